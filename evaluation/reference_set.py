"""The set that generated images are compared with: images, or the mean and covariance of their features in a file.

What Inception or another network says of the reference is computed once per set, weights and filter and kept in the
cache folder, also when several processes ask for it at the same time.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from data import BACKGROUND, ImageSet, load_images, save_png
from evaluation.feature_metrics import FeatureMoments
from evaluation.inception import FeatureNetwork, stream
from image_folder import claim, evenly, write_settings
from runtime.progress import Progress
from runtime.safe_write import replacing

FETCH_AGAIN = "fetch it again or make it with `pytorch-fid --save-stats`"
MAKE_AGAIN = "delete it to make it again"


@dataclass(frozen=True)
class ReferenceSet:
    """Images uint8 `[M, C, R, R]`, or the `statistics` (mean [D], covariance [D, D]) of a file, each without the other.

    `name` is "train", "holdout" or the folder or file as given; `fingerprint` is 16 hexadecimal digits of the content.
    """

    name: str
    fingerprint: str
    images: np.ndarray | None = None
    statistics: tuple[np.ndarray, np.ndarray] | None = None
    statistics_count: int | None = None

    @property
    def count(self) -> int | None:
        """Number of images, None for a statistics file that does not say."""
        return self.statistics_count if self.images is None else len(self.images)

    @property
    def pixels(self) -> np.ndarray:
        """The images, uint8 `[M, C, R, R]`; raises ValueError for a statistics file."""
        if self.images is None:
            raise ValueError(
                f"The reference {self.name} is a file of statistics, against which only fid and fid_infinity can be "
                "computed: pass a folder of images as --reference, or --metrics fid."
            )
        return self.images

    def moments(
        self, network: FeatureNetwork, cache_dir: str | os.PathLike, batch_size: int = 64
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and covariance [D, D] of the pool features, float64.

        Those of images are kept in `fid_reference_{fingerprint}_{weights}_{resize}.npz`, which holds `mu` and `sigma`
        as pytorch-fid reads them and `n`; they come from the cached features if there are any.

        Raises ValueError if the file is damaged, if the D of a statistics file is not that of the network, or for
        fewer than two images.
        """
        if self.statistics is not None:
            found, needed = len(self.statistics[0]), network.num_features
            if found != needed:
                raise ValueError(
                    f"The reference {self.name} has statistics of {found} features, but the network gives {needed}: "
                    "pass one that was made of its features, those of the pool of Inception."
                )
            return self.statistics

        def write(temporary: Path) -> None:
            moments = FeatureMoments()
            for batch in self._feature_batches(network, cache_dir, batch_size):
                moments.update(batch)
            np.savez(temporary, mu=moments.mean, sigma=moments.cov, n=moments.n)

        file = self._cache_file("fid_reference", ".npz", network, cache_dir)
        _make_once(file, write)
        mean, cov, count = _read_statistics(file, MAKE_AGAIN)
        if (len(mean), count) != (network.num_features, self.count):
            raise ValueError(
                f"The FID reference {file} is damaged, as it is of {count} images and {len(mean)} features instead of "
                f"{self.count} and {network.num_features}: {MAKE_AGAIN}."
            )
        return mean, cov

    def features(self, network: FeatureNetwork, cache_dir: str | os.PathLike, batch_size: int = 64) -> np.ndarray:
        """Pool features of the images, float32 [M, D].

        They are memory-mapped from `features_{fingerprint}_{weights}_{resize}.npy` in the cache folder.

        Raises ValueError for a statistics file, or if the cached file is damaged.
        """
        pixels = self.pixels
        shape = (len(pixels), network.num_features)

        def write(temporary: Path) -> None:
            features, start = np.empty(shape, np.float32), 0
            for batch in self._stream(network, batch_size):
                features[start : start + len(batch)] = batch
                start += len(batch)
            np.save(temporary, features)

        file = self._cache_file("features", ".npy", network, cache_dir)
        _make_once(file, write)
        try:
            features = np.load(file, mmap_mode="r")
        except Exception as error:
            # A header cut short fails in as many ways as it has bytes.
            raise ValueError(
                f"The features of the reference in {file} are damaged ({type(error).__name__}): {MAKE_AGAIN}."
            ) from error
        if features.shape != shape or features.dtype != np.float32:
            raise ValueError(
                f"The features of the reference in {file} are damaged, as they are {features.dtype} of shape "
                f"{list(features.shape)} instead of float32 of shape {list(shape)}: {MAKE_AGAIN}."
            )
        return features

    def _cache_file(self, stem: str, suffix: str, network: FeatureNetwork, cache_dir: str | os.PathLike) -> Path:
        return Path(cache_dir) / f"{stem}_{self.fingerprint}_{network.fingerprint}_{network.resize}{suffix}"

    def _stream(self, network: FeatureNetwork, batch_size: int) -> Iterator[np.ndarray]:
        with Progress(total=self.count, desc=f"features of {self.name}", unit="img") as bar:
            for features in stream(network, self.pixels, batch_size):
                yield features.pool.numpy()
                bar.update(len(features.pool))

    def _feature_batches(
        self, network: FeatureNetwork, cache_dir: str | os.PathLike, batch_size: int
    ) -> Iterator[np.ndarray]:
        """Pool features [B, D], in equal batches whether they come from the cache or from the network."""
        if not self._cache_file("features", ".npy", network, cache_dir).exists():
            yield from self._stream(network, batch_size)
            return
        features = self.features(network, cache_dir, batch_size)
        for start in range(0, len(features), batch_size):
            yield features[start : start + batch_size]


