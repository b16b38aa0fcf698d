"""The error map against exact Jacobians, closed forms and Gaussian images, whose optimal denoiser is known."""

import math
import os
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from children import FORKS
from conftest import assert_same
from model import LIFTDualTimestepModel, NoTimestepModel, SingleTimestepModel
from paths.optimal import find_optimal_path_n_steps_lambda
from paths.path import leads, path_from_cells, timestep_grid
from planning import error_map as error_map_module
from planning.error_map import (
    BLOCKS,
    CHAIN_RULE_FACTORS,
    CLIPPED_MSES,
    MSES,
    draw_noise_and_probes,
    error_map,
    largest_deviation,
    per_image,
    published_errors,
)
from planning.map_file import PartFiles
from planning.map_paths import heatmap_path, path_errors
from runtime.distributed import Processes
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser, Spectrum, jacobian_maps, mse_maps


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


def small_model(model_class=LIFTDualTimestepModel):
    torch.manual_seed(1)
    model = model_class(hidden_dims=(8, 16), channels=1).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    if model.knows_time:
        # The sinusoid is float32 by design.
        model.embed.mlp.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return model


@pytest.fixture(scope="module", params=["eps", "x0"])
def against_exact(request):
    model, scheduler, t_grid = small_model(), DDIMScheduler(), [999, 600, 0]

    def differentiated(*xs, ts):
        outputs = model(*xs, *ts)
        if request.param == "eps":
            return outputs
        abars = [scheduler.alphas_cumprod[t].view(-1, 1, 1, 1) for t in ts]
        return tuple((x - (1 - a).sqrt() * e) / a.sqrt() for x, e, a in zip(xs, outputs, abars, strict=True))

    seen = {}

    def denoise(xs, ts):
        for x_64, x_32, t_64, t_32 in zip(*xs, *ts, strict=True):
            seen[int(t_64), int(t_32)] = (x_64.detach()[None], x_32.detach()[None])
        return model(*xs, *ts)

    result = run(denoise, images(b=1, h=8, w=8), t_grid, scheduler=scheduler, num_probes=200, seed=3, of=request.param)
    exact = {name: torch.zeros(3, 3, dtype=torch.float64) for name in BLOCKS}
    for i, t_64 in enumerate(t_grid):
        for j, t_32 in enumerate(t_grid):
            ts = (torch.tensor([t_64]), torch.tensor([t_32]))
            rows = torch.func.jacrev(lambda a, b, ts=ts: differentiated(a, b, ts=ts), argnums=(0, 1))(*seen[t_64, t_32])
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


@pytest.mark.parametrize("of", ["eps", "x0"])
def test_estimates_are_unbiased_over_seeds(of):
    model, x = small_model().requires_grad_(False), images(b=1, h=8, w=8)
    t = torch.tensor([400])

    def at_fixed_point(xs, ts):  # Noise differs between seeds, so it is taken out: the Jacobian is one matrix.
        return model(*(x.detach() * 0.5 + a - a.detach() for x, a in zip(pair, xs, strict=True)), t, t)

    def differentiated(*xs):
        if of == "eps":
            return model(*xs, t, t)
        abar = DDIMScheduler().alphas_cumprod[400]
        return tuple((x - (1 - abar).sqrt() * e) / abar.sqrt() for x, e in zip(xs, model(*xs, t, t), strict=True))

    pair = (x, F.avg_pool2d(x, 2))
    rows = torch.func.jacrev(differentiated, argnums=(0, 1))(*(0.5 * p for p in pair))
    runs = [run(at_fixed_point, x, [400], num_probes=1, seed=seed, of=of)["jacobian"] for seed in range(200)]
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


