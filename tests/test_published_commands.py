"""Commands as the published README and guide print them, on a tiny model, and what other tools make of their output."""

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from pytorch_fid import fid_score
from torch.utils.data import DataLoader
from torchvision import transforms

import compute_heatmap_30
import eval_fid_batch
import generate_with_path_30
import make_figures
from conftest import HARDWARE
from data import AFHQ64Dataset, load_images
from evaluation.results_table import read_rows


class Colours(torch.nn.Module):
    """Stands in for Inception: the mean of each channel and of its square."""

    BLOCK_INDEX_BY_DIM = {6: 0}

    def __init__(self, blocks):
        super().__init__()

    def forward(self, x):
        return [torch.cat([x, x**2], 1).mean((2, 3), keepdim=True)]


def frechet(images_1, images_2):
    """FID of images `[N, H, W, 3]` in [0, 1] by the features of `Colours`."""
    features = [np.concatenate([x, x**2], 3).mean((1, 2)) for x in (images_1, images_2)]
    (mean_1, cov_1), (mean_2, cov_2) = ((f.mean(0), np.cov(f, rowvar=False)) for f in features)
    root = scipy.linalg.sqrtm(cov_1 @ cov_2).real
    return ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root)


@pytest.fixture
def map_file(stage, run, tmp_path):
    """The map that the published command measures, which names the figure."""
    # The published flags, with a grid and images that take seconds.
    flags = ["--checkpoint", run.lift, "--output", tmp_path / "heatmap_100ep.png", "--num_steps", 4]
    flags += ["--grid", 5, "--K", 1, "--num_images", 2, "--cache_dir", run.cache, *HARDWARE]
    stage(compute_heatmap_30, *flags)
    with Image.open(tmp_path / "heatmap_100ep.png") as figure:
        assert figure.width > 300
    return tmp_path / "heatmap_100ep.pth"


def test_map_samples_and_fid_of_folders(stage, refused, run, map_file, tmp_path, monkeypatch):
    folder, real, few = tmp_path / "fid_dp64_100ep", tmp_path / "fid_real", tmp_path / "few"
    flags = ["--checkpoint", run.lift, "--heatmap", map_file, "--output_dir", folder, "--path_type", "dp_64"]
    stage(generate_with_path_30, *flags, "--num_steps", 4, "--num_images", 12, *HARDWARE)
    assert (folder / "figures/grid.png").exists()
    flags = [*run.eval_flags(tmp_path / "scores.csv"), "--model_type", "lift", "--write_reference", real]
    output = stage(eval_fid_batch, *flags).output
    assert "12 images of the reference 'train'" in output and not (tmp_path / "scores.csv").exists()
    stage(eval_fid_batch, *flags[:-1], few, "--num_images", 5)
    pixels = load_images("synthetic", 16, run.cache, limit=12).pixels.transpose(0, 2, 3, 1)
    for k, index in enumerate((1, 3, 6, 8, 10)):  # Spread evenly: 12 (2k + 1) / 10.
        np.testing.assert_array_equal(np.asarray(Image.open(few / f"{k:06d}.png")), pixels[index])
    assert len(list(few.glob("*.png"))) == 5
    written = np.stack([np.asarray(Image.open(real / f"{k:06d}.png")) for k in range(12)])
    np.testing.assert_array_equal(written, pixels)
    # The other package opens every picture in both folders, which have to be of one size.
    monkeypatch.setattr(fid_score, "InceptionV3", Colours)
    try:
        found = fid_score.calculate_fid_given_paths([str(real), str(folder)], 5, "cpu", 6, num_workers=0)
    except TypeError as error:
        pytest.skip(f"this SciPy has no sqrtm that pytorch-fid can call: {error}")
    samples = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])
    assert len(samples) == 12
    assert found == pytest.approx(frechet(pixels / 255, samples / 255), rel=1e-3)
    # Samples stand beside real images.
    heights = {}
    for name, more in (("alone", []), ("beside", ["--real", real])):
        stage(make_figures, "samples", f"LIFT={folder}", "--columns", 4, *more, "--output", tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as figure:
            shown = np.asarray(figure.convert("RGB"))
        heights[name] = len(shown)
    assert heights["beside"] > heights["alone"] + 64
    refused(
        make_figures, "samples", f"LIFT={real}", "--columns", 12, "--real", few, "--output", tmp_path / "x.png",
        says=["holds 5 images for a row of 12"],
    )  # fmt: skip


def test_real_images_are_kept_not_mixed_and_no_samples_of_lift(stage, run, held_out_folder, refused, tmp_path):
    real = tmp_path / "fid_real"
    flags = [*run.eval_flags(tmp_path / "scores.csv"), "--model_type", "lift", "--write_reference", real]
    stage(eval_fid_batch, *flags)
    (real / "000003.png").unlink()
    before = {file.name: file.stat().st_mtime_ns for file in real.glob("*.png")}
    stage(eval_fid_batch, *flags)
    after = {file.name: file.stat().st_mtime_ns for file in real.glob("*.png")}
    assert len(after) == 12 and {name: after[name] for name in before} == before
    # They serve as images to train on or to compare with.
    np.testing.assert_array_equal(
        load_images(str(real), 16, tmp_path / "cache").pixels, load_images("synthetic", 16, run.cache, limit=12).pixels
    )
    flags += ["--reference", held_out_folder]
    refused(eval_fid_batch, *flags, says=["holds results with another reference", "--force"])
    stage(eval_fid_batch, *flags, "--force")
    assert len(list(real.glob("*.png"))) == 3


@pytest.fixture
def held_out_folder(tmp_path):
    folder = tmp_path / "others"
    folder.mkdir()
    for k, image in enumerate(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(image).save(folder / f"{k}.png")
    return folder


def test_scores_go_into_the_folder_that_output_dir_names(stage, run, tmp_path):
    flags = ["--checkpoint", run.lift, "--output_dir", tmp_path / "eval_test", "--metrics", "swd", "--num_steps", 4]
    stage(eval_fid_batch, *flags, "--num_images", 4, "--cache_dir", run.cache, *HARDWARE)
    assert len(read_rows(tmp_path / "eval_test/fid_results.csv")) == 1


def test_the_data_set_of_the_published_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "huggan/AFHQv2"
    folder.mkdir(parents=True)
    pictures = [
        Image.fromarray(np.random.default_rng(k).integers(0, 256, size, dtype=np.uint8))
        for k, size in enumerate([(64, 64, 3), (90, 70, 3), (64, 100, 3)])
    ]
    for k, picture in enumerate(pictures):
        picture.save(folder / f"{k}.png")
    images = AFHQ64Dataset(split="train", cache_dir=tmp_path / "cache")
    assert len(images) == 3
    [batch] = DataLoader(images, batch_size=3, shuffle=False)
    steps = [
        transforms.Resize(64),
        transforms.CenterCrop(64),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
    expected = torch.stack([transforms.Compose(steps)(picture) for picture in pictures])
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no split 'test'"):
        AFHQ64Dataset("test")
