"""Images in: decoding against torchvision, the cache, what is refused, and the order of batches."""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import data
from data import (
    ImageSet,
    TwoScaleBatches,
    coarse,
    distinct_images,
    fingerprint_array,
    first_of_equals,
    load_images,
    split_holdout,
    to_float,
    to_uint8,
)
from images.sources import open_source
from images.synthetic import synthetic_images

CPU = torch.device("cpu")
# Width and height; at some of them the longer side or the margin of the crop is not whole.
SIZES = [(33, 50), (70, 41), (20, 20), (64, 64), (17, 90), (31, 16), (47, 33), (16, 16), (65, 64), (101, 37)]


def picture(seed: int, size=(24, 24), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def make_folder(folder: Path, count: int = 3, mode: str = "RGB") -> Path:
    folder.mkdir(parents=True)
    for k in range(count):
        picture(k, mode=mode).save(folder / f"{k}.png")
    return folder


def by_torchvision(image: Image.Image, resolution: int) -> np.ndarray:
    pipeline = transforms.Compose([transforms.Resize(resolution), transforms.CenterCrop(resolution)])
    return np.asarray(pipeline(image)).transpose(2, 0, 1)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def no_decoding(monkeypatch):
    def fail(*args):
        raise AssertionError("images were decoded again")

    return lambda: [monkeypatch.setattr(data, name, fail) for name in ("_decode_all", "_synthetic_pixels")]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))


def parquet_folder(folder: Path, columns: dict, features: dict) -> Path:
    folder.mkdir()
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


# Sources


def test_synthetic_images_are_those_of_the_generator(cache, monkeypatch):
    images = load_images("synthetic", 16, cache, limit=6)
    np.testing.assert_array_equal(images.pixels, synthetic_images(6, 16))
    assert (images.name, images.channels, len(images)) == ("synthetic", 3, 6)
    assert images.pixels.dtype == np.uint8 and images.fingerprint == fingerprint_array(synthetic_images(6, 16))
    monkeypatch.setattr(data, "SYNTHETIC_DEFAULT_IMAGES", 5)
    np.testing.assert_array_equal(load_images("synthetic", 16, cache).pixels, synthetic_images(5, 16))


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((6, 3, 16, 16), np.float32),
        np.zeros((6, 3, 16, 16), np.int8),
        np.zeros((6, 3, 32, 32), np.uint8),
        np.zeros((6, 3, 16, 32), np.uint8),
        np.zeros((6, 3, 16), np.uint8),
        np.zeros(6, np.uint8),
    ],
)
def test_an_array_of_another_kind_in_the_cache_is_no_answer(cache, other):
    expected = np.array(load_images("synthetic", 16, cache, limit=6).pixels)
    [file] = cache.glob("*.npy")
    np.save(file, other)
    np.testing.assert_array_equal(load_images("synthetic", 16, cache, limit=6).pixels, expected)


@pytest.mark.parametrize("fingerprint", ["", "0123", "0" * 17])
def test_a_fingerprint_of_another_length_in_the_cache_is_no_answer(cache, fingerprint):
    images = load_images("synthetic", 16, cache, limit=6)
    [file] = cache.glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": fingerprint}))
    assert load_images("synthetic", 16, cache, limit=6).fingerprint == images.fingerprint


def test_there_are_4096_synthetic_images_unless_told_otherwise(cache, monkeypatch):
    monkeypatch.setattr(data, "_synthetic_pixels", lambda count, side: np.zeros((count, 3, side, side), np.uint8))
    assert [len(load_images("synthetic", 16, cache, limit=limit)) for limit in (None, 1, 5000)] == [4096, 1, 5000]


def test_synthetic_chunks_join_to_one_sequence(cache, monkeypatch):
    monkeypatch.setattr(data, "DECODE_CHUNK", 4)
    np.testing.assert_array_equal(load_images("synthetic", 16, cache, limit=10).pixels, synthetic_images(10, 16))