def record(calls, denoise=identity):
    def recorded(xs, ts):
        calls.append(([x.detach().clone() for x in xs], [t.clone() for t in ts]))
        return denoise(xs, ts)

    return recorded


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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v"])
def test_clipped_errors_are_those_of_the_image_the_sampler_goes_by(prediction_type):
    scheduler, x, t_grid = DDIMScheduler(prediction_type=prediction_type), images(b=3), [999, 500, 20]
    seen = {}

    def denoise(xs, ts):  # Far off, so that the clamp has work to do.
        for k, (t_64, t_32) in enumerate(zip(*map(torch.Tensor.tolist, ts), strict=True)):
            found = [
                scheduler.predict_x0(1.7 * y[k : k + 1] + 0.4, t, y[k : k + 1])
                for y, t in zip(xs, (t_64, t_32), strict=True)
            ]
            seen.setdefault((t_64, t_32), []).append([y.clamp(-1, 1) for y in found])
        return tuple(1.7 * y + 0.4 for y in xs)

    result = run(denoise, x, t_grid, scheduler=scheduler, num_probes=1, batch_size=3, maps="mse")
    for i, t_64 in enumerate(t_grid):
        for j, t_32 in enumerate(t_grid):
            fine, coarse = (torch.cat(parts) for parts in zip(*seen[t_64, t_32], strict=True))
            error = x - fine
            expected = [error, F.avg_pool2d(x, 2) - coarse, 2 * F.avg_pool2d(error, 2)]
            for name, values in zip(CLIPPED_MSES, expected, strict=True):
                assert result[name][i, j].item() == pytest.approx(values.square().sum().item() / 3, rel=1e-9)
    assert (result["clipped_mse_64"] < result["mse_64"]).any()
    assert (result["clipped_mse_64"] <= result["mse_64"] * (1 + 1e-9)).all()  # Images lie within the clamp.


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
        ({"maps": "none"}, "maps is 'none' but must be one of all, blocks, mse"),
        ({"of": "v"}, "of is 'v' but must be one of eps, x0"),
        ({"num_predictions": 0}, "num_predictions is 0 but must be 1"),
        ({"num_predictions": 3}, "num_predictions is 3 but must be 1"),
        ({"denoise": lambda xs, ts: xs[0]}, "must return two predictions"),
        ({"denoise": lambda xs, ts: xs[:1]}, "must return two predictions"),
        ({"num_predictions": 1}, "must return a tuple of one prediction, the fine"),
        ({"num_predictions": 1, "denoise": lambda xs, ts: xs[0]}, "must return a tuple of one prediction, the fine"),
        ({"num_predictions": 1, "denoise": lambda xs, ts: xs[1:]}, r"fine prediction of shape \[8, 1, 2, 2\]"),
        ({"num_predictions": 1, "denoise": lambda xs, ts: (xs[0].detach(),)}, "fine prediction .* carries no gradient"),
        ({"denoise": lambda xs, ts: (xs[0], xs[0])}, r"coarse prediction of shape \[8, 1, 4, 4\] .*\[8, 1, 2, 2\]"),
        ({"denoise": lambda xs, ts: (xs[0], xs[1].detach())}, "coarse prediction .* carries no gradient"),
    ],
)
def test_mistakes_raise_one_clear_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(**{"denoise": identity, "x": images(), "t_grid": [999, 0]} | options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


# Gaussian images, whose optimal denoiser and its maps are known


def gaussian_model(prediction_type="epsilon"):
    """The exact denoiser of 4x4 images whose variances span two decades, and its schedule."""
    generator = torch.Generator().manual_seed(11)
    low, high = (10 ** (2 * torch.rand(shape, generator=generator) - 1.5) for shape in ((1, 2, 2), (3, 1, 2, 2)))
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    return GaussianDenoiser(scheduler, low.double(), high.double()), scheduler


def gaussian_run(count, t_grid, prediction_type="epsilon", **options):
    denoiser, scheduler = gaussian_model(prediction_type)
    x = denoiser.draw(count, torch.Generator().manual_seed(12))
    options = {"scheduler": scheduler, "num_probes": 1, "batch_size": 4096, "seed": 13} | options
    return run(denoiser.denoise, x, t_grid, **options), denoiser.spectrum()


@pytest.mark.parametrize("spacing", ["uniform_t", "uniform_log_snr"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_denoising_errors_of_gaussian_images_are_those_of_the_closed_form(prediction_type, spacing):
    t_grid = timestep_grid(6, spacing=spacing, log_snr=DDIMScheduler().log_snr.numpy())
    result, spectrum = gaussian_run(4000, t_grid.tolist(), prediction_type, maps="mse")
    for name, truth, dims in zip(
        ("mse_64", "mse_32"), mse_maps(spectrum, result["log_snr_grid"]), (16, 4), strict=True
    ):
        error = result[f"{name}_se"]
        assert ((result[name] - truth).abs() < 3.5 * error).all()
        assert (error < 0.03 * truth).all() and truth.max() > 50 * truth.min()
        # The transposed map is another one.
        assert ((result[name].T - truth).abs() > 10 * error).any()
        snr = result["snr_grid"][:, None] if name == "mse_64" else result["snr_grid"]
        eps_error = result[f"eps_{name}_se"]
        assert ((result[f"eps_{name}"] - truth * snr / dims).abs() < 3.5 * eps_error).all()
        torch.testing.assert_close(eps_error, error * snr / dims)
    # The best coarse prediction is the low band of the best fine one.
    torch.testing.assert_close(result["mse_64_low"], 4 * result["mse_32"])
    torch.testing.assert_close(result["mse_64_low_se"], 4 * result["mse_32_se"])


def test_errors_in_noise_are_per_dimension_means_of_what_the_network_gets_wrong():
    scheduler, x, t_grid, wrong = DDIMScheduler(), images(b=5, c=2), [900, 300], []

    def offset(xs, ts):  # ε̂ = x_t + 1/10 stands for an error that is computed here from the noise in x_t.
        clean = (x, F.avg_pool2d(x, 2))
        abars = [scheduler.alphas_cumprod[t].view(-1, 1, 1, 1) for t in ts]
        noise = [(n - a.sqrt() * c) / (1 - a).sqrt() for n, a, c in zip(xs, abars, clean, strict=True)]
        wrong.append([(n + 0.1 - e).square().flatten(1).mean(1) for n, e in zip(xs, noise, strict=True)])
        return tuple(n + 0.1 for n in xs)

    result = run(offset, x, t_grid, scheduler=scheduler, batch_size=5, maps="mse")
    for scale, name in enumerate(("eps_mse_64", "eps_mse_32")):
        per_image = torch.stack([cell[scale] for cell in wrong]).view(2, 2, 5)
        torch.testing.assert_close(result[name], per_image.mean(-1))
        torch.testing.assert_close(result[f"{name}_se"], per_image.std(-1) / 5**0.5)


def test_denoising_errors_do_not_depend_on_the_prediction_type():
    one, other, third = (gaussian_run(6, [999, 500, 0], kind)[0] for kind in ("epsilon", "x0", "v"))
    for result in (other, third):
        for name in ("mse_64", "mse_32", "eps_mse_64", "jacobian", "mse_32_se"):
            torch.testing.assert_close(result[name], one[name], rtol=1e-7, atol=0)
        assert not any(t.requires_grad for t in result.values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("t_grid", [[900, 400, 50]])
def test_jacobians_of_the_clean_image_are_those_of_the_closed_form(prediction_type, t_grid):
    result, spectrum = gaussian_run(1, t_grid, prediction_type, num_probes=2000, of="x0")
    for name, truth in jacobian_maps(spectrum, result["log_snr_grid"], of="x0").items():
        assert ((result["jacobian"][name] - truth).abs() < 3.5 * result["jacobian_se"][name] + 1e-9 * truth).all()
        assert (result["jacobian_se"][name] < 0.05 * truth).all()
    assert result["of"] == "x0"


def test_measured_errors_are_one_gradient():
    """Both denoising errors are derivatives of one function, twice the information: ∂mse_64/∂b = ∂mse_32/∂a."""
    t_grid = [560, 530, 500]
    result, spectrum = gaussian_run(40_000, t_grid, maps="mse", batch_size=40_000)
    snr = result["snr_grid"]
    fine, coarse = result["mse_per_image"][:2].double()
    along_b = (fine[1, 2] - fine[1, 0]) / (snr[2] - snr[0])  # [B]
    along_a = (coarse[2, 1] - coarse[0, 1]) / (snr[2] - snr[0])
    difference = along_b - along_a
    error = difference.std() / len(difference) ** 0.5
    assert difference.mean().abs() < 3 * error
    # Which says something, because the sampling error is small and single images are far from it.
    truth = -(spectrum.low / (1 + spectrum.low * snr[1] * 1.25)).square().sum() / 4
    assert error < 0.03 * truth.abs()
    for one in (along_b, along_a):
        assert one.mean().item() == pytest.approx(truth.item(), rel=0.06)


def test_parts_of_a_map_are_those_of_the_whole():
    model, x = small_model(), images(b=2, h=8, w=8)
    gradients = []

    def denoise(xs, ts):
        gradients.append((torch.is_grad_enabled(), xs[0].requires_grad))
        return model(*xs, *ts)

    whole, blocks, mse = (run(denoise, x, [900, 300, 0], maps=m, batch_size=6) for m in ("all", "blocks", "mse"))
    assert gradients == [(True, True)] * 6 + [(False, False)] * 3
    assert mse["num_probes"] == 4
    for part, gone in ((blocks, "mse"), (mse, "jacobian")):
        assert whole.keys() - part.keys() == {key for key in whole if gone in key} != set()
        assert_same({key: whole[key] for key in part}, part)
    assert blocks.keys() & mse.keys() == whole.keys() - {key for key in whole if "mse" in key or "jacobian" in key}
    per_image = whole["jacobian_per_image"].double().mean(-1)
    torch.testing.assert_close(per_image, torch.stack([*whole["jacobian"].values()]), rtol=1e-6, atol=0)
    per_image = whole["mse_per_image"].double().mean(-1)
    torch.testing.assert_close(per_image, torch.stack([whole[name] for name in MSES + CLIPPED_MSES]), rtol=1e-6, atol=0)
    assert whole["measured"].all() and whole["interpolation_error"] is None


# Denoisers that predict the fine scale alone


@pytest.mark.parametrize("of", ["eps", "x0"])
@pytest.mark.parametrize("model_class", [SingleTimestepModel, NoTimestepModel])
def test_a_fine_map_is_the_exact_jacobian_and_error_of_its_model(model_class, of):
    model, scheduler, x, t_grid = small_model(model_class), DDIMScheduler(), images(b=1, h=8, w=8), [950, 400, 10]
    options = {"scheduler": scheduler, "num_probes": 150, "seed": 3, "of": of}
    result = run(model.denoise, x, t_grid, num_predictions=1, **options)
    clean = (x, F.avg_pool2d(x, 2))
    noise, (probes, _) = draw_noise_and_probes(clean, 150, 3)
    for i, t_64 in enumerate(t_grid):
        for j, t_32 in enumerate(t_grid):
            abars = scheduler.alphas_cumprod[[t_64, t_32]]
            xs = [a.sqrt() * c + (1 - a).sqrt() * e for a, c, e in zip(abars, clean, noise, strict=True)]
            clocks = [torch.tensor([t_64])] if model_class is SingleTimestepModel else []

            def differentiated(x_64, x_32, clocks=clocks, abar=abars[0]):
                epsilon = model(x_64, x_32, *clocks)
                return epsilon if of == "eps" else (x_64 - (1 - abar).sqrt() * epsilon) / abar.sqrt()

            for name, jacobian in zip(
                ("HH", "HL"), torch.func.jacrev(differentiated, argnums=(0, 1))(*xs), strict=True
            ):
                matrix = jacobian.reshape(64, -1)
                # Both what these very probes give, and what they are an estimate of.
                estimate = (probes.view(150, 64) @ matrix).square().sum(1).mean()
                torch.testing.assert_close(result["jacobian"][name][i, j], estimate, rtol=1e-9, atol=0)
                error = result["jacobian_se"][name][i, j]
                assert 0 < (estimate - matrix.square().sum()).abs() < 3 * error < 0.6 * matrix.square().sum()
            with torch.no_grad():
                x0 = (xs[0] - (1 - abars[0]).sqrt() * model(*xs, *clocks)) / abars[0].sqrt()
            for clamped, error in (("", x - x0), ("clipped_", x - x0.clamp(-1, 1))):
                low = error.view(4, 2, 4, 2).sum((1, 3)) / 2
                for name, value in (("mse_64", error), ("mse_64_low", low)):
                    torch.testing.assert_close(result[clamped + name][i, j], value.square().sum(), rtol=1e-6, atol=0)


def only_fine(denoise):
    return lambda xs, ts: denoise(xs, ts)[:1]


def fine_part(result):
    """What a map says of the fine prediction, in the form of the map of a denoiser that makes no other."""
    kept = {key: value for key, value in result.items() if "mse_32" not in key}
    for key in ("jacobian", "jacobian_se"):
        kept |= {key: {name: result[key][name] for name in ("HH", "HL")}} if key in result else {}
    if "jacobian" in result:
        kept["jacobian_per_image"] = result["jacobian_per_image"][[0, 1]]
    if "mse_64" in result:
        kept["mse_per_image"] = result["mse_per_image"][[0, 2, 3, 5]]
    if result["interpolation_error"]:
        gone = ("LH", "LL", "mse_32", "clipped_mse_32")
        report = result["interpolation_error"]
        kept["interpolation_error"] = {name: value for name, value in report.items() if name not in gone}
    return kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"of": "x0"},
        {"maps": "mse"},
        {"maps": "blocks", "num_probes": 3},
        {"coarse": 3},
        {"batch_size": 5},
        {"t_grid": [700, 20]},
    ],
    ids=str,
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_a_fine_map_is_the_fine_part_of_the_whole(prediction_type, options):
    denoiser, scheduler = gaussian_model(prediction_type)
    x = denoiser.draw(4, torch.Generator().manual_seed(12))
    options = {"t_grid": timestep_grid(5).tolist(), "scheduler": scheduler, "num_probes": 2, "seed": 6} | options
    whole = run(denoiser.denoise, x, **options)
    fine = run(only_fine(denoiser.denoise), x, num_predictions=1, **options)
    assert_same(fine, fine_part(whole))
    assert largest_deviation(fine, whole) == largest_deviation(fine, fine) == 0
    for name in {*BLOCKS, *MSES, *CLIPPED_MSES} & values_of(fine).keys():
        assert torch.equal(per_image(fine, name), per_image(whole, name))
        torch.testing.assert_close(per_image(fine, name).double().mean(-1), values_of(fine)[name], rtol=1e-6, atol=0)
    if "jacobian" in fine:
        for normalisation in ("published", "sum"):
            ours, theirs = (published_errors(result, "C", normalisation) for result in (fine, whole))
            assert torch.equal(ours[0], theirs[0]) and not ours[1].any() and theirs[1].all()
            errors = (path_errors(result, "dp_64", "C", normalisation) for result in (fine, whole))
            assert all(np.array_equal(one, other) for one, other in zip(*errors, strict=True))


def bent(xs, ts):
    """Of one scale, neither linear nor alike at two timesteps."""
    gain = 1 + ts[0].double()[:, None, None, None] / 1000
    return (gain * xs[0] + 0.3 * torch.sin(3 * xs[0]).roll(1, -1),)


@pytest.mark.parametrize("options", [{}, {"of": "x0"}, {"maps": "mse"}, {"maps": "blocks"}], ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_the_map_of_one_scale_is_a_column_of_a_model_that_ignores_the_other(prediction_type, options):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    options = {"t_grid": timestep_grid(5).tolist(), "scheduler": scheduler, "num_probes": 2, "seed": 6} | options
    whole = run(bent, images(3), num_predictions=1, **options)
    calls = []
    one = run(record(calls, bent), images(3), num_predictions=1, num_scales=1, batch_size=3, **options)
    # Every line is measured, once.
    assert len(calls) == 5 and all(len(xs) == len(ts) == 1 for xs, ts in calls)
    for key in ("jacobian", "jacobian_se"):
        if key in whole:
            assert not whole[key].pop("HL").any()
    if "jacobian" in whole:
        whole["jacobian_per_image"] = whole["jacobian_per_image"][:1]
    assert_same(one, whole)
    assert one["measured"].all() and one["interpolation_error"] is None
    assert all(torch.equal(one[name], one[name][:, :1].expand(5, 5)) for name in {*MSES, *CLIPPED_MSES} & one.keys())


def test_the_error_of_one_scale_in_gaussian_noise_is_the_closed_form():
    """White images of variance s, whose best prediction is linear: Σ s / (1 + s γ)."""
    scheduler, s, t_grid = DDIMScheduler(prediction_type="x0"), 0.4, timestep_grid(6).tolist()
    generator = torch.Generator().manual_seed(3)
    x = math.sqrt(s) * torch.randn(3000, 1, 4, 4, generator=generator, dtype=torch.float64)

    def denoise(xs, ts):
        signal = scheduler.alphas_cumprod[ts[0]][:, None, None, None]
        return (xs[0] * s * signal.sqrt() / (1 - signal + s * signal),)

    options = {"maps": "mse", "scheduler": scheduler, "batch_size": 3000}
    result = run(denoise, x, t_grid, num_predictions=1, num_scales=1, **options)
    truth = 16 * s / (1 + s * result["snr_grid"])[:, None].expand(6, 6)
    assert ((result["mse_64"] - truth).abs() < 3.5 * result["mse_64_se"]).all()
    assert (result["mse_64_se"] < 0.02 * truth).all() and truth.max() > 50 * truth.min()


@pytest.mark.parametrize("maps", ["all", "mse"])
def test_some_cells_are_those_of_the_whole_and_stand_for_their_row(maps):
    options = {"t_grid": timestep_grid(5).tolist(), "num_probes": 2, "seed": 6, "maps": maps}
    whole = run(linear, images(3), **options)
    cells = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 1, 0], [1, 0, 0, 0, 1]]).bool()
    calls = []
    some = run(record(calls, linear), images(3), cells=cells, batch_size=3, **options)
    assert len(calls) == cells.sum() and torch.equal(some["measured"], cells)
    log_snr = whole["log_snr_grid"]
    for name, value in values_of(some).items():
        for i in range(5):
            known = cells[i].nonzero()[:, 0]
            for j in range(5):
                nearest = known[(log_snr[known] - log_snr[j]).abs().argmin()]
                assert value[i, j] == values_of(whole)[name][i, nearest]
    assert torch.equal(some["mse_per_image"][:, cells], whole["mse_per_image"][:, cells])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": torch.ones(2, 3).bool()}, r"cells must be bool \[2, 2\]"),
        ({"cells": torch.tensor([[True, True], [False, False]])}, "hold one in every row"),
        (
            {"cells": torch.ones(3, 3).bool(), "coarse": 2, "t_grid": [900, 500, 100]},
            "coarse thins a grid of which all",
        ),
        ({"num_predictions": 1, "num_scales": 1, "coarse": 2, "t_grid": [900, 500, 100]}, "coarse thins"),
    ],
)
def test_impossible_cells_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(linear, images(), **{"t_grid": [900, 300]} | options)


