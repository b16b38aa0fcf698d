"""Run any model along any path, one scale or several, with DDIM.

The final point of a path is clean: the last step takes every scale to abar = 1 (`end="clean"`), or stops at
abar(0), noise of standard deviation 0.01, as the published runs did (`end="t0"`).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from diffusion.solvers import Ddim
from diffusion.step import Solver, Step
from paths.path import Path
from runtime.device import autocast, compile_or_not, compiling_failed
from scheduler import CLEAN, NO_VARIANCE, DDIMScheduler, Denoiser

Images = tuple[torch.Tensor, ...]
# Called at a point of a path with its index and images; what it returns, if anything, is gone on with instead.
Callback = Callable[[int, Images], tuple[int, Images] | None]
ENDS = ("clean", "t0")
# Whence the coarse image comes that a network reads and does not predict (`sample`).
COARSE_FEEDS = ("x0", "noisy")
IMAGES_PER_SEED = 1_000_000


class Samples(NamedTuple):
    """What `sample` returns: one `[B, C, H, W]` tensor per scale, fine first, and the calls it took."""

    images: Images
    nfe: int  # For each image; of an adaptive solver the mean over the images, rounded.


def check_finite(images: torch.Tensor, names: Sequence[object]) -> None:
    """Raise ValueError, with its name, for the first of some images `[B, C, H, W]` that is NaN or infinite anywhere."""
    finite = images.isfinite().flatten(1).all(1)  # [B]
    if not finite.all():
        raise ValueError(
            f"The network makes image {names[finite.tolist().index(False)]} NaN or infinite; use another checkpoint, "
            "or --precision fp32."
        )


class GreedySamples(NamedTuple):
    """What `sample_greedy` returns."""

    images: Images  # fine and coarse, [B, C, H, W]
    nfe: torch.Tensor  # int64 [B], network evaluations spent on each image, those on moves not taken included
    points: torch.Tensor  # int64 [B, M + 1, 2], timesteps on the way to 0; shorter paths wait on their last rung


class SeededNoise:
    """Standard normal noise in which row k depends on `seeds[k]` and on the number of draws before only.

    The same on every device and for every batch size: it is drawn on the CPU, one generator per seed. A seed is a
    number, or several together, of which the last is not 0, for a stream of its own.
    """

    def __init__(self, seeds: Sequence[int | tuple[int, ...]]):
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def draw(self, shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """Float32 `[len(seeds), *shape]`."""
        rows = np.empty((len(self._generators), *shape), np.float32)
        for generator, row in zip(self._generators, rows, strict=True):
            generator.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(rows).to(device)


def image_seeds(seed: int, count: int) -> range:
    """The seeds of `count` images of evaluation seed `seed`: no two evaluation seeds share an image."""
    if seed < 0:
        raise ValueError(f"Seed {seed} is negative; choose 0 or a positive integer.")
    if count > IMAGES_PER_SEED:
        raise ValueError(f"{count} images exceed the {IMAGES_PER_SEED} that one seed provides; use several seeds.")
    return range(seed * IMAGES_PER_SEED, seed * IMAGES_PER_SEED + count)


def scale_shapes(num_scales: int, channels: int, resolution: int) -> list[tuple[int, int, int]]:
    """`(C, H, W)` of each scale, fine first, each half the size of the one before."""
    return [(channels, resolution >> s, resolution >> s) for s in range(num_scales)]


def coarse_feed(model: torch.nn.Module, coarse_from: str) -> str | None:
    """`coarse_from` for a model that reads more scales than it predicts, None for any other."""
    return coarse_from if model.num_predictions < model.num_scales else None


def in_full_batches(denoise: Denoiser, batch_size: int) -> Denoiser:
    """A denoiser that calls `denoise` with `batch_size` contiguous images when it is called with that many or fewer.

    Smaller batches are filled up with copies of their last image, whose predictions are dropped. Timesteps become
    float64, as real ones are.
    """

    def call(xs: Images, ts: Images, *labels: torch.Tensor) -> Images:
        count = len(xs[0])
        rows = torch.arange(batch_size, device=xs[0].device).clamp(max=count - 1) if count < batch_size else slice(None)
        full = [tuple(x[rows].contiguous() for x in xs), tuple(t[rows].double().contiguous() for t in ts)]
        full += [each[rows].contiguous() for each in labels]
        return tuple(prediction[:count] for prediction in denoise(*full))

    return call


def compile_denoiser(
    denoise: Denoiser,
    shapes: Sequence[tuple[int, int, int]],
    batch_size: int,
    device: torch.device,
    precision: str = "auto",
    with_labels: bool = False,
) -> tuple[Denoiser, str]:
    """`denoise` compiled for batches of `(C, H, W)` per scale, or itself and one sentence that says what failed.

    Sampling with it under `autocast(device, precision)` compiles nothing more, nor does the last, smaller batch: for
    another size the compiler would take as long as for the first. Another model of the same sizes is compiled at
    once. Takes minutes on a CPU. with_labels: whether it is told classes. Raises what says that memory has run out.
    """

    def rehearse(compiled: Denoiser) -> None:
        xs = tuple(torch.zeros(batch_size, *shape, device=device) for shape in shapes)
        ts = tuple(torch.zeros(batch_size, dtype=torch.float64, device=device) for _ in shapes)
        labels = (torch.zeros(batch_size, dtype=torch.long, device=device),) if with_labels else ()
        with torch.no_grad(), autocast(device, precision):
            compiled(xs, ts, *labels)

    compiled, reason = compile_or_not(denoise, rehearse, dynamic=False)
    if reason:
        return denoise, compiling_failed(reason)
    full = in_full_batches(compiled, batch_size)
    full.calls = getattr(denoise, "calls", 1)
    return full, ""


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,
    noise: Sequence[torch.Tensor],
    eta: float = 0.0,
    callback: Callback | None = None,
    end: str = "clean",
    draw: Callable[[Sequence[int]], torch.Tensor] | None = None,
    coarse_from: str | None = None,
    solver: Solver | None = None,
    labels: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
) -> Samples:
    """Sample along a path from standard normal `noise`, one `[B, C, H, W]` tensor per scale, fine first.

    The scales are those of `scheduler.representation`, to whose subspaces all noise is brought.

    denoise: `(xs, ts) -> predictions`, one tensor per scale each, ts int64 `[B]`, called once at every point
        but the last, and as often besides as the solver asks. Of 2C channels the second half is about variances, which
        a solver may read (`DDIMScheduler.split_variance`). A scale whose timestep does not move keeps its image,
        except that with `end="clean"` the last step takes every scale to clean. solver: of `diffusion.solvers`; None:
        DDIM with eta, 0 DDIM to 1 ancestral. Where noise is needed on the way, `draw(shape)` supplies it,
        `[B, C, H, W]` for shape `(C, H, W)`, scale by scale. callback: called as `(k, images)` at
        every point k; where it returns `(k', images')`, sampling goes on from point k' <= k with those images.
    coarse_from: for a denoiser that reads all scales and predicts the first alone, one of COARSE_FEEDS. The other
        images are then made anew after every call. "x0": the mean of the predicted clean image over the pixels of
        theirs, noised to their timestep with fresh noise from `draw`; pure noise at the start. "noisy": the mean of
        the noisy fine image, whatever their timestep.
    labels: the class of each image, int64 `[B]`, for a denoiser that takes them as a third argument.
    given: clean coarse images `[B, C, H/2, W/2]`, for a denoiser that reads two scales (arXiv 2106.15282, section 4.2).
        The coarse scale rests at its timestep on the path: every call sees the given image with `noise[1]` at that
        timestep, at timestep 0 as it is, and is told so. Of the predictions the first alone counts, and the image that
        is returned is composed with the given one.

    Returns images (float32, in [-1, 1] if the schedule clamps; the first is the image that the scales compose) and the
    calls counted, which are several for each evaluation of a denoiser that says so (`calls`). Raises ValueError if path
    and noise differ in their number of scales, for an unknown end or feed, for predictions that leave a scale to no
    feed, for a path that moves a given image before its last point, for a solver that reads variances which are not
    there, for a callback that goes on from a later point, and what `scheduler.step_from` raises.
    """
    if path.num_scales != len(noise):
        raise ValueError(f"The path has {path.num_scales} scale(s) but the model samples {len(noise)}.")
    if end not in ENDS:
        raise ValueError(f"Unknown end '{end}'; choose one of {', '.join(ENDS)}.")
    if coarse_from not in (None, *COARSE_FEEDS):
        raise ValueError(f"Unknown coarse feed '{coarse_from}'; choose one of {', '.join(COARSE_FEEDS)}.")
    if coarse_from == "x0" and draw is None:
        raise ValueError("A coarse image made of the clean one needs fresh noise; pass draw.")
    if given is not None and (path.num_scales != 2 or coarse_from is not None):
        raise ValueError("A coarse image that is given needs a path of two scales, and no coarse feed beside it.")
    if given is not None and len({t_32 for _, t_32 in path.points[:-1]}) > 1:
        raise ValueError(f"A coarse image that is given rests at one timestep, and path {path.kind} moves it.")
    solver = Ddim(eta) if solver is None else solver
    if coarse_from is not None and solver.calls_between:
        raise ValueError(f"{solver.name} calls the network between points, where it has no coarse image to read.")
    if solver.draws and draw is None:
        raise ValueError(f"{solver.name} draws noise at every step; pass draw.")
    targets = [*path.points[1:-1], (CLEAN,) * path.num_scales if end == "clean" else path.points[-1]]
    representation = scheduler.representation
    xs = representation.project(tuple(map(scheduler.prior, noise, path.points[0])))
    if coarse_from == "noisy":
        xs = (xs[0], *(_mean_like(xs[0], x) for x in xs[1:]))
    num_known, known, resting = path.num_scales, (), ()
    if given is not None:
        level = path.points[0][1]
        num_known, known = 1, (given.to(xs[0].dtype),)
        # Whatever is drawn, timestep 0 is the image itself, as in all that is given clean.
        resting = (scheduler.add_noise(given, noise[1], level).to(xs[0].dtype) if level > 0 else known[0],)
        xs = (xs[0], *resting)
        targets = [(t, level) for t, _ in targets]
    batch, device = len(xs[0]), xs[0].device
    k = seen = 0
    solver.start()
    tables = functools.cache(lambda: scheduler.to(device))
    calls = getattr(denoise, "calls", 1)

    def call(
        xs: Images, point: tuple[int | torch.Tensor, ...], rows: torch.Tensor | None = None
    ) -> tuple[Images, Images | None]:
        nonlocal seen
        count, is_real = len(xs[0]), isinstance(point[0], torch.Tensor)
        behind = known if rows is None else tuple(x[rows] for x in known)
        if len(xs) < path.num_scales:  # Of a solver, which moves the fine scale alone.
            xs += resting if rows is None else tuple(x[rows] for x in resting)
        ts = point if is_real else tuple(torch.full((count,), t, dtype=torch.long, device=device) for t in point)
        told = () if labels is None else (labels if rows is None else labels[rows],)
        predictions, variances = scheduler.split_variance(denoise(xs, ts, *told), xs)
        seen += count * calls
        if given is None and len(predictions) != (path.num_scales if coarse_from is None else 1):
            raise ValueError(
                f"The denoiser predicts {len(predictions)} of {path.num_scales} scales, which does not go with "
                f"coarse_from = {coarse_from}."
            )
        predictions = tuple(prediction.to(x.dtype) for x, prediction in zip(xs, predictions[:num_known], strict=False))
        return (tables() if is_real else scheduler).predict_clean(predictions, point, xs, behind), variances

    def evaluate(xs: Images, point: tuple[int | torch.Tensor, ...], rows: torch.Tensor | None = None) -> Images:
        return call(xs, point, rows)[0]

    while True:
        if callback is not None and (moved := callback(k, xs)) is not None:
            if not 0 <= moved[0] <= k:
                raise ValueError(f"A callback at point {k} must go on from point 0 to {k}, not from {moved[0]}.")
            if moved[0] < k:
                solver.start()
            k, xs = moved
        if k == path.nfe:
            return Samples(representation.finished(xs if given is None else (xs[0], *known)), round(seen / batch))
        point, next_point = path.points[k], targets[k]
        moves = [t_next != t for t, t_next in zip(point, next_point, strict=True)]
        for t, t_next in itertools.compress(zip(point, next_point, strict=True), moves):
            scheduler.check_step(t, t_next)
        x0s, variances = call(xs, point)
        if solver.reads_variance:
            if variances is None:
                raise ValueError(NO_VARIANCE)
            variances = tuple(each.to(x.dtype) for each, x in zip(variances[:num_known], xs, strict=False))

        moving = list(zip(xs, moves, strict=True))[: len(x0s)]

        def fresh(moving: list[tuple[torch.Tensor, bool]] = moving) -> Images:
            return representation.project(tuple(draw(x.shape[1:]) if move else x for x, move in moving))

        stepped = solver.step(Step(scheduler, point, next_point, xs, x0s, evaluate, fresh, calls, variances))
        stepped += resting
        if coarse_from == "noisy":
            stepped += tuple(_mean_like(stepped[0], x) for x in xs[1:])
        elif coarse_from == "x0":
            for x, t_next in zip(xs[1:], next_point[1:], strict=True):
                x = _mean_like(x0s[0], x)
                stepped += (x if t_next == CLEAN else scheduler.add_noise(x, draw(x.shape[1:]), t_next),)
        k, xs = k + 1, stepped


def _mean_like(fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(fine, fine.shape[-1] // coarse.shape[-1])


@torch.no_grad()
def sample_greedy(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    rungs: Sequence[int],  # timesteps that both scales may visit, falling strictly to 0
    noise: Sequence[torch.Tensor],  # fine and coarse, [B, C, H, W]
) -> GreedySamples:
    """Sample with two clocks, each image choosing its moves by trying them; it starts with both scales on rungs[0].

    From its point an image tries to move the fine scale, the coarse one, or both by one rung (DDIM, eta = 0), calls the
    network at each of the three, and takes the move of least estimated error per rung. The estimate is the difference
    between Euler's step and the trapezoid that the new prediction allows, in the coordinates in which DDIM is Euler's
    method (arXiv 2010.02502, eq. 14): ½ |σ̂' - σ̂| ‖ε' - ε‖ with σ̂ = SNR^-½, both scales in quadrature. The prediction
    at the move taken serves the next choice. A scale that is one rung short of 0 waits for the other, which then has no
    choice, and the last step takes both to clean together.

    Every evaluation counts in `nfe`, also those of moves not taken: some three per point. Compare with paths of so many
    steps. Raises ValueError for rungs that do not fall to 0 or start at zero SNR, and for other than two scales.
    """
    ladder = torch.tensor(list(rungs), device=noise[0].device)
    if len(noise) != 2 or len(ladder) < 2 or (ladder.diff() >= 0).any() or ladder[-1] != 0:
        raise ValueError(f"Greedy sampling needs 2 scales and rungs falling to 0; got {len(noise)} and {list(rungs)}.")
    tables = scheduler.to(ladder.device)
    sigma = tables.snr[ladder].pow(-0.5)
    if sigma.isinf().any():
        raise ValueError(f"The SNR at timestep {rungs[0]} is 0, where noise is undefined; start the rungs below it.")
    last = len(ladder) - 2  # The rung from which the last step lands on clean.
    moves = torch.tensor([[1, 0], [0, 1], [1, 1]], device=ladder.device)

    def evaluate(xs: Images, at: torch.Tensor) -> tuple[Images, Images]:
        ts = ladder[at].T
        predictions = denoise(xs, tuple(ts))
        predictions = tuple(p.to(x.dtype) for p, x in zip(predictions, xs, strict=True))
        epsilons = tuple(tables.predict_epsilon(p, t, x) for p, t, x in zip(predictions, ts, xs, strict=True))
        return predictions, epsilons

    xs = scheduler.representation.project(tuple(tables.prior(each, rungs[0]) for each in noise))
    at = torch.zeros(len(noise[0]), 2, dtype=torch.long, device=ladder.device)
    nfe = torch.ones(len(at), dtype=torch.long, device=ladder.device)
    predictions, epsilons = evaluate(xs, at)
    points = [ladder[at]]
    while (at < last).any():
        states = (*xs, *predictions, *epsilons)
        best_error = torch.full((len(at),), math.inf, dtype=torch.float64, device=ladder.device)
        best_at, best = at.clone(), tuple(s.clone() for s in states)
        for move in moves:
            # Both move together only if both can; a move alone is no choice for a scale that has arrived.
            rows = (at + move <= last).all(1).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            x, prediction, epsilon = (tuple(s[rows] for s in group) for group in (xs, predictions, epsilons))
            start, end = at[rows], at[rows] + move
            ts = ladder[start].T
            x0s = tables.predict_clean(prediction, ts, x)
            x = tuple(
                tables.step_from(x0, t, u, y) if m else y
                for y, x0, t, u, m in zip(x, x0s, ts, ladder[end].T, move.tolist(), strict=True)
            )
            prediction, new_epsilon = evaluate(x, end)
            nfe[rows] += 1
            change = [(e - f).flatten(1).double().norm(dim=1) for e, f in zip(new_epsilon, epsilon, strict=True)]
            error = ((sigma[end] - sigma[start]) * torch.stack(change, 1)).norm(dim=1) / (2 * move.sum())
            better = error < best_error[rows]
            chosen = rows[better]
            best_error[chosen], best_at[chosen] = error[better], end[better]
            for kept, new in zip(best, (*x, *prediction, *new_epsilon), strict=True):
                kept[chosen] = new[better]
        at, xs, predictions, epsilons = best_at, best[:2], best[2:4], best[4:]
        points.append(ladder[at])
    ts = ladder[at].T
    x0s = tables.predict_clean(predictions, ts, xs)
    xs = tuple(tables.step_from(x0, t, torch.full_like(t, CLEAN), x) for x0, t, x in zip(x0s, ts, xs, strict=True))
    points.append(torch.zeros_like(points[0]))
    return GreedySamples(scheduler.representation.finished(xs), nfe.cpu(), torch.stack(points, 1).cpu())


def sample_seeds(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,
    seeds: Sequence[int],
    shapes: Sequence[tuple[int, int, int]],
    batch_size: int,
    device: torch.device | str = "cpu",
    eta: float = 0.0,
    callback: Callback | None = None,
    end: str = "clean",
    coarse_from: str | None = None,
    solver: Solver | None = None,
    labels: Sequence[int] | None = None,
    starts: Callable[[Sequence[int]], Images] | None = None,
) -> Iterator[tuple[Sequence[int], Samples]]:
    """`sample` batch by batch, with the noise of each seed: image k depends on `seeds[k]` alone.

    shapes: `(C, H, W)` per scale, fine first. labels: the class of each seed. starts: what goes in place of the noise
    of some seeds, `[B, C, H, W]` by scale, for a model that starts from images. Yields the seeds of each batch with its
    samples.
    """

    def prepare(start: int) -> tuple[Sequence[int], Callable, list[torch.Tensor]]:
        chosen = seeds[start : start + batch_size]
        draw = functools.partial(SeededNoise(chosen).draw, device=device)
        return chosen, draw, [draw(shape) for shape in shapes] if starts is None else list(starts(chosen))

    firsts = range(0, len(seeds), batch_size)
    following = prepare(0) if firsts else None
    for start in firsts:
        chosen, draw, noise = following
        told = None if labels is None else torch.tensor(labels[start : start + batch_size], device=device)
        samples = sample(denoise, scheduler, path, noise, eta, callback, end, draw, coarse_from, solver, told)
        if start != firsts[-1]:
            # A GPU is still at work on these images, and the host has nothing else to do.
            following = prepare(start + batch_size)
        yield chosen, samples
