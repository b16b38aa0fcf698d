"""The model card of an exported model: what it is, how it was trained, how to sample, and what it cannot do."""

import textwrap
from typing import Any

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

With the code of LIFT and its requirements at hand, in this folder, by `PYTHONPATH=path/to/LIFT python`:

```python
from data import to_uint8
from runtime.device import select_device
from {module} import {class_name}
from paths.families import diagonal{shift}
from figures.images import save_image_grid
from diffusion.sampler import image_seeds, sample_seeds, scale_shapes
from scheduler import DDIMScheduler

device = select_device(None)  # The first GPU if there is one.
model = {class_name}.from_pretrained(".").to(device)  # This folder; or the id of the model on the hub.
config = model.config
scheduler = DDIMScheduler(config["num_train_timesteps"], config["beta_schedule"], config["prediction_type"]{process})
path = diagonal(18, num_scales=model.num_scales, num_train_timesteps=config["num_train_timesteps"])  # 18 network calls.
{tie}shapes = scale_shapes(model.num_scales, config["channels"], config["resolution"])
seeds = image_seeds(42, 8)  # An image depends on its seed alone.
[(_, samples)] = sample_seeds(model.denoise, scheduler, path, seeds, shapes, len(seeds), device{feed})
save_image_grid(to_uint8(samples.images[0]).cpu(), "samples.png", columns=4)
```

{paths}

## Limitations

- It was trained on images of {fine}×{fine} pixels; other sizes are untested.
- It is unconditional: what an image shows follows from its seed and cannot be asked for.
- It repeats what its training images show, with their gaps and biases, and may come close to a single one of them.
- This card holds no score: `eval_fid_batch.py` of LIFT measures FID and sliced Wasserstein distance.
{limitation}"""

DESCRIPTIONS = {
    "BaselineModel": "the single-scale reference that LIFT is compared with: a UNet that denoises images of "
    "{fine}×{fine} at one timestep",
    "LIFTDualTimestepModel": "the LIFT model: one UNet that denoises images of {fine}×{fine} and "
    "{coarse}×{coarse} together, each with its own timestep",
    "LIFTBaselineModel": "an ablation: one UNet that denoises images of {fine}×{fine} and {coarse}×{coarse} together "
    "at one shared timestep",
    "SingleTimestepModel": "an ablation: a UNet that sees images of {fine}×{fine} and {coarse}×{coarse}, denoises the "
    "fine one and knows the timestep of that one alone",
    "NoTimestepModel": "an ablation: a UNet that sees images of {fine}×{fine} and {coarse}×{coarse}, denoises the "
    "fine one and knows no timestep",
}
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
IMAGE_DIAGONAL = (
    "path = log_snr_shift(path, scheduler.representation.image_lead, scheduler.log_snr.numpy())  "
    "# Noise as on the image.\n"
)
TWO_CLOCKS = (
    "On the diagonal both scales have the same timestep. `compute_heatmap_30.py` finds other paths, from the "
    "checkpoint that this model was exported from; `load_schedule` of `paths/schedule_file.py` reads those of a "
    "`schedule.json`."
)
COARSE_FEED = (
    'The model reads the coarse image and does not predict it. With `coarse_from="x0"` that is the 2×2 mean of the '
    "clean image that was predicted last, noised again to its own timestep; with "
    '`coarse_from="noisy"` it is the 2×2 mean of the noisy fine image.'
)
ONE_CLOCK = "The diagonal, in any number of steps, is the only kind of path that this model can follow."
APPROXIMATE_INPUT = (
    "- In training the coarse image was that of a real one, with noise of its own; in sampling it is made from the "
    "fine one and tells nothing more.\n"
)
PREDICTIONS = {"epsilon": "the noise", "x0": "the clean image", "v": "the velocity v"}


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
        ("min-SNR weights of the timesteps", "gamma {min_snr_gamma:g}", ("min_snr_gamma",)),
        ("EMA", "{ema}", ("ema_decay",)),
        ("precision", "{precision}", ("precision",)),
        ("seed", "{seed}", ("seed",)),
        ("weights in this folder", "{weights}", ("weights",)),
        ("fingerprint of the weights", "`{weights_fingerprint}`", ("weights_fingerprint",)),
        ("fingerprint of the images", "`{data_fingerprint}`", ("data_fingerprint",)),
    ]  # fmt: skip
    said = config | {
        "made": "drawn by LIFT at" if config.get("dataset") == "synthetic" else "resized and cropped at the centre to",
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
        if all(config.get(key) is not None for key in keys) and not (keys == ("loss_weights",) and one_loss)
    ]
    if not lines:
        return "How these weights were trained is not recorded."
    return "\n".join(["| | |", "|---|---|", *lines])


def _ema(config: dict[str, Any]) -> str:
    if not config.get("ema_decay"):
        return "none"
    ratio = config.get("ema_rampup_ratio")
    return f"decay {config['ema_decay']:g} per step" + (f", half-life at most {ratio:g} of the steps" if ratio else "")


def model_card(config: dict[str, Any], num_parameters: int) -> str:
    """The card, Markdown with a YAML head, of a model by its config: `class_name`, `networks.pretrained.MODEL_KEYS`."""
    class_name, fine = config["class_name"], config["resolution"]
    reads_more_than_it_predicts = class_name in ("SingleTimestepModel", "NoTimestepModel")
    is_residual = config.get("representation") == "residual"
    tied = is_residual and class_name == "LIFTDualTimestepModel"
    paths = ONE_CLOCK if class_name in ("BaselineModel", "LIFTBaselineModel") else TWO_CLOCKS
    said = config | {
        "description": DESCRIPTIONS[class_name].format(fine=fine, coarse=fine // 2),
        "num_parameters": num_parameters,
        "hidden_dims": ", ".join(map(str, config["hidden_dims"])),
        "prediction": PREDICTIONS[config["prediction_type"]],
    }
    return TEMPLATE.format(
        class_name=class_name,
        fine=fine,
        introduction=textwrap.fill(INTRODUCTION.format(**said) + RESIDUAL_SCALES * is_residual, 120),
        training=_training_section(config),
        module="baseline_model" if class_name == "BaselineModel" else "model",
        process=', representation="residual"' if is_residual else "",
        tie=IMAGE_DIAGONAL if tied else "",
        shift=", log_snr_shift" if tied else "",
        feed=', coarse_from="x0"' if reads_more_than_it_predicts else "",
        paths=textwrap.fill(f"{COARSE_FEED} {paths}" if reads_more_than_it_predicts else paths, 120),
        limitation=APPROXIMATE_INPUT if reads_more_than_it_predicts else "",
    )
