"""Measured receptive fields against kernels, dense matrices, error maps and the formula of a network."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baseline_model import BaselineModel
from evaluation.receptive_field import ReceptiveField, measure_receptive_fields, share_by_scale
from exact_models import C, H, W, model, noisy, rng
from model import LIFTDualTimestepModel
from planning.error_map import error_map
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser

CLEAN = DDIMScheduler(prediction_type="x0")  # Of which a prediction is the clean image.
ALL = {"num_pixels": None}


def kernel():
    return torch.randn(2, 2, 5, 3, generator=rng(1), dtype=torch.float64)


def convolve(weight, circular=False):
    """A linear denoiser with a kernel [C, C, h, w] of odd sides."""
    reach = [size // 2 for size in weight.shape[2:]]

    def denoise(xs, ts):
        pad = (reach[1], reach[1], reach[0], reach[0])
        return (F.conv2d(F.pad(xs[0], pad, mode="circular" if circular else "constant"), weight),)

    return denoise


def images(*size, count=3, channels=2):
    return torch.randn(count, channels, *size, generator=rng(2), dtype=torch.float64)


def centred(energies, h, w):
    """The h x w middle of a map, and the largest of the rest."""
    top, left = energies.shape[0] // 2 - h // 2, energies.shape[1] // 2 - w // 2
    rest = energies.clone()
    rest[top : top + h, left : left + w] = 0
    return energies[top : top + h, left : left + w], rest.max().item()


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("pixels", [{}, {"num_pixels": 20}, ALL, {"num_pixels": 4, "margin": 2}])
def test_the_map_of_a_convolution_is_its_squared_kernel(circular, pixels):
    """Exactly, also of pixels at the border, as a mean over the pairs that exist."""
    xs, squared = (images(7, 6, count=30),), kernel().square().sum((0, 1))  # PyTorch's kernels are not flipped.
    [field] = measure_receptive_fields(convolve(kernel(), circular), CLEAN, xs, (500,), circular=circular, **pixels)
    assert field.energies.shape == ((7, 6) if circular else (13, 11))
    found, rest = centred(field.energies, 5, 3)
    torch.testing.assert_close(found, squared, rtol=1e-12, atol=0)
    assert rest == 0
    number = 30 * {"num_pixels": 1, **pixels}["num_pixels"] if pixels != ALL else 30 * 42
    assert field.pairs[field.pairs.shape[0] // 2, field.pairs.shape[1] // 2] == number
    if circular:
        assert (field.pairs == number).all() and field.total == pytest.approx(squared.sum().item(), rel=1e-12)
    elif pixels == ALL:  # As many pairs as images overlap when one is shifted.
        rows, columns = 7 - torch.arange(-6, 7).abs(), 6 - torch.arange(-5, 6).abs()
        assert torch.equal(field.pairs, 30 * rows[:, None] * columns)


def test_shares_and_sides_of_windows_are_those_of_the_kernel():
    weight = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    weight[0, 0, 3, 3], weight[0, 0, 2, 4], weight[0, 0, 5, 3], weight[0, 0, 0, 6] = 3, 2, 1, 0.5
    [field] = measure_receptive_fields(convolve(weight), CLEAN, (images(9, 9, channels=1),), (0,), **ALL)
    total = 9 + 4 + 1 + 0.25
    assert list(field.sides) == list(range(1, 18, 2))
    wanted = [9 / total, 13 / total, 14 / total, 1, 1, 1, 1, 1, 1]
    torch.testing.assert_close(field.shares(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    assert [field.side_of(share) for share in (0.1, 9 / total - 1e-9, 0.9, 0.95, 0.99, 1)] == [1, 1, 3, 5, 7, 7]
    for share in (0, -1, 1.01):
        with pytest.raises(ValueError, match=r"^A window holds a share above 0 and up to 1, not"):
            field.side_of(share)


def test_windows_of_a_torus_count_the_shorter_way_round():
    """An even torus of 4 has offsets -2 to 1, of which a window of 3 holds all but -2."""
    energies = torch.arange(1.0, 17, dtype=torch.float64).view(4, 4)
    field = ReceptiveField(energies, torch.ones(4, 4, dtype=torch.int64), energies.sum().item())
    assert list(field.sides) == [1, 3, 5]
    middle = energies[1:, 1:].sum().item()
    assert field.shares().tolist() == pytest.approx([energies[2, 2].item() / 136, middle / 136, 1])


@pytest.mark.parametrize(
    ("process", "prediction_type"),
    [("cosine_clipped", "epsilon"), ("sub_vp_cosine", "v"), ("ve", "score"), ("ve", "x0"), ("flow", "velocity")],
)
def test_a_linear_denoiser_of_any_prediction_has_the_clean_image_of_its_process(process, prediction_type):
    """x̂ = K * x, said in the words of a prediction type."""
    scheduler = DDIMScheduler(beta_schedule=process, prediction_type=prediction_type, clip_sample=False)

    def denoise(xs, ts):
        x0 = convolve(kernel())(xs, ts)[0]
        return (scheduler.target(x0, scheduler.epsilon_of(x0, ts[0], xs[0]), ts[0]),)

    for t in (300, 300.5):
        [field] = measure_receptive_fields(denoise, scheduler, (images(6, 7),), (t,), num_pixels=10)
        found, rest = centred(field.energies, 5, 3)
        torch.testing.assert_close(found, kernel().square().sum((0, 1)), rtol=1e-6, atol=1e-9)
        assert rest < 1e-9


def rows_of(matrix, out_shape, in_shape):
    """By hand: sums of g(p, q) by offset, and numbers of pairs, of a dense Jacobian [out, in]."""
    (_, h, w), (channels, rows, columns) = out_shape, in_shape
    g = matrix.square().view(out_shape[0], h, w, channels, rows, columns).sum((0, 3))  # [h, w, rows, columns]
    sums, pairs = torch.zeros(2, 2 * rows - 1, 2 * columns - 1, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            for i in range(rows):
                for j in range(columns):
                    place = i - y * rows // h + rows - 1, j - x * columns // w + columns - 1
                    sums[place] += g[y, x, i, j]
                    pairs[place] += 1
    return sums, pairs


@pytest.mark.parametrize("of", [0, 1])
@pytest.mark.parametrize("ts", [(400, 400), (700, 100), (100, 700)])
def test_gaussian_images_have_the_rows_of_their_matrix_in_both_scales(ts, of):
    scheduler = DDIMScheduler(prediction_type="v", clip_sample=False)
    denoiser, _, _ = model(scheduler)
    xs, times = noisy(scheduler, *ts, count=1)

    def clean(*xs):
        return scheduler.predict_x0(denoiser(*xs, *times)[of], times[of], xs[of])

    jacobians = torch.autograd.functional.jacobian(clean, xs)
    fields = measure_receptive_fields(denoiser.denoise, scheduler, xs, ts, of=of, **ALL)
    out = [(C, H, W), (C, H // 2, W // 2)][of]
    for field, jacobian, x in zip(fields, jacobians, xs, strict=True):
        sums, pairs = rows_of(jacobian, out, x.shape[1:])
        torch.testing.assert_close(field.energies, sums / pairs.clamp(min=1), rtol=1e-9, atol=1e-14)
        assert torch.equal(field.pairs, pairs.long())
        assert field.total * out[1] * out[2] == pytest.approx(jacobian.square().sum().item(), rel=1e-9)
    norms = torch.stack([jacobian.square().sum() for jacobian in jacobians])
    torch.testing.assert_close(share_by_scale(fields), norms / norms.sum(), rtol=1e-9, atol=0)


def test_one_scale_of_gaussian_images_has_the_rows_of_its_matrix():
    """The coarse image of pure noise, which says nothing, and the fine one alone."""
    scheduler = DDIMScheduler(beta_schedule="cosine_zero_terminal", prediction_type="v", clip_sample=False)
    denoiser, basis, variances = model(scheduler)
    _, noise = noisy(scheduler, 500, 999, count=4)[0]

    def denoise(xs, ts):
        return denoiser.denoise((xs[0], noise[: len(xs[0])]), (ts[0], torch.full_like(ts[0], 999)))[:1]

    [field] = measure_receptive_fields(denoise, scheduler, (images(H, W, channels=C),), (500,), **ALL)
    alpha, sigma = scheduler.alphas[500], scheduler.sigmas[500]
    gains = alpha * variances / (alpha**2 * variances + sigma**2)  # Of orthonormal modes.
    matrix = basis.T @ (gains[:, None] * basis)
    sums, pairs = rows_of(matrix, (C, H, W), (C, H, W))
    torch.testing.assert_close(field.energies, sums / pairs.clamp(min=1), rtol=1e-9, atol=1e-14)
    assert share_by_scale([field]).tolist() == [1]


def test_shares_of_scales_are_those_of_the_blocks_of_an_error_map():
    """With as many probes as a signed square of them has, its estimate is near: 4 % of noise here."""
    scheduler = DDIMScheduler(clip_sample=False)
    clean = torch.rand(2, C, H, W, generator=rng(5), dtype=torch.float64) * 2 - 1
    denoiser = model(scheduler)[0]
    found = error_map(denoiser.denoise, scheduler, clean, (600, 300), 400, maps="blocks", of="x0", progress=False)
    for i, j in ((0, 1), (1, 0)):
        ts = [(600, 300)[k] for k in (i, j)]
        fields = measure_receptive_fields(denoiser.denoise, scheduler, noisy(scheduler, *ts, 2)[0], ts, **ALL)
        fine, coarse = (found["jacobian"][block][i, j].item() for block in ("HH", "HL"))
        assert share_by_scale(fields)[1].item() == pytest.approx(coarse / (fine + coarse), rel=0.05)
        assert fields[0].total * H * W == pytest.approx(fine, rel=0.05)


def network(name, depth, model_class=BaselineModel):
    torch.manual_seed(0)
    built = model_class((8,) * depth, 2, network=name)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.15)
    return built.requires_grad_(False)


@pytest.mark.parametrize("name", ["resnet", "resnet_circular"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_resnet_has_nothing_beyond_its_receptive_field(name, depth):
    built, xs = network(name, depth), (images(20, 18).float(),)
    [field] = measure_receptive_fields(
        built.denoise, DDIMScheduler(), xs, (500,), num_pixels=30, circular=name != "resnet"
    )
    side = built.unet.receptive_field
    inside, rest = centred(field.energies, side, side)
    assert rest == 0 and (inside > 0).all() and field.side_of(1) == side
    shares = field.shares()
    assert shares[-1] == 1 and (shares.diff() >= 0).all() and shares[side // 2 - 1] < 1
    assert field.side_of(0.9) < side


@pytest.mark.parametrize("model_class", [BaselineModel, LIFTDualTimestepModel])
def test_neither_the_batch_size_nor_other_images_matter(model_class):
    built, xs = network("resnet", 1, model_class), (images(8, 8, count=5).float(), images(4, 4, count=5).float())
    xs, ts = xs[: built.num_scales], (700, 200)[: built.num_scales]
    once, apart = (
        measure_receptive_fields(built.denoise, DDIMScheduler(), xs, ts, num_pixels=3, seed=4, batch_size=size)
        for size in (5, 2)
    )
    other = measure_receptive_fields(built.denoise, DDIMScheduler(), xs, ts, num_pixels=3, seed=5)
    for one, another, moved in zip(once, apart, other, strict=True):
        torch.testing.assert_close(one.energies, another.energies, rtol=1e-4, atol=1e-9)
        assert torch.equal(one.pairs, another.pairs) and not torch.equal(one.pairs, moved.pairs)
    shares = share_by_scale(once)
    assert shares.sum().item() == pytest.approx(1) and (shares > 0).all()


def test_what_cannot_be_measured_is_refused():
    xs = (images(6, 6),)
    passes = convolve(kernel())

    def measure(denoise=passes, xs=xs, ts=(500,), **options):
        return measure_receptive_fields(denoise, CLEAN, xs, ts, **options)

    for options, says in (
        ({"xs": (xs[0][0],)}, "Noisy images must be float"),
        ({"ts": (500, 400)}, "1 scales and 2 timesteps"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_pixels": 0}, "num_pixels is 0, but 1 to 36"),
        ({"num_pixels": 5, "margin": 2}, "num_pixels is 5, but 1 to 4"),
        ({"margin": 3}, "A margin of 3 pixels leaves none of images of 6x6"),
        ({"margin": -1}, "A margin of -1"),
        ({"denoise": lambda xs, ts: (xs[0].detach(),)}, "lets gradients pass"),
        ({"denoise": lambda xs, ts: (xs[0] * math.inf,)}, "not finite"),
        ({"xs": (*xs, *xs), "ts": (5, 5), "of": 1}, "no prediction of scale 1"),
    ):
        with pytest.raises(ValueError, match=says):
            measure(**options)
    [blind] = measure(lambda xs, ts: (0 * xs[0],))
    for refused in (blind.shares, lambda: share_by_scale([blind])):
        with pytest.raises(ValueError, match=r"depend.* no.* share of it\.$"):
            refused()


def test_gradients_reach_through_a_gaussian_denoiser_in_its_dtype():
    """float32 in, and a frozen denoiser is left as it was."""
    denoiser = model(DDIMScheduler(clip_sample=False))[0].float()
    assert isinstance(denoiser, GaussianDenoiser)
    xs = tuple(x.float() for x in noisy(DDIMScheduler(), 500, 400)[0])
    with torch.no_grad():
        fields = measure_receptive_fields(denoiser.denoise, DDIMScheduler(clip_sample=False), xs, (500, 400))
    assert all(field.energies.dtype == torch.float64 for field in fields) and not any(x.requires_grad for x in xs)
