"""Generate images by a cascade: a base makes small ones from noise, and stages double them (arXiv 2106.15282).

    python generate_cascade.py --base checkpoints/BASE/baseline_400ep.pth --stages checkpoints/STAGE/cascade_400ep.pth
    python generate_cascade.py --base FILE_16 --stages FILE_32 FILE_64 --ema --s_0 2 4 --num_steps 18 --stage_steps 9
    python generate_cascade.py --base FILE_16 --stages FILE_32 FILE_64 --ema --search 500 --output results/levels
    python generate_cascade.py --base FILE_16 --stages FILE_32 FILE_64 --ema --s_0 results/levels/cascade.json
    python generate_cascade.py --base FILE_16 --stages FILE_32 --class cat --guidance_scale 2

The base is any model that makes images of its size from noise, along --path_type. A stage is one of train_lift.py
--model cascade, or a dual model, whose word on the coarse image is then not asked. It is given the image before it at
the noise level --s_0, which it is told: a log SNR, `clean` (plain super-resolution) or `noise` (which hides the image).

Writes one PNG per image, named by its seed, into --output (images already there are skipped), settings.json, and
`figures/grid.png`. Image k is a function of its seed, whatever else is made.

With --search N no image is kept: for each stage in turn levels are scored by the sliced Wasserstein distance of N
images of the chain to N that were held out of its training, all from the same seeds; `cascade.json` has the best,
`levels.csv` every score, and `figures/levels.png` shows them.
"""

import runtime.startup  # noqa: F401

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import cli
from cli import DataSettings
from data import read_png, save_png
from diffusion.sampler import image_seeds
from evaluation.chain import LEVELS_FILE, Chain, ChainSettings, level_text, levels_of, open_chain, write_levels
from evaluation.given_images import evaluation_images
from evaluation.level_search import search_levels
from evaluation.results_table import write_csv
from figures.images import save_image_grid
from figures.levels import plot_levels
from figures.style import WEIGHTS_TITLES
from image_folder import claim, write_settings
from runtime.device import select_device
from runtime.progress import Progress
from runtime.reports import markdown_table
from runtime.safe_write import short_name
from runtime.settings import option, parse_settings

GRID_IMAGES = 64
GRID_FILE, CURVES_FILE, SCORES_FILE = "figures/grid.png", "figures/levels.png", "levels.csv"


@dataclass(frozen=True, kw_only=True)
class CascadeSettings(ChainSettings, DataSettings):
    """Which chain, what is made with it or how its levels are searched, and where that goes."""

    num_images: int = option(64, "images", parse=cli.positive_int)
    seed: int = option(42, "image k has seed 1000000 * SEED + k", parse=cli.seed)
    search: int | None = option(
        None, "search the levels with N images in place of making some", parse=cli.positive_int, metavar="N"
    )
    lowest: float = option(-4.0, "log SNR of the noisiest level that is searched", parse=float, shown="-4")
    highest: float = option(8.0, "and of the cleanest, beside clean", parse=float)
    grid: int = option(7, "levels to begin with", parse=cli.positive_int)
    rounds: int = option(2, "of halving the distance to the neighbours of the best", parse=cli.seed)
    output: str | None = option(
        None,
        "folder (cascades/{base}_{stages}_{weights}_{path}_{calls}_{levels}, or cascade_levels/..., in the results of "
        "the run of the last stage)",
    )
    force: bool = option(False, "replace what --output holds of other settings")

    def check(self) -> None:
        super().check()
        if self.search is None:
            usual = {field.name: field.default for field in fields(self)}
            named = [name for name in ("lowest", "highest", "grid", "rounds") if getattr(self, name) != usual[name]]
            if named:
                raise ValueError(f"--{named[0]} belongs to --search N; name that too, or leave it out.")
        elif self.s_0 != ("clean",):
            raise ValueError("--search finds the levels that --s_0 names; leave one of them out.")


def parse_args() -> CascadeSettings:
    """The settings of this stage, from its flags."""
    # A classifier is of one resolution, and a chain of several.
    return parse_settings(CascadeSettings, __doc__, leave_out=("classifier", "classifier_scale"))


def output_folder(settings: CascadeSettings, chain: Chain, kind: str, levels: list[str]) -> Path:
    """Where results go, unless told otherwise."""
    if settings.output is not None:
        return Path(settings.output)
    links = (chain.base, *chain.stages)
    words = [*(link.loaded.file.stem for link in links), chain.last.weights, chain.base.path.kind]
    words += [*(str(link.path.nfe) for link in links), *levels]
    name = "_".join(words) + settings.solver_suffix + chain.base.conditions.suffix
    return chain.last.results / kind / short_name(name)


