"""The search of levels, on chains of exact Gaussian models whose best level is known in closed form."""

import math
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch

from checkpoint import LoadedModel
from data import coarse, to_uint8
from evaluation.chain import Chain, ChainSettings, Link
from evaluation.level_search import search_levels
from evaluation.pixel_metrics import SlicedWasserstein
from paths.families import diagonal
from planning.conditions import NO_CLASS
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser

SCHEDULER = DDIMScheduler(beta_schedule="cosine", prediction_type="v", clip_sample=False)
LOG_SNR = SCHEDULER.log_snr.numpy()
SIDE, COUNT = 16, 200
SEEDS = range(COUNT)


class Base:
    """Exact for coarse images of independent pixels of one variance."""

    def __init__(self, variance):
        self.variance = variance

    def denoise(self, xs, ts):
        [x], [t] = xs, ts
        alpha, sigma = SCHEDULER.scales(t, x)
        x0 = alpha * self.variance / (alpha.square() * self.variance + sigma.square()) * x
        return (SCHEDULER.target(x0, (x - alpha * x0) / sigma, t),)


def loaded(model, num_scales, side):
    model.num_scales = model.num_predictions = num_scales
    config = {"resolution": side, "channels": 1, "model_type": "dual", "t_pairs": "independent", "weights": "raw"}
    return LoadedModel(model, SCHEDULER, config, "f" * 16, FilePath(f"{side}.pth"))


def chain_of(variance_of_base, low, detail=0.02, num_steps=40):
    """A base, and a dual model that is exact for low modes and details of these variances."""
    half = SIDE // 2
    parts = torch.full((1, half, half), low), torch.full((3, 1, half, half), detail)
    model = GaussianDenoiser(SCHEDULER, *parts, representation="overcomplete")
    fine = diagonal(num_steps, "uniform_log_snr", 1, LOG_SNR)
    links = [Link(loaded(each, k, side), NO_CLASS, fine) for each, k, side in (
        (Base(variance_of_base), 1, half), (model, 2, SIDE)
    )]  # fmt: skip
    return Chain(
        links[0],
        links[1:],
        ChainSettings(base="a", stages=("b",), solver="dpmpp_3m"),
        torch.device("cpu"),
        "fp32",
        COUNT,
    )


def variance_at(level, of_base, low):
    """Of the low modes that come out, where those that are given have 4 of_base and the stage takes them for `low`."""
    b = math.exp(level)
    gain = low * math.sqrt(b) / 2 / (1 + low * b / 4)
    return gain**2 * (b * of_base + 1) + low / (1 + low * b / 4)


def away_from(variance):
    def score(number, images):
        assert number == 0
        return abs((2 * coarse(images)).std().item() - math.sqrt(variance))

    return score


@pytest.mark.parametrize("level", [-2.0, 1.0, 4.0])
def test_what_comes_out_at_a_level_has_the_variance_of_the_closed_form(level):
    chain = chain_of(0.12, 0.16)
    made = chain.enlarge(0, chain.start(SEEDS), SEEDS, level)
    # Clamps of [-1, 1] reach a standard deviation below 0.4 hardly ever; 12800 modes have a deviation of 1.3 %.
    found = (2 * coarse(made.images)).var().item()
    assert found == pytest.approx(variance_at(level, 0.12, 0.16), rel=0.05)
    assert made.nfe == 80 and made.images.shape == (COUNT, 1, SIDE, SIDE)


def test_a_wrong_base_is_better_hidden_and_a_right_one_need_not_be():
    low = 0.16
    wrong = search_levels(chain_of(0.12, low), [None], SEEDS, -6, 8, 5, 1, score=away_from(low))[0]
    right = search_levels(chain_of(low / 4, low), [None], SEEDS, -6, 8, 5, 1, score=away_from(low))[0]
    assert wrong.level < 1 and wrong.scores[math.inf] > 0.2 > 10 * wrong.scores[wrong.level]
    assert max(right.scores.values()) < 0.02
    levels = sorted(wrong.scores)
    assert all(wrong.scores[a] < wrong.scores[b] + 0.01 for a, b in zip(levels, levels[1:], strict=False))


def test_the_best_level_lies_where_two_errors_cancel():
    # The base makes too much of the low modes, and the stage takes them for too little.
    of_base, low, truth = 0.12, 0.16, 0.3
    places = np.linspace(-6, 8, 1401)
    best = places[np.argmin([abs(variance_at(level, of_base, low) - truth) for level in places])]
    assert -3 < best < 5
    rows = []
    found = search_levels(chain_of(of_base, low), [None], SEEDS, -6, 8, 8, 3, score=away_from(truth), seen=rows.append)[
        0
    ]
    # Half a step of the last round, and what the variance of the samples is uncertain by.
    assert found.level == pytest.approx(best, abs=0.5)
    assert len(rows) == len({row["timestep"] for row in rows}) <= 1 + 8 + 2 * 3
    assert min(row["swd"] for row in rows) == found.scores[found.level] and {row["nfe"] for row in rows} == {80}


def test_the_score_is_the_distance_to_images_held_out_from_equal_seeds():
    chain, seeds = chain_of(0.05, 0.16, num_steps=3), range(6)
    real = torch.randint(256, (9, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    [found] = search_levels(chain, [real], seeds, -2, 6, 3, 0)
    assert sorted(found.scores) == [-2, 2, 6, math.inf]
    metric, start = SlicedWasserstein(real, 6), chain.start(seeds)
    for level, value in found.scores.items():
        pixels = to_uint8(chain.enlarge(0, start, seeds, level).images)
        distances = metric.distance(pixels)
        assert value == pytest.approx(sum(distances.values()) / len(distances))
    with pytest.raises(ValueError, match="there are no levels to search"):
        search_levels(chain, [real], seeds, 3, 3)


def test_a_path_far_from_the_training_is_warned_of(capsys):
    chain = chain_of(0.05, 0.16, num_steps=2)
    link = chain.stages[0]
    config = link.loaded.config | {"t_pairs": "same", "t_pairs_points": None}
    chain.stages[0] = link._replace(loaded=link.loaded._replace(config=config))
    chain.enlarge(0, chain.start([1]), [1], 2.0)
    assert "warning: 16.pth: this model was trained with --t_pairs same" in capsys.readouterr().err
