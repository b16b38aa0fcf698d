"""Presets of training: what `--preset` sets wherever a flag is not given."""

import argparse
import copy
from typing import Any

from checkpoint import MODEL_CLASSES
from images.representation import REPRESENTATIONS

PRESETS: dict[str, dict[str, Any]] = {
    "published": {
        "prediction_type": "epsilon",
        "beta_schedule": "cosine_clipped",
        "loss_weights": (1.0, 1.0),
        "t_pairs": {"overcomplete": "independent", "residual": "independent"},
    },
    "improved": {
        "prediction_type": "v",
        "beta_schedule": "cosine",
        "loss_weights": "auto",
        "t_pairs": {"overcomplete": "band:diagonal,1", "residual": "band:image,1"},
    },
}
COARSE_SHARE = 0.25  # Dimensions of the coarse scale, as a share of those of the image.


def with_preset(args: argparse.Namespace, model_type: str) -> argparse.Namespace:
    """Flags of training with what they leave open (None) taken from `args.preset`, and `auto` as numbers.

    Weights stay None for a model with one loss, pairs of timesteps for one without a choice of its own in the preset.
    """
    args, preset = copy.copy(args), PRESETS[args.preset]
    for name in ("prediction_type", "beta_schedule"):
        if getattr(args, name) is None:
            setattr(args, name, preset[name])
    if args.t_pairs is None and model_type == "dual":
        args.t_pairs = preset["t_pairs"][args.representation]
    one_loss = MODEL_CLASSES[model_type].num_predictions == 1
    if args.loss_weights is None and not one_loss:
        args.loss_weights = preset["loss_weights"]
    if args.loss_weights == "auto":
        args.loss_weights = None if one_loss else balanced_weights(args.representation)
    return args


def balanced_weights(representation: str) -> tuple[float, float]:
    """Weights of the losses of the fine and the coarse scale by their shares of all dimensions, of sum 1."""
    fine = REPRESENTATIONS[representation].fine_share
    return fine / (fine + COARSE_SHARE), COARSE_SHARE / (fine + COARSE_SHARE)


def preset_help() -> str:
    """What each preset sets, in one line."""
    texts = []
    for name, preset in PRESETS.items():
        weights, pairs = preset["loss_weights"], preset["t_pairs"]
        weights = weights if isinstance(weights, str) else ",".join(f"{weight:g}" for weight in weights)
        pairs = " or ".join(f"{regime} ({kind})" for kind, regime in pairs.items())
        flags = f"--prediction_type {preset['prediction_type']} --beta_schedule {preset['beta_schedule']}"
        texts.append(f"{name}: {flags} --loss_weights {weights}, for dual models --t_pairs {pairs}")
    return "; ".join(texts)
