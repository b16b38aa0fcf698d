"""Models of latents go through the stages: trained, resumed, sampled and scored in pixels, mapped, or refused."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

import compute_cross_jacobian
import compute_heatmap_30
import compute_trajectories
import encode
import eval_fid_batch
import evaluate_likelihood
import export
import generate_sr
import generate_with_path_30
import inpaint
import interpolate
import train_baseline
import train_classifier
import train_lift
from autoencoders import save_autoencoder
from checkpoint import load_model, read_checkpoint
from conftest import HARDWARE, STEPS, assert_same, read_log
from data import read_png
from diffusion import space as spaces
from planning.map_file import load_heatmap
from training.settings import TrainingSettings

CLASSIFIER = "checkpoints/classifier_2ep.pth"
LIVELY = ("--lr", 0.005, "--save_every", 2, "--ema_decay", 0.5, "--seed", 3)


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoders")
    for seed, name in enumerate(("one", "other")):
        save_autoencoder(folder / name, seed)
    save_autoencoder(folder / "deep", 2, levels=3, shift_factor=0.1)
    return folder


@pytest.fixture
def flags(tiny, cache, tmp_path, autoencoders):
    def of(name="run", autoencoder="one"):
        return [*tiny(tmp_path / name), "--cache_dir", cache, "--latents", autoencoders / autoencoder, *LIVELY]

    return of


@pytest.fixture(scope="module")
def trained(stage, tiny, tmp_path_factory, autoencoders):
    """A baseline DiT that knows classes, and a dual residual UNet, both of 8x8 latents of images of 16x16."""
    folder = tmp_path_factory.mktemp("trained")
    shared = [*tiny(folder), "--latents", autoencoders / "one", *LIVELY]
    network = ["--network", "DiT/2", "--hidden_dims", "16,16", "--classes"]
    ended = stage(train_baseline, *shared, *network)
    assert f"at 16x16 as 4x8x8 latents of '{autoencoders / 'one'}'" in ended.output
    stage(train_lift, *shared, "--representation", "residual")
    return folder


def baseline(folder):
    return folder / "checkpoints/baseline_2ep.pth"


def dual(folder):
    return folder / "checkpoints/lift_dual_timestep_2ep.pth"


def test_checkpoints_say_which_latents(trained, autoencoders):
    for file in (baseline(trained), dual(trained)):
        loaded = load_model(file)
        config = loaded.config
        said = {name: config[name] for name in config if name.startswith("latents")}
        assert said == {
            "latents": str(autoencoders / "one"),
            "latents_is_here": True,
            "latents_fingerprint": loaded.space.autoencoder.fingerprint,
            "latents_scaling": 0.5,
            "latents_shift": 0.0,
            "latents_downscale": 2,
        }
        assert (config["channels"], config["image_channels"], config["resolution"]) == (4, 3, 16)
        assert loaded.model.channels == 4 and loaded.side == 8 and loaded.image_shape == (3, 16, 16)
        assert not loaded.scheduler.clip_sample
    assert len(list((trained / "cache").glob("latents_*.npy"))) == 1


def test_grids_are_of_pixels(trained):
    for name, side in (("fine", 16), ("coarse", 8)):
        grid = trained / f"logs/lift_dual_timestep/samples_2ep_{name}.png"
        with Image.open(grid) as image:
            assert image.width >= 8 * side and image.width < 8 * (side + 3)


@pytest.mark.parametrize("module", [train_baseline, train_lift], ids=["baseline", "lift"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(stage, refused, flags, tmp_path, autoencoders, module):
    """With draws, of mirrored images too; the autoencoder may lie elsewhere by then, and must be the same."""
    stem = {train_baseline: "baseline", train_lift: "lift_dual_timestep"}[module]
    stage(module, *flags("whole"), "--epochs", 4, "--flip")
    stage(module, *flags(), "--epochs", 2, "--flip")
    more = "--epochs", 4, "--flip", "--resume"
    refused(
        module, *flags("run", "other"), *more, says=("with latents_fingerprint = ", "(--latents with the autoencoder")
    )
    pixels = [word for word in flags() if word not in ("--latents", autoencoders / "one")]
    refused(module, *pixels, *more, says=("with latents_fingerprint = ", "not None"))
    moved = tmp_path / "moved"
    shutil.copytree(autoencoders / "one", moved)
    stage(module, *flags(), "--latents", moved, *more)
    whole, parts = (read_checkpoint(tmp_path / run / f"checkpoints/{stem}_4ep.pth") for run in ("whole", "run"))
    for state in ("model_state", "ema_state"):
        assert_same(whole[state], parts[state])
    assert parts["config"]["latents"] == str(moved)
    before = read_checkpoint(tmp_path / f"run/checkpoints/{stem}_2ep.pth")["model_state"]
    assert any((before[name] != value).any() for name, value in whole["model_state"].items())


def test_parts_of_a_step_share_its_draws(stage, flags, tmp_path):
    for name, parts in (("whole", 1), ("parts", 4)):
        stage(train_lift, *flags(name), "--accumulate", parts, "--lr", 1e-6)
    whole, parts = ([row["loss_64"] for row in read_log(tmp_path / name)] for name in ("whole", "parts"))
    assert len(whole) == 6 and whole == pytest.approx(parts, rel=1e-4)


def sample_flags(file, output, *more):
    return ["--checkpoint", file, "--output", output, "--num_images", 3, *STEPS, *HARDWARE, *more]


def test_samples_are_images(stage, trained, tmp_path):
    stage(generate_with_path_30, *sample_flags(baseline(trained), tmp_path / "one", "--trajectory"))
    stage(generate_with_path_30, *sample_flags(dual(trained), tmp_path / "two", "--trajectory"))
    for folder in ("one", "two"):
        pngs = sorted((tmp_path / folder).glob("[0-9]*.png"))
        assert [read_png(file).shape for file in pngs] == [(3, 16, 16)] * 3
        assert (tmp_path / folder / "figures/trajectory.png").exists()
    # Of one seed, whatever is sampled beside it.
    stage(generate_with_path_30, *sample_flags(dual(trained), tmp_path / "again", "--batch_size", 1))
    for file in (tmp_path / "two").glob("[0-9]*.png"):
        apart = read_png(file).int() - read_png(tmp_path / "again" / file.name).int()
        assert apart.abs().max() <= 1


def test_scores_compare_pixels_and_say_the_latents(stage, trained, tmp_path, autoencoders):
    table = tmp_path / "scores.csv"
    flags = ["--checkpoint", baseline(trained), dual(trained), "--output", table, "--metrics", "swd", "nn"]
    stage(eval_fid_batch, *flags, "--cache_dir", trained / "cache", *STEPS, *HARDWARE)
    with open(table, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 and {row["resolution"] for row in rows} == {"16"}
    print_ = load_model(baseline(trained)).config["latents_fingerprint"]
    assert {row["latents"] for row in rows} == {f"one ({print_})"}
    assert all(float(row["swd"]) > 0 for row in rows if row["metric"] == "swd")


def test_maps_and_trajectories_are_of_latents(stage, trained, tmp_path):
    data = "--cache_dir", trained / "cache"
    heatmap, lines = tmp_path / "map.pth", tmp_path / "lines.pth"
    probes = ["--grid", 4, "--K", 1, "--num_images", 2, "--output", heatmap]
    stage(compute_heatmap_30, "--checkpoint", dual(trained), *probes, *STEPS, *HARDWARE, *data)
    content = load_heatmap(heatmap)
    assert content["mse_64"].isfinite().all()
    more = ["--path_type", "dp_64", "--heatmap", heatmap]
    stage(generate_with_path_30, *sample_flags(dual(trained), tmp_path / "dp", *more))
    assert len(list((tmp_path / "dp").glob("[0-9]*.png"))) == 3
    few = ["--num_images", 2, "--lines", 4, "--output", lines, *HARDWARE]
    stage(compute_trajectories, "--checkpoint", dual(trained), *few)
    assert lines.exists()


def test_interpolations_of_seeds_are_decoded(stage, trained, tmp_path):
    flags = ["--checkpoint", dual(trained), "--seeds", 1, 2, "--frames", 3, "--output", tmp_path / "strip"]
    stage(interpolate, *flags, *STEPS, *HARDWARE)
    assert [read_png(file).shape for file in sorted((tmp_path / "strip").glob("frame_*.png"))] == [(3, 16, 16)] * 3


def test_cross_jacobians_are_of_latents(stage, trained, tmp_path):
    flags = ["--checkpoint_dir", trained / "checkpoints", "--output_dir", tmp_path / "cross", "--grid", 4, "--K", 1]
    flags += ["--cache_dir", trained / "cache", "--coupling_images", 2, "--coupling_timesteps", 3]
    flags += ["--heatmap_dir", tmp_path / "maps", "--heatmap_images", 2]
    stage(compute_cross_jacobian, *flags, *STEPS, *HARDWARE)
    assert list((tmp_path / "cross").glob("*.csv"))


def test_grey_images_have_models_of_latents_too(stage, flags, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "grey").mkdir()
    for k in range(8):
        Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(tmp_path / f"grey/{k}.png")
    stage(train_baseline, *flags(), "--dataset", tmp_path / "grey", "--limit", 8)
    config = read_checkpoint(baseline(tmp_path / "run"))["config"]
    assert (config["channels"], config["image_channels"]) == (4, 1)
    stage(generate_with_path_30, *sample_flags(baseline(tmp_path / "run"), tmp_path / "samples"))
    assert {read_png(file).shape for file in (tmp_path / "samples").glob("[0-9]*.png")} == {(1, 16, 16)}


@pytest.mark.parametrize("objective", ["hybrid", "vlb"])
def test_learned_variances_need_no_bytes(stage, flags, tmp_path, objective):
    stage(train_baseline, *flags(), "--objective", objective)
    more = "--solver", "ancestral", "--variance", "learned"
    stage(generate_with_path_30, *sample_flags(baseline(tmp_path / "run"), tmp_path / "samples", *more))
    assert len(list((tmp_path / "samples").glob("[0-9]*.png"))) == 3


def test_a_band_that_follows_its_path_measures_latents(stage, flags, tmp_path):
    stage(train_lift, *flags(), "--t_pairs", "follow:2", "--replan_every", 1, "--replan_images", 2)
    assert read_checkpoint(dual(tmp_path / "run"))["config"]["latents_downscale"] == 2


def test_stages_of_pixels_refuse_them(refused, trained, tmp_path):
    file = dual(trained)
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image)
    (tmp_path / "images").mkdir()
    shutil.copy(image, tmp_path / "images")
    given, output = ["--checkpoint", file, *HARDWARE], ["--output", tmp_path / "out"]
    stages = {
        inpaint: [*given, *output, "--mask", "left"],
        generate_sr: [*given, *output, "--input", tmp_path / "images"],
        encode: [*given, *output, "--input", image],
        evaluate_likelihood: [*given, *output],
        interpolate: [*given, *output, "--input", image, image],
        export: [file, tmp_path / "out"],
    }
    for module, words in stages.items():
        says = f"was trained on latents of '{load_model(file).config['latents']}', and {module.__name__}.py"
        refused(module, *words, says=(says, "pass a checkpoint of a training without --latents"))


def test_an_autoencoder_that_has_gone_or_changed_is_said(stage, refused, flags, tmp_path, autoencoders):
    place = tmp_path / "place"
    shutil.copytree(autoencoders / "one", place)
    stage(train_baseline, *flags(), "--latents", place)
    file = baseline(tmp_path / "run")
    spaces._opened.cache_clear()
    place.rename(tmp_path / "gone")
    words = sample_flags(file, tmp_path / "samples")
    refused(generate_with_path_30, *words, says=(f"of {file} lay in '{place}', which is not there",))
    table = "--metrics", "swd", "--output", tmp_path / "scores.csv", *STEPS, *HARDWARE
    shutil.copytree(autoencoders / "other", place)
    refused(generate_with_path_30, *words, says=(f"'{place}' holds other weights", "bring those back"))
    ended = refused(eval_fid_batch, "--checkpoint", file, *table, "--cache_dir", tmp_path, says=("other weights",))
    assert "fid_results" not in ended


def test_trainings_that_cannot_be_are_refused(refused, flags, tiny, tmp_path, autoencoders, monkeypatch):
    deep = flags("run", "deep")
    says = ("--resolution 16 has latents of 4x4, whose side must be a multiple of 8", "levels")
    refused(train_lift, *deep, "--hidden_dims", "8,8,8", says=says)
    refused(train_lift, *deep, "--network", "DiT/4", "--hidden_dims", "16,16", says=("of 4x4", "patches of two scales"))
    gone = tiny(tmp_path / "new")
    refused(train_baseline, *gone, "--latents", tmp_path / "nothing/here", says=("is no folder",))
    refused(train_baseline, *gone, "--latents", "nobody/nothing", says=("the hub did not give it",))
    refused(train_baseline, *gone, "--latents", autoencoders, says=("holds no AutoencoderKL",))
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    refused(train_baseline, *gone, "--latents", autoencoders / "one", says=("pip install diffusers",))
    assert not (tmp_path / "new").exists()


def test_terms_that_compare_images_are_refused():
    for name in ("perceptual_weight", "feature_weight"):
        with pytest.raises(ValueError, match="which latents are not"):
            TrainingSettings(model_type="dual", latents="some/vae", **{name: 0.1})
    assert TrainingSettings(model_type="dual").latents is None


def test_classifiers_are_of_pixels(stage, refused, tiny, trained, tmp_path):
    with pytest.raises(ValueError, match="to which --latents belongs"):
        TrainingSettings(model_type="classifier", classes="any", latents="some/vae")
    stage(train_classifier, *tiny(tmp_path / "judge"))
    words = sample_flags(baseline(trained), tmp_path / "out", "--classifier", tmp_path / "judge" / CLASSIFIER)
    refused(generate_with_path_30, *words, says=("and --classifier is for models of pixels",))


def test_a_run_of_latents_has_its_own_place():
    assert TrainingSettings(model_type="dual").is_published_kind
    assert not TrainingSettings(model_type="dual", latents="some/vae").is_published_kind
