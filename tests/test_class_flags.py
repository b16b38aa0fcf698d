"""`--classes` of training, `--class` and `--guidance_scale` of sampling: whose class an image is, and what it costs."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import compute_heatmap_30
import eval_fid_batch
import generate_with_path_30
import train_baseline
import train_lift
from checkpoint import load_model, read_checkpoint, save_checkpoint
from conftest import HARDWARE, LAST, STEPS, assert_same
from data import read_png, to_uint8
from diffusion.guidance import ClassifierFree, Unconditional
from diffusion.sampler import SeededNoise, image_seeds, sample, sample_seeds, scale_shapes
from diffusion.solvers import make_solver
from evaluation.results_table import read_rows
from paths.families import diagonal
from training.objective import Denoising

NAMES = ["bird", "cat", "dog"]
FLAGS = ["--classes", "--lr", 0.01]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, which differ in their colours."""
    place, rng = tmp_path_factory.mktemp("pets"), np.random.default_rng(0)
    for k, name in enumerate(NAMES):
        (place / name).mkdir()
        for image in range(4):
            pixels = rng.integers(0, 60, (16, 16, 3), np.uint8)
            pixels[..., k] += 180
            Image.fromarray(pixels).save(place / name / f"{image}.png")
    return place


@pytest.fixture(scope="module")
def made(stage, tiny, folder, tmp_path_factory):
    """A baseline and a dual model that were told the classes, some of whose embeddings are made large."""
    place = tmp_path_factory.mktemp("made")
    files = {}
    for script, stem in ((train_baseline, "baseline"), (train_lift, "lift_dual_timestep")):
        stage(script, *tiny(place), "--dataset", folder, *FLAGS)
        file = files[stem] = place / f"checkpoints/{stem}_2ep.pth"
        content = read_checkpoint(file)
        table = content["model_state"]["embed_class.table.weight"]
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(1)) * 3)
        save_checkpoint(file, {key: value for key, value in content.items() if key != "format_version"})
    return files


MODELS = ["baseline", "lift_dual_timestep"]


def walk(file, labels, batch_size=4, solver="ddim", guide=lambda denoise: denoise):
    loaded = load_model(file)
    shapes = scale_shapes(loaded.model.num_scales, 3, 16)
    path = diagonal(3, "uniform_t", num_scales=loaded.model.num_scales)
    batches = sample_seeds(
        guide(loaded.denoise), loaded.scheduler, path, range(4), shapes, batch_size, labels=labels,
        solver=make_solver(solver, **({"tolerance": 0.1} if solver == "ode" else {})),
    )  # fmt: skip
    return torch.cat([samples.images[0] for _, samples in batches])


# Training


@pytest.mark.parametrize("script", [train_baseline, train_lift])
def test_a_checkpoint_says_the_classes_and_a_stopped_run_ends_as_one_in_one_go(stage, tiny, folder, tmp_path, script):
    flags = ["--dataset", folder, *FLAGS]
    ended = stage(script, *tiny(tmp_path / "whole"), *flags)
    assert "3 classes" in ended.output and "unconditionally" not in ended.output
    stage(script, *tiny(tmp_path / "parts"), *flags, "--epochs", 1)
    stage(script, *tiny(tmp_path / "parts"), *flags, "--epochs", 2, "--resume")
    contents = [read_checkpoint(next((tmp_path / name).rglob("*_last.pth"))) for name in ("whole", "parts")]
    assert_same(*(content["model_state"] for content in contents))
    assert contents[0]["config"]["class_names"] == NAMES and contents[0]["config"]["label_dropout"] == 0.1
    # What it was told of, it learned.
    table = contents[0]["model_state"]["embed_class.table.weight"]
    assert table.shape[0] == 4 and (table.std(1) > 0).all()


