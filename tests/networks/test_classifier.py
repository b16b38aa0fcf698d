"""Classifiers of noisy images: shapes, what each scale and clock changes, and what is refused."""

import pytest
import torch

from checkpoint import CLASSIFIERS, FILE_STEMS, MODEL_CLASSES, build_model, network_class
from networks.classifier import NoisyClassifier, PairClassifier


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def made(kind, **options):
    torch.manual_seed(0)
    return kind((8, 16), channels=1, num_classes=3, **options).eval()


def inputs(kind, count=2):
    xs = torch.randn(count, 1, 16, 16, generator=rng(1)), torch.randn(count, 1, 8, 8, generator=rng(2))
    ts = torch.full((count,), 100), torch.full((count,), 700)
    return xs[: kind.num_scales], ts[: kind.num_scales]


@pytest.mark.parametrize("kind", CLASSIFIERS.values())
def test_logits_are_linear_in_the_features(kind):
    model = made(kind)
    taken = model.inputs(*inputs(kind))
    features = model.features(*taken)
    assert features.shape == (2, model.num_features) == (2, 16)
    assert torch.equal(model(*taken), features @ model.head.weight.T + model.head.bias)
    assert model.classify(*inputs(kind)).shape == (2, 3)


@pytest.mark.parametrize("kind", CLASSIFIERS.values())
def test_every_image_and_clock_matters(kind):
    model = made(kind)
    xs, ts = inputs(kind)
    before = model.classify(xs, ts)
    for k in range(kind.num_scales):
        for group, by in ((xs, 0.5), (ts, 50)):
            changed = [list(xs), list(ts)]
            changed[group is ts][k] = group[k] + by
            assert (model.classify(*changed) - before).abs().max() > 1e-6
    # Another image of the batch does not.
    assert torch.allclose(model.classify([x[:1] for x in xs], [t[:1] for t in ts]), before[:1], atol=1e-6)


def test_a_residual_pair_is_read_within_its_subspace():
    model = made(PairClassifier, representation="residual")
    (x_64, x_32), ts = inputs(PairClassifier)
    outside = torch.randn(2, 1, 8, 8, generator=rng(3)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(model.classify((x_64 + outside, x_32), ts), model.classify((x_64, x_32), ts), atol=1e-5)
    free = made(PairClassifier)
    assert (free.classify((x_64 + outside, x_32), ts) - free.classify((x_64, x_32), ts)).abs().max() > 1e-3


def test_recomputing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = made(NoisyClassifier).train()
        model.unet.recompute = recompute
        model.classify(*inputs(NoisyClassifier)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert len(model.unet.blocks()) == 5


def test_what_is_refused():
    with pytest.raises(ValueError, match="two classes or more, not 1"):
        NoisyClassifier((8,), num_classes=1)
    with pytest.raises(ValueError, match="multiples of 8"):
        NoisyClassifier((8, 12))
    with pytest.raises(ValueError, match="Unknown representation 'x'"):
        PairClassifier((8,), representation="x")
    with pytest.raises(ValueError, match="multiple of 4"):
        NoisyClassifier((8, 8, 8)).classify((torch.zeros(1, 3, 6, 8),), (torch.zeros(1),))
    with pytest.raises(ValueError, match="half the size"):
        PairClassifier((8,)).classify((torch.zeros(1, 3, 8, 8),) * 2, (torch.zeros(1),) * 2)


def test_models_and_classifiers_say_which_they_are():
    assert not MODEL_CLASSES.keys() & CLASSIFIERS.keys()
    assert FILE_STEMS.keys() == MODEL_CLASSES.keys() | CLASSIFIERS.keys()
    assert len(set(FILE_STEMS.values())) == len(FILE_STEMS)
    for name in FILE_STEMS:
        assert network_class(name).predicts_images == (name in MODEL_CLASSES)
    config = {"hidden_dims": [8, 16], "channels": 1, "class_names": list("abc"), "representation": "residual"}
    assert type(build_model(config | {"model_type": "classifier"})) is NoisyClassifier
    pair = build_model(config | {"model_type": "classifier_pair"})
    assert pair.representation.name == "residual" and pair.num_classes == 3
