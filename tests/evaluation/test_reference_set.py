"""References: moments against NumPy, files of pytorch-fid, and a cache that several processes share."""

import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from children import FORKS
from data import ImageSet, fingerprint_array
from evaluation.inception import Features
from evaluation.reference_set import from_images, load_reference


class Colours:
    """Stands in for Inception: six features, the mean of each channel and of its square; counts its calls in a file."""

    fingerprint, resize, num_features = "weights1", "clean", 6

    def __init__(self, log, pause=0.0):
        self.log, self.pause = log, pause

    def __call__(self, pixels):
        # Appending is atomic, also between processes.
        with open(self.log, "a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(self.pause)
        x = pixels.float() / 255
        return Features(torch.cat([x, x**2], dim=1).mean(dim=(2, 3)), torch.zeros(len(pixels), 4))

    @property
    def calls(self):
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


def image_set(n=10, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)
    return ImageSet(pixels, "noise", fingerprint_array(pixels))


def expected_features(pixels):
    x = pixels / 255
    return np.concatenate([x, x**2], axis=1).mean(axis=(2, 3))  # [N, 6]


@pytest.fixture
def network(tmp_path):
    return Colours(tmp_path / "calls")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


# Images


def test_reference_of_images_says_what_it_is(network, cache):
    images = image_set()
    reference = from_images(images, "holdout")
    assert (reference.name, reference.count, reference.fingerprint) == ("holdout", 10, images.fingerprint)
    assert reference.pixels is reference.images is images.pixels and reference.statistics is None


def test_moments_and_features_equal_those_of_numpy(network, cache):
    images = image_set()
    expected = expected_features(images.pixels)
    mean, cov = from_images(images, "train").moments(network, cache, batch_size=4)
    assert mean.dtype == cov.dtype == np.float64 and network.calls == 3
    np.testing.assert_allclose(mean, expected.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(cov, np.cov(expected, rowvar=False), rtol=1e-3, atol=1e-8)
    features = from_images(images, "train").features(network, cache, batch_size=4)
    assert isinstance(features, np.memmap) and features.dtype == np.float32 and network.calls == 6
    np.testing.assert_allclose(features, expected, rtol=1e-6)


@pytest.mark.parametrize("what", ["moments", "features"])
def test_images_come_in_batches_of_64_unless_told_otherwise(network, cache, what):
    images = image_set(130)
    found = getattr(from_images(images, "train"), what)(network, cache)
    expected = expected_features(images.pixels)
    assert network.calls == 3
    np.testing.assert_allclose(*((found, expected) if what == "features" else (found[0], expected.mean(0))), rtol=1e-6)


def test_both_are_computed_once_for_every_set_weights_and_filter(network, cache):
    images = image_set()
    reference = from_images(images, "train")
    first = [*reference.moments(network, cache, 4), reference.features(network, cache, 4)]
    assert network.calls == 6
    # The name is not part of what is cached.
    again = from_images(images, "folder")
    for ours, theirs in zip([*again.moments(network, cache, 3), again.features(network, cache, 3)], first, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert network.calls == 6
    from_images(image_set(seed=1), "train").moments(network, cache)
    network.resize = "pytorch-fid"
    reference.moments(network, cache)
    network.fingerprint = "weights2"
    reference.moments(network, cache)
    assert network.calls == 9
    other = image_set(seed=1).fingerprint
    assert {file.name for file in cache.iterdir() if file.suffix != ".lock"} == {
        f"fid_reference_{images.fingerprint}_weights1_clean.npz",
        f"features_{images.fingerprint}_weights1_clean.npy",
        f"fid_reference_{other}_weights1_clean.npz",
        f"fid_reference_{images.fingerprint}_weights1_pytorch-fid.npz",
        f"fid_reference_{images.fingerprint}_weights2_pytorch-fid.npz",
    }


def test_moments_come_from_the_features_if_they_are_there(network, cache, tmp_path):
    reference = from_images(image_set(), "train")
    streamed = reference.moments(network, tmp_path / "other", 4)
    reference.features(network, cache, 4)
    calls = network.calls
    for ours, theirs in zip(reference.moments(network, cache, 4), streamed, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert network.calls == calls


def test_cached_moments_are_read_by_pytorch_fid(network, cache):
    from pytorch_fid.fid_score import compute_statistics_of_path

    reference = from_images(image_set(), "train")
    mean, cov = reference.moments(network, cache)
    (file,) = cache.glob("fid_reference_*.npz")
    theirs = compute_statistics_of_path(str(file), None, 1, 6, "cpu")
    np.testing.assert_array_equal(theirs[0], mean)
    np.testing.assert_array_equal(theirs[1], cov)
    # As a reference of its own it also knows how many images it is of.
    assert load_reference(file, 16, 3, cache).count == 10


def test_one_image_has_no_moments_and_leaves_no_file(network, cache):
    with pytest.raises(ValueError, match="at least two images"):
        from_images(image_set(1), "train").moments(network, cache)
    assert [file for file in cache.iterdir() if file.suffix != ".lock"] == []


def ask(images, log, cache, what, barrier, answers):
    network = Colours(log, pause=0.05)
    barrier.wait(60)
    answers.put([np.array(part) for part in getattr(from_images(images, "train"), what)(network, cache, 5)])


@pytest.mark.parametrize("what", ["moments", "features"])
def test_processes_that_ask_at_once_compute_once(network, cache, what):
    barrier, answers = FORKS.Barrier(3), FORKS.Queue()
    arguments = (image_set(), network.log, cache, what, barrier, answers)
    workers = [FORKS.Process(target=ask, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    given = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert network.calls == 2 and len(set(network.log.read_text().split())) == 1
    for answer in given[1:]:
        for ours, theirs in zip(answer, given[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def damage_by_cutting(file):
    file.write_bytes(file.read_bytes()[:200])


def damage_by_emptying(file):
    file.write_bytes(b"")


def damage_by_another_shape(file):
    if file.suffix == ".npy":
        np.save(file, np.zeros((9, 6), np.float32))
    else:
        np.savez(file, mu=np.zeros(5), sigma=np.eye(5), n=10)


def damage_by_another_count_or_type(file):
    if file.suffix == ".npy":
        np.save(file, np.zeros((10, 6)))
    else:
        np.savez(file, mu=np.zeros(6), sigma=np.eye(6), n=9)


@pytest.mark.parametrize("what", ["moments", "features"])
@pytest.mark.parametrize(
    "damage", [damage_by_cutting, damage_by_emptying, damage_by_another_shape, damage_by_another_count_or_type]
)
def test_damaged_cache_is_refused_until_it_is_deleted(network, cache, what, damage):
    reference = from_images(image_set(), "train")
    ask = getattr(reference, what)
    first = [np.array(part) for part in ask(network, cache)]
    (file,) = (file for file in cache.iterdir() if file.suffix != ".lock")
    damage(file)
    with pytest.raises(ValueError, match=f"{file.name}.*delete it to make it again") as error:
        ask(network, cache)
    assert "damaged" in str(error.value)
    file.unlink()
    for ours, theirs in zip(ask(network, cache), first, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# Statistics files


def some_statistics(d=6):
    x = np.random.default_rng(0).normal(size=(20, d))
    return x.mean(axis=0), np.cov(x, rowvar=False)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_statistics_file_is_read(network, cache, tmp_path, save):
    mean, cov = some_statistics()
    save(tmp_path / "stats.npz", mu=mean, sigma=cov)
    reference = load_reference(str(tmp_path / "stats.npz"), 64, 3, cache)
    assert reference.name == str(tmp_path / "stats.npz") and reference.count is None and reference.images is None
    ours = reference.moments(network, cache)
    np.testing.assert_array_equal(ours[0], mean)
    np.testing.assert_array_equal(ours[1], cov)
    assert network.calls == 0 and not cache.exists()


def test_statistics_may_be_of_one_image_and_asymmetric_by_rounding(network, cache, tmp_path):
    mean, cov = some_statistics()
    rounded = cov + 1e-6 * np.abs(cov).max() * np.triu(np.ones_like(cov), 1)
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=rounded, n=1)
    reference = load_reference(tmp_path / "stats.npz", 64, 3, cache)
    assert reference.count == 1
    np.testing.assert_array_equal(reference.moments(network, cache)[1], rounded)


def test_statistics_are_named_by_both_arrays(cache, tmp_path):
    mean, cov = some_statistics()
    fingerprints = []
    for name, mu, sigma in (("a", mean, cov), ("b", mean, cov), ("c", mean + 1e-9, cov), ("d", mean, cov * 1.001)):
        np.savez(tmp_path / f"{name}.npz", mu=mu, sigma=sigma)
        fingerprints.append(load_reference(tmp_path / f"{name}.npz", 64, 3, cache).fingerprint)
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 3
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in fingerprints)


def test_statistics_of_other_features_are_refused(network, cache, tmp_path):
    mean, cov = some_statistics(5)
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=cov)
    with pytest.raises(ValueError, match=r"stats\.npz has statistics of 5 features, but the network gives 6"):
        load_reference(tmp_path / "stats.npz", 64, 3, cache).moments(network, cache)


def test_what_needs_images_is_refused_for_statistics(network, cache, tmp_path):
    mean, cov = some_statistics()
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=cov)
    reference = load_reference(tmp_path / "stats.npz", 64, 3, cache)
    for ask in (lambda: reference.pixels, lambda: reference.features(network, cache)):
        with pytest.raises(ValueError, match=r"stats\.npz.*only fid.*folder of images.*--metrics fid"):
            ask()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"mu": np.zeros(6)}, "lacks sigma"),
        ({"mean": np.zeros(6), "cov": np.eye(6)}, "lacks mu and sigma"),
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, r"their shapes are \[6\] and \[5, 5\]"),
        ({"mu": np.zeros((1, 6)), "sigma": np.eye(6)}, r"their shapes are \[1, 6\] and \[6, 6\]"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "not finite"),
        ({"mu": np.zeros(6), "sigma": np.full((6, 6), np.inf)}, "not finite"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "damaged or no .npz archive"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "damaged or no .npz archive"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "n": np.arange(3)}, "no number of images"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "n": 0}, "no number of images"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0.4, 1]])}, "not symmetric"),
    ],
)
def test_unfit_statistics_are_refused(cache, tmp_path, arrays, says):
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=rf"stats\.npz.*{says}"):
        load_reference(tmp_path / "stats.npz", 64, 3, cache)


