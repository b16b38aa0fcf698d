"""The path of stages that follow the equation to a tolerance: that of their flags, or the usual one of the model."""

from dataclasses import dataclass

import cli
from checkpoint import LoadedModel
from paths.path import Path
from planning.choice import OnePathSettings, SolverSettings, StepSettings, path_of_settings
from planning.path_types import PATH_FAMILIES, PATH_TYPES, path_type
from runtime.settings import option

TWO_CLOCK_STEPS = 10  # Straight lines between so many timesteps stay near the diagonal of the image.
OTHER_TYPES = f"{', '.join(PATH_TYPES)}; {'; '.join(f'{name}:{words}' for name, words in PATH_FAMILIES.items())}"


@dataclass(frozen=True, kw_only=True)
class OpenPathSettings(OnePathSettings):
    """A path whose type and number of steps are those of `usual_path` unless they are given."""

    group = "path"
    num_steps: int | None = option(
        None,
        f"steps of the path, each solved to --tolerance (1; of the residual pair with two clocks {TWO_CLOCK_STEPS})",
        parse=cli.positive_int,
    )
    path_type: str | None = option(
        None,
        f"diagonal, of the residual pair with two clocks image_diagonal; or another: {OTHER_TYPES}",
        parse=path_type,
        metavar="TYPE",
    )


def usual_path(settings: OpenPathSettings, loaded: LoadedModel) -> tuple[Path, str]:
    """The path that settings name for a model, and what to call it in the name of a file.

    What they leave open is the diagonal in one step, which leaves all steps to the tolerance; of the residual pair with
    two clocks the diagonal of the image in TWO_CLOCK_STEPS; by a solver of fixed steps in as many as elsewhere. Raises
    what `path_of_settings` raises.
    """
    is_bent = loaded.model.has_two_clocks() and loaded.scheduler.representation.image_lead > 0
    kind, steps = ("image_diagonal", TWO_CLOCK_STEPS) if is_bent else ("diagonal", 1)
    if isinstance(settings, SolverSettings) and not settings.make_solver().adaptive:
        steps = StepSettings.num_steps
    chosen = {"path_type": settings.path_type or kind, "num_steps": settings.num_steps or steps}
    return path_of_settings(settings.but(**chosen), loaded)
