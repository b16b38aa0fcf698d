"""`--class` of the stages that change or make single images: whose class they are of, what it costs, what is said."""

import csv
import json

import pytest
import torch

import encode
import generate_sr
import generate_with_path_30
import inpaint
import interpolate
import train_baseline
import train_lift
from checkpoint import build_model, load_classifier, load_model, read_checkpoint, save_checkpoint
from conftest import HARDWARE, STEPS
from data import read_png, save_png, to_float, to_uint8
from diffusion.adaptive import Ode
from diffusion.guidance import ClassifierFree, ClassifierGuided, OfClass
from diffusion.latents import decode, load_latents
from diffusion.sampler import sample, scale_shapes
from diffusion.super_resolution import make_consistent, noise_seeds, super_resolution_path, super_resolve
from evaluation.given_latents import encode_pixels
from inpaint import load_mask, scale_masks
from paths.families import diagonal

NAMES = ["bird", "cat", "dog"]
CAT = NAMES.index("cat")
SEEDS = [42_000_000, 42_000_001]
# Flags, and what they make of a denoiser that takes labels.
GUIDES = {
    "class": (["--class", "cat"], lambda denoise: denoise, 1, "class cat, guidance 1"),
    "guided": (
        ["--class", "cat", "--guidance_scale", 3],
        lambda denoise: ClassifierFree(denoise, 3, 3.0),
        2,
        "class cat, guidance 3",
    ),
}


@pytest.fixture(scope="module")
def files(stage, tiny, tmp_path_factory):
    """Models of one scale and of two, and others made of them with large embeddings of classes.

    These predict v, and little of it, so that the equation is smooth, as that of a trained model is.
    """
    place, found = tmp_path_factory.mktemp("models"), {}
    for script, stem in ((train_baseline, "baseline"), (train_lift, "lift_dual_timestep")):
        stage(script, *tiny(place))
        found[stem] = place / f"checkpoints/{stem}_2ep.pth"
        content = {key: value for key, value in read_checkpoint(found[stem]).items() if key != "format_version"}
        config = content["config"] | {"class_names": NAMES, "label_dropout": 0.1, "prediction_type": "v"}
        state = build_model(config).state_dict() | content["model_state"]
        state["unet.head.2.weight"] = 0.1 * state["unet.head.2.weight"]
        table = torch.randn(state["embed_class.table.weight"].shape, generator=torch.Generator().manual_seed(1))
        state["embed_class.table.weight"] = 3 * table
        found[f"{stem} told"] = place / f"{stem}_told.pth"
        save_checkpoint(found[f"{stem} told"], content | {"model_state": state, "ema_state": None, "config": config})
    config = load_model(found["baseline"]).config | {"model_type": "classifier", "class_names": NAMES}
    del config["network"]
    torch.manual_seed(0)
    classifier = build_model(config)
    for p in classifier.parameters():
        p.data += 0.1 * torch.randn_like(p)
    found["classifier"] = place / "classifier.pth"
    content = {"model_state": classifier.state_dict(), "ema_state": None, "config": config, "epoch": 1, "step": 1}
    save_checkpoint(found["classifier"], content)
    return found


@pytest.fixture
def pixels(tmp_path, monkeypatch):
    """Two images of 16×16 in a folder `fine` and their halves in `coarse`; stages run beside them."""
    monkeypatch.chdir(tmp_path)
    made = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    for folder, images in (("fine", made), ("coarse", made[..., ::2, ::2])):
        (tmp_path / folder).mkdir()
        for name, image in zip("ab", images, strict=True):
            save_png(image.contiguous(), tmp_path / folder / f"{name}.png", by_lift=False)
    return made


def flags_of(file, output, *flags):
    return ["--checkpoint", file, *HARDWARE, "--output", output, *flags]


def pngs(folder, pattern="*.png"):
    return torch.stack([read_png(file) for file in sorted(folder.glob(pattern)) if file.stem not in PAGES])


PAGES = ("inpainting", "grid", "sr")


def said(folder):
    return json.loads((folder / "settings.json").read_text())


def painted(loaded, denoise, pixels, jump_repeats=1):
    path, mask = diagonal(4, num_scales=loaded.model.num_scales), load_mask("left", None, 16)
    masks = scale_masks(mask, 16, loaded.model.num_scales)
    seeds = [noise_seeds(image[None], 42)[0] for image in pixels]
    [samples] = inpaint.inpaint(
        denoise, loaded.scheduler, path, to_float(pixels), masks, seeds, jump_length=2, jump_repeats=jump_repeats
    )
    return samples.images[0], samples.nfe