def from_images(images: ImageSet, name: str) -> ReferenceSet:
    """The reference that consists of `images`, under the name that results show, such as "train" or "holdout"."""
    return ReferenceSet(name, images.fingerprint, images=images.pixels)


def load_reference(
    place: str | os.PathLike,
    resolution: int,
    channels: int,
    cache_dir: str | os.PathLike = "cache",
    num_workers: int = 4,
    background: str = BACKGROUND,
    pad: str | None = None,
) -> ReferenceSet:
    """The reference at `place`: a folder of images, or a statistics file as pytorch-fid, EDM and LIFT write them.

    Args:
        place: a folder of images of `resolution` x `resolution` pixels, which are not resized, or of smaller ones if
            they are padded; or an `.npz` file that holds `mu` [D] and `sigma` [D, D], and possibly the number of
            images `n`.
        channels: of the model's images, 1 for grey and 3 for colour, which those of a folder must have.
        cache_dir: folder of the decoded images.
        background: the colour under what is transparent in the images of a folder.
        pad: the colour to pad smaller images of a folder with, as those of the training were, if any.

    Raises:
        FileNotFoundError: there is nothing at `place`.
        ValueError: a statistics file is damaged or lacks something, or an image is unreadable, of another size, or
            grey where the model's are not or the other way round.
    """
    name = str(place)
    if Path(place).is_file():
        mean, cov, count = _read_statistics(Path(place), FETCH_AGAIN)
        digest = hashlib.sha256(mean.tobytes() + cov.tobytes()).hexdigest()
        return ReferenceSet(name, digest[:16], statistics=(mean, cov), statistics_count=count)
    if not Path(place).is_dir():
        raise FileNotFoundError(f"There is no reference {place}: pass a folder of images or an .npz statistics file.")
    images = load_images(
        name, resolution, cache_dir, resize_filter=None, num_workers=num_workers, background=background, pad=pad
    )
    if images.channels != channels:
        kinds = {1: "grey", 3: "in colour"}
        raise ValueError(
            f"The images of the reference {place} are {kinds[images.channels]}, but those of the model are "
            f"{kinds[channels]}: pass a folder of images like those it was trained on."
        )
    return from_images(images, name)


def write_images(reference: ReferenceSet, folder: Path, count: int | None = None, force: bool = False) -> None:
    """Write the images of a reference as PNGs, `000000.png` and on, for other tools; what is there is kept.

    count: of so many, spread evenly over the set; None for all. Raises ValueError for a file of statistics, for more
    images than there are, and for a folder with images of another reference unless forced.
    """
    pixels = reference.pixels
    if count is not None:
        pixels = pixels[evenly(count, len(pixels), f"the reference '{reference.name}'")]
    said = {"reference": reference.name, "reference_fingerprint": reference.fingerprint, "count": len(pixels)}
    claim(folder, said, force, ("[0-9]*.png",))
    write_settings(folder, said)
    with Progress(total=len(pixels), desc=f"images of {reference.name}", unit="img") as bar:
        for k, image in enumerate(pixels):
            if not (folder / f"{k:06d}.png").exists():
                save_png(torch.from_numpy(image.copy()), folder / f"{k:06d}.png", by_lift=False)
            bar.update()


def _make_once(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make `file` unless it exists; of several processes one does it while the others wait."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        # Another process may have made it while this one waited.
        if not file.exists():
            with replacing(file) as temporary:
                write(temporary)


def _read_statistics(file: Path, way_out: str) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Mean [D], covariance [D, D] in float64, and the number of images if the file says it."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name], np.float64) for name in ("mu", "sigma", "n") if name in archive}
    except Exception as error:
        # A damaged archive fails in zipfile, zlib or NumPy, and a foreign file in yet other ways.
        raise ValueError(
            f"The statistics file {file} is damaged or no .npz archive ({type(error).__name__}): {way_out}."
        ) from error
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise ValueError(f"The statistics file {file} lacks {' and '.join(missing)}: {way_out}.")
    mean, cov = arrays["mu"], arrays["sigma"]
    if mean.ndim != 1 or cov.shape != mean.shape * 2:
        raise ValueError(
            f"The statistics file {file} must hold mu [D] and sigma [D, D], but their shapes are {list(mean.shape)} "
            f"and {list(cov.shape)}: {way_out}."
        )
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f"The statistics file {file} holds values that are not finite: {way_out}.")
    if not np.allclose(cov, cov.T, rtol=1e-5, atol=1e-5 * np.abs(cov).max(initial=0)):
        raise ValueError(f"The statistics file {file} holds a sigma that is not symmetric: {way_out}.")
    count = arrays.get("n")
    if count is not None and (count.size != 1 or count.item() < 1):
        raise ValueError(f"The statistics file {file} holds no number of images under n: {way_out}.")
    return mean, cov, None if count is None else int(count.item())
