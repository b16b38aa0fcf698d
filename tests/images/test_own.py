"""What LIFT has drawn is told from the images of others, and is an image only where there is no other."""

import io
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import train_lift
from conftest import TINY
from data import load_images, save_png
from figures.images import save_image_grid
from figures.style import save_figure
from image_folder import read_folder
from images import own
from images.own import MARKED_BYTES, Origin, origin
from images.sources import open_source
from interpolate import save_gif

SIDE = 16


def pixels(seed, channels=3, side=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (channels, side, side), dtype=np.uint8)


def photo(seed, kind="PNG", side=SIDE, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels(seed, side=side).transpose(1, 2, 0)).save(stream, kind, **options)
    return stream.getvalue()


def text(**chunks):
    info = PngInfo()
    for keyword, value in chunks.items():
        info.add_text(keyword, value)
    return info


def draw_plot(file, seed):
    figure = Figure()
    figure.subplots().plot(pixels(seed)[0])
    save_figure(figure, file)


# What LIFT writes, by what writes it.
WRITERS = {
    "grey sample": (Origin.SAMPLE, ".png", lambda file, k: save_png(torch.from_numpy(pixels(k, 1)), file)),
    "sample": (Origin.SAMPLE, ".png", lambda file, k: save_png(torch.from_numpy(pixels(k)), file)),
    "grid": (Origin.FIGURE, ".png", lambda file, k: save_image_grid(pixels(k)[None], file, 1)),
    "plot": (Origin.FIGURE, ".png", draw_plot),
    "animation": (Origin.FIGURE, ".gif", lambda file, k: save_gif(torch.from_numpy(np.stack([pixels(k)] * 3)), file)),
}


QUICK = [name for name in WRITERS if name != "plot"]


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_marked_and_the_same_each_time(tmp_path, name):
    kind, suffix, write = WRITERS[name]
    contents = set()
    for k in (1, 2, 1):
        file = tmp_path / f"{k}{suffix}"
        write(file, k)
        contents.add(file.read_bytes())
        assert origin(file.read_bytes()[:MARKED_BYTES]) is kind
        with Image.open(file) as image:
            assert image.info.get("Software", image.info.get("comment")) in ("LIFT", b"LIFT figure")
    assert len(contents) == 2


@pytest.mark.parametrize(
    "content",
    [
        photo(1),
        photo(1, "JPEG", comment=b"LIFT figure"),
        photo(1, "GIF"),
        photo(1, "GIF", comment=b"LIFT figures"),
        photo(1, pnginfo=text(Software="LIFTER")),
        photo(1, pnginfo=text(Software="Photoshop", Comment="LIFT")),
        photo(1, pnginfo=text(Comment="figure")),
        photo(1, pnginfo=text(Title="Software\0LIFT")),
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"Software\0LIFT",
    ],
)
def test_others_are_not_taken_for_it(content):
    assert origin(content[:MARKED_BYTES]) is Origin.OTHERS


