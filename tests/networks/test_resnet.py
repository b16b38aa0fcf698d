"""The ResNet has one resolution and no norm, a receptive field that is its formula, and on the torus no border."""

import json

import pytest
import torch
from torch import nn

import train_baseline
import train_lift
from baseline_model import BaselineModel
from model import (
    CascadeModel,
    LIFTBaselineModel,
    LIFTDualTimestepModel,
    NoTimestepModel,
    SingleTimestepModel,
    network_name,
    resolve_network,
)
from networks.blocks import ResidualBlock
from networks.resnet import ResNet

NAMES = {"resnet": "zeros", "resnet_circular": "circular"}
MODELS = [
    BaselineModel,
    LIFTDualTimestepModel,
    LIFTBaselineModel,
    CascadeModel,
    SingleTimestepModel,
    NoTimestepModel,
]


def build(model_class, network="resnet", widths=(8, 16, 8), channels=2, **options):
    """A small model in float64 in which nothing is zero."""
    torch.manual_seed(0)
    model = model_class(widths, channels, network=network, **options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    if model.knows_time:  # Sinusoids are float32.
        model.embed.mlp.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return model


def inputs(model, size=(12, 20), channels=2):
    g = torch.Generator().manual_seed(1)
    shapes = [(2, channels, size[0] >> s, size[1] >> s) for s in range(model.num_scales)]
    t = torch.tensor([3, 800])
    ts = (t, t if model.one_clock else 999 - t)[: model.num_scales]
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes), ts


def shifted(xs, fine):
    """Every scale by as much of the picture, in pixels of the fine one."""
    return tuple(torch.roll(x, (fine[0] >> s, fine[1] >> s), (2, 3)) for s, x in enumerate(xs))


def difference(ones, others):
    return max((a - b).abs().max().item() for a, b in zip(ones, others, strict=True))


# What it is


def conv(a, b, side):
    return a * b * side * side + b


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("widths", [(64, 64, 64, 64, 64, 64), (16, 8, 24)])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_has_the_parameters_of_its_description(name, widths, channels):
    with torch.device("meta"):
        model = BaselineModel(widths, channels, name)
    first, time = widths[0], 4 * widths[0]
    total = first * time + time + time * time + time  # The MLP of the clock.
    total += conv(channels, first, 3) + conv(widths[-1], channels, 3)
    for a, b in zip((first, *widths), widths, strict=False):
        total += conv(a, b, 3) + time * b + b + conv(b, b, 3) + (conv(a, b, 1) if a != b else 0)
    assert sum(p.numel() for p in model.parameters()) == total
    kinds = {type(module) for module in model.unet.modules() if not list(module.children())}
    assert kinds <= {nn.Conv2d, nn.Linear, nn.SiLU, nn.Identity}  # No norm, no attention.
    convolutions = [module for module in model.unet.modules() if isinstance(module, nn.Conv2d)]
    assert {module.stride for module in convolutions} == {(1, 1)}
    assert {module.padding_mode for module in convolutions if module.kernel_size == (3, 3)} == {NAMES[name]}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_class", MODELS)
def test_at_first_blocks_are_the_identity_and_predictions_are_zero(model_class, name):
    torch.manual_seed(0)
    model = model_class((16, 16, 8), 2, network=name)
    xs, ts = inputs(model)
    xs = tuple(x.float() for x in xs)
    assert all(not out.any() for out in model.denoise(xs, ts))
    first, second, narrowing = model.unet.layers
    h, t = torch.randn(2, 16, 5, 7), torch.randn(2, 64) if model.knows_time else None
    assert torch.equal(first(h, t), h) and torch.equal(second(h, t), h)
    assert torch.equal(narrowing(h, t), narrowing.shortcut(h))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_class", MODELS)
def test_gradients_reach_every_parameter_and_recomputing_changes_none(model_class, name):
    model = build(model_class, name)
    xs, ts = inputs(model)
    blocks, runs, found = model.unet.blocks(), [], {}
    assert blocks == list(model.unet.layers) and all(isinstance(block, ResidualBlock) for block in blocks)
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    for recompute in (False, True):
        model.unet.recompute = recompute
        runs.clear()
        out = model.denoise(xs, ts)
        assert [o.shape for o in out] == [x.shape for x in xs[: model.num_predictions]]
        sum(o.square().sum() for o in out).backward()
        assert len(runs) == 3 * (1 + recompute)
        found[recompute] = [*out, *(p.grad for p in model.parameters())]
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


def test_features_are_what_blocks_hand_on_and_cost_no_head():
    model = build(BaselineModel)
    xs, ts = inputs(model)
    handed, heads = [], []
    hooks = [layer.register_forward_hook(lambda m, args, out: handed.append(out)) for layer in model.unet.layers]
    out = model.denoise(xs, ts)
    for hook in hooks:
        hook.remove()
    model.unet.head.register_forward_pre_hook(lambda m, args: heads.append(args[0]))
    found = model.features(xs, ts)
    assert not heads and [f.shape[1] for f in found] == [8, 16, 8]
    assert all(torch.equal(a, b) for a, b in zip(found, handed, strict=True))
    assert torch.equal(model.denoise(xs, ts)[0], out[0]) and torch.equal(heads[0], found[-1])


