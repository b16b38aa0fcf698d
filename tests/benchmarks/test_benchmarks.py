"""The benchmarks run, and what they derive from their measurements is right. Nothing is timed here."""

import functools
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import bench_eval
import bench_heatmap
import bench_local
import bench_settings
import bench_solvers
import bench_train
import machine
import train_lift
from baseline_model import BaselineModel
from diffusion.sampler import image_seeds, sample
from diffusion.solvers import SOLVERS
from model import LIFTDualTimestepModel
from paths.families import diagonal
from planning.error_map import BLOCKS, error_map
from scheduler import DDIMScheduler

TINY = ("--resolution", 16, "--hidden_dims", "8,16", "--device", "cpu")


def test_bench_settings_prints_a_row_for_each_combination(stage):
    output = stage(bench_settings, *TINY, "--batch_size", 2, "--rounds", 1).output
    assert output.count("| fp32 |") == output.count("| bf16 |") == 4


def test_bench_solvers_prints_a_row_for_each(stage):
    output = stage(bench_solvers, *TINY, "--batch_size", 2, "--rounds", 1, "--num_steps", 2).output
    for name in SOLVERS:
        assert output.count(f"| {name} | ") == 1


def test_bench_train_prints_and_writes_a_report_of_all_models(stage, tmp_path):
    file = tmp_path / "report.md"
    flags = ("--batch_sizes", 2, "--steps", 1, "--precision", "fp32", "--output", file)
    with mock.patch.multiple(bench_train, EPOCH_IMAGES=8, WARM_UP_STEPS=1):
        with mock.patch.object(machine, "PEAK_SECONDS", 1e-4):
            output = stage(bench_train, *TINY, *flags).output
    assert file.read_text() == output
    for name in bench_train.MODEL_CLASSES:
        assert f"| {name} | 2 | plain | fp32 | eager |" in output
        assert f"| {name} | 2 | ours | fp32 | eager |" in output
    assert output.count("| diffusers | fp32 |") == (0 if bench_train.diffusers is None else 2)
    assert str(tmp_path) not in output


def test_bench_train_times_steps_with_further_terms_beside_those_without(stage):
    raced, race = [], bench_train.race

    def watched(contestants, *limits):
        raced.append({name: one.trainer.objective.terms for name, one in contestants.items() if name != "plain"})
        return race(contestants, *limits)

    flags = ("--models", "baseline", "--batch_sizes", 2, "--steps", 1, "--precision", "fp32", "--no-diffusers")
    with mock.patch.multiple(bench_train, EPOCH_IMAGES=8, WARM_UP_STEPS=1, race=watched):
        with mock.patch.object(machine, "PEAK_SECONDS", 1e-4):
            output = stage(bench_train, *TINY, *flags, "--terms").output
    assert {name: [term.name for term in terms] for name, terms in raced[1].items()} == {
        "none": [],
        "perceptual": ["perceptual"],
        "features": ["features"],
        "both": ["perceptual", "features"],
    }
    for name in ("none", "perceptual", "features", "both"):
        assert f"| baseline | 2 | {name} | " in output
    result = SimpleNamespace(label={"batch": 2}, with_terms={"none": 0.5, "both": 0.75})
    assert [row["times a step without"] for row in bench_train.terms_rows(result)] == ["1.000", "1.500"]


@pytest.mark.skipif(bench_train.diffusers is None, reason="diffusers is not installed")
@pytest.mark.parametrize("hidden_dims", [(8, 16), (16, 32, 64, 128), (64, 128, 256, 512)])
def test_the_network_of_diffusers_has_as_many_parameters_within_5_percent(hidden_dims):
    with torch.device("meta"):
        ours, theirs = (
            sum(p.numel() for p in network(hidden_dims, 3).parameters())
            for network in (BaselineModel, bench_train.DiffusersBaseline)
        )
    assert theirs == pytest.approx(ours, rel=0.05)


def test_time_inside_another_part_counts_once():
    clock = [0.0]

    def work(seconds):
        clock[0] += seconds

    with mock.patch.object(time, "perf_counter", lambda: clock[0]):
        watch = bench_train.Stopwatch(torch.device("cpu"))
        inner = watch.timed("inner", work)
        outer = watch.timed("outer", lambda: (work(1), inner(2), inner(3), work(4)))
        watch.timed("rest", lambda: (outer(), work(5)))()
    assert watch.seconds == {"inner": 5, "outer": 5, "rest": 5}


