"""Pairs are a function of their seeds, survive what kills their maker, and are not taken for others."""

import json
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

from conftest import list_files
from diffusion import pairs
from diffusion.pairs import check_unique, ends_of, load_pairs, make_pairs, pair_seeds, seal_pairs, shard_file
from diffusion.sampler import IMAGES_PER_SEED, SeededNoise
from diffusion.solvers import SOLVERS, make_solver
from paths.families import diagonal
from paths.path import Path
from scheduler import DDIMScheduler

FLOW = DDIMScheduler(beta_schedule="flow", prediction_type="velocity", clip_sample=False)
SHAPES = [(1, 16, 16), (1, 8, 8)]
SEEDS = pair_seeds(42, 0, 10)
SAID = {
    "beta_schedule": "flow", "representation": "overcomplete", "model_type": "dual", "resolution": 16, "channels": 1,
    "class_names": ["cat", "dog"], "data_fingerprint": "feed", "teacher_fingerprint": "c0ffee", "weights": "ema",
    "path_fingerprint": "abc", "solver": "ddim eta 0", "end": "clean", "precision": "fp32",
    "first_seed": SEEDS.start, "num_pairs": 10, "shard_size": 4,
}  # fmt: skip
SIZE = 0.4  # Of an image, as a share of its noise.


def lines(xs, ts, labels=None):
    """The velocity of the lines from eps to x = SIZE eps."""
    sizes = (SIZE + (1 - SIZE) * t.double().view(-1, 1, 1, 1) / 999 for t in ts)
    return tuple((x.double() * (1 - SIZE) / size).float() for x, size in zip(xs, sizes, strict=True))


def walk(seeds):
    ends = ends_of(lines, FLOW, diagonal(5, "uniform_t", 2), seeds, SHAPES, 3, labels=[0] * len(seeds))
    return ends, [seed % IMAGES_PER_SEED % 2 for seed in seeds]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "pairs"
    make_pairs(made, SAID, walk)
    seal_pairs(made, SAID)
    return made


def test_a_pair_is_the_noise_of_its_seed_and_what_becomes_of_it(folder):
    found = load_pairs(folder, SAID)
    assert len(found) == 10 and found.seeds == SEEDS and found.labels.tolist() == [0, 1] * 5
    noise = SeededNoise(SEEDS)
    for shape, x in zip(SHAPES, found.scales, strict=True):
        assert x.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(x), SIZE * noise.draw(shape), rtol=1e-4, atol=1e-5)
    for rows in ([3], [9, 0, 4]):
        for row, *drawn in zip(rows, *found.noise(rows), strict=True):
            own = SeededNoise([SEEDS[row]])
            assert all(torch.equal(x, own.draw(shape)[0]) for x, shape in zip(drawn, SHAPES, strict=True))


def test_seeds_are_those_of_no_evaluation_and_of_no_other_round():
    largest = (10**18 - 1) * IMAGES_PER_SEED + IMAGES_PER_SEED - 1
    ranges = [pair_seeds(seed, number, IMAGES_PER_SEED) for seed in (0, 1, 10**18 - 1) for number in (0, 1, 999)]
    assert all(each.start > largest for each in ranges)
    edges = sorted((each.start, each.stop) for each in ranges)
    assert all(one[1] <= other[0] for one, other in zip(edges, edges[1:], strict=False))
    with pytest.raises(ValueError, match="--num_pairs 1000001 exceeds the 1000000 pairs"):
        pair_seeds(0, 0, IMAGES_PER_SEED + 1)


def test_stopped_anywhere_it_goes_on_with_the_same_bytes(tmp_path, folder):
    """Of a shard that was in the making nothing is left; those before it are not made again."""
    whole = {name: digest for name, (digest, _) in list_files(folder).items()}
    for calls in range(3):
        other = tmp_path / f"stopped_{calls}"
        walked = []

        def stopping(seeds, walked=walked, calls=calls):
            if len(walked) == calls:
                raise KeyboardInterrupt
            walked.append(seeds)
            return walk(seeds)

        with pytest.raises(KeyboardInterrupt):
            make_pairs(other, SAID, stopping)
        (other / f".pairs_{calls:05d}.0123.tmp.npz").write_bytes(b"a part")
        with pytest.raises(ValueError, match="does not hold all of its 10 pairs yet"):
            load_pairs(other, SAID)
        again = []
        make_pairs(other, SAID, lambda seeds, again=again: (again.append(seeds), walk(seeds))[1])
        seal_pairs(other, SAID)
        assert walked + again == [SEEDS[:4], SEEDS[4:8], SEEDS[8:]] and len(walked) == calls
        assert {name: digest for name, (digest, _) in list_files(other).items()} == whole


