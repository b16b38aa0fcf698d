import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from baseline_model import BaselineModel
from diffusion.sampler import sample
from model import (
    CascadeModel,
    LIFTBaselineModel,
    LIFTDualTimestepModel,
    NoTimestepModel,
    SingleTimestepModel,
)
from networks.blocks import ResidualBlock, SelfAttention, timestep_embedding
from paths.families import diagonal
from scheduler import DDIMScheduler, predictions_alone

PARAMETERS = {
    BaselineModel: 58_274_627,
    LIFTBaselineModel: 58_278_086,
    LIFTDualTimestepModel: 58_475_206,
    CascadeModel: 58_473_475,
    SingleTimestepModel: 58_276_355,
    NoTimestepModel: 56_943_875,
}
MODELS = list(PARAMETERS)
NUM_CLOCKS = {
    BaselineModel: 1,
    LIFTBaselineModel: 1,
    LIFTDualTimestepModel: 2,
    CascadeModel: 2,
    SingleTimestepModel: 1,
    NoTimestepModel: 0,
}
NUM_PREDICTIONS = {
    BaselineModel: 1,
    LIFTBaselineModel: 2,
    LIFTDualTimestepModel: 2,
    CascadeModel: 1,
    SingleTimestepModel: 1,
    NoTimestepModel: 1,
}
SMALL = (8, 8, 16, 24)


def build(model_class, hidden_dims=SMALL, channels=3):
    torch.manual_seed(0)
    return model_class(hidden_dims=hidden_dims, channels=channels).eval().requires_grad_(False)


def inputs(model_class, batch=2, size=64, channels=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    x_64 = torch.randn(batch, channels, size, size, generator=g)
    x_32 = torch.randn(batch, channels, size // 2, size // 2, generator=g)
    ts = [torch.randint(1000, (batch,), generator=g) for _ in range(NUM_CLOCKS[model_class])]
    return ([x_64] if model_class is BaselineModel else [x_64, x_32]), ts


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("model_class", MODELS)
def test_parameter_counts_are_the_published_ones(model_class):
    with torch.device("meta"):
        model = model_class()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[model_class]
    assert all(p.requires_grad for p in model.parameters())


def test_dual_model_costs_the_published_flops_and_reaches_4x4():
    sizes = []
    with torch.device("meta"):
        model = LIFTDualTimestepModel()
        model.unet.middle1.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(2, 3, 64, 64), torch.empty(2, 3, 32, 32), torch.empty(2), torch.empty(2))
    assert round(counter.get_total_flops() / 2 / 1e9, 2) == 16.45
    assert sizes == [(2, 512, 4, 4)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("model_class", MODELS)
def test_predictions_have_the_shapes_of_the_images(model_class, size, channels):
    xs, ts = inputs(model_class, size=size, channels=channels)
    out = as_tuple(build(model_class, channels=channels)(*xs, *ts))
    assert [o.shape for o in out] == [x.shape for x in xs[: NUM_PREDICTIONS[model_class]]]
    assert all(o.isfinite().all() and o.std() > 0 for o in out)


@pytest.mark.parametrize("model_class", MODELS)
def test_images_of_a_batch_do_not_see_each_other(model_class):
    model = build(model_class, hidden_dims=(8, 128))  # 128 channels bring attention in.
    xs, ts = inputs(model_class, batch=3, size=16)
    out = as_tuple(model(*xs, *ts))
    for k in range(3):
        alone = as_tuple(model(*(x[k : k + 1] for x in xs), *(t[k : k + 1] for t in ts)))
        for together, single in zip(out, alone, strict=True):
            torch.testing.assert_close(together[k : k + 1], single, rtol=1e-5, atol=1e-5)
    order = torch.tensor([2, 0, 1])
    shuffled = as_tuple(model(*(x[order] for x in xs), *(t[order] for t in ts)))
    for together, other in zip(out, shuffled, strict=True):
        torch.testing.assert_close(together[order], other, rtol=1e-5, atol=1e-5)


def upsample_by_hand(x):
    """Factor 2 bilinear interpolation between pixel centres: 3/4 of the nearest pixel, 1/4 of the next."""
    for axis in (2, 3):
        x = np.moveaxis(x, axis, -1)
        before = np.concatenate([x[..., :1], x[..., :-1]], axis=-1)
        after = np.concatenate([x[..., 1:], x[..., -1:]], axis=-1)
        x = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=-1).reshape(*x.shape[:-1], -1)
        x = np.moveaxis(x, -1, axis)
    return x


@pytest.mark.parametrize("model_class", MODELS[1:])
def test_scales_join_by_upsampling_and_part_by_averaging(model_class):
    model = build(model_class)
    seen = {}
    model.unet.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    xs, ts = inputs(model_class, size=32)
    out = as_tuple(model(*xs, *ts))
    assert torch.equal(seen["x"][:, :3], xs[0])
    np.testing.assert_allclose(seen["x"][:, 3:], upsample_by_hand(xs[1].numpy()), atol=1e-6)
    assert torch.equal(out[0], seen["out"][:, :3])
    if len(out) == 2:
        blocks = seen["out"][:, 3:].reshape(2, 3, 16, 2, 16, 2)
        torch.testing.assert_close(out[1], blocks.mean(dim=(3, 5)))
    model(xs[0], torch.full_like(xs[1], 0.3), *ts)
    torch.testing.assert_close(seen["x"][:, 3:], torch.full_like(xs[0], 0.3))


def test_attention_is_softmax_attention_with_four_heads():
    torch.manual_seed(0)
    layer = SelfAttention(32).double()
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64)
    h = F.group_norm(x, 8, layer.norm.weight, layer.norm.bias).flatten(2)  # [B, C, HW]
    q, k, v = (
        torch.einsum("oc,bcn->bon", layer.qkv.weight[part, :, 0, 0], h) + layer.qkv.bias[part, None]
        for part in (slice(0, 32), slice(32, 64), slice(64, 96))
    )
    heads = []
    for c in range(0, 32, 8):
        scores = torch.einsum("bcn,bcm->bnm", q[:, c : c + 8], k[:, c : c + 8]) / 8**0.5
        weights = scores.exp() / scores.exp().sum(dim=2, keepdim=True)
        heads.append(torch.einsum("bnm,bcm->bcn", weights, v[:, c : c + 8]))
    mixed = torch.einsum("oc,bcn->bon", layer.proj.weight[:, :, 0, 0], torch.cat(heads, dim=1))
    expected = x + mixed.reshape(x.shape) + layer.proj.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_suits_the_fused_kernel(layout):
    torch.manual_seed(0)
    layer = SelfAttention(32).to(memory_format=layout)
    x = torch.randn(2, 32, 4, 4).to(memory_format=layout)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # Raises if the kernel cannot take its inputs.
        fused = layer(x)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(fused, layer(x))


