"""Chains of cascaded diffusion (arXiv 2106.15282): a base makes images from noise, and stages double them one by one.

Each stage gets the image before it at a noise level of its own, s_0, which is said as a log SNR, `clean` (timestep 0,
plain super-resolution) or `noise` (the last timestep, which hides that image).

An image depends on its seed S alone. The base starts from the noise of S, as in every other stage; number j of the
stages from that of (S, j), and the noise that it is given its coarse image with is that of (S, j, 1).
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch

import cli
from checkpoint import COARSE_IMAGES, LoadedModel, load_model
from cli import HardwareSettings
from diffusion.sampler import Denoiser, check_finite, coarse_feed, sample_seeds, scale_shapes
from diffusion.super_resolution import super_resolution_path, super_resolve
from paths.families import diagonal
from paths.path import Path, timestep_of_level
from planning.choice import OnePathSettings, SolverSettings, path_of_settings
from planning.conditions import NO_CLASS, ClassSettings, Conditions, listed
from planning.regimes import off_regime_note
from runtime.device import autocast, resolve_precision
from runtime.errors import need_file
from runtime.reports import say_once
from runtime.safe_write import replacing
from runtime.settings import REQUIRED, option

LEVEL_WORDS = {"clean": math.inf, "noise": -math.inf}
LEVELS_FILE = "cascade.json"


def parse_level(text: str) -> float:
    """The log SNR that a text says, a number or one of LEVEL_WORDS. Raises ValueError for any other text."""
    if text in LEVEL_WORDS:
        return LEVEL_WORDS[text]
    if not math.isfinite(level := float(text)):
        raise ValueError(text)
    return level + 0.0  # -0 and 0 are one number.


def level_text(level: float) -> str:
    """A level as `parse_level` takes it."""
    return next((word for word, value in LEVEL_WORDS.items() if value == level), repr(level).removesuffix(".0"))


def level_or_file(text: str) -> str:
    """A level as `level_text` writes it, or the name of a file of levels. Raises ValueError for any other text."""
    if text.endswith(".json"):
        return text
    try:
        return level_text(parse_level(text))
    except ValueError as error:
        raise ValueError(
            f"'{text}' is no noise level; give a log SNR such as 2, {', '.join(LEVEL_WORDS)} or a {LEVELS_FILE}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class ChainSettings(ClassSettings, OnePathSettings, SolverSettings, HardwareSettings):
    """Which models follow each other, and how each is sampled; the type of path is that of the base."""

    group = "chain"
    base: str = option(REQUIRED, "checkpoint of what makes the smallest images, from noise", metavar="FILE")
    stages: tuple[str, ...] = option(
        REQUIRED,
        "checkpoints of what doubles them, one after the other: stages of a cascade (train_lift.py --model cascade) or "
        "dual models",
        nargs="+",
        metavar="FILE",
    )
    ema: bool = option(False, "use the EMA weights")
    s_0: tuple[str, ...] = option(
        ("clean",),
        "noise level of the image that a stage is given, one for all stages or for each: a log SNR, clean, noise "
        f"(which hides it), or the {LEVELS_FILE} of --search",
        parse=cli.checked(level_or_file),
        nargs="+",
        metavar="LEVEL",
    )
    stage_steps: tuple[int, ...] | None = option(
        None, "steps of the stages, one number for all or for each (--num_steps)", parse=cli.positive_int, nargs="+"
    )
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)

    def check(self) -> None:
        super().check()
        if len(self.s_0) > 1 and any(text.endswith(".json") for text in self.s_0):
            raise ValueError("--s_0 names a file beside others; pass levels, or one file that has all of them.")
        for name in ("s_0", "stage_steps"):
            given = getattr(self, name)
            if given is not None and len(given) not in (1, len(self.stages)):
                raise ValueError(
                    f"--{name} has {len(given)} values for {len(self.stages)} stage(s); give one for all, or for each."
                )

    def steps_of(self, number: int) -> int:
        """The steps of a stage, counted from 0."""
        steps = self.stage_steps or (self.num_steps,)
        return steps[number % len(steps)]


class Link(NamedTuple):
    """A model of a chain: of the base with its path, of a stage with that of its fine clock alone."""

    loaded: LoadedModel
    conditions: Conditions
    path: Path

    @property
    def denoise(self) -> Denoiser:
        """It, guided as its conditions say; it takes labels then, if there are classes."""
        return self.conditions.guided(self.conditions.told_classes(self.loaded.denoise_with_variance), self.loaded)

    def stage_path(self, level: float) -> Path:
        """Of a stage the path at a level."""
        return super_resolution_path(self.path, timestep_of_level(level, self.loaded.scheduler.log_snr.cpu().numpy()))


class Enlarged(NamedTuple):
    """Images of a chain."""

    images: torch.Tensor  # float32 [N, C, R, R] in [-1, 1], on the CPU
    nfe: int  # network calls for each, summed over the chain


class Chain:
    """A base and its stages; `open_chain` makes one of settings."""

    def __init__(
        self,
        base: Link,
        stages: Sequence[Link],
        settings: ChainSettings,  # how every step is taken
        device: torch.device,
        precision: str = "auto",
        batch_size: int = 64,
    ):
        check_fit([link.loaded for link in (base, *stages)])
        self.base, self.stages, self.settings = base, list(stages), settings
        self.device, self.precision, self.batch_size = device, resolve_precision(device, precision), batch_size

    def start(self, seeds: Sequence[int]) -> Enlarged:
        """The images of the base. Raises ValueError for one that is not finite."""
        loaded, conditions, path = self.base
        shapes = scale_shapes(loaded.model.num_scales, loaded.config["channels"], loaded.side)
        parts, calls = [], 0
        with autocast(self.device, self.precision):
            for chosen, samples in sample_seeds(
                self.base.denoise, loaded.scheduler, path, seeds, shapes, self.batch_size, self.device,
                coarse_from=coarse_feed(loaded.model, self.settings.coarse_from), solver=self.settings.make_solver(),
                labels=conditions.labels(seeds),
            ):  # fmt: skip
                check_finite(samples.images[0], [f"of seed {seed}" for seed in chosen])
                parts.append(samples.images[0].float().clamp(-1, 1).cpu())
                calls += samples.nfe * len(chosen)
        return Enlarged(torch.cat(parts), round(calls / len(seeds)))

    def enlarge(self, number: int, before: Enlarged, seeds: Sequence[int], level: float) -> Enlarged:
        """What a stage, counted from 0, makes of the images before it, given at a level.

        Raises ValueError for an image that is not finite.
        """
        link = self.stages[number]
        path = link.stage_path(level)
        note = off_regime_note(path, link.loaded.config, link.loaded.scheduler)
        if note:
            say_once(f"warning: {link.loaded.file}: {note}")
        parts, calls = [], 0
        with autocast(self.device, self.precision):
            for images, nfe in super_resolve(
                link.denoise, link.loaded.scheduler, path, before.images, [(seed, number + 1) for seed in seeds],
                self.batch_size, self.device, solver=self.settings.make_solver(), labels=link.conditions.labels(seeds),
                names=[f"of seed {seed}, stage {number + 1}," for seed in seeds],
            ):  # fmt: skip
                parts.append(images.float().clamp(-1, 1).cpu())
                calls += nfe * len(images)
        return Enlarged(torch.cat(parts), before.nfe + round(calls / len(seeds)))

    def run(self, seeds: Sequence[int], levels: Sequence[float]) -> Enlarged:
        """The images of some seeds with the stages at these levels."""
        made = self.start(seeds)
        for number, level in enumerate(levels):
            made = self.enlarge(number, made, seeds, level)
        return made

    @property
    def last(self) -> LoadedModel:
        """What makes the images that a chain ends with."""
        return self.stages[-1].loaded

    def said(self, levels: Sequence[float]) -> dict[str, Any]:
        """What a folder of images says of how they were made."""
        paths = [self.base.path, *(link.stage_path(level) for link, level in zip(self.stages, levels, strict=True))]
        return {
            "weights_fingerprints": [link.loaded.fingerprint for link in (self.base, *self.stages)],
            "path_fingerprints": [path.fingerprint() for path in paths],
            "s_0": [level_text(level) for level in levels],
            **self.settings.solver_said,
            "precision": self.precision,
            **self.base.conditions.said,
        }


def check_fit(models: Sequence[LoadedModel]) -> None:
    """Raise ValueError, naming both files, unless each model doubles what the one before makes, of the same classes."""
    base = models[0]
    for before, after in zip(models, models[1:], strict=False):
        side, wanted = before.config["resolution"], after.config["resolution"] // 2
        if side != wanted:
            raise ValueError(
                f"{after.file} enlarges images of {wanted}x{wanted}, and {before.file} makes such of {side}x{side}; "
                "pass models whose sizes fit."
            )
        if before.image_channels != after.image_channels:
            raise ValueError(
                f"{after.file} enlarges images of {after.image_channels} channel(s), and {before.file} makes such of "
                f"{before.image_channels}; pass models of the same."
            )
        ours, theirs = (tuple(model.config.get("class_names") or ()) for model in (base, after))
        if theirs not in ((), ours):
            known = f"knows the classes {listed(ours)}" if ours else "was trained without classes"
            raise ValueError(
                f"{after.file} is told of the classes {listed(theirs)}, and {base.file} {known}; pass models of the "
                "same classes."
            )


def open_chain(settings: ChainSettings, device: torch.device) -> Chain:
    """The chain that settings name.

    Raises ValueError for models that do not fit (`check_fit`), for a base that makes no images from noise, for a stage
    that cannot be given an image at a level, and for what their solver and classes refuse.
    """
    models = [load_model(settings.base, settings.ema, device)]
    models += [load_model(file, settings.ema, device, given=(COARSE_IMAGES,)) for file in settings.stages]
    for number, loaded in enumerate(models):
        loaded.require_pixels("generate_cascade.py")
        if number:
            loaded.require_enlarging()
            loaded.require_means("a stage of a cascade")
            loaded.check_solver(settings.make_solver())
            if settings.make_solver().reads_variance:
                loaded.check_variance()
    check_fit(models)
    base, *others = models
    path, _ = path_of_settings(settings, base)
    stages = []
    for number, loaded in enumerate(others):
        log_snr = loaded.scheduler.log_snr.cpu().numpy()
        fine = diagonal(settings.steps_of(number), settings.spacing, 1, log_snr, len(log_snr))
        told = bool(loaded.config.get("class_names"))
        stages.append(Link(loaded, settings.conditions(loaded) if told else NO_CLASS, fine))
    link = Link(base, settings.conditions(base), path)
    return Chain(link, stages, settings, device, settings.precision, settings.batch_size)


def levels_of(settings: ChainSettings, chain: Chain) -> tuple[float, ...]:
    """The level of each stage that settings say, or the file that they name.

    A file of other weights is used with a note. Raises FileNotFoundError for one that is missing, and ValueError for
    one that is damaged or of another number of stages.
    """
    if not settings.s_0[0].endswith(".json"):
        levels = [parse_level(text) for text in settings.s_0]
        return tuple(levels if len(levels) == len(chain.stages) else levels * len(chain.stages))
    file = need_file(settings.s_0[0], "File of levels", "write one with --search, or pass levels as --s_0")
    try:
        said = json.loads(FilePath(file).read_text(encoding="utf-8"))["stages"]
        levels = tuple(parse_level(str(stage["s_0"])) for stage in said)
        weights = [stage["weights_fingerprint"] for stage in said]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or no {LEVELS_FILE} of --search ({error}); write it again.") from error
    if len(levels) != len(chain.stages):
        raise ValueError(f"{file} has levels of {len(levels)} stage(s), and this chain has {len(chain.stages)}.")
    if weights != [link.loaded.fingerprint for link in chain.stages]:
        print(f"note: the levels of {file} were found with other weights", file=sys.stderr)
    return levels


def write_levels(file: FilePath, chain: Chain, levels: Sequence[float], more: Sequence[dict[str, Any]], **said) -> None:
    """Write what `levels_of` reads; more: what else is to be said of each stage."""
    stages = [
        {"s_0": level_text(level), "timestep": link.stage_path(level).points[0][1]}
        | {"checkpoint": link.loaded.file.name, "weights_fingerprint": link.loaded.fingerprint, **further}
        for link, level, further in zip(chain.stages, levels, more, strict=True)
    ]
    base = {"checkpoint": chain.base.loaded.file.name, "weights_fingerprint": chain.base.loaded.fingerprint}
    with replacing(file) as temporary:
        temporary.write_text(json.dumps({"base": base, "stages": stages, **said}, indent=1) + "\n", encoding="utf-8")