def test_processes_share_the_shards(tmp_path, folder):
    for rank in (1, 0):
        make_pairs(tmp_path / "shared", SAID, walk, (rank, 2))
    seal_pairs(tmp_path / "shared", SAID)
    one, other = (
        {name: digest for name, (digest, _) in list_files(each).items()} for each in (folder, tmp_path / "shared")
    )
    assert one == other


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("teacher_fingerprint", "decaf", "the teacher was c0ffee, not decaf"),
        ("data_fingerprint", "food", "the data of the training was feed, not food"),
        ("beta_schedule", "ve", "the process was flow, not ve"),
        ("representation", "residual", "the representation was overcomplete, not residual"),
        ("resolution", 32, "the resolution was 16, not 32"),
        ("channels", 3, "the channels was 1, not 3"),
        ("class_names", ["cat", "cow"], "the classes was"),
        ("weights", "raw", "the kind of weights was ema, not raw"),
        ("path_fingerprint", "def", "the path was abc, not def"),
        ("solver", "heun", "the solver was ddim eta 0, not heun"),
        ("first_seed", 7, "the first seed was"),
        ("num_pairs", 11, "the number of pairs was 10, not 11"),
    ],
)
def test_other_pairs_are_refused(folder, key, value, words):
    before = list_files(folder)
    for attempt in (lambda said: load_pairs(folder, said), lambda said: make_pairs(folder, said, walk)):
        with pytest.raises(ValueError) as caught:
            attempt(SAID | {key: value})
        assert words in str(caught.value) and str(folder) in str(caught.value) and "another --run" in str(caught.value)
    assert list_files(folder) == before


def cut(file):
    os.truncate(file, file.stat().st_size - 200)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def of_another(file):
    shutil.copy(shard_file(file.parent, 0), file)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "is damaged or cut short"),
        (flip_a_bit, "is damaged or cut short"),
        (of_another, "is damaged or cut short"),
        (os.remove, "is missing"),
    ],
)
def test_a_shard_that_is_not_what_was_written_is_named(folder, harm, words):
    file = shard_file(folder, 1)
    content = file.read_bytes()
    harm(file)
    with pytest.raises(ValueError) as caught:
        load_pairs(folder, SAID)
    assert words in str(caught.value) and str(file) in str(caught.value) and "makes it again" in str(caught.value)
    file.unlink(missing_ok=True)
    make_pairs(folder, SAID, walk)
    assert file.read_bytes() == content and len(load_pairs(folder, SAID)) == 10


def test_a_damaged_manifest_is_named_and_no_folder_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        load_pairs(tmp_path / "none", SAID)
    for text in ("", "{", "[]", json.dumps({"shards": []})):
        (folder / pairs.MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=r"pairs\.json is damaged"):
            load_pairs(folder, SAID)


def test_a_shard_that_cannot_be_written_leaves_what_was_there(tmp_path):
    with mock.patch("numpy.savez", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(OSError, match="No space left"):
            make_pairs(tmp_path / "pairs", SAID, walk)
    assert [file.name for file in (tmp_path / "pairs").iterdir()] == [pairs.MANIFEST]


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_that_draw_are_refused(name):
    solver = make_solver(name)
    if not solver.draws:
        return check_unique(solver)
    with pytest.raises(ValueError, match=f"--solver {solver.name} draws noise on the way"):
        ends_of(lines, FLOW, diagonal(2, "uniform_t", 2), SEEDS, SHAPES, 3, solver=solver)


def test_ancestral_ddim_and_late_starts_are_refused():
    with pytest.raises(ValueError, match="--solver ddim with --eta draws noise on the way"):
        check_unique(make_solver("ddim", eta=0.5))
    with pytest.raises(ValueError, match="a pair at timestep 999"):
        ends_of(lines, FLOW, Path([(999, 990), (0, 0)], "late", {}), SEEDS, SHAPES, 3)


def test_images_that_are_not_finite_are_named():
    def poisoned(xs, ts, labels=None):
        return tuple(torch.where(torch.arange(len(x))[:, None, None, None] == 1, torch.nan, x) for x in xs)

    with pytest.raises(ValueError, match=f"of seed {SEEDS[1]} NaN or infinite"):
        ends_of(poisoned, FLOW, diagonal(2, "uniform_t", 2), SEEDS, SHAPES, 3)
