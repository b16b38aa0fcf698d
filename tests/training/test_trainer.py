import functools
import json
import math
import shutil
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import train_baseline
import train_lift
from checkpoint import COARSE_IMAGES, MODEL_CLASSES, build_model, checkpoint_file, load_model, read_checkpoint
from conftest import LAST, LOG, RUN, assert_same, assert_same_run, list_files, read_log, run_stage
from data import ImageSet, coarse, load_images, to_float
from images.synthetic import synthetic_images
from networks.blocks import ResidualBlock
from planning.regimes import resolve_regime
from runtime.device import resolve_precision
from scheduler import DDIMScheduler
from training.memory import for_batch, saved_bytes, training_memory
from training.objective import Denoising, step_generator
from training.run import describe
from training.trainer import Trainer

CPU = torch.device("cpu")
# Which timesteps each model is shown, of the fine and of the coarse scale.
CLOCKS = {"baseline": ["64"], "dual": ["64", "32"], "shared_t": ["64"], "single_t": ["64"], "no_t": []}
CLOCKS["cascade"] = ["64", "32"]
PREDICTS_COARSE = ("dual", "shared_t")


# The loss


class Recorder(nn.Module):
    """Keeps what it is called with and returns what `answer(z)` makes of every noisy image to be predicted."""

    def __init__(self, model_type, answer=torch.zeros_like):
        super().__init__()
        self.model_type = model_type
        self.answer = answer

    def forward(self, *inputs):
        scales = 1 if self.model_type == "baseline" else 2
        self.images, self.clocks = inputs[:scales], inputs[scales:]
        if self.model_type in PREDICTS_COARSE:
            return tuple(self.answer(z) for z in self.images)
        return self.answer(self.images[0])

    def shown(self):
        return self.images, self.clocks


def images(batch=8, size=16, seed=0):
    x_64 = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x_64, coarse(x_64)


def shown(model_type, x_64, x_32, seed=0, answer=torch.zeros_like, prediction_type="epsilon"):
    """The mean losses, the noisy images and the clocks of one call."""
    model = Recorder(model_type, answer)
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    return mean_losses(model, model_type, scheduler, x_64, x_32, step_generator(0, seed, CPU)), *model.shown()


def mean_losses(model, model_type, scheduler, x_64, x_32, generator):
    """Every loss of a batch drawn by a generator, after checking that there is one per image."""
    objective = Denoising(resolve_regime(None, model_type), scheduler)
    denoise = functools.partial(MODEL_CLASSES[model_type]((8,)).denoise, network=model)
    losses = objective.losses(denoise, objective.draw(x_64, x_32, generator))
    assert all(values.shape == (len(x_64),) for values in losses.values())
    return {name: values.mean() for name, values in losses.items()}


def tables(t):
    """sqrt(abar) and sqrt(1 - abar) at timesteps [B], to multiply images with."""
    alpha_bar = DDIMScheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()


@pytest.mark.parametrize("model_type", MODEL_CLASSES)
def test_a_model_that_knows_nothing_has_the_variance_of_the_noise_as_its_loss(model_type):
    losses, noisy, clocks = shown(model_type, *images(64, 32))
    assert set(losses) == ({"loss_64", "loss_32"} if model_type in PREDICTS_COARSE else {"loss_64"})
    assert len(clocks) == len(CLOCKS[model_type])
    assert [len(t) for t in clocks] == [64] * len(clocks)
    for value in losses.values():
        # The mean of n squares of standard normals has a standard deviation of sqrt(2 / n), here below 0.007.
        assert value.item() == pytest.approx(1, abs=0.03) and value.dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("model_type", ["baseline", "dual", "shared_t", "single_t"])
def test_the_target_equals_the_one_derived_from_what_the_model_saw(model_type, prediction_type):
    x_64, x_32 = images()
    _, noisy, clocks = shown(model_type, x_64, x_32, prediction_type=prediction_type)
    targets = []
    for z, x, t in zip(noisy, (x_64, x_32), clocks * 2 if model_type == "shared_t" else clocks, strict=False):
        signal, spread = tables(t)
        noise = (z - signal * x) / spread
        targets.append({"epsilon": noise, "x0": x, "v": signal * noise - spread * x}[prediction_type])

    def off_by_three(z):
        return 3 + next(target for target in targets if target.shape == z.shape)

    perfect, _, _ = shown(model_type, x_64, x_32, 0, lambda z: off_by_three(z) - 3, prediction_type)
    wrong, _, _ = shown(model_type, x_64, x_32, 0, off_by_three, prediction_type)
    assert len(perfect) == (2 if model_type in PREDICTS_COARSE else 1)
    assert all(value.item() < 1e-6 for value in perfect.values())
    assert all(value.item() == pytest.approx(9, abs=1e-4) for value in wrong.values())