@pytest.mark.parametrize("holdout, is_unseen", [(4, True), (3, False)])
def test_classes_without_an_image_to_train_on_are_named(stage, tiny, cache, tmp_path, holdout, is_unseen):
    # The built-in animals take turns: four of twelve images, spread evenly, are all those of one kind.
    data = ["--dataset", "synthetic", "--limit", 12, "--holdout", holdout, "--cache_dir", cache, "--batch_size", 4]
    ended = stage(train_baseline, *tiny(tmp_path), *data, "--classes", "--dry_run")
    said = [line for line in ended.output.splitlines() if line.startswith("warning: no image of ")]
    assert len(said) == is_unseen and all("no image of dog is among" in line for line in said)


def test_a_run_goes_on_with_the_same_labels_alone(stage, refused, tiny, folder, cache, tmp_path):
    pets = tmp_path / "pets"
    shutil.copytree(folder, pets)
    flags = [*tiny(tmp_path / "run"), "--dataset", pets, "--cache_dir", cache]
    stage(train_baseline, *flags, *FLAGS, "--epochs", 1)
    (pets / "cat").rename(pets / "cow")
    refused(train_baseline, *flags, *FLAGS, "--resume", says=("class_names = ['bird', 'cat', 'dog'], not",))
    (pets / "cow").rename(pets / "cat")
    refused(train_baseline, *flags, "--lr", 0.01, "--resume", says=("class_names = ['bird', 'cat', 'dog'], not None",))
    refused(train_baseline, *flags, *FLAGS, "--label_dropout", 0.2, "--resume", says=("label_dropout = 0.1, not 0.2",))


def test_a_run_from_before_there_were_classes_goes_on(stage, refused, tiny, folder, tmp_path):
    flags = [*tiny(tmp_path), "--dataset", folder]
    stage(train_lift, *flags, "--epochs", 1)
    content = read_checkpoint(tmp_path / LAST)
    for name in ("class_names", "labels_fingerprint", "label_dropout", "network"):
        content["config"].pop(name)
        content["settings"].pop(name, None)
    save_checkpoint(tmp_path / LAST, {key: value for key, value in content.items() if key != "format_version"})
    refused(train_lift, *flags, "--classes", "--resume", says=("class_names = None, not",))
    stage(train_lift, *flags, "--resume")


def test_what_training_on_classes_refuses(refused, tiny, folder, cache, tmp_path):
    flags = [*tiny(tmp_path), "--dataset", folder, "--cache_dir", cache]
    refused(train_lift, *flags, "--classes", "--model", "no_t", says=("'no_t' model has no clock",), status=2)
    refused(train_baseline, *flags, "--label_dropout", 0.1, says=("belongs to --classes",), status=2)
    for share in ("0", "1", "many"):
        refused(train_baseline, *flags, "--classes", "--label_dropout", share, says=("between 0 and 1",), status=2)
    plain = tmp_path / "plain"
    shutil.copytree(folder / "cat", plain)
    flags = [*tiny(tmp_path), "--dataset", plain, "--limit", 4, "--cache_dir", cache, "--classes"]
    refused(train_baseline, *flags, says=("has no labels",))


def test_the_share_of_labels_that_are_hidden_is_that_asked_for(trainer):
    run = trainer()
    config = run.config | {"class_names": NAMES, "label_dropout": 0.3}
    objective, count = Denoising(config, run.scheduler), 20_000
    x = torch.zeros(count, 1, 2, 2)
    labels = torch.arange(count) % 3
    draws = [
        objective.draw(x, x[..., :1, :1], torch.Generator().manual_seed(seed), 0.0, labels).labels for seed in (1, 1, 2)
    ]
    hidden = draws[0] == 3
    # Six deviations of a share of so many.
    assert abs(hidden.double().mean() - 0.3) < 6 * (0.21 / count) ** 0.5
    assert torch.equal(draws[0][~hidden], labels[~hidden])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    # Nothing else is drawn otherwise for them.
    told = objective.draw(x, x[..., :1, :1], torch.Generator().manual_seed(1), 0.0, labels)
    untold = objective.draw(x, x[..., :1, :1], torch.Generator().manual_seed(1), 0.0)
    assert_same(list(told[:6]), list(untold[:6]))


