"""From pixels to numbers, without any network: how far generated images are from real ones, and how close to copies.

The nearest training images and the sliced Wasserstein distance. Images are uint8 arrays or CPU tensors [N, C, H, W]
with one or three channels. Most numbers depend on N, and compare only at equal N.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

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
