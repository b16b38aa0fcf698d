"""Cold diffusion as an objective: the clean image of a degraded one, by absolute errors (arXiv 2208.09392, eq. 1)."""

from typing import Any, Protocol

import torch.nn.functional as F

from checkpoint import network_class
from images.representation import Images
from scheduler import COLD
from training.objective import Denoising, TrainingBatch

COLD_SETTINGS = ("degradation", "severity_schedule", "input_noise")


class Cold(Denoising):
    """Absolute errors of the clean image, of the fine scale alone; all else is as in `Denoising`."""

    distance = staticmethod(F.l1_loss)

    def noised(self, batch: TrainingBatch) -> tuple[Images, Images]:
        """The fine images of a step, degraded, twice: a network is shown them as they are."""
        degraded = (self.scheduler.add_noise(*batch.scales[0]),)
        return degraded, degraded


class ColdSettings(Protocol):
    """The settings of a training that `check_cold` asks for."""

    model_type: str
    objective: str | None
    process: str | None
    prediction_type: str | None
    t_law: str | None
    timestep_weights: str | None
    min_snr_gamma: float | None
    perceptual_weight: float | None
    feature_weight: float | None
    classes: str | None
    latents: str | None


def check_cold(settings: ColdSettings) -> None:
    """Raise ValueError for settings of cold diffusion without its objective or process, or with what it has not."""
    if settings.objective != COLD:
        said = [name for name in COLD_SETTINGS if getattr(settings, name) is not None]
        if said:
            raise ValueError(f"--{said[0]} belongs to --objective cold, not to {settings.objective}; leave it out.")
        if settings.process == COLD:
            raise ValueError(
                f"--process cold has no noise, which the objective {settings.objective} would need; pass another "
                "--process, or --preset cold for an objective that does without."
            )
        return
    if settings.process != COLD:
        raise ValueError(
            f"--objective cold restores degraded images, and the process {settings.process} makes noisy ones; pass "
            "--preset cold, or another --objective."
        )
    if network_class(settings.model_type).num_scales > 1:
        raise ValueError(
            f"--objective cold degrades images of one scale, and a '{settings.model_type}' model has two; train a "
            "baseline (train_baseline.py)."
        )
    others: dict[str, tuple[bool, Any]] = {
        "prediction_type": (settings.prediction_type != "x0", "x0"),
        "timestep_weights": (settings.timestep_weights != "published", "published"),
        "min_snr_gamma": (settings.min_snr_gamma is not None, "none"),
        "t_law": (settings.t_law.startswith("log_normal"), "one by t"),
        "perceptual_weight": (bool(settings.perceptual_weight), "0"),
        "feature_weight": (bool(settings.feature_weight), "0"),
        "classes": (settings.classes is not None, "none"),
        "latents": (settings.latents is not None, "none"),
    }
    for name, (differs, only) in others.items():
        if differs:
            raise ValueError(
                f"--objective cold goes with no --{name} but {only}, as it knows pixels and severities and no noise "
                "level; leave that out."
            )
