"""eval_fid_batch.py on tiny models: jobs and rows, references, refusals, many processes at one table, and kills."""

import csv
import multiprocessing.forkserver
import os
import pkgutil
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import aggregate_results
import cli
import compute_heatmap_30
import eval_fid_batch
import generate_with_path_30
import train_lift
from checkpoint import build_model, load_model, read_checkpoint, save_checkpoint
from children import FORKS
from conftest import MEASURED, SCORED, list_files, results_of, run_stage
from data import fingerprint_array, load_images, split_holdout
from evaluation import jobs as jobs_module
from evaluation import scoring
from evaluation.feature_metrics import fid_infinity, inception_score, kernel_distance, precision_recall
from evaluation.inception import Features
from evaluation.pixel_metrics import sliced_wasserstein
from evaluation.results_table import METRIC_VALUES, RESULT_FIELDS, VALUE_FIELDS, read_rows
from evaluation.table_file import csv_line
from evaluation.training_columns import TRAINING_FIELDS
from paths import families
from paths.schedule_file import save_schedule
from planning.choice import PathSettings, choose_path
from planning.map_file import load_heatmap
from result_rows import EARLIER_HEADERS, table_text

SECONDS = 120  # Far longer than anything here takes, so that a busy machine fails no test.
JOBS = [(model_type, path_type, seed) for model_type, path_type in MEASURED for seed in ("42", "43")]


@pytest.fixture(scope="module", autouse=True)
def server():
    """The server of children starts here, from where it finds what it is to import."""
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def elsewhere(server, tmp_path, monkeypatch):
    """A stage that falls back on a default place writes it here."""
    monkeypatch.chdir(tmp_path)


class Colours:
    """Stands in for Inception: six features, the mean of each channel and of its square, and four logits."""

    fingerprint, num_features = "0123456789abcdef", 6

    def __init__(self, weights=None, device="cpu", resize="pytorch-fid"):
        self.resize = resize

    def __call__(self, pixels):
        x = pixels.float() / 255
        x = torch.cat([x, x**2], dim=1).mean(dim=(2, 3))  # [B, 6]
        pool = x if self.resize == "pytorch-fid" else x.sqrt()
        return Features(pool, 9 * pool[:, 1:5])


def colours(pixels):
    x = pixels / 255
    return np.concatenate([x, x**2], axis=1).mean(axis=(2, 3))  # [N, 6]


def moments(features):
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet(mean_1, cov_1, mean_2, cov_2):
    root = scipy.linalg.sqrtm(cov_1 @ cov_2).real
    return ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(jobs_module, "load_inception", Colours)


@pytest.fixture
def no_sampling(monkeypatch):
    """A test in which an image is made fails."""
    monkeypatch.setattr(jobs_module, "generate", lambda *args, **kwargs: pytest.fail("images were made"))


def measured(row):
    return {name: value for name, value in row.items() if name not in ("seconds", "date")}


def images_in(folder):
    """Pixels of generated files, uint8 [N, C, R, R]."""
    files = sorted(Path(folder).glob("[0-9]*.png"))
    return np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])


def save_folder(folder, pixels):
    folder.mkdir()
    for k, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0)[..., : 3 if len(image) == 3 else 1].squeeze()).save(
            folder / f"{k}.png"
        )
    return folder


def lift_flags(run, output, *flags):
    return [*run.eval_flags(output), "--model_type", "lift", *flags]


@pytest.fixture(scope="module")
def held_out_run(stage, tiny, run, tmp_path_factory):
    """The folder of a LIFT model trained on eight of twelve images."""
    folder = tmp_path_factory.mktemp("holdout")
    stage(train_lift, *tiny(folder), "--cache_dir", run.cache, "--epochs", 1, "--holdout", 4)
    return folder / "checkpoints"


# Jobs and rows


def test_every_job_has_one_row(run, table):
    with open(table, newline="") as stream:
        assert next(csv.reader(stream)) == list(RESULT_FIELDS)
    rows = read_rows(table)
    assert [(row["model_type"], row["path_type"], row["seed"]) for row in rows] == JOBS
    images = load_images("synthetic", 16, run.cache, limit=12)
    for row in rows:
        checkpoint = run.baseline if row["model_type"] == "baseline" else run.lift
        assert row["checkpoint"] == checkpoint.name
        assert row["checkpoint_fingerprint"] == load_model(checkpoint).fingerprint
        assert row["reference_fingerprint"] == images.fingerprint
        expected = {"weights": "raw", "nfe": "4", "num_images": "12", "epoch": "2", "dataset": "synthetic"}
        expected |= {"metric": "swd", "metric_features": "swd-7x7-16", "resize": "none", "precision": "fp32"}
        expected |= {"reference": "train", "reference_images": "12", "fid": "", "swd_64": "", "swd_32": ""}
        # What was trained: `tiny` of conftest, with the flags of `run`.
        loaded = load_model(checkpoint)
        expected |= {"solver": "ddim eta 0 clean", "preset": "published", "process": "vp cosine_clipped"}
        expected |= {"loss_weights": "[1]" if loaded.model.num_scales == 1 else "[1,1]", "prediction": "epsilon"}
        expected |= {"lr": "0.003", "ema_decay": "0.5", "training_images": "12", "training_data": images.fingerprint}
        expected |= {"images_seen": str(loaded.config["step"] * loaded.config["batch_size"]), "resolution": "16"}
        expected |= {
            "run": loaded.config.get("run") or "",
            "training_seed": "42",
            "min_snr_gamma": "none",
            "flip": "no",
        }
        assert {name: row[name] for name in expected} == expected
        assert all(row[name] for name in TRAINING_FIELDS if name != "run")
        assert row["swd"] == row["swd_16"] and float(row["swd"]) > 0
    assert len({row["swd"] for row in rows}) == len(rows)
    assert len({row["path_fingerprint"] for row in rows}) == 3


@pytest.mark.parametrize(("path_type", "model_type"), [("baseline", "baseline"), ("dp_64", "dual")])
def test_the_score_is_that_of_the_generated_files(stage, run, table, tmp_path, path_type, model_type):
    stage(generate_with_path_30, *run.generate_flags(tmp_path / "samples", path_type, 12), "--batch_size", 5)
    expected = sliced_wasserstein(run.images(), images_in(tmp_path / "samples"))[16]
    kind = path_type.replace("baseline", "diagonal")
    rows = {(row["model_type"], row["path_type"], row["seed"]): row for row in read_rows(table)}
    assert float(rows[model_type, kind, "42"]["swd"]) == pytest.approx(expected, abs=1e-3)


def test_scored_jobs_are_skipped_unless_forced(stage, run, table, tmp_path):
    file = tmp_path / "scores.csv"
    shutil.copy(table, file)
    before = file.read_bytes()
    ended = stage(eval_fid_batch, *run.eval_flags(file), *SCORED, "--batch_size", 5)
    assert ended.output.count("scored already") == 6 and file.read_bytes() == before
    ended = stage(eval_fid_batch, *run.eval_flags(file), *SCORED, "--seeds", 43, 44)
    assert ended.output.count("scored already") == 3 and len(read_rows(file)) == 9
    stage(eval_fid_batch, *run.eval_flags(file), *SCORED, "--seeds", 42, "--model_type", "lift", "--force")
    rows = read_rows(file)
    assert len(rows) == 11
    assert [measured(row) for row in rows[9:]] == [measured(rows[k]) for k in (2, 4)]


