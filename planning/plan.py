"""Plans on a heatmap: a criterion, the best path for each number of calls, and what others cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

import cli
from diffusion.solvers import SOLVERS, make_solver, with_rule
from paths.families import cascade, diagonal, fine_first, lead, log_snr_shift
from paths.map_interpolation import interpolate_map
from paths.optimal import find_optimal_path_n_steps_lambda, kl_path
from paths.path import Path
from paths.refine import cost_off_grid, refine_path
from planning.choice import CriterionSettings
from planning.error_map import per_image
from planning.map_file import map_fingerprint
from planning.map_paths import (
    KLProblem,
    beyond_seen,
    heatmap_path,
    kl_cascade,
    kl_lines,
    kl_refined,
    lift_path,
    path_errors,
    path_mses,
    representation_of,
    seen_cells,
    trusted,
)
from runtime.settings import option
from scheduler import DDIMScheduler

NEAR = 0.25  # A path keeps to where a network was trained if it is off by no more in log SNR, as timesteps may be.
DENSITY_LINES = 30
RANKING = (
    "That is not the quality of images: with exact denoisers such costs ranked paths by rank correlations of 0.19 to "
    "0.99, with a small trained network by -0.58 to 0.47 (docs/results.md, section 2)."
)
PUBLISHED = {"dp_64": "DP-64", "dp_total": "DP-Total"}


@dataclass(frozen=True, kw_only=True)
class PlanCriterionSettings(CriterionSettings):
    """What a plan minimises, and over which part of the plane."""

    criterion: str = option(
        "kl",
        "what the path minimises: kl and dp on a heatmap, for steps that hold their clean image, as those of ddim; "
        "trajectory on what compute_trajectories.py measured, for --solver",
        choices=("kl", "dp_64", "dp_total", "trajectory"),
    )
    solver: str = option("ddim", "of --criterion trajectory: what the path is for", choices=tuple(SOLVERS))
    start: int | None = option(None, "timestep of the first point, for kl (that of the map)", parse=cli.positive_int)
    end: int = option(0, "timestep at which the cost ends, for kl", parse=cli.seed)

    def check(self) -> None:
        super().check()
        if self.criterion != "kl" and (self.start is not None or self.end):
            raise ValueError("--start and --end go with --criterion kl")
        if self.criterion != "trajectory" and self.solver != "ddim":
            raise ValueError(
                f"--criterion {self.criterion} is the loss of steps that hold their clean image, as ddim does, and not "
                f"{self.solver}; use --criterion trajectory"
            )
        if make_solver(self.solver).rule is None:
            raise ValueError(
                f"--criterion trajectory fits {', '.join(with_rule())}, which take one call a step and no noise, and "
                f"not {self.solver}"
            )


class Plan(NamedTuple):
    """One path under the criterion."""

    family: str
    path: Path
    cost: float


class Planner:
    """A criterion on one heatmap: optimal paths, and the cost of any other.

    Raises ValueError for a start or end off the map, and for dp_total on a map of the fine scale alone.
    """

    can_resample = two_clocks = True
    is_slow = False

    def __init__(self, heatmap: dict, settings: PlanCriterionSettings):
        self.heatmap, self.settings = heatmap, settings
        self.said = heatmap | {"resolution": math.isqrt(heatmap["num_pixels_64"])}
        self.map_fingerprint = map_fingerprint(heatmap)
        self.solver = {"name": "ddim", "eta": 0.0, "end": "clean"}
        scheduler = DDIMScheduler(heatmap["num_train_timesteps"], heatmap["beta_schedule"], prediction_type="v")
        self.representation = representation_of(heatmap)
        self.log_snr = scheduler.log_snr.numpy()
        self.t_grid = heatmap["t_grid"].numpy()
        self.is_kl = settings.criterion == "kl"
        self.start = int(self.t_grid[0]) if settings.start is None else settings.start
        if self.is_kl:
            kl_lines(heatmap, self.log_snr, settings.start, settings.end, 2)  # Refuses a start or end off the map.
            problem = KLProblem.of(trusted(heatmap, self.log_snr), settings.kl_weight)
            options = {"criterion": "kl", "weight": settings.kl_weight, "bands": problem.bands}
            maps = problem[:2]
        else:
            if settings.criterion == "dp_total" and "LL" not in heatmap.get("jacobian", {"LL": None}):
                raise ValueError(
                    "This heatmap is of a model that predicts the fine image alone, and dp_total counts the error of "
                    "the coarse one too; use --criterion dp_64."
                )
            maps = path_errors(heatmap, settings.criterion, settings.factor, settings.normalisation)[:2]
            options = {"criterion": "published"}
        self._cost = cost_off_grid(self.t_grid, *maps, self.log_snr, **options)

    @property
    def criterion(self) -> str:
        """What is minimised, in words."""
        chosen = self.settings
        if self.is_kl:
            return f"kl, weight {chosen.kl_weight:g}, t = {self.start} to {chosen.end}"
        rule = f"{chosen.normalisation} normalisation, max_jump {chosen.max_jump}"
        return f"{chosen.criterion}, factor {chosen.factor}, {rule}"

    @property
    def meaning(self) -> str:
        """What the optimum is optimal for, in words."""
        if not self.is_kl:
            what = {"dp_64": "the fine prediction", "dp_total": "both predictions"}[self.settings.criterion]
            return f"of least published cost: how strongly {what} of this network depends on the noise"
        return "of least denoising error, of this network on the images of this map, that the steps hold fixed"

    @property
    def ranking(self) -> str:
        """What such costs have been found to say of images."""
        return RANKING

    @property
    def variant(self) -> str:
        """The criterion as a part of a file name; empty for the usual one."""
        chosen, usual = self.settings, PlanCriterionSettings()
        used = ("kl_weight", "start", "end") if self.is_kl else ("factor", "normalisation", "max_jump")
        values = {name: getattr(chosen, name) for name in ("criterion", *used)}
        words = [f"{name}-{value}" for name, value in values.items() if value != getattr(usual, name)]
        return "".join(f"_{word.removeprefix('criterion-')}" for word in words)

    def cost(self, path: Path) -> float:
        """The criterion on any path of two scales."""
        return self._cost(np.clip(path.points, self.settings.end, self.start))

    def optimum(self, nfe: int, on_diagonal: bool = False) -> Path:
        """The best path of all, or of those on the diagonal; the published criteria have no diagonal optimum."""
        settings = self.settings
        if self.is_kl:
            return kl_refined(
                self.heatmap, self.log_snr, nfe, settings.kl_weight, on_diagonal, self.start, settings.end
            ).path
        errors = path_errors(self.heatmap, settings.criterion, settings.factor, settings.normalisation)
        cells, _ = find_optimal_path_n_steps_lambda(*errors, nfe, settings.max_jump)
        options = {"criterion": "published", "max_jump": settings.max_jump}
        return refine_path(cells, self.t_grid, *errors[:2], self.log_snr, **options).path

    def families(self, nfe: int) -> list[Plan]:
        """Every path of so many steps, the optimum first."""
        end = self.settings.end
        # A schedule that begins at `end` is like any other.
        log_snr = self.log_snr[end:]
        table = {"log_snr": log_snr, "num_train_timesteps": len(log_snr), "start": self.start - end}
        even = diagonal(nfe, "uniform_log_snr", **table)
        made = {"diagonal, uniform t": diagonal(nfe, "uniform_t", **table), "diagonal, uniform λ": even}
        made["diagonal, Karras"] = diagonal(nfe, "karras", **table)
        if self.representation.image_lead:
            made["image diagonal, uniform λ"] = log_snr_shift(even, self.representation.image_lead, log_snr)
        for name, sign in (("coarse", 1), ("fine", -1)):
            made[f"{name} ahead by 1 in λ"] = log_snr_shift(even, sign, log_snr)
            made[f"{name} 1 point ahead"] = lead(even, sign)
        if nfe > 1:
            made["cascade, coarse first"] = cascade(nfe, spacing="uniform_log_snr", **table)
            made["fine first"] = fine_first(nfe, spacing="uniform_log_snr", **table)
        paths = {"optimal": self.optimum(nfe)}
        if self.is_kl:
            paths["optimal diagonal"] = self.optimum(nfe, on_diagonal=True)
        if self.is_kl and nfe > 1 and "seen_32" not in self.heatmap:
            options = {"weight": self.settings.kl_weight, "start": self.start, "end": end}
            paths["best cascade"] = kl_cascade(self.heatmap, self.log_snr, nfe, **options)
        paths |= {name: lift_path(path, end) for name, path in made.items()}
        if self.is_kl and "jacobian" in self.heatmap and self.start == self.t_grid[0]:
            paths |= {f"published {name}": self._published(kind, nfe) for kind, name in PUBLISHED.items()}
        kept = {name: path for name, path in paths.items() if path is not None}
        if self.is_kl:  # Where the network was not trained its errors say nothing.
            kept = {name: path for name, path in kept.items() if name == "optimal" or self._is_seen(path)}
        return [Plan(name, path, self.cost(path)) for name, path in kept.items()]

    def _is_seen(self, path: Path) -> bool:
        inner = np.array(path.points[1:-1]).reshape(-1, 2)
        return beyond_seen(self.heatmap, inner, self.log_snr).max(initial=0) <= NEAR

    def _published(self, kind: str, nfe: int) -> Path | None:
        try:
            settings = self.settings
            return heatmap_path(self.heatmap, kind, nfe, settings.max_jump, settings.factor, settings.normalisation)[0]
        except ValueError:  # So many steps of at most max_jump cells do not cross the grid.
            return None

    def resample(self, nfe: int) -> tuple[np.ndarray, np.ndarray, Callable]:
        """Timesteps of a grid, the maps per image on it, and how to solve for mean maps."""
        settings, heatmap = self.settings, self.heatmap
        if not self.is_kl:
            blocks = [block for block in ("HH", "LL") if block in heatmap["jacobian"]]
            maps = torch.stack([per_image(heatmap, block) for block in blocks]).double().numpy()

            def solve(*norms):
                content = heatmap | {"jacobian": dict(zip(blocks, map(torch.from_numpy, norms), strict=True))}
                errors = path_errors(content, settings.criterion, settings.factor, settings.normalisation)
                return find_optimal_path_n_steps_lambda(*errors, nfe, settings.max_jump)

            return self.t_grid, maps, solve
        t_grid = kl_lines(heatmap, self.log_snr, self.start, settings.end, max(DENSITY_LINES, nfe + 1))
        lines = self.log_snr[t_grid]
        known = trusted(heatmap, self.log_snr)
        values = torch.stack([per_image(known, name) for name in path_mses(heatmap)]).double().numpy()
        values = values.transpose(0, 3, 1, 2)  # [3, B, n, n]
        maps = interpolate_map(values, self.log_snr[self.t_grid], lines).transpose(0, 2, 3, 1)
        seen = seen_cells(heatmap, t_grid, self.log_snr)

        def solve(*means):
            problem = KLProblem.of_maps(*means, np.exp(lines), settings.kl_weight, self.representation.name)
            return kl_path(*problem[:3], nfe, settings.kl_weight, bands=problem.bands, allowed=seen)

        return t_grid, maps, solve
