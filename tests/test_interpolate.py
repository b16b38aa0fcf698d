"""Interpolation against the geometry of the sphere, plain sampling of its ends and a plain loop, and its stage."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import encode
import generate_with_path_30
import interpolate
import train_lift
from checkpoint import load_model
from conftest import HARDWARE, STEPS, results_of
from data import coarse, fingerprint_array, read_png, save_png, to_uint8
from diffusion.adaptive import Ode
from diffusion.latents import decode, load_latents
from diffusion.sampler import COARSE_FEEDS, coarse_feed, sample, sample_seeds, scale_shapes
from diffusion.solvers import Heun
from evaluation.given_latents import encode_pixels
from interpolate import slerp
from model import LIFTBaselineModel, LIFTDualTimestepModel, NoTimestepModel, SingleTimestepModel
from paths.families import diagonal
from paths.path import Path
from scheduler import DDIMScheduler

SCHEDULER = DDIMScheduler()
CASCADE = Path(((999, 999), (999, 700), (999, 300), (800, 300), (500, 100), (0, 0)), "by hand", {})
SHAPES = scale_shapes(2, 3, 8)
WEIGHTS = torch.tensor([0, 1, 0.25, 0.5, 0.9], dtype=torch.float64)


def blending(xs, ts):
    """A denoiser that joins the scales without sums over pixels, whose result has the same bits in any batch."""
    return 0.5 * xs[0] + 0.3 * xs[1].repeat_interleave(2, 2).repeat_interleave(2, 3), 0.6 * xs[1] + 0.1


def noise_of(seed, shape=(3, 8, 8)):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


# The sphere


def test_great_circles_have_even_angles_and_keep_the_norm():
    first, last = noise_of(0).double(), noise_of(1).double()
    last *= first.norm() / last.norm()
    weights = torch.linspace(0, 1, 9, dtype=torch.float64)
    points = slerp(first, last, weights)
    torch.testing.assert_close(points.flatten(1).norm(dim=1), first.norm().expand(9))

    def angle(a, b):
        return math.acos((a * b).sum() / (a.norm() * b.norm()))

    whole = angle(first, last)
    assert 1 < whole < 2
    for k, point in enumerate(points[1:-1], start=1):
        assert angle(first, point) == pytest.approx(k / 8 * whole) and angle(point, last) == pytest.approx(
            (8 - k) / 8 * whole
        )
    # They lie in the plane of the two.
    assert torch.linalg.matrix_rank(torch.cat([points.flatten(1)]), tol=1e-9) == 2


def test_the_ends_are_exact():
    first, last = noise_of(0), 3 * noise_of(1)
    points = slerp(first, last, WEIGHTS)
    assert points.dtype == torch.float32 and points.shape == (5, 3, 8, 8)
    assert torch.equal(points[0], first) and torch.equal(points[1], last)


def test_between_normal_images_lie_normal_ones():
    middle = slerp(noise_of(0, (3, 64, 64)), noise_of(1, (3, 64, 64)), torch.tensor([0.5]))
    assert abs(middle.var() - 1) < 5 * math.sqrt(2 / middle.numel())
    assert abs(middle.mean()) < 5 / math.sqrt(middle.numel())


def test_images_of_one_direction_have_a_line_between_them():
    first = noise_of(0)
    assert torch.equal(slerp(first, first, WEIGHTS), first.expand(5, -1, -1, -1))
    for factor in (2.0, -1.0):
        points, last = slerp(first, factor * first, WEIGHTS), factor * first
        assert torch.equal(points[:2], torch.stack([first, last]))
        torch.testing.assert_close(points[3], (1 + factor) / 2 * first)


# The sampling


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("feed", COARSE_FEEDS)
@pytest.mark.parametrize(
    "model_class", [LIFTDualTimestepModel, LIFTBaselineModel, SingleTimestepModel, NoTimestepModel]
)
def test_the_ends_are_the_images_of_the_seeds(model_class, feed, at):
    torch.manual_seed(0)
    model = model_class((8, 8)).eval().requires_grad_(False)
    feed, path = coarse_feed(model, feed), diagonal(5)
    if model_class in (LIFTDualTimestepModel, SingleTimestepModel):
        path = CASCADE
    options = {"end": "t0", "coarse_from": feed}
    shapes = scale_shapes(2, 3, 16)
    [(_, plain)] = sample_seeds(model.denoise, SCHEDULER, path, [7, 3], shapes, 2, **options)
    ends = interpolate.interpolate(model.denoise, SCHEDULER, path, [7, 3], WEIGHTS[:2], shapes, at, **options)
    for one, other in zip(ends.images, plain.images, strict=True):
        assert torch.equal(one, other)
    frames = interpolate.interpolate(model.denoise, SCHEDULER, path, [7, 3], WEIGHTS, shapes, at, **options)
    assert frames.nfe == 5
    # Convolutions round differently at other batch sizes.
    torch.testing.assert_close(frames.images[0][:2], plain.images[0], rtol=0, atol=1e-4)
    apart = (frames.images[0][2:, None] - frames.images[0][None, :2]).flatten(2).abs().amax(2)
    assert apart.min() > 0.01


@pytest.mark.parametrize("at", [0, 2, 4])
def test_frames_are_sampled_on_from_between_the_states_of_two_seeds(at):
    states = []
    for seed in (5, 6):
        generator = np.random.default_rng(seed)
        noise = [torch.from_numpy(generator.standard_normal((1, *shape), dtype=np.float32)) for shape in SHAPES]
        sample(blending, SCHEDULER, CASCADE, noise, callback=lambda k, xs: states.append(xs) if k == at else None)
    found = interpolate.interpolate(blending, SCHEDULER, CASCADE, [5, 6], WEIGHTS, SHAPES, at)
    rest = Path(CASCADE.points[at:], "rest", {})
    for k, w in enumerate(WEIGHTS.tolist()):
        start = []
        for a, b in zip(*states, strict=True):
            angle = math.acos((a.double() * b.double()).sum() / (a.double().norm() * b.double().norm()))
            start.append((math.sin((1 - w) * angle) * a + math.sin(w * angle) * b) / math.sin(angle))
        expected = sample(blending, SCHEDULER, rest, start).images
        for x, y in zip(found.images, expected, strict=True):
            torch.testing.assert_close(x[k], y[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("feed", [None, *COARSE_FEEDS])
def test_a_frame_does_not_depend_on_those_beside_it(feed, at):
    def denoise(xs, ts):
        return blending(xs, ts)[: 1 if feed else 2]

    def run(weights):
        return interpolate.interpolate(
            denoise, SCHEDULER, CASCADE, [5, 6], weights, SHAPES, at, coarse_from=feed
        ).images[0]

    together = run(WEIGHTS)
    assert torch.equal(run(WEIGHTS[[0, 1, 4, 2]]), together[[0, 1, 4, 2]])
    # Two equal seeds have nothing between them.
    same = interpolate.interpolate(denoise, SCHEDULER, CASCADE, [5, 5], WEIGHTS, SHAPES, at, coarse_from=feed)
    assert torch.equal(same.images[0], together[:1].expand(5, -1, -1, -1))


@pytest.mark.parametrize("at", [0, 3])
def test_the_noisy_feed_is_the_mean_of_the_fine_image_in_every_call(at):
    def denoise(xs, ts):
        torch.testing.assert_close(xs[1], coarse(xs[0]), rtol=0, atol=1e-6)
        return blending(xs, ts)[:1]

    interpolate.interpolate(denoise, SCHEDULER, CASCADE, [5, 6], WEIGHTS, SHAPES, at, coarse_from="noisy")


def test_each_scale_goes_its_own_way():
    seen = []

    def denoise(xs, ts):
        seen.append(xs)
        return xs

    interpolate.interpolate(denoise, SCHEDULER, CASCADE, [5, 6], WEIGHTS, SHAPES)
    fine, small = seen[0]
    assert small.shape == (5, 3, 4, 4)
    # The great circle of what is drawn, and not the mean of the fine noise, which has a quarter of the variance.
    ends = [torch.stack([noise_of(seed) for seed in (5, 6)]), small[:2]]
    for x, (a, b) in zip((fine, small), ends, strict=True):
        assert torch.equal(x, slerp(a, b, WEIGHTS))
    assert (small - coarse(fine)).abs().max() > 0.5


def test_points_and_weights_that_are_none_are_refused():
    for at in (-1, 5):
        with pytest.raises(ValueError, match=rf"^--at {at} is not a point before the last of a path of 5 steps"):
            interpolate.interpolate(blending, SCHEDULER, CASCADE, [5, 6], WEIGHTS, SHAPES, at)
    with pytest.raises(ValueError, match=r"must be 0 and 1, the ends, not \[0\.5, 0\.9"):
        interpolate.interpolate(blending, SCHEDULER, CASCADE, [5, 6], WEIGHTS[3:], SHAPES)


# The stage


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A stage that falls back on a default place writes it here."""
    monkeypatch.chdir(tmp_path)


