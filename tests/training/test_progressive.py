"""Progressive distillation: what a student learns, by algebra and closed forms, and rounds of runs that are killed."""

import csv
import multiprocessing
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import cli
import distill
import eval_fid_batch
import generate_with_path_30
import train_baseline
import train_lift
from checkpoint import load_model, read_checkpoint
from children import KillAt
from conftest import HARDWARE, assert_same
from data import coarse
from diffusion.sampler import sample
from exact_models import model as gaussian
from paths.families import cascade, diagonal, lead
from paths.path import Path as SamplingPath
from planning.regimes import off_regime_note
from planning.students import STUDENT_PATH, halved, student_path
from scheduler import CLEAN, PREDICTION_TYPES, DDIMScheduler
from training.objective import Networks
from training.progressive import Progressive, kept, two_steps
from training.timesteps import clean_weight
from training.trainer import Trainer

KINDS = [
    (name, prediction)
    for name in ("cosine", "linear", "cosine_zero_terminal", "sub_vp_linear", "ve", "flow")
    for prediction in PREDICTION_TYPES
    if prediction not in ("epsilon", "score") or name not in ("flow", "cosine_zero_terminal")
]
PAIRS = {"t_pairs": "independent", "t_pairs_points": None, "loss_weights": [0.8, 0.2]}
SINGLE = {"t_pairs": None, "t_pairs_points": None, "loss_weights": [1.0]}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


class RandomPair(nn.Module):
    """A denoiser of both scales without any sense: each sees both images and both clocks."""

    def __init__(self, num_scales):
        super().__init__()
        generator = rng(5)
        self.convolutions = nn.ModuleList(nn.Conv2d(3 * num_scales, 3, 3, padding=1) for _ in range(num_scales))
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        self.double()

    def forward(self, xs, ts):
        sizes = [x.shape[-2:] for x in xs]
        phases = sum((1 + k) * t.double() for k, t in enumerate(ts)) / 700
        found = []
        for convolution, size in zip(self.convolutions, sizes, strict=True):
            seen = torch.cat([nn.functional.interpolate(x, size=size) for x in xs], dim=1)
            found.append(torch.tanh(convolution(seen)) * phases.cos()[:, None, None, None])
        return tuple(found)


def noisy(num_scales, count=4):
    return tuple(randn(count, 3, 8 >> s, 8 >> s, seed=s) for s in range(num_scales))


def at(*ts):
    return tuple(torch.full((4,), t) for t in ts)


# The algebra


@pytest.mark.parametrize(("schedule", "prediction"), KINDS)
@pytest.mark.parametrize(
    "points",
    [
        [(999,), (700,), (350,)], [(400,), (150,), (CLEAN,)], [(999, 999), (800, 500), (620, 90)],
        [(640, 300), (333, 222), (CLEAN, CLEAN)], [(900, 800), (900, 300), (500, 300)],
    ],
)  # fmt: skip
def test_one_step_lands_where_two_of_the_teacher_do(schedule, prediction, points):
    """For networks of any sense, in float64, by the step of the sampler; a scale that rests keeps its image."""
    scheduler = DDIMScheduler(1000, schedule, prediction, clip_sample=False)
    teacher, zs = RandomPair(len(points[0])), noisy(len(points[0]))

    def walk(xs, start, end):
        with torch.no_grad():
            predictions = teacher(xs, at(*start))
        return tuple(
            x if t == t_next else scheduler.step(p, t, t_next, x)
            for p, t, t_next, x in zip(predictions, start, end, xs, strict=True)
        )

    there = walk(walk(zs, points[0], points[1]), points[1], points[2])
    with torch.no_grad():
        found = two_steps(teacher, scheduler, zs, *(at(*point) for point in points))
    for x0, z, t, t_next, goal in zip(found, zs, points[0], points[2], there, strict=True):
        scale = goal.abs().max()
        torch.testing.assert_close(scheduler.step_from(x0, t, t_next, z) / scale, goal / scale, rtol=0, atol=1e-10)


