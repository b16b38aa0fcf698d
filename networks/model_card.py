"""The model card of an exported model: what it is, how it was trained, how to sample, and what it cannot do."""

import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

TEMPLATE = """\
---
library_name: lift
pipeline_tag: unconditional-image-generation
tags:
- diffusion
- ddim
- lift
- pytorch_model_hub_mixin
- model_hub_mixin
---

# {class_name}, {fine}×{fine}

{introduction}

## Training

{training}

## Sampling

{sampling}

## Limitations

- It was trained on images of {fine}×{fine} pixels; other sizes are untested.
{classes}
- It repeats what its training images show, with their gaps and biases, and may come close to a single one of them.
- This card holds no score: `eval_fid_batch.py` of LIFT measures FID and sliced Wasserstein distance.
{limitation}"""

INTRODUCTION = (
    "LIFT (Learned Independent Frequency Timesteps) denoises an image and its half-size version together, each with "
    "its own timestep, and samples along a path through the plane of the two timesteps. This is {description}. It has "
    "{num_parameters:,} parameters (`hidden_dims` {hidden_dims}) and predicts {prediction} on the noise schedule "
    "`{beta_schedule}` with {num_train_timesteps} timesteps."
)
RESIDUAL_SCALES = (
    " Its fine scale is what the coarse one leaves: the image less its upsampled 2×2 mean, of which every 2×2 block "
    "sums to zero."
)
STANDALONE = """\
With PyTorch alone, in this folder:

    python sample.py

It writes eight images into `samples/`, along the {nfe} network calls of `schedule.json`; `--seeds` and `--schedule`
choose others. Schedules are those that LIFT plans for this model (`schedule_*.json`, `samples/*/schedule.json`).
{paths}To call the network from a program of your own, which needs no code of LIFT either:

```python
import torch

network = torch.export.load("model.pt2").module()  # Written by PyTorch {version}.
{example}
```

`sample.py` shows what to make of the predictions.

"""
IN_LIFT = """\
In the code of LIFT, `{class_name}.from_pretrained("this folder, or its id on the hub")` gives the model back as a
module."""
COARSE_FEED = (
    "The model reads the coarse image and does not predict it: that is the 2×2 mean of the clean image that was\n"
    "predicted last, noised again to its own timestep.\n"
)
ONE_CLOCK = "The diagonal, in any number of steps, is the only kind of path that this model can follow.\n"
EXAMPLES = {
    1: "[prediction] = network([x], [t])  # x: float32 [B, {channels}, {fine}, {fine}]; t: int64 [B].",
    2: "{predictions} = network([x_{fine}, x_{coarse}], [t_{fine}, t_{coarse}])"
    "  # x_{fine}: float32 [B, {channels}, {fine}, {fine}]; t_{fine}: int64 [B].",
}
UNCONDITIONAL = "- It is unconditional: what an image shows follows from its seed and cannot be asked for."
PROGRAM_OF_NO_CLASS = (
    "- It was told of {count} classes in training ({names}), which the code of LIFT asks it for with `--class`; "
    "`model.pt2` and `sample.py` are of the null class, and know none of them."
)
CLASSES = "- It was told of {count} classes in training ({names}), which the code of LIFT asks it for with `--class`."
SHOWN_CLASSES = 10
APPROXIMATE_INPUT = (
    "- In training the coarse image was that of a real one, with noise of its own; in sampling it is made from the "
    "fine one and tells nothing more.\n"
)
GIVEN_INPUT = (
    "- It makes no image from noise alone: it enlarges images of {coarse}, clean or with noise of a timestep that it\n"
    "  is told.\n"
)
PREDICTIONS = {"epsilon": "the noise", "x0": "the clean image", "v": "v (arXiv 2202.00512)"}


