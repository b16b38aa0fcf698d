"""Classes that a data set offers, and the label of every image, by hand: folders, archives, columns, the cache."""

import io
import json
import re
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

import data
import train_baseline
import train_lift
from conftest import TINY
from data import ImageSet, fingerprint_array, fingerprint_labels, load_images, split_holdout
from images.classes import by_columns
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


def ways(source, count=None):
    """What a source offers, in plain values."""
    return plain(source.classes(source.count if count is None else count))


def plain(classes):
    for way in classes:
        assert way.labels.dtype == np.int64 and isinstance(way.names, tuple)
    return [(way.by, list(way.names), way.labels.tolist()) for way in classes]


@pytest.mark.parametrize(
    ("files", "names", "labels"),
    [
        ("cat/1 cat/2 dog/1 wild/1", "cat dog wild", [0, 0, 1, 2]),
        ("train/dog/1 train/cat/1 val/cat/1 val/emu/1", "cat dog", [0, 1]),
        ("images/b/1 images/a/1", "a b", [0, 1]),  # Within a folder of its own.
        ("n01/images/1 n02/images/1 n02/more/2", "n01 n02", [0, 1, 1]),
        ("0/1 1/1 10/1 2/1 2/2", "0 1 2 10", [0, 1, 3, 2, 2]),  # Digits as of MNIST; files go by their names.
        ("a/1 10/1 9/1", "10 9 a", [0, 1, 2]),
        ("bus/1 car/1 train/1", "bus car train", [0, 1, 2]),
        ("1 2", "", None),
        ("cat/1 cat/2", "", None),
        ("cat/1", "", None),
        ("train/1 test/1", "", None),
        ("cat/1 dog/1 cover", "", None),  # Not all of them are in one.
        ("00000/1 00001/1", "", None),  # Parts of a large set.
        ("00000/1 000001/1", "00000 000001", [0, 1]),
    ],
)
def test_classes_of_folders(tmp_path, files, names, labels):
    found = open_source(fill(tmp_path / "set", *(f"{name}.png" for name in files.split())))
    assert ways(found) == ([("folder", names.split(), labels)] if names else [])


def test_classes_of_archives(tmp_path):
    one = open_source(pack(tmp_path / "one.zip", "faces/dog/1.png", "faces/cat/1.png", "faces/dog/2.png"))
    assert ways(one) == [("folder", ["cat", "dog"], [0, 1, 1])]
    for name in ("cat", "dog", "wild"):
        pack(tmp_path / f"set/{name}.zip", "1.png", "2.png")
    several = open_source(str(tmp_path / "set"))
    assert ways(several) == [("folder", ["cat", "dog", "wild"], [0, 0, 1, 1, 2, 2])]
    assert ways(open_source(pack(tmp_path / "plain.zip", "a/1.png", "a/2.png"))) == []


def test_a_limit_renumbers_nothing(tmp_path):
    source = open_source(fill(tmp_path / "set", "a/x/1.png", "a/y/2.png", "b/1.png", "c/1.png"))
    # The folders of a class are no classes.
    assert [ways(source, count) for count in range(1, 5)] == [
        [("folder", ["a", "b", "c"], [0, 0, 1, 2][:count])] for count in range(1, 5)
    ]
    assert [source.classes(count)[0].present for count in (2, 3)] == [("a",), ("a", "b")]


LABEL = datasets.ClassLabel(names=["cat", "dog", "wild", "yeti"])
FOUR = "cat dog wild yeti"


