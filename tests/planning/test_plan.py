"""A criterion on a heatmap, apart from the stage that prints it (test_plan_path.py)."""

import pytest
import torch

from paths.path import timestep_grid
from planning.plan import NEAR, PlanCriterionSettings, Planner
from scheduler import DDIMScheduler
from truth.gaussian import Spectrum, exact_heatmap

SCHEDULER = DDIMScheduler()
LOG_SNR = SCHEDULER.log_snr.numpy()


def heatmap():
    content = exact_heatmap(Spectrum.power_law(8), SCHEDULER, timestep_grid(13, start=960))
    return content | {"num_train_timesteps": 1000, "beta_schedule": "cosine_clipped"}


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize(("beyond", "kept"), [(NEAR, True), (NEAR + 1e-9, False)])
def test_a_path_keeps_to_where_a_network_was_trained_if_it_is_as_near_as_timesteps_may_be(side, beyond, kept):
    # Two steps from 80, evenly in t, call at 40, where a quarter is added to log SNR without rounding.
    here = LOG_SNR[40]
    assert (here + NEAR) - here == NEAR == here - (here - NEAR)
    edges = sorted((here + side * beyond, side * 30.0))
    content = heatmap() | {"seen_32": torch.tensor(edges, dtype=torch.float64)[:, None].expand(2, 1000)}
    families = {plan.family: plan.path.points for plan in Planner(content, PlanCriterionSettings(start=80)).families(2)}
    assert ("diagonal, uniform t" in families) == kept
    if kept:
        assert families["diagonal, uniform t"] == ((80, 80), (40, 40), (0, 0))