def _training_section(config: dict[str, Any]) -> str:
    """A table of what the config says about training; a setting that it does not hold has no row."""
    rows = [
        ("images", "`{dataset}`, {made} {resolution}×{resolution}", ("dataset", "resolution")),
        ("number of images", "the first {limit}", ("limit",)),
        ("held out", "{holdout} of them, evenly over the set", ("holdout",)),
        ("mirrored at random", "{flip}", ("flip",)),
        ("epochs", "{epoch} of {epochs}, {step} steps", ("epoch", "epochs", "step")),
        ("batch size", "{batch_size}", ("batch_size",)),
        ("optimizer", "AdamW, learning rate {lr:g} ({lr_schedule}), weight decay {weight_decay:g}",
         ("lr", "lr_schedule", "weight_decay")),
        ("gradient clip", "norm {grad_clip:g}", ("grad_clip",)),
        ("pairs of timesteps", "{t_pairs}", ("t_pairs",)),
        ("weights of the losses, fine and coarse", "{weighed}", ("loss_weights",)),
        ("perceptual loss, weight", "{perceptual_weight:g}", ("perceptual_weight",)),
        ("feature matching, weight", "{feature_weight:g}", ("feature_weight",)),
        ("objective", "{objective}", ("objective",)),
        ("weight of the bound, bits per dimension", "{vlb_weight:g}", ("vlb_weight",)),
        ("images whose class was not told", "{label_dropout:.0%}", ("label_dropout",)),
        ("min-SNR weights of the timesteps", "gamma {min_snr_gamma:g}", ("min_snr_gamma",)),
        ("weights of the timesteps", "{timestep_weights}", ("timestep_weights",)),
        ("timesteps", "{t_law}, {times} numbers", ("t_law", "times")),
        ("EMA", "{ema}", ("ema_decay",)),
        ("precision", "{precision}", ("precision",)),
        ("seed", "{seed}", ("seed",)),
        ("weights in this folder", "{weights}", ("weights",)),
        ("fingerprint of the weights", "`{weights_fingerprint}`", ("weights_fingerprint",)),
        ("fingerprint of the images", "`{data_fingerprint}`", ("data_fingerprint",)),
    ]  # fmt: skip
    said = config | {
        "made": _made(config),
        "ema": _ema(config),
        "weighed": ", ".join(f"{weight:g}" for weight in config.get("loss_weights") or ()),
        "flip": "yes" if config.get("flip") else "no",
        "weights": {"raw": "raw", "ema": "EMA"}.get(config.get("weights")),
        "step": f"{config.get('step', 0):,}",
    }
    one_loss = len(config.get("loss_weights") or ()) == 1
    lines = [
        f"| {label} | {text.format(**said)} |"
        for label, text, keys in rows
        if all(config.get(key) is not None for key in keys)
        and not (keys == ("loss_weights",) and one_loss)
        and not (keys[0] in ("perceptual_weight", "feature_weight") and not config[keys[0]])
    ]
    if not lines:
        return "How these weights were trained is not recorded."
    return "\n".join(["| | |", "|---|---|", *lines])


def _made(config: dict[str, Any]) -> str:
    if config.get("dataset") == "synthetic":
        return "drawn by LIFT at"
    return f"padded with {config['pad']} to" if config.get("pad") else "resized and cropped at the centre to"


def _ema(config: dict[str, Any]) -> str:
    if not config.get("ema_decay"):
        return "none"
    ratio = config.get("ema_rampup_ratio")
    return f"decay {config['ema_decay']:g} per step" + (f", half-life at most {ratio:g} of the steps" if ratio else "")


def model_card(config: dict[str, Any], model: nn.Module, standalone: bool = True, nfe: int = 18) -> str:
    """The card, Markdown with a YAML head, of a model and its config: `class_name`, `networks.pretrained.MODEL_KEYS`.

    standalone: whether the files of `networks.program` lie beside it; nfe: the calls of their schedule.
    """
    class_name, fine = config["class_name"], config["resolution"]
    approximate = APPROXIMATE_INPUT if model.num_predictions < model.num_scales else ""
    sizes = {"fine": f"{fine}×{fine}", "coarse": f"{fine // 2}×{fine // 2}"}
    is_residual = config.get("representation") == "residual"
    said = config | {
        "description": model.description.format(network=model.network.title, **sizes),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "hidden_dims": ", ".join(map(str, config["hidden_dims"])),
        "prediction": PREDICTIONS[config["prediction_type"]],
    }
    return TEMPLATE.format(
        class_name=class_name,
        fine=fine,
        introduction=textwrap.fill(INTRODUCTION.format(**said) + RESIDUAL_SCALES * is_residual, 120),
        training=_training_section(config),
        sampling=_sampling_section(config, model, standalone, nfe),
        classes=_classes(config.get("class_names") or (), standalone),
        limitation=GIVEN_INPUT.format(**sizes) if model.coarse_given else approximate,
    )


def _classes(names: Sequence[str], standalone: bool) -> str:
    if not names:
        return UNCONDITIONAL
    # An item of a list is one line, and a name may have several.
    shown = [" ".join(name.splitlines()) for name in names[:SHOWN_CLASSES]] + ["…"] * (len(names) > SHOWN_CLASSES)
    text = PROGRAM_OF_NO_CLASS if standalone else CLASSES
    return text.format(count=len(names), names=", ".join(shown))


def _sampling_section(config: dict[str, Any], model: nn.Module, standalone: bool, nfe: int) -> str:
    class_name, fine = config["class_name"], config["resolution"]
    fine_alone = model.num_predictions < model.num_scales
    sizes = {"channels": config["channels"], "fine": fine, "coarse": fine // 2}
    predictions = "[prediction]" if fine_alone else "fine, coarse"
    example = EXAMPLES[model.num_scales].format(predictions=predictions, **sizes)
    paths = ONE_CLOCK if model.one_clock else COARSE_FEED * fine_alone
    alone = STANDALONE.format(nfe=nfe, version=torch.__version__, example=example, paths=paths)
    return alone * standalone + IN_LIFT.format(class_name=class_name)