@pytest.mark.parametrize("form", ["parquet", "saved"])
@pytest.mark.parametrize(
    ("labels", "features", "found"),
    [
        # A column of classes has all of its names in its own order; -1 and nothing are no class.
        ({"label": [2, 0, 1, 0]}, {"label": LABEL}, [("label", FOUR, [2, 0, 1, 0])]),
        ({"species": [1, 0, 1, -1]}, {"species": LABEL}, [("species", FOUR, [1, 0, 1, -1])]),
        ({"label": [3, None, 1, 0]}, {"label": LABEL}, [("label", FOUR, [3, -1, 1, 0])]),
        (
            {"label": [1, 0, 2, 1]},
            {"label": datasets.ClassLabel(names=["z", "a", "m"])},
            [("label", "z a m", [1, 0, 2, 1])],
        ),
        ({"label": [-1, -1, -1, -1]}, {"label": LABEL}, []),
        ({"label": [0, 0, 0, 0]}, {"label": LABEL}, []),
        ({"Labels": [7, 10, 9, 7]}, {"Labels": datasets.Value("int64")}, [("Labels", "7 9 10", [0, 2, 1, 0])]),
        ({"label": [-5, 10, -10, 10]}, {"label": datasets.Value("int32")}, [("label", "-10 -5 10", [1, 2, 0, 2])]),
        ({"label": [200, 3, 3, 3]}, {"label": datasets.Value("uint8")}, [("label", "3 200", [1, 0, 0, 0])]),
        ({"class": ["b", "a", None, "c"]}, {"class": datasets.Value("string")}, [("class", "a b c", [1, 0, -1, 2])]),
        ({"class": ["9", "10", "9", "1"]}, {"class": datasets.Value("string")}, [("class", "1 9 10", [1, 2, 1, 0])]),
        ({"label": ["b", "a", "b", "b"]}, {"label": datasets.Value("large_string")}, [("label", "a b", [1, 0, 1, 1])]),
        (
            {"label": [True, False, True, True]},
            {"label": datasets.Value("bool")},
            [("label", "False True", [1, 0, 1, 1])],
        ),
        ({"label": [0.5, 0.1, 0.2, 0.3]}, {"label": datasets.Value("float32")}, []),
        ({"labels": [[1], [2], [1], []]}, {"labels": datasets.Sequence(datasets.Value("int64"))}, []),
        ({"caption": ["a", "b", "c", "d"]}, {"caption": datasets.Value("string")}, []),
        ({}, {}, []),
        (
            {"fine_label": [3, 1, 0, 0], "coarse_label": [0, 0, 1, 1]},
            {"fine_label": LABEL, "coarse_label": LABEL},
            [("fine_label", FOUR, [3, 1, 0, 0]), ("coarse_label", FOUR, [0, 0, 1, 1])],
        ),
    ],
)
def test_classes_of_columns(tmp_path, form, labels, features, found):
    made = rows(4, labels, features)
    if form == "saved":
        # Rows that lie in another order than they were written.
        made.select([3, 2, 1, 0]).save_to_disk(str(tmp_path / "set"))
        found = [(column, names, numbers[::-1]) for column, names, numbers in found]
    else:
        (tmp_path / "set").mkdir()
        made.to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    source = open_source(str(tmp_path / "set"))
    expected = [(f"column '{column}'", names.split(), numbers) for column, names, numbers in found]
    assert ways(source) == expected
    assert ways(source, 2) == [(by, names, numbers[:2]) for by, names, numbers in expected]


def test_no_rows_have_no_classes(tmp_path):
    features = {"label": LABEL, "class": datasets.Value("string")}
    assert by_columns(rows(0, {"label": [], "class": []}, features)) == ()


# From the source to an ImageSet: every image is of one grey level, ten times its label and the number of its kind

LEVELS = [20, 1, 11, 21, 2, 12, 22, 3, 13, 23, 4, 14]
BAD = (3, 5)
NAMES = ("cat", "dog", "wild")


def one_level(level):
    stream = io.BytesIO()
    Image.new("L", (SIDE, SIDE), level).save(stream, "PNG")
    return stream.getvalue()


