"""RePaint in closed form: a linear recursion, every solver and process with jumps, and models that go back or not."""

import numpy as np
import pytest
import torch

import inpaint
from checkpoint import read_checkpoint, save_checkpoint
from conftest import HARDWARE
from data import coarse
from diffusion.sampler import sample
from diffusion.solvers import SOLVERS, make_solver
from exact_models import Correlated
from inpaint import load_mask, repaint, scale_masks
from paths.families import diagonal
from paths.path import Path
from scheduler import DDIMScheduler

# Those whose step is linear in the images and the noise; of `pc` the length of a step depends on both.
LINEAR = [name for name in SOLVERS if name not in ("pc", "ode", "consistency")]
WITHOUT_NOISE = [name for name in SOLVERS if not make_solver(name).draws and name != "ode"]
KINDS = {"one scale": ("overcomplete", 1), "two scales": ("overcomplete", 2), "residual": ("residual", 2)}
PROCESSES = {
    "vp": ("vp", "cosine", "x0"),
    "vp to zero SNR": ("vp", "cosine_zero_terminal", "v"),
    "sub_vp": ("sub_vp", "cosine", "x0"),
    "ve": ("ve", None, "x0"),
    "flow": ("flow", None, "x0"),
}
COMBINATIONS = [
    ("vp", "one scale"),
    ("vp to zero SNR", "two scales"),
    ("vp to zero SNR", "residual"),
    ("sub_vp", "one scale"),
    ("ve", "two scales"),
    ("flow", "one scale"),
]

# The recursion of algorithm 1

SLOPE, STEPS = 0.9, 50
PAIR = np.array([[1, SLOPE], [SLOPE, 1]])


def pairs(scheduler):
    """2x2 images of which each row is a pair of numbers of unit variance, apart from the other row."""
    covariance = torch.kron(torch.eye(2, dtype=torch.float64), torch.from_numpy(PAIR))
    return Correlated(scheduler, covariance)


def recursion(abar, repeats, variance):
    """The law of the second number of a pair whose first is x by algorithm 1: the coefficient of x, and the variance.

    abar: from clean, where it is 1, to the start. A step draws N(posterior mean of x_{t-1}, variance), puts in the
    first number with noise of its own, and goes back by a step of the chain, all but `repeats` times.
    """
    mean, law = np.array([abar[-1] ** 0.5, 0]), np.diag([1 - abar[-1], 1])
    for t in range(len(abar) - 1, 0, -1):
        ratio, left = abar[t] / abar[t - 1], 1 - abar[t - 1]
        clean = abar[t] ** 0.5 * PAIR @ np.linalg.inv(abar[t] * PAIR + (1 - abar[t]) * np.eye(2))
        step = (abar[t - 1] ** 0.5 * (1 - ratio) * clean + ratio**0.5 * left * np.eye(2)) / (1 - abar[t])
        drawn = (1 - ratio) * (left / (1 - abar[t]) if variance == "beta_tilde" or t == 1 else 1)
        for again in range(repeats - 1 if t > 1 else 0, -1, -1):
            mean, law = step @ mean, step @ law @ step.T + drawn * np.eye(2)
            mean[0], law[0], law[:, 0], law[0, 0] = abar[t - 1] ** 0.5, 0, 0, left
            if again:
                mean, law = ratio**0.5 * mean, ratio * law + (1 - ratio) * np.eye(2)
    return mean[1], law[1, 1]


def noise_by_noise(number):
    """Draws of zeros, but in image k >= 1 of the k-th: a one in the first column of row 0, the second of row 1."""
    drawn = 0

    def draw(shape):
        nonlocal drawn
        noise = torch.zeros(number + 1, *shape, dtype=torch.float64)
        drawn += 1
        if drawn <= number:
            noise[drawn, 0] = torch.eye(2)
        return noise

    return draw


