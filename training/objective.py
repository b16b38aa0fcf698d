"""What a training step shows the network, and what it minimises.

An objective draws what a step shows, from random numbers of its own seed and number, computes losses image by image,
and says how they add up. What it learns in the course of a run is its `state`, which checkpoints hold. The trainer asks
for nothing else, so that a family of models is an objective, and not another loop.

Shapes: B images of a step, C channels, H x W pixels of the fine scale.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import network_class
from images.representation import Images
from model import ScaleModel
from planning.regimes import TimestepPairs
from scheduler import DDIMScheduler, Denoiser
from training.coupling import OPTIMAL, optimal_partners
from training.terms import Term, compare
from training.timesteps import IMPORTANCE, UNIFORM, Importance, densities, prediction_weight

# Key in files: what people read.
LOSS_NAMES = {
    "loss_64": "fine loss",
    "loss_32": "coarse loss",
    "vlb_64": "fine bound, bits per dimension",
    "vlb_32": "coarse bound, bits per dimension",
    "perceptual": "perceptual loss",
    "features": "feature loss",
}
SCALE_LOSSES = ("loss_64", "loss_32")  # Squared errors of predictions; the rest are bounds and `training.terms`.
MEASURE_NAMES = LOSS_NAMES | {"cross_entropy": "cross-entropy", "accuracy": "accuracy"}  # Of classifiers, too.


def step_generator(seed: int, step: int, device: torch.device, *purpose: int) -> torch.Generator:
    """The random numbers of one training step, a function of seed and step, and of what else than noise they are for.

    purpose: a number of at least 1, or nothing.
    """
    mixed = int(np.random.SeedSequence((seed, step, *purpose)).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator(device).manual_seed(mixed)


class Networks(NamedTuple):
    """What an objective may look through beside the network that it is given to minimise."""

    student: ScaleModel  # The model in training, by itself: neither compiled nor shared among processes.
    teacher: Denoiser | None = None  # Of noisy images of the same process, frozen; says predictions alone.


class TrainingBatch(NamedTuple):
    """What one step shows the network: clean images (or latents), their noise and their timesteps, image by image."""

    x_64: torch.Tensor  # [B, C, H, W], in the residual representation the residual, and so the noise
    x_32: torch.Tensor  # [B, C, H/2, W/2]
    noise_64: torch.Tensor  # [B, C, H, W]
    noise_32: torch.Tensor  # [B, C, H/2, W/2]
    t_64: torch.Tensor  # [B], int64, or float64 where times are real
    t_32: torch.Tensor  # [B]
    share: torch.Tensor | None = None  # [B], what the loss of each image counts for how it was drawn; None: 1
    labels: torch.Tensor | None = None  # [B], int64, the class of each image, or the null class
    next_64: torch.Tensor | None = None  # [B], float64, the cleaner times that predictions are compared with
    next_32: torch.Tensor | None = None  # [B]

    def rows(self, rows: slice) -> "TrainingBatch":
        """Some of the images."""
        return TrainingBatch(*(None if field is None else field[rows] for field in self))

    @property
    def scales(self) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]:
        """Clean images, noise and timesteps of each scale, fine first."""
        return (self.x_64, self.noise_64, self.t_64), (self.x_32, self.noise_32, self.t_32)

    def clock(self, loss: str) -> torch.Tensor:
        """The timesteps `[B]` that a loss belongs to, by its name: of what both scales share, those of the fine one."""
        return self.t_32 if loss.endswith("_32") else self.t_64


class Noising:
    """What objectives share that show noisy images at timesteps of a regime, of one scale and of two.

    config: of a run, with `t_pairs`, `t_pairs_points` and, if they are not the published ones, `t_law`, `times`,
    `coupling` (and then `model_type`), and `only_time`, the one timestep of both clocks of a student of one step.
    Draws happen on the device of the tables of the scheduler. terms: further losses of the predicted clean image, on
    that device.
    """

    evaluates = "denoise"  # The method of a model that `losses` calls.
    learned_variance = False  # Whether the network is one that says the variance of a step.
    timed = False  # Whether what a step shows depends on how much of the run is over, other than by its pairs.

    def __init__(
        self,
        config: dict[str, Any],
        scheduler: DDIMScheduler,
        terms: Sequence[Term] = (),
        networks: Networks | None = None,  # None for objectives that look through none
    ):
        self.scheduler, self.terms = scheduler, terms
        self.pairs = TimestepPairs(config, scheduler)
        self._null_class, self._label_dropout = len(config.get("class_names") or ()), config.get("label_dropout")
        self._real = config.get("times", "whole") == "real"
        # What the network sees of an image says how far that is from a noise.
        of_optimal = config.get("coupling") == OPTIMAL
        self._num_coupled = network_class(config["model_type"]).num_scales if of_optimal else None
        # Images to start from are given, and dealt out as noise is; noise of stored pairs never is.
        self._deals_given = config.get("start_dataset") is not None
        self._only_time = config.get("only_time")
        law = config.get("t_law", UNIFORM) if self._only_time is None else UNIFORM
        self._importance = Importance(self.pairs.leads) if law == IMPORTANCE else None
        self._densities = None if law in (UNIFORM, IMPORTANCE) else densities(law, scheduler).expand(2, -1)
        if self._densities is not None and not self._densities[self.pairs.leads].sum() > 1e-6:
            raise ValueError(
                f"--t_law {law} draws no pair of --t_pairs {config['t_pairs']}, which leads by other timesteps; choose "
                "another mean or a larger deviation."
            )

    def draw(
        self,
        x_64: torch.Tensor,  # [B, C, H, W]
        x_32: torch.Tensor,  # [B, C, H/2, W/2], its 2x2 mean
        generator: torch.Generator,
        progress: float = 0.0,  # the share of the run that is over
        labels: torch.Tensor | None = None,  # [B], the class of each image
        noise: Images | None = None,  # as x_64 and x_32, of images that have theirs or start from others
    ) -> TrainingBatch:
        """Noise and timesteps for clean images: pairs of the regime, with the leading clock by its law.

        Each scale has its own noise, which belongs to the image that it is given with, and else is drawn; what lines
        start from in place of noise belongs to none. Images and noise of the fine scale are those of the
        representation. A share of the labels (`label_dropout`) becomes the null class (arXiv 2207.12598, algorithm 1).
        """
        device, representation = x_64.device, self.scheduler.representation
        t_64, t_32, share, *more = self._timesteps(len(x_64), generator, progress)  # [B] each
        drawn = noise is None
        if drawn:
            noise = tuple(torch.randn(x.shape, generator=generator, device=device) for x in (x_64, x_32))
        clean, noise = map(representation.project, ((x_64, x_32), noise))
        if (drawn or self._deals_given) and self._num_coupled is not None:
            seen = slice(self._num_coupled)
            partners = optimal_partners(clean[seen], noise[seen], labels)  # [B]
            noise = tuple(each[partners] for each in noise)
        if labels is not None and self._label_dropout is not None:
            hidden = torch.rand(len(labels), generator=generator, device=device) < self._label_dropout
            labels = torch.where(hidden, self._null_class, labels)
        return TrainingBatch(*clean, *noise, t_64, t_32, share, labels, *more)

    def _timesteps(self, batch: int, generator: torch.Generator, progress: float) -> tuple[torch.Tensor | None, ...]:
        # Timesteps, shares, and what else stands behind the labels of a batch.
        if self._only_time is not None:
            t = torch.full((batch,), self._only_time, device=self.scheduler.log_snr.device)
            t = t.double() if self._real else t
            return t, t, None
        pairs = self.pairs.at(progress)
        law = self._densities if self._importance is None else self._importance.densities()
        if law is None:
            (t_64, t_32), likelier = pairs.draw(batch, generator), None
        else:
            t_64, t_32, likelier = pairs.draw_by(law, batch, generator)
        if self._real:
            count = self.scheduler.num_train_timesteps
            within = torch.rand(2, batch, dtype=torch.float64, generator=generator, device=t_64.device)
            t_64, t_32 = ((t + u) * ((count - 1) / count) for t, u in zip((t_64, t_32), within, strict=True))
            t_32 = t_64 if pairs.same else t_32
        return t_64, t_32, None if self._importance is None else 1 / likelier

    def noised(self, batch: TrainingBatch) -> tuple[Images, Images]:
        """Both scales of the images of a step, noisy, and as a network is shown them."""
        noisy = tuple(self.scheduler.add_noise(*scale) for scale in batch.scales)
        return noisy, tuple(map(self.scheduler.shown, noisy, (batch.t_64, batch.t_32)))

    def drives(self, losses: dict[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
        """What of each image `[B]` says how often its timesteps are to be drawn."""
        raise NotImplementedError

    def observe(
        self,
        losses: dict[str, torch.Tensor],
        batch: TrainingBatch,
        good: torch.Tensor,  # whether the step was taken
        total: Callable[[torch.Tensor], torch.Tensor],  # sums over processes
    ) -> None:
        """Learn from the losses of a step, of this process's share of the images."""
        if self._importance is not None:
            self._importance.observe(self.drives(losses, batch), (batch.t_64, batch.t_32), good, total)

    @property
    def state(self) -> dict[str, torch.Tensor] | None:
        """What a run that goes on from here has to know, other than `pairs.state`; None for nothing."""
        return None if self._importance is None else self._importance.state

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if saved.get("regime_state") is not None:
            for name in ("before_32", "log_snr_32"):
                self.pairs = self.pairs.moved_to(saved["regime_state"][name])
        if self._importance is not None:
            device = self.scheduler.log_snr.device
            self._importance.state = {name: value.to(device) for name, value in saved["objective_state"].items()}


