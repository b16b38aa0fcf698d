"""The benchmarks of paths: how paths are taken apart and put together, what criteria say of them, and their tables."""

import csv
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compute_heatmap_30
import criteria
import factorial
import generate_with_path_30
import greedy
import rank_criteria
import train_baseline
import train_lift
from combinations import OFFSETS, SPACINGS, trained_paths
from conftest import run_stage
from data import load_images, read_png
from evaluation.pixel_metrics import sliced_wasserstein
from evaluation.results_table import write_csv
from paths.path import timestep_grid
from paths.schedule_file import save_schedule
from planning.error_map import MSES, error_map
from planning.map_file import load_heatmap, save_heatmap
from planning.map_paths import heatmap_path, kl_refined
from rank_criteria import Candidate, agreement
from scheduler import DDIMScheduler
from study import COLUMNS
from truth.gaussian import GaussianDenoiser, Spectrum, exact_heatmap
from truth.linear_sampler import ddim_output, w2_squared
from truth.optimal_points import optimal_points

SPECTRUM = Spectrum.power_law(8)
LOG_SNR = DDIMScheduler().log_snr.numpy()


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def assert_figure(file):
    with Image.open(file) as figure:
        assert min(figure.size) > 300 and len(np.unique(np.asarray(figure.convert("L")))) > 20


# Gaussian images


@pytest.fixture(scope="module")
def exact_run(stage, tmp_path_factory):
    """Name of the files of `experiments/factorial.py gaussian`, and what it printed."""
    name = tmp_path_factory.mktemp("factorial") / "new/gaussian"
    return name, stage(factorial, "gaussian", "--resolution", 8, "--nfe", 6, 8, "--output", name).output


def exact_values(name):
    columns = ("schedule", "model", "spacing", "offset", "nfe")
    rows = rows_of(f"{name}.csv")
    values = {tuple(row[c] for c in columns): float(row["value"]) for row in rows}
    assert len(values) == len(rows) == 2 * 2 * (20 + 4) and {row["seed"] for row in rows} == {""}
    return values


STARTS = [("cosine_clipped", "cosine_clipped"), ("cosine from λ = -10", "cosine")]


def start_of(log_snr):
    return max(t for t in range(1000) if log_snr[t] >= -10)


def spaced(log_snr, start, spacing, nfe):
    if spacing == "uniform λ":
        return np.linspace(log_snr[start], log_snr[0], nfe + 1)
    return np.interp(np.linspace(start, 0, nfe + 1), np.arange(1000), log_snr)


@pytest.mark.parametrize(("label", "schedule"), STARTS)
def test_the_baseline_has_the_variances_that_euler_steps_leave(exact_run, label, schedule):
    """One clock: std from DDIM is that of the first state times Π (s + σσ') / (s + σ²), σ = γ^-½ (theory.md, 5)."""
    values = exact_values(exact_run[0])
    log_snr = DDIMScheduler(beta_schedule=schedule, prediction_type="v").log_snr.numpy()
    variances = torch.cat([SPECTRUM.low, SPECTRUM.high]).numpy()
    for spacing in ("uniform t", "uniform λ"):
        for nfe in (6, 8):
            sigma = np.exp(-spaced(log_snr, start_of(log_snr), spacing, nfe) / 2)
            deviation = np.full_like(variances, math.sqrt(1 + sigma[0] ** 2))  # 1 / √ᾱ
            for now, then in zip(sigma[:-1], [*sigma[1:-1], 0.0], strict=True):
                deviation *= (variances + now * then) / (variances + now**2)
            expected = ((np.sqrt(variances) - deviation) ** 2).sum()
            assert values[label, "baseline", spacing, "", str(nfe)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("label", "schedule"), STARTS)
