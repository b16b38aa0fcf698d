"""Training a stage of a cascade: both levels random, loss on the fine image alone, in both representations."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import compute_heatmap_30
import compute_trajectories
import eval_fid_batch
import generate_with_path_30
import interpolate
import train_lift
from checkpoint import COARSE_IMAGES, load_model
from conftest import HARDWARE
from data import coarse
from model import CascadeModel
from planning.presets import PRESETS
from planning.regimes import resolve_regime
from scheduler import DDIMScheduler
from training.objective import Denoising, TrainingBatch, step_generator
from training.settings import TrainingSettings

REPRESENTATIONS = ("overcomplete", "residual")


def drawn(representation, batch=16):
    scheduler = DDIMScheduler(prediction_type="v", representation=representation)
    objective = Denoising(resolve_regime(None, "cascade"), scheduler)
    x_64 = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return scheduler, objective, objective.draw(x_64, coarse(x_64), step_generator(0, 0, torch.device("cpu")))


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_the_loss_is_of_the_fine_image_alone(representation):
    torch.manual_seed(0)
    scheduler, objective, batch = drawn(representation)
    model = CascadeModel((8, 16), representation=representation)
    losses = objective.losses(model.denoise, batch)
    assert set(losses) == {"loss_64"}
    # Another coarse image and its noise that make up the same noisy one: of neither is anything to be predicted.
    alpha, sigma = scheduler.scales(batch.t_32, batch.x_32)
    x_32 = batch.x_32 + 0.1
    other = batch._replace(x_32=x_32, noise_32=batch.noise_32 - alpha * 0.1 / sigma)
    torch.testing.assert_close(objective.losses(model.denoise, other)["loss_64"], losses["loss_64"], rtol=1e-4, atol=0)
    # What the network is shown of the coarse image is the noisy one, and its level is told.
    seen = objective.losses(model.denoise, batch._replace(noise_32=batch.noise_32 + 1))["loss_64"]
    told = objective.losses(model.denoise, batch._replace(t_32=batch.t_32.flip(0)))["loss_64"]
    assert (seen - losses["loss_64"]).abs().max() > 1e-3 < (told - losses["loss_64"]).abs().max()
    total = objective.minimised(losses, batch)
    torch.testing.assert_close(total, losses["loss_64"].mean())


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_the_loss_of_a_residual_is_a_mean_over_its_dimensions(representation):
    scheduler, objective, batch = drawn(representation)

    def nothing(xs, ts):
        return (torch.zeros_like(xs[0]),)

    target = scheduler.target(*TrainingBatch.scales.fget(batch)[0])
    share = 0.75 if representation == "residual" else 1.0
    expected = target.square().flatten(1).mean(1) / share
    torch.testing.assert_close(objective.losses(nothing, batch)["loss_64"], expected)


def test_both_levels_are_random_and_independent():
    scheduler, objective, _ = drawn("overcomplete")
    t_64, t_32 = objective.pairs.draw(20_000, torch.Generator().manual_seed(0))
    assert abs(torch.corrcoef(torch.stack([t_64, t_32]).double())[0, 1]) < 0.03
    for t in (t_64, t_32):
        assert t.min() == 0 and t.max() == 999 and t.double().mean().item() == pytest.approx(499.5, abs=8)


@pytest.mark.parametrize(
    "preset", [name for name in PRESETS if PRESETS[name]["objective"] not in ("consistency", "cold")]
)
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_every_preset_leaves_the_pairs_independent(preset, representation):
    settings = TrainingSettings(model_type="cascade", preset=preset, representation=representation)
    assert settings.loss_weights == (1.0,)
    assert resolve_regime(settings.t_pairs, "cascade")["t_pairs"] == "independent"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"objective": "consistency"}, "predicts the fine scale alone"),
        ({"t_pairs": "follow:1"}, "use band"),
        ({"loss_weights": (1.0, 1.0)}, "the loss of the fine scale alone"),
        ({"preset": "flow", "target_dataset": "synthetic"}, "does not"),
    ],
)
def test_what_such_a_model_cannot_be_trained_with_is_refused(values, says):
    with pytest.raises(ValueError, match=says):
        TrainingSettings(model_type="cascade", **values)


@pytest.fixture(scope="module")
def trained(stage, tiny, cache, tmp_path_factory):
    """A residual stage told of classes with learnt variances, and one of the published kind."""
    folder = tmp_path_factory.mktemp("stages")
    further = ["--representation", "residual", "--preset", "iddpm", "--classes", "--feature_weight", 0.1]
    files = {}
    for name, flags in {"residual": further, "published": []}.items():
        place = folder / name
        stage(train_lift, *tiny(place), "--cache_dir", cache, "--model", "cascade", "--ema_decay", 0.5, *flags)
        files[name] = place / "checkpoints/cascade_2ep.pth"
    return files


def test_a_run_draws_what_it_makes_of_given_images(trained):
    for file in trained.values():
        [log] = (file.parent.parent / "logs").iterdir()
        rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
        assert all("loss_64" in row and "loss_32" not in row for row in rows)
        assert {png.name for png in log.glob("*.png")} == {"samples_2ep_fine.png"}
        with Image.open(log / "samples_2ep_fine.png") as grid:
            assert len(np.unique(np.asarray(grid))) > 20
    loaded = load_model(trained["residual"], given=(COARSE_IMAGES,))
    assert loaded.config["t_pairs"] == "independent" and loaded.learned_variance
    assert loaded.scheduler.representation.name == "residual" and loaded.model.num_classes > 1


def test_a_dry_run_says_the_memory(stage, tiny, cache, tmp_path):
    output = stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, "--model", "cascade", "--dry_run").output
    assert "activations" in output and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (generate_with_path_30, ["--num_images", 2]),
        (compute_heatmap_30, []),
        (compute_trajectories, []),
        (interpolate, ["--seeds", 1, 2]),
        (eval_fid_batch, ["--metrics", "swd"]),
    ],
)
def test_stages_that_start_from_noise_say_where_such_a_model_belongs(refused, trained, tmp_path, module, flags):
    file = trained["published"]
    output = tmp_path / ("out.pth" if module in (compute_heatmap_30, compute_trajectories) else "out")
    says = ("enlarges images that it is given", "generate_cascade.py")
    refused(module, "--checkpoint", file, *flags, "--output", output, *HARDWARE, says=says)