@pytest.mark.parametrize(("predictions", "scales"), [(2, 1), (1, 3), (1, 0)])
def test_an_impossible_number_of_scales_is_refused(predictions, scales):
    with pytest.raises(ValueError, match=f"num_scales is {scales}"):
        run(bent, images(), [900, 300], num_predictions=predictions, num_scales=scales)


def test_values_per_image_go_by_name():
    result = run(linear, images(b=3), [900, 400, 20], num_probes=1)
    for k, name in enumerate(BLOCKS):
        assert torch.equal(per_image(result, name), result["jacobian_per_image"][k])
    for k, name in enumerate(MSES + CLIPPED_MSES):
        assert torch.equal(per_image(result, name), result["mse_per_image"][k])
    fine = run(only_fine(linear), images(b=3), [900, 400, 20], maps="blocks", num_predictions=1)
    with pytest.raises(ValueError, match="^This heatmap holds no LL but HH, HL.$"):
        per_image(fine, "LL")


def test_a_deviation_of_a_fine_map_counts():
    reference = run(only_fine(small_model().denoise), images(b=3, h=8, w=8), [900, 20], num_predictions=1)
    for name, values in values_of(reference).items():
        error = (reference["jacobian_se"] | reference).get(name if name in BLOCKS else f"{name}_se")
        moved = values.clone()
        moved[1, 0] += 2.5 * error[1, 0]
        other = reference | ({"jacobian": reference["jacobian"] | {name: moved}} if name in BLOCKS else {name: moved})
        assert largest_deviation(other, reference) == pytest.approx(2.5, rel=1e-6)


