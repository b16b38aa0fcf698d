"""What a training run writes down: settings, rows of numbers, TensorBoard and, where asked for, Weights & Biases.

`metrics.jsonl` holds what follows from seed and step, so that a resumed run writes the same bytes as one that never
stopped; what the clock says is in `speed.jsonl` with the same steps.
"""

import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from runtime.errors import naming
from runtime.safe_write import replacing
from training.objective import MEASURE_NAMES

METRICS_FILE = "metrics.jsonl"
SPEED_FILE = "speed.jsonl"
SETTINGS_FILE = "settings.json"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` file, without a last one that is being written or that a crash cut short.

    Raises ValueError for a file of anything else.
    """
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if not all("step" in row for row in rows):
            raise ValueError("a row lacks its step")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); bring it back, or name another log folder.") from error
    return rows


class JsonLines:
    """A file of one JSON object per line that a full disk delays but never damages.

    Rows of steps after `first_step` are dropped when it is opened: the run will write them again. `pending` are rows
    that could not be written so far, as text.
    """

    def __init__(self, file: Path, first_step: int, pending: str = ""):
        self.file = file
        rows = read_metrics(file) if file.exists() else []
        with replacing(file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= first_step))
        self.pending = pending

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; it stays in memory until it can be written."""
        self.pending += json.dumps(row) + "\n"
        try:
            self.write(sync=False)
        except OSError:
            pass  # The next row or the next checkpoint tries again.

    def write(self, sync: bool = True) -> None:
        """Write every row, to the disk itself if `sync`; raises OSError, leaving the file as it was, if that fails."""
        with open(self.file, "ab", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            rest = memoryview(self.pending.encode())
            try:
                while rest:
                    rest = rest[stream.write(rest) :]
                if sync:
                    os.fsync(stream.fileno())
            except OSError as error:
                stream.truncate(end)
                raise OSError(
                    f"{self.file} could not be written: it needs {len(self.pending):,} bytes more ({error.strerror})"
                ) from error
        self.pending = ""


def _import_wandb():
    try:
        import wandb
        from wandb import init  # noqa: F401  A folder called wandb, as its runs leave, can be imported too.
    except ImportError as error:
        raise ValueError("--wandb needs the wandb package; pip install wandb, or leave --wandb out.") from error
    return wandb


class RunLog:
    """The log folder of one run, from `first_step` on.

    settings: of the run, written to `settings.json` and shown in Weights & Biases, which mirrors the TensorBoard if
    `with_wandb`. unwritten_rows: as `unwritten_rows` gave them before a stop. Raises ValueError, before anything is
    written, if the package is asked for and missing.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        settings: dict[str, Any],
        with_wandb: bool = False,
        unwritten_rows: Mapping[str, str] | None = None,
    ):
        wandb = _import_wandb() if with_wandb else None
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {
            name: JsonLines(folder / name, first_step, (unwritten_rows or {}).get(name, ""))
            for name in (METRICS_FILE, SPEED_FILE)
        }
        with replacing(folder / SETTINGS_FILE) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        self.wandb = None if wandb is None else self._start_wandb(wandb, settings)
        try:
            with naming(folder / "tensorboard"):
                self.board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        except UnicodeEncodeError as error:
            raise ValueError(f"TensorBoard cannot write to {folder}, whose name is no text; pass --log_dir.") from error

    def _start_wandb(self, wandb, config: dict[str, Any]):
        id_file = self.folder / "wandb_id"
        if not id_file.exists():
            with replacing(id_file) as temporary:
                temporary.write_text(uuid.uuid4().hex[:12])
        return wandb.init(
            project="lift",
            name=self.folder.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(self.folder),
            config=config,
            sync_tensorboard=True,
        )

    def _on_board(self, action: Callable[[SummaryWriter], None], reopen: bool = False) -> None:
        try:
            if self.board is None and reopen:
                self.board = SummaryWriter(str(self.folder / "tensorboard"))
            if self.board is not None:
                action(self.board)
        except OSError as error:
            print(f"warning: TensorBoard has a gap, {self.folder} cannot be written ({error})", file=sys.stderr)
            self.board = None

    def write(self, row: Mapping[str, Any], speed: Mapping[str, float], curves: Mapping[str, float]) -> None:
        """Append a row to both files; show it and `curves`, numbers for the board alone, on the board."""
        position = {"step": row["step"], "epoch": row["epoch"]}
        self.files[METRICS_FILE].append(row)
        self.files[SPEED_FILE].append(position | speed)

        def show(board: SummaryWriter) -> None:
            for name, value in (row | speed | curves).items():
                if name not in position:
                    board.add_scalar(MEASURE_NAMES.get(name, name), value, row["step"])

        self._on_board(show)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers on the board alone."""
        self._on_board(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()] and None)

    def images(self, name: str, pixels: torch.Tensor, step: int) -> None:
        """Show uint8 images `[N, C, H, W]` on the board."""
        self._on_board(lambda board: board.add_images(name, pixels, step))

    def flush(self) -> None:
        """Bring everything to the disk; raises OSError if the rows cannot be."""
        self._on_board(lambda board: board.flush(), reopen=True)
        for file in self.files.values():
            file.write()

    @property
    def unwritten_rows(self) -> dict[str, str]:
        """What `flush` could not write, by file."""
        return {name: file.pending for name, file in self.files.items() if file.pending}

    def close(self) -> None:
        """End the log."""
        self._on_board(lambda board: board.close())
        if self.wandb is not None:
            self.wandb.finish()
