"""The comparison of a cascade and a dual model: equal calls, what the ways share, the table; on untrained models."""

import csv
import statistics

import numpy as np
import pytest
import torch

import cascades
from cascades import BEST, CASCADE, CHAIN, CLEAN_CHAIN, DIAGONAL, DUAL_STAGE, CascadeStudySettings, Comparison, report
from chain_models import Models
from conftest import HARDWARE
from data import load_images, split_holdout, to_uint8
from diffusion.sampler import image_seeds
from evaluation.pixel_metrics import SlicedWasserstein


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


def flags(models, output, kind="overcomplete"):
    files = {"base": models("baseline", 16)}
    files |= {"stage" if k == "cascade" else k: models(k, 32, representation=kind) for k in ("cascade", "dual")}
    words = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    return [*words, "--cache_dir", models.cache, "--output", output, "--num_images", 4, *HARDWARE]


def rows_of(name):
    with open(f"{name}.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_way_takes_the_calls_that_it_says(stage, models, tmp_path):
    output = tmp_path / "found/scores"
    words = ["compare", "--nfe", 3, 4, "--seeds", 1, 2, "--s_0", 1]
    said = stage(cascades, *words, *flags(models, output)).output
    rows = rows_of(output)
    assert len(rows) == 5 * 2 * 2 and [row["way"] for row in rows[::2][:5]] == [
        CHAIN, CLEAN_CHAIN, DUAL_STAGE, CASCADE, DIAGONAL
    ]  # fmt: skip
    # Ten steps of four images each, of a chain twice.
    assert {row["way"]: row["images_seen"] for row in rows} == {
        CHAIN: "80", CLEAN_CHAIN: "80", DUAL_STAGE: "80", CASCADE: "40", DIAGONAL: "40"
    }  # fmt: skip
    images = load_images("synthetic", 32, models.cache, limit=20)
    training, held_out = split_holdout(images, 6)
    metric = SlicedWasserstein(training.pixels, 4)
    chosen = held_out.pixels[(2 * np.arange(4) + 1) * 6 // 8]
    real = statistics.mean(metric.distance(torch.from_numpy(chosen)).values())
    [floor] = {float(row["swd_real"]) for row in rows}
    assert floor == pytest.approx(real, abs=1e-5)
    settings = CascadeStudySettings(
        base=str(models("baseline", 16)), stage=str(models("cascade", 32, representation="overcomplete")),
        dual=str(models("dual", 32, representation="overcomplete")), s_0="1", num_images=4, precision="fp32",
        device="cpu", output="x",
    )  # fmt: skip
    chain = next(iter(Comparison(settings).ways(3)))
    assert (chain.name, chain.nfe, chain.coarse_calls) == (CHAIN, 3, 1)
    score = statistics.mean(metric.distance(chain.make(image_seeds(1, 4)).pixels).values())
    assert float(rows[0]["swd"]) == pytest.approx(score, abs=1e-4)
    assert "| overcomplete | CDM chain | 1 | 80 |" in said and f"held out: {real:.2f}" in said
    assert all((tmp_path / f"found/scores.{kind}").exists() for kind in ("md", "png"))
    # What is there is kept, and another representation is added.
    stage(cascades, "compare", "--nfe", 3, "--seeds", 1, "--s_0", 1, *flags(models, output, "residual"))
    assert rows_of(output)[:20] == rows and {row["name"] for row in rows_of(output)[20:]} == {"residual"}


def test_the_cascade_path_of_the_dual_model_is_the_chain_within_it(models):
    settings = CascadeStudySettings(
        base=str(models("baseline", 16)), stage=str(models("cascade", 32, representation="residual")),
        dual=str(models("dual", 32, representation="residual")), s_0="clean", num_images=2, device="cpu", output="x",
    )  # fmt: skip
    ways = {way.name: way for way in Comparison(settings).ways(4)}
    assert set(ways) == {CHAIN, DUAL_STAGE, CASCADE, DIAGONAL} and BEST not in ways
    assert all(way.make(image_seeds(1, 2)).nfe == 4 for way in ways.values())
    pixels = ways[CHAIN].make(image_seeds(1, 2)).pixels
    assert pixels.shape == (2, 3, 32, 32) and pixels.dtype == to_uint8(torch.zeros(1)).dtype


def test_the_table_has_the_mean_and_the_deviation_of_seeds():
    row = {"name": "a", "way": CHAIN, "s_0": "1", "nfe": "4", "images_seen": "9", "parameters": "1234"}
    rows = [row | {"seed": str(k), "swd": str(value), "fd": ""} for k, value in enumerate((10.0, 12.0))]
    text, panels = report([*rows, rows[0] | {"way": DIAGONAL, "s_0": "", "nfe": "8", "swd": "7"}])
    assert "| a | CDM chain | 1 | 9 | 1,234 | 11.00 ± 1.41 |  |" in text
    assert "| a | dual, diagonal |  | 9 | 1,234 |  | 7.00 |" in text
    assert panels == {"a": {"CDM chain at 1": {4: 11.0}, "dual, diagonal": {8: 7.0}}}


def test_what_cannot_be_compared_is_refused(refused, models, tmp_path):
    words = flags(models, tmp_path / "x")
    refused(cascades, "compare", *words, "--nfe", 1, says=("leaves a cascade no call",), status=2)
    wrong = [*words, "--dual", models("baseline", 32)]
    refused(cascades, "compare", *wrong, says=("is no model of two clocks",))
