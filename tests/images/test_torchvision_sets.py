"""Folders as torchvision leaves them: idx files and pickles, written here byte by byte, as images and labels."""

import gzip
import hashlib
import os
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision.datasets as published
from PIL import Image

import data
import train_baseline
from conftest import TINY
from data import load_images, split_holdout
from images.sources import open_source

RNG = np.random.default_rng(60)
DIGITS = RNG.integers(0, 256, (7, 28, 28), np.uint8)
DIGIT_LABELS = [5, 0, 4, 1, 9, 2, 1]


def idx(array):
    """An array in the format of LeCun: 0, 0, 8 for bytes, the number of sides, the sides with the high byte first."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(raw, packed=False, images=DIGITS, labels=DIGIT_LABELS):
    raw.mkdir(parents=True)
    contents = {"train-images-idx3-ubyte": idx(images), "train-labels-idx1-ubyte": idx(np.array(labels))}
    # The part to test on is there as well, and not read.
    contents |= {"t10k-images-idx3-ubyte": idx(images[:2]), "t10k-labels-idx1-ubyte": idx(np.array(labels[:2]))}
    for name, content in contents.items():
        (raw / f"{name}{'.gz' * packed}").write_bytes(gzip.compress(content) if packed else content)


COLOURS = RNG.integers(0, 256, (10, 3, 32, 32), np.uint8)
FINE, COARSE = [3, 0, 4, 1, 2, 0, 3, 3, 1, 4], [1, 0, 1, 0, 0, 0, 1, 1, 0, 1]
FINE_NAMES = ["beaver", "apple", "pine", "oak", "fox"]
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer"]


def dump(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(monkeypatch):
    def write(folder):
        """Two images in each of five files, of which torchvision is to take the checksums for those it knows."""
        sums = []
        for k in range(5):
            part = slice(2 * k, 2 * k + 2)
            content = {"data": COLOURS[part].reshape(2, -1), "labels": FINE[part]}
            sums.append([f"data_batch_{k + 1}", dump(folder / f"data_batch_{k + 1}", content)])
        meta = dump(folder / "batches.meta", {"label_names": CIFAR10_NAMES})
        monkeypatch.setattr(published.CIFAR10, "train_list", sums)
        monkeypatch.setattr(published.CIFAR10, "meta", published.CIFAR10.meta | {"md5": meta})
        return folder

    return write


@pytest.fixture
def cifar100(monkeypatch):
    def write(folder):
        content = {"data": COLOURS.reshape(10, -1), "fine_labels": FINE, "coarse_labels": COARSE}
        names = {
            "fine_label_names": ["beaver", "apple", "pine", "oak", "fox"],
            "coarse_label_names": ["plant", "animal"],
        }
        monkeypatch.setattr(published.CIFAR100, "train_list", [["train", dump(folder / "train", content)]])
        meta = published.CIFAR100.meta | {"md5": dump(folder / "meta", names)}
        monkeypatch.setattr(published.CIFAR100, "meta", meta)
        return folder

    return write


def plain(images):
    return [(way.by, list(way.names), way.labels.tolist()) for way in images.classes]


def padded_digits(images=DIGITS):
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["", "MNIST", "MNIST/raw"])
def test_digits_are_read_from_each_of_their_folders(tmp_path, packed, below):
    write_idx(tmp_path / "root/MNIST/raw", packed)
    images = load_images(str(tmp_path / "root" / below), 32, tmp_path / "cache", pad="black")
    np.testing.assert_array_equal(images.pixels, padded_digits())
    assert plain(images) == [("label", published.MNIST.classes, DIGIT_LABELS)]
    assert images.divided("label").names[DIGIT_LABELS[0]] == "5 - five"


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_what_is_read_is_what_torchvision_reads(tmp_path, name):
    write_idx(tmp_path / name / "raw")
    theirs = getattr(published, name)(str(tmp_path), train=True, download=False)
    images = load_images(str(tmp_path), 32, tmp_path / "cache", pad="black")
    [way] = images.classes
    np.testing.assert_array_equal(images.pixels[:, 0, 2:30, 2:30], theirs.data.numpy())
    assert list(way.names) == theirs.classes and way.labels.tolist() == theirs.targets.tolist()


def test_digits_in_a_folder_of_another_name_are_numbers(tmp_path, monkeypatch):
    write_idx(tmp_path / "glyphs/raw")
    numbers = [("label", [str(k) for k in range(10)], DIGIT_LABELS)]
    assert plain(load_images(str(tmp_path / "glyphs"), 32, tmp_path / "cache", pad="black")) == numbers
    # Named after all, seen from within.
    (tmp_path / "glyphs").rename(tmp_path / "KMNIST")
    monkeypatch.chdir(tmp_path / "KMNIST/raw")
    [(_, names, labels)] = plain(load_images(".", 32, tmp_path / "cache", pad="black"))
    assert (names, labels) == (published.KMNIST.classes, DIGIT_LABELS)


def test_digits_are_resized_as_files_are(tmp_path):
    write_idx(tmp_path / "MNIST/raw")
    (tmp_path / "files").mkdir()
    for k, digit in enumerate(DIGITS):
        Image.fromarray(digit).save(tmp_path / f"files/{k}.png")
    for settings in ({"resolution": 16}, {"resolution": 64, "resize_filter": "box"}, {"resolution": 32, "pad": "red"}):
        found = [
            load_images(str(tmp_path / name), cache_dir=tmp_path / "cache", **settings) for name in ("MNIST", "files")
        ]
        assert found[0].fingerprint == found[1].fingerprint and found[0].channels == (3 if "pad" in settings else 1)


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar_10_is_read_from_each_of_its_folders(tmp_path, cifar10, below):
    cifar10(tmp_path / "root/cifar-10-batches-py")
    images = load_images(str(tmp_path / "root" / below), 32, tmp_path / "cache")
    np.testing.assert_array_equal(images.pixels, COLOURS)
    assert plain(images) == [("label", CIFAR10_NAMES, FINE)]


@pytest.mark.parametrize("below", ["", "cifar-100-python"])
def test_cifar_100_is_divided_in_two_ways(tmp_path, cifar100, below):
    cifar100(tmp_path / "root/cifar-100-python")
    images = load_images(str(tmp_path / "root" / below), 32, tmp_path / "cache")
    np.testing.assert_array_equal(images.pixels, COLOURS)
    assert plain(images) == [
        ("fine_labels", FINE_NAMES, FINE),
        ("coarse_labels", ["plant", "animal"], COARSE),
    ]
    assert images.divided("coarse_labels").labels.tolist() == COARSE
    with pytest.raises(ValueError, match="by fine_labels and coarse_labels; name .* as in --classes fine_labels"):
        images.divided()


def test_a_folder_of_cifar_may_have_another_name(tmp_path, cifar10):
    cifar10(tmp_path / "pictures")
    np.testing.assert_array_equal(load_images(str(tmp_path / "pictures"), 32, tmp_path / "cache").pixels, COLOURS)


def test_limit_holdout_and_cache_keep_labels_with_their_images(tmp_path, cifar10, monkeypatch):
    place = str(cifar10(tmp_path / "cifar-10-batches-py"))
    images = load_images(place, 32, tmp_path / "cache", limit=6)
    assert plain(images) == [("label", CIFAR10_NAMES, FINE[:6])]
    training, held_out = split_holdout(images, 2)
    assert plain(held_out)[0][2] == [FINE[1], FINE[4]] and plain(training)[0][2] == [FINE[k] for k in (0, 2, 3, 5)]

    def fail(*arguments):
        raise AssertionError("images were decoded again")

    monkeypatch.setattr(data, "_decode_all", fail)
    again = load_images(place, 32, tmp_path / "cache", limit=6)
    assert again.classes == images.classes and again.fingerprint == images.fingerprint
    with pytest.raises(ValueError, match="--limit 11 asks for more images than the 10 of"):
        load_images(place, 32, tmp_path / "cache", limit=11)


def test_a_file_that_is_written_anew_is_decoded_again(tmp_path):
    write_idx(tmp_path / "MNIST/raw")
    before = load_images(str(tmp_path / "MNIST"), 32, tmp_path / "cache", pad="black")
    labels = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.array(DIGIT_LABELS[::-1])))
    os.utime(labels, ns=(1, 1))
    after = load_images(str(tmp_path / "MNIST"), 32, tmp_path / "cache", pad="black")
    assert plain(after)[0][2] == DIGIT_LABELS[::-1] and after.fingerprint == before.fingerprint


# What is refused


@pytest.mark.parametrize("size", [0, 3, 15, 16, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_digits_that_are_cut_short_are_one_sentence(tmp_path, size, packed):
    write_idx(tmp_path / "MNIST/raw", packed)
    file = tmp_path / f"MNIST/raw/train-images-idx3-ubyte{'.gz' * packed}"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError) as caught:
        open_source(str(tmp_path))
    assert str(caught.value) == f"{file} is damaged, perhaps cut short; copy or download it again."


def test_a_packed_file_with_damage_in_the_middle_is_one_sentence(tmp_path):
    write_idx(tmp_path / "MNIST/raw", packed=True)
    file = tmp_path / "MNIST/raw/train-labels-idx1-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[12:20] = bytes(8)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz is damaged"):
        open_source(str(tmp_path))


def test_digits_need_their_labels(tmp_path):
    write_idx(tmp_path / "MNIST/raw")
    labels = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.array(DIGIT_LABELS[:6])))
    with pytest.raises(ValueError, match="holds 7 images and .* 6 labels; copy both"):
        open_source(str(tmp_path))
    labels.write_bytes(idx(np.array([10] * 7)))
    with pytest.raises(ValueError, match="labels beyond the 10 classes of MNIST"):
        open_source(str(tmp_path))
    labels.unlink()
    with pytest.raises(ValueError, match="lacks train-labels-idx1-ubyte, with or without .gz; copy it there"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "batches.meta"])
def test_a_file_of_cifar_that_is_cut_short_is_named_before_it_is_run(tmp_path, cifar10, name, monkeypatch):
    folder = cifar10(tmp_path / "cifar-10-batches-py")
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    monkeypatch.setattr(pickle, "load", None)
    with pytest.raises(ValueError) as caught:
        open_source(str(tmp_path))
    assert str(caught.value) == (
        f"{folder / name} is not the file that was published, perhaps cut short; unpack or download the data set again."
    )


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_3", "batches.meta"])
def test_a_file_of_cifar_that_is_missing_is_named(tmp_path, cifar10, name):
    (cifar10(tmp_path / "cifar-10-batches-py") / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing; unpack or download the data set again"):
        open_source(str(tmp_path))


def test_of_several_sets_one_must_be_named(tmp_path, cifar10):
    write_idx(tmp_path / "MNIST/raw")
    cifar10(tmp_path / "cifar-10-batches-py")
    with pytest.raises(ValueError) as caught:
        open_source(str(tmp_path))
    assert f"name the folder of one of them: {tmp_path / 'MNIST'}, {tmp_path / 'cifar-10-batches-py'}." in str(
        caught.value
    )
    assert open_source(str(tmp_path / "MNIST")).count == 7
    # None of them is meant.
    Image.new("L", (16, 16)).save(tmp_path / "photo.png")
    assert open_source(str(tmp_path)).count == 1


# Beside images


def test_images_of_others_come_first_and_what_lift_wrote_does_not(tmp_path):
    write_idx(tmp_path / "MNIST/raw")
    (tmp_path / "samples").mkdir()
    data.save_png(torch.zeros(3, 16, 16, dtype=torch.uint8), tmp_path / "samples/0.png")
    assert open_source(str(tmp_path)).count == 7
    data.save_png(torch.zeros(3, 16, 16, dtype=torch.uint8), tmp_path / "photo.png", by_lift=False)
    assert open_source(str(tmp_path)).count == 1


def test_a_model_is_trained_on_digits(stage, tmp_path):
    write_idx(tmp_path / "MNIST/raw")
    words = [*TINY, "--dataset", tmp_path, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out", "--pad"]
    words[words.index("--limit") + 1] = 6
    words[words.index("--resolution") + 1] = 32
    output = stage(train_baseline, *words, "--dry_run").output
    assert "note: the images have 6 classes by label (0 - zero, 1 - one, 2 - two, ...)" in output
