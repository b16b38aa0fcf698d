"""Export the model of a checkpoint as a folder that `from_pretrained` and the hub read.

    python export.py checkpoints/lift_dual_timestep_400ep.pth --ema exports/lift_400ep_ema
    python export.py checkpoints/baseline_400ep.pth exports/baseline_400ep --force
    python export.py --run NAME --ema exports/name
    hf upload NAME/lift exports/lift_400ep_ema

Writes model.safetensors, config.json (everything needed to sample, and how the model was trained) and README.md (the
model card). `LIFTDualTimestepModel.from_pretrained("exports/lift_400ep_ema")` gives the model back.
"""

import runtime.startup  # noqa: F401

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings
from images.sources import is_hub_id
from networks.model_card import model_card
from networks.pretrained import CONFIG_FILE, MODEL_KEYS, OPTIONAL_MODEL_KEYS, read_config, write_pretrained
from runtime.settings import REQUIRED, option, parse_settings

# Other entries of a checkpoint's config may hold places on the machine that trained.
TRAINING_KEYS = (
    "limit", "holdout", "resize_filter", "background", "skip_bad_images", "flip", "data_fingerprint", "epochs",
    "batch_size", "lr", "lr_schedule", "weight_decay", "grad_clip", "ema_decay", "ema_rampup_ratio", "t_pairs",
    "loss_weights", "min_snr_gamma", "seed", "precision", "epoch", "step", "weights",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportSettings(CheckpointSettings):
    """What is exported, and where to."""

    checkpoint: str | None = option(
        None, "a checkpoint that training wrote", flag="checkpoint", metavar="CHECKPOINT", nargs="?"
    )
    output: str = option(REQUIRED, "folder", flag="output", metavar="OUT")
    force: bool = option(False, "replace the export that OUT holds")

    def check(self) -> None:
        if self.checkpoint is None and self.run is None:
            raise ValueError("CHECKPOINT OUT, or --run NAME OUT, is required")
        super().check()


def parse_args() -> ExportSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(ExportSettings, __doc__)


def public_dataset_name(dataset: str) -> str:
    """A hub id or "synthetic" as it is, a folder without its place."""
    if is_hub_id(dataset) and not Path(dataset).is_dir():
        return dataset
    return Path(dataset).resolve().name


def export_config(loaded: LoadedModel, checkpoint: str) -> dict[str, Any]:
    """What `config.json` says of a loaded checkpoint; raises ValueError if that lacks what sampling needs."""
    config = loaded.config
    missing = [key for key in MODEL_KEYS if key not in config]
    if missing:
        raise ValueError(f"Checkpoint {checkpoint} does not say its {', '.join(missing)}; train again to export.")
    dataset = {"dataset": public_dataset_name(config["dataset"])} if "dataset" in config else {}
    return (
        {"class_name": type(loaded.model).__name__}
        | {key: config[key] for key in MODEL_KEYS}
        | {key: config[key] for key in OPTIONAL_MODEL_KEYS if config.get(key, "overcomplete") != "overcomplete"}
        | dataset
        | {key: config[key] for key in TRAINING_KEYS if key in config}
        | {"weights_fingerprint": loaded.fingerprint}
    )


def check_output(folder: Path, force: bool) -> None:
    """Raise ValueError if `folder` holds files, unless they are an export that `force` allows to replace."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; pass a folder as OUT.")
    # Hidden files are those of git, of the hub's client, or of an export that was killed.
    if not folder.exists() or all(entry.name.startswith(".") for entry in folder.iterdir()):
        return
    if not force:
        raise ValueError(f"{folder} holds files already; pass --force to replace an export, or another OUT.")
    try:
        read_config(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds files but no {CONFIG_FILE} of an export, so --force does not replace them; pass another "
            "OUT."
        ) from error


def main() -> None:
    """Export."""
    settings = parse_args()
    folder = Path(settings.output)
    check_output(folder, settings.force)
    loaded = load_model(settings.checkpoint, settings.ema)
    config = export_config(loaded, settings.checkpoint)
    num_parameters = sum(p.numel() for p in loaded.model.parameters())
    write_pretrained(folder, loaded.model, config, model_card(config, num_parameters))
    print(
        f"{config['class_name']} with {num_parameters:,} parameters, {loaded.weights} weights of epoch "
        f"{config['epoch']}, in {folder}: model.safetensors, config.json, README.md"
    )


if __name__ == "__main__":
    cli.run_stage(main)
