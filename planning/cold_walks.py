"""Flags of stages that make images of nothing with models of cold diffusion: what their walks start from."""

from dataclasses import dataclass
from typing import Any

import cli
from checkpoint import LoadedModel
from cli import DataSettings
from diffusion.cold_starts import START_COMPONENTS, START_NOISE, MixtureStarts, mixture_of
from diffusion.solvers import COLD_SOLVERS
from planning.choice import WalkSettings
from runtime.settings import option


@dataclass(frozen=True, kw_only=True)
class MixtureSettings(WalkSettings):
    """How a step of a path is taken, and from what a walk of cold diffusion starts.

    Raises ValueError for a start beside another solver.
    """

    group = "start of cold diffusion"
    start_components: int | None = option(
        None,
        "Gaussians whose mixture is fitted to the fully degraded images of the training, of which walks start "
        f"({START_COMPONENTS})",
        parse=cli.positive_int,
        metavar="K",
    )
    start_noise: float | None = option(
        None,
        f"deviation of the noise on such a start, which breaks the symmetry of its pixels ({START_NOISE:g})",
        parse=cli.number_from_zero,
        metavar="SIGMA",
    )

    def check(self) -> None:
        super().check()
        for name, usual in (("start_components", START_COMPONENTS), ("start_noise", START_NOISE)):
            if self.solver in COLD_SOLVERS and getattr(self, name) is None:
                self._derive(**{name: usual})
            elif self.solver not in COLD_SOLVERS and getattr(self, name) is not None:
                raise ValueError(
                    f"--{name} belongs to --solver {' and '.join(COLD_SOLVERS)}, not to {self.solver}; leave it out."
                )

    @property
    def start_words(self) -> str:
        """What walks of cold diffusion start from; nothing for others."""
        if self.solver not in COLD_SOLVERS:
            return ""
        return f"from {self.start_components} Gaussians with noise {self.start_noise:g}"

    @property
    def solver_label(self) -> str:
        return " ".join(filter(None, (super().solver_label, self.start_words)))

    @property
    def solver_said(self) -> dict[str, Any]:
        return super().solver_said | ({"start": self.start_words} if self.start_words else {})

    @property
    def solver_suffix(self) -> str:
        return super().solver_suffix + (f"_gmm{self.start_components}" if self.start_words else "")

    def mixture_starts(self, loaded: LoadedModel, data: DataSettings) -> MixtureStarts | None:
        """What walks of a model of cold diffusion start from; None for all others.

        data: where its training images are, if not where its config says. Raises what `cli.load_image_parts` and
        `mixture_of` raise.
        """
        if not loaded.is_cold:
            return None
        mixture = mixture_of(
            loaded.config["data_fingerprint"],
            lambda: cli.load_training_images(data, loaded.config),
            loaded.scheduler,
            self.start_components,
            data.cache_dir,
        )
        return MixtureStarts(mixture, loaded.image_shape, self.start_noise)