@pytest.mark.parametrize("width", [35, 37, 38])
def test_jobs_scored_by_an_earlier_version_are_skipped(stage, run, table, tmp_path, width):
    file = tmp_path / "scores.csv"
    file.write_text(table_text(EARLIER_HEADERS[width].split(","), read_rows(table)))
    before = file.read_bytes()
    ended = stage(eval_fid_batch, *run.eval_flags(file), *SCORED)
    assert ended.output.count("scored already") == 6 and file.read_bytes() == before
    stage(eval_fid_batch, *run.eval_flags(file), *SCORED, "--seeds", 43, 44)
    assert file.read_bytes().startswith(before)
    # The new seed says of the old ones how they were trained.
    output = stage(aggregate_results, "--input", file, "--output", tmp_path / "t").output
    assert "not recorded" not in output and output.count("(3) |") >= 3
    # In brief the best of each model and path is printed, and all is written.
    page = (tmp_path / "t.md").read_text()
    brief = stage(aggregate_results, "--input", file, "--output", tmp_path / "t", "--brief").output
    assert (tmp_path / "t.md").read_text() == page and len(brief) < len(page) / 2
    assert brief.count("## ") == 1 and brief.count("\n| ") == 2 + 3 and "| Baseline | raw | 2 |" in brief


def test_a_table_that_a_spreadsheet_saved_is_refused_before_anything_is_computed(
    refused, run, table, tmp_path, no_sampling, monkeypatch
):
    monkeypatch.setattr(jobs_module, "load_model", lambda *args: pytest.fail("a model was loaded"))
    file = tmp_path / "scores.csv"
    file.write_text(table_text(RESULT_FIELDS, read_rows(table), delimiter=";", lineterminator="\r\n"), newline="")
    says = (f"{file} was saved by a spreadsheet with semicolons", "save it as CSV", "--output")
    refused(eval_fid_batch, *lift_flags(run, file, "--seeds", 77), says=says)


def test_other_data_than_were_trained_on_are_not_counted(stage, run, tmp_path):
    stage(eval_fid_batch, *lift_flags(run, tmp_path / "scores.csv", "--dataset", "synthetic", "--limit", 13))
    [row] = read_rows(tmp_path / "scores.csv")
    assert row["reference_images"] == "13" and row["training_images"] == ""
    assert row["training_data"] == load_model(run.lift).config["data_fingerprint"]