@pytest.mark.parametrize(
    ("beta_schedule", "variance", "repeats"),
    [
        ("cosine", "beta_tilde", (1, 2, 5, 10, 30)),
        ("cosine", "beta", (1, 2, 5)),
        ("cosine", None, (1, 2)),
        ("linear", "beta", (1, 2)),
    ],
)
def test_the_painted_follows_the_known_as_algorithm_1_has_it(beta_schedule, variance, repeats):
    """Without sampling error: the response to the known number, and to each number of noise that is drawn."""
    scheduler = DDIMScheduler(STEPS + 1, beta_schedule, clip_sample=False)
    abar = [1.0, *scheduler.alphas_cumprod[1:].tolist()]
    path, mask = Path([(t,) for t in range(STEPS, -1, -1)], "test", {}), torch.tensor([[True, False]] * 2)
    solver = make_solver("ancestral", variance=variance) if variance else None  # DDIM with eta 1.
    slopes = []
    for passes in repeats:
        slope, spread = recursion(abar, passes, variance or "beta_tilde")
        slopes.append(slope)
        # Of the start, and for each step its own, of the known, and for going back.
        number = 2 + STEPS * passes * 3 if passes < 3 else 0
        images = torch.zeros(number + 1, 1, 2, 2, dtype=torch.float64)
        images[0] = 1
        draw = noise_by_noise(number)
        found = repaint(
            pairs(scheduler).denoise, scheduler, path, images, [mask], draw, jump_repeats=passes, solver=solver
        ).images[0]
        assert found[0, 0, :, 1].tolist() == pytest.approx([slope] * 2, abs=1e-9)
        if number:
            assert found[1:, 0, :, 1].square().sum().item() == pytest.approx(spread, abs=1e-9)
    # A third is missed without jumps, and little with many.
    assert slopes == sorted(slopes) and slopes[0] < 0.62 and (len(slopes) < 5 or 0.88 < slopes[-1] < SLOPE)


# Every solver and process


def correlated(side=4):
    """A covariance by distance, and of rows that differ."""
    place = torch.arange(side, dtype=torch.float64)
    near = torch.exp(-(place[:, None] - place).abs() / 2)
    scale = torch.linspace(0.5, 1, side, dtype=torch.float64)
    return torch.kron(scale[:, None] * near * scale, near)


def setting(process, kind, num_steps, consistent=False):
    """The scheduler, an exact denoiser and a path evenly through log SNR, from the last timestep."""
    (name, beta_schedule, prediction), (representation, num_scales) = PROCESSES[process], KINDS[kind]
    beta_schedule = beta_schedule or "cosine"
    scheduler = DDIMScheduler(1000, beta_schedule, prediction, False, representation, name)
    log_snr = scheduler.log_snr.numpy().copy()
    if not np.isfinite(log_snr[-1]):
        log_snr[-1] = 2 * log_snr[-2] - log_snr[-3]
    path = diagonal(num_steps, "uniform_log_snr", num_scales, log_snr=log_snr)
    assert path.points[0] == (999,) * num_scales
    return scheduler, Correlated(scheduler, correlated(), num_scales, consistent).denoise, path


def conditional(mask, scale):
    """Mean of all pixels where what is known is 1, their covariance, and which are painted."""
    covariance, unit = correlated(), torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    rows = (unit if scale == "fine" else coarse(unit)).flatten(1).T[mask.flatten()]
    gain = covariance @ rows.T @ torch.linalg.inv(rows @ covariance @ rows.T)
    hole = ~mask.flatten() if scale == "fine" else torch.ones(16, dtype=torch.bool)
    return gain @ torch.ones(len(rows), dtype=torch.float64), covariance - gain @ rows @ covariance, hole


