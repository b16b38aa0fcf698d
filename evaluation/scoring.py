"""From a model and a path to the numbers of a results row: generated images, what Inception says of them, metrics.

`generate` samples, on all processes of a run, and lets the Inception network see each batch while a GPU samples the
next; `Scorer` compares the images with a reference. Nothing is written but the features of the reference, in the cache.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import LoadedModel
from data import ImageSet, distinct_images
from diffusion.cold_starts import MixtureStarts
from diffusion.sampler import Denoiser, coarse_feed, sample_seeds, scale_shapes
from diffusion.starts import Starts
from diffusion.step import Solver
from evaluation.feature_metrics import (
    MANIFOLD_K,
    MIN_EXTRAPOLATED_FEATURES,
    SCORE_SPLITS,
    FeatureMoments,
    accuracy,
    fid_infinity,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from evaluation.inception import FeatureNetwork, Features, Inception, extract
from evaluation.judge import Judge
from evaluation.pixel_metrics import NearestNeighbours, SlicedWasserstein, swd_levels
from evaluation.reference_set import ReferenceSet
from evaluation.results_table import METRIC_VALUES
from image_folder import evenly
from paths.path import Path
from runtime.device import autocast
from runtime.distributed import Processes
from runtime.progress import Progress

FEATURE_METRICS = ("fid", "fid_infinity", "kid", "is", "pr")
JUDGE_METRICS = ("fd", "cs", "ca")
EITHER_METRICS = ("kid", "pr")  # Of FEATURE_METRICS those that a judge may take over from Inception.
FEATURES = ("inception", "judge")
# Known before an image is made, whereas the metrics themselves would refuse only then.
FEWEST_IMAGES = {"fid": 2, "fid_infinity": MIN_EXTRAPOLATED_FEATURES, "kid": 2, "is": SCORE_SPLITS}
FEWEST_IMAGES |= {"pr": MANIFOLD_K + 1, "swd": 1, "nn": 1, "fd": 2, "cs": SCORE_SPLITS, "ca": 1}


def judged(metrics: Iterable[str], features: str = "inception") -> set[str]:
    """The metrics that need a judge, if EITHER_METRICS are computed of these FEATURES."""
    return set(metrics) & {*JUDGE_METRICS, *(EITHER_METRICS if features == "judge" else ())}


def needs_inception(metrics: Iterable[str], features: str = "inception") -> bool:
    """Whether any of the metrics needs Inception."""
    return bool((set(metrics) & set(FEATURE_METRICS)) - judged(metrics, features))


class Generated(NamedTuple):
    """The images of one job."""

    pixels: torch.Tensor  # uint8 [N, C, R, R], on the CPU, rounded as in a PNG
    features: Features | None  # of those pixels, if asked for
    nfe: int  # network calls that each image took, of an adaptive solver in the mean
    labels: torch.Tensor | None = None  # int64 [N], the classes that were sampled, if any


def generate(
    loaded: LoadedModel,
    path: Path,
    seeds: Sequence[int],
    processes: Processes,
    batch_size: int = 64,
    precision: str = "auto",
    solver: Solver | None = None,  # None: DDIM
    end: str = "clean",
    inception: Inception | None = None,
    denoise: Denoiser | None = None,  # what is called in place of the model itself, such as its compiled form
    overlap: bool | None = None,  # features of one batch beside the sampling of the next; None: on GPUs
    coarse_from: str = "x0",  # what a model reads as the coarse image that it does not predict
    labels: Sequence[int] | None = None,  # the class of every seed
    starts: Starts | MixtureStarts | None = None,  # what a model starts from that does not start from noise
) -> Generated | None:
    """The fine image of every seed; the processes of a run share the batches, and the first gets all of them.

    Latents are decoded, batch by batch. A batch holds the same seeds whatever the number of processes, and is
    computed by one of them, so the images are the same. Returns None on all processes but the first. Raises
    ValueError if an image is not finite.
    """
    device, space = processes.device, loaded.space
    shapes = scale_shapes(loaded.model.num_scales, loaded.config["channels"], loaded.side)
    batches = torch.arange(len(seeds)).split(batch_size)[processes.rank :: processes.count]
    mine = torch.cat(batches).tolist() if batches else []
    sampled = sample_seeds(
        denoise or loaded.denoise_with_variance, loaded.scheduler, path, [seeds[k] for k in mine], shapes,
        batch_size, device, end=end, coarse_from=coarse_feed(loaded.model, coarse_from), solver=solver,
        labels=None if labels is None else [labels[k] for k in mine],
        starts=starts and functools.partial(starts.of_seeds, num_scales=loaded.model.num_scales, device=device),
    )  # fmt: skip
    pixels, features, calls, broken = [torch.empty(0, *loaded.image_shape, dtype=torch.uint8)], [], 0, None
    with (
        autocast(device, precision),
        _Beside(device, device.type == "cuda" if overlap is None else overlap) as beside,
        Progress(total=len(mine), unit="img", leave=False, disable=not processes.is_main) as bar,
    ):
        for chosen, samples in sampled:
            calls, fine = calls + samples.nfe * len(chosen), samples.images[0]
            finite = fine.isfinite().flatten(1).all(1)  # [B]
            rounded = space.pixels(fine)  # [B, C, R, R]
            if inception is not None:
                features.append(beside.submit(inception, rounded))
            pixels.append(rounded.cpu())
            if not finite.all():
                broken = chosen[finite.tolist().index(False)]
                break
            bar.update(len(chosen))
        features = [future.result() for future in features]
    if processes.any(broken is not None)[0]:
        culprit = "an image of another process" if broken is None else f"the image of seed {broken}"
        raise ValueError(
            f"The {loaded.weights} weights of epoch {loaded.config['epoch']} make {culprit} NaN or infinite along path "
            f"{path.kind} of {path.nfe} steps; use another checkpoint, or --precision fp32."
        )
    parts = processes.gather((mine, torch.cat(pixels), _join(features), calls))
    if parts is None:
        return None
    order = torch.tensor([k for part in parts for k in part[0]]).argsort()
    known = [part[2] for part in parts if part[2] is not None]
    return Generated(
        torch.cat([part[1] for part in parts])[order],
        Features(*(values[order] for values in _join(known))) if known else None,
        round(sum(part[3] for part in parts) / len(seeds)),
        None if labels is None else torch.tensor(labels),
    )


def _join(parts: Iterable[Features]) -> Features | None:
    parts = list(parts)
    return Features(*(torch.cat(values) for values in zip(*parts, strict=True))) if parts else None


class _Beside:
    """Calls functions of what has just been computed: at once, or in a thread with a CUDA stream of its own."""

    def __init__(self, device: torch.device, overlap: bool):
        self._device = device
        self._pool = ThreadPoolExecutor(1) if overlap else None
        self._stream = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None

    def __enter__(self) -> "_Beside":
        return self

    def __exit__(self, *error) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable, value: torch.Tensor) -> Future:
        if self._pool is None:
            done = Future()
            done.set_result(function(value))
            return done
        if self._stream is None:
            return self._pool.submit(function, value)
        computed = torch.cuda.current_stream(self._device).record_event()

        def call():
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(computed)
                return function(value)

        return self._pool.submit(call)


class Scorer:
    """The metrics of generated images against one reference; what belongs to the reference is made once.

    metrics: of results_table.METRICS. training: the images the model was trained on, for `nn`; held_out: those kept
    out, for what a judge says of real images. inception: needed for FEATURE_METRICS. judge: for JUDGE_METRICS, and for
    EITHER_METRICS if `features` says so. `settings[metric]` holds the key columns metric, metric_features and resize of
    its rows, `floors[metric]` the number of real images that a judge sees beside, None without any.

    Raises ValueError if a metric cannot be computed from so many images, or against this reference, and for images that
    the judge cannot judge.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        num_images: int,
        reference: ReferenceSet,
        training: ImageSet,
        inception: Inception | None = None,
        device: torch.device | str = "cpu",
        cache_dir: str | os.PathLike = "cache",
        judge: Judge | None = None,
        held_out: ImageSet | None = None,
        features: str = "inception",  # of FEATURES, for EITHER_METRICS
    ):
        self.reference, self.training, self.inception = reference, training, inception
        self.judge, self._held_out, self._by_judge = judge, held_out, judged(metrics, features)
        self._judged: tuple[Generated, Features] | None = None
        self._floor: dict[str, dict[str, float]] = {}
        if self._by_judge:
            judge.check(training.pixels.shape[-1], training.channels)
        self.num_images, self.cache_dir = num_images, cache_dir
        self.settings, self.floors = {}, dict.fromkeys(metrics)
        for metric in metrics:
            if num_images < FEWEST_IMAGES[metric]:
                raise ValueError(
                    f"The metric {metric} needs at least {FEWEST_IMAGES[metric]} images, not {num_images}; raise "
                    "--num_images or leave it out of --metrics."
                )
            features, resize = "pixels", "none"
            if metric in self._by_judge:
                features, resize = judge.label, judge.resize
                self.floors[metric] = self._floor_size(metric)
            elif metric in FEATURE_METRICS:
                features, resize = f"inception-{inception.fingerprint}", inception.resize
            elif metric == "swd":
                features = f"swd-7x7-{'-'.join(str(level) for level in swd_levels(training.pixels.shape[-1]))}"
            self.settings[metric] = {"metric": metric, "metric_features": features, "resize": resize}
        if set(metrics) & {"swd", "kid", "pr"}:  # Which a file of statistics does not do for.
            reference_pixels = reference.pixels
        for metric in ("kid", "pr"):
            if metric in metrics and reference.count < FEWEST_IMAGES[metric]:
                raise ValueError(
                    f"The metric {metric} needs at least {FEWEST_IMAGES[metric]} images to compare with, but the "
                    f"reference {reference.name} has {reference.count}; pass another or leave it out of --metrics."
                )
        if "swd" in metrics:
            self._swd = SlicedWasserstein(reference_pixels, num_images, device=device)
        if "nn" in metrics:
            # A training image that occurs twice would be at distance 0 from its neighbour, and excuse every copy of it.
            self._neighbours = NearestNeighbours(distinct_images(training.pixels), device)

    def prepare(self, metrics: Iterable[str]) -> None:
        """Make what these metrics need of the reference, so that one which is no good is refused before sampling.

        Raises ValueError as `ReferenceSet.moments` and `ReferenceSet.features`.
        """
        # Moments come from features where there are any, and then the network sees the reference once.
        for metric in sorted(set(metrics) & {"kid", "pr"}):
            self._reference_features(metric)
        for metric in sorted(set(metrics) & {"fid", "fid_infinity", "fd"}):
            self._reference_moments(metric)

    def score(self, metric: str, generated: Generated) -> dict[str, float]:
        """The value columns of one metric."""
        values = getattr(self, f"_{metric}_values")(generated)
        # The table has columns for the levels of 64x64 images only; the mean of SWD counts every level.
        return {name: round(value, 6) for name, value in values.items() if name in METRIC_VALUES[metric]}

    def _network(self, metric: str) -> FeatureNetwork:
        return self.judge if metric in self._by_judge else self.inception

    def _features(self, metric: str, generated: Generated) -> Features:
        """What the network of a metric says of generated images; a judge, which is small, sees them after all."""
        if metric not in self._by_judge:
            return generated.features
        if self._judged is None or self._judged[0] is not generated:
            self._judged = generated, extract(self.judge, generated.pixels)
        return self._judged[1]

    def _reference_moments(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        return self.reference.moments(self._network(metric), self.cache_dir)

    def _reference_features(self, metric: str) -> np.ndarray:
        return self.reference.features(self._network(metric), self.cache_dir)

    def _distance(self, metric: str, features: Features) -> float:
        moments = FeatureMoments()
        for batch in features.pool.split(1024):
            moments.update(batch)
        return frechet_distance(moments.mean, moments.cov, *self._reference_moments(metric))

    def _fid_values(self, generated: Generated) -> dict[str, float]:
        return {"fid": self._distance("fid", generated.features)}

    def _fid_infinity_values(self, generated: Generated) -> dict[str, float]:
        moments = self._reference_moments("fid_infinity")
        return {"fid_infinity": fid_infinity(generated.features.pool, *moments).value}

    def _fd_values(self, generated: Generated) -> dict[str, float]:
        def floor(real: Features, _) -> dict[str, float]:
            return {"fd_real": self._distance("fd", real)}

        return {"fd": self._distance("fd", self._features("fd", generated))} | self._of_real("fd", floor)

    def _cs_values(self, generated: Generated) -> dict[str, float]:
        mean, sd = inception_score(self._features("cs", generated).logits, metric="cs")

        def floor(real: Features, _) -> dict[str, float]:
            return {"class_score_real": inception_score(real.logits, metric="cs")[0]}

        return {"class_score": mean, "class_score_sd": sd} | self._of_real("cs", floor)

    def _ca_values(self, generated: Generated) -> dict[str, float]:
        if generated.labels is None:
            raise ValueError("The metric ca needs images that were sampled by class; leave it out of --metrics.")

        def floor(real: Features, labels: torch.Tensor) -> dict[str, float]:
            return {"class_accuracy_real": accuracy(real.logits, labels)}

        found = accuracy(self._features("ca", generated).logits, generated.labels)
        return {"class_accuracy": found} | self._of_real("ca", floor)

    def _real_images(self, metric: str) -> ImageSet | None:
        """Real images that a judge sees beside generated ones, as many if there are: those held out.

        A distance is from the reference: where that is what is held out, they are those of the training. None if there
        are none, or too few.
        """
        held_out = self._held_out
        if metric == "fd" and held_out is not None and self.reference.fingerprint == held_out.fingerprint:
            held_out = self.training
        if metric not in JUDGE_METRICS or held_out is None or len(held_out) < FEWEST_IMAGES[metric]:
            return None
        if metric == "ca" and self._labels_of(held_out) is None:
            return None
        return held_out

    def _labels_of(self, images: ImageSet) -> np.ndarray | None:
        """The labels of images by the classes of the judge; None if they are not divided so."""
        ways = (way for way in images.classes if tuple(way.names) == self.judge.class_names and (way.labels >= 0).all())
        return next((way.labels for way in ways), None)

    def _floor_size(self, metric: str) -> int | None:
        real = self._real_images(metric)
        return None if real is None else min(self.num_images, len(real))

    def _of_real(self, metric: str, values: Callable[[Features, torch.Tensor | None], dict]) -> dict[str, float]:
        """The value of real images of a metric, which is computed once; nothing without such images."""
        if metric not in self._floor:
            self._floor[metric] = {}
            real = self._real_images(metric)
            if real is not None:
                chosen = evenly(self.floors[metric], len(real), "the images held out")
                labels = torch.from_numpy(self._labels_of(real)[chosen]) if metric == "ca" else None
                self._floor[metric] = values(extract(self.judge, real.pixels[chosen]), labels)
        return self._floor[metric]

    def _kid_values(self, generated: Generated) -> dict[str, float]:
        mean, sd = kernel_distance(self._features("kid", generated).pool, self._reference_features("kid"))
        return {"kid": mean, "kid_sd": sd}

    def _is_values(self, generated: Generated) -> dict[str, float]:
        mean, sd = inception_score(generated.features.logits)
        return {"inception_score": mean, "inception_score_sd": sd}

    def _pr_values(self, generated: Generated) -> dict[str, float]:
        precision, recall = precision_recall(self._features("pr", generated).pool, self._reference_features("pr"))
        return {"manifold_precision": precision, "manifold_recall": recall}

    def _swd_values(self, generated: Generated) -> dict[str, float]:
        distances = self._swd.distance(generated.pixels)
        levels = {f"swd_{level}": value for level, value in distances.items()}
        return levels | {"swd": sum(distances.values()) / len(distances)}

    def _nn_values(self, generated: Generated) -> dict[str, float]:
        found = self._neighbours.compare(generated.pixels)
        return {
            "nn_distance": found.distance,
            "nn_distance_real": found.distance_real,
            "authenticity": found.authenticity,
        }
