"""Folders for files, files for folders, damaged caches and logs: one sentence each, and any name is one."""

import os
import shutil

import numpy as np
import pytest
import torch

import aggregate_results
import compute_heatmap_30
import encode
import eval_fid_batch
import export
import generate_sr
import generate_with_path_30
import inpaint
import interpolate
import make_figures
import plan_path
import report
import train_lift
from conftest import HARDWARE, LOG, STEPS, TINY, read_log, run_stage
from data import load_images, save_png
from evaluation.results_table import read_rows

PLACES = ["--output_dir", "c", "--log_dir", "l", "--cache_dir", "cache"]
SWD = ["--metrics", "swd", "--num_images", 4, "--model_type", "lift", *STEPS, *HARDWARE]


@pytest.fixture
def place(run, table, tmp_path, monkeypatch):
    """A folder that is the working one, with a checkpoint, a map and a table in it, and a folder `folder`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder/below").mkdir(parents=True)
    shutil.copy(run.lift, "model.pth")
    shutil.copy(run.heatmap, "map.pth")
    shutil.copy(table, "table.csv")
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run.lift, "checkpoints")
    shutil.copytree(run.folder / "cache", "cache")
    return tmp_path


PLAN = ["--heatmap", "map.pth", "--nfe", 4, "--bootstrap", 0]
MODEL = ["--checkpoint", "model.pth", *STEPS, *HARDWARE]
# A folder where a file is meant.
FOLDERS = [
    (compute_heatmap_30, ["--checkpoint", "folder"], "Checkpoint folder is a folder"),
    (generate_with_path_30, ["--checkpoint", "folder"], "Checkpoint folder is a folder"),
    (export, ["folder", "out"], "Checkpoint folder is a folder"),
    (generate_with_path_30, [*MODEL, "--schedule", "folder"], "folder is a folder"),
    (generate_with_path_30, [*MODEL, "--path_type", "kl", "--heatmap", "folder"], "Heatmap folder is a folder"),
    (plan_path, ["--heatmap", "folder"], "Heatmap folder is a folder"),
    (compute_heatmap_30, [*MODEL, "--grid", 4, "--num_images", 2, "--output", "folder"], "Heatmap folder is a folder"),
    (inpaint, [*MODEL, "--mask", "folder"], "--mask folder is neither a file"),
    (aggregate_results, ["--input", "folder"], "folder is a folder, where a file is needed"),
    (aggregate_results, ["--input", "table.csv", "--output", "is"], "is.csv is a folder, where a file is needed"),
    (report, ["--results", "folder"], "Results table folder is a folder"),
    (eval_fid_batch, ["--metrics", "fid", "--inception_weights", "folder", *SWD[4:]], "file folder is a folder"),
    (eval_fid_batch, [*SWD, "--path_type", "schedule:folder"], "folder is a folder"),
    (train_lift, [*TINY, *PLACES, "--t_pairs", "path:folder"], "folder is a folder"),
    (make_figures, ["paths_epochs", "folder", "--output", "f.png"], "Heatmap folder is a folder"),
]
# A file where a folder is meant, or where one is needed above.
FILES = [
    (generate_with_path_30, [*MODEL, "--output", "table.csv"], "table.csv is a file, where a folder is needed"),
    (generate_with_path_30, [*MODEL, "--output", "table.csv/a/b"], "table.csv is a file, where a folder is needed"),
    (generate_sr, [*MODEL, "--on", "train", "--output", "table.csv"], "table.csv is a file, where a folder is needed"),
    (generate_sr, [*MODEL, "--input", "table.csv"], "--input table.csv is not a folder"),
    (inpaint, [*MODEL, "--mask", "left", "--output", "table.csv"], "table.csv is a file, where a folder is needed"),
    (inpaint, [*MODEL, "--mask", "left", "--input", "table.csv"], "--input table.csv is not a folder"),
    (interpolate, [*MODEL, "--seeds", 1, 2, "--output", "table.csv"], "table.csv is a file, where a folder is needed"),
    (encode, [*MODEL, "--input", "table.csv"], "table.csv cannot be used (Pillow cannot identify it"),
    (encode, [*MODEL, "--decode", "table.csv"], "table.csv is damaged or no file of latents"),
    (
        plan_path,
        ["--heatmap", "map.pth", "--nfe", 4, "--bootstrap", 0, "--output", "table.csv"],
        "table.csv is a file, where a folder is needed",
    ),
    (export, ["model.pth", "table.csv"], "table.csv is a file"),
    (export, ["model.pth", "table.csv/a"], "table.csv is a file, where a folder is needed"),
    (train_lift, [*TINY, *PLACES, "--output_dir", "table.csv"], "table.csv is a file, where a folder is needed"),
    (train_lift, [*TINY, *PLACES, "--output_dir", "table.csv/a"], "table.csv is a file, where a folder is needed"),
    (train_lift, [*TINY, *PLACES, "--log_dir", "table.csv"], "table.csv is a file, where a folder is needed"),
    (train_lift, [*TINY, *PLACES, "--cache_dir", "table.csv"], "table.csv is a file, where a folder is needed"),
    (train_lift, [*TINY, *PLACES, "--dataset", "table.csv"], "--dataset table.csv is not a folder"),
    (eval_fid_batch, [*SWD, "--output", "table.csv/a.csv"], "table.csv is a file, where a folder is needed"),
    (eval_fid_batch, [*SWD, "--checkpoint_dir", "table.csv"], "table.csv has no lift_dual_timestep checkpoint"),
    (report, ["--results", "table.csv", "--folder", "map.pth"], "map.pth is a file; pass the folder"),
    (make_figures, ["losses", "table.csv/a", "--output", "f.png"], "table.csv/a/metrics.jsonl does not exist"),
]


@pytest.mark.parametrize(("module", "flags", "says"), [*FOLDERS, *FILES])
def test_folders_for_files_and_files_for_folders(place, module, flags, says):
    (place / "is.csv").mkdir()
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    ended = run_stage(module, *flags)
    assert ended.status == 1 and ended.message.startswith("error: ") and says in ended.message
    assert len(ended.message.splitlines()) == 1 and "Errno" not in ended.message
    after = {file: file.read_bytes() for file in place.rglob("*") if file.is_file() and file.suffix != ".lock"}
    assert after.items() <= before.items()


NAMES = ["new\nline", "-dash a'b\"c %s{0} [x]*?", "é猫", os.fsdecode(b"\xff\xfe"), "n" * 246]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_of_a_folder_or_a_file_goes_through(stage, place, name):
    images = f"./{name}"
    os.mkdir(images)
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 256, (3, 16, 16), dtype=np.uint8)
        save_png(torch.from_numpy(pixels), place / images / (f"{name}.png" if k == 3 else f"{k}.png"))
    stage(inpaint, *MODEL, "--mask", "left", "--input", images, "--num_images", 2, "--jump_repeats", 1)
    stage(generate_sr, *MODEL, "--input", images, "--resize", "--output", "sr")
    assert len(list((place / "sr").glob("*.png"))) == 6
    stage(generate_sr, *MODEL, "--on", "train", "--dataset", images, "--output", f"{images}.sr")
    stage(generate_with_path_30, *MODEL, "--num_images", 2, "--output", f"{images}.out")
    stage(interpolate, *MODEL, "--seeds", 1, 2, "--frames", 3, "--gif", "--output", f"{images}.gif")
    given = [f"{images}/0.png", f"{images}/{name}.png"]
    stage(interpolate, *MODEL, "--input", *given, "--frames", 2, "--tolerance", 0.1)
    stage(encode, *MODEL, "--input", images, "--tolerance", 0.1, "--output", "latents")
    stage(encode, *MODEL, "--decode", "latents/latents.npz", "--solver", "ddim", "--output", f"{images}.npz")
    assert len(list((place / "latents").glob("*.png"))) == len(list((place / f"{name}.npz").glob("*.png"))) == 6
    stage(plan_path, *PLAN, "--output", f"{images}.d")
    scored = [*SWD, "--checkpoint_dir", "checkpoints", "--output", f"{images}.csv"]
    stage(eval_fid_batch, *scored, "--dataset", images)
    stage(eval_fid_batch, *scored, "--reference", images, "--seeds", 1)
    assert len(read_rows(f"{images}.csv")) == 2
    stage(aggregate_results, "--input", f"{images}.csv", "--output", f"{images[:200]}_t")
    stage(report, "--results", f"{images}.csv", "--output", f"{images}.htm", f"--title={name}", "--folder", images)
    assert not [file for file in place.rglob(".*") if ".tmp" in file.name]


@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b'{"a": 1}', b"text", b"\x93NUMPY\x01\x00", bytes(500), b"PK\5\6" + bytes(18)]
)
@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_damaged_cache_is_made_again(tmp_path, suffix, content):
    before = np.array(load_images("synthetic", 16, tmp_path, limit=6).pixels)
    [file] = tmp_path.glob(f"*{suffix}")
    for damaged in (content, file.read_bytes()[:-5]):
        file.write_bytes(damaged)
        images = load_images("synthetic", 16, tmp_path, limit=6)
        np.testing.assert_array_equal(images.pixels, before)
    file.unlink()
    assert load_images("synthetic", 16, tmp_path, limit=6).fingerprint == images.fingerprint


@pytest.mark.parametrize("content", [b"[1, 2]\n", b'{"a": 1}\n', b"\xff\xfe{}\n"])
def test_damaged_logs_are_named(stage, refused, tiny, tmp_path, content):
    flags = [*tiny(tmp_path), "--epochs", 1]
    stage(train_lift, *flags)
    for name in ("metrics.jsonl", "settings.json"):
        file = tmp_path / LOG / name
        whole = file.read_bytes()
        file.write_bytes(content if name == "settings.json" else whole + content)
        # A settings file that says something else is one of another run.
        says = "is of a run with" if name == "settings.json" and content[:1] == b"{" else f"{file} is damaged"
        refused(train_lift, *flags, "--epochs", 2, "--resume", "auto", says=(says, "log"))
        file.write_bytes(whole)
    stage(train_lift, *flags, "--epochs", 2, "--resume", "auto")
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_folder_that_tensorboard_cannot_write_to_is_named(refused, tmp_path):
    name = tmp_path / os.fsdecode(b"\xff")
    flags = [*TINY, "--output_dir", tmp_path / "c", "--cache_dir", tmp_path / "cache"]
    ended = run_stage(train_lift, *flags, "--log_dir", name)
    assert ended.status == 1 and "TensorBoard cannot write to" in ended.message and "--log_dir" in ended.message
