"""What backbones give of themselves on the way is what their forward pass hands on, and costs no decoder."""

import pytest
import torch
from torch import nn

from model import UNet
from networks.ddpm_unet import DdpmUNet
from networks.dit import DiT, DiTBlock


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def handed_on(network, modules, *inputs):
    """Outputs of modules in a forward pass, in the order of the calls, and what the pass returned."""
    found = []
    hooks = [module.register_forward_hook(lambda module, args, out: found.append(out)) for module in modules]
    out = network(*inputs)
    for hook in hooks:
        hook.remove()
    return found, out


def calls(network, function):
    """Modules that hold weights and are called meanwhile."""
    called = set()
    leaves = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    hooks = [leaf.register_forward_pre_hook(lambda module, args: called.add(module)) for leaf in leaves]
    function()
    for hook in hooks:
        hook.remove()
    return called


@pytest.mark.parametrize("kind", [UNet, DdpmUNet])
@pytest.mark.parametrize("time", [16, None])
def test_features_of_a_unet_are_what_its_skips_and_its_middle_carry(kind, time):
    network, x = kind((2,), (2,), (8, 16, 8), time), torch.randn(2, 2, 16, 16)
    t = None if time is None else torch.randn(2, time)
    ends = [level.attention for level in network.down] + [network.middle2 if kind is UNet else network.middle]
    expected, out = handed_on(network, ends, x, t)
    if kind is DdpmUNet:
        del expected[-2]  # Which the second block of the lowest level goes on from.
    found = network.features(x, t)
    assert len(found) == len(expected) == (4 if kind is UNet else 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [f.shape[1:] for f in found][:2] == [(8, 16, 16), (16, 8, 8)]
    assert torch.equal(network(x, t), out)
    # Skips come to the decoder as they are.
    seen, _ = handed_on(network, [], x, t), []
    for level, skip in zip(network.up, found[-2::-1], strict=True):
        block = level.block1 if kind is UNet else level.block
        block.register_forward_pre_hook(lambda module, args, skip=skip: seen[0].append(args[0][:, -skip.shape[1] :]))
    network(x, t)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], found[-2::-1], strict=True))
    decoder = set(network.up.modules()) | set(network.head.modules())
    assert not calls(network, lambda: network.features(x, t)) & decoder


@pytest.mark.parametrize(("depth", "blocks"), [(1, [0]), (3, [2]), (4, [2, 3]), (7, [2, 5, 6])])
@pytest.mark.parametrize("scales", [1, 2])
def test_features_of_a_dit_are_the_tokens_of_every_third_block_and_of_the_last(depth, blocks, scales):
    network = DiT((2,) * scales, (2,) * scales, (8,) * depth, 8)
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    inputs = tuple(torch.randn(2, 2, 8 >> s, 8 >> s) for s in range(scales)), (torch.randn(2, 8),) * scales
    every, out = handed_on(network, [m for m in network.modules() if isinstance(m, DiTBlock)], *inputs)
    found = network.features(*inputs)
    assert len(found) == len(blocks) and found[0].shape == (2, 16 if scales == 1 else 20, 8)
    assert all(torch.equal(a, every[k]) for a, k in zip(found, blocks, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(network(*inputs), out, strict=True))
    assert not calls(network, lambda: network.features(*inputs)) & set(network.heads.modules())