def group_norm_by_hand(x, norm):
    groups = x.reshape(len(x), 8, -1)
    scaled = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    return scaled.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("embedding_dim", [None, 12])
def test_residual_block_is_its_formula(embedding_dim):
    torch.manual_seed(0)
    block = ResidualBlock(8, 16, embedding_dim).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    h = group_norm_by_hand(x, block.norm1)
    h = F.conv2d(h * h.sigmoid(), block.conv1.weight, block.conv1.bias, padding=1)
    if embedding_dim is not None:
        h = h + ((t * t.sigmoid()) @ block.time.weight.T + block.time.bias)[:, :, None, None]
    h = group_norm_by_hand(h, block.norm2)
    h = F.conv2d(h * h.sigmoid(), block.conv2.weight, block.conv2.bias, padding=1)
    shortcut = torch.einsum("oc,bchw->bohw", block.shortcut.weight[:, :, 0, 0], x) + block.shortcut.bias[:, None, None]
    torch.testing.assert_close(block(x, t), h + shortcut)


@pytest.mark.parametrize("t", [torch.tensor([0, 1, 37, 999]), torch.tensor([0.0, 0.5, 36.75, 999.0])])
def test_sinusoidal_embedding_has_its_closed_form(t):
    width = 64
    frequencies = 10000.0 ** (-np.arange(32) / 32)
    angles = t.numpy()[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    embedding = timestep_embedding(t, width)
    assert embedding.dtype == torch.float32
    np.testing.assert_allclose(embedding, expected, atol=2e-4)  # Angles up to 999 carry float32 rounding.


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("hidden_dims", [(), (12, 24), (64, 4), (0,), (-8,)])
def test_wrong_widths_are_named(model_class, hidden_dims):
    with pytest.raises(ValueError, match=r"^hidden_dims \(.*\) must be positive multiples of 8, .*512\.$"):
        model_class(hidden_dims=hidden_dims)


@pytest.mark.parametrize("model_class", MODELS)
def test_recomputing_runs_every_block_again_for_the_same_gradients(model_class):
    model = build(model_class, hidden_dims=(8, 128)).requires_grad_(True)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock | SelfAttention)]
    # Two levels down and up of two blocks each, three in the middle, and attention at 128 channels.
    assert model.unet.blocks() == blocks and len(blocks) == 2 * 4 + 3 + 2
    runs = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    xs, ts = inputs(model_class, size=16)
    found = {}
    for recompute in (False, True):
        model.unet.recompute = recompute
        runs.clear()
        out = as_tuple(model(*xs, *ts))
        assert len(runs) == len(blocks)
        sum(o.square().sum() for o in out).backward()
        assert len(runs) == (1 + recompute) * len(blocks)
        found[recompute] = [*out, *(p.grad for p in model.parameters())]
        model.zero_grad(set_to_none=True)
    for one, other in zip(*found.values(), strict=True):
        assert torch.equal(one, other)
    runs.clear()
    with torch.no_grad():  # Nothing is kept, and so nothing run again.
        model(*xs, *ts)
    assert len(runs) == len(blocks)