def test_two_runs_of_equal_weights_have_a_row_each(stage, run, tmp_path):
    file, content = tmp_path / "scores.csv", read_checkpoint(run.lift)
    for name in ("first", "second", "second"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        save_checkpoint(folder / run.lift.name, content | {"config": content["config"] | {"run": name}})
        ended = stage(eval_fid_batch, *lift_flags(run, file, "--checkpoint_dir", folder))
    assert "scored already" in ended.output
    assert [row["run"] for row in read_rows(file)] == ["first", "second"]


def test_only_the_metrics_that_are_missing_are_added(stage, run, table, tmp_path, stand_in):
    file = tmp_path / "scores.csv"
    shutil.copy(table, file)
    flags = [*run.eval_flags(file), *SCORED, "--metrics", "swd", "nn", "fid", "--seeds", 42]
    output = stage(eval_fid_batch, *flags, "--cache_dir", "cache").output
    assert "swd" not in output and output.count(": nn_distance ") == output.count(": fid ") == 3
    rows = read_rows(file)
    assert [row["metric"] for row in rows] == ["swd"] * 6 + ["nn", "fid"] * 3
    for row in rows:
        # A row has the values of its metric alone.
        assert {name for name in VALUE_FIELDS if row[name]} <= set(METRIC_VALUES[row["metric"]])


def test_other_settings_are_other_rows(stage, run, table, tmp_path):
    file = tmp_path / "scores.csv"
    shutil.copy(table, file)
    flags = lift_flags(run, file)
    for change in (["--ema"], ["--num_images", 11], ["--num_steps", 5], ["--eta", 1], ["--end", "t0"]):
        ended = stage(eval_fid_batch, *flags, *change)
        assert "scored already" not in ended.output
    rows = read_rows(file)
    assert len(rows) == 11 and rows[6]["weights"] == "ema" and rows[7]["num_images"] == "11"


EVERYTHING = ["--model_type", "lift", "baseline", "--path_type", "dp_64", "diagonal", "--weights", "raw", "ema"]
EVERYTHING += ["--num_steps", 5, 4, "--seeds", 43, 42]


def test_jobs_are_checkpoints_by_weights_paths_steps_and_seeds(stage, run, tmp_path):
    for epoch in (10, 9):
        for model in ("baseline", "lift_dual_timestep"):
            (tmp_path / f"{model}_{epoch}ep.pth").touch()
    (tmp_path / "lift_dual_timestep_last.pth").touch()
    flags = [*run.eval_flags("scores.csv"), *EVERYTHING, "--checkpoint_dir", tmp_path, "--list_jobs"]
    names = ("--model_type", "--epochs", "--weights", "--path_type", "--num_steps", "--seeds")
    listed = []
    for line in stage(eval_fid_batch, *flags).output.splitlines():
        words = shlex.split(line)
        assert tuple(words[-12::2]) == names
        listed.append(tuple(words[-11::2]))
    grids = [
        (("dual",), ("9", "10"), ("raw", "ema"), ("dp_64", "diagonal"), ("5", "4"), ("43", "42")),
        # A model with one clock has the diagonal only.
        (("baseline",), ("9", "10"), ("raw", "ema"), ("diagonal",), ("5", "4"), ("43", "42")),
    ]
    assert listed == [job for grid in grids for job in product(*grid)] and len(listed) == 48
    assert len(stage(eval_fid_batch, *flags, "--epochs", 10).output.splitlines()) == 24
    # What is named twice is one job.
    twice = ["--seeds", 42, 42, "--weights", "ema", "ema", "--model_type", "lift", "dual"]
    assert len(stage(eval_fid_batch, *flags, *twice, "--ema").output.splitlines()) == 8


def test_listed_jobs_give_the_same_rows(stage, run, tmp_path):
    flags = [*EVERYTHING, "--metrics", "swd", "nn", "--K", 1, "--heatmap_images", 2]
    flags += ["--heatmap_dir", tmp_path / "maps of $mine"]
    commands = stage(eval_fid_batch, *run.eval_flags(tmp_path / "one by one.csv"), *flags, "--list_jobs").output
    commands = [shlex.split(line) for line in commands.splitlines()]
    assert len(commands) == 24 and list(tmp_path.iterdir()) == []
    assert all(command[:2] == ["python", "eval_fid_batch.py"] for command in commands)
    # In any order.
    for command in reversed(commands):
        stage(eval_fid_batch, *command[2:])
    stage(eval_fid_batch, *run.eval_flags(tmp_path / "at once.csv"), *flags)
    at_once, one_by_one = (read_rows(tmp_path / f"{name}.csv") for name in ("at once", "one by one"))
    assert len(at_once) == 48
    expected = [at_once[k + j] for k in range(46, -1, -2) for j in (0, 1)]
    assert [measured(row) for row in one_by_one] == [measured(row) for row in expected]


def test_a_listed_job_has_one_kind_of_weights_whatever_the_flags(stage, run, tmp_path):
    output = stage(eval_fid_batch, *lift_flags(run, tmp_path / "scores.csv", "--ema", "--list_jobs")).output
    [command] = [shlex.split(line) for line in output.splitlines()]
    stage(eval_fid_batch, *command[2:])
    assert [row["weights"] for row in read_rows(tmp_path / "scores.csv")] == ["ema"]


def test_multi_seed_means_the_published_seeds(stage, run, tmp_path):
    output = stage(eval_fid_batch, *lift_flags(run, tmp_path / "scores.csv", "--multi-seed", "--list_jobs")).output
    assert re.findall(r"--seeds (\d+)$", output, re.MULTILINE) == ["42", "43", "44", "45", "46"]


def test_a_missing_heatmap_is_computed_as_the_flags_say(stage, run, tmp_path):
    flags = ["--path_type", "dp_64", "diagonal", "--weights", "raw", "ema", "--heatmap_dir", tmp_path]
    flags += ["--K", 2, "--heatmap_images", 3, "--grid", 5, "--grid_spacing", "uniform_log_snr", "--num_steps", 4]
    output = stage(eval_fid_batch, *lift_flags(run, tmp_path / "scores.csv"), *flags).output
    assert len(re.findall(r" dp_64 4 steps seed 42: computing .*/heatmap_5_2ep(_ema)?\.pth first", output)) == 2
    assert len(read_rows(tmp_path / "scores.csv")) == 4
    for weights, suffix in (("raw", ""), ("ema", "_ema")):
        content = load_heatmap(tmp_path / f"heatmap_5_2ep{suffix}.pth")
        assert (content["weights"], content["K"], content["batch"]) == (weights, 2, 3)
        assert (content["grid"], content["grid_spacing"]) == (5, "uniform_log_snr")
        assert content["data_fingerprint"] == load_images("synthetic", 16, run.cache, limit=12).fingerprint
    # It is the map that compute_heatmap_30.py makes, which keeps it.
    flags = ["--grid", 5, "--grid_spacing", "uniform_log_snr", "--K", 2, "--num_images", 3, "--num_steps", 4]
    file = tmp_path / "heatmap_5_2ep.pth"
    with mock.patch.object(compute_heatmap_30, "draw"):
        assert "is kept" in stage(compute_heatmap_30, *run.heatmap_flags(file), *flags).output


# Path families, models that read a coarse image they do not predict, and regimes


def save_model(file, like, **changes):
    """A model of random weights whose config is that of the checkpoint `like`, but for the changes."""
    content = read_checkpoint(like)
    config = content["config"] | changes
    torch.manual_seed(0)
    state = build_model(config).state_dict()
    file.parent.mkdir(exist_ok=True)
    save_checkpoint(file, content | {"config": config, "model_state": state, "ema_state": None})
    return file


@pytest.fixture(scope="module")
def others(run, tmp_path_factory):
    """Folder of models of other types, and of a dual one whose clocks were one in training."""
    folder = tmp_path_factory.mktemp("others")
    for model_type in ("single_t", "no_t", "shared_t"):
        save_model(folder / f"{model_type}_2ep.pth", run.lift, model_type=model_type, t_pairs="same")
    save_model(folder / "single_t_2ep.pth", run.lift, model_type="single_t")
    save_model(folder / "lift_dual_timestep_2ep.pth", run.lift, t_pairs="same")
    return folder


FEEDS = ["--coarse_from", "x0", "noisy"]


def listed(stage, run, *flags):
    """Notes, and the flags --model_type, --path_type, --num_steps and --coarse_from of the jobs that are listed."""
    ended = stage(eval_fid_batch, *run.eval_flags("scores.csv"), *flags, "--list_jobs")
    jobs = []
    for line in ended.output.splitlines():
        words = shlex.split(line)
        # What comes last counts.
        last = {word: words[k + 1] for k, word in enumerate(words[:-1]) if word.startswith("--")}
        own = last["--coarse_from"] if words[-2] == "--coarse_from" else None
        jobs.append((last["--model_type"], last["--path_type"], last["--num_steps"], own))
    return ended.notes, jobs


def test_jobs_of_models_that_read_a_coarse_image_have_a_feed(stage, run, others):
    shutil.copy(run.baseline, others)
    flags = ["--checkpoint_dir", others, "--model_type", "baseline", "lift", "shared_t", "single_t", "no_t"]
    types = ["diagonal", "dp_64", "kl", "cascade:2.0,1", "shift:-1", "cascade:best"]
    notes, jobs = listed(stage, run, *flags, "--path_type", *types, *FEEDS, "--num_steps", 4, 3)
    names = ["diagonal", "dp_64", "kl", "cascade:2,1", "shift:-1", "cascade:best"]
    expected = [("baseline", "diagonal", None)]
    expected += [("dual", name, None) for name in names]
    expected += [("shared_t", "diagonal", None)]
    own = [name for name in names if name not in ("kl", "cascade:best")]
    expected += [(m, name, feed) for m in ("single_t", "no_t") for name in own for feed in ("x0", "noisy")]
    assert jobs == [(m, name, n, feed) for m, name, feed in expected for n in ("4", "3")]
    # What one clock cannot follow goes without saying, where others can.
    assert notes.count("note: left out: ") == 4 and "baseline" not in notes and "shared_t" not in notes
    for text in ("--path_type kl counts the error of the coarse prediction, which a 'no_t' model", "cascade:best"):
        assert text in notes
    notes, jobs = listed(
        stage, run, *flags[:3], "shared_t", "--path_type", "diagonal", "lead:1", "--checkpoint_dir", others
    )
    assert jobs == [("shared_t", "diagonal", "4", None)] and "lead:1 needs a model with two clocks" in notes


def test_a_schedule_is_one_job_whatever_the_number_of_steps(stage, run, others, tmp_path):
    path = families.lead(families.diagonal(3), 1)
    file = tmp_path / "my plan.json"
    save_schedule(path, file, load_model(run.lift).scheduler.log_snr.numpy(), solver={"name": "ddim"})
    flags = ["--model_type", "lift", "single_t", "baseline", "--path_type", f"schedule:{file}", "diagonal"]
    shutil.copy(run.baseline, others)
    _, jobs = listed(stage, run, "--checkpoint_dir", others, *flags, "--num_steps", 4, 5)
    both = [("4", None), ("5", None)]
    name = f"schedule:{file}"
    assert jobs == [
        ("dual", name, "3", None),
        *(("dual", "diagonal", *end) for end in both),
        ("single_t", name, "3", "x0"),
        *(("single_t", "diagonal", n, "x0") for n, _ in both),
        *(("baseline", "diagonal", *end) for end in both),
    ]
    stage(eval_fid_batch, *run.eval_flags("scores.csv"), "--model_type", "lift", "--path_type", name)
    [row] = read_rows("scores.csv")
    assert (row["path_type"], row["nfe"], row["path_fingerprint"]) == (name, "3", path.fingerprint())


def test_ablations_have_a_row_for_every_feed_and_path(stage, run, others, tmp_path):
    flags = ["--checkpoint_dir", others, "--model_type", "single_t", "--path_type", "diagonal", "dp_64"]
    flags += ["--heatmap_dir", tmp_path / "maps", "--K", 1, "--heatmap_images", 2]
    ended = stage(eval_fid_batch, *run.eval_flags("at_once.csv"), *flags, *FEEDS)
    assert list_files(tmp_path / "maps").keys() == {"heatmap_4_single_t_2ep.pth"}
    rows = read_rows("at_once.csv")
    keys = [(path_type, feed) for path_type in ("diagonal", "dp_64") for feed in ("x0", "noisy")]
    assert [(row["path_type"], row["coarse_from"]) for row in rows] == keys
    assert len({row["swd"] for row in rows}) == len({row["path_fingerprint"] for row in rows}) == 4
    loaded = load_model(others / "single_t_2ep.pth")
    for row, (path_type, feed) in zip(rows, keys, strict=True):
        path = choose_path(PathSettings(), path_type, 4, loaded, tmp_path / "maps/heatmap_4_single_t_2ep.pth")
        assert row["path_fingerprint"] == f"{path.fingerprint()}-{feed}"
        assert (row["model_type"], row["regime"], row["nfe"]) == ("single_t", "independent", "4")
        # It is the score of the files of the same feed.
        words = ["--checkpoint", others / "single_t_2ep.pth", "--path_type", path_type, "--coarse_from", feed]
        words += ["--heatmap", tmp_path / "maps/heatmap_4_single_t_2ep.pth", "--num_images", 12, "--num_steps", 4]
        stage(generate_with_path_30, *words, "--device", "cpu", "--precision", "fp32")
        folder = results_of("dual") / f"samples/single_t_2ep_raw_{path_type}_4_{feed}"
        expected = sliced_wasserstein(run.images(), images_in(folder))[16]
        assert float(row["swd"]) == pytest.approx(expected, abs=1e-3)
    said = f"single_t_2ep.pth raw dp_64 coarse from noisy 4 steps seed 42: swd level 16 px {float(rows[3]['swd']):.5g}"
    assert said in re.sub("swd level 64.*?, swd level 32.*?, ", "", ended.output)
    # One by one the same, and skipped when there.
    output = stage(eval_fid_batch, *run.eval_flags("one_by_one.csv"), *flags, *FEEDS, "--list_jobs").output
    for command in map(shlex.split, output.splitlines()):
        stage(eval_fid_batch, *command[2:])
    assert [measured(row) for row in read_rows("one_by_one.csv")] == [measured(row) for row in rows]
    ended = stage(eval_fid_batch, *run.eval_flags("one_by_one.csv"), *flags, *FEEDS)
    assert ended.output.count("scored already") == 4 and "warning" not in ended.notes


def test_models_that_predict_what_they_read_have_no_feed(stage, run, table, tmp_path):
    file = tmp_path / "scores.csv"
    shutil.copy(table, file)
    ended = stage(eval_fid_batch, *run.eval_flags(file), *SCORED, "--coarse_from", "noisy", "x0")
    assert ended.output.count("scored already") == 6
    assert {row["coarse_from"] for row in read_rows(file)} == {""}
    assert {(row["model_type"], row["regime"]) for row in read_rows(file)} == {
        ("baseline", ""),
        ("dual", "independent"),
    }


def test_families_are_scored_like_any_path(stage, run, tmp_path):
    types = ["cascade:2,3", "cascade:best", "shift:1", "lead:1", "heuristic:0.8"]
    stage(eval_fid_batch, *lift_flags(run, tmp_path / "scores.csv", "--path_type", *types))
    rows = read_rows(tmp_path / "scores.csv")
    assert [row["path_type"] for row in rows] == types
    assert len({row["swd"] for row in rows}) == len({row["path_fingerprint"] for row in rows}) == 5
    assert {row["nfe"] for row in rows} == {"4"}
    loaded = load_model(run.lift)
    for row in rows:
        path = choose_path(PathSettings(), row["path_type"], 4, loaded, run.heatmap)
        assert row["path_fingerprint"] == path.fingerprint()


def test_a_path_off_the_regime_of_training_is_warned_of_once(stage, run, others, tmp_path):
    flags = ["--checkpoint_dir", others, "--model_type", "lift", "--path_type", "lead:2", "diagonal", "cascade:inf"]
    seeds = ["--seeds", 1, 2]
    ended = stage(eval_fid_batch, *run.eval_flags("scores.csv"), *flags, *seeds)
    warnings = [line for line in ended.notes.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    for kind, line in zip(("lead", "cascade"), warnings, strict=True):
        assert "lift_dual_timestep_2ep.pth" in line and "--t_pairs same" in line and f"path {kind}" in line
    assert {row["regime"] for row in read_rows("scores.csv")} == {"same"}
    # What is scored needs no warning.
    assert "warning" not in stage(eval_fid_batch, *run.eval_flags("scores.csv"), *flags, *seeds).notes
    words = ["--checkpoint", others / "lift_dual_timestep_2ep.pth", "--num_images", 1, "--num_steps", 4]
    words += ["--device", "cpu", "--precision", "fp32", "--path_type"]
    assert "warning: " in stage(generate_with_path_30, *words, "lead:2").notes
    assert "warning: " not in stage(generate_with_path_30, *words, "diagonal").notes
    # The model of one clock was trained as it is sampled.
    ended = stage(eval_fid_batch, *run.eval_flags("scores.csv"), *flags[:3], "shared_t", "--checkpoint_dir", others)
    assert "warning" not in ended.notes and read_rows("scores.csv")[-1]["regime"] == "same"


# Metrics of Inception features


def test_feature_metrics_are_those_of_the_generated_files(stage, run, tmp_path, stand_in):
    names = ["fid", "fid_infinity", "kid", "is", "pr", "nn", "swd"]
    flags = ["--num_images", 120, "--cache_dir", tmp_path / "cache", "--metrics"]
    # The sliced distance would need as many training images.
    stage(eval_fid_batch, *lift_flags(run, "scores.csv"), *flags, *names[:-1], "--batch_size", 50)
    stage(generate_with_path_30, *run.generate_flags("samples", "diagonal", 120), "--batch_size", 50)
    fake, real = colours(images_in("samples")), colours(run.images())
    logits = 9 * fake[:, 1:5]
    expected = {
        "fid": (frechet(*moments(real), *moments(fake)),),
        "fid_infinity": (fid_infinity(fake, *moments(real)).value,),
        "kid": kernel_distance(fake, real),
        "is": inception_score(logits),
        "pr": precision_recall(fake, real),
    }
    rows = {row["metric"]: row for row in read_rows("scores.csv")}
    assert list(rows) == names[:-1] and expected["fid"][0] > 0.01
    for metric, values in expected.items():
        row = rows[metric]
        assert [float(row[name]) for name in METRIC_VALUES[metric]] == pytest.approx(values, abs=2e-5)
        assert {name for name in VALUE_FIELDS if row[name]} == set(METRIC_VALUES[metric])
        assert row["metric_features"] == "inception-0123456789abcdef" and row["resize"] == "pytorch-fid"
        assert row["num_images"] == "120" and row["reference_images"] == "12"
    assert rows["nn"]["metric_features"] == "pixels" and float(rows["nn"]["nn_distance"]) > 0
    cached = sorted(file.name.split("_")[0] for file in Path("cache").glob("*_0123456789abcdef_*.np?"))
    assert cached == ["features", "fid"]
    ended = stage(eval_fid_batch, *lift_flags(run, "scores.csv"), *flags, *names[:-1])
    assert "scored already" in ended.output and len(read_rows("scores.csv")) == 6


def test_another_filter_makes_another_row(stage, run, tmp_path, stand_in):
    flags = lift_flags(run, "scores.csv", "--metrics", "fid", "nn", "--cache_dir", tmp_path / "cache")
    for resize in ("pytorch-fid", "clean"):
        stage(eval_fid_batch, *flags, "--resize", resize)
    rows = read_rows("scores.csv")
    assert [(row["metric"], row["resize"]) for row in rows] == [
        ("fid", "pytorch-fid"), ("nn", "none"), ("fid", "clean")
    ]  # fmt: skip
    assert rows[0]["fid"] != rows[2]["fid"]
    different = {name for name in rows[0] if rows[0][name] != rows[2][name]} - {"seconds", "date"}
    assert different == {"resize", "fid"}


def test_few_images_are_noted_once(stage, run, held_out_run, tmp_path, stand_in):
    # Models of different training images, so that each has a reference of its own.
    shutil.copytree(held_out_run, tmp_path / "checkpoints")
    shutil.copy(run.baseline, tmp_path / "checkpoints")
    flags = [*run.eval_flags("scores.csv"), "--checkpoint_dir", "checkpoints", "--num_images", 8, "--metrics"]
    ended = stage(eval_fid_batch, *flags, "fid", "kid", "--cache_dir", tmp_path / "cache")
    assert ended.notes.count("note: 8 images are fewer than the 2048 features") == 1
    assert len({row["reference_fingerprint"] for row in read_rows("scores.csv")}) == 2
    assert "note:" not in stage(eval_fid_batch, *flags, "swd").notes


# References


def test_references_are_named_counted_and_compared_with(stage, run, held_out_run, tmp_path, stand_in):
    images = load_images("synthetic", 16, run.cache, limit=12)
    training, held_out = split_holdout(images, 4)
    other = np.random.default_rng(0).integers(0, 256, (7, 3, 16, 16), dtype=np.uint8)
    mean, cov = moments(colours(other))
    save_folder(tmp_path / "folder", other)
    # As generate_with_path_30.py leaves it.
    Image.new("RGB", (40, 9)).save(tmp_path / "folder/grid.png")
    np.savez(tmp_path / "counted.npz", mu=mean, sigma=cov, n=7)
    np.savez(tmp_path / "file.npz", mu=mean, sigma=cov)
    flags = lift_flags(run, "scores.csv", "--metrics", "fid", "--checkpoint_dir", held_out_run)
    flags += ["--cache_dir", tmp_path / "cache", "--num_images", 9]
    for reference in ("train", "holdout", "folder", "counted.npz", "file.npz"):
        stage(eval_fid_batch, *flags, "--reference", reference)
    flags = run.generate_flags("samples", "diagonal", 9)
    stage(generate_with_path_30, *flags, "--checkpoint", held_out_run / "lift_dual_timestep_1ep.pth")
    fake = moments(colours(images_in("samples")))
    rows = {row["reference"]: row for row in read_rows("scores.csv")}
    expected = {
        "train": (training.pixels, "8", training.fingerprint),
        "holdout": (held_out.pixels, "4", held_out.fingerprint),
        "folder": (other, "7", fingerprint_array(other)),
        "counted.npz": (other, "7", None),
    }
    # The same numbers, whether the file says of how many images they are or not, and so one row.
    assert list(rows) == list(expected)
    for name, (pixels, count, fingerprint) in expected.items():
        row = rows[name]
        assert (row["reference_images"], row["dataset"]) == (count, "synthetic")
        assert float(row["fid"]) == pytest.approx(frechet(*fake, *moments(colours(pixels))), abs=2e-5)
        assert fingerprint is None or row["reference_fingerprint"] == fingerprint
    assert len({row["reference_fingerprint"] for row in rows.values()}) == 4
    assert rows["folder"]["fid"] == rows["counted.npz"]["fid"] != rows["train"]["fid"]


def test_images_are_as_many_as_the_reference_has(stage, run, held_out_run, tmp_path, stand_in):
    np.savez(tmp_path / "file.npz", mu=np.full(6, 0.5), sigma=np.eye(6), n=5)
    flags = lift_flags(run, "scores.csv", "--metrics", "fid", "--checkpoint_dir", held_out_run)
    for reference, count in (("train", 8), ("holdout", 4), ("file.npz", 5)):
        stage(eval_fid_batch, *flags, "--reference", reference, "--cache_dir", tmp_path / "cache")
        assert read_rows("scores.csv")[-1]["num_images"] == str(count)


def test_nearest_neighbours_are_among_the_training_images_whatever_the_reference(stage, run, held_out_run, tmp_path):
    flags = lift_flags(run, "scores.csv", "--metrics", "nn", "--checkpoint_dir", held_out_run, "--num_images", 4)
    for reference in ("train", "holdout"):
        stage(eval_fid_batch, *flags, "--reference", reference)
    first, second = read_rows("scores.csv")
    names = METRIC_VALUES["nn"]
    assert [first[name] for name in names] == [second[name] for name in names]


def test_a_holdout_may_be_named_for_a_model_that_was_trained_without(stage, run, tmp_path, stand_in):
    flags = lift_flags(run, "scores.csv", "--metrics", "fid", "--reference", "holdout", "--holdout", 3)
    stage(eval_fid_batch, *flags, "--cache_dir", tmp_path / "cache")
    [row] = read_rows("scores.csv")
    assert (row["reference"], row["reference_images"]) == ("holdout", "3")


# Refusals


def bad_reference(name, tmp_path, run):
    """What is to be refused, made in `tmp_path`."""
    file = tmp_path / "file.npz"
    pixels = run.images()
    if name == "five features":
        np.savez(file, mu=np.zeros(5), sigma=np.eye(5), n=9)
    elif name == "no count":
        np.savez(file, mu=np.zeros(6), sigma=np.eye(6))
    elif name == "good":
        np.savez(file, mu=np.zeros(6), sigma=np.eye(6), n=9)
    elif name == "damaged":
        np.savez(file, mu=np.zeros(6), sigma=np.eye(6), n=9)
        file.write_bytes(file.read_bytes()[:-90])
    elif name == "lopsided":
        np.savez(file, mu=np.zeros(6), sigma=np.tri(6), n=9)
    elif name == "larger":
        return save_folder(tmp_path / "folder", np.repeat(np.repeat(pixels, 2, axis=2), 2, axis=3))
    elif name == "grey":
        return save_folder(tmp_path / "folder", pixels[:, :1])
    elif name == "three images":
        return save_folder(tmp_path / "folder", pixels[:3])
    elif name == "one image":
        return save_folder(tmp_path / "folder", pixels[:1])
    elif name == "missing":
        return tmp_path / "nowhere"
    else:
        return name
    return file


@pytest.mark.parametrize(
    ("reference", "flags", "says"),
    [
        ("five features", ["--metrics", "fid"], ("file.npz", "5 features", "gives 6")),
        ("no count", ["--metrics", "fid"], ("file.npz", "--num_images")),
        ("good", ["--metrics", "fid", "kid"], ("file.npz", "only fid and fid_infinity", "--reference")),
        ("good", ["--metrics", "pr"], ("file.npz", "only fid and fid_infinity", "--reference")),
        ("good", ["--metrics", "swd"], ("file.npz", "only fid and fid_infinity", "--reference")),
        ("damaged", ["--metrics", "fid"], ("file.npz", "damaged", "fetch it again")),
        ("lopsided", ["--metrics", "fid"], ("file.npz", "not symmetric", "fetch it again")),
        ("larger", ["--metrics", "fid"], ("0.png is 32x32 and not 16x16",)),
        ("grey", ["--metrics", "fid"], ("folder are grey", "in colour")),
        ("one image", ["--metrics", "fid", "--num_images", 9], ("at least two images",)),
        ("three images", ["--metrics", "pr", "--num_images", 9], ("pr needs at least 4", "has 3", "--metrics")),
        ("missing", ["--metrics", "fid"], ("nowhere", "a folder of images")),
        ("holdout", ["--metrics", "fid"], ("--reference holdout", "'synthetic'", "none were", "--holdout N")),
        ("train", ["--metrics", "fid_infinity", "--num_images", 99], ("fid_infinity", "100 images, not 99")),
        ("train", ["--metrics", "fid", "is", "--num_images", 9], ("metric is needs", "10 images, not 9")),
        ("train", ["--metrics", "pr", "--num_images", 3], ("metric pr needs", "4 images, not 3")),
    ],
)
def test_references_and_numbers_that_do_not_go_together_are_refused_before_sampling(
    refused, run, tmp_path, stand_in, no_sampling, reference, flags, says
):
    # All but the cache of this test is compared, to which a refused reference may add what was decoded of it.
    place = bad_reference(reference, tmp_path, run)
    flags = lift_flags(run, tmp_path / "scores.csv", "--reference", place, *flags)
    cache = tmp_path.parent / f"{tmp_path.name}_cache"
    refused(eval_fid_batch, *flags, "--cache_dir", cache, says=says, keeps=(run.folder,))


def test_a_damaged_cache_is_refused_before_sampling(stage, refused, run, tmp_path, stand_in, monkeypatch):
    flags = lift_flags(run, tmp_path / "scores.csv", "--metrics", "fid", "kid", "--cache_dir", tmp_path / "cache")
    stage(eval_fid_batch, *flags)
    monkeypatch.setattr(jobs_module, "generate", lambda *args, **kwargs: pytest.fail("images were made"))
    for name in ("fid_reference_*.npz", "features_*.npy"):
        [file] = Path("cache").glob(name)
        whole = file.read_bytes()
        file.write_bytes(whole[:50])
        refused(eval_fid_batch, *flags, "--seeds", 43, says=(file.name, "damaged", "delete it"))
        file.write_bytes(whole)
    # What is scored already needs none of it.
    file.write_bytes(whole[:50])
    assert "scored already" in stage(eval_fid_batch, *flags).output


def test_fid_without_weights_says_why_not(refused, run, tmp_path, monkeypatch):
    def offline(url, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    flags = [*run.eval_flags(tmp_path / "scores.csv"), "--model_type", "baseline", "--metrics", "fid"]
    says = ("FID needs the Inception weights", "could not be downloaded", "--inception_weights", "--metrics swd")
    refused(eval_fid_batch, *flags, says=says, keeps=(run.folder,))
    flags += ["--inception_weights", tmp_path / "none.pth"]
    refused(eval_fid_batch, *flags, says=(tmp_path / "none.pth",), keeps=(run.folder,))


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--num_images", 13], 1, ("13", "12", "--num_images from 1 to 12")),
        (["--epochs", 7], 1, ("no baseline checkpoint of epoch 7", "--checkpoint_dir")),
        (["--checkpoint_dir", "missing"], 1, ("missing has no baseline checkpoint",)),
        (["--model_type", "baseline", "--path_type", "dp_64"], 1, ("dp_64", "two clocks")),
        (["--model_type", "baseline", "--path_type", "cascade:2"], 1, ("cascade:2", "two clocks", "diagonal")),
        (["--path_type", "cascade:fast"], 2, ("'cascade:fast'", "LOG_SNR[,STEPS] or best")),
        (["--path_type", "zigzag"], 2, ("'zigzag'", "dp_total", "heuristic:")),
        (["--path_type", "schedule:none.json"], 1, ("none.json does not exist",)),
        (["--coarse_from", "clean"], 2, ("'clean'", "noisy")),
        (["--model_type", "lift", "--path_type", "cascade:2,9"], 1, ("9 of 4 steps",)),
        (["--model_type", "lift", "--path_type", "dp_64", "--grid", 30], 1, ("4 steps", "29 cells", "at least 6")),
        (["--model_type", "lift", "--path_type", "dp_64", "--num_steps", 7], 1, ("7 steps", "lower num_steps")),
        (["--model_type", "unet"], 2, ("'unet'",)),
        (["--weights", "both"], 2, ("'both'", "ema")),
        (["--metrics", "beauty"], 2, ("'beauty'", "fid_infinity")),
        (["--resize", "nearest"], 2, ("'nearest'", "bicubic-antialias")),
        (["--num_steps", 4, 0], 2, ("--num_steps", "'0'")),
        (["--list"], 2, ("--list",)),
        (["--device", "cuda:77"], 1, ("--device cuda:77",)),
        (["--dataset", "nowhere/to/be/found"], 1, ("nowhere/to/be/found", "not a folder")),
        (["--holdout", 12], 1, ("--holdout 12", "1 to 11")),
        (["--seeds", "forty"], 2, ("--seeds", "'forty'")),
        (["--seeds", -1], 2, ("--seeds", "'-1'")),
    ],
)
def test_scoring_refuses(refused, run, tmp_path, no_sampling, flags, status, says):
    flags = [*run.eval_flags(tmp_path / "scores.csv"), *flags]
    refused(eval_fid_batch, *flags, says=says, status=status, keeps=(run.folder,))


def test_a_heatmap_of_other_weights_is_left_alone(refused, run, tmp_path, no_sampling):
    shutil.copy(run.heatmap, tmp_path / "heatmap_4_2ep_ema.pth")
    flags = lift_flags(run, tmp_path / "scores.csv", "--path_type", "dp_64", "--ema", "--heatmap_dir", tmp_path)
    refused(eval_fid_batch, *flags, says=("heatmap_4_2ep_ema.pth", "other weights than the ema ones", "--force"))


def test_a_foreign_table_is_left_alone(refused, run, tmp_path, no_sampling):
    file = tmp_path / "scores.csv"
    file.write_text("name,score\na,1\n")
    flags = [*run.eval_flags(file), "--model_type", "baseline"]
    refused(eval_fid_batch, *flags, says=(file, "not a results table"))
    refused(aggregate_results, "--input", file, "--output", tmp_path / "t", says=(file, "not a results table"))


def test_a_table_edited_into_nonsense_is_refused_before_anything_is_computed(
    refused, run, table, tmp_path, no_sampling, monkeypatch
):
    monkeypatch.setattr(jobs_module, "load_model", lambda *args: pytest.fail("a model was loaded"))
    lines = table.read_text().splitlines(keepends=True)
    fields = {name: RESULT_FIELDS.index(name) for name in ("swd", "seed", "metric", "weights", "fid")}
    file = tmp_path / "scores.csv"
    for column, text in (("swd", "about 3"), ("seed", "4x"), ("metric", "fdi"), ("weights", "EMA"), ("fid", "3.1")):
        [words] = csv.reader([lines[4]])
        words[fields[column]] = text
        file.write_text("".join([*lines[:4], csv_line(words), *lines[5:]]))
        flags = lift_flags(run, file, "--seeds", 77)
        refused(eval_fid_batch, *flags, says=(f"{file} line 5, column {column}: '{text}'", "correct it or delete"))


def test_a_line_cut_short_is_scored_again(stage, run, table, tmp_path):
    file = tmp_path / "scores.csv"
    file.write_bytes(table.read_bytes()[:-30])
    with pytest.warns(UserWarning, match="line 7 is not a whole result"):
        output = stage(eval_fid_batch, *run.eval_flags(file), *SCORED).output
    assert output.count("scored already") == 5
    with pytest.warns(UserWarning, match="line 7"):
        rows = read_rows(file)
    assert [measured(row) for row in rows] == [measured(row) for row in read_rows(table)]


def test_a_network_that_is_not_finite_is_named_and_what_was_scored_is_kept(run, tmp_path, monkeypatch):
    calls = 0

    def load(*arguments, **options):
        loaded = load_model(*arguments, **options)
        denoise = loaded.model.denoise

        def broken(xs, ts):
            nonlocal calls
            calls += 1
            predictions = denoise(xs, ts)
            # Of the second seed and its second batch the third image, from its second step on.
            if calls >= 3 * 4 + 4 + 2:
                predictions[0][2] = torch.nan
            return predictions

        loaded.model.denoise = broken
        return loaded

    monkeypatch.setattr(jobs_module, "load_model", load)
    flags = lift_flags(run, tmp_path / "scores.csv", "--seeds", 42, 43, 44, "--batch_size", 4)
    ended = run_stage(eval_fid_batch, *flags)
    assert ended.status == 1 and len(ended.message.splitlines()) == 1
    assert "raw weights of epoch 2 make the image of seed 43000006 NaN or infinite along path diagonal" in ended.message
    assert [row["seed"] for row in read_rows(tmp_path / "scores.csv")] == ["42"]
    # Of the broken batch on, nothing is sampled for this seed, and the next one is broken at once.
    assert calls == 3 * 4 + 2 * 4 + 4
    monkeypatch.undo()
    assert run_stage(eval_fid_batch, *flags).status == 0
    assert [row["seed"] for row in read_rows(tmp_path / "scores.csv")] == ["42", "43", "44"]


def test_a_job_that_fails_keeps_no_other_from_running(run, tmp_path, monkeypatch):
    def generate(loaded, path, seeds, *arguments, **options):
        if seeds[0] == 43_000_000:
            raise ValueError("this one will not do.")
        return scoring.generate(loaded, path, seeds, *arguments, **options)

    monkeypatch.setattr(jobs_module, "generate", generate)
    ended = run_stage(eval_fid_batch, *lift_flags(run, tmp_path / "scores.csv", "--seeds", 42, 43, 44))
    assert ended.status == 1 and ended.message == "error: this one will not do."
    assert "seed 43: failed: this one will not do." in ended.notes
    assert [row["seed"] for row in read_rows(tmp_path / "scores.csv")] == ["42", "44"]


# Processes


def evaluate_in_child(flags, patches, environment, output, ready):
    """What a child does: evaluate on one thread, with attributes replaced by what `patches` make of them."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    os.environ.update(environment)
    for place, name, make in patches:
        owner = pkgutil.resolve_name(place)
        setattr(owner, name, make(getattr(owner, name)))
    if ready is not None:
        ready.set()
    with mock.patch.object(sys, "argv", ["eval_fid_batch.py", *map(str, flags)]):
        cli.run_stage(eval_fid_batch.main)


@pytest.fixture
def child(tmp_path):
    """`child(flags, *patches, environment={})` starts an evaluation that has imported everything when this returns.

    What it says goes to the file `said` of the process.
    """
    started = []

    def start(flags, *patches, environment=None, wait=True):
        ready = FORKS.Event() if wait else None
        said = tmp_path / f"said_{len(started)}"
        process = FORKS.Process(target=evaluate_in_child, args=(flags, patches, environment or {}, said, ready))
        process.start()
        process.said = said
        started.append(process)
        assert not wait or ready.wait(SECONDS)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def finish(*processes):
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0, process.said.read_text()
    return [process.said.read_text() for process in processes]


class Replace:
    """Makes something else of an attribute."""

    def __init__(self, value):
        self.value = value

    def __call__(self, _):
        return self.value


class Meet:
    """Makes a function whose first call waits until as many processes are in theirs as the barrier has parties."""

    def __init__(self, barrier):
        self.barrier = barrier

    def __call__(self, function):
        met = False

        def meeting(*args, **kwargs):
            nonlocal met
            if not met:
                met = True
                self.barrier.wait(SECONDS)
            return function(*args, **kwargs)

        return meeting


class Log:
    """Makes a function that adds a line to a file at each call."""

    def __init__(self, file):
        self.file = file

    def __call__(self, function):
        def logging(*args, **kwargs):
            with open(self.file, "a") as stream:
                stream.write(f"{os.getpid()}\n")
            return function(*args, **kwargs)

        return logging


class Delay:
    """Makes a function that takes its time."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, function):
        def delayed(*args, **kwargs):
            time.sleep(self.seconds)
            return function(*args, **kwargs)

        return delayed


class Hang:
    """Makes a function that says by a file that it was called, and then takes very long."""

    def __init__(self, file):
        self.file = file

    def __call__(self, function):
        def hanging(*args, **kwargs):
            self.file.touch()
            time.sleep(SECONDS)

        return hanging


def never(key_of_file, key):
    """Stands in for `has_row` of a process that sees an old table."""
    return False


def wait_until(condition, *processes):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.01)