def flags_of(checkpoint, *flags):
    return ["--checkpoint", checkpoint, *STEPS, *HARDWARE, "--seeds", 42_000_000, 42_000_001, *flags]


def frames_in(folder):
    return [read_png(file) for file in sorted(folder.glob("frame_*.png"))]


@pytest.mark.parametrize("model", ["lift", "baseline"])
def test_the_first_and_last_frames_are_images_of_the_stage_that_generates(stage, run, tmp_path, model):
    checkpoint = getattr(run, model)
    flags = ["--checkpoint", checkpoint, "--num_images", 2, "--output", tmp_path / "images", *STEPS, *HARDWARE]
    stage(generate_with_path_30, *flags)
    expected = [read_png(tmp_path / f"images/00004200000{k}.png") for k in range(2)]
    stage(interpolate, *flags_of(checkpoint, "--frames", 2, "--at", 2))
    [folder] = (results_of("dual" if model == "lift" else model) / "interpolation").iterdir()
    assert folder.name == f"{checkpoint.stem}_raw_diagonal_4_42000000_42000001_at2"
    assert all(torch.equal(one, other) for one, other in zip(frames_in(folder), expected, strict=True))


def test_frames_strip_and_animation(stage, refused, run, tmp_path):
    flags = flags_of(run.lift, "--frames", 5, "--output", "walk")
    ended = stage(interpolate, *flags, "--gif", "--batch_size", 4)
    assert "5 frames in walk: 5 new with 4 network calls each" in ended.output
    assert "interpolation: 5 of 5 images" in ended.notes
    frames = frames_in(tmp_path / "walk")
    assert len(frames) == 5 and not any(torch.equal(a, b) for a, b in zip(frames, frames[1:], strict=False))
    with Image.open(tmp_path / "walk/grid.png") as strip:
        # Eight output pixels a pixel and a white line of two between the frames.
        assert strip.size == (5 * (128 + 2) + 2, 128 + 2 + 2)
        shown = np.asarray(strip)[2 + 3 : -2 : 8, 2 + 3 :][:, :126:8]
    np.testing.assert_array_equal(shown, frames[0].permute(1, 2, 0))
    with Image.open(tmp_path / "walk/frames.gif") as animation:
        assert (animation.n_frames, animation.info["loop"], animation.size) == (8, 0, (256, 256))
        for k in range(8):
            animation.seek(k)
            assert animation.info["duration"] == 100
            pixels = np.asarray(animation.convert("RGB"))[8::16, 8::16].transpose(2, 0, 1).astype(int)
            # There and back, in the 256 colours of this format.
            assert np.abs(pixels - frames[min(k, 8 - k)].numpy()).mean() < 8
    stage(interpolate, *flags)
    assert (tmp_path / "walk/frames.gif").exists()
    # A frame that is gone comes back as it was, the others stay, and so does no animation that was not asked for.
    (tmp_path / "walk/frame_003.png").unlink()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "walk").glob("frame_*.png")}
    assert "1 new" in stage(interpolate, *flags).output
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    # Convolutions round differently at other batch sizes.
    assert (frames_in(tmp_path / "walk")[3].int() - frames[3].int()).abs().max() <= 1
    assert not (tmp_path / "walk/frames.gif").exists()
    assert "all there already" in stage(interpolate, *flags).output
    for others in (["--frames", 6], ["--at", 1], ["--seeds", 1, 2], ["--ema"], ["--end", "t0"]):
        refused(interpolate, *flags, *others, says=("walk holds results with another", "--force"))
    stage(interpolate, *flags, "--frames", 3, "--force")
    assert len(frames_in(tmp_path / "walk")) == 3


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--seeds", 1], 2, ("--seeds", "2 arguments")),
        (["--seeds", 1, 2, 3], 2, ("unrecognized arguments: 3",)),
        (["--seeds", 1, -2], 2, ("'-2' is not 0 or a positive integer",)),
        (["--frames", 1], 2, ("--frames must be at least 2",)),
        (["--batch_size", 2], 2, ("--batch_size 3",)),
        (["--at", 4], 1, ("--at 4 is not a point before the last of a path of 4 steps",)),
        (["--at", -1], 1, ("--at -1",)),
        (["--path_type", "dp_64"], 1, ("heatmap_30_2ep.pth",)),
        (["--schedule", "nowhere.json"], 1, ("nowhere.json",)),
        (["--checkpoint", "nowhere.pth"], 1, ("nowhere.pth",)),
    ],
)
def test_flags_that_make_no_sense_are_refused(refused, run, flags, status, says):
    refused(interpolate, *flags_of(run.lift, *flags), says=says, status=status)


