"""Inpainting against a second implementation, exact Gaussian conditionals and super-resolution, and its stage."""

from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import inpaint
import train_lift
from checkpoint import load_model
from conftest import HARDWARE, STEPS, results_of
from data import coarse, load_images, read_png, save_png, split_holdout, to_float, to_uint8
from diffusion.sampler import COARSE_FEEDS, coarse_feed, sample_seeds, scale_shapes
from diffusion.super_resolution import make_consistent, noise_seeds, super_resolution_path, super_resolve
from inpaint import MASKS, jump_counts, load_mask, repaint, scale_masks
from model import LIFTBaselineModel, LIFTDualTimestepModel, NoTimestepModel, SingleTimestepModel
from paths.families import diagonal
from paths.path import Path
from paths.schedule_file import save_schedule
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser

RNG = np.random.default_rng(0)
SCHEDULER = DDIMScheduler()
CASCADE = Path(((999, 999), (999, 700), (999, 300), (800, 300), (500, 100), (200, 0), (50, 0), (0, 0)), "hand-made", {})
PATHS = {"diagonal": diagonal(6), "cascade": CASCADE, "one scale": diagonal(5, num_scales=1)}


def pixels_of(count, size=8, channels=3):
    return torch.from_numpy(RNG.integers(0, 256, (count, channels, size, size), dtype=np.uint8))


def mask_of(size=8, share=0.6):
    return torch.from_numpy(RNG.random((size, size)) < share)


def drawer(count, dtype=torch.float64, seed=3, kept=None):
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        noise = torch.randn(count, *shape, generator=generator, dtype=dtype)
        if kept is not None:
            kept.append(noise)
        return noise

    return draw


