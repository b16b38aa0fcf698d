"""Optimal transport within a batch, by trying all assignments, and what it leaves as it was."""

import itertools

import pytest
import torch

from scheduler import DDIMScheduler
from training.coupling import optimal_partners
from training.objective import Denoising, step_generator
from training.settings import TrainingSettings

SHAPES = [(2, 4, 4), (2, 2, 2)]


def rows_of(count, seed=0, shapes=SHAPES, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(mean + torch.randn(count, *shape, generator=generator) for shape in shapes)


def cost(clean, noise, order):
    return sum((x - e[list(order)]).square().sum().item() for x, e in zip(clean, noise, strict=True))


@pytest.mark.parametrize("num_scales", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_assignment_is_shorter(num_scales, seed):
    clean, noise = (rows_of(6, 10 * seed + k, SHAPES[:num_scales]) for k in (1, 2))
    partners = optimal_partners(clean, noise)
    best = min(itertools.permutations(range(6)), key=lambda order: cost(clean, noise, order))
    assert partners.tolist() == list(best) != list(range(6))


@pytest.mark.parametrize("seed", range(5))
def test_noise_stays_within_its_class(seed):
    clean, noise = rows_of(7, 10 * seed + 1), rows_of(7, 10 * seed + 2)
    labels = torch.tensor([2, 0, 2, 0, 2, 5, 2])
    partners = optimal_partners(clean, noise, labels)
    allowed = [order for order in itertools.permutations(range(7)) if torch.equal(labels[list(order)], labels)]
    assert partners.tolist() == list(min(allowed, key=lambda order: cost(clean, noise, order)))
    assert len(allowed) == 48 and partners.tolist() != optimal_partners(clean, noise).tolist()


def test_the_noise_of_a_class_keeps_its_law():
    """Across classes, noise would go to the class whose images it is near to: its mean would be that of its class."""
    labels = torch.arange(2).repeat(64)
    [noise], [clean] = rows_of(128, 1, SHAPES[:1]), rows_of(128, 2, SHAPES[:1])
    clean = clean + 2.0 * (2 * labels - 1)[:, None, None, None]
    within, across = (noise[optimal_partners((clean,), (noise,), given)] for given in (labels, None))
    deviation = 1 / (64 * 32) ** 0.5
    means = [[dealt[labels == label].mean().item() for label in (0, 1)] for dealt in (within, across)]
    assert max(map(abs, means[0])) < 4 * deviation and min(map(abs, means[1])) > 5 * deviation


def objective(coupling=None, model_type="dual", **config):
    said = {"t_pairs": "independent", "t_pairs_points": None, "coupling": coupling, "model_type": model_type}
    return Denoising(said | config, DDIMScheduler(beta_schedule="flow", prediction_type="velocity"))


def draw(coupling, labels=None, step=3, **options):
    x_64, x_32 = rows_of(6, 5)
    return objective(coupling, **options).draw(x_64, x_32, step_generator(1, step, torch.device("cpu")), labels=labels)


def test_a_step_has_the_same_noise_dealt_out_otherwise():
    plain, dealt = draw(None), draw("ot")
    clean, noise = ((plain.x_64, plain.x_32), (plain.noise_64, plain.noise_32))
    partners = optimal_partners(clean, noise)
    assert sorted(partners.tolist()) == list(range(6)) != partners.tolist()
    assert torch.equal(dealt.noise_64, plain.noise_64[partners]) and torch.equal(
        dealt.noise_32, plain.noise_32[partners]
    )
    for name in ("x_64", "x_32", "t_64", "t_32"):
        assert torch.equal(getattr(dealt, name), getattr(plain, name))
    assert all(torch.equal(one, other) for one, other in zip(dealt[:6], draw("ot")[:6], strict=True))
    assert not torch.equal(dealt.noise_64, draw("ot", step=4).noise_64)


def test_hidden_labels_do_not_open_a_class():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    options = {"class_names": ["a", "b"], "label_dropout": 0.999}
    plain, dealt = draw(None, labels, **options), draw("ot", labels, **options)
    assert (dealt.labels == 2).all()
    for own in (slice(0, 3), slice(3, 6)):
        assert {*plain.noise_64[own, 0, 0, 0].tolist()} == {*dealt.noise_64[own, 0, 0, 0].tolist()}


def test_a_model_of_one_scale_goes_by_that_alone():
    plain, dealt = draw(None, model_type="baseline"), draw("ot", model_type="baseline")
    partners = optimal_partners((plain.x_64,), (plain.noise_64,))
    assert torch.equal(dealt.noise_64, plain.noise_64[partners])
    assert partners.tolist() != optimal_partners((plain.x_64, plain.x_32), (plain.noise_64, plain.noise_32)).tolist()


def test_lines_cross_less():
    """The best constant velocity at pure noise is the mean over images: what is left is less under the coupling."""
    clean, noise = rows_of(64, 1, [(1, 2, 2)]), rows_of(64, 2, [(1, 2, 2)])
    [x], [e] = clean, noise
    dealt = e[optimal_partners(clean, noise)]
    assert (dealt - x).square().mean() < 0.5 * (e - x).square().mean()


def test_only_flow_has_lines_and_no_choice_is_as_before():
    with pytest.raises(ValueError, match="--coupling ot makes lines from noise to images cross less, which only"):
        TrainingSettings(model_type="dual", coupling="ot")
    flow = {"model_type": "dual", "preset": "flow"}
    assert TrainingSettings(**flow, coupling="ot").recorded()["coupling"] == "ot"
    plain = TrainingSettings(**flow, coupling="independent")
    assert plain.recorded() == TrainingSettings(**flow).recorded() and plain.recorded()["coupling"] is None
    assert plain.before_choices()["coupling"] is None
    with pytest.raises(ValueError, match="a classifier predicts no image, to which --coupling belongs"):
        TrainingSettings(model_type="classifier", classes="any", coupling="ot")


def test_a_run_learns_by_it_on_any_number_of_processes(trainer):
    """What a process is shown are its rows of a step that was dealt out as a whole."""
    run = trainer("--preset", "flow", "--coupling", "ot")
    x_64, x_32, _ = next(run.batches.epoch(0))
    whole = run.draw(x_64, x_32)
    run.processes.count = 2
    for rank in (0, 1):
        run.processes.rank = rank
        own = run.draw(x_64, x_32)
        assert torch.equal(own.noise_64, whole.noise_64[2 * rank : 2 * rank + 2])
        assert torch.equal(own.noise_32, whole.noise_32[2 * rank : 2 * rank + 2])