def paint(walk, solver, repeats, count=0, scale="fine", jump_length=2, **options):
    """Images of which the right half is known and 1: without noise, as the mean is, or `count` draws."""
    scheduler, denoise, path = walk
    mask = load_mask("left", scale, 4)
    generator = torch.Generator().manual_seed(0)
    images = torch.ones(max(1, count), 1, 4, 4, dtype=torch.float64)

    def draw(shape):
        shape = (len(images), *shape)
        empty = torch.zeros(shape, dtype=torch.float64)
        return empty.normal_(generator=generator) if count else empty

    found = repaint(
        denoise, scheduler, path, images, scale_masks(mask, 4, path.num_scales), draw,
        jump_length=jump_length, jump_repeats=repeats, solver=solver, **options,
    )  # fmt: skip
    known = found.images[0] if scale == "fine" else coarse(found.images[0])
    assert torch.equal(known[..., mask], torch.ones_like(known[..., mask])) or scale == "coarse"
    torch.testing.assert_close(known[..., mask], torch.ones_like(known[..., mask]), rtol=0, atol=1e-12)
    return found.images[0].flatten(1)


def missed(images, scale="fine"):
    """The error of the mean of what is painted, as a share of it."""
    mean, _, hole = conditional(load_mask("left", scale, 4), scale)
    return ((images.mean(0) - mean)[hole].norm() / mean[hole].norm()).item()


@pytest.mark.parametrize(("process", "kind"), COMBINATIONS)
@pytest.mark.parametrize("solver", LINEAR)
def test_passes_bring_every_solver_to_the_conditional(solver, process, kind):
    walk = setting(process, kind, 16)
    errors = [missed(paint(walk, make_solver(solver), repeats)) for repeats in (1, 2, 6)]
    assert errors[0] > 0.3 and errors[1] < 0.9 * errors[0] and errors[2] < 0.8 * errors[1]


def spread_missed(images):
    """The error of their covariance, as a share of it."""
    _, spread, _ = conditional(load_mask("left", "fine", 4), "fine")
    return ((torch.cov(images.T) - spread).norm() / spread.norm()).item()


@pytest.mark.parametrize(
    ("solver", "process"), [("ddim", "vp"), ("heun", "flow"), ("dpmpp_3m", "vp to zero SNR"), ("unipc", "ve")]
)
def test_many_passes_end_at_the_conditional_also_without_noise_in_the_steps(solver, process):
    """The noise of going back and forth is all that there is, and gives the mean and the covariance."""
    found = paint(setting(process, "one scale", 24), make_solver(solver), 27, count=1000)
    assert missed(found) < 0.15 and spread_missed(found) < 0.2