@pytest.mark.parametrize(
    ("intervals", "idle"),
    [
        ([(2, 5)], 0),
        ([(0, 2), (1, 3), (3, 4)], 0),
        ([(6, 10), (0, 4)], 0.2),
        ([(0, 10), (2, 3), (15, 20)], 0.25),
    ],
)
def test_idle_share_of_overlapping_and_separate_kernels(intervals, idle):
    assert bench_train.idle_share(intervals) == pytest.approx(idle)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::convolution_backward", "convolution"),
        ("aten::addmm", "matmul, attention"),
        ("aten::_scaled_dot_product_flash_attention_backward", "matmul, attention"),
        ("aten::native_group_norm", "normalisation"),
        ("aten::linalg_vector_norm", "optimizer, EMA"),
        ("aten::_fused_adamw_", "optimizer, EMA"),
        ("triton_red_fused_convolution_native_group_norm_3", "fused"),
        ("aten::copy_", "copies"),
        ("aten::silu_backward", "elementwise"),
        ("aten::as_strided", "other"),
    ],
)
def test_operators_are_told_apart(name, kind):
    assert bench_train.operator_kind(name) == kind


@pytest.mark.parametrize("full", [True, False])
def test_bench_heatmap_prints_and_writes_its_tables(stage, tiny, cache, tmp_path, full):
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, "--epochs", 1)
    file = tmp_path / "report.md"
    flags = [
        "--checkpoint",
        tmp_path / "checkpoints/lift_dual_timestep_1ep.pth",
        "--output",
        file,
        "--cache_dir",
        cache,
    ]
    flags += ["--grid", 4, "--coarse", 3, "--lines", 2, "--rounds", 1, "--num_images", 2, "--device", "cpu"]
    output = stage(bench_heatmap, *flags, *(() if full else ("--no-full",))).output
    assert file.read_text() == output
    assert "4 cells, 2 images, median of 1 turns" in output
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in output.splitlines() if line[:1] == "|"]
    ways = ["plain, K=4", "ours, K=4", "ours, K=1"]
    assert [row[0] for row in rows].count("ours, denoising errors") == 1  # Which have no Jacobian to compare.
    for way in ways:
        timed, factors = [[cell.replace(",", "") for cell in row[1:]] for row in rows if row[0] == way]
        assert float(timed[0]) > 0 and float(timed[2]) <= float(timed[1]) and len(factors) == 4
    assert [float(f) for f in next(row[1:] for row in rows[5:] if row[0] == ways[0])] == [1] * 4
    names = [row[0] for row in rows]
    for name in ("whole", "--coarse 3", *BLOCKS, "fine error", "coarse error"):
        assert names.count(name) == full
    assert str(tmp_path) not in output


def test_images_factors_by_hand():
    plain = {block: torch.tensor([[1.0, 2.0, 4.0]]) for block in BLOCKS}
    errors = plain | {"HH": torch.tensor([[2.0, 6.0, 2.0]]), "LL": 0.5 * plain["LL"]}
    # Squares of the ratios of HH are 4, 9 and 1/4.
    assert bench_heatmap.images_factors(errors, plain) == {"HH": 4, "HL": 1, "LH": 1, "LL": 0.25}


def test_the_plain_way_measures_the_same_blocks():
    """Where every probe is exact, forward mode and ours must find the same spread over images."""
    gain = torch.tensor([1.0, 2.0, 5.0])[:, None, None, None]

    def denoise(xs, ts):
        t_64, t_32 = (t.float().view(-1, 1, 1, 1) / 1000 for t in ts)
        corner = torch.nn.functional.pad(xs[1][..., None, None], (0, 1, 0, 1)).permute(0, 1, 2, 4, 3, 5).flatten(4)
        corner = corner.flatten(2, 3)  # Each coarse pixel in one corner of its 2x2 block.
        fine = gain * ((1 + t_64) * xs[0] + t_32 * corner)
        return fine, gain * ((2 + t_32) * xs[1] + (3 + t_64) * xs[0][..., ::2, ::2])

    scheduler, t_grid = DDIMScheduler(), [900, 300]
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loaded = SimpleNamespace(scheduler=scheduler, denoise=denoise)
    plain = bench_heatmap.plain_map(loaded, x, torch.tensor(t_grid))
    ours = error_map(denoise, scheduler, x, t_grid, 1, batch_size=3, progress=False, maps="blocks")["jacobian_se"]
    for block in BLOCKS:
        torch.testing.assert_close(plain[block].double(), ours[block], rtol=1e-4, atol=0)
        assert plain[block].max() > 1.05 * plain[block].min() > 0


