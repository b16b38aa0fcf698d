"""Export the model of a checkpoint as a folder that `from_pretrained` and the hub read.

    python export.py checkpoints/lift_dual_timestep_400ep.pth --ema exports/lift_400ep_ema
    python export.py checkpoints/baseline_400ep.pth exports/baseline_400ep --force
    python export.py --run NAME --ema exports/name
    python export.py --run NAME --ema --schedule results/NAME/plan_14ep_ema/schedule_optimal_10.json exports/name
    hf upload NAME/lift exports/lift_400ep_ema

Writes model.safetensors, config.json (everything needed to sample, and how the model was trained) and README.md (the
model card). `LIFTDualTimestepModel.from_pretrained("exports/lift_400ep_ema")` gives the model back.

And for machines that have PyTorch and nothing else: model.pt2, the network as a program of torch.export, schedule.json,
the path that flags choose, noise.pt, the noise of eight seeds, and sample.py, which samples with these; but not of a
stage of a cascade, which enlarges images that are given.
"""

import runtime.startup  # noqa: F401

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli
from checkpoint import COARSE_IMAGES, LoadedModel, load_model
from cli import CheckpointSettings
from diffusion.sampler import SeededNoise, image_seeds, scale_shapes
from images.sources import is_hub_id
from networks.model_card import PREDICTIONS, model_card
from networks.pretrained import CONFIG_FILE, MODEL_KEYS, OPTIONAL_MODEL_KEYS, read_config, write_pretrained
from networks.program import (
    NOISE_FILE,
    PROGRAM_FILE,
    SCHEDULE_FILE,
    SCRIPT_FILE,
    noise_bytes,
    program_bytes,
    script_bytes,
)
from paths.path import Path as SamplingPath
from paths.schedule_file import save_schedule
from planning.choice import OnePathSettings, path_of_settings, path_type
from planning.replay import made_for
from runtime.settings import REQUIRED, option, parse_settings

STORED_SEED, STORED_IMAGES = 42, 8  # Whose noise goes with an export.
USUAL_VALUES = (None, False, "overcomplete", "unet")  # Which a config need not say.
# Other entries of a checkpoint's config may hold places on the machine that trained.
TRAINING_KEYS = (
    "limit", "holdout", "resize_filter", "background", "pad", "skip_bad_images", "flip", "data_fingerprint", "epochs",
    "batch_size", "lr", "lr_schedule", "weight_decay", "grad_clip", "ema_decay", "ema_rampup_ratio", "t_pairs",
    "loss_weights", "perceptual_weight", "feature_weight", "min_snr_gamma", "timestep_weights", "t_law", "times",
    "objective", "vlb_weight", "label_dropout", "seed", "precision", "epoch", "step", "weights",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportSettings(CheckpointSettings, OnePathSettings):
    """What is exported, with which path, and where to."""

    checkpoint: str | None = option(
        None, "a checkpoint that training wrote", flag="checkpoint", metavar="CHECKPOINT", nargs="?"
    )
    output: str = option(REQUIRED, "folder", flag="output", metavar="OUT")
    force: bool = option(False, "replace the export that OUT holds")
    path_type: str | None = option(
        None,
        "path of sample.py, a type of generate_with_path_30.py (image_diagonal of a residual pair, else diagonal)",
        parse=path_type,
        metavar="TYPE",
    )

    def check(self) -> None:
        if self.checkpoint is None and self.run is None:
            raise ValueError("CHECKPOINT OUT, or --run NAME OUT, is required")
        super().check()


def parse_args() -> ExportSettings:
    """The settings of this stage, from its flags."""
    # Coarse images that are not predicted come from the clean fine one in sample.py.
    return parse_settings(ExportSettings, __doc__, leave_out=("coarse_from",))


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
        {name: getattr(loaded.model, name) for name in ("num_scales", "num_predictions")}
        | {"class_name": type(loaded.model).__name__}
        | {key: config[key] for key in MODEL_KEYS}
        | {key: config[key] for key in OPTIONAL_MODEL_KEYS if config.get(key) not in USUAL_VALUES}
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


def standalone_files(settings: ExportSettings, loaded: LoadedModel) -> tuple[SamplingPath, dict[str, bytes]]:
    """The path that the exported script follows, and its files by name."""
    config, model = loaded.config, loaded.model
    if settings.path_type is None:
        tied = loaded.model.has_two_clocks() and loaded.scheduler.representation.image_lead > 0
        settings = settings.but(path_type="image_diagonal" if tied else "diagonal")
    path, _ = path_of_settings(settings, loaded)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / SCHEDULE_FILE
        save_schedule(
            path,
            file,
            loaded.scheduler.log_snr.numpy(),
            solver={"name": "ddim", "eta": 0.0, "end": "clean"},
            criterion=path.provenance.get("criterion"),
            cost=path.provenance.get("cost"),
            beta_schedule=config["beta_schedule"],
            **made_for(path, loaded),
        )
        schedule = file.read_bytes()
    shapes = scale_shapes(model.num_scales, config["channels"], config["resolution"])
    # A coarse image that is not predicted is noised again at every point but the last.
    shapes += shapes[1:] * (path.nfe - 1 if model.num_predictions < model.num_scales else 0)
    seeds = image_seeds(STORED_SEED, STORED_IMAGES)
    noise = SeededNoise(seeds)
    return path, {
        PROGRAM_FILE: program_bytes(model, config["channels"], config["resolution"]),
        SCHEDULE_FILE: schedule,
        NOISE_FILE: noise_bytes(seeds, [noise.draw(shape) for shape in shapes], path.points),
        SCRIPT_FILE: script_bytes(),
    }


def main() -> None:
    """Export."""
    settings = parse_args()
    folder = Path(settings.output)
    check_output(folder, settings.force)
    loaded = load_model(settings.checkpoint, settings.ema, given=(COARSE_IMAGES,))
    loaded.require_pixels("export.py")
    loaded.require_means("export.py")
    process, prediction = loaded.scheduler.process, loaded.scheduler.prediction_type
    if process != "vp" or prediction not in PREDICTIONS:
        raise ValueError(
            f"{settings.checkpoint} is of the process '{process}' and predicts {prediction}, and sample.py knows vp "
            f"with {', '.join(PREDICTIONS)} alone; export another model."
        )
    config = export_config(loaded, settings.checkpoint)
    num_parameters = sum(p.numel() for p in loaded.model.parameters())
    files, alone, card = {}, "", {"standalone": False}
    if not loaded.model.coarse_given:  # A script of PyTorch alone has no image that could be given.
        path, files = standalone_files(settings, loaded)
        alone = f", and for PyTorch alone {', '.join(files)}; path {path.kind} {path.fingerprint()}"
        card = {"nfe": path.nfe}
    write_pretrained(folder, loaded.model, config, model_card(config, loaded.model, **card), files)
    print(
        f"{config['class_name']} with {num_parameters:,} parameters, {loaded.weights} weights of epoch "
        f"{config['epoch']}, in {folder}: model.safetensors, config.json, README.md{alone}"
    )


if __name__ == "__main__":
    cli.run_stage(main)