@pytest.mark.parametrize("free_fine", [False, True])
@pytest.mark.parametrize("solver", ["heun", "euler_maruyama"])
def test_known_coarse_pixels_are_taken_in_too(solver, free_fine):
    walk, options = setting("flow", "two scales", 20), {"scale": "coarse", "free_fine": free_fine}
    errors = [missed(paint(walk, make_solver(solver), repeats, **options), "coarse") for repeats in (1, 5)]
    assert errors[0] > 0.2 and errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_the_equation_to_a_tolerance_goes_back(process):
    walk = setting(process, "one scale", 15)
    errors = [missed(paint(walk, make_solver("ode", tolerance=1e-2), repeats)) for repeats in (1, 3)]
    assert errors[0] > 0.6 and errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("solver", "options", "process", "kind", "bound"),
    [
        # Of which the length of a step depends on what is drawn, so that there is no mean without noise.
        ("pc", {}, "ve", "two scales", 0.25),
        ("langevin", {"rounds": 20}, "ve", "one scale", 0.45),
        ("consistency", {}, "vp", "one scale", 0.25),
        ("consistency", {}, "ve", "two scales", 0.25),
    ],
)
def test_what_is_drawn_has_the_right_mean_and_spread(solver, options, process, kind, bound):
    """A consistency model is one whose clean images are exactly the ends of its paths."""
    walk = setting(process, kind, 20, consistent=solver == "consistency")
    found = [paint(walk, make_solver(solver, **options), repeats, count=400) for repeats in (1, 4)]
    errors = [missed(images) for images in found]
    assert errors[0] > 0.25 and errors[1] < 0.75 * errors[0] and spread_missed(found[1]) < bound
    assert solver == "pc" or spread_missed(found[1]) < spread_missed(found[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", WITHOUT_NOISE)
def test_after_a_jump_a_step_is_the_first_of_a_walk(solver, kind):
    """Nothing is left of what was seen before, of images that are no more."""
    scheduler, exact, path = setting("vp", kind, 6)
    points, representation, seen = path.points, scheduler.representation, []

    def denoise(xs, ts):
        seen.append((tuple(t[0].item() for t in ts), xs))
        return tuple(p + 0.1 * p.square() for p in exact(xs, ts))

    paint((scheduler, denoise, path), make_solver(solver), 3, count=1)
    if solver == "heun":  # Of the two calls of a step the first.
        seen = seen[::2]
    assert len(seen) == 6 + 2 * 2 * 2
    after = [k for k in range(1, len(seen)) if points.index(seen[k][0]) < points.index(seen[k - 1][0])]
    assert len(after) == 4
    hole = ~load_mask("left", "fine", 4)
    for (point, xs), (_, reached) in [(seen[k], seen[k + 1]) for k in after]:
        alone = []

        def go(k, found, xs=xs, alone=alone):
            alone.append(found)
            return (0, xs) if k == 0 else None

        rest = Path(points[points.index(point) :], "rest", {})
        sample(denoise, scheduler, rest, [torch.zeros_like(x) for x in xs], callback=go, solver=make_solver(solver))
        there = (representation.compose(representation.project(each))[..., hole] for each in (alone[1], reached))
        torch.testing.assert_close(*there, rtol=1e-9, atol=1e-9)


# The stage


@pytest.mark.parametrize(
    ("changed", "flags", "says"),
    [
        ({"start_dataset": "cats"}, (), "was trained to walk from images of 'cats', not from noise"),
        ({"objective": "consistency"}, (), "only --solver consistency samples such a model, not ddim; pass that one"),
        ({"objective": "progressive"}, (), "is a student of steps of DDIM, and --eta draws noise; pass --eta 0."),
        ({"objective": "progressive"}, ("--solver", "unipc"), "and --solver takes others; leave --solver out."),
        ({}, ("--solver", "consistency"), "samples models that were trained with --objective consistency"),
        (
            {"student_points": [[999, 999], [0, 0]], "teacher_fingerprint": "0"},
            ("--path_type", "student"),
            "--jump_length 3 is too long for a path of 1 step; pass --jump_repeats 1 for no jumps.",
        ),
    ],
)
def test_what_cannot_go_back_says_so(refused, run, tmp_path, changed, flags, says):
    file = changed_copy(run, tmp_path, changed)
    refused(inpaint, "--checkpoint", file, *IMAGES, "--cache_dir", run.cache, *flags, says=(says,))


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({"objective": "consistency"}, ("--solver", "consistency", "--num_steps", 4)),
        (
            {
                "objective": "progressive",
                "student_points": [[999, 999], [800, 800], [500, 500], [200, 200], [0, 0]],
                "teacher_fingerprint": "0",
            },
            ("--path_type", "student", "--eta", 0),
        ),
    ],
)
def test_students_go_back_along_their_own_steps(stage, run, tmp_path, changed, flags):
    file = changed_copy(run, tmp_path, changed)
    jumps = ["--jump_length", 1, "--jump_repeats", 3, "--output", tmp_path / "out"]
    ended = stage(inpaint, "--checkpoint", file, *IMAGES, "--cache_dir", run.cache, *flags, *jumps)
    assert "2 new with 10 network calls each, 4 of the path and 6 by jumps" in ended.output
    assert "worse images" not in ended.notes


IMAGES = ["--mask", "left", "--on", "train", "--num_images", 2, *HARDWARE]


def changed_copy(run, folder, changed):
    """The dual model, whose config says other things of its training."""
    content = {key: value for key, value in read_checkpoint(run.lift).items() if key != "format_version"}
    save_checkpoint(folder / "changed.pth", content | {"config": content["config"] | changed})
    return folder / "changed.pth"