def test_two_evaluations_share_a_list(stage, run, child, tmp_path):
    flags = lift_flags(run, tmp_path / "scores.csv", "--seeds", *range(6))
    barrier = FORKS.Barrier(2)
    # Both are within a job at the same time, so that the second found the first job taken.
    said = finish(*[child(flags, ("evaluation.jobs", "generate", Meet(barrier))) for _ in range(2)])
    rows = read_rows(tmp_path / "scores.csv")
    assert sorted(row["seed"] for row in rows) == [str(seed) for seed in range(6)]
    scored = [re.findall(r"seed (\d): swd level 16 px ", text) for text in said]
    assert all(scored) and sorted(sum(scored, [])) == [str(seed) for seed in range(6)]
    waits = [re.findall(r"seed (\d): waiting for the process that is at it\n", text) for text in said]
    assert sum(waits, []).count("0") == 1
    for text, waited in zip(said, waits, strict=True):
        # It has its row when the wait is over.
        assert all(f"seed {seed}: scored already" in text for seed in waited)
    stage(eval_fid_batch, *lift_flags(run, tmp_path / "alone.csv", "--seeds", *range(6)))
    rows.sort(key=lambda row: row["seed"])
    assert [measured(row) for row in rows] == [measured(row) for row in read_rows(tmp_path / "alone.csv")]


