"""From an error map to a schedule: the best path for each number of calls, what others cost, and how sure that is.

    python plan_path.py --heatmap results/heatmap_30_400ep_ema.pth
    python plan_path.py --run NAME --ema                             # on the map of a run's last checkpoint
    python plan_path.py --heatmap FILE --nfe 6 8 10 18 36 --kl_weight 1 --output results/plan_400ep_ema
    python plan_path.py --heatmap FILE --criterion dp_total --nfe 18
    python plan_path.py --run NAME --ema --criterion trajectory --solver dpmpp_2m      # after compute_trajectories.py
    python plan_path.py --heatmap FILE --start 950 --end 20          # from less noise, and not counting the last of it

Prints, for each number of steps, the cost of the optimum, of the best diagonal, of the best cascade and of hand-made
families, their excess over the optimum, how the optimum leads, where the best cascade waits, and the timesteps and log
SNR of what is written. With --criterion kl and a model that was trained around a path, there are only those that keep
to where it was trained. Writes into --output (plan_[{model}_]{epoch}ep_{weights}[_{criterion}] beside the heatmap):
schedule_{optimal,diagonal,cascade}_{N}.json, which the --schedule of generate_with_path_30.py replays, costs.csv,
cost.png (cost against calls), paths.png, and density.png (the cells that the optimum visits when images are resampled).
"""

import runtime.startup  # noqa: F401

from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np

import cli
from cli import CheckpointSettings
from diffusion.solvers import make_solver
from evaluation.results_table import write_csv
from figures.costs import plot_cost_against_nfe
from figures.maps import plot_path_density
from figures.paths import plot_path_comparison
from image_folder import SETTINGS_FILE, claim, write_settings
from paths.bootstrap import bootstrap_paths
from paths.path import Path, leads
from paths.schedule_file import load_schedule, save_schedule
from planning.heatmap import map_of
from planning.map_file import load_heatmap
from planning.plan import PlanCriterionSettings, Planner
from planning.students import file_words
from planning.trajectory_file import load_trajectories, trajectories_of
from planning.trajectory_plan import TrajectoryPlanner
from runtime.progress import Progress
from runtime.settings import option, parse_settings

DENSITY_NFE = 18  # The number of steps nearest to it is resampled.
# Families that are written as schedules, and what their files are called.
SCHEDULES = {"optimal": "optimal", "optimal diagonal": "diagonal", "best cascade": "cascade"}


@dataclass(frozen=True, kw_only=True)
class PlanSettings(CheckpointSettings, PlanCriterionSettings):
    """A plan on a heatmap, and where it is written."""

    heatmap: str | None = option(None, "file of compute_heatmap_30.py (that of --checkpoint or --run)")
    trajectories: str | None = option(
        None, "for --criterion trajectory: file of compute_trajectories.py (that of --checkpoint or --run)"
    )
    nfe: tuple[int, ...] = option((6, 8, 10, 18, 36), "network calls", parse=cli.positive_int, nargs="+")
    bootstrap: int = option(200, "replicates of the images; 0 leaves them out", parse=cli.seed)
    seed: int = option(0, "of the replicates", parse=cli.seed)
    output: str | None = option(None, "folder (plan_[{model}_]{epoch}ep_{weights}[_{criterion}] beside the heatmap)")
    force: bool = option(False, "replace the plan on another map, or by another criterion, that --output holds")

    @property
    def needs_checkpoint(self) -> bool:
        return self.heatmap is None and self.trajectories is None

    def check(self) -> None:
        super().check()
        own, other = ("heatmap", "trajectories")[:: -1 if self.criterion == "trajectory" else 1]
        if getattr(self, other) is not None:
            raise ValueError(f"--criterion {self.criterion} plans with --{own}; leave --{other} out")
        if getattr(self, own) is not None and self.checkpoint is not None:
            raise ValueError(f"--{own} names the file; leave --checkpoint and --run out")
        order = make_solver(self.solver).rule.order
        least = order + 1 if order > 1 else 1
        if min(self.nfe) < least:
            raise ValueError(
                f"--nfe {min(self.nfe)} is less than the {least} calls in which {self.solver} takes a step of its "
                "order; raise it, or plan for another --solver"
            )


def parse_args() -> PlanSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(PlanSettings, __doc__)


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


def load_planner(settings: PlanSettings) -> tuple[Planner | TrajectoryPlanner, FilePath]:
    """What plans by the criterion of settings, and the file that it plans on."""
    if settings.criterion == "trajectory":
        file = FilePath(settings.trajectories or trajectories_of(settings))
        return TrajectoryPlanner(*load_trajectories(file), settings), file
    file = FilePath(settings.heatmap or map_of(settings))
    return Planner(load_heatmap(file), settings), file


