"""`--pad`: images keep their pixels, in the middle of a square of one colour, in training and in later stages."""

import hashlib
import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import cli
import data
import generate_sr
import inpaint
import train_baseline
from checkpoint import read_checkpoint, save_checkpoint
from conftest import HARDWARE, STEPS, TINY
from data import fingerprint_array, load_images, padded, read_png, split_holdout
from evaluation.reference_set import load_reference
from image_folder import as_in_training, read_folder
from images.reading import TooLargeError
from images.sources import open_source
from inpaint import load_mask
from runtime.settings import parse_settings
from training.settings import TrainingSettings

RNG = np.random.default_rng(28)
BLACK, RED = (0, 0, 0), (255, 0, 0)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))


def drawn(width, height, channels=3):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def around(array, side, colour):
    """The expected image, [side, side, 3], by np.pad: the smaller half of a margin is left and above."""
    rows, columns = (side - size for size in array.shape[:2])
    margins = (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)
    channels = np.broadcast_to(array[..., None], (*array.shape, 3)) if array.ndim == 2 else array
    return np.stack([np.pad(channels[..., k], margins, constant_values=colour[k]) for k in range(3)], -1)


def write(folder, *arrays):
    folder.mkdir(parents=True)
    for k, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{k}.png")
    return str(folder)


def load(place, cache, resolution=32, pad="black", **options):
    """The images as `[N, R, R, C]`."""
    return np.asarray(load_images(place, resolution, cache, pad=pad, **options).pixels).transpose(0, 2, 3, 1)


# Width and height: MNIST's, odd rests of one and of both sides, one pixel, the whole square.
@pytest.mark.parametrize("size", [(28, 28), (27, 28), (28, 27), (31, 31), (32, 5), (1, 1), (32, 32)])
@pytest.mark.parametrize("colour", [BLACK, (128,) * 3, RED])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_in_the_middle_and_an_odd_rest_right_and_below(size, colour, channels):
    array = drawn(*size, channels)
    image = padded(Image.fromarray(array), 32, colour)
    assert image.mode == ("L" if channels == 1 and (colour != RED or size == (32, 32)) else "RGB")
    np.testing.assert_array_equal(image.convert("RGB"), around(array, 32, colour))


def test_of_a_rest_of_three_one_is_left_and_above():
    image = np.asarray(padded(Image.fromarray(np.full((13, 13), 9, np.uint8)), 16, BLACK))
    rows, columns = np.nonzero(image)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 13, 1, 13)


@pytest.mark.parametrize("size", [(33, 8), (8, 33), (64, 64)])
def test_what_does_not_fit_is_not_padded(size):
    with pytest.raises(TooLargeError, match=f"is {size[0]}x{size[1]} and does not fit into 32x32"):
        padded(Image.fromarray(drawn(*size)), 32, BLACK)


# Folders and tables


def test_grey_images_stay_grey_if_the_colour_is(tmp_path, cache):
    digits = [drawn(28, 28, 1) for _ in range(3)]
    place = write(tmp_path / "digits", *digits)
    for pad, colour in (("black", BLACK), ("white", (255,) * 3), ("#808080", (128,) * 3)):
        expected = [around(digit, 32, colour)[..., :1] for digit in digits]
        np.testing.assert_array_equal(load(place, cache, pad=pad), expected)
    np.testing.assert_array_equal(load(place, cache, pad="red"), [around(digit, 32, RED) for digit in digits])
    # None of the colour shows.
    assert load(write(tmp_path / "whole", drawn(32, 32, 1)), cache, pad="red").shape == (1, 32, 32, 1)


def test_colour_and_sizes_may_be_mixed(tmp_path, cache):
    arrays = [drawn(28, 28), drawn(31, 17, 1), drawn(32, 32), drawn(3, 30)]
    place = write(tmp_path / "set", *arrays)
    for pad, colour in (("black", BLACK), ("#0a141e", (10, 20, 30))):
        np.testing.assert_array_equal(load(place, cache, pad=pad), [around(array, 32, colour) for array in arrays])


def test_transparency_is_laid_on_the_background_and_then_padded(tmp_path, cache):
    colour, alpha = drawn(28, 27), RNG.choice(np.array([0, 255], np.uint8), (27, 28))
    place = write(tmp_path / "set", np.dstack([colour, alpha]))
    shown = np.where(alpha[..., None] == 255, colour, np.array([10, 20, 30], np.uint8))
    found = load(place, cache, pad="red", background="#0a141e")
    np.testing.assert_array_equal(found, [around(shown, 32, RED)])
    # Grey with transparency, on grey and in grey.
    place = write(tmp_path / "grey", np.dstack([colour[..., 0], alpha]))
    shown = np.where(alpha == 255, colour[..., 0], 255)
    np.testing.assert_array_equal(load(place, cache), [around(shown, 32, BLACK)[..., :1]])