def enlarged(loaded, denoise, pixels):
    coarse = pixels[..., ::2, ::2].contiguous()
    path = super_resolution_path(diagonal(4, num_scales=1))
    [(fine, nfe)] = super_resolve(denoise, loaded.scheduler, path, to_float(coarse), noise_seeds(coarse, 42))
    return make_consistent(fine, to_float(coarse)), nfe


def walked(loaded, denoise, pixels):
    path, weights = diagonal(4, num_scales=loaded.model.num_scales), torch.tensor([0.0, 1.0, 0.5]).double()
    shapes = scale_shapes(loaded.model.num_scales, 3, 16)
    samples = interpolate.interpolate(denoise, loaded.scheduler, path, SEEDS, weights, shapes)
    return samples.images[0][[0, 2, 1]], samples.nfe


STAGES = {
    "inpaint": (inpaint, ["--input", "fine", "--mask", "left", "--jump_repeats", 1, *STEPS], painted),
    "generate_sr": (generate_sr, ["--input", "coarse", *STEPS], enlarged),
    "interpolate": (interpolate, ["--seeds", *SEEDS, "--frames", 3, *STEPS], walked),
}


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("name", STAGES)
def test_images_are_those_of_the_denoiser_that_is_told(stage, files, pixels, tmp_path, name, guide):
    (module, flags, call), file = STAGES[name], files["lift_dual_timestep told"]
    more, guided, calls, label = GUIDES[guide]
    ended = stage(module, *flags_of(file, "out", *flags, *more))
    assert f"new with {4 * calls} network calls each" in ended.output
    assert said(tmp_path / "out")["guidance"] == label and said(tmp_path / "out")["classes"] == ["cat"]
    loaded = load_model(file)
    images, nfe = call(loaded, OfClass(guided(loaded.denoise), CAT), pixels)
    assert nfe == 4 * calls and torch.equal(pngs(tmp_path / "out"), to_uint8(images))
    # Without a class it is the null class, and nothing is said.
    stage(module, *flags_of(file, "null", *flags))
    null, _ = call(loaded, loaded.denoise, pixels)
    assert torch.equal(pngs(tmp_path / "null"), to_uint8(null)) and "guidance" not in said(tmp_path / "null")
    assert (to_uint8(null).int() - to_uint8(images).int()).flatten(1).abs().amax(1).min() > 2


def test_the_first_frame_is_the_image_of_the_seed_and_the_class(stage, files, pixels, tmp_path):
    flags = ["--class", "cat", "--guidance_scale", 2, *STEPS]
    file = files["baseline told"]
    stage(interpolate, *flags_of(file, "frames", "--seeds", *SEEDS, "--frames", 2, *flags))
    stage(generate_with_path_30, *flags_of(file, "images", "--num_images", 2, *flags))
    assert torch.equal(pngs(tmp_path / "frames"), pngs(tmp_path / "images", "[0-9]*.png"))


@pytest.mark.parametrize("guide", GUIDES)
def test_images_go_to_latents_of_a_class_and_back(stage, files, pixels, tmp_path, guide):
    more, guided, calls, label = GUIDES[guide]
    file, exact = files["baseline told"], ["--tolerance", 1e-4, "--num_calls", 9999]
    stage(encode, *flags_of(file, "out", "--input", "fine", *more, *exact))
    assert (pngs(tmp_path / "out").int() - pixels.int()).abs().max() <= 3
    assert said(tmp_path / "out")["guidance"] == label
    found, loaded = load_latents(tmp_path / "out/latents.npz"), load_model(file)
    denoise = OfClass(guided(loaded.denoise), CAT)
    path = diagonal(1, num_scales=1)
    latents, up = encode_pixels(loaded, path, pixels, 1e-4, 9999, denoise)
    images, down = decode(denoise, loaded.scheduler, path, latents, Ode(1e-4, 9999))
    assert torch.equal(found.scales[0], latents[0].float()) and torch.equal(pngs(tmp_path / "out"), to_uint8(images))
    assert found.measured["calls_up"] == tuple(up.tolist()) and found.measured["calls_down"] == tuple(down.tolist())
    assert all(count % calls == 0 for count in [*up.tolist(), *down.tolist()])
    # Latents of a class are no latents of another, which makes another image of them.
    decoding = ["--decode", "out/latents.npz", *exact]
    ended = stage(encode, *flags_of(file, "again", *decoding, *more))
    assert "note" not in ended.output and torch.equal(pngs(tmp_path / "again"), pngs(tmp_path / "out"))
    ended = stage(encode, *flags_of(file, "null", *decoding))
    assert f"was encoded with {label}, and other images come out" in ended.output
    assert not torch.equal(pngs(tmp_path / "null"), pngs(tmp_path / "out"))