# Given images


def given_flags(checkpoint, *flags):
    return ["--checkpoint", checkpoint, *HARDWARE, "--input", "mine/a.png", "mine/b.png", "--num_steps", 1, *flags]


@pytest.fixture
def given(run, tmp_path):
    """Images of the training as `mine/a.png` and `mine/b.png`."""
    (tmp_path / "mine").mkdir()
    pixels = torch.from_numpy(np.array(run.images()[[0, 5]]))
    for name, image in zip("ab", pixels, strict=True):
        save_png(image, tmp_path / f"mine/{name}.png", by_lift=False)
    return pixels


@pytest.mark.parametrize("model, at", [("lift", 0), ("lift", 2), ("baseline", 0)])
def test_the_first_and_last_frames_are_given_images(stage, run, given, tmp_path, model, at):
    checkpoint, loaded = getattr(run, model), load_model(getattr(run, model))
    steps = ["--num_steps", 3, "--at", at] if at else []
    flags = given_flags(checkpoint, "--tolerance", 1e-5, "--num_calls", 9999, "--frames", 4, *steps)
    output = stage(interpolate, *flags).output
    [folder] = (results_of("dual" if model == "lift" else model) / "interpolation").iterdir()
    words = f"{checkpoint.stem}_raw_diagonal_{3 if at else 1}_a_b{f'_at{at}' if at else ''}_ode"
    assert folder.name == words and "4 new" in output
    frames = frames_in(folder)
    for frame, image in ((frames[0], given[0]), (frames[3], given[1])):
        # A network of two epochs is steep.
        assert (frame.double() - image).square().mean().sqrt() < 4
    assert not torch.equal(frames[1], frames[0]) and not torch.equal(frames[2], frames[3])
    said = json.loads((folder / "settings.json").read_text())
    assert said["input_fingerprints"] == [fingerprint_array(image.numpy()) for image in given]
    assert "seeds" not in said and (said["end"], said["precision"]) == ("t0", "fp32")
    assert said["solver"] == "ode tolerance 1e-05"
    if at:
        return
    # Between the latents, and not clamped on the way down.
    path = diagonal(1, num_scales=loaded.model.num_scales)
    latents = encode_pixels(loaded, path, given, 1e-5, 9999).latents
    weights = torch.tensor([0, 1, 1 / 3, 2 / 3], dtype=torch.float64)
    starts = [slerp(x[0], x[1], weights) for x in latents]
    expected = decode(loaded.denoise, loaded.scheduler, path, starts, Ode(1e-5, 9999)).images
    for frame, image in zip([frames[0], frames[3], *frames[1:3]], to_uint8(expected), strict=True):
        assert (frame.int() - image.int()).abs().max() <= 1


