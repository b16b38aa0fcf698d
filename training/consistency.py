"""Consistency models as an objective: f at a noise level is to be what it is at the next cleaner one.

f is the function of `diffusion.consistency`. A step shows the network an image at one of two neighbouring levels
(`training.noise_levels`), and compares its f with that of a cleaner state of the same path, through which no gradient
goes (arXiv 2303.01469). The cleaner state is

    the same image with the same noise                (consistency training)
    one step of the equation of a teacher from there  (consistency distillation, `consistency_solver` ddim or heun)

and the label that is told, or hidden, is the same. Distances, by the mean over the dimensions of a scale of squared
differences m: m itself for `ct`, whose paper prefers LPIPS to it, which there is not here, and pseudo-Huber
sqrt(m + c^2) - c for `ict` and `ect` (arXiv 2310.14189, eq. 8, by the root of the number of dimensions, as c is).

Both scales of a pair move together: at equal σ̂ in the over-complete pair, and in the residual one along the diagonal of
the image, where the coarse scale has half the σ̂, as noise on an image has it. Each has its own function, with its own
boundary at its timestep 0, where a coarse scale that would be cleaner still stays.

Shapes: B images of a step.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from checkpoint import network_class
from diffusion.consistency import consistency_function
from diffusion.solvers import LONGEST_HEUN_FALL
from images.representation import Images
from scheduler import DDIMScheduler, Denoiser
from training.noise_levels import FORMS, ICT, ct_decay
from training.objective import SCALE_LOSSES, Denoising, Networks, TrainingBatch
from training.terms import Term
from training.timesteps import UNIFORM

CALLS_OF_TEACHER = {"heun": 2, "ddim": 1, None: 0}  # For an image of a step.
TEACHER_SOLVERS = tuple(filter(None, CALLS_OF_TEACHER))
HUBER = 0.00054  # c by the root of the number of dimensions (arXiv 2310.14189, section 3.3).

NO_TEACHER = (
    "--consistency_solver is how a teacher takes its step, and there is none; leave it out, or distil a trained model "
    "(distill.py)."
)


def teacher_step(
    teacher: Denoiser,
    scheduler: DDIMScheduler,
    solver: str,  # of TEACHER_SOLVERS
    xs: Images,
    ts: Images,  # float64 [B] by scale, where alpha > 0
    next_ts: Images,
    *labels: torch.Tensor,
) -> Images:
    """Noisy images at `next_ts`, one step of the teacher's equation from xs at ts, with no clean image clamped.

    ddim is Euler's step in σ̂; heun the trapezoidal rule (arXiv 2206.00364, algorithm 1), which is that step and
    (σ̂ / σ̂' - 1) / 2 of what the clean image changes by. Where σ̂ falls by more than LONGEST_HEUN_FALL, as to no noise
    at all, it is the exponential step with the mean of both clean images, as in `diffusion.solvers.Heun`.
    """

    def clean(xs: Images, ts: Images) -> Images:
        predictions = teacher(xs, ts, *labels)
        return tuple(
            scheduler.predict_x0(prediction.to(x.dtype), t, x)
            for prediction, t, x in zip(predictions, ts, xs, strict=False)
        )

    wide = torch.empty(0, 0, 0, 0, dtype=torch.float64)
    levels = [[scheduler.scales(t, wide) for t in times] for times in (ts, next_ts)]
    x0s, there = clean(xs, ts), []
    for x, x0, (alpha, sigma), (alpha_next, sigma_next) in zip(xs, x0s, *levels, strict=False):
        keep = sigma_next / torch.where(sigma > 0, sigma, 1.0)
        moved = keep.to(x.dtype) * x + (alpha_next - alpha * keep).to(x.dtype) * x0
        there.append(torch.where(sigma > 0, moved, x))
    there = tuple(there)
    if solver == "ddim":
        return there
    found = []
    for x, x0, end, (alpha, sigma), (alpha_next, sigma_next) in zip(
        there, x0s, clean(there, next_ts), *levels, strict=False
    ):
        fall = (sigma / alpha) / (sigma_next / alpha_next)  # σ̂ / σ̂'
        half = torch.where(fall > LONGEST_HEUN_FALL, 1 - 1 / fall, fall - 1) / 2
        half = torch.where(sigma > 0, half, 0.0)
        found.append(x + (alpha_next * half).to(x.dtype) * (end - x0))
    return tuple(found)


class Consistency(Denoising):
    """Consistency training, or with a teacher distillation.

    config: also `consistency`, a form of `training.noise_levels`, and `consistency_solver`, how the teacher of
    `networks` takes its step, or None for training without one. Of pairs of timesteps it knows `same`, and for the
    residual pair the diagonal of the image. The target of `ct` is a network of averaged weights, which is its state;
    without `networks` it is the network that is minimised, as for the others. Raises ValueError for a solver without a
    teacher, and for predictions of x0 in flow.
    """

    timed = True

    def __init__(
        self,
        config: dict[str, Any],
        scheduler: DDIMScheduler,
        terms: Sequence[Term] = (),
        networks: Networks | None = None,
    ):
        super().__init__(config, scheduler, terms, networks)
        check_function(scheduler.process, scheduler.prediction_type)
        self._solver = config.get("consistency_solver")
        self._teacher = None if networks is None else networks.teacher
        if self._solver is not None and self._teacher is None:
            raise ValueError(NO_TEACHER)
        self._form = config.get("consistency") or ICT
        self._levels = FORMS[self._form](scheduler)
        self._lead = 0.0 if config.get("t_pairs") in (None, "same") else scheduler.representation.image_lead
        self._target = self._decay = None
        if self._levels.averages_target and networks is not None:
            self._student = networks.student
            self._target = copy.deepcopy(networks.student).requires_grad_(False)

    def _timesteps(self, batch: int, generator: torch.Generator, progress: float) -> tuple[torch.Tensor | None, ...]:
        drawn = self._levels.draw(batch, generator, progress)
        self._decay = ct_decay(progress)
        times = [(t, self._coarse_time(t)) for t in (drawn.times, drawn.next_times)]
        (t_64, t_32), next_times = times
        return t_64, t_32, drawn.weights, *next_times

    def _coarse_time(self, t_64: torch.Tensor) -> torch.Tensor:
        if not self._lead:
            return t_64
        return self._levels.times(self._levels.levels_at(t_64) * math.exp(-self._lead / 2))

    def losses(self, denoise: Denoiser, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        """Distances between f at both levels for every image by predicted scale, `loss_64` and maybe `loss_32`, `[B]`.

        denoise: a network, which is shown noisy images as it is to see them.
        """
        noisy, shown = self.noised(batch)
        found = self._function(self._outputs(denoise, shown, batch), noisy, (batch.t_64, batch.t_32))
        # The network with gradients first: autocast keeps the weights that it casts, and those cast without have none.
        with torch.no_grad():
            target = self._target_images(denoise, noisy, batch)
        shares = (self.scheduler.representation.fine_share, 1.0)
        return {
            name: self._distance(one - other, share)
            for name, one, other, share in zip(SCALE_LOSSES, found, target, shares, strict=False)
        }  # [B] each

    def _function(self, predictions: Images, xs: Images, ts: Images) -> Images:
        found = []
        for prediction, x, t in zip(predictions, xs, ts, strict=False):
            x0 = self.scheduler.predict_x0(prediction.to(x.dtype), t, x)
            found.append(consistency_function(self.scheduler, x0, t, x))
        return tuple(found)

    def cleaner(self, noisy: Images, batch: TrainingBatch) -> Images:
        """The states at the next levels that belong to noisy images of a step: of one path, with one noise."""
        next_ts = batch.next_64, batch.next_32
        if self._solver is None:
            same = zip((batch.x_64, batch.x_32), (batch.noise_64, batch.noise_32), next_ts, strict=True)
            return tuple(self.scheduler.add_noise(*each) for each in same)
        told = () if batch.labels is None else (batch.labels,)
        return teacher_step(
            self._teacher, self.scheduler, self._solver, noisy, (batch.t_64, batch.t_32), next_ts, *told
        )

    def _target_images(self, denoise: Denoiser, noisy: Images, batch: TrainingBatch) -> Images:
        states, next_ts = self.cleaner(noisy, batch), (batch.next_64, batch.next_32)
        network = denoise if self._target is None else self._target.denoise
        told = () if batch.labels is None else (batch.labels,)
        predictions = network(tuple(map(self.scheduler.shown, states, next_ts)), next_ts, *told)
        return self._function(predictions, states, next_ts)

    def _distance(self, difference: torch.Tensor, share: float) -> torch.Tensor:
        mean = difference.square().flatten(1).mean(1) / share
        return mean if self._levels.averages_target else (mean + HUBER**2).sqrt() - HUBER

    def observe(
        self,
        losses: dict[str, torch.Tensor],
        batch: TrainingBatch,
        good: torch.Tensor,
        total: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Move the target network of `ct` towards the weights after a step that was taken."""
        if self._target is None:
            return
        share = torch.where(good, 1 - self._decay, 0.0)
        with torch.no_grad():
            for average, weights in zip(self._target.parameters(), self._student.parameters(), strict=True):
                average.lerp_(weights, share.to(average))

    @property
    def state(self) -> dict[str, torch.Tensor] | None:
        """The weights of the target network; None where there is none."""
        return None if self._target is None else self._target.state_dict()

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().restore(saved)
        if self._target is not None:
            self._target.load_state_dict(saved["objective_state"])


def check_consistency(settings: Any) -> None:
    """Raise ValueError, naming a flag, for settings of a training that it leaves no room for."""
    model = network_class(settings.model_type)
    if model.num_predictions < model.num_scales:
        raise ValueError(
            f"--objective consistency compares states of all that is read, of which a '{settings.model_type}' model "
            "predicts the fine scale alone; train a dual, shared_t or baseline model."
        )
    own = {"t_law": UNIFORM, "timestep_weights": "published", "min_snr_gamma": None}
    own |= {"perceptual_weight": 0.0, "feature_weight": 0.0}
    for name, usual in own.items():
        if getattr(settings, name) != usual:
            way_out = "leave it out" if usual is None else f"pass --{name} {usual}".removesuffix(".0")
            raise ValueError(
                f"--objective consistency has noise levels, weights and a distance of its own, which --{name} would "
                f"change; {way_out}."
            )
    if settings.cuda_graphs:
        # The call for the target would write over what the gradient of the other one needs.
        raise ValueError("--cuda_graphs and --objective consistency exclude each other; leave one of them out.")
    if settings.consistency_solver is not None and settings.student is None:
        raise ValueError(NO_TEACHER)
    check_function(settings.process, settings.prediction_type)


def check_function(process: str, prediction_type: str) -> None:
    """Raise ValueError for a prediction whose consistency function does not come to the image at timestep 0."""
    if process == "flow" and prediction_type == "x0":
        raise ValueError(
            "--objective consistency asks of the clean image that it be the noisy one where there is no noise, of "
            "which a prediction of x0 knows nothing in the process 'flow'; use --prediction_type velocity or v."
        )
