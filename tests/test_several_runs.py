"""Several runs side by side: what each writes, and that none is mixed with another."""

import csv
import json
from pathlib import Path

import pytest
import torch

import aggregate_results
import compute_cross_jacobian
import compute_heatmap_30
import eval_fid_batch
import export
import generate_with_path_30
import interpolate
import make_figures
import plan_path
import report
import train_baseline
import train_lift
from checkpoint import read_checkpoint
from conftest import HARDWARE, TINY, list_files
from paths.schedule_file import load_schedule

LIFT = "lift_dual_timestep"
# Presets and representations, and the folder that each has for its checkpoints.
RUNS = {
    ("published", "overcomplete"): "",
    ("published", "residual"): "dual-residual-published-16px-synthetic-seed42",
    ("improved", "overcomplete"): "dual-improved-16px-synthetic-seed42",
    ("improved", "residual"): "dual-residual-improved-16px-synthetic-seed42",
}
MAP = ["--grid", 6, "--K", 1, "--num_images", 2, "--num_steps", 6, *HARDWARE]
SCORES = ["--metrics", "swd", "--num_images", 2, "--num_steps", 4, "--path_type", "diagonal", "kl", *HARDWARE]
SCORES += ["--grid", 6, "--K", 1, "--heatmap_images", 2]


def train_flags(preset="published", representation="overcomplete"):
    return [*TINY, "--cache_dir", "cache", "--preset", preset, "--representation", representation]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(stage, run):
    """All stages of one run, after training."""
    flags = ["--run", run] if run else ["--checkpoint", f"checkpoints/{LIFT}_2ep.pth"]
    stage(compute_heatmap_30, *flags, *MAP, "--cache_dir", "cache")
    stage(plan_path, *flags, "--nfe", 4, "--bootstrap", 3)
    stage(generate_with_path_30, *flags, "--path_type", "kl", "--num_steps", 4, "--num_images", 2, *HARDWARE)
    stage(interpolate, *flags, "--seeds", 1, 2, "--frames", 3, "--num_steps", 4, *HARDWARE)
    stage(eval_fid_batch, *flags, *SCORES, "--cache_dir", "cache")


def test_four_runs_of_equal_epochs_keep_all_that_is_theirs(stage, elsewhere, tiny):
    for settings in RUNS:
        stage(train_lift, *train_flags(*settings))
    kept = {}
    for run in RUNS.values():
        everything(stage, run)
        results = Path("results") / run
        made = [*results.glob("*.*"), *results.glob("plan_*/*"), *results.glob("samples/*/**/*")]
        kept[run] = {file: file.read_bytes() for file in made if file.is_file() and file.suffix != ".lock"}
        names = "heatmap_6_2ep.pth heatmap_6_2ep.png fid_results.csv schedule_optimal_4.json costs.csv grid.png"
        assert {file.name for file in kept[run]} >= set(names.split())
        weights = read_checkpoint(Path("checkpoints") / run / f"{LIFT}_2ep.pth")
        heatmap = torch.load(results / "heatmap_6_2ep.pth", weights_only=True)
        [row, _] = csv.DictReader((results / "fid_results.csv").open())
        plan = load_schedule(results / "plan_2ep_raw/schedule_optimal_4.json").provenance
        assert heatmap["fingerprint"] == row["checkpoint_fingerprint"] == plan["model_fingerprint"]
        assert heatmap["run"] == weights["config"]["run"]
    fingerprints = {row.split(",")[0] for run in RUNS.values() for row in scores(run)[1:]}
    assert len(fingerprints) == len(RUNS)
    # Nothing was written over by the runs that came later, but for the first folder, which holds the others.
    for files in kept.values():
        assert {file: file.read_bytes() for file in files} == files
    named = [run for run in RUNS.values() if run]
    page = stage(aggregate_results, "--run", *named).output
    assert Path(f"results/fid_table_{'_'.join(named)}.md").exists() and not Path("results/fid_table.md").exists()
    assert all(title in page for title in ("residual", "LIFT KL"))
    stage(report, "--run", named[0])
    assert (Path("results") / named[0] / "report.html").exists()


def scores(run):
    return (Path("results") / run / "fid_results.csv").read_text().splitlines()