def test_clocks_that_a_model_hides_reach_its_map_through_the_noise_alone():
    def measured(model_class, clocks):
        model = small_model(model_class).requires_grad_(False)
        options = {"num_probes": 1, "num_predictions": model.num_predictions}
        result = run(lambda xs, ts: model.denoise(xs, clocks(*ts)), images(h=8, w=8), [900, 500, 20], **options)
        assert all((values.diff(dim=dim) != 0).all() for values in values_of(result).values() for dim in (0, 1))
        return result

    def told(t_64, t_32):
        return t_64, t_32

    def other_fine(t_64, t_32):
        return 999 - t_64, t_32

    def other_coarse(t_64, t_32):
        return t_64, 999 - t_32

    for model_class, hidden, shown in (
        (LIFTDualTimestepModel, [], [other_fine, other_coarse]),
        (SingleTimestepModel, [other_coarse], [other_fine]),
        (NoTimestepModel, [other_fine, other_coarse], []),
    ):
        result = measured(model_class, told)
        for clocks in hidden:
            assert_same(measured(model_class, clocks), result)
        for clocks in shown:
            other = measured(model_class, clocks)
            assert all(not torch.equal(other[name], result[name]) for name in ("mse_64", "mse_64_low"))


# Thinned maps


@pytest.fixture(scope="module")
def thinned():
    """The whole map of 16 lines, 8 of them measured and the rest interpolated, and what the latter cost."""
    calls = []
    denoiser, scheduler = gaussian_model()
    t_grid = timestep_grid(16, spacing="uniform_log_snr", log_snr=scheduler.log_snr.numpy()).tolist()

    def denoise(xs, ts):
        calls.append(list(zip(*(t.tolist() for t in ts), strict=True)))
        return denoiser.denoise(xs, ts)

    x = denoiser.draw(200, torch.Generator().manual_seed(3))
    options = {"scheduler": scheduler, "num_probes": 1, "batch_size": 200, "seed": 4}
    whole = run(denoise, x, t_grid, **options)
    calls.clear()
    return whole, run(denoise, x, t_grid, coarse=8, **options), calls


