"""The bound as an objective: its terms by second computations, the variances that it finds, runs that learn them."""

import itertools
import math
import re
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import compute_heatmap_30
import evaluate_likelihood
import export
import generate_with_path_30
import train_baseline
import train_lift
from checkpoint import load_model, read_checkpoint
from conftest import HARDWARE, STEPS, assert_same
from data import coarse
from diffusion import elbo as bound_module
from diffusion.elbo import ddpm_chain, elbo
from diffusion.likelihood import GREY_LEVEL
from diffusion.solvers import SOLVERS
from images.representation import REPRESENTATIONS
from paths.families import diagonal
from scheduler import DDIMScheduler
from training.objective import TrainingBatch
from training.objectives import OBJECTIVES
from training.settings import TrainingSettings
from training.variational import Hybrid, StepTables, Variational

S = 0.5
YES = torch.tensor(True)
BITS = 1 / math.log(2)
PAIRS = {"t_pairs": "independent", "t_pairs_points": None, "loss_weights": [0.8, 0.2]}
SINGLE = {"t_pairs": None, "t_pairs_points": None, "loss_weights": [1.0]}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def make(prediction="epsilon", count=1000, representation="overcomplete", schedule="linear"):
    return DDIMScheduler(count, schedule, prediction, clip_sample=False, representation=representation)


class Chain:
    """Of the linear schedule, by its betas alone, as in arXiv 2006.11239; index t is the step from timestep t."""

    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    before = np.append(1, abar[:-1])
    tilde = betas * (1 - before) / (1 - abar)
    clipped = np.append(tilde[1], tilde[1:])  # As the code of arXiv 2102.09672 has it.
    # Of x0 in the mean of a true step, and of x_t.
    weights = np.stack([before**0.5 * betas, (1 - betas) ** 0.5 * (1 - before)]) / (1 - abar)
    # Of numbers N(0, S^2): the variance of x_(t-1) given x_t, and the v that it has.
    given = S**2 * (1 - abar) / (abar * S**2 + 1 - abar)
    best = tilde + weights[0] ** 2 * given
    shares = np.log(best / clipped) / np.log(betas / clipped)


def test_tables_are_those_of_the_chain_by_its_betas():
    tables = StepTables(make("x0"))
    np.testing.assert_allclose(tables.spans.numpy(), np.log(Chain.betas / Chain.clipped), rtol=1e-8, atol=1e-12)
    assert tables.smallest_of_last.item() == pytest.approx(Chain.tilde[1], rel=1e-9)
    # A squared error of the clean image counts the square of its weight in the mean, by the variance.
    np.testing.assert_allclose(
        tables.gains[1:].numpy(), Chain.weights[0, 1:] ** 2 / Chain.tilde[1:], rtol=1e-7, atol=1e-12
    )
    assert tables.gains[0] == 0


def one_scale(x, noise, t):
    """A batch of the fine scale; the other one is not looked at."""
    return TrainingBatch(x, coarse(x), noise, coarse(noise), t, t)


def answers(*outputs):
    return lambda zs, ts: outputs


def joined(prediction, v):
    """What a network returns for a prediction and a share v in [0, 1]."""
    return torch.cat([prediction, 2 * v - 1], dim=1)


# What is minimised


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_descent_on_the_bound_finds_the_variance_of_the_true_chain(prediction):
    """For numbers N(0, S^2) and the exact mean; data and noise have their second moments exactly."""
    assert ((Chain.shares > 0) & (Chain.shares < 1)).all()
    scheduler = make(prediction)
    t = torch.tensor([1, 2, 20, 200, 500, 800])
    pattern = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64).expand(len(t), 1, 2, 2)
    x, noise = S * pattern, pattern.transpose(-1, -2)
    z = scheduler.add_noise(x, noise, t)
    alpha, sigma = scheduler.scales(t, x)
    x0 = alpha * S**2 / (alpha**2 * S**2 + sigma**2) * z
    exact = scheduler.target(x0, scheduler.epsilon_of(x0, t, z), t)
    objective, batch = Variational(SINGLE, scheduler), one_scale(x, noise, t)
    v = torch.full((len(t),), 0.5, dtype=torch.float64, requires_grad=True)
    for _ in range(20):  # Newton's method.
        outputs = joined(exact, v[:, None, None, None].expand_as(x))
        [slope] = torch.autograd.grad(objective.losses(answers(outputs), batch)["vlb_64"].sum(), v, create_graph=True)
        [bend] = torch.autograd.grad(slope.sum(), v)
        v = (v - slope / bend).detach().requires_grad_()
    np.testing.assert_allclose(v.detach().numpy(), Chain.shares[t], rtol=0, atol=1e-6)


