"""What a stage has measured for a heatmap: on which images, on which lines, in which cells and how often."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import planning.heatmap
from checkpoint import LoadedModel, save_checkpoint
from data import ImageSet, fingerprint_array
from paths.path import timestep_grid
from planning.heatmap import MapSettings, compute, find_map, measure
from planning.map_file import load_heatmap
from runtime.distributed import Processes
from scheduler import DDIMScheduler

SCHEDULER = DDIMScheduler()
LOG_SNR = SCHEDULER.log_snr.numpy()
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 1, 4, 4), dtype=np.uint8)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """`measured(**settings)`: what `error_map` is asked for, call by call, and the content of the map."""

    def run(seen=None, **settings):
        asked = []

        def error_map(denoise, scheduler, images, t_grid, **options):
            asked.append(options | {"images": images, "t_grid": t_grid})
            return {"t_grid": torch.tensor(t_grid), "num_probes": options["num_probes"], "num_images": len(images)}

        monkeypatch.setattr(planning.heatmap, "error_map", error_map)
        config = {"num_train_timesteps": 1000, "model_type": "dual", "weights": "raw", "run": "first"}
        model = SimpleNamespace(denoise=None, num_predictions=2, num_scales=2)
        loaded = LoadedModel(model, SCHEDULER, config, "f" * 16, tmp_path / "model.pth")
        images = ImageSet(PIXELS, "noise", fingerprint_array(PIXELS))
        settings = {"start": 999, "grid": 5, "num_images": 4, "precision": "fp32"} | settings
        settings = MapSettings(checkpoint=loaded.file, **settings)
        said, file = {"fingerprint": "f" * 16}, tmp_path / "map.pth"
        content = measure(settings, loaded, images, said, seen, file, Processes("cpu"))
        assert load_heatmap(file).keys() == (content | said | {"format_version": 2}).keys()
        return asked, content

    return run


def test_cells_that_were_seen_are_not_interpolated():
    with pytest.raises(ValueError, match="--coarse interpolates over all pairs of timesteps; leave it out"):
        MapSettings(checkpoint="model.pth", seen_only=True, coarse=3)


@pytest.mark.parametrize("regime", ["independent", "band:image,1"])
def test_what_was_seen_is_asked_for_where_it_is_not_all_and_told_where_it_is_crossed(
    monkeypatch, tmp_path, capsys, regime
):
    config = {"model_type": "dual", "t_pairs": regime, "t_pairs_points": None, "channels": 1, "weights": "raw"}
    config |= {"epoch": 1, "beta_schedule": "cosine_clipped"}
    loaded = LoadedModel(
        SimpleNamespace(num_scales=2, one_clock=False), SCHEDULER, config, "f" * 16, tmp_path / "model.pth"
    )
    images, given = ImageSet(PIXELS, "noise", fingerprint_array(PIXELS)), []
    monkeypatch.setattr(planning.heatmap, "load_model", lambda *_: loaded)
    monkeypatch.setattr("cli.load_training_images", lambda *_: images)
    monkeypatch.setattr(planning.heatmap, "measure", lambda *arguments: given.append(arguments) or {"a": 1})

    def made(**options):
        file = tmp_path / "map.pth"
        return compute(MapSettings(checkpoint=loaded.file, output=file, num_images=9, **options), Processes("cpu"))

    everything = regime == "independent"
    made(coarse=3)
    assert ("--coarse interpolates between pairs of timesteps that" in capsys.readouterr().err) == (not everything)
    assert (given[0][4] is None) == everything and given[0][0].start == 999 and given[0][3]["start"] == 999
    if everything:
        with pytest.raises(ValueError, match="model.pth was trained on all pairs of timesteps; leave --seen_only out"):
            made(seen_only=True)
    else:
        content, file = made(seen_only=True)
        assert content["seen_only"] is True and file == tmp_path / "map.pth" and "seen_only" not in given[0][3]
    with pytest.raises(ValueError, match="--num_images 10 exceeds the 9 images of 'noise'"):
        compute(MapSettings(checkpoint=loaded.file, num_images=10, output=tmp_path / "map.pth"), Processes("cpu"))


def test_a_map_replaces_no_checkpoint(monkeypatch, tmp_path):
    config = {"model_type": "dual", "t_pairs": "independent", "channels": 1, "weights": "raw", "epoch": 1}
    config |= {"beta_schedule": "cosine_clipped"}
    loaded = LoadedModel(
        SimpleNamespace(num_scales=2, one_clock=False), SCHEDULER, config, "f" * 16, tmp_path / "model.pth"
    )
    images = ImageSet(PIXELS, "noise", fingerprint_array(PIXELS))
    monkeypatch.setattr(planning.heatmap, "load_model", lambda *_: loaded)
    monkeypatch.setattr("cli.load_training_images", lambda *_: images)
    monkeypatch.setattr(planning.heatmap, "measure", lambda *_: pytest.fail("measured over a checkpoint"))
    save_checkpoint(loaded.file, {"config": config, "model_state": {}, "ema_state": None, "epoch": 1, "step": 3})
    before = loaded.file.read_bytes()
    settings = MapSettings(checkpoint=loaded.file, output=loaded.file, num_images=9, force=True)
    with pytest.raises(ValueError, match="model.pth is a checkpoint, which no map replaces; pass another --output"):
        compute(settings, Processes("cpu"))
    assert loaded.file.read_bytes() == before


def chosen(asked):
    """The images of a call, by their places in the set."""
    pixels = ((asked["images"] + 1) * 127.5).round().to(torch.uint8).numpy()
    return [next(k for k, image in enumerate(PIXELS) if np.array_equal(image, one)) for one in pixels]


def test_a_map_is_of_as_many_different_images_in_order_which_the_seed_chooses(measured):
    found = {}
    for seed in range(12):
        [asked], content = measured(seed=seed)
        found[seed] = chosen(asked)
        assert found[seed] == sorted(set(found[seed])) and len(found[seed]) == 4 and asked["seed"] == seed
        assert "num_images" not in content and content["run"] == "first" and content["model_type"] == "dual"
    assert len({tuple(places) for places in found.values()}) > 6
    assert set().union(*found.values()) == set(range(9))
    assert chosen(measured(seed=3)[0][0]) == found[3]
    [asked], _ = measured(num_images=9)
    assert chosen(asked) == list(range(9))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, {"num_probes": 4, "batch_size": 4, "maps": "all", "of": "eps", "coarse": None}),
        ({"K": 2, "batch_size": 7, "maps": "mse"}, {"num_probes": 2, "batch_size": 7, "maps": "mse"}),
        ({"num_images": 3, "of": "x0", "coarse": 3}, {"batch_size": 3, "of": "x0", "coarse": 3}),
    ],
)
def test_a_map_is_measured_as_its_settings_say(measured, settings, said):
    [asked], content = measured(**settings)
    assert said.items() <= asked.items() and asked["t_grid"] == timestep_grid(5).tolist() and "cells" not in asked
    assert (asked["num_predictions"], asked["num_scales"]) == (2, 2) and "seen_32" not in content
    assert (content["used_precision"], content["num_train_timesteps"]) == ("fp32", 1000)


def test_lines_begin_where_they_are_told_to_and_are_spaced_as_they_are_told_to(measured):
    [asked], _ = measured(start=700, grid_spacing="uniform_log_snr", grid=8)
    assert asked["t_grid"] == timestep_grid(8, spacing="uniform_log_snr", start=700, log_snr=LOG_SNR).tolist()


def test_cells_are_those_that_were_seen_if_no_others_are_asked_for(measured):
    seen = torch.from_numpy(np.stack([LOG_SNR - 1, LOG_SNR + 2]))
    for seen_only in (False, True):
        [asked], content = measured(seen, seen_only=seen_only, grid=12)
        assert torch.equal(content["seen_32"], seen) and ("cells" in asked) == seen_only
    lines = LOG_SNR[asked["t_grid"]]
    lead = lines - lines[:, None]
    np.testing.assert_array_equal(asked["cells"].numpy(), (lead >= -1) & (lead <= 2))


@pytest.mark.parametrize(("deviation", "used"), [(1.0, "bf16"), (1.001, "fp32")])
def test_a_faster_precision_is_tried_on_three_lines(measured, monkeypatch, capsys, deviation, used):
    monkeypatch.setattr(planning.heatmap, "resolve_precision", lambda device, name: "bf16")
    monkeypatch.setattr(planning.heatmap, "largest_deviation", lambda *maps: deviation)
    asked, content = measured(precision="auto", grid=6)
    grid = timestep_grid(6).tolist()
    assert [call["t_grid"] for call in asked] == [[999, grid[3], 0]] * 2 + [grid]
    precisions = [call["autocast"].args[1] for call in asked]
    assert precisions == ["bf16", "fp32", used] and content["used_precision"] == used
    assert f"bf16 differs from fp32 by at most {deviation:.2g} standard errors: {used}\n" in capsys.readouterr().out


def test_the_map_of_a_checkpoint_is_the_usual_one_or_the_only_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, checkpoint = {"model_type": "dual", "run": "one"}, tmp_path / "checkpoints/one/lift_dual_timestep_4ep.pth"

    def found():
        return find_map(checkpoint, config, 4, "ema").name

    folder = find_map(checkpoint, config, 4, "ema").parent
    folder.mkdir(parents=True)
    assert found() == "heatmap_30_4ep_ema.pth"
    for other in ("heatmap_12_4ep.pth", "heatmap_12_14ep_ema.pth", "heatmap_x_4ep_ema.pth", "heatmap_1_2_4ep_ema.pth"):
        (folder / other).touch()
        assert found() == "heatmap_30_4ep_ema.pth"
    (folder / "heatmap_12_4ep_ema.pth").touch()
    assert found() == "heatmap_12_4ep_ema.pth"
    (folder / "heatmap_9_4ep_ema.pth").touch()
    assert found() == "heatmap_30_4ep_ema.pth"
    (folder / "heatmap_9_4ep_ema.pth").unlink()
    (folder / "heatmap_30_4ep_ema.pth").touch()
    assert found() == "heatmap_30_4ep_ema.pth"
