"""`--solver` of the stages: calls counted, rows and schedule files that say it, and what does not go together."""

import json

import pytest

import eval_fid_batch
import generate_with_path_30
from conftest import HARDWARE
from evaluation.results_table import read_rows

SAMPLING = ["--path_type", "diagonal", "--num_steps", 4, "--num_images", 2, *HARDWARE]


@pytest.mark.parametrize(
    "flags, calls, entry",
    [
        (["heun"], 7, {"name": "heun"}),
        (["dpmpp_2m"], 4, {"name": "dpmpp_2m"}),
        (["ancestral", "--variance", "beta_tilde"], 4, {"name": "ancestral", "variance": "beta_tilde"}),
        (["langevin", "--langevin_rounds", 2], 9, {"name": "langevin", "rounds": 2}),
    ],
)
def test_sampling_counts_calls_and_says_the_solver(stage, run, tmp_path, flags, calls, entry):
    ended = stage(generate_with_path_30, "--checkpoint", run.lift, "--output", tmp_path, "--solver", *flags, *SAMPLING)
    assert f"2 new with {calls} network calls each" in ended.output
    assert json.loads((tmp_path / "schedule.json").read_text())["solver"] == entry | {"end": "clean"}


def test_images_of_another_solver_are_others_and_are_not_mixed(stage, refused, run, tmp_path):
    flags = ["--checkpoint", run.lift, *SAMPLING]
    for name in ("ddim", "unipc"):
        stage(generate_with_path_30, *flags, "--output", tmp_path / name, "--solver", name)
    first, second = ((tmp_path / name / "000042000000.png").read_bytes() for name in ("ddim", "unipc"))
    assert first != second
    refused(generate_with_path_30, *flags, "--output", tmp_path / "ddim", "--solver", "unipc", says=("ddim", "--force"))
    assert (tmp_path / "ddim/000042000000.png").read_bytes() == first


def test_rows_say_the_solver_and_are_found_again(stage, run, tmp_path):
    flags = [*run.eval_flags(tmp_path / "scores.csv"), "--model_type", "lift", "--path_type", "diagonal"]
    flags += ["--metrics", "swd", "--num_steps", 4]
    for solver in (["ddim"], ["heun"], ["ancestral"], ["ancestral", "--variance", "beta_tilde"]):
        stage(eval_fid_batch, *flags, "--solver", *solver)
        again = stage(eval_fid_batch, *flags, "--solver", *solver)
        assert "scored already" in again.output
    rows = read_rows(tmp_path / "scores.csv")
    said = [(row["solver"], int(row["nfe"])) for row in rows]
    assert said == [
        ("ddim eta 0 clean", 4), ("heun clean", 7), ("ancestral beta clean", 4), ("ancestral beta_tilde clean", 4)
    ]  # fmt: skip
    assert len({row["swd"] for row in rows}) == 4


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--solver", "plms"], ("--solver", "plms", "dpmpp_2m")),
        (["--solver", "heun", "--eta", 0.5], ("--eta belongs to --solver ddim, not to heun",)),
        (["--variance", "beta"], ("--variance belongs to --solver ancestral, not to ddim",)),
        (["--solver", "pc", "--langevin_rounds", 3], ("--langevin_rounds belongs to --solver langevin",)),
    ],
)
def test_flags_of_another_solver_are_usage_errors(refused, run, tmp_path, flags, words):
    flags = ["--checkpoint", run.lift, "--output", tmp_path / "new", *SAMPLING, *flags]
    refused(generate_with_path_30, *flags, says=words, status=2)