def test_values_are_the_exact_distances_of_the_paths(exact_run, label, schedule):
    values = exact_values(exact_run[0])
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type="v")
    log_snr, start = scheduler.log_snr.numpy(), start_of(scheduler.log_snr.numpy())

    def distance(points):
        points = np.array(points)
        points[-1] = np.inf
        return w2_squared(SPECTRUM, ddim_output(SPECTRUM, points)).item()

    heatmap = exact_heatmap(SPECTRUM, scheduler, timestep_grid(30, start=start))
    for nfe in (6, 8):
        key = lambda spacing, offset: (label, "LIFT", spacing, offset, str(nfe))  # noqa: B023, E731
        published = log_snr[np.array(heatmap_path(heatmap, "dp_total", nfe)[0].points)]
        assert values[key("published", "published")] == pytest.approx(distance(published), rel=1e-9)
        best = optimal_points(SPECTRUM, nfe, "w2", log_snr[start], math.inf)[1]
        assert values[key("optimal", "optimal 2-D")] == pytest.approx(best, rel=1e-3)
        for spacing in ("uniform t", "uniform λ"):
            u = spaced(log_snr, start, spacing, nfe)
            assert values[key(spacing, "diagonal")] == pytest.approx(distance(u[:, None] + np.zeros(2)), rel=1e-9)
        # Half a unit up and down, far from the ends of the schedule.
        ahead = np.stack([u - 0.5, u + 0.5], axis=1)
        ahead[0], ahead[-1] = u[0], u[-1]
        assert u[0] < ahead[1, 0] and ahead[-2, 1] < u[-1]
        assert values[key("uniform λ", "coarse ahead by 1")] == pytest.approx(distance(ahead), rel=1e-6)
        assert values[key("uniform λ", "coarse behind by 1")] == pytest.approx(distance(ahead[:, ::-1]), rel=1e-6)


def test_what_is_called_optimal_is_best_of_its_kind(exact_run):
    values = exact_values(exact_run[0])
    for label, _ in STARTS:
        for nfe in ("6", "8"):
            among = {key[1:4]: value for key, value in values.items() if (key[0], key[4]) == (label, nfe)}
            for spacing in SPACINGS[:-1]:
                assert among["LIFT", "optimal", "diagonal"] < among["LIFT", spacing, "diagonal"]
                assert among["baseline", "optimal", ""] < among["baseline", spacing, ""]
            lift = {key: value for key, value in among.items() if key[0] == "LIFT"}
            assert min(lift, key=lift.get) == ("LIFT", "optimal", "optimal 2-D")


