"""Names and places of runs."""

import argparse
from pathlib import Path

import pytest

from runtime.runs import derived_name, known_runs, logs_beside, places, results_of, resume_folder, run_name


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("text", ["a", "dual-improved-64px-AFHQv2-seed42", "Läufe_2", "0.5+x", "x" * 100])
def test_names_of_runs(text):
    assert run_name(text) == text


@pytest.mark.parametrize("text", ["", ".", "..", ".hidden", "-x", "a/b", "a b", "a\n", "x" * 101, "a:b"])
def test_what_could_be_no_folder_or_hide_is_no_name(text):
    with pytest.raises(argparse.ArgumentTypeError):
        run_name(text)


def test_a_run_has_two_folders_and_the_published_one_three():
    assert places("a") == (Path("checkpoints/a"), Path("checkpoints/a/logs"), Path("results/a"))
    assert places(None) == (Path("checkpoints"), Path("logs"), Path("results"))
    assert logs_beside("checkpoints/../checkpoints") == Path("logs")
    assert logs_beside("elsewhere") == Path("elsewhere/logs")


@pytest.mark.parametrize(
    ("file", "run", "expected"),
    [
        ("checkpoints/x_1ep.pth", "a", "results"),  # A published place, whatever the name of its run.
        ("checkpoints/b/x_1ep.pth", "a", "results/b"),  # A folder that was given another name.
        ("checkpoints/b/x_1ep.pth", None, "results/b"),
        ("checkpoints/b/c/x_1ep.pth", "a", "results/a"),
        ("elsewhere/x_1ep.pth", "a", "results/a"),
        ("elsewhere/x_1ep.pth", None, "results"),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_results_lie_where_the_checkpoint_says(file, run, expected, absolute):
    assert results_of(Path(file).resolve() if absolute else file, {"run": run}) == Path(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("dual", "overcomplete", "published", 64, "huggan/AFHQv2", 42), "dual-published-64px-AFHQv2-seed42"),
        (("dual", "residual", "improved", 32, "synthetic", 7), "dual-residual-improved-32px-synthetic-seed7"),
        (("single_t", "overcomplete", "published", 8, "a b/ö~ü/", 0), "single_t-published-8px-ö-ü-seed0"),
        (
            ("baseline", "overcomplete", "improved", 64, "owner/set:config", 1),
            "baseline-improved-64px-set-config-seed1",
        ),
        (("baseline", "overcomplete", "improved", 64, "/", 1), "baseline-improved-64px-images-seed1"),
    ],
)
def test_a_run_without_a_name_is_called_by_its_settings(settings, expected):
    assert derived_name(*settings) == expected
    assert run_name(derived_name(*settings)) == expected


def test_a_folder_of_images_is_called_by_its_own_name(monkeypatch):
    Path("cats").mkdir()
    settings = ("dual", "overcomplete", "published", 64)
    assert derived_name(*settings, "cats", 1) == derived_name(*settings, str(Path("cats").resolve()), 1)
    monkeypatch.chdir("cats")
    assert derived_name(*settings, ".", 1) == "dual-published-64px-cats-seed1"
    assert len(run_name(derived_name(*settings, "x" * 250, 1))) <= 100


def test_runs_are_known_by_their_checkpoints():
    assert known_runs() == []
    for file in ("checkpoints/b/x_1ep.pth", "checkpoints/a/y_last.pth", "checkpoints/c/readme", "checkpoints/z.pth"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    assert known_runs() == ["a", "b"]


def test_a_run_is_resumed_from_its_folder_or_a_file_in_it():
    assert resume_folder("x/y") == resume_folder("x/y/baseline_last.pth") == Path("x/y")
