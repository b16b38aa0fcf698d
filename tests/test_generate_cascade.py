"""Chains of a base and its stages, by flags: sizes, seeds, classes, levels and their search, and what is refused."""

import csv
import json
import math

import pytest
import torch

import generate_cascade
import generate_sr
import generate_with_path_30
from chain_models import Models
from checkpoint import COARSE_IMAGES, load_model
from conftest import HARDWARE
from data import read_png, to_uint8
from diffusion.sampler import SeededNoise, sample
from diffusion.super_resolution import LEVEL_NOISE, super_resolution_path
from evaluation.chain import ChainSettings, level_text, open_chain, parse_level
from paths.families import diagonal
from paths.path import timestep_of_level

NAMES = ["bird", "cat", "dog"]


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


def chain_flags(write, *stages, base=None, count=3, steps=2):
    base = base or write("baseline", 16)
    return ["--base", base, "--stages", *stages, "--num_images", count, "--num_steps", steps, *HARDWARE]


def pngs(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.png")}


def noise_of(seed, shape):
    return SeededNoise([seed]).draw(shape)


@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
@pytest.mark.parametrize("kind", ["cascade", "dual"])
def test_a_chain_of_two_stages_is_three_walks_from_noises_of_one_seed(stage, write, tmp_path, kind, representation):
    files = [write(kind, side, representation=representation) for side in (32, 64)]
    flags = [*chain_flags(write, *files, count=2), "--stage_steps", 2, 3, "--s_0", 1, "clean"]
    ended = stage(generate_cascade, *flags, "--output", tmp_path / "out")
    assert "2 new with 7 network calls each; s_0 1, clean" in ended.output
    seed = 42_000_001
    base = load_model(write("baseline", 16))
    walk = base.model.denoise, base.scheduler, diagonal(2, num_scales=1), [noise_of(seed, (3, 16, 16))]
    image = sample(*walk).images[0]
    for number, (file, steps, level) in enumerate(zip(files, (2, 3), (1.0, math.inf), strict=True), 1):
        loaded = load_model(file, given=(COARSE_IMAGES,))
        t = timestep_of_level(level, loaded.scheduler.log_snr.numpy())
        path = super_resolution_path(diagonal(steps, num_scales=1), t)
        side = 16 * 2**number
        noise = noise_of((seed, number), (3, side, side)), noise_of((seed, number, LEVEL_NOISE), image.shape[1:])
        image = sample(loaded.model.denoise, loaded.scheduler, path, noise, given=image.clamp(-1, 1)).images[0]
    found = read_png(tmp_path / "out" / f"{seed:012d}.png")
    # A batch of two is rounded otherwise than one.
    assert (found.int() - to_uint8(image)[0].int()).abs().max() <= 1
    assert found.shape == (3, 64, 64) and found.float().std() > 5


def test_an_image_depends_on_its_seed_alone(stage, write, tmp_path):
    flags = [*chain_flags(write, write("cascade", 32)), "--s_0", "0.5", "--eta", 1]
    stage(generate_cascade, *flags, "--output", tmp_path / "a")
    stage(generate_cascade, *flags, "--output", tmp_path / "b", "--batch_size", 2, "--num_images", 2)
    ended = stage(generate_cascade, *flags, "--output", tmp_path / "b", "--batch_size", 1)
    assert "1 new" in ended.output and pngs(tmp_path / "a").keys() == pngs(tmp_path / "b").keys()
    for name in pngs(tmp_path / "a"):
        one, other = (read_png(tmp_path / folder / name).int() for folder in ("a", "b"))
        assert (one - other).abs().max() <= 1  # Batches of other sizes are rounded otherwise.
    assert len(set(pngs(tmp_path / "a").values())) == 3
    assert "all there already" in stage(generate_cascade, *flags, "--output", tmp_path / "b").output
    assert (tmp_path / "a/figures/grid.png").exists()


def test_the_base_makes_what_it_makes_elsewhere(write, stage, tmp_path):
    file = write("baseline", 16)
    walk = ["--checkpoint", file, "--num_images", 2, "--num_steps", 2, *HARDWARE]
    stage(generate_with_path_30, *walk, "--output", tmp_path / "base")
    settings = ChainSettings(base=str(file), stages=(str(write("cascade", 32)),), num_steps=2, precision="fp32")
    made = open_chain(settings, torch.device("cpu")).start([42_000_000, 42_000_001])
    for seed, image in zip((42_000_000, 42_000_001), to_uint8(made.images), strict=True):
        assert (read_png(tmp_path / "base" / f"{seed:012d}.png").int() - image.int()).abs().max() <= 1
    assert made.nfe == 2


def test_levels_are_said_as_log_snr():
    assert [parse_level(text) for text in ("clean", "noise", "-2.50", "-0")] == [math.inf, -math.inf, -2.5, 0.0]
    assert [level_text(level) for level in (math.inf, -math.inf, -2.5, 3.0)] == ["clean", "noise", "-2.5", "3"]
    for text in ("nan", "inf", "dirty"):
        with pytest.raises(ValueError):
            parse_level(text)


def test_classes_are_passed_along_the_chain(stage, write, tmp_path):
    told = {"class_names": NAMES, "label_dropout": 0.1}
    base, stage_file = write("baseline", 16, **told), write("cascade", 32, **told)
    flags = [*chain_flags(write, stage_file, base=base), "--s_0", 2]
    stage(generate_cascade, *flags, "--output", tmp_path / "all")
    ended = stage(generate_cascade, *flags, "--output", tmp_path / "cat", "--class", "cat", "--guidance_scale", 2)
    assert "8 network calls each" in ended.output  # Two models, two steps, two calls each.
    stage(generate_cascade, *flags, "--output", tmp_path / "plain", "--class", "cat")
    every, cats = pngs(tmp_path / "all"), pngs(tmp_path / "plain")
    second = "000042000001.png"  # Whose turn it is.
    assert every[second] == cats[second] and every["000042000000.png"] != cats["000042000000.png"]
    assert json.loads((tmp_path / "plain/settings.json").read_text())["classes"] == ["cat"]
    # A stage that knows no classes goes with any base.
    stage(generate_cascade, *chain_flags(write, write("cascade", 32), base=base), "--output", tmp_path / "untold")


def test_the_search_writes_levels_that_are_used(stage, write, tmp_path):
    flags = chain_flags(write, write("cascade", 32), write("cascade", 64), steps=1)
    more = ["--search", 4, "--grid", 3, "--rounds", 1, "--cache_dir", write.cache, "--output", tmp_path / "found"]
    ended = stage(generate_cascade, *flags, *more)
    with open(tmp_path / "found/levels.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    said = json.loads((tmp_path / "found/cascade.json").read_text())
    for number, found in enumerate(said["stages"], 1):
        own = {row["s_0"]: float(row["swd"]) for row in rows if row["stage"] == str(number)}
        assert 4 <= len(own) <= 6 and {"clean", "-4", "2", "8"} <= own.keys()
        assert found["s_0"] == min(own, key=own.get) and found["swd"] == min(own.values())
        assert found["swd_clean"] == own["clean"]
        assert {row["nfe"] for row in rows if row["stage"] == str(number)} == {str(number + 1)}
    assert (tmp_path / "found/figures/levels.png").exists() and "which --s_0 takes" in ended.output
    made = stage(generate_cascade, *flags, "--s_0", tmp_path / "found/cascade.json", "--output", tmp_path / "by_file")
    levels = [found["s_0"] for found in said["stages"]]
    assert f"s_0 {', '.join(levels)}" in made.output and "other weights" not in made.notes
    stage(generate_cascade, *flags, "--s_0", *levels, "--output", tmp_path / "by_hand")
    assert pngs(tmp_path / "by_file") == pngs(tmp_path / "by_hand")
    other = chain_flags(write, write("dual", 32), write("cascade", 64), steps=1)
    noted = stage(generate_cascade, *other, "--s_0", tmp_path / "found/cascade.json", "--output", tmp_path / "other")
    assert "were found with other weights" in noted.notes


def test_a_stage_of_a_cascade_enlarges_images_as_a_dual_model_does(stage, write, tmp_path):
    for kind in ("cascade", "dual"):
        flags = ["--checkpoint", write(kind, 32), "--num_steps", 2, "--num_images", 2, "--cache_dir", write.cache]
        stage(generate_sr, *flags, "--output", tmp_path / kind, *HARDWARE)
        assert (tmp_path / kind / "sr_metrics.csv").exists()


@pytest.mark.parametrize(
    ("make", "says", "status"),
    [
        (lambda w: chain_flags(w, w("cascade", 64)), ("64", "16x16", "sizes fit", "baseline_16.pth"), 1),
        (lambda w: chain_flags(w, w("cascade", 32), w("cascade", 32)), ("sizes fit", "cascade_32.pth"), 1),
        (lambda w: chain_flags(w, w("cascade", 32, channels=1)), ("1 channel(s)", "baseline_16.pth"), 1),
        (lambda w: chain_flags(w, w("cascade", 32, class_names=NAMES)), ("was trained without classes",), 1),
        (lambda w: chain_flags(w, w("single_t", 32)), ("a 'single_t' model", "two clocks"), 1),
        (lambda w: chain_flags(w, w("baseline", 32)), ("a 'baseline' model", "two clocks"), 1),
        (lambda w: chain_flags(w, w("cascade", 32), base=w("cascade", 16)), ("enlarges images that it is given",), 1),
        (lambda w: [*chain_flags(w, w("cascade", 32)), "--s_0", "dirty"], ("no noise level", "clean, noise"), 2),
        (lambda w: [*chain_flags(w, w("cascade", 32)), "--s_0", 1, 2], ("--s_0 has 2 values for 1 stage",), 2),
        (lambda w: [*chain_flags(w, w("cascade", 32)), "--s_0", "a.json"], ("a.json",), 1),
        (lambda w: [*chain_flags(w, w("cascade", 32)), "--stage_steps", 1, 2, 3], ("--stage_steps has 3",), 2),
        (lambda w: [*chain_flags(w, w("cascade", 32)), "--grid", 5], ("--grid belongs to --search",), 2),
        (lambda w: [*chain_flags(w, w("cascade", 32)), "--search", 4, "--s_0", 1], ("leave one of them out",), 2),
        (lambda w: [*chain_flags(w, w("cascade", 32)), "--search", 7, "--cache_dir", w.cache], ("6 images held",), 1),
        (lambda w: [*chain_flags(w, w("cascade", 32)), "--class", "cat"], ("without classes",), 1),
    ],
)
def test_what_does_not_fit_is_said(refused, write, tmp_path, make, says, status):
    refused(generate_cascade, *make(write), "--output", tmp_path / "out", says=says, status=status)


def test_images_of_other_levels_are_not_mixed(stage, refused, write, tmp_path):
    flags = [*chain_flags(write, write("cascade", 32), count=1), "--output", tmp_path / "out"]
    stage(generate_cascade, *flags, "--s_0", 1)
    refused(generate_cascade, *flags, "--s_0", 2, says=("another path_fingerprints, s_0", "--force"))
    before = pngs(tmp_path / "out")
    stage(generate_cascade, *flags, "--s_0", 2, "--force")
    assert pngs(tmp_path / "out") != before and len(before) == 1