@pytest.mark.parametrize("resolution", [16, 32])
def test_resize_and_crop_equal_torchvision(tmp_path, cache, resolution):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, size in enumerate(SIZES):
        picture(k, size).save(folder / (f"{k:02d}.png" if k % 2 else f"{k:02d}.jpg"))
    images = load_images(str(folder), resolution, cache)
    assert images.pixels.shape == (len(SIZES), 3, resolution, resolution)
    for pixels, file in zip(images.pixels, sorted(folder.iterdir()), strict=True):
        expected = by_torchvision(Image.open(file).convert("RGB"), resolution)
        assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1, file.name


def test_folder_is_read_in_order_of_names_with_its_sub_folders(tmp_path, cache, monkeypatch):
    folder = tmp_path / "pictures"
    names = ["b/2.png", "a/1.PNG", "a/deep/er/0.bmp", "c.webp"]
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k, (16, 16)).save(folder / name, lossless=True)
    (folder / "notes.txt").write_text("no image")
    monkeypatch.setattr(data, "DECODE_CHUNK", 3)
    images = load_images(str(folder), 16, cache)
    order = ["a/1.PNG", "a/deep/er/0.bmp", "b/2.png", "c.webp"]
    expected = [np.asarray(picture(names.index(name), (16, 16))).transpose(2, 0, 1) for name in order]
    np.testing.assert_array_equal(images.pixels, expected)
    np.testing.assert_array_equal(load_images(str(folder), 16, cache, limit=2).pixels, expected[:2])


def test_the_train_folder_is_preferred(tmp_path, cache):
    make_folder(tmp_path / "pictures" / "train", count=2)
    make_folder(tmp_path / "pictures" / "test", count=3)
    assert len(load_images(str(tmp_path / "pictures"), 16, cache)) == 2


@pytest.mark.parametrize("name", ["!first.png", "~last.png"])
def test_a_set_is_grey_only_if_all_of_it_is(tmp_path, cache, name):
    grey = load_images(str(make_folder(tmp_path / "grey", mode="L")), 16, cache)
    assert grey.channels == 1 and grey.pixels.shape == (3, 1, 16, 16)
    folder = make_folder(tmp_path / "mixed", count=1)
    picture(7, mode="L").save(folder / name)
    mixed = load_images(str(folder), 16, cache).pixels
    assert mixed.shape == (2, 3, 16, 16)
    is_grey = [bool((image == image[:1]).all()) for image in mixed]
    assert is_grey == ([True, False] if name == "!first.png" else [False, True])