def place_of(rng, k):
    return "/".join([*(str(rng.integers(3)) for _ in range(rng.integers(3))), f"{k:02d}"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_of_a_random_folder_the_first_kind_there_is_counts(tmp_path, capsys, seed, packed):
    """Photos, if there are any; else what was sampled; else what was drawn; and the rest is counted."""
    rng = np.random.default_rng(seed)
    there = {Origin.OTHERS: [], Origin.SAMPLE: [], Origin.FIGURE: []}
    kinds = [name for name in ("photo", *QUICK) if rng.random() < 0.5] or ["grid"]
    for k in range(rng.integers(2, 12)):
        name = rng.choice(kinds)
        kind, suffix, write = WRITERS.get(name) or (Origin.OTHERS, rng.choice([".png", ".PNG", ".jpg", ".gif"]), None)
        file = tmp_path / f"set/{place_of(rng, k)}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if write is None:
            file.write_bytes(photo(k, {".jpg": "JPEG", ".gif": "GIF"}.get(suffix, "PNG")))
        else:
            write(file, k)
        there[kind].append(file.relative_to(tmp_path / "set"))
    meant = sorted(next(filter(None, there.values())))
    contents = [(tmp_path / "set" / file).read_bytes() for file in meant]
    place = tmp_path / "set"
    if packed:
        place = tmp_path / "set.zip"
        with zipfile.ZipFile(place, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for file in (file for files in there.values() for file in files):
                archive.write(tmp_path / "set" / file, file)
    source = open_source(str(place))
    assert [source.read(i) for i in range(source.count)] == contents
    left_out = sum(len(files) for kind, files in there.items() if kind and sorted(files) != meant)
    said = capsys.readouterr().err
    assert (f"{left_out} of the files of '{place}' are left out: {left_out} written by LIFT" in said) == (left_out > 0)


def parquet(file, seeds):
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": [photo(k, side=20) for k in seeds]}), file)


def packed(file, seeds):
    with zipfile.ZipFile(file, "w") as archive:
        for k in seeds:
            archive.writestr(f"{k}.png", photo(k, side=20))


# A folder of images in each of the forms that it may have, and the images in their order.
FORMS = {
    "files": lambda folder: [(folder / f"{k:02d}.png").write_bytes(photo(k, side=20)) for k in range(6)],
    "an archive": lambda folder: packed(folder / "a.zip", range(6)),
    "a table": lambda folder: parquet(folder / "faces.parquet", range(6)),
    "parts": lambda folder: [
        parquet(folder / f"data/{part}-00000-of-00001.parquet", seeds)
        for part, seeds in (("test", range(9)), ("train", range(6)))
    ],
}


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """An empty folder that is the working one, whose name would be a pattern."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "faces [2]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_run_in_the_folder_of_its_images_goes_on(stage, tiny, inside, form):
    FORMS[form](inside)
    flags = [*TINY, "--dataset", ".", "--limit", 6, "--save_every", 1]
    stage(train_lift, *flags, "--epochs", 1)
    assert list(inside.rglob("samples_1ep_fine.png")), "there is nothing to be mistaken for an image"
    stage(train_lift, *flags, "--epochs", 2, "--resume", "auto")
    images = load_images(str(inside), SIDE, "other_cache")
    (inside.parent / "alone").mkdir()
    FORMS["files"](inside.parent / "alone")
    expected = load_images(str(inside.parent / "alone"), SIDE, "other_cache")
    np.testing.assert_array_equal(images.pixels, expected.pixels)


def test_pictures_of_lift_are_no_images_beside_tables(inside):
    parquet(inside / "faces.parquet", range(3))
    for k, (_, suffix, write) in enumerate(WRITERS.values()):
        write(inside / f"{k}{suffix}", k)
    assert len(load_images(".", SIDE, "cache")) == 3
    (inside / "faces.parquet").unlink()
    assert len(load_images(".", 32, "cache", resize_filter="box")) == 2


def test_a_folder_to_paint_in_is_read_without_its_figures(tmp_path, capsys):
    for k, (_, suffix, write) in enumerate(WRITERS.values()):
        write(tmp_path / f"{k}{suffix}", k)
    (tmp_path / "photo.png").write_bytes(photo(9))
    assert sorted(read_folder(tmp_path, SIDE, 3)) == ["0", "1", "photo"]
    assert "3 written by LIFT" in capsys.readouterr().err
    with pytest.raises(ValueError, match="grid.png cannot be used"):
        save_image_grid(pixels(1)[None], tmp_path / "below/grid.png", 1)
        read_folder(tmp_path / "below", SIDE, 3)


def test_a_pipe_in_a_folder_to_paint_in_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(photo(1))
    assert list(read_folder(tmp_path, SIDE, 3)) == ["b"]


def test_no_more_than_the_start_of_a_picture_that_may_be_marked_is_read(tmp_path, monkeypatch):
    for k in range(30):
        suffix = (".png", ".jpg", ".GIF")[k % 3]
        (tmp_path / f"{k:02d}{suffix}").write_bytes(b"x" * (1 if k < 9 else 5000))
    read = []

    def counted(file, most=None):
        read.append((file.suffix, most))
        return Path(file).read_bytes()[:most]

    monkeypatch.setattr(own, "read_bytes", counted)
    assert open_source(str(tmp_path)).count == 30
    assert sorted(read) == [(".GIF", MARKED_BYTES)] * 10 + [(".png", MARKED_BYTES)] * 10