@pytest.mark.parametrize("model_class", MODELS)
def test_wrong_image_sizes_are_named(model_class):
    model = build(model_class)
    xs, ts = inputs(model_class, size=40)
    with pytest.raises(ValueError, match=r"^Image size 40x40 must be a multiple of 16 for the 4 levels of "):
        model(*xs, *ts)


@pytest.mark.parametrize("model_class", MODELS[1:])
def test_coarse_image_must_be_half_the_fine_one(model_class):
    model = build(model_class)
    (x_64, x_32), ts = inputs(model_class, size=32)
    with pytest.raises(ValueError, match=r"^A coarse image of 32x32 must be half .* fine image, which is 16x16\.$"):
        model(x_32, x_64, *ts)


@pytest.mark.parametrize("model_class", MODELS)
def test_denoise_takes_one_image_and_clock_per_scale_and_gives_each_prediction(model_class):
    model = build(model_class)
    (x_64, x_32), (t_64, t_32) = inputs(LIFTDualTimestepModel, size=32)
    expected = {
        BaselineModel: lambda: (model(x_64, t_64),),
        LIFTBaselineModel: lambda: model(x_64, x_32, t_64),
        LIFTDualTimestepModel: lambda: model(x_64, x_32, t_64, t_32),
        CascadeModel: lambda: (model(x_64, x_32, t_64, t_32),),
        SingleTimestepModel: lambda: (model(x_64, x_32, t_64),),
        NoTimestepModel: lambda: (model(x_64, x_32),),
    }[model_class]()
    t_coarse = t_64 if model_class is LIFTBaselineModel else t_32
    out = model.denoise((x_64, x_32)[: model.num_scales], (t_64, t_coarse)[: model.num_scales])
    assert isinstance(out, tuple) and len(out) == model.num_predictions == NUM_PREDICTIONS[model_class]
    assert model.num_scales == (1 if model_class is BaselineModel else 2)
    assert model.channels == 3 and build(model_class, channels=1).channels == 1
    for got, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    if model.num_scales == 2:
        other = model.denoise((x_64, x_32 + 0.5), (t_64, t_coarse))
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(out, other, strict=True))


def test_shared_clock_refuses_to_leave_the_diagonal():
    model = build(LIFTBaselineModel)
    xs, (t_64,) = inputs(LIFTBaselineModel, size=32)
    with pytest.raises(ValueError, match=r"^A model with one shared timestep can only follow a diagonal path\.$"):
        model.denoise(tuple(xs), (t_64, t_64 + torch.tensor([0, 1])))