def test_a_step_minimises_the_losses_weighed_by_scale_and_timestep(trainer):
    run = trainer("--loss_weights", "0.5,3", "--min_snr_gamma", 5)
    batch = run.draw(*next(run.batches.epoch(0))[:2])
    losses = run.objective.losses(run.model.denoise, batch)
    expected = 0.0
    for weight, name, t in ((0.5, "loss_64", batch.t_64), (3, "loss_32", batch.t_32)):
        snr = run.scheduler.snr[t]
        expected += weight * (losses[name] * torch.where(snr < 5, 1, 5 / snr)).mean().item()
    found = run.objective.minimised(losses, batch)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert found.item() != pytest.approx(sum(values.mean().item() for values in losses.values()), rel=0.05)
    # What is logged stays comparable between runs.
    values = run.train_step(*next(run.batches.epoch(0))[:2])
    assert values["loss_32"].item() == pytest.approx(losses["loss_32"].mean().item(), rel=1e-6)


def test_a_scale_of_weight_0_is_not_learnt(trainer):
    run = trainer("--loss_weights", "1,0")
    head = run.model.unet.head[-1]
    before = head.weight.detach().clone()
    run.train_step(*next(run.batches.epoch(0))[:2])
    # The channels of the coarse prediction are decayed and nothing else.
    torch.testing.assert_close(
        head.weight[3:], before[3:] * (1 - run.settings.lr * run.settings.weight_decay), rtol=1e-6, atol=0
    )
    assert ((head.weight[:3] - before[:3]).abs() > 1e-5).all()


def spread_of(z):
    """The standard deviation of every image, which tells its timestep when the clean image is black."""
    return z.flatten(1).std(1, correction=0)


@pytest.mark.parametrize("model_type", MODEL_CLASSES)
def test_every_scale_has_its_own_timestep_unless_the_clock_is_shared(model_type):
    zeros = torch.zeros(2000, 3, 16, 16)
    _, noisy, clocks = shown(model_type, zeros, coarse(zeros))
    for z, t in zip(noisy, clocks, strict=False):
        torch.testing.assert_close(spread_of(z), tables(t)[1].flatten(), rtol=0.25, atol=0)
    if model_type == "baseline":
        return
    fine, small = spread_of(noisy[0]), spread_of(noisy[1])
    correlation = torch.corrcoef(torch.stack([fine, small]))[0, 1].item()
    if model_type == "shared_t":
        assert correlation > 0.98
    else:
        # Of 2000 independent pairs the correlation has a standard deviation of 0.022.
        assert abs(correlation) < 0.1
    if model_type == "dual":
        assert not torch.equal(*clocks)


