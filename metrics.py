"""How far generated images are from real ones: FID and the sliced Wasserstein distance.

Images are uint8 arrays or tensors [N, C, H, W] with one or three channels. Both distances depend on the
number of images, so values at different N are never comparable. FID needs the Inception weights of
pytorch-fid; the sliced Wasserstein distance needs nothing but the images.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import weights_fingerprint
from safe_write import replacing

PATCH_SIZE = 7
PATCHES_PER_IMAGE = 128
NUM_PROJECTIONS = 512
COARSEST_LEVEL = 16

# At 32 directions a chunk of 4000 images takes 66 MB per side.
_PROJECTIONS_PER_CHUNK = 32
_IMAGES_PER_PYRAMID = 50
_CACHED_PROJECTION_BYTES = 3 * 2**28


def _check_images(images: np.ndarray | torch.Tensor, role: str) -> None:
    dtype = str(images.dtype).removeprefix("torch.")
    if dtype != "uint8" or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"The {role} images must be uint8 of shape [N, 1 or 3, H, W], "
            f"but they are {dtype} of shape {list(images.shape)}."
        )


def _float_batch(images: np.ndarray | torch.Tensor, index: slice, device: torch.device | str) -> torch.Tensor:
    batch = images[index]
    if not isinstance(batch, torch.Tensor):
        # A copy, because a read-only memory map cannot back a tensor.
        batch = torch.from_numpy(np.array(batch))
    return batch.to(device).float()


# Fréchet inception distance


def load_inception(weights: str | Path | None, device: torch.device | str) -> nn.Module:
    """The Inception network of FID, mapping [B, 3, H, W] in [0, 1] to a list with one [B, 2048, 1, 1] tensor.

    Args:
        weights: state-dict file of pytorch-fid (`pt_inception-2015-12-05-6726825d.pth`), read without network
            access; None takes the copy in the torch hub cache, downloading it when it is not there.
        device: where the network goes; it is in evaluation mode and needs no gradient.

    Raises:
        FileNotFoundError: there is no file `weights`.
        ValueError: `weights` is damaged or holds something else.
        RuntimeError: pytorch-fid is not installed, or the download failed.
    """
    try:
        import pytorch_fid.inception as library
    except ImportError as error:
        raise RuntimeError(
            "FID needs the package pytorch-fid: run `pip install pytorch-fid` or use --metrics swd."
        ) from error

    if weights is None:
        state = _download_inception_weights(library.FID_WEIGHTS_URL)
    else:
        state = _read_inception_weights(Path(weights))

    # The constructor always asks this function for its weights, so handing it ours is the one way to the same
    # network without a second download.
    fetch_weights = library.load_state_dict_from_url
    library.load_state_dict_from_url = lambda *args, **kwargs: state
    try:
        inception = library.InceptionV3(resize_input=True, normalize_input=True)
    except RuntimeError as error:
        raise ValueError(
            f"{weights or library.FID_WEIGHTS_URL} does not hold the Inception weights of pytorch-fid: "
            f"get them from {library.FID_WEIGHTS_URL} or use --metrics swd."
        ) from error
    finally:
        library.load_state_dict_from_url = fetch_weights
    return inception.eval().to(device)


def _download_inception_weights(url: str) -> Mapping[str, torch.Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:
        # Network, disk and unpickling raise errors of many types, and the way out is the same.
        raise RuntimeError(
            f"FID needs the Inception weights, which could not be downloaded from {url} "
            f"({type(error).__name__}): pass --inception_weights FILE or use --metrics swd."
        ) from error


def _read_inception_weights(file: Path) -> Mapping[str, torch.Tensor]:
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no Inception weights file {file}: correct --inception_weights or use --metrics swd."
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged or foreign file fails in as many ways as it has bytes.
        raise ValueError(
            f"The Inception weights file {file} cannot be read as a torch state dict "
            f"({type(error).__name__}): fetch it again or use --metrics swd."
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(
            f"{file} is not a state dict of named tensors: "
            f"pass the weights file of pytorch-fid to --inception_weights or use --metrics swd."
        )
    return state


def inception_fingerprint(inception: nn.Module) -> str:
    """16 hexadecimal digits that name the weights of `inception`, equal on every device."""
    return weights_fingerprint(inception.state_dict())


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


@torch.inference_mode()
def inception_features(
    images: np.ndarray | torch.Tensor,  # uint8 [N, C, H, W], C = 1 is repeated to 3
    inception: nn.Module,  # from load_inception
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> FeatureMoments:
    """Moments of the pool3 features of `images`, which enter as in pytorch-fid: [0, 1], resized to 299.

    Raises ValueError when the images are not uint8 [N, 1 or 3, H, W].
    """
    _check_images(images, "evaluated")
    moments = FeatureMoments()
    for start in range(0, len(images), batch_size):
        batch = _float_batch(images, slice(start, start + batch_size), device) / 255  # [B, C, H, W]
        batch = batch.expand(-1, 3, -1, -1)  # [B, 3, H, W]
        moments.update(inception(batch)[0].flatten(1))  # [B, 2048]
    return moments


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians, ‖μ1 - μ2‖² + tr Σ1 + tr Σ2 - 2 tr (Σ1^½ Σ2 Σ1^½)^½.

    Equation 6 of arXiv 1706.08500. With Σ = F Fᵀ the last trace is the sum of the singular values of
    F1ᵀ F2, the square roots of the eigenvalues of Σ1^½ Σ2 Σ1^½. Taking them without squaring keeps the zero
    eigenvalues of a covariance of fewer images than features at 1e-16 instead of their root 1e-8.

    Args:
        mean_1, mean_2: [D].
        cov_1, cov_2: symmetric positive semi-definite [D, D].

    Raises:
        ValueError: shapes differ, a value is not finite, or a covariance has a truly negative eigenvalue.
    """
    mean_1, mean_2 = np.asarray(mean_1, dtype=np.float64), np.asarray(mean_2, dtype=np.float64)
    cov_1, cov_2 = np.asarray(cov_1, dtype=np.float64), np.asarray(cov_2, dtype=np.float64)
    if mean_1.ndim != 1 or mean_1.shape != mean_2.shape or not cov_1.shape == cov_2.shape == mean_1.shape * 2:
        raise ValueError(
            f"Two means [D] and two covariances [D, D] are needed, but their shapes are {list(mean_1.shape)}, "
            f"{list(mean_2.shape)}, {list(cov_1.shape)} and {list(cov_2.shape)}."
        )
    if not all(np.isfinite(array).all() for array in (mean_1, mean_2, cov_1, cov_2)):
        raise ValueError("The moments of the features hold values that are not finite.")
    product = _covariance_factor(cov_1).T @ _covariance_factor(cov_2)  # [rank 1, rank 2]
    root_trace = np.linalg.svd(product, compute_uv=False).sum()
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2) - 2 * root_trace
    # Equal Gaussians leave the rounding of the traces, of either sign.
    return max(0.0, float(distance))