@pytest.mark.parametrize("model_class", MODELS)
def test_a_model_reacts_to_the_clocks_it_knows_and_to_no_other(model_class):
    model = build(model_class)
    xs, ts = inputs(LIFTDualTimestepModel, size=32)
    xs = tuple(xs)[: model.num_scales]
    base = (torch.full((2,), 300), torch.full((2,), 300))[: model.num_scales]
    with_fine = (torch.full((2,), 700), *base[1:])
    if model_class is LIFTBaselineModel:
        with_fine = (torch.full((2,), 700),) * 2

    def change(ts):
        pairs = zip(model.denoise(xs, base), model.denoise(xs, ts), strict=True)
        return [(a - b).abs().max().item() for a, b in pairs]

    if model_class in (SingleTimestepModel, NoTimestepModel):
        assert change((base[0], torch.full((2,), 700))) == [0.0]
    if model_class is NoTimestepModel:
        assert change(with_fine) == [0.0]
        assert not any("time" in name or "embed" in name for name, _ in model.named_parameters())
        return
    assert min(change(with_fine)) > 1e-3
    if model_class in (LIFTDualTimestepModel, CascadeModel):
        assert min(change((base[0], torch.full((2,), 700)))) > 1e-3
        fine_ahead = as_tuple(model(*xs, torch.full((2,), 700), torch.full((2,), 300)))
        coarse_ahead = as_tuple(model(*xs, torch.full((2,), 300), torch.full((2,), 700)))
        assert (fine_ahead[0] - coarse_ahead[0]).abs().max() > 1e-3


def test_a_stage_of_a_cascade_is_the_dual_model_without_its_coarse_head():
    dual, cascade = build(LIFTDualTimestepModel), build(CascadeModel)
    weights = dual.state_dict()
    assert cascade.state_dict().keys() == weights.keys()
    head = [name for name, value in cascade.state_dict().items() if value.shape != weights[name].shape]
    assert head == ["unet.head.2.weight", "unet.head.2.bias"]
    cascade.load_state_dict(weights | {name: weights[name][:3] for name in head})
    xs, ts = inputs(CascadeModel, size=32)
    assert torch.equal(cascade(*xs, *ts), dual(*xs, *ts)[0])


@pytest.mark.parametrize("learned_variance", [False, True])
def test_a_stage_of_residuals_reads_and_predicts_details_alone(learned_variance):
    torch.manual_seed(0)
    model = CascadeModel(SMALL, representation="residual", learned_variance=learned_variance).eval()
    (x_64, x_32), ts = inputs(CascadeModel, size=32)
    with torch.no_grad():
        out = model(x_64, x_32, *ts)
        shifted = model(x_64 + 0.7, x_32, *ts)
    assert out.shape == (2, 6 if learned_variance else 3, 32, 32)
    assert F.avg_pool2d(out[:, :3], 2).abs().max() < 1e-6 < out[:, :3].std()
    torch.testing.assert_close(shifted, out, rtol=0, atol=1e-5)
    if learned_variance:  # What is said of variances is no image, and has means.
        assert F.avg_pool2d(out[:, 3:], 2).abs().max() > 1e-3


def twin_models(share):
    """A shared-t model, and a dual one whose joint embedding is `share` of that of t_64 and the rest of that of t_32.

    On the diagonal that is the embedding of t. SiLU is the identity there, to 1e-25, because its inputs are about 64.
    """
    torch.manual_seed(2)
    shared, dual = (c(hidden_dims=(8, 16)).double().eval() for c in (LIFTBaselineModel, LIFTDualTimestepModel))
    for parameter in shared.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    missing, unexpected = dual.load_state_dict(shared.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"combine"} and not unexpected
    for model in (shared, dual):
        # The sinusoid is float32 by design.
        model.embed.mlp.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    identity = torch.eye(32, dtype=torch.float64)
    dual.combine[0].weight.data = torch.cat([share * identity, (1 - share) * identity], dim=1)
    dual.combine[0].bias.data.fill_(64)
    dual.combine[2].weight.data = identity
    dual.combine[2].bias.data.fill_(-64)
    return shared.requires_grad_(False), dual.requires_grad_(False)


