"""What a step draws, shows and minimises: pairs by a law, real times, importance, and runs that are trained so."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest, truncnorm
from scipy.stats import uniform as even
from torch import nn

import train_baseline
import train_lift
from checkpoint import MODEL_CLASSES, load_model, read_checkpoint, save_checkpoint
from conftest import LAST, assert_same
from data import coarse
from diffusion.sampler import sample_seeds
from model import ScaleModel
from paths.families import diagonal
from planning.regimes import TimestepPairs, pair_probabilities
from scheduler import PREDICTION_TYPES, DDIMScheduler
from training.objective import Denoising, TrainingBatch
from training.settings import TIMES, TrainingSettings

KINDS = [
    (name, prediction)
    for name in ("cosine", "cosine_zero_terminal", "sub_vp_linear", "ve", "flow")
    for prediction in PREDICTION_TYPES
    if prediction not in ("epsilon", "score") or name not in ("flow", "cosine_zero_terminal")
]
YES = torch.tensor(True)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# Pairs of timesteps, drawn by a law

COUNT = 100
SHORT = DDIMScheduler(COUNT, "linear")
POINTS = [[99, 99], [99, 60], [30, 55], [3, 0]]
REGIMES = [None, "independent", "same", "shift:2", "heuristic:0.8", "band:2", "band:image,1", "band:diagonal,0.05"]
REGIMES += ["path:x", "band:path:x,0.7"]


def regime(text):
    return {"t_pairs": text, "t_pairs_points": POINTS if "path" in (text or "") else None}


def by_hand(text, law):
    """The probability of every pair (t_64, t_32), leader by leader; law: how often each of the two clocks has a t."""
    name, _, parameter = (text or "independent").partition(":")
    if name == "independent":
        return np.outer(*law) / np.outer(*law).sum()
    table, snr, t = np.zeros((COUNT, COUNT)), SHORT.log_snr.numpy(), np.arange(COUNT)

    def near(distance, width=-1.0):
        inside = (distance <= width) | (t == distance.argmin())
        return inside / inside.sum()

    if "path" in text:
        for start, end in itertools.pairwise(POINTS):
            for share in (np.arange(1000) + 0.5) / 1000:
                i, j = np.round(np.array(start) + share * np.subtract(end, start)).astype(int)
                table[i] += law[0][i] * (near(np.abs(snr - snr[j]), 0.35) if name == "band" else t == j)
        return table / table.sum()
    for k in range(COUNT):
        if "," in parameter:
            path, width = parameter.split(",")
            target = min(snr[k] + {"image": math.log(4), "diagonal": 0}[path], snr[0])
            table[k] += law[0][k] * near(np.abs(snr - target), float(width) / 2)
            continue
        value = float(parameter or 0)
        if name == "same":
            fine = small = t == k
        elif name == "band":
            fine = small = near(np.abs(snr - snr[k]), value)
        elif name == "shift":
            fine, small = near(np.abs(snr - snr[k] - value)), near(np.abs(snr - snr[k] + value))
        else:
            fine, small = near(np.abs(t - value * k)), near(np.abs(t - k / value))
        table[k] += law[0][k] * fine
        table[:, k] += (law[0] if name == "same" else law[1])[k] * small
    return table / table.sum()


def assert_drawn_from(table, *indices):
    """Chi-square over cells that are likely enough, and over the rest of them together."""
    expected = table.flatten() * len(indices[0])
    found = np.bincount(np.ravel_multi_index(indices, table.shape), minlength=table.size)
    assert (table[indices] > 0).all()
    likely = expected > 5
    expected, found = (np.append(each[likely], each[~likely].sum()) for each in (expected, found))
    kept = expected > 5
    assert chisquare(found[kept], expected[kept] / expected[kept].sum() * found[kept].sum()).pvalue > 1e-4


@pytest.mark.parametrize("text", REGIMES)
def test_pairs_by_a_law_are_as_likely_as_counted_by_hand(text):
    t = torch.arange(COUNT) / COUNT
    law = torch.stack([(3 * t).exp(), 0.2 + (9 * t).sin().square()]).double()
    law = law / law.mean(1, keepdim=True)
    pairs = TimestepPairs(regime(text), SHORT)
    own = by_hand(text, np.ones((2, COUNT)))
    for densities_, table in ((law, by_hand(text, law.numpy())), (torch.ones(2, COUNT).double(), own)):
        t_64, t_32, ratio = (each.numpy() for each in pairs.draw_by(densities_, 200_000, rng(1)))
        assert t_64.dtype == t_32.dtype == np.int64 and ratio.dtype == np.float64
        if text is None:  # A model of one scale is not shown the other clock.
            assert_drawn_from(table.sum(1), t_64)
            np.testing.assert_allclose(ratio, (table.sum(1) / own.sum(1))[t_64], rtol=1e-9)
        else:
            assert_drawn_from(table, t_64, t_32)
            np.testing.assert_allclose(ratio, table[t_64, t_32] / own[t_64, t_32], rtol=1e-6)
    np.testing.assert_allclose(ratio, 1, rtol=1e-6)


@pytest.mark.parametrize("text", REGIMES)
def test_which_timesteps_lead(text):
    leads = TimestepPairs(regime(text), SHORT).leads.numpy()
    around = text is not None and ("path" in text or "," in text)
    fine = by_hand(text, np.stack([np.ones(COUNT), np.full(COUNT, 0.0 if around else 1.0)])).sum(1) > 0
    np.testing.assert_array_equal(leads, [fine, np.full(COUNT, not around)])
    assert fine.all() != (around and "path" in text)


# Real times


def drawn(scheduler, size=20_000, **config):
    x = torch.zeros(size, 1, 2, 2)
    return Denoising(regime(config.pop("t_pairs", "independent")) | config, scheduler).draw(x, coarse(x), rng(2))


@pytest.mark.parametrize("text", [None, "independent", "same", "band:2"])
def test_real_times_are_even_over_all_of_the_process(text):
    process = DDIMScheduler(10, "ve")  # Where whole numbers, or one timestep too many, would be seen.
    batch = drawn(process, t_pairs=text, times="real")
    for t in (batch.t_64, batch.t_32):
        assert t.dtype == torch.float64 and t.min() >= 0 and 8.99 < t.max() <= 9
        # The band is even in its own way, but within each timestep.
        assert text == "band:2" or kstest(t, even(0, 9).cdf).pvalue > 1e-4
        assert kstest(t * 10 / 9 % 1, even.cdf).pvalue > 1e-4
    assert torch.equal(batch.t_64, batch.t_32) == (text == "same")
    whole = drawn(process, t_pairs=text)
    assert whole.t_64.dtype == whole.t_32.dtype == torch.int64 and whole.share is None


@pytest.mark.parametrize("text", ["independent", "same"])
def test_times_of_a_law_have_its_distribution(text):
    low, high = math.log(0.02), math.log(100)
    law = truncnorm((low + 1) / 2, (high + 1) / 2, -1, 2)
    options = {"t_pairs": text, "t_law": "log_normal:-1,2"}
    real, whole = (drawn(DDIMScheduler(beta_schedule="ve"), times=times, **options) for times in ("real", "whole"))
    for clock in ("t_64", "t_32"):
        t = getattr(real, clock).numpy()
        assert kstest(low + t / 999 * (high - low), law.cdf).pvalue > 1e-4
        assert kstest(t * 1000 / 999 % 1, even.cdf).pvalue > 1e-4
        shares = np.diff(law.cdf(np.linspace(low, high, 1001)))
        assert_drawn_from(shares, getattr(whole, clock).numpy())
    # Both clocks of a law have their own random numbers.
    assert torch.equal(real.t_64, real.t_32) == (text == "same")
    assert abs(np.corrcoef(real.t_64, real.t_32)[0, 1] - (text == "same")) < 0.04
    # What is drawn by a fixed law counts as it is drawn.
    assert real.share is None and whole.share is None


# Losses


@pytest.mark.parametrize("times", [torch.int64, torch.float64])
def test_each_scale_is_weighed_at_its_own_clock_and_each_image_by_its_share(times):
    t_64, t_32 = torch.tensor([[100, 200, 700, 990], [50, 600, 998, 1]]).to(times)
    share, values = torch.tensor([1, 0.5, 2, 0.1]).double(), torch.rand(2, 4, generator=rng(4))
    batch = TrainingBatch(*torch.zeros(4, 4, 1, 1, 1), t_64, t_32, share)
    options = {"timestep_weights": "likelihood", "loss_weights": [0.5, 3]}
    objective = Denoising(
        regime("independent") | options, DDIMScheduler(beta_schedule="flow", prediction_type="velocity")
    )
    # With the velocity 1 / tau^2 for each error of the clean image, -dSNR/dtau is 2 (1 - tau) / tau^3.
    expected = [values[k] * share * 2 * (999 - t) / t for k, t in enumerate((t_64, t_32))]
    found = objective.minimised({"loss_64": values[0], "loss_32": values[1]}, batch)
    assert found.item() == pytest.approx((0.5 * expected[0].mean() + 3 * expected[1].mean()).item(), rel=1e-5)


@pytest.mark.parametrize("name, prediction_type", KINDS)
def test_losses_of_real_times_are_those_of_whole_ones_where_they_meet(name, prediction_type):
    process = DDIMScheduler(beta_schedule=name, prediction_type=prediction_type)
    clocks = torch.tensor([[0, 1, 400, 998, 999], [999, 998, 3, 1, 0]])
    scales = [torch.randn(2, 5, 2, side, side, dtype=torch.float64, generator=rng(5)) for side in (4, 2)]
    clean, noise = zip(*scales, strict=True)
    found = []
    for t_64, t_32 in (clocks, clocks.double()):
        objective = Denoising(regime("independent") | {"timestep_weights": "likelihood"}, process)
        batch = TrainingBatch(*clean, *noise, t_64, t_32)
        losses = objective.losses(lambda zs, ts: tuple(z.tanh() for z in zs), batch)
        found.append([*losses.values(), objective.minimised(losses, batch)])
    for whole, real in zip(*found, strict=True):
        assert whole.isfinite().all()
        torch.testing.assert_close(whole, real, rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", [None, "independent", "band:2", "band:image,1", "path:x"])
def test_what_importance_minimises_is_what_even_draws_do(text):
    process = DDIMScheduler(beta_schedule="linear")
    config = regime(text) | {"t_law": "importance", "loss_weights": [1.0] if text is None else [1.0, 0.5]}
    objective, generator = Denoising(config, process), rng(6)
    t = torch.arange(1000)
    fine, small = (0.02 + (-t / 60).exp()).double(), (0.05 + (t / 999) ** 4).double()

    def step(size):
        x = torch.zeros(size, 1, 2, 2)
        batch = objective.draw(x, coarse(x), generator)
        return batch, {"loss_64": fine[batch.t_64]} | ({} if text is None else {"loss_32": small[batch.t_32]})

    for _ in range(20):
        batch, losses = step(10_000)
        objective.observe(losses, batch, YES, torch.clone)
    batch, losses = step(200_000)
    assert batch.share.std() > 0.2  # It is at work.
    if text is None:
        p, loss = torch.full((1000, 1), 1e-3).double(), fine[:, None]
    else:
        p, loss = pair_probabilities(config, process.log_snr), fine[:, None] + 0.5 * small
    expected = (p * loss).sum()
    by_image = batch.share * (losses["loss_64"] + 0.5 * losses.get("loss_32", 0))
    found = objective.minimised(losses, batch)
    assert found.item() == pytest.approx(by_image.mean().item(), rel=1e-9)
    assert abs(found - expected) < 4.5 * by_image.std() / len(by_image) ** 0.5
    if text is None:  # In proportion to the loss, all images count nearly alike, which even draws do not.
        assert by_image.std() < 0.1 * ((p * loss**2).sum() - expected**2).sqrt()


def test_importance_learns_of_what_is_minimised_by_scale_and_timestep():
    config = regime("independent") | {"t_law": "importance", "timestep_weights": "likelihood", "loss_weights": [2, 0.5]}
    objective = Denoising(config, DDIMScheduler(beta_schedule="flow", prediction_type="velocity"))
    t_64, t_32 = torch.tensor([[100, 333], [700, 5]])
    share = torch.tensor([0.3, 9]).double()  # By which what an image adds is not yet divided.
    batch = TrainingBatch(*torch.zeros(4, 2, 1, 1, 1), t_64, t_32, share)
    losses = {"loss_64": torch.tensor([3.0, 1.0]), "loss_32": torch.tensor([0.5, 7.0])}
    objective.observe(losses, batch, YES, torch.clone)
    adds = sum(w * x * 2 * (999 - t) / t for w, x, t in zip((2, 0.5), losses.values(), (t_64, t_32), strict=True))
    for clock, t in enumerate((t_64, t_32)):
        torch.testing.assert_close(objective.state["squares"][clock, t // 10], adds.double() ** 2, rtol=1e-6, atol=0)
        assert objective.state["seen"][clock].sum() == 2


# Runs

REAL = ("--times", "real", "--timestep_weights", "likelihood", "--prediction_type", "v")


@pytest.fixture
def eager():
    """Importance that tiny runs live to see."""
    with mock.patch.multiple("training.timesteps", BINS=2, FEWEST=2):
        yield


def resume_file(folder):
    content = read_checkpoint(next(folder.rglob("*_last.pth")))
    return content | {"execution": {}, "settings": {}}  # How it was come by.


@pytest.mark.parametrize("flags", [(), REAL])
@pytest.mark.parametrize("script", [train_baseline, train_lift])
def test_a_stopped_run_of_importance_ends_as_one_in_one_go(stage, tiny, cache, tmp_path, eager, script, flags):
    flags = ["--cache_dir", cache, "--t_law", "importance", "--lr", 0.003, *flags]
    stage(script, *tiny(tmp_path / "whole"), *flags)
    stage(script, *tiny(tmp_path / "parts"), *flags, "--epochs", 1)
    half = resume_file(tmp_path / "parts")["objective_state"]
    assert half["seen"].sum(1).tolist() == [12, 12] and (half["squares"] > 0).all()
    stage(script, *tiny(tmp_path / "parts"), *flags, "--resume")
    whole, parts = resume_file(tmp_path / "whole"), resume_file(tmp_path / "parts")
    assert_same(parts, whole)
    assert whole["objective_state"]["seen"].sum(1).tolist() == [24, 24]
    # The second half would have been another one without what the first one learnt.
    assert any(not torch.equal(half[name], whole["objective_state"][name]) for name in half)


def test_a_step_in_parts_draws_and_learns_the_same(trainer, eager):
    flags = ("--t_law", "importance", *REAL)
    runs = trainer(*flags), trainer(*flags, "--accumulate", 2)
    shares = []
    for _ in range(4):
        whole, parts = (run.draw(*next(run.batches.epoch(0))[:2]) for run in runs)
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        shares.append(whole.share)
        one, other = (run.train_step(*next(run.batches.epoch(0))[:2]) for run in runs)
        assert one["grad_norm"].item() == pytest.approx(other["grad_norm"].item(), rel=1e-4)
    assert (shares[0] == 1).all() and shares[-1].std() > 0.01
    for one, other in zip(*(run.objective.state.values() for run in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def test_checkpoints_say_what_a_run_drew_and_resume_by_that_alone(stage, refused, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *REAL]
    stage(train_lift, *flags, "--t_law", "log_normal", "--epochs", 1)
    config = load_model(tmp_path / "checkpoints/lift_dual_timestep_1ep.pth").config
    said = {"t_law": "log_normal:-1.2,1.2", "times": "real", "timestep_weights": "likelihood", "min_snr_gamma": None}
    assert {name: config[name] for name in said} == said
    kept = (cache,)
    says = ("t_law = log_normal:-1.2,1.2, not logit_normal:0,1;",)
    refused(train_lift, *flags, "--t_law", "logit_normal", "--resume", says=says, keeps=kept)
    for flag, value, name in (("--times", "whole", "times"), ("--timestep_weights", "edm", "timestep_weights")):
        more = [flag, value, "--t_law", "log_normal", "--resume"]
        refused(train_lift, *flags, *more, says=(f"{name} = {said[name]}, not {value};",), keeps=kept)
    stage(train_lift, *flags, "--t_law", "log_normal:-1.20,1.2", "--resume")


def test_a_run_from_before_there_was_a_choice_goes_on_as_it_was(stage, refused, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache]
    stage(train_lift, *tiny(tmp_path / "whole"), "--cache_dir", cache)
    stage(train_lift, *flags, "--epochs", 1)
    content = read_checkpoint(tmp_path / LAST)
    assert content.pop("objective_state") is None
    for name in ("t_law", "times", "timestep_weights"):
        assert content["config"].pop(name) == {"t_law": "uniform", "times": "whole"}.get(name, "published")
        del content["settings"][name]
    save_checkpoint(tmp_path / LAST, content)
    refused(train_lift, *flags, "--resume", "--times", "real", says=("times = whole, not real;",))
    refused(train_lift, *flags, "--resume", "--t_law", "importance", says=("t_law = uniform, not importance;",))
    stage(train_lift, *flags, "--resume")
    assert_same(*(read_checkpoint(place / LAST)["model_state"] for place in (tmp_path, tmp_path / "whole")))


def test_min_snr_is_a_weight_of_timesteps_and_takes_the_place_of_that_of_a_preset(refused, trainer, tiny, tmp_path):
    flags = [*tiny(tmp_path), "--min_snr_gamma", 5, "--timestep_weights", "edm"]
    refused(train_lift, *flags, says=("--min_snr_gamma and --timestep_weights exclude each other",), status=2)
    run = trainer("--preset", "ve", "--min_snr_gamma", 5)
    assert (run.config["timestep_weights"], run.config["min_snr_gamma"], run.config["times"]) == (
        "published",
        5,
        "real",
    )
    assert TrainingSettings(**{name: run.config[name] for name in run.settings.recorded()}).min_snr_gamma == 5
    assert run.settings.but(min_snr_gamma=None).timestep_weights == "sigma2"
    batch = TrainingBatch(*torch.zeros(4, 2, 1, 1, 1), *torch.tensor([[0.5, 900.25], [900.25, 0.5]]).double())
    # SNR is 1 / sigma^2, of which an error of the noise counts all, and a clean image at most 5.
    snr = 2500 * 5000 ** (-2 * batch.t_64 / 999)
    expected = (snr.clamp(max=5) / snr).mean().item()  # Of each scale, whose weights add up to 1.
    assert run.objective.minimised({"loss_64": torch.ones(2), "loss_32": torch.ones(2)}, batch).item() == pytest.approx(
        expected, rel=1e-5
    )
    assert run.train_step(*next(run.batches.epoch(0))[:2])["grad_norm"].isfinite()


# Models


@pytest.mark.parametrize("model_type", MODEL_CLASSES)
def test_a_model_denoises_the_same_whatever_is_called_in_its_place(model_type):
    torch.manual_seed(0)
    model = MODEL_CLASSES[model_type]((8, 16))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.5, 700.0])
    xs, ts = (x, coarse(x)), (t, t)
    called = []

    def network(*inputs):
        called.append(len(inputs))
        return model(*inputs)

    own = model.denoise(xs, ts)
    assert isinstance(own, tuple) and len(own) == model.num_predictions
    assert [each.shape for each in own] == [each.shape for each in xs[: model.num_predictions]]
    assert_same(model.denoise(xs, ts, network=network), own)
    assert called == [{"baseline": 2, "dual": 4, "shared_t": 3, "single_t": 3, "no_t": 2, "cascade": 4}[model_type]]
    apart = (t, t + 50)
    if model_type == "shared_t":
        with pytest.raises(ValueError, match="one shared timestep can only follow a diagonal path"):
            model.denoise(xs, apart)
    else:
        assert torch.equal(model.denoise(xs, apart)[0], own[0]) == (model_type not in ("dual", "cascade"))
    model.denoise(xs, apart, network=network)  # Training does not wait to compare.


class OneConvolution(ScaleModel):
    """The least that trains: both scales and both clocks into one layer."""

    description = "a convolution"

    def __init__(self, hidden_dims, channels=3, representation="overcomplete", network="unet"):
        super().__init__()
        self.unet = nn.Sequential(nn.Conv2d(2 * channels + 2, 2 * channels, 3, padding=1))
        self.unet.stride, self.unet.stride_reason = 2, "for the means."  # Which the trainer asks for.

    def inputs(self, xs, ts):
        return xs[0], nn.functional.interpolate(xs[1], scale_factor=2), torch.stack(ts, 1).float() / 999

    def forward(self, x_64, x_up, t):
        fine, small = self.unet(torch.cat([x_64, x_up, t[..., None, None].expand(-1, -1, *x_64.shape[-2:])], 1)).chunk(
            2, 1
        )
        return fine, coarse(small)


@pytest.mark.parametrize("times", TIMES)
def test_a_new_class_of_models_trains_and_is_sampled(stage, tiny, cache, tmp_path, times):
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--times", times, "--lr", 0.02, "--epochs", 12]
    with mock.patch.dict(MODEL_CLASSES, dual=OneConvolution):
        stage(train_lift, *flags)
        loaded = load_model(tmp_path / "checkpoints/lift_dual_timestep_12ep.pth")
    assert isinstance(loaded.model, OneConvolution)
    x = torch.randn(64, 3, 16, 16, generator=rng(7))
    noise = (x, torch.randn(64, 3, 8, 8, generator=rng(8)))
    t = torch.full((64,), 999)
    # At the noisiest timestep, what is seen is the noise; nothing learnt would be an error of about 1.
    for predicted, target in zip(loaded.denoise(noise, (t, t)), noise, strict=True):
        assert (predicted - target).square().mean() < 0.6
    arguments = (
        loaded.denoise,
        loaded.scheduler,
        diagonal(4),
        range(2),
        [(3, 16, 16), (3, 8, 8)],
        2,
        torch.device("cpu"),
    )
    [(_, samples)] = sample_seeds(*arguments)
    assert samples.nfe == 4 and all(images.isfinite().all() for images in samples.images)
