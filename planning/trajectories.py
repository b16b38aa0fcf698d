"""Fine trajectories of a network, and what it sees along them: all that is needed to plan for a solver.

A trajectory is what the network makes of one noise in many steps, here of DPM-Solver++(2M) along the diagonal of the
image. What a path with few steps can change is how far it ends from there; the errors of the network itself, which are
in both, it cannot. Kept are the states of every scale at every line, in variance-preserving scale, and the clean images
seen in them, at the lines and, for two clocks, at pairs of lines: the fine state of one line beside the coarse state of
another.

Both are kept as coordinates. In a basis in which images are nearly independent (`images.modes`) modes of about equal
variance make a bin, and within a bin only inner products matter, which the leading eigenvectors of their matrix give.

Shapes: n lines and the clean end, S scales, K measured cells, B noises, M bins, R coordinates.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from diffusion.sampler import sample
from diffusion.solvers import Dpmpp2M
from diffusion.step import Step
from images.modes import ModeBasis, band_to_modes, to_modes
from images.representation import Images, Overcomplete
from paths.path import Path
from runtime.progress import Progress
from scheduler import DDIMScheduler, Denoiser

BINS = 24  # Of variance, evenly in its logarithm, of each band.
LEAST_SHARE = 1e-9  # Of the largest eigenvalue: coordinates below it are left out.


class Band(NamedTuple):
    """One band of the images: of one scale all of it, of two the low band or the details."""

    scales: tuple[int, ...]  # That hold it.
    result: int  # Which of them, as an index, has it in the image at the end.
    variances: torch.Tensor  # float64 [R], mean over the modes of the bin of a coordinate, in units of x²
    states: torch.Tensor  # float64 [len(scales), n + 1, R]: at each line, and clean; coarse images doubled
    seen: torch.Tensor  # float64 [len(scales), K, R]: the clean images seen in each cell


class Trajectories(NamedTuple):
    """What `fine_trajectories` measured; squared lengths are means over the noises, in units of x² per image."""

    points: torch.Tensor  # int64 [n + 1, S], timesteps of the lines on the diagonal, and 0 for the clean end
    log_snr: torch.Tensor  # float64 [n + 1, S] at them, +inf at the end
    cells: torch.Tensor  # int64 [n, n], by fine and coarse line: which of the K cells, or -1
    bands: tuple[Band, ...]
    nfe: int  # network calls for each noise


class _Recorder(Dpmpp2M):
    """The solver of the trajectories, which keeps what it is given."""

    def start(self) -> None:
        super().start()
        self.xs: list[Images] = []
        self.x0s: list[Images] = []

    def step(self, step: Step) -> Images:
        self.xs.append(step.xs)
        self.x0s.append(step.x0s)
        self.end = super().step(step)
        return self.end


@torch.no_grad()
def fine_trajectories(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    lines: Sequence[Sequence[int]],  # [n + 1][S] timesteps of the diagonal, from noise to 0
    noise: Images,  # standard normal [B, C, H, W] per scale, as `sample` takes it
    cells: torch.Tensor | None = None,  # bool [n, n]: what else to measure for two clocks; None: the lines alone
    batch_size: int = 16,
    autocast: Callable[[], AbstractContextManager] | None = None,  # entered around all calls
    progress: bool = True,
) -> Trajectories:
    """Trajectories from every noise, and what the denoiser sees along them: n calls, and one for each further cell.

    Clean images are those that the sampler goes by, clamped if the scheduler clamps. Raises ValueError for fewer than
    two noises, of which there is no variance, for cells of another shape, and what `sample` raises.
    """
    count, num_scales = len(noise[0]), len(noise)
    if count < 2:
        raise ValueError("Trajectories need 2 noises or more, from which they take the variances of their images.")
    path = Path(lines, "lines", {})
    points = torch.tensor(path.points)  # [n + 1, S]
    wanted = torch.eye(path.nfe, dtype=torch.bool)
    if cells is not None:
        if num_scales != 2 or cells.shape != wanted.shape:
            raise ValueError(f"cells must be bool {list(wanted.shape)} like the lines, and of two scales.")
        wanted = wanted | cells
    places = wanted.nonzero()  # [K, 2]
    tables, representation = scheduler.to(noise[0].device), scheduler.representation
    log_snr = tables.log_snr.cpu()[points]
    log_snr[-1] = math.inf
    sizes = torch.hypot(tables.alphas, tables.sigmas).cpu()[points]
    sizes[-1] = 1
    bar = Progress(total=len(places) * count, unit="call", desc="trajectories", disable=not progress)

    def see(xs: Images, ts: Sequence[int]) -> Images:
        predictions = denoise(xs, tuple(torch.full((len(x),), t, device=x.device) for x, t in zip(xs, ts, strict=True)))
        predictions = tuple(p.to(x.dtype) for p, x in zip(predictions, xs, strict=True))
        return representation.project(tables.predict_clean(predictions, tuple(ts), xs))

    with (autocast or nullcontext)(), bar:
        walks = []
        for start in range(0, count, batch_size):
            walk = _Recorder()
            sample(denoise, scheduler, path, tuple(x[start : start + batch_size] for x in noise), solver=walk)
            walks.append(walk)
            bar.update(path.nfe * len(walk.end[0]))
        ends = [representation.compose(walk.end) for walk in walks]
        mean = sum(end.double().sum(0) for end in ends) / count
        basis = ModeBasis.of_images(ends, mean)
        variances = sum(to_modes(end.double() - mean, basis).square().sum(0) for end in ends) / (count - 1)
        bands = _bands(variances, num_scales, representation)
        products: list[torch.Tensor] = [0] * len(bands)
        for walk in walks:
            states = [
                tuple(x / size for x, size in zip(xs, level, strict=True))
                for xs, level in zip([*walk.xs, walk.end], sizes.tolist(), strict=True)
            ]
            vectors = [_by_band(xs, basis, bands) for xs in states]
            for i, j in places.tolist():
                x0s = walk.x0s[i]
                if i != j:
                    x0s = see((walk.xs[i][0], walk.xs[j][1]), (points[i, 0].item(), points[j, 1].item()))
                    bar.update(len(x0s[0]))
                vectors.append(_by_band(x0s, basis, bands))
            for b, band in enumerate(bands):
                # By scale, then by line or cell.
                rows = torch.stack([v[b][s] for s in range(len(band.scales)) for v in vectors])  # [Q, B', modes]
                if not rows.isfinite().all():
                    raise ValueError(
                        "The network makes an image NaN or infinite on its way; use another checkpoint, or --precision "
                        "fp32."
                    )
                products[b] = products[b] + torch.stack([_product(rows[..., chosen]) for chosen in band.bins])
    found = []
    for band, product in zip(bands, products, strict=True):
        table, own = _coordinates(product / count, band.variances)
        states, seen = table.unflatten(0, (len(band.scales), -1)).split([path.nfe + 1, len(places)], dim=1)
        found.append(Band(band.scales, band.result, own, states.contiguous(), seen.contiguous()))
    numbers = torch.full(wanted.shape, -1)
    numbers[tuple(places.T)] = torch.arange(len(places))
    return Trajectories(points, log_snr, numbers, tuple(found), len(places))


class _Bins(NamedTuple):
    """Which modes of a band make a bin."""

    scales: tuple[int, ...]
    result: int
    is_low: bool | None  # None: all bands
    bins: list[torch.Tensor]  # indices of modes
    variances: torch.Tensor  # [M]


def _bands(variances: torch.Tensor, num_scales: int, representation: Overcomplete) -> list[_Bins]:
    """The bands of a model from the variances `[4, C, H/2, W/2]` of its images."""
    if num_scales == 1:
        return [_Bins((0,), 0, None, *_binned(variances.flatten()))]
    fine_holds_low = representation.fine_share == 1
    low = _Bins((0, 1) if fine_holds_low else (1,), 0, True, *_binned(variances[0].flatten()))
    return [low, _Bins((0,), 0, False, *_binned(variances[1:].flatten()))]


def _binned(variances: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    logs = variances.clamp(min=1e-12).log()
    edges = torch.linspace(logs.min().item(), logs.max().item(), BINS + 1, dtype=torch.float64)[1:-1].to(logs)
    number = torch.bucketize(logs, edges)
    bins = [(number == k).nonzero()[:, 0] for k in number.unique().tolist()]
    return bins, torch.stack([variances[chosen].mean() for chosen in bins]).cpu()


def _by_band(xs: Images, basis: ModeBasis, bands: Sequence[_Bins]) -> list[list[torch.Tensor]]:
    """Modes `[B, modes]` of each band, of every scale that holds it; those of the coarse scale doubled."""
    fine = to_modes(xs[0].double(), basis)  # [B, 4, C, H/2, W/2]
    parts = {None: fine, True: fine[:, 0], False: fine[:, 1:]}
    coarse = band_to_modes(2 * xs[1].double(), basis) if len(xs) > 1 else None
    return [
        [(parts[band.is_low] if scale == 0 else coarse).flatten(1).float() for scale in band.scales] for band in bands
    ]


def _product(vectors: torch.Tensor) -> torch.Tensor:
    rows = vectors.flatten(1).double()  # [Q, B' modes]
    return (rows @ rows.T).cpu()


def _coordinates(products: torch.Tensor, variances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors `[Q, R]` with the inner products `[M, Q, Q]` of all bins, but for what is below `LEAST_SHARE`; and the
    variance that belongs to each coordinate `[R]`."""
    values, axes = torch.linalg.eigh(products)  # rising, [M, Q]; [M, Q, Q] by column
    bins, columns = (values > LEAST_SHARE * values[:, -1:]).nonzero(as_tuple=True)  # [R] each
    table = axes[bins, :, columns] * values[bins, columns].sqrt()[:, None]  # [R, Q]
    return table.T.contiguous(), variances[bins]
