"""Error maps as files: whole ones, and the parts of unfinished ones beside them."""

import glob
import os
from pathlib import Path
from typing import Any

import torch

from checkpoint import weights_fingerprint
from runtime.errors import need_file
from runtime.safe_write import replacing, short_name

HEATMAP_FORMAT_VERSION = 2  # 2 has denoising errors per image, and says what was measured.


def save_heatmap(file: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a heatmap file atomically: the maps of `error_map` with whatever the stage adds, plain types only."""
    # Of a stream of Python it is known why it could not be written to.
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        torch.save({"format_version": HEATMAP_FORMAT_VERSION} | content, stream)


def load_heatmap(file: str | os.PathLike) -> dict[str, Any]:
    """Read a heatmap file.

    Raises FileNotFoundError if it is missing, ValueError if it is damaged, no heatmap, or of a later version.
    """
    file = need_file(file, "Heatmap", "make it with compute_heatmap_30.py")
    wrong = f"{file} is not a heatmap; make one with compute_heatmap_30.py."
    content = read_measured(file, f"Heatmap {file}", "t_grid", wrong, "compute it again", HEATMAP_FORMAT_VERSION)
    if content["format_version"] < HEATMAP_FORMAT_VERSION:
        raise ValueError(
            f"Heatmap {file} has format version {content['format_version']}, which holds too little; compute it again "
            "(compute_heatmap_30.py --force)."
        )
    return content


def read_measured(file: Path, name: str, key: str, wrong: str, way_out: str, version: int) -> dict[str, Any]:
    """What a file says that was measured of a network: tensors and plain types, `key` and a fingerprint among them.

    Raises ValueError for a damaged file, with the way out; with the sentence `wrong` for another kind of file; and for
    one of a later version than `version`. name: of the file in sentences.
    """
    try:
        content = torch.load(file, weights_only=True)
    except Exception as error:  # A damaged zip or pickle raises whatever the damage happens to hit.
        raise ValueError(f"{name} is damaged ({type(error).__name__}); {way_out}.") from error
    if not isinstance(content, dict) or not {"format_version", key, "fingerprint"} <= content.keys():
        raise ValueError(wrong)
    if content["format_version"] > version:
        raise ValueError(f"{name} has format version {content['format_version']}; update LIFT to read it.")
    return content


def map_fingerprint(content: dict[str, Any]) -> str:
    """16 hex digits of what was measured: the same maps of the same images, whatever else the file says."""
    blocks = {f"jacobian {name}": values for name, values in content.get("jacobian", {}).items()}
    errors = {name: content[name] for name in ("t_grid", "mse_64", "mse_32") if name in content}
    return weights_fingerprint(blocks | errors)


class PartFiles:
    """Unfinished work of an error map, kept beside the file it will become: `{file}.part{rank}` per process.

    settings: JSON types; whatever the values depend on. Parts of other settings, and damaged ones, count as none.
    """

    def __init__(self, file: str | os.PathLike, settings: dict[str, Any]):
        self._file = Path(file)
        self._settings = settings | {"format_version": HEATMAP_FORMAT_VERSION}

    def _names(self) -> list[Path]:
        return sorted(self._file.parent.glob(f"{glob.escape(self._name('').name)}[0-9]*"))

    def _name(self, rank: int | str) -> Path:
        return self._file.with_name(f"{short_name(self._file.name, 240)}.part{rank}")

    def read(self) -> list[dict[str, torch.Tensor]]:
        """What earlier processes finished: `done` bool `[M·B]` and the values there, one dict each."""
        found = []
        for name in self._names():
            try:
                part = torch.load(name, weights_only=True)
                if part.pop("settings") == self._settings:
                    found.append(part)
            except Exception:  # A damaged zip or pickle raises whatever the damage happens to hit.
                continue
        return found

    def write(self, rank: int, part: dict[str, torch.Tensor]) -> None:
        """Replace the part of one process."""
        with replacing(self._name(rank)) as temporary, open(temporary, "wb") as stream:
            torch.save(part | {"settings": self._settings}, stream)

    def remove(self) -> None:
        """Delete all parts, once the map itself is safe."""
        for name in self._names():
            name.unlink(missing_ok=True)
