"""Schedules of other processes, resolutions and weights, against the noise that their timesteps stand for."""

import itertools
import json
import math
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch

from checkpoint import MODEL_CLASSES, LoadedModel
from conftest import ROOT
from diffusion.sampler import sample
from paths.families import cascade, diagonal, lead, log_snr_shift
from paths.path import Path
from paths.schedule_file import FURTHER_DETAILS, load_schedule, save_schedule
from planning.choice import PathSettings, choose_path
from planning.regimes import resolve_regime
from planning.replay import PURE_NOISE, TOLERANCE, made_for, replay, replay_for
from runtime.reports import say_once
from scheduler import SCHEDULE_NAMES, DDIMScheduler
from truth.gaussian import GaussianDenoiser

MADE = {"model_fingerprint": "a" * 16, "resolution": 64, "representation": "overcomplete"}
MADE |= {"weights": "ema", "epoch": 14, "run": "first"}


def process(name, count=1000, representation="overcomplete"):
    return DDIMScheduler(count, name, "v", representation=representation)


def table(name, count=1000):
    return process(name, count).log_snr.numpy()


@pytest.fixture(autouse=True)
def nothing_said():
    say_once.cache_clear()


@pytest.fixture
def said(capsys):
    return lambda: capsys.readouterr().err.splitlines()


@pytest.fixture
def saved(tmp_path):
    """`saved(path, schedule, count, **what)` is the file of a path that was made for a process."""

    def save(path, name="cosine_clipped", count=1000, **what):
        file = tmp_path / f"schedule_{len(list(tmp_path.iterdir()))}.json"
        save_schedule(path, file, table(name, count), {"name": "ddim"}, beta_schedule=name, **what)
        return str(file)

    return save


def changed(file, **changes):
    content = json.loads(FilePath(file).read_text())
    FilePath(file).write_text(json.dumps(content | changes))
    return file


def loaded(fingerprint="b" * 16, model_type="dual", schedule="cosine_clipped", representation="overcomplete", **config):
    config = {"model_type": model_type, "weights": "raw", "epoch": 3, "resolution": 32} | config
    scheduler = process(schedule, representation=representation)
    return LoadedModel(MODEL_CLASSES[model_type], scheduler, config, fingerprint, FilePath("model.pth"))


