"""Plans on fine trajectories: the best path for a solver at each number of calls, and what others cost."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.solvers import make_solver
from images.representation import REPRESENTATIONS
from paths.descent import descend
from paths.families import diagonal, log_snr_shift
from paths.path import Path
from planning.deviation import deviation
from planning.plan import Plan, PlanCriterionSettings
from planning.trajectories import Trajectories
from planning.trajectory_file import trajectory_fingerprint
from scheduler import DDIMScheduler

# Starts of the search: log SNRs of the second point and of the last before the end, and powers of the spacing between.
FIRST, LAST, POWERS = (-14.0, -10.0, -7.0, -5.0), (0.0, 2.0, 5.0, 8.0), (0.7, 1.0, 1.4)
RANKING = (
    "With two small trained networks such costs ranked the distances of samples along 200 random paths by rank "
    "correlations of 0.90 to 1.00 (docs/results.md, section 10)."
)
LEADS = (-3, -2, -1, 1, 2, 3)  # Lines that the coarse scale leads by in starts with two clocks.


class TrajectoryPlanner:
    """A solver on the trajectories of one network: optimal paths, and the cost of any other.

    The cost is the mean squared distance, in units of x² per image, of what the solver samples along a path from the
    end of the fine trajectory of the same noise (`planning.deviation`).
    """

    is_slow, can_resample = True, False

    def __init__(self, trajectories: Trajectories, said: Mapping[str, Any], settings: PlanCriterionSettings):
        self.trajectories, self.said, self.settings = trajectories, said, settings
        self.map_fingerprint = trajectory_fingerprint(trajectories)
        self.solver = {"name": settings.solver, "end": "clean"}
        self.representation = REPRESENTATIONS[said["representation"]]
        scheduler = DDIMScheduler(said["num_train_timesteps"], said["beta_schedule"], prediction_type="v")
        self.log_snr = scheduler.log_snr.numpy()
        self.num_scales = trajectories.points.shape[1]
        self.two_clocks = self.num_scales > 1 and trajectories.nfe > len(trajectories.cells)
        self._cost = deviation(trajectories, make_solver(settings.solver).rule)
        self._points = trajectories.points.numpy()

    @property
    def criterion(self) -> str:
        """What is minimised, in words."""
        return f"trajectory, {self.settings.solver}"

    @property
    def meaning(self) -> str:
        """What the optimum is optimal for, in words."""
        return (
            f"whose samples by {self.settings.solver} end nearest to what this network makes of the same noise in "
            f"{len(self._points) - 1} steps, in units of x² per image"
        )

    @property
    def ranking(self) -> str:
        """What such costs have been found to say of images."""
        return RANKING

    @property
    def variant(self) -> str:
        """The criterion as a part of a file name."""
        return f"_trajectory_{self.settings.solver}"

    def valid(self, lines: np.ndarray) -> np.ndarray:
        """Which of some paths, int `[P, N, S]`, go from line 0 on without a stop, where something was measured."""
        cells, inside = self.trajectories.cells.numpy(), np.clip(lines, 0, len(self._points) - 2)
        timesteps = np.take_along_axis(self._points[:, None], np.concatenate([inside, 0 * inside[:, :1] - 1], 1), 0)
        return (
            (lines == inside).all((1, 2))
            & (lines[:, 0] == 0).all(1)
            & (np.diff(lines, axis=1) >= 0).all((1, 2))
            & (np.diff(timesteps, axis=1) != 0).any(2).all(1)
            & (cells[inside[..., 0], inside[..., -1]] >= 0).all(1)
        )

    def lines_of(self, path: Path) -> np.ndarray | None:
        """The lines `[N, S]` nearest to the points of a path in log SNR, or None where they are no path."""
        table = np.maximum(self.log_snr, self.trajectories.log_snr[0, 0].item())
        wanted = table[np.array(path.points[:-1])]  # [N, S]
        lines = np.abs(self.trajectories.log_snr[:-1].numpy() - wanted[:, None]).argmin(1)  # [N, S]
        return lines if self.valid(lines[None])[0] else None

    def path_of(self, lines: np.ndarray, kind: str) -> Path:
        """The path along lines `[N, S]`, with what it was planned for in its provenance."""
        points = np.concatenate([np.take_along_axis(self._points, lines, 0), 0 * self._points[:1]])
        provenance = {"criterion": self.criterion, "weights": self.said["fingerprint"]}
        return Path([tuple(point) for point in points.tolist()], kind, provenance)

    def cost(self, lines: np.ndarray) -> float:
        """The criterion on lines `[N, S]`."""
        return float(self._cost(lines[None])[0])

    def families(self, nfe: int) -> list[Plan]:
        """The optimum, of two clocks and of one, and every family by hand that keeps to what was measured."""
        if nfe > len(self._points) - 1:
            raise ValueError(
                f"--nfe {nfe} is more than the {len(self._points) - 1} lines of these trajectories; plan fewer calls, "
                "or compute more --lines."
            )
        even = {"log_snr": self.log_snr, "num_train_timesteps": len(self.log_snr), "start": int(self._points[0, 0])}
        ahead = self.representation.image_lead
        name = "image diagonal" if ahead else "diagonal"
        made = {}
        for spacing, words in (("uniform_t", "uniform t"), ("uniform_log_snr", "uniform λ"), ("karras", "Karras")):
            base = diagonal(nfe, spacing, self.num_scales, **even)
            made[f"{name}, {words}"] = log_snr_shift(base, ahead, self.log_snr) if ahead else base
        if self.two_clocks:
            base = diagonal(nfe, "uniform_log_snr", **even)
            for words, sign in (("coarse", 1), ("fine", -1)):
                made[f"{words} ahead by 1 in λ"] = log_snr_shift(base, ahead + sign, self.log_snr)
        by_hand = {name: lines for name, path in made.items() if (lines := self.lines_of(path)) is not None}
        starts = [*self._spaced(nfe), *(lines for lines in by_hand.values() if (lines == lines[:, :1]).all())]
        level, _ = descend(self._cost, self.valid, starts, tied=True)
        found = {"optimal diagonal": level}
        if self.two_clocks:
            starts = [level, *(self._leading(level, lead) for lead in LEADS), *by_hand.values()]
            found = {"optimal": descend(self._cost, self.valid, starts)[0]} | found
        return [Plan(name, self.path_of(lines, name), self.cost(lines)) for name, lines in (found | by_hand).items()]

    def _spaced(self, nfe: int) -> list[np.ndarray]:
        known = self.trajectories.log_snr[:-1, 0].numpy()
        share = np.linspace(0, 1, max(nfe - 1, 1))
        starts = []
        for first, last, power in itertools.product(FIRST, LAST, POWERS):
            wanted = first + (last - first) * share**power
            inner = np.abs(known - wanted[:, None]).argmin(1)[: nfe - 1]
            # Points that fall on one line move on.
            inner = np.maximum.accumulate(inner - np.arange(len(inner))) + np.arange(len(inner))
            starts.append(np.repeat(np.concatenate([[0], np.maximum(inner, 1)])[:, None], self.num_scales, 1))
        # Every line in turn, where there are hardly more of them than calls.
        most = np.linspace(0, len(known) - 1, nfe).round().astype(int)
        return [*starts, np.repeat(most[:, None], self.num_scales, 1)]

    def _leading(self, lines: np.ndarray, lead: int) -> np.ndarray:
        moved = lines.copy()
        moved[1:, 1] = np.clip(moved[1:, 1] + lead, 0, len(self._points) - 2)
        return moved
