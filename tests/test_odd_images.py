"""Odd images and odd places of images through `load_images`: read as they are meant, or refused by name."""

import errno
import io
import json
import os
import resource
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import cli
import data
import train_baseline
from conftest import TINY
from data import fingerprint_array, load_images
from images.own import IMAGE_TEXT, png_info
from runtime.settings import parse_settings
from training.settings import TrainingSettings

RNG = np.random.default_rng(17)
SIDE = 16
JUNK = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(80)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))


def pixels(seed, channels=3, side=SIDE):
    shape = (side, side, channels) if channels > 1 else (side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def put(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def load(place, cache, **options):
    """The images as `[N, R, R, C]`."""
    return np.asarray(load_images(str(place), SIDE, cache, **options).pixels).transpose(0, 2, 3, 1)


def equal(found, *expected):
    np.testing.assert_array_equal(found, np.stack([e if e.ndim == 3 else e[..., None] for e in expected]))


# Pixels


def test_a_folder_of_photos_stands_upright(tmp_path, cache):
    turned = {2: lambda a: a[:, ::-1], 3: lambda a: np.rot90(a, 2), 6: lambda a: np.rot90(a, -1), 8: np.rot90}
    for orientation in turned:
        exif = Image.Exif()
        exif[0x0112] = orientation
        put(tmp_path / f"set/{orientation}.png", png(pixels(orientation), exif=exif))
    expected = [turn(pixels(orientation)) for orientation, turn in turned.items()]
    equal(load(tmp_path / "set", cache), *expected)
    equal(load(tmp_path / "set", cache, resize_filter=None), *expected)


@pytest.mark.parametrize("background", ["white", "black", "#0a141e"])
def test_transparent_parts_show_the_background(tmp_path, cache, background):
    colour = {"white": (255,) * 3, "black": (0,) * 3, "#0a141e": (10, 20, 30)}[background]
    logo = pixels(1, 4)
    logo[..., 3] = np.where(RNG.random((SIDE, SIDE)) < 0.5, 0, 255)
    put(tmp_path / "set/logo.png", png(logo))
    expected = np.where(logo[..., 3:] == 255, logo[..., :3], np.array(colour, np.uint8))
    equal(load(tmp_path / "set", cache, background=background), expected)


def test_backgrounds_have_a_cache_each_and_the_old_name_is_kept_for_white(tmp_path, cache):
    put(tmp_path / "set/logo.png", png(pixels(1, 4)))
    whites = load_images(str(tmp_path / "set"), SIDE, cache)
    assert load_images(str(tmp_path / "set"), SIDE, cache, background="#ffffff").fingerprint == whites.fingerprint
    assert len(list(cache.glob("*.npy"))) == 1
    blacks = load_images(str(tmp_path / "set"), SIDE, cache, background="black")
    assert blacks.fingerprint != whites.fingerprint and len(list(cache.glob("*.npy"))) == 2


def test_grey_kinds_together_are_a_grey_set(tmp_path, cache):
    grey, deep = pixels(1, 1), RNG.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    put(tmp_path / "set/a.png", png(grey))
    put(tmp_path / "set/b.png", png(np.dstack([grey, np.full_like(grey, 255)])))
    put(tmp_path / "set/c.pgm", b"P5\n16 16\n65535\n" + deep.astype(">u2").tobytes())
    put(tmp_path / "set/d.tif", png(deep, "TIFF"))
    rounded = np.rint(deep / 257).astype(np.uint8)
    equal(load(tmp_path / "set", cache), grey, grey, rounded, rounded)


@pytest.mark.parametrize("values", [np.int32, np.float32])
def test_what_has_no_rule_is_refused_by_name(tmp_path, cache, values):
    put(tmp_path / "set/a.png", png(pixels(1)))
    put(tmp_path / "set/b.tif", png(pixels(2, 1).astype(values), "TIFF"))
    with pytest.raises(ValueError, match=r"set/b\.tif cannot be read \(it has more than 16 bits.*--skip_bad_images"):
        load(tmp_path / "set", cache)
    equal(load(tmp_path / "set", cache, skip_bad_images=True), pixels(1))


# The cache of earlier versions


def as_before(cache, array=None):
    """Make what is in the cache that of a version that did not say how it read; perhaps with other pixels."""
    [info], [file] = cache.glob("*.json"), cache.glob("*.npy")
    said = json.loads(info.read_text())
    assert said.pop("reading")
    if array is not None:
        np.save(file, array)
        said["fingerprint"] = fingerprint_array(array)
    info.write_text(json.dumps(said))
    return file.name


def test_arrays_of_earlier_versions_stay_in_use(tmp_path, cache, monkeypatch):
    for k, kind in enumerate(("PNG", "JPEG", "BMP")):
        put(tmp_path / f"set/{k}.{kind.lower()}", png(pixels(k), kind))
    put(tmp_path / "set/bad.png", b"no image")
    before = load_images(str(tmp_path / "set"), SIDE, cache, skip_bad_images=True)
    as_before(cache)
    monkeypatch.setattr(data, "_decode_all", lambda *args: pytest.fail("decoded again"))
    for _ in range(2):
        after = load_images(str(tmp_path / "set"), SIDE, cache, skip_bad_images=True)
        assert after.fingerprint == before.fingerprint
        np.testing.assert_array_equal(after.pixels, before.pixels)
        # Looked at once.
        monkeypatch.setattr(data, "reads_as_ever", lambda content: pytest.fail("looked at again"))


@pytest.mark.parametrize("odd", ["turned", "transparent", "deep"])
def test_arrays_that_were_misread_are_decoded_again(tmp_path, cache, odd):
    exif = Image.Exif()
    exif[0x0112] = 3
    content = {
        "turned": png(pixels(1), "JPEG", exif=exif),
        "transparent": png(pixels(1, 4)),
        "deep": png(RNG.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)),
    }[odd]
    put(tmp_path / "set/a.png", png(pixels(0)))
    put(tmp_path / "set/b.png", content)
    right = load_images(str(tmp_path / "set"), SIDE, cache)
    pixels_right = np.array(right.pixels)
    name = as_before(cache, pixels_right[:, :, ::-1])
    again = load_images(str(tmp_path / "set"), SIDE, cache)
    np.testing.assert_array_equal(again.pixels, pixels_right)
    assert again.fingerprint == right.fingerprint and (cache / name).exists()


# Folders


def test_what_is_left_out_is_said_in_one_line(tmp_path, cache, capsys):
    for name in ("a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png"):
        put(tmp_path / "set" / name, png(pixels(1)))
    put(tmp_path / "set/._a.png", JUNK)
    put(tmp_path / "set/notes.txt", b"")
    for _ in range(2):
        equal(load(tmp_path / "set", cache), pixels(1))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert lines == [f"note: 4 of the files of '{tmp_path / 'set'}' are left out: 1 .txt, 3 hidden"]


@pytest.mark.parametrize("suffix", ["gif", "jfif", "tga", "jp2", "pcx", "ico", "dib", "sgi"])
def test_every_suffix_of_pillow_is_taken(tmp_path, cache, suffix):
    kind = {"jfif": "JPEG", "dib": "BMP", "jp2": "JPEG2000"}.get(suffix, suffix.upper())
    put(tmp_path / f"set/a.{suffix.upper()}", png(pixels(1), kind))
    put(tmp_path / "set/b.png", png(pixels(2)))
    found = load(tmp_path / "set", cache)
    equal(found[1:], pixels(2))
    assert np.abs(found[0].astype(int) - pixels(1)).mean() < (1 if kind != "GIF" and kind[0] != "J" else 60)


def test_a_broken_link_is_named_or_left_out(tmp_path, cache):
    put(tmp_path / "set/a.png", png(pixels(1)))
    (tmp_path / "set/b.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"set/b\.png cannot be read \(it is a link to gone\.png, which is not there"):
        load(tmp_path / "set", cache)
    equal(load(tmp_path / "set", cache, skip_bad_images=True), pixels(1))
    put(tmp_path / "set/gone.png", png(pixels(2)))
    equal(load(tmp_path / "set", cache, skip_bad_images=True), pixels(1), pixels(2), pixels(2))


@pytest.mark.parametrize(
    ("folders", "used"),
    [
        (("bus", "car", "train"), ("bus", "car", "train")),
        (("test", "train"), ("train",)),
        (("train", "val", "test"), ("train",)),
        (("cat", "test"), ("cat", "test")),
        (("exam", "test", "train"), ("exam", "test", "train")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_train_may_be_a_class(tmp_path, cache, capsys, folders, used, packed):
    place = tmp_path / ("loose" if packed else "set")
    for k, name in enumerate(folders):
        put(place / name / "1.png", png(pixels(k)))
    if packed:
        (tmp_path / "set").mkdir()
        with zipfile.ZipFile(tmp_path / "set/all.zip", "w") as archive:
            for name in folders:
                archive.write(place / name / "1.png", f"wrapped/{name}/1.png")
    expected = [pixels(folders.index(name)) for name in sorted(used)]
    equal(load(tmp_path / "set", cache), *expected)
    said = capsys.readouterr().err
    assert ("outside of its part 'train'" in said) == (len(used) < len(folders))
    assert ("among others" in said) == (not packed and "train" in folders and used == folders)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["nothing", "text", "hidden", "by LIFT", "hidden in zip", "zip", "parquet"])
def test_a_test_part_is_never_trained_on_for_want_of_images(tmp_path, cache, capsys, form, packed):
    content, place = png(pixels(2)), tmp_path / "set/train"
    place.mkdir(parents=True)
    if packed:
        (tmp_path / "set/test").mkdir()
        with zipfile.ZipFile(tmp_path / "set/test/a.zip", "w") as archive:
            archive.writestr("1.png", png(pixels(1)))
    else:
        put(tmp_path / "set/test/1.png", png(pixels(1)))
    match form:
        case "text":
            put(place / "1.txt", b"no image")
        case "hidden":
            put(place / "._1.png", content)
            put(place / "__MACOSX/1.png", content)
        case "by LIFT":
            put(place / "1.png", png(pixels(2), pnginfo=png_info(IMAGE_TEXT)))
        case "parquet":
            rows = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]})
            rows.to_parquet(str(place / "0.parquet"))
        case "zip" | "hidden in zip":
            with zipfile.ZipFile(place / "a.zip", "w") as archive:
                archive.writestr("a/1.png" if form == "zip" else "__MACOSX/1.png", content)
                archive.writestr("a/1.txt", "")
    if form in ("zip", "parquet"):
        equal(load(tmp_path / "set", cache), pixels(2))
        # Of an archive the text, and of the other part its image or its archive.
        said = "1 outside of its part 'train'" in capsys.readouterr().err
        assert said == (form == "zip")
    else:
        with pytest.raises((RuntimeError, ValueError), match="set"):
            load(tmp_path / "set", cache)


# Archives and data sets


def test_zips_of_images(tmp_path, cache, capsys):
    for name in ("b", "a"):
        (tmp_path / "set").mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / f"set/{name}.zip", "w") as archive:
            for k, inside in enumerate(("x/1.png", "0.PNG")):
                archive.writestr(inside, png(pixels(10 * k + ord(name))))
            archive.writestr("__MACOSX/x/._1.png", JUNK)
            archive.writestr("readme.txt", "")
    in_a, in_b = ((pixels(10 + ord(name)), pixels(ord(name))) for name in "ab")
    equal(load(tmp_path / "set", cache), *in_a, *in_b)
    assert "4 of the files" in capsys.readouterr().err
    equal(load(tmp_path / "set/b.zip", cache), *in_b)
    with zipfile.ZipFile(tmp_path / "set/c.zip", "w") as archive:
        archive.writestr("bad.png", b"no image")
    with pytest.raises(ValueError, match=r"set/c\.zip/bad\.png cannot be read"):
        load(tmp_path / "set", cache)
    equal(load(tmp_path / "set", cache, skip_bad_images=True), *in_a, *in_b)


def parquet(folder, columns):
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train-00000-of-00001.parquet")


@pytest.mark.parametrize("form", ["bytes", "struct", "struct of a path", "struct of a zip", "second"])
def test_bytes_in_parquet(tmp_path, cache, form):
    contents = [png(pixels(k)) for k in range(3)]
    place = put(tmp_path / "elsewhere/1.png", contents[1])
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for k, content in enumerate(contents):
            archive.writestr(f"a/{k}.png", content)
    columns = {
        "bytes": {"label": [0, 1, 2], "picture": contents},
        "struct": {"image": [{"bytes": content, "path": "a.png"} for content in contents]},
        "struct of a path": {
            "image": [
                {"bytes": contents[0], "path": None},
                {"bytes": None, "path": str(place)},
                {"bytes": contents[2], "path": None},
            ]
        },
        "struct of a zip": {  # As the library names a file in an archive of the hub.
            "image": [{"bytes": contents[0], "path": None}]
            + [{"bytes": None, "path": f"zip://a/{k}.png::{tmp_path}/pictures.zip"} for k in (1, 2)]
        },
        "second": {"key": [b"1", b"2", b"3"], "jpg": contents},
    }[form]
    parquet(tmp_path / "set", columns)
    equal(load(tmp_path / "set", cache), *(pixels(k) for k in range(3)))


def test_lists_of_images_are_refused_by_name(tmp_path, cache):
    parquet(tmp_path / "set", {"label": [1], "frames": [[{"bytes": png(pixels(1)), "path": None}]]})
    with pytest.raises(ValueError, match="no image column, but lists in frames; write one image per row"):
        load(tmp_path / "set", cache)


@pytest.mark.parametrize("as_dict", [False, True])
def test_folders_of_save_to_disk(tmp_path, cache, as_dict):
    features = datasets.Features({"image": datasets.Image()})
    parts = [
        datasets.Dataset.from_dict({"image": [Image.fromarray(pixels(k)) for k in range(n)]}, features) for n in (2, 3)
    ]
    rows = datasets.DatasetDict(test=parts[1], train=parts[0]) if as_dict else parts[0]
    rows.save_to_disk(str(tmp_path / "set"))
    equal(load(tmp_path / "set", cache), pixels(0), pixels(1))


def test_configs_are_chosen_by_name(tmp_path, cache):
    for k, name in enumerate(("small", "large")):
        parquet(tmp_path / "set" / name, {"image": [png(pixels(k))]})
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large"))
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for place in ("set", "set:tiny"):
        with pytest.raises(ValueError, match=r"has the configs small, large; name one .*set:small"):
            load(tmp_path / place, cache)
    for k, name in enumerate(("small", "large")):
        equal(load(tmp_path / f"set:{name}", cache), pixels(k))
    assert not [file for file in cache.iterdir() if ":" in file.name]


def test_a_folder_may_have_a_colon_in_its_name(tmp_path, cache):
    put(tmp_path / "a:b/1.png", png(pixels(1)))
    equal(load(tmp_path / "a:b", cache), pixels(1))
    assert any(file.name.startswith("a:b_16_") for file in cache.iterdir())


@pytest.mark.parametrize("name", ["n" * 250, "é" * 125])
def test_a_folder_may_have_a_long_name(tmp_path, cache, name):
    put(tmp_path / name / f"{'x' * 246}.png", png(pixels(1)))
    equal(load(tmp_path / name, cache), pixels(1))


# Limits of the system


def test_damaged_images_keep_no_file_open(tmp_path, cache):
    photo = png(pixels(1, side=40), "JPEG")
    for k in range(200):
        put(tmp_path / f"set/{k:03d}.jpg", photo if k % 10 == 0 else photo[: -(20 + k)])
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 16, limit[1]))
    try:
        assert len(load(tmp_path / "set", cache, skip_bad_images=True, num_workers=4)) == 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_an_exhausted_limit_is_no_unreadable_image(tmp_path, cache, monkeypatch, number):
    for k in range(4):
        put(tmp_path / f"set/{k}.png", png(pixels(k)))
    read = Path.read_bytes

    def exhausted(file):
        if file.name == "2.png":
            raise OSError(number, os.strerror(number), str(file))
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", exhausted)
    with pytest.raises(OSError, match=rf"set/2\.png could not be opened \({os.strerror(number)}\)"):
        load(tmp_path / "set", cache, skip_bad_images=True)
    assert not list(cache.glob("*.npy"))


