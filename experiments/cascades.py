"""Cascaded diffusion against one model of both scales: equal calls, equal training, the same level of the coarse image.

    python experiments/cascades.py compare --base FILE_32 --stage FILE_64 --dual FILE_64 --ema --s_0 2 \\
        --heatmap FILE --judge FILE --output results/cascades/scores
    python experiments/cascades.py compare --base FILE_32 --stage RESIDUAL_STAGE --dual RESIDUAL_DUAL --ema --s_0 2 \\
        --output results/cascades/scores                       # the other representation, in the same table

Six ways to an image in N network calls, of which a cascade spends --coarse_calls on the coarse image (half):

    CDM chain            a base, and a stage of a cascade that is given its image at s_0 (arXiv 2106.15282)
    CDM chain, clean     the same at s_0 = clean, plain super-resolution
    dual as a stage      a base, and the dual model in place of the stage: what training for it is worth
    dual, cascade        the dual model alone along the L-shaped path that stops the coarse scale at s_0
    dual, diagonal       along the diagonal of the image
    dual, best path      along the path of least KL on --heatmap

Sliced Wasserstein distance (SWD ×1000) to as many training images and, with --judge, the Fréchet distance of its
features; beside them those of real images held out. Image k of a seed starts from the noise of that seed everywhere.
Training is compared by the images that the models have seen, those of a chain added up.

Adds rows, by --name, to OUTPUT.csv, one after another, so that a study that is stopped goes on; draws all that the
table holds in OUTPUT.md and OUTPUT.png.
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(FilePath(__file__).resolve().parent.parent))

import cli
from checkpoint import LoadedModel, load_model
from cli import DataSettings, HardwareSettings
from diffusion.sampler import image_seeds
from evaluation.chain import ChainSettings, check_fit, level_or_file, level_text, levels_of, open_chain
from evaluation.judge import load_judge
from evaluation.reference_set import from_images
from evaluation.results_table import write_csv
from evaluation.scoring import Generated, Scorer, generate
from figures.costs import plot_distance_against_nfe
from image_folder import evenly
from paths.path import SPACINGS, Path
from planning.choice import PathSettings, choose_path
from planning.conditions import ClassSettings
from runtime.device import resolve_precision
from runtime.distributed import Processes
from runtime.progress import Progress
from runtime.reports import markdown_table, print_report
from runtime.settings import REQUIRED, option, parse_command
from study import StudySettings, read_csv

CHAIN, CLEAN_CHAIN, DUAL_STAGE = "CDM chain", "CDM chain, clean", "dual as a stage"
CASCADE, DIAGONAL, BEST = "dual, cascade", "dual, diagonal", "dual, best path"
KEY = ("name", "way", "s_0", "nfe", "seed", "num_images", "weights")
COLUMNS = (*KEY, "swd", "swd_real", "fd", "fd_real", "judge", "images_seen", "parameters", "coarse_calls")


@dataclass(frozen=True, kw_only=True)
class CascadeStudySettings(StudySettings, DataSettings, HardwareSettings):
    """Which models are compared, in how many calls, and on how many images."""

    base: str = option(REQUIRED, "what makes coarse images from noise", metavar="FILE")
    stage: str = option(REQUIRED, "what enlarges them, of train_lift.py --model cascade", metavar="FILE")
    dual: str = option(REQUIRED, "a dual model of the same images", metavar="FILE")
    ema: bool = option(False, "use the EMA weights")
    s_0: str = option(
        "2", "level of the coarse image: a log SNR, clean, or the cascade.json of a search for the stage",
        parse=cli.checked(level_or_file), metavar="LEVEL",
    )  # fmt: skip
    name: str | None = option(None, "of these models in the table (the representation of the dual model)")
    heatmap: str | None = option(None, "of the dual model, with --maps mse, for its best path", metavar="FILE")
    judge: str | None = option(None, "checkpoint of train_classifier.py, for the Fréchet distance", metavar="FILE")
    nfe: tuple[int, ...] = option((8, 18, 36), "network calls", parse=cli.positive_int, nargs="+")
    coarse_calls: int | None = option(None, "calls for the coarse image in a cascade (half)", parse=cli.positive_int)
    spacing: str = option("uniform_t", "of every leg and diagonal", choices=SPACINGS)
    num_images: int = option(500, "per seed", parse=cli.positive_int)
    seeds: tuple[int, ...] = option((42, 43, 44), parse=cli.seed, nargs="+")
    batch_size: int = option(100, parse=cli.positive_int)

    def check(self) -> None:
        super().check()
        fewest = min(self.nfe)
        if not (self.coarse_calls or 1) < fewest:
            raise ValueError(f"--nfe {fewest} leaves a cascade no call for one of its scales; choose more.")


class Way(NamedTuple):
    """A way to images: how many calls they take, and what makes those of some seeds."""

    name: str
    s_0: str
    nfe: int
    coarse_calls: int | None
    models: tuple[LoadedModel, ...]
    make: Callable[[Sequence[int]], Generated]

    @property
    def images_seen(self) -> int | None:
        """In the training of its models; None where a checkpoint does not say."""
        steps = [(model.config.get("step"), model.config.get("batch_size")) for model in self.models]
        return sum(step * batch for step, batch in steps) if all(map(all, steps)) else None

    @property
    def parameters(self) -> int:
        """Of its models."""
        return sum(p.numel() for model in self.models for p in model.model.parameters())

    @property
    def weights(self) -> str:
        """Fingerprints of its models."""
        return " ".join(model.fingerprint for model in self.models)


class Comparison:
    """The models of a comparison, and the ways to images that they have."""

    def __init__(self, settings: CascadeStudySettings):
        self.settings, self.processes = settings, Processes(settings.device)
        self.dual = load_model(settings.dual, settings.ema, self.processes.device)
        if not self.dual.model.has_two_clocks():
            raise ValueError(f"{settings.dual} is no model of two clocks; pass one of train_lift.py as --dual.")
        self.precision = resolve_precision(self.processes.device, settings.precision)
        chain = open_chain(self._chain_settings(settings.stage, settings.s_0, 2, 1), self.processes.device)
        check_fit([chain.base.loaded, self.dual])
        [self.level] = levels_of(chain.settings, chain)
        self.name = settings.name or self.dual.scheduler.representation.name

    def _chain_settings(self, stage: str, level: str, nfe: int, coarse_calls: int) -> ChainSettings:
        chosen = self.settings
        return ChainSettings(
            base=chosen.base, stages=(stage,), ema=chosen.ema, s_0=(level,), num_steps=coarse_calls,
            stage_steps=(nfe - coarse_calls,), spacing=chosen.spacing, batch_size=chosen.batch_size,
            device=chosen.device, precision=chosen.precision,
        )  # fmt: skip

    def ways(self, nfe: int) -> Iterator[Way]:
        """Those that take so many calls."""
        coarse_calls = self.settings.coarse_calls or nfe // 2
        at = level_text(self.level)
        for name, stage, level in (
            (CHAIN, self.settings.stage, at),
            (CLEAN_CHAIN, self.settings.stage, "clean"),
            (DUAL_STAGE, self.settings.dual, at),
        ):
            if name != CLEAN_CHAIN or at != "clean":
                yield self._chain(name, stage, level, nfe, coarse_calls)
        yield self._walk(
            CASCADE, f"cascade:{'inf' if self.level == math.inf else at},{coarse_calls}", nfe, coarse_calls
        )
        tied = self.dual.scheduler.representation.image_lead > 0
        yield self._walk(DIAGONAL, "image_diagonal" if tied else "diagonal", nfe)
        if self.settings.heatmap is not None:
            yield self._walk(BEST, "kl", nfe)

    def _chain(self, name: str, stage: str, level: str, nfe: int, coarse_calls: int) -> Way:
        chain = open_chain(self._chain_settings(stage, level, nfe, coarse_calls), self.processes.device)

        def make(seeds: Sequence[int]) -> Generated:
            made = chain.run(seeds, levels_of(chain.settings, chain))
            return Generated(chain.last.space.pixels(made.images), None, made.nfe)

        return Way(name, level, nfe, coarse_calls, (chain.base.loaded, chain.last), make)

    def _walk(self, name: str, path_type: str, nfe: int, coarse_calls: int | None = None) -> Way:
        paths = PathSettings(spacing=self.settings.spacing)
        path: Path = choose_path(paths, path_type, nfe, self.dual, self.settings.heatmap)
        conditions = ClassSettings().conditions(self.dual)

        def make(seeds: Sequence[int]) -> Generated:
            return generate(
                self.dual, path, seeds, self.processes, self.settings.batch_size, self.precision,
                denoise=conditions.told_classes(self.dual.denoise_with_variance), labels=conditions.labels(seeds),
            )  # fmt: skip

        return Way(name, level_text(self.level) if name == CASCADE else "", nfe, coarse_calls, (self.dual,), make)


def make_scorer(settings: CascadeStudySettings, comparison: Comparison) -> tuple[Scorer, dict[str, float]]:
    """What scores images against those of the training, and the SWD of real images held out, if there are enough."""
    training, held_out = cli.load_image_parts(settings, comparison.dual.config)
    device = comparison.processes.device
    judge = None if settings.judge is None else load_judge(settings.judge, device)
    metrics = ("swd", "fd") if judge is not None else ("swd",)
    reference = from_images(training, "train")
    scorer = Scorer(
        metrics, settings.num_images, reference, training, None, device, settings.cache_dir, judge, held_out
    )
    scorer.prepare(metrics)
    floor = {}
    if held_out is not None and len(held_out) >= settings.num_images:
        rows = evenly(settings.num_images, len(held_out), "the images held out")
        real = Generated(torch.from_numpy(held_out.pixels[rows]), None, 0)
        floor = {"swd_real": scorer.score("swd", real)["swd"]}
    return scorer, floor


def measure(settings: CascadeStudySettings) -> list[dict[str, Any]]:
    """All rows of the table, with those of these models that were missing added one by one."""
    comparison = Comparison(settings)
    scorer, floor = make_scorer(settings, comparison)
    file = FilePath(f"{settings.output}.csv")
    rows = read_csv(file) if file.exists() else []
    known = {tuple(row[name] for name in KEY) for row in rows}
    jobs = [(way, seed) for nfe in settings.nfe for way in comparison.ways(nfe) for seed in settings.seeds]
    for way, seed in Progress(jobs, unit="score"):
        values = (comparison.name, way.name, way.s_0, way.nfe, seed, settings.num_images, way.weights)
        key = dict(zip(KEY, map(str, values), strict=True))
        if tuple(key.values()) in known:
            continue
        generated = way.make(image_seeds(seed, settings.num_images))
        if generated.nfe != way.nfe:
            raise ValueError(f"{way.name} took {generated.nfe} calls in place of {way.nfe}, so that nothing compares.")
        scores = {metric: scorer.score(metric, generated) for metric in scorer.settings}
        found = {"swd": scores["swd"]["swd"], **floor, **scores.get("fd", {})}
        found |= {"judge": scorer.judge.label if scorer.judge else "", "images_seen": way.images_seen}
        found |= {"parameters": way.parameters, "coarse_calls": way.coarse_calls}
        rows.append({name: (key | found).get(name) for name in COLUMNS})
        write_csv(file, rows)
    return rows


def report(rows: Sequence[dict[str, Any]], metric: str = "swd") -> tuple[str, dict[str, dict[str, dict[int, float]]]]:
    """Markdown of one metric, and the means as curves of `plot_distance_against_nfe`: a panel for each name."""
    groups: dict[tuple, list[float]] = {}
    for row in (row for row in rows if row[metric] not in (None, "")):
        groups.setdefault((row["name"], row["way"], row["s_0"], int(row["nfe"])), []).append(float(row[metric]))
    calls, lines, panels = sorted({key[3] for key in groups}), [], {}
    for name, way, level in dict.fromkeys(key[:3] for key in groups):
        values = {nfe: groups[name, way, level, nfe] for nfe in calls if (name, way, level, nfe) in groups}
        own = next(row for row in rows if (row["name"], row["way"], row["s_0"]) == (name, way, level))
        line = {"models": name, "way": way, "s_0": level, "images seen": own["images_seen"] or "?"}
        line["parameters"] = f"{int(own['parameters']):,}"
        lines.append(line | {str(nfe): _text(values[nfe]) if nfe in values else "" for nfe in calls})
        curve = f"{way} at {level}" if level not in ("", "clean") else way
        panels.setdefault(name, {})[curve] = {nfe: statistics.mean(each) for nfe, each in values.items()}
    return markdown_table(lines), panels


def _text(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _floors(rows: Sequence[dict[str, Any]], metric: str) -> str:
    found = {row["name"]: float(row[f"{metric}_real"]) for row in rows if row[f"{metric}_real"] not in (None, "")}
    said = ", ".join(f"{value:.2f} ({name})" for name, value in found.items())
    return f"Real images held out: {said}." if said else "No floor: too few images were held out."


def main() -> None:
    """Score what is missing, then write the tables and the figure."""
    _, settings = parse_command({"compare": (CascadeStudySettings, "one cascade and one dual model")}, __doc__)
    FilePath(settings.output).parent.mkdir(parents=True, exist_ok=True)
    rows = measure(settings)
    counts = " or ".join(sorted({str(row["num_images"]) for row in rows}))
    seeds = len({str(row["seed"]) for row in rows})
    parts = ["# Cascades and one model of both scales"]
    for metric, title in (("swd", "SWD ×1000"), ("fd", "Fréchet distance of the judge")):
        if any(row[metric] not in (None, "") for row in rows):
            said = f"{title} of {counts} images by network calls, mean ± deviation over {seeds} sampling seeds."
            parts += [f"{said} {_floors(rows, metric)}", report(rows, metric)[0]]
    print_report("\n\n".join(parts), f"{settings.output}.md")
    panels = report(rows)[1]
    least = 0.8 * min(value for curves in panels.values() for curve in curves.values() for value in curve.values())
    plot_distance_against_nfe(panels, f"{settings.output}.png", "Cascades and one model", "SWD ×1000", least)


if __name__ == "__main__":
    cli.run_stage(main)
