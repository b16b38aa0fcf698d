"""Images and masks of any size for inpainting and super-resolution: brought to the model's size as in training."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import generate_sr
import inpaint
from checkpoint import read_checkpoint, save_checkpoint
from conftest import HARDWARE, STEPS
from data import RESIZE_FILTERS, load_images, read_png
from image_folder import read_folder
from inpaint import load_mask

RNG = np.random.default_rng(23)
# Width and height: wide, high, small, large, the model's.
SIZES = [(40, 25), (17, 50), (9, 7), (64, 64), (16, 16), (16, 31)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_photos(folder, sizes=SIZES, channels=3):
    folder.mkdir(parents=True, exist_ok=True)
    for k, (width, height) in enumerate(sizes):
        shape = (height, width, 3) if channels == 3 else (height, width)
        Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{k}.png")
    return folder


def write_images(folder, images):
    folder.mkdir()
    for name, pixels in images.items():
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize_filter", RESIZE_FILTERS)
@pytest.mark.parametrize("size", [16, 32])
def test_a_folder_is_read_as_training_reads_it(tmp_path, size, resize_filter, channels):
    folder = write_photos(tmp_path / "photos", channels=channels)
    expected = load_images(str(folder), size, tmp_path / "cache", resize_filter=resize_filter).pixels
    found = read_folder(folder, size, channels, resize_filter=resize_filter)
    np.testing.assert_array_equal(torch.stack(list(found.values())), expected)


@pytest.mark.parametrize("scale", ["fine", "coarse", None])
@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (16, 16), (8, 8), (6, 6), (70, 33)])
def test_a_mask_is_resized_by_nearest_neighbours(tmp_path, scale, shape):
    drawn = RNG.random(shape) < 0.5
    Image.fromarray(np.where(drawn, 255, 0).astype(np.uint8)).save(tmp_path / "mask.png")
    # A file of the coarse size is a coarse mask, unless it is said to be fine.
    side = 8 if scale == "coarse" or (scale is None and shape == (8, 8)) else 16
    pipeline = [transforms.Resize(side, transforms.InterpolationMode.NEAREST), transforms.CenterCrop(side)]
    expected = np.asarray(transforms.Compose(pipeline)(Image.fromarray(drawn)))
    np.testing.assert_array_equal(load_mask("mask.png", scale, 16, resize=True), expected)
    if shape not in ((16, 16), (8, 8)):
        with pytest.raises(ValueError, match=rf"it is {shape[1]}x{shape[0]}.*--resize brings others to it"):
            load_mask("mask.png", None, 16)


def with_filter(checkpoint, resize_filter, folder):
    """The checkpoint of a model that was trained on images resized by this filter."""
    content = read_checkpoint(checkpoint)
    file = folder / f"{resize_filter}_1ep.pth"
    save_checkpoint(file, content | {"config": content["config"] | {"resize_filter": resize_filter}})
    return file


@pytest.mark.parametrize("resize_filter", ["bilinear", "lanczos"])
@pytest.mark.parametrize(
    ("module", "size", "flags"),
    [(generate_sr, 8, ()), (inpaint, 16, ("--mask", "mask.png", "--jump_repeats", 1))],
)
def test_a_resized_folder_gives_what_its_resized_images_give(
    stage, refused, run, tmp_path, module, size, flags, resize_filter
):
    photos = write_photos(tmp_path / "photos", SIZES[:3])
    drawn = RNG.random((23, 50)) < 0.5
    Image.fromarray(drawn).save("mask.png")
    checkpoint = with_filter(run.lift, resize_filter, tmp_path)
    flags = ["--checkpoint", checkpoint, *STEPS, *HARDWARE, *flags]
    refused(module, *flags, "--input", "photos", says=("cannot be used (it is", f"{size}x{size}", "--resize"))
    stage(module, *flags, "--input", "photos", "--resize", "--output", "made")
    write_images(tmp_path / "fitted", read_folder(photos, size, 3, resize_filter=resize_filter))
    Image.fromarray(load_mask("mask.png", None, 16, resize=True).numpy()).save("mask.png")
    stage(module, *flags, "--input", "fitted", "--output", "expected")
    names = sorted(file.name for file in (tmp_path / "made").glob("[0-9]*.png"))
    assert len(names) == 3
    for name in names:
        assert torch.equal(read_png(tmp_path / "made" / name), read_png(tmp_path / "expected" / name))
    settings = [json.loads((tmp_path / place / "settings.json").read_text()) for place in ("made", "expected")]
    assert [said["resize_filter"] for said in settings] == [resize_filter, None]
    # Neither goes into the folder of the other.
    for place, more in (("made", ()), ("expected", ("--resize",))):
        says = (f"{place} holds results with another resize_filter", "--force")
        refused(module, *flags, "--input", "fitted", "--output", place, *more, says=says)


def test_folders_of_before_there_was_a_choice_are_gone_on_with(stage, run, tmp_path):
    write_photos(tmp_path / "photos", [(8, 8)])
    flags = ["--checkpoint", run.lift, *STEPS, *HARDWARE, "--input", "photos", "--output", "made"]
    stage(generate_sr, *flags)
    said = json.loads((tmp_path / "made/settings.json").read_text())
    del said["resize_filter"]
    (tmp_path / "made/settings.json").write_text(json.dumps(said))
    assert "all there already" in stage(generate_sr, *flags).output


@pytest.mark.parametrize(
    ("module", "flags"), [(generate_sr, ("--on", "train")), (inpaint, ("--mask", "left")), (generate_sr, ())]
)
def test_what_has_its_size_is_not_to_be_resized(refused, run, module, flags):
    refused(module, "--checkpoint", run.lift, *flags, "--resize", says=("--resize is for --input",), status=2)
