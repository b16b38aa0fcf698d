import json

import pytest

from image_folder import claim, claim_images, write_settings

NAMES = ("cat[1]", "star*", "cat1", "star2", "**")


@pytest.fixture
def folder(tmp_path):
    """Images of three names that look like patterns, two that they would match, and a figure."""
    for name in NAMES:
        (tmp_path / f"{name}.png").write_bytes(b"")
    (tmp_path / "grid.png").write_bytes(b"")
    write_settings(tmp_path, {"seed": 1, "images": dict.fromkeys(("cat[1]", "star*", "**"), "")})
    return tmp_path


def test_only_what_was_made_here_is_removed(folder):
    assert claim(folder, {"seed": 2}, force=True, made=("gr*.png",)) == {}
    assert {file.name for file in folder.glob("*.png")} == {"cat1.png", "star2.png"}


def test_equal_settings_keep_everything_and_say_what_there_is(folder):
    assert set(claim(folder, {"seed": 1}, force=False)["images"]) == {"cat[1]", "star*", "**"}
    with pytest.raises(ValueError, match=r"holds results with another seed; pass --force"):
        claim(folder, {"seed": 2}, force=False)
    assert len(list(folder.glob("*.png"))) == 6


def test_an_image_that_came_from_elsewhere_is_not_replaced_unasked(folder):
    with pytest.raises(ValueError, match=r"cat1\.png was not made by this stage"):
        claim_images(folder, {"seed": 1}, {"cat1": "a"}, force=False)
    assert claim_images(folder, {"seed": 1}, {"cat1": "a", "star*": ""}, force=True) == ["cat1"]
    assert set(json.loads((folder / "settings.json").read_text())["images"]) == {"cat[1]", "star*", "**", "cat1"}


def test_an_image_of_another_source_is_made_again(folder):
    assert claim_images(folder, {"seed": 1}, {"star*": "other", "**": ""}, force=False) == ["star*"]
    assert not (folder / "star*.png").exists() and (folder / "star2.png").exists()
