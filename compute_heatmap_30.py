"""Measure what a step costs at every fine and coarse timestep: the error map of a two-scale checkpoint, 30x30 cells.

    python compute_heatmap_30.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --device 0
    python compute_heatmap_30.py --checkpoint FILE --output results/heatmap_30_400ep.pth --K 4 --num_images 16
    python compute_heatmap_30.py --checkpoint FILE --coarse 10 --K 1           # a thinned grid, interpolated
    python compute_heatmap_30.py --checkpoint FILE --maps mse                  # all that KL paths need
    python compute_heatmap_30.py --checkpoint FILE --maps mse --seen_only      # of a model trained around a path
    torchrun --standalone --nproc_per_node=4 compute_heatmap_30.py --checkpoint FILE
    python compute_heatmap_30.py --run NAME --ema                             # of the last checkpoint of a run
    python compute_heatmap_30.py --plot_only --output results/heatmap_30_400ep_ema.pth

Writes results/heatmap_30_{epoch}ep[_ema].pth (of a run with a name: in results/NAME) and two figures beside it: the
published errors with their optimal paths (.png), and the maps themselves, Jacobian blocks and denoising errors
(_maps.png). Images are those the checkpoint was trained on. A computation that is stopped and started again goes on
from its .part files.

Models that predict the fine scale alone (single_t, no_t) have maps of that scale, and DP-64 is the only path found on
them; theirs are results/heatmap_30_{model}_{epoch}ep[_ema].pth. A baseline has one clock and only its denoising errors,
which are measured along it (--maps mse and no --coarse, whatever is passed): all that its best schedule, kl_diagonal,
needs. The map of a model that was trained around a path (--t_pairs) says where that was, and KL paths keep to it.
"""

import runtime.startup  # noqa: F401

from dataclasses import dataclass
from pathlib import Path

import cli
from figures.maps import plot_heatmap, plot_heatmap_pair, plot_maps
from paths.optimal import check_steps
from paths.path import leads, path_from_cells
from planning.choice import StepSettings
from planning.heatmap import PATH_SETTINGS, MapSettings, beside_figure, compute, dp_names, map_of, path_fields
from planning.map_file import load_heatmap, save_heatmap
from runtime.distributed import PATIENCE, Processes
from runtime.settings import option, parse_settings


@dataclass(frozen=True, kw_only=True)
class HeatmapSettings(MapSettings, StepSettings):
    """A map, and the published paths that are found and drawn on it."""

    plot_only: bool = option(False, "draw the figures of an existing --output, or of the model's")

    @property
    def needs_checkpoint(self) -> bool:
        return not (self.plot_only and self.output)


def parse_args() -> HeatmapSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(HeatmapSettings, __doc__)


def draw(content: dict, file: Path) -> None:
    """The figures of one heatmap, beside it, and how its published paths lead."""
    t_grid, log_snr_grid = content["t_grid"].numpy(), content["log_snr_grid"].numpy()
    label = f"epoch {content['epoch']}, {content['weights']} weights"
    # Maps from before other models had any do not say whose they are.
    model_type = content.get("model_type", "dual")
    label = label if model_type == "dual" else f"{model_type}, {label}"
    maps = content.get("jacobian", {}) | {name: content[name] for name in ("mse_64", "mse_32") if name in content}
    maps_file = file.with_name(f"{file.stem}_maps.png")
    plot_maps(maps, log_snr_grid, t_grid, maps_file, label, content["of"])
    print(f"figure {maps_file}")
    if "jacobian" not in content:
        return
    title = f"{label}, factor {content['factor']}, {content['num_steps']} steps"
    names = dp_names(content)
    if "total" in names:
        plot_heatmap_pair(
            content["error_64"].numpy(),
            content["error_total"].numpy(),
            t_grid,
            log_snr_grid,
            content["samples_64"],
            content["samples_total"],
            file.with_suffix(".png"),
            title,
        )
    else:
        plot_heatmap(
            content["error_64"].numpy(),
            t_grid,
            log_snr_grid,
            file.with_suffix(".png"),
            title,
            "fine error per unit of log SNR",
            {"DP-64": content["samples_64"]},
        )
    for name in names:
        lead = leads(path_from_cells(content[f"samples_{name}"], t_grid, f"dp_{name}", {}), t_grid)
        print(
            f"DP-{name.title()}: coarse ahead at {lead['ahead']} of {lead['points']} points, "
            f"behind at {lead['behind']}, largest lead {lead['largest_lead']} cells"
        )
    print(f"figure {file.with_suffix('.png')}")


def main() -> None:
    """Compute or reuse the map, find the published paths, then draw."""
    settings = parse_args()
    processes = Processes("cpu" if settings.plot_only else settings.device, PATIENCE)
    if settings.plot_only:
        file = beside_figure(settings.output) if settings.output else map_of(settings)
        content = load_heatmap(file)
    else:
        content, file = compute(settings, processes, (settings.num_steps, settings.max_jump))
    processes.close()
    if not processes.is_main:
        return
    if "jacobian" in content:
        check_steps(len(content["t_grid"]), settings.num_steps, settings.max_jump)
        rule = [getattr(settings, name) for name in PATH_SETTINGS]
        known = [content.get(name) for name in PATH_SETTINGS]
        content |= path_fields(content, *rule)
        if not settings.plot_only and known != rule:
            save_heatmap(file, content)
    draw(content, file)
    print(f"heatmap {file}")


if __name__ == "__main__":
    cli.run_stage(main)
