"""Every stage from training to figures on tiny models, what each refuses, and the shell scripts."""

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aggregate_results
import compute_cross_jacobian
import compute_heatmap_30
import eval_fid_batch
import export
import generate_sr
import generate_with_path_30
import interpolate
import make_figures
import plan_path
import report
import train_baseline
import train_lift
from checkpoint import build_model, load_model, read_checkpoint, save_checkpoint
from conftest import HARDWARE, MEASURED, ROOT, STEPS, assert_same, list_files, results_of, run_stage
from data import load_images
from evaluation.results_table import append_row, read_rows
from paths.families import diagonal
from paths.optimal import find_optimal_path_n_steps_lambda
from paths.schedule_file import load_schedule
from planning import heatmap as heatmap_module
from planning.map_file import load_heatmap, save_heatmap

STAGES = [
    train_baseline,
    train_lift,
    compute_heatmap_30,
    compute_cross_jacobian,
    generate_with_path_30,
    generate_sr,
    eval_fid_batch,
    aggregate_results,
    make_figures,
    export,
    plan_path,
    report,
]
FIRST_SEED = 42_000_000


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A stage that falls back on a default place writes it here."""
    monkeypatch.chdir(tmp_path)


# Heatmaps


def test_a_heatmap_holds_the_published_paths_of_its_errors(run):
    content = load_heatmap(run.heatmap)
    assert content["fingerprint"] == load_model(run.lift).fingerprint
    assert content["t_grid"].tolist() == [999, 666, 333, 0]
    assert (content["K"], content["batch"], content["seed"], content["epoch"]) == (1, 2, 42, 2)
    torch.testing.assert_close(content["error_total"], content["error_64"] + content["error_32"])
    assert (content["error_64"] > 0).all()
    for name, weight in (("64", 0), ("total", 1)):
        maps = content["error_64"].numpy(), weight * content["error_32"].numpy()
        cells, cost = find_optimal_path_n_steps_lambda(*maps, content["log_snr_grid"].numpy(), 4, 5)
        assert content[f"samples_{name}"] == [list(cell) for cell in cells]
        assert content[f"timesteps_{name}"] == [[content["t_grid"][i].item() for i in cell] for cell in cells]
        assert content["costs"][name] == pytest.approx(cost)
    for suffix in (".png", "_maps.png"):
        with Image.open(run.heatmap.with_name(run.heatmap.stem + suffix)) as figure:
            assert min(figure.size) > 300


@pytest.fixture
def drawn(monkeypatch):
    """The heatmap files whose figures were asked for and, because they take seconds, not drawn."""
    files = []
    monkeypatch.setattr(compute_heatmap_30, "draw", lambda content, file: files.append(file))
    return files


def test_figures_of_a_heatmap_are_drawn_again(stage, run, tmp_path):
    shutil.copy(run.heatmap, tmp_path / "map.pth")
    before = list_files(tmp_path)
    stage(compute_heatmap_30, "--plot_only", "--output", tmp_path / "map.pth", *STEPS)
    after = list_files(tmp_path)
    assert after.keys() == {"map.pth", "map.png", "map_maps.png"} and after["map.pth"] == before["map.pth"]


def test_a_figure_given_as_output_does_not_replace_its_map(stage, run, tmp_path):
    ended = stage(compute_heatmap_30, *run.heatmap_flags(tmp_path / "heatmap.png"))
    assert list_files(tmp_path).keys() >= {"heatmap.png", "heatmap.pth", "heatmap_maps.png"}
    assert f"heatmap {tmp_path / 'heatmap.pth'}" in ended.output
    with Image.open(tmp_path / "heatmap.png") as figure:
        assert figure.format == "PNG"
    assert load_heatmap(tmp_path / "heatmap.pth")["fingerprint"] == load_heatmap(run.heatmap)["fingerprint"]
    before = list_files(tmp_path)["heatmap.pth"]
    stage(compute_heatmap_30, "--plot_only", "--output", tmp_path / "heatmap.png", *STEPS)
    assert list_files(tmp_path)["heatmap.pth"] == before


def test_a_heatmap_is_kept_or_replaced(stage, refused, run, tmp_path, drawn):
    file = tmp_path / "map.pth"
    shutil.copy(run.heatmap, file)
    before = list_files(tmp_path)["map.pth"]
    assert "is kept" in stage(compute_heatmap_30, *run.heatmap_flags(file)).output
    assert list_files(tmp_path)["map.pth"] == before
    # Paths of another length come from the same map.
    assert "is kept" in stage(compute_heatmap_30, *run.heatmap_flags(file), "--num_steps", 5).output
    assert len(load_heatmap(file)["samples_64"]) == 6
    torch.testing.assert_close(load_heatmap(file)["mse_64"], load_heatmap(run.heatmap)["mse_64"], rtol=0, atol=0)
    before = list_files(tmp_path)["map.pth"]
    other = [*run.heatmap_flags(file), "--K", 2]
    refused(compute_heatmap_30, *other, says=(file, "another K", "--force", "--output"))
    refused(compute_heatmap_30, *run.heatmap_flags(file), "--ema", says=(file, "fingerprint, weights"))
    assert list_files(tmp_path)["map.pth"] == before
    stage(compute_heatmap_30, *other, "--force")
    assert load_heatmap(file)["K"] == 2 and drawn == [file] * 3


def test_a_heatmap_computed_again_is_the_same_whatever_the_batch(stage, run, tmp_path, drawn):
    stage(compute_heatmap_30, *run.heatmap_flags(tmp_path / "map.pth"), "--batch_size", 3)
    one, other = load_heatmap(run.heatmap), load_heatmap(tmp_path / "map.pth")
    for name in ("error_64", "error_32", "mse_64", "mse_32"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-7)


def test_default_names_tell_epoch_and_weights(stage, run, tmp_path, drawn):
    flags = run.heatmap_flags("unused")
    place = flags.index("--output")
    stage(compute_heatmap_30, *flags[:place], *flags[place + 2 :], "--ema")
    assert load_heatmap(results_of("dual") / "heatmap_4_2ep_ema.pth")["weights"] == "ema"
    stage(generate_with_path_30, "--checkpoint", run.baseline, "--num_images", 1, *STEPS, *HARDWARE)
    assert (results_of("baseline") / f"samples/baseline_2ep_raw_diagonal_4/{FIRST_SEED:012d}.png").exists()


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--num_steps", 2, "--max_jump", 1], 1, ("2 steps", "max_jump", "at least 3 steps")),
        (["--num_steps", 7], 1, ("7 steps", "lower num_steps")),
        (["--num_images", 13], 1, ("--num_images 13", "12 images of 'synthetic'")),
        (["--grid", 1], 1, ("grid of 1",)),
        (["--K", 0], 2, ("--K", "'0'")),
        (["--device", 77], 1, ("--device 77",)),
        (["--dataset", "./missing"], 1, ("./missing", "not a folder")),
        (["--limit", 3, "--num_images", 4], 1, ("--num_images 4", "3 images")),
        (["--coarse", 1], 1, ("coarse is 1", "4 lines", "2 to 3")),
        (["--coarse", 4], 1, ("coarse is 4", "4 lines", "2 to 3")),
        (["--coarse", 0], 2, ("--coarse", "'0'")),
        (["--start", 1000], 1, ("1000", "999")),
        (["--start", 2], 1, ("grid of 4", "2 and 3")),
        (["--start", 0], 2, ("--start", "'0'")),
        (["--grid_spacing", "even"], 2, ("--grid_spacing", "'even'", "uniform_log_snr")),
        (["--maps", "none"], 2, ("--maps", "'none'", "blocks")),
        (["--of", "v"], 2, ("--of", "'v'", "x0")),
        (["--normalisation", "mean"], 2, ("--normalisation", "'mean'", "per_dim")),
        (["--gird", 4], 2, ("--gird",)),
    ],
)
def test_heatmap_refuses(refused, run, tmp_path, flags, status, says):
    # What is decoded before the refusal stays in the cache.
    load_images("synthetic", 16, run.cache, limit=3)
    flags = [*run.heatmap_flags(tmp_path / "map.pth"), *flags]
    refused(compute_heatmap_30, *flags, says=says, status=status, keeps=(run.folder,))


@pytest.fixture
def untrained(run, tmp_path):
    """`untrained(model_type)`: a checkpoint of new weights like that of the run."""

    def make(model_type):
        content = read_checkpoint(run.lift)
        config = content["config"] | {"model_type": model_type}
        torch.manual_seed(0)
        content |= {"config": config, "model_state": build_model(config).state_dict(), "ema_state": None}
        save_checkpoint(tmp_path / f"{model_type}.pth", content)
        return tmp_path / f"{model_type}.pth"

    return make


def test_an_error_map_needs_one_scale_or_any_two_timesteps(refused, run, untrained, tmp_path):
    checkpoint = untrained("shared_t")
    flags = [*run.heatmap_flags(tmp_path / "map.pth"), "--checkpoint", checkpoint]
    says = (checkpoint, "'shared_t'", "any two timesteps", "baseline, dual, single_t, no_t")
    refused(compute_heatmap_30, *flags, says=says)


def test_a_baseline_has_its_denoising_errors_mapped_along_its_clock(stage, run, untrained, tmp_path):
    flags = [*run.heatmap_flags(tmp_path / "map.pth"), "--checkpoint", untrained("baseline")]
    # Neither the published paths, which have no use for it, nor thinning keep a map of so few lines from being made.
    stage(compute_heatmap_30, *flags, "--grid", 8, "--coarse", 3, "--num_steps", 18)
    content = load_heatmap(tmp_path / "map.pth")
    assert content["maps"] == "mse" and content["coarse"] is None and content["model_type"] == "baseline"
    assert content["mse_64"].shape == (8, 8) and torch.equal(content["mse_64"].T[0], content["mse_64"].T[7])
    assert (tmp_path / "map_maps.png").is_file() and not (tmp_path / "map.png").exists()
    output = stage(compute_heatmap_30, *flags, "--grid", 8).output
    assert "is kept" in output


@pytest.mark.parametrize("model_type", ["single_t", "no_t"])
def test_a_heatmap_of_the_fine_prediction_alone(stage, run, untrained, tmp_path, drawn, model_type):
    flags = run.heatmap_flags("unused")
    place = flags.index("--output")
    flags = [*flags[:place], *flags[place + 2 :], "--checkpoint", untrained(model_type)]
    stage(compute_heatmap_30, *flags)
    file = results_of("dual") / f"heatmap_4_{model_type}_2ep.pth"  # Its config is the dual model's.
    content = load_heatmap(file)
    assert content["model_type"] == model_type and content["jacobian"].keys() == {"HH", "HL"}
    assert not [name for name in content if "_32" in name and name not in ("num_pixels_32", "num_dims_32")]
    assert not [name for name in content if "total" in name]
    weight = 1 / (content["snr_grid"] * (1 + content["snr_grid"]))
    torch.testing.assert_close(content["error_64"], content["jacobian"]["HH"] / 16**4 * weight[:, None])
    log_snr = content["log_snr_grid"].numpy()
    cells, cost = find_optimal_path_n_steps_lambda(content["error_64"].numpy(), np.zeros((4, 4)), log_snr, 4, 5)
    assert content["samples_64"] == [list(cell) for cell in cells]
    assert content["timesteps_64"] == [[content["t_grid"][i].item() for i in cell] for cell in cells]
    assert content["costs"] == {"64": pytest.approx(cost)} and content["all_steps"].keys() == {"64"}
    assert content["all_steps"]["64"][4] == {"cells": content["samples_64"], "cost": pytest.approx(cost)}
    before = list_files(file.parent)
    assert "is kept" in stage(compute_heatmap_30, *flags).output and list_files(file.parent) == before
    stage(compute_heatmap_30, *flags, "--num_steps", 5)
    assert len(load_heatmap(file)["timesteps_64"]) == 6 and len(drawn) == 3


def test_figures_of_the_fine_prediction_alone(stage, run, untrained, tmp_path, monkeypatch):
    file = tmp_path / "maps/map.pth"
    with monkeypatch.context() as patched:
        patched.setattr(compute_heatmap_30, "draw", lambda content, file: None)
        stage(compute_heatmap_30, *run.heatmap_flags(file), "--checkpoint", untrained("single_t"))
    before = list_files(file.parent)
    output = stage(compute_heatmap_30, "--plot_only", "--output", file, *STEPS).output
    assert "DP-64: " in output and "DP-Total" not in output
    after = list_files(file.parent)
    assert after.keys() == {"map.pth", "map.png", "map_maps.png"} and after["map.pth"] == before["map.pth"]
    # One panel where a model that predicts both scales has two, and one row where it has two.
    sizes = {}
    for place in (file, run.heatmap):
        for suffix in (".png", "_maps.png"):
            with Image.open(place.with_name(place.stem + suffix)) as figure:
                sizes[place, suffix] = figure.size
    assert sizes[file, ".png"][0] < 0.7 * sizes[run.heatmap, ".png"][0]
    assert sizes[file, "_maps.png"][1] < 0.8 * sizes[run.heatmap, "_maps.png"][1]


def test_a_heatmap_from_before_models_were_told_apart_is_kept(stage, run, tmp_path, monkeypatch):
    titles = []
    for name in ("plot_maps", "plot_heatmap_pair"):
        monkeypatch.setattr(compute_heatmap_30, name, lambda *arguments: titles.extend(arguments[4:]))
    content = load_heatmap(run.heatmap)
    assert content.pop("model_type") == "dual"
    save_heatmap(tmp_path / "map.pth", content)
    before = list_files(tmp_path)
    assert "is kept" in stage(compute_heatmap_30, *run.heatmap_flags(tmp_path / "map.pth")).output
    assert list_files(tmp_path)["map.pth"] == before["map.pth"]
    assert titles[0] == "epoch 2, raw weights" and titles[-1] == "epoch 2, raw weights, factor B, 4 steps"


def test_an_error_map_needs_images_like_those_of_training(refused, run, tmp_path):
    (tmp_path / "grey").mkdir()
    for k, pixels in enumerate(run.images()[:3]):
        Image.fromarray(pixels[0]).save(tmp_path / f"grey/{k}.png")
    load_images(str(tmp_path / "grey"), 16, run.cache)
    flags = [*run.heatmap_flags(tmp_path / "map.pth"), "--dataset", tmp_path / "grey"]
    refused(compute_heatmap_30, *flags, says=(tmp_path / "grey", "1 channel(s)", run.lift, "--dataset"))


@pytest.fixture(scope="module")
def zero_terminal(stage, tiny, run, tmp_path_factory):
    """A checkpoint whose schedule ends at zero SNR."""
    folder = tmp_path_factory.mktemp("zero")
    flags = ("--beta_schedule", "linear_zero_terminal", "--prediction_type", "v", "--epochs", 1)
    stage(train_lift, *tiny(folder), "--cache_dir", run.cache, *flags)
    return folder / "checkpoints/lift_dual_timestep_1ep.pth"


def test_a_map_starts_below_zero_snr(stage, refused, run, zero_terminal, tmp_path, drawn):
    flags = [*run.heatmap_flags(tmp_path / "map.pth"), "--checkpoint", zero_terminal]
    says = (zero_terminal, "'linear_zero_terminal'", "SNR is 0 at timestep 999", "--start", "998")
    refused(compute_heatmap_30, *flags, "--start", 999, says=says, keeps=(run.folder,))
    stage(compute_heatmap_30, *flags, "--grid_spacing", "uniform_log_snr")
    content = load_heatmap(tmp_path / "map.pth")
    assert content["start"] == content["t_grid"][0] == 998 and content["log_snr_grid"].isfinite().all()
    # Even in log SNR, as far as timesteps allow.
    log_snr = load_model(zero_terminal).scheduler.log_snr
    nearest = [(log_snr - x).abs()[1:-1].argmin() + 1 for x in np.linspace(log_snr[998], log_snr[0], 4)[1:-1]]
    assert content["t_grid"].tolist() == [998, *nearest, 0]
    assert not any(t.requires_grad for t in content.values() if isinstance(t, torch.Tensor))


def test_a_heatmap_of_the_first_version_is_named_and_replaced(stage, refused, run, tmp_path, drawn):
    file = tmp_path / "map.pth"
    torch.save(load_heatmap(run.heatmap) | {"format_version": 1}, file)
    says = (file, "format version 1", "compute it again", "--force")
    refused(compute_heatmap_30, *run.heatmap_flags(file), says=says)
    refused(compute_heatmap_30, "--plot_only", "--output", file, says=says)
    flags = run.generate_flags(tmp_path / "samples", "dp_64")
    refused(generate_with_path_30, *flags, "--heatmap", file, says=says)
    stage(compute_heatmap_30, *run.heatmap_flags(file), "--force")
    torch.testing.assert_close(load_heatmap(file)["jacobian"], load_heatmap(run.heatmap)["jacobian"])


@pytest.fixture
def denoiser(monkeypatch):
    """`denoiser(make)`: heatmaps are computed with what `make` makes of the function of the model."""

    def replace(make):
        def load(*arguments):
            loaded = load_model(*arguments)
            loaded.model.denoise = make(loaded.model.denoise)
            return loaded

        monkeypatch.setattr(heatmap_module, "load_model", load)

    return replace


def test_a_network_that_is_not_finite_is_named(refused, run, tmp_path, denoiser):
    denoiser(lambda denoise: lambda xs, ts: tuple(x * float("nan") for x in denoise(xs, ts)))
    flags = run.heatmap_flags(tmp_path / "map.pth")
    refused(compute_heatmap_30, *flags, says=("not finite", "damaged"), keeps=(run.folder,))


def test_an_interrupted_heatmap_goes_on(stage, run, tmp_path, drawn, denoiser):
    calls = []

    def counting(limit):
        def make(denoise):
            def call(xs, ts):
                if len(calls) == limit:
                    raise KeyboardInterrupt
                calls.append(len(xs[0]))
                return denoise(xs, ts)

            return call

        return make

    flags = run.heatmap_flags(tmp_path / "map.pth")
    denoiser(counting(5))
    assert run_stage(compute_heatmap_30, *flags).status == 130
    assert list_files(tmp_path).keys() == {"map.pth.part0"}
    # Work with another seed neither uses nor hurts it, once it is done under another name.
    denoiser(counting(None))
    stage(compute_heatmap_30, *run.heatmap_flags(tmp_path / "other.pth"), "--seed", 1)
    assert list_files(tmp_path).keys() == {"map.pth.part0", "other.pth"} and calls == [2] * 21
    stage(compute_heatmap_30, *flags)
    assert calls == [2] * (21 + 11)
    assert list_files(tmp_path).keys() == {"map.pth", "other.pth"}
    assert_same(load_heatmap(tmp_path / "map.pth"), load_heatmap(run.heatmap))


def test_parts_of_other_settings_are_computed_again(stage, run, tmp_path, drawn, denoiser):
    flags = run.heatmap_flags(tmp_path / "map.pth")
    calls = []

    def make(denoise):
        def call(xs, ts):
            calls.append(len(xs[0]))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return denoise(xs, ts)

        return call

    denoiser(make)
    assert run_stage(compute_heatmap_30, *flags, "--seed", 1).status == 130
    stage(compute_heatmap_30, *flags)
    assert len(calls) == 4 + 16 and list_files(tmp_path).keys() == {"map.pth"}
    assert_same(load_heatmap(tmp_path / "map.pth"), load_heatmap(run.heatmap))


def test_denoising_errors_alone_are_those_of_the_whole_map(stage, refused, run, tmp_path, drawn):
    file, whole = tmp_path / "map.pth", load_heatmap(run.heatmap)
    stage(compute_heatmap_30, *run.heatmap_flags(file), "--maps", "mse")
    content = load_heatmap(file)
    assert content["maps"] == "mse" and not {"jacobian", "samples_64", "error_64", "factor"} & content.keys()
    for name in ("mse_64", "mse_32", "mse_64_low", "mse_64_se", "eps_mse_32"):
        torch.testing.assert_close(content[name], whole[name])
    assert "is kept" in stage(compute_heatmap_30, *run.heatmap_flags(file), "--maps", "mse").output
    refused(compute_heatmap_30, *run.heatmap_flags(file), says=(file, "another maps", "--force"))
    flags = run.generate_flags(tmp_path / "samples", "dp_64")
    refused(generate_with_path_30, *flags, "--heatmap", file, says=("denoising errors only", "--maps all"))
    # No path is made of it here, so that none need be possible.
    stage(compute_heatmap_30, *run.heatmap_flags(file), "--maps", "mse", "--max_jump", 1, "--num_steps", 2)


def test_figures_of_denoising_errors_alone(stage, run, tmp_path):
    stage(compute_heatmap_30, *run.heatmap_flags(tmp_path / "map.pth"), "--maps", "mse")
    assert list_files(tmp_path).keys() == {"map.pth", "map_maps.png"}
    stage(compute_heatmap_30, "--plot_only", "--output", tmp_path / "map.pth")


def test_a_thinned_heatmap_says_so(stage, run, tmp_path, drawn):
    file, whole = tmp_path / "map.pth", load_heatmap(run.heatmap)
    stage(compute_heatmap_30, *run.heatmap_flags(file), "--coarse", 3, "--maps", "blocks")
    content = load_heatmap(file)
    # Lines 0, 2 and 3 of 4: 1.5 rounds to an even number.
    lines = torch.tensor([0, 2, 3])
    assert content["coarse"] == 3 and content["measured"].nonzero().tolist() == [
        [i, j] for i in (0, 2, 3) for j in (0, 2, 3)
    ]
    for name in ("HH", "LL"):
        cells = (lines[:, None], lines)
        torch.testing.assert_close(content["jacobian"][name][cells], whole["jacobian"][name][cells], rtol=1e-5, atol=0)
    assert content["interpolation_error"]["cells"] == [[1, 1]] * 3 and "mse_64" not in content
    assert content["interpolation_error"]["HH"]["max"] > 0 and len(content["samples_total"]) == 5


def test_jacobians_of_the_clean_image_are_kept_apart(stage, refused, run, tmp_path, drawn):
    file, whole = tmp_path / "map.pth", load_heatmap(run.heatmap)
    stage(compute_heatmap_30, *run.heatmap_flags(file), "--of", "x0")
    content = load_heatmap(file)
    assert content["of"] == "x0" and whole["of"] == "eps"
    # ∂x̂0_64/∂x_32 is ∂ε̂_64/∂x_32 over √SNR_64, whatever the probes.
    expected = whole["jacobian"]["HL"] / whole["snr_grid"][:, None]
    # At t = 0, 1 - abar is 1e-4 and has four digits in fp32.
    torch.testing.assert_close(content["jacobian"]["HL"], expected, rtol=1e-3, atol=0)
    refused(compute_heatmap_30, *run.heatmap_flags(file), says=(file, "another of", "--force"))


@pytest.mark.parametrize(("deviation", "used"), [(0.5, "bf16"), (1.5, "fp32"), (float("nan"), "fp32")])
def test_bf16_is_used_where_it_changes_less_than_chance(stage, run, tmp_path, drawn, monkeypatch, deviation, used):
    monkeypatch.setattr(heatmap_module, "resolve_precision", lambda device, name: "bf16")
    monkeypatch.setattr(heatmap_module, "largest_deviation", lambda *maps: deviation)
    flags = [*run.heatmap_flags(tmp_path / "map.pth"), "--precision", "auto"]
    output = stage(compute_heatmap_30, *flags).output
    assert f"bf16 differs from fp32 by at most {deviation:.2g} standard errors: {used}\n" in output
    ours, exact = (load_heatmap(file)["jacobian"]["HH"] for file in (tmp_path / "map.pth", run.heatmap))
    assert torch.equal(ours, exact) == (used == "fp32")
    torch.testing.assert_close(ours, exact, rtol=0.2, atol=0)


def test_a_grid_of_two_lines_is_probed_too(stage, run, tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(heatmap_module, "resolve_precision", lambda device, name: "bf16")
    flags = [*run.heatmap_flags(tmp_path / "map.pth"), "--precision", "auto", "--grid", 2, "--num_steps", 2]
    assert "standard errors: " in stage(compute_heatmap_30, *flags).output
    assert load_heatmap(tmp_path / "map.pth")["t_grid"].tolist() == [999, 0]


def test_two_processes_compute_one_heatmap(run, tmp_path):
    flags = [*run.heatmap_flags(tmp_path / "map.pth"), "--maps", "mse"]  # Of which one figure is quick.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [ROOT / "compute_heatmap_30.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(f"heatmap {tmp_path / 'map.pth'}") == 1
    assert list_files(tmp_path).keys() == {"map.pth", "map_maps.png"}
    content, whole = load_heatmap(tmp_path / "map.pth"), load_heatmap(run.heatmap)
    for name in ("mse_64", "mse_32", "mse_64_se"):
        torch.testing.assert_close(content[name], whole[name], rtol=1e-5, atol=0)


def test_plot_only_needs_a_whole_heatmap(refused, run, tmp_path):
    file = tmp_path / "map.pth"
    refused(compute_heatmap_30, "--plot_only", says=("--checkpoint FILE or --run NAME",), status=2)
    refused(compute_heatmap_30, "--output", file, says=("--checkpoint",), status=2)
    refused(compute_heatmap_30, "--plot_only", "--output", file, says=(file, "does not exist"))
    file.write_bytes(run.heatmap.read_bytes()[:-100])
    refused(compute_heatmap_30, "--plot_only", "--output", file, says=(file, "damaged"))
    refused(compute_heatmap_30, "--plot_only", "--output", run.lift, says=(run.lift, "not a heatmap"))


# Samples


def images_in(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("[0-9]*.png"))}


def assert_same_images(some, others):
    """Up to rounding: kernels add in another order in another batch, which shows as one grey level here and there."""
    assert some.keys() == others.keys()
    for name in some:
        one, other = (np.asarray(Image.open(io.BytesIO(png[name]))).astype(int) for png in (some, others))
        difference = np.abs(one - other)
        assert difference.max() <= 1 and difference.mean() < 0.01


@pytest.fixture(scope="session")
def samples(stage, run):
    """`samples(path_type)` is the folder of its five images and what the stage said."""
    made = {}

    def make(path_type):
        if path_type not in made:
            folder = run.folder / "samples" / path_type
            made[path_type] = folder, stage(generate_with_path_30, *run.generate_flags(folder, path_type)).output
        return made[path_type]

    return make


@pytest.mark.parametrize("path_type", ["baseline", "diagonal", "dp_64", "dp_total"])
def test_images_are_named_by_seed_and_cost_num_steps_calls(run, samples, path_type):
    folder, output = samples(path_type)
    kind = path_type.replace("baseline", "diagonal")
    assert list(images_in(folder)) == [f"{FIRST_SEED + k:012d}.png" for k in range(5)]
    assert f"5 images in {folder}: 5 new with 4 network calls each; path {kind} " in output
    path = load_schedule(folder / "schedule.json")
    assert (path.kind, path.nfe, path.num_scales) == (kind, 4, 1 if path_type == "baseline" else 2)
    assert path.fingerprint() in output
    if kind == "diagonal":
        assert path.points == diagonal(4, num_scales=path.num_scales).points
    else:
        points = load_heatmap(run.heatmap)[f"timesteps_{path_type.removeprefix('dp_')}"]
        assert [list(point) for point in path.points] == points
    schedule = json.loads((folder / "schedule.json").read_text())
    checkpoint = run.baseline if path_type == "baseline" else run.lift
    assert schedule["model_fingerprint"] == load_model(checkpoint).fingerprint
    with Image.open(folder / f"{FIRST_SEED:012d}.png") as image:
        assert image.size == (16, 16) and len(np.unique(np.asarray(image))) > 20
    with Image.open(folder / "figures/grid.png") as grid:
        assert grid.size == (5 * 18 + 2, 18 + 2)


def test_models_paths_and_weights_make_different_images(stage, run, samples, tmp_path):
    flags = run.generate_flags(tmp_path / "ema")
    stage(generate_with_path_30, *flags, "--ema")
    folders = [tmp_path / "ema", *(samples(p)[0] for p in ("baseline", "diagonal", "dp_64"))]
    images = [image for folder in folders for image in images_in(folder).values()]
    assert len(set(images)) == 20


@pytest.mark.parametrize("path_type", ["baseline", "diagonal", "dp_total"])
@pytest.mark.parametrize(("batch_size", "count"), [(1, 3), (2, 5), (5, 7)])
def test_an_image_is_the_same_in_every_batch(stage, run, samples, tmp_path, path_type, batch_size, count):
    flags = run.generate_flags(tmp_path / "samples", path_type, count)
    stage(generate_with_path_30, *flags, "--batch_size", batch_size)
    expected, made = images_in(samples(path_type)[0]), images_in(tmp_path / "samples")
    assert len(made) == count
    shared = expected.keys() & made.keys()
    assert len(shared) == min(count, 5)
    assert_same_images({name: made[name] for name in shared}, {name: expected[name] for name in shared})


def test_ancestral_noise_belongs_to_the_image_too(stage, run, tmp_path):
    folders = [tmp_path / name for name in ("one", "many", "ddim")]
    for folder, flags in zip(folders, (["--eta", 1, "--batch_size", 1], ["--eta", 1], []), strict=True):
        stage(generate_with_path_30, *run.generate_flags(folder, count=3), *flags)
    one, many, ddim = map(images_in, folders)
    assert_same_images(one, many)
    assert not set(one.values()) & set(ddim.values())


def test_only_missing_images_are_made(stage, run, samples, tmp_path):
    folder = tmp_path / "samples"
    shutil.copytree(samples("diagonal")[0], folder)
    complete = images_in(folder)
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("[0-9]*.png")}
    ended = stage(generate_with_path_30, *run.generate_flags(folder))
    assert f"5 images in {folder}: all there already" in ended.output
    name = f"{FIRST_SEED + 2:012d}.png"
    (folder / name).unlink()
    ended = stage(generate_with_path_30, *run.generate_flags(folder))
    assert "1 new with 4 network calls each" in ended.output
    assert images_in(folder) == complete
    assert all((folder / n).stat().st_mtime_ns == time for n, time in times.items() if n != name)


def test_a_schedule_file_replays_its_path_without_a_heatmap(stage, run, samples, tmp_path):
    made, _ = samples("dp_total")
    folder = tmp_path / "replayed"
    flags = ["--checkpoint", run.lift, "--output", folder, "--num_images", 5, *HARDWARE, "--num_steps", 9]
    ended = stage(generate_with_path_30, *flags, "--schedule", made / "schedule.json", "--heatmap", "missing.pth")
    assert "5 new with 4 network calls each; path dp_total" in ended.output
    assert images_in(folder) == images_in(made)
    again = load_schedule(folder / "schedule.json")
    assert again == load_schedule(made / "schedule.json")


def test_default_folders_tell_the_parameters_of_a_path_and_the_feed(stage, refused, run, tmp_path):
    flags = ["--num_images", 1, *STEPS, *HARDWARE]
    heatmap = ["--heatmap", run.heatmap]
    for path_type in ("cascade:2,1", "cascade:best", "shift:-1.5", "lead:2", "heuristic:0.8"):
        stage(generate_with_path_30, "--checkpoint", run.lift, *flags, *heatmap, "--path_type", path_type)
    content = torch.load(run.lift, weights_only=True)
    content["config"]["model_type"] = "no_t"
    torch.manual_seed(0)
    content["model_state"] = build_model(content["config"]).state_dict()
    torch.save(content, "no_t_2ep.pth")
    ablation = ["--checkpoint", "no_t_2ep.pth", *flags]
    made = stage(generate_with_path_30, "--checkpoint", run.lift, *flags).output
    samples = results_of("dual") / "samples"
    plan = samples / "lift_dual_timestep_2ep_raw_lead_2_4/schedule.json"
    stage(generate_with_path_30, *ablation, "--path_type", f"schedule:{plan}", "--num_steps", 9)
    for feed in ("x0", "noisy"):
        stage(generate_with_path_30, *ablation, "--coarse_from", feed, "--trajectory")
    folders = {path.name: path for path in samples.iterdir()}
    lift, no_t = "lift_dual_timestep_2ep_raw", "no_t_2ep_raw"
    kinds = ("cascade_2_1", "cascade_best", "shift_-1.5", "lead_2", "heuristic_0.8", "diagonal")
    names = {f"{lift}_{kind}_4" for kind in kinds} | {f"{no_t}_diagonal_4_{feed}" for feed in ("x0", "noisy")}
    assert folders.keys() == names | {f"{no_t}_schedule_schedule_4_x0"} and "path diagonal" in made
    images = [image for folder in folders.values() for image in images_in(folder).values()]
    assert len(set(images)) == len(images) == 9
    settings = {name: json.loads((folder / "settings.json").read_text()) for name, folder in folders.items()}
    assert {name for name in names if "coarse_from" in settings[name]} == {name for name in names if "no_t" in name}
    assert settings[f"{no_t}_diagonal_4_noisy"]["coarse_from"] == "noisy"
    assert load_schedule(folders[f"{lift}_cascade_best_4"] / "schedule.json").kind == "cascade"
    # Images of another feed do not share a folder, and those of the dual model have none.
    folder = folders[f"{no_t}_diagonal_4_noisy"]
    refused(generate_with_path_30, *ablation, "--output", folder, says=(folder, "another coarse_from"))
    output = ["--output", folders[f"{lift}_diagonal_4"], "--coarse_from", "noisy"]
    assert "all there" in stage(generate_with_path_30, "--checkpoint", run.lift, *flags, *output).output
    refused(
        generate_with_path_30, *ablation, "--path_type", "dp_total", says=("dp_total", "coarse prediction", "dp_64")
    )


@pytest.mark.parametrize("path_type", ["baseline", "dp_64"])
def test_a_trajectory_is_drawn_and_changes_no_image(stage, run, samples, tmp_path, path_type):
    folder = tmp_path / "samples"
    shutil.copytree(samples(path_type)[0], folder)
    before = images_in(folder)
    stage(generate_with_path_30, *run.generate_flags(folder, path_type), "--trajectory")
    with Image.open(folder / "figures/trajectory.png") as figure:
        assert figure.width > figure.height > 50
    assert images_in(folder) == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ema"], ("weights_fingerprint",)),
        (["--num_steps", 5], ("path_fingerprint",)),
        (["--path_type", "dp_64"], ("path_fingerprint",)),
        (["--eta", 0.5], ("eta",)),
        (["--end", "t0"], ("end",)),
    ],
)
def test_images_made_otherwise_do_not_share_a_folder(refused, run, samples, flags, says):
    folder, _ = samples("diagonal")
    flags = [*run.generate_flags(folder), *flags]
    refused(generate_with_path_30, *flags, says=(folder, *says, "--output"), keeps=(folder,))


def test_forced_images_replace_all_of_the_others(stage, run, samples, tmp_path):
    folder = tmp_path / "samples"
    shutil.copytree(samples("diagonal")[0], folder)
    ended = stage(generate_with_path_30, *run.generate_flags(folder, "dp_64", 3), "--force")
    assert "3 new with 4 network calls each; path dp_64" in ended.output
    expected = images_in(samples("dp_64")[0])
    assert images_in(folder) == dict(list(expected.items())[:3])
    assert load_schedule(folder / "schedule.json").kind == "dp_64"


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--path_type", "dp_64", "--num_steps", 2, "--max_jump", 1], 1, ("2 steps", "at least 3 steps")),
        (["--path_type", "dp_64", "--heatmap", "missing.pth"], 1, ("missing.pth", "compute_heatmap_30.py")),
        (["--path_type", "dp_64", "--ema"], 1, ("heatmap_4_2ep.pth", "other weights", "ema")),
        (["--path_type", "zigzag"], 2, ("'zigzag'", "dp_total")),
        (["--path_type", "cascade:2,x"], 2, ("'cascade:2,x'", "LOG_SNR[,STEPS] or best")),
        (["--path_type", "cascade:2,4"], 1, ("4 of 4 steps",)),
        (["--path_type", "schedule:missing.json"], 1, ("missing.json",)),
        (["--coarse_from", "clean"], 2, ("'clean'", "noisy")),
        (["--schedule", "missing.json"], 1, ("missing.json",)),
        (["--num_steps", 1000], 1, ("num_steps is 1000",)),
        (["--num_images", 1_000_001], 1, ("1000001 images", "several seeds")),
        (["--eta", 2], 2, ("--eta", "'2'")),
        (["--seed", -1], 2, ("--seed", "'-1'")),
        (["--device", 77], 1, ("--device 77",)),
        (["--steps", 4], 2, ("--steps",)),
    ],
)
def test_generation_refuses(refused, run, tmp_path, flags, status, says):
    flags = [*run.generate_flags(tmp_path / "samples"), *flags]
    refused(generate_with_path_30, *flags, says=says, status=status, keeps=(run.folder,))


def test_a_baseline_cannot_follow_two_clocks(refused, run, samples, tmp_path):
    flags = run.generate_flags(tmp_path / "samples", "baseline")
    refused(generate_with_path_30, *flags, "--path_type", "dp_64", says=("dp_64", "two clocks", "'baseline'"))
    schedule = samples("dp_64")[0] / "schedule.json"
    refused(generate_with_path_30, *flags, "--schedule", schedule, says=(schedule, "2 scale(s)", "'baseline'"))


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b[:60] + bytes(20) + b[80:], lambda b: b""])
def test_a_damaged_image_is_named(refused, run, samples, tmp_path, damage):
    folder = tmp_path / "samples"
    shutil.copytree(samples("diagonal")[0], folder)
    file = folder / f"{FIRST_SEED + 1:012d}.png"
    file.write_bytes(damage(file.read_bytes()))
    before = images_in(folder)
    ended = run_stage(generate_with_path_30, *run.generate_flags(folder))
    assert ended.status == 1 and str(file) in ended.message and "damaged" in ended.message
    assert images_in(folder) == before


# Damaged checkpoints


def truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def text(file):
    file.write_text("not a checkpoint")


def foreign(file):
    torch.save({"weight": torch.zeros(3)}, file)


@pytest.mark.parametrize("damage", [truncated, text, foreign, Path.unlink])
def test_a_checkpoint_that_is_none_is_named_by_every_stage(refused, run, tmp_path, damage):
    file = tmp_path / "checkpoints" / run.lift.name
    file.parent.mkdir()
    shutil.copy(run.lift, file)
    damage(file)
    flags = ["--checkpoint", file]
    refused(compute_heatmap_30, *run.heatmap_flags(tmp_path / "map.pth"), *flags, says=(file,))
    refused(generate_with_path_30, *run.generate_flags(tmp_path / "samples"), *flags, says=(file,))
    says = (file,) if file.exists() else (file.parent, "has no lift_dual_timestep checkpoint")
    flags = [*run.eval_flags(tmp_path / "scores.csv"), "--model_type", "lift", "--checkpoint_dir", file.parent]
    refused(eval_fid_batch, *flags, says=says)


def test_ema_weights_that_were_not_kept_are_refused_by_every_stage(refused, stage, tiny, run, tmp_path):
    stage(train_lift, *tiny(tmp_path), "--ema_decay", 0, "--epochs", 1)
    file = tmp_path / "checkpoints/lift_dual_timestep_1ep.pth"
    flags = ["--checkpoint", file, "--ema"]
    says = (file, "no EMA weights", "--ema")
    refused(compute_heatmap_30, *run.heatmap_flags(tmp_path / "map.pth"), *flags, says=says)
    refused(generate_with_path_30, *run.generate_flags(tmp_path / "samples"), *flags, says=says)
    flags = ["--model_type", "lift", "--checkpoint_dir", file.parent, "--ema"]
    refused(eval_fid_batch, *run.eval_flags(tmp_path / "scores.csv"), *flags, says=says)


# Table and figures


def test_the_table_holds_mean_and_deviation_over_seeds(stage, table, tmp_path):
    ended = stage(aggregate_results, "--input", table, "--output", tmp_path / "new/table")
    with open(tmp_path / "new/table.csv", newline="") as stream:
        rows = {(row["model_type"], row["path_type"]): row for row in csv.DictReader(stream)}
    assert set(rows) == set(MEASURED)
    for key, row in rows.items():
        scores = [float(r["swd"]) for r in read_rows(table) if (r["model_type"], r["path_type"]) == key]
        assert float(row["swd_mean"]) == pytest.approx(np.mean(scores), abs=1e-9)
        assert float(row["swd_sd"]) == pytest.approx(np.std(scores, ddof=1), abs=1e-9)
        assert row["swd_seeds"] == "2" and row["fid_mean"] == ""
        assert f"{np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f} (2)" in ended.output
    assert ended.output.strip() == (tmp_path / "new/table.md").read_text().strip()
    assert "| Baseline | LIFT diagonal | LIFT DP-64 |" in ended.output


def test_nothing_to_aggregate(refused, tmp_path):
    refused(aggregate_results, "--input", tmp_path / "none.csv", "--output", tmp_path / "table", says=("no result",))


def figure_inputs(run, table, samples):
    folders = {name: samples(name)[0] for name in ("baseline", "diagonal", "dp_64")}
    return {
        "losses": [run.folder / "logs/baseline", run.folder / "logs/lift_dual_timestep"],
        "paths": [f"{name}={folder}/schedule.json" for name, folder in folders.items() if name != "baseline"],
        "paths_epochs": [run.heatmap, "--title", "paths"],
        "scores": [table, "--metric", "swd", "--title", "scores"],
        "nfe": [f"here={table}", "--metric", "swd"],
        "samples": [*(f"{name}={folder}" for name, folder in folders.items()), "--columns", 4],
    }


@pytest.mark.parametrize("figure", ["losses", "paths", "paths_epochs", "scores", "nfe", "samples"])
def test_every_figure_is_drawn(stage, run, table, samples, tmp_path, figure):
    output = tmp_path / "figure.png"
    stage(make_figures, figure, *figure_inputs(run, table, samples)[figure], "--output", output)
    with Image.open(output) as image:
        assert min(image.size) > 200
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["losses", "missing"], 1, ("missing/metrics.jsonl does not exist", "log folder")),
        (["paths", "a=missing.json"], 1, ("missing.json",)),
        (["paths_epochs", "HEATMAP", "HEATMAP"], 1, ("second heatmap of epoch 2 with raw weights",)),
        (["paths_epochs", "missing.pth"], 1, ("missing.pth does not exist",)),
        (["samples", "a=here", "a=there"], 1, ("'a'", "NAME=")),
        (["samples", "a=missing"], 1, ("missing holds no generated images",)),
        (["scores", "TABLE"], 1, ("fid",)),
        (["scores", "TABLE", "--metric", "kid"], 1, ("no row", "kid")),
        (["scores", "TABLE", "--metric", "beauty"], 2, ("'beauty'",)),
        (["nfe", "TABLE"], 1, ("holds no fid",)),
        (["nfe", "TABLE", "--metric", "swd", "--path_type", "kl"], 1, ("holds no swd of what is asked for",)),
        (["nfe", "TABLE", "--metric", "kid_sd"], 1, ("holds no kid_sd",)),
        (["nfe", "TABLE", "--regime", "bnad:2"], 2, ("bnad:2",)),
        (["nfe", "TABLE", "--path_type", "zigzag"], 2, ("'zigzag'",)),
        (["spirals", "a"], 2, ("'spirals'",)),
    ],
)
def test_figures_of_nothing_are_refused(refused, run, table, tmp_path, flags, status, says):
    flags = [{"TABLE": str(table), "HEATMAP": str(run.heatmap)}.get(flag, flag) for flag in flags]
    refused(make_figures, *flags, "--output", tmp_path / "figure.png", says=says, status=status)


def test_scores_stand_against_calls_by_table_and_series(stage, refused, table, tmp_path, monkeypatch):
    """Every point is the mean and the deviation over seeds of the rows of its series."""
    other, mixed, rows = tmp_path / "other.csv", tmp_path / "mixed.csv", read_rows(table)
    for row in rows:
        append_row(other, row)
        more = {"nfe": 7, "swd": float(row["swd"]) + 2, "regime": "same" if row["model_type"] == "dual" else ""}
        append_row(other, row | more)
        append_row(mixed, row)
        append_row(mixed, row | {"weights": "ema" if row["weights"] == "raw" else "raw"})
    drawn = []
    monkeypatch.setattr(make_figures, "plot_scores_against_nfe", lambda panels, *others: drawn.append(panels))
    flags = [f"a={table}", f"b={other}", "--metric", "swd", "--output", tmp_path / "figure.png"]
    stage(make_figures, "nfe", *flags, "--path_type", "diagonal")
    stage(make_figures, "nfe", *flags, "--regime", "same")

    def points(curves):
        scores = {}
        for row in rows:
            scores.setdefault((row["model_type"], row["path_type"], int(row["nfe"])), []).append(float(row["swd"]))
        sums = {key: (np.mean(of_seeds), np.std(of_seeds, ddof=1)) for key, of_seeds in scores.items()}
        return {
            title: {nfe: pytest.approx((sums[key][0] + more, sums[key][1])) for nfe, more, key in of_curve}
            for title, of_curve in curves.items()
        }

    (nfe,) = {int(row["nfe"]) for row in rows}
    baseline, diagonal, dp = (*[(name, "diagonal", nfe) for name in ("baseline", "dual")], ("dual", "dp_64", nfe))
    again = {"Baseline": [(nfe, 0, baseline), (7, 2, baseline)], "LIFT diagonal": [(nfe, 0, diagonal)]}
    again["LIFT diagonal, same"] = [(7, 2, diagonal)]
    first = {"Baseline": [(nfe, 0, baseline)], "LIFT diagonal": [(nfe, 0, diagonal)]}
    assert drawn[0] == {"a": points(first), "b": points(again)}
    only = {"Baseline": again["Baseline"], "LIFT diagonal, same": again["LIFT diagonal, same"]}
    only["LIFT DP-64, same"] = [(7, 2, dp)]
    assert drawn[1] == {"a": points({"Baseline": [(nfe, 0, baseline)]}), "b": points(only)}
    stage(make_figures, "nfe", *flags, "--path_type", "diagonal", "--hide_regime")
    one_name = {"Baseline": again["Baseline"], "LIFT diagonal": [(nfe, 0, diagonal), (7, 2, diagonal)]}
    assert drawn[2] == {"a": points(first), "b": points(one_name)}
    flags = ["nfe", mixed, "--metric", "swd", "--output", tmp_path / "figure.png"]
    refused(make_figures, *flags, says=("two results of Baseline", "raw and EMA weights"))
    for row in rows:
        append_row(other, row | {"regime": "same" if row["model_type"] == "dual" else ""})
    flags = ["nfe", other, "--metric", "swd", "--output", tmp_path / "figure.png", "--hide_regime"]
    refused(make_figures, *flags, says=("two results of LIFT diagonal", "two regimes"))
    fewer = tmp_path / "fewer.csv"
    for row in rows:
        append_row(fewer, row | {"num_images": 7})
    flags = ["nfe", f"a={table}", f"b={fewer}", "--metric", "swd", "--output", tmp_path / "figure.png"]
    refused(make_figures, *flags, says=("scores with num_images", "7", "do not compare"))


def test_samples_of_other_seeds_do_not_stand_beside_each_other(refused, stage, run, samples, tmp_path):
    stage(generate_with_path_30, *run.generate_flags(tmp_path / "other", count=2), "--seed", 43)
    inputs = [f"a={samples('diagonal')[0]}", f"b={tmp_path / 'other'}"]
    refused(make_figures, "samples", *inputs, "--output", tmp_path / "figure.png", says=("share no seed", "--seed"))


# Flags


@pytest.mark.parametrize("module", STAGES, ids=lambda module: module.__name__)
def test_help_and_unknown_flags(stage, refused, module):
    output = stage(module, "--help").output
    assert output.startswith(f"usage: {module.__name__}.py")
    # The commands of the docstring come as they are written.
    assert module.__doc__.strip().splitlines()[0] in output
    refused(module, "--no_such_flag", says=(), status=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_make_no_images(refused, run, tmp_path, value):
    content = read_checkpoint(run.lift)
    content["model_state"] = {
        name: torch.full_like(weights, value) if weights.is_floating_point() else weights
        for name, weights in content["model_state"].items()
    }
    save_checkpoint(tmp_path / "broken.pth", content)
    flags = ["--checkpoint", tmp_path / "broken.pth", "--num_steps", 2, *HARDWARE]
    says = ["NaN or infinite", "another checkpoint"]
    ended = run_stage(generate_with_path_30, *flags, "--num_images", 3, "--output", tmp_path / "samples")
    assert ended.status == 1 and all(part in ended.message for part in [*says, "seed 42000000"])
    assert not list((tmp_path / "samples").glob("[0-9]*.png"))
    ended = run_stage(interpolate, *flags, "--seeds", 1, 2, "--frames", 3, "--output", tmp_path / "frames")
    assert ended.status == 1 and all(part in ended.message for part in [*says, "frame_000"])
    assert not list((tmp_path / "frames").glob("frame_*.png"))


def stage_process(*words, **options):
    """A stage in a process of its own, whose output is bytes."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, **options)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_terminal_of_few_letters_loses_letters_and_no_results(table, tmp_path, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    flags = ["--input", table, "--output", tmp_path / "t"]
    process = stage_process("aggregate_results.py", *flags, env=environment)
    said = process.communicate()[0].decode(encoding)
    assert process.returncode == 0 and "| epoch |" in said
    assert "±" in (tmp_path / "t.md").read_text(encoding="utf-8")