def random_step(scheduler, t, num_scales, seed=3):
    """A batch of random images at timesteps `[scales, B]`, and random outputs of a network, as leaves."""
    generator = rng(seed)
    images = torch.rand(t.shape[1], 2, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    scales = scheduler.representation.split(images)
    noise = scheduler.representation.project(
        tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in scales)
    )
    predictions = scheduler.representation.project(
        tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in scales)
    )
    said = tuple(torch.rand(x.shape, generator=generator, dtype=torch.float64) * 3 - 1.5 for x in scales)
    outputs = tuple(
        torch.cat(pair, 1).requires_grad_() for pair in list(zip(predictions, said, strict=True))[:num_scales]
    )
    return TrainingBatch(*scales, *noise, *t), outputs


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_terms_are_divergences_of_gaussians(representation, prediction):
    """By `torch.distributions`; of the residual by dense Gaussians in the three dimensions of a block."""
    scheduler = make(prediction, representation=representation)
    t = torch.tensor([[1, 30, 999], [700, 1, 45]])
    batch, outputs = random_step(scheduler, t, 2)
    losses = Variational(PAIRS, scheduler).losses(answers(*outputs), batch)
    for scale, (output, (x, noise, t)) in enumerate(zip(outputs, batch.scales, strict=True)):
        prediction, said = output.detach().chunk(2, 1)
        z = scheduler.add_noise(x, noise, t)
        of_x0, of_z, tilde, beta = (
            torch.from_numpy(each)[t][:, None, None, None] for each in (*Chain.weights, Chain.tilde, Chain.betas)
        )
        means = [of_x0 * clean + of_z * z for clean in (x, scheduler.predict_x0(prediction, t, z))]
        v = (said + 1) / 2
        if representation == "residual" and scale == 0:
            v = coarse(v)
            variance = (v * beta.log() + (1 - v) * tilde.log()).exp()
            basis = torch.linalg.svd(torch.eye(4) - 0.25)[0][:, :3].double()
            blocks = [
                torch.nn.functional.pixel_unshuffle(each, 2).unflatten(1, (-1, 4)).movedim(2, -1) @ basis
                for each in means
            ]  # [B, C, H/2, W/2, 3]
            eye = torch.eye(3, dtype=torch.float64)
            laws = [
                MultivariateNormal(mean, each.expand(v.shape)[..., None, None] * eye)
                for mean, each in zip(blocks, (tilde, variance), strict=True)
            ]
            expected = kl_divergence(*laws).flatten(1).mean(1) / 3
        else:
            variance = (v * beta.log() + (1 - v) * tilde.log()).exp()
            laws = [Normal(mean, each.sqrt()) for mean, each in zip(means, (tilde, variance), strict=True)]
            expected = kl_divergence(*laws).flatten(1).mean(1)
        found = losses[("vlb_64", "vlb_32")[scale]]
        torch.testing.assert_close(found, 1000 * BITS * expected, rtol=1e-7, atol=1e-9)


def test_the_last_term_is_the_probability_of_grey_levels():
    scheduler = make("v")
    pixels = torch.randint(0, 256, (2, 2, 4, 4), generator=rng())
    pixels[0, 0, 0] = torch.tensor([0, 255, 0, 255])
    x, noise = (pixels / 127.5 - 1).double(), torch.randn(2, 2, 4, 4, generator=rng(1)).double()
    t = torch.tensor([0, 0])
    z = scheduler.add_noise(x, noise, t)
    x0 = x + 0.01 * torch.randn(x.shape, generator=rng(2)).double()
    v = torch.rand(x.shape, generator=rng(3)).double()
    output = joined(scheduler.target(x0, scheduler.epsilon_of(x0, t, z), t), v).requires_grad_()
    found = Variational(SINGLE, scheduler).losses(answers(output), one_scale(x, noise, t))["vlb_64"]
    deviation = np.exp((v * np.log(Chain.betas[0]) + (1 - v) * np.log(Chain.tilde[1])).numpy() / 2)
    high = np.where(pixels == 255, 1, norm.cdf((x + GREY_LEVEL / 2 - x0).numpy() / deviation))
    low = np.where(pixels == 0, 0, norm.cdf((x - GREY_LEVEL / 2 - x0).numpy() / deviation))
    expected = -np.log(high - low).mean((1, 2, 3)) * 1000 * BITS
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9)
    found.sum().backward()
    assert output.grad.isfinite().all() and (output.grad != 0).all()