def test_frames_of_given_images_by_another_solver_and_end(stage, refused, run, given, tmp_path):
    """The images are encoded as ever, and what the other solver makes of their latents is written."""
    loaded, path = load_model(run.lift), diagonal(4)
    flags = given_flags(run.lift, "--num_steps", 4, "--solver", "ddim", "--end", "clean", "--frames", 2)
    assert "2 new with 4 network calls each" in stage(interpolate, *flags, "--output", "walk").output
    latents = encode_pixels(loaded, path, given, 1e-4, 1000).latents
    expected = sample(loaded.denoise, loaded.scheduler.unclamped(), path, latents).images[0]
    for frame, image in zip(frames_in(tmp_path / "walk"), to_uint8(expected), strict=True):
        assert torch.equal(frame, image)
    # What is there stays, and a frame that is gone comes back as it was.
    before = (tmp_path / "walk/frame_001.png").read_bytes()
    (tmp_path / "walk/frame_001.png").unlink()
    assert "1 new" in stage(interpolate, *flags, "--output", "walk").output
    assert (tmp_path / "walk/frame_001.png").read_bytes() == before
    assert "all there already" in stage(interpolate, *flags, "--output", "walk").output
    save_png(given[0].flip(2), tmp_path / "mine/b.png")
    says = ("walk holds results with another input_fingerprints", "--force")
    refused(interpolate, *flags, "--output", "walk", says=says)


