"""Classes that a data set offers, counted by hand: folders, archives and columns; and what training says of them."""

import io
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

import train_baseline
import train_lift
from conftest import TINY
from data import load_images, split_holdout
from images.sources import Classes, open_source

SIDE = 16


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))


def picture(seed):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def fill(folder, *names):
    for k, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(k))
    return str(folder)


def pack(file, *names):
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for k, name in enumerate(names):
            archive.writestr(name, picture(k))
    return str(file)


def rows(count, labels, features):
    images = [{"bytes": picture(k), "path": None} for k in range(count)]
    features = datasets.Features({"image": datasets.Image()} | features)
    return datasets.Dataset.from_dict({"image": images} | labels, features=features)


def by_folder(*names):
    return (Classes("folder", names),)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("cat/1.png", "cat/2.png", "dog/1.png", "wild/1.png"), ("cat", "dog", "wild")),
        (("train/dog/1.png", "train/cat/1.png", "val/cat/1.png", "val/emu/1.png"), ("cat", "dog")),
        (("images/b/1.png", "images/a/1.png"), ("a", "b")),  # Within a folder of its own.
        (("n01/images/1.png", "n02/images/1.png", "n02/more/2.png"), ("n01", "n02")),
        (("0/1.png", "1/1.png", "10/1.png"), ("0", "1", "10")),  # Digits as of MNIST.
        (("bus/1.png", "car/1.png", "train/1.png"), ("bus", "car", "train")),
        (("1.png", "2.png"), None),
        (("cat/1.png", "cat/2.png"), None),
        (("cat/1.png",), None),
        (("train/1.png", "test/1.png"), None),
        (("cat/1.png", "dog/1.png", "cover.png"), None),  # Not all of them are in one.
        (("00000/1.png", "00001/1.png"), None),  # Parts of a large set.
        (("00000/1.png", "000001/1.png"), ("00000", "000001")),
    ],
)
def test_classes_of_folders(tmp_path, names, classes):
    found = open_source(fill(tmp_path / "set", *names))
    assert found.classes(found.count) == (by_folder(*classes) if classes else ())


def test_classes_of_archives(tmp_path):
    one = open_source(pack(tmp_path / "one.zip", "faces/cat/1.png", "faces/dog/1.png", "faces/dog/2.png"))
    assert one.classes(3) == by_folder("cat", "dog")
    for name in ("cat", "dog", "wild"):
        pack(tmp_path / f"set/{name}.zip", "1.png", "2.png")
    several = open_source(str(tmp_path / "set"))
    assert several.classes(6) == by_folder("cat", "dog", "wild")
    assert open_source(pack(tmp_path / "plain.zip", "a/1.png", "a/2.png")).classes(2) == ()


def test_only_the_images_that_are_taken_count(tmp_path):
    source = open_source(fill(tmp_path / "set", "a/x/1.png", "a/y/2.png", "b/1.png", "c/1.png"))
    found = [source.classes(count) for count in range(1, 5)]
    # The folders of a class are no classes.
    assert found == [(), (), by_folder("a", "b"), by_folder("a", "b", "c")]


LABEL = datasets.ClassLabel(names=["cat", "dog", "wild", "yeti"])