class Denoising(Noising):  # A family of models is a class beside it, with its name in `training.objectives`.
    """Squared errors of predictions.

    config: also with `loss_weights` and, if they are not the published ones, `timestep_weights`, `min_snr_gamma`.
    """

    distance = staticmethod(F.mse_loss)  # Of predictions from what they should be, value by value.

    def __init__(
        self,
        config: dict[str, Any],
        scheduler: DDIMScheduler,
        terms: Sequence[Term] = (),
        networks: Networks | None = None,
    ):
        super().__init__(config, scheduler, terms, networks)
        loss_weights = config.get("loss_weights", [1.0] * len(SCALE_LOSSES))
        self._loss_weights = dict(zip(SCALE_LOSSES, loss_weights, strict=False))
        self._loss_weights |= {term.name: term.weight for term in terms}
        self._weight = prediction_weight(config, scheduler)

    def losses(self, denoise: Denoiser, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        """Squared error of every image per predicted scale, `loss_64` and where predicted `loss_32`, float32 `[B]`.

        denoise: a network, which is shown noisy images as it is to see them. Each loss is a mean over the dimensions of
        its scale: a residual has three for every four pixels. Behind them, by its name, each of the terms.
        """
        noisy, shown = self.noised(batch)
        predictions = self._outputs(denoise, shown, batch)
        return self._errors(predictions, batch) | self._further(predictions, noisy, shown, batch)

    def _outputs(self, denoise: Denoiser, shown: Images, batch: TrainingBatch) -> Images:
        """What the network returns of the images of a step."""
        told = () if batch.labels is None else (batch.labels,)
        return denoise(shown, (batch.t_64, batch.t_32), *told)

    def _errors(self, predictions: Images, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        shares, errors = (self.scheduler.representation.fine_share, 1.0), {}
        for name, prediction, scale, share in zip(SCALE_LOSSES, predictions, batch.scales, shares, strict=False):
            distances = self.distance(prediction.float(), self.scheduler.target(*scale), reduction="none")
            errors[name] = distances.flatten(1).mean(1) / share  # [B]
        return errors

    def _further(
        self, predictions: Images, noisy: Images, shown: Images, batch: TrainingBatch
    ) -> dict[str, torch.Tensor]:
        if not self.terms:
            return {}
        clean, noise, ts = zip(*batch.scales, strict=True)
        images = compare(self.scheduler, predictions, clean, noise, noisy, shown, ts, batch.labels)
        signal = self.scheduler.alpha_bar_at(batch.t_64)  # [B]
        distances = ((term.name, term.distance(images)) for term in self.terms)
        return {name: signal.to(distance) * distance for name, distance in distances}  # [B] each

    def minimised(self, losses: dict[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
        """What a step minimises: the mean over images of their losses, weighed by scale and by timestep.

        Terms have their own weights and none by timestep but that which is in them.
        """
        total = torch.zeros((), device=batch.x_64.device)
        for name, values in self._by_timestep(losses, batch).items():
            by_image = values if batch.share is None else values * batch.share.to(values)
            total = total + self._loss_weights[name] * by_image.mean()
        return total

    def drives(self, losses: dict[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
        weighed = self._by_timestep(losses, batch)
        return sum(self._loss_weights[name] * values for name, values in weighed.items())

    def _by_timestep(self, losses: dict[str, torch.Tensor], batch: TrainingBatch) -> dict[str, torch.Tensor]:
        if self._weight is None:
            return losses
        return {
            name: values * self._weight(batch.clock(name)).to(values) if name in SCALE_LOSSES else values
            for name, values in losses.items()
        }