class Spy:
    """A denoiser of as many scales as it is given, or of the fine one, which keeps what it was called with."""

    def __init__(self, fine_only=False):
        self.fine_only, self.seen = fine_only, []

    def __call__(self, xs, ts):
        self.seen.append((xs, tuple(t[0].item() for t in ts)))
        fine = 0.6 * xs[0] + 0.2 * torch.roll(xs[0], 1, -1)
        if len(xs) == 1:
            return (fine,)
        fine = fine + 0.3 * xs[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
        return (fine,) if self.fine_only else (fine, 0.5 * xs[1] + 0.2 * coarse(xs[0]))


def visited(num_steps, jump_length, jump_repeats):
    """The points at which a call is made: every stretch repeated, one after another, and what is left over once."""
    ends = [k for k in range(1, num_steps) if k % jump_length == 0] if jump_repeats > 1 else []
    points = [k for end in ends for _ in range(jump_repeats) for k in range(end - jump_length, end)]
    return points + list(range(max(ends, default=0), num_steps))


# Masks


def test_masks_by_name_leave_open_what_they_say():
    for n in (8, 16, 32, 64):
        known = {name: load_mask(name, "fine", n) for name in MASKS}
        assert all(mask.shape == (n, n) and mask.dtype == torch.bool for mask in known.values())
        hole = torch.zeros(n, n)
        hole[n // 4 : n // 4 + n // 2, n // 4 : n // 4 + n // 2] = 1
        assert torch.equal(~known["center"], hole.bool())
        assert not known["left"][:, : n // 2].any() and known["left"][:, n // 2 :].all() and known["none"].all()
        assert abs(known["random"].float().mean() - 0.5) < 2 / n
        assert torch.equal(known["random"], load_mask("random", "fine", n))
        assert torch.equal(load_mask("center", "coarse", 2 * n), known["center"])


@pytest.mark.parametrize("size", [8, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P"])
def test_a_mask_file_says_its_scale_by_its_size(tmp_path, size, mode):
    levels = np.where(mask_of(size), RNG.integers(128, 256, (size, size)), RNG.integers(0, 128, (size, size)))
    if mode in ("1", "P"):
        levels = np.where(levels > 127, 255, 0)
    Image.fromarray(levels.astype(np.uint8)).convert(mode).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(load_mask(str(tmp_path / "mask.png"), "fine", 8), levels > 127)


@pytest.mark.parametrize("level", [255, 0])
@pytest.mark.parametrize("size", [8, 4])
def test_a_mask_may_be_drawn_on_transparency_turned_or_deep(tmp_path, size, level):
    drawn = mask_of(size)
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[drawn] = (level, level, level, 255)
    Image.fromarray(pixels).save(tmp_path / "drawn.png")
    known = drawn if level else ~np.asarray(drawn)
    np.testing.assert_array_equal(load_mask(str(tmp_path / "drawn.png"), "fine", 8), known)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.asarray(drawn).astype(np.uint16) * 65535).save(tmp_path / "deep.png", exif=exif)
    np.testing.assert_array_equal(load_mask(str(tmp_path / "deep.png"), "fine", 8), np.rot90(drawn, -1))


def test_masks_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="hole is neither a file nor one of center, left, random, none"):
        load_mask("hole", "fine", 8)
    Image.new("L", (8, 4)).save(tmp_path / "wide.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "deep.png", "TIFF")
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in {"wide": "it is 8x4", "deep": "more than 16 bits", "text": "cannot identify"}.items():
        with pytest.raises(ValueError, match=rf"{name}.png cannot be used \(.*{reason}.*8x8 pixels, or of 4x4"):
            load_mask(str(tmp_path / f"{name}.png"), "fine", 8)


def test_a_coarse_pixel_is_known_where_all_of_it_is():
    mask = mask_of(share=0.8)
    fine, small = scale_masks(mask, 8, 2)
    assert torch.equal(fine, mask) and 0 < small.sum() < 16
    for i, j in np.ndindex(4, 4):
        assert small[i, j] == (mask[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].sum() == 4)
    assert len(scale_masks(mask, 8, 1)) == 1
    fine, small = scale_masks(mask[:4, :4], 8, 2, "x0")
    assert not fine.any() and fine.shape == (8, 8) and torch.equal(small, mask[:4, :4])
    for refused in ((1, None), (2, "noisy")):
        with pytest.raises(ValueError, match="coarse image of its own.*8x8 pixels"):
            scale_masks(mask[:4, :4], 8, *refused)


# The jumps


@pytest.mark.parametrize("jump_repeats", [1, 2, 4])
@pytest.mark.parametrize("jump_length", [1, 2, 3, 6])
@pytest.mark.parametrize("num_steps", [7, 8, 12])
def test_jumps_visit_the_points_of_a_list_by_hand(num_steps, jump_length, jump_repeats):
    spy, path = Spy(), diagonal(num_steps)
    images, masks = to_float(pixels_of(2)).double(), scale_masks(mask_of(), 8, 2)
    samples = repaint(spy, SCHEDULER, path, images, masks, drawer(2), 1.0, jump_length, jump_repeats)
    points = visited(num_steps, jump_length, jump_repeats)
    assert [ts for _, ts in spy.seen] == [path.points[k] for k in points]
    counts = jump_counts(num_steps, jump_length, jump_repeats)
    assert samples.nfe == len(points) == num_steps + jump_length * sum(counts.values())


def test_jumps_must_fit_the_path():
    assert jump_counts(4, 9, 1) == {} and jump_counts(4, 3, 3) == {3: 2}
    for jump_length in (4, 9):
        with pytest.raises(ValueError, match=rf"--jump_length {jump_length} is too long for a path of 4 steps"):
            jump_counts(4, jump_length, 2)


@pytest.mark.parametrize("beta_schedule", ["cosine_clipped", "cosine_zero_terminal"])
@pytest.mark.parametrize(("t", "t_back"), [(0, 1), (0, 999), (500, 501), (300, 800)])
def test_noise_upon_noise_is_noise_at_once(beta_schedule, t, t_back):
    scheduler = DDIMScheduler(beta_schedule=beta_schedule, prediction_type="v")
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    # The weights of image, first and second noise.
    image = scheduler.renoise(scheduler.add_noise(one, zero, t), zero, t, t_back)
    noises = [scheduler.renoise(scheduler.add_noise(zero, one, t), zero, t, t_back)]
    noises.append(scheduler.renoise(zero, one, t, t_back))
    torch.testing.assert_close(image, scheduler.add_noise(one, zero, t_back), rtol=1e-9, atol=1e-12)
    variance = scheduler.add_noise(zero, one, t_back).square()
    torch.testing.assert_close(sum(x.square() for x in noises), variance, rtol=1e-9, atol=1e-12)


# The sampling


def by_hand(spy, scheduler, path, images, masks, draws, eta, jump_length, jump_repeats, feed, free_fine):
    """RePaint as a plain loop over the list of visited points, one pixel mask at a time."""
    abar = scheduler.alphas_cumprod.tolist()
    known = [images, coarse(images)][: path.num_scales]

    def put(xs, k):
        for s, (mask, t) in enumerate(zip(masks, path.points[k], strict=True)):
            if mask.any():
                noised = known[s]
                if t > 0:
                    noised = abar[t] ** 0.5 * known[s] + (1 - abar[t]) ** 0.5 * next(draws)
                xs[s] = mask * noised + ~mask * xs[s]
        if not masks[0].any() and (k == path.nfe or not free_fine):
            t, means = path.points[k][0], known[1]
            if t > 0:
                means = abar[t] ** 0.5 * means + (1 - abar[t]) ** 0.5 * next(draws) / 2
            large = masks[1].repeat_interleave(2, 0).repeat_interleave(2, 1)
            xs[0] = torch.where(large, make_consistent(xs[0], means), xs[0])
        return xs

    def mean_if_noisy(xs):
        return [xs[0], coarse(xs[0])] if feed == "noisy" else xs

    points = visited(path.nfe, jump_length, jump_repeats)
    xs = [next(draws) for _ in known]
    if feed == "noisy":
        xs[1] = coarse(xs[0])
    xs = mean_if_noisy(put(xs, 0))
    for k, following in zip(points, [*points[1:], path.nfe], strict=True):
        predictions, moved = spy(xs, [torch.tensor([t]) for t in path.points[k]]), []
        for s, (x, t, t_next) in enumerate(zip(xs, path.points[k], path.points[k + 1], strict=True)):
            is_last = k + 1 == path.nfe
            a, a_next = abar[t], 1.0 if is_last else abar[t_next]
            if s >= len(predictions):
                a_fine = abar[path.points[k][0]]
                x0 = ((xs[0] - (1 - a_fine) ** 0.5 * predictions[0]) / a_fine**0.5).clamp(-1, 1)
                if feed == "noisy":
                    moved.append(coarse(moved[0]))
                else:
                    renewed = a_next**0.5 * coarse(x0)
                    moved.append(renewed if is_last else renewed + (1 - a_next) ** 0.5 * next(draws))
            elif t == t_next and not is_last:
                moved.append(x)
            else:
                x0 = ((x - (1 - a) ** 0.5 * predictions[s]) / a**0.5).clamp(-1, 1)
                epsilon = (x - a**0.5 * x0) / (1 - a) ** 0.5
                sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
                x = a_next**0.5 * x0 + max(1 - a_next - sigma**2, 0) ** 0.5 * epsilon
                moved.append(x + sigma * next(draws) if eta > 0 else x)
        xs = put(moved, k + 1)
        if following <= k:
            for s, (t, u) in enumerate(zip(path.points[k + 1], path.points[following], strict=True)):
                if u != t:
                    ratio = abar[u] / abar[t]
                    xs[s] = ratio**0.5 * xs[s] + (1 - ratio) ** 0.5 * next(draws)
        xs = mean_if_noisy(xs)
    return xs[0]


CASES = [
    ("diagonal", "fine", None),
    ("diagonal", "coarse", None),
    ("diagonal", "coarse, free", None),
    ("cascade", "fine", None),
    ("cascade", "coarse", None),
    ("one scale", "fine", None),
    ("cascade", "fine", "x0"),
    ("cascade", "coarse", "x0"),
    ("cascade", "coarse, free", "x0"),
    ("diagonal", "fine", "noisy"),
]


@pytest.mark.parametrize("jumps", [(1, 1), (2, 3)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("name", "scale", "feed"), CASES)
def test_repaint_is_a_plain_loop(name, scale, feed, eta, jumps):
    path, kept, options = PATHS[name], [], (eta, *jumps, feed, scale.endswith("free"))
    images = to_float(pixels_of(2)).double()
    masks = scale_masks(mask_of(8 if scale == "fine" else 4), 8, path.num_scales, feed)
    spies = Spy(feed is not None), Spy(feed is not None)
    samples = repaint(spies[0], SCHEDULER, path, images, masks, drawer(2, kept=kept), *options)
    left = iter(kept)
    expected = by_hand(spies[1], SCHEDULER, path, images, masks, left, *options)
    assert next(left, None) is None
    torch.testing.assert_close(samples.images[0], expected, rtol=1e-6, atol=1e-6)
    for (xs, _), (ys, _) in zip(*(spy.seen for spy in spies), strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("jumps", [(1, 1), (1, 2)])
@pytest.mark.parametrize("name", PATHS)
def test_known_pixels_come_out_as_they_went_in(name, jumps):
    path = PATHS[name]
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 4, 8, 8).repeat(2, 1, 1, 1)[:, :3]
    pixels[1] = 255 - pixels[1]
    for mask in (mask_of(), torch.ones(8, 8, dtype=torch.bool)):
        masks = scale_masks(mask, 8, path.num_scales)
        [samples] = inpaint.inpaint(
            Spy(), SCHEDULER, path, to_float(pixels), masks, [1, 2], jump_length=jumps[0], jump_repeats=jumps[1]
        )
        found = to_uint8(samples.images[0])
        assert torch.equal(found[:, :, mask], pixels[:, :, mask])
        assert mask.all() or not torch.equal(found, pixels)
        if path.num_scales == 2:
            small = masks[1]
            assert torch.equal(samples.images[1][:, :, small], coarse(to_float(pixels))[:, :, small])


@pytest.mark.parametrize("free_fine", [False, True])
def test_known_coarse_pixels_are_the_means_of_the_result(free_fine):
    pixels, mask = pixels_of(3), mask_of(4)
    masks = scale_masks(mask, 8, 2)
    given = coarse(to_float(pixels))
    [samples] = inpaint.inpaint(Spy(), SCHEDULER, CASCADE, to_float(pixels), masks, [1, 2, 3], free_fine=free_fine)
    apart = (coarse(samples.images[0]) - given).abs()
    assert apart[:, :, mask].max() <= 1e-6 < 0.1 < apart[:, :, ~mask].max()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("feed", COARSE_FEEDS)
@pytest.mark.parametrize(
    "model_class", [LIFTDualTimestepModel, LIFTBaselineModel, SingleTimestepModel, NoTimestepModel]
)
def test_with_nothing_known_this_is_plain_sampling(model_class, feed, eta):
    torch.manual_seed(0)
    model = model_class((8, 8)).eval().requires_grad_(False)
    feed, path, seeds = coarse_feed(model, feed), diagonal(4), [5, 3, 8]
    masks = scale_masks(torch.zeros(16, 16, dtype=torch.bool), 16, 2)
    images = to_float(pixels_of(3, 16))
    painted = inpaint.inpaint(
        model.denoise, SCHEDULER, path, images, masks, seeds, batch_size=2, eta=eta, coarse_from=feed
    )
    plain = sample_seeds(model.denoise, SCHEDULER, path, seeds, scale_shapes(2, 3, 16), 2, eta=eta, coarse_from=feed)
    for one, (_, other) in zip(painted, plain, strict=True):
        assert one.nfe == other.nfe == 4
        assert torch.equal(one.images[0], other.images[0])


def test_with_all_coarse_pixels_known_this_is_super_resolution():
    images, seeds = to_float(pixels_of(3)), [4, 9, 2]
    path = super_resolution_path(diagonal(5, num_scales=1))
    masks = scale_masks(torch.ones(4, 4, dtype=torch.bool), 8, 2)
    [painted] = inpaint.inpaint(Spy(), SCHEDULER, path, images, masks, seeds, eta=0.0, free_fine=True)
    [upscaled] = super_resolve(Spy(), SCHEDULER, path, coarse(images), seeds)
    assert torch.equal(painted.images[0], make_consistent(upscaled.images, coarse(images)))
    assert painted.nfe == upscaled.nfe == 5


def test_an_image_does_not_depend_on_its_batch():
    images, masks, seeds = to_float(pixels_of(5)), scale_masks(mask_of(), 8, 2), [3, 1, 4, 15, 9]

    def run(rows, batch_size):
        chosen = [seeds[k] for k in rows]
        batches = inpaint.inpaint(
            Spy(), SCHEDULER, CASCADE, images[rows], masks, chosen, batch_size, jump_length=2, jump_repeats=2
        )
        return torch.cat([batch.images[0] for batch in batches])

    together = run([0, 1, 2, 3, 4], 5)
    assert torch.equal(run([0, 1, 2, 3, 4], 2), together)
    assert torch.equal(run([4, 2], 1), together[[4, 2]])
    # What is not known of it does not matter either.
    images = torch.where(masks[0], images, 0.25)
    assert torch.equal(run([0, 1, 2, 3, 4], 3), together)


def test_an_image_that_is_not_finite_is_named():
    def denoise(xs, ts):
        return tuple(torch.where(x[:, :1, :1, :1] > 0.9, torch.nan, x) for x in xs)

    images = torch.zeros(5, 3, 8, 8)
    images[3, 0, 0, 0] = 1
    masks = scale_masks(torch.arange(64).view(8, 8) == 0, 8, 2)
    with mock.patch.object(inpaint.SeededNoise, "draw", lambda self, shape, device: 0.0 * torch.zeros(2, *shape)):
        with pytest.raises(ValueError, match="image 3 NaN or infinite"):
            list(inpaint.inpaint(denoise, SCHEDULER, CASCADE, images[:4], masks, range(4), batch_size=2))


# Exact conditionals


@pytest.mark.parametrize(
    ("scale", "free_fine", "bound"), [("fine", False, 0.15), ("coarse", False, 0.15), ("coarse", True, 0.4)]
)
def test_jumps_bring_gaussian_images_to_their_exact_conditional(scale, free_fine, bound):
    size, count = 4, 1000
    scheduler = DDIMScheduler(clip_sample=False)
    low = torch.tensor([[[1.0, 0.4], [0.4, 0.2]]])
    denoiser = GaussianDenoiser(scheduler, low, torch.full((3, 1, 2, 2), 0.05))
    unit = torch.eye(size**2, dtype=torch.float64)
    with mock.patch.object(torch, "randn", lambda shape, **_: unit.view(shape)):
        basis = denoiser.draw(size**2).flatten(1)
    covariance = basis.T @ basis
    mask = load_mask("left", scale, size)
    image = torch.ones(1, 1, size, size, dtype=torch.float64)
    # One row for each known number, the pixels of which it is the mean.
    pixels = unit.view(size**2, 1, size, size)
    rows = (pixels if scale == "fine" else coarse(pixels)).flatten(1).T[mask.flatten()]
    gain = covariance @ rows.T @ torch.linalg.inv(rows @ covariance @ rows.T)
    hole = ~load_mask("left", "fine", size).flatten()
    mean, spread = gain @ rows @ image.flatten(), covariance - gain @ rows @ covariance
    path = diagonal(40, "uniform_log_snr", log_snr=scheduler.log_snr.numpy())
    masks, images = scale_masks(mask, size, 2), image.expand(count, -1, -1, -1)
    errors = []
    for jump_repeats in (1, 3, 10):
        samples = repaint(
            denoiser.denoise, scheduler, path, images, masks, drawer(count), 1.0, 2, jump_repeats, free_fine=free_fine
        )
        found = samples.images[0].flatten(1)
        torch.testing.assert_close(found @ rows.T, images.flatten(1) @ rows.T, rtol=0, atol=1e-12)
        errors.append(((found.mean(0) - mean)[hole].norm() / mean[hole].norm()).item())
        # What the ancestral step of few steps loses is an eighth of the variance, with jumps or without.
        assert (torch.cov(found.T) - spread).norm() < 0.25 * spread.norm()
    # Without jumps it is half of what the known pixels say that is missed.
    assert errors[0] > 0.4 and errors[1] < 0.85 * errors[0] and errors[2] < bound


# The stage


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A stage that falls back on a default place writes it here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def held_out(stage, tiny, run, tmp_path_factory):
    """A dual model that was trained without 4 of 12 images."""
    folder = tmp_path_factory.mktemp("held_out")
    stage(train_lift, *tiny(folder), "--cache_dir", run.cache, "--holdout", 4, "--epochs", 1, "--lr", 0.003)
    return folder / "checkpoints/lift_dual_timestep_1ep.pth"


def flags_of(checkpoint, run, *flags):
    jumps = ["--jump_length", 2, "--jump_repeats", 2]
    return ["--checkpoint", checkpoint, *STEPS, *jumps, *HARDWARE, "--cache_dir", run.cache, *flags]


def write_images(folder, images, names="abcdefgh"):
    folder.mkdir(exist_ok=True)
    for name, pixels in zip(names, images, strict=False):
        save_png(pixels, folder / f"{name}.png")


def test_held_out_images_are_painted(stage, refused, run, held_out, tmp_path):
    flags = flags_of(held_out, run, "--mask", "center", "--num_images", 4, "--output", "painted", "--batch_size", 8)
    ended = stage(inpaint, *flags, "--repeats", 2)
    # Jumps from point 2 of 4, once.
    assert "8 images in painted: 8 new with 6 network calls each, 4 of the path and 2 by jumps" in ended.output
    assert "TRAINED ON" not in ended.output and "inpainting: 8 of 8 images" in ended.notes
    originals = torch.from_numpy(
        np.array(split_holdout(load_images("synthetic", 16, run.cache, limit=12), 4)[1].pixels)
    )
    made = {
        seed: torch.stack([read_png(tmp_path / f"painted/000{k}_{seed}.png") for k in range(4)]) for seed in (42, 43)
    }
    mask, loaded = load_mask("center", "fine", 16), load_model(held_out)
    for pixels in made.values():
        assert torch.equal(pixels[:, :, mask], originals[:, :, mask])
        assert (pixels[:, :, ~mask] != originals[:, :, ~mask]).any()
    assert not torch.equal(made[42], made[43])
    both = originals.repeat_interleave(2, 0)
    seeds = [noise_seeds(image[None], seed)[0] for image in originals for seed in (42, 43)]
    [samples] = inpaint.inpaint(
        loaded.model.denoise, loaded.scheduler, diagonal(4), to_float(both), scale_masks(mask, 16, 2), seeds,
        jump_length=2, jump_repeats=2,
    )  # fmt: skip
    assert torch.equal(to_uint8(samples.images[0]), torch.stack([made[42], made[43]], 1).flatten(0, 1))
    with Image.open(tmp_path / "painted/inpainting.png") as figure:
        assert figure.width > 4 * 128 and figure.height > 4 * 128
    # What is there stays, further seeds come beside it, and other settings are refused.
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "painted").glob("0*.png")}
    assert "8 images in painted: all there already" in stage(inpaint, *flags, "--repeats", 2).output
    assert "8 images in painted: 4 new" in stage(inpaint, *flags, "--repeats", 2, "--seed", 43).output
    assert len(times) == 8 and all(file.stat().st_mtime_ns == time for file, time in times.items())
    for others in (["--mask", "left"], ["--eta", 0], ["--jump_repeats", 3], ["--num_steps", 5]):
        refused(inpaint, *flags, *others, says=("painted holds results with another", "--force"))
    stage(inpaint, *flags, "--mask", "left", "--force")
    assert len(list((tmp_path / "painted").glob("0*.png"))) == 4


def test_a_folder_is_painted_below_a_coarse_mask(stage, refused, run, tmp_path):
    pixels = pixels_of(3, 16)
    write_images(tmp_path / "mine", pixels)
    mask = mask_of(8)
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    log_snr = SCHEDULER.log_snr.numpy()
    save_schedule(
        Path(((999, 999), (999, 300), (400, 100), (0, 0)), "hand-made", {}), tmp_path / "path.json", log_snr, solver={}
    )
    flags = flags_of(run.lift, run, "--input", "mine", "--mask", "mask.png", "--schedule", "path.json", "--ema")
    ended = stage(inpaint, *flags)
    folder = results_of("dual") / "inpainting/lift_dual_timestep_2ep_ema_hand-made_3_mask_mine"
    assert "3 new with 5 network calls each" in ended.output and "path hand-made" in ended.output
    made = torch.stack([read_png(folder / f"{name}_42.png") for name in "abc"])
    apart = (coarse(made.double()) - coarse(pixels.double())).abs()
    # Rounding to grey levels moves a mean by half a level, and clipping by more, of which the middle half sees none.
    middle = ((made > 0) & (made < 255)).view(3, 3, 8, 2, 8, 2).all(5).all(3) & mask
    assert middle.any() and apart[middle].max() <= 0.5 < apart[:, :, ~mask].mean()
    # An image that changed is made again, and foreign ones are left alone.
    write_images(tmp_path / "mine", pixels_of(1, 16))
    assert "3 images" in (output := stage(inpaint, *flags).output) and "1 new" in output
    write_images(tmp_path / "mine", pixels_of(1, 16), "d")
    write_images(folder, pixels_of(1, 16), ["d_42"])
    refused(inpaint, *flags, says=("d_42.png was not made by this stage", "--force"))


def test_a_model_of_one_scale_paints_too(stage, run, tmp_path):
    flags = flags_of(run.baseline, run, "--mask", "random", "--num_images", 2, "--jump_repeats", 1, "--output", "out")
    ended = stage(inpaint, *flags)
    assert "2 new with 4 network calls each, 4 of the path and 0 by jumps" in ended.output
    assert "NOTE: THE NETWORK WAS TRAINED ON THESE IMAGES" in ended.output
    known, images = load_mask("random", "fine", 16), run.images()
    made = [read_png(tmp_path / f"out/000{k}_42.png") for k in range(2)]
    for pixels, original in zip(made, images[[3, 9]], strict=True):
        assert torch.equal(pixels[:, known], torch.from_numpy(original)[:, known])


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--mask", "hole.png"], 1, ("hole.png is neither a file", "center, left, random, none")),
        (["--mask", "wide.png"], 1, ("wide.png cannot be used", "it is 12x12", "16x16 pixels, or of 8x8")),
        (["--mask", "left", "--jump_length", 4], 1, ("--jump_length 4 is too long for a path of 4 steps",)),
        (["--mask", "left", "--free_fine"], 1, ("--free_fine is for a mask of the coarse scale",)),
        (["--mask", "left", "--input", "nowhere"], 1, ("nowhere is not a folder", "16x16")),
        (["--mask", "left", "--input", "small"], 1, ("a.png", "8x8 and not 16x16")),
        (["--mask", "left", "--input", "mine", "--output", "mine"], 1, ("is the folder of the input",)),
        (["--mask", "left", "--input", "mine", "--num_images", 3], 1, ("--num_images 3", "2 images of mine")),
        (["--mask", "left", "--on", "holdout"], 1, ("none of 'synthetic'", "--on train")),
        (["--mask", "left", "--path_type", "dp_64"], 1, ("heatmap_30_2ep.pth",)),
        (["--mask", "left", "--path_type", "straight"], 2, ("'straight' is no type of path",)),
        (["--mask", "wide.png", "--mask_scale", "coarse"], 2, ("--mask_scale is for a mask by name",)),
        (["--mask", "left", "--input", "mine", "--on", "train"], 2, ("--on", "--input")),
        (["--mask", "left", "--eta", 2], 2, ("--eta",)),
        ([], 2, ("--mask",)),
    ],
)
def test_flags_that_make_no_sense_are_refused(refused, run, tmp_path, flags, status, says):
    Image.new("L", (12, 12)).save(tmp_path / "wide.png")
    write_images(tmp_path / "mine", pixels_of(2, 16))
    write_images(tmp_path / "small", pixels_of(1, 8))
    refused(inpaint, *flags_of(run.lift, run, *flags), says=says, status=status)


def test_a_coarse_mask_for_a_model_without_a_coarse_image_is_refused(refused, run):
    flags = flags_of(run.baseline, run, "--mask", "left", "--mask_scale", "coarse")
    refused(inpaint, *flags, says=("coarse image of its own", "baseline"))


def test_help_shows_the_commands(stage):
    output = stage(inpaint, "--help").output
    assert output.startswith("usage: inpaint.py") and inpaint.__doc__.strip().splitlines()[0] in output