# The walk


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("solver", ["ddim", "heun", "ode"])
def test_an_image_depends_on_its_own_class_alone(made, model, solver):
    mixed = walk(made[model], [0, 1, 2, 0], solver=solver)
    for batch_size in (1, 3):
        torch.testing.assert_close(walk(made[model], [0, 1, 2, 0], batch_size, solver), mixed, rtol=0, atol=2e-4)
    for label in range(3):
        rows = [k for k, each in enumerate([0, 1, 2, 0]) if each == label]
        same = walk(made[model], [label] * 4, solver=solver)
        torch.testing.assert_close(same[rows], mixed[rows], rtol=0, atol=2e-4)
        others = [k for k in range(4) if k not in rows]
        assert (same[others] - mixed[others]).flatten(1).abs().amax(1).min() > 0.01


@pytest.mark.parametrize("model", MODELS)
def test_guidance_is_affine_and_counts_its_calls(made, model):
    loaded = load_model(made[model])
    scales = loaded.model.num_scales
    xs = tuple(
        torch.randn(2, *shape, generator=torch.Generator().manual_seed(3)) for shape in scale_shapes(scales, 3, 16)
    )
    ts, labels = (torch.full((2,), 400),) * scales, torch.tensor([0, 2])
    without, told = loaded.denoise(xs, ts), loaded.denoise(xs, ts, labels)
    for scale in (0.5, 1.0, 3.0):
        for k, guided in enumerate(ClassifierFree(loaded.denoise, 3, scale)(xs, ts, labels)):
            torch.testing.assert_close(guided, without[k] + scale * (told[k] - without[k]), rtol=1e-4, atol=1e-5)
    assert_same(Unconditional(loaded.denoise)(xs, ts, labels), without)
    path, noise = diagonal(3, "uniform_t", num_scales=scales), [torch.randn(2, *x.shape[1:]) for x in xs]
    for guide, calls in ((lambda d: d, 1), (Unconditional, 1), (lambda d: ClassifierFree(d, 3, 2.0), 2)):
        for solver, evaluations in (("ddim", 3), ("heun", 5)):
            made_here = sample(
                guide(loaded.denoise), loaded.scheduler, path, noise, solver=make_solver(solver), labels=labels
            )
            assert made_here.nfe == calls * evaluations


def test_an_adaptive_solver_counts_guided_calls_and_keeps_to_their_limit(made):
    loaded = load_model(made["baseline"])
    noise, path = (
        [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))],
        diagonal(1, "uniform_t", num_scales=1),
    )

    def spent(guide, **options):
        solver = make_solver("ode", tolerance=0.1, **options)
        labels = torch.tensor([0, 1])
        found = sample(guide(loaded.denoise), loaded.scheduler, path, noise, solver=solver, labels=labels)
        return found.nfe, solver.spent.spent.mean()

    def guide(denoise):
        return ClassifierFree(denoise, 3, 1.5)

    for each in (lambda denoise: denoise, guide):
        nfe, mean = spent(each)
        assert nfe == round(mean)
    nfe = spent(guide)[0]
    assert nfe % 2 == 0 or spent(guide)[1] % 1
    with pytest.raises(ValueError, match="needs more than"):
        spent(guide, max_calls=int(spent(guide)[1] * 0.6))


# Stages


def pngs(folder):
    return {file.name: read_png(file) for file in folder.glob("[0-9]*.png")}