def test_guided_calls_up_count_against_their_limit(stage, refused, files, pixels):
    file, rough = files["baseline told"], ["--input", "fine", "--tolerance", 0.1]
    stage(encode, *flags_of(file, "out", *rough, "--class", "cat"))
    most = int(max(load_latents("out/latents.npz").measured["calls_up"]))
    few = ["--num_calls", 8, "--class", "cat", "--guidance_scale", 2]
    assert most >= 8
    refused(encode, *flags_of(file, "x", *rough, *few), says=("16 network calls or more", "allows 8"))
    loaded = load_model(file)
    guided = OfClass(ClassifierFree(loaded.denoise, 3, 2.0), CAT)
    spent = encode_pixels(loaded, diagonal(1, num_scales=1), pixels, 0.1, 9999, guided).nfe
    with pytest.raises(ValueError, match="needs more than"):
        encode_pixels(loaded, diagonal(1, num_scales=1), pixels, 0.1, int(spent.max()) - 1, guided)


def test_between_given_images_both_ways_are_of_the_class(stage, files, pixels, tmp_path):
    flags = ["--input", "fine/a.png", "fine/b.png", "--frames", 3, "--tolerance", 1e-4, "--num_calls", 9999]
    file = files["baseline told"]
    for name, more in (("cat", ["--class", "cat", "--guidance_scale", 2]), ("null", [])):
        stage(interpolate, *flags_of(file, name, *flags, *more))
        assert (pngs(tmp_path / name)[::2].int() - pixels.int()).abs().max() <= 1
    assert not torch.equal(pngs(tmp_path / "cat")[1], pngs(tmp_path / "null")[1])


def test_a_classifier_guides_a_model_without_classes(stage, files, pixels, tmp_path):
    file, classifier = files["baseline"], files["classifier"]
    more = ["--class", "cat", "--classifier", classifier, "--classifier_scale", 20]
    module, flags, call = STAGES["inpaint"]
    ended = stage(module, *flags_of(file, "out", *flags, *more))
    assert "2 new with 8 network calls each, 8 of the path and 0 by jumps" in ended.output
    loaded, judge = load_model(file), load_classifier(classifier)
    assert said(tmp_path / "out")["guidance"] == f"class cat, classifier {judge.fingerprint} 20"

    def unaware(xs, ts, labels):
        return loaded.denoise(xs, ts)

    guided = OfClass(ClassifierGuided(unaware, judge.log_probability, loaded.scheduler, 20.0), CAT)
    images, nfe = call(loaded, guided, pixels)
    assert nfe == 8 and torch.equal(pngs(tmp_path / "out"), to_uint8(images))
    assert not torch.equal(pngs(tmp_path / "out"), to_uint8(call(loaded, loaded.denoise, pixels)[0]))


@pytest.mark.parametrize("with_classifier", [False, True])
def test_jumps_are_guided_and_their_calls_counted(stage, files, pixels, tmp_path, with_classifier):
    """Each evaluation is with and without the class, and with a classifier a third call."""
    file, classifier = files["lift_dual_timestep told"], files["classifier"]
    more = ["--class", "cat", "--guidance_scale", 3, *(["--classifier", classifier] if with_classifier else [])]
    jumps, calls = ["--jump_length", 2, "--jump_repeats", 3], 2 + with_classifier
    flags = ["--input", "fine", "--mask", "left", *STEPS, *jumps]
    ended = stage(inpaint, *flags_of(file, "out", *flags, *more))
    assert (
        f"2 new with {8 * calls} network calls each, {4 * calls} of the path and {4 * calls} by jumps" in ended.output
    )
    loaded = load_model(file)
    guided = ClassifierFree(loaded.denoise, 3, 3.0)
    if with_classifier:
        guided = ClassifierGuided(guided, load_classifier(classifier).log_probability, loaded.scheduler, 1.0)
    images, nfe = painted(loaded, OfClass(guided, CAT), pixels, jump_repeats=3)
    assert nfe == 8 * calls and torch.equal(pngs(tmp_path / "out"), to_uint8(images))