def generate(settings: CascadeSettings, chain: Chain) -> None:
    """Make what is missing, then draw the grid."""
    levels = levels_of(settings, chain)
    said = chain.said(levels)
    folder = output_folder(settings, chain, "cascades", said["s_0"])
    claim(folder, said, settings.force, ("[0-9]*.png", "figures/*.png"))
    write_settings(folder, said)
    seeds = image_seeds(settings.seed, settings.num_images)
    files = {seed: folder / f"{seed:012d}.png" for seed in seeds}
    missing = [seed for seed in seeds if not files[seed].exists()]
    calls = 0
    with Progress(total=len(missing), unit="img", desc="cascade") as bar:
        for start in range(0, len(missing), settings.batch_size):
            chosen = missing[start : start + settings.batch_size]
            made = chain.run(chosen, levels)
            calls += made.nfe * len(chosen)
            for seed, pixels in zip(chosen, chain.last.space.pixels(made.images), strict=True):
                save_png(pixels, files[seed])
            bar.update(len(chosen))
    shown = [read_png(files[seed]) for seed in seeds[:GRID_IMAGES]]
    save_image_grid(torch.stack(shown).numpy(), folder / GRID_FILE, columns=8)
    new = f"{len(missing)} new with {round(calls / max(1, len(missing)))} network calls each"
    at = ", ".join(map(level_text, levels))
    print(f"{len(seeds)} images in {folder}: {new if missing else 'all there already'}; s_0 {at}")


def search(settings: CascadeSettings, chain: Chain) -> None:
    """Score levels stage by stage, and write the best."""
    said: dict[str, Any] = chain.said([math.inf] * len(chain.stages)) | {"s_0": "searched", "seed": settings.seed}
    said |= {name: getattr(settings, name) for name in ("search", "lowest", "highest", "grid", "rounds")}
    folder = output_folder(settings, chain, "cascade_levels", [])
    references = [
        evaluation_images(settings, link.loaded, str(link.loaded.file), "holdout", None) for link in chain.stages
    ]
    fewest = min(map(len, references))
    if settings.search > fewest:
        raise ValueError(f"--search {settings.search} asks for more than the {fewest} images held out; lower it.")
    claim(folder, said, settings.force, ("[0-9]*.png", LEVELS_FILE, SCORES_FILE, "figures/*.png"))
    write_settings(folder, said)
    rows: list[dict[str, Any]] = []

    def seen(row: dict[str, Any]) -> None:
        rows.append(row | {"seed": settings.seed})
        write_csv(folder / SCORES_FILE, rows)
        bar.update()

    seeds = image_seeds(settings.seed, settings.search)
    with Progress(unit="level", desc="search") as bar:
        found = search_levels(
            chain, references, seeds, settings.lowest, settings.highest, settings.grid, settings.rounds, seen=seen
        )
    names = [f"{link.loaded.side // 2} to {link.loaded.side} px" for link in chain.stages]
    curves = dict(zip(names, (each.scores for each in found), strict=True))
    title = f"Levels of given images, {settings.search} images, {WEIGHTS_TITLES[chain.last.weights]}"
    plot_levels(curves, folder / CURVES_FILE, title)
    levels = [each.level for each in found]
    further = [{"swd": each.scores[each.level], "swd_clean": each.scores[math.inf]} for each in found]
    write_levels(folder / LEVELS_FILE, chain, levels, further, num_images=settings.search, seed=settings.seed)
    columns = ("stage", "s_0", "timestep", "nfe", "swd")
    print(markdown_table([{name: row[name] for name in columns} for row in rows]))
    for name, each in zip(names, found, strict=True):
        print(f"{name}: s_0 {level_text(each.level)}, SWD {each.scores[each.level]:.2f}, of clean images "
              f"{each.scores[math.inf]:.2f}")  # fmt: skip
    print(f"{folder / LEVELS_FILE}, which --s_0 takes; {folder / SCORES_FILE} and {folder / CURVES_FILE}")


def main() -> None:
    """Make images, or search the levels for them."""
    settings = parse_args()
    chain = open_chain(settings, select_device(settings.device))
    (generate if settings.search is None else search)(settings, chain)


if __name__ == "__main__":
    cli.run_stage(main)
