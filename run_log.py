"""What a training run writes down: metrics.jsonl, speed.jsonl, TensorBoard and, where asked for, Weights & Biases.

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

from safe_write import replacing

METRICS_FILE = "metrics.jsonl"
SPEED_FILE = "speed.jsonl"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` file, without a last one that is being written or that a crash cut short."""
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class JsonLines:
    """A file of one JSON object per line that a full disk delays but never damages.

    Rows of steps after `first_step` are dropped when it is opened: the run will write them again.
    """

    def __init__(self, file: Path, first_step: int):
        self.file = file
        rows = read_metrics(file) if file.exists() else []
        with replacing(file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= first_step))
        self.pending = ""

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; it stays in memory until it can be written."""
        self.pending += json.dumps(row) + "\n"
        try:
            self.write()
        except OSError:
            pass  # The next row or the next checkpoint tries again.

    def write(self) -> None:
        """Bring every row to the disk; raises OSError, leaving the file as it was, if that fails."""
        with open(self.file, "ab", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            rest = memoryview(self.pending.encode())
            try:
                while rest:
                    rest = rest[stream.write(rest) :]
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(end)
                raise
        self.pending = ""


class RunLog:
    """The log folder of one run, from `first_step` on.

    wandb_config: the settings to show in Weights & Biases, which then mirrors the TensorBoard; None leaves it out.
    Raises ValueError if that package is asked for and missing.
    """

    def __init__(self, folder: Path, first_step: int, wandb_config: dict[str, Any] | None = None):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = JsonLines(folder / METRICS_FILE, first_step)
        self.speed = JsonLines(folder / SPEED_FILE, first_step)
        self.wandb = None if wandb_config is None else self._start_wandb(wandb_config)
        self.board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def _start_wandb(self, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ValueError("--wandb needs the wandb package; pip install wandb, or leave --wandb out.") from error
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

    def _on_board(self, action: Callable[[SummaryWriter], None]) -> None:
        if self.board is None:
            return
        try:
            action(self.board)
        except OSError as error:
            print(f"warning: TensorBoard has a gap, {self.folder} cannot be written ({error})", file=sys.stderr)
            self.board = None

    def write(self, row: Mapping[str, Any], speed: Mapping[str, float], curves: Mapping[str, float]) -> None:
        """Append a row to both files; show it and `curves`, numbers for the board alone, on the board."""
        self.metrics.append(row)
        position = {"step": row["step"], "epoch": row["epoch"]}
        self.speed.append(position | speed)

        def show(board: SummaryWriter) -> None:
            for name, value in (row | speed | curves).items():
                if name not in position:
                    board.add_scalar(name, value, row["step"])

        self._on_board(show)

    def images(self, name: str, pixels: torch.Tensor, step: int) -> None:
        """Show uint8 images `[N, C, H, W]` on the board."""
        self._on_board(lambda board: board.add_images(name, pixels, step))

    def flush(self) -> None:
        """Bring everything to the disk; raises OSError if the rows cannot be."""
        self.metrics.write()
        self.speed.write()
        if self.board is None:
            self.board = SummaryWriter(str(self.folder / "tensorboard"))
        self._on_board(lambda board: board.flush())

    def close(self) -> None:
        """End the log."""
        self._on_board(lambda board: board.close())
        if self.wandb is not None:
            self.wandb.finish()