def test_what_meets_another_run_in_the_published_places_goes_elsewhere_and_says_so(stage, elsewhere, tiny):
    first = stage(train_lift, *train_flags())
    assert "run dual-published-16px-synthetic-seed42: checkpoints in checkpoints, logs in logs/" in first.output
    before = list_files(elsewhere)
    other = "dual-published-16px-synthetic-seed7"
    second = stage(train_lift, *train_flags(), "--seed", 7)
    said = "note: checkpoints holds the run dual-published-16px-synthetic-seed42, so that this one goes to checkpoints/"
    assert said + other in second.output
    assert {**list_files(elsewhere), **before} == list_files(elsewhere)
    assert Path(f"checkpoints/{other}/{LIFT}_2ep.pth").exists()
    assert Path(f"checkpoints/{other}/logs/{LIFT}/metrics.jsonl").exists()
    # Each goes on where it was, also when the other has gone.
    assert "is done" in stage(train_lift, *train_flags(), "--resume", "auto").output
    for file in (*Path("checkpoints").glob("*.pth"), Path(f"logs/{LIFT}/settings.json")):
        file.unlink()
    assert f"checkpoints/{other}/" in stage(train_lift, *train_flags(), "--seed", 7, "--resume", "auto").output
    # A baseline has a place of its own.
    assert "checkpoints in checkpoints," in stage(train_baseline, *train_flags()[:-2], "--seed", 7).output


def test_a_run_of_an_earlier_version_in_the_published_places_is_known_by_its_config(stage, elsewhere, tiny):
    stage(train_lift, *train_flags())
    for file in Path("checkpoints").glob("*.pth"):
        content = torch.load(file, weights_only=True)
        for name in ("run", "preset", "representation"):
            del content["config"][name]
        content.pop("settings", None)
        torch.save(content, file)
    said = json.loads(Path(f"logs/{LIFT}/settings.json").read_text())
    del said["run"], said["representation"]
    Path(f"logs/{LIFT}/settings.json").write_text(json.dumps(said))
    assert "is done" in stage(train_lift, *train_flags(), "--resume", "auto").output
    assert "holds the run dual-published-16px-synthetic-seed42" in stage(train_lift, *train_flags(), "--seed", 7).output
    assert "is done" in stage(train_lift, "--resume", "checkpoints", "--device", "cpu").output


@pytest.mark.parametrize(
    ("module", "how"),
    [(train_lift, "folder"), (train_baseline, "file"), (train_lift, "name"), (train_baseline, "moved")],
)
def test_resuming_needs_no_other_flag(stage, refused, elsewhere, tiny, module, how):
    settings = [*TINY, "--cache_dir", "cache", "--run", "mine", "--hidden_dims", "8,8", "--ema_decay", 0.5]
    stage(module, *settings, "--epochs", 2, "--save_every", 1)
    stage(module, *settings, "--epochs", 3, "--save_every", 1, "--run", "straight")
    stem = LIFT if module is train_lift else "baseline"
    if how == "moved":
        Path("archive").mkdir()
        Path("checkpoints/mine").rename("archive/mine")
    flags = {
        "folder": ["--resume", "checkpoints/mine"],
        "file": ["--resume", f"checkpoints/mine/{stem}_last.pth"],
        "name": ["--run", "mine", "--resume"],
        "moved": ["--resume", "archive/mine"],
    }[how]
    assert "is done: 2 of 2 epochs" in stage(module, *flags).output
    stage(module, *flags, "--epochs", 3)
    folder, straight = Path("archive/mine" if how == "moved" else "checkpoints/mine"), Path("checkpoints/straight")
    ours, theirs = (read_checkpoint(place / f"{stem}_3ep.pth") for place in (folder, straight))
    for name in ("model_state", "ema_state"):
        assert all(torch.equal(value, theirs[name][key]) for key, value in ours[name].items())
    rows = [(place / f"logs/{stem}/metrics.jsonl").read_text() for place in (folder, straight)]
    assert rows[0] == rows[1]
    refused(module, *flags, "--seed", 5, says=("seed = 42, not 5",))


def test_what_cannot_be_resumed_is_named(stage, refused, elsewhere, tiny):
    refused(train_lift, "--resume", "nowhere", says=("nowhere holds no lift_dual_timestep_last.pth",))
    for run, model in (("a", "single_t"), ("a", "no_t"), ("b", "single_t")):
        stage(train_lift, *TINY, "--cache_dir", "cache", "--run", run, "--model", model)
    refused(train_lift, "--run", "a", "--resume", says=("several runs", "--model single_t or no_t"))
    refused(train_lift, "--run", "c", "--resume", says=("checkpoints/c holds no", "the runs here are a, b (--run)"))
    refused(train_baseline, "--run", "a", "--resume", says=("checkpoints/a holds no baseline_last.pth",))
    assert "is done" in stage(train_lift, "--run", "a", "--resume", "--model", "no_t").output
    assert "is done" in stage(train_lift, "--run", "b", "--resume").output
    refused(train_lift, "--resume", "checkpoints/b", "--output_dir", "x", says=("leave --output_dir out",), status=2)
    for file in Path("checkpoints/b").glob("*_last*.pth"):
        file.write_bytes(b"no checkpoint")
    refused(train_lift, "--run", "b", "--resume", says=("single_t_last.pth is damaged",))


