"""Pairs of a noise and the image that a walk makes of it, as a folder: the coupling that rectified flow trains on.

A pair is its seed and the end of a walk that draws nothing on the way (arXiv 2209.03003, section 2.2). Its noise is not
stored, as `SeededNoise` draws it again from the seed, so that no reader can mistake one for another. A folder holds

    pairs.json          what made the pairs, and once all are there the checksum of each shard
    pairs_00000.npz     `fine`, the image, and of two scales `coarse`, where that one ended, float32 [n, C, H, W];
                        `labels`, int64 [n], of a model with classes; `made_by`, which ties a shard to its settings

Images are float32, as the walk computes them: rounded to half as many bytes, they would no longer be what it makes.
Shard k has the pairs from k * shard_size on. It is written whole or not at all, so that making pairs goes on after a
kill with the shard that was in the making, and ends with the same bits.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffusion.sampler import IMAGES_PER_SEED, SeededNoise, check_finite, sample_seeds
from diffusion.step import Solver, check_draws_nothing, check_starts_at_last
from images.representation import Images
from paths.path import Path
from runtime.safe_write import remove_temporaries, replacing
from scheduler import DDIMScheduler, Denoiser

MANIFEST = "pairs.json"
SHARD_SIZE = 1000
SCALES = ("fine", "coarse")  # Names of the arrays in a shard.
FIRST_SEED = 10**18  # No seed of an evaluation is as large, so that no model is judged on noise that it was taught.
# What a folder says of its pairs, and what messages call it; in the order in which differences are named.
SAID = {
    "beta_schedule": "the process",
    "representation": "the representation",
    "model_type": "the model",
    "resolution": "the resolution",
    "channels": "the channels",
    "class_names": "the classes",
    "data_fingerprint": "the data of the training",
    "teacher_fingerprint": "the teacher",
    "weights": "the kind of weights",
    "path_fingerprint": "the path",
    "solver": "the solver",
    "end": "the end of the walk",
    "precision": "the precision",
    "first_seed": "the first seed",
    "num_pairs": "the number of pairs",
    "shard_size": "the number of pairs in a shard",
}
Walk = Callable[[range], tuple[Images, Sequence[int] | None]]  # From seeds to their end states and classes.


def pair_seeds(seed: int, number: int, count: int) -> range:
    """The seeds of the pairs number `number` (0 to 999) of a run of some seed; those of no evaluation are among them.

    Raises ValueError for more than a million.
    """
    if count > IMAGES_PER_SEED:
        raise ValueError(f"--num_pairs {count} exceeds the {IMAGES_PER_SEED} pairs that one seed provides; lower it.")
    first = ((FIRST_SEED + seed) * 1000 + number) * IMAGES_PER_SEED
    return range(first, first + count)


def check_unique(solver: Solver) -> None:
    """Raise ValueError for a solver that draws noise on the way, of which the seed's noise makes no one image."""
    check_draws_nothing(
        solver,
        "so that no image belongs to a noise by itself; choose one that draws none, such as ddim with --eta 0, heun or "
        "ode.",
    )


