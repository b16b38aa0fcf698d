"""The error map against exact Jacobians, closed forms and Gaussian images, whose optimal denoiser is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from error_map import BLOCKS, CHAIN_RULE_FACTORS, error_map, published_errors
from model import LIFTDualTimestepModel
from path import timestep_grid
from scheduler import DDIMScheduler


def images(b=2, c=1, h=4, w=4, seed=5, dtype=torch.float64):
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def run(denoise, x, t_grid, **options):
    return error_map(denoise, options.pop("scheduler", DDIMScheduler()), x, t_grid, progress=False, **options)


def identity(xs, ts):
    return xs


def corner(x_32):
    """Each coarse pixel placed in one corner of its 2x2 block: a coarse-to-fine map with orthogonal rows."""
    x_64 = x_32.new_zeros(*x_32.shape[:2], 2 * x_32.shape[2], 2 * x_32.shape[3])
    x_64[..., ::2, ::2] = x_32
    return x_64


def gains(ts):
    """Four functions of (t_64, t_32), none symmetrical, one per block."""
    t_64, t_32 = (t.double()[:, None, None, None] / 1000 for t in ts)
    return 1 + t_64 + 3 * t_32, 2 - t_64 * t_32**2, 0.3 + t_32 - t_64, 5 - 2 * t_64 + t_32


def linear(xs, ts):
    """Every block has orthogonal rows, so J Jᵀ is diagonal and each single probe gives ‖J‖² exactly."""
    hh, hl, lh, ll = gains(ts)
    return hh * xs[0] + hl * corner(xs[1]), lh * F.avg_pool2d(xs[0], 2) + ll * xs[1]


def linear_norms(t_64, t_32, n_64, n_32):
    hh, hl, lh, ll = (g.item() for g in gains((torch.tensor([t_64]), torch.tensor([t_32]))))
    # The pool has n_32 rows of four entries 1/4.
    return {"HH": hh**2 * n_64, "HL": hl**2 * n_32, "LH": lh**2 * n_32 / 4, "LL": ll**2 * n_32}


def small_model():
    torch.manual_seed(1)
    model = LIFTDualTimestepModel(hidden_dims=(8, 16), channels=1).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    # The sinusoid is float32 by design.
    model.embed.mlp.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return model


@pytest.fixture(scope="module")
def against_exact():
    model, scheduler, t_grid = small_model(), DDIMScheduler(), [999, 600, 0]
    seen = {}

    def denoise(xs, ts):
        for x_64, x_32, t_64, t_32 in zip(*xs, *ts, strict=True):
            seen[int(t_64), int(t_32)] = (x_64.detach()[None], x_32.detach()[None])
        return model(*xs, *ts)

    result = run(denoise, images(b=1, h=8, w=8), t_grid, scheduler=scheduler, num_probes=200, seed=3)
    exact = {name: torch.zeros(3, 3, dtype=torch.float64) for name in BLOCKS}
    for i, t_64 in enumerate(t_grid):
        for j, t_32 in enumerate(t_grid):
            ts = (torch.tensor([t_64]), torch.tensor([t_32]))
            rows = torch.func.jacrev(lambda a, b, ts=ts: model(a, b, *ts), argnums=(0, 1))(*seen[t_64, t_32])
            for name, jacobian in zip(BLOCKS, [block for row in rows for block in row], strict=True):
                exact[name][i, j] = jacobian.square().sum()
    return result, exact, model


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_a_model_agree_with_its_exact_jacobian(against_exact, name):
    result, exact, _ = against_exact
    estimate, error = result["jacobian"][name], result["jacobian_se"][name]
    assert (error > 0).all()
    assert ((estimate - exact[name]).abs() < 3 * error).all()
    # Three standard errors mean something only if they are small and the cells differ by more.
    assert (error < 0.15 * exact[name]).all()
    assert exact[name].max() > 2 * exact[name].min()


def test_estimates_are_unbiased_over_seeds():
    model, x = small_model().requires_grad_(False), images(b=1, h=8, w=8)
    t = torch.tensor([400])

    def at_fixed_point(xs, ts):  # Noise differs between seeds, so it is taken out: the Jacobian is one matrix.
        return model(*(x.detach() * 0.5 + a - a.detach() for x, a in zip(pair, xs, strict=True)), t, t)

    pair = (x, F.avg_pool2d(x, 2))
    rows = torch.func.jacrev(lambda a, b: model(a, b, t, t), argnums=(0, 1))(*(0.5 * p for p in pair))
    runs = [run(at_fixed_point, x, [400], num_probes=1, seed=seed)["jacobian"] for seed in range(200)]
    for name, jacobian in zip(BLOCKS, [block for row in rows for block in row], strict=True):
        values = torch.stack([r[name][0, 0] for r in runs])
        assert values.std() > 0
        assert (values.mean() - jacobian.square().sum()).abs() < 3 * values.std() / math.sqrt(200)


def test_parameters_get_no_gradient(against_exact):
    model = against_exact[2]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("num_probes", [1, 3])
def test_orthogonal_rows_are_exact_with_every_probe(num_probes):
    t_grid = [900, 500, 20]
    result = run(linear, images(b=3, c=2, h=4, w=6), t_grid, num_probes=num_probes)
    n_64, n_32 = 2 * 4 * 6, 2 * 2 * 3
    for i, t_64 in enumerate(t_grid):
        for j, t_32 in enumerate(t_grid):
            for name, norm in linear_norms(t_64, t_32, n_64, n_32).items():
                assert result["jacobian"][name][i, j].item() == pytest.approx(norm, rel=1e-12)
                assert result["jacobian_se"][name][i, j].item() == pytest.approx(0, abs=1e-12 * norm)


def test_a_scale_that_is_ignored_has_a_zero_block():
    result = run(identity, images(), [700, 10])
    assert all((result["jacobian"][name] == 0).all() for name in ("HL", "LH"))
    assert (result["jacobian"]["HH"] == 16).all() and (result["jacobian"]["LL"] == 4).all()


def test_standard_error_over_images_is_that_of_their_norms():
    def denoise(xs, ts):
        gain = torch.arange(1, 6, dtype=torch.float64)[:, None, None, None]
        return gain * xs[0], xs[1]

    result = run(denoise, images(b=5), [500], batch_size=5)
    norms = 16 * np.arange(1, 6) ** 2.0
    assert result["jacobian"]["HH"].item() == pytest.approx(norms.mean())
    assert result["jacobian_se"]["HH"].item() == pytest.approx(norms.std(ddof=1) / math.sqrt(5))
    assert result["jacobian_per_image"][0, 0, 0].tolist() == pytest.approx(norms.tolist())


def test_standard_error_of_one_image_is_that_of_its_probes():
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(xs, ts):
        return (xs[0].flatten(1) @ matrix.T).view_as(xs[0]), xs[1]

    result = run(denoise, images(b=1), [500], num_probes=3000)
    gram = matrix @ matrix.T
    # Var ‖Jᵀw‖² = 2 Σ_{a≠b} (J Jᵀ)²_ab for signs w.
    variance = 2 * (gram.square().sum() - gram.diagonal().square().sum())
    assert result["jacobian_se"]["HH"].item() == pytest.approx(math.sqrt(variance / 3000), rel=0.1)
    lonely = run(denoise, images(b=1), [500], num_probes=1)
    assert lonely["jacobian_se"]["HH"].isnan() and lonely["mse_64_se"].isnan()
    assert lonely["jacobian"]["HH"].isfinite()


def record(calls):
    def denoise(xs, ts):
        calls.append(([x.detach().clone() for x in xs], [t.clone() for t in ts]))
        return xs

    return denoise


def test_every_cell_sees_the_same_images_and_noise():
    scheduler, x, t_grid, calls = DDIMScheduler(), images(b=3, c=3), [950, 400, 3], []
    run(record(calls), x, t_grid, scheduler=scheduler, batch_size=3, num_probes=2, seed=9)
    assert [tuple(t[0].item() for t in ts) for _, ts in calls] == [(a, b) for a in t_grid for b in t_grid]
    clean = (x, x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5)))
    noise = []
    for xs, ts in calls:
        assert all(t.dtype == torch.int64 and len(t) == 3 and len(set(t.tolist())) == 1 for t in ts)
        alpha_bars = [scheduler.alphas_cumprod[t[0]] for t in ts]
        noise.append([(x - a.sqrt() * c) / (1 - a).sqrt() for x, a, c in zip(xs, alpha_bars, clean, strict=True)])
    for e_64, e_32 in noise[1:]:
        torch.testing.assert_close(e_64, noise[0][0])
        torch.testing.assert_close(e_32, noise[0][1])
    values = torch.cat([e.flatten() for e in noise[0]])
    assert len(values.unique()) == len(values)
    assert values.std().item() == pytest.approx(1, abs=0.2)


def test_noise_and_probes_follow_the_seed_alone():
    model, state = small_model(), torch.get_rng_state()
    options = {"x": images(b=1, h=8, w=8), "t_grid": [800, 100]}
    first, again, other = (run(lambda xs, ts: model(*xs, *ts), seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["jacobian_per_image"], again["jacobian_per_image"])
    assert not torch.equal(first["jacobian_per_image"], other["jacobian_per_image"])
    more_probes = run(lambda xs, ts: model(*xs, *ts), seed=1, num_probes=7, **options)
    assert torch.equal(first["mse_64"], more_probes["mse_64"])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_result_does_not_depend_on_batch_size(batch_size):
    model, calls = small_model(), []

    def denoise(xs, ts):
        calls.append(len(xs[0]))
        return model(*xs, *ts)

    x = images(b=2, h=8, w=8)
    one_cell_each, other = (run(denoise, x, [900, 300, 0], batch_size=size) for size in (2, batch_size))
    assert calls[:9] == [2] * 9 and sum(calls[9:]) == 18 and max(calls[9:]) == min(batch_size, 18)
    for key in ("mse_64", "mse_32", "mse_64_se", "mse_32_se", "jacobian", "jacobian_se"):
        torch.testing.assert_close(other[key], one_cell_each[key], rtol=1e-9, atol=1e-12)


def test_mse_of_a_zero_prediction_is_the_noise_over_snr():
    calls, t_grid, scheduler = [], [990, 500, 0], DDIMScheduler()

    def zero(xs, ts):
        record(calls)(xs, ts)
        return xs[0] * 0, xs[1] * 0

    result = run(zero, torch.zeros(3, 2, 4, 4, dtype=torch.float64), t_grid, scheduler=scheduler, batch_size=3)
    # Black images: what the denoiser sees is noise times sqrt(1 - abar).
    (x_64, x_32), _ = calls[0]
    for key, x, shape in (("mse_64", x_64, (3, 1)), ("mse_32", x_32, (1, 3))):
        per_image = (x.square().flatten(1).sum(1) / (1 - scheduler.alphas_cumprod[990])).numpy()
        for name, value in (("", per_image.mean()), ("_se", per_image.std(ddof=1) / math.sqrt(3))):
            expected = (value / scheduler.snr[t_grid]).view(shape).expand(3, 3)
            torch.testing.assert_close(result[key + name], expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_gaussian_images_give_the_closed_form_map(prediction_type):
    s_low, s_high, t_grid, b = 2.0, 0.3, [900, 500, 100], 300
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(4)
    n_low, n_high = 4, 12

    def split(x):  # Orthonormal Haar low band, and the rest.
        low = 2 * F.avg_pool2d(x, 2)
        return low, x - spread(low)

    def spread(low):
        return low.repeat_interleave(2, 2).repeat_interleave(2, 3) / 2

    low = torch.randn(b, 1, 2, 2, generator=generator, dtype=torch.float64) * s_low**0.5
    _, detail = split(torch.randn(b, 1, 4, 4, generator=generator, dtype=torch.float64) * s_high**0.5)
    x = spread(low) + detail

    def optimal(xs, ts):
        abars = [scheduler.alphas_cumprod[t].view(-1, 1, 1, 1) for t in ts]
        z_64, z_32 = (x / (1 - abar).sqrt() for x, abar in zip(xs, abars, strict=True))
        a, c = (abar / (1 - abar) for abar in abars)
        z_low, z_detail = split(z_64)
        low = (a.sqrt() * z_low + c.sqrt() / 2 * z_32) / (1 / s_low + a + c / 4)
        x0s = (spread(low) + a.sqrt() * z_detail / (1 / s_high + a), low / 2)
        epsilons = (z_64 - a.sqrt() * x0s[0], z_32 - c.sqrt() * x0s[1])
        vs = tuple(abar.sqrt() * e - (1 - abar).sqrt() * x0 for abar, e, x0 in zip(abars, epsilons, x0s, strict=True))
        return {"epsilon": epsilons, "x0": x0s, "v": vs}[prediction_type]

    result = run(optimal, x, t_grid, scheduler=scheduler, num_probes=2, batch_size=300)
    abar = scheduler.alphas_cumprod[t_grid].numpy()
    snr = abar / (1 - abar)
    a, c = np.meshgrid(snr, snr, indexing="ij")
    scale_64, scale_32 = np.meshgrid(1 / (1 - abar), 1 / (1 - abar), indexing="ij")
    posterior = 1 / (1 / s_low + a + c / 4)
    expected = {
        "mse_64": n_low * posterior + n_high / (1 / s_high + a),
        "mse_32": n_low * posterior / 4,
        "HH": scale_64 * (n_low * (1 - a * posterior) ** 2 + n_high / (1 + s_high * a) ** 2),
        "HL": scale_32 * n_low * a * c / 4 * posterior**2,
        "LH": scale_64 * n_low * a * c / 4 * posterior**2,
        "LL": scale_32 * n_low * (1 - c / 4 * posterior) ** 2,
    }
    for name, value in expected.items():
        if name in BLOCKS:
            estimate, error = result["jacobian"][name], result["jacobian_se"][name]
        else:
            estimate, error = result[name], result[name + "_se"]
        # Cells share their random numbers, so this is one draw seen nine times rather than nine draws.
        assert (np.abs(estimate.numpy() - value) <= 3 * error.numpy() + 1e-9 * value).all(), name
        assert (error.numpy() < 0.1 * value).all(), name


def test_published_errors_put_each_clock_on_its_axis():
    t_grid = [950, 500, 200, 5]
    result = run(linear, images(b=1, c=2, h=4, w=8), t_grid, num_probes=1)
    formulas = {
        "A": lambda s: 1 / (1 + s),
        "B": lambda s: 1 / (s * (1 + s)),
        "C": lambda s: s / (4 * (1 + s) ** 2),
        "D": lambda s: 1 / (4 * (1 + s) ** 2),
    }
    assert CHAIN_RULE_FACTORS.keys() == formulas.keys()
    for factor, formula in formulas.items():
        error_64, error_32 = published_errors(result, factor)
        for i, t_64 in enumerate(t_grid):
            for j, t_32 in enumerate(t_grid):
                norms = linear_norms(t_64, t_32, 2 * 32, 2 * 8)
                snr_64, snr_32 = (DDIMScheduler().snr[t].item() for t in (t_64, t_32))
                assert error_64[i, j].item() == pytest.approx(norms["HH"] / 32**2 * formula(snr_64))
                assert error_32[i, j].item() == pytest.approx(norms["LL"] / 8**2 * formula(snr_32))
    assert all(torch.equal(a, b) for a, b in zip(published_errors(result), published_errors(result, "B"), strict=True))
    with pytest.raises(ValueError, match="factor 'E'; choose one of A, B, C, D"):
        published_errors(result, "E")


def test_result_is_plain_and_survives_a_weights_only_load(tmp_path):
    result = run(linear, images(b=2, dtype=torch.float32).double(), timestep_grid(4), num_probes=3, seed=8)
    torch.save(result, tmp_path / "map.pth")
    loaded = torch.load(tmp_path / "map.pth", weights_only=True)
    assert loaded["t_grid"].dtype == torch.int64 and loaded["t_grid"].tolist() == [999, 666, 333, 0]
    assert torch.equal(loaded["snr_grid"], DDIMScheduler().snr[[999, 666, 333, 0]])
    assert torch.equal(loaded["log_snr_grid"], loaded["snr_grid"].log())
    assert [loaded[key] for key in ("num_probes", "num_images", "seed")] == [3, 2, 8]
    assert (loaded["num_pixels_64"], loaded["num_pixels_32"]) == (16, 4)
    assert loaded["jacobian_per_image"].shape == (4, 4, 4, 2)
    assert loaded["jacobian_per_image"].dtype == torch.float32
    for table in (*loaded["jacobian"].values(), *loaded["jacobian_se"].values(), loaded["mse_32_se"]):
        assert table.shape == (4, 4) and table.dtype == torch.float64 and not table.requires_grad


def test_runs_inside_no_grad_and_under_autocast():
    model, x = LIFTDualTimestepModel(hidden_dims=(8, 16), channels=1), images(h=8, w=8, dtype=torch.float32)
    entered = []

    def autocast():
        entered.append(True)
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def denoise(xs, ts):
        prediction = model(*xs, *ts)
        assert prediction[0].dtype == (torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32)
        return prediction

    with torch.no_grad():
        exact = run(denoise, x, [700, 100], batch_size=2)
        rounded = run(denoise, x, [700, 100], batch_size=2, autocast=autocast)
    assert len(entered) == 4
    for key in ("HH", "LL"):
        assert not torch.equal(rounded["jacobian"][key], exact["jacobian"][key])
        torch.testing.assert_close(rounded["jacobian"][key], exact["jacobian"][key], rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"\[2, 3, 4\].*must be float \[B, C, H, W\]"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "uint8.*must be float"),
        ({"x": torch.zeros(2, 3, 4, 5)}, r"\[2, 3, 4, 5\].*even height and width"),
        ({"x": torch.zeros(0, 3, 4, 4)}, "at least one image"),
        ({"t_grid": [1000, 0]}, "spans 0 to 1000 .* timesteps 0 to 999"),
        ({"t_grid": [5, -1]}, "spans -1 to 5"),
        ({"t_grid": [0, 999]}, "must fall strictly"),
        ({"t_grid": [[999, 0]]}, r"must be integers \[n\]"),
        ({"t_grid": [999.0, 0.0]}, "float32, but must be integers"),
        ({"t_grid": []}, r"must be integers \[n\]"),
        ({"num_probes": 0}, "num_probes is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        (
            {"scheduler": DDIMScheduler(beta_schedule="linear_zero_terminal", prediction_type="v")},
            "999 is 0; start",
        ),
        ({"denoise": lambda xs, ts: xs[0]}, "must return two predictions"),
        ({"denoise": lambda xs, ts: (xs[0], xs[0])}, r"coarse prediction of shape \[8, 1, 4, 4\] .*\[8, 1, 2, 2\]"),
        ({"denoise": lambda xs, ts: (xs[0], xs[1].detach())}, "coarse prediction .* carries no gradient"),
    ],
)
def test_mistakes_raise_one_clear_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(**{"denoise": identity, "x": images(), "t_grid": [999, 0]} | options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
