"""`--solver` of the stages: calls counted, rows and schedule files that say it, and what does not go together."""

import json
import re
import shlex

import pytest
import torch

import eval_fid_batch
import generate_sr
import generate_with_path_30
import inpaint
import interpolate
import train_lift
from checkpoint import load_model
from conftest import HARDWARE, run_stage
from diffusion.sampler import SeededNoise, sample, sample_seeds, scale_shapes
from diffusion.solvers import make_solver
from evaluation.results_table import aggregate, read_rows
from paths.families import diagonal
from paths.path import Path

USUAL = ["--num_steps", 18]
SAMPLING = ["--path_type", "diagonal", "--num_steps", 4, "--num_images", 2, *HARDWARE]


@pytest.mark.parametrize(
    "flags, calls, entry",
    [
        (["heun"], 7, {"name": "heun"}),
        (["dpmpp_2m"], 4, {"name": "dpmpp_2m"}),
        (["ancestral", "--variance", "beta_tilde"], 4, {"name": "ancestral", "variance": "beta_tilde"}),
        (["langevin", "--langevin_rounds", 2], 9, {"name": "langevin", "rounds": 2}),
        # As many steps as fit the calls.
        (["dpmpp_2m", *USUAL, "--num_calls", 3], 3, {"name": "dpmpp_2m"}),
        (["heun", *USUAL, "--num_calls", 12], 11, {"name": "heun"}),
        (["heun", *USUAL, "--num_calls", 12, "--end", "t0"], 12, {"name": "heun", "end": "t0"}),
        (["langevin", *USUAL, "--num_calls", 18], 16, {"name": "langevin", "rounds": 5}),
    ],
)
def test_sampling_counts_calls_and_says_the_solver(stage, run, tmp_path, flags, calls, entry):
    ended = stage(generate_with_path_30, "--checkpoint", run.lift, "--output", tmp_path, *SAMPLING, "--solver", *flags)
    assert f"2 new with {calls} network calls each" in ended.output
    assert json.loads((tmp_path / "schedule.json").read_text())["solver"] == {"end": "clean"} | entry


def test_an_adaptive_solver_counts_the_calls_that_images_took(stage, run, tmp_path):
    flags = ["--checkpoint", run.lift, "--solver", "ode", *SAMPLING, "--num_steps", 1]
    calls = []
    for tolerance in (0.1, 1e-4):
        folder = tmp_path / f"{tolerance}"
        ended = stage(generate_with_path_30, *flags, "--tolerance", tolerance, "--output", folder)
        calls.append(int(re.search(r"2 new with (\d+) network calls each", ended.output)[1]))
        said = json.loads((folder / "schedule.json").read_text())["solver"]
        assert said == {"name": "ode", "tolerance": tolerance, "end": "clean"}
    assert 8 <= calls[0] < calls[1] < 1000


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


def test_rows_of_an_adaptive_solver_are_found_again_whatever_calls_they_took(stage, run, tmp_path):
    flags = [*run.eval_flags(tmp_path / "scores.csv"), "--model_type", "lift", "--path_type", "diagonal"]
    flags += ["--metrics", "swd", "--num_steps", 1, "--solver", "ode", "--tolerance"]
    stage(eval_fid_batch, *flags, 0.01)
    assert "scored already" in stage(eval_fid_batch, *flags, 0.01).output
    stage(eval_fid_batch, *flags, 0.1)
    rows = read_rows(tmp_path / "scores.csv")
    assert [row["solver"] for row in rows] == ["ode tolerance 0.01 clean", "ode tolerance 0.1 clean"]
    assert int(rows[0]["nfe"]) > int(rows[1]["nfe"]) > 7
    # Seeds take other calls, and are repetitions all the same.
    others = [dict(rows[0]) | {"seed": seed, "nfe": nfe} for seed, nfe in (("43", "55"), ("44", "60"))]
    [result] = aggregate([*others, dict(rows[0]) | {"nfe": "50"}])
    assert (result["nfe"], result["swd_seeds"]) == ("55", 3)