def test_the_job_of_a_process_that_dies_is_taken_over(run, child, tmp_path):
    flags = lift_flags(run, tmp_path / "scores.csv", "--seeds", 1, 2)
    hanging = child(flags, ("evaluation.jobs", "generate", Hang(tmp_path / "there")))
    wait_until((tmp_path / "there").exists, hanging)
    waiting = child(flags)
    wait_until(lambda: "seed 1: waiting" in waiting.said.read_text(), hanging, waiting)
    # Everything else is done by then.
    assert [row["seed"] for row in read_rows(tmp_path / "scores.csv")] == ["2"]
    hanging.kill()
    [said] = finish(waiting)
    assert "seed 1: swd level 16 px " in said
    assert [row["seed"] for row in read_rows(tmp_path / "scores.csv")] == ["2", "1"]


def test_evaluations_that_need_the_same_heatmap_compute_it_once(run, child, tmp_path):
    barrier = FORKS.Barrier(4)
    patches = [
        # None of them has found it when the first begins.
        ("planning.heatmap", "compute", Meet(barrier)),
        ("planning.heatmap", "error_map", Log(tmp_path / "calls")),
    ]
    flags = lift_flags(run, tmp_path / "scores.csv", "--path_type", "dp_64", "--heatmap_dir", tmp_path / "maps")
    flags += ["--K", 1, "--heatmap_images", 2, "--seeds"]
    said = finish(*[child([*flags, seed], *patches, wait=False) for seed in range(4)])
    assert all("computing" in text for text in said) and sum("is kept" in text for text in said) == 3
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert list_files(tmp_path / "maps").keys() == {"heatmap_4_2ep.pth"}
    rows = read_rows(tmp_path / "scores.csv")
    assert sorted(row["seed"] for row in rows) == ["0", "1", "2", "3"]
    assert len({row["path_fingerprint"] for row in rows}) == 1