def test_a_stage_finds_the_checkpoint_of_a_run(stage, refused, elsewhere, tiny):
    settings = [*TINY, "--cache_dir", "cache", "--run", "mine", "--save_every", 1]
    stage(train_lift, *settings)
    sample = ["--num_images", 1, "--num_steps", 2, *HARDWARE]
    stage(generate_with_path_30, "--run", "mine", *sample)
    stage(generate_with_path_30, "--run", "mine", "--epoch", 1, *sample)
    assert sorted(folder.name for folder in Path("results/mine/samples").iterdir()) == [
        f"{LIFT}_{epoch}ep_raw_diagonal_2" for epoch in (1, 2)
    ]
    stage(export, "--run", "mine", "out")
    assert json.loads(Path("out/config.json").read_text())["epoch"] == 2
    stage(train_baseline, *settings)
    refused(
        generate_with_path_30, "--run", "mine", says=("several types; pass --model_type baseline or dual",), status=2
    )
    stage(generate_with_path_30, "--run", "mine", "--model_type", "baseline", *sample)
    refused(generate_with_path_30, "--run", "mine", "--model_type", "no_t", says=("has no no_t checkpoint",), status=2)
    flags = ("--run", "mine", "--model_type", "dual", "--epoch", 9)
    refused(generate_with_path_30, *flags, says=("has no lift_dual_timestep checkpoint of epoch 9",), status=2)
    refused(generate_with_path_30, "--run", "none", says=("the runs here are mine (--run)",), status=2)
    refused(generate_with_path_30, says=("--checkpoint FILE or --run NAME is required", "mine"), status=2)
    refused(generate_with_path_30, "--epoch", 2, says=("name that too",), status=2)
    both = ("--run", "mine", "--checkpoint", "x.pth")
    refused(generate_with_path_30, *both, says=("exclude each other",), status=2)


def test_scores_of_runs_and_files_go_to_their_own_tables(stage, refused, elsewhere, tiny):
    for run in ("a", "b"):
        stage(train_lift, *TINY, "--cache_dir", "cache", "--run", run, "--seed", len(run) + ord(run))
    flags = ["--metrics", "swd", "--num_images", 2, "--num_steps", 2, *HARDWARE, "--cache_dir", "cache"]
    stage(eval_fid_batch, "--run", "a", "b", *flags)
    assert [len(scores(run)) for run in ("a", "b")] == [2, 2]
    assert "scored already" in stage(eval_fid_batch, "--checkpoint", f"checkpoints/b/{LIFT}_2ep.pth", *flags).output
    stage(eval_fid_batch, "--run", "a", "b", *flags, "--output", "one.csv")
    assert len(Path("one.csv").read_text().splitlines()) == 3
    jobs = stage(eval_fid_batch, "--run", "a", "b", *flags, "--list_jobs").output.splitlines()
    assert [job.rpartition("--run ")[2].split()[0] for job in jobs] == ["a", "b"]
    refused(eval_fid_batch, "--run", "a", "--checkpoint_dir", "x", says=("exclude each other",), status=2)
    refused(eval_fid_batch, "--checkpoint", "x", "--epochs", 2, says=("beside --checkpoint",), status=2)
    refused(eval_fid_batch, *flags, says=("checkpoints has no baseline checkpoint", "the runs here are a, b (--run)"))