def test_timesteps_are_uniform_over_the_whole_schedule():
    zeros = torch.zeros(40_000, 1, 2, 2)
    _, _, clocks = shown("dual", zeros, coarse(zeros))
    for t in clocks:
        assert t.dtype == torch.int64 and t.min() == 0 and t.max() == 999
        counts = torch.bincount(t // 100, minlength=10)
        # Each of ten equal parts gets 4000 with a standard deviation of 60.
        assert (counts - 4000).abs().max() < 300


def test_every_scale_has_its_own_noise():
    zeros = torch.zeros(300, 3, 16, 16)
    _, (z_64, z_32), (t_64, t_32) = shown("dual", zeros, coarse(zeros))
    noise_64, noise_32 = z_64 / tables(t_64)[1], z_32 / tables(t_32)[1]
    assert noise_32.std().item() == pytest.approx(1, abs=0.02)
    for other in (2 * coarse(noise_64), noise_64[..., ::2, ::2], noise_64[..., :8, :8]):
        assert abs((other * noise_32).mean().item()) < 0.02
    assert abs((noise_64[1:] * noise_64[:-1]).mean().item()) < 0.02


def test_the_loss_is_single_precision_whatever_the_model_returns():
    losses, _, _ = shown("dual", *images(), answer=lambda z: torch.zeros_like(z, dtype=torch.bfloat16))
    assert all(value.dtype == torch.float32 for value in losses.values())


def test_noise_of_a_step_is_a_function_of_seed_and_step_only():
    draws = {}
    for seed in range(8):
        for step in (*range(8), 10**6):
            torch.manual_seed(step)
            draws[seed, step] = torch.rand(4, generator=step_generator(seed, step, CPU))
    torch.manual_seed(1)
    assert all(torch.equal(torch.rand(4, generator=step_generator(*key, CPU)), draw) for key, draw in draws.items())
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(draws)


# One step


def run_steps(trainer, count):
    batches = [batch for epoch in range(-(-count // 3)) for batch in trainer.batches.epoch(epoch)]
    return [trainer.train_step(*batch[:2]) for batch in batches[:count]]


def parameters_of(model):
    return [p.detach().double().clone() for p in model.parameters()]


def test_ema_is_the_recursion_computed_by_hand(trainer):
    run = trainer("--ema_decay", "0.7", "--lr", "0.01")
    expected = parameters_of(run.model)
    for x_64, x_32, _ in [*run.batches.epoch(0), *run.batches.epoch(1)]:
        run.train_step(x_64, x_32)
        expected = [0.7 * e + 0.3 * p for e, p in zip(expected, parameters_of(run.model), strict=True)]
        for ema, value in zip(parameters_of(run.ema), expected, strict=True):
            torch.testing.assert_close(ema, value, rtol=1e-5, atol=1e-6)
    assert run.step == 6
    distance = sum((e - p).abs().sum() for e, p in zip(expected, parameters_of(run.model), strict=True))
    assert distance > 1 and not any(p.requires_grad for p in run.ema.parameters())


def test_ema_that_ramps_up_is_a_weighted_sum_of_the_weights_of_all_steps(trainer):
    run = trainer("--ema_decay", "0.8", "--ema_rampup_ratio", "0.4", "--lr", "0.01")
    batches = [batch for epoch in range(4) for batch in run.batches.epoch(epoch)]
    trajectory = [parameters_of(run.model)]
    for batch in batches:
        run.train_step(*batch[:2])
        trajectory.append(parameters_of(run.model))
    # Half-lives in steps: 0.4, 0.8, ..., until they reach the one of the decay. The first step forgets the start.
    longest = math.log(0.5) / math.log(0.8)
    decays = [0.0] + [0.5 ** (1 / min(longest, 0.4 * done)) for done in range(1, len(batches))]
    assert len(set(decays)) == 9 and len(batches) == 12
    weights = [0.0] + [(1 - d) * math.prod(decays[n + 1 :]) for n, d in enumerate(decays)]
    assert sum(weights) == pytest.approx(1)
    for k, ema in enumerate(parameters_of(run.ema)):
        expected = sum(weight * each[k] for weight, each in zip(weights, trajectory, strict=True))
        torch.testing.assert_close(ema, expected, rtol=1e-5, atol=1e-6)


def test_the_first_step_is_that_of_adamw(trainer):
    run = trainer("--lr", "0.01", "--weight_decay", "0.3", "--grad_clip", "1e9")
    before = parameters_of(run.model)
    run_steps(run, 1)
    for old, parameter in zip(before, run.model.parameters(), strict=True):
        g = parameter.grad.double()
        # After one step both bias-corrected moments are those of the gradient itself (arXiv 1711.05101).
        expected = old * (1 - 0.01 * 0.3) - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_gradients_are_scaled_to_the_largest_norm_and_no_further(trainer):
    free, clipped = trainer("--grad_clip", "1e9"), trainer("--grad_clip", "0.02")
    [free_values], [clipped_values] = run_steps(free, 1), run_steps(clipped, 1)
    gradients = [[p.grad for p in run.model.parameters()] for run in (free, clipped)]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients[0]))
    assert norm > 0.1
    assert free_values["grad_norm"].item() == pytest.approx(norm, rel=1e-5)
    # What is logged is the norm before clipping.
    assert clipped_values["grad_norm"].item() == pytest.approx(norm, rel=1e-5)
    for whole, scaled in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled, whole * (0.02 / norm), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("lr_schedule", ["constant", "cosine"])
def test_learning_rate_of_every_step(trainer, lr_schedule):
    run = trainer("--lr_schedule", lr_schedule, "--lr", "0.002")
    for step, batch in enumerate([*run.batches.epoch(0), *run.batches.epoch(1)]):
        factor = (1 + math.cos(math.pi * step / 6)) / 2 if lr_schedule == "cosine" else 1
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.002 * factor, rel=1e-12)
        run.train_step(*batch[:2])
    end = run.optimizer.param_groups[0]["lr"]
    assert end == pytest.approx(0, abs=1e-12) if lr_schedule == "cosine" else end == 0.002


def test_training_lowers_the_loss_of_a_set_that_is_learnt_quickly(trainer):
    run = trainer("--limit", "4", "--lr", "0.003", "--ema_decay", "0.9")
    x_64 = to_float(torch.from_numpy(synthetic_images(4, 16)))

    def loss(model):
        """Of many draws of noise that training does not see."""
        with torch.no_grad():
            arguments = (run.scheduler, x_64.repeat(64, 1, 1, 1), coarse(x_64).repeat(64, 1, 1, 1))
            return mean_losses(model, "dual", *arguments, step_generator(999, 0, CPU))

    before = loss(run.model)
    for epoch in range(80):
        for batch in run.batches.epoch(epoch):
            run.train_step(*batch[:2])
    for model in (run.model, run.ema):
        after = loss(model)
        assert all(after[name] < 0.6 * before[name] for name in ("loss_64", "loss_32")), (before, after)


# Runs


@pytest.mark.parametrize("flags", [(), ("--flip",), ("--ema_rampup_ratio", 0.3)])
def test_two_epochs_and_two_more_are_four_epochs(stage, tiny, cache, tmp_path, straight, flags):
    common = [*tiny(tmp_path), "--cache_dir", cache, *RUN, *flags]
    stage(train_lift, *common, "--epochs", 2)
    assert read_checkpoint(tmp_path / LAST)["epoch"] == 2
    torch.manual_seed(12345)
    stage(train_lift, *common, "--epochs", 4, "--resume")
    assert read_checkpoint(tmp_path / LAST)["optimizer"]["state"]
    assert_same_run(tmp_path, straight(*flags))


def test_seed_flip_and_schedule_make_a_difference(straight):
    runs = [(), ("--flip",), ("--seed", 7), ("--lr_schedule", "cosine")]
    assert len({load_model(straight(*flags) / LAST).fingerprint for flags in runs}) == len(runs)


def test_an_interrupted_cosine_run_ends_as_if_it_had_not_been(stage, tiny, cache, tmp_path, straight, monkeypatch):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 4, "--lr_schedule", "cosine"]
    train_step = Trainer.train_step

    def interrupted(self, *batch):
        if self.step == 8:
            raise KeyboardInterrupt
        return train_step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert run_stage(train_lift, *flags).status == 130
    assert read_checkpoint(tmp_path / LAST)["step"] == 6
    assert read_log(tmp_path)[-1]["step"] == 8
    stage(train_lift, *flags, "--resume")
    assert_same_run(tmp_path, straight("--lr_schedule", "cosine"))