def test_budgets_of_calls_make_jobs_of_steps(stage, run, tmp_path):
    flags = [*run.eval_flags(tmp_path / "scores.csv"), "--model_type", "lift", "--path_type", "diagonal"]
    flags += ["--metrics", "swd", "--solver", "heun", *USUAL, "--num_calls", 3, 4, 8]
    listed = stage(eval_fid_batch, *flags, "--list_jobs").output.splitlines()
    assert [re.findall(r"--num_(?:steps|calls) (\d+)", line)[-2:] for line in listed] == [["2", "3"], ["4", "7"]]
    stage(eval_fid_batch, *shlex.split(listed[1])[2:])
    assert [row["nfe"] for row in read_rows(tmp_path / "scores.csv")] == ["7"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--solver", "plms"], ("--solver", "plms", "dpmpp_2m")),
        (["--solver", "heun", "--eta", 0.5], ("--eta belongs to --solver ddim, not to heun",)),
        (["--variance", "beta"], ("--variance belongs to --solver ancestral, not to ddim",)),
        (["--solver", "pc", "--langevin_rounds", 3], ("--langevin_rounds belongs to --solver langevin",)),
        (["--solver", "heun", "--tolerance", 0.1], ("--tolerance belongs to --solver ode, not to heun",)),
        (["--solver", "langevin", "--num_calls", 5, "--num_steps", 18], ("needs 6 network calls or more", "allows 5")),
        (["--solver", "heun", "--num_calls", 9], ("--num_steps and --num_calls exclude each other",)),
        (["--solver", "ode", "--tolerance", 1e-15], ("--tolerance 1e-15 is too small",)),
    ],
)
def test_flags_of_another_solver_are_usage_errors(refused, run, tmp_path, flags, words):
    flags = ["--checkpoint", run.lift, "--output", tmp_path / "new", *SAMPLING, *flags]
    refused(generate_with_path_30, *flags, says=words, status=2)


def test_more_calls_than_allowed_are_refused(refused, stage, run, tmp_path):
    flags = ["--checkpoint", run.lift, "--output", tmp_path / "new", *SAMPLING]
    ode = ["--solver", "ode", "--tolerance", 1e-5]
    says = ("ode takes 33 network calls or more for 4 step(s)", "--num_calls allows 20", "such as --num_steps 1")
    refused(generate_with_path_30, *flags, *ode, "--num_calls", 20, says=says)
    says = ("needs more than 20 network calls for an image at --tolerance 1e-05", "--num_calls")
    ended = run_stage(generate_with_path_30, *flags, *ode, "--num_calls", 20, "--num_steps", 1)
    assert ended.status == 1 and all(word in ended.message for word in says)
    stage(generate_with_path_30, "--checkpoint", run.lift, "--output", tmp_path / "samples", *SAMPLING)
    schedule = tmp_path / "samples/schedule.json"
    says = ("heun takes 7 network calls or more for 4 step(s)", "--num_calls allows 5")
    refused(
        generate_with_path_30, *flags, "--schedule", schedule, "--solver", "heun", *USUAL, "--num_calls", 5, says=says
    )


@pytest.mark.parametrize("solver", ["heun", "pc", "langevin", "ode"])
def test_calls_between_points_are_refused_where_they_have_no_coarse_image(refused, stage, tiny, tmp_path, solver):
    stage(train_lift, *tiny(tmp_path / "run"), "--model", "single_t", "--epochs", 1)
    file = next((tmp_path / "run").rglob("single_t_1ep.pth"))
    flags = ["--checkpoint", file, "--solver", solver]
    says = (f"--solver {solver} calls the network between points, where a 'single_t' model", "unipc")
    refused(generate_with_path_30, *flags, *SAMPLING, "--output", tmp_path / "new", says=says)
    table = ["--metrics", "swd", "--num_images", 4, "--output", tmp_path / "scores.csv", *HARDWARE]
    refused(eval_fid_batch, *flags, *table, says=says)


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
