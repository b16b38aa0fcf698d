"""Progressive distillation: one step of a student lands where two steps of its teacher land (arXiv 2202.00512).

Both walk along one path by DDIM, the student at every second point of the teacher. From a noisy image z at the start of
a step the teacher goes to the point between and on to the end, where it is at z″. The student learns the clean image x̃
whose step from z lands on z″ (appendix G). In x̂ = x / alpha and σ̂ = sigma / alpha, in which a step of DDIM to a clean
image x keeps the share r = σ̂' / σ̂ of what x̂ differs from it, with r₁, r₂ of the two steps and x₁, x₂ seen by the
teacher before them,

    x̃ = [(1 - r₂) x₂ + r₂ (1 - r₁) x₁] / (1 - r₁ r₂)

which is a mean of both with positive weights: it divides by no small difference, and lies in [-1, 1] if they do. A step
that ends on the clean image has r₂ = 0 and x̃ = x₂, what the teacher sees at the point between.

Each scale has its own clock and its own r. A scale that rests in one of the two steps has r = 1 there; one that rests
in both does not move, whatever is predicted of it, and learns x₁, what the teacher sees.

Shapes: B images of a step, N steps of the student.
"""

from collections.abc import Sequence
from typing import Any

import torch

from images.representation import Images
from scheduler import CLEAN, DDIMScheduler, Denoiser
from training.objective import Denoising, Networks, TrainingBatch
from training.terms import Term

CALLS_EACH = 2  # Of the teacher, for an image of a step.


def kept(scheduler: DDIMScheduler, t: torch.Tensor, t_next: torch.Tensor) -> torch.Tensor:
    """The share of the noise of x̂ that a step from t to t_next keeps, σ̂(t_next) / σ̂(t), float64 `[B]`.

    t: int64 `[B]`; t_next: likewise, or CLEAN, which keeps nothing. A step from pure noise, where alpha is 0, keeps
    nothing either; rest keeps all, also there and where there is no noise.
    """
    wide = torch.empty(0, 1, dtype=torch.float64)
    (alpha, sigma), (after, left) = (scheduler.scales(each, wide) for each in (t, t_next))  # [B, 1] each
    share = torch.where(t_next == CLEAN, 0.0, (left * alpha / (sigma * after))[:, 0])
    return torch.where(t_next == t, 1.0, share)


def two_steps(
    teacher: Denoiser,
    scheduler: DDIMScheduler,
    zs: Images,  # [B, C, H, W] by scale
    starts: Images,  # int64 [B] by scale
    middles: Images,
    ends: Images,  # or CLEAN
    labels: torch.Tensor | None = None,  # [B]
) -> Images:
    """x̃ by scale: the clean images whose one step of DDIM from zs lands where two of the teacher land."""
    told = () if labels is None else (labels,)

    def seen(xs: Images, ts: Images) -> Images:
        predictions = teacher(xs, ts, *told)
        return scheduler.predict_clean(tuple(p.to(x) for p, x in zip(predictions, xs, strict=True)), ts, xs)

    def land(x0: torch.Tensor, x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor) -> torch.Tensor:
        alpha, sigma = scheduler.scales(t_next, x)
        moved = alpha * x0 + sigma * scheduler.epsilon_of(x0, t, x)
        return torch.where((t_next == t)[:, None, None, None], x, moved)  # Rest asks for no noise to step along.

    firsts = seen(zs, starts)
    between = tuple(map(land, firsts, zs, starts, middles))
    seconds = seen(between, middles)
    found = []
    for x1, x2, start, middle, end in zip(firsts, seconds, starts, middles, ends, strict=True):
        r1, r2 = kept(scheduler, start, middle), kept(scheduler, middle, end)
        moves = r1 * r2 < 1
        first = torch.where(moves, r2 * (1 - r1) / torch.where(moves, 1 - r1 * r2, 1.0), 1.0)
        first = first.to(x1.dtype)[:, None, None, None]
        found.append(first * x1 + (1 - first) * x2)
    return tuple(found)


class Progressive(Denoising):
    """Squared errors of predictions, as of clean images x̃ that two steps of the teacher lead to.

    config: also `teacher_points`, 2N + 1 points from noise to clean, each a list of timesteps, fine first; the last one
    stands for the clean image. Needs `networks.teacher`. `t_pairs`, `t_law` and `times` say nothing here: every step of
    the student is shown as often.
    """

    def __init__(
        self,
        config: dict[str, Any],
        scheduler: DDIMScheduler,
        terms: Sequence[Term] = (),
        networks: Networks | None = None,
    ):
        super().__init__(config, scheduler, terms, networks)
        self._teacher = networks.teacher
        points = torch.tensor(config["teacher_points"], device=scheduler.log_snr.device)  # [2N + 1, scales]
        points[-1] = CLEAN
        self._starts, self._middles, self._ends = points[:-1:2].T, points[1::2].T, points[2::2].T  # [scales, N] each

    def _timesteps(
        self, batch: int, generator: torch.Generator, progress: float
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        count, device = self._starts.shape[1], self._starts.device
        place = torch.randint(count, (batch,), generator=generator, device=device)  # [B]
        t_64, t_32 = (self._starts[scale][place] for scale in (0, -1))  # A model of one scale does not look at t_32.
        return t_64, t_32, None

    def losses(self, denoise: Denoiser, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        """As of `Denoising`, with what the teacher leads to as clean images, and the noise that follows from it."""
        return super().losses(denoise, self.taught(batch))

    @torch.no_grad()
    def taught(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with x̃ as its clean images and the noise that makes the same noisy images of them.

        An image without noise, as flow has it at timestep 0, is its own clean image.
        """
        scheduler = self.scheduler
        used = batch.scales[: len(self._starts)]
        zs = tuple(scheduler.add_noise(*scale) for scale in used)
        # Which step starts there: no two of a path do so at the same timesteps.
        starts = zip(self._starts, (t for _, _, t in used), strict=True)
        place = torch.stack([t[:, None] == each for each, t in starts]).all(0).int().argmax(1)  # [B]
        points = (tuple(each[place] for each in rows) for rows in (self._starts, self._middles, self._ends))
        found = two_steps(self._teacher, scheduler, zs, *points, batch.labels)
        changes = {}
        for size, x0, (x, noise, t), z in zip((64, 32), found, used, zs, strict=False):
            noisy = scheduler.scales(t, z)[1] > 0
            changes[f"x_{size}"] = torch.where(noisy, x0, x)
            changes[f"noise_{size}"] = torch.where(noisy, scheduler.epsilon_of(x0, t, z), noise)
        return batch._replace(**changes)
