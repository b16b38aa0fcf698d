"""Presets of training: what `--preset` sets wherever a setting is not given."""

from typing import Any

from checkpoint import MODEL_CLASSES, network_class
from images.representation import REPRESENTATIONS
from networks.ema import USUAL_RAMPUP
from scheduler import COLD

PRESETS: dict[str, dict[str, Any]] = {
    "published": {
        "network": "unet",
        "process": "vp",
        "prediction_type": "epsilon",
        "beta_schedule": "cosine_clipped",
        "loss_weights": (1.0, 1.0),
        "ema_rampup_ratio": 0.0,
        "timestep_weights": "published",
        "t_law": "uniform",
        "times": "whole",
        "perceptual_weight": 0.0,
        "feature_weight": 0.0,
        "objective": "denoising",
        "t_pairs": {"overcomplete": "independent", "residual": "independent"},
    },
    "improved": {
        "network": "unet",
        "process": "vp",
        "prediction_type": "v",
        "beta_schedule": "cosine",
        "loss_weights": "auto",
        "ema_rampup_ratio": USUAL_RAMPUP,
        "timestep_weights": "published",
        "t_law": "uniform",
        "times": "whole",
        "perceptual_weight": 0.0,
        "feature_weight": 0.0,
        "objective": "denoising",
        "t_pairs": {"overcomplete": "band:diagonal,1", "residual": "band:image,1"},
    },
}
# Families of the field, with what is theirs, and otherwise as `improved`. The loss of scores, weighed by sigma^2, is
# that of the noise.
_NOISE = PRESETS["improved"] | {"prediction_type": "epsilon", "timestep_weights": "sigma2"}
PRESETS |= {
    "ddpm": _NOISE | {"beta_schedule": "linear", "timestep_weights": "published"},  # arXiv 2006.11239
    # The loss of arXiv 2006.11239 and two terms of the predicted clean image (`training.terms`); as its clipped betas
    # end at almost no signal, both are weighed by abar.
    "ddpm_report": _NOISE
    | {"network": "ddpm_unet", "beta_schedule": "cosine_report", "timestep_weights": "published"}
    | {"perceptual_weight": 0.1, "feature_weight": 0.05},
    "iddpm": _NOISE | {"timestep_weights": "published", "objective": "hybrid"},  # arXiv 2102.09672
    "ncsn": _NOISE | {"process": "ve", "beta_schedule": "ve"},  # arXiv 1907.05600, levels and all
    "vp": _NOISE | {"beta_schedule": "linear", "times": "real"},  # arXiv 2011.13456, as the next two
    "sub_vp": _NOISE | {"process": "sub_vp", "beta_schedule": "sub_vp_linear", "times": "real"},
    "ve": _NOISE | {"process": "ve", "beta_schedule": "ve", "times": "real"},
    "flow": PRESETS["improved"]  # arXiv 2209.03003, 2210.02747
    | {"process": "flow", "prediction_type": "velocity", "beta_schedule": "flow", "times": "real"},
    "ict": PRESETS["improved"]  # arXiv 2310.14189, with our network and process
    | {"objective": "consistency", "times": "real"},
    "cold": PRESETS["improved"]  # arXiv 2208.09392, with our network
    | {"process": COLD, "prediction_type": "x0", "beta_schedule": COLD, "objective": COLD},
}
# What configs from before there was a choice stand for.
EARLIER_VALUES = {
    "network": "unet",
    "ema_rampup_ratio": 0.0, "process": "vp", "timestep_weights": "published", "t_law": "uniform", "times": "whole",
    "perceptual_weight": 0.0, "feature_weight": 0.0,
    "objective": "denoising",
}  # fmt: skip
COARSE_SHARE = 0.25  # Dimensions of the coarse scale, as a share of those of the image.


def preset_values(preset: str, model_type: str, representation: str) -> dict[str, Any]:
    """What a preset means for a type of model, setting by setting.

    Pairs of timesteps are None for models that do not predict two scales by two clocks, which have pairs of their own,
    and a model of one prediction, or a classifier, has nothing to weigh.
    """
    values = PRESETS[preset]
    model = network_class(model_type)
    pairs = values["t_pairs"][representation] if model.has_two_clocks() else None
    weights = values["loss_weights"] if model.num_predictions > 1 else (1.0,)
    return values | {"loss_weights": weights, "t_pairs": pairs}


def preset_of(config: dict[str, Any]) -> str:
    """The preset of a checkpoint's config: the one it names or, of those before there were names, the one it fits."""
    named = config.get("preset")
    fits = (name for name, values in PRESETS.items() if values["prediction_type"] == config.get("prediction_type"))
    # There were no degradations before there were names.
    return named or next((name for name in fits if PRESETS[name]["process"] != COLD), "published")


def loss_weights_of(config: dict[str, Any]) -> tuple[float, ...]:
    """The weights of the losses by a checkpoint's config; all alike where it is from before there was a choice."""
    return tuple(config.get("loss_weights", [1.0] * MODEL_CLASSES[config["model_type"]].num_predictions))


def fits_preset(preset: str, config: dict[str, Any]) -> bool:
    """Whether a checkpoint's config, from before there were some of the choices or not, has all that a preset sets.

    Pairs of timesteps are left aside.
    """
    representation = config.get("representation", "overcomplete")
    values = preset_values(preset, config["model_type"], representation)
    if values["loss_weights"] == "auto":
        values["loss_weights"] = balanced_weights(representation)
    said = EARLIER_VALUES | config | {"loss_weights": loss_weights_of(config)}
    return all(said.get(name) == value for name, value in values.items() if name != "t_pairs")


def balanced_weights(representation: str) -> tuple[float, float]:
    """Weights of the losses of the fine and the coarse scale by their shares of all dimensions, of sum 1."""
    fine = REPRESENTATIONS[representation].fine_share
    return fine / (fine + COARSE_SHARE), COARSE_SHARE / (fine + COARSE_SHARE)


def preset_help() -> str:
    """What each preset sets, in one line: of the first two what they differ in, of others what they change of it."""
    first = ("published", "improved")
    texts = [_described(name, other) for name, other in (first, first[::-1])]
    texts += [_described(name, "improved") for name in PRESETS if name not in first]
    return "; ".join([*texts[:2], f"as improved but for what is named, {texts[2]}", *texts[3:]])


def _described(name: str, other: str) -> str:
    """The flags of what a preset sets otherwise than another one; a process without noise schedules says its own."""
    values = {key: value for key, value in PRESETS[name].items() if value != PRESETS[other][key]}
    pairs = values.pop("t_pairs", None)
    if values.get("beta_schedule") == values.get("process"):
        values.pop("beta_schedule", None)
    texts = [f"--{key} {_written(value)}" for key, value in values.items()]
    if pairs is not None:
        kinds = {regime: [kind for kind in pairs if pairs[kind] == regime] for regime in pairs.values()}
        said = (regime + f" ({kind[0]})" * (len(kinds) > 1) for regime, kind in kinds.items())
        texts.append("for dual models --t_pairs " + " or ".join(said))
    return f"{name}: {' '.join(texts)}"


def _written(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, tuple):
        return ",".join(f"{number:g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
