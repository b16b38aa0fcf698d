"""Scripts that evaluate, with a stand-in for Python: what starts, with which flags, where, and how it ends."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

import aggregate_results
import compute_heatmap_30
import eval_fid_batch
import generate_with_path_30
import make_figures
import plan_path
import report
from conftest import ROOT
from test_stages import defaults, parsed, run_script

SBATCH = ROOT / "scripts/slurm_eval.sbatch"
SECONDS = 60  # Far longer than anything here takes, so that a busy machine fails no test.
PATHS = ["diagonal", "dp_64", "dp_total", "kl_diagonal", "kl"]


@pytest.fixture
def models(checkout):
    """`models(*names)` makes empty checkpoints in the checkout, which it returns."""
    (checkout / "checkpoints").mkdir()

    def make(*names):
        for name in names:
            (checkout / f"checkpoints/{name}ep.pth").touch()
        return checkout

    return make


def calls_of(commands, module=None):
    """The flags of the commands, or of those of one stage."""
    calls = map(parsed, commands)
    return [(found, flags) for found, flags in calls] if module is None else [c for m, c in calls if m is module]


# What is called


def test_everything_is_evaluated_with_the_defaults_of_the_stages(models):
    checkout = models(*(f"{stem}_{epoch}" for epoch in (1000, 200) for stem in ("baseline", "lift_dual_timestep")))
    ended, commands = run_script(checkout, "eval_all.sh")
    assert ended.returncode == 0, ended.stderr
    scored, written = calls_of(commands, eval_fid_batch)
    assert scored == defaults(eval_fid_batch) | {"path_type": PATHS}
    # The images beside the samples are those of the training, for each of which there is a column.
    assert written["write_reference"] == "results/training_images" and written["num_images"] == 12
    assert written["checkpoint"] == ["checkpoints/lift_dual_timestep_1000ep.pth"]
    assert scored["model_type"] == ["baseline", "lift"] and scored["epochs"] is None
    heatmaps = calls_of(commands, compute_heatmap_30)
    for call, epoch in zip(heatmaps, (200, 1000), strict=True):
        checkpoint = f"checkpoints/lift_dual_timestep_{epoch}ep.pth"
        output = {"output": f"results/heatmap_30_{epoch}ep.pth"}
        assert call == defaults(compute_heatmap_30, "--checkpoint", checkpoint) | output
    generated = calls_of(commands, generate_with_path_30)
    assert {call["path_type"] for call in generated} == set(PATHS)
    assert all("_1000ep" in call["checkpoint"] and call["trajectory"] for call in generated)
    figures = {call["figure"]: call for call in calls_of(commands, make_figures)}
    assert figures.keys() == {"scores", "samples", "paths"}
    assert figures["samples"]["real"] == "results/training_images"
    assert len(figures["samples"]["inputs"]) == len(figures["paths"]["inputs"]) == len(generated) == 6
    [plan] = calls_of(commands, plan_path)
    assert plan == defaults(plan_path, "--heatmap", "results/heatmap_30_1000ep.pth")
    assert calls_of(commands, aggregate_results) == [defaults(aggregate_results, "--brief")]
    assert calls_of(commands, report) == [defaults(report)]
    # Maps first, then all scores in one call, and what shows them last.
    order = [module for module, _ in calls_of(commands)]
    assert order[:4] == [compute_heatmap_30, compute_heatmap_30, eval_fid_batch, make_figures]
    assert order[-2:] == [report, aggregate_results]


def test_images_that_have_moved_are_found_by_the_scores_and_by_what_stands_beside_samples(models):
    ended, commands = run_script(models("lift_dual_timestep_9"), "eval_all.sh", EVAL_ARGS="--dataset elsewhere")
    assert ended.returncode == 0, ended.stderr
    assert [call["dataset"] for call in calls_of(commands, eval_fid_batch)] == ["elsewhere"] * 2


def test_flags_of_eval_all_reach_every_stage(models):
    checkout = models("lift_dual_timestep_9")
    ended, commands = run_script(checkout, "eval_all.sh", "--multi-seed", "--force", "--ema", METRICS="swd")
    assert ended.returncode == 0 and "LIFT is scored alone" in ended.stderr
    scored, _ = calls_of(commands, eval_fid_batch)
    changes = {"model_type": ["lift"], "path_type": PATHS, "seeds": [42, 43, 44, 45, 46], "force": True}
    assert scored == defaults(eval_fid_batch) | changes | {"weights": ["ema"], "metrics": ["swd"]}
    [heatmap] = calls_of(commands, compute_heatmap_30)
    assert heatmap["force"] and heatmap["ema"] and heatmap["output"] == "results/heatmap_30_9ep_ema.pth"
    for call in calls_of(commands, generate_with_path_30):
        assert call["ema"] and call["force"] and call["heatmap"] == "results/heatmap_30_9ep_ema.pth"
    [plan] = calls_of(commands, plan_path)
    assert plan["heatmap"] == "results/heatmap_30_9ep_ema.pth" and plan["force"]


# A figure of scores needs a number of steps that was scored.
@pytest.mark.parametrize(("figured", "nfe"), [("6", 6), ("10", 10), ("18", 10)])
def test_both_kinds_of_weights_and_several_numbers_of_steps(models, figured, nfe):
    checkout = models("baseline_9", "lift_dual_timestep_9", "lift_dual_timestep_3")
    settings = {"WEIGHTS": "raw ema", "SCORED_STEPS": "6 10", "PATHS": "diagonal kl", "METRICS": "pr fid"}
    ended, commands = run_script(checkout, "eval_all.sh", **settings, NUM_STEPS=figured, NUM_IMAGES="500")
    assert ended.returncode == 0, ended.stderr
    scored, _ = calls_of(commands, eval_fid_batch)
    changes = {"weights": ["raw", "ema"], "num_steps": [6, 10], "path_type": ["diagonal", "kl"], "num_images": 500}
    assert scored == defaults(eval_fid_batch) | changes | {"metrics": ["pr", "fid"]}
    outputs = [call["output"] for call in calls_of(commands, compute_heatmap_30)]
    assert outputs == [f"results/heatmap_30_{name}.pth" for name in ("3ep", "3ep_ema", "9ep", "9ep_ema")]
    # The baseline and two paths, for both kinds of weights.
    generated = calls_of(commands, generate_with_path_30)
    assert [(call["ema"], call["path_type"]) for call in generated] == [
        (ema, path_type) for ema in (False, True) for path_type in ("diagonal", "diagonal", "kl")
    ]
    assert {call["num_steps"] for call in generated} == {int(figured)}
    plans = [call["heatmap"] for call in calls_of(commands, plan_path)]
    assert plans == ["results/heatmap_30_9ep.pth", "results/heatmap_30_9ep_ema.pth"]
    figures = calls_of(commands, make_figures)
    assert Counter(call["figure"] for call in figures) == {"scores": 1, "samples": 2, "paths": 2}
    [scores] = [call for call in figures if call["figure"] == "scores"]
    assert (scores["metric"], scores["nfe"], scores["num_images"]) == ("manifold_precision", nfe, 500)
    assert len(calls_of(commands, aggregate_results)) == len(calls_of(commands, report)) == 1
    for figure in ("manifold_precision.png", "samples_9ep_ema.png", "plan_9ep_raw*/*.png"):
        assert figure in ended.stdout


@pytest.mark.parametrize("metric", ["fid", "fid_infinity", "kid", "is", "pr", "swd", "nn"])
def test_every_metric_has_its_figure(models, metric):
    ended, commands = run_script(models("lift_dual_timestep_9"), "eval_all.sh", METRICS=metric, PATHS="diagonal")
    assert ended.returncode == 0, ended.stderr
    scores = [call for call in calls_of(commands, make_figures) if call["figure"] == "scores"]
    assert [call["output"] for call in scores] == [f"results/{scores[0]['metric']}.png"]
    # Paths that all are diagonals need no map.
    assert not calls_of(commands, compute_heatmap_30) and not calls_of(commands, plan_path)


def test_other_settings_reach_the_scores(models):
    values = {"reference": "holdout", "resize": "clean", "K": 2, "heatmap_images": 3, "grid": 8, "device": "cpu"}
    values |= {"grid_spacing": "uniform_log_snr", "eta": 0.5, "end": "t0", "spacing": "published", "max_jump": 4}
    values |= {"factor": "A", "normalisation": "sum", "kl_weight": 0.5, "precision": "fp32", "num_workers": 2}
    settings = {name.upper(): str(value) for name, value in values.items()}
    settings |= {"RESULTS_DIR": "there", "CHECKPOINT_DIR": "here", "CACHE_DIR": "pixels", "EVAL_BATCH_SIZE": "7"}
    ended, commands = run_script(models(), "eval_lift.sh", "9", **settings, EVAL_ARGS="--inception_weights FILE")
    assert ended.returncode == 0, ended.stderr
    places = {
        "checkpoint_dir": "here",
        "heatmap_dir": "there",
        "output": "there/fid_results.csv",
        "cache_dir": "pixels",
    }
    values |= places | {"batch_size": 7, "inception_weights": "FILE", "model_type": ["lift"], "epochs": [9]}
    assert calls_of(commands) == [(eval_fid_batch, defaults(eval_fid_batch) | values)]


def test_families_of_paths_reach_every_stage_under_names_that_are_files(models):
    names = {
        "diagonal": "diagonal",
        "cascade:-2,6": "cascade_-2_6",
        "shift:0.5": "shift_0.5",
        "schedule:plans/a.json": "schedule_plans_a.json",
    }
    checkout = models("lift_dual_timestep_9")
    (checkout / "plans").mkdir()
    ended, commands = run_script(checkout, "eval_all.sh", PATHS=" ".join(names), COARSE_FROM="x0 noisy", METRICS="swd")
    assert ended.returncode == 0, ended.stderr
    scored, _ = calls_of(commands, eval_fid_batch)
    assert scored["path_type"] == list(names) and scored["coarse_from"] == ["x0", "noisy"]
    generated = calls_of(commands, generate_with_path_30)
    assert [call["path_type"] for call in generated] == list(names)
    folders = [f"results/samples/lift_dual_timestep_9ep_raw_{name}_18" for name in names.values()]
    assert [call["output"] for call in generated] == folders
    figures = {call["figure"]: call for call in calls_of(commands, make_figures)}
    assert figures["samples"]["inputs"] == [
        f"LIFT {path_type}={folder}" for path_type, folder in zip(names, folders, strict=True)
    ]
    # None of these is an optimum on a map.
    assert not calls_of(commands, compute_heatmap_30) and not calls_of(commands, plan_path)


@pytest.mark.parametrize(("paths", "needs"), [("cascade:best", 1), ("shift:1 kl", 1), ("cascade:2 lead:1", 0)])
def test_maps_are_made_for_the_paths_that_need_them(models, paths, needs):
    ended, commands = run_script(models("lift_dual_timestep_9"), "eval_all.sh", PATHS=paths, METRICS="swd")
    assert ended.returncode == 0, ended.stderr
    assert len(calls_of(commands, compute_heatmap_30)) == len(calls_of(commands, plan_path)) == needs


def test_scripts_of_one_model(models):
    checkout = models("lift_dual_timestep_9", "lift_dual_timestep_20")
    expected = {
        "eval_baseline.sh": {"model_type": ["baseline"], "path_type": ["diagonal"]},
        "eval_lift.sh": {"model_type": ["lift"], "path_type": ["diagonal"]},
        "eval_lift_dp.sh": {"model_type": ["lift"], "path_type": PATHS[1:]},
    }
    for name, changes in expected.items():
        for epochs in ([], [20]):
            (checkout / "commands").unlink(missing_ok=True)
            ended, commands = run_script(checkout, name, *map(str, epochs))
            assert ended.returncode == 0, ended.stderr
            # Paths on maps are scored at the epochs whose maps were computed.
            named = epochs or ([9, 20] if name == "eval_lift_dp.sh" else None)
            assert calls_of(commands)[-1] == (
                eval_fid_batch, defaults(eval_fid_batch) | changes | {"epochs": named}
            )  # fmt: skip
            assert len(commands) == 1 + (len(named) if name == "eval_lift_dp.sh" else 0)


@pytest.mark.parametrize("name", ["compute_heatmap.sh", "plot_heatmap.sh"])
def test_maps_of_every_kind_of_weights(checkout, name):
    ended, commands = run_script(checkout, name, "9", "20", WEIGHTS="ema raw", GRID="8")
    assert ended.returncode == 0, ended.stderr
    calls = calls_of(commands, compute_heatmap_30)
    assert [call["output"] for call in calls] == [
        f"results/heatmap_8_{epoch}ep{suffix}.pth" for epoch in (9, 20) for suffix in ("_ema", "")
    ]
    computes = name == "compute_heatmap.sh"
    assert [call["plot_only"] for call in calls] == [not computes] * 4
    assert [call["ema"] for call in calls] == ([True, False] * 2 if computes else [False] * 4)


def test_nothing_to_evaluate_is_said(models):
    ended, commands = run_script(models("baseline_9"), "eval_all.sh")
    assert ended.returncode == 2 and commands == []
    assert "no LIFT checkpoint in checkpoints" in ended.stderr and "eval_baseline.sh" in ended.stderr


# Several jobs at a time

# A job says that it has started, waits until so many have as MEET says, and ends as FAILS says: "2" with status 3,
# "k2" by a signal.
PYTHON = """\
import json, os, signal, sys, time