@pytest.mark.parametrize("form", ["parquet", "saved"])
@pytest.mark.parametrize(
    ("labels", "features", "found"),
    [
        ({"label": [2, 0, 1, 0]}, {"label": LABEL}, [("label", "cat", "dog", "wild")]),
        ({"species": [1, 0, 1, -1]}, {"species": LABEL}, [("species", "cat", "dog")]),
        ({"label": [-1, -1, -1, -1]}, {"label": LABEL}, []),
        ({"label": [0, 0, 0, 0]}, {"label": LABEL}, []),
        ({"Labels": [7, 10, 9, 7]}, {"Labels": datasets.Value("int64")}, [("Labels", "7", "9", "10")]),
        ({"class": ["b", "a", None, "c"]}, {"class": datasets.Value("string")}, [("class", "a", "b", "c")]),
        ({"label": [True, False, True, True]}, {"label": datasets.Value("bool")}, [("label", "False", "True")]),
        ({"label": [0.5, 0.1, 0.2, 0.3]}, {"label": datasets.Value("float32")}, []),
        ({"labels": [[1], [2], [1], []]}, {"labels": datasets.Sequence(datasets.Value("int64"))}, []),
        ({"caption": ["a", "b", "c", "d"]}, {"caption": datasets.Value("string")}, []),
        ({}, {}, []),
        (
            {"fine_label": [3, 1, 0, 0], "coarse_label": [0, 0, 1, 1]},
            {"fine_label": LABEL, "coarse_label": LABEL},
            [("fine_label", "cat", "dog", "yeti"), ("coarse_label", "cat", "dog")],
        ),
    ],
)
def test_classes_of_columns(tmp_path, form, labels, features, found):
    made = rows(4, labels, features)
    if form == "saved":
        # Rows that lie in another order than they were written.
        made.select([3, 2, 1, 0]).save_to_disk(str(tmp_path / "set"))
    else:
        (tmp_path / "set").mkdir()
        made.to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    source = open_source(str(tmp_path / "set"))
    assert source.classes(4) == tuple(Classes(f"column '{name}'", tuple(names)) for name, *names in found)


def test_rows_beyond_the_limit_do_not_count(tmp_path):
    rows(5, {"label": [1, 1, 0, 2, 3]}, {"label": LABEL}).save_to_disk(str(tmp_path / "set"))
    images = load_images(str(tmp_path / "set"), SIDE, tmp_path / "cache", limit=3)
    assert images.classes == (Classes("column 'label'", ("cat", "dog")),)
    assert load_images(str(tmp_path / "set"), SIDE, tmp_path / "cache", limit=2).classes == ()
    # Nor do the parts of a set know which classes went where.
    assert [part.classes for part in split_holdout(images, 1)] == [images.classes] * 2


# What training says


def trained(stage, module, tmp_path, place, *flags):
    words = [*TINY, "--dataset", place, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    words[words.index("--limit") + 1] = 6
    output = stage(module, *words, *flags).output
    return [line for line in output.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize("module", [train_lift, train_baseline])
def test_a_training_says_that_it_does_not_use_them(stage, tmp_path, module):
    place = fill(tmp_path / "set", *(f"{name}/{k}.png" for name in ("cat", "dog", "wild") for k in range(2)))
    said = ["note: the images have 3 classes by folder (cat, dog, wild); the model is trained without them "
            "(unconditionally)"]  # fmt: skip
    assert trained(stage, module, tmp_path, place, "--dry_run") == said
    # Now the images come out of the cache.
    assert trained(stage, module, tmp_path, place, "--dry_run", "--holdout", 1) == said
    assert trained(stage, module, tmp_path, place, "--epochs", 1) == said


def test_many_classes_and_long_names_make_one_short_line(stage, tmp_path):
    names = [f"{k} {'very ' * 20}long\nname" for k in range(6)]
    labels = {"label": names, "kind": [0, 1, 0, 1, 2, 3]}
    made = rows(6, labels, {"label": datasets.Value("string"), "kind": LABEL})
    made.save_to_disk(str(tmp_path / "set"))
    [line] = trained(stage, train_baseline, tmp_path, tmp_path / "set", "--dry_run")
    assert "6 classes by column 'label' (0 very very very very very..., 1 very" in line
    assert ", ...) and 4 classes by column 'kind' (cat, dog, wild, ...); the model" in line and len(line) < 260


def test_nothing_is_said_where_there_are_none(stage, tmp_path):
    place = fill(tmp_path / "set", *(f"{k}.png" for k in range(6)))
    assert trained(stage, train_baseline, tmp_path, place, "--dry_run") == []
    assert trained(stage, train_baseline, tmp_path, "synthetic", "--dry_run") == []
