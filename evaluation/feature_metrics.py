"""From features of Inception, or of another classifier, to numbers: how far generated images are from real ones.

The Fréchet distance (FID), its extrapolation to infinitely many images, the kernel distance (KID), the inception score,
precision and recall. Features are arrays or CPU tensors [N, D]. Most numbers depend on N, and compare only at equal N.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch

MIN_EXTRAPOLATED_FEATURES = 100
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
SCORE_SPLITS = 10
MANIFOLD_K = 3


def _checked_features(features: np.ndarray | torch.Tensor, role: str, at_least: int) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"The {role} must have shape [N, D], but they have {list(features.shape)}.")
    if len(features) < at_least:
        raise ValueError(f"The {role} are of {len(features)} images, but at least {at_least} are needed: take more.")
    if not np.isfinite(features).all():
        raise ValueError(f"The {role} hold values that are not finite.")
    return features


def _checked_pair(features, reference, at_least: int) -> tuple[torch.Tensor, torch.Tensor]:
    features = _checked_features(features, "features of the generated images", at_least)
    reference = _checked_features(reference, "features of the reference images", at_least)
    widths = features.shape[1], reference.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"Features of one network are compared, not of {widths[0]} values with {widths[1]}.")
    return torch.from_numpy(features.astype(np.float64)), torch.from_numpy(reference.astype(np.float64))


def _library_metric(module: str, function: str, metric: str, flag: str) -> Callable:
    try:
        return getattr(importlib.import_module(f"torch_fidelity.{module}"), function)
    except (ImportError, AttributeError) as error:
        # Older versions lack precision and recall, and the way out is the same.
        raise RuntimeError(
            f"{metric} needs the package torch-fidelity: run `pip install 'torch-fidelity>=0.4'` or leave {flag} "
            f"out of --metrics."
        ) from error


# Fréchet distance


class FeatureMoments:
    """Mean and covariance of a stream of feature vectors in float64, without keeping the features.

    Batches are merged by their centred sums (Chan, Golub and LeVeque 1979), so a mean that is large against
    the spread costs no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    def update(self, features: np.ndarray | torch.Tensor) -> None:
        """Add the rows of `features` [B, D]; raises ValueError when D changes or a feature is not finite."""
        if isinstance(features, torch.Tensor):
            features = features.detach().cpu().numpy()
        batch = np.asarray(features, dtype=np.float64)
        if batch.ndim != 2 or (self._mean is not None and batch.shape[1] != len(self._mean)):
            width = "D" if self._mean is None else len(self._mean)
            raise ValueError(f"Features must have shape [B, {width}], but they have {list(batch.shape)}.")
        if not np.isfinite(batch).all():
            raise ValueError("The features hold values that are not finite, so they have no moments.")
        if len(batch) == 0:
            return
        if self._mean is None:
            self._mean = np.zeros(batch.shape[1])
            self._scatter = np.zeros((batch.shape[1], batch.shape[1]))
        total = self.n + len(batch)
        batch_mean = batch.mean(axis=0)
        centred = batch - batch_mean
        shift = batch_mean - self._mean
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.n * len(batch) / total)
        self._mean += shift * (len(batch) / total)
        self.n = total

    @property
    def mean(self) -> np.ndarray:
        """Mean [D]; raises ValueError before the first feature."""
        if self.n < 1:
            raise ValueError("The mean of features needs at least one image.")
        return self._mean.copy()

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance [D, D] (divided by n - 1); raises ValueError below two features."""
        if self.n < 2:
            raise ValueError(f"The covariance of features needs at least two images, but there are {self.n}.")
        return self._scatter / (self.n - 1)


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians, ‖μ1 - μ2‖² + tr Σ1 + tr Σ2 - 2 tr (Σ1^½ Σ2 Σ1^½)^½.

    Equation 6 of arXiv 1706.08500. With Σ = F Fᵀ by Cholesky the last trace is the sum of the singular values of
    G = F1ᵀ F2, the roots of the eigenvalues of G Gᵀ, which has no more rows than the lower of the two ranks. So
    no matrix square root is taken, and no zero eigenvalues come in where there are fewer images than features.

    Means are [D], covariances symmetric positive semi-definite [D, D]. Raises ValueError when shapes differ, a value
    is not finite, or a covariance has a truly negative eigenvalue.
    """
    dim = np.size(mean_1)
    return _distance_by_factors(*_mean_and_factor(mean_1, cov_1, dim), *_mean_and_factor(mean_2, cov_2, dim))


