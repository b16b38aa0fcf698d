"""Where walks of cold diffusion start: degraded images, or draws from what fully degraded images look like.

Images of the most severe degradation have few dimensions: a colour each, or a few waves. Their law is taken as a
mixture of Gaussians in the principal coordinates that hold their variance (arXiv 2208.09392, section 5), fitted once by
scikit-learn and kept. A draw is made of its seed alone, with a little noise on every pixel: what is the same all over
an image stays so under a network that treats all places alike, and the noise breaks that symmetry.

Shapes: N images, C channels, R x R pixels, P = C R R; d coordinates, K Gaussians.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock

from data import ImageSet, to_float
from diffusion.cold import ColdScheduler
from diffusion.sampler import IMAGES_PER_SEED, SeededNoise
from diffusion.starts import Starts
from images.representation import Images
from runtime.safe_write import replacing

START_COMPONENTS, START_NOISE = 8, 0.002
FIT_IMAGES = 5000  # At most, evenly over those there are.
MOST_COORDINATES = 64
HELD = 0.999  # Of the variance, by the coordinates.
ROUNDS = 1000  # Of the fit, at most.
VERSION = 1  # Of what a file holds.
CALL_IMAGES = 256


class Mixture(NamedTuple):
    """Gaussians in principal coordinates, float64: x = centre + basis (means[k] + roots[k] z)."""

    centre: np.ndarray  # [P]
    basis: np.ndarray  # [d, P], rows orthonormal
    weights: np.ndarray  # [K], of sum 1
    means: np.ndarray  # [K, d]
    roots: np.ndarray  # [K, d, d], lower triangular: of covariances


def fit_mixture(points: np.ndarray, components: int) -> Mixture:
    """The mixture of `components` Gaussians of points `[N, P]`, always the same.

    Its coordinates, MOST_COORDINATES at most, hold a share HELD of their variance; there is none where all points are
    one. Raises ValueError for more components than points, and RuntimeError if scikit-learn is missing.
    """
    try:  # They take a second to be imported, which no other model needs.
        from sklearn.decomposition import PCA
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise RuntimeError(
            "The start of cold diffusion needs the package scikit-learn: run `pip install scikit-learn`."
        ) from error
    if components > len(points):
        raise ValueError(
            f"--start_components {components} are more than the {len(points)} images that they are fitted to; lower it."
        )
    points = np.asarray(points, dtype=np.float64)
    most = min(MOST_COORDINATES, len(points) - 1, points.shape[1])
    spread = points.std(axis=0).max()
    if not most or spread < 1e-6:
        count = points.shape[1]
        return Mixture(points.mean(0), np.zeros((0, count)), np.ones(1), np.zeros((1, 0)), np.zeros((1, 0, 0)))
    solver = "covariance_eigh" if points.shape[1] <= 4 * MOST_COORDINATES else "randomized"
    axes = PCA(most, svd_solver=solver, random_state=0).fit(points)
    count = int((axes.explained_variance_ratio_.cumsum() < HELD).sum()) + 1
    coordinates = axes.transform(points)[:, :count]  # [N, d]
    mixture = GaussianMixture(components, random_state=0, max_iter=ROUNDS).fit(coordinates)
    roots = np.linalg.cholesky(mixture.covariances_)
    return Mixture(axes.mean_, axes.components_[:count], mixture.weights_, mixture.means_, roots)


def draw(mixture: Mixture, noise: SeededNoise) -> torch.Tensor:
    """A point of the mixture for each generator, float32 `[B, P]`: first its Gaussian is drawn, then its place."""
    uniform = torch.special.ndtr(noise.draw((1,)).double())[:, 0].numpy()  # [B]
    edges = mixture.weights.cumsum()
    chosen = np.searchsorted(edges / edges[-1], uniform, side="right").clip(max=len(edges) - 1)
    z = noise.draw((len(mixture.basis),)).double().numpy()  # [B, d]
    # One by one, as sums over a batch may be rounded by its size.
    points = [
        mixture.centre + (mixture.means[k] + mixture.roots[k] @ each) @ mixture.basis
        for k, each in zip(chosen, z, strict=True)
    ]
    return torch.from_numpy(np.stack(points).astype(np.float32))


class MixtureStarts:
    """Draws of a mixture to start from, with a little noise.

    noise: its deviation on every pixel. shape: (C, R, R). As long as there are images of one evaluation seed.
    """

    def __init__(self, mixture: Mixture, shape: Sequence[int], noise: float = START_NOISE):
        self.mixture, self.shape, self.noise = mixture, tuple(shape), noise

    def __len__(self) -> int:
        return IMAGES_PER_SEED

    def of_seeds(self, seeds: Sequence[int], num_scales: int, device: torch.device | str) -> Images:
        """The start of each seed, a function of it and of the mixture alone: float32 `[B, C, R, R]`."""
        noise = SeededNoise(seeds)
        images = draw(self.mixture, noise).view(-1, *self.shape)
        return ((images + self.noise * noise.draw(self.shape)).to(device),)[:num_scales]


class DegradedStarts(Starts):
    """Images to start from once they are fully degraded."""

    def __init__(self, pixels: np.ndarray, scheduler: ColdScheduler):
        super().__init__(pixels)
        self._scheduler = scheduler

    def scales(self, rows: Sequence[int], num_scales: int, device: torch.device | str) -> Images:
        x = super().scales(rows, 1, device)[0]
        return (self._scheduler.degrade(x, self._scheduler.num_train_timesteps - 1),)


def mixture_of(
    data_fingerprint: str,
    images: Callable[[], ImageSet],  # asked for only if the cache has no mixture of them
    scheduler: ColdScheduler,
    components: int,
    cache_dir: str | os.PathLike,
) -> Mixture:
    """The mixture of fully degraded images, from the cache if it is there, else fitted and put there.

    Files go by the fingerprint of the data, the degradation and the number of components, and hold plain arrays. Raises
    ValueError if the images are not those of the fingerprint, what `fit_mixture` raises, and OSError if the cache
    cannot be written.
    """
    said = f"{VERSION} {data_fingerprint} {scheduler.degradation} {components}"
    file = Path(cache_dir) / f"cold_start_{hashlib.sha256(said.encode()).hexdigest()[:16]}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file.with_suffix('.lock')}"):
        found = _cached(file)
        if found is None:
            chosen = images()
            if chosen.fingerprint != data_fingerprint:
                raise ValueError(
                    f"The images of '{chosen.name}' are not those that the model was trained on, to whose degraded "
                    "forms the start of samples is fitted; pass the place of those as --dataset."
                )
            found = fit_mixture(fully_degraded(chosen.pixels, scheduler), components)
            with replacing(file) as temporary, open(temporary, "wb") as stream:
                np.savez(stream, **found._asdict())
    return found


def fully_degraded(pixels: np.ndarray, scheduler: ColdScheduler) -> np.ndarray:
    """Some of uint8 images `[N, C, R, R]`, FIT_IMAGES at most, as D(x, 1): float32 `[n, P]`."""
    count = min(FIT_IMAGES, len(pixels))
    rows = (2 * np.arange(count) + 1) * len(pixels) // (2 * count)
    parts = [
        scheduler.degrade(to_float(torch.from_numpy(np.array(pixels[part]))), scheduler.num_train_timesteps - 1)
        for part in np.array_split(rows, -(-count // CALL_IMAGES))
    ]
    return torch.cat(parts).flatten(1).numpy()


def _cached(file: Path) -> Mixture | None:
    """The mixture of a file, or None if there is none or it is not what was written."""
    try:
        with np.load(file) as content:
            return Mixture(**{name: content[name] for name in Mixture._fields})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