def test_tables_and_figure_show_the_values(exact_run):
    name, output = exact_run
    text = Path(f"{name}.md").read_text(encoding="utf-8")
    assert output == text and text.startswith("# W2² of DDIM on Gaussian images, a power law\n")
    values = exact_values(name)
    sections = re.findall(r"^## (.+), (\d+) calls\n\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert [section[:2] for section in sections] == [(label, nfe) for label, _ in STARTS for nfe in ("6", "8")]
    for label, nfe, table in sections:
        lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
        assert lines[0] == ["offset", *SPACINGS] and [line[0] for line in lines[2:]] == ["baseline", *OFFSETS]
        for offset, *cells in lines[2:]:
            where = ("baseline", "") if offset == "baseline" else ("LIFT", offset)
            expected = [values[label, where[0], spacing, where[1], nfe] for spacing in SPACINGS]
            assert [float(cell) for cell in cells] == pytest.approx(expected, abs=0.0051)
    assert_figure(f"{name}.png")


def test_too_few_calls_for_the_published_path_are_refused(refused, tmp_path):
    flags = ["gaussian", "--resolution", 8, "--output", tmp_path / "table"]
    refused(factorial, *flags, "--nfe", 3, says=("3 steps", "at least 6 steps"))
    refused(factorial, *flags, "--nfe", 6, "--spectrum", "missing.npz", says=("missing.npz", "does not exist"))
    refused(rank_criteria, *flags, "--nfe", 3, says=("3 steps", "at least 6 steps"))


# Trained networks

HARDWARE = ["--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def trained(stage, tiny, tmp_path_factory):
    """Folder of a LIFT model and a baseline after one epoch, and the heatmap of a small grid."""
    folder = tmp_path_factory.mktemp("trained")
    for module in (train_baseline, train_lift):
        stage(module, *tiny(folder), "--epochs", 1, "--lr", 0.003)
    flags = ["--checkpoint", folder / "checkpoints/lift_dual_timestep_1ep.pth", "--cache_dir", folder / "cache"]
    flags += ["--output", folder / "map.pth", "--grid", 4, "--K", 1, "--num_images", 2, "--num_steps", 3, *HARDWARE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_heatmap_30, "draw", lambda content, file: None)
        stage(compute_heatmap_30, *flags)
    return folder


def trained_flags(folder, output):
    flags = ["trained", "--checkpoint", folder / "checkpoints/lift_dual_timestep_1ep.pth"]
    flags += ["--baseline", folder / "checkpoints/baseline_1ep.pth", "--heatmap", folder / "map.pth"]
    return [*flags, "--num_images", 8, "--nfe", 3, "--output", output, "--cache_dir", folder / "cache", *HARDWARE]


@pytest.fixture(scope="module")
def scores(stage, trained):
    """Name of the files of `experiments/factorial.py trained` for two seeds."""
    stage(factorial, *trained_flags(trained, trained / "scores"), "--seeds", 42, 43)
    return trained / "scores"


def combinations():
    lift = [("LIFT", spacing, offset) for spacing in SPACINGS for offset in OFFSETS]
    return lift + [("baseline", spacing, "") for spacing in SPACINGS]


def test_every_combination_is_scored_for_every_seed(scores):
    rows = rows_of(f"{scores}.csv")
    expected = [(seed, *combination) for seed in ("42", "43") for combination in combinations()]
    assert [(r["seed"], r["model"], r["spacing"], r["offset"]) for r in rows] == expected
    assert {(row["schedule"], row["nfe"]) for row in rows} == {("cosine_clipped", "3")}
    by_path = {}
    for row in rows:
        assert float(row["value"]) > 0
        by_path.setdefault((row["seed"], row["model"], row["detail"]), set()).add(row["value"])
    # The same path has the same score, and seeds and paths differ.
    assert all(len(values) == 1 for values in by_path.values()) and len(by_path) < len(rows)
    assert len({value for values in by_path.values() for value in values}) == len(by_path)
    text = Path(f"{scores}.md").read_text(encoding="utf-8")
    assert text.startswith("# SWD x1000 of lift_dual_timestep_1ep, 8 images, 2 seeds\n")
    two = [float(row["value"]) for row in rows if (row["model"], row["spacing"]) == ("baseline", "uniform λ")]
    assert len(two) == 2
    assert f"{np.mean(two):.2f} ± {np.std(two, ddof=1):.2f} |" in text
    assert_figure(f"{scores}.png")


def paths_of(folder):
    made = trained_paths(load_heatmap(folder / "map.pth"), LOG_SNR, 3)
    return {(model, spacing, offset): path for model, spacing, offset, path in made}


def test_paths_of_a_network_are_those_of_its_heatmap(trained, scores):
    paths, heatmap = paths_of(trained), load_heatmap(trained / "map.pth")
    assert list(paths) == combinations()
    rows = rows_of(f"{scores}.csv")
    assert [row["detail"] for row in rows] == 2 * [path.fingerprint() for path in paths.values()]
    refined = kl_refined(heatmap, LOG_SNR, 3).path
    level = kl_refined(heatmap, LOG_SNR, 3, diagonal=True).path
    assert paths["LIFT", "optimal", "optimal 2-D"].points == refined.points
    assert paths["LIFT", "optimal", "diagonal"].points == level.points
    assert paths["baseline", "optimal", ""].points == tuple(point[:1] for point in level.points)
    assert paths["LIFT", "uniform t", "diagonal"].points == tuple((t, t) for t in (999, 666, 333, 0))
    assert paths["LIFT", "published", "published"].points == heatmap_path(heatmap, "dp_total", 3)[0].points
    ahead = np.array(paths["LIFT", "uniform λ", "coarse ahead by 1"].points)
    assert LOG_SNR[ahead[1:-1, 1]] - LOG_SNR[ahead[1:-1, 0]] == pytest.approx([1.0] * 2, abs=0.1)


@pytest.mark.parametrize("combination", [("LIFT", "optimal", "optimal 2-D"), ("baseline", "uniform λ", "")])
def test_a_score_is_that_of_the_images_along_the_path(stage, trained, scores, tmp_path, combination):
    save_schedule(paths_of(trained)[combination], tmp_path / "path.json", LOG_SNR, solver={"name": "ddim"})
    name = "baseline_1ep" if combination[0] == "baseline" else "lift_dual_timestep_1ep"
    flags = ["--checkpoint", trained / f"checkpoints/{name}.pth", "--schedule", tmp_path / "path.json"]
    stage(generate_with_path_30, *flags, "--num_images", 8, "--seed", 43, "--output", tmp_path / "images", *HARDWARE)
    images = torch.stack([torch.as_tensor(read_png(file)) for file in sorted((tmp_path / "images").glob("[0-9]*.png"))])
    real = load_images("synthetic", 16, trained / "cache", limit=12).pixels
    expected = np.mean(list(sliced_wasserstein(real, images).values()))
    rows = {(r["seed"], r["model"], r["spacing"], r["offset"]): float(r["value"]) for r in rows_of(f"{scores}.csv")}
    # Another batch may change a grey level here and there.
    assert rows["43", *combination] == pytest.approx(expected, rel=1e-3)


def test_a_stopped_run_goes_on_and_no_path_is_sampled_twice(stage, trained, scores, tmp_path, monkeypatch):
    known = {(r["seed"], r["model"], r["detail"]): float(r["value"]) for r in rows_of(f"{scores}.csv")}
    calls, limit = [], 7

    def score(loaded, path, seed, *rest):
        if len(calls) == limit:
            raise KeyboardInterrupt
        model = "LIFT" if loaded.config["model_type"] == "dual" else "baseline"
        calls.append((str(seed), model, path.fingerprint()))
        return known[calls[-1]]

    monkeypatch.setattr(factorial, "score", score)
    monkeypatch.setattr(factorial, "plot_factorial", lambda *arguments: None)
    flags = [*trained_flags(trained, tmp_path / "again"), "--seeds", 42, 43]
    assert run_stage(factorial, *flags).status == 130
    # Rows that share a path with an earlier one cost nothing.
    assert 7 <= len(rows_of(tmp_path / "again.csv")) < 48 and not (tmp_path / "again.md").exists()
    limit = None
    stage(factorial, *flags)
    assert len(calls) == len(set(calls)) == len(known)
    assert rows_of(tmp_path / "again.csv") == rows_of(f"{scores}.csv")
    before = (tmp_path / "again.csv").stat().st_mtime_ns
    stage(factorial, *flags)
    assert len(calls) == len(known) and (tmp_path / "again.csv").stat().st_mtime_ns == before


def test_scores_of_other_weights_or_paths_do_not_mix(refused, trained, scores, tmp_path):
    flags = trained_flags(trained, tmp_path / "table")
    refused(factorial, *flags, "--ema", says=(trained / "map.pth", "other weights"))
    refused(factorial, *flags, "--heatmap", "missing.pth", says=("missing.pth", "does not exist"))
    refused(factorial, *flags, "--nfe", 7, says=("7 steps", "lower num_steps"))
    for suffix in ("csv", "json"):
        shutil.copy(f"{scores}.{suffix}", tmp_path / f"kept.{suffix}")
    others = [*trained_flags(trained, tmp_path / "kept"), "--num_images", 9]
    refused(factorial, *others, says=(tmp_path / "kept.json", "another num_images", "--output"))
    rows = rows_of(f"{scores}.csv")
    rows[3]["detail"] = "0" * 16
    write_csv(tmp_path / "table.csv", rows)
    refused(factorial, *flags, says=(tmp_path / "table.csv", "another path", "--output"))
    ranking = ["trained", "--heatmap", trained / "map.pth", "--output", tmp_path / "ranks"]
    refused(rank_criteria, *ranking, "--scores", tmp_path / "table.csv", says=("another path", "pass the heatmap"))
    (tmp_path / "empty.csv").write_text(",".join(COLUMNS) + "\n")
    refused(rank_criteria, *ranking, "--scores", tmp_path / "empty.csv", says=("no score", "factorial.py trained"))
    refused(rank_criteria, *ranking, "--scores", "missing.csv", says=("missing.csv",))
    content = load_heatmap(trained / "map.pth")
    for name in ("jacobian", "mse_64"):
        save_heatmap(tmp_path / "part.pth", {key: value for key, value in content.items() if key != name})
        ranking[2] = tmp_path / "part.pth"
        refused(rank_criteria, *ranking, "--scores", f"{scores}.csv", says=("lacks", "--maps all"))


# Criteria


def hand_made(criterion_costs, distances, nfe=4):
    return [Candidate("f", nfe, {"c": c}, {"d": d}) for c, d in zip(criterion_costs, distances, strict=True)]


@pytest.mark.parametrize(
    ("costs", "distances", "rho", "regret"),
    [
        ([1, 2, 3], [4, 5, 9], 1, 0),
        ([3, 2, 1], [4, 5, 9], -1, 9 / 4 - 1),
        ([1, 3, 2, 4], [10, 20, 30, 40], 0.8, 0),  # 1 - 6 · 2 / (4 · 15)
        ([1, 1, 2], [5, 4, 9], 0.75**0.5, 0.25),  # Ranks 1.5, 1.5, 3 and 2, 1, 3; the first of equal costs is taken.
    ],
)
def test_agreement_by_hand(costs, distances, rho, regret):
    assert agreement(hand_made(costs, distances), "c", "d") == pytest.approx((rho, regret))


def test_agreement_is_within_a_number_of_steps():
    # Perfect for either number of steps, though all together it is not.
    candidates = hand_made([10, 11, 12], [1, 2, 3], 4) + hand_made([1, 2, 3], [10, 20, 40], 6)
    assert agreement(candidates, "c", "d") == pytest.approx((1, 0))
    candidates = hand_made([1, 2, 3], [1, 2, 3], 4) + hand_made([3, 2, 1], [10, 20, 40], 6)
    assert agreement(candidates, "c", "d") == pytest.approx((0, 1.5))


@pytest.fixture(scope="module")
def ranked(stage, tmp_path_factory):
    """Name of the files of `experiments/rank_criteria.py gaussian`, its output, and the candidates by schedule."""
    name, found = tmp_path_factory.mktemp("ranks") / "new/gaussian", {}

    def keep(spectrum, schedule, nfes):
        found[schedule] = original(spectrum, schedule, nfes)
        return found[schedule]

    with pytest.MonkeyPatch.context() as patch:
        original = rank_criteria.gaussian_candidates
        patch.setattr(rank_criteria, "gaussian_candidates", keep)
        output = stage(rank_criteria, "gaussian", "--resolution", 8, "--nfe", 6, "--output", name).output
    return name, output, found


def test_the_left_riemann_sum_is_the_kl_of_the_chain_up_to_a_constant(ranked):
    _, _, found = ranked
    assert found.keys() == {"cosine_clipped", "cosine"}
    for candidates in found.values():
        assert agreement(candidates, "KL p=0", "chain KL") == pytest.approx((1, 0), abs=1e-9)
        difference = np.array([c.costs["KL p=0"] - c.distances["chain KL"] for c in candidates])
        assert np.ptp(difference) < 1e-9 * max(c.costs["KL p=0"] for c in candidates)
        assert difference.mean() > 10  # The information gained.
        # Doing well in this is not doing well with DDIM.
        assert agreement(candidates, "KL p=0", "W2²")[0] < agreement(candidates, "KL p=1 bands", "W2²")[0]


def test_reports_show_the_agreement_of_every_criterion(ranked):
    name, output, found = ranked
    text = Path(f"{name}.md").read_text(encoding="utf-8")
    assert output == text and text.startswith("# Criteria against exact distances, power law\n")
    sections = re.split(r"\n## ", text)[1:]
    assert [s.splitlines()[0] for s in sections] == ["cosine_clipped", "cosine from λ = -10"]
    for section, candidates in zip(sections, found.values(), strict=True):
        assert f"{len(candidates)} paths: {len(candidates)} of 6 steps." in section
        lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if "|" in line]
        assert [line[0] for line in lines[2:]] == list(candidates[0].costs)
        for criterion, *cells in lines[2:]:
            for k, distance in enumerate(("W2²", "KL", "chain KL")):
                rho, regret = agreement(candidates, criterion, distance)
                assert float(cells[2 * k]) == pytest.approx(rho, abs=0.0051)
                assert float(cells[2 * k + 1].rstrip("%")) == pytest.approx(100 * regret, abs=0.051)
    for schedule in ("cosine_clipped", "cosine"):
        assert_figure(f"{name}_{schedule}.png")


def test_candidates_are_distinct_paths_of_all_families(ranked):
    for candidates in ranked[2].values():
        families = {c.family for c in candidates}
        assert families == {"diagonal", "shift", "lead", "cascade", "fine first", "published DP", "KL path"}
        assert len({tuple(c.costs.values()) for c in candidates}) == len(candidates) > 40
        # The optimum of a criterion is best in it, apart from the interpolation of its map.
        best = min(candidates, key=lambda c: c.costs["KL p=1 bands"])
        assert best.family == "KL path"


def test_ranks_of_measured_scores(stage, trained, scores, tmp_path):
    flags = ["trained", "--heatmap", trained / "map.pth", "--scores", f"{scores}.csv", "--output", tmp_path / "ranks"]
    output = stage(rank_criteria, *flags).output
    distinct = len({row["detail"] for row in rows_of(f"{scores}.csv") if row["model"] == "LIFT"})
    assert output.startswith("# Criteria against measured scores, epoch 1, raw weights\n\n## scores\n")
    assert f"{distinct} paths: {distinct} of 3 steps." in output
    assert (tmp_path / "ranks.md").read_text(encoding="utf-8") == output
    assert_figure(tmp_path / "ranks.png")


POINTS = np.array([[-3.0, -3.0], [-1.0, 0.5], [4.0, 4.0]])


def test_criteria_on_a_path_of_three_points_by_hand():
    """Four modes, s = 2 in the low band and 0.5, 0.25 and 0.1 in the details: one pixel block of one channel."""
    spectrum = Spectrum(torch.tensor([2.0]), torch.tensor([0.5, 0.25, 0.1]))
    size = criteria.sizes(4, channels=1)
    assert size == ((4, 1), (4, 1))
    costs = criteria.evaluate(POINTS, criteria.gaussian_reader(spectrum), size)
    a, b = np.exp(POINTS).T
    d_64, d_32 = np.diff(POINTS, axis=0).T
    q = a + b / 4
    norm_64 = (1 + a) * (((1 + b / 2) / (1 + 2 * q)) ** 2 + sum((1 + s * a) ** -2.0 for s in (0.5, 0.25, 0.1)))
    norm_32 = (1 + b) * ((1 + 2 * a) / (1 + 2 * q)) ** 2
    low, detail = 2 / (1 + 2 * q), sum(s / (1 + s * a) for s in (0.5, 0.25, 0.1))

    def trapezoids(fine, coarse):
        return ((fine[:-1] + fine[1:]) / 2 * d_64).sum() + ((coarse[:-1] + coarse[1:]) / 2 * d_32).sum()

    def second_form(*pairs):
        return -sum((np.diff(error) * np.diff(clock)).sum() for error, clock in pairs) / 2

    factors = {
        "A": lambda s: 1 / (1 + s),
        "B": lambda s: 1 / (s * (1 + s)),
        "C": lambda s: s / (4 * (1 + s) ** 2),
        "D": lambda s: 1 / (4 * (1 + s) ** 2),
    }
    expected = {}
    for name, f in factors.items():
        expected[f"DP-64 {name}"] = trapezoids(norm_64 / 16 * f(a), 0 * b)
        expected[f"DP-Total {name} published"] = trapezoids(norm_64 / 16 * f(a), norm_32 * f(b))
        expected[f"DP-Total {name} per_dim"] = trapezoids(norm_64 / 4 * f(a), norm_32 * f(b))
        expected[f"DP-Total {name} sum"] = trapezoids(norm_64 * f(a), norm_32 * f(b))
    # ‖J‖² = C·H·W (1 + S) leaves the constant over S.
    expected["J = I DP-64 B"] = trapezoids(4 / 16 / a, 0 * b)
    for name, divide in (("published", 16), ("per_dim", 4), ("sum", 1)):
        expected[f"J = I DP-Total B {name}"] = trapezoids(4 / divide / a, 1 / b)
    left = ((low + detail)[:-1] * np.diff(a) + low[:-1] / 4 * np.diff(b)).sum() / 2
    expected["KL p=0"] = left
    right = ((low + detail)[1:] * np.diff(a) + low[1:] / 4 * np.diff(b)).sum() / 2
    expected["KL p=0 symmetric"] = left - right
    for p in (0.25, 0.5, 0.75, 1.0):
        weigh = np.log if p == 1 else lambda s, p=p: s ** (1 - p) / (1 - p)
        expected[f"KL p={p:g} scales"] = second_form((low + detail, weigh(a)), (low / 4, weigh(b)))
        expected[f"KL p={p:g} bands"] = second_form((detail, weigh(a)), (low, weigh(q)))
    assert costs.keys() == expected.keys()
    assert costs == pytest.approx(expected, rel=1e-9)


def test_the_content_free_network_has_the_norms_of_a_scaled_identity():
    """ε̂ = x / √(1 - ᾱ), by automatic differentiation of its sum of squares."""
    size = criteria.sizes(3 * 4 * 4)
    assert size == ((16, 4), (48, 12))
    maps = criteria.content_free(POINTS, size)
    for values, dims, lines in ((maps.norm_64, 48, POINTS[:, 0]), (maps.norm_32, 12, POINTS[:, 1])):
        for value, line in zip(values, lines, strict=True):
            scale = 1 / np.sqrt(1 - 1 / (1 + np.exp(-line)))
            jacobian = torch.func.jacrev(lambda x, scale=scale: x * scale)(torch.zeros(dims, dtype=torch.float64))
            assert value == pytest.approx(jacobian.square().sum().item())
    assert np.isnan(np.stack(maps[2:])).all()


def test_measured_maps_on_their_lines_and_between():
    scheduler = DDIMScheduler(prediction_type="v")
    t_grid = timestep_grid(20, start=950, spacing="uniform_log_snr", log_snr=LOG_SNR)
    heatmap = exact_heatmap(SPECTRUM, scheduler, t_grid)
    heatmap["mse_64_low"] = 0.5 * heatmap["mse_64_low"]  # As that of a network, not four times mse_32.
    read = criteria.measured_reader(heatmap, LOG_SNR)
    cells = np.array([[0, 0], [3, 7], [12, 12], [12, 19], [19, 19]])
    maps = read(LOG_SNR[t_grid[cells]])
    known = [heatmap["jacobian"]["HH"], heatmap["jacobian"]["LL"], *(heatmap[name] for name in MSES)]
    for values, whole in zip(maps, known, strict=True):
        np.testing.assert_allclose(values, whole.numpy()[tuple(cells.T)], rtol=1e-10)
    points = LOG_SNR[np.array([[940, 700], [333, 111], [77, 500]])]
    exact = criteria.gaussian_reader(SPECTRUM)(points)
    for values, truth in zip(read(points)[:4], exact[:4], strict=True):
        np.testing.assert_allclose(values, truth, rtol=0.02)


def test_the_exact_maps_are_those_that_an_error_map_measures():
    scheduler = DDIMScheduler(prediction_type="v", clip_sample=False)
    rng = torch.Generator().manual_seed(0)
    low, high = (torch.rand(shape, generator=rng, dtype=torch.float64) + 0.1 for shape in ((1, 2, 2), (3, 1, 2, 2)))
    denoiser = GaussianDenoiser(scheduler, low, high)
    measured = error_map(denoiser.denoise, scheduler, denoiser.draw(400, rng), [600, 300], 1, batch_size=400)
    read = criteria.gaussian_reader(denoiser.spectrum())
    points = LOG_SNR[np.array([[600, 600], [600, 300], [300, 300]])]
    for values, name in zip(read(points)[2:], MSES, strict=True):
        np.testing.assert_allclose(measured[name].numpy()[[0, 0, 1], [0, 1, 1]], values, rtol=0.08)


def test_greedy_prints_its_true_calls_beside_diagonals(stage, trained, tmp_path):
    flags = ["--checkpoint", trained / "checkpoints/lift_dual_timestep_1ep.pth", "--cache_dir", trained / "cache"]
    flags += ["--rungs", 1, 3, "--num_images", 6, "--batch_size", 4, "--device", "cpu"]
    output = stage(greedy, *flags, "--output", tmp_path / "report.md").output
    assert (tmp_path / "report.md").read_text() == output
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    for rungs, calls, *scores in rows[2:]:
        steps = int(rungs.split(",")[0])
        # Trying costs up to three calls for each of at most 2 (steps - 1) moves, and at least one.
        assert steps <= float(calls.split()[0]) <= 1 + 6 * (steps - 1)
        assert all(float(value) > 0 for value in scores)
    one_step = rows[2]
    assert one_step[1].startswith("1.0") and one_step[3] == one_step[4] == one_step[5]
