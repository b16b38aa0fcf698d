"""From flags to the classes of samples and to what guides them: which image is of which class, and the denoiser."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cli
from checkpoint import LoadedClassifier, LoadedModel, load_classifier
from diffusion.guidance import ClassifierFree, ClassifierGuided, OfClass, Unconditional
from diffusion.sampler import IMAGES_PER_SEED
from runtime.settings import Settings, option
from scheduler import Denoiser

SHOWN_NAMES = 10


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings(Settings):
    """What guides towards the classes that a stage names."""

    group = "classes"
    guidance_scale: float | None = option(
        None,
        "classifier-free guidance, e_u + G (e_c - e_u): 0 is unconditional, 1 conditional, above it leans towards the "
        "class at two network calls in place of one; others count G - 1 (1)",
        parse=cli.number_from_zero,
        metavar="G",
    )
    classifier: str | None = option(
        None, "guide by this checkpoint of train_classifier.py, at one network call more each time", metavar="FILE"
    )
    classifier_scale: float | None = option(
        None,
        "of --classifier: what the gradient of log p(class | noisy image) is multiplied by (1)",
        parse=cli.number_from_zero,
        metavar="S",
    )

    def check(self) -> None:
        super().check()
        if self.classifier_scale is not None and self.classifier is None:
            raise ValueError("--classifier_scale belongs to --classifier FILE; name that too, or leave it out.")

    @property
    def calls_each(self) -> int:
        """Network calls of an evaluation: one, another for guidance, another for a classifier."""
        return calls_each(self.guidance_scale, self.classifier is not None)

    def conditions_of(self, loaded: LoadedModel, classes: tuple[str, ...] | None) -> "Conditions":
        """What the flags mean for a model and some classes, or for all of them (None).

        Raises ValueError for classes or guidance where there are none, for a class that does not exist, and for a
        classifier that is none, or one of another resolution, process or other classes.
        """
        names = tuple(loaded.config.get("class_names") or ())
        classifier = None
        if self.classifier is not None:
            classifier = load_classifier(self.classifier, loaded.device)
            _check_classifier(classifier, loaded)
            of_classifier = classifier.class_names
            if names and names != of_classifier:
                raise ValueError(
                    f"The classifier {self.classifier} knows the classes {listed(of_classifier)}, but {loaded.file} "
                    f"{listed(names)}; train one on the same data."
                )
            names = of_classifier
        told = bool(loaded.config.get("class_names"))
        if not names and (classes is not None or self.guidance_scale is not None):
            flag = "--class" if classes is not None else "--guidance_scale"
            raise ValueError(
                f"{loaded.file} was trained without classes, so that {flag} says nothing to it; train with --classes, "
                "or leave it out."
            )
        if not told and self.guidance_scale is not None:
            raise ValueError(
                f"{loaded.file} was trained without classes, and only --classifier guides it; leave --guidance_scale "
                "out, or train with --classes."
            )
        chosen = names if classes is None else classes
        unknown = [name for name in chosen if name not in names]
        if unknown:
            whose = loaded.file if told else self.classifier
            raise ValueError(f"--class {unknown[0]} is no class of {whose}, which has {listed(names)}.")
        scale = (1.0 if self.guidance_scale is None else self.guidance_scale) if told else 0.0
        return Conditions(
            names=chosen,
            indices=tuple(map(names.index, chosen)),
            known=names,
            null=len(names),
            all_classes=classes is None,
            told=told,
            scale=scale,
            classifier=classifier,
            classifier_scale=1.0 if self.classifier_scale is None else self.classifier_scale,
        )


@dataclass(frozen=True, kw_only=True)
class ClassSettings(GuidanceSettings):
    """Which classes are sampled, and what guides towards them; nothing of it for models without classes."""

    group = "classes"
    classes: tuple[str, ...] | None = option(
        None,
        "classes to sample, by name: image k is of the class number k modulo their number (all of the model)",
        flag="--class",
        nargs="+",
        metavar="NAME",
    )

    def check(self) -> None:
        super().check()
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("--class names a class twice; leave one of them out.")

    def conditions(self, loaded: LoadedModel) -> "Conditions":
        """What the flags mean for a model; raises what `conditions_of` raises."""
        return self.conditions_of(loaded, self.classes)


@dataclass(frozen=True, kw_only=True)
class OneClassSettings(GuidanceSettings):
    """Of which class all images of a stage are, and what guides towards it; of none unless it is named."""

    group = "classes"
    class_name: str | None = option(
        None, "class of all images, by name (none: what a model with classes knows of no class)", flag="--class",
        metavar="NAME",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        for name in ("guidance_scale", "classifier"):
            if getattr(self, name) is not None and self.class_name is None:
                raise ValueError(f"--{name} leans towards a class; name it with --class NAME, or leave --{name} out.")

    def conditions(self, loaded: LoadedModel) -> "Conditions":
        """What the flags mean for a model; raises what `conditions_of` raises."""
        return NO_CLASS if self.class_name is None else self.conditions_of(loaded, (self.class_name,))


def calls_each(guidance_scale: float | None, classifier: bool) -> int:
    """Network calls of an evaluation: one, another for guidance by a scale that needs it, another for a classifier."""
    return 1 + (guidance_scale not in (None, 0.0, 1.0)) + classifier


def listed(names: Sequence[str]) -> str:
    """The names of classes as messages have them, of many the first ones."""
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {len(names) - SHOWN_NAMES} more" * (len(names) > SHOWN_NAMES))


def _written(number: float) -> str:
    """A number to its last digit, as two that are not equal are two scales; whole ones without a point."""
    return str(float(number)).removesuffix(".0")


def _check_classifier(classifier: LoadedClassifier, loaded: LoadedModel) -> None:
    """Raise ValueError unless a classifier reads what the process of a model makes of its images."""
    loaded.require_pixels("--classifier")
    if loaded.starts_from_images:
        raise ValueError(
            f"{loaded.file} starts from images, so that what it is shown is no noisy image, which --classifier reads; "
            "leave it out."
        )
    model = loaded.model
    for what, ours, theirs in (
        ("images at side", loaded.config["resolution"], classifier.config["resolution"]),
        ("channels", loaded.config["channels"], classifier.config["channels"]),
        ("timesteps", loaded.scheduler.num_train_timesteps, classifier.scheduler.num_train_timesteps),
        ("the process", loaded.scheduler.process_name, classifier.scheduler.process_name),
    ):
        if ours != theirs:
            raise ValueError(
                f"The classifier {classifier.file} was trained on {what} {theirs}, but {loaded.file} on {ours}; train "
                "one like the model."
            )
    if classifier.model.num_scales > 1:
        if model.num_predictions < 2:
            raise ValueError(
                f"The classifier {classifier.file} reads two scales with noise of their own, of which {loaded.file} "
                "makes one; train one with --scales 1."
            )
        if classifier.scheduler.representation.name != loaded.scheduler.representation.name:
            raise ValueError(
                f"The classifier {classifier.file} reads the pair '{classifier.scheduler.representation.name}', but "
                f"{loaded.file} makes '{loaded.scheduler.representation.name}'; train one with that --representation."
            )
    elif model.num_scales > 1 and loaded.scheduler.representation.name == "residual":
        raise ValueError(
            f"The classifier {classifier.file} reads images, but the fine scale of {loaded.file} is a residual; train "
            "one with --scales 2 --representation residual."
        )


@dataclass(frozen=True)
class Conditions:
    """Classes and guidance of the samples of one model; of a model that knows none, `names` is empty."""

    names: tuple[str, ...]  # of the classes to sample
    indices: tuple[int, ...]  # and their labels
    known: tuple[str, ...]  # all classes of the model, or else of the classifier
    null: int
    all_classes: bool
    told: bool  # whether the model itself takes classes
    scale: float
    classifier: LoadedClassifier | None  # which guides beside the model
    classifier_scale: float

    @property
    def calls(self) -> int:
        """Network calls of an evaluation."""
        return calls_each(self.scale if self.told else None, self.classifier is not None)

    def labels(self, seeds: Sequence[int]) -> list[int] | None:
        """The class of each seed, which depends on it alone; None for a model that knows no classes."""
        return [self.indices[seed % IMAGES_PER_SEED % len(self.indices)] for seed in seeds] if self.names else None

    def told_classes(self, denoise: Denoiser) -> Denoiser:
        """`denoise` with guidance by its own predictions; it takes labels then, if there are classes."""
        if not self.names or (self.told and self.scale == 1.0):
            return denoise
        return ClassifierFree(denoise, self.null, self.scale) if self.scale else Unconditional(denoise)

    def guided(self, denoise: Denoiser, loaded: LoadedModel) -> Denoiser:
        """What `told_classes` returned, compiled or not, guided by the classifier too if there is one.

        loaded: the model that it came from. What a classifier does is not compiled, as it takes a gradient.
        """
        if self.classifier is None:
            return denoise
        return ClassifierGuided(denoise, self.classifier.log_probability, loaded.scheduler, self.classifier_scale)

    def of_the_class(self, denoise: Denoiser, loaded: LoadedModel) -> Denoiser:
        """What `told_classes` returned, guided as by `guided` and told of the only class that there is, if any.

        It takes no labels.
        """
        return OfClass(self.guided(denoise, loaded), *self.indices) if self.names else denoise

    @property
    def label(self) -> str:
        """What rows of results call it, one line: empty without classes."""
        if not self.names:
            return ""
        words = [] if self.all_classes else [f"class {'+'.join(self.names)}"]
        words += [f"guidance {_written(self.scale)}"] if self.told else []
        if self.classifier is not None:
            words.append(f"classifier {self.classifier.fingerprint} {_written(self.classifier_scale)}")
        return " ".join(", ".join(words).splitlines())

    @property
    def title(self) -> str:
        """What titles of figures add for it."""
        return f", {self.label}" if self.names else ""

    @property
    def said(self) -> dict[str, Any]:
        """What a folder of images says of it; nothing without classes."""
        return {"classes": list(self.names), "guidance": self.label} if self.names else {}

    @property
    def suffix(self) -> str:
        """What names of folders add for it; a column of labels may hold what no name of a folder may."""
        if not self.names:
            return ""
        words = [] if self.all_classes else [re.sub(r"[/\\\n\r]+", "-", "-".join(self.names))]
        words += [f"g{_written(self.scale)}"] if self.told and self.scale != 1.0 else []
        words += [f"c{_written(self.classifier_scale)}"] if self.classifier is not None else []
        return "".join(f"_{word}" for word in words)


NO_CLASS = Conditions(
    names=(), indices=(), known=(), null=0, all_classes=False, told=False, scale=0.0, classifier=None,
    classifier_scale=1.0,
)  # fmt: skip


class Guidance(NamedTuple):
    """What `Conditions.label` says of guidance: its kind, which is all but the last number, and that number."""

    kind: str  # such as "guidance", "class cat, guidance" and "guidance 1, classifier c0ffee"
    scale: float
    calls: int  # network calls of an evaluation


_NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?"
_LABEL = re.compile(
    rf"(?P<kind>(?:class .+?, )?(?:guidance|(?:guidance (?P<fixed>{_NUMBER}), )?(?P<classifier>classifier) [0-9a-f]+)) "
    rf"(?P<scale>{_NUMBER})"
)


def guidance_of(label: str) -> Guidance:
    """The guidance that a row of results names, of two kinds at once that by the classifier.

    Raises ValueError for what `Conditions.label` does not say, and where it says nothing.
    """
    found = _LABEL.fullmatch(label)
    if found is None:
        raise ValueError(f"'{label}' names no scale of guidance" if label else "no guidance is named")
    scale, by_classifier = float(found["scale"]), found["classifier"] is not None
    own = scale if not by_classifier else float(found["fixed"]) if found["fixed"] else None
    return Guidance(found["kind"], scale, calls_each(own, by_classifier))