def test_an_image_is_turned_before_it_is_padded(tmp_path, cache):
    array, exif = drawn(28, 9), Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "set").mkdir()
    Image.fromarray(array).save(tmp_path / "set/0.png", exif=exif)
    np.testing.assert_array_equal(load("set", cache), [around(np.rot90(array, -1), 32, BLACK)])


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_of_a_parquet_folder_are_padded(tmp_path, cache, channels):
    arrays = [drawn(28, 28, channels) for _ in range(5)]
    rows = {"image": [], "label": list(range(5))}
    for array in arrays:
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "PNG")
        rows["image"].append({"bytes": stream.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (tmp_path / "digits/data").mkdir(parents=True)
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(tmp_path / "digits/data/train-00000-of-00001.parquet")
    expected = [around(array, 32, BLACK)[..., :channels] for array in arrays]
    np.testing.assert_array_equal(load("digits", cache), expected)
    with pytest.raises(ValueError, match="image 0 of dataset 'digits' is 28x28 and does not fit into 16x16"):
        load("digits", cache, 16)


def test_built_in_images_have_their_size(cache):
    plain = load_images("synthetic", 16, cache, limit=4)
    assert load_images("synthetic", 16, cache, limit=4, pad="red").fingerprint == plain.fingerprint
    assert len(list(cache.glob("*.npy"))) == 1


# The cache


def test_a_padded_set_has_a_cache_of_its_own(tmp_path, cache, monkeypatch):
    place = write(tmp_path / "digits", *(drawn(28, 28, 1) for _ in range(3)))
    flags = [{"pad": None}, {"pad": "black"}, {"pad": "white"}, {"pad": "black", "background": "black"}]
    first = [load_images(place, 32, cache, **options) for options in flags]
    # What is black is black, whatever it is laid under.
    assert len({images.fingerprint for images in first}) == 3 and first[1].fingerprint == first[3].fingerprint
    assert len(list(cache.glob("*.npy"))) == 4
    key = open_source(place).key
    for end in ("", "|pad (0, 0, 0)", "|pad (255, 255, 255)", "|(0, 0, 0)|pad (0, 0, 0)"):
        label = f"{key}|32|bilinear|3|False{end}"
        assert (cache / f"digits_32_{hashlib.sha256(label.encode()).hexdigest()[:12]}.npy").exists()
    said = [json.loads(file.read_text()) for file in cache.glob("*.json")]
    assert sorted((info.get("resize_filter", ""), info.get("pad", "")) for info in said) == [
        ("", "black"), ("", "black"), ("", "white"), ("bilinear", ""),
    ]  # fmt: skip

    def fail(*arguments):
        raise AssertionError("images were decoded again")

    monkeypatch.setattr(data, "_decode_all", fail)
    for options, before in zip([*flags, {"pad": "#000"}], [*first, first[1]], strict=True):
        again = load_images(place, 32, cache, **options)
        assert again.fingerprint == before.fingerprint == fingerprint_array(np.asarray(again.pixels))
        np.testing.assert_array_equal(again.pixels, before.pixels)


# What does not fit


@pytest.mark.parametrize("size", [(33, 28), (28, 33), (40, 40)])
def test_a_larger_image_is_named_or_left_out(tmp_path, cache, capsys, size):
    arrays = [drawn(28, 28), drawn(*size), drawn(32, 30)]
    place = write(tmp_path / "set", *arrays)
    with pytest.raises(ValueError) as caught:
        load(place, cache)
    assert str(caught.value) == (
        f"{place}/1.png is {size[0]}x{size[1]} and does not fit into 32x32, to which --pad pads; leave --pad out or "
        "raise --resolution, or pass --skip_bad_images."
    )
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    kept = load(place, cache, skip_bad_images=True)
    np.testing.assert_array_equal(kept, [around(arrays[k], 32, BLACK) for k in (0, 2)])
    says = f"skipped {place}/1.png: is {size[0]}x{size[1]} and does not fit into 32x32"
    assert says in capsys.readouterr().out
    # Images left out are not made up for.
    assert len(load(place, cache, limit=2, skip_bad_images=True)) == 1
    assert len(load(place, cache, 48)) == 3 and len(load(place, cache, pad=None)) == 3


def test_a_set_without_an_image_that_fits_holds_none(tmp_path, cache):
    place = write(tmp_path / "set", drawn(33, 33), drawn(40, 8))
    with pytest.raises(ValueError, match="holds no readable image"):
        load(place, cache, skip_bad_images=True)


def test_an_unreadable_image_is_called_so(tmp_path, cache):
    place = write(tmp_path / "set", drawn(28, 28))
    (tmp_path / "set/1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"1\.png cannot be read \(Pillow cannot identify it"):
        load(place, cache)
    assert len(load(place, cache, skip_bad_images=True)) == 1


# The setting


def settings_of(tiny, tmp_path, *words):
    flags = [*tiny(tmp_path), "--dataset", str(tmp_path / "digits"), "--limit", "8", "--resolution", "32", *words]
    return parse_settings(TrainingSettings, "A run.", flags, model_type="baseline")


def test_the_flag_alone_is_black_and_without_it_nothing_is_padded(tiny, tmp_path):
    for words, pad in (
        ((), None),
        (("--pad",), "black"),
        (("--pad", "#ff0000"), "#ff0000"),
        (("--pad", "--flip"), "black"),
    ):
        settings = settings_of(tiny, tmp_path, *words)
        assert settings.pad == settings.recorded()["pad"] == pad and settings.before_choices()["pad"] is None


def test_padding_is_recorded_and_later_stages_take_it(tiny, tmp_path, cache):
    digits = [drawn(28, 28, 1) for _ in range(8)]
    write(tmp_path / "digits", *digits)
    settings = settings_of(tiny, tmp_path, "--pad", "white", "--holdout", "2")
    training, held_out = cli.load_image_parts(settings)
    whole = load_images("digits", 32, cache, pad="white")
    expected = split_holdout(whole, 2)
    assert [training.fingerprint, held_out.fingerprint] == [part.fingerprint for part in expected]
    config = settings.recorded() | {"data_fingerprint": training.fingerprint}
    for later in (cli.DataSettings(cache_dir=str(cache)), cli.DataSettings(cache_dir=str(cache), dataset="digits")):
        found = cli.load_image_parts(later, config)
        assert [part.fingerprint for part in found] == [training.fingerprint, held_out.fingerprint]
    # Other images of the user's come to their size in the same way.
    other = drawn(20, 30, 1)
    write(tmp_path / "other", other)
    later = cli.DataSettings(cache_dir=str(cache), dataset="other", limit=1)
    found = cli.load_training_images(later, config).pixels
    np.testing.assert_array_equal(found[0, 0], around(other, 32, (255,) * 3)[..., 0])
    del config["pad"]
    with pytest.raises(ValueError, match="no longer those of the training"):
        cli.load_training_images(cli.DataSettings(cache_dir=str(cache)), config)


def test_a_checkpoint_of_before_there_was_padding_finds_its_images(tiny, tmp_path, cache):
    write(tmp_path / "digits", *(drawn(28, 28, 1) for _ in range(8)))
    settings = settings_of(tiny, tmp_path)
    trained_on = cli.load_training_images(settings)
    config = settings.recorded() | {"data_fingerprint": trained_on.fingerprint}
    del config["pad"]
    assert (
        cli.load_training_images(cli.DataSettings(cache_dir=str(cache)), config).fingerprint == trained_on.fingerprint
    )
    assert as_in_training(config, True) == {"background": "white", "resize_filter": "bilinear", "pad": None}
    assert as_in_training(config | {"pad": "red"}, True)["pad"] == "red"
    assert as_in_training(config | {"pad": "red"}, False)["pad"] is None


def test_a_run_goes_on_with_the_same_padding_only(stage, refused, tiny, tmp_path):
    write(tmp_path / "digits", *(drawn(28, 28, 1) for _ in range(8)))
    flags = [*tiny(tmp_path), "--dataset", "digits", "--limit", 8, "--resolution", 32, "--epochs", 1]
    stage(train_baseline, *flags, "--pad")
    config = read_checkpoint(tmp_path / "checkpoints/baseline_1ep.pth")["config"]
    assert (config["pad"], config["channels"]) == ("black", 1)
    for other, found in (((), None), (("--pad", "white"), "white")):
        load_images("digits", 32, tmp_path / "cache", limit=8, pad=found)
        says = (f"was trained with pad = black, not {found}; resume with the same value",)
        refused(train_baseline, *flags, *other, "--resume", says=says)
    stage(train_baseline, *flags, "--pad", "--resume", "--epochs", 2)
    content = read_checkpoint(tmp_path / "checkpoints/baseline_2ep.pth")
    assert (content["step"], content["config"]["pad"]) == (4, "black")


def test_a_run_of_before_there_was_padding_goes_on_without(stage, refused, tiny, tmp_path):
    place = write(tmp_path / "digits", *(drawn(28, 28, 1) for _ in range(8)))
    flags = [*tiny(tmp_path), "--dataset", "digits", "--limit", 8, "--resolution", 32, "--epochs", 1]
    stage(train_baseline, *flags)
    last, log = tmp_path / "checkpoints/baseline_last.pth", tmp_path / "logs/baseline/settings.json"
    content, said = read_checkpoint(last), json.loads(log.read_text())
    assert content["config"].pop("pad") is said.pop("pad") is None
    save_checkpoint(last, content)
    log.write_text(json.dumps(said))
    load_images(place, 32, tmp_path / "cache", limit=8, pad="black")
    refused(train_baseline, *flags, "--pad", "--resume", says=("was trained with pad = None, not black",))
    stage(train_baseline, *flags, "--resume", "--epochs", 2)
    assert read_checkpoint(tmp_path / "checkpoints/baseline_2ep.pth")["step"] == 4


def test_flags_that_do_not_fit_are_usage_errors(refused):
    says = ("--pad", "'nocolour' is no colour such as white or #808080")
    refused(train_baseline, *TINY, "--pad", "nocolour", says=says, status=2)
    says = ("--pad resizes nothing", "leave it or --resize_filter out")
    refused(train_baseline, *TINY, "--pad", "--resize_filter", "box", says=says, status=2)


# Stages after training


def test_a_reference_is_padded_as_the_training_was(tmp_path, cache):
    digits = [drawn(28, 28, 1), drawn(32, 32, 1)]
    place = write(tmp_path / "digits", *digits)
    found = load_reference(place, 32, 1, cache, pad="black")
    np.testing.assert_array_equal(found.images[:, 0], [around(digit, 32, BLACK)[..., 0] for digit in digits])
    with pytest.raises(ValueError, match="is 28x28 and not 32x32"):
        load_reference(place, 32, 1, cache)
    with pytest.raises(ValueError, match=r"is 28x28 and does not fit into 16x16; name a folder .* or remove the image"):
        load_reference(place, 16, 1, cache, pad="black")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad", ["black", "#808080"])
def test_a_folder_is_padded_as_training_pads_it(tmp_path, cache, channels, pad):
    place = write(tmp_path / "set", *(drawn(*size, channels) for size in ((28, 28), (27, 30), (32, 32))))
    found = torch.stack(list(read_folder(tmp_path / "set", 32, channels, pad=pad).values()))
    np.testing.assert_array_equal(found, load_images(place, 32, cache, pad=pad).pixels)


def test_of_a_mask_the_margin_is_known(tmp_path):
    hole = RNG.random((11, 12)) < 0.5
    Image.fromarray(hole).save("mask.png")
    for scale, side in (("fine", 32), ("coarse", 16), (None, 32)):
        expected = around(hole.astype(np.uint8) * 255, side, (255,) * 3)[..., 0] > 0
        np.testing.assert_array_equal(load_mask("mask.png", scale, 32, resize=True, pad=True), expected)
    Image.fromarray(RNG.random((17, 12)) < 0.5).save("mask.png")
    with pytest.raises(
        ValueError, match="it is 12x17 and does not fit into 16x16.*coarse scale; smaller ones are padded"
    ):
        load_mask("mask.png", "coarse", 32, resize=True, pad=True)


@pytest.mark.parametrize(
    ("module", "size", "flags"),
    [(generate_sr, 8, ()), (inpaint, 16, ("--mask", "mask.png", "--jump_repeats", 1))],
)
def test_a_padded_folder_gives_what_its_padded_images_give(stage, refused, run, tmp_path, module, size, flags):
    content = read_checkpoint(run.lift)
    save_checkpoint(tmp_path / "padded_1ep.pth", content | {"config": content["config"] | {"pad": "#0a141e"}})
    write(tmp_path / "photos", drawn(size, size), drawn(size - 2, size - 3), drawn(size - 5, size))
    Image.fromarray(RNG.random((13, 12)) < 0.5).save("mask.png")
    flags = ["--checkpoint", "padded_1ep.pth", *STEPS, *HARDWARE, *flags]
    stage(module, *flags, "--input", "photos", "--resize", "--output", "made")
    fitted = read_folder(tmp_path / "photos", size, 3, pad="#0a141e").values()
    write(tmp_path / "fitted", *(image.permute(1, 2, 0).numpy() for image in fitted))
    Image.fromarray(load_mask("mask.png", None, 16, resize=True, pad=True).numpy()).save("mask.png")
    stage(module, *flags, "--input", "fitted", "--output", "expected")
    names = sorted(file.name for file in (tmp_path / "made").glob("[0-9]*.png"))
    assert len(names) == 3
    for name in names:
        assert torch.equal(read_png(tmp_path / "made" / name), read_png(tmp_path / "expected" / name))
    settings = [json.loads((tmp_path / place / "settings.json").read_text()) for place in ("made", "expected")]
    assert [(said["resize_filter"], said["pad"]) for said in settings] == [(None, "#0a141e"), (None, None)]
    refused(module, *flags, "--input", "fitted", "--output", "made", says=("made holds results with another pad",))
    write(tmp_path / "large", drawn(size, size + 1))
    says = (f"it is {size}x{size + 1} and does not fit into {size}x{size}", "to which smaller ones are padded")
    refused(module, *flags, "--input", "large", "--resize", "--output", "more", says=says)
