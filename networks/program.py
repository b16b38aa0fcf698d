"""A network as a program that needs no code of this project: what `torch.export` saves and any PyTorch loads.

Beside it lies all that sampling needs: a schedule, the noise of a few seeds, and `standalone.py` as the script.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

PROGRAM_FILE, NOISE_FILE, SCRIPT_FILE, SCHEDULE_FILE = "model.pt2", "noise.pt", "sample.py", "schedule.json"
EXPORTED_BATCH = 2  # Any other size runs too; of 1 the exporter would make a constant.
LARGEST_BATCH = 2**31 - 1  # PyTorch 2.6 asks for a bound.


class _Network(nn.Module):
    """A model with one signature for all: `(xs, ts) -> predictions`, lists with one tensor per scale, fine first.

    What it says of variances, which the script has no use for, is left out.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, xs: list[torch.Tensor], ts: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        predictions = self.model(*self.model.inputs(tuple(xs), tuple(ts)))
        return tuple(
            prediction[:, : x.shape[1]]
            for prediction, x in zip(
                predictions if isinstance(predictions, tuple) else (predictions,), xs, strict=False
            )
        )


def program_bytes(model: nn.Module, channels: int, resolution: int) -> bytes:
    """The `.pt2` file of a model on the CPU in float32, for any batch size.

    The program is called as `(xs, ts)`: lists of images float32 `[B, C, R >> s, R >> s]` and of timesteps int64 `[B]`,
    both for every scale s, fine first; it returns a tuple of one prediction per scale that the model predicts. Raises
    RuntimeError if the exporter cannot follow the model.
    """
    scales = range(model.num_scales)
    xs = [torch.zeros(EXPORTED_BATCH, channels, resolution >> s, resolution >> s) for s in scales]
    ts = [torch.zeros(EXPORTED_BATCH, dtype=torch.long) for _ in scales]
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    sizes = ([{0: batch} for _ in scales], [{0: batch} for _ in scales])
    stream = io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(_Network(model).eval(), (xs, ts), dynamic_shapes=sizes, strict=False)
        torch.export.save(program, stream)
    return stream.getvalue()


def script_bytes() -> bytes:
    """The script that samples with these files and with PyTorch alone."""
    return Path(__file__).with_name("standalone.py").read_bytes()


def noise_bytes(seeds: Sequence[int], draws: Sequence[torch.Tensor], points: Sequence[Sequence[int]]) -> bytes:
    """The noise `[K, C, H, W]` of K seeds, in the order in which a sampler draws it along the points of a path."""
    stream = io.BytesIO()
    content = {"seeds": list(seeds), "draws": list(draws), "points": [list(point) for point in points]}
    torch.save(content, stream)
    return stream.getvalue()