def describe_points(path: Path, log_snr: np.ndarray) -> str:
    """Timesteps and log SNR of every point, scale by scale, as Python lists."""
    lines = []
    for name, timesteps in zip(("64", "32"), zip(*path.points, strict=True), strict=False):
        lines.append(f"    t_{name} = {list(timesteps)}")
        lines.append(f"    λ_{name} = [{', '.join(f'{log_snr[t]:.2f}' for t in timesteps)}]")
    return "\n".join(lines)


def prepare_output(folder: FilePath, planner: Planner | TrajectoryPlanner, settings: PlanSettings) -> None:
    """Make a folder that of this plan; raises ValueError, unless forced, if it holds another, which is then removed."""
    said = {
        "weights_fingerprint": planner.said["fingerprint"],
        "map_fingerprint": planner.map_fingerprint,
        "criterion": planner.criterion,
        "nfe": sorted(set(settings.nfe)),
        "bootstrap": settings.bootstrap if planner.can_resample else 0,
        "seed": settings.seed if planner.can_resample else 0,
    }
    claim(folder, said, settings.force, ("schedule_*.json", "costs.csv", "*.png"))
    for file in folder.glob("schedule_*.json") if not (folder / SETTINGS_FILE).exists() else ():
        # Of a version that kept no settings, or not of a plan.
        made = load_schedule(file).provenance
        if not settings.force and [made["model_fingerprint"], made["criterion"]] != [
            said["weights_fingerprint"],
            said["criterion"],
        ]:
            raise ValueError(
                f"{file} is of another plan ({made['criterion']}); pass --force to replace it, or another --output."
            )
    write_settings(folder, said)


def main() -> None:
    """Plan, print, write, draw."""
    settings = parse_args()
    planner, file = load_planner(settings)
    said = planner.said
    label = f"epoch {said['epoch']}, {said['weights']} weights"
    name = f"plan_{file_words({'model_type': 'dual'} | said, said['epoch'])}_{said['weights']}{planner.variant}"
    folder = FilePath(settings.output or file.parent / name)
    numbers = Progress(sorted(set(settings.nfe)), desc="plans", unit="plan", disable=not planner.is_slow)
    plans = {nfe: planner.families(nfe) for nfe in numbers}
    resamples = settings.bootstrap and planner.can_resample
    if resamples:  # Before anything is written, because too few images or replicates are refused.
        resampled = min(plans, key=lambda n: abs(n - DENSITY_NFE))
        t_grid, maps, solve = planner.resample(resampled)
        grid_cells, grid_cost = solve(*maps.mean(-1))
        result = bootstrap_paths(maps, solve, settings.bootstrap, settings.seed)

    prepare_output(folder, planner, settings)
    print(f"criterion: {planner.criterion}\noptimal: the path {planner.meaning}. {planner.ranking}")
    if settings.criterion.startswith("dp"):
        print(
            f"the optimum moves at most {settings.max_jump} cells per step; hand-made paths need not, and may cost less"
        )
    rows = []
    for nfe, families in plans.items():
        best = families[0]
        lead = ""
        if planner.two_clocks:
            lead = f": {describe_lead(best.path, planner.log_snr, planner.representation.image_lead)}"
        print(f"\n{nfe} calls{lead}")
        for family, path, cost in families:
            # Of a cost below nothing there is no share.
            excess = cost / best.cost - 1 if best.cost > 0 else None
            waits = f"  {describe_cascade(path)}" if family == "best cascade" else ""
            print(f"  {family:24s} cost {cost:12.6g}  excess {'-' if excess is None else f'{excess:.2%}':>8}{waits}")
            rows.append({"nfe": nfe, "family": family, "cost": cost, "excess": excess, "path": path.fingerprint()})
        for family, path, cost in families:
            if family not in SCHEDULES:
                continue
            schedule = folder / f"schedule_{SCHEDULES[family]}_{nfe}.json"
            print(f"  {schedule}\n{describe_points(path, planner.log_snr)}")
            save_schedule(
                path,
                schedule,
                planner.log_snr,
                solver=planner.solver,
                criterion=planner.criterion,
                cost=cost,
                model_fingerprint=said["fingerprint"],
                data_fingerprint=said["data_fingerprint"],
                beta_schedule=said["beta_schedule"],
                representation=planner.representation.name,
                resolution=said["resolution"],
                weights=said["weights"],
                epoch=said["epoch"],
                run=said.get("run"),
            )
    write_csv(folder / "costs.csv", rows)

    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        curves.setdefault(row["family"], {})[row["nfe"]] = row["cost"]
    title = f"{label}: {planner.criterion}"
    plot_cost_against_nfe(curves, folder / "cost.png", title, "cost of the path", families[0].family)
    optimal = {f"{nfe} calls": families[0].path for nfe, families in plans.items()}
    plot_path_comparison(optimal, planner.log_snr, folder / "paths.png", title)
    if resamples:
        shown = maps.mean(-1)[0]
        title = f"{title}, {resampled} calls, {settings.bootstrap} replicates of {maps.shape[-1]} images"
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