def test_a_scale_that_rests_all_the_while_learns_what_the_teacher_sees():
    scheduler = DDIMScheduler(1000, "cosine", "v", clip_sample=False)
    teacher, zs = RandomPair(2), noisy(2)
    with torch.no_grad():
        found = two_steps(teacher, scheduler, zs, *(at(*point) for point in [(900, 300), (500, 300), (200, 300)]))
        seen = scheduler.predict_clean(teacher(zs, at(900, 300)), at(900, 300), zs)
    assert torch.equal(found[1], seen[1]) and not torch.equal(found[0], seen[0])


@pytest.mark.parametrize("schedule", ["flow", "cosine_zero_terminal", "cosine"])
def test_a_scale_that_rests_at_pure_noise_learns_the_step_after_it(schedule):
    """It sets out from its point with the other scale where that is by then: x̃ is x₂, whatever was seen before."""
    scheduler = DDIMScheduler(1000, schedule, "v", clip_sample=False)
    teacher, zs = RandomPair(2), noisy(2)
    with torch.no_grad():
        found = two_steps(teacher, scheduler, zs, *(at(*point) for point in [(999, 300), (999, 100), (600, 20)]))
        early = scheduler.predict_clean(teacher(zs, at(999, 300)), at(999, 300), zs)
        moved = zs[0], scheduler.step_from(early[1], 300, 100, zs[1])
        late = scheduler.predict_clean(teacher(moved, at(999, 100)), at(999, 100), moved)
    torch.testing.assert_close(found[0], late[0], rtol=1e-10, atol=1e-10)
    assert (late[0] - early[0]).abs().max() > 0.01


@pytest.mark.parametrize("prediction", ["v", "velocity", "x0"])
@pytest.mark.parametrize("path", [cascade(4, coarse_steps=1), cascade(8, coarse_steps=3)])
def test_a_clock_of_flow_may_reach_timestep_0_before_the_other(path, prediction):
    """There is no noise there, and the image is shown and learnt as it is."""
    scheduler = DDIMScheduler(1000, "flow", prediction, clip_sample=False)
    config = PAIRS | {"teacher_points": [list(point) for point in path.points], "timestep_weights": "truncated_snr"}
    teacher = RandomPair(2)
    objective = Progressive(config, scheduler, (), Networks(None, teacher))
    x = randn(64, 3, 8, 8, seed=2)
    batch = objective.draw(x, coarse(x), rng(3))
    taught = objective.taught(batch)
    rests = batch.t_32 == 0
    assert rests.any() and not rests.all()
    assert torch.equal(taught.x_32[rests], batch.x_32[rests])
    for one, other in zip(objective.noised(batch)[0], objective.noised(taught)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert all(values.isfinite().all() for values in objective.losses(teacher, batch).values())


@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
def test_what_is_learnt_is_an_image_where_the_teacher_sees_images(representation):
    """A mean with positive weights of two that are clamped; with one clock also of what both scales compose."""
    scheduler = DDIMScheduler(1000, "cosine", "v", representation=representation)
    teacher, zs = RandomPair(2), scheduler.representation.project(noisy(2))

    def projected(xs, ts):
        return scheduler.representation.project(tuple(3 * x for x in teacher(xs, ts)))

    with torch.no_grad():
        found = two_steps(projected, scheduler, zs, *(at(t, t) for t in (990, 700, 400)))
    image = scheduler.representation.compose(found)
    assert image.abs().max() == pytest.approx(1, abs=1e-9)


def test_the_share_kept_is_that_of_the_noise():
    scheduler = DDIMScheduler(1000, "linear", "v")
    t, t_next = torch.tensor([999, 500, 500, 20]), torch.tensor([400, 499, CLEAN, 0])
    sigma = [((1 - abar) / abar).sqrt() for abar in (scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t_next])]
    expected = torch.where(t_next == CLEAN, 0, sigma[1] / sigma[0])
    torch.testing.assert_close(kept(scheduler, t, t_next), expected, rtol=1e-12, atol=0)
    zero = DDIMScheduler(1000, "linear_zero_terminal", "v")
    assert kept(zero, torch.tensor([999, 999]), torch.tensor([998, 999])).tolist() == [0, 1]
    flow = DDIMScheduler(1000, "flow", "v")
    t, t_next = torch.tensor([999, 999, 500, 0, 0]), torch.tensor([999, 400, 0, 0, CLEAN])
    assert kept(flow, t, t_next).tolist() == [1, 0, 0, 1, 0]


