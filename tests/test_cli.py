"""Values of flags, and how a stage ends: whole numbers of any length, and memory that runs out."""

import argparse

import numpy as np
import pytest

import cli
import eval_fid_batch
import generate_with_path_30
import interpolate
import train_lift
from conftest import HARDWARE, STEPS, TINY, run_stage
from diffusion.sampler import image_seeds
from evaluation.results_table import read_rows

RNG = np.random.default_rng(4)
HUGE = [str(10**18), str(2**63), str(2**64), str(10**30), "1" * 5000]


@pytest.mark.parametrize("parse", [cli.seed, cli.positive_int, interpolate.image_seed])
def test_whole_numbers_are_read_or_refused(parse):
    for value in (1, 7, 10**17, 10**18 - 1, *RNG.integers(1, 10**18, 20)):
        assert parse(str(value)) == value
    for text in ("-1", "", "1.5", "1e3", "²", "x", " 1"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' is not "):
            parse(text)


@pytest.mark.parametrize("text", HUGE, ids=len)
def test_numbers_that_nothing_holds_are_too_large(text):
    for parse in (cli.seed, cli.positive_int):
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            parse(text)
        assert "too large; choose less than 1000000000000000000" in str(refused.value)
        assert len(str(refused.value)) < 150


def test_every_seed_in_the_name_of_an_image_may_be_interpolated():
    for seed in (0, 42, 10**18 - 1):
        for image_seed in image_seeds(seed, 1_000_000)[::999_999]:
            assert interpolate.image_seed(str(image_seed)) == image_seed
    with pytest.raises(argparse.ArgumentTypeError):
        interpolate.image_seed(str(10**24))


@pytest.mark.parametrize("text", HUGE, ids=len)
@pytest.mark.parametrize(
    ("module", "flags"), [(train_lift, [*TINY, "--seed"]), (eval_fid_batch, ["--metrics", "swd", "--seeds", 1])]
)
def test_a_seed_that_is_too_large_is_a_usage_error(refused, module, flags, text):
    refused(module, *flags, text, says=("--seed", "is too large; choose less than"), status=2)


def test_the_largest_seed_goes_through(stage, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seed = 10**18 - 1
    stage(train_lift, *TINY, "--seed", seed, "--epochs", 1)
    flags = ["--checkpoint", run.lift, "--num_images", 2, "--seed", seed, "--output", "samples", *STEPS, *HARDWARE]
    stage(generate_with_path_30, *flags)
    names = sorted(file.stem for file in (tmp_path / "samples").glob("[0-9]*.png"))
    assert names == [f"{seed}00000{k}" for k in range(2)]
    stage(interpolate, "--checkpoint", run.lift, "--seeds", *names, "--output", "walk", *STEPS, *HARDWARE)
    assert (tmp_path / "walk/frame_000.png").read_bytes() == (tmp_path / f"samples/{names[0]}.png").read_bytes()
    flags = [*run.eval_flags("scores.csv"), "--model_type", "lift", "--path_type", "diagonal", "--num_images", 4]
    stage(eval_fid_batch, *flags, "--seeds", seed)
    assert [row["seed"] for row in read_rows("scores.csv")] == [str(seed)]


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 8 TiB")])
def test_memory_that_runs_out_is_one_sentence(capsys, error):
    class Stage:
        __name__ = "stage"

        @staticmethod
        def main():
            raise error

    ended = run_stage(Stage)
    assert ended.status == 1 and ended.message.startswith("error: out of memory") and "--batch_size" in ended.message
    assert str(error) in ended.message