@pytest.fixture
def ranks(child):
    """`ranks(flags, *patches, second=())` starts the two processes of one run; `second` are patches of one of them."""

    def start(flags, *patches, second=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        return [
            child(
                flags, *patches, *(second if rank else ()), wait=False,
                environment=dict(zip(names, map(str, (rank, 2, rank, "127.0.0.1", port)), strict=True)),
            )
            for rank in (0, 1)
        ]  # fmt: skip

    return start


STAND_IN = ("evaluation.jobs", "load_inception", Replace(Colours))


def test_two_processes_of_one_run_give_the_rows_of_one(stage, run, ranks, tmp_path, stand_in):
    # Three batches of two processes, of which the last is not full; a map is computed by both as well.
    flags = ["--path_type", "diagonal", "dp_64", "--num_images", 11, "--batch_size", 4, "--metrics", "fid", "swd", "nn"]
    flags += ["--cache_dir", tmp_path / "cache", "--K", 1, "--heatmap_images", 2, "--heatmap_dir"]
    # The second process is done with the map well before the first has written it.
    late = ("planning.heatmap", "save_heatmap", Delay(0.5))
    first, second = finish(*ranks(lift_flags(run, tmp_path / "two.csv", *flags, tmp_path / "maps"), STAND_IN, late))
    assert first.count(": fid ") == 2 and "seed" not in second
    stage(eval_fid_batch, *lift_flags(run, tmp_path / "one.csv", *flags, tmp_path / "maps"))
    two, one = (read_rows(tmp_path / f"{name}.csv") for name in ("two", "one"))
    assert len(two) == 6 and [measured(row) for row in two] == [measured(row) for row in one]
    again = finish(*ranks(lift_flags(run, tmp_path / "two.csv", *flags, tmp_path / "maps"), STAND_IN))
    assert again[0].count("scored already") == 2 and len(read_rows(tmp_path / "two.csv")) == 6


def test_the_first_process_says_what_is_missing(stage, run, ranks, tmp_path, stand_in):
    # Both have batches.
    flags = lift_flags(run, tmp_path / "scores.csv", "--cache_dir", tmp_path / "cache", "--batch_size", 4, "--metrics")
    stage(eval_fid_batch, *flags, "fid")
    # On another host the table may still look as it did.
    finish(*ranks([*flags, "fid", "swd"], STAND_IN, second=[("evaluation.jobs", "has_row", Replace(never))]))
    assert [row["metric"] for row in read_rows(tmp_path / "scores.csv")] == ["fid", "swd"]


# Killed

GRID = ["--weights", "raw", "ema", "--path_type", "diagonal", "dp_64", "--num_steps", 4, 5, "--seeds", 42, 43, 44]
GRID += ["--metrics", "swd", "nn", "--K", 1, "--heatmap_images", 2]


def grid_flags(run, folder):
    return lift_flags(run, folder / "scores.csv", *GRID, "--heatmap_dir", folder, "--cache_dir", folder / "cache")


def test_killed_thirty_times_at_random_moments(run, child, tmp_path):
    start = time.monotonic()
    finish(child(grid_flags(run, tmp_path / "whole")))
    seconds = time.monotonic() - start
    expected = [measured(row) for row in read_rows(tmp_path / "whole/scores.csv")]
    assert len(expected) == 48 and len({(row["metric"], row["swd"], row["nn_distance"]) for row in expected}) == 48
    chance, kills, tables = random.Random(0), 0, 0
    while kills < 30 or tables == 0:
        folder = tmp_path / f"{tables}"
        process = child(grid_flags(run, folder))
        process.join(chance.uniform(0, seconds / 4) if kills < 30 else SECONDS)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), process.said.read_text()
        kills += process.exitcode != 0
        if process.exitcode == 0:
            # One process at a time, so that the rows come in order, however often it died.
            assert [measured(row) for row in read_rows(folder / "scores.csv")] == expected
            # What a killed writer of a map leaves has a hidden name.
            names = {file.rpartition("/")[2].split("_")[0] for file in list_files(folder) if "/." not in f"/{file}"}
            assert names == {"scores.csv", "heatmap", "synthetic"}
            tables += 1
    assert kills == 30
