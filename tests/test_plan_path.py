"""plan_path.py as a stage, on the exact maps of Gaussian images: what it prints and writes, and what it refuses.

The grid lines are the multiples of 80, so that some hand-made paths lie on them, where nothing is interpolated.
"""

import csv
import re

import numpy as np
import pytest
import torch

import plan_path
from conftest import list_files
from paths.families import cascade, diagonal, fine_first, lead, log_snr_shift
from paths.optimal import kl_path
from paths.path import timestep_grid
from paths.schedule_file import load_schedule
from planning.error_map import BLOCKS, MSES
from planning.map_file import load_heatmap, save_heatmap
from planning.map_paths import heatmap_path
from scheduler import DDIMScheduler
from truth.gaussian import Spectrum, exact_heatmap, jacobian

START, GAP = 960, 80
RESOLUTION = 8
SPECTRUM = Spectrum.power_law(RESOLUTION)
SCHEDULER = DDIMScheduler(prediction_type="v")
LOG_SNR = SCHEDULER.log_snr.numpy()
# Factors of the errors of six images, mean 1.
FACTORS = np.array([0.5, 0.7, 0.9, 1.1, 1.3, 1.5])
ROW = re.compile(r"  (\S.*?)\s+cost\s+(\S+)\s+excess\s+(\S+)%")
# Families that are written as schedules, and what their files are called.
SCHEDULES = {"optimal": "optimal", "optimal diagonal": "diagonal", "best cascade": "cascade"}