def test_sixteen_bit_grey_is_scaled_to_eight(tmp_path, cache):
    folder = tmp_path / "deep"
    folder.mkdir()
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(values).save(folder / "0.png")
    np.testing.assert_array_equal(load_images(str(folder), 16, cache).pixels[0, 0], values // 257)


def test_parquet_folder_is_opened_by_datasets(tmp_path, cache, hub_cache, no_decoding):
    pictures = [picture(k, (16, 16)) for k in range(4)]
    folder = parquet_folder(
        tmp_path / "rows",
        {"label": [0, 1, 0, 1], "image": pictures},
        {"label": datasets.Value("int64"), "image": datasets.Image()},
    )
    images = load_images(str(folder), 16, cache)
    np.testing.assert_array_equal(images.pixels, [np.asarray(p).transpose(2, 0, 1) for p in pictures])
    no_decoding()
    again = load_images(str(folder), 16, cache)
    np.testing.assert_array_equal(again.pixels, images.pixels)
    assert again.fingerprint == images.fingerprint


def test_parquet_with_an_empty_row_names_it(tmp_path, cache, hub_cache):
    features = {"picture": datasets.Image()}
    folder = parquet_folder(tmp_path / "rows", {"picture": [picture(0), None, picture(2)]}, features)
    with pytest.raises(ValueError, match="image 1 of dataset .*rows.*the row is empty.*--skip_bad_images"):
        load_images(str(folder), 16, cache)
    assert len(load_images(str(folder), 16, cache, skip_bad_images=True)) == 2


def test_data_without_an_image_column_is_refused(tmp_path, cache, hub_cache):
    folder = parquet_folder(tmp_path / "rows", {"label": [0, 1]}, {"label": datasets.Value("int64")})
    with pytest.raises(ValueError, match="has no image column; its columns are label"):
        load_images(str(folder), 16, cache)


def test_unknown_dataset_ends_with_the_ways_out(cache, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(RuntimeError) as caught:
        load_images("nobody/nothing", 16, cache)
    message = str(caught.value)
    assert "\n" not in message and "much more" not in message
    for part in ("'nobody/nothing'", "ConnectionError: Couldn't reach the hub", "--dataset FOLDER", "synthetic"):
        assert part in message


def test_missing_folders_and_files_are_no_hub_ids(tmp_path, cache):
    file = tmp_path / "file"
    file.write_text("")
    for name in ("./missing", str(tmp_path / "missing"), "~/missing", str(file)):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            load_images(name, 16, cache)


@pytest.mark.parametrize("resolution", [-16, 0, 8, 40, 63])
def test_resolution_must_be_a_multiple_of_16(cache, resolution):
    with pytest.raises(ValueError, match=f"--resolution {resolution} must be a positive multiple of 16"):
        load_images("synthetic", resolution, cache, limit=1)
    assert not cache.exists()


def test_limit_must_lie_within_the_data(tmp_path, cache):
    folder = str(make_folder(tmp_path / "pictures"))
    assert len(load_images(folder, 16, cache, limit=3)) == 3
    with pytest.raises(ValueError, match="--limit 4 asks for more images than the 3 of"):
        load_images(folder, 16, cache, limit=4)
    with pytest.raises(ValueError, match="--limit 0"):
        load_images(folder, 16, cache, limit=0)


def test_images_that_are_not_to_be_resized_must_have_their_size(tmp_path, cache):
    for name, size in (("exact", (16, 16)), ("larger", (32, 32)), ("taller", (16, 17))):
        folder = tmp_path / name
        folder.mkdir()
        for k, side in enumerate([(16, 16), size]):
            picture(k, side).save(folder / f"{k}.png")
        if name == "exact":
            expected = [np.asarray(picture(k, size)).transpose(2, 0, 1) for k in (0, 1)]
            np.testing.assert_array_equal(load_images(str(folder), 16, cache, resize_filter=None).pixels, expected)
            continue
        says = rf"1.png is {size[0]}x{size[1]} and not 16x16; .* --dataset, which resiz"
        # Skipping unreadable images skips none of these, and resizing takes them all.
        for skip_bad_images in (False, True):
            with pytest.raises(ValueError, match=says):
                load_images(str(folder), 16, cache, resize_filter=None, skip_bad_images=skip_bad_images)
        assert len(load_images(str(folder), 16, cache)) == 2


# Damaged images


def damage(folder: Path, how: str) -> Path:
    file = folder / ("1.jpg" if how == "text" else "1.png")
    (folder / "1.png").unlink()
    if how == "truncated":
        picture(1, (200, 200)).save(file)
        file.write_bytes(file.read_bytes()[:40_000])
    elif how == "flipped":
        picture(1, (200, 200)).save(file)
        content = bytearray(file.read_bytes())
        content[1000:1100] = bytes(100)
        file.write_bytes(content)
    else:
        file.write_text("not an image" if how == "text" else "")
    return file


@pytest.mark.parametrize("how", ["truncated", "flipped", "text", "empty"])
def test_a_damaged_image_is_named_or_left_out(tmp_path, cache, how, capsys):
    folder = make_folder(tmp_path / "pictures")
    file = damage(folder, how)
    with pytest.raises(ValueError) as caught:
        load_images(str(folder), 16, cache)
    assert str(file) in str(caught.value) and "--skip_bad_images" in str(caught.value)
    assert [f.suffix for f in cache.iterdir()] == [".lock"]
    kept = load_images(str(folder), 16, cache, skip_bad_images=True).pixels
    assert f"skipped {file}: " in capsys.readouterr().out
    np.testing.assert_array_equal(kept, [by_torchvision(picture(k), 16) for k in (0, 2)])


def test_a_damaged_first_image_does_not_decide_the_colours(tmp_path, cache):
    folder = make_folder(tmp_path / "pictures", mode="L")
    (folder / "0.png").write_text("")
    assert load_images(str(folder), 16, cache, skip_bad_images=True).pixels.shape == (2, 1, 16, 16)


def test_a_folder_of_damaged_images_holds_none(tmp_path, cache):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "0.png").write_text("")
    with pytest.raises(ValueError, match="holds no readable image"):
        load_images(str(folder), 16, cache, skip_bad_images=True)


# Cache


# A dot in the name is not the start of a suffix.
@pytest.mark.parametrize("name", ["pictures", "pictures.v2"])
def test_second_load_decodes_nothing_and_other_settings_do(tmp_path, cache, no_decoding, name):
    folder = make_folder(tmp_path / name)
    settings = [
        {},
        {"resolution": 32},
        {"resize_filter": "lanczos"},
        {"limit": 2},
        {"skip_bad_images": True},
    ]
    first = [load_images(str(folder), **{"resolution": 16} | s, cache_dir=cache) for s in settings]
    alone = [
        load_images(str(folder), **{"resolution": 16} | s, cache_dir=tmp_path / f"c{k}") for k, s in enumerate(settings)
    ]
    for together, separate in zip(first, alone, strict=True):
        np.testing.assert_array_equal(together.pixels, separate.pixels)
        assert together.fingerprint == separate.fingerprint == fingerprint_array(together.pixels)
    assert [len(images) for images in first] == [3, 3, 3, 2, 3]
    assert len({images.fingerprint for images in first}) == 4  # Nothing was bad, so skipping gives equal pixels.
    assert len(list(cache.glob("*.npy"))) == 5
    no_decoding()
    for before, setting in zip(first, settings, strict=True):
        after = load_images(str(folder), **{"resolution": 16} | setting, cache_dir=cache)
        np.testing.assert_array_equal(after.pixels, before.pixels)
        assert after.fingerprint == before.fingerprint


def test_a_cache_has_the_name_that_earlier_versions_gave_it(tmp_path, cache):
    folder = make_folder(tmp_path / "pictures")
    for flags, settings in (
        ({}, "bilinear|3|False"),
        ({"background": "white"}, "bilinear|3|False"),
        ({"background": "#FFF"}, "bilinear|3|False"),
        ({"limit": 2, "resize_filter": "box"}, "box|2|False"),
        ({"skip_bad_images": True}, "bilinear|3|True"),
        ({"background": "black"}, "bilinear|3|False|(0, 0, 0)"),
    ):
        load_images(str(folder), 16, cache, **flags)
        label = f"{open_source(str(folder)).key}|16|{settings}"
        assert (cache / f"pictures_16_{hashlib.sha256(label.encode()).hexdigest()[:12]}.npy").exists()
    assert len(list(cache.glob("*.npy"))) == 4
    # Painted images have no background, whatever is asked for.
    for background in ("white", "black"):
        load_images("synthetic", 16, cache, limit=1, background=background)
    assert len(list(cache.glob("synthetic*.npy"))) == 1


def test_a_changed_file_is_decoded_again(tmp_path, cache):
    folder = make_folder(tmp_path / "pictures")
    before = load_images(str(folder), 16, cache)
    picture(99).save(folder / "1.png")
    after = load_images(str(folder), 16, cache)
    assert after.fingerprint != before.fingerprint
    np.testing.assert_array_equal(after.pixels[1], by_torchvision(picture(99), 16))
    np.testing.assert_array_equal(after.pixels[[0, 2]], before.pixels[[0, 2]])
    (folder / "2.png").unlink()
    assert len(load_images(str(folder), 16, cache)) == 2


def test_cache_says_what_it_holds(cache):
    images = load_images("synthetic", 32, cache, limit=2, resize_filter="box")
    [info] = [json.loads(file.read_text()) for file in cache.glob("*.json")]
    assert info == {
        "dataset": "synthetic",
        "fingerprint": images.fingerprint,
        "resolution": 32,
        "resize_filter": "box",
    }


def test_fingerprint_sees_content_shape_and_type(monkeypatch):
    pixels = synthetic_images(3, 16)
    monkeypatch.setattr(data, "DECODE_CHUNK", 2)
    other = pixels.copy()
    other[2, 1, 5, 5] ^= 1
    variants = [pixels, other, pixels[:2], pixels.reshape(3, 3, 8, 32), pixels.view(np.int8)]
    assert len({fingerprint_array(v) for v in variants}) == len(variants)
    assert fingerprint_array(pixels) == fingerprint_array(pixels.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3))


