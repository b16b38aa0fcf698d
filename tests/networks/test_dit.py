"""Diffusion transformers: what the paper says of them, closed forms, and the same network in diffusers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baseline_model import BaselineModel
from model import (
    DEFAULT_HIDDEN_DIMS,
    LIFTBaselineModel,
    LIFTDualTimestepModel,
    NoTimestepModel,
    SingleTimestepModel,
    network_name,
    resolve_network,
)
from networks import dit
from networks.dit import SIZES, Attention, DiTBlock, heads_of_width, positions, unpatchify

WIDTHS = (32, 32)
# Of the paper, in millions, for 4 channels, 1000 classes and learned variance.
PRINTED = {"S": 33, "B": 130, "L": 458, "XL": 675}
MODELS = [BaselineModel, LIFTDualTimestepModel, LIFTBaselineModel, SingleTimestepModel]


def build(model_class=LIFTDualTimestepModel, network="DiT/2", widths=WIDTHS, channels=2, random=True, **options):
    """A small model; `random` gives values to what is zero at first, and a say to what is next to nothing."""
    torch.manual_seed(0)
    model = model_class(widths, channels, network=network, **options)
    if random:
        for p in model.parameters():
            nn.init.normal_(p, std=0.15)
    return model


def inputs(model, size=8, batch=3, channels=2):
    g = torch.Generator().manual_seed(1)
    xs = tuple(torch.randn(batch, channels, size >> s, size >> s, generator=g) for s in range(model.num_scales))
    ts = tuple(torch.randint(1000, (batch,), generator=g) for _ in xs)
    return xs, ts if not model.one_clock else (ts[0],) * len(ts)


# Names and sizes


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_parameters_of_the_paper(size):
    """In millions, as printed: without the fixed positions, of which the 256 D values would make 131 of the 130."""
    depth, width, heads = SIZES[size]
    with torch.device("meta"):
        model = BaselineModel(channels=4, network=f"DiT-{size}/2", num_classes=1000, learned_variance=True)
    patch = width * (4 * 2 * 2 + 1)
    time = 256 * width + width + width * width + width
    classes = 1001 * width
    # qkv 3, projection 1, MLP 8 and modulation 6 squares of the width, and biases as many as outputs.
    block = 18 * width**2 + (3 + 1 + 4 + 1 + 6) * width
    final = 2 * width**2 + 2 * width + (width + 1) * 2 * 2 * 8
    count = sum(p.numel() for p in model.parameters())
    assert count == patch + time + classes + depth * block + final
    assert round(count / 1e6) == PRINTED[size]
    assert model.hidden_dims == (width,) * depth and model.sinusoid_width == 256
    assert {layer.attention.num_heads for layer in model.unet.layers} == {heads} and width % heads == 0


def test_names_say_size_and_patch_in_any_case():
    for text, name in (
        ("dit-xl/2", "DiT-XL/2"),
        ("DIT/16", "DiT/16"),
        ("UNet", "unet"),
        ("DDPM_UNET", "ddpm_unet"),
        ("DDPM_UNet_plain", "ddpm_unet_plain"),
    ):
        assert network_name(text) == name == network_name(name)
    for text in (
        "DiT",
        "DiT/0",
        "DiT/",
        "DiT-M/2",
        "DiT-S/2.5",
        "DiT-S/-2",
        "dit-/2",
        "unet/2",
        "",
        "DiT/٣",
        "DiT/2\n",
    ):
        with pytest.raises(
            ValueError, match=r"(?s)^Unknown network '.*choose one of unet, ddpm_unet, ddpm_unet_plain, DiT-S/2"
        ):
            network_name(text)
    found = resolve_network("dit-b/8")
    assert found.hidden_dims == (768,) * 12 and found.make.keywords == {"patch": 8, "num_heads": 12}
    for widths in (found.hidden_dims, list(found.hidden_dims), list(DEFAULT_HIDDEN_DIMS)):
        assert resolve_network("DiT-B/8", widths).hidden_dims == found.hidden_dims
    with pytest.raises(ValueError, match=r"^DiT-B/8 has 12 blocks of width 768; leave hidden_dims out, or choose"):
        resolve_network("DiT-B/8", (768,) * 11)


@pytest.mark.parametrize("widths", [DEFAULT_HIDDEN_DIMS, (), (32, 64), (30, 30), (0,), (-4, -4), (2,)])
def test_widths_of_a_dit_are_equal_and_hold_positions(widths):
    with pytest.raises(ValueError, match=r"^hidden_dims \(.*\) must be the width of every block of a DiT, all equal"):
        BaselineModel(widths, network="DiT/2")


@pytest.mark.parametrize(
    ("width", "heads"), [(4, 1), (64, 1), (96, 1), (128, 2), (192, 3), (200, 2), (384, 6), (768, 12), (1024, 16)]
)
def test_heads_have_64_channels_or_somewhat_more(width, heads):
    assert heads_of_width(width) == heads and width % heads == 0


def test_a_model_without_clocks_is_refused():
    with pytest.raises(ValueError, match=r"^DiT/2 hears of its input through timesteps alone.*unet or ddpm_unet\.$"):
        NoTimestepModel(WIDTHS, network="dit/2")


@pytest.mark.parametrize(("model_class", "stride"), [(BaselineModel, 4), (LIFTDualTimestepModel, 8)])
def test_patches_divide_images_of_every_scale(model_class, stride):
    model = build(model_class, "DiT/4")
    assert model.unet.stride == stride
    xs, ts = inputs(model, size=8)
    assert [o.shape for o in model.denoise(xs, ts)] == [x.shape for x in xs]
    scales = "one scale" if stride == 4 else "two scales"
    says = (
        rf"^Image size 20x18 must be a multiple of {stride} for the 4x4 patches of {scales}; use a smaller patch, such"
    )
    with pytest.raises(ValueError, match=says):
        model.denoise((torch.zeros(3, 2, 20, 18), torch.zeros(3, 2, 10, 9))[: model.num_scales], ts)


# Initialisation


@pytest.mark.parametrize("model_class", MODELS)
def test_at_first_blocks_are_the_identity_and_predictions_are_zero(model_class):
    model = build(model_class, random=False, learned_variance=True, num_classes=2)
    xs, ts = inputs(model)
    out = model.denoise(xs, ts, torch.tensor([0, 1, 2]))
    assert all(not o.any() and o.shape[1] == 4 for o in out)
    tokens, c = torch.randn(3, 20, 32), torch.randn(3, 2, 32)
    for block in model.unet.layers:
        assert torch.equal(block(tokens, c, (16, 4)), tokens)
    for name, p in model.named_parameters():
        zero = "modulation" in name or "heads" in name or ("bias" in name and "combine" not in name)
        assert zero == (not p.any()), name


def test_initial_weights_are_those_of_the_paper():
    torch.manual_seed(0)
    model = BaselineModel((256, 256), 3, "DiT/4")
    for linear in (model.embed.mlp[0], model.embed.mlp[2]):
        assert abs(linear.weight.std() / 0.02 - 1) < 0.02
    block = model.unet.layers[1]
    for weight in (block.attention.qkv.weight, block.attention.proj.weight, block.mlp[0].weight, block.mlp[2].weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.99 * bound < weight.abs().max() <= bound and abs(weight.std() * math.sqrt(3) / bound - 1) < 0.02
    bound = math.sqrt(6 / (256 + 3 * 4 * 4))  # A patch is one vector.
    assert 0.99 * bound < model.unet.patchify[0].weight.abs().max() <= bound


# Patches and positions


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_unpatchifying_undoes_patches(patch):
    """With the weights that copy a patch, channels last."""
    x = torch.randn(2, 3, 4 * patch, 5 * patch)
    values = 3 * patch * patch
    convolution = nn.Conv2d(3, values, patch, stride=patch, bias=False)
    copies = torch.eye(values).view(patch, patch, 3, values)  # row, column, channel of a patch
    convolution.weight.data = copies.permute(3, 2, 0, 1).contiguous()
    tokens = convolution(x).flatten(2).transpose(1, 2)
    assert torch.equal(tokens[0, 6].view(patch, patch, 3), x[0, :, patch : 2 * patch, patch : 2 * patch].movedim(0, 2))
    assert torch.equal(unpatchify(tokens, 4, 5, patch), x)


def test_positions_have_their_closed_form_at_every_scale():
    found = positions(3, 5, 1, 16)
    assert found.shape == (15, 16) and found.dtype == torch.float32
    for row in range(3):
        for column in range(5):
            angles = [(place, 10000.0 ** (-k / 4)) for place in (column, row) for k in range(4)]
            sines, cosines = ([f(place * frequency) for place, frequency in angles] for f in (math.sin, math.cos))
            wanted = torch.tensor(sines[:4] + cosines[:4] + sines[4:] + cosines[4:])
            torch.testing.assert_close(found[5 * row + column], wanted, rtol=0, atol=1e-6)
    # The middle of a coarse patch is that of the four fine ones it covers, whose angles lie around its own.
    fine, coarse = positions(4, 4, 1, 4).view(4, 4, 4), positions(2, 2, 2, 4).view(2, 2, 4)
    for row in range(2):
        for column in range(2):
            covered = fine[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((0, 1)).view(2, 2)
            wanted = F.normalize(covered, dim=1).flatten()  # The mean of two unit vectors points between them.
            torch.testing.assert_close(coarse[row, column], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_class", MODELS)
def test_tokens_that_move_with_their_positions_change_nothing_else(model_class, monkeypatch):
    model = build(model_class).double().eval()
    model.embed.mlp.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    xs, ts = inputs(model)
    xs = tuple(x.double() for x in xs)
    order = {16: torch.randperm(16, generator=torch.Generator().manual_seed(2)), 4: torch.tensor([2, 0, 3, 1])}

    def shuffled(x):
        """Patches of 2x2 pixels in another order."""
        side = x.shape[-1] // 2
        patches = x.unflatten(2, (side, 2)).unflatten(4, (side, 2)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)
        return unpatchify(patches[:, order[side * side]], side, side, 2)

    with torch.no_grad():
        out = model.denoise(xs, ts)
        moved_alone = model.denoise(tuple(map(shuffled, xs)), ts)
        monkeypatch.setattr(dit, "positions", lambda *grid: positions(*grid)[order[grid[0] * grid[1]]])
        moved = model.denoise(tuple(map(shuffled, xs)), ts)
    for a, b, c in zip(out, moved, moved_alone, strict=True):
        torch.testing.assert_close(b, shuffled(a), rtol=0, atol=1e-12)
        assert (c - shuffled(a)).abs().max() > 1e-3


# Attention, and two scales


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_the_softmax_of_its_definition(heads):
    torch.manual_seed(0)
    attention, h = Attention(16, heads).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    w, b = attention.qkv.weight, attention.qkv.bias
    q, k, v = ((h @ w[16 * n : 16 * n + 16].T + b[16 * n : 16 * n + 16]) for n in range(3))
    found, d = [], 16 // heads
    for head in range(heads):
        part = slice(head * d, head * d + d)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d)
        found.append((scores.exp() / scores.exp().sum(2, keepdim=True)) @ v[..., part])
    wanted = torch.cat(found, 2) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(h), wanted, rtol=0, atol=1e-13)


def test_tokens_of_each_scale_listen_to_their_own_clock():
    model = build().eval()
    (x_64, x_32), (t_64, t_32) = inputs(model)
    block, seen = model.unet.layers[0], []
    block.attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        first = model(x_64, x_32, t_64, t_32)
        later_coarse, later_fine = model(x_64, x_32, t_64, 999 - t_32), model(x_64, x_32, 999 - t_64, t_32)
    usual, coarse, fine = seen
    assert torch.equal(usual[:, :16], coarse[:, :16]) and (usual[:, 16:] - coarse[:, 16:]).abs().amax(2).min() > 1e-3
    assert torch.equal(usual[:, 16:], fine[:, 16:]) and (usual[:, :16] - fine[:, :16]).abs().amax(2).min() > 1e-3
    # By attention, either clock moves both predictions.
    for other in (later_coarse, later_fine):
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(first, other, strict=True))


def test_scales_that_do_not_attend_to_each_other_are_two_networks_of_one_scale(monkeypatch):
    """With the weights of the fine and of the coarse part of a network of two scales."""
    model = build().eval()
    (x_64, x_32), (t_64, t_32) = inputs(model)
    with torch.no_grad():
        joined = model(x_64, x_32, t_64, t_32)
    apart = torch.block_diag(torch.ones(16, 16), torch.ones(4, 4)).bool()
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: attend(q, k, v, attn_mask=apart))
    with torch.no_grad():
        cut = model(x_64, x_32, t_64, t_32)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for scale, (x, t) in enumerate(((x_64, t_64), (x_32, t_32))):
        own = {f"unet.{part}.{scale}.": f"unet.{part}.0." for part in ("patchify", "heads")}
        single = BaselineModel(WIDTHS, 2, "DiT/2").eval()
        chosen = {}
        for name, value in model.state_dict().items():
            old = next((start for start in own if name.startswith(start)), None)
            if old is not None or "patchify" not in name and "heads" not in name:
                chosen[name if old is None else name.replace(old, own[old])] = value
        single.load_state_dict(chosen)
        with monkeypatch.context() as patched, torch.no_grad():
            # Places in the picture are those of this scale.
            patched.setattr(dit, "positions", lambda r, c, _, *rest, scale=scale: positions(r, c, 2**scale, *rest))
            alone = single(x, t)
        torch.testing.assert_close(cut[scale], alone, rtol=0, atol=1e-5)
        assert (joined[scale] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("model_class", MODELS)
def test_gradients_reach_every_parameter_and_recomputing_changes_none(model_class):
    model = build(model_class, num_classes=2)
    xs, ts = inputs(model)
    labels, found = torch.tensor([0, 1, 2]), {}
    assert model.unet.blocks() == [m for m in model.modules() if isinstance(m, DiTBlock)] and len(WIDTHS) == 2
    runs = []
    for block in model.unet.blocks():
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    for recompute in (False, True):
        model.unet.recompute = recompute
        runs.clear()
        out = model.denoise(xs, ts, labels)
        sum(o.square().sum() for o in out).backward()
        assert len(runs) == 2 * (1 + recompute)
        found[recompute] = [*out, *(p.grad for p in model.parameters())]
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


# A second library


@pytest.mark.parametrize(("widths", "patch", "heads"), [((128, 128), 2, 2), ((32, 32, 32), 4, 1)])
def test_diffusers_computes_the_same_of_the_same_weights(widths, patch, heads):
    """`DiTTransformer2DModel` has an embedder of time and class in every block, of which trained weights are equal.

    Its sinusoids have frequencies 10000^(-k / 127) where those of the paper's code, and ours, have 10000^(-k / 128);
    its blocks norm before the MLP with 1e-5 unless told otherwise.
    """
    diffusers = pytest.importorskip("diffusers")
    ours = build(BaselineModel, f"DiT/{patch}", widths, 3, num_classes=5, learned_variance=True).eval()
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=widths[0] // heads,
        in_channels=3,
        out_channels=6,
        num_layers=len(widths),
        sample_size=16,
        patch_size=patch,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    state = ours.state_dict()
    renamed = {
        "pos_embed.proj": "unet.patchify.0",
        "proj_out_1": "unet.heads.0.modulation.1",
        "proj_out_2": "unet.heads.0.linear",
    }
    for k in range(len(widths)):
        there, here = f"transformer_blocks.{k}", f"unet.layers.{k}"
        renamed |= {
            f"{there}.norm1.linear": f"{here}.modulation.1",
            f"{there}.attn1.to_out.0": f"{here}.attention.proj",
            f"{there}.ff.net.0.proj": f"{here}.mlp.0",
            f"{there}.ff.net.2": f"{here}.mlp.2",
            f"{there}.norm1.emb.timestep_embedder.linear_1": "embed.mlp.0",
            f"{there}.norm1.emb.timestep_embedder.linear_2": "embed.mlp.2",
            f"{there}.norm1.emb.class_embedder.embedding_table": "embed_class.table",
        }
    weights = {
        f"{new}.{kind}": state[f"{old}.{kind}"]
        for new, old in renamed.items()
        for kind in ("weight", "bias")
        if f"{old}.{kind}" in state
    }
    for k in range(len(widths)):
        for kind in ("weight", "bias"):
            parts = state[f"unet.layers.{k}.attention.qkv.{kind}"].chunk(3)
            weights |= {
                f"transformer_blocks.{k}.attn1.to_{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)
            }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    g = torch.Generator().manual_seed(3)
    x, t, labels = torch.randn(4, 3, 16, 16, generator=g), torch.tensor([0, 17, 500, 999]), torch.tensor([0, 4, 2, 5])
    with torch.no_grad():
        wanted = theirs(x, timestep=t, class_labels=labels).sample
        got = ours(x, t, labels)
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.std().item())
