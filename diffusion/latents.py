"""From latents back to images, and files of latents.

A model of one scale, of the residual or of the over-complete pair has latents: all the scales that it reads follow its
probability-flow equation (arXiv 2011.13456, eq. 13), which `diffusion.likelihood.encode` solves upwards and `decode`
downwards.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion.adaptive import Ode
from diffusion.sampler import sample
from diffusion.step import Solver
from images.representation import Images
from paths.path import Path
from runtime.errors import need_file
from runtime.safe_write import replacing
from scheduler import DDIMScheduler, Denoiser

SCALES = ("fine", "coarse")  # Names of the arrays in a file.


class Decoded(NamedTuple):
    """What `decode` returns."""

    images: torch.Tensor  # [B, C, H, W], in [-1, 1] but for what lies outside, which is not clamped
    nfe: torch.Tensor  # int64 [B], network calls for each image


def decode(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,
    latents: Images,  # [B, C, H, W] per scale, fine first
    solver: Solver | None = None,  # None: Ode()
    end: str = "t0",
    draw: Callable[[Sequence[int]], torch.Tensor] | None = None,  # as `sample` takes it, for solvers that need it
) -> Decoded:
    """The images of latents: `sample` without a clamp, divided by alpha_0 where it ends at timestep 0.

    By `Ode` this undoes `encode` along the same path, the nearer the smaller both tolerances. A clamp would not, as the
    equation that is solved on the way up has none. Nor does `end="clean"`, whose last call takes away what the network
    holds for noise of timestep 0. In flow, where nothing is noise at timestep 0, both ends have that call half a
    timestep earlier, at noise of 1/1998. Raises what `sample` and the solver raise.
    """
    solver = Ode() if solver is None else solver
    samples = sample(denoise, scheduler.unclamped(), path, latents, end=end, draw=draw, solver=solver)
    image = samples.images[0]
    if end == "t0":
        image = image / scheduler.alphas[0].item()
    if solver.adaptive:
        return Decoded(image, torch.from_numpy(solver.spent.spent.copy()))
    return Decoded(image, torch.full((len(image),), samples.nfe))


@dataclass(frozen=True)
class Latents:
    """Latents of images, and what is known of each: what a file of latents holds.

    Raises ValueError for names, fingerprints or measurements of another number, and for names that no files can have.
    """

    scales: Images  # float32 [N, C, H, W] per scale, fine first
    names: tuple[str, ...]
    settings: dict[str, Any]  # what made them; `weights_fingerprint` and `path_fingerprint` at least
    fingerprints: tuple[str, ...] = ()  # of the images that they are of, if known
    measured: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)  # by name, one for each image

    def __post_init__(self) -> None:
        count = len(self.names)
        columns = {"names": self.names, **dict(zip(SCALES, self.scales, strict=False)), **self.measured}
        columns |= {"fingerprints": self.fingerprints} if self.fingerprints else {}
        for name, column in columns.items():
            if len(column) != count:
                raise ValueError(f"it has {count} names and {len(column)} {name}")
        odd = [name for name in self.names if name in ("", ".", "..") or "/" in name or "\0" in name]
        if odd or len(set(self.names)) != count:
            raise ValueError(f"'{odd[0]}' is no name of an image" if odd else "two images have one name")

    def __len__(self) -> int:
        return len(self.names)

    def row(self, k: int) -> "Latents":
        """Those of image k alone."""
        return Latents(
            tuple(x[k : k + 1] for x in self.scales),
            self.names[k : k + 1],
            self.settings,
            self.fingerprints[k : k + 1],
            {name: values[k : k + 1] for name, values in self.measured.items()},
        )

    def with_others(self, others: "Latents") -> "Latents":
        """Both; of two images of one name that of `others`."""
        replaced = set(others.names)
        kept = [k for k, name in enumerate(self.names) if name not in replaced]
        return Latents(
            tuple(torch.cat([x[kept], y]) for x, y in zip(self.scales, others.scales, strict=True)),
            (*(self.names[k] for k in kept), *others.names),
            self.settings,
            (*(self.fingerprints[k] for k in kept), *others.fingerprints),
            {name: (*(v[k] for k in kept), *others.measured[name]) for name, v in self.measured.items()},
        )


def save_latents(file: str | os.PathLike, latents: Latents) -> None:
    """Write the `.npz` that `load_latents` reads, as a whole or not at all.

    Arrays: `fine` and of a pair `coarse`, `names`, `fingerprints`, one for each measurement, and `settings`,
    the texts as JSON.
    """
    arrays = {name: x.float().cpu().numpy() for name, x in zip(SCALES, latents.scales, strict=False)}
    # JSON, as NumPy's texts lose zeros at their end and take no names that are no text.
    texts = {"names": latents.names, "fingerprints": latents.fingerprints, "settings": latents.settings}
    arrays |= {name: np.array(json.dumps(text)) for name, text in texts.items()}
    arrays |= {f"measured_{name}": np.array(values, np.float64) for name, values in latents.measured.items()}
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **arrays)


def load_latents(file: str | os.PathLike, way_out: str = "write it again with encode.py --input") -> Latents:
    """Read a file of latents; way_out: what to do with a damaged one.

    Raises FileNotFoundError if it is missing, and ValueError if it is damaged, no such file, or holds latents that are
    NaN or infinite.
    """
    file = need_file(FilePath(file), "File of latents", "write one with encode.py --input")
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        scales = tuple(torch.from_numpy(arrays[name]).float() for name in SCALES if name in arrays)
        names, fingerprints, settings = (
            json.loads(arrays[name].item()) for name in ("names", "fingerprints", "settings")
        )
        measured = {
            name.removeprefix("measured_"): tuple(values.tolist())
            for name, values in arrays.items()
            if name.startswith("measured_")
        }
        if (
            not scales
            or any(x.ndim != 4 for x in scales)
            or not {"weights_fingerprint", "path_fingerprint"} <= {*settings}
        ):
            raise ValueError("it lacks latents or what made them")
        latents = Latents(scales, tuple(map(str, names)), settings, tuple(map(str, fingerprints)), measured)
    except MemoryError:
        raise
    except Exception as error:  # A damaged zip raises whatever the damage happens to hit.
        reason = str(error) if isinstance(error, ValueError | KeyError) else type(error).__name__
        raise ValueError(f"{file} is damaged or no file of latents ({reason}); {way_out}.") from error
    if not all(x.isfinite().all() for x in scales):
        raise ValueError(f"{file} holds latents that are NaN or infinite; {way_out}.")
    return latents