def test_a_reader_that_leaves_ends_a_stage_quietly(table, tmp_path):
    process = stage_process(
        "aggregate_results.py", "--input", table, "--output", tmp_path / "t", stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 128 + 13
    assert (tmp_path / "t.md").exists()


# Shell scripts

SCRIPTS = sorted(ROOT.glob("scripts/*.sh"))
RUNNABLE = [script for script in SCRIPTS if script.name not in ("common.sh", "ddpm.sh")]


def run_script(checkout, name, *arguments, **settings):
    """The process, and the commands given to Python."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": "false", **settings}
    ended = subprocess.run(
        ["bash", f"scripts/{name}", *arguments], cwd=checkout, env=environment, capture_output=True, text=True
    )
    commands = checkout / "commands"
    lines = commands.read_text().split("\0\n\0") if commands.exists() else []
    return ended, [line.split("\0") for line in lines if line]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda script: script.name)
def test_scripts_explain_themselves_without_doing_anything(checkout, script):
    assert os.access(script, os.X_OK)
    for flag in ("--help", "-h"):
        ended, commands = run_script(checkout, script.name, flag)
        assert ended.returncode == 0 and f"./scripts/{script.name}" in ended.stdout
        assert "set -euo" not in ended.stdout and not ended.stdout.startswith("#") and commands == []


@pytest.mark.parametrize("script", [s for s in RUNNABLE if s.name != "test.sh"], ids=lambda script: script.name)
def test_scripts_refuse_what_they_do_not_know(checkout, script):
    ended, commands = run_script(checkout, script.name, "--nonsense")
    assert ended.returncode == 2 and commands == []
    assert ended.stderr.startswith("error: ") and "--nonsense" in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["compute_heatmap.sh", "plot_heatmap.sh"])
def test_scripts_ask_for_the_epochs_they_need(checkout, name):
    ended, commands = run_script(checkout, name)
    assert ended.returncode == 2 and "name the epochs" in ended.stderr and commands == []


def parsed(command):
    """The settings of one command of a script as its stage has them, those it was not given too."""
    [module] = [module for module in STAGES if f"{module.__name__}.py" == command[0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", command)
        settings = module.parse_args()
    command = {}
    if isinstance(settings, tuple):  # Of a stage with several commands.
        command, settings = {"figure": settings[0]}, settings[1]
    values = command | dataclasses.asdict(settings)
    return module, {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# What scripts name, although the stages would find it.
SAID = dict.fromkeys((train_baseline, train_lift), {"output_dir": "checkpoints", "log_dir": "logs"})
SAID[eval_fid_batch] = {
    "model_type": ["baseline", "lift"],
    "checkpoint_dir": "checkpoints",
    "heatmap_dir": "results",
    "output": "results/fid_results.csv",
}


def defaults(module, *required):
    return parsed([f"{module.__name__}.py", *required])[1] | SAID.get(module, {})


def test_scripts_train_with_the_defaults_of_the_stages(checkout):
    for argument, modules in (("baseline", [train_baseline]), ("lift", [train_lift])):
        (checkout / "commands").unlink(missing_ok=True)
        ended, commands = run_script(checkout, "train.sh", argument)
        assert ended.returncode == 0, ended.stderr
        assert [parsed(command) for command in commands] == [(module, defaults(module)) for module in modules]
    (checkout / "commands").unlink()
    settings = {"EPOCHS": "7", "HIDDEN_DIMS": "8,16", "LIMIT": "5", "DEVICE": "cpu"}
    ended, commands = run_script(checkout, "train.sh", **settings, TRAIN_ARGS="--flip --resume auto")
    changes = {"epochs": 7, "hidden_dims": [8, 16], "limit": 5, "device": "cpu", "flip": True, "resume": "auto"}
    expected = [(module, defaults(module) | changes) for module in (train_baseline, train_lift)]
    assert [parsed(command) for command in commands] == expected