def ends_of(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,
    seeds: range,
    shapes: Sequence[tuple[int, int, int]],
    batch_size: int,
    device: torch.device | str = "cpu",
    solver: Solver | None = None,
    end: str = "clean",
    labels: Sequence[int] | None = None,
) -> Images:
    """Where the walks from the noise of some seeds end, float32 `[N, C, H, W]`: the image, and the coarse scale if any.

    Raises what `check_unique`, `check_starts_at_last` and `sample` raise, and ValueError for images that are not
    finite.
    """
    if solver is not None:
        check_unique(solver)
    check_starts_at_last(path, scheduler, "a pair")
    walks = sample_seeds(
        denoise, scheduler, path, seeds, shapes, batch_size, device, end=end, solver=solver, labels=labels
    )
    parts: list[Images] = []
    for chosen, samples in walks:
        for x in samples.images:
            check_finite(x, [f"of seed {seed}" for seed in chosen])
        parts.append(tuple(x.float().cpu() for x in samples.images))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Pairs:
    """A coupling in memory: row k is the end of the walk from the noise of `seeds[k]`."""

    scales: tuple[np.ndarray, ...]  # float32 [N, C, H, W] each, fine first
    labels: np.ndarray | None  # int64 [N]
    seeds: range
    fingerprint: str

    def __len__(self) -> int:
        return len(self.seeds)

    def noise(self, rows: Sequence[int], device: torch.device | str = "cpu") -> Images:
        """The noise `[B, C, H, W]` that the walks of some rows began with, of a single scale with a coarse half."""
        source = SeededNoise([self.seeds[row] for row in rows])
        fine = self.scales[0].shape[1:]
        return tuple(source.draw(shape, device) for shape in (fine, (fine[0], fine[1] // 2, fine[2] // 2)))


def shard_file(folder: str | os.PathLike, number: int) -> FilePath:
    """The file of a shard."""
    return FilePath(folder) / f"pairs_{number:05d}.npz"


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _checksum(file: FilePath) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _rows(said: dict[str, Any], number: int) -> range:
    """Which pairs a shard has."""
    return range(said["num_pairs"])[number * said["shard_size"] : (number + 1) * said["shard_size"]]


def _num_shards(said: dict[str, Any]) -> int:
    return -(-said["num_pairs"] // said["shard_size"])


def num_own(said: dict[str, Any], part: tuple[int, int]) -> int:
    """How many pairs are in the shards that `make_pairs` makes in one of several processes."""
    return sum(len(_rows(said, number)) for number in range(part[0], _num_shards(said), part[1]))


def _read_manifest(folder: FilePath) -> dict[str, Any] | None:
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or not isinstance(content["shards"], list) or not {*SAID} <= content.keys():
            raise ValueError("it lacks what made the pairs")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove {folder}, and the pairs are made again.") from error
    return content


def _write_manifest(folder: FilePath, said: dict[str, Any], shards: list[str]) -> None:
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(said | {"shards": shards}, indent=1) + "\n")


def _compare(folder: FilePath, found: dict[str, Any], said: dict[str, Any]) -> None:
    for key, words in SAID.items():
        if found[key] != said[key]:
            raise ValueError(
                f"{folder} holds pairs for which {words} was {found[key]}, not {said[key]}; go on with what they were "
                "made by, or pass another --run."
            )


def _load_shard(file: FilePath, said: dict[str, Any], rows: range) -> dict[str, np.ndarray]:
    """The arrays of a shard; raises ValueError unless it is what these settings write, and OSError."""
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (MemoryError, FileNotFoundError):
        raise
    except Exception as error:  # A damaged zip raises whatever the damage happens to hit.
        raise ValueError(f"{file} is damaged ({type(error).__name__})") from error
    if str(arrays.get("made_by")) != _digest(said):
        raise ValueError(f"{file} was made by other settings than {MANIFEST} beside it says")
    if any(len(values) != len(rows) for name, values in arrays.items() if name != "made_by"):
        raise ValueError(f"{file} has another number of pairs than {len(rows)}")
    return arrays


def make_pairs(
    folder: str | os.PathLike,
    said: dict[str, Any],  # the keys of SAID
    walk: Walk,
    part: tuple[int, int] = (0, 1),  # this process and their number: each makes every so-manieth shard
    done: Callable[[int], None] = lambda count: None,  # told of pairs that are there
) -> bool:
    """Make the shards of a folder that are not there or not whole; `seal_pairs` after all processes are done.

    Returns whether there were any such. Raises ValueError for a folder of other pairs, naming what differs first, and
    what walk raises.
    """
    folder = FilePath(folder)
    found = _read_manifest(folder)
    if found is not None:
        _compare(folder, found, said)
    elif part[0] == 0:
        remove_temporaries(folder, FilePath(MANIFEST).stem)
        _write_manifest(folder, said, [])
    first, made = said["first_seed"], False
    for number in range(part[0], _num_shards(said), part[1]):
        file, rows = shard_file(folder, number), _rows(said, number)
        remove_temporaries(folder, file.stem)
        try:
            _load_shard(file, said, rows)
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, ValueError):
                tqdm.write(f"note: {error}; it is made again", file=sys.stderr)
            states, labels = walk(range(first + rows.start, first + rows.stop))
            arrays = {name: x.numpy() for name, x in zip(SCALES, states, strict=False)}
            arrays |= {} if labels is None else {"labels": np.array(labels, np.int64)}
            with replacing(file) as temporary, open(temporary, "wb") as stream:
                np.savez(stream, made_by=np.array(_digest(said)), **arrays)
            made = True
        done(len(rows))
    return made


def seal_pairs(folder: str | os.PathLike, said: dict[str, Any]) -> None:
    """Write down the checksums of all shards, which says that they are all there."""
    shards = [_checksum(shard_file(folder, number)) for number in range(_num_shards(said))]
    if _read_manifest(FilePath(folder)) != said | {"shards": shards}:
        _write_manifest(FilePath(folder), said, shards)


def is_sealed(folder: str | os.PathLike) -> bool:
    """Whether all pairs of a folder have been made; raises ValueError if its manifest is damaged."""
    found = _read_manifest(FilePath(folder))
    return found is not None and bool(found["shards"])


def load_pairs(folder: str | os.PathLike, said: dict[str, Any]) -> Pairs:
    """The pairs of a folder, verified.

    Raises FileNotFoundError if there are none, and ValueError, naming it, for the first thing in which they differ from
    what is said, for pairs that are not all there, and for a shard that is missing, damaged or cut short.
    """
    folder = FilePath(folder)
    found = _read_manifest(folder)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no pairs; make them with distill.py.")
    _compare(folder, found, said)
    if len(found["shards"]) != _num_shards(said):
        raise ValueError(f"{folder} does not hold all of its {said['num_pairs']} pairs yet; run distill.py again.")
    again = "remove it, and distill.py makes it again"
    scales: list[np.ndarray] = []
    labels = None if said["class_names"] is None else np.empty(said["num_pairs"], np.int64)
    for number, checksum in enumerate(found["shards"]):
        file, rows = shard_file(folder, number), _rows(said, number)
        if not file.exists():
            raise ValueError(f"{file} is missing; run distill.py again, which makes it again.")
        if _checksum(file) != checksum:
            raise ValueError(f"{file} is damaged or cut short, as its checksum is not that of {MANIFEST}; {again}.")
        try:
            arrays = _load_shard(file, said, rows)
            states = [arrays[name] for name in SCALES if name in arrays]
            # Made once, so that no more than the pairs lie in memory.
            scales = scales or [np.empty((said["num_pairs"], *x.shape[1:]), np.float32) for x in states]
            for whole, x in zip(scales, states, strict=True):
                whole[rows.start : rows.stop] = x
            if labels is not None:
                labels[rows.start : rows.stop] = arrays["labels"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{error}; {again}.") from error
    if scales[0].shape[1:] != (said["channels"], said["resolution"], said["resolution"]):
        raise ValueError(f"{folder} holds images of another size than {said['resolution']}; remove it, and run again.")
    seeds = range(said["first_seed"], said["first_seed"] + said["num_pairs"])
    return Pairs(tuple(scales), labels, seeds, _digest(said | {"shards": found["shards"]}))


def blank_pairs(said: dict[str, Any], num_scales: int) -> Pairs:
    """Pairs of zeros in place of those that have not been made, for what asks of their number and size alone."""
    count, side = said["num_pairs"], said["resolution"]
    scales = tuple(np.zeros((count, said["channels"], side >> s, side >> s), np.float32) for s in range(num_scales))
    labels = None if said["class_names"] is None else np.zeros(count, np.int64)
    return Pairs(scales, labels, range(said["first_seed"], said["first_seed"] + count), "not made")