@pytest.mark.parametrize("kind", ["lift", "residual"])
def test_given_images_have_the_latents_of_encode(stage, tiny, run, given, tmp_path, monkeypatch, kind):
    """Of the over-complete pair, and of the residual pair with two clocks, whose usual path is another."""
    checkpoint = run.lift
    if kind == "residual":
        flags = [*tiny(tmp_path / "run"), "--cache_dir", run.cache, "--epochs", 1, "--representation", "residual"]
        stage(train_lift, *flags)
        checkpoint = tmp_path / "run/checkpoints/lift_dual_timestep_1ep.pth"
    flags = ["--checkpoint", checkpoint, *HARDWARE, "--tolerance", 0.1, "--input", "mine/a.png", "mine/b.png"]
    stage(encode, *flags, "--output", "latents")
    found = []
    monkeypatch.setattr(interpolate, "encode_pixels", lambda *args: found.append(encode_pixels(*args)) or found[0])
    output = stage(interpolate, *flags, "--frames", 2, "--output", "walk").output
    assert f"path {'image_diagonal' if kind == 'residual' else 'diagonal'} " in output
    for expected, x in zip(load_latents("latents/latents.npz").scales, found[0].latents, strict=True):
        assert torch.equal(x.float(), expected)
    said = [json.loads((tmp_path / f"{name}/settings.json").read_text()) for name in ("walk", "latents")]
    assert said[0]["path_fingerprint"] == said[1]["path_fingerprint"]
    # With the flags of seeds it is the diagonal as ever.
    seeds = [*flags[:-3], "--seeds", 1, 2, "--solver", "ode", "--frames", 2, "--output", "seeds"]
    output = stage(interpolate, *seeds).output
    assert f"path diagonal {diagonal(18).fingerprint()}" in output


