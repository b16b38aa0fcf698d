"""`--solver` of the stages: calls counted, rows and schedule files that say it, and what does not go together."""

import json

import pytest
import torch

import eval_fid_batch
import generate_sr
import generate_with_path_30
import inpaint
import interpolate
from checkpoint import load_model
from conftest import HARDWARE
from diffusion.sampler import SeededNoise, sample, sample_seeds, scale_shapes
from diffusion.solvers import make_solver
from evaluation.results_table import read_rows
from paths.families import diagonal
from paths.path import Path

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


@pytest.mark.parametrize(
    "module, flags",
    [
        (generate_sr, ["--on", "train", "--num_images", 2, "--num_steps", 4]),
        (inpaint, ["--mask", "center", "--on", "train", "--num_images", 2, "--num_steps", 4, "--jump_repeats", 2]),
        (interpolate, ["--seeds", 1, 2, "--frames", 4, "--num_steps", 4, "--at", 1]),
    ],
    ids=["super-resolution", "inpainting", "interpolation"],
)
def test_other_stages_take_a_solver_too(stage, run, tmp_path, module, flags):
    """Other images, in folders that say it, and what is said of DDIM is as it was."""
    settings = {}
    cache = [] if module is interpolate else ["--cache_dir", run.cache]
    for solver in ("ddim", "unipc"):
        folder = tmp_path / solver
        stage(module, "--checkpoint", run.lift, *flags, *cache, "--solver", solver, "--output", folder, *HARDWARE)
        settings[solver] = json.loads((folder / "settings.json").read_text())
    assert "solver" not in settings["ddim"] and settings["unipc"]["solver"] == "unipc"
    pictures = [sorted((tmp_path / name).rglob("*.png")) for name in ("ddim", "unipc")]
    assert len(pictures[0]) == len(pictures[1]) > 0
    assert any(one.read_bytes() != two.read_bytes() for one, two in zip(*pictures, strict=True))


def test_a_walk_from_between_two_images_forgets_what_was_seen_of_others(run):
    """At point 0 nothing was seen, at a later one only the images that lie there: weights 0 and 1 are the ends."""
    loaded, path = load_model(run.lift), diagonal(6)
    shapes = scale_shapes(2, 3, 16)
    weights = torch.tensor([0.0, 1.0, 0.5])
    for at in (0, 3):
        found = interpolate.interpolate(
            loaded.denoise, loaded.scheduler, path, [4, 5], weights, shapes, at, solver=make_solver("ddim")
        )
        [(_, ends)] = sample_seeds(loaded.denoise, loaded.scheduler, path, [4, 5], shapes, 2)
        torch.testing.assert_close(found.images[0][:2], ends.images[0], rtol=1e-4, atol=1e-4)
    states = []

    def record(k, xs):
        states.append(xs)

    draw = SeededNoise([4, 5]).draw
    solver = make_solver("dpmpp_2m")
    sample(loaded.denoise, loaded.scheduler, path, [draw(shape) for shape in shapes], callback=record, solver=solver)
    middle = [interpolate.slerp(x[0], x[1], torch.tensor([0.5])) for x in states[3]]
    rest = Path(path.points[3:], "rest", {})
    expected = sample(loaded.denoise, loaded.scheduler, rest, middle, solver=make_solver("dpmpp_2m"))
    found = interpolate.interpolate(
        loaded.denoise, loaded.scheduler, path, [4, 5], weights, shapes, 3, solver=make_solver("dpmpp_2m")
    )
    torch.testing.assert_close(found.images[0][2:], expected.images[0], rtol=1e-4, atol=1e-4)