def test_one_class_is_that_class_in_every_row(files):
    loaded = load_model(files["baseline told"])
    noise, path = [torch.randn(3, 3, 16, 16)], diagonal(3, num_scales=1)
    by_labels = sample(loaded.denoise, loaded.scheduler, path, noise, labels=torch.full((3,), CAT))
    guided = OfClass(ClassifierFree(loaded.denoise, 3, 2.0), CAT)
    assert torch.equal(
        sample(OfClass(loaded.denoise, CAT), loaded.scheduler, path, noise).images[0], by_labels.images[0]
    )
    assert guided.calls == 2 and sample(guided, loaded.scheduler, path, noise).nfe == 6


def test_measured_super_resolution_says_class_and_calls(stage, files, pixels, tmp_path, cache):
    flags = ["--on", "train", "--num_images", 2, "--cache_dir", cache, *STEPS, "--class", "dog", "--guidance_scale", 2]
    stage(generate_sr, *flags_of(files["lift_dual_timestep told"], "out", *flags))
    rows = list(csv.DictReader((tmp_path / "out/sr_metrics.csv").open()))
    assert {row["guidance"] for row in rows} == {"class dog, guidance 2"} and "classes" not in rows[0]
    assert {row["nfe"] for row in rows if row["method"].startswith("lift")} == {"8"}


@pytest.mark.parametrize("name", [*STAGES, "encode"])
def test_folders_of_other_classes_are_not_mixed_and_have_names_of_their_own(
    stage, refused, files, pixels, tmp_path, name
):
    module, flags, _ = STAGES.get(name, (encode, ["--input", "fine", "--tolerance", 0.1], None))
    file = files["lift_dual_timestep told"]
    stage(module, *flags_of(file, "out", *flags, "--class", "cat"))
    for more in ([], ["--class", "dog"], ["--class", "cat", "--guidance_scale", 2]):
        refused(module, *flags_of(file, "out", *flags, *more), says=("guidance", "--force"))
    at_home = ["--checkpoint", file, *HARDWARE, *flags]
    for more in ([], ["--class", "cat"], ["--class", "cat", "--guidance_scale", 2]):
        assert "already" not in stage(module, *at_home, *more).output
    places = {folder.parent.name for folder in files["baseline"].parent.parent.rglob("settings.json")}
    places |= {folder.parent.name for folder in tmp_path.rglob("settings.json")}
    assert any("_cat_g2" in place for place in places)


@pytest.mark.parametrize("name", [*STAGES, "encode"])
def test_what_says_nothing_is_refused(refused, files, pixels, name):
    module, flags, _ = STAGES.get(name, (encode, ["--input", "fine"], None))
    told, plain = files["lift_dual_timestep told"], files["lift_dual_timestep"]
    refused(module, *flags_of(told, "x", *flags, "--class", "cow"), says=("--class cow is no class", "bird, cat, dog"))
    refused(module, *flags_of(told, "x", *flags, "--guidance_scale", 2), says=("name it with --class",), status=2)
    refused(module, *flags_of(told, "x", *flags, "--classifier", "c.pth"), says=("name it with --class",), status=2)
    scaled = ["--class", "cat", "--classifier_scale", 2]
    refused(module, *flags_of(told, "x", *flags, *scaled), says=("belongs to --classifier",), status=2)
    negative = ["--class", "cat", "--guidance_scale", -1]
    refused(module, *flags_of(told, "x", *flags, *negative), says=("at least 0",), status=2)
    refused(module, *flags_of(plain, "x", *flags, "--class", "cat"), says=("without classes", "--class"))
    guided = ["--class", "cat", "--classifier", told]
    refused(module, *flags_of(plain, "x", *flags, *guided), says=("is no classifier",))


def test_calls_that_leave_no_room_for_guidance_are_refused(refused, files, pixels):
    few = ["--seeds", *SEEDS, "--class", "cat", "--guidance_scale", 2, "--num_calls", 1]
    refused(interpolate, *flags_of(files["baseline told"], "x", *few), says=("2 network calls",), status=2)