def values_of(result):
    return result.get("jacobian", {}) | {name: result[name] for name in MSES + CLIPPED_MSES if name in result}


def test_a_thinned_map_measures_its_lines_and_as_many_cells_off_them(thinned):
    _, thin, calls = thinned
    lines = [0, 2, 4, 6, 9, 11, 13, 15]  # The nearest to 15/7 apart.
    t_grid = thin["t_grid"].tolist()
    cells = [(i, j) for i in lines for j in lines]
    assert thin["measured"].nonzero().tolist() == [list(cell) for cell in cells]
    held_out = thin["interpolation_error"]["cells"]
    assert len(held_out) == 8 and all(i not in lines and j not in lines for i, j in held_out)
    assert len({i for i, _ in held_out}) == len({j for _, j in held_out}) == 8
    assert calls == [[(t_grid[i], t_grid[j])] * 200 for i, j in [*cells, *held_out]]


def test_measured_cells_of_a_thinned_map_are_those_of_the_whole(thinned):
    whole, thin, _ = thinned
    measured = thin["measured"]
    assert whole.keys() == thin.keys()
    for name in ("jacobian_per_image", "mse_per_image"):
        assert torch.equal(thin[name][:, measured], whole[name][:, measured])
        assert not torch.equal(thin[name], whole[name])
    for name, values in values_of(whole).items():
        assert torch.equal(values_of(thin)[name][measured], values[measured])
    for name in ("mse_64_se", "mse_32_se", "eps_mse_64", "eps_mse_32_se"):
        assert torch.equal(thin[name][measured], whole[name][measured])
    for name in BLOCKS:
        assert torch.equal(thin["jacobian_se"][name][measured], whole["jacobian_se"][name][measured])


def test_interpolation_error_is_that_of_the_held_out_cells(thinned):
    whole, thin, _ = thinned
    report = thin["interpolation_error"]
    assert report.keys() == {*values_of(whole), "cells"}
    rows, columns = np.array(report["cells"]).T
    for name, values in values_of(whole).items():
        error = np.abs(values_of(thin)[name].numpy() / values.numpy() - 1)
        assert report[name]["median"] == pytest.approx(np.median(error[rows, columns]), rel=1e-6)
        assert report[name]["max"] == pytest.approx(error[rows, columns].max(), rel=1e-6)
        # These few cells, which are off the lines of both axes, stand for all others: few of those are worse.
        away = error[~thin["measured"].numpy()]
        assert 0 < np.median(away) < report[name]["median"] and np.quantile(away, 0.8) < report[name]["max"]
        assert away.max() < 2.5 * report[name]["max"] < 0.6


