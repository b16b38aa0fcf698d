import json
import os

import numpy as np
import pytest

from paths.families import diagonal
from paths.path import path_from_cells, timestep_grid
from paths.schedule_file import FURTHER_DETAILS, load_schedule, save_schedule
from scheduler import DDIMScheduler

SOLVER = {"name": "ddim", "eta": 0.0, "end": "clean"}


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "schedule.json"
    log_snr = DDIMScheduler().log_snr.numpy()
    path = path_from_cells([(0, 0), (0, 5), (29, 29)], timestep_grid(), "dp_total", {"max_jump": 24, "factor": "B"})
    save_schedule(path, file, log_snr, SOLVER, "trapezoid", 1.25, "aaaa", "bbbb", "cosine_clipped")
    return file, path, log_snr


def test_schedule_round_trip(saved):
    file, path, log_snr = saved
    loaded = load_schedule(file)
    assert (loaded.points, loaded.kind, loaded.fingerprint()) == (path.points, path.kind, path.fingerprint())
    assert loaded.provenance == {
        "max_jump": 24,
        "factor": "B",
        "log_snr": [[log_snr[t] for t in point] for point in path.points],
        "solver": SOLVER,
        "criterion": "trapezoid",
        "cost": 1.25,
        "path_fingerprint": path.fingerprint(),
        "model_fingerprint": "aaaa",
        "data_fingerprint": "bbbb",
        "beta_schedule": "cosine_clipped",
        "num_train_timesteps": 1000,
    } | dict.fromkeys(("representation", "resolution", "weights", "epoch", "run"))
    content = json.loads(file.read_text())
    assert content["format_version"] == 1 and (content["nfe"], content["num_scales"]) == (2, 2)
    assert content["provenance"] == {"max_jump": 24, "factor": "B"}

    again = file.with_name("again.json")
    save_schedule(loaded, again, log_snr, SOLVER, "trapezoid", 1.25, "aaaa", "bbbb", "cosine_clipped")
    assert again.read_bytes() == file.read_bytes()


def test_schedule_of_one_scale_and_of_zero_terminal_snr(tmp_path):
    log_snr = DDIMScheduler().log_snr.numpy()
    log_snr[999] = -np.inf
    path = diagonal(18, num_scales=1)
    save_schedule(path, str(tmp_path / "a.json"), log_snr, SOLVER)
    loaded = load_schedule(str(tmp_path / "a.json"))
    assert loaded.points == path.points
    assert loaded.provenance["log_snr"][0] == [None] and loaded.provenance["log_snr"][-1] == [log_snr[0]]
    assert loaded.provenance["criterion"] is None and loaded.provenance["cost"] is None
    assert "Infinity" not in (tmp_path / "a.json").read_text()


def test_failed_save_leaves_the_file_as_it_was(saved, monkeypatch):
    file, path, log_snr = saved
    before = file.read_bytes()
    with_nan = log_snr.copy()
    with_nan[5] = np.nan
    for table, solver, cost, message in [
        (log_snr[:999], SOLVER, None, "starts at timestep 999"),
        (with_nan, SOLVER, None, "NaN"),
        (log_snr, {"eta": np.zeros(1)}, None, "finite JSON types"),
        (log_snr, SOLVER, float("inf"), "finite JSON types"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_schedule(path, file, table, solver, cost=cost)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_schedule(path, file.parent / "nowhere" / "a.json", log_snr, SOLVER)

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_schedule(path, file, log_snr, {"name": "heun"})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_missing_schedule(tmp_path):
    for file in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=file.name):
            load_schedule(file)


@pytest.mark.parametrize("size", [0, 1, 100, -3])
def test_truncated_schedule(saved, size):
    file = saved[0]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="schedule.json is not JSON"):
        load_schedule(file)


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"[" * 100_000])
def test_binary_and_absurd_schedule(saved, content):
    saved[0].write_bytes(content)
    with pytest.raises(ValueError, match="schedule.json is not JSON"):
        load_schedule(saved[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "update LIFT"),
        ({"format_version": "1"}, "not a schedule file"),
        ({"points": [[999, 999], [0, 0]]}, "changed after it was saved"),
        ({"points": [[999, 999], [999, 825], [0, 0]]}, "changed after it was saved"),
        ({"points": [[999, 999], [0, 1]]}, "last point"),
        ({"points": [[999, 999], [0.5, 0], [0, 0]]}, "integer"),
        ({"points": None}, "integer"),
        ({"nfe": 3}, "changed after it was saved"),
        ({"kind": 7}, "kind"),
        ({"provenance": []}, "provenance"),
        ({"cost": float("nan")}, "finite JSON types"),
        ({"log_snr": None}, "log_snr"),
        ({"log_snr": []}, "log_snr"),
        ({"log_snr": [[-5.7, -5.7], [-5.7, -4.0], [9.2]]}, "log_snr"),
        ({"log_snr": [[-5.7, -5.7], [-5.7, "high"], [9.2, 9.2]]}, "log_snr"),
        ({"log_snr": [[-5.7, -5.7], [-5.7, -6.0], [9.2, 9.2]]}, "changed after it was saved: its log_snr"),  # It falls.
        (
            {"log_snr": [[-5.7, -5.7], [-5.6, -4.0], [9.2, 9.2]]},
            "changed after it was saved: its log_snr",
        ),  # Twice 999.
        ({"log_snr": [[None, None], [None, None], [9.2, 9.2]]}, "changed after it was saved: its log_snr"),
    ],
)
def test_damaged_schedule(saved, change, message):
    file = saved[0]
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"schedule.json.*{message}"):
        load_schedule(file)


def test_what_earlier_versions_did_not_say_is_none(saved):
    file, path, _ = saved
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in FURTHER_DETAILS}))
    loaded = load_schedule(file)
    assert loaded.points == path.points and {loaded.provenance[key] for key in FURTHER_DETAILS} == {None}
    made_for = {"representation": "residual", "resolution": 32, "weights": "ema", "epoch": 7, "run": "my run"}
    save_schedule(loaded, file, DDIMScheduler(1200).log_snr.numpy(), SOLVER, **made_for)
    loaded = load_schedule(file)
    assert {key: loaded.provenance[key] for key in FURTHER_DETAILS} == made_for | {"num_train_timesteps": 1200}


def test_json_that_is_no_schedule(saved):
    file = saved[0]
    content = json.loads(file.read_text())
    for other in ([], 3, {}, {"points": content["points"]}):
        file.write_text(json.dumps(other))
        with pytest.raises(ValueError, match="schedule.json is not a schedule file"):
            load_schedule(file)
    for key in content.keys() - {"format_version", *FURTHER_DETAILS}:
        file.write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        with pytest.raises(ValueError, match=f"schedule.json is not a complete schedule file: it lacks {key}"):
            load_schedule(file)