def write(place, form, bad=(), label=True):
    """A data set of LEVELS in some form, of which some images are damaged, and the levels in the order it has them."""
    contents = [b"damaged" if k in bad else one_level(level) for k, level in enumerate(LEVELS)]
    names = [f"{NAMES[level // 10] if label else 'all'}/{level}.png" for level in LEVELS]
    if form == "folder":
        for name, content in zip(names, contents, strict=True):
            file = place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    elif form == "zip":
        place = place.with_suffix(".zip")
        with zipfile.ZipFile(place, "w") as archive:
            for name, content in zip(names, contents, strict=True):
                archive.writestr(name, content)
    else:
        columns = {"image": [{"bytes": content, "path": None} for content in contents]}
        features = datasets.Features({"image": datasets.Image()})
        if label:
            columns["label"] = [level // 10 for level in LEVELS]
            features["label"] = datasets.ClassLabel(names=list(NAMES))
        made = datasets.Dataset.from_dict(columns, features=features)
        if form == "saved":
            made.save_to_disk(str(place))
        else:
            place.mkdir()
            made.to_parquet(place / "train-00000-of-00001.parquet")
    left = [level for k, level in enumerate(LEVELS) if k not in bad]
    return str(place), sorted(left) if form in ("folder", "zip") else left


def check(images, levels):
    assert images.pixels[:, 0, 0, 0].tolist() == levels
    [way] = images.classes
    assert (way.names, way.labels.tolist()) == (NAMES, [level // 10 for level in levels])


@pytest.fixture
def no_decoding(monkeypatch):
    def fail(*arguments):
        raise AssertionError("images were decoded again")

    return lambda: monkeypatch.setattr(data, "_decode_all", fail)


@pytest.mark.parametrize("form", ["folder", "zip", "parquet", "saved"])
@pytest.mark.parametrize("bad", [(), BAD])
def test_labels_go_with_their_images(tmp_path, form, bad, no_decoding, monkeypatch):
    monkeypatch.setattr(data, "DECODE_CHUNK", 5)
    place, levels = write(tmp_path / "set", form, bad)
    whole = load_images(place, SIDE, tmp_path / "cache", skip_bad_images=True)
    check(whole, levels)
    by = "folder" if form in ("folder", "zip") else "label"
    assert whole.divided(by) is whole.divided() is whole.classes[0]
    # Of the first eight, bad ones are not made up for.
    files = sorted(LEVELS) if form in ("folder", "zip") else LEVELS
    first = [level for level in files[:8] if level in levels]
    check(load_images(place, SIDE, tmp_path / "cache", limit=8, skip_bad_images=True), first)
    training, held_out = split_holdout(whole, 4)
    check(training, [level for level in levels if level not in held_out.pixels[:, 0, 0, 0]])
    check(held_out, [levels[(2 * k + 1) * len(levels) // 8] for k in range(4)])
    no_decoding()
    check(load_images(place, SIDE, tmp_path / "cache", skip_bad_images=True), levels)
    check(load_images(place, SIDE, tmp_path / "cache", limit=8, skip_bad_images=True), first)


def test_images_held_out_and_their_repetitions_take_their_labels_along():
    pixels = np.zeros((10, 1, SIDE, SIDE), np.uint8)
    pixels[:, 0, 0, 0] = [0, 1, 2, 1, 4, 0, 6, 7, 8, 2]  # Of these 1, 5 and 8 are held out.
    images = ImageSet(pixels, "set", "0", (Classes("folder", tuple("abcdefghij"), np.arange(10)),))
    training, held_out = split_holdout(images, 3)
    assert held_out.classes[0].labels.tolist() == [1, 5, 8] and training.classes[0].labels.tolist() == [2, 4, 6, 7, 9]


def test_rows_beyond_the_limit_do_not_count(tmp_path):
    rows(5, {"label": [1, 1, 0, 2, 3]}, {"label": LABEL}).save_to_disk(str(tmp_path / "set"))
    images = load_images(str(tmp_path / "set"), SIDE, tmp_path / "cache", limit=3)
    assert plain(images.classes) == [("column 'label'", FOUR.split(), [1, 1, 0])]
    assert images.divided().present == ("cat", "dog")
    few = load_images(str(tmp_path / "set"), SIDE, tmp_path / "cache", limit=2)
    with pytest.raises(ValueError, match=r"All 2 images of .*set' are of one class by column 'label' \(dog\).*--limit"):
        few.divided()


# The cache


def as_earlier_versions_wrote(cache):
    [file] = cache.glob("*.json")
    info = json.loads(file.read_text())
    del info["classes"]
    file.write_text(json.dumps(info))


def test_a_cache_without_labels_stays_in_use(tmp_path, no_decoding):
    place, levels = write(tmp_path / "set", "parquet")
    before = load_images(place, SIDE, tmp_path / "cache", skip_bad_images=True)
    as_earlier_versions_wrote(tmp_path / "cache")
    no_decoding()
    for _ in range(2):
        found = load_images(place, SIDE, tmp_path / "cache", skip_bad_images=True)
        check(found, levels)
        assert found.fingerprint == before.fingerprint
        assert len(list((tmp_path / "cache").iterdir())) == 3


def test_where_images_were_left_out_it_is_decoded_again(tmp_path, no_decoding):
    place, levels = write(tmp_path / "set", "parquet", BAD)
    before = load_images(place, SIDE, tmp_path / "cache", skip_bad_images=True)
    as_earlier_versions_wrote(tmp_path / "cache")
    found = load_images(place, SIDE, tmp_path / "cache", skip_bad_images=True)
    check(found, levels)
    assert found.fingerprint == before.fingerprint
    no_decoding()
    check(load_images(place, SIDE, tmp_path / "cache", skip_bad_images=True), levels)


def test_a_cache_of_a_set_without_labels_stays_in_use(tmp_path, no_decoding):
    place, levels = write(tmp_path / "set", "folder", BAD, label=False)
    load_images(place, SIDE, tmp_path / "cache", skip_bad_images=True)
    as_earlier_versions_wrote(tmp_path / "cache")
    no_decoding()
    found = load_images(place, SIDE, tmp_path / "cache", skip_bad_images=True)
    assert found.classes == () and len(found) == len(levels)


@pytest.mark.parametrize(
    "damage",
    [
        {"labels": [0, 1]},
        {"labels": [0] * 11 + [3]},
        {"labels": [0] * 11 + [-2]},
        {"labels": [0.5] * 12},
        {"labels": [[0]] * 12},
        {"labels": None},
        {"names": ["cat", "dog", 3]},
        {"names": 5},
    ],
)
def test_damaged_labels_in_the_cache_are_no_answer(tmp_path, damage):
    place, levels = write(tmp_path / "set", "folder")
    load_images(place, SIDE, tmp_path / "cache")
    [file] = (tmp_path / "cache").glob("*.json")
    info = json.loads(file.read_text())
    info["classes"][0] |= damage
    file.write_text(json.dumps(info))
    check(load_images(place, SIDE, tmp_path / "cache"), levels)


def test_labels_leave_the_fingerprint_of_the_images_alone(tmp_path):
    place, levels = write(tmp_path / "set", "saved")
    other, _ = write(tmp_path / "other", "saved", label=False)
    found = [load_images(name, SIDE, tmp_path / "cache") for name in (place, other)]
    assert found[0].fingerprint == found[1].fingerprint == fingerprint_array(found[0].pixels)


def test_a_fingerprint_of_labels_sees_names_and_labels():
    way = Classes("folder", ("a", "b"), np.array([0, 1, 0]))
    others = [
        Classes("folder", ("a", "c"), np.array([0, 1, 0])),
        Classes("folder", ("ab",), np.array([0, 1, 0])),
        Classes("folder", ("a", "b"), np.array([0, 1, 1])),
        Classes("folder", ("a", "b"), np.array([0, 1])),
    ]
    assert len({fingerprint_labels(each) for each in (way, *others)}) == 5 and way not in others
    # The same by another name, as of a folder that was packed into a table, and in other integers.
    same = Classes("column 'label'", ("a", "b"), np.array([0, 1, 0], np.int8))
    assert re.fullmatch("[0-9a-f]{16}", fingerprint_labels(way)) and fingerprint_labels(way) == fingerprint_labels(same)
    assert way != same and way == Classes("folder", ("a", "b"), np.array([0, 1, 0]))


# The way that is asked for


def divided(*found):
    return ImageSet(np.zeros((4, 1, SIDE, SIDE), np.uint8), "set", "0", found)


FINE = Classes("column 'fine'", ("a", "b", "c"), np.array([0, 1, 2, 2]))
COARSE = Classes("column 'coarse'", ("x", "y"), np.array([0, 0, 1, 1]))
HOLED = Classes("folder", ("x", "y"), np.array([-1, 0, -1, 1]))


def test_a_way_is_named_as_it_is_or_by_its_column():
    images = divided(FINE, COARSE)
    assert images.divided("fine") is images.divided("column 'fine'") is FINE and images.divided("coarse") is COARSE
    assert divided(COARSE).divided() is COARSE


@pytest.mark.parametrize(
    ("found", "by", "says"),
    [
        ((), None, "'set' has no labels: put the images of each class into a folder of its own, or name a data set "
         "with a label column."),
        ((), "label", "'set' has no labels: "),
        ((FINE, COARSE), None, "by column 'fine' and column 'coarse'; name one of them, as in --classes fine."),
        ((FINE, COARSE), "label", "not divided into classes by 'label' but by column 'fine' and column 'coarse'; pass "
         "--classes fine."),
        ((HOLED,), None, "2 of the 4 images of 'set' have no label by folder (counted from 0: 0, 2); label them, take "
         "them out of the data set, or leave --classes out."),
        ((FINE, COARSE.take(np.array([0, 1]))), "coarse", "All 2 images of 'set' are of one class by column 'coarse' "
         "(x), and it takes two; take more of them (--limit), or name another way with --classes BY."),
        ((FINE.take(slice(3, 4)),), None, "All 1 images"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused_in_one_sentence(found, by, says):
    with pytest.raises(ValueError) as caught:
        divided(*found).divided(by)
    assert says in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


def test_of_many_images_without_a_label_a_few_are_named():
    many = Classes("folder", ("x", "y"), np.array([0, 1] + [-1] * 2000))
    with pytest.raises(ValueError, match=r"2,000 of the 2,002 images .* \(counted from 0: 2, 3, 4, \.\.\.\)"):
        divided(many).divided()
    with pytest.raises(ValueError, match="1 of the 3 images of 'set' has no label"):
        divided(many.take(slice(3))).divided()


# The hub, which is not asked


@pytest.mark.parametrize(
    ("name", "columns", "size", "channels"),
    [("ylecun/mnist", ("image", "label"), 28, 1), ("uoft-cs/cifar10", ("img", "label"), 32, 3)],
)
def test_data_sets_of_the_hub_have_their_labels(tmp_path, monkeypatch, name, columns, size, channels):
    names = [str(k) for k in range(10)] if channels == 1 else ["airplane", "automobile", "bird", "cat", "deer"]
    labels = [4, 0, 3, 3, 1, 2]
    pictures = [Image.new("RGB" if channels == 3 else "L", (size, size), (10 * label,) * channels) for label in labels]
    image, label = columns
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})
    made = datasets.Dataset.from_dict({image: pictures, label: labels}, features=features)

    def from_the_hub(asked, config, split):
        assert (asked, config, split) == (name, None, "train")
        return made

    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    images = load_images(name, 32, tmp_path / "cache", pad="black" if size < 32 else None)
    assert images.channels == channels and images.pixels[:, 0, 16, 16].tolist() == [10 * label for label in labels]
    assert plain(images.classes) == [("column 'label'", names, labels)]
    # A folder that holds what the hub does.
    folder = tmp_path / "copy/data"
    folder.mkdir(parents=True)
    made.to_parquet(folder / "train-00000-of-00001.parquet")
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    copy = load_images(str(tmp_path / "copy"), 32, tmp_path / "cache", pad="black" if size < 32 else None)
    assert copy.fingerprint == images.fingerprint and copy.classes == images.classes


def test_classes_of_built_in_images_take_turns(tmp_path):
    for limit in (8, 1):
        [way] = load_images("synthetic", SIDE, tmp_path / "cache", limit=limit).classes
        assert (way.by, way.names) == ("animal", ("cat", "dog", "wild"))
        assert way.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1][:limit]


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
            "(unconditionally); pass --classes to tell it"]  # fmt: skip
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
    assert ", ...) and 4 classes by column 'kind' (cat, dog, wild, ...); the model" in line and len(line) < 290


def test_nothing_is_said_where_there_are_none(stage, tmp_path):
    place = fill(tmp_path / "set", *(f"{k}.png" for k in range(6)))
    assert trained(stage, train_baseline, tmp_path, place, "--dry_run") == []


def test_classes_of_the_built_in_images_are_said(stage, tmp_path):
    [line] = trained(stage, train_baseline, tmp_path, "synthetic", "--dry_run")
    assert "3 classes by animal (cat, dog, wild)" in line


def test_classes_that_no_image_is_of_are_not_counted(stage, tmp_path):
    rows(8, {"label": [3, 1, 3, 1, 3, 1, 0, 2]}, {"label": LABEL}).save_to_disk(str(tmp_path / "set"))
    [line] = trained(stage, train_baseline, tmp_path, tmp_path / "set", "--dry_run")
    assert "2 classes by column 'label' (dog, yeti);" in line
    rows(8, {"label": [1] * 7 + [0]}, {"label": LABEL}).save_to_disk(str(tmp_path / "other"))
    assert trained(stage, train_baseline, tmp_path, tmp_path / "other", "--dry_run") == []