def even_path(name, count, num_steps, start=-5.5, lead=0.7):
    """Both clocks even in log SNR from `start` on, the coarse one ahead, well within every process."""
    log_snr = table(name, count)
    first = int(np.abs(log_snr - start).argmin())
    base = diagonal(num_steps, "uniform_log_snr", log_snr=log_snr, num_train_timesteps=count, start=first)
    ahead = log_snr_shift(base, lead, log_snr).points
    # Away from the clean end, where timesteps are far apart, but for the last point.
    return Path([*[(max(i, 20), max(j, 12)) for i, j in ahead[: num_steps // 2]], (20, 12), (0, 0)], "made", {})


# The same process


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize("num_scales", [1, 2])
def test_a_path_of_the_same_process_is_what_it_was(saved, said, name, num_scales):
    path = diagonal(18, num_scales=num_scales)
    replayed = replay(saved(path, name), process(name))
    assert replayed.points == path.points and said() == []


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/**/schedule*.json")), ids=lambda file: file.parent.name)
def test_published_schedules_are_followed(file, said):
    path = load_schedule(file)
    assert replay(str(file), process(path.provenance["beta_schedule"])).points == path.points and said() == []
    replayed = replay(str(file), process("cosine"))
    log_snr = np.array(path.provenance["log_snr"])
    calls = np.array(path.points)[:-1] > 0
    assert np.abs(table("cosine")[np.array(replayed.points)] - log_snr)[:-1][calls].max() < 0.5
    assert replayed.nfe == path.nfe and len(said()) == 1


# Another process


def by_hand(path, there, here):
    """Points by looking for the nearest noise level one timestep after the other."""
    found = []
    for point in path.points:
        levels = [min(range(len(here)), key=lambda t, wanted=there[i]: abs(here[t] - wanted)) for i in point]
        found.append(tuple(0 if i == 0 else level for i, level in zip(point, levels, strict=True)))
    return tuple(found)


@pytest.mark.parametrize(("there", "here"), list(itertools.permutations(SCHEDULE_NAMES, 2)))
def test_log_snr_counts_and_not_the_number_of_the_timestep(saved, said, there, here):
    path = even_path(there, 1000, 12)
    replayed = replay(saved(path, there, criterion="kl", cost=1.5), process(here))
    expected = by_hand(path, table(there), table(here))
    assert replayed.points == expected
    off = np.abs(table(here)[np.array(expected)] - table(there)[np.array(path.points)])[:-1]
    [line] = said()
    assert line.startswith("note: schedule ") and f"'{there}' with 1000 timesteps" in line
    assert f"of '{here}' with 1000 timesteps" in line and line.endswith(f"off by {off.max():.2g} at most")
    # Half the distance of neighbours from t = 12 on.
    assert off.max() < 0.06
    made = replayed.provenance
    assert (made["beta_schedule"], made["criterion"], made["cost"]) == (here, "kl", 1.5)
    assert made["log_snr"] == [[table(here)[t] for t in point] for point in expected]
    assert made["path_fingerprint"] == replayed.fingerprint()
    assert made["followed"] == {"path_fingerprint": path.fingerprint(), "beta_schedule": there}


@pytest.mark.parametrize(("there", "here"), [(1000, 250), (250, 1000), (400, 1600)])
def test_processes_of_other_numbers_of_timesteps(saved, said, there, here):
    path = even_path("cosine_clipped", there, 10, start=-2.0)
    replayed = replay(saved(path, "cosine_clipped", there), process("linear", here))
    assert replayed.points == by_hand(path, table("cosine_clipped", there), table("linear", here))
    assert f"with {there} timesteps" in said()[0]


def test_there_and_back_again(saved):
    path = even_path("linear", 1000, 12)
    there = replay(saved(path, "linear"), process("cosine"))
    assert np.abs(np.subtract(there.points, path.points)).max() > 30
    back = replay(saved(there, "cosine"), process("linear"))
    assert np.abs(np.subtract(back.points, path.points)).max() <= 1


def test_images_along_a_followed_path_are_those_of_the_process_it_was_made_for(saved):
    low, high = torch.tensor([[[1.0, 0.4], [0.4, 0.2]]]), torch.full((3, 1, 2, 2), 0.05)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(64, 1, side, side, generator=generator, dtype=torch.float64) for side in (4, 2)]
    images = {}
    path = even_path("cosine_clipped", 1000, 12)
    for name, chosen in (
        ("cosine_clipped", path),
        ("cosine", path),
        ("followed", replay(saved(path), process("cosine"))),
    ):
        scheduler = process("cosine" if name == "followed" else name)
        scheduler.clip_sample = False
        images[name] = sample(GaussianDenoiser(scheduler, low, high).denoise, scheduler, chosen, noise).images[0]
    off = {name: (images[name] - images["cosine_clipped"]).norm().item() for name in ("cosine", "followed")}
    assert off["followed"] < 0.005 * images["cosine_clipped"].norm() < 0.05 * off["cosine"] / 0.1


@pytest.mark.parametrize("here", ["cosine_clipped", "linear", "cosine_clipped_zero_terminal"])
def test_what_is_noisier_than_the_process_is_refused(saved, said, here):
    file = saved(diagonal(9), "cosine")
    if here.endswith("zero_terminal"):  # Which comes to no signal at all.
        assert replay(file, process(here)).points[0] == (998, 998)
        return
    with pytest.raises(ValueError, match=f"'cosine' with 1000 timesteps, and '{here}' with 1000 timesteps") as caught:
        replay(file, process(here))
    assert f"has log SNR -19.84, and the nearest here is {table(here)[-1]:.4g}; plan" in str(caught.value)
    assert said() == []


@pytest.mark.parametrize(("there", "here"), [("cosine", "cosine_zero_terminal"), ("linear_zero_terminal", "cosine")])
def test_pure_noise_is_pure_noise(saved, there, here):
    first = set(replay(saved(diagonal(9), there), process(here)).points[0])
    assert first <= {998, 999} and len(first) == 1
    assert max(table(there)[-1], table(here)[first.pop()]) < PURE_NOISE


@pytest.mark.parametrize("excess", [-0.01, 0.01])
def test_the_tolerance(saved, excess):
    # A path that begins so much below the end of the other process.
    end, there = table("cosine_clipped")[-1], table("linear", 4000)
    first = int(np.abs(there - (end - TOLERANCE - excess)).argmin())
    assert abs(there[first] - (end - TOLERANCE - excess)) < 0.005
    file = saved(diagonal(6, num_train_timesteps=4000, start=first), "linear", 4000)
    if excess < 0:
        assert replay(file, process("cosine_clipped")).points[0] == (999, 999)
    else:
        with pytest.raises(ValueError, match="cannot follow it: at timestep"):
            replay(file, process("cosine_clipped"))


def test_points_that_would_fall_on_one_timestep_are_refused(saved):
    # Timestep 1 of cosine has more signal than timestep 0 of linear, which is the clean end.
    file = saved(Path([(800,), (1,), (0,)], "made", {}), "cosine")
    with pytest.raises(ValueError, match=r"too far apart to follow it: two of its points would fall on \(0,\)"):
        replay(file, process("linear"))
    file = saved(Path([(450, 450), (300, 300), (299, 300), (0, 0)], "made", {}), "cosine_clipped", 1000)
    with pytest.raises(ValueError, match=r"two of its points would fall on \(\d+, \d+\)"):
        replay(file, process("linear", 100))


def test_a_scale_that_waits_at_the_clean_end_waits_there(saved):
    for there, here in itertools.permutations(("cosine", "linear"), 2):
        path = cascade(6, remaining=0, start=700)
        replayed = replay(saved(path, there), process(here))
        assert [j for _, j in replayed.points[-4:]] == [0] * 4 and replayed.nfe == 6


def test_files_that_do_not_name_their_process_are_followed_by_their_log_snr(saved, said):
    path = even_path("linear", 1000, 8)
    unnamed, later = (changed(saved(path, "linear"), beta_schedule=name) for name in (None, "of_tomorrow"))
    expected = by_hand(path, table("linear"), table("cosine"))
    assert replay(unnamed, process("cosine")).points == replay(later, process("cosine")).points == expected
    lines = said()
    assert "made for another process, and is followed" in lines[0] and "'of_tomorrow'" in lines[1]
    assert replay(unnamed, process("linear")).points == path.points and said() == []


# Files that were changed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"beta_schedule": "linear"}, "timestep 999 of 'linear' with 1000 timesteps has log SNR -10.1"),
        ({"beta_schedule": "cosine_clipped_zero_terminal"}, "has log SNR -inf, not -5.7"),
        ({"num_train_timesteps": 2000}, "with 2000 timesteps has log SNR"),
        ({"num_train_timesteps": 999}, "its num_train_timesteps is 999"),
        ({"num_train_timesteps": "1000"}, "its num_train_timesteps is 1000"),
        ({"resolution": "64x64"}, "its resolution is 64x64"),
        ({"resolution": 0}, "its resolution is 0"),
    ],
)
def test_what_does_not_fit_the_points_is_refused(saved, changes, says):
    file = changed(saved(diagonal(6), **MADE), **changes)
    with pytest.raises(ValueError, match="was changed after it was saved") as caught:
        replay(file, process("cosine_clipped"), 64)
    assert says in str(caught.value) and file in str(caught.value)


@pytest.mark.parametrize("point", range(7))
@pytest.mark.parametrize("scale", [0, 1])
def test_one_altered_log_snr_is_noticed(saved, point, scale):
    path = lead(diagonal(6), 1)
    file = saved(path)
    log_snr = json.loads(FilePath(file).read_text())["log_snr"]
    for change, refused in ((1e-9, False), (1e-3, True), (-1e-3, True)):
        new = json.loads(json.dumps(log_snr))
        # Of all points with this timestep, or it is no function of it.
        t = path.points[point][scale]
        for k, pair in enumerate(path.points):
            new[k] = [value + change * (other == t) for value, other in zip(new[k], pair, strict=True)]
        changed(file, log_snr=new)
        if refused:
            with pytest.raises(ValueError, match=f"timestep {t} of 'cosine_clipped'"):
                replay(file, process("cosine_clipped"))
        else:
            assert replay(file, process("cosine_clipped")).points == path.points


# Another pair of scales, resolution or weights


def test_another_pair_of_scales_is_refused(saved):
    for there, here in itertools.permutations(("overcomplete", "residual")):
        file = saved(diagonal(6), representation=there)
        with pytest.raises(ValueError, match=f"made for the {there} pair of scales, and this model has the {here} one"):
            replay(file, process("cosine_clipped", representation=here))
        assert replay(file, process("cosine_clipped", representation=there)).nfe == 6
        # One scale is the same in both, and older files do not say.
        one = saved(diagonal(6, num_scales=1), representation=there)
        older = saved(diagonal(6))
        assert {replay(f, process("cosine_clipped", representation=here)).nfe for f in (one, older)} == {6}


@pytest.mark.parametrize(("there", "here"), [(64, 32), (32, 128), (64, 64), (None, 32)])
@pytest.mark.parametrize("criterion", ["kl", None])
def test_another_resolution_is_pointed_out(saved, said, there, here, criterion):
    file = saved(diagonal(6), resolution=there, criterion=criterion)
    assert replay(file, process("cosine_clipped"), here).points == diagonal(6).points
    if there in (None, here):
        assert said() == []
        return
    [line] = said()
    # The mean of 2x2 pixels has four times the SNR, so that at half the side an image needs as much more.
    shift = math.log(4) * math.log2(there / here)
    assert f"{abs(shift):.2f} {'higher' if there > here else 'lower'}" in line and f"made at {there}x{there}" in line
    assert line.startswith("warning: " if criterion else "note: ")


@pytest.mark.parametrize(("criterion", "kind"), [("kl, weight 1", "warning"), (None, "note")])
def test_other_weights_are_pointed_out(saved, said, criterion, kind):
    file = saved(diagonal(6), criterion=criterion, **MADE | {"resolution": 32})
    replay_for(file, loaded("a" * 16))
    assert said() == []
    for _ in range(2):
        replay_for(file, loaded("b" * 16, run="second", epoch=3))
    assert said() == [
        f"{kind}: schedule {file} was made for other weights (run first, epoch 14, ema) than it is followed with "
        "(run second, epoch 3, raw)"
    ]
    # Each pair of a file and weights counts.
    replay_for(file, loaded("c" * 16, run="second", epoch=4))
    assert len(said()) == 1


def test_files_of_earlier_versions_say_less(saved, said):
    path = even_path("cosine_clipped", 1000, 8)
    file = saved(path, criterion="kl", **MADE)
    content = json.loads(FilePath(file).read_text())
    FilePath(file).write_text(json.dumps({key: content[key] for key in content if key not in FURTHER_DETAILS}))
    assert load_schedule(file).provenance["resolution"] is None
    assert replay_for(file, loaded("a" * 16, representation="residual")).points == path.points and said() == []
    assert replay_for(file, loaded("b" * 16)).points == path.points
    assert said() == [f"warning: schedule {file} was made for other weights than it is followed with (epoch 3, raw)"]
    assert replay_for(file, loaded("a" * 16, schedule="cosine")).points == by_hand(
        path, table("cosine_clipped"), table("cosine")
    )


def test_a_copy_says_what_the_file_said(saved):
    made = made_for(diagonal(6), loaded(run="second", data_fingerprint="d" * 16, representation_of="nothing"))
    assert made == {"model_fingerprint": "b" * 16, "data_fingerprint": "d" * 16, "representation": None} | {
        "resolution": 32, "weights": "raw", "epoch": 3, "run": "second",
    }  # fmt: skip
    for schedule in ("cosine_clipped", "cosine"):
        path = replay_for(saved(even_path("cosine_clipped", 1000, 8), **MADE), loaded(schedule=schedule))
        assert made_for(path, loaded()) == MADE | {"data_fingerprint": None}


# Who replays


def test_a_type_of_path_and_a_training_follow_it_alike(saved, said):
    path = even_path("linear", 1000, 8)
    file = saved(path, "linear", criterion="kl", **MADE)
    expected = by_hand(path, table("linear"), table("cosine"))
    model = loaded(schedule="cosine")
    assert choose_path(PathSettings(), f"schedule:{file}", 5, model).points == expected
    assert [line.split(": ")[0] for line in said()] == ["note", "warning", "warning"]
    for text in (f"path:{file}", f"band:{file},1"):
        config = resolve_regime(text, "dual", lambda name: replay(name, model.scheduler, 32))
        assert config["t_pairs_points"] == [list(point) for point in expected]
    one_clock = saved(diagonal(6), "cosine")
    with pytest.raises(ValueError, match="2 scale"):
        choose_path(PathSettings(), f"schedule:{one_clock}", 5, loaded(model_type="baseline"))
