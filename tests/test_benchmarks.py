"""The benchmarks run, and what they derive from their measurements is right. Nothing is timed here."""

import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_settings
import bench_train

from baseline_model import BaselineModel

TINY = ("--resolution", 16, "--hidden_dims", "8,16", "--device", "cpu")


def test_bench_settings_prints_a_row_for_each_combination(stage):
    output = stage(bench_settings, *TINY, "--batch_size", 2, "--rounds", 1).output
    assert output.count("| fp32 |") == output.count("| bf16 |") == 4


def test_bench_train_prints_and_writes_a_report_of_all_models(stage, tmp_path):
    file = tmp_path / "report.md"
    with mock.patch.multiple(bench_train, EPOCH_IMAGES=8, PEAK_SECONDS=1e-4, WARM_UP_STEPS=1):
        flags = ("--batch_sizes", 2, "--steps", 1, "--precision", "fp32", "--output", file)
        output = stage(bench_train, *TINY, *flags).output
    assert file.read_text() == output
    for name in bench_train.MODEL_CLASSES:
        assert f"| {name} | 2 | plain | fp32 | eager |" in output
        assert f"| {name} | 2 | ours | fp32 | eager |" in output
    assert output.count("| diffusers | fp32 |") == (0 if bench_train.diffusers is None else 2)
    assert str(tmp_path) not in output


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
