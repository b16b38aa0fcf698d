"""Consistency as an objective: its levels, its two branches, exact solutions for Gaussian images, and runs of it."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm, truncnorm
from torch import nn

import compute_heatmap_30
import compute_trajectories
import encode
import eval_fid_batch
import evaluate_likelihood
import export
import generate_sr
import generate_with_path_30
import inpaint
import interpolate
import train_baseline
import train_lift
from checkpoint import read_checkpoint
from conftest import HARDWARE, assert_same, run_stage
from data import coarse, save_png
from diffusion.consistency import consistency_function
from images.representation import REPRESENTATIONS
from scheduler import DDIMScheduler
from training.consistency import HUBER, TEACHER_SOLVERS, Consistency, teacher_step
from training.noise_levels import (
    FORMS,
    CtLevels,
    EctLevels,
    IctLevels,
    ct_decay,
    ct_levels,
    ect_cleaner,
    ect_exponent,
    ict_levels,
    karras_levels,
)
from training.objective import Networks, TrainingBatch
from training.settings import TrainingSettings
from training.trainer import Trainer

S = 0.5
YES, NO = torch.tensor(True), torch.tensor(False)
SINGLE = {"t_pairs": None, "loss_weights": [1.0]}
PAIR = {"overcomplete": {"t_pairs": "same", "loss_weights": [0.8, 0.2]}}
PAIR["residual"] = PAIR["overcomplete"] | {"t_pairs": "band:image,0", "t_pairs_points": None}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


@pytest.fixture
def edm():
    """The levels of arXiv 2303.01469 as a process, whose network says the clean image."""
    with mock.patch("scheduler.VE_SIGMAS", (0.002, 80.0)):
        yield DDIMScheduler(process="ve", prediction_type="x0", clip_sample=False)


# Levels


def test_levels_grow_as_the_papers_say():
    assert [ct_levels(p) for p in (0, 1)] == [2, 151]
    # By its own formula at 1000 steps of a run.
    for k in range(0, 1001, 7):
        expected = math.ceil(math.sqrt(k / 1000 * (151**2 - 4) + 4) - 1) + 1
        assert ct_levels(k / 1000) == expected
        assert ct_decay(k / 1000) == pytest.approx(0.9 ** (2 / expected), rel=1e-12)
    assert ct_decay(0) == pytest.approx(0.9) and ct_decay(1) == pytest.approx(math.exp(2 * math.log(0.9) / 151))
    tiny = 1e-9
    for stage, count in enumerate((10, 20, 40, 80, 160, 320, 640, 1280)):
        assert ict_levels(stage / 8) == ict_levels((stage + 1) / 8 - tiny) == count + 1
        assert ect_exponent(stage / 8) == ect_exponent((stage + 1) / 8 - tiny) == stage + 1
    assert ict_levels(1) == 1281 and ect_exponent(1) == 8
    t = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    for stage in (1, 4, 8):
        shares = 1 - (1 + 8 / (1 + np.exp(t.numpy()))) / 2**stage
        np.testing.assert_allclose(ect_cleaner(t, (stage - 1) / 8), t.numpy() * np.maximum(shares, 0), rtol=1e-12)
    np.testing.assert_allclose(
        karras_levels(0.002, 80, 18), (0.002 ** (1 / 7) + np.arange(18) / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    )


PROCESSES = ["cosine", "cosine_clipped", "cosine_zero_terminal", "sub_vp_linear", "ve", "flow"]


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("form", FORMS)
def test_neighbours_are_levels_of_the_process(form, name):
    scheduler = DDIMScheduler(beta_schedule=name, prediction_type="v", clip_sample=False)
    levels = FORMS[form](scheduler)
    usable = np.flatnonzero(scheduler.alphas.numpy() > 0)[-1]
    usable += 0.5 if name == "flow" else 0
    for progress in (0, 0.3, 1):
        drawn = levels.draw(2000, rng(1), progress)
        assert all(each.dtype == torch.float64 and each.shape == (2000,) for each in drawn)
        assert (drawn.times > drawn.next_times).all() and drawn.next_times.min() >= 0 and drawn.times.max() <= usable
        assert drawn.weights.isfinite().all() and (drawn.weights > 0).all()
        again = levels.draw(2000, rng(1), progress)
        assert all(map(torch.equal, drawn, again))
    if form != "ect":
        count = {"ct": ct_levels, "ict": ict_levels}[form](0.3)
        low = scheduler.sigmas[0] / scheduler.alphas[0]
        high = min(80.0, levels.levels_at(torch.tensor(float(usable), dtype=torch.float64)).item())
        grid = karras_levels(low.item(), high, count).numpy()
        drawn = levels.draw(4000, rng(2), 0.3)
        for times, of in ((drawn.next_times, grid[:-1]), (drawn.times, grid[1:])):
            found = (scheduler.curves(times).sigma / scheduler.curves(times).alpha).numpy()
            inner = found[found < high * (1 - 1e-6)]
            assert np.abs(inner[:, None] / np.maximum(of, 1e-12) - 1).min(1).max() < 1e-6 or low == 0
        if high == 80:  # The rest of the process stands for the last level.
            last = drawn.times[drawn.next_times == drawn.next_times.max()]
            assert last.max() > last.min() + 0.5 * (usable - last.min())
        assert name == "flow" or (drawn.next_times == 0).any()  # Exactly, where the function is the image.


def test_laws_of_levels(edm):
    ict, count = IctLevels(edm), 41
    grid = np.log(karras_levels(0.002, 80, count).numpy())
    shares = norm.cdf(grid, -1.1, 2)
    np.testing.assert_allclose(ict.probabilities(count), np.diff(shares) / (shares[-1] - shares[0]), rtol=1e-9)
    drawn = ict.draw(50_000, rng(3), 2 / 8)
    found = np.log(ict.levels_at(drawn.times).numpy())
    place = np.abs(found[:, None] - grid).argmin(1) - 1
    np.testing.assert_allclose(np.bincount(place, minlength=40) / 50_000, ict.probabilities(count), atol=0.008)
    np.testing.assert_allclose(drawn.weights, 1 / np.diff(np.exp(grid))[place], rtol=1e-9)
    ect = EctLevels(edm)
    drawn = ect.draw(20_000, rng(4), 0.4)
    levels, cleaner = (ect.levels_at(t) for t in (drawn.times, drawn.next_times))
    law = truncnorm((grid[0] + 1.1) / 2, (grid[-1] + 1.1) / 2, -1.1, 2)
    assert kstest(levels.log().numpy(), law.cdf).pvalue > 1e-4
    torch.testing.assert_close(cleaner, ect_cleaner(levels, 0.4).clamp(min=0.002))
    torch.testing.assert_close(drawn.weights, 1 / (levels - cleaner))
    even = CtLevels(edm).draw(30_000, rng(5), 1)
    place = np.abs(np.log(ict.levels_at(even.times).numpy())[:, None] - np.log(karras_levels(0.002, 80, 151).numpy()))
    np.testing.assert_allclose(np.bincount(place.argmin(1), minlength=151)[1:] / 30_000, 1 / 150, atol=0.003)
    assert (even.weights == 1).all()


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_both_scales_move_along_the_curve_of_one_image(representation):
    scheduler = DDIMScheduler(
        beta_schedule="cosine", prediction_type="v", clip_sample=False, representation=representation
    )
    for form in FORMS:
        objective = Consistency(PAIR[representation] | {"consistency": form}, scheduler)
        x = torch.zeros(64, 1, 4, 4)
        batch = objective.draw(x, coarse(x), rng(6), 0.5)
        for t_64, t_32 in ((batch.t_64, batch.t_32), (batch.next_64, batch.next_32)):
            if representation == "overcomplete":
                assert torch.equal(t_64, t_32)
                continue
            lead = scheduler.log_snr_at(t_32) - scheduler.log_snr_at(t_64)
            here = t_32 > 0  # Where it would be cleaner than timestep 0 it stays there.
            assert here.any() and (lead[~here] < math.log(4) + 1e-6).all()
            torch.testing.assert_close(lead[here], torch.full_like(lead[here], math.log(4)), rtol=1e-6, atol=1e-6)
        assert batch.share.shape == (64,)


# Exact solutions for images N(0, S^2)


PATTERN = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64).expand(1, 1, 2, 2)


def slopes_found(objective, count):
    """What f = slope x̂ of each level is when every distance is minimal, from the cleanest level on, `[count]`."""
    levels = karras_levels(0.002, 80, count)
    times = objective._levels.times(levels)
    # Image and noise have their second moments exactly, and are not correlated.
    x, noise = S * PATTERN, PATTERN.transpose(-1, -2)
    slopes = [1.0]
    for above in range(1, count):
        t, next_t = times[above : above + 1], times[above - 1 : above]
        batch = TrainingBatch(x, coarse(x), noise, coarse(noise), t, t, next_64=next_t, next_32=next_t)

        def network(slope, level):
            # The clean image of which f is slope x.
            least, now = levels[0], levels[level]

            def denoise(xs, ts, *labels):
                x = xs[0] * (1 + now**2).sqrt()  # It is shown less.
                return (x if level == 0 else (slope * x - least / now * x) / (1 - least / now),)

            return denoise

        def both(slope, above=above):
            upper, lower = network(slope, above), network(slopes[above - 1], above - 1)
            return lambda xs, ts, *labels: (upper if ts[0] == times[above] else lower)(xs, ts)

        slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
        [down] = torch.autograd.grad(objective.losses(both(slope), batch)["loss_64"].sum(), slope, create_graph=True)
        [bend] = torch.autograd.grad(down, slope)
        slopes.append((slope - down / bend).item())
    return slopes


def exact_teacher(scheduler, s=S, mean=0.0):
    def teacher(xs, ts, *labels):
        found = []
        for x, t in zip(xs, ts, strict=True):
            alpha, sigma = scheduler.scales(t, x)
            x0 = mean + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x - alpha * mean)
            noise = (x - alpha * x0) / torch.where(sigma > 0, sigma, 1.0)
            found.append(scheduler.target(x0, noise, t))
        return tuple(found)

    return teacher


@pytest.mark.parametrize("count, expected", [(11, 0.376), (41, 0.466), (161, 0.491)])
def test_the_solution_of_training_has_less_deviation_with_few_levels(edm, count, expected):
    slopes = slopes_found(Consistency(SINGLE | {"consistency": "ct"}, edm), count)
    assert slopes[-1] * math.hypot(S, 80) == pytest.approx(expected, abs=6e-4)
    # By regression, level by level.
    levels = karras_levels(0.002, 80, count).tolist()
    by_hand = math.prod((S**2 + a * b) / (S**2 + b**2) for a, b in itertools.pairwise(levels))
    assert slopes[-1] == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("count, solver, expected", [(18, "heun", 0.528), (40, "heun", 0.505), (40, "ddim", None)])
def test_the_solution_of_distillation_is_the_walk_of_the_teacher(edm, count, solver, expected):
    networks = Networks(None, exact_teacher(edm))
    config = SINGLE | {"consistency": "ct", "consistency_solver": solver}
    with mock.patch("copy.deepcopy", lambda network: mock.MagicMock()):
        objective = Consistency(config, edm, networks=networks)
    objective._target = None
    slope = slopes_found(objective, count)[-1]
    factor, levels = 1.0, karras_levels(0.002, 80, count).tolist()
    for now, after in itertools.pairwise(reversed(levels)):
        drift = [level / (S**2 + level**2) for level in (now, after)]
        euler = 1 + (after - now) * drift[0]
        factor *= euler if solver == "ddim" else 1 + (after - now) / 2 * (drift[0] + drift[1] * euler)
    assert slope == pytest.approx(factor, rel=1e-6)
    if expected is not None:
        assert slope * math.hypot(S, 80) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    "name, prediction", [("cosine", "v"), ("ve", "epsilon"), ("flow", "velocity"), ("linear", "x0")]
)
def test_the_step_of_the_teacher_keeps_the_exact_function_to_its_order(name, prediction):
    """f is constant along the exact path: by Heun but for the third power of a step, by DDIM for the second."""
    scheduler, mean = DDIMScheduler(beta_schedule=name, prediction_type=prediction, clip_sample=False), 0.3
    teacher = exact_teacher(scheduler, mean=mean)
    start, x = 1.2, normal(1, 1, 2, 2)

    def exact(x, t):
        alpha, sigma = scheduler.scales(t, x)
        return (x / alpha - mean) / (S**2 + (sigma / alpha) ** 2).sqrt()

    def at(level):
        return scheduler.time_of(torch.tensor([-2 * math.log(level)], dtype=torch.float64))

    for solver, order in (("heun", 3), ("ddim", 2)):
        errors = []
        for width in (0.1, 0.05, 0.025):
            ts, after = at(start), at(start - width)
            [moved] = teacher_step(teacher, scheduler, solver, (x,), (ts,), (after,))
            errors.append((exact(moved, after) - exact(x, ts)).abs().max().item())
        slopes = -np.diff(np.log(errors)) / math.log(2)
        assert abs(slopes[-1] - order) < 0.15, (solver, errors)
    # To the end of the process, and a scale that is there.
    for solver in TEACHER_SOLVERS:
        zero = torch.zeros(1, dtype=torch.float64)
        [ended] = teacher_step(teacher, scheduler, solver, (x,), (at(0.1 + start),), (zero,))
        assert ended.isfinite().all()
        [same] = teacher_step(teacher, scheduler, solver, (x,), (zero,), (zero,))
        torch.testing.assert_close(same, x)


# Both branches


def tangled(xs, ts, *labels):
    """A network whose answers depend on all that it is told."""
    mixed = sum(x.flatten(1).mean(1) + t / 500 for x, t in zip(xs, ts, strict=True))[:, None, None, None]
    if labels:
        mixed = mixed + labels[0][:, None, None, None]
    return tuple(torch.tanh(x - x.flip(-1) / 2 + mixed.to(x)) for x in xs)


def step_of(objective, seed=7, labels=None, progress=0.4):
    x = normal(6, 2, 4, 4, seed=seed).clamp(-1, 1)
    return objective.draw(x, coarse(x), rng(seed), progress, labels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_the_losses_are_distances_of_both_ends_with_one_noise(representation, form):
    scheduler = DDIMScheduler(
        beta_schedule="cosine", prediction_type="v", clip_sample=False, representation=representation
    )
    objective = Consistency(PAIR[representation] | {"consistency": form}, scheduler)
    labels = torch.arange(6)
    batch = step_of(objective, labels=labels)
    ends = []
    for ts in ((batch.t_64, batch.t_32), (batch.next_64, batch.next_32)):
        pairs = zip((batch.x_64, batch.x_32), (batch.noise_64, batch.noise_32), ts, strict=True)
        xs = tuple(scheduler.add_noise(*each) for each in pairs)
        said = tangled(xs, ts, labels)
        ends.append(
            [
                consistency_function(scheduler, scheduler.predict_x0(p, t, x), t, x)
                for p, t, x in zip(said, ts, xs, strict=True)
            ]
        )
    losses = objective.losses(tangled, batch)
    fine = 0.75 if representation == "residual" else 1
    for (name, found), one, other, share in zip(losses.items(), *ends, (fine, 1), strict=True):
        mean = (one - other).square().flatten(1).sum(1) / (share * one[0].numel())
        expected = mean if form == "ct" else (mean + 0.00054**2).sqrt() - 0.00054
        torch.testing.assert_close(found, expected, msg=name)
    weights = [0.8 * losses["loss_64"] + 0.2 * losses["loss_32"], batch.share]
    torch.testing.assert_close(objective.minimised(losses, batch), (weights[0] * weights[1]).mean())


def test_the_exact_function_of_one_image_has_no_loss_but_with_other_noise():
    """Of data that is one image every path leads there, and both branches differ by the noise of timestep 0 alone."""
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="x0", clip_sample=False)
    objective = Consistency(SINGLE | {"consistency": "ct"}, scheduler)
    x = normal(1, 2, 4, 4).expand(64, -1, -1, -1)
    batch = objective.draw(x, coarse(x), rng(8), 1.0)

    def denoise(xs, ts, *labels):
        return (x,)

    assert objective.losses(denoise, batch)["loss_64"].max() < 1e-20
    fresh = batch._replace(noise_64=normal(*x.shape, seed=9))
    mixed = mock.patch.object(objective, "cleaner", lambda noisy, batch: Consistency.cleaner(objective, noisy, fresh))
    with mixed:
        found = objective.losses(denoise, batch)["loss_64"]
    least = (scheduler.sigmas[0] / scheduler.alphas[0]).item()
    assert found.mean() == pytest.approx(2 * least**2, rel=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_goes_through_the_target(form):
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v", clip_sample=False)
    objective = Consistency(SINGLE | {"consistency": form}, scheduler)
    batch = step_of(objective)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def network(weight):
        return lambda xs, ts, *labels: (torch.tanh(weight * xs[0] + ts[0][:, None, None, None] / 300),)

    def gradient(denoise):
        return torch.autograd.grad(objective.minimised(objective.losses(denoise, batch), batch), weight)[0]

    calls = []

    def second_is_constant(xs, ts, *labels):
        calls.append(ts)
        return network(weight if len(calls) == 1 else torch.tensor(0.7, dtype=torch.float64))(xs, ts)

    found = gradient(network(weight))
    assert torch.equal(found, gradient(second_is_constant)) and found != 0
    assert torch.equal(calls[0][0], batch.t_64) and torch.equal(calls[1][0], batch.next_64)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def denoise(self, xs, ts, *labels):
        return tuple(self.weight * x for x in xs)


def test_the_target_of_ct_follows_the_weights():
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v", clip_sample=False)
    student = Student()
    objective = Consistency(SINGLE | {"consistency": "ct"}, scheduler, networks=Networks(student))
    expected = 0.5
    for k, (progress, good) in enumerate(((0.0, YES), (0.4, YES), (0.5, NO), (1.0, YES))):
        batch = step_of(objective, progress=progress)
        with torch.no_grad():
            student.weight.fill_(k + 1)
        objective.observe({}, batch, good, torch.clone)
        expected += (1 - ct_decay(progress)) * (k + 1 - expected) * good.item()
        assert objective.state["weight"].item() == pytest.approx(expected, rel=1e-6)
    # The target is what it says, and not the network that is minimised.
    batch = step_of(objective)
    with torch.no_grad():
        student.weight.fill_(objective.state["weight"].item())
        one = objective.losses(student.denoise, batch)["loss_64"]
        alone = Consistency(SINGLE | {"consistency": "ct"}, scheduler).losses(student.denoise, batch)["loss_64"]
        torch.testing.assert_close(one, alone)
        student.weight.fill_(2.0)
        assert not torch.allclose(objective.losses(student.denoise, batch)["loss_64"], alone)
    other = Consistency(SINGLE | {"consistency": "ct"}, scheduler, networks=Networks(Student()))
    other.restore({"objective_state": objective.state})
    assert torch.equal(other.state["weight"], objective.state["weight"])
    assert Consistency(SINGLE, scheduler, networks=Networks(student)).state is None and HUBER == 0.00054


def test_a_teacher_that_is_not_there_is_missed():
    scheduler = DDIMScheduler(prediction_type="v")
    with pytest.raises(ValueError, match="--consistency_solver is how a teacher takes its step, and there is none"):
        Consistency(SINGLE | {"consistency_solver": "heun"}, scheduler, networks=Networks(Student()))


# Settings


def test_settings_that_make_no_sense_are_refused():
    options = {"model_type": "dual", "objective": "consistency", "prediction_type": "v"}
    for more, says in (
        ({"t_law": "importance"}, "--t_law"),
        ({"timestep_weights": "sigma2"}, "pass --timestep_weights published"),
        ({"min_snr_gamma": 5.0}, "--min_snr_gamma would change; leave it out"),
        ({"perceptual_weight": 0.1}, "pass --perceptual_weight 0"),
        ({"feature_weight": 0.1}, "pass --feature_weight 0"),
        ({"times": "whole"}, "has --times real"),
        ({"t_pairs": "independent"}, "has --t_pairs same"),
        ({"consistency_solver": "ddim"}, "there is none"),
        ({"model_type": "single_t"}, "a 'single_t' model predicts the fine scale alone"),
        ({"model_type": "no_t"}, "a 'no_t' model"),
        ({"process": "flow", "prediction_type": "x0"}, "use --prediction_type velocity or v"),
        ({"cuda_graphs": True}, "--cuda_graphs and --objective consistency exclude each other"),
    ):
        with pytest.raises(ValueError, match=says):
            TrainingSettings(**options | more)
    for name, value in (("consistency", "ct"), ("consistency_solver", "heun")):
        with pytest.raises(ValueError, match=f"--{name} belongs to --objective consistency, not to denoising"):
            TrainingSettings(model_type="dual", **{name: value})


@pytest.mark.parametrize("model_type, pairs", [("dual", ("same", "band:image,0")), ("shared_t", (None, None))])
def test_what_is_not_given_follows(model_type, pairs):
    for representation, regime in zip(("overcomplete", "residual"), pairs, strict=True):
        chosen = TrainingSettings(model_type=model_type, preset="ict", representation=representation)
        assert (chosen.consistency, chosen.consistency_solver, chosen.times) == ("ict", None, "real")
        assert chosen.t_pairs == regime and chosen.prediction_type == "v"
        assert TrainingSettings(**chosen.given()) == chosen
    distilled = {"model_type": model_type, "preset": "ict", "student": "cd"}
    assert TrainingSettings(**distilled).consistency_solver == "heun"
    assert TrainingSettings(**distilled, consistency="ect").consistency_solver is None
    assert TrainingSettings(**distilled, consistency="ect", consistency_solver="ddim").consistency_solver == "ddim"


# Runs


FLAGS = ("--preset", "ict", "--lr", 0.003)


@pytest.mark.parametrize("form", ["ct", "ict"])
@pytest.mark.parametrize("script", [train_baseline, train_lift])
def test_a_stopped_run_ends_as_one_in_one_go(stage, tiny, cache, tmp_path, script, form):
    flags = ["--cache_dir", cache, *FLAGS, "--consistency", form, "--save_every", 1]
    stage(script, *tiny(tmp_path / "whole"), *flags)
    # Levels depend on the end of the run, so that it is stopped on the way rather than resumed to a later end.
    taken, step = [], Trainer.train_step

    def stopping(self, *images):
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(self.step)
        return step(self, *images)

    with mock.patch.object(Trainer, "train_step", stopping):
        assert run_stage(script, *tiny(tmp_path / "parts"), *flags, "--resume_minutes", 1e-9).status == 130
    assert len(taken) == 4
    stage(script, *tiny(tmp_path / "parts"), *flags, "--resume")
    contents = [
        read_checkpoint(next((tmp_path / name).rglob("*_last.pth"))) | {"execution": {}, "settings": {}}
        for name in ("whole", "parts")
    ]
    assert_same(*contents)
    state = contents[0]["objective_state"]
    assert (state is None) == (form == "ict")
    if form == "ct":
        assert state.keys() == contents[0]["model_state"].keys()
        assert not all(torch.equal(state[name], contents[0]["model_state"][name]) for name in state)


def test_a_longer_run_is_another_one(stage, refused, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *FLAGS]
    stage(train_baseline, *flags, "--epochs", 1)
    refused(train_baseline, *flags, "--epochs", 2, "--resume", says=("epochs = 1, not 2",))


@pytest.fixture(scope="module")
def trained(stage, tiny, cache, tmp_path_factory):
    """Checkpoints of consistency models, and of one that is none."""
    files = {}
    kinds = {
        "baseline": (train_baseline, *FLAGS),
        "dual": (train_lift, *FLAGS),
        "residual": (train_lift, *FLAGS, "--representation", "residual", "--consistency", "ect"),
        "shared_t": (train_lift, *FLAGS, "--model", "shared_t", "--consistency", "ct"),
        "plain": (train_lift,),
    }
    for name, (script, *flags) in kinds.items():
        folder = tmp_path_factory.mktemp(name)
        stage(script, *tiny(folder), "--cache_dir", cache, "--epochs", 1, *flags)
        files[name] = next((folder / "checkpoints").glob("*_1ep.pth"))
    return files


@pytest.mark.parametrize("name", ["baseline", "dual", "residual", "shared_t"])
def test_such_models_are_sampled_by_their_solver(stage, trained, tmp_path, name):
    path = "image_diagonal" if name == "residual" else "diagonal"
    images = []
    for calls in (1, 2):
        flags = ["--num_calls", calls, "--num_steps", 18, "--num_images", 2, "--solver", "consistency", *HARDWARE]
        output = tmp_path / str(calls)
        flags += ["--checkpoint", trained[name], "--output", output, "--path_type", path]
        ended = stage(generate_with_path_30, *flags)
        assert f"2 new with {calls} network calls each" in ended.output and "warning: this path" not in ended.notes
        images.append((output / "000042000000.png").read_bytes())
    assert images[0] != images[1]


SAMPLES = ["--num_images", 2, "--num_steps", 2, *HARDWARE]
ONLY = "only --solver consistency samples such a model"


@pytest.mark.parametrize("solver", ["ddim", "heun", "unipc", "ancestral"])
def test_other_solvers_are_refused(refused, trained, tmp_path, cache, solver):
    flags = ["--checkpoint", trained["dual"], "--solver", solver]
    refused(generate_with_path_30, *flags, *SAMPLES, "--output", tmp_path / "x", says=(ONLY, solver))


def test_other_stages_refuse_what_makes_no_sense(refused, trained, tmp_path, cache):
    dual, plain = ["--checkpoint", trained["dual"]], ["--checkpoint", trained["plain"]]
    data, out = ["--cache_dir", cache, "--on", "train"], ["--output", tmp_path / "x"]
    own = ["--solver", "consistency"]
    is_none = "samples models that were trained with --objective consistency"
    refused(generate_with_path_30, *plain, *own, *SAMPLES, *out, says=(is_none,))
    table = ["--metrics", "swd", "--num_images", 4, "--num_steps", 2, *HARDWARE, "--cache_dir", cache]
    table += ["--path_type", "diagonal", "--output", tmp_path / "scores.csv"]
    refused(eval_fid_batch, *dual, *table, says=(ONLY,))
    refused(eval_fid_batch, *plain, *own, *table, says=(is_none,))
    refused(inpaint, *dual, *data, *SAMPLES, *out, "--mask", "center", says=(ONLY,))
    refused(interpolate, *dual, *out, "--seeds", 1, 2, "--frames", 3, "--num_steps", 2, *HARDWARE, says=(ONLY,))
    means = "it predicts where a path ends, and no mean of clean images"
    refused(generate_sr, *dual, *own, *data, *SAMPLES, *out, says=(means,))
    refused(generate_sr, *plain, *own, *data, *SAMPLES, *out, says=(is_none,))
    save_png(torch.zeros(3, 16, 16, dtype=torch.uint8), tmp_path / "given.png", by_lift=False)
    refused(encode, *dual, "--input", tmp_path / "given.png", *HARDWARE, *out, says=(means,))
    refused(evaluate_likelihood, *dual, *data, "--num_images", 2, *HARDWARE, *out, says=(means,))
    refused(export, trained["dual"], tmp_path / "folder", says=(means,))
    maps = ["--grid", 4, "--K", 1, "--num_images", 2, *HARDWARE, "--cache_dir", cache, *out]
    refused(compute_heatmap_30, *dual, *maps, says=(means,))
    refused(compute_trajectories, *dual, *HARDWARE, *out, says=(means,))


def test_consistency_learns(trainer):
    """The mean distance at one draw falls under descent, of both scales."""
    run = trainer(*FLAGS)
    values = run.train_step(*next(run.batches.epoch(0)))
    assert list(values) == ["loss_64", "loss_32", "grad_norm"] and all(v.isfinite() for v in values.values())
    batch = run.draw(*next(run.batches.epoch(0)))

    def loss():
        return run.objective.minimised(run.objective.losses(run.model.denoise, batch), batch)

    before = loss().item()
    optimizer = torch.optim.Adam(run.model.parameters(), 0.003)
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.8 * before