def test_the_way_up_has_a_tolerance_and_calls_of_its_own(stage, refused, run, given, tmp_path):
    """By a solver of fixed steps, whose calls --num_calls counts on the way down alone."""
    loaded, path = load_model(run.lift), diagonal(3)
    flags = ["--checkpoint", run.lift, *HARDWARE, "--input", "mine/a.png", "mine/b.png", "--solver", "heun"]
    flags += ["--num_calls", 6, "--frames", 2, "--output", "walk"]
    assert "2 new with 6 network calls each" in stage(interpolate, *flags, "--tolerance", 0.01).output
    latents = encode_pixels(loaded, path, given, 0.01, 1000).latents
    unclamped = loaded.scheduler.unclamped()
    expected = sample(loaded.denoise, unclamped, path, latents, end="t0", solver=Heun()).images[0]
    for frame, image in zip(frames_in(tmp_path / "walk"), to_uint8(expected), strict=True):
        assert torch.equal(frame, image)
    said = json.loads((tmp_path / "walk/settings.json").read_text())
    assert (said["solver"], said["tolerance"]) == ("heun", 0.01)
    refused(interpolate, *flags, says=("walk holds results with another tolerance", "--force"))
    settings = interpolate.InterpolationSettings(
        checkpoint="a.pth", input=("a.png", "b.png"), solver="heun", tolerance=0.1
    )
    assert settings.tolerance == settings.but(frames=3).tolerance == settings.given()["tolerance"] == 0.1


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--seeds", 1, 2], 2, ("either --seeds A B or --input A B",)),
        (["--input", "mine/a.png"], 2, ("--input", "2 arguments")),
        (["--solver", "ancestral"], 2, ("--solver ancestral", "draws noise on the way", "such as ode")),
        (["--solver", "ddim", "--eta", 0.5], 2, ("--solver ddim eta 0.5 draws noise",)),
        (["--tolerance", 1e-15], 2, ("--tolerance 1e-15 is too small",)),
        (["--solver", "heun", "--tolerance", 1e-15], 2, ("--tolerance 1e-15 is too small",)),
        (["--at", 1], 1, ("--at 1 is not a point before the last of a path of 1 step",)),
        (["--num_calls", 5], 1, ("--num_calls allows 5",)),
        (["--output", "mine", "--force"], 1, ("mine is the folder of the input mine/a.png",)),
        (["--input", "mine/a.png", "wide.png"], 1, ("wide.png", "20x16 and not 16x16", "--resize brings others")),
        (["--input", "mine/a.png", "text.png"], 1, ("text.png cannot be used",)),
        (["--input", "mine/a.png", "mine"], 1, ("mine cannot be used (Is a directory)",)),
        (["--input", "mine/a.png", "nowhere.png"], 1, ("nowhere.png cannot be used (No such file",)),
    ],
)
def test_given_images_that_make_no_sense_are_refused(refused, run, given, tmp_path, flags, status, says):
    Image.new("RGB", (20, 16)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("text")
    refused(interpolate, *given_flags(run.lift, *flags), says=says, status=status)


def test_given_images_have_defaults_of_their_own():
    given = interpolate.InterpolationSettings(checkpoint="a.pth", input=("a.png", "b.png"))
    seeds = interpolate.InterpolationSettings(checkpoint="a.pth", seeds=(1, 2))
    assert (given.solver, given.end, given.precision, given.eta) == ("ode", "t0", "fp32", None)
    assert (seeds.solver, seeds.end, seeds.precision, seeds.eta) == ("ddim", "clean", "auto", 0)
    assert (given.num_steps, given.path_type, seeds.num_steps, seeds.path_type) == (None, None, 18, "diagonal")
    assert seeds.but(solver="heun", num_calls=9).num_steps == 5 and seeds.but(num_steps=4).num_steps == 4
    assert given.but(solver="ddim", precision="bf16").end == "t0"
    assert given.but(precision="bf16").precision == "bf16" and given.but(end="clean").end == "clean"


def test_what_is_of_given_images_or_of_seeds_alone(stage, refused, run, given, tmp_path):
    plain = ["--checkpoint", run.lift, *STEPS, *HARDWARE]
    refused(interpolate, *plain, says=("either --seeds A B or --input A B",), status=2)
    refused(interpolate, *flags_of(run.lift, "--resize"), says=("--resize is for images of --input",), status=2)
    says = ("--tolerance belongs to --solver ode, not to heun",)
    refused(interpolate, *flags_of(run.lift, "--solver", "heun", "--tolerance", 0.1), says=says, status=2)
    Image.new("L", (20, 40), 90).save(tmp_path / "wide.png")
    flags = given_flags(run.lift, "--resize", "--tolerance", 0.1, "--frames", 2, "--output", "walk")
    stage(interpolate, *flags, "--input", "mine/a.png", "wide.png")
    said = json.loads((tmp_path / "walk/settings.json").read_text())
    assert said["input_fingerprints"][1] == fingerprint_array(np.full((3, 16, 16), 90, np.uint8))


@pytest.mark.parametrize("kind", ["single_t", "no_t"])
def test_models_that_follow_no_equation_take_no_images(refused, stage, tiny, run, given, tmp_path, kind):
    stage(train_lift, *tiny(tmp_path / "run"), "--cache_dir", run.cache, "--model", kind, "--epochs", 1)
    file = tmp_path / f"run/checkpoints/{kind}_1ep.pth"
    says = (f"a '{kind}' model", "reads 2 scales and predicts 1")
    refused(interpolate, *given_flags(file, "--solver", "ddim"), says=says)
    refused(interpolate, *given_flags(file), says=("--solver ode calls the network between points",))


def test_help_shows_the_commands(stage):
    output = stage(interpolate, "--help").output
    assert output.startswith("usage: interpolate.py") and interpolate.__doc__.strip().splitlines()[0] in output