def test_one_image_and_a_zero_block_can_be_thinned():
    result = run(linear, images(b=1), timestep_grid(6).tolist(), coarse=3, num_probes=2)
    assert (result["jacobian_se"]["HH"] < 1e-9).all() and result["mse_64_se"].isnan().all()
    result = run(identity, images(b=2), timestep_grid(6).tolist(), coarse=3)
    assert (result["jacobian"]["HL"] == 0).all() and "HL" not in result["interpolation_error"]
    torch.testing.assert_close(result["jacobian"]["HH"], torch.full((6, 6), 16.0).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("coarse", [-1, 0, 1, 4, 5])
def test_impossible_thinning_is_refused(coarse):
    message = f"^coarse is {coarse} but a grid of 4 lines can be thinned to 2 to 3.$"
    with pytest.raises(ValueError, match=message):
        run(identity, images(), timestep_grid(4).tolist(), coarse=coarse)


@pytest.mark.parametrize("coarse", [2, 3, 4, 5, 6, 7, 8])
def test_every_possible_thinning_is_exact_for_log_linear_maps(coarse):
    snr = DDIMScheduler().snr

    def denoise(xs, ts):  # ‖J_HH‖² = 16 SNR_64^0.6 SNR_32^-0.2.
        s_64, s_32 = (snr[t].view(-1, 1, 1, 1) for t in ts)
        return s_64**0.3 * s_32**-0.1 * xs[0], xs[1]

    options = {"num_probes": 1, "maps": "blocks"}
    whole, thin = (run(denoise, images(), timestep_grid(9).tolist(), coarse=c, **options) for c in (None, coarse))
    torch.testing.assert_close(thin["jacobian"]["HH"], whole["jacobian"]["HH"], rtol=1e-9, atol=0)
    assert thin["measured"].sum() == coarse**2 and len(thin["interpolation_error"]["cells"]) == coarse
    assert thin["interpolation_error"]["HH"]["max"] < 1e-9


# Work that is interrupted, and shared


SETTINGS = {"K": 2, "name": "map"}
T_GRID = [950, 600, 300, 20]


class Interrupted(Exception):
    pass


class Counting:
    """A denoiser that counts its samples, and raises at a call."""

    def __init__(self, raises_at=None, failure=Interrupted, model_class=LIFTDualTimestepModel):
        self.model, self.raises_at, self.failure = small_model(model_class), raises_at, failure
        self.sizes = []

    def __call__(self, xs, ts):
        if len(self.sizes) == self.raises_at:
            raise self.failure
        self.sizes.append(len(xs[0]))
        return self.model.denoise(xs, ts)


def measure(denoise, file=None, **options):
    parts = None if file is None else PartFiles(file, options.pop("settings", SETTINGS))
    options = {"num_probes": 2, "batch_size": 6, "seed": 7} | options
    return run(denoise, images(b=3, h=8, w=8), T_GRID, parts=parts, **options)


@pytest.fixture(scope="module")
def uninterrupted():
    return measure(Counting())


@pytest.mark.parametrize("failure", [Interrupted, KeyboardInterrupt])
def test_an_interrupted_map_goes_on_where_it_stopped(tmp_path, uninterrupted, failure):
    file = tmp_path / "map.pth"
    for calls in (2, 4):  # Of 8 in all.
        denoise = Counting(calls, failure)
        with pytest.raises(failure):
            measure(denoise, file)
        assert [f.name for f in tmp_path.iterdir()] == ["map.pth.part0"]
    rest = Counting()
    assert_same(measure(rest, file), uninterrupted)
    assert rest.sizes == [6, 6]


@pytest.mark.parametrize("agreed", [True, False])
def test_processes_that_see_other_files_start_anew(tmp_path, uninterrupted, agreed):
    with pytest.raises(Interrupted):
        measure(Counting(3), tmp_path / "map.pth")
    processes, rest = SimpleNamespace(rank=0, count=1, agree=lambda text: agreed), Counting()
    assert_same(measure(rest, tmp_path / "map.pth", processes=processes), uninterrupted)
    assert sum(rest.sizes) == (48 - 18 if agreed else 48)


def test_nothing_is_computed_again_whatever_the_batch(tmp_path, uninterrupted):
    file = tmp_path / "map.pth"
    with pytest.raises(Interrupted):
        measure(Counting(3), file, batch_size=5)
    rest = Counting()
    result = measure(rest, file, batch_size=7)
    assert sum(rest.sizes) == 48 - 15
    for name in ("jacobian", "mse_64", "mse_32_se"):
        torch.testing.assert_close(result[name], uninterrupted[name], rtol=1e-12, atol=0)


def test_a_finished_part_needs_no_call(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setattr(error_map_module, "SECONDS_BETWEEN_PARTS", -1)
    measure(Counting(), tmp_path / "map.pth")
    assert_same(measure(Counting(raises_at=0), tmp_path / "map.pth"), uninterrupted)


def test_work_is_kept_every_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(error_map_module, "SECONDS_BETWEEN_PARTS", -1)
    parts, seen = PartFiles(tmp_path / "map.pth", SETTINGS), []
    counting = Counting()

    def denoise(xs, ts):
        seen.append([part["done"].sum().item() for part in parts.read()])
        return counting(xs, ts)

    measure(denoise, tmp_path / "map.pth")
    assert seen == [[], *([k] for k in range(6, 48, 6))]
    parts.remove()
    assert list(tmp_path.iterdir()) == []


def test_nothing_done_leaves_no_part(tmp_path):
    with pytest.raises(Interrupted):
        measure(Counting(0), tmp_path / "map.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-60]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("no part"),
        lambda file: torch.save([1, 2], file),
        lambda file: torch.save({"done": torch.ones(48, dtype=torch.bool)}, file),
    ],
    ids=["cut", "empty", "text", "list", "without settings"],
)
def test_damaged_parts_count_as_none(tmp_path, uninterrupted, damage):
    with pytest.raises(Interrupted):
        measure(Counting(3), tmp_path / "map.pth")
    damage(tmp_path / "map.pth.part0")
    again = Counting()
    assert_same(measure(again, tmp_path / "map.pth"), uninterrupted)
    assert sum(again.sizes) == 48


def test_parts_of_other_settings_and_of_other_files_count_as_none(tmp_path, uninterrupted):
    with pytest.raises(Interrupted):
        measure(Counting(3), tmp_path / "map.pth", settings=SETTINGS | {"K": 3})
    with pytest.raises(Interrupted):
        measure(Counting(3), tmp_path / "other.pth")
    again = Counting()
    assert_same(measure(again, tmp_path / "map.pth"), uninterrupted)
    assert sum(again.sizes) == 48
    PartFiles(tmp_path / "map.pth", {}).remove()
    assert [file.name for file in tmp_path.iterdir()] == ["other.pth.part0"]


def test_a_thinned_map_is_resumed_too(tmp_path):
    whole = measure(Counting(), coarse=3)
    with pytest.raises(Interrupted):
        measure(Counting(4), tmp_path / "map.pth", coarse=3)
    rest = Counting()
    assert_same(measure(rest, tmp_path / "map.pth", coarse=3), whole)
    assert sum(rest.sizes) == 3 * (9 + 3) - 24


def test_a_fine_map_is_resumed_too(tmp_path):
    def counting(calls=None):
        return Counting(calls, model_class=SingleTimestepModel)

    whole = measure(counting(), coarse=3, num_predictions=1)
    with pytest.raises(Interrupted):
        measure(counting(4), tmp_path / "map.pth", coarse=3, num_predictions=1)
    rest = counting()
    assert_same(measure(rest, tmp_path / "map.pth", coarse=3, num_predictions=1), whole)
    assert sum(rest.sizes) == 3 * (9 + 3) - 24 and whole["jacobian"].keys() == {"HH", "HL"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"maps": "mse"}, {"maps": "blocks"}, {"coarse": 2}])
