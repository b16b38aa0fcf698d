"""Models as folders: `model.safetensors`, `config.json` and a model card, here or on the hub.

`config.json` names the class of the model, the arguments that rebuild it and the sha256 of its weights, so that a
folder of another model, or one whose files do not belong together, is refused instead of loaded. `export.py` adds
the schedule and the training; `huggingface_hub` uploads and downloads.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from networks.model_card import model_card
from runtime.safe_write import replacing

try:
    from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    HUB_PROBLEM = None
except ImportError as error:  # Training needs neither library, and some machines that train have neither.
    PyTorchModelHubMixin, HUB_PROBLEM = object, str(error)

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
# What rebuilds the model and its schedule; everything else in a config is about one set of weights.
MODEL_KEYS = (
    "model_type", "hidden_dims", "channels", "resolution", "num_train_timesteps", "beta_schedule", "prediction_type",
)  # fmt: skip
# Likewise, where it is not the usual one.
OPTIONAL_MODEL_KEYS = ("representation", "network", "class_names", "learned_variance")
REQUIRED_KEYS = ("class_name", "hidden_dims", "channels", "weights_sha256")


def model_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that rebuild the model of a config; what it does not say is as it was before there was a choice."""
    options = {"hidden_dims": tuple(config["hidden_dims"]), "channels": config["channels"]}
    options |= {key: config[key] for key in ("representation", "network", "learned_variance") if config.get(key)}
    num_classes = len(config.get("class_names") or ()) or config.get("num_classes")
    return options | ({"num_classes": num_classes} if num_classes else {})


def _require_hub() -> None:
    if HUB_PROBLEM is not None:
        raise RuntimeError(
            f"Folders of models need huggingface_hub and safetensors, and one is missing ({HUB_PROBLEM}); run "
            "pip install huggingface_hub safetensors."
        )


def write_pretrained(
    folder: str | os.PathLike,
    model: nn.Module,
    config: dict[str, Any],
    card: str | None = None,
    further: Mapping[str, bytes] | None = None,  # files by name that belong to them
) -> dict[str, Any]:
    """Write the weights of a model, `config`, a card and further files into a folder: all of them, or on failure none.

    config: JSON types; `class_name` and `weights_sha256` are added. If it holds the checksum of other weights, what it
    says beyond MODEL_KEYS is about those and is left out. card: None leaves the folder without one, or with the one it
    has. Returns the config as written. Raises OSError if the folder cannot be written, RuntimeError without the
    libraries.
    """
    _require_hub()
    # The library's own writer makes a file that no other user may read.
    weights = save({name: value.contiguous() for name, value in model.state_dict().items()})
    checksum = hashlib.sha256(weights).hexdigest()
    if config.get("weights_sha256", checksum) != checksum:
        config = {key: config[key] for key in MODEL_KEYS + OPTIONAL_MODEL_KEYS if key in config}
    config = config | {"class_name": type(model).__name__, "weights_sha256": checksum}
    contents = {CONFIG_FILE: f"{json.dumps(config, indent=2)}\n".encode()} | (further or {})
    if card is not None:
        contents[CARD_FILE] = card.encode()
    contents[WEIGHTS_FILE] = weights
    with ExitStack() as stack:
        # Renamed in reverse order when all are written: a new folder without its config.json is none yet.
        for name, content in contents.items():
            stack.enter_context(replacing(Path(folder) / name)).write_bytes(content)
    return config


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config of a folder; raises FileNotFoundError or ValueError if it is not that of a LIFT model."""
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} lacks {CONFIG_FILE}; pass a folder that export.py wrote.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); export the model again.") from error
    missing = [key for key in REQUIRED_KEYS if not isinstance(config, dict) or key not in config]
    if missing:
        raise ValueError(f"{file} is not that of a LIFT model: it lacks {', '.join(missing)}.")
    return config


def _find_folder(name: str | os.PathLike, **download: Any) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **download))
    except Exception as error:  # The library raises a dozen types of its own and its dependencies' for one cause.
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"'{name}' is not a folder, and the hub gave no model of that name ({type(error).__name__}: {reason}); "
            "check the name and the network."
        ) from error


class PretrainedMixin(PyTorchModelHubMixin):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a model built from `hidden_dims` and `channels`.

    All three raise RuntimeError on a machine without huggingface_hub or safetensors.
    """

    _hub_mixin_config: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """What `config.json` said, for a model from `from_pretrained`; else the arguments it was built with."""
        return dict(self._hub_mixin_config or {})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,  # a folder, or an id on the hub
        *,
        map_location: str = "cpu",
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ):
        """The model of a folder, in eval mode on `map_location`, with every weight checked.

        Raises FileNotFoundError if there is no such folder or model on the hub, or if a file is missing, and
        ValueError if the model is of another class, damaged, or does not fit its config.
        """
        _require_hub()
        folder = _find_folder(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        config = read_config(folder)
        if config["class_name"] != cls.__name__:
            raise ValueError(
                f"{folder} holds a {config['class_name']}, not a {cls.__name__}; load it with "
                f"{config['class_name']}.from_pretrained."
            )
        file = folder / WEIGHTS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {WEIGHTS_FILE}; export the model again.")
        weights = file.read_bytes()
        if hashlib.sha256(weights).hexdigest() != config["weights_sha256"]:
            raise ValueError(f"{file} is damaged or not the weights of its {CONFIG_FILE}; export the model again.")
        try:
            model = cls(**model_options(config))
            model.load_state_dict(load(weights))
        except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{file} does not fit the model that its {CONFIG_FILE} describes.") from error
        model._hub_mixin_config = config
        return model.to(map_location).eval()

    def save_pretrained(self, save_directory: str | os.PathLike, *, config: dict[str, Any] | None = None, **kwargs):
        """Write the model and its config into a folder, and a card if it has none.

        config: is added to what `self.config` says. Takes what `PyTorchModelHubMixin.save_pretrained` takes.
        """
        _require_hub()
        self._hub_mixin_config = self.config | (config or {})
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        self._hub_mixin_config = write_pretrained(save_directory, self, self.config)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """Upload the model, its config and its card, as `PyTorchModelHubMixin.push_to_hub` does."""
        _require_hub()
        return super().push_to_hub(*args, **kwargs)

    def generate_model_card(self, *args: Any, **kwargs: Any):
        """The card that `export.py` writes; for a model that was not exported, the one of huggingface_hub."""
        if not all(key in self.config for key in MODEL_KEYS):
            return super().generate_model_card(*args, **kwargs)
        return ModelCard(model_card(self.config, self, standalone=False))
