"""Heatmap files hold what was saved, and say what is wrong with others."""

import pytest
import torch

from conftest import assert_same
from paths.path import timestep_grid
from planning.error_map import error_map
from planning.map_file import load_heatmap, save_heatmap
from scheduler import DDIMScheduler


def test_a_heatmap_file_is_what_was_saved(tmp_path):
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    t_grid = timestep_grid(5).tolist()
    measured = error_map(lambda xs, ts: xs, DDIMScheduler(), images, t_grid, coarse=3, progress=False)
    content = measured | {"fingerprint": "none"}
    save_heatmap(tmp_path / "map.pth", content)
    assert_same(load_heatmap(tmp_path / "map.pth"), {"format_version": 2} | content)
    assert [file.name for file in tmp_path.iterdir()] == ["map.pth"]


@pytest.mark.parametrize(("version", "says"), [(1, "which holds too little; compute it again"), (3, "update LIFT")])
def test_heatmap_files_of_other_versions_are_named(tmp_path, version, says):
    file = tmp_path / "map.pth"
    torch.save({"format_version": version, "t_grid": torch.zeros(3), "fingerprint": "none"}, file)
    with pytest.raises(ValueError, match=f"^Heatmap {file} has format version {version}.*{says}"):
        load_heatmap(file)