def test_a_row_that_a_crash_cut_short_does_not_stop_the_run(stage, tiny, cache, tmp_path, straight):
    shutil.copytree(straight(), tmp_path, dirs_exist_ok=True)
    log = tmp_path / LOG / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 13, "epo')
    rows = read_log(straight())
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 5, "--resume")
    assert read_log(tmp_path)[:12] == rows
    assert [row["step"] for row in read_log(tmp_path)] == list(range(1, 16))


def test_rows_of_the_log(straight):
    rows = read_log(straight())
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["epoch"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for row in rows:
        assert {"loss_64", "loss_32", "grad_norm", "lr"} <= row.keys() and row["bad_steps"] == 0
        assert all(math.isfinite(value) for value in row.values())
    for row in read_log(straight(), "speed.jsonl"):
        assert row["images_per_second"] > 0 and 0.05 < row["memory_gib"] < 50
    assert len(list((straight() / LOG / "tensorboard").iterdir())) == 1


def test_a_row_is_the_mean_of_its_steps(stage, tiny, cache, tmp_path, straight):
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 2, "--log_every", 2)
    rows, single = read_log(tmp_path), read_log(straight())
    # Every second step, and the end of every epoch of three.
    spans = [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert [row["step"] for row in rows] == [end for _, end in spans]
    for row, (start, end) in zip(rows, spans, strict=True):
        for name in ("loss_64", "loss_32", "grad_norm"):
            assert row[name] == pytest.approx(np.mean([r[name] for r in single[start:end]]), rel=1e-5)


def test_files_are_named_by_epoch_and_the_last_epoch_is_always_saved(stage, tiny, cache, tmp_path, straight):
    names = {file.name for file in (straight() / "checkpoints").glob("*.pth")}
    assert names == {f"lift_dual_timestep_{part}.pth" for part in ("2ep", "4ep", "last", "last_1")}
    stage(train_baseline, *tiny(tmp_path), "--cache_dir", cache, "--epochs", 3, "--save_every", 2)
    names = {file.name for file in (tmp_path / "checkpoints").glob("*.pth")}
    assert names == {f"baseline_{part}.pth" for part in ("2ep", "3ep", "last", "last_1")}


def test_a_snapshot_and_the_resume_file_hold_the_same_weights(straight):
    snapshot, last = (load_model(straight() / name) for name in ("checkpoints/lift_dual_timestep_4ep.pth", LAST))
    assert snapshot.fingerprint == last.fingerprint
    assert snapshot.config == last.config and (last.config["epoch"], last.config["step"]) == (4, 12)


def test_sample_grids_show_32_images_of_both_scales(straight):
    for epoch in (2, 4):
        for name, size in (("fine", 16), ("coarse", 8)):
            with Image.open(straight() / LOG / f"samples_{epoch}ep_{name}.png") as grid:
                assert grid.size == (8 * (size + 2) + 2, 4 * (size + 2) + 2)
                assert len(np.unique(np.asarray(grid))) > 20


@pytest.mark.parametrize("model_type", MODEL_CLASSES)
def test_every_model_trains_and_its_checkpoint_loads(stage, tiny, cache, tmp_path, model_type):
    module, flags = (train_baseline, []) if model_type == "baseline" else (train_lift, ["--model", model_type])
    ended = stage(module, *tiny(tmp_path), "--cache_dir", cache, "--ema_decay", 0.5, *flags)
    file = checkpoint_file(tmp_path / "checkpoints", model_type, 2)
    assert str(file) in ended.output
    raw, ema = (load_model(file, ema, given=(COARSE_IMAGES,)) for ema in (False, True))
    assert type(raw.model) is type(ema.model) is MODEL_CLASSES[model_type]
    assert raw.fingerprint != ema.fingerprint
    assert raw.config["dataset"] == "synthetic" and raw.config["resolution"] == 16 and raw.config["limit"] == 12
    assert all(torch.isfinite(p).all() for p in raw.model.parameters())
    [log] = (tmp_path / "logs").iterdir()
    rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(math.isfinite(row["loss_64"]) for row in rows)
    assert all(("loss_32" in row) == (model_type in PREDICTS_COARSE) for row in rows)
    scales = {"fine", "coarse"} if model_type in PREDICTS_COARSE else {"fine"}
    assert {file.name for file in log.glob("*.png")} == {f"samples_2ep_{scale}.png" for scale in scales}


def test_no_ema_is_kept_for_decay_0(stage, tiny, cache, tmp_path):
    stage(train_baseline, *tiny(tmp_path), "--cache_dir", cache, "--ema_decay", 0)
    file = tmp_path / "checkpoints/baseline_2ep.pth"
    assert read_checkpoint(file)["ema_state"] is None
    load_model(file)
    with pytest.raises(ValueError, match="no EMA weights"):
        load_model(file, ema=True)
    stage(train_baseline, *tiny(tmp_path), "--cache_dir", cache, "--ema_decay", 0, "--epochs", 3, "--resume")
    assert read_checkpoint(tmp_path / "checkpoints/baseline_last.pth")["epoch"] == 3


def test_a_finished_run_says_so_and_does_nothing(stage, tiny, cache, straight):
    folder = straight()
    for resume in (["--resume"], ["--resume", "auto"]):
        before = list_files(folder)
        ended = stage(train_lift, *tiny(folder), "--cache_dir", cache, *RUN, "--epochs", 4, *resume)
        assert ended.output == f"{folder / LAST} is done: 4 of 4 epochs.\n"
        assert list_files(folder) == before


def test_resume_auto_starts_afresh_where_nothing_was_saved(stage, tiny, cache, tmp_path, straight):
    shutil.copytree(straight() / LOG, tmp_path / LOG)
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 4, "--resume", "auto")
    assert_same_run(tmp_path, straight())