def _mean_and_factor(mean: np.ndarray, cov: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    mean, cov = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    if mean.shape != (dim,) or cov.shape != (dim, dim):
        raise ValueError(
            f"Moments of {dim} features are a mean [{dim}] and a covariance [{dim}, {dim}], "
            f"but the shapes are {list(mean.shape)} and {list(cov.shape)}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError("The moments of the features hold values that are not finite.")
    return mean, _covariance_factor(cov)


def _distance_by_factors(mean_1: np.ndarray, factor_1: np.ndarray, mean_2: np.ndarray, factor_2: np.ndarray) -> float:
    traces = np.sum(factor_1**2) + np.sum(factor_2**2) - 2 * _nuclear_norm(factor_1.T @ factor_2)
    # Equal Gaussians leave the rounding of the traces, of either sign.
    return max(0.0, float(np.sum((mean_1 - mean_2) ** 2) + traces))


def _nuclear_norm(matrix: np.ndarray) -> float:
    thin = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    gram = thin @ thin.T
    scale = np.sqrt(np.diagonal(gram))
    scale[scale == 0] = 1
    if scipy.linalg.lapack.dpstrf(gram / np.outer(scale, scale), lower=1)[2] < len(thin):
        # The rounding of a zero eigenvalue has a root that is not small, and singular values come without roots.
        return np.linalg.svd(thin, compute_uv=False).sum()
    # Columns of factors fall in size, and of a matrix that falls in size eigenvalues below 1e-16 are precise too.
    return np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()


def _covariance_factor(cov: np.ndarray) -> np.ndarray:
    # F [D, rank] with F Fᵀ = cov, in a fraction of the time of the eigenvectors.
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
    order = pivots - 1
    lower = np.tril(lower)[:, :rank]  # [D, rank]
    # Pivoting stops when no variance is left, and what a covariance then still holds is rounding.
    rest = cov[np.ix_(order[rank:], order[rank:])] - lower[rank:] @ lower[rank:].T  # [D - rank, D - rank]
    tolerance = 4 * len(cov) * np.finfo(np.float64).eps * np.diagonal(cov).max(initial=0)
    if np.abs(rest).max(initial=0) > tolerance:
        # No covariance, or a rounded one, as a float32 file of fewer images than features has it.
        return _spectral_factor(cov)
    factor = np.empty_like(lower)
    factor[order] = lower
    return factor


def _spectral_factor(cov: np.ndarray) -> np.ndarray:
    eigenvalues, vectors = np.linalg.eigh(cov)
    largest = np.abs(eigenvalues).max()
    # Rounding of a float32 covariance stays below this; a lower eigenvalue means the matrix is no covariance.
    if eigenvalues[0] < -1e-6 * largest:
        raise ValueError(
            f"A covariance of features has the eigenvalue {eigenvalues[0]:.3g} beside the largest {largest:.3g}, "
            f"so it is not positive semi-definite."
        )
    # Below the rounding of the decomposition an eigenvalue is noise, whose square root would not be small.
    keep = eigenvalues > len(cov) * np.finfo(np.float64).eps * largest
    return (vectors[:, keep] * np.sqrt(eigenvalues[keep]))[:, ::-1]  # [D, rank]


class FIDInfinity(NamedTuple):
    """FID extrapolated to infinitely many generated images, and the points that it was extrapolated from."""

    value: float
    sizes: np.ndarray  # int [K], generated images of each point
    fids: np.ndarray  # float [K]


def random_subsets(count: int, num_sizes: int = 15, seed: int = 0) -> list[np.ndarray]:
    """Indices of `num_sizes` random subsets of `count` images, of sizes evenly spaced from count / 10 to count."""
    generator = np.random.default_rng(seed)
    sizes = np.linspace(count // 10, count, num_sizes).round().astype(int)
    return [generator.permutation(count)[:size] for size in sizes]


def fid_infinity(
    features: np.ndarray | torch.Tensor,  # [N, D] of generated images, N >= 100
    mean: np.ndarray,  # [D] of the reference
    cov: np.ndarray,  # [D, D] of the reference
    seed: int = 0,
    num_sizes: int = 15,  # two or more
) -> FIDInfinity:
    """FID at infinitely many generated images: the straight line of FID over 1/n, taken at 1/n = 0.

    Algorithm 1 of arXiv 1911.07023: FID of n images exceeds its limit by about a constant over n, a constant
    that differs between models, and the line through random subsets of n = N/10 to N images removes it. What
    goes is the bias of the number of generated images; that of the reference stays, whose moments are fixed,
    and so does the chance in which N images were generated. It is arithmetic on features of any network, and
    may fall slightly below zero.

    Raises ValueError for fewer than 100 features, values that are not finite, or moments of another width or kind.
    """
    features = _checked_features(features, "features of the generated images", MIN_EXTRAPOLATED_FEATURES)
    dim = features.shape[1]
    mean, factor = _mean_and_factor(mean, cov, dim)
    subsets = random_subsets(len(features), num_sizes, seed)
    fids = []
    for subset in subsets:
        drawn = features[subset].astype(np.float64)  # [n, D]
        drawn_mean = drawn.mean(axis=0)
        root = (drawn - drawn_mean).T / np.sqrt(len(drawn) - 1)  # [D, n]
        # The centred features are a factor of their covariance, the thinner one up to n = D.
        drawn_factor = root if len(drawn) <= dim else _covariance_factor(root @ root.T)
        fids.append(_distance_by_factors(drawn_mean, drawn_factor, mean, factor))
    sizes = np.array([len(subset) for subset in subsets])
    _, intercept = np.polyfit(1 / sizes, fids, 1)
    return FIDInfinity(float(intercept), sizes, np.array(fids))


# Kernel distance, inception and class score, precision and recall


def kernel_distance(
    features: np.ndarray | torch.Tensor,  # [N, D] of generated images
    reference: np.ndarray | torch.Tensor,  # [M, D] of real images
    seed: int = 0,
) -> tuple[float, float]:
    """KID: mean of the unbiased squared maximum mean discrepancy over random subsets, and its standard deviation.

    Section 4 of arXiv 1801.01401, by torch-fidelity: kernel (x·y / D + 1)³, 100 pairs of subsets of
    min(1000, N, M) images each, in float64. The mean has no bias at any N, and is slightly negative at times
    for equal distributions. The deviation is the spread between subsets of these same images: it says how far
    one subset can be trusted. It is no standard error of the mean, as the subsets overlap, and with min(N, M)
    up to 1000 one side is the same in every subset; where both are, one pair says all and the deviation is 0.

    Raises ValueError below two images on a side, for widths that differ and for values that are not finite, and
    RuntimeError when torch-fidelity is missing.
    """
    features, reference = _checked_pair(features, reference, at_least=2)
    kid = _library_metric("metric_kid", "kid_features_to_metric", "KID", "kid")
    size = min(KID_SUBSET_SIZE, len(features), len(reference))
    subsets = 1 if size == max(len(features), len(reference)) else KID_SUBSETS
    out = kid(features, reference, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False)
    return out["kernel_inception_distance_mean"], out["kernel_inception_distance_std"]


def inception_score(
    logits: np.ndarray | torch.Tensor,  # [N, C]
    seed: int = 0,
    metric: str = "is",  # what `--metrics` calls it: "is", or "cs" of another classifier
) -> tuple[float, float]:
    """Inception score: exp of the mean KL(p(y|x) ‖ p(y)), as mean and standard deviation over ten random parts.

    Section 4 of arXiv 1606.03498, by torch-fidelity, from the logits of p(y|x). It lies between 1, where all images
    look alike to the classifier, and C, where it is sure of each and finds every class as often; it looks at no real
    image, and is biased by N: compare equal numbers of images only. Of another classifier than Inception it is called
    the class score.

    Raises ValueError below ten images or for values that are not finite, RuntimeError when torch-fidelity is missing.
    """
    logits = _checked_features(logits, "logits of the generated images", SCORE_SPLITS)
    score = _library_metric(
        "metric_isc", "isc_features_to_metric", "The class score" if metric == "cs" else "The inception score", metric
    )
    out = score(torch.from_numpy(logits.astype(np.float64)), splits=SCORE_SPLITS, shuffle=True, rng_seed=seed)
    return out["inception_score_mean"], out["inception_score_std"]


def accuracy(logits: np.ndarray | torch.Tensor, labels: np.ndarray | torch.Tensor) -> float:
    """The share of images whose likeliest class, by logits [N, C], is their label [N].

    Raises ValueError for values that are not finite, and for another number of labels.
    """
    logits = _checked_features(logits, "logits of the images", 1)
    labels = np.asarray(labels)
    if labels.shape != (len(logits),):
        raise ValueError(f"{len(logits)} images need a label each, not {list(labels.shape)}.")
    return float((logits.argmax(1) == labels).mean())


def precision_recall(
    features: np.ndarray | torch.Tensor,  # [N, D] of generated images
    reference: np.ndarray | torch.Tensor,  # [M, D] of real images
) -> tuple[float, float]:
    """Share of generated images within the real manifold (precision), and of real ones in the generated (recall).

    arXiv 1904.06991, by torch-fidelity: a manifold is the union of balls about its images, each reaching to
    the third nearest other image of the same set. Both depend on N and M.

    Raises ValueError for fewer than four images on a side, widths that differ or values that are not finite, and
    RuntimeError when torch-fidelity is missing.
    """
    # Distances come from ‖x‖² + ‖y‖² - 2 x·y, of which float32 leaves little between images that nearly agree.
    features, reference = _checked_pair(features, reference, at_least=MANIFOLD_K + 1)
    prc = _library_metric("metric_prc", "prc_features_to_metric", "Precision and recall", "pr")
    # All distances at once would need 8 N M bytes.
    out = prc(features, reference, prc_neighborhood=MANIFOLD_K, prc_batch_size=1000, save_cpu_ram=True, verbose=False)
    return out["precision"], out["recall"]