# Closed forms


def students_of(teacher, scheduler, path):
    """The exact students of a denoiser, round by round, down to one step, as denoisers of the starts of their steps."""
    found = []
    while path.nfe > 1:
        points = [*path.points[:-1], (CLEAN,) * path.num_scales]
        steps = {
            start: (middle, end) for start, middle, end in zip(points[::2], points[1::2], points[2::2], strict=False)
        }

        def student(xs, ts, teacher=teacher, steps=steps):
            start = tuple(t[0].item() for t in ts)
            middle, end = (
                tuple(torch.full_like(t, to) for t, to in zip(ts, point, strict=True)) for point in steps[start]
            )
            x0s = two_steps(teacher, scheduler, xs, ts, middle, end)
            epsilons = (scheduler.epsilon_of(x0, t, x) for x0, t, x in zip(x0s, ts, xs, strict=True))
            return tuple(map(scheduler.target, x0s, epsilons, ts))

        path, teacher = halved(path), student
        found.append((path, student))
    return found


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("kind", ["one scale", "diagonal", "lead", "cascade"])
def test_the_student_of_one_step_is_the_product_of_the_steps_of_a_linear_teacher(prediction, kind):
    """Exact students of Gaussian images make in 4, 2 and 1 steps the very images that the teacher makes in 8."""
    scheduler = DDIMScheduler(1000, "cosine", prediction, clip_sample=False)
    if kind == "one scale":
        path, variance = diagonal(8, num_scales=1), 0.3

        def teacher(xs, ts):
            alpha, sigma = scheduler.scales(ts[0], xs[0])
            x0 = alpha * variance / (alpha**2 * variance + sigma**2) * xs[0]
            return (scheduler.target(x0, scheduler.epsilon_of(x0, ts[0], xs[0]), ts[0]),)

        noise = (randn(3, 1, 4, 4),)
        # By hand, number by number: in x̂ a step keeps v + r (1 - v), with v what is seen of x̂.
        product, level = 1.0, [(scheduler.snr[t] ** -1).item() for (t,) in path.points[:-1]] + [0.0]
        for now, after in zip(level, level[1:], strict=False):
            share = variance / (variance + now)
            product *= share + (after / now) ** 0.5 * (1 - share)
        expected = product * noise[0] / scheduler.alphas[999]
    else:
        base = diagonal(8)
        path = {"diagonal": base, "lead": lead(base, 2), "cascade": cascade(8)}[kind]
        denoiser = gaussian(scheduler)[0]
        teacher = denoiser.denoise
        noise = (randn(3, 2, 4, 6), randn(3, 2, 2, 3, seed=1))
        expected = None
    made = sample(teacher, scheduler, path, noise).images
    if expected is not None:
        torch.testing.assert_close(made[0], expected, rtol=1e-9, atol=1e-12)
    found = students_of(teacher, scheduler, path)
    assert [way.nfe for way, _ in found] == [4, 2, 1]
    for way, student in found:
        for one, other in zip(sample(student, scheduler, way, noise).images, made, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("schedule", ["cosine", "flow", "ve"])
@pytest.mark.parametrize("num_scales", [1, 2])
def test_the_exact_student_has_no_loss_and_no_other(schedule, num_scales):
    """What minimises the objective is x̃; the teacher gets no gradient, and every step is shown as often."""
    scheduler = DDIMScheduler(1000, schedule, "v", clip_sample=False)
    path = lead(diagonal(8), 1) if num_scales == 2 else diagonal(8, num_scales=1)
    teacher = RandomPair(num_scales)
    config = (PAIRS if num_scales == 2 else SINGLE) | {"teacher_points": [list(point) for point in path.points]}
    config["timestep_weights"] = "truncated_snr"
    objective = Progressive(config, scheduler, (), Networks(None, lambda xs, ts: teacher(xs, ts)))
    [(way, student), *_] = students_of(teacher, scheduler, path)
    x = randn(400, 3, 8, 8, seed=2)
    batch = objective.draw(x, coarse(x), rng(3))
    starts = list(zip(batch.t_64.tolist(), batch.t_32.tolist(), strict=True))
    expected = {(point[0], point[-1]) for point in way.points[:-1]}
    assert {*starts} == expected and len(expected) == 4
    assert all(abs(starts.count(point) - 100) < 45 for point in expected)  # Five deviations.

    def call(shown, ts):
        # The network is shown what `shown` makes of noisy images, and the student takes these themselves.
        noisy = [scheduler.add_noise(*scale) for scale in batch.scales[:num_scales]]
        outputs = [torch.empty_like(x) for x in noisy]
        for start in expected:
            rows = torch.tensor([point == start for point in starts])
            found = student([x[rows] for x in noisy], [t[rows] for t in ts[:num_scales]])
            for output, one in zip(outputs, found, strict=True):
                output[rows] = one
        return tuple(outputs)

    losses = objective.losses(call, batch)
    assert len(losses) == num_scales
    for values in losses.values():
        assert values.max() < 1e-12
    shifted = objective.losses(lambda xs, ts: tuple(1 + out for out in call(xs, ts)), batch)
    for values in shifted.values():
        torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(field.requires_grad for field in objective.taught(batch)[:4])


def test_the_noisy_images_stay_as_they_were_drawn():
    scheduler = DDIMScheduler(1000, "cosine", "v", clip_sample=False)
    config = PAIRS | {"teacher_points": [list(point) for point in lead(diagonal(4), 1).points]}
    objective = Progressive(config, scheduler, (), Networks(None, RandomPair(2)))
    x = randn(16, 3, 8, 8, seed=2)
    batch = objective.draw(x, coarse(x), rng(3))
    taught = objective.taught(batch)
    for one, other in zip(objective.noised(batch)[0], objective.noised(taught)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert (taught.x_64 - batch.x_64).abs().max() > 0.1


def test_the_truncated_weight_is_the_larger_of_two_errors():
    """Of the clean image and of the noise that follows from it (arXiv 2202.00512, eq. 9)."""
    scheduler = DDIMScheduler(1000, "cosine", "v")
    t, x, x0, other = (
        torch.arange(0, 1000, 9),
        randn(112, 1, 2, 2),
        randn(112, 1, 2, 2, seed=1),
        randn(112, 1, 2, 2, seed=2),
    )
    clean = (x0 - other).square().flatten(1).mean(1)
    noise = (scheduler.epsilon_of(x0, t, x) - scheduler.epsilon_of(other, t, x)).square().flatten(1).mean(1)
    weighed = clean_weight("truncated_snr", scheduler, t) * clean
    torch.testing.assert_close(weighed, torch.maximum(clean, noise), rtol=1e-9, atol=0)


# Paths of students


def test_a_path_is_halved_through_its_points():
    path = SamplingPath(((999, 999), (700, 500), (700, 90), (20, 3), (0, 0)), "lead", {})
    assert halved(path).points == ((999, 999), (700, 90), (0, 0))
    with pytest.raises(ValueError, match="a path of 9 steps cannot be halved"):
        halved(diagonal(9))


def test_a_student_off_its_path_is_warned_of():
    path = diagonal(4, num_scales=1)
    config = {"student_points": [list(point) for point in path.points], "teacher_fingerprint": "c0ffee"}
    scheduler = DDIMScheduler(1000, "cosine", "v")
    assert student_path(config).points == path.points and student_path({}) is None
    assert off_regime_note(path, config, scheduler) is None
    note = off_regime_note(diagonal(3, num_scales=1), config, scheduler)
    assert "student of 4 steps, and 3 of the 3 of path diagonal" in note and f"--path_type {STUDENT_PATH}" in note
    alone = config | {"student_points": [[999], [0]]}
    assert "student of 1 step, and 4 of the 4" in off_regime_note(path, alone, scheduler)


# Runs

V = ("--preset", "improved")
ROUNDS = ("--method", "progressive", "--from", 4, "--epochs", 2, "--resume_minutes", 1e-9)


@pytest.fixture(scope="module")
def teachers(stage, tiny, tmp_path_factory):
    """A baseline and a residual pair, that predict v, in a folder each."""
    found = {}
    for name, script, more in (
        ("baseline", train_baseline, ()),
        ("dual", train_lift, ("--representation", "residual")),
    ):
        folder = tmp_path_factory.mktemp(name)
        stage(script, *tiny(folder), *V, *more, "--ema_decay", 0.5, "--lr", 0.003)
        stem = {"baseline": "baseline", "dual": "lift_dual_timestep"}[name]
        found[name] = folder / f"checkpoints/{stem}_2ep.pth"
    return found


@pytest.mark.parametrize("kind", ["baseline", "dual"])
def test_rounds_halve_the_calls(stage, refused, teachers, tmp_path, monkeypatch, kind):
    teacher = teachers[kind]
    monkeypatch.chdir(tmp_path)
    more = ("--path_type", "shift:1") if kind == "dual" else ()
    flags = ["--teacher", teacher, *ROUNDS, *more, "--run", "fast", "--cache_dir", teacher.parent.parent / "cache"]
    stage(distill, *flags, *HARDWARE)
    stem = teacher.name.removesuffix("_2ep.pth")
    files = [Path(f"checkpoints/fast/{stem}_{calls}calls.pth") for calls in (2, 1)]
    contents = [read_checkpoint(file) for file in files]
    first = load_model(teacher, ema=True)
    assert contents[0]["config"]["teacher_fingerprint"] == first.fingerprint
    assert contents[1]["config"]["teacher_fingerprint"] == load_model(files[0], ema=True).fingerprint
    points = contents[0]["config"]["teacher_points"]
    assert len(points) == 5 and contents[0]["config"]["student_points"] == points[::2]
    assert contents[1]["config"]["teacher_points"] == points[::2]
    assert contents[1]["config"]["student_points"] == [points[0], points[-1]]
    if kind == "dual":
        assert any(t_64 != t_32 for t_64, t_32 in points)
    for name in ("hidden_dims", "beta_schedule", "prediction_type", "representation", "resolution", "data_fingerprint"):
        assert contents[1]["config"][name] == first.config[name]
    # What walks along the path of the student is the student itself, in so many calls.
    said = stage(generate_with_path_30, "--checkpoint", files[1], "--ema", "--path_type", "student", "--num_images", 2,
                 "--output", "samples", *HARDWARE).output  # fmt: skip
    assert "2 new with 1 network calls each; path student" in said
    stage(eval_fid_batch, "--run", "fast", "--ema", "--path_type", "student", "--metrics", "swd", "--num_images", 8,
          "--cache_dir", teacher.parent.parent / "cache", *HARDWARE)  # fmt: skip
    with open("results/fast/fid_results.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [(row["nfe"], row["path_type"]) for row in rows] == [("1", "student"), ("2", "student")]
    # Six steps of four images a round.
    assert [(row["student_images"], row["teacher_calls"]) for row in rows] == [("48", "96"), ("24", "48")]
    assert [row["student"] for row in rows] == ["1calls", "2calls"]
    for flag, value in (("solver", "heun"), ("solver", "ancestral"), ("solver", "consistency"), ("eta", 0.5)):
        refused(generate_with_path_30, "--checkpoint", files[0], "--path_type", "student", f"--{flag}", value,
                "--output", "other", *HARDWARE, says=(f"--{flag}",))  # fmt: skip


def test_a_student_starts_from_its_teacher(stage, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = teachers["baseline"]
    flags = ["--teacher", teacher, *ROUNDS, "--to", 2, "--cache_dir", teacher.parent.parent / "cache", *HARDWARE]
    for weights, key in (("raw", "model_state"), ("ema", "ema_state")):
        stage(distill, *flags, "--teacher_weights", weights, "--lr", 1e-12, "--run", weights)
        found = read_checkpoint(f"checkpoints/{weights}/baseline_2calls.pth")
        for name, value in read_checkpoint(teacher)[key].items():
            torch.testing.assert_close(found["model_state"][name], value, rtol=0, atol=1e-6)


def distil_in_child(folder, flags, patches):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.chdir(folder)
    for owner, name, make in patches:
        setattr(owner, name, make(getattr(owner, name)))
    with mock.patch.object(sys, "argv", ["distill.py", *map(str, flags)]):
        cli.run_stage(distill.main)


@pytest.mark.parametrize("step", [2, 6, 7, 11])
def test_a_run_killed_in_any_round_ends_with_the_same_bits(stage, teachers, tmp_path, monkeypatch, step):
    """Three steps an epoch, two epochs a round: the 2nd step is of the first round, the 11th of the second."""
    teacher = teachers["baseline"]
    flags = ["--teacher", teacher, *ROUNDS, "--run", "fast", "--cache_dir", teacher.parent.parent / "cache", *HARDWARE]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    child = multiprocessing.get_context("fork").Process(
        target=distil_in_child, args=(tmp_path / "parts", flags, [(Trainer, "train_step", KillAt(step))])
    )
    child.start()
    child.join()
    assert child.exitcode == -9
    for name in ("whole", "parts"):
        monkeypatch.chdir(tmp_path / name)
        stage(distill, *flags, *(["--resume"] if name == "parts" else []))
    for calls in (2, 1):
        for file in (f"baseline_{calls}calls.pth", f"baseline_{calls}calls_last.pth"):
            whole, parts = (read_checkpoint(tmp_path / name / "checkpoints/fast" / file) for name in ("whole", "parts"))
            ignored = {"execution": {}, "settings": {}}
            assert_same(*(content | (ignored if "settings" in content else {}) for content in (whole, parts)))
    # Once more: all is done, and nothing changes.
    assert stage(distill, *flags, "--resume").output.count("is done: 2 of 2 epochs") == 2


def test_students_are_told_the_classes_of_their_teacher(stage, tiny, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    stage(train_lift, *tiny(tmp_path), *V, "--classes", "--label_dropout", 0.2, "--epochs", 1)
    teacher = tmp_path / "checkpoints/lift_dual_timestep_1ep.pth"
    flags = ["--method", "progressive", "--from", 4, "--to", 2, "--epochs", 1, "--run", "fast", *HARDWARE]
    stage(distill, *flags, "--teacher", teacher, "--cache_dir", tmp_path / "cache")
    file = Path("checkpoints/fast/lift_dual_timestep_2calls.pth")
    ours, theirs = (read_checkpoint(each)["config"] for each in (file, teacher))
    for name in ("class_names", "labels_fingerprint", "label_dropout"):
        assert ours[name] == theirs[name]
    walk = ["--checkpoint", file, "--path_type", "student", "--num_images", 3, "--class", "dog", *HARDWARE]
    said = stage(generate_with_path_30, *walk, "--guidance_scale", 2, "--output", "guided").output
    assert "3 new with 4 network calls each; path student" in said


def test_rounds_may_be_done_one_by_one(stage, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = teachers["baseline"]
    flags = ["--teacher", teacher, *ROUNDS, "--run", "fast", "--cache_dir", teacher.parent.parent / "cache", *HARDWARE]
    stage(distill, *flags, "--rounds", 1)
    assert sorted(file.name for file in Path("checkpoints/fast").glob("*calls.pth")) == ["baseline_2calls.pth"]
    stage(distill, *flags, "--resume")
    names = sorted(file.name for file in Path("checkpoints/fast").glob("*calls.pth"))
    assert names == ["baseline_1calls.pth", "baseline_2calls.pth"]


def test_rounds_go_on_after_one_of_more_epochs(stage, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = teachers["baseline"]
    flags = ["--teacher", teacher, *ROUNDS, "--run", "fast", "--cache_dir", teacher.parent.parent / "cache", *HARDWARE]
    stage(distill, *flags, "--rounds", 1)
    stage(distill, *flags, "--epochs", 1, "--resume")
    contents = [read_checkpoint(f"checkpoints/fast/baseline_{calls}calls.pth") for calls in (2, 1)]
    assert [content["epoch"] for content in contents] == [2, 1]


def test_a_student_of_more_epochs_takes_the_place_of_that_of_fewer_after_a_kill(stage, teachers, tmp_path, monkeypatch):
    """Between the resume file of its last epoch and its checkpoint, which has the name of the one before."""
    monkeypatch.chdir(tmp_path)
    teacher = teachers["baseline"]
    flags = ["--teacher", teacher, *ROUNDS, "--run", "fast", "--cache_dir", teacher.parent.parent / "cache", *HARDWARE]
    file = Path("checkpoints/fast/baseline_2calls.pth")
    stage(distill, *flags, "--rounds", 1, "--epochs", 1)
    before = file.read_bytes()
    stage(distill, *flags, "--rounds", 1, "--resume")
    file.write_bytes(before)
    stage(distill, *flags, "--resume")
    assert read_checkpoint(file)["epoch"] == 2 and file.with_name("baseline_1calls.pth").exists()


def test_a_student_without_its_resume_file_is_not_lost(stage, refused, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = teachers["baseline"]
    flags = ["--teacher", teacher, *ROUNDS, "--to", 2, "--cache_dir", teacher.parent.parent / "cache", *HARDWARE]
    stage(distill, *flags, "--run", "fast")
    folder = Path("checkpoints/fast")
    for file in folder.glob("baseline_2calls_last*.pth"):
        file.unlink()
    says, keeps = ("baseline_2calls.pth exists",), (folder,)
    refused(distill, *flags, "--run", "fast", "--resume", "auto", says=says, keeps=keeps)
    refused(distill, *flags, "--run", "fast", "--log_dir", "logs", says=says, keeps=keeps)


def test_what_cannot_be_distilled_is_refused(stage, tiny, run, teachers, refused, tmp_path, monkeypatch, straight):
    monkeypatch.chdir(tmp_path)
    teacher = teachers["baseline"]
    flags = ["--method", "progressive", "--cache_dir", teacher.parent.parent / "cache", *HARDWARE]
    good = [*flags, "--teacher", teacher]
    keeps = (teacher.parent,)
    for more in (["--from", 6, "--to", 4], ["--from", 4, "--to", 4], ["--from", 12], ["--from", 2, "--to", 4]):
        refused(distill, *good, *more, says=("are no rounds that halve the calls",), status=2, keeps=keeps)
    refused(distill, *flags, "--teacher", run.baseline, says=("predicts epsilon has no student",), status=2)
    refused(distill, *flags, "--teacher", tmp_path / "none.pth", says=("none.pth",))
    refused(distill, *good, "--resolution", 32, "--from", 4, says=("the resolution of the teacher", "is 16, not 32"))
    refused(distill, *good, "--classes", "--from", 4, says=("the classes of the teacher", "is None, not"))
    refused(distill, *good, "--from", 4, "--path_type", "student", says=("is no student",))
    refused(train_baseline, *tiny(tmp_path), "--objective", "progressive", says=("needs a teacher; run distill.py",))
    folder = tmp_path / "samples"
    refused(generate_with_path_30, "--checkpoint", teacher, "--path_type", "student", "--output", folder, *HARDWARE,
            says=("is no student, which has a path of its own",))  # fmt: skip


def test_another_teacher_does_not_go_on(stage, teachers, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = teachers["baseline"]
    flags = [*ROUNDS, "--to", 2, "--run", "fast", "--cache_dir", teacher.parent.parent / "cache", *HARDWARE]
    stage(distill, *flags, "--teacher", teacher)
    refused(distill, *flags, "--teacher", teacher, says=("exists already; pass --resume",))
    other = ["--teacher", teacher, "--teacher_weights", "raw", "--resume"]
    refused(distill, *flags, *other, says=("teacher_fingerprint = ", "resume with the same value"))
    refused(distill, *flags, "--teacher", teacher, "--spacing", "karras", "--resume", says=("_points = ",))