def test_a_denoiser_that_is_not_finite_is_named_and_not_kept(tmp_path, bad, options, monkeypatch):
    monkeypatch.setattr(error_map_module, "SECONDS_BETWEEN_PARTS", -1)
    counting = Counting()

    def denoise(xs, ts):
        fine, coarse = counting(xs, ts)
        return fine * torch.where(ts[1] < 100, bad, 1.0).view(-1, 1, 1, 1), coarse

    with pytest.raises(ValueError, match="^The denoiser returns what is not finite here; its weights may be damaged.$"):
        measure(denoise, tmp_path / "map.pth", **options)
    rest = Counting()
    assert_same(measure(rest, tmp_path / "map.pth", **options), measure(Counting(), **options))
    assert 0 < sum(rest.sizes) < sum(counting.sizes) + sum(rest.sizes)


def measure_in_child(environment, folder, raises_at, model_class):
    """One of several processes: it shares a map, and leaves what it got and how many samples it saw."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    processes = Processes("cpu")
    denoise = Counting(raises_at, model_class=model_class)
    options = {"processes": processes, "num_predictions": model_class.num_predictions}
    try:
        result = measure(denoise, folder / "map.pth", **options)
    finally:
        torch.save(denoise.sizes, folder / f"sizes{processes.rank}.pth")
    torch.save(result, folder / f"result{processes.rank}.pth")
    processes.close()


@pytest.fixture
def together(tmp_path):
    """`together(2, raises_at={rank: call})` measures in processes; samples that each saw, and their exit codes."""
    started = []

    def start(count, raises_at=(), model_class=LIFTDualTimestepModel):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
        ranks = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        calls = [dict(raises_at).get(rank) for rank in range(count)]
        processes = [
            FORKS.Process(target=measure_in_child, args=(environment, tmp_path, call, model_class))
            for environment, call in zip(ranks, calls, strict=True)
        ]
        started.extend(processes)
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        sizes = [sum(torch.load(tmp_path / f"sizes{rank}.pth")) for rank in range(count)]
        return sizes, [process.exitcode for process in processes]

    yield start
    for process in started:
        process.kill()
        process.join()


def assert_nearly_same(result, other):
    assert result.keys() == other.keys()
    for name in {"jacobian", "jacobian_se", "mse_64", "mse_32", "mse_64_se", "mse_32_se", "eps_mse_64"} & other.keys():
        torch.testing.assert_close(result[name], other[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [2, 5])
def test_several_processes_share_the_cells_and_agree(together, tmp_path, uninterrupted, count):
    sizes, codes = together(count)
    assert codes == [0] * count
    assert sizes == {2: [24, 24], 5: [10, 10, 10, 9, 9]}[count]
    results = [torch.load(tmp_path / f"result{rank}.pth") for rank in range(count)]
    for result in results:
        assert_same(result, results[0])
    assert_nearly_same(results[0], uninterrupted)


def test_several_processes_share_a_fine_map(together, tmp_path):
    sizes, codes = together(2, model_class=NoTimestepModel)
    assert codes == [0, 0] and sizes == [24, 24]
    alone = measure(Counting(model_class=NoTimestepModel), num_predictions=1)
    for rank in range(2):
        assert_nearly_same(torch.load(tmp_path / f"result{rank}.pth"), alone)


def test_another_number_of_processes_goes_on(together, tmp_path, uninterrupted):
    with pytest.raises(Interrupted):
        measure(Counting(2), tmp_path / "map.pth")
    # Two share what is left, 36 samples, and one of them dies.
    sizes, codes = together(2, {1: 1})
    assert sizes == [18, 6] and 0 not in codes
    assert sorted(file.name for file in tmp_path.glob("map*")) == ["map.pth.part0", "map.pth.part1"]
    rest = Counting()
    assert_nearly_same(measure(rest, tmp_path / "map.pth"), uninterrupted)
    assert sum(rest.sizes) == 48 - 12 - 24


def test_parts_of_all_are_counted_once(together, tmp_path, uninterrupted):
    sizes, codes = together(2, {0: 3, 1: 2})
    assert sizes == [18, 12] and 0 not in codes
    sizes, codes = together(3)
    assert sum(sizes) == 48 - 30 and codes == [0] * 3
    for rank in range(3):
        assert_nearly_same(torch.load(tmp_path / f"result{rank}.pth"), uninterrupted)
    sizes, codes = together(2)
    assert sizes == [0, 0] and codes == [0] * 2
    assert_nearly_same(torch.load(tmp_path / "result1.pth"), uninterrupted)


# What is made of a map


def test_normalisations_by_hand():
    norms = {"HH": torch.tensor([[6.0, 12.0], [18.0, 24.0]]), "LL": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    result = {"jacobian": {name: norm.double() for name, norm in norms.items()}}
    result |= {"snr_grid": torch.tensor([0.5, 2.0]).double(), "log_snr_grid": torch.tensor([0.5, 2.0]).log().double()}
    result |= {"num_pixels_64": 8, "num_pixels_32": 2, "num_dims_64": 24, "num_dims_32": 6}
    # Factor B is 1/(0.5 · 1.5) = 4/3 and 1/(2 · 3) = 1/6.
    expected = {
        "published": ([[6 / 48, 12 / 48], [18 / 384, 24 / 384]], [[1 / 3, 2 / 24], [3 / 3, 4 / 24]]),
        "per_dim": ([[1 / 3, 2 / 3], [1 / 8, 1 / 6]], [[2 / 9, 1 / 18], [2 / 3, 1 / 9]]),
        "sum": ([[8, 16], [3, 4]], [[4 / 3, 1 / 3], [4, 2 / 3]]),
    }
    for normalisation, errors in expected.items():
        for ours, by_hand in zip(published_errors(result, "B", normalisation), errors, strict=True):
            np.testing.assert_allclose(ours, by_hand, rtol=1e-6)
        for kind, weight in (("dp_64", 0), ("dp_total", 1)):
            error_64, error_32, log_snr = path_errors(result, kind, "B", normalisation)
            np.testing.assert_allclose(error_64, errors[0], rtol=1e-6)
            np.testing.assert_allclose(error_32, weight * np.array(errors[1]), rtol=1e-6)
            np.testing.assert_allclose(log_snr, [-math.log(2), math.log(2)], rtol=1e-6)
    with pytest.raises(ValueError, match="^Unknown normalisation 'mean'; choose one of published, per_dim, sum.$"):
        published_errors(result, "B", "mean")
    del result["jacobian"]
    with pytest.raises(
        ValueError, match="^This heatmap holds denoising errors only; compute it again with --maps all.$"
    ):
        published_errors(result)


def test_largest_deviation_by_hand():
    def flat(value, error):
        jacobian = {name: torch.full((2, 2), value).double() for name in BLOCKS}
        jacobian_se = {name: torch.full((2, 2), error).double() for name in BLOCKS}
        maps = {"jacobian": jacobian, "jacobian_se": jacobian_se}
        for name in ("mse_64", "mse_32"):
            maps |= {name: torch.full((2, 2), value).double(), f"{name}_se": torch.full((2, 2), error).double()}
        return maps

    reference, other = flat(5.0, 0.5), flat(5.0, 99.0)
    assert largest_deviation(other, reference) == 0
    other["mse_32"][1, 0] = 4.0
    assert largest_deviation(other, reference) == pytest.approx(2)
    other["jacobian"]["LH"][0, 1] = 6.25
    assert largest_deviation(other, reference) == pytest.approx(2.5)
    without = {name: value for name, value in other.items() if "jacobian" not in name}
    assert largest_deviation(without, reference) == pytest.approx(2)
    reference["jacobian_se"]["HH"][0, 0] = math.nan
    assert math.isnan(largest_deviation(other, reference))


@pytest.fixture(scope="module")
def power_law():
    """The maps of perfectly denoised 64x64 images with a power spectrum, on the published grid."""
    scheduler, t_grid = DDIMScheduler(), torch.from_numpy(timestep_grid(30))
    result = {
        "t_grid": t_grid,
        "snr_grid": scheduler.snr[t_grid],
        "log_snr_grid": scheduler.log_snr[t_grid],
        "fingerprint": "none",
        "num_pixels_64": 64 * 64,
        "num_pixels_32": 32 * 32,
        "num_dims_64": 3 * 64 * 64,
        "num_dims_32": 3 * 32 * 32,
    }
    return result | {"jacobian": jacobian_maps(Spectrum.power_law(), result["log_snr_grid"])}


@pytest.mark.parametrize(
    ("normalisation", "ahead", "largest_lead", "cost"),
    [("published", 17, 8, 1.18085), ("per_dim", 17, 5, 644.872), ("sum", 3, 1, 4.95100e6)],
)
def test_the_published_lead_of_the_coarse_scale_is_its_weight(power_law, normalisation, ahead, largest_lead, cost):
    errors = [error.numpy() for error in published_errors(power_law, "B", normalisation)]
    cells, found = find_optimal_path_n_steps_lambda(*errors, power_law["log_snr_grid"].numpy(), 18, 5)
    t_grid = power_law["t_grid"].numpy()
    lead = leads(path_from_cells(cells, t_grid, "dp_total", {}), t_grid)
    assert (lead["ahead"], lead["behind"], lead["points"]) == (ahead, 0, 19)
    assert lead["largest_lead"] == largest_lead and found == pytest.approx(cost, rel=1e-5)
    path, same = heatmap_path(power_law, "dp_total", 18, 5, "B", normalisation)
    assert path.provenance["cells"] == [list(cell) for cell in cells] and same == found
    # Scaling both maps alike moves nothing.
    assert find_optimal_path_n_steps_lambda(*(3 * e for e in errors), power_law["log_snr_grid"], 18, 5)[0] == cells


def test_a_jacobian_without_content_costs_about_as_much(power_law):
    """‖I‖²/(1 - ᾱ) for any images: the clocks do not interact, and each takes the best trapezoids of its own."""
    alpha_bar = DDIMScheduler().alphas_cumprod[power_law["t_grid"]]
    norms = {"HH": (3 * 64**2 / (1 - alpha_bar))[:, None], "LL": 3 * 32**2 / (1 - alpha_bar)}
    flat = power_law | {"jacobian": {name: norm.expand(30, 30) for name, norm in norms.items()}}
    x, snr = flat["log_snr_grid"].numpy(), flat["snr_grid"].numpy()
    error = 3 / (64**2 * snr)
    best = np.full(30, np.inf)  # The least cost from line 0 to each line in so many moves of at most 5 lines.
    best[0] = 0
    for _ in range(18):
        moves = [[best[i] + (error[i] + error[j]) / 2 * (x[j] - x[i]) for i in range(max(0, j - 5), j + 1)]
                 for j in range(30)]  # fmt: skip
        best = np.array([min(costs) for costs in moves])
    for kind, times in (("dp_64", 1), ("dp_total", 5)):  # A coarse pixel counts four times.
        path, cost = heatmap_path(flat, kind, 18, 5)
        assert cost == pytest.approx(times * best[-1], rel=1e-9) and len(path.points) == 19
        with_content = heatmap_path(power_law, kind, 18, 5)[1]
        assert with_content == pytest.approx(cost, rel=0.01)
    assert best[-1] == pytest.approx(0.2374, rel=1e-3)