@pytest.mark.parametrize("share", [1, 0.25, 0])
def test_the_shared_clock_is_the_dual_model_on_the_diagonal_with_tied_weights(share):
    shared, dual = twin_models(share)
    (x_64, x_32), (t, other) = inputs(LIFTDualTimestepModel, size=16)
    x_64, x_32 = x_64.double(), x_32.double()
    wanted = shared(x_64, x_32, t)
    # Sums with 64 are rounded by 7e-15 at most, which this network does not amplify.
    for got, expected in zip(dual(x_64, x_32, t, t), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    for ts, same in (((t, other), share == 1), ((other, t), share == 0)):
        change = max((a - b).abs().max() for a, b in zip(dual(x_64, x_32, *ts), wanted, strict=True))
        assert change < 1e-13 if same else change > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_with_tied_weights_both_models_sample_the_same_images_on_the_diagonal(eta):
    shared, dual = twin_models(0.5)
    (x_64, x_32), _ = inputs(LIFTDualTimestepModel, size=16)
    noise, path, visited = (x_64.double(), x_32.double()), diagonal(12), {}

    def sampled(model):
        generator, points = torch.Generator().manual_seed(3), visited.setdefault(type(model), [])

        def draw(shape):
            return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

        def callback(k, images):
            points.append(images)

        return sample(model.denoise, DDIMScheduler(), path, noise, eta, callback, draw=draw).images

    images = sampled(shared)
    for got, wanted in zip(sampled(dual), images, strict=True):
        # At most 1e-13 at each of 12 calls, of which a step makes 17 times as much near noise, if nothing is clamped.
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
        assert 0.1 < wanted.std() and wanted.abs().max() <= 1
    for one, other in zip(*visited.values(), strict=True):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(one, other, strict=True))
    dual.combine[0].bias.data.fill_(63.9)
    assert (sampled(dual)[0] - images[0]).abs().max() > 1e-4


def test_each_image_of_a_batch_follows_its_own_clock():
    model = build(LIFTDualTimestepModel)
    (x_64, x_32), _ = inputs(LIFTDualTimestepModel, size=32)
    t = torch.tensor([500, 500])
    for moved in ((t, torch.tensor([500, 100])), (torch.tensor([500, 100]), t)):
        before, after = model(x_64, x_32, t, t), model(x_64, x_32, *moved)
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-6)
            assert (a[1] - b[1]).abs().max() > 1e-3


@pytest.mark.parametrize("model_class", [m for m in MODELS if m is not NoTimestepModel])
def test_classes_are_added_to_the_embedding_of_time(model_class):
    """A class whose embedding is that of none changes nothing, and each image has its own."""
    torch.manual_seed(0)
    model = model_class(hidden_dims=(8, 16), channels=1, num_classes=3).eval()
    plain = model_class(hidden_dims=(8, 16), channels=1)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("embed_class")})
    xs = (torch.randn(4, 1, 16, 16), torch.randn(4, 1, 8, 8))[: model.num_scales]
    ts = (torch.full((4,), 500),) * model.num_scales
    with torch.no_grad():
        model.embed_class.table.weight[[1, 3]] = 0
        model.embed_class.table.weight[[0, 2]] = torch.tensor([[1.0], [-1.0]])
        labels = torch.tensor([0, 1, 2, 3])
        told, untold, without = model.denoise(xs, ts, labels), model.denoise(xs, ts), plain.denoise(xs, ts)
        for a, b, c in zip(told, untold, without, strict=True):
            assert torch.equal(b, c)
            same = [torch.allclose(a[k], c[k], atol=1e-6) for k in range(4)]
            assert same == [False, True, False, True]
        alone = model.denoise(tuple(x[:1] for x in xs), tuple(t[:1] for t in ts), labels[:1])
        assert torch.allclose(alone[0], told[0][:1], atol=1e-6)


def test_labels_of_a_model_without_classes_are_refused():
    xs, ts = (torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 8, 8)), (torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="trained without classes"):
        LIFTDualTimestepModel((8, 16), 1).denoise(xs, ts, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="no embedding"):
        NoTimestepModel((8, 16), 1, num_classes=2)


@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
def test_learned_variance_is_the_second_half_of_a_prediction(representation):
    model = LIFTDualTimestepModel((8, 16), 2, representation, learned_variance=True)
    xs, ts = (torch.randn(2, 2, 16, 16), torch.randn(2, 2, 8, 8)), (torch.zeros(2), torch.zeros(2))
    fine, coarse = model.denoise(xs, ts)
    for alone, whole in zip(predictions_alone(model.denoise)(xs, ts), (fine, coarse), strict=True):
        assert torch.equal(alone, whole[:, :2])
    assert fine.shape == (2, 4, 16, 16) and coarse.shape == (2, 4, 8, 8)
    means = torch.nn.functional.avg_pool2d(fine, 2).abs().amax((0, 2, 3))
    assert (means[:2] < 1e-6).all() == (representation == "residual") and (means[2:] > 1e-3).all()