@pytest.mark.parametrize("model", MODELS)
def test_classes_are_sampled_in_turn(stage, made, tmp_path, model):
    flags = ["--checkpoint", made[model], "--num_images", 6, *STEPS, *HARDWARE]
    ended = stage(generate_with_path_30, *flags, "--output", tmp_path / "all")
    assert "6 new with 4 network calls each" in ended.output
    every = pngs(tmp_path / "all")
    assert (tmp_path / "all/figures/classes.png").exists()
    assert json.loads((tmp_path / "all/settings.json").read_text())["classes"] == NAMES
    stage(generate_with_path_30, *flags, "--class", "cat", "--output", tmp_path / "cat")
    for k, (name, image) in enumerate(sorted(pngs(tmp_path / "cat").items())):
        assert torch.equal(image, every[name]) == (k % 3 == 1)
    ended = stage(generate_with_path_30, *flags, "--guidance_scale", 0, "--output", tmp_path / "none")
    assert "6 new with 4 network calls each" in ended.output
    loaded = load_model(made[model])
    noise = SeededNoise(image_seeds(42, 6))
    shapes = scale_shapes(loaded.model.num_scales, 3, 16)
    path = diagonal(4, "uniform_t", num_scales=loaded.model.num_scales)
    plain = sample(loaded.denoise, loaded.scheduler, path, [noise.draw(shape) for shape in shapes])
    assert torch.equal(
        torch.stack([image for _, image in sorted(pngs(tmp_path / "none").items())]), to_uint8(plain.images[0])
    )
    ended = stage(
        generate_with_path_30, *flags, "--guidance_scale", 2, "--class", "dog", "bird", "--output", tmp_path / "g"
    )
    assert "6 new with 8 network calls each" in ended.output


def test_a_folder_of_other_classes_is_not_mixed(stage, refused, made, tmp_path):
    flags = ["--checkpoint", made["baseline"], "--num_images", 2, *STEPS, *HARDWARE, "--output", tmp_path / "out"]
    stage(generate_with_path_30, *flags, "--class", "cat")
    for more in ([], ["--class", "dog"], ["--class", "cat", "--guidance_scale", 2]):
        refused(generate_with_path_30, *flags, *more, says=("--force",))


def test_what_sampling_of_classes_refuses(refused, run, made):
    flags = ["--checkpoint", made["baseline"], *HARDWARE]
    refused(generate_with_path_30, *flags, "--class", "cow", says=("--class cow is no class", "bird, cat, dog"))
    refused(generate_with_path_30, *flags, "--class", "cat", "cat", says=("names a class twice",), status=2)
    refused(generate_with_path_30, *flags, "--guidance_scale", "-1", says=("at least 0",), status=2)
    plain = ["--checkpoint", run.baseline, *HARDWARE]
    refused(generate_with_path_30, *plain, "--class", "cat", says=("without classes", "--class"))
    refused(generate_with_path_30, *plain, "--guidance_scale", 2, says=("without classes", "--guidance_scale"))
    few = ["--guidance_scale", 2, "--num_calls", 1]
    refused(generate_with_path_30, *flags, *few, says=("2 network calls",), status=2)


def test_rows_say_the_guidance_and_count_its_calls(stage, made, cache, tmp_path):
    flags = ["--checkpoint", made["baseline"], "--metrics", "swd", "--num_images", 6, "--cache_dir", cache]
    flags += [*STEPS, *HARDWARE, "--output", tmp_path / "scores.csv", "--path_type", "diagonal"]
    for more in ([], ["--guidance_scale", 2], ["--class", "cat"], ["--guidance_scale", 2]):
        ended = stage(eval_fid_batch, *flags, *more)
    assert "scored already" in ended.output
    stage(eval_fid_batch, *flags, "--guidance_scale", 3, "--num_steps", 18, "--num_calls", 8)
    rows = read_rows(tmp_path / "scores.csv")
    said = [("guidance 1", "4"), ("guidance 2", "8"), ("class cat, guidance 1", "4"), ("guidance 3", "8")]
    assert [(row["guidance"], row["nfe"]) for row in rows] == said
    assert len({row["path_fingerprint"] for row in rows}) == 4 and len({row["swd"] for row in rows}) == 4
    assert {row["classes"] for row in rows} == {"[bird,cat,dog]"}


def test_stages_that_name_no_class_measure_the_null_class(stage, made, cache, tmp_path):
    flags = ["--grid", 5, *STEPS, "--K", 1, "--num_images", 2, "--cache_dir", cache, *HARDWARE]
    stage(compute_heatmap_30, "--checkpoint", made["lift_dual_timestep"], *flags, "--output", tmp_path / "map.pth")
    assert (tmp_path / "map.pth").exists()