def test_the_log_of_a_run_with_other_settings_is_not_touched(refused, stage, tiny, cache, tmp_path, straight):
    shutil.copytree(straight("--flip") / LOG, tmp_path / LOG)
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 4, "--resume"]
    says = (tmp_path / LOG / "metrics.jsonl", "flip = True, not False", "--log_dir")
    refused(train_lift, *flags, "auto", says=says)
    shutil.copytree(straight() / "checkpoints", tmp_path / "checkpoints", dirs_exist_ok=True)
    refused(train_lift, *flags, "required", says=says)


def test_a_run_that_ended_before_its_first_save_starts_again(stage, tiny, cache, tmp_path, straight):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 4]
    with mock.patch("training.objective.Denoising.losses", mock.Mock(side_effect=MemoryError)):
        assert "out of memory" in run_stage(train_lift, *flags).message
    # Nothing was computed, so that nothing is in the way.
    with mock.patch.object(Trainer, "save_resume_file", mock.Mock(side_effect=KeyboardInterrupt)):
        assert run_stage(train_lift, *flags).status == 130
    # Some steps were, and the message says how to go on.
    assert "--resume auto" in run_stage(train_lift, *flags).message
    assert "--resume auto" in run_stage(train_lift, *flags, "--resume").message
    stage(train_lift, *flags, "--resume", "auto")
    assert_same_run(tmp_path, straight())


# Refusals


def test_an_existing_run_is_not_overwritten(refused, tiny, cache, straight):
    folder = straight()
    flags = [*tiny(folder), "--cache_dir", cache, *RUN, "--epochs", 4]
    refused(train_lift, *flags, says=(folder / "checkpoints", "exists already", "--resume"), keeps=(folder,))


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--lr", 0.001, ("lr = 0.005, not 0.001",)),
        ("--batch_size", 2, ("batch_size = 4, not 2",)),
        ("--seed", 7, ("seed = 42, not 7",)),
        ("--limit", 13, ("limit = 14, not 13",)),
        ("--hidden_dims", "8,8", ("hidden_dims = [8, 16], not [8, 8]",)),
        ("--ema_decay", 0, ("ema_decay = 0.9, not 0.0",)),
        ("--lr_schedule", "cosine", ("lr_schedule = constant, not cosine",)),
    ],
)
def test_a_run_is_resumed_with_its_own_settings_only(refused, tiny, cache, straight, flag, value, says):
    folder = straight()
    flags = [*tiny(folder), "--cache_dir", cache, *RUN, "--epochs", 8, "--resume", flag, value]
    # What is decoded before the refusal stays in the cache.
    load_images("synthetic", 16, cache, limit=13)
    refused(train_lift, *flags, says=(folder / LAST, "--output_dir", *says), keeps=(folder, cache))


def test_a_cosine_run_is_resumed_to_its_own_end_only(refused, tiny, cache, straight):
    folder = straight("--lr_schedule", "cosine")
    flags = [*tiny(folder), "--cache_dir", cache, *RUN, "--lr_schedule", "cosine", "--epochs", 8, "--resume"]
    refused(train_lift, *flags, says=(folder / LAST, "epochs = 4, not 8"), keeps=(folder, cache))


def test_the_log_of_another_run_is_not_overwritten(refused, tiny, cache, tmp_path, straight):
    folder = straight()
    flags = [*tiny(folder), "--cache_dir", cache, *RUN, "--output_dir", tmp_path / "new"]
    says = (folder / LOG / "metrics.jsonl", "exists already", "--log_dir")
    refused(train_lift, *flags, says=says, keeps=(folder,))


