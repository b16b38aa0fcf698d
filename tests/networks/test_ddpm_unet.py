"""The UNet of the DDPM report is what its description says, counted and looked at block by block."""

import pytest
import torch

from baseline_model import BaselineModel
from model import LIFTDualTimestepModel, NoTimestepModel
from networks.blocks import ResidualBlock, SelfAttention
from networks.ddpm_unet import DdpmUNet

WIDTHS = (64, 128, 256, 512)


def described(widths, channels, time, with_attention=True):
    """Parameters, counted from the description: kernels and biases, GroupNorms, and what embeds the time."""

    def conv(a, b, side):
        return a * b * side * side + b

    def block(a, b):
        return 2 * a + conv(a, b, 3) + time * b + b + 2 * b + conv(b, b, 3) + (conv(a, b, 1) if a != b else 0)

    def attention(width):
        return 2 * width + conv(width, 3 * width, 1) + conv(width, width, 1)

    total = widths[0] * time + time + time * time + time  # The MLP of the clock.
    total += conv(channels, widths[0], 7) + 2 * widths[0] + conv(widths[0], channels, 3)
    for narrow, wide in zip((widths[0], *widths), widths, strict=False):
        total += block(narrow, wide)
    total += block(widths[-1], widths[-1])
    for narrow, wide in zip(widths, widths[1:], strict=False):
        total += conv(narrow, narrow, 3) + conv(wide, narrow, 3) + block(2 * narrow, narrow)
    return total + (2 * (attention(widths[1]) + attention(widths[2])) if with_attention else 0)


@pytest.mark.parametrize("widths", [WIDTHS, (16, 8, 24, 32, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_has_the_parameters_of_its_description(widths, channels):
    with torch.device("meta"):
        model = BaselineModel(widths, channels, "ddpm_unet")
    count = sum(p.numel() for p in model.parameters())
    assert count == described(widths, channels, 4 * widths[0])
    assert widths != WIDTHS or 0.9 * 15e6 < count < 1.1 * 15e6


@pytest.mark.parametrize("widths", [WIDTHS, (16, 8, 24, 32, 8)])
def test_the_plain_one_lacks_attention_and_nothing_else(widths):
    with torch.device("meta"):
        model, whole = (BaselineModel(widths, 3, f"ddpm_unet{suffix}") for suffix in ("_plain", ""))
    assert not any(isinstance(module, SelfAttention) for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) == described(widths, 3, 4 * widths[0], with_attention=False)
    shared = {name: p.shape for name, p in whole.named_parameters() if ".attention." not in name}
    assert {name: p.shape for name, p in model.named_parameters()} == shared


def shapes_of_attention(network, size):
    """Sides of the feature maps that attention sees, in order, and of those that residual blocks see."""
    seen = {SelfAttention: [], ResidualBlock: []}
    for module in network.modules():
        if type(module) in seen:
            module.register_forward_pre_hook(lambda module, args: seen[type(module)].append(args[0].shape[-1]))
    network(torch.empty(1, 3, size, size), torch.empty(1, 256))
    return seen[SelfAttention], seen[ResidualBlock]


def test_attention_of_8_heads_is_at_16_and_8_of_32_and_nowhere_else():
    with torch.device("meta"):
        network = DdpmUNet((3,), (3,), WIDTHS, 256)
        attention, blocks = shapes_of_attention(network, 32)
    assert attention == [16, 8, 8, 16]
    assert blocks == [32, 16, 8, 4, 4, 8, 16, 32]
    assert [m.num_heads for m in network.modules() if isinstance(m, SelfAttention)] == [8] * 4
    assert network.stem.kernel_size == (7, 7) and network.head[-1].kernel_size == (3, 3)


@pytest.mark.parametrize(("levels", "sides"), [(1, []), (2, [16]), (3, [16, 8, 16]), (5, [16, 8, 8, 16])])
def test_attention_goes_with_the_level_whatever_the_number_of_levels(levels, sides):
    with torch.device("meta"):
        assert shapes_of_attention(DdpmUNet((3,), (3,), (8,) * levels, 256), 32)[0] == sides


@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
@pytest.mark.parametrize("model_class", [BaselineModel, LIFTDualTimestepModel, NoTimestepModel])
def test_gradients_reach_every_parameter_and_predictions_have_the_shape_of_images(model_class, size):
    torch.manual_seed(0)
    model = model_class((8, 8, 16, 24), 2, network="ddpm_unet")
    xs = (torch.randn(2, 2, *size), torch.randn(2, 2, size[0] // 2, size[1] // 2))[: model.num_scales]
    out = model.denoise(xs, (torch.tensor([3, 800]),) * model.num_scales)
    assert [o.shape for o in out] == [x.shape for x in xs[: model.num_predictions]]
    sum(o.square().sum() for o in out).backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_sizes_and_widths_that_do_not_fit_are_refused():
    for widths in ((8, 12), (), (4, 8)):
        with pytest.raises(ValueError, match=r"^hidden_dims \(.*must be positive multiples of 8"):
            DdpmUNet((3,), (3,), widths, 32)
    network = DdpmUNet((3,), (3,), (8, 8, 8), None)
    assert network.stride == 4 and network(torch.zeros(1, 3, 12, 4), None).shape == (1, 3, 12, 4)
    with pytest.raises(
        ValueError, match=r"^Image size 12x6 must be a multiple of 4 for the 3 levels of --hidden_dims;"
    ):
        network(torch.zeros(1, 3, 12, 6), None)
    assert DdpmUNet((3, 3), (3, 3), (8,), None).stride == 2  # So that there is a coarse image.