# What it sees


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_pixel_sees_its_window_to_the_edge_and_no_further(name, depth):
    network = build(BaselineModel, name, (8,) * depth, 1).unet
    side = network.receptive_field
    assert side == {1: 9, 2: 13, 3: 17}[depth]
    reach, size, t = side // 2, side + 6, torch.randn(1, 32, dtype=torch.float64)
    x = torch.randn(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    for row, column in ((size // 2, size // 2), (size // 2, 1)):
        [gradient] = torch.autograd.grad(network(x, t)[0, 0, row, column], x)
        rows, columns = (torch.arange(size) - place for place in (row, column))
        if name == "resnet_circular":
            rows, columns = ((each + size // 2) % size - size // 2 for each in (rows, columns))
        inside = (rows.abs() <= reach)[:, None] & (columns.abs() <= reach)
        assert torch.equal(gradient[0, 0] != 0, inside)  # Also in the corners, the furthest that it sees.


@pytest.mark.parametrize(
    ("model_class", "representation"),
    [(model, "overcomplete") for model in MODELS] + [(model, "residual") for model in MODELS[1:4]],
)
def test_on_the_torus_it_commutes_with_shifts_and_with_zeros_it_does_not(model_class, representation):
    options = {"representation": representation} if model_class.num_scales > 1 else {}
    moves = [(2, 0), (-4, 6), (10, 18)] + ([(1, 3)] if model_class is BaselineModel else [])
    for name in NAMES:
        model = build(model_class, name, **options).requires_grad_(False)
        xs, ts = inputs(model)
        out = model.denoise(xs, ts)
        for move in moves:
            moved = difference(model.denoise(shifted(xs, move), ts), shifted(out, move))
            assert moved < 1e-10 if name == "resnet_circular" else moved > 1e-3


def test_zeros_are_seen_no_further_than_the_receptive_field_reaches():
    """The interior of both is the same function of its window."""
    zeros, circular = (build(BaselineModel, name, (8,), 1).requires_grad_(False) for name in NAMES)
    circular.load_state_dict(zeros.state_dict())
    xs, ts = inputs(zeros, (16, 20), 1)
    apart = (zeros.denoise(xs, ts)[0] - circular.denoise(xs, ts)[0]).abs().amax((0, 1))
    reach = zeros.unet.receptive_field // 2
    assert apart[reach:-reach, reach:-reach].max() < 1e-12 < 1e-4 < apart[reach - 1, reach:-reach].max()


# Names, sizes, and a training


def test_names_in_any_case_and_odd_ones_refused_in_a_sentence():
    assert network_name("ResNet") == "resnet" and network_name("RESNET_circular") == "resnet_circular"
    assert resolve_network("resnet_circular", (8,)).make.keywords == {"padding": "circular"}
    for text in ("resnet50", "resnet_", "resnet/2", "resnet circular", "resnet_zeros", "resnet\n"):
        with pytest.raises(
            ValueError, match=r"(?s)^Unknown network '.*'; choose one of .*, resnet, resnet_circular\.$"
        ):
            network_name(text)
    for widths in ((), (12,), (8, 4)):
        with pytest.raises(ValueError, match=r"^hidden_dims \(.*\) must be positive multiples of 8"):
            BaselineModel(widths, network="resnet")


def test_images_of_any_size_and_of_even_ones_with_two_scales():
    single, dual = (resolve_network("resnet", (8,)).make((1,) * n, (1,) * n, (8,), None) for n in (1, 2))
    assert isinstance(single, ResNet) and (single.stride, dual.stride) == (1, 2)
    assert single(torch.zeros(1, 1, 7, 5), None).shape == (1, 1, 7, 5)
    assert dual(torch.zeros(1, 2, 6, 10), None).shape == (1, 2, 6, 10)
    with pytest.raises(ValueError, match=r"^Image size 6x7 must be a multiple of 2 for two scales; use another --res"):
        dual(torch.zeros(1, 2, 6, 7), None)


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (train_baseline, ["resnet_circular", "--classes", "--precision", "bf16"]),
        (train_lift, ["resnet", "--feature_weight", "0.05", "--recompute"]),
        (train_lift, ["resnet", "--model", "cascade", "--representation", "residual"]),
        (train_lift, ["resnet_circular", "--model", "no_t"]),
    ],
    ids=["classes", "features", "cascade", "no_t"],
)
def test_a_training_of_seconds_brings_the_loss_down(stage, tiny, cache, tmp_path, module, flags):
    lively = ["--epochs", 16, "--lr", 0.004, "--save_every", 16, "--ema_decay", 0.5]
    stage(module, *tiny(tmp_path), "--cache_dir", cache, *lively, "--network", *flags)
    [log] = (tmp_path / "logs").rglob("metrics.jsonl")
    losses = [json.loads(line)["loss_64"] for line in log.read_text().splitlines()]
    assert len(losses) == 48 and losses[0] == pytest.approx(1, abs=0.15)  # That of predictions of 0.
    assert sum(losses[-16:]) / 16 < 0.7