def test_resume_needs_a_run(refused, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--resume"]
    refused(train_lift, *flags, says=(tmp_path / LAST, "does not exist"))


def test_a_snapshot_is_no_resume_file(refused, tiny, cache, tmp_path, straight):
    shutil.copytree(straight(), tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "checkpoints/lift_dual_timestep_4ep.pth", tmp_path / LAST)
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 8, "--resume"]
    refused(train_lift, *flags, says=(tmp_path / LAST, "optimizer", "_last.pth"))


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--batch_size", 13], 1, ("--batch_size 13", "12 images", "'synthetic'")),
        (["--resolution", 24], 1, ("--resolution 24", "multiple of 16")),
        (["--hidden_dims", "8,12"], 2, ("(8, 12)", "multiples of 8")),
        (["--hidden_dims", "8,8,8,8,8"], 1, ("--resolution 16", "32", "--hidden_dims")),
        (["--hidden_dims", "wide"], 2, ("--hidden_dims", "'wide'")),
        (["--lr", -1], 2, ("--lr", "'-1'")),
        (["--lr", "nan"], 2, ("--lr", "'nan'")),
        (["--ema_decay", 1.5], 2, ("--ema_decay", "'1.5'")),
        (["--beta_schedule", "cosine_zero_terminal"], 1, ("cosine_zero_terminal", "zero SNR")),
        (["--device", "77"], 1, ("--device 77",)),
        (["--device", "tpu"], 1, ("--device tpu",)),
        (["--cuda_graphs"], 1, ("--cuda_graphs", "cpu")),
        (["--cuda_graphs", "--compile"], 1, ("--cuda_graphs needs a compiled network on a GPU, not cpu",)),
        (["--epochs", 0], 2, ("--epochs", "'0'")),
        (["--seed", -1], 2, ("--seed", "'-1'")),
        (["--output_dir", __file__], 1, (__file__,)),
        (["--batchsize", 4], 2, ("--batchsize",)),
        (["--dataset", "nowhere/to/be/found"], 1, ("nowhere/to/be/found", "not a folder", "synthetic")),
        (["--dataset", "./missing"], 1, ("./missing", "not a folder")),
    ],
)
def test_bad_flags_leave_no_trace(refused, stage, tiny, cache, tmp_path, flags, status, says):
    cli_flags = [*tiny(tmp_path), "--cache_dir", cache]
    refused(train_baseline, *cli_flags, *flags, says=says, status=status, keeps=(cache,))


def test_a_corrupt_image_is_named_and_left_out_on_request_only(refused, stage, tiny, cache, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, pixels in enumerate(synthetic_images(6, 16)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{k}.png")
    bad = folder / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--dataset", folder, "--limit", 6]
    refused(train_baseline, *flags, says=(bad, "--skip_bad_images"), keeps=(cache,))
    ended = stage(train_baseline, *flags, "--skip_bad_images")
    assert "5 images of" in ended.output
    config = load_model(tmp_path / "checkpoints/baseline_2ep.pth").config
    assert config["skip_bad_images"] is True and config["dataset"] == str(folder)


# Execution


def test_a_float16_run_scales_its_loss_and_resumes_with_the_scale(stage, tiny, cache, tmp_path):
    flags = ["--cache_dir", cache, *RUN, "--precision", "fp16", "--epochs"]
    scaler = torch.amp.GradScaler
    with mock.patch.object(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, growth_interval=2)):
        stage(train_lift, *tiny(tmp_path / "once"), *flags, 2)
        stage(train_lift, *tiny(tmp_path / "twice"), *flags, 1, "--save_every", 1)
        stage(train_lift, *tiny(tmp_path / "twice"), *flags, 2, "--resume")
    once, twice = (read_checkpoint(tmp_path / name / LAST) for name in ("once", "twice"))
    # Doubled after every second one of six steps.
    assert once["loss_scaler"]["scale"] == 2.0**16 * 2**3
    assert once["config"]["precision"] == "fp16"
    for key in ("model_state", "ema_state", "optimizer", "loss_scaler"):
        assert_same(once[key], twice[key])


def test_a_run_keeps_the_precision_that_was_chosen_for_it(stage, tiny, cache, tmp_path, straight, monkeypatch):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--precision", "auto", "--resume", "auto", "--epochs"]
    expected = straight()
    for epochs, fastest in ((2, "fp32"), (4, "bf16")):
        monkeypatch.setattr("training.trainer.resolve_precision", lambda *_, name=fastest: name)
        stage(train_lift, *flags, epochs)
    assert_same_run(tmp_path, expected)


def test_an_overflow_of_float16_halves_the_scale_and_skips_the_step(trainer):
    run = trainer("--precision", "fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = parameters_of(run.model)
    run_steps(run, 1)
    assert run.scaler.get_scale() == 2.0**39 and run.bad_steps["total"] == 1
    assert all(torch.equal(old, new) for old, new in zip(before, parameters_of(run.model), strict=True))


def test_activations_are_kept_unless_asked_otherwise(trainer):
    for flags, recompute in (((), False), (("--recompute",), True)):
        assert trainer(*flags).model.unet.recompute is recompute


def test_recomputed_activations_give_the_same_bits(stage, tiny, cache, tmp_path, straight):
    calls = []
    forward = ResidualBlock.forward

    def counting(self, *inputs):
        calls.append(self)
        return forward(self, *inputs)

    with mock.patch.object(ResidualBlock, "forward", counting):
        stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 4, "--recompute")
    # Two levels of four blocks and two in the middle: twice in twelve steps, once in both calls of two grids.
    assert len(calls) == 10 * (12 * 2 + 2 * 2)
    assert_same_run(tmp_path, straight())


def test_a_compiled_run_gives_the_same_up_to_rounding(stage, tiny, cache, tmp_path, straight):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 4, "--compile"]
    # The same graphs without the minutes that generating machine code takes.
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        assert "cpu, fp32, compiled\n" in stage(train_lift, *flags).output
    for row, other in zip(read_log(tmp_path), read_log(straight()), strict=True):
        assert {name: pytest.approx(value, rel=1e-4) for name, value in row.items()} == other