def test_a_plan_is_never_written_over(stage, refused, elsewhere, tiny):
    for run in ("a", "b"):
        stage(train_lift, *TINY, "--cache_dir", "cache", "--run", run, "--seed", ord(run))
        stage(compute_heatmap_30, "--run", run, *MAP, "--cache_dir", "cache")
    plan = ["--nfe", 4, "--bootstrap", 3]
    stage(plan_path, "--run", "a", *plan)
    folder = Path("results/a/plan_2ep_raw")
    before = list_files(folder)
    stage(plan_path, "--run", "b", *plan)
    stage(plan_path, "--run", "a", *plan, "--criterion", "dp_64", "--max_jump", 2)
    stage(plan_path, "--run", "a", *plan, "--kl_weight", 0, "--start", 900)
    assert {place.name for place in folder.parent.glob("plan_*")} == {
        "plan_2ep_raw", "plan_2ep_raw_dp_64_max_jump-2", "plan_2ep_raw_kl_weight-0.0_start-900"
    }  # fmt: skip
    into = ("--output", folder)
    for flags, says in (
        (("--run", "b", *plan), "weights_fingerprint, map_fingerprint"),
        (("--run", "a", *plan, "--criterion", "dp_total"), "criterion"),
        (("--run", "a", "--nfe", 5, "--bootstrap", 3), "nfe"),
        (("--run", "a", *plan, "--seed", 1), "seed"),
    ):
        refused(plan_path, *flags, *into, says=(f"{folder} holds results with another {says}", "--force"))
    (folder / "settings.json").unlink()  # As of an earlier version.
    refused(plan_path, "--run", "b", *plan, *into, says=("is of another plan", "--force"))
    stage(plan_path, "--run", "a", *plan)
    assert list_files(folder).keys() == before.keys()
    stage(plan_path, "--run", "b", "--nfe", 5, "--bootstrap", 0, *into, "--force")
    kinds = ("optimal", "diagonal", "cascade")
    made = {"settings.json", "costs.csv", "cost.png", "paths.png", *(f"schedule_{kind}_5.json" for kind in kinds)}
    assert {file.name for file in folder.iterdir()} == made


def test_no_output_takes_the_place_of_another_kind_of_file(stage, refused, elsewhere, tiny):
    stage(train_lift, *TINY, "--cache_dir", "cache", "--run", "a")
    file = f"checkpoints/a/{LIFT}_2ep.pth"
    refused(compute_heatmap_30, "--run", "a", *MAP, "--cache_dir", "cache", "--output", file, says=("not a heatmap",))
    forced = (*MAP, "--cache_dir", "cache", "--output", file, "--force")
    refused(compute_heatmap_30, "--run", "a", *forced, says=(file, "is a checkpoint, which no map replaces"))
    for module, *flags in (
        (make_figures, "samples", "A=x", "--output", file),
        (make_figures, "scores", "x.csv", "--output", "x.csv"),
        (report, "--output", "results/fid_results.csv"),
    ):
        refused(module, *flags, says=("--output", "does not end in"), status=2)


def test_couplings_of_another_model_are_not_written_over(stage, refused, elsewhere, tiny):
    flags = ["--weights", "raw", "--grid", 6, "--K", 1, "--heatmap_images", 2, "--coupling_images", 2, "--num_steps", 6]
    flags += [*HARDWARE, "--cache_dir", "cache"]
    for run in ("a", "b"):
        stage(train_lift, *TINY, "--cache_dir", "cache", "--run", run, "--seed", ord(run))
        stage(compute_cross_jacobian, "--run", run, *flags)
    kept = [Path(f"results/{run}/cross_jacobian_2ep.csv").read_text() for run in ("a", "b")]
    assert kept[0] != kept[1]
    stage(compute_cross_jacobian, "--checkpoint_dir", "checkpoints/a", *flags)  # The same place and model.
    into = ("--output_dir", "results/a")
    refused(compute_cross_jacobian, "--run", "b", *flags, *into, says=("another model at epoch 2", "--force"))
    stage(compute_cross_jacobian, "--run", "b", *flags, *into, "--force")
    assert Path("results/a/cross_jacobian_2ep.csv").read_text() == kept[1]


def test_a_plan_prints_what_can_be_pasted(stage, elsewhere, tiny):
    stage(train_lift, *TINY, "--cache_dir", "cache", "--run", "a")
    stage(compute_heatmap_30, "--run", "a", *MAP, "--cache_dir", "cache")
    said = stage(plan_path, "--run", "a", "--nfe", 3, 5, "--bootstrap", 0).output
    assert "docs/results.md" in said
    lines = iter(said.splitlines())
    found = 0
    for line in lines:
        if not line.strip().startswith("results/a/"):
            continue
        path = load_schedule(line.strip())
        log_snr = iter(path.provenance["log_snr"])
        printed = [next(lines).strip().partition(" = ") for _ in range(4)]
        assert [name for name, _, _ in printed] == ["t_64", "λ_64", "t_32", "λ_32"]
        values = [json.loads(text) for _, _, text in printed]
        assert list(zip(values[0], values[2], strict=True)) == list(path.points)
        for fine, coarse, point in zip(values[1], values[3], log_snr, strict=True):
            assert [fine, coarse] == pytest.approx(point, abs=0.005)
        found += 1
    assert found == 6