# Values


def test_floats_and_bytes_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels)[[0, -1]].tolist() == [-1, 1] and to_float(levels).dtype == torch.float32
    # Every level owns the interval of half a level to both sides, and beyond the ends values are clamped.
    edges = (levels.double()[:-1] + 0.5) / 127.5 - 1
    assert torch.equal(to_uint8(edges - 1e-4), levels[:-1]) and torch.equal(to_uint8(edges + 1e-4), levels[1:])
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_coarse_image_is_the_2x2_mean():
    x_64 = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    blocks = x_64.reshape(2, 3, 4, 2, 4, 2).mean(dim=(3, 5))
    torch.testing.assert_close(coarse(x_64), blocks, rtol=0, atol=1e-12)


# Held-out images


def counted(count, repeated=()):
    """Images that differ, but for those whose index is in `repeated`, which equal the one whose index is its value."""
    pixels = np.zeros((count, 1, 16, 16), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    for index, of in dict(repeated).items():
        pixels[index] = pixels[of]
    return ImageSet(pixels, "counted", fingerprint_array(pixels))


def indices(pixels):
    return (pixels[:, 0, 0, :2].astype(int) @ [1, 256]).tolist()


def in_the_middle(count, holdout):
    """Of so many stretches of equal length the image in whose place, from k to k + 1, the middle of each lies."""
    middles = [(Fraction(k) + Fraction(1, 2)) * Fraction(count, holdout) for k in range(holdout)]
    return [next(k for k in range(count) if k <= middle < k + 1) for middle in middles]


@pytest.mark.parametrize(
    ("count", "holdout", "chosen"),
    [
        (2, 1, [1]),
        (3, 1, [1]),
        (3, 2, [0, 2]),
        (4, 2, [1, 3]),
        (9, 3, [1, 4, 7]),
        (10, 1, [5]),
        (10, 3, [1, 5, 8]),
        (10, 4, [1, 3, 6, 8]),
        (10, 9, [0, 1, 2, 3, 5, 6, 7, 8, 9]),
        (1000, 4, [125, 375, 625, 875]),
    ],
)
def test_these_images_are_held_out(count, holdout, chosen):
    assert in_the_middle(count, holdout) == chosen
    training, held_out = split_holdout(counted(count), holdout)
    assert indices(held_out.pixels) == chosen
    assert indices(training.pixels) == [k for k in range(count) if k not in chosen]


def test_held_out_images_are_those_in_the_middle_of_equal_stretches_whatever_their_number():
    for count in range(2, 25):
        for holdout in range(1, count):
            training, held_out = split_holdout(counted(count), holdout)
            chosen = in_the_middle(count, holdout)
            assert indices(held_out.pixels) == chosen and len(chosen) == holdout
            assert indices(training.pixels) == sorted(set(range(count)) - set(chosen))


@pytest.mark.parametrize(("count", "holdout"), [(2, 1), (10, 9), (300, 7), (300, 150), (299, 298)])
def test_both_parts_are_sets_of_their_own(count, holdout):
    images = counted(count)
    training, held_out = split_holdout(images, holdout)
    assert indices(held_out.pixels) == in_the_middle(count, holdout) and len(training) == count - holdout
    for part in (training, held_out):
        assert part.name == "counted" and part.fingerprint == fingerprint_array(part.pixels)
    assert len({images.fingerprint, training.fingerprint, held_out.fingerprint}) == 3
    assert [part.fingerprint for part in split_holdout(images, holdout)] == [training.fingerprint, held_out.fingerprint]


def test_a_set_sorted_by_class_has_every_class_in_both_parts():
    classes = np.repeat(np.arange(3), [20, 50, 30])
    parts = split_holdout(counted(100), 10)
    counts = [np.bincount(classes[indices(part.pixels)]).tolist() for part in parts]
    assert counts == [[18, 45, 27], [2, 5, 3]]


def test_repetitions_of_held_out_images_are_in_neither_part():
    # Of ten images, 1, 5 and 8 are held out; repetitions may come before and after, and among those trained on.
    training, held_out = split_holdout(counted(10, {3: 1, 5: 0, 9: 2}), 3)
    assert indices(held_out.pixels) == [1, 0, 8]
    assert indices(training.pixels) == [2, 4, 6, 7, 2]
    training, held_out = split_holdout(counted(10, {5: 1}), 3)
    assert indices(held_out.pixels) == [1, 1, 8] and indices(training.pixels) == [0, 2, 3, 4, 6, 7, 9]


@pytest.mark.parametrize("count", [-1, 0, 10, 11])
def test_a_holdout_must_leave_both_parts(count):
    with pytest.raises(ValueError, match=f"--holdout {count} must leave images .* 'counted' has 10, so choose 1 to 9"):
        split_holdout(counted(10), count)


def test_a_holdout_must_leave_more_than_repetitions():
    with pytest.raises(ValueError, match="--holdout 2 leaves none of the images of 'counted', which repeats them"):
        split_holdout(counted(6, {k: k % 2 for k in range(2, 6)}), 2)


def test_repetitions_are_found():
    images = counted(6, {2: 0, 3: 1, 5: 0})
    assert first_of_equals(images.pixels).tolist() == [0, 1, 0, 1, 4, 0]
    assert indices(distinct_images(images.pixels)) == [0, 1, 4]


# Batches


def numbered(count: int) -> ImageSet:
    """Random images whose first channel holds the number of the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
    pixels[:, 0] = np.arange(count, dtype=np.uint8)[:, None, None]
    return ImageSet(pixels, "numbered", "0")


def order_of(batches) -> list[int]:
    return [int(k) for x_64, _, _ in batches for k in to_uint8(x_64)[:, 0, 0, 0]]


def test_an_epoch_shows_every_image_once_in_an_order_of_seed_and_epoch():
    images = numbered(31)
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            orders[seed, epoch] = order_of(TwoScaleBatches(images, 1, seed, CPU).epoch(epoch))
            assert sorted(orders[seed, epoch]) == list(range(31))
    assert len({tuple(order) for order in orders.values()}) == 6
    # Another batch size, other epochs before, mirroring: the same order, less the remainder.
    batches = TwoScaleBatches(images, 4, 1, CPU, flip=True)
    assert len(batches) == 7
    for epoch in (2, 0):
        assert order_of(batches.epoch(epoch)) == orders[1, epoch][:28]


def test_global_random_state_has_no_say():
    images, orders = numbered(31), []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)
        orders.append(order_of(TwoScaleBatches(images, 4, 3, CPU, flip=True).epoch(5)))
    assert orders[0] == orders[1]


def test_first_batch_continues_the_epoch():
    batches = TwoScaleBatches(numbered(31), 4, 1, CPU, flip=True)
    whole = list(batches.epoch(3))
    for first in range(8):
        rest = list(batches.epoch(3, first_batch=first))
        assert len(rest) == 7 - first
        for (x_64, x_32, _), (y_64, y_32, _) in zip(rest, whole[first:], strict=True):
            assert torch.equal(x_64, y_64) and torch.equal(x_32, y_32)


def test_batches_hold_the_pixels_and_their_2x2_mean():
    images = numbered(9)
    for x_64, x_32, _ in TwoScaleBatches(images, 4, 0, CPU).epoch(0):
        chosen = images.pixels[to_uint8(x_64)[:, 0, 0, 0].numpy()].astype(np.float64) / 127.5 - 1
        assert x_64.dtype == x_32.dtype == torch.float32
        np.testing.assert_allclose(x_64.numpy(), chosen, rtol=0, atol=1e-6)
        blocks = chosen.reshape(4, 3, 8, 2, 8, 2).mean(axis=(3, 5))
        np.testing.assert_allclose(x_32.numpy(), blocks, rtol=0, atol=1e-6)
        assert x_64.min() == -1 and x_64.max() == 1


def test_flip_mirrors_half_of_the_images():
    images = numbered(250)
    mirrored = []
    for epoch in range(4):
        [(x_64, x_32, _)] = TwoScaleBatches(images, 250, 0, CPU, flip=True).epoch(epoch)
        original = to_float(torch.from_numpy(images.pixels[to_uint8(x_64)[:, 0, 0, 0].numpy()]))
        same = (x_64 == original).flatten(1).all(1)
        turned = (x_64 == original.flip(-1)).flatten(1).all(1)
        assert (same ^ turned).all()
        torch.testing.assert_close(x_32, coarse(torch.where(turned[:, None, None, None], original.flip(-1), original)))
        mirrored.append(turned[torch.argsort(x_64[:, 0, 0, 0])])
        [(again, _, _)] = TwoScaleBatches(images, 250, 0, CPU, flip=True).epoch(epoch)
        assert torch.equal(again, x_64)
    share = torch.stack(mirrored).float()
    # Of 1000 fair coins the share of heads has a standard deviation of 0.016.
    assert 0.42 < share.mean() < 0.58
    # Each epoch throws the coins again.
    assert 0.3 < (share[0] != share[1]).float().mean() < 0.7


@pytest.mark.parametrize("batch_size", [0, 10])
def test_batch_must_fit_the_set(batch_size):
    with pytest.raises(ValueError, match=f"--batch_size {batch_size} does not fit the 9 images"):
        TwoScaleBatches(numbered(9), batch_size, 0, CPU)


@pytest.mark.parametrize("flip", [False, True])
def test_labels_go_with_their_images(flip):
    images = numbered(31)
    labels = np.arange(31, dtype=np.uint8)[::-1].copy()  # That of image k is 30 - k.
    labelled = TwoScaleBatches(images, 4, 1, CPU, flip, labels)
    plain = TwoScaleBatches(images, 4, 1, CPU, flip)
    labels[:] = 99
    for epoch, first in ((0, 0), (1, 0), (1, 3)):
        both = list(zip(labelled.epoch(epoch, first), plain.epoch(epoch, first), strict=True))
        assert len(both) == 7 - first
        for (x_64, x_32, found), (y_64, y_32, none) in both:
            assert found.dtype == torch.int64 and torch.equal(found, 30 - to_uint8(x_64)[:, 0, 0, 0].long())
            # Nothing else about a batch depends on labels.
            assert none is None and torch.equal(x_64, y_64) and torch.equal(x_32, y_32)


@pytest.mark.parametrize("labels", [np.zeros(8, int), np.zeros((9, 1), int), np.zeros(10, int)])
def test_every_image_needs_a_label(labels):
    with pytest.raises(ValueError, match="9 images of 'numbered' need a label each"):
        TwoScaleBatches(numbered(9), 3, 0, CPU, labels=labels)
