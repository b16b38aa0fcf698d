"""Images that several processes share, their features, and the images that are held out; metrics as a row has them."""

import hashlib
import os
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import generate_with_path_30
import train_lift
from checkpoint import load_model, read_checkpoint
from children import FORKS
from cli import DataSettings
from conftest import TINY, run_stage
from data import ImageSet, fingerprint_array, load_images, read_png, split_holdout, to_float
from diffusion.sampler import image_seeds
from diffusion.solvers import Ddim
from evaluation.feature_metrics import kernel_distance
from evaluation.inception import Features
from evaluation.pixel_metrics import NearestNeighbours
from evaluation.reference_set import ReferenceSet, from_images
from evaluation.scoring import Generated, Scorer, generate
from paths.families import diagonal
from runtime.distributed import Processes

NFE = 3
# Images and batches: a last batch that is not full, as many full ones as processes, fewer batches than processes, and
# more batches than two for each of three processes.
SIZES = [(5, 2), (6, 3), (3, 4), (1, 1), (13, 2)]


class Colours:
    """Stands in for Inception: six features, the mean of each channel and of its square, and four logits."""

    fingerprint, resize, num_features = "0123456789abcdef", "clean", 6

    def __call__(self, pixels):
        x = pixels.float() / 255
        pool = torch.cat([x, x**2], dim=1).mean(dim=(2, 3))  # [B, 6]
        return Features(pool, 9 * pool[:, 1:5])


def numbers(generated):
    """A hash of all that was generated, to the bit."""
    parts = [generated.pixels, *generated.features]
    return [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in parts], generated.nfe


def generate_sizes(file, processes):
    loaded = load_model(file)
    path = diagonal(NFE, num_scales=loaded.model.num_scales)
    results = []
    for count, batch_size in SIZES:
        options = {"precision": "fp32", "solver": Ddim(0.5), "inception": Colours()}
        results.append(generate(loaded, path, image_seeds(7, count), processes, batch_size, **options))
    return [result and numbers(result) for result in results]


def break_after(denoise, call, row):
    """A denoiser whose prediction of one image is NaN at one call and ever after."""
    calls = 0

    def broken(xs, ts):
        nonlocal calls
        calls += 1
        predictions = denoise(xs, ts)
        if calls >= call:
            predictions[0][row] = torch.nan
        return predictions

    return broken


def generate_broken(file, processes):
    """Five batches of two images each; the last rank breaks in the second image of its first batch."""
    loaded = load_model(file)
    path = diagonal(NFE, num_scales=loaded.model.num_scales)
    is_last = processes.rank == processes.count - 1
    denoise = break_after(loaded.model.denoise, 2, 1) if is_last else loaded.model.denoise
    try:
        generate(loaded, path, image_seeds(7, 10), processes, 2, "fp32", denoise=denoise)
    except ValueError as error:
        return str(error)


def rank_in_child(environment, work, file, answers):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.environ.update(environment)
    processes = Processes("cpu")
    answers.put((processes.rank, work(file, processes)))
    processes.close()


@pytest.fixture
def ranks():
    """`ranks(count, work, file)` is what `work(file, processes)` gives in each process of one run, by rank."""
    started = []

    def run(count, work, file):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        answers = FORKS.Queue()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        for rank in range(count):
            environment = dict(zip(names, map(str, (rank, count, rank, "127.0.0.1", port)), strict=True))
            started.append(FORKS.Process(target=rank_in_child, args=(environment, work, file, answers)))
            started[-1].start()
        given = dict(answers.get(timeout=120) for _ in range(count))
        return [given[rank] for rank in range(count)]

    yield run
    for process in started:
        process.join(60)
        process.kill()


# Generated images


@pytest.mark.parametrize("model", ["baseline", "lift"])
def test_images_are_those_of_the_files(stage, run, tmp_path, model):
    path_type = {"baseline": "baseline", "lift": "diagonal"}[model]
    stage(generate_with_path_30, *run.generate_flags(tmp_path, path_type, 5), "--batch_size", 2)
    files = sorted(tmp_path.glob("[0-9]*.png"))
    loaded = load_model(getattr(run, model))
    path = diagonal(4, num_scales=loaded.model.num_scales)
    generated = generate(loaded, path, image_seeds(42, 5), Processes("cpu"), 2, "fp32")
    assert generated.pixels.dtype == torch.uint8 and generated.features is None and generated.nfe == 4
    assert torch.equal(generated.pixels, torch.stack([read_png(file) for file in files]))


