"""The stage of likelihoods: what it prints and writes, that it goes on where it was, and what it refuses."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch

import evaluate_likelihood
import train_baseline
import train_lift
from checkpoint import load_model
from conftest import HARDWARE, results_of
from data import fingerprint_array, load_images, split_holdout
from diffusion.elbo import ddpm_chain, elbo
from diffusion.likelihood import bits_per_dim, dequantised, log_likelihood
from diffusion.super_resolution import noise_seeds
from evaluate_likelihood import LikelihoodSettings, find_path
from images.representation import RESIDUAL
from paths.families import diagonal

# Tiny models are as rough as they are quick, and so are their walks.
ROUGH = ["--num_images", 4, "--tolerance", 0.1]
FEW = ["--method", "elbo", "--num_images", 4, "--num_steps", 20, "--timesteps", 4]
SAID = r"(\d+\.\d{3}) \+- (\d+\.\d{3}) bits per dimension \((\d+) images of (\w+), standard error over images; "


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A stage that falls back on a default place writes it here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def held_out(stage, tiny, run, tmp_path_factory):
    """A baseline and a model of the residual pair, trained without 4 of 12 images, by type."""
    folder = tmp_path_factory.mktemp("held_out")
    flags = [*tiny(folder), "--cache_dir", run.cache, "--holdout", 4, "--epochs", 1, "--lr", 0.003]
    stage(train_baseline, *flags)
    stage(train_lift, *flags, "--representation", "residual")
    stage(train_lift, *flags, "--model", "single_t")
    return {
        "baseline": folder / "checkpoints/baseline_1ep.pth",
        "dual": folder / "checkpoints/lift_dual_timestep_1ep.pth",
        "single_t": folder / "checkpoints/single_t_1ep.pth",
    }


def flags_of(checkpoint, run, *flags, method=ROUGH):
    return ["--checkpoint", checkpoint, *HARDWARE, "--cache_dir", run.cache, *method, *flags]


def rows_of(folder):
    with open(folder / "likelihood.csv") as stream:
        return list(csv.DictReader(stream))


def held_out_pixels(run, count=4):
    return torch.from_numpy(np.array(split_holdout(load_images("synthetic", 16, run.cache, limit=12), count)[1].pixels))


@pytest.mark.parametrize("kind", ["baseline", "dual"])
def test_held_out_images_are_measured(stage, run, held_out, tmp_path, kind):
    output = stage(evaluate_likelihood, *flags_of(held_out[kind], run, "--output", "out", "--batch_size", 3)).output
    mean, error, count, of = re.search(SAID + r"1 probe, tolerance 0.1, \d+ calls\)", output).groups()
    rows, pixels, loaded = rows_of(tmp_path / "out"), held_out_pixels(run), load_model(held_out[kind])
    assert (count, of) == ("4", "holdout") and "TRAINED ON" not in output and "precision fp32" in output
    assert [row["fingerprint"] for row in rows] == [fingerprint_array(image) for image in pixels.numpy()]
    # The same by the functions themselves; batches of another size round otherwise.
    path = find_path(LikelihoodSettings(checkpoint=held_out[kind]), loaded)[0]
    seeds = noise_seeds(pixels, 42)
    images = dequantised(pixels, seeds)
    scales = (images,) if kind == "baseline" else RESIDUAL.split(images)
    found = log_likelihood(loaded.denoise, loaded.scheduler, path, scales, 1, seeds, 0.1)
    bits = bits_per_dim(found.log_likelihood, 3 * 16 * 16)
    for row, value, nats, nfe in zip(rows, bits, found.log_likelihood, found.nfe, strict=True):
        assert float(row["bits_per_dim"]) == pytest.approx(value.item(), abs=0.01)
        assert float(row["log_likelihood"]) == pytest.approx(nats.item(), abs=5)
        assert abs(int(row["nfe"]) - nfe) <= 12
    values = torch.tensor([float(row["bits_per_dim"]) for row in rows], dtype=torch.float64)
    assert float(mean) == pytest.approx(values.mean().item(), abs=6e-4)
    assert float(error) == pytest.approx(values.std().item() / 2, abs=6e-4)
    said = json.loads((tmp_path / "out/settings.json").read_text())
    assert said["weights_fingerprint"] == loaded.fingerprint and said["path_fingerprint"] == path.fingerprint()
    assert (said["probes"], said["tolerance"], said["seed"], said["of"]) == (1, 0.1, 42, "holdout")
    assert said["precision"] == "fp32"


@pytest.mark.parametrize("kind", ["baseline", "dual"])
def test_the_bound_of_held_out_images(stage, run, held_out, tmp_path, kind):
    flags = flags_of(held_out[kind], run, "--output", "out", "--batch_size", 3, method=FEW)
    output = stage(evaluate_likelihood, *flags).output
    said = r"bits per dimension at most \((\d+) images of (\w+), standard error over images, "
    said += r"at most (\d+\.\d{3}) by draws; "
    how = r"elbo, variance beta, 4 of 20 steps, 6 calls\)"
    mean, error, count, of, drawn = re.search(r"(\d+\.\d{3}) \+- (\d+\.\d{3}) " + said + how, output).groups()
    rows, pixels, loaded = rows_of(tmp_path / "out"), held_out_pixels(run), load_model(held_out[kind])
    assert (count, of) == ("4", "holdout")
    # The same by the functions themselves.
    settings = LikelihoodSettings(checkpoint=held_out[kind], method="elbo", num_steps=20)
    path = find_path(settings, loaded)[0]
    chain = ddpm_chain(loaded.scheduler, path, "beta")
    found = elbo(loaded.denoise, loaded.scheduler, chain, pixels, 4, noise_seeds(pixels, 42))
    scale = 768 * math.log(2)
    for k, row in enumerate(rows):
        assert row["fingerprint"] == fingerprint_array(pixels[k].numpy()) and row["nfe"] == "6"
        values = {"elbo": found.elbo[k], "bits_per_dim": -found.elbo[k] / scale, "bits_error": found.error[k] / scale}
        values |= {"bits_prior": found.prior[k] / scale, "bits_last": found.last[k] / scale}
        assert len(row) == len(values) + 2
        for name, value in values.items():
            assert float(row[name]) == pytest.approx(value.item(), rel=1e-4, abs=1e-5)
    values = np.array([[float(row[name]) for name in ("bits_per_dim", "bits_error")] for row in rows])
    assert float(mean) == pytest.approx(values[:, 0].mean(), abs=6e-4)
    assert float(error) == pytest.approx(values[:, 0].std(ddof=1) / 2, abs=6e-4)
    assert float(drawn) == pytest.approx((values[:, 1] ** 2).sum() ** 0.5 / 4, abs=6e-4)
    said = json.loads((tmp_path / "out/settings.json").read_text())
    assert (said["method"], said["variance"], said["timesteps"], said["seed"]) == ("elbo", "beta", 4, 42)
    assert not {"probes", "tolerance"} & said.keys()


def test_the_chain_is_that_of_all_timesteps(run, held_out):
    for kind, points in (("baseline", [(999,), (998,)]), ("dual", [(999, 999)])):
        loaded = load_model(held_out[kind])
        path, name = find_path(LikelihoodSettings(checkpoint=held_out[kind], method="elbo"), loaded)
        assert path.nfe == 999 and list(path.points[: len(points)]) == points
        assert name == ("diagonal" if kind == "baseline" else "image_diagonal")


def test_bounds_are_not_computed_again_and_have_folders_of_their_own(
    stage, refused, run, held_out, tmp_path, monkeypatch
):
    flags = flags_of(held_out["baseline"], run, "--num_images", 2, method=FEW)
    stage(evaluate_likelihood, *flags)
    stage(evaluate_likelihood, *flags, "--variance", "beta_tilde")
    output = stage(evaluate_likelihood, *flags, "--timesteps", "all", "--num_images", 1).output
    assert re.search(
        r"\d bits per dimension at most \(1 image of holdout, at most 0\.\d+ by draws; .*all of 20 steps, 22 c", output
    )
    [place] = (tmp_path / "results").glob("*/likelihood")
    name = "baseline_1ep_raw_holdout_diagonal_20_elbo"
    assert {folder.name for folder in place.iterdir()} == {
        f"{name}_beta_4", f"{name}_beta_tilde_4", f"{name}_beta_all"
    }  # fmt: skip
    one, tilde = (rows_of(place / f"{name}_{variance}_4") for variance in ("beta", "beta_tilde"))
    assert [row["fingerprint"] for row in one] == [row["fingerprint"] for row in tilde]
    assert all(a["elbo"] != b["elbo"] for a, b in zip(one, tilde, strict=True))
    stage(evaluate_likelihood, *flags, "--num_images", 4)
    assert len(rows := rows_of(place / f"{name}_beta_4")) == 4 and rows[:2] == one
    monkeypatch.setattr(evaluate_likelihood, "elbo", lambda *args: pytest.fail("computed again"))
    assert "all there already" in stage(evaluate_likelihood, *flags).output
    flags = [*flags, "--output", place / f"{name}_beta_4"]
    for more, key in (
        (["--variance", "beta_tilde"], "variance"),
        (["--timesteps", 5], "timesteps"),
        (["--seed", 43], "seed"),
        (["--num_steps", 21], "path_fingerprint"),
    ):
        refused(evaluate_likelihood, *flags, *more, says=("holds results with another", key, "--force"))
    by_ode = flags_of(held_out["baseline"], run, "--output", place / f"{name}_beta_4")
    refused(evaluate_likelihood, *by_ode, says=("holds results with another", "method", "--force"))
    table = place / f"{name}_beta_4/likelihood.csv"
    table.write_text("fingerprint,bits_per_dim,log_likelihood,nfe\n")
    refused(evaluate_likelihood, *flags, says=("likelihood.csv is damaged", "another header"))


def test_the_path_is_that_of_the_model(run, held_out):
    one = find_path(LikelihoodSettings(checkpoint=held_out["baseline"]), load_model(held_out["baseline"]))[0]
    assert one.points == diagonal(1, num_scales=1).points
    dual, settings = load_model(held_out["dual"]), LikelihoodSettings(checkpoint=held_out["dual"])
    pair, kind = find_path(settings, dual)
    assert (kind, pair.nfe, pair.num_scales) == ("image_diagonal", 10, 2)
    log_snr = dual.scheduler.log_snr
    fine, coarse = pair.points[5]
    assert log_snr[coarse] - log_snr[fine] == pytest.approx(math.log(4), abs=0.02)
    other, kind = find_path(settings.but(path_type="shift:0", num_steps=3), dual)
    assert kind == "shift_0" and other.points == diagonal(3).points


def test_what_is_there_is_not_computed_again(stage, refused, run, held_out, tmp_path, monkeypatch):
    flags = flags_of(held_out["baseline"], run, "--output", "out")
    first = stage(evaluate_likelihood, *flags, "--num_images", 2).output
    before = rows_of(tmp_path / "out")
    assert "2 new" in first and len(before) == 2
    stage(evaluate_likelihood, *flags)
    after = rows_of(tmp_path / "out")
    # Those spread over four images are others than those over two, if not all; no row changes.
    assert after[:2] == before and {row["fingerprint"] for row in after} == {
        fingerprint_array(image) for image in held_out_pixels(run).numpy()
    }
    monkeypatch.setattr(evaluate_likelihood, "log_likelihood", lambda *args: pytest.fail("computed again"))
    again = stage(evaluate_likelihood, *flags, "--num_images", 2).output
    assert "all there already" in again and again.splitlines()[0] == first.splitlines()[0]
    for more, name in (
        (["--seed", 43], "seed"),
        (["--tolerance", 0.2], "tolerance"),
        (["--probes", 2], "probes"),
        (["--ema"], "weights_fingerprint"),
        (["--num_steps", 2], "path_fingerprint"),
        (["--on", "train"], "of"),
        (["--precision", "bf16"], "precision"),
    ):
        refused(evaluate_likelihood, *flags, *more, says=("out holds results with another", name, "--force"))


def test_other_settings_have_other_folders_and_are_replaced_on_demand(stage, run, held_out, tmp_path):
    flags = flags_of(held_out["baseline"], run, "--num_images", 1)
    output = stage(evaluate_likelihood, *flags).output
    assert re.match(
        r"-?\d+\.\d{3} bits per dimension \(1 image of holdout; 1 probe, tolerance 0.1, \d+ calls\)", output
    )
    stage(evaluate_likelihood, *flags, "--ema")
    output = stage(evaluate_likelihood, *flags, "--on", "train").output
    assert "NOTE: THE NETWORK WAS TRAINED ON THESE IMAGES" in output
    [place] = (tmp_path / "results").glob("*/likelihood")
    assert {folder.name for folder in place.iterdir()} == {
        "baseline_1ep_raw_holdout_diagonal_1", "baseline_1ep_ema_holdout_diagonal_1",
        "baseline_1ep_raw_train_diagonal_1",
    }  # fmt: skip
    assert place.parent == tmp_path / results_of("baseline")
    [old] = rows_of(place / "baseline_1ep_raw_holdout_diagonal_1")
    stage(evaluate_likelihood, *flags, "--seed", 43, "--probes", 3, "--force")
    [new] = rows_of(place / "baseline_1ep_raw_holdout_diagonal_1")
    assert new["fingerprint"] == old["fingerprint"] and new["bits_per_dim"] != old["bits_per_dim"]


def test_models_that_give_images_no_likelihood_are_refused(refused, run, held_out):
    says = (run.lift, "a 'dual' model", "not defined for a model of the over-complete pair", "baseline")
    refused(evaluate_likelihood, *flags_of(run.lift, run, "--on", "train"), says=says)
    says = ("a 'single_t' model", "reads 2 scales and predicts 1")
    for method in (ROUGH, FEW):
        refused(evaluate_likelihood, *flags_of(held_out["single_t"], run, method=method), says=says)


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--num_images", 5], 1, ("--num_images 5", "4 images")),
        (["--num_calls", 9], 1, ("An image needs more than 9 network calls", "--tolerance 0.1")),
        (["--path_type", "lead:2"], 1, ("--path_type lead:2", "two clocks")),
        (["--holdout", 3], 1, ("was not trained without these 3 images",)),
        (["--num_steps", 5000], 1, ("5000",)),
        (["--tolerance", 1e-15], 2, ("--tolerance 1e-15 is too small",)),
        (["--tolerance", 0], 2, ("--tolerance", "positive")),
        (["--probes", 0], 2, ("--probes", "positive")),
        (["--coarse_from", "x0"], 2, ("--coarse_from",)),
        (["--variance", "beta"], 2, ("--variance belongs to --method elbo, not to ode; leave it out",)),
        (["--timesteps", 9], 2, ("--timesteps belongs to --method elbo",)),
        (["--method", "elbo"], 2, ("--tolerance belongs to --method ode, not to elbo; leave it out",)),
        (["--run", "mine"], 2, ("--checkpoint and --run exclude each other",)),
    ],
)
def test_flags_that_make_no_sense_are_refused(refused, run, held_out, flags, status, says):
    load_images("synthetic", 16, run.cache, limit=12)
    refused(evaluate_likelihood, *flags_of(held_out["baseline"], run, *flags), says=says, status=status)


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--probes", 2], 2, ("--probes belongs to --method ode",)),
        (["--num_calls", 2], 2, ("--num_calls belongs to --method ode",)),
        (["--timesteps", 1], 2, ("'1' is too few; choose 2 or more, or all",)),
        (["--timesteps", "some"], 2, ("'some' is not a positive integer",)),
        (["--timesteps", 20], 1, ("--timesteps 20 cannot be drawn of a chain of 20 steps; choose 2 to 19, or all",)),
        (["--variance", "gamma"], 2, ("--variance",)),
    ],
)
def test_flags_that_make_no_bound_are_refused(refused, run, held_out, flags, status, says):
    load_images("synthetic", 16, run.cache, limit=12)
    refused(evaluate_likelihood, *flags_of(held_out["baseline"], run, *flags, method=FEW), says=says, status=status)


@pytest.mark.parametrize("steps, words", [(1, "1 step"), (2, "2 steps")])
def test_the_shortest_chains_are_computed_whole(stage, refused, run, held_out, steps, words):
    flags = flags_of(held_out["baseline"], run, "--num_steps", steps, method=FEW)
    says = (f"of a chain of {words}: a chain of so many steps is computed whole; pass --timesteps all",)
    refused(evaluate_likelihood, *flags, "--timesteps", 2, says=says)
    assert f"all of {words}, {steps + 2} calls)" in stage(evaluate_likelihood, *flags, "--timesteps", "all").output


def test_a_file_where_the_folder_goes_is_said_first(refused, run, held_out, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_likelihood, "log_likelihood", lambda *args: pytest.fail("computed"))
    load_images("synthetic", 16, run.cache, limit=12)
    (tmp_path / "out.csv").write_text("mine")
    says = ("out.csv is a file, where a folder is needed",)
    refused(evaluate_likelihood, *flags_of(held_out["baseline"], run, "--output", "out.csv"), says=says)


def test_images_must_have_been_held_out(refused, run):
    says = ("none of 'synthetic'", "--holdout N", "--on train")
    refused(evaluate_likelihood, *flags_of(run.baseline, run), says=says)


def test_broken_networks_and_tables_are_refused(stage, refused, run, held_out, tmp_path):
    content = torch.load(held_out["baseline"], weights_only=True)
    for tensor in content["model_state"].values():
        tensor *= math.nan
    torch.save(content, tmp_path / "nan.pth")
    says = ("makes an image NaN or infinite",)
    refused(evaluate_likelihood, *flags_of("nan.pth", run, "--output", "nan"), says=says)
    flags = flags_of(held_out["baseline"], run, "--output", "out", "--num_images", 1)
    stage(evaluate_likelihood, *flags)
    table = tmp_path / "out/likelihood.csv"
    whole = table.read_text()
    for text in ("", whole.replace("nfe", "calls"), whole + "1,2\n", whole + "a,b,c,d\n"):
        table.write_text(text)
        refused(evaluate_likelihood, *flags, says=("out/likelihood.csv is damaged", "--output"))
    (tmp_path / "out/settings.json").unlink()
    refused(evaluate_likelihood, *flags, says=("out/likelihood.csv does not say what made it", "--force"))
    stage(evaluate_likelihood, *flags, "--force")
    assert table.read_text() == whole