@pytest.mark.parametrize("content", [b"", b"not an archive", None], ids=["empty", "text", "cut short"])
def test_damaged_statistics_are_refused(cache, tmp_path, content):
    mean, cov = some_statistics()
    file = tmp_path / "stats.npz"
    np.savez(file, mu=mean, sigma=cov)
    file.write_bytes(file.read_bytes()[:300] if content is None else content)
    with pytest.raises(ValueError, match=r"stats\.npz is damaged or no \.npz archive"):
        load_reference(file, 64, 3, cache)


def test_an_array_is_no_statistics_file(cache, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"images\.npy is damaged or no \.npz archive"):
        load_reference(tmp_path / "images.npy", 64, 3, cache)


# Folders


def write_folder(folder, channels=3, size=16, n=4):
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(folder / f"{i}.png")
    return pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_is_read_as_it_is(cache, tmp_path, channels):
    pixels = write_folder(tmp_path / "real", channels)
    reference = load_reference(str(tmp_path / "real"), 16, channels, cache, num_workers=1)
    np.testing.assert_array_equal(reference.pixels, pixels)
    assert reference.count == 4 and reference.name == str(tmp_path / "real")
    assert reference.fingerprint == fingerprint_array(pixels)


def test_images_of_another_size_or_kind_are_refused(cache, tmp_path):
    write_folder(tmp_path / "small")
    with pytest.raises(ValueError, match=r"small/0\.png is 16x16 and not 32x32"):
        load_reference(tmp_path / "small", 32, 3, cache)
    with pytest.raises(ValueError, match="small are in colour, but those of the model are grey"):
        load_reference(tmp_path / "small", 16, 1, cache)
    write_folder(tmp_path / "grey", channels=1)
    with pytest.raises(ValueError, match="grey are grey, but those of the model are in colour"):
        load_reference(tmp_path / "grey", 16, 3, cache)


def test_missing_reference_is_named(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no reference .*nowhere: pass a folder of images or an \.npz"):
        load_reference(tmp_path / "nowhere", 16, 3, cache)