def test_a_full_disk_is_named_with_the_file(cache):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match=r"cache/synthetic_16_\w+\.npy, which takes 6,144 bytes \(File too large\)"):
            load_images("synthetic", SIDE, cache, limit=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    assert len(load_images("synthetic", SIDE, cache, limit=8)) == 8


# The setting


def test_background_is_recorded_and_later_stages_take_it(tmp_path, tiny):
    put(tmp_path / "set/a.png", png(pixels(1, 4)))
    words = [*tiny(tmp_path), "--dataset", str(tmp_path / "set"), "--limit", "1", "--background", "black"]
    settings = parse_settings(TrainingSettings, "A run.", words, model_type="baseline")
    trained_on = cli.load_training_images(settings)
    config = settings.recorded() | {"data_fingerprint": trained_on.fingerprint}
    assert config["background"] == "black" and settings.before_choices()["background"] == "white"
    later = cli.DataSettings(cache_dir=str(tmp_path / "cache"))
    assert cli.load_training_images(later, config).fingerprint == trained_on.fingerprint
    del config["background"]
    with pytest.raises(ValueError, match="no longer those of the training"):
        cli.load_training_images(later, config)


def test_a_colour_that_is_none_is_a_usage_error(refused, tmp_path):
    says = ("--background", "'nocolour' is no colour such as white or #808080")
    refused(train_baseline, *TINY, "--background", "nocolour", says=says, status=2)


def test_in_random_folders_all_that_is_readable_is_found(tmp_path, cache):
    """Fifty random folders of good, odd and damaged files: what is found is what is readable, in order."""
    for folder in range(50):
        expected = []
        for k in range(RNG.integers(1, 12)):
            name, array = f"{folder}/{k:02d}", pixels(100 * folder + k)
            match RNG.integers(7):
                case 0:
                    put(tmp_path / f"{name}.png", png(array)[:-40])
                case 1:
                    put(tmp_path / f"{folder}/.{k}.png", png(array))
                case 2:
                    put(tmp_path / f"{name}.txt", b"text")
                case 3:
                    exif = Image.Exif()
                    exif[0x0112] = 3
                    put(tmp_path / f"{name}.png", png(array, exif=exif))
                    expected.append(np.rot90(array, 2))
                case 4:
                    put(tmp_path / f"{name}.tiff", png(array.mean(-1).astype(np.float32), "TIFF"))
                case 5:
                    put(tmp_path / f"{name}.png", png(np.dstack([array, np.zeros((SIDE, SIDE), np.uint8)])))
                    expected.append(np.full_like(array, 255))
                case _:
                    put(tmp_path / f"{name}.bmp", png(array, "BMP"))
                    expected.append(array)
        if expected:
            equal(load(tmp_path / str(folder), cache, skip_bad_images=True), *expected)
