"""From features and pixels to numbers: how far generated images are from real ones, and how close to copies.

On features of Inception: the Fréchet distance (FID), its extrapolation to infinitely many images, the kernel
distance (KID), the inception score, precision and recall. On pixels, without any network: the sliced Wasserstein
distance and the nearest training images. Features are arrays or CPU tensors [N, D]; images are uint8 arrays or CPU
tensors [N, C, H, W] with one or three channels. Most numbers depend on N, and compare only at equal N.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F

MIN_EXTRAPOLATED_FEATURES = 100
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
SCORE_SPLITS = 10
MANIFOLD_K = 3

PATCH_SIZE = 7
PATCHES_PER_IMAGE = 128
NUM_PROJECTIONS = 512
COARSEST_LEVEL = 16

# At 32 directions a chunk of 4000 images takes 66 MB per side.
_PROJECTIONS_PER_CHUNK = 32
_IMAGES_PER_PYRAMID = 50
_CACHED_PROJECTION_BYTES = 3 * 2**28
_SEARCHED_AT_ONCE = 512
_VALUES_PER_PRODUCT = 1024
_VALUES_COMPARED_AT_ONCE = 2**24


def _check_images(images: np.ndarray | torch.Tensor, role: str) -> None:
    dtype = str(images.dtype).removeprefix("torch.")
    if dtype != "uint8" or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"The {role} images must be uint8 of shape [N, 1 or 3, H, W], "
            f"but they are {dtype} of shape {list(images.shape)}."
        )


def _as_tensor(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    # A copy, because a read-only memory map cannot back a tensor.
    return images if isinstance(images, torch.Tensor) else torch.from_numpy(np.array(images))


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


# Fréchet inception distance


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


# Kernel distance, inception score, precision and recall


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


def inception_score(logits: np.ndarray | torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Inception score: exp of the mean KL(p(y|x) ‖ p(y)), as mean and standard deviation over ten random parts.

    Section 4 of arXiv 1606.03498, by torch-fidelity, from the logits [N, C] of p(y|x). It lies between 1 and C,
    looks at no real image, and is biased by N: compare equal numbers of images only.

    Raises ValueError below ten images or for values that are not finite, RuntimeError when torch-fidelity is missing.
    """
    logits = _checked_features(logits, "logits of the generated images", SCORE_SPLITS)
    score = _library_metric("metric_isc", "isc_features_to_metric", "The inception score", "is")
    out = score(torch.from_numpy(logits.astype(np.float64)), splits=SCORE_SPLITS, shuffle=True, rng_seed=seed)
    return out["inception_score_mean"], out["inception_score_std"]


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


# Nearest training images


class Neighbours(NamedTuple):
    """What `NearestNeighbours.compare` finds; distances are RMS pixel differences in grey levels of 0 to 255."""

    distance: float  # median over generated images, to the nearest training image
    distance_real: float  # median over training images, to the nearest other training image
    authenticity: float  # share of generated images that are no near copies


