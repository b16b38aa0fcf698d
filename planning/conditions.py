"""From flags to the classes of samples and to what guides them: which image is of which class, and the denoiser."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cli
from checkpoint import LoadedModel
from diffusion.guidance import ClassifierFree, Unconditional
from diffusion.sampler import IMAGES_PER_SEED
from runtime.settings import Settings, option
from scheduler import Denoiser

SHOWN_NAMES = 10


@dataclass(frozen=True, kw_only=True)
class ClassSettings(Settings):
    """Which classes are sampled, and what guides towards them; nothing of it for models without classes."""

    group = "classes"
    classes: tuple[str, ...] | None = option(
        None,
        "classes to sample, by name: image k is of the class number k modulo their number (all of the model)",
        flag="--class",
        nargs="+",
        metavar="NAME",
    )
    guidance_scale: float | None = option(
        None,
        "classifier-free guidance, e_u + G (e_c - e_u): 0 is unconditional, 1 conditional, above it leans towards the "
        "class at two network calls in place of one; others count G - 1 (1)",
        parse=cli.number_from_zero,
        metavar="G",
    )

    def check(self) -> None:
        super().check()
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("--class names a class twice; leave one of them out.")

    @property
    def calls_each(self) -> int:
        """Network calls of an evaluation: one, and another for guidance."""
        return 1 + (self.guidance_scale not in (None, 0.0, 1.0))

    def conditions(self, loaded: LoadedModel) -> "Conditions":
        """What the flags mean for a model.

        Raises ValueError for classes or guidance where there are none, and for a class that does not exist.
        """
        names = tuple(loaded.config.get("class_names") or ())
        if not names and (self.classes is not None or self.guidance_scale is not None):
            flag = "--class" if self.classes is not None else "--guidance_scale"
            raise ValueError(
                f"{loaded.file} was trained without classes, so that {flag} says nothing to it; train with --classes, "
                "or leave it out."
            )
        chosen = names if self.classes is None else self.classes
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise ValueError(f"--class {unknown[0]} is no class of {loaded.file}, which has {_listed(names)}.")
        return Conditions(
            names=chosen,
            indices=tuple(map(names.index, chosen)),
            null=len(names),
            all_classes=self.classes is None,
            scale=1.0 if self.guidance_scale is None else self.guidance_scale,
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {len(names) - SHOWN_NAMES} more" * (len(names) > SHOWN_NAMES))


@dataclass(frozen=True)
class Conditions:
    """Classes and guidance of the samples of one model; of a model that knows none, `names` is empty."""

    names: tuple[str, ...]  # of the classes to sample
    indices: tuple[int, ...]  # and their labels
    null: int
    all_classes: bool
    scale: float

    @property
    def calls(self) -> int:
        """Network calls of an evaluation."""
        return 1 + (self.scale not in (0.0, 1.0))

    def labels(self, seeds: Sequence[int]) -> list[int] | None:
        """The class of each seed, which depends on it alone; None for a model that knows no classes."""
        return [self.indices[seed % IMAGES_PER_SEED % len(self.indices)] for seed in seeds] if self.names else None

    def guided(self, denoise: Denoiser) -> Denoiser:
        """`denoise` guided by its own predictions; it takes labels then, if there are classes."""
        if not self.names or self.scale == 1.0:
            return denoise
        return ClassifierFree(denoise, self.null, self.scale) if self.scale else Unconditional(denoise)

    @property
    def label(self) -> str:
        """What rows of results call it: empty without classes."""
        if not self.names:
            return ""
        words = [] if self.all_classes else [f"class {'+'.join(self.names)}"]
        return ", ".join([*words, f"guidance {self.scale:g}"])

    @property
    def said(self) -> dict[str, Any]:
        """What a folder of images says of it; nothing without classes."""
        return {"classes": list(self.names), "guidance": self.label} if self.names else {}

    @property
    def suffix(self) -> str:
        """What names of folders add for it."""
        if not self.names:
            return ""
        words = [] if self.all_classes else ["-".join(self.names)]
        words += [f"g{self.scale:g}"] if self.scale != 1.0 else []
        return "".join(f"_{word}" for word in words)