class Same:
    """The noise of every call and image is one."""

    def __init__(self, seeds):
        self.count = len(seeds)

    def draw(self, shape, device):
        return torch.randn(shape, generator=rng(sum(shape))).expand(self.count, *shape)


def rough(zs, ts):
    """A network of 2C outputs whose predictions and variances depend on all that it is shown."""
    found = []
    for z, t in zip(zs, ts, strict=False):
        mixed = zs[0].flatten(1).mean(1) + zs[-1].flatten(1).square().mean(1) + t / 7
        found.append(torch.cat([torch.tanh(z - z.flip(-1) / 2), torch.cos(3 * z + mixed[:, None, None, None])], 1))
    return tuple(found)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("representation, bytes_", [(None, True), (None, False), ("residual", False)])
def test_the_mean_over_timesteps_is_the_bound_of_evaluate_likelihood(monkeypatch, representation, bytes_, prediction):
    """In bits per dimension, all but the prior: one estimate of L_vlb in training and in the table."""
    monkeypatch.setattr(bound_module, "SeededNoise", Same)
    count, shape = 12, (2, 4, 4)
    scheduler = make(prediction, count, representation or "overcomplete", "cosine_clipped")

    def denoise(zs, ts):
        said, v = zip(*(each.chunk(2, 1) for each in rough(zs[: path.num_scales], ts)), strict=True)
        said = scheduler.representation.project(said)  # As models do.
        return tuple(torch.cat(pair, 1) for pair in zip(said, v, strict=True))

    pixels = torch.randint(0, 256, (1, *shape), generator=rng(5), dtype=torch.uint8)
    x = pixels.double() / 127.5 - 1
    path = diagonal(count - 1, num_scales=2 if representation else 1, num_train_timesteps=count)
    found = elbo(denoise, scheduler, ddpm_chain(scheduler, path, "learned"), pixels if bytes_ else x)

    scales = scheduler.representation.split(x.expand(count, -1, -1, -1))
    noise = scheduler.representation.project(tuple(Same(range(count)).draw(s.shape[1:], None).double() for s in scales))
    t = torch.arange(count)
    objective = Variational(PAIRS if representation else SINGLE, scheduler)
    losses = objective.losses(denoise, TrainingBatch(*scales, *noise, t, t))
    weights = (0.75, 0.25) if representation else (1,)
    bits = sum(w * losses[name].mean() for w, name in zip(weights, ("vlb_64", "vlb_32"), strict=False)).item()
    expected = (found.steps + found.last).item() * BITS / x.numel()
    if representation:  # Densities, times the width of a grey level; that of one scale is of grey levels.
        expected -= math.log2(GREY_LEVEL)
    if representation or bytes_:
        assert bits == pytest.approx(expected, rel=1e-5 if bytes_ else 1e-9)
    else:
        own = losses["vlb_64"][1:].sum().item() / count
        assert own == pytest.approx(found.steps.item() * BITS / x.numel(), rel=1e-9)


def gradients(objective, batch, outputs, minimised=None):
    losses = objective.losses(answers(*outputs), batch)
    total = objective.minimised(losses, batch) if minimised is None else minimised(losses)
    return [g.chunk(2, 1) for g in torch.autograd.grad(total, outputs, materialize_grads=True)]


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("share", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_the_bound_of_the_hybrid_is_for_the_variances_alone(share, representation):
    scheduler, t = make("v", representation=representation), torch.tensor([[0, 30, 999], [700, 0, 45]])
    config = PAIRS | {"vlb_weight": 0.003, "timestep_weights": "sigma2"}
    batch, outputs = random_step(scheduler, t, 2)
    batch = batch._replace(share=share)
    plain, hybrid, bound = (OBJECTIVES[name](config, scheduler) for name in ("denoising", "hybrid", "vlb"))

    def simple(losses):
        return plain.minimised({name: losses[name] for name in ("loss_64", "loss_32")}, batch)

    means = [mean for mean, _ in gradients(hybrid, batch, outputs, simple)]
    rest = gradients(bound, batch, outputs)
    found = gradients(hybrid, batch, outputs)
    for (mean, v), simple_mean, (bound_mean, bound_v) in zip(found, means, rest, strict=True):
        torch.testing.assert_close(mean, simple_mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(v, 0.003 * bound_v, rtol=1e-6, atol=0)
        assert (v != 0).any() and (bound_mean != 0).any() and mean.abs().sum() > 0
    # What is shown of images and what is in the log is the same in all three.
    losses = [o.losses(answers(*outputs), batch) for o in (hybrid, bound)]
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name])
    assert list(losses[0]) == ["loss_64", "loss_32", "vlb_64", "vlb_32"]