class NearestNeighbours:
    """How close generated images are to images of the training set, which shows memorisation.

    The distance of two images is the root mean square difference of their values. A generated image is authentic
    when it is farther from its nearest training image than that one is from its own nearest other training image
    (arXiv 2102.08921). Of copies none is; of new images from the same source a third to nearly all are, depending
    on the source, so the share needs that of held-out images beside it.

    The search is exact: float32 products with a bound on their rounding leave a few candidates, which are
    compared in whole numbers. The distances within the training set are computed once, at the first comparison.
    """

    def __init__(self, training: np.ndarray | torch.Tensor, device: torch.device | str = "cpu") -> None:
        """Keep `training`, uint8 [M, C, R, R] with M >= 2; raises ValueError when it is anything else."""
        _check_images(training, "training")
        if len(training) < 2:
            raise ValueError(f"Nearest neighbours need at least two training images, but there are {len(training)}.")
        self.shape = tuple(training.shape[1:])
        self._training = _as_tensor(training).flatten(1).to(device)  # uint8 [M, V]
        # Distances are the same from any origin, and from the mean image the products are smallest.
        self._origin = (self._training.sum(dim=0) / len(training)).round()  # float [V]
        self._norms = torch.cat([self._squared_norms(part) for part in self._training.split(_SEARCHED_AT_ONCE)])  # [M]

    @torch.inference_mode()
    def compare(self, generated: np.ndarray | torch.Tensor) -> Neighbours:
        """Of `generated`, uint8 [N, C, R, R]; raises ValueError when it is empty or of another shape or type."""
        _check_images(generated, "generated")
        if tuple(generated.shape[1:]) != self.shape or len(generated) == 0:
            raise ValueError(
                f"Nearest neighbours need generated images [N, {', '.join(map(str, self.shape))}] like those of the "
                f"training set, but they are {list(generated.shape)}."
            )
        squared, nearest = self._search(_as_tensor(generated).flatten(1))
        return Neighbours(
            distance=self._median_rms(squared),
            distance_real=self._median_rms(self._own_squared),
            authenticity=(squared > self._own_squared[nearest]).double().mean().item(),
        )

    @cached_property
    def _own_squared(self) -> torch.Tensor:
        return self._search(self._training, among_themselves=True)[0]  # int64 [M]

    def _median_rms(self, squared: torch.Tensor) -> float:
        return float(np.median(np.sqrt(squared.cpu().numpy() / self._training.shape[1])))

    def _centred(self, images: torch.Tensor, values: slice = slice(None)) -> torch.Tensor:
        # Whole numbers up to 255 are exact in TF32 and bfloat16 too, to which a process may have set its products.
        return images[:, values].float() - self._origin[values]

    def _squared_norms(self, images: torch.Tensor) -> torch.Tensor:
        return self._centred(images).square().sum(dim=1, dtype=torch.float64)

    def _search(self, images: torch.Tensor, among_themselves: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        # Sum of squared differences to the nearest training image and its index, int64 [N] each.
        found = []
        for start in range(0, len(images), _SEARCHED_AT_ONCE):
            batch = images[start : start + _SEARCHED_AT_ONCE].to(self._origin.device)  # [B, V]
            approximate, error = self._approximate(batch)  # [B, M], [B, 1]
            if among_themselves:
                approximate.diagonal(start).fill_(torch.inf)
            # Only these can be nearest when every distance is wrong by its error at most.
            near = approximate <= approximate.amin(dim=1, keepdim=True) + 2 * error  # [B, M]
            found.append(self._nearest_of(batch, near))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _approximate(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        products = torch.zeros(len(batch), len(self._training), device=batch.device)  # [B, M]
        # Short sums keep the bound on their rounding low.
        blocks = [slice(k, k + _VALUES_PER_PRODUCT) for k in range(0, batch.shape[1], _VALUES_PER_PRODUCT)]
        for values in blocks:
            products.addmm_(self._centred(batch, values), self._centred(self._training, values).T)
        norms = self._squared_norms(batch)[:, None]  # [B, 1]
        # The rounding of a sum of n products is below n units of its sum of sizes, which is at most (‖a‖² + ‖b‖²) / 2.
        # A unit is taken twice as large as float32 has it, because some hardware cuts off instead of rounding.
        units = (_VALUES_PER_PRODUCT + len(blocks) + 8) * torch.finfo(torch.float32).eps
        error = units * (norms + self._norms.max())
        return norms.float() + self._norms.float() - 2 * products, error.float()

    def _nearest_of(self, batch: torch.Tensor, near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(self._training)
        best = torch.full((len(batch),), torch.iinfo(torch.int64).max, device=batch.device)
        for pairs in near.nonzero().split(max(1, _VALUES_COMPARED_AT_ONCE // batch.shape[1])):  # [p, 2]
            row, column = pairs.unbind(1)
            squared = (batch[row].int() - self._training[column].int()).square().sum(dim=1)  # int64 [p]
            # Distance first, index second, in one number: of equally near images the first counts.
            best.scatter_reduce_(0, row, squared * count + column, "amin")
        return best // count, best % count


# Sliced Wasserstein distance


def swd_levels(resolution: int) -> tuple[int, ...]:
    """Sizes of the Laplacian pyramid of a square image, halved down to 16 while even: (64, 32, 16) for 64.

    Raises ValueError when `resolution` is smaller than a patch of 7 pixels.
    """
    if resolution < PATCH_SIZE:
        raise ValueError(
            f"The sliced Wasserstein distance needs images of at least {PATCH_SIZE} pixels, not {resolution}."
        )
    levels = [resolution]
    while levels[-1] % 2 == 0 and levels[-1] // 2 >= COARSEST_LEVEL:
        levels.append(levels[-1] // 2)
    return tuple(levels)


def _blur_matrix(size: int) -> torch.Tensor:
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    reached = torch.arange(size)[:, None] + torch.arange(-2, 3)  # [size, 5]
    # Borders mirror about the outermost pixel, which is not repeated.
    mirrored = (size - 1) - ((size - 1) - reached.abs()).abs()
    return torch.zeros(size, size).scatter_add_(1, mirrored, taps.expand(size, 5))


def laplacian_pyramid(images: torch.Tensor, levels: tuple[int, ...]) -> list[torch.Tensor]:
    """Band-pass images [B, C, s, s] for every s of `levels`, finest first; the last is the low-pass rest.

    Blur by the 5-tap kernel [1, 4, 6, 4, 1]/16 with mirrored borders, halve, and subtract what doubling
    brings back (Burt and Adelson 1983), as in arXiv 1710.10196, section 5.

    Args:
        images: float [B, C, levels[0], levels[0]].
        levels: sizes, each half the one before, from `swd_levels`.
    """
    pyramid = []
    for size in levels[:-1]:
        blur = _blur_matrix(size).to(images)  # [s, s]
        halve = blur[::2]  # [s / 2, s]
        # Every other pixel of the doubled row is zero before the blur, which would take half of its mass.
        double = 2 * blur[:, ::2]  # [s, s / 2]
        low = halve @ images @ halve.T  # [B, C, s / 2, s / 2]
        pyramid.append(images - double @ low @ double.T)
        images = low
    return [*pyramid, images]


def sorted_projections(descriptors: torch.Tensor, directions: torch.Tensor) -> Iterator[torch.Tensor]:
    """Projections of descriptors [n, V] on unit directions [K, V], sorted along each: in chunks [k, n] of K rows."""
    for chunk in directions.split(_PROJECTIONS_PER_CHUNK):
        projections = chunk @ descriptors.T  # [k, n]
        if projections.device.type == "cpu":
            # Sorts single-precision rows several times faster than torch does on a CPU.
            projections.numpy().sort(axis=1)
            yield projections
        else:
            yield projections.sort(dim=1).values


def projected_distance(first: Iterable[torch.Tensor], second: Iterable[torch.Tensor]) -> float:
    """Mean over directions of the Wasserstein-1 distance, from `sorted_projections` of two sets of equal size.

    In one dimension it is the mean absolute difference of the sorted values. The chunks of `second` are overwritten.
    """
    total, num_directions = 0.0, 0
    for on_first, on_second in zip(first, second, strict=True):
        # Long rows are averaged by pairwise sums in float32, and the few row means are added in float64.
        total += on_second.sub_(on_first).abs_().mean(dim=1).double().sum().item()
        num_directions += len(on_first)
    return total / num_directions


class SlicedWasserstein:
    """Sliced Wasserstein distance to one set of real images, for many sets of generated ones.

    Section 5 of arXiv 1710.10196: per level of a Laplacian pyramid, 128 random 7x7 patches of every image,
    each set normalised per colour channel by its own mean and standard deviation, and the mean absolute
    difference of the sorted projections on 512 random unit directions, times 1000. The random choices depend
    on `seed`, the resolution and the numbers of images alone, and image k of either set gives patches from
    the same places: equal sets are at distance 0, and every generated set meets the same real descriptors.

    A colour set takes 1 GB at 1000 images and, with nothing kept between sets, 1 GB at 4000.
    """

    def __init__(
        self,
        real: np.ndarray | torch.Tensor,  # uint8 [M, C, R, R], M >= num_images
        num_images: int,  # images of every generated set
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Draw `num_images` real images, patch places and directions.

        Raises ValueError when the images are not square uint8 [M, 1 or 3, R, R] or fewer than `num_images`.
        """
        _check_images(real, "real")
        count, channels, height, width = real.shape
        if height != width:
            raise ValueError(f"The real images must be square, but they are {height} by {width}.")
        if not 0 < num_images <= count:
            raise ValueError(
                f"The sliced Wasserstein distance compares equal numbers of images, but {num_images} generated "
                f"ones are asked for and {count} real ones given: choose --num_images from 1 to {count}."
            )
        self.levels = swd_levels(height)
        self.num_images = num_images
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(count, generator=generator)[:num_images].sort().values
        if not isinstance(real, torch.Tensor):
            chosen = chosen.numpy()
        self._real = real if num_images == count else real[chosen]
        self._corners = [
            torch.randint(size - PATCH_SIZE + 1, (num_images, PATCHES_PER_IMAGE, 2), generator=generator)
            for size in self.levels
        ]  # per level [N, P, 2], top and left of every patch
        self._directions = []
        for _ in self.levels:
            normal = torch.randn(NUM_PROJECTIONS, channels * PATCH_SIZE**2, generator=generator)
            self._directions.append(F.normalize(normal, dim=1).to(self.device))  # [K, C * 49]
        # Up to about 1000 images the sorted projections of the real side are kept, beyond they are made again.
        kept_bytes = 4 * len(self.levels) * NUM_PROJECTIONS * num_images * PATCHES_PER_IMAGE
        self._keep_sorted_real = kept_bytes <= _CACHED_PROJECTION_BYTES
        self._sorted_real: dict[int, list[torch.Tensor]] = {}

    @torch.inference_mode()
    def distance(self, fake: np.ndarray | torch.Tensor) -> dict[int, float]:
        """Distance per level, {64: ..., 32: ..., 16: ...} for images of 64 pixels, in thousandths.

        Raises ValueError when `fake` is not uint8 [num_images, C, R, R] like the real images.
        """
        _check_images(fake, "generated")
        if tuple(fake.shape) != tuple(self._real.shape):
            raise ValueError(
                f"The sliced Wasserstein distance compares sets of equal shape, but the generated images are "
                f"{list(fake.shape)} and the real ones {list(self._real.shape)}."
            )
        return {size: self._level_distance(fake, index) for index, size in enumerate(self.levels)}

    def _level_distance(self, fake: np.ndarray | torch.Tensor, level: int) -> float:
        real_chunks = self._sorted_real.get(level)
        if real_chunks is None:
            real_chunks = self._sorted_projections(self._real, level)
            if self._keep_sorted_real:
                real_chunks = self._sorted_real[level] = list(real_chunks)
        return 1000 * projected_distance(real_chunks, self._sorted_projections(fake, level))

    def _sorted_projections(self, images: np.ndarray | torch.Tensor, level: int) -> Iterator[torch.Tensor]:
        return sorted_projections(self._descriptors(images, level), self._directions[level])

    def _descriptors(self, images: np.ndarray | torch.Tensor, level: int) -> torch.Tensor:
        descriptors = torch.empty(
            self.num_images, PATCHES_PER_IMAGE, images.shape[1], PATCH_SIZE, PATCH_SIZE, device=self.device
        )
        for start in range(0, self.num_images, _IMAGES_PER_PYRAMID):
            batch = slice(start, start + _IMAGES_PER_PYRAMID)
            pixels = _as_tensor(images[batch]).to(self.device).float()
            # The band of a level is what the next one leaves, so the pyramid goes one level further.
            band = laplacian_pyramid(pixels, self.levels[: level + 2])[level]  # [B, C, s, s]
            windows = band.unfold(2, PATCH_SIZE, 1).unfold(3, PATCH_SIZE, 1)  # [B, C, s - 6, s - 6, 7, 7]
            top, left = self._corners[level][batch].to(self.device).unbind(-1)  # [B, P]
            image = torch.arange(len(band), device=self.device)[:, None]  # [B, 1]
            descriptors[batch] = windows[image, :, top, left]  # [B, P, C, 7, 7]
        std, mean = torch.std_mean(descriptors, dim=(0, 1, 3, 4), correction=0, keepdim=True)
        # A constant channel has no scale and stays zero.
        std = torch.where(std > 0, std, torch.ones_like(std))
        return descriptors.sub_(mean).div_(std).flatten(2).flatten(0, 1)  # [N * P, C * 49]


def sliced_wasserstein(
    real: np.ndarray | torch.Tensor,  # uint8 [M, C, R, R], M >= N
    fake: np.ndarray | torch.Tensor,  # uint8 [N, C, R, R]
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """Distance per level of one generated set; see `SlicedWasserstein`, which is for several."""
    return SlicedWasserstein(real, len(fake), seed, device).distance(fake)