def test_a_machine_that_cannot_compile_says_so_and_trains(stage, tiny, cache, tmp_path, straight):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 4, "--compile"]

    def failing(model, mode):
        def call(*_):
            raise RuntimeError("no compiler\nand much more")

        return call

    with mock.patch.object(torch, "compile", failing):
        output = stage(train_lift, *flags).output
    assert "note: compiling failed (RuntimeError: no compiler); going on without\n" in output
    assert (tmp_path / LOG / "metrics.jsonl").read_bytes() == (straight() / LOG / "metrics.jsonl").read_bytes()


def test_deterministic_kernels_are_asked_for_by_those_runs_alone(stage, tiny, cache, tmp_path, straight):
    seen = []
    train_step = Trainer.train_step

    def watching(self, *batch):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return train_step(self, *batch)

    with mock.patch.object(Trainer, "train_step", watching):
        for folder, flags in (("a", ["--deterministic"]), ("b", [])):
            stage(train_lift, *tiny(tmp_path / folder), "--cache_dir", cache, *RUN, "--epochs", 4, *flags)
            assert_same_run(tmp_path / folder, straight())
    assert seen == [True] * 12 + [False] * 12


def test_cuda_graphs_and_parts_exclude_each_other(trainer):
    with pytest.raises(ValueError, match=r"^--cuda_graphs and --accumulate exclude each other"):
        trainer().settings.but(cuda_graphs=True, accumulate=2, compile=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_batch_and_the_flags_that_help(refused, tiny, cache, tmp_path, straight, error):
    straight()
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--accumulate", 2]
    with mock.patch("training.objective.Denoising.losses", mock.Mock(side_effect=error)):
        message = run_stage(train_lift, *flags).message
    for part in ("out of memory", "batch of 4", "--accumulate 4", "--recompute", "--precision", "--hidden_dims"):
        assert part in message
    assert len(message.splitlines()) == 1


def test_other_errors_of_the_device_are_not_taken_for_a_lack_of_memory(tiny, cache, tmp_path, straight):
    straight()
    with mock.patch("training.objective.Denoising.losses", mock.Mock(side_effect=RuntimeError("illegal access"))):
        message = run_stage(train_lift, *tiny(tmp_path), "--cache_dir", cache).message
    assert message == "error: illegal access"


def test_a_dry_run_says_what_would_be_run_and_writes_nothing(stage, tiny, cache, tmp_path, straight):
    straight()
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--precision", "auto", "--device", "cpu", "--dry_run"]
    output = stage(train_lift, *flags).output
    assert not list(tmp_path.iterdir())
    parameters = sum(p.numel() for p in build_model(read_checkpoint(straight() / LAST)["config"]).parameters())
    for part in (f"{parameters:,} parameters", "3 steps per epoch", "lr = 0.005", "position: step 0 of 6"):
        assert part in output
    assert f"precision = {resolve_precision(CPU, 'auto')}\n" in output
    # A run that could not go on is refused before it is tried.
    refusal = run_stage(train_lift, *tiny(straight()), "--cache_dir", cache, *RUN, "--epochs", 8, "--dry_run")
    assert refusal.status == 1 and "exists already" in refusal.message


def test_saved_bytes_are_those_of_the_chain_rule():
    model = nn.Sequential(nn.Linear(10, 20), nn.SiLU(), nn.Linear(20, 5))
    x = torch.zeros(3, 10)
    # Each linear map needs its input for the gradient of its weights, and the SiLU its own.
    assert saved_bytes(model, lambda: model(x)) == 3 * (10 + 20 + 20) * 4
    assert saved_bytes(model, lambda: model[2](model[1](model[0](x))), [model[0]]) == 3 * (10 + 20 + 20) * 4
    blocks = [nn.Sequential(nn.Linear(20, width), nn.SiLU(), nn.Linear(width, 20)) for width in (40, 30)]
    deep = nn.Sequential(nn.Linear(10, 20), *blocks, nn.Linear(20, 5))
    # The inputs of the four, and inside the larger block those of the SiLU and of the second linear map.
    assert saved_bytes(deep, lambda: deep(x), blocks) == 3 * (10 + 20 + 20 + 20 + 40 + 40) * 4
    assert for_batch(lambda n: 7 + 5 * n, 64) == 7 + 5 * 64


def test_memory_of_a_run_is_that_of_its_parts(trainer):
    memory = training_memory(trainer())
    weights = sum(p.numel() for p in trainer().parameters) * 4
    expected = {"weights": weights, "gradients": weights, "AdamW": 2 * weights, "EMA": weights, "data set": 12 * 768}
    assert {name: memory[name] for name in expected} == expected
    assert training_memory(trainer("--ema_decay", 0))["EMA"] == 0
    # Half the images at a time keep half as much, and recomputing them less still.
    halved, less = (training_memory(trainer(*flags))["activations"] for flags in (["--accumulate", 2], ["--recompute"]))
    assert halved < 0.55 * memory["activations"] and less < 0.6 * memory["activations"]


def board(folder):
    """The scalars `{name: [(step, value)]}` and the names of images that TensorBoard shows of a run."""
    events = EventAccumulator(str(folder / LOG / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}, tags["images"]


def test_the_board_shows_what_the_log_says_and_the_loss_per_timestep(straight):
    scalars, images = board(straight())
    rows = read_log(straight())
    shown = {"loss_64": "fine loss", "loss_32": "coarse loss", "grad_norm": "grad_norm", "lr": "lr"}
    for name, tag in shown.items():
        assert [step for step, _ in scalars[tag]] == list(range(1, 13))
        assert [value for _, value in scalars[tag]] == pytest.approx([row[name] for row in rows], rel=1e-6)
    assert {"images_per_second", "memory_gib"} <= scalars.keys()
    assert {name.split("/")[0] for name in images} == {"samples_fine", "samples_coarse"}
    # Four images a step fall in a few of ten bins; weighted by how many they are, they give the mean again.
    bins = {name: values for name, values in scalars.items() if " by timestep/" in name}
    ranges = [f"{k * 100:03d}-{k * 100 + 99:03d}" for k in range(10)]
    labels = {f"{scale} loss by timestep/{ts}" for scale in ("fine", "coarse") for ts in ranges}
    assert bins.keys() <= labels and len(bins) > 12


def test_bins_are_means_over_the_images_whose_timestep_is_in_them(trainer):
    run = trainer("--batch_size", 12)
    batch = run.draw(*next(run.batches.epoch(0))[:2])
    with torch.no_grad():
        losses = run.objective.losses(run.model.denoise, batch)
    run_steps(run, 1)
    row, curves = run.row()
    expected = {}
    for name, tag, t in (("loss_64", "fine loss", batch.t_64), ("loss_32", "coarse loss", batch.t_32)):
        assert row[name] == pytest.approx(losses[name].mean().item(), rel=1e-6)
        for k in range(10):
            chosen = losses[name][(t >= 100 * k) & (t < 100 * (k + 1))]
            if len(chosen):
                expected[f"{tag} by timestep/{100 * k:03d}-{100 * k + 99:03d}"] = pytest.approx(
                    chosen.mean().item(), rel=1e-5
                )
    assert curves == expected


def test_weights_and_biases_gets_the_settings_and_one_run_for_all_its_parts(
    stage, tiny, cache, tmp_path, monkeypatch, straight
):
    wandb = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for epochs in (2, 4):
        resume = ["--resume", "auto"]
        stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", epochs, "--wandb", *resume)
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["sync_tensorboard"]
    assert first["config"]["lr"] == 0.005 and first["name"] == "lift_dual_timestep"
    assert wandb.init.return_value.finish.call_count == 2
    assert_same_run(tmp_path, straight())


@pytest.mark.parametrize("found", [None, types.ModuleType("wandb")], ids=["nothing", "a folder of its runs"])
def test_weights_and_biases_that_is_missing_is_named(refused, tiny, cache, tmp_path, monkeypatch, found):
    monkeypatch.setitem(sys.modules, "wandb", found)
    refused(train_lift, *tiny(tmp_path), "--cache_dir", cache, "--wandb", says=("--wandb needs the wandb package",))


@pytest.mark.parametrize(
    ("schedule", "prediction", "warned"),
    [("cosine", "epsilon", True), ("cosine", "v", False), ("cosine_clipped", "epsilon", False)],
)
def test_noise_that_is_predicted_where_nothing_is_left_of_the_image_is_pointed_out(
    trainer, schedule, prediction, warned
):
    run = trainer("--beta_schedule", schedule, "--prediction_type", prediction)
    text = describe(run, ImageSet(np.zeros((8, 3, 16, 16), np.uint8), "black", "f" * 16))
    assert ("has so little signal that a noise prediction says nothing" in text) == warned