@pytest.mark.parametrize("count", [2, 3])
def test_images_and_features_do_not_depend_on_the_number_of_processes(run, ranks, count):
    alone = generate_sizes(run.lift, Processes("cpu"))
    assert len({pixels for (pixels, *_), _ in alone}) == len(SIZES) and {nfe for _, nfe in alone} == {NFE}
    first, *others = ranks(count, generate_sizes, run.lift)
    assert first == alone
    assert others == [[None] * len(SIZES)] * (count - 1)


def test_features_beside_the_sampling_are_those_after_it(run):
    loaded = load_model(run.lift)
    path = diagonal(NFE, num_scales=2)
    settings = (loaded, path, image_seeds(1, 7), Processes("cpu"), 2, "fp32")
    beside, after = (generate(*settings, inception=Colours(), overlap=overlap) for overlap in (True, False))
    assert numbers(beside) == numbers(after)
    # Row k belongs to image k.
    pixels = beside.pixels.double() / 255
    torch.testing.assert_close(beside.features.pool[:, :3], pixels.mean(dim=(2, 3)).float())
    assert beside.features.logits.shape == (7, 4)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_fault_of_the_inception_network_is_not_lost(run, overlap):
    def faulty(pixels):
        raise RuntimeError("no such layer")

    loaded = load_model(run.lift)
    settings = (loaded, diagonal(NFE, num_scales=2), image_seeds(1, 5), Processes("cpu"), 2, "fp32")
    with pytest.raises(RuntimeError, match="no such layer"):
        generate(*settings, inception=faulty, overlap=overlap)


def test_an_image_that_is_not_finite_is_named_by_its_seed(run):
    loaded = load_model(run.lift, ema=True)
    # The second image of the second batch.
    loaded.model.denoise = break_after(loaded.model.denoise, NFE + 2, 1)
    path = diagonal(NFE, num_scales=2)
    with pytest.raises(ValueError, match="^The ema weights of epoch 2 make the image of seed 7000003 NaN or infinite"):
        generate(loaded, path, image_seeds(7, 6), Processes("cpu"), 2, "fp32")


def test_all_processes_refuse_what_one_of_them_finds(run, ranks):
    first, second = ranks(2, generate_broken, run.lift)
    # Its first batch is the second of all.
    assert "the image of seed 7000003 NaN" in second
    assert "an image of another process NaN" in first and "\n" not in first


# Metrics


