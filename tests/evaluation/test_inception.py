"""The Inception network against pytorch-fid, torch-fidelity and clean-fid, with random weights."""

import importlib
import sys

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer, make_resizer

from evaluation.feature_metrics import inception_score, kernel_distance, precision_recall
from evaluation.inception import RESIZES, Features, extract, load_inception, network_input, stream

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"


def random_images(seed, n, size, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


def hard_images(seed, size):
    """Noise above black-and-white noise, at which a cubic filter overshoots."""
    image = random_images(seed, 1, size)
    image[:, :, : size // 2] = np.where(image[:, :, : size // 2] > 127, 255, 0)
    return image


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Random weights under the name at which the torch hub cache keeps the real ones."""
    library = importlib.import_module("pytorch_fid.inception")
    folder = tmp_path_factory.mktemp("torch_home") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: None)
        patch.setattr(library.torchvision.models.Inception3, "load_state_dict", lambda self, state: None)
        state = library.fid_inception_v3().state_dict()
    for name, value in state.items():
        if value.ndim == 4:
            # He's scale keeps the signal alive through the depth.
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.startswith("fc."):
            # A bias of this size cannot be mistaken for rounding.
            value.normal_(0, 0.1, generator=generator)
    torch.save(state, folder / WEIGHTS_NAME)
    return folder / WEIGHTS_NAME


@pytest.fixture(scope="module")
def inception(weights_file):
    return load_inception(weights_file, "cpu")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


# Features


def test_features_equal_those_of_pytorch_fid(weights_file, inception, no_network, monkeypatch):
    library = importlib.import_module("pytorch_fid.inception")
    fid_score = importlib.import_module("pytorch_fid.fid_score")
    images = random_images(0, 3, 64)
    # The library finds the file in its own cache and so builds the network without any of our code.
    monkeypatch.setenv("TORCH_HOME", str(weights_file.parents[2]))
    network = library.InceptionV3([library.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    to_tensor = fid_score.TF.ToTensor()
    with torch.no_grad():
        expected = network(torch.stack([to_tensor(image.transpose(1, 2, 0)) for image in images]))[0].flatten(1)
    assert expected.shape == (3, inception.num_features) and expected.std(dim=0).max() > 1e-2
    features = extract(inception, images, batch_size=2)
    assert features.pool.dtype == features.logits.dtype == torch.float32
    np.testing.assert_allclose(features.pool, expected, rtol=1e-4, atol=1e-5)
    # The cache of the torch hub is where the weights come from without a file.
    assert load_inception(None, "cpu").fingerprint == inception.fingerprint


def test_features_and_logits_equal_those_of_torch_fidelity(weights_file):
    library = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    # Its input is (x - 128) / 128, like that of clean-fid and unlike that of pytorch-fid, and it resizes by a filter
    # of its own, which images of 299x299 escape.
    images = torch.from_numpy(random_images(1, 2, 299))
    other = library.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights_file))
    pool, logits = other(images)
    features = extract(load_inception(weights_file, "cpu", "clean"), images)
    assert features.logits.shape == (2, 1008) and logits.std() > 0.1
    np.testing.assert_allclose(features.pool, pool, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features.logits, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())


class Images(torch.utils.data.Dataset):
    """What torch-fidelity takes as a set of images."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, k):
        return self.pixels[k]


def test_scores_equal_those_of_torch_fidelity_on_the_same_images(weights_file):
    library = importlib.import_module("torch_fidelity")
    # Noise of its own coarseness and brightness in every image, so that the sets differ and so do their images.
    sets = []
    for seed, spread in ((3, 60), (4, 90)):
        generator = np.random.default_rng(seed)
        blocks = [generator.normal(generator.uniform(80, 170, (3, 1, 1)), spread, (3, 13, 13)) for _ in range(12)]
        pixels = np.stack([np.kron(block, np.ones((1, 23, 23))) for block in blocks]).clip(0, 255)
        sets.append(torch.from_numpy(pixels.astype(np.uint8)))
    theirs = library.calculate_metrics(
        input1=Images(sets[0]), input2=Images(sets[1]), isc=True, kid=True, prc=True, cuda=False, cache=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights_file), kid_subset_size=12,
        kid_subsets=1, batch_size=6, rng_seed=0, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    generated, reference = (extract(load_inception(weights_file, "cpu", "clean"), pixels) for pixels in sets)
    score = inception_score(generated.logits)
    assert score[0] > 1.0001 and score == pytest.approx(
        (theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-4, abs=1e-6
    )
    distance = kernel_distance(generated.pool, reference.pool)[0]
    assert distance == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3) and abs(distance) > 1e-6
    shares = (theirs["precision"], theirs["recall"])
    assert precision_recall(generated.pool, reference.pool) == pytest.approx(shares) and 0 < max(shares)


def test_grey_images_enter_as_three_equal_channels(inception):
    grey = random_images(1, 2, 32, channels=1)
    expected = inception(torch.from_numpy(np.repeat(grey, 3, axis=1)))
    for ours, theirs in zip(extract(inception, grey), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_of_the_caller_does_not_reach_the_network(inception):
    images = torch.from_numpy(random_images(2, 1, 32))
    alone = inception(images)
    with torch.autocast("cpu", torch.bfloat16):
        within = inception(images)
    for ours, theirs in zip(within, alone, strict=True):
        assert ours.dtype == torch.float32 and not ours.requires_grad and torch.equal(ours, theirs)


class MeanColours:
    """Stands in for Inception: the mean of each channel, and of its square as logits; notes the size of batches."""

    fingerprint, resize, num_features = "colours", "none", 3

    def __init__(self):
        self.sizes = []

    def __call__(self, pixels):
        self.sizes.append(len(pixels))
        return Features(pixels.float().mean(dim=(2, 3)), pixels.float().square().mean(dim=(2, 3)))


@pytest.mark.parametrize("as_given", [np.asarray, torch.from_numpy])
def test_batches_are_put_together_in_order(as_given):
    images, network = random_images(0, 10, 8), MeanColours()
    features = extract(network, as_given(images), batch_size=4)
    assert network.sizes == [4, 4, 2]
    np.testing.assert_allclose(features.pool, images.mean(axis=(2, 3)), rtol=1e-6)
    np.testing.assert_allclose(features.logits, (images.astype(float) ** 2).mean(axis=(2, 3)), rtol=1e-6)
    assert [len(part.logits) for part in stream(network, as_given(images), 7)] == [7, 3]


def test_a_read_only_memory_map_is_read(tmp_path):
    np.save(tmp_path / "images.npy", random_images(0, 3, 8))
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    np.testing.assert_allclose(extract(MeanColours(), images).pool, images.mean(axis=(2, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 3, 32, 32)),
        torch.zeros(2, 4, 32, 32, dtype=torch.uint8),
        np.zeros((3, 32, 32), np.uint8),
        np.zeros((0, 3, 32, 32), np.uint8),
    ],
    ids=["float64", "four channels", "one image", "none"],
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ValueError, match=r"at least one image, uint8 of shape \[N, 1 or 3, H, W\]"):
        extract(MeanColours(), images)


# Resizing


@pytest.mark.parametrize("size", [32, 64, 298, 300, 512])
def test_clean_filter_equals_that_of_clean_fid(size):
    image = hard_images(0, size)
    expected = build_resizer("clean")(image[0].transpose(1, 2, 0)).transpose(2, 0, 1)
    assert expected.min() == 0 and expected.max() == 255
    ours = network_input(torch.from_numpy(image), "clean")[0] * 128 + 128
    # Rounding to float32 in [-1, 1] is 8e-6 grey levels.
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_bicubic_filter_without_clipping_overshoots_and_else_equals_the_clean_one():
    image = torch.from_numpy(hard_images(1, 48))
    grey_levels = network_input(image, "bicubic-antialias") * 128 + 128
    assert grey_levels.min() < -20 and grey_levels.max() > 275
    clipped = network_input(image, "clean") * 128 + 128
    np.testing.assert_allclose(grey_levels.clamp(0, 255), clipped, atol=1e-4)


@pytest.mark.parametrize("size", [32, 512])
def test_filter_of_pytorch_fid_is_bilinear_without_antialiasing(size):
    image = hard_images(2, size)
    ours = network_input(torch.from_numpy(image), "pytorch-fid")[0]
    resizer = make_resizer("PyTorch", False, "bilinear", (299, 299))
    np.testing.assert_allclose((ours + 1) * 127.5, resizer(image[0].transpose(1, 2, 0)).transpose(2, 0, 1), atol=1e-3)
    # The filter of the original samples each output pixel at a point, so it reaches two input pixels a side.
    row = np.clip((np.arange(299) + 0.5) * size / 299 - 0.5, 0, size - 1)
    left = np.minimum(row.astype(int), size - 2)
    weight = row - left
    down = image[0, :, left] * (1 - weight)[:, None, None] + image[0, :, left + 1] * weight[:, None, None]
    both = down[:, :, left] * (1 - weight) + down[:, :, left + 1] * weight  # [299, 3, 299]
    np.testing.assert_allclose((ours + 1) * 127.5, both.transpose(1, 0, 2), atol=1e-2)


def test_filters_leave_images_of_the_size_of_the_network():
    image = torch.from_numpy(random_images(3, 1, 299))
    assert torch.equal(network_input(image, "pytorch-fid"), 2 * (image.float() / 255) - 1)
    for resize in ("clean", "bicubic-antialias"):
        assert torch.equal(network_input(image, resize), (image.float() - 128) / 128)


@pytest.mark.parametrize("resize", RESIZES)
def test_filter_is_the_one_asked_for(weights_file, inception, resize):
    image = torch.from_numpy(hard_images(4, 64))
    network = load_inception(weights_file, "cpu", resize)
    assert network.resize == resize and network.fingerprint == inception.fingerprint
    with torch.inference_mode():
        expected = network.embed(network_input(image, resize))[0]
    assert torch.equal(network(image).pool, expected)
    if resize != "pytorch-fid":
        assert not torch.allclose(network(image).pool, inception(image).pool, rtol=1e-2)


def test_unknown_filter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'lanczos'.*pytorch-fid, clean, bicubic-antialias"):
        load_inception(tmp_path / "nowhere.pth", "cpu", "lanczos")


# Weights


@pytest.mark.parametrize("name", ["fc.weight", "Mixed_7c.branch3x3_1.bn.bias"])
def test_fingerprint_names_the_weights(tmp_path, weights_file, inception, name):
    state = torch.load(weights_file)
    state[name].flatten()[5] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    other = load_inception(tmp_path / "other.pth", "cpu")
    assert other.fingerprint != inception.fingerprint
    # It becomes part of a file name.
    assert len(inception.fingerprint) == 16 and int(inception.fingerprint, 16) >= 0


def test_fingerprint_does_not_depend_on_the_order_in_memory(weights_file, inception, monkeypatch):
    monkeypatch.setattr("evaluation.inception.memory_format", lambda device: torch.contiguous_format)
    plain = load_inception(weights_file, "cpu")
    monkeypatch.setattr("evaluation.inception.memory_format", lambda device: torch.channels_last)
    assert load_inception(weights_file, "cpu").fingerprint == plain.fingerprint == inception.fingerprint


def test_library_keeps_its_own_download(inception):
    library = importlib.import_module("pytorch_fid.inception")
    assert library.load_state_dict_from_url.__module__.startswith("torch.")


def test_missing_damaged_and_foreign_weights_are_named(tmp_path, weights_file):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_inception(tmp_path / "nowhere.pth", "cpu")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(weights_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="damaged.pth"):
        load_inception(damaged, "cpu")
    for name, content in (
        ("list.pth", [1, 2]),
        ("checkpoint.pth", {"model_state": {}, "epoch": 3}),
        ("other.pth", {"weight": torch.zeros(3)}),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_inception(tmp_path / name, "cpu")


def test_failed_download_says_what_to_pass(no_network):
    with pytest.raises(RuntimeError, match="could not be downloaded.*--inception_weights FILE.*--metrics swd"):
        load_inception(None, "cpu")


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
    with pytest.raises(RuntimeError, match="pip install pytorch-fid"):
        load_inception(None, "cpu")