def test_a_network_without_variances_is_refused():
    scheduler = make()
    batch, outputs = random_step(scheduler, torch.tensor([[3], [4]]), 2)
    with pytest.raises(ValueError, match="has not learnt the variance of its steps"):
        Hybrid(PAIRS, scheduler).losses(answers(*(o[:, :2] for o in outputs)), batch)


# Importance


@pytest.mark.parametrize("name", ["hybrid", "vlb"])
def test_importance_is_of_the_bound_and_leaves_what_is_minimised(name):
    scheduler = make()
    objective = OBJECTIVES[name](SINGLE | {"t_law": "importance", "vlb_weight": 0.01}, scheduler)
    t, generator = torch.arange(1000), rng(6)
    error, bound = (0.05 + (t / 999) ** 4).double(), 20 * (0.02 + (-t / 60).exp()).double()

    def step(size):
        x = torch.zeros(size, 1, 2, 2)
        batch = objective.draw(x, coarse(x), generator)
        return batch, {"loss_64": error[batch.t_64], "vlb_64": bound[batch.t_64]}

    for _ in range(20):
        batch, losses = step(10_000)
        objective.observe(losses, batch, YES, torch.clone)
    batch, losses = step(200_000)
    # Drawn as often as the bound is large, which the errors are not.
    drawn = torch.bincount(batch.t_64 // 100, minlength=10) / len(batch.t_64)
    expected = bound.view(10, 100).sum(1) / bound.sum()
    np.testing.assert_allclose(drawn, 0.99 * expected + 0.001, atol=0.01)
    expected = (0.01 * bound + error).mean() if name == "hybrid" else bound.mean()
    by_image = (0.01 * losses["vlb_64"] + losses["loss_64"] if name == "hybrid" else losses["vlb_64"]) * batch.share
    found = objective.minimised(losses, batch)
    assert found.item() == pytest.approx(by_image.mean().item(), rel=1e-9)
    assert abs(found - expected) < 4.5 * by_image.std() / len(by_image) ** 0.5


def test_importance_learns_of_both_scales_as_they_are_weighed():
    objective = Hybrid(PAIRS | {"t_law": "importance"}, make())
    t_64, t_32 = torch.tensor([[100, 333], [700, 5]])
    batch = TrainingBatch(*torch.zeros(4, 2, 1, 1, 1), t_64, t_32, torch.tensor([0.3, 9]).double())
    bounds = {"vlb_64": torch.tensor([3.0, 1.0]), "vlb_32": torch.tensor([0.5, 7.0])}
    objective.observe({"loss_64": torch.full((2,), 1e6), "loss_32": torch.ones(2)} | bounds, batch, YES, torch.clone)
    adds = 0.8 * bounds["vlb_64"] + 0.2 * bounds["vlb_32"]
    for clock, t in enumerate((t_64, t_32)):
        torch.testing.assert_close(objective.state["squares"][clock, t // 10], adds.double() ** 2, rtol=1e-6, atol=0)


@pytest.fixture
def eager():
    """Importance that tiny runs live to see."""
    with mock.patch.multiple("training.timesteps", BINS=2, FEWEST=2):
        yield


@pytest.mark.parametrize("script", [train_baseline, train_lift])
def test_a_stopped_run_ends_as_one_in_one_go(stage, tiny, cache, tmp_path, eager, script):
    flags = ["--cache_dir", cache, "--objective", "hybrid", "--t_law", "importance", "--lr", 0.003]
    stage(script, *tiny(tmp_path / "whole"), *flags)
    stage(script, *tiny(tmp_path / "parts"), *flags, "--epochs", 1)
    stage(script, *tiny(tmp_path / "parts"), *flags, "--resume")
    contents = [
        read_checkpoint(next((tmp_path / name).rglob("*_last.pth"))) | {"execution": {}, "settings": {}}
        for name in ("whole", "parts")
    ]
    assert_same(*contents)
    assert contents[0]["objective_state"]["seen"].sum(1).tolist() == [24, 24]
    assert contents[0]["config"]["learned_variance"] is True and contents[0]["config"]["vlb_weight"] == 0.001


# Settings


@pytest.mark.parametrize("name", ["hybrid", "vlb"])
@pytest.mark.parametrize(
    "flags", [{"process": "sub_vp"}, {"process": "ve"}, {"process": "flow", "prediction_type": "v"}]
)
def test_only_the_chain_of_ddpm_has_the_bound(name, flags):
    with pytest.raises(ValueError, match=f"--objective {name} is the bound of the chain of DDPM.*--process vp"):
        TrainingSettings(model_type="dual", objective=name, **flags)
    with pytest.raises(ValueError, match="at whole timesteps"):
        TrainingSettings(model_type="dual", objective=name, times="real")
    with pytest.raises(ValueError, match="--t_law log_normal:-1.2,1.2 would change it; choose uniform or importance"):
        TrainingSettings(model_type="dual", objective=name, t_law="log_normal")


def test_settings_that_make_no_sense_are_refused():
    for more in ({}, {"objective": "vlb"}):
        with pytest.raises(ValueError, match="--vlb_weight belongs to --objective hybrid"):
            TrainingSettings(model_type="dual", vlb_weight=0.1, **more)
    for more in ({"timestep_weights": "sigma2"}, {"min_snr_gamma": 5.0}):
        with pytest.raises(ValueError, match="--objective vlb says itself what errors count"):
            TrainingSettings(model_type="dual", objective="vlb", **more)
    preset = TrainingSettings(model_type="dual", preset="iddpm")
    said = preset.objective, preset.vlb_weight, preset.prediction_type, preset.beta_schedule, preset.times
    assert said == ("hybrid", 0.001, "epsilon", "cosine", "whole")
    assert preset.but(objective="vlb").vlb_weight is None
    assert TrainingSettings(model_type="dual").objective == "denoising"


# Runs


def test_a_run_learns_variances_and_says_so_in_its_log(trainer):
    run = trainer("--objective", "hybrid", "--lr", 0.003)
    assert run.model.learned_variance and run.config["objective"] == "hybrid"
    values = run.train_step(*next(run.batches.epoch(0)))
    assert list(values) == ["loss_64", "loss_32", "vlb_64", "vlb_32", "grad_norm"]
    assert all(value.isfinite() for value in values.values())
    row, curves = run.row()
    assert {"vlb_64", "vlb_32"} <= row.keys() and any("fine bound, bits per dimension by timestep" in c for c in curves)
    plain = trainer("--lr", 0.003)
    assert "learned_variance" not in plain.config and not plain.model.learned_variance


def test_the_bound_falls(trainer):
    """Its variances alone, at what a fresh network predicts, of which nothing else is learnt here."""
    run = trainer("--objective", "vlb", "--lr", 0.01, "--prediction_type", "v")
    batch = run.draw(*next(run.batches.epoch(0)))
    batch = batch._replace(t_64=torch.tensor([5, 100, 300, 600]), t_32=torch.tensor([600, 300, 100, 5]))

    def bound():
        return run.objective.minimised(run.objective.losses(run.model.denoise, batch), batch)

    before = bound().item()
    optimizer = torch.optim.Adam(run.model.parameters(), 0.003)
    for _ in range(30):
        optimizer.zero_grad()
        bound().backward()
        optimizer.step()
    assert bound().item() < 0.7 * before


SHARED = ("--objective", "hybrid", "--lr", 0.003, "--epochs", 1)


@pytest.fixture(scope="module")
def learned(stage, tiny, cache, tmp_path_factory):
    """Checkpoints of models that have learnt variances: a baseline, over-complete and residual pairs, and others."""
    files = {}
    kinds = {
        "baseline": (train_baseline,),
        "dual": (train_lift,),
        "residual": (train_lift, "--representation", "residual"),
        "shared_t": (train_lift, "--model", "shared_t"),
        "single_t": (train_lift, "--model", "single_t"),
        "no_t": (train_lift, "--model", "no_t", "--objective", "vlb"),
        "plain": (train_lift, "--objective", "denoising"),
    }
    for name, (script, *flags) in kinds.items():
        folder = tmp_path_factory.mktemp(name)
        stage(script, *tiny(folder), "--cache_dir", cache, *SHARED, *flags)
        files[name] = next((folder / "checkpoints").glob("*_1ep.pth"))
    return files


def sampled(stage, checkpoint, output, *flags):
    flags = ["--num_steps", 3, "--num_images", 2, *HARDWARE, *flags]
    stage(generate_with_path_30, "--checkpoint", checkpoint, "--output", output, *flags)
    return {file.name: file.read_bytes() for file in output.glob("*.png") if file.name[0].isdigit()}


@pytest.mark.parametrize("name", ["baseline", "dual", "residual"])
def test_every_solver_samples_from_such_a_model(stage, learned, tmp_path, name):
    images = {}
    ways = [(solver,) for solver in SOLVERS if solver != "consistency"]  # Which is for models of its own.
    for way in [*ways, ("ancestral", "--variance", "beta_tilde"), ("ancestral", "--variance", "learned")]:
        flags = ["--tolerance", 0.1] if way == ("ode",) else []
        images[way] = sampled(stage, learned[name], tmp_path / "-".join(way), "--solver", *way, *flags)
        assert len(images[way]) == 2
    chains = [way for way in images if way[0] == "ancestral"]
    assert all(images[one] != images[other] for one, other in itertools.combinations(chains, 2))


@pytest.mark.parametrize("name", ["shared_t", "single_t", "no_t"])
def test_ablations_are_sampled_with_the_variance_that_they_have_learnt(stage, learned, tmp_path, name):
    assert sampled(stage, learned[name], tmp_path / "x", "--solver", "ancestral", "--variance", "learned")


def test_variances_that_were_not_learnt_are_refused(refused, learned, cache, tmp_path):
    says = ("This model has not learnt the variance of its steps; pass --variance beta or beta_tilde, or train one",)
    flags = ["--checkpoint", learned["plain"], *HARDWARE, "--variance", "learned"]
    refused(generate_with_path_30, *flags, "--solver", "ancestral", "--output", tmp_path / "x", says=says)


def test_maps_exports_and_likelihoods_of_such_models(stage, learned, cache, tmp_path):
    for name in ("dual", "residual"):
        flags = ["--checkpoint", learned[name], "--output", tmp_path / f"{name}.pt", "--grid", 4, "--K", 1, *STEPS]
        stage(compute_heatmap_30, *flags, "--num_images", 2, *HARDWARE, "--cache_dir", cache)
    for name in ("baseline", "residual"):
        flags = ["--checkpoint", learned[name], *HARDWARE, "--cache_dir", cache, "--on", "train", "--num_images", 2]
        found = {}
        for variance in ("learned", "beta"):
            more = ["--method", "elbo", "--variance", variance, "--num_steps", 6, "--timesteps", "all"]
            ended = stage(evaluate_likelihood, *flags, *more, "--output", tmp_path / f"{name}-{variance}")
            found[variance] = float(re.search(r"([\d.]+) \+- [\d.]+ bits", ended.output)[1])
            assert f"elbo, variance {variance}" in ended.output
        assert found["learned"] != found["beta"] and all(map(math.isfinite, found.values()))
    for name in ("baseline", "dual", "shared_t", "single_t"):
        stage(export, learned[name], tmp_path / f"export-{name}")
        loaded = load_model(learned[name])
        exported = torch.export.load(tmp_path / f"export-{name}" / "model.pt2").module()
        xs = [torch.randn(2, 3, 16 >> k, 16 >> k, generator=rng(k)) for k in range(loaded.model.num_scales)]
        ts = [torch.tensor([500, 20])] * len(xs)
        own = loaded.denoise(tuple(xs), tuple(ts))
        assert [each.shape for each in own] == [x.shape for x in xs[: len(own)]]
        for one, other in zip(exported(xs, ts), own, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        again = type(loaded.model).from_pretrained(tmp_path / f"export-{name}")
        assert again.learned_variance
        assert_same(again.denoise(tuple(xs), tuple(ts)), loaded.denoise_with_variance(tuple(xs), tuple(ts)))