def heatmap_content(factors=FACTORS) -> dict:
    t_grid = timestep_grid(START // GAP + 1, start=START)
    content = exact_heatmap(SPECTRUM, SCHEDULER, t_grid)
    images = torch.from_numpy(np.asarray(factors))
    for name, maps in (("jacobian", content["jacobian"].values()), ("mse", [content[name] for name in MSES])):
        content[f"{name}_per_image"] = (torch.stack(list(maps))[..., None] * images).float()  # [., n, n, B]
    assert tuple(content["jacobian"]) == BLOCKS
    content |= {
        "fingerprint": "f" * 16,
        "data_fingerprint": "d" * 16,
        "beta_schedule": "cosine_clipped",
        "num_train_timesteps": 1000,
    }
    return content | {"epoch": 7, "weights": "ema", "of": "eps"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def heatmap(tmp_path_factory):
    file = tmp_path_factory.mktemp("map") / "heatmap.pth"
    save_heatmap(file, heatmap_content())
    return file


@pytest.fixture(scope="module")
def plan(stage, heatmap, tmp_path_factory):
    """`plan(*flags)`: folder and output of a run for 2 and 4 calls, made once."""
    made = {}

    def run(*flags):
        if flags not in made:
            folder = tmp_path_factory.mktemp("plan")
            common = ("--heatmap", heatmap, "--output", folder, "--nfe", 4, 2, 4)
            made[flags] = folder, stage(plan_path, *common, *flags).output
        return made[flags]

    return run


def read_costs(folder):
    with open(folder / "costs.csv", newline="", encoding="utf-8") as stream:
        return {(int(row["nfe"]), row["family"]): row for row in csv.DictReader(stream)}


def hand_made(nfe, start=START):
    """The families by their names, from the functions that make them."""
    table = {"log_snr": LOG_SNR, "start": start}
    even = diagonal(nfe, "uniform_log_snr", **table)
    return {
        "diagonal, uniform t": diagonal(nfe, **table),
        "diagonal, uniform λ": even,
        "diagonal, Karras": diagonal(nfe, "karras", **table),
        "coarse ahead by 1 in λ": log_snr_shift(even, 1, LOG_SNR),
        "fine ahead by 1 in λ": log_snr_shift(even, -1, LOG_SNR),
        "coarse 1 point ahead": lead(even, 1),
        "fine 1 point ahead": lead(even, -1),
        "cascade, coarse first": cascade(nfe, spacing="uniform_log_snr", **table),
        "fine first": fine_first(nfe, spacing="uniform_log_snr", **table),
    }


def closed_form_kl(points, weight):
    """½ Σ m_s Δγ_s at weight 0, else ½ Σ (M(k) - M(k+1)) ΔW over the low and the detail band (theory.md, 4 and 5)."""
    low, high = SPECTRUM.low.numpy(), SPECTRUM.high.numpy()
    a, b = np.exp(LOG_SNR[np.array(points)]).T
    q = a + b / 4
    error_low = (low / (1 + low * q[:, None])).sum(1)
    error_detail = (high / (1 + high * a[:, None])).sum(1)
    if weight == 0:
        return ((error_low + error_detail)[:-1] * np.diff(a) + error_low[:-1] / 4 * np.diff(b)).sum() / 2
    weigh = np.log if weight == 1 else lambda snr: snr ** (1 - weight) / (1 - weight)
    return -(np.diff(error_low) * np.diff(weigh(q)) + np.diff(error_detail) * np.diff(weigh(a))).sum() / 2


def closed_form_published(points, coarse):
    """Trapezoids of ‖J‖² / (HW)² / (S (1 + S)) in log SNR, factor B."""
    lines = LOG_SNR[np.array(points)]  # [N+1, 2]
    blocks = jacobian(SPECTRUM, *torch.from_numpy(lines).T)
    total = 0.0
    for s, (block, side) in enumerate((("HH", RESOLUTION), ("LL", RESOLUTION // 2))):
        snr = np.exp(lines[:, s])
        error = blocks[block].numpy() / side**4 / (snr * (1 + snr))
        total += (coarse or s == 0) * ((error[:-1] + error[1:]) / 2 * np.diff(lines[:, s])).sum()
    return total


@pytest.mark.parametrize("weight", [0, 0.5, 1])
def test_no_family_costs_less_than_the_optimum_and_costs_are_those_of_the_closed_form(plan, weight):
    folder, output = plan("--kl_weight", weight, "--bootstrap", 0)
    assert output.startswith(f"criterion: kl, weight {weight:g}, t = 960 to 0\n")
    costs, content = read_costs(folder), heatmap_content()
    for nfe in (2, 4):
        families = hand_made(nfe)
        for family, name in SCHEDULES.items():
            families[family] = load_schedule(folder / f"schedule_{name}_{nfe}.json")
        if nfe == 4:  # Two steps of five cells do not cross twelve.
            families["published DP-64"] = heatmap_path(content, "dp_64", nfe)[0]
            families["published DP-Total"] = heatmap_path(content, "dp_total", nfe)[0]
        rows = {family: row for (n, family), row in costs.items() if n == nfe}
        assert list(rows)[:3] == list(SCHEDULES) and rows.keys() == families.keys()
        best = float(rows["optimal"]["cost"])
        for family, path in families.items():
            row = rows[family]
            assert row["path"] == path.fingerprint()
            cost = float(row["cost"])
            on_lines = not any(t % GAP for point in path.points for t in point)
            # Elsewhere the map is interpolated; at weight 0 all is decided between its last two lines.
            rel = 1e-9 if on_lines else 0.06 if weight else 0.2
            assert cost == pytest.approx(closed_form_kl(path.points, weight), rel=rel), family
            assert cost >= best * (1 - 1e-12)
            assert float(row["excess"]) == pytest.approx(cost / best - 1, abs=1e-12)
        assert float(rows["optimal"]["cost"]) < float(rows["optimal diagonal"]["cost"])
    printed = ROW.findall(output)
    assert [name for name, _, _ in printed] == [family for _, family in costs]
    for (_, cost, excess), row in zip(printed, costs.values(), strict=True):
        assert float(cost) == pytest.approx(float(row["cost"]), rel=1e-5)
        assert float(excess) == pytest.approx(100 * float(row["excess"]), abs=0.0051)


def test_schedules_replay_and_say_what_made_them(plan):
    folder, _ = plan("--kl_weight", 1, "--bootstrap", 0)
    costs = read_costs(folder)
    for family, name in SCHEDULES.items():
        for nfe in (2, 4):
            path = load_schedule(folder / f"schedule_{name}_{nfe}.json")
            assert path.nfe == nfe and path.points[0] == (START, START) and path.points[-1] == (0, 0)
            assert all(t_64 == t_32 for t_64, t_32 in path.points) == (name == "diagonal")
            assert path.kind == "cascade" if name == "cascade" else path.kind == "refined"
            details = path.provenance
            assert details["cost"] == float(costs[nfe, family]["cost"])
            assert details["criterion"] == "kl, weight 1, t = 960 to 0"
            assert details["solver"] == {"name": "ddim", "eta": 0.0, "end": "clean"}
            stated = (details["model_fingerprint"], details["data_fingerprint"], details["beta_schedule"])
            assert stated == ("f" * 16, "d" * 16, "cosine_clipped")
            assert (details["start"], details["end"]) == (START, 0)


@pytest.mark.parametrize("weight", [0, 1])
def test_the_best_cascade_is_that_of_the_closed_form(plan, weight):
    folder, output = plan("--kl_weight", weight, "--bootstrap", 0)
    said = re.findall(r"best cascade .*%  coarse log SNR waits at (\S+) after (\d+) of (\d+) calls\n", output)
    costs = read_costs(folder)
    assert [calls for *_, calls in said] == ["2", "4"]
    for waits, first, calls in said:
        nfe = int(calls)
        path = load_schedule(folder / f"schedule_cascade_{nfe}.json")
        t_64, t_32 = np.array(path.points).T
        steps = path.provenance["first_steps"]
        assert steps == int(first) == (t_64 == START).sum() - 1
        # The coarse scale alone, then the fine one alone, then both to the end.
        remaining = t_32[steps]
        assert (t_32[steps:-1] == remaining).all() and remaining == path.provenance["remaining"] and t_32[-1] == 0
        assert float(waits) == pytest.approx(LOG_SNR[remaining], abs=0.0051)
        assert path.provenance["waits_at_log_snr"] == LOG_SNR[remaining]
        # By the closed form, no other waiting level, split or spacing by hand does better, up to interpolation.
        table = {"log_snr": LOG_SNR, "start": START, "spacing": "uniform_log_snr"}
        others = [
            cascade(nfe, coarse_steps=k, remaining=t, **table) for k in range(1, nfe) for t in (0, *range(40, 900, 40))
        ]
        by_hand = min(closed_form_kl(other.points, weight) for other in others)
        assert closed_form_kl(path.points, weight) < by_hand * (1.02 if weight else 1.1)
        assert float(costs[nfe, "best cascade"]["cost"]) <= float(costs[nfe, "cascade, coarse first"]["cost"])


def test_the_lead_printed_is_that_of_the_schedule(plan):
    folder, output = plan("--kl_weight", 1, "--bootstrap", 0)
    pattern = (
        r"(\d+) calls: coarse ahead at (\d+) of (\d+) points, behind at (\d+); "
        r"lead in log SNR from (\S+) to (\S+)"
    )
    said = re.findall(pattern, output)
    assert [row[0] for row in said] == ["2", "4"]
    for nfe, ahead, points, behind, low, high in said:
        t_64, t_32 = np.array(load_schedule(folder / f"schedule_optimal_{nfe}.json").points).T
        assert (int(ahead), int(behind)) == ((t_32 < t_64).sum(), (t_32 > t_64).sum())
        assert int(points) == int(nfe) + 1 and int(ahead) + int(behind) > 0
        difference = LOG_SNR[t_32] - LOG_SNR[t_64]
        assert (float(low), float(high)) == pytest.approx((difference.min(), difference.max()), abs=0.0051)


def test_the_interval_is_that_of_the_resampled_images(plan):
    # Images differ by factors that all their maps share, so every replicate has the same path, at a scaled cost.
    folder, output = plan("--bootstrap", 40, "--seed", 3)
    pattern = r"\n4 calls, resampled: cost (\S+) on the grid, 95 % interval (\S+) to (\S+); a replicate visits (\S+) of"
    cost, low, high, visited = re.search(pattern, output).groups()
    rng = np.random.default_rng(3)
    means = np.array([FACTORS[rng.integers(6, size=6)].mean() for _ in range(40)])
    expected = float(cost) * np.quantile(means, [0.025, 0.975])
    assert (float(low), float(high)) == pytest.approx(tuple(expected), rel=1e-4)
    assert visited == "100%"
    # 30 lines, even in log SNR as far as timesteps allow.
    t_grid = timestep_grid(30, spacing="uniform_log_snr", start=START, log_snr=LOG_SNR)
    exact = exact_heatmap(SPECTRUM, SCHEDULER, t_grid)
    maps = exact["mse_64"].numpy(), exact["mse_32"].numpy(), exact["snr_grid"].numpy()
    assert float(cost) == pytest.approx(kl_path(*maps, 4, 1.0, bands=True)[1], rel=0.02)
    figures = {"cost.png", "paths.png", "density.png"}
    schedules = {f"schedule_{name}_{nfe}.json" for name in SCHEDULES.values() for nfe in (2, 4)}
    assert list_files(folder).keys() == {"settings.json", "costs.csv", *figures, *schedules}


@pytest.mark.parametrize("criterion", ["dp_64", "dp_total"])
def test_published_criteria(stage, heatmap, tmp_path, criterion):
    folder = tmp_path / "plan"
    flags = ("--heatmap", heatmap, "--output", folder, "--nfe", 4, "--criterion", criterion, "--bootstrap", 5)
    output = stage(plan_path, *flags).output
    assert f"criterion: {criterion}, factor B, published normalisation, max_jump 5\n" in output
    assert "at most 5 cells per step" in output and "a replicate visits 100% of" in output
    names = {"settings.json", "costs.csv", "cost.png", "paths.png", "density.png", "schedule_optimal_4.json"}
    assert list_files(folder).keys() == names
    costs = {family: row for (_, family), row in read_costs(folder).items()}
    assert not {"optimal diagonal", "best cascade", "published DP-64"} & costs.keys()
    coarse = criterion == "dp_total"
    even = hand_made(4)["diagonal, uniform t"]
    assert not any(t % GAP for t, _ in even.points)
    assert float(costs["diagonal, uniform t"]["cost"]) == pytest.approx(
        closed_form_published(even.points, coarse), rel=1e-9
    )
    # The optimum is that of the grid, refined, with steps of at most five lines.
    best = float(costs["optimal"]["cost"])
    cells, on_grid = heatmap_path(load_heatmap(heatmap), criterion, 4)
    assert on_grid == pytest.approx(closed_form_published(cells.points, coarse), rel=1e-9)
    assert 0.5 * on_grid < best <= on_grid * (1 + 1e-9)
    path = load_schedule(folder / "schedule_optimal_4.json")
    assert path.provenance["cost"] == best
    assert -np.diff(path.points, axis=0).min() <= 5 * GAP


def test_the_published_paths_obey_factor_and_normalisation(stage, heatmap, tmp_path):
    content = load_heatmap(heatmap)
    prints = []
    for k, (factor, normalisation) in enumerate([("B", "published"), ("A", "published"), ("A", "sum")]):
        options = {"factor": factor, "normalisation": normalisation}
        flags = [word for name, value in options.items() for word in (f"--{name}", value)]
        folder = tmp_path / str(k)
        stage(plan_path, "--heatmap", heatmap, "--output", folder, "--nfe", 4, "--bootstrap", 0, *flags)
        prints.append(read_costs(folder)[4, "published DP-Total"]["path"])
        assert prints[-1] == heatmap_path(content, "dp_total", 4, **options)[0].fingerprint()
    assert len(set(prints)) == 3


def test_start_and_end(stage, tmp_path):
    """Points lie from the start to the end, the last step goes on to 0, and the map below the end does not matter."""
    folders = []
    for changed in (-1, 0, 240):
        content = heatmap_content()
        factor = 1 - 0.1 * (content["t_grid"] == changed).double()
        content |= {name: content[name] * factor * factor[:, None] for name in MSES}
        save_heatmap(tmp_path / "map.pth", content)
        folders.append(tmp_path / f"changed {changed}")
        flags = ("--heatmap", tmp_path / "map.pth", "--output", folders[-1], "--nfe", 4, "--bootstrap", 0)
        output = stage(plan_path, *flags, "--start", 640, "--end", 160).output
        assert "t = 640 to 160" in output
    costs = read_costs(folders[0])
    assert costs == read_costs(folders[1]) != read_costs(folders[2])
    assert not any("published" in family for _, family in costs)
    for name in SCHEDULES.values():
        path = load_schedule(folders[0] / f"schedule_{name}_4.json")
        points = np.array(path.points)
        assert points[0].tolist() == [640, 640] and points[-1].tolist() == [0, 0] and points[:-1].min() >= 160
        assert path.points == load_schedule(folders[1] / f"schedule_{name}_4.json").points
        counted = np.clip(points, 160, None)
        assert path.provenance["cost"] == pytest.approx(closed_form_kl(counted, 1), rel=0.03)
        if name == "cascade":
            continue
        # The path on the grid, from which it was refined, is told in timesteps too.
        grid_path = path.provenance["grid_path"]
        assert grid_path[0] == [640, 640] and grid_path[-1] == [160, 160]
    # Hand-made paths are spaced to the end of the cost, from which the last step goes on to clean.
    even = float(costs[4, "diagonal, uniform t"]["cost"])
    assert even == pytest.approx(closed_form_kl([(t, t) for t in (640, 520, 400, 280, 160)], 1), rel=1e-3)
    assert all(float(row["excess"]) >= 0 for row in costs.values())


def test_one_call_leaves_no_choice(stage, heatmap, tmp_path):
    flags = ("--heatmap", heatmap, "--output", tmp_path / "plan", "--nfe", 1, "--bootstrap", 0)
    output = stage(plan_path, *flags).output
    assert "\n1 calls: coarse ahead at 0 of 2 points, behind at 0; lead in log SNR from +0.00 to +0.00\n" in output
    assert "resampled" not in output and not (tmp_path / "plan/density.png").exists()
    costs = read_costs(tmp_path / "plan")
    assert {family for _, family in costs} == {*SCHEDULES, *hand_made(2)} - {
        "best cascade",
        "cascade, coarse first",
        "fine first",
    }
    expected = closed_form_kl([(START, START), (0, 0)], 1)
    assert [float(row["cost"]) for row in costs.values()] == pytest.approx([expected] * len(costs), rel=1e-9)
    assert load_schedule(tmp_path / "plan/schedule_optimal_1.json").points == ((START, START), (0, 0))


def test_the_default_folder_tells_model_epoch_and_weights(stage, heatmap, tmp_path):
    save_heatmap("results/map.pth", load_heatmap(heatmap))
    output = stage(plan_path, "--heatmap", "results/map.pth", "--nfe", 1, "--bootstrap", 0).output
    assert "schedules and figures in results/plan_7ep_ema\n" in output
    assert (tmp_path / "results/plan_7ep_ema/schedule_optimal_1.json").exists()
    save_heatmap(tmp_path / "a/other.pth", load_heatmap(heatmap) | {"model_type": "single_t"})
    output = stage(plan_path, "--heatmap", tmp_path / "a/other.pth", "--nfe", 1, "--bootstrap", 0).output
    assert f"schedules and figures in {tmp_path}/a/plan_single_t_7ep_ema\n" in output


def without(*prefixes):
    content = heatmap_content()
    return {name: value for name, value in content.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--heatmap", "missing.pth"], 1, ("missing.pth does not exist", "compute_heatmap_30.py")),
        (["--heatmap", "damaged.pth"], 1, ("damaged.pth is damaged",)),
        (["--heatmap", "blocks.pth"], 1, ("no denoising errors", "--maps all")),
        (["--heatmap", "mse.pth", "--criterion", "dp_total"], 1, ("denoising errors only", "--maps all")),
        (["--heatmap", "one.pth", "--nfe", 2], 1, ("at least 2 images",)),
        (["--bootstrap", 1, "--nfe", 2], 1, ("replicates is 1",)),
        (["--start", 980], 1, ("from timestep 980 to 0", "960 to 0")),
        (["--start", 1000], 1, ("from timestep 1000 to 0", "960 to 0")),
        (["--start", 0], 2, ("--start", "'0'")),
        (["--end", 960], 1, ("from timestep 960 to 960", "960 to 0")),
        (["--start", 100, "--end", 200], 1, ("from timestep 100 to 200",)),
        (["--start", 20, "--nfe", 21], 1, ("21", "20")),
        (["--criterion", "dp_64", "--nfe", 4, 2], 1, ("2 steps", "at least 3 steps")),
        (["--criterion", "dp_64", "--nfe", 25], 1, ("25 steps", "24 at most")),
        (["--criterion", "dp_64", "--start", 900], 2, ("--start and --end", "kl")),
        (["--criterion", "dp_64", "--end", 9], 2, ("--start and --end", "kl")),
        (["--criterion", "w2"], 2, ("'w2'", "dp_total")),
        (["--nfe", 0], 2, ("--nfe", "'0'")),
        (["--kl_weight", 1.5], 2, ("--kl_weight", "'1.5'")),
        (["--no_such_flag"], 2, ("--no_such_flag",)),
    ],
)
def test_planning_refuses(refused, heatmap, tmp_path, flags, status, says):
    (tmp_path / "damaged.pth").write_bytes(heatmap.read_bytes()[:-100])
    save_heatmap(tmp_path / "blocks.pth", without("mse"))
    save_heatmap(tmp_path / "mse.pth", without("jacobian"))
    save_heatmap(tmp_path / "one.pth", heatmap_content([1.0]))
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan/schedule_optimal_4.json").write_text("kept")
    common = ["--heatmap", heatmap, "--output", tmp_path / "plan"]
    refused(plan_path, *common, *flags, says=says, status=status, keeps=(heatmap.parent,))


def fine_only():
    """The heatmap of a model that predicts the fine image alone."""
    content = without("mse_32")
    kept = [BLOCKS.index("HH"), BLOCKS.index("HL")]
    content["jacobian"] = {block: content["jacobian"][block] for block in ("HH", "HL")}
    content["jacobian_per_image"] = content["jacobian_per_image"][kept]
    content["mse_per_image"] = content["mse_per_image"][[0, 2]]
    return content | {"model_type": "single_t"}


def test_a_map_of_the_fine_scale_alone_has_a_best_dp_64(stage, refused, heatmap, tmp_path):
    save_heatmap(tmp_path / "fine.pth", fine_only())
    flags = ["--heatmap", tmp_path / "fine.pth", "--nfe", 4, "--output", tmp_path / "plan"]
    refused(plan_path, *flags, says=("predicts the fine image alone", "use dp_64"))
    refused(plan_path, *flags, "--criterion", "dp_total", says=("predicts the fine image alone", "--criterion dp_64"))
    prints = {}
    for name, file in (("fine", tmp_path / "fine.pth"), ("both", heatmap)):
        common = ("--nfe", 4, "--criterion", "dp_64", "--bootstrap", 5)
        stage(plan_path, "--heatmap", file, "--output", tmp_path / name, *common)
        prints[name] = read_costs(tmp_path / name)
    assert prints["fine"] == prints["both"]


def test_paths_where_the_network_was_not_trained_have_no_cost(stage, tmp_path):
    log_snr = SCHEDULER.log_snr
    seen = torch.stack([log_snr - 0.4, log_snr + 0.4])
    save_heatmap(tmp_path / "band.pth", heatmap_content() | {"seen_32": seen})
    flags = ("--heatmap", tmp_path / "band.pth", "--output", tmp_path / "plan", "--nfe", 4, "--bootstrap", 3)
    output = stage(plan_path, *flags).output
    families = [family for (_, family) in read_costs(tmp_path / "plan")]
    hand = {name: path for name, path in hand_made(4).items() if name.startswith("diagonal")}
    hand["published DP-Total"] = published = heatmap_path(heatmap_content(), "dp_total", 4)[0]
    t_64, t_32 = np.array(published.points[1:-1]).T
    assert (log_snr[t_64] - log_snr[t_32]).abs().max() < 0.4 + 0.25 and len(hand) == 4
    assert families == ["optimal", "optimal diagonal", *hand] and "cascade" not in output
    best = load_schedule(tmp_path / "plan/schedule_optimal_4.json")
    t_64, t_32 = np.array(best.points[1:-1]).T
    assert (log_snr[t_64] - log_snr[t_32]).abs().max() < 0.4 + 0.25 + 0.1
    assert not (tmp_path / "plan/schedule_cascade_4.json").exists()


def test_a_map_of_denoising_errors_alone_is_enough_for_kl(stage, tmp_path):
    save_heatmap(tmp_path / "mse.pth", without("jacobian"))
    flags = ("--heatmap", tmp_path / "mse.pth", "--output", tmp_path / "plan", "--nfe", 4, "--bootstrap", 0)
    output = stage(plan_path, *flags).output
    assert "optimal diagonal" in output and "published" not in output


def test_help(stage):
    output = stage(plan_path, "--help").output
    assert output.startswith("usage: plan_path.py") and plan_path.__doc__.splitlines()[0] in output
