"""Every backbone goes through the stages: trained, stopped and resumed, saved, mapped, sampled and exported."""

import re

import pytest
import torch

import compute_heatmap_30
import export
import generate_with_path_30
import train_baseline
import train_lift
from checkpoint import MODEL_CLASSES, load_model, read_checkpoint
from conftest import HARDWARE, STEPS, assert_same
from planning.map_file import load_heatmap
from training.settings import TrainingSettings

STAGES = {train_baseline: "baseline", train_lift: "lift_dual_timestep"}
NETWORKS = {"ddpm_unet": (), "DiT/4": ("--hidden_dims", "32,32"), "resnet": (), "resnet_circular": ()}
KIND = {
    "ddpm_unet": "UNet (ddpm_unet)",
    "DiT/4": "diffusion transformer (DiT/4)",
    "resnet": "ResNet (resnet)",
    "resnet_circular": "ResNet (resnet_circular)",
}
pytestmark = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture
def flags(tiny, cache, tmp_path, network):
    def of(name="run"):
        lively = "--lr", 0.005, "--save_every", 2, "--ema_decay", 0.5, "--seed", 3
        return [*tiny(tmp_path / name), "--cache_dir", cache, "--network", network, *NETWORKS[network], *lively]

    return of


@pytest.mark.parametrize("module", STAGES, ids=STAGES.get)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(stage, refused, flags, tmp_path, module, network):
    stem = STAGES[module]
    stage(module, *flags("whole"), "--epochs", 4)
    stage(module, *flags(), "--epochs", 2)
    folder = tmp_path / "run/checkpoints"
    other = {"ddpm_unet": "unet", "DiT/4": "DiT/2", "resnet": "resnet_circular"}.get(network, "resnet")
    says = (f"network = {network}, not {other}",)
    refused(module, *flags(), "--network", other, "--epochs", 4, "--resume", says=says)
    stage(module, *flags(), "--network", network.upper(), "--epochs", 4, "--resume", "--recompute")
    whole, parts = (read_checkpoint(tmp_path / run / f"checkpoints/{stem}_4ep.pth") for run in ("whole", "run"))
    assert whole["config"]["network"] == parts["config"]["network"] == network
    for state in ("model_state", "ema_state"):
        assert_same(whole[state], parts[state])
    assert any(
        (whole["model_state"][n] != v).any()
        for n, v in read_checkpoint(folder / f"{stem}_2ep.pth")["model_state"].items()
    )


def test_a_dual_model_is_mapped_sampled_and_exported(stage, flags, tmp_path, network):
    stage(train_lift, *flags())
    checkpoint, heatmap = tmp_path / "run/checkpoints/lift_dual_timestep_2ep.pth", tmp_path / "map.pth"
    loaded = load_model(checkpoint)
    assert loaded.model.network.name == network and loaded.config["network"] == network
    probes = ["--grid", 4, "--K", 2, "--num_images", 2, "--output", heatmap]
    data = ["--cache_dir", tmp_path / "run/cache"]
    stage(compute_heatmap_30, "--checkpoint", checkpoint, *probes, *STEPS, *HARDWARE, *data)
    heat = load_heatmap(heatmap)
    norms = {
        name: value for name, value in heat.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    assert norms and all(value.isfinite().all() for value in norms.values())
    samples = ["--output", tmp_path / "samples", "--num_images", 2, "--heatmap", heatmap, "--path_type", "dp_64"]
    stage(generate_with_path_30, "--checkpoint", checkpoint, *samples, *STEPS, *HARDWARE)
    assert len(list((tmp_path / "samples").rglob("*.png"))) >= 2
    stage(export, checkpoint, tmp_path / "export", "--num_steps", 2)
    again = MODEL_CLASSES["dual"].from_pretrained(tmp_path / "export")
    assert_same(again.state_dict(), loaded.model.state_dict())
    assert again.network.name == network and again.hidden_dims == loaded.model.hidden_dims
    card = re.sub(r"\s+", " ", (tmp_path / "export/README.md").read_text())
    assert f"the LIFT model: one {KIND[network]} that denoises images of 16×16 and 8×8 together" in card
    program = torch.export.load(tmp_path / "export/model.pt2").module()
    xs, ts = [torch.randn(3, 3, 16, 16), torch.randn(3, 3, 8, 8)], [torch.tensor([1, 500, 999])] * 2
    for got, wanted in zip(program(xs, ts), again.denoise(tuple(xs), tuple(ts)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_settings_say_what_is_built(network, refused, tiny, cache, tmp_path):
    settings = TrainingSettings(model_type="dual", network=network.lower(), hidden_dims=(32, 32))
    assert settings.recorded()["network"] == network and settings.recorded()["hidden_dims"] == [32, 32]
    if network != "DiT/4":
        assert TrainingSettings(model_type="no_t", network=network).hidden_dims == (64, 128, 256, 512)
        return
    sized = TrainingSettings(model_type="baseline", network="dit-s/4")
    assert sized.recorded()["network"] == "DiT-S/4" and sized.recorded()["hidden_dims"] == [384] * 12
    assert sized.but(network="unet").hidden_dims == (64, 128, 256, 512)
    assert TrainingSettings(**sized.recorded() | {"model_type": "dual", "loss_weights": None}) is not None
    for flags, status, says in (
        (["--network", "DiT-S/4"], 2, ("DiT-S/4 has 12 blocks of width 384; leave hidden_dims out",)),
        (["--network", "DiT/4"], 2, ("hidden_dims (8, 16) must be the width of every block of a DiT",)),
        (["--network", "DiT/4", "--model", "no_t", "--hidden_dims", "8"], 2, ("through timesteps alone", "ddpm_unet")),
        (["--network", "vit"], 2, ("Unknown network 'vit'; choose one of unet, ddpm_unet, ddpm_unet_plain, D",)),
        (["--network", "DiT/3", "--hidden_dims", "8"], 1, (
            "--resolution 16 must be a multiple of 6 for the 3x3 patches of two scales; use a smaller patch, such as",
        )),
    ):  # fmt: skip
        refused(train_lift, *tiny(tmp_path), "--cache_dir", cache, *flags, status=status, says=says)
