"""From settings to the path that a model samples along, and which model can follow which path."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, ClassVar

import cli
from checkpoint import MODEL_CLASSES, LoadedModel, unmet_need
from diffusion.adaptive import MOST_CALLS, TOLERANCE
from diffusion.sampler import COARSE_FEEDS, ENDS, coarse_feed
from diffusion.solvers import COLD_SOLVERS, LANGEVIN_ROUNDS, SOLVERS, VARIANCES, make_solver
from diffusion.step import Solver
from paths.families import cascade, diagonal, heuristic, lead, log_snr_shift, through
from paths.path import BY_LOG_SNR, SPACINGS, Path, timestep_of_level
from paths.schedule_file import load_schedule
from planning.error_map import CHAIN_RULE_FACTORS, NORMALISATIONS
from planning.heatmap import find_map
from planning.map_file import load_heatmap
from planning.map_paths import NO_CASCADE, heatmap_path, kl_cascade, kl_refined
from planning.path_types import PATH_FAMILIES, PATH_TYPES, PathType, parse_path_type, path_type
from planning.regimes import off_regime_note, seen_range
from planning.replay import replay_for
from planning.students import NO_STUDENT, STUDENT_PATH, student_path
from runtime.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class CriterionSettings(Settings):
    """What an optimal path minimises."""

    group = "criterion"
    max_jump: int = option(5, "cells a dp step may move per axis", parse=cli.positive_int)
    factor: str = option("B", "chain-rule factor", choices=tuple(CHAIN_RULE_FACTORS))
    normalisation: str = option(
        "published",
        "what a dp error is divided by: pixels squared, dimensions, or nothing",
        choices=tuple(NORMALISATIONS),
    )
    kl_weight: float = option(1.0, "of the kl paths: 0 is KL, 1 weighs log SNR evenly", parse=cli.unit_interval)


@dataclass(frozen=True, kw_only=True)
class EndSettings(Settings):
    """Where a walk along a path ends."""

    group = "path"
    end: str = option("clean", "land on the clean image, or on t=0 as published", choices=ENDS)


@dataclass(frozen=True, kw_only=True)
class SolverSettings(Settings):
    """How a step of a path is taken.

    Raises ValueError for a setting that belongs to another solver.
    """

    group = "path"
    usual_eta: ClassVar[float] = 0.0
    solver: str = option(
        "ddim",
        "how a step is taken; heun, pc, langevin and ode call the network more than once a step, ode as often as its "
        "--tolerance asks for, also with --num_steps 1; of models of cold diffusion cold or cold_naive",
        choices=(*SOLVERS, *COLD_SOLVERS),
    )
    eta: float | None = option(
        None, "of ddim: 0 DDIM to 1 ancestral (0; of inpaint.py 1, as published)", parse=cli.unit_interval
    )
    variance: str | None = option(
        None,
        f"of ancestral: a bound, or learned, which models trained with --objective hybrid or vlb say ({VARIANCES[0]})",
        choices=VARIANCES,
    )
    langevin_rounds: int | None = option(
        None, f"of langevin: steps at every point ({LANGEVIN_ROUNDS})", parse=cli.positive_int, metavar="M"
    )
    tolerance: float | None = option(
        None, f"of ode: relative and absolute error of its steps ({TOLERANCE:g})", parse=cli.positive_float
    )

    def check(self) -> None:
        super().check()
        owners = {"eta": "ddim", "variance": "ancestral", "langevin_rounds": "langevin", "tolerance": "ode"}
        for name, solver in owners.items():
            if getattr(self, name) is not None and self.solver != solver:
                raise ValueError(f"--{name} belongs to --solver {solver}, not to {self.solver}; leave it out.")
        if self.solver == "ddim" and self.eta is None:
            self._derive(eta=self.usual_eta)
        self.make_solver()

    @property
    def solver_options(self) -> dict[str, Any]:
        """What a solver of that name takes."""
        return {
            "ddim": {"eta": self.eta},
            "ancestral": {"variance": self.variance or VARIANCES[0]},
            "langevin": {"rounds": self.langevin_rounds or LANGEVIN_ROUNDS},
            "ode": {"tolerance": self.tolerance or TOLERANCE},
        }.get(self.solver, {})

    def make_solver(self) -> Solver:
        """One for a walk at a time."""
        return make_solver(self.solver, **self.solver_options)

    @property
    def solver_words(self) -> str:
        """What it is called, such as "ddim eta 0"."""
        options = (f"{name} {value:g}" if name != "variance" else value for name, value in self.solver_options.items())
        return " ".join([self.solver, *options])

    @property
    def solver_suffix(self) -> str:
        """What names of folders add for it; nothing for DDIM."""
        return "" if self.solver == "ddim" else f"_{self.solver}"

    @property
    def solver_said(self) -> dict[str, Any]:
        """What a folder of images says of it; those of earlier versions, all made by DDIM, have eta alone."""
        return {"eta": self.eta} | ({} if self.solver == "ddim" else {"solver": self.solver_words})


def _several(calls: int | tuple[int, ...]) -> tuple[int, ...]:
    return calls if isinstance(calls, tuple) else (calls,)


@dataclass(frozen=True, kw_only=True)
class WalkSettings(SolverSettings, EndSettings):
    """How a step of a path is taken, and where the last one lands."""

    group = "path"
    calls_each: ClassVar[int] = 1  # Network calls of an evaluation; stages with `ClassSettings` have more.

    num_calls: int | None = option(
        None,
        "network calls, in place of --num_steps: the most steps that do with so many; of ode the most for an image "
        f"({MOST_CALLS})",
        parse=cli.positive_int,
        metavar="N",
    )

    def check(self) -> None:
        super().check()
        if self.num_calls is None or self.solver == "ode":
            return
        if min(_several(self.num_calls)) < self.calls_each:
            raise ValueError(
                f"a guided evaluation is {self.calls_each} network calls, and --num_calls allows fewer; raise it, or "
                "leave the guidance out."
            )
        fitting = [self.make_solver().steps(calls // self.calls_each, self.end) for calls in _several(self.num_calls)]
        steps = tuple(dict.fromkeys(fitting)) if isinstance(self.num_calls, tuple) else fitting[0]
        usual = next(field.default for field in dataclasses.fields(self) if field.name == "num_steps")
        if self.num_steps not in (usual, steps):
            raise ValueError("--num_steps and --num_calls exclude each other; leave one of them out.")
        self._derive(num_steps=steps)

    @property
    def most_calls(self) -> int | None:
        """The most network calls there may be; None for as many as the steps take."""
        return None if self.num_calls is None else max(_several(self.num_calls))

    def make_solver(self) -> Solver:
        limit = {"max_calls": self.most_calls or MOST_CALLS} if self.solver == "ode" else {}
        return make_solver(self.solver, **self.solver_options, **limit)

    def check_calls(self, num_steps: int) -> None:
        """Raise ValueError if a walk of so many steps takes more calls than there may be."""
        solver = self.make_solver()
        calls = self.calls(num_steps)
        if self.most_calls is not None and calls > self.most_calls:
            fewer = ", such as --num_steps 1" if solver.adaptive and num_steps > 1 else ""
            raise ValueError(
                f"--solver {self.solver} takes {calls} network calls or more for {num_steps} step(s), and --num_calls "
                f"allows {self.most_calls}; raise it, or take fewer steps{fewer}."
            )

    def calls(self, num_steps: int) -> int:
        """Network calls of a walk of so many steps, of an adaptive solver the fewest."""
        return self.make_solver().calls(num_steps, self.end) * self.calls_each

    @property
    def solver_label(self) -> str:
        """What it is called in rows of results, such as "ddim eta 0 clean"."""
        return f"{self.solver_words} {self.end}"

    @property
    def solver_entry(self) -> dict[str, Any]:
        """What it is called in schedule files."""
        return {"name": self.solver, **self.solver_options, "end": self.end}


@dataclass(frozen=True, kw_only=True)
class PathSettings(CriterionSettings):
    """What decides a path, other than its type and its number of steps."""

    group = "path"
    spacing: str = option("uniform_t", "of the diagonal", choices=SPACINGS)


@dataclass(frozen=True, kw_only=True)
class StepSettings(PathSettings):
    """What decides a path of one number of steps, other than its type."""

    group = "path"
    num_steps: int = option(18, "steps, each one network call by ddim", parse=cli.positive_int)


_TYPES = f"{', '.join(PATH_TYPES)}; {'; '.join(f'{name}:{words}' for name, words in PATH_FAMILIES.items())}"


@dataclass(frozen=True, kw_only=True)
class OnePathSettings(StepSettings):
    """The path of a stage that samples along one, as `path_of_settings` finds it."""

    path_type: str = option("diagonal", _TYPES, parse=path_type, metavar="TYPE")
    schedule: str | None = option(None, "follow the path of this schedule file instead of --path_type")
    heatmap: str | None = option(None, "for dp, kl and cascade:best (that of the checkpoint in the run's results)")
    coarse_from: str = option(
        "x0",
        "coarse image that a model reads and does not predict: of its clean or of its noisy fine image",
        choices=COARSE_FEEDS,
    )


@dataclass(frozen=True, kw_only=True)
class SeveralPathsSettings(PathSettings):
    """The paths of a stage that samples along several."""

    group = "path"
    path_type: tuple[str, ...] = option(("diagonal",), _TYPES, parse=path_type, metavar="TYPE", nargs="+")
    num_steps: tuple[int, ...] = option(
        (18,), "steps, each one network call by ddim", parse=cli.positive_int, nargs="+"
    )


def why_not(model_type: str, path_type: str) -> str:
    """Why a type of model cannot follow a type of path, as a sentence, or an empty text.

    Raises what `parse_path_type` and, for a schedule, `load_schedule` raise.
    """
    kind, model = parse_path_type(path_type), MODEL_CLASSES[model_type]
    if problem := unmet_need(f"A '{model_type}' model", {"model_type": model_type}):
        return problem
    if kind.name == "schedule":
        path = load_schedule(kind.parameters[0])
        two_clocks = any(len(set(point)) > 1 for point in path.points)
        if path.num_scales == model.num_scales and not (two_clocks and model.one_clock):
            return ""
        return (
            f"Schedule {kind.parameters[0]} moves {path.num_scales} scale(s){' by two clocks' if two_clocks else ''}, "
            f"which a '{model_type}' model cannot follow; pass one made for it."
        )
    one_clock = ("diagonal", "kl_diagonal") if model.num_scales == 1 else ("diagonal",)
    if kind.name not in (*one_clock, STUDENT_PATH, "through") and model.one_clock:
        return (
            f"--path_type {path_type} needs a model with two clocks, but this one is '{model_type}'; use --path_type "
            f"{' or '.join(one_clock)}."
        )
    if kind.needs_heatmap and kind.name != "dp_64" and model.num_predictions < model.num_scales:
        return (
            f"--path_type {path_type} counts the error of the coarse prediction, which a '{model_type}' model does not "
            "make; use dp_64, or a path that needs no heatmap, such as cascade:2."
        )
    return ""


def solver_problem(settings: SolverSettings, model_type: str) -> str:
    """Why a type of model cannot be sampled by the solver of settings, as a sentence, or an empty text."""
    model = MODEL_CLASSES[model_type]
    if model.num_predictions == model.num_scales or not settings.make_solver().calls_between:
        return ""
    others = ", ".join(name for name in SOLVERS if not make_solver(name).calls_between)
    return (
        f"--solver {settings.solver} calls the network between points, where a '{model_type}' model has no coarse "
        f"image to read; choose one of {others}."
    )


def path_of_settings(settings: OnePathSettings, loaded: LoadedModel) -> tuple[Path, str]:
    """The path that settings name, and what to call it in the name of a file.

    Prints a warning if it leads far from what the model was trained on. Raises ValueError for a solver that the model
    cannot be sampled by, also because of its objective or for want of a variance, or that takes more calls than there
    may be, and what `choose_path` raises.
    """
    config = loaded.config
    if isinstance(settings, SolverSettings) and (problem := solver_problem(settings, config["model_type"])):
        raise ValueError(problem)
    if isinstance(settings, SolverSettings):
        loaded.check_solver(settings.make_solver())
        if settings.make_solver().reads_variance:
            loaded.check_variance()
    file = find_map(loaded.file, config, config["epoch"], loaded.weights)
    path_type = settings.path_type if settings.schedule is None else f"schedule:{settings.schedule}"
    path = choose_path(settings, path_type, settings.num_steps, loaded, settings.heatmap or file)
    if isinstance(settings, WalkSettings):
        settings.check_calls(path.nfe)
    note = off_regime_note(path, config, loaded.scheduler, coarse_feed(loaded.model, settings.coarse_from))
    if note:
        print(f"warning: {note}", file=sys.stderr)
    return path, path.kind if settings.schedule else parse_path_type(path_type).file_name


def check_followed(path_type: str, loaded: LoadedModel) -> None:
    """Raise ValueError if a loaded model cannot follow a type of path, because of its type or of its training."""
    reason = why_not(loaded.config["model_type"], path_type)
    if parse_path_type(path_type).name != "diagonal" and not loaded.scheduler.noise_levels:
        reason = (
            f"--path_type {path_type} counts in log SNR, and {loaded.file} is a model of cold diffusion, without "
            "noise; use diagonal."
        )
    is_best_cascade = parse_path_type(path_type) == PathType("cascade", ("best",))
    if not reason and is_best_cascade and seen_range(loaded.config, loaded.scheduler) is not None:
        reason = NO_CASCADE
    if reason:
        raise ValueError(reason)


def choose_path(
    settings: PathSettings,
    path_type: str,
    num_steps: int,  # of a type that does not say it
    loaded: LoadedModel,
    heatmap: str | FilePath | None = None,  # of the same weights, for types that are optimal on one
) -> Path:
    """The path of a type for a loaded model.

    A schedule is followed as `planning.replay` says, which prints what need not suit the model. Raises ValueError if
    the model cannot follow such a path (`check_followed`), if the heatmap was computed with other weights, and what the
    path functions and the files raise.
    """
    kind = parse_path_type(path_type)
    check_followed(path_type, loaded)
    if settings.spacing in BY_LOG_SNR and not loaded.scheduler.noise_levels:
        raise ValueError(
            f"--spacing {settings.spacing} counts in log SNR, and {loaded.file} is a model of cold diffusion, without "
            "noise; choose uniform_t."
        )
    if kind.name == STUDENT_PATH:
        path = student_path(loaded.config)
        if path is None:
            raise ValueError(NO_STUDENT.format(loaded.file))
        return path
    if kind.name == "schedule":
        return replay_for(kind.parameters[0], loaded, getattr(settings, "solver", None))
    if kind.needs_heatmap:
        return _optimal_path(settings, kind, num_steps, loaded, heatmap)
    log_snr = loaded.scheduler.log_snr.numpy()
    table = {"log_snr": log_snr, "num_train_timesteps": len(log_snr)}
    if kind.name == "cascade":
        level, *steps = kind.parameters
        remaining = timestep_of_level(level, log_snr)
        if remaining == len(log_snr) - 1:
            raise ValueError(
                f"--path_type {path_type} waits at timestep {remaining}, where it starts; choose a log SNR above "
                f"{log_snr[-2]:.4g}."
            )
        return cascade(
            num_steps, coarse_steps=next(iter(steps), None), remaining=remaining, spacing=settings.spacing, **table
        )
    if kind.name == "through":
        ahead = 0.0 if loaded.model.one_clock else loaded.scheduler.representation.image_lead
        return through(kind.parameters, log_snr, loaded.model.num_scales, ahead)
    base = diagonal(num_steps, settings.spacing, loaded.model.num_scales, **table)
    if kind.name == "image_diagonal":
        ahead = loaded.scheduler.representation.image_lead
        return Path(log_snr_shift(base, ahead, log_snr).points, "image_diagonal", {"base": base.provenance})
    if kind.name == "shift":
        return log_snr_shift(base, *kind.parameters, log_snr)
    families = {"lead": lead, "heuristic": heuristic}
    return families[kind.name](base, *kind.parameters) if kind.name in families else base


def _optimal_path(
    settings: PathSettings, kind: PathType, num_steps: int, loaded: LoadedModel, heatmap: str | FilePath | None
) -> Path:
    content = load_heatmap(heatmap)
    if content["fingerprint"] != loaded.fingerprint:
        raise ValueError(
            f"Heatmap {heatmap} was computed with other weights than the {loaded.weights} ones of this checkpoint; "
            "compute it again (compute_heatmap_30.py --force) or name another."
        )
    if kind.name.startswith("dp"):
        return heatmap_path(content, kind.name, num_steps, settings.max_jump, settings.factor, settings.normalisation)[
            0
        ]
    seen = seen_range(loaded.config, loaded.scheduler)
    content |= {} if seen is None else {"seen_32": seen}  # Older files do not say.
    log_snr = loaded.scheduler.log_snr.numpy()
    if kind.name == "cascade":
        path = kl_cascade(content, log_snr, num_steps, settings.kl_weight)
    else:
        path = kl_refined(content, log_snr, num_steps, settings.kl_weight, kind.name == "kl_diagonal").path
        if loaded.model.num_scales == 1:
            path = Path([point[:1] for point in path.points], path.kind, path.provenance)
    criterion = {"criterion": f"{kind}, weight {settings.kl_weight:g}", "heatmap_weights": content["fingerprint"]}
    return Path(path.points, kind.name, path.provenance | criterion)
