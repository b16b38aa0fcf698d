"""What the system refuses is said in one sentence, with the file that it is about, whatever writes it."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from conftest import NoRoom
from data import save_png
from evaluation.results_table import append_row, write_csv
from figures.images import save_image_grid
from figures.style import save_figure
from image_folder import write_settings
from interpolate import save_gif
from paths.families import diagonal
from paths.schedule_file import load_schedule, save_schedule
from planning.map_file import PartFiles, load_heatmap, save_heatmap
from runtime.errors import in_words, naming, need_file
from scheduler import DDIMScheduler
from training.run_log import RunLog

RNG = np.random.default_rng(3)


def refusal(act):
    with pytest.raises(OSError) as caught:
        act()
    return in_words(caught.value)


def test_a_sentence_names_the_place_the_cause_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    assert refusal(Path("file").mkdir) == "file is a file, where a folder is needed; name another place."
    below = Path("file/below/me")
    for act in (lambda: below.mkdir(parents=True), below.read_bytes, lambda: os.replace("folder", below)):
        assert refusal(act) == "file is a file, where a folder is needed; name another place."
    assert refusal(Path("folder").read_bytes) == "folder is a folder, where a file is needed; name a file."
    assert refusal(lambda: os.replace("file", "folder")).startswith("folder is a folder")
    gone = "gone cannot be read or written (No such file or directory); check the name."
    assert refusal(Path("gone").read_bytes) == refusal(lambda: open(b"gone")) == gone
    assert "loop" in (said := refusal(Path("loop").read_bytes)) and "circle" in said
    assert "choose a shorter name" in refusal(Path("x" * 300).read_bytes)


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_number_of_the_system_makes_a_sentence(number):
    said = in_words(OSError(number, os.strerror(number), "results/table.csv"))
    assert "results/table.csv" in said and len(said.splitlines()) == 1 and said.endswith(".") and "Errno" not in said


@pytest.mark.parametrize("error", [OSError("A sentence of our own."), OSError(5, "Input/output error"), OSError()])
def test_what_names_no_file_stays_as_it_is(error):
    assert in_words(error) == str(error)


def test_errors_are_named_once():
    def failing(error, cause=None):
        try:
            with naming("outer"), naming("inner"):
                try:
                    if cause is not None:
                        raise cause
                finally:
                    raise error
        except Exception as caught:
            return caught

    full = OSError(errno.ENOSPC, "full")
    assert failing(full).filename == "inner" and failing(full).errno == errno.ENOSPC
    assert failing(RuntimeError("unexpected pos"), full).filename == "inner"
    for error in (OSError(errno.ENOENT, "gone", "other"), OSError("no number"), RuntimeError("no cause"), ValueError()):
        assert failing(error) is error
    assert isinstance(failing(OSError(errno.EACCES, "denied")), PermissionError)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_a_file_that_is_needed_is_one(tmp_path, kind):
    file = tmp_path / kind
    {"missing": lambda: None, "folder": file.mkdir, "pipe": lambda: os.mkfifo(file)}[kind]()
    says = {"missing": "", "folder": " is a folder, and as a file it", "pipe": " is no file, and as one it"}[kind]
    with pytest.raises(FileNotFoundError, match=f"^Checkpoint {file}{says} does not exist; train"):
        need_file(file, "Checkpoint", "train")
    (tmp_path / "there").touch()
    assert need_file(str(tmp_path / "there"), "Checkpoint", "train") == tmp_path / "there"


# A full disk

PIXELS = RNG.integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)
LOG_SNR = DDIMScheduler().log_snr.numpy()
ROW = {
    "checkpoint_fingerprint": "a", "weights": "raw", "path_fingerprint": "b", "nfe": 4, "seed": 1, "num_images": 8,
    "metric": "swd", "metric_features": "none", "resize": "none", "reference_fingerprint": "c", "precision": "fp32",
    "swd": 1.5, "reference": "r" * 9000, "epoch": 1, "date": "2025-01-31T23:59:59Z",
}  # fmt: skip


def draw_plot(file):
    figure = Figure()
    figure.subplots().imshow(PIXELS[0, 0])
    save_figure(figure, file)


# Everything that writes more than some kilobytes, and the name of what it writes.
WRITERS = {
    "image.png": lambda file: save_png(torch.from_numpy(PIXELS[0]), file),
    "grid.png": lambda file: save_image_grid(PIXELS, file, 2),
    "plot.png": draw_plot,
    "walk.gif": lambda file: save_gif(torch.from_numpy(PIXELS), file),
    "map.pth": lambda file: save_heatmap(file, {"x": torch.zeros(5000)}),
    "map.pth.part0": lambda file: PartFiles(file.with_suffix(""), {}).write(0, {"x": torch.zeros(5000)}),
    "path.json": lambda file: save_schedule(diagonal(900), file, LOG_SNR, solver={}),
    "settings.json": lambda file: write_settings(file.parent, {"images": dict.fromkeys(map(str, range(999)), "")}),
    "costs.csv": lambda file: write_csv(file, [{"nfe": k, "cost": k / 7} for k in range(999)]),
    "table.csv": lambda file: append_row(file, ROW),
}


@pytest.mark.parametrize("size", [0, 700, 4096])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_with_the_file_and_leaves_the_old_one(tmp_path, name, size):
    file = tmp_path / name
    for old in (b"", b"old"):
        if old and name != "table.csv":
            file.write_bytes(old)
        before = {found: found.read_bytes() for found in tmp_path.iterdir() if found.suffix != ".lock"}
        with NoRoom(size):
            said = refusal(lambda: WRITERS[name](file))
        assert said == f"{file} cannot be read or written (File too large); make room there, or name another place."
        assert {found: found.read_bytes() for found in tmp_path.iterdir() if found.suffix != ".lock"} == before
    WRITERS[name](file)
    assert file.stat().st_size > size


def test_a_log_on_a_full_disk_is_named(tmp_path):
    with NoRoom(0):
        assert "settings.json cannot be read or written" in refusal(lambda: RunLog(tmp_path, 0, {}))


def test_a_table_that_is_added_to_on_a_full_disk_is_named(tmp_path):
    row = ROW | {"reference": "train"}
    append_row(tmp_path / "table.csv", row)
    with NoRoom((tmp_path / "table.csv").stat().st_size + 20):
        assert f"{tmp_path / 'table.csv'} cannot be" in refusal(lambda: append_row(tmp_path / "table.csv", row))
    append_row(tmp_path / "table.csv", row)
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 4


def test_long_names_of_maps_and_their_parts(tmp_path):
    file = tmp_path / ("[m]" * 82 + ".pth")
    assert len(file.name) == 250
    parts = PartFiles(file, {"a": 1})
    for rank in (0, 1, 12):
        parts.write(rank, {"x": torch.full((2,), float(rank))})
    assert sorted(part["x"][0].item() for part in parts.read()) == [0, 1, 12]
    parts.remove()
    save_heatmap(file, {"t_grid": torch.zeros(3), "fingerprint": "f"})
    assert load_heatmap(file)["fingerprint"] == "f" and list(tmp_path.iterdir()) == [file]
    save_schedule(diagonal(4), file, LOG_SNR, solver={})
    assert load_schedule(file).nfe == 4