def table_rows(output, first):
    """The rows of a printed table whose first column is called `first`, as one dict each."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in output.splitlines() if line[:1] == "|"]
    rows, header = [], None
    for cells in lines:
        if cells[0] == first or (header is not None and len(cells) != len(header)):
            header = cells if cells[0] == first else None
        elif header is not None and cells[0] != "---":
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def test_bench_eval_prints_and_writes_its_tables(stage, tiny, cache, tmp_path):
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, "--epochs", 1)
    file = tmp_path / "report.md"
    flags = ["--checkpoint", tmp_path / "checkpoints/lift_dual_timestep_1ep.pth", "--cache_dir", cache]
    flags += ["--output", file, "--device", "cpu", "--batch_size", 2, "--num_steps", 2, "--steps", 1, "--num_images", 3]
    flags += ["--parts", "sampling", "overhead", "images", "--variants", "fp32", "fp32 compiled", "bf16 compiled"]
    graphs_only = functools.partial(torch.compile, backend="aot_eager")
    with mock.patch.object(machine, "PEAK_SECONDS", 1e-4), mock.patch.object(torch, "compile", graphs_only):
        output = stage(bench_eval, *flags).output
    assert file.read_text() == output
    kinds = [("plain", "fp32", "eager"), ("ours", "fp32", "eager"), ("ours", "fp32", "compiled")]
    kinds.append(("ours", "bf16", "compiled"))
    for model_type in bench_eval.MODELS:
        section = next(part for part in output.split("## ") if part.startswith(f"Sampling, {model_type}"))
        rows = table_rows(section, "variant")
        assert [(row["variant"], row["precision"], row["graph"]) for row in rows] == kinds
        assert float(rows[0]["it / plain"]) == 1
    for row in table_rows(output, "model"):
        assert 0 < float(row["around the network"].strip("%")) < 100 and float(row["free network"].strip("%")) > 0
    rows = table_rows(output.split("3 images of")[1], "variant")
    assert [row["variant"] for row in rows] == ["plain", "fp32", "fp32 compiled", "bf16 compiled"]
    assert [row["largest difference"] for row in rows[:1]] == ["0"]
    assert all(int(row["largest difference"]) <= 1 for row in rows[1:3])
    assert str(tmp_path) not in output


def test_bench_eval_measures_inception_and_the_frechet_distance(stage):
    with mock.patch.multiple(bench_eval, INCEPTION_BATCH=1, FRECHET_FEATURES=8):
        with mock.patch.object(machine, "PEAK_SECONDS", 1e-4):
            output = stage(bench_eval, *TINY, "--steps", 1, "--parts", "inception", "frechet").output
    assert [row["resize"] for row in table_rows(output, "resize")] == list(bench_eval.RESIZES)
    theirs, ours = table_rows(output, "by")
    assert float(theirs["distance"]) == pytest.approx(float(ours["distance"]), rel=1e-6)


def test_bench_eval_needs_a_checkpoint_for_its_images(refused):
    refused(bench_eval, *TINY, "--parts", "images", says=("--checkpoint", "--parts"))


@pytest.mark.parametrize("model_class", [LIFTDualTimestepModel, BaselineModel])
def test_the_plain_loop_samples_the_same_images(model_class):
    torch.manual_seed(0)
    model, scheduler = model_class((8, 16)).eval(), DDIMScheduler()
    path = diagonal(5, num_scales=model.num_scales)
    noise = [torch.randn(2, 3, 16 >> s, 16 >> s) for s in range(model.num_scales)]
    plain, ours = bench_eval.plain_sample(model, scheduler, path, noise), sample(model.denoise, scheduler, path, noise)
    for a, b in zip(plain, ours.images, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_variants_of_a_model_sample_the_same_images():
    torch.manual_seed(0)
    model, path = LIFTDualTimestepModel((8, 16)), diagonal(3)
    made = [bench_eval.Contestant(v, model, DDIMScheduler(), 16, 2, torch.device("cpu")) for v in ("plain", "fp32")]
    batches = [list(it.images(path, image_seeds(0, 3))) for it in made]
    assert [len(images[0]) for images in batches[0]] == [2, 1]
    for a, b in zip(*batches, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_slow_contestant_has_one_turn():
    clock, order = [0.0], []

    def takes(name, seconds):
        order.append(name)
        clock[0] += seconds

    contestants = {name: functools.partial(takes, name, s) for name, s in (("a", 1), ("b", 3), ("c", 5))}
    with mock.patch.object(time, "perf_counter", lambda: clock[0]):
        seconds = bench_eval.race(contestants, 2, 100, torch.device("cpu"))
    assert seconds == {"a": [1, 1, 1], "b": [3, 3, 3], "c": [5]}
    assert order == list("abcabab")


def test_overhead_is_what_passes_outside_the_network():
    """A network that takes 8 s a call and a sampler that takes 1 s around each of 2 calls."""
    clock = [0.0]

    def network(xs, ts):
        clock[0] += 8
        return xs

    def batch(path, denoise):
        for _ in range(2):
            clock[0] += 1
            denoise((torch.zeros(1),), ())

    contestant = SimpleNamespace(variant="fp32", denoise=network, device=torch.device("cpu"), batch=batch)
    with mock.patch.object(time, "perf_counter", lambda: clock[0]):
        row = bench_eval.overhead_row(contestant, diagonal(2))
    assert row["around the network"] == row["free network"] == f"{2 / 18:.2%}"
    assert row["ms per batch"] == 18_000


def test_speed_rows_by_hand():
    made = {
        "plain": SimpleNamespace(precision="fp32", graph="eager"),
        "bf16": SimpleNamespace(precision="bf16", graph="eager"),
    }
    seconds = {"plain": [2.0, 4.0, 3.0], "bf16": [1.0, 1.0, 3.0]}
    plain, ours = bench_eval.sampling_rows(made, seconds, 50, 6, 10, {"fp32": 2000, "bf16": 10_000})
    # 6 images in 3 s and in 1 s, at 500 FLOP each; ratios of the turns are 2, 4 and 1.
    assert (plain["images/s"], plain["of peak"], plain["it / plain"]) == (2, "50.0%", 1)
    assert (ours["images/s"], ours["of peak"], ours["it / plain"]) == (6, "30.0%", 2)


def test_differences_of_images_by_hand():
    plain = torch.tensor([[[[10, 20], [0, 255]]]], dtype=torch.uint8)
    other = torch.tensor([[[[10, 17], [1, 255]]]], dtype=torch.uint8)
    rows = bench_eval.image_rows({"plain": plain, "bf16": other}, lambda it: float(it.sum()))
    assert [row["SWD"] for row in rows] == ["285.000", "283.000"]
    assert [row["largest difference"] for row in rows] == [0, 3]
    assert [row["mean difference"] for row in rows] == ["0", "1"]
    assert [row["values that differ"] for row in rows] == ["0.000%", "50.000%"]


def test_bench_local_agrees_with_the_plain_way_and_prints_a_row_for_each_machine(stage, cache, tmp_path):
    file = tmp_path / "report.md"
    flags = ("--limit", 4, "--resolution", 16, "--num_steps", 2, "--windows", 3, 5, "--plain_pixels", 2)
    with mock.patch.object(machine, "PEAK_SECONDS", 1e-4):
        output = stage(bench_local, *flags, "--device", "cpu", "--cache_dir", cache, "--output", file).output
    assert file.read_text() == output
    assert float(output.split("by at most ")[1].split(".\n")[0]) < 1e-4
    rows = table_rows(output, "machine")
    assert [(row["machine"], row["P"]) for row in rows] == [
        (m, p) for p in ("3", "5", "15 to 7") for m in ("els", "bbels", "ls")
    ]
    for row in rows:
        assert float(row["s per image"].replace(",", "")) > 0
        assert (row["plain / it"] == "-") == (row["machine"] == "ls")