place, arguments = os.environ["PLACE"], sys.argv[1:]
file = os.open(place + "/events", os.O_RDWR | os.O_CREAT | os.O_APPEND)


def write(what):
    known = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "SLURM_ARRAY_TASK_ID")}
    os.write(file, (json.dumps({"what": what, "command": arguments, **known}) + "\\n").encode())


if arguments[0] == "-c":
    print(os.environ.get("GPUS", 0))
elif "--list_jobs" in arguments:
    write("list")
    print(open(place + "/jobs").read(), end="")
    sys.exit(int(os.environ.get("LIST_STATUS", 0)))
else:
    write("start")
    deadline = time.monotonic() + 60
    while open(place + "/events").read().count('"start"') < int(os.environ.get("MEET", 0)):
        if time.monotonic() > deadline:
            sys.exit(99)
        time.sleep(0.01)
    write("end")
    fails = os.environ.get("FAILS", "").split()
    if "k" + arguments[-1] in fails:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(3 if arguments[-1] in fails else 0)
"""
JOBS = 7


@pytest.fixture
def fleet(checkout):
    """`run(script, *arguments, **settings)` in a checkout that lists jobs 0 to 6; `events(*what)` after it."""
    python = checkout / ".venv/bin/python"
    python.write_text(f"#!{sys.executable} -IS\n{PYTHON}")
    output = ["--output", 'it\'s "$HOME" & more', "--path_type", "schedule:my plan,*.json"]
    jobs = [["python", "eval_fid_batch.py", *output, "--job", str(k)] for k in range(JOBS)]
    (checkout / "jobs").write_text("".join(f"{shlex.join(job)}\n" for job in jobs))

    def run(script, *arguments, **settings):
        environment = {"PATH": os.environ["PATH"], "PYTHON": "false", "PLACE": str(checkout), **settings}
        return subprocess.run(
            ["bash", script, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=SECONDS
        )

    def events(*what):
        file = checkout / "events"
        rows = map(json.loads, file.read_text().splitlines()) if file.exists() else []
        return [row for row in rows if row["what"] in what]

    return SimpleNamespace(run=run, events=events, folder=checkout, jobs=[job[1:] for job in jobs])


def most_at_once(events):
    """The largest number of jobs that ran side by side on each GPU, and on all together."""
    running, most = Counter(), Counter()
    for event in events:
        gpu = event["CUDA_VISIBLE_DEVICES"]
        running[gpu] += 1 if event["what"] == "start" else -1
        most[gpu] = max(most[gpu], running[gpu])
        most["all"] = max(most["all"], running.total())
    return dict(most)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"PARALLEL": "3"}, {None: 3, "all": 3}),
        ({"PARALLEL": "3", "GPUS": "2"}, {"0": 2, "1": 1, "all": 3}),
        ({"PARALLEL": "3", "DEVICE": "cpu"}, {None: 3, "all": 3}),
        ({"PARALLEL": "3", "CUDA_VISIBLE_DEVICES": "5,3,GPU-8a"}, {"5": 1, "3": 1, "GPU-8a": 1, "all": 3}),
        ({"PARALLEL": "3", "CUDA_VISIBLE_DEVICES": "7"}, {"7": 3, "all": 3}),
        ({"GPUS": "3"}, {"0": 1, "1": 1, "2": 1, "all": 3}),
    ],
)
def test_every_job_runs_once_and_each_slot_has_its_gpu(fleet, settings, most):
    ended = fleet.run("scripts/eval_lift.sh", MEET="3", **settings)
    assert ended.returncode == 0, ended.stderr
    # Also what a shell would split or replace comes as it was listed.
    assert sorted(event["command"] for event in fleet.events("start")) == fleet.jobs
    assert most_at_once(fleet.events("start", "end")) == most
    [listed] = fleet.events("list")
    changes = {"list_jobs": True, "model_type": ["lift"], "device": settings.get("DEVICE")}
    assert parsed(listed["command"]) == (eval_fid_batch, defaults(eval_fid_batch) | changes)


@pytest.mark.parametrize("settings", [{}, {"GPUS": "1"}, {"PARALLEL": "1", "GPUS": "4"}, {"GPUS": "4", "DEVICE": "0"}])
def test_one_process_scores_all_where_there_is_one_place_for_it(fleet, settings):
    ended = fleet.run("scripts/eval_lift.sh", **settings)
    assert ended.returncode == 0 and fleet.events("list") == []
    [run] = fleet.events("start")
    assert parsed(run["command"])[1]["model_type"] == ["lift"] and run["CUDA_VISIBLE_DEVICES"] is None


@pytest.mark.parametrize("fails", ["1", "k1", "0 k2 6"])
def test_a_job_that_fails_or_is_killed_keeps_no_other_from_running(fleet, fails):
    ended = fleet.run("scripts/eval_lift.sh", PARALLEL="2", FAILS=fails)
    assert ended.returncode != 0
    assert sorted(event["command"] for event in fleet.events("start")) == fleet.jobs


def test_several_jobs_at_a_time_do_not_share_one_named_gpu(fleet):
    ended = fleet.run("scripts/eval_lift.sh", PARALLEL="2", DEVICE="1")
    assert ended.returncode == 2 and "DEVICE=1" in ended.stderr and fleet.events("list", "start") == []


def test_a_list_that_cannot_be_made_is_a_failure(fleet):
    (fleet.folder / "jobs").write_text("")
    assert fleet.run("scripts/eval_lift.sh", PARALLEL="2", LIST_STATUS="1").returncode != 0
    assert fleet.events("start") == []


# slurm_eval.sbatch


@pytest.fixture
def submit(fleet):
    """Run the job script as SLURM does, as a copy elsewhere, as one task of an array."""
    copy = fleet.folder / "spool/slurm_script"
    copy.parent.mkdir()
    shutil.copy(SBATCH, copy)

    def run(task, first, count, *arguments, **settings):
        places = {"ID": task, "MIN": first, "MAX": first + count - 1, "COUNT": count}
        slurm = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in places.items()}
        return fleet.run(copy, *arguments, SLURM_SUBMIT_DIR=str(fleet.folder), **slurm | settings)

    return run


@pytest.mark.parametrize(("first", "count"), [(0, 3), (5, 2), (0, 1), (1, 9)])
def test_the_tasks_of_an_array_share_the_jobs(fleet, submit, first, count):
    for task in range(first, first + count):
        ended = submit(task, first, count)
        assert ended.returncode == 0, ended.stderr
    starts = fleet.events("start")
    # None is left out, and none comes twice.
    assert sorted(event["command"] for event in starts) == fleet.jobs
    shares = Counter(event["SLURM_ARRAY_TASK_ID"] for event in starts)
    assert max(shares.values()) - min(shares.values()) <= 1 and len(shares) == min(count, JOBS)


def test_tasks_list_the_jobs_of_eval_all(fleet, submit):
    assert submit(0, 0, 1).returncode == 0
    assert submit(0, 0, 1, "lift", "kl dp_64", WEIGHTS="raw ema", SEEDS="42 43").returncode == 0
    assert submit(0, 0, 1, "single_t no_t", "cascade:2,6 shift:-1", COARSE_FROM="noisy x0").returncode == 0
    everything = defaults(eval_fid_batch) | {"list_jobs": True, "path_type": PATHS}
    changes = {"model_type": ["lift"], "path_type": ["kl", "dp_64"], "weights": ["raw", "ema"], "seeds": [42, 43]}
    ablations = {"model_type": ["single_t", "no_t"], "path_type": ["cascade:2,6", "shift:-1"]}
    ablations |= {"coarse_from": ["noisy", "x0"]}
    expected = [everything, everything | changes, everything | ablations]
    assert [parsed(event["command"])[1] for event in fleet.events("list")] == expected


@pytest.mark.parametrize("fails", ["0", "k0"])
def test_a_task_goes_on_after_a_job_that_fails_and_ends_with_its_failure(fleet, submit, fails):
    assert submit(0, 0, 2, FAILS=fails).returncode == 1
    assert [event["command"][-1] for event in fleet.events("start")] == ["0", "2", "4", "6"]


def test_a_task_without_a_list_fails(fleet, submit):
    assert submit(0, 0, 2, LIST_STATUS="1").returncode == 1
    assert fleet.events("start") == []


@pytest.mark.parametrize(
    ("arguments", "settings", "says"),
    [
        ((), {"SLURM_ARRAY_TASK_ID": ""}, "sbatch --array=0-15"),
        (("lift", "kl", "9"), {}, "'9'"),
        # Tasks 0, 2 and 4, and a task that was submitted again with one that is far from it.
        ((), {"SLURM_ARRAY_TASK_MAX": "4"}, "gaps"),
        ((), {"SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_COUNT": "2"}, "gaps"),
    ],
)
def test_tasks_refuse_what_they_cannot_share(fleet, submit, arguments, settings, says):
    ended = submit(0, 0, 3, *arguments, **settings)
    assert ended.returncode == 2 and says in ended.stderr and ended.stderr.count("\n") == 1
    assert fleet.events("list", "start") == []


def test_outside_slurm_nothing_runs(fleet):
    ended = fleet.run(SBATCH)
    assert ended.returncode == 2 and "not a SLURM array" in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_job_script_explains_itself_without_doing_anything(fleet, flag):
    assert os.access(SBATCH, os.X_OK)
    ended = fleet.run("scripts/slurm_eval.sbatch", flag)
    assert ended.returncode == 0 and "./scripts/slurm_eval.sbatch" in ended.stdout
    assert "SBATCH" not in ended.stdout and "set -euo" not in ended.stdout and not ended.stdout.startswith("#")
    assert fleet.events("list", "start") == []


def test_sbatch_finds_its_options():
    lines = SBATCH.read_text().splitlines()
    # sbatch reads no options after the first line that is not a comment.
    comments = lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    options = [line.removeprefix("#SBATCH ") for line in comments if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append", "--gpus-per-task=1"} <= set(options)
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)
    assert sum("#SBATCH" in line for line in lines) == len(options)
    subprocess.run(["bash", "-n", SBATCH], check=True)