def image_set(count=12, side=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return ImageSet(pixels, "noise", fingerprint_array(pixels))


def made(images):
    pixels = torch.from_numpy(images.pixels)
    return Generated(pixels, Colours()(pixels), 4)


@pytest.mark.parametrize(
    ("metric", "fewest"), [("fid", 2), ("fid_infinity", 100), ("kid", 2), ("is", 10), ("pr", 4), ("swd", 1), ("nn", 1)]
)
def test_too_few_images_are_refused_before_any_is_made(tmp_path, metric, fewest):
    images = image_set(100)
    arguments = (from_images(images, "train"), images, Colours(), "cpu", tmp_path)
    with pytest.raises(ValueError, match=f"{metric} needs at least {fewest} images, not {fewest - 1}; raise --num_im"):
        Scorer([metric], fewest - 1, *arguments)
    # So many do.
    values = Scorer([metric], fewest, *arguments).score(metric, made(image_set(fewest, seed=1)))
    assert all(np.isfinite(value) for value in values.values())


@pytest.mark.parametrize(("metric", "fewest"), [("kid", 2), ("pr", 4)])
def test_too_few_images_to_compare_with_are_refused_before_any_is_made(tmp_path, metric, fewest):
    training = image_set()
    for count in (fewest - 1, fewest):
        reference = from_images(image_set(count, seed=2), "holdout")
        arguments = ([metric], 12, reference, training, Colours(), "cpu", tmp_path)
        if count < fewest:
            with pytest.raises(ValueError, match=f"{metric} needs at least {fewest} .* holdout has {count}; pass anot"):
                Scorer(*arguments)
        else:
            Scorer(*arguments).score(metric, made(image_set(seed=1)))


def test_settings_tell_what_sees_the_images(tmp_path):
    images = image_set(side=64)
    scorer = Scorer(["fid", "kid", "swd", "nn"], 12, from_images(images, "train"), images, Colours(), "cpu", tmp_path)
    assert {name: tuple(settings.values()) for name, settings in scorer.settings.items()} == {
        "fid": ("fid", "inception-0123456789abcdef", "clean"),
        "kid": ("kid", "inception-0123456789abcdef", "clean"),
        "swd": ("swd", "swd-7x7-64-32-16", "none"),
        "nn": ("nn", "pixels", "none"),
    }
    swd = scorer.score("swd", made(image_set(side=64, seed=1)))
    assert swd["swd"] == pytest.approx((swd["swd_64"] + swd["swd_32"] + swd["swd_16"]) / 3, abs=1e-5)


def test_the_network_sees_the_reference_once(tmp_path):
    calls = []

    class Counting(Colours):
        def __call__(self, pixels):
            calls.append(len(pixels))
            return super().__call__(pixels)

    images = image_set()
    scorer = Scorer(["fid", "kid"], 12, from_images(images, "train"), images, Counting(), "cpu", tmp_path)
    assert calls == []
    scorer.prepare(["fid", "kid"])
    assert calls == [12]
    generated = made(image_set(seed=1))
    kid = scorer.score("kid", generated)["kid"]
    assert scorer.score("fid", generated)["fid"] > 0 and calls == [12]
    expected, _ = kernel_distance(generated.features.pool, Colours()(torch.from_numpy(images.pixels)).pool)
    assert kid == pytest.approx(expected, abs=1e-6)


def test_statistics_of_another_network_are_refused_before_sampling(tmp_path):
    reference = ReferenceSet("file.npz", "f", statistics=(np.zeros(5), np.eye(5)), statistics_count=9)
    scorer = Scorer(["fid", "is"], 12, reference, image_set(), Colours(), "cpu", tmp_path)
    scorer.prepare(["is"])  # Which looks at no reference.
    with pytest.raises(ValueError, match="file.npz has statistics of 5 features, but the network gives 6"):
        scorer.prepare(["fid", "is"])


def test_copies_of_repeated_training_images_are_found(tmp_path):
    images = image_set()
    repeated = ImageSet(np.concatenate([images.pixels, images.pixels]), "noise", "twice")
    scorer = Scorer(["nn"], 6, from_images(repeated, "train"), repeated, device="cpu", cache_dir=tmp_path)
    values = scorer.score("nn", Generated(torch.from_numpy(images.pixels[:6]), None, 4))
    assert values["authenticity"] == values["nn_distance"] == 0 and values["nn_distance_real"] > 50
    # Without this care every training image would be at distance 0 from itself.
    assert NearestNeighbours(repeated.pixels).compare(images.pixels[:6]).distance_real == 0


# Held-out images


def save_images(folder, sizes, seed=0):
    folder.mkdir()
    for k, size in enumerate(sizes):
        pixels = np.random.default_rng(seed + k).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def test_figures_beside_generated_images_are_none_of_them(stage, run, tmp_path):
    stage(generate_with_path_30, *run.generate_flags(tmp_path / "samples", count=3), "--trajectory")
    assert (tmp_path / "samples/figures/grid.png").exists() and (tmp_path / "samples/figures/trajectory.png").exists()
    images = load_images(str(tmp_path / "samples"), 16, tmp_path / "cache", resize_filter=None)
    files = sorted((tmp_path / "samples").glob("[0-9]*.png"))
    np.testing.assert_array_equal(images.pixels, [read_png(file).numpy() for file in files])


def test_training_sees_the_rest(trainer, cache):
    images = load_images("synthetic", 16, cache, limit=12)
    rest, _ = split_holdout(images, 3)
    run = trainer("--holdout", 3)
    np.testing.assert_array_equal(run.batches.pixels.numpy(), rest.pixels)
    assert run.config["holdout"] == 3 and run.config["data_fingerprint"] == rest.fingerprint != images.fingerprint
    shown = torch.cat([x_64 for x_64, _, _ in run.batches.epoch(0)])
    assert {x.numpy().tobytes() for x in shown} <= {
        x.numpy().tobytes() for x in to_float(torch.from_numpy(rest.pixels))
    }


def test_a_run_goes_on_with_its_own_holdout_only(stage, refused, tiny, tmp_path):
    flags = [*tiny(tmp_path), "--epochs", 1]
    stage(train_lift, *flags, "--holdout", 3)
    file = tmp_path / "checkpoints/lift_dual_timestep_1ep.pth"
    assert read_checkpoint(file)["config"]["holdout"] == 3
    for other in ([], ["--holdout", 4]):
        refused(train_lift, *flags, "--epochs", 2, "--resume", *other, says=("holdout",))
    stage(train_lift, *flags, "--epochs", 2, "--resume", "--holdout", 3)
    assert run_stage(train_lift, *TINY, "--cache_dir", tmp_path / "cache", "--holdout", 12).status == 1


def test_counts_belong_to_the_data_set_they_were_given_with(tmp_path):
    folder = str(save_images(tmp_path / "images", [(16, 16)] * 6))
    config = {"dataset": folder, "resolution": 16, "resize_filter": "bilinear", "skip_bad_images": False}
    config |= {"limit": 5, "holdout": 2}

    def parts(config, **given):
        settings = DataSettings(num_workers=1, cache_dir=tmp_path / "cache", **given)
        images, held_out = cli.load_image_parts(settings, config)
        return len(images), held_out and len(held_out)

    assert parts(config) == (3, 2)
    assert parts(config, holdout=1) == (4, 1) and parts(config, limit=4) == (2, 2)
    assert parts(config, dataset=folder) == (6, None)
    assert parts(config, dataset=folder, holdout=4) == (2, 4)
    # At another place, the images of the training are still those; others are not, however many.
    images = load_images(folder, resolution=16, cache_dir=tmp_path / "cache", limit=5)
    config["data_fingerprint"] = split_holdout(images, 2)[0].fingerprint
    moved = str(shutil.copytree(folder, tmp_path / "moved"))
    assert parts(config, dataset=moved) == parts(config, dataset=folder) == (3, 2)
    assert parts(config, dataset=moved, holdout=1) == (5, 1)
    for count in (1, 6):
        others = str(save_images(tmp_path / f"others{count}", [(16, 16)] * count, seed=100))
        assert parts(config, dataset=others) == (count, None)
    del config["data_fingerprint"]
    assert parts(config | {"holdout": None}) == (5, None)
    # Checkpoints of before there were held-out images say nothing of them.
    del config["holdout"]
    assert parts(config) == (5, None) and parts(config, holdout=1) == (4, 1)


@pytest.mark.parametrize("change", ["added", "removed", "other pixels"])
def test_a_folder_that_has_changed_is_no_longer_the_training_set(tmp_path, change):
    folder = save_images(tmp_path / "images", [(16, 16)] * 8)
    images = load_images(str(folder), resolution=16, cache_dir=tmp_path / "cache")
    config = {"dataset": str(folder), "resolution": 16, "resize_filter": "bilinear", "skip_bad_images": False}
    config |= {"holdout": 3, "data_fingerprint": split_holdout(images, 3)[0].fingerprint}
    settings = DataSettings(num_workers=1, cache_dir=tmp_path / "cache")
    assert len(cli.load_image_parts(settings, config)[1]) == 3
    files = sorted(folder.iterdir())
    if change == "removed":
        files[0].unlink()
    else:
        other = save_images(tmp_path / "other", [(16, 16)], seed=99)
        shutil.copy(next(other.iterdir()), files[0] if change == "other pixels" else folder / "00.png")
    with pytest.raises(ValueError, match="no longer those of the training"):
        cli.load_image_parts(settings, config)
    # What is there now may be named, and held-out images of it are asked for anew.
    images, held_out = cli.load_image_parts(settings.but(dataset=str(folder), holdout=2), config)
    assert len(held_out) == 2
