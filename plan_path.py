"""From an error map to a schedule: the best path for each number of calls, what others cost, and how sure that is.

    python plan_path.py --heatmap results/heatmap_30_400ep_ema.pth
    python plan_path.py --heatmap FILE --nfe 6 8 10 18 36 --kl_weight 1 --output results/plan_400ep_ema
    python plan_path.py --heatmap FILE --criterion dp_total --nfe 18
    python plan_path.py --heatmap FILE --start 950 --end 20          # from less noise, and not counting the last of it

Prints, for each number of steps, the cost of the optimum, of the best diagonal, of the best cascade and of hand-made
families, their excess over the optimum, how the optimum leads, and where the best cascade waits. With --criterion kl
and a model that was trained around a path, there are only those that keep to where it was trained. Writes into --output
(results/plan_[{model}_]{epoch}ep_{weights}): schedule_{optimal,diagonal,cascade}_{N}.json, which the --schedule of
generate_with_path_30.py replays, costs.csv, cost.png (cost against calls), paths.png, and density.png (the cells that
the optimum visits when images are resampled).
"""

import argparse
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import NamedTuple

import numpy as np
import torch

import cli
from evaluation.results_table import write_csv
from figures.costs import plot_cost_against_nfe
from figures.maps import plot_path_density
from figures.paths import plot_path_comparison
from paths.bootstrap import bootstrap_paths
from paths.families import cascade, diagonal, fine_first, lead, log_snr_shift
from paths.map_interpolation import interpolate_map
from paths.optimal import find_optimal_path_n_steps_lambda, kl_path
from paths.path import Path, leads
from paths.refine import cost_off_grid, refine_path
from paths.schedule_file import save_schedule
from planning.choice import (
    KLProblem,
    add_criterion_arguments,
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
from planning.error_map import load_heatmap, per_image
from scheduler import DDIMScheduler

NEAR = 0.25  # A path keeps to where a network was trained if it is off by no more in log SNR, as timesteps may be.
DENSITY_LINES = 30
DENSITY_NFE = 18  # The number of steps nearest to it is resampled.


def parse_args() -> argparse.Namespace:
    """The flags of this stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--heatmap", required=True, help="file of compute_heatmap_30.py")
    add("--criterion", choices=("kl", "dp_64", "dp_total"), default="kl", help="what the path minimises (kl)")
    add("--nfe", nargs="+", type=cli.positive_int, default=[6, 8, 10, 18, 36], help="network calls (6 8 10 18 36)")
    add("--start", type=cli.positive_int, default=None, help="timestep of the first point, for kl (that of the map)")
    add("--end", type=cli.seed, default=0, help="timestep at which the cost ends, for kl (0)")
    add("--bootstrap", type=cli.seed, default=200, help="replicates of the images (200); 0 leaves them out")
    add("--seed", type=cli.seed, default=0, help="of the replicates (0)")
    add("--output", default=None, help="folder (results/plan_[{model}_]{epoch}ep_{weights})")
    add_criterion_arguments(parser)
    args = parser.parse_args()
    if args.criterion != "kl" and (args.start is not None or args.end):
        parser.error("--start and --end go with --criterion kl")
    return args


class Plan(NamedTuple):
    """One path under the criterion."""

    family: str
    path: Path
    cost: float


class Planner:
    """A criterion on one heatmap: optimal paths, and the cost of any other."""

    def __init__(self, heatmap: dict, args: argparse.Namespace):
        self.heatmap, self.args = heatmap, args
        scheduler = DDIMScheduler(heatmap["num_train_timesteps"], heatmap["beta_schedule"], prediction_type="v")
        self.representation = representation_of(heatmap)
        self.log_snr = scheduler.log_snr.numpy()
        self.t_grid = heatmap["t_grid"].numpy()
        self.is_kl = args.criterion == "kl"
        self.start = int(self.t_grid[0]) if args.start is None else args.start
        if self.is_kl:
            kl_lines(heatmap, self.log_snr, args.start, args.end, 2)  # Refuses a start or end off the map.
            problem = KLProblem.of(trusted(heatmap, self.log_snr), args.kl_weight)
            options = {"criterion": "kl", "weight": args.kl_weight, "bands": problem.bands}
            maps = problem[:2]
        else:
            if args.criterion == "dp_total" and "LL" not in heatmap.get("jacobian", {"LL": None}):
                raise ValueError(
                    "This heatmap is of a model that predicts the fine image alone, and dp_total counts the error of "
                    "the coarse one too; use --criterion dp_64."
                )
            maps = path_errors(heatmap, args.criterion, args.factor, args.normalisation)[:2]
            options = {"criterion": "published"}
        self._cost = cost_off_grid(self.t_grid, *maps, self.log_snr, **options)

    @property
    def criterion(self) -> str:
        """What is minimised, in words."""
        args = self.args
        if self.is_kl:
            return f"kl, weight {args.kl_weight:g}, t = {self.start} to {args.end}"
        return f"{args.criterion}, factor {args.factor}, {args.normalisation} normalisation, max_jump {args.max_jump}"

    def cost(self, path: Path) -> float:
        """The criterion on any path of two scales."""
        return self._cost(np.clip(path.points, self.args.end, self.start))

    def optimum(self, nfe: int, on_diagonal: bool = False) -> Path:
        """The best path of all, or of those on the diagonal; the published criteria have no diagonal optimum."""
        args = self.args
        if self.is_kl:
            return kl_refined(self.heatmap, self.log_snr, nfe, args.kl_weight, on_diagonal, self.start, args.end).path
        errors = path_errors(self.heatmap, args.criterion, args.factor, args.normalisation)
        cells, _ = find_optimal_path_n_steps_lambda(*errors, nfe, args.max_jump)
        options = {"criterion": "published", "max_jump": args.max_jump}
        return refine_path(cells, self.t_grid, *errors[:2], self.log_snr, **options).path

    def families(self, nfe: int) -> list[Plan]:
        """Every path of so many steps, the optimum first."""
        end = self.args.end
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
            options = {"weight": self.args.kl_weight, "start": self.start, "end": end}
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
            args = self.args
            return heatmap_path(self.heatmap, kind, nfe, args.max_jump, args.factor, args.normalisation)[0]
        except ValueError:  # So many steps of at most max_jump cells do not cross the grid.
            return None

    def resample(self, nfe: int) -> tuple[np.ndarray, np.ndarray, Callable]:
        """Timesteps of a grid, the maps per image on it, and how to solve for mean maps."""
        args, heatmap = self.args, self.heatmap
        if not self.is_kl:
            blocks = [block for block in ("HH", "LL") if block in heatmap["jacobian"]]
            maps = torch.stack([per_image(heatmap, block) for block in blocks]).double().numpy()

            def solve(*norms):
                content = heatmap | {"jacobian": dict(zip(blocks, map(torch.from_numpy, norms), strict=True))}
                errors = path_errors(content, args.criterion, args.factor, args.normalisation)
                return find_optimal_path_n_steps_lambda(*errors, nfe, args.max_jump)

            return self.t_grid, maps, solve
        t_grid = kl_lines(heatmap, self.log_snr, self.start, args.end, max(DENSITY_LINES, nfe + 1))
        lines = self.log_snr[t_grid]
        known = trusted(heatmap, self.log_snr)
        values = torch.stack([per_image(known, name) for name in path_mses(heatmap)]).double().numpy()
        values = values.transpose(0, 3, 1, 2)  # [3, B, n, n]
        maps = interpolate_map(values, self.log_snr[self.t_grid], lines).transpose(0, 2, 3, 1)
        seen = seen_cells(heatmap, t_grid, self.log_snr)

        def solve(*means):
            problem = KLProblem.of_maps(*means, np.exp(lines), args.kl_weight, self.representation.name)
            return kl_path(*problem[:3], nfe, args.kl_weight, bands=problem.bands, allowed=seen)

        return t_grid, maps, solve


PUBLISHED = {"dp_64": "DP-64", "dp_total": "DP-Total"}
# Families that are written as schedules, and what their files are called.
SCHEDULES = {"optimal": "optimal", "optimal diagonal": "diagonal", "best cascade": "cascade"}


def describe_cascade(path: Path) -> str:
    """Where the coarse scale of a `kl_cascade` waits, and how many of the calls take it there."""
    made = path.provenance
    return f"coarse log SNR waits at {made['waits_at_log_snr']:+.2f} after {made['first_steps']} of {path.nfe} calls"


def describe_lead(path: Path, log_snr: np.ndarray, image_lead: float) -> str:
    """How the coarse scale leads, in points and in log SNR, where tied clocks differ by `image_lead`."""
    lead = leads(path)
    fine, coarse = log_snr[np.array(path.points)].T
    ahead = coarse - fine
    return (
        f"coarse ahead at {lead['ahead']} of {lead['points']} points, behind at {lead['behind']}; "
        f"lead in log SNR from {ahead.min():+.2f} to {ahead.max():+.2f}"
        + (f" ({image_lead:+.2f} on the diagonal of the image)" if image_lead else "")
    )


def main() -> None:
    """Plan, print, write, draw."""
    args = parse_args()
    heatmap = load_heatmap(args.heatmap)
    planner = Planner(heatmap, args)
    label = f"epoch {heatmap['epoch']}, {heatmap['weights']} weights"
    model = f"{heatmap['model_type']}_" if heatmap.get("model_type", "dual") != "dual" else ""
    folder = FilePath(args.output or f"results/plan_{model}{heatmap['epoch']}ep_{heatmap['weights']}")
    plans = {nfe: planner.families(nfe) for nfe in sorted(set(args.nfe))}
    if args.bootstrap:  # Before anything is written, because too few images or replicates are refused.
        resampled = min(plans, key=lambda n: abs(n - DENSITY_NFE))
        t_grid, maps, solve = planner.resample(resampled)
        grid_cells, grid_cost = solve(*maps.mean(-1))
        result = bootstrap_paths(maps, solve, args.bootstrap, args.seed)

    folder.mkdir(parents=True, exist_ok=True)
    print(f"criterion: {planner.criterion}")
    if not planner.is_kl:
        print(f"the optimum moves at most {args.max_jump} cells per step; hand-made paths need not, and may cost less")
    rows = []
    for nfe, families in plans.items():
        best = families[0]
        print(f"\n{nfe} calls: {describe_lead(best.path, planner.log_snr, planner.representation.image_lead)}")
        for family, path, cost in families:
            excess = cost / best.cost - 1
            said = f"  {describe_cascade(path)}" if family == "best cascade" else ""
            print(f"  {family:24s} cost {cost:12.6g}  excess {excess:8.2%}{said}")
            rows.append({"nfe": nfe, "family": family, "cost": cost, "excess": excess, "path": path.fingerprint()})
        for family, path, cost in families:
            if family not in SCHEDULES:
                continue
            save_schedule(
                path,
                folder / f"schedule_{SCHEDULES[family]}_{nfe}.json",
                planner.log_snr,
                solver={"name": "ddim", "eta": 0.0, "end": "clean"},
                criterion=planner.criterion,
                cost=cost,
                model_fingerprint=heatmap["fingerprint"],
                data_fingerprint=heatmap["data_fingerprint"],
                beta_schedule=heatmap["beta_schedule"],
            )
    write_csv(folder / "costs.csv", rows)

    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        curves.setdefault(row["family"], {})[row["nfe"]] = row["cost"]
    title = f"{label}: {planner.criterion}"
    plot_cost_against_nfe(curves, folder / "cost.png", title, "cost of the path", "optimal")
    optimal = {f"{nfe} calls": families[0].path for nfe, families in plans.items()}
    plot_path_comparison(optimal, planner.log_snr, folder / "paths.png", title)
    if args.bootstrap:
        shown = maps.mean(-1)[0]
        title = f"{title}, {resampled} calls, {args.bootstrap} replicates of {maps.shape[-1]} images"
        plot_path_density(
            shown, result.density, planner.log_snr[t_grid], t_grid, grid_cells, grid_cost, result.interval,
            folder / "density.png", title,
            "fine denoising error" if planner.is_kl else r"squared norm $\|J_{HH}\|_F^2$",
        )  # fmt: skip
        low, high = result.interval
        sure = (result.density[tuple(np.array(grid_cells).T)]).mean()
        print(f"\n{resampled} calls, resampled: cost {grid_cost:.6g} on the grid, ", end="")
        print(f"95 % interval {low:.6g} to {high:.6g}; a replicate visits {sure:.0%} of its cells")
    print(f"schedules and figures in {folder}")


if __name__ == "__main__":
    cli.run_stage(main)