def _covariance_factor(cov: np.ndarray) -> np.ndarray:
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
    return vectors[:, keep] * np.sqrt(eigenvalues[keep])  # [D, rank]


def fid_reference_moments(
    images: np.ndarray | torch.Tensor,  # uint8 [N, C, H, W]
    fingerprint: str,  # of the images
    inception: nn.Module,
    inception_name: str,  # from inception_fingerprint
    cache_dir: str | Path,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Mean [2048] and covariance [2048, 2048] of the real images, computed once and kept in `cache_dir`.

    The file `fid_reference_{fingerprint}_{inception_name}.npz` holds `mu`, `sigma` (the names
    pytorch-fid reads) and `n`.

    Raises:
        ValueError: the cached file is damaged or counts another number of images.
    """
    file = Path(cache_dir) / f"fid_reference_{fingerprint}_{inception_name}.npz"
    if file.exists():
        try:
            with np.load(file, allow_pickle=False) as cached:
                mean, cov, n = cached["mu"], cached["sigma"], int(cached["n"])
        except Exception as error:
            # A damaged archive fails in zipfile, zlib or numpy, and the way out is the same.
            raise ValueError(
                f"The FID reference {file} is damaged ({type(error).__name__}): delete it to make it again."
            ) from error
        if n != len(images):
            raise ValueError(
                f"The FID reference {file} is of {n} images but {len(images)} are given: delete it to compute it again."
            )
        return mean, cov

    moments = inception_features(images, inception, batch_size, device)
    with replacing(file) as temporary:
        np.savez(temporary, mu=moments.mean, sigma=moments.cov, n=moments.n)
    return moments.mean, moments.cov


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
        total = 0.0
        for on_real, on_fake in zip(real_chunks, self._sorted_projections(fake, level), strict=True):
            # Long rows are averaged by pairwise sums in float32, and the few row means are added in float64.
            total += on_fake.sub_(on_real).abs_().mean(dim=1).double().sum().item()
        return 1000 * total / NUM_PROJECTIONS

    def _sorted_projections(self, images: np.ndarray | torch.Tensor, level: int) -> Iterator[torch.Tensor]:
        descriptors = self._descriptors(images, level)  # [N * P, C * 49]
        for directions in self._directions[level].split(_PROJECTIONS_PER_CHUNK):
            projections = directions @ descriptors.T  # [k, N * P]
            if projections.device.type == "cpu":
                # Sorts single-precision rows several times faster than torch does on a CPU.
                projections.numpy().sort(axis=1)
                yield projections
            else:
                yield projections.sort(dim=1).values

    def _descriptors(self, images: np.ndarray | torch.Tensor, level: int) -> torch.Tensor:
        descriptors = torch.empty(
            self.num_images, PATCHES_PER_IMAGE, images.shape[1], PATCH_SIZE, PATCH_SIZE, device=self.device
        )
        for start in range(0, self.num_images, _IMAGES_PER_PYRAMID):
            batch = slice(start, start + _IMAGES_PER_PYRAMID)
            pixels = _float_batch(images, batch, self.device)
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
