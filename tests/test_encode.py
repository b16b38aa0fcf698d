"""The stage that takes images to latents and back: what it prints and writes, that it goes on, and what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image

import encode
import train_lift
from checkpoint import load_model
from conftest import HARDWARE, results_of, run_stage
from data import fingerprint_array, read_png, save_png, to_float, to_uint8
from diffusion.adaptive import Ode
from diffusion.latents import decode, load_latents, save_latents
from diffusion.sampler import sample
from diffusion.solvers import make_solver
from evaluation.given_latents import encode_pixels
from paths.families import diagonal

ROUGH = ["--tolerance", 0.01]
# A whole line of the table: calls up and down, both differences.
ROW = r"^{} +(\d+)  +(\d+)  +(\d+\.\d{{4}})  +(\d+\.\d{{4}})$"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A stage that falls back on a default place writes it here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def given(run, tmp_path):
    """A folder `mine` with images a to c of the training."""
    (tmp_path / "mine").mkdir()
    pixels = torch.from_numpy(np.array(run.images()[:3]))
    for name, image in zip("abc", pixels, strict=True):
        save_png(image, tmp_path / f"mine/{name}.png", by_lift=False)
    return pixels


@pytest.fixture(scope="module")
def others(stage, tiny, run, tmp_path_factory):
    """A model of the residual pair and one that predicts the fine scale alone."""
    folder = tmp_path_factory.mktemp("others")
    flags = [*tiny(folder), "--cache_dir", run.cache, "--epochs", 1]
    stage(train_lift, *flags, "--representation", "residual")
    stage(train_lift, *flags, "--model", "single_t")
    stage(train_lift, *flags, "--model", "no_t")
    return {
        "residual": folder / "checkpoints/lift_dual_timestep_1ep.pth",
        "single_t": folder / "checkpoints/single_t_1ep.pth",
        "no_t": folder / "checkpoints/no_t_1ep.pth",
    }


def flags_of(checkpoint, *flags):
    return ["--checkpoint", checkpoint, *HARDWARE, *ROUGH, *flags]


def table_of(output, names):
    return [re.search(ROW.format(name), output, re.MULTILINE).groups() for name in names]


def differences(images, pixels):
    apart = (images.double() - to_float(pixels).double()).flatten(1) * 127.5
    return apart.square().mean(1).sqrt(), apart.abs().amax(1)


@pytest.mark.parametrize("kind", ["baseline", "lift", "residual"])
def test_images_go_to_latents_and_back(stage, run, others, given, tmp_path, kind):
    """Of one scale, of the over-complete and of the residual pair."""
    checkpoint = others.get(kind) or getattr(run, kind)
    more = ["--num_steps", 1] if kind == "residual" else []
    ended = stage(encode, *flags_of(checkpoint, "--input", "mine", "--output", "out", "--batch_size", 2, *more))
    assert "encoding: 3 of 3 images" in ended.notes
    assert "3 images in out: 3 new; differences in grey levels; path" in ended.output
    loaded = load_model(checkpoint)
    path = diagonal(1, num_scales=loaded.model.num_scales)
    path = type(path)(path.points, "image_diagonal", {}) if kind == "residual" else path
    found = load_latents(tmp_path / "out/latents.npz")
    assert found.names == ("a", "b", "c") and [x.shape[1] for x in found.scales] == [3] * path.num_scales
    # Batches of another size round otherwise, so the same two and one.
    expected = [encode_pixels(loaded, path, given[rows], 0.01, 1000) for rows in ([0, 1], [2])]
    if kind != "residual":  # Whose diagonal of the image is another.
        for k, latents in enumerate(found.scales):
            assert torch.equal(latents, torch.cat([each.latents[k] for each in expected]))
        assert found.measured["calls_up"] == tuple(torch.cat([each.nfe for each in expected]).tolist())
        backs = [decode(loaded.denoise, loaded.scheduler, path, each.latents, Ode(0.01)) for each in expected]
        images, down = (torch.cat([getattr(back, name) for back in backs]) for name in ("images", "nfe"))
        rms, largest = differences(images, given)
        for row, *values in zip(
            table_of(ended.output, "abc"), found.measured["calls_up"], down, rms, largest, strict=True
        ):
            assert row == tuple(f"{value:.{places}f}" for value, places in zip(values, (0, 0, 4, 4), strict=True))
        for name, image in zip("abc", to_uint8(images), strict=True):
            assert torch.equal(read_png(tmp_path / f"out/{name}.png"), image)
    said = json.loads((tmp_path / "out/settings.json").read_text())
    assert said["weights_fingerprint"] == loaded.fingerprint and said["tolerance"] == 0.01 and said["of"] == "input"
    assert said["images"] == {name: fingerprint_array(image.numpy()) for name, image in zip("abc", given, strict=True)}
    assert found.settings == {key: value for key, value in said.items() if key != "images"}
    with Image.open(tmp_path / "out/figures/grid.png") as grid:
        assert grid.width > 3 * 128 and grid.height > 2 * 128


def test_the_smaller_the_tolerance_the_nearer_it_comes_back(stage, run, given):
    errors = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        flags = ["--checkpoint", run.lift, *HARDWARE, "--input", "mine", "--tolerance", tolerance]
        output = stage(encode, *flags, "--output", f"out{tolerance}", "--num_calls", 9999).output
        errors.append(max(float(largest) for *_, largest in table_of(output, "abc")))
    assert errors[0] > 2 * errors[1] > 6 * errors[2] and errors[2] < 2


def test_what_is_there_is_not_made_again(stage, refused, run, given, tmp_path, monkeypatch):
    flags = flags_of(run.lift, "--output", "out", "--input")
    first = stage(encode, *flags, "mine/a.png", "mine/b.png").output
    assert "2 new" in first
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.png")}
    before = load_latents("out/latents.npz")
    # Others join them.
    assert "1 new" in stage(encode, *flags, "mine").output
    after = load_latents("out/latents.npz")
    assert after.names == ("a", "b", "c") and torch.equal(after.scales[0][:2], before.scales[0])
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_pixels", lambda *args: pytest.fail("computed again"))
        again = stage(encode, *flags, "mine/a.png", "mine/b.png").output
    assert "all there already" in again and table_of(again, "ab") == table_of(first, "ab")
    # One whose picture is gone, one that has changed, and none of them if the latents are gone.
    (tmp_path / "out/b.png").unlink()
    save_png(given[0].flip(2), tmp_path / "mine/a.png")
    assert "2 new" in stage(encode, *flags, "mine").output
    changed = load_latents("out/latents.npz")
    assert changed.names == ("c", "a", "b") and not torch.equal(changed.scales[0][1], after.scales[0][0])
    (tmp_path / "out/latents.npz").unlink()
    assert "3 new" in stage(encode, *flags, "mine").output
    for more, name in (
        (["--tolerance", 0.02], "tolerance"),
        (["--ema"], "weights_fingerprint"),
        (["--num_steps", 2], "path_fingerprint"),
        (["--precision", "bf16"], "precision"),
        (["--resize"], "resize_filter"),
    ):
        refused(encode, *flags, "mine", *more, says=("out holds results with another", name, "--force"))
    stage(encode, *flags, "mine/b.png", "--tolerance", 0.02, "--force")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.png")) == ["b.png"]
    assert load_latents("out/latents.npz").names == ("b",)


def test_two_runs_into_one_folder_add_to_each_other(stage, run, given, tmp_path, monkeypatch):
    flags, ended = flags_of(run.lift, "--output", "out", "--input"), []

    def meanwhile(*args):
        if not ended:  # The second run begins and ends while the first one computes.
            ended.append("")
            ended.append(stage(encode, *flags, "mine/b.png").output)
        return encode_pixels(*args)

    def alone(file, latents):
        with pytest.raises(Timeout):
            FileLock(f"{file}.lock", timeout=0).acquire()
        save_latents(file, latents)

    monkeypatch.setattr(encode, "encode_pixels", meanwhile)
    monkeypatch.setattr(encode, "save_latents", alone)
    first = stage(encode, *flags, "mine/a.png").output
    assert "1 images in out: 1 new" in first and "1 images in out: 1 new" in ended[1]
    found = load_latents("out/latents.npz")
    assert found.names == ("b", "a")
    assert table_of(first, "a") != table_of(ended[1], "b") and len(found.measured["rms"]) == 2
    assert json.loads((tmp_path / "out/settings.json").read_text())["images"].keys() == {"a", "b"}
    assert "all there already" in stage(encode, *flags, "mine/a.png", "mine/b.png").output


def test_folders_are_named_by_what_made_them(stage, run, given):
    stage(encode, *flags_of(run.baseline, "--input", "mine"))
    stage(encode, *flags_of(run.baseline, "--input", "mine/a.png", "mine/b.png"))
    place = results_of("baseline") / "latents"
    names = {folder.name for folder in place.iterdir()}
    assert names == {"baseline_2ep_raw_diagonal_1_mine", "baseline_2ep_raw_diagonal_1_a_b"}
    stage(encode, *flags_of(run.baseline, "--decode", place / "baseline_2ep_raw_diagonal_1_mine/latents.npz"))
    assert {folder.name for folder in place.iterdir()} - names == {"baseline_2ep_raw_diagonal_1_ode_latents"}


# Latents to images


@pytest.fixture
def encoded(stage, run, given):
    stage(encode, *flags_of(run.lift, "--input", "mine", "--output", "out"))
    return load_latents("out/latents.npz")


def test_latents_are_decoded_as_they_came_back(stage, refused, run, encoded, tmp_path):
    flags = flags_of(run.lift, "--decode", "out/latents.npz", "--output", "images")
    output = stage(encode, *flags).output
    assert re.search(r"3 images in images: 3 new with \d+ network calls each; path diagonal", output)
    assert "note" not in output
    for name in "abc":
        assert torch.equal(read_png(tmp_path / f"images/{name}.png"), read_png(tmp_path / f"out/{name}.png"))
    assert "all there already" in stage(encode, *flags).output
    (tmp_path / "images/b.png").unlink()
    assert "1 new" in stage(encode, *flags).output
    for more in (["--solver", "heun", "--num_steps", 4], ["--tolerance", 0.1], ["--end", "clean"], ["--num_steps", 2]):
        # A tolerance belongs to ode.
        named = [flag for flag in flags if flag not in ROUGH] if "--solver" in more else flags
        refused(encode, *named, *more, says=("images holds results with another", "--force"))
    refused(encode, *flags[:-1], "out", "--force", says=("out is the folder of the input",))


@pytest.mark.parametrize("solver", ["ddim", "heun", "ancestral"])
def test_edited_latents_are_decoded_by_any_solver(stage, run, encoded, tmp_path, solver):
    content = dict(np.load("out/latents.npz"))
    content["fine"] = -content["fine"]
    np.savez("edited.npz", **content)
    flags = ["--checkpoint", run.lift, *HARDWARE, "--decode", "edited.npz", "--solver", solver, "--end", "clean"]
    output = stage(encode, *flags, "--num_steps", 4, "--output", "images").output
    made, loaded, path = make_solver(solver), load_model(run.lift), diagonal(4)
    assert f"3 new with {made.calls(4)} network calls each" in output
    # The default number of steps of this solver is another path than that of the latents.
    assert "note: edited.npz was encoded along another path than diagonal" in output
    found = torch.stack([read_png(tmp_path / f"images/{name}.png") for name in "abc"])
    if not made.draws:
        scales = (-encoded.scales[0], encoded.scales[1])
        expected = sample(loaded.denoise, loaded.scheduler.unclamped(), path, scales, solver=made).images[0]
        assert torch.equal(found, to_uint8(expected))
    # What is drawn for an image follows from its latents and the seed.
    for name in content:
        content[name] = content[name][1:2] if content[name].ndim else content[name]
    content["names"], content["fingerprints"] = np.array('["other"]'), np.array('["x"]')
    np.savez("one.npz", **content)
    alone = ["--decode", "one.npz", "--num_steps", 4, "--output", "alone"]
    stage(encode, *flags, *alone)
    assert (read_png(tmp_path / "alone/other.png").int() - found[1].int()).abs().max() <= 1
    stage(encode, *flags, *alone, "--seed", 1, "--output", "seeded")
    same = torch.equal(read_png(tmp_path / "seeded/other.png"), read_png(tmp_path / "alone/other.png"))
    assert same != made.draws
    # A folder is of one seed where that matters.
    ended = run_stage(encode, *flags, *alone, "--seed", 2)
    assert ended.status == made.draws and (not made.draws or "alone holds results with another seed" in ended.message)


def test_steps_are_as_many_as_a_solver_needs(stage, run, encoded):
    flags = ["--checkpoint", run.lift, *HARDWARE, "--decode", "out/latents.npz", "--solver", "ddim"]
    assert "with 18 network calls each" in stage(encode, *flags, "--output", "a").output
    assert "with 7 network calls each" in stage(encode, *flags, "--num_calls", 7, "--output", "b").output


def test_latents_of_other_models_are_refused(refused, run, others, encoded, tmp_path):
    says = ("out/latents.npz holds latents of other weights than the", "with --ema or without")
    refused(encode, *flags_of(run.baseline, "--decode", "out/latents.npz"), says=says)
    refused(encode, *flags_of(others["residual"], "--decode", "out/latents.npz"), says=says)
    refused(encode, *flags_of(run.lift, "--decode", "out/latents.npz", "--ema"), says=says)
    content = dict(np.load("out/latents.npz"))
    for name, change in {
        "small": {"fine": content["fine"][..., :8]},
        "grey": {"fine": content["fine"][:, :1], "coarse": content["coarse"][:, :1]},
    }.items():
        np.savez(f"{name}.npz", **content | change)
        says = (f"{name}.npz holds latents of shapes fine [", "this model has fine [3, 16, 16]; coarse [3, 8, 8]")
        refused(encode, *flags_of(run.lift, "--decode", f"{name}.npz"), says=says)
    content.pop("coarse")
    np.savez("fine.npz", **content)
    refused(encode, *flags_of(run.lift, "--decode", "fine.npz"), says=("shapes fine [3, 16, 16], and this",))


def test_damaged_latents_are_refused(refused, run, encoded, tmp_path):
    whole = (tmp_path / "out/latents.npz").read_bytes()
    for content in (b"", whole[:-100], b"text"):
        (tmp_path / "cut.npz").write_bytes(content)
        says = ("cut.npz is damaged or no file of latents", "encode.py --input")
        refused(encode, *flags_of(run.lift, "--decode", "cut.npz"), says=says)
    shutil.copy("cut.npz", "out/latents.npz")
    flags = flags_of(run.lift, "--input", "mine", "--output", "out")
    refused(encode, *flags, says=("out/latents.npz is damaged", "remove it, and run again"))
    (tmp_path / "out/settings.json").unlink()
    refused(encode, *flags, says=("out/latents.npz does not say what made it", "--force"))


# Bad input


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        ([], 2, ("either --input", "or --decode")),
        (["--input", "mine", "--decode", "x.npz"], 2, ("either --input", "or --decode")),
        (["--decode", "x.npz", "--resize"], 2, ("--resize is for images of --input",)),
        (["--input", "mine", "--end", "clean"], 2, ("--solver and --end are for --decode",)),
        (["--input", "mine", "--coarse_from", "x0"], 2, ("--coarse_from",)),
        (["--input", "mine", "--tolerance", 1e-15], 2, ("--tolerance 1e-15 is too small",)),
        (["--input", "mine", "--num_calls", 9], 1, ("An image needs more than 9 network calls", "--tolerance 0.01")),
        (["--input", "mine", "--num_calls", 5], 1, ("--num_calls allows 5",)),
        (["--input", "mine", "--path_type", "dp_64"], 1, ("heatmap_30_2ep.pth",)),
        (["--input", "mine", "--output", "mine"], 1, ("mine is the folder of the input",)),
        (["--input", "mine/a.png", "--output", "mine", "--force"], 1, ("mine is the folder of the input",)),
        (["--input", "mine/a.png", "--output", "a.txt"], 1, ("a.txt is a file, where a folder is needed",)),
        (["--input", "mine", "mine/a.png"], 1, ("--input mine is a folder beside others",)),
        (["--input", "nowhere.png"], 1, ("--input nowhere.png does not exist",)),
        (["--input", "empty"], 1, ("--input empty holds no image", "16x16")),
        (["--input", "mine/a.png", "again/a.png"], 1, ("again/a.png has the name of another image",)),
        (["--input", "odd/wide.png"], 1, ("odd/wide.png", "20x16 and not 16x16", "--resize brings others")),
        (["--input", "odd/float.tiff"], 1, ("odd/float.tiff", "more than 16 bits per value")),
        (["--input", "odd/text.png"], 1, ("odd/text.png cannot be used", "cannot identify it", "16x16 pixels")),
        (["--decode", "nowhere.npz"], 1, ("File of latents nowhere.npz does not exist", "encode.py --input")),
        (["--decode", "mine"], 1, ("File of latents mine is a folder",)),
        (["--checkpoint", "nowhere.pth", "--input", "mine"], 1, ("nowhere.pth",)),
    ],
)
def test_what_makes_no_sense_is_refused(refused, run, given, tmp_path, flags, status, says):
    for name in ("empty", "again", "odd"):
        (tmp_path / name).mkdir()
    save_png(given[1], tmp_path / "again/a.png")
    Image.new("RGB", (20, 16)).save("odd/wide.png")
    Image.fromarray(np.zeros((16, 16), np.float32)).save("odd/float.tiff")
    (tmp_path / "odd/text.png").write_text("text")
    (tmp_path / "a.txt").write_text("mine")
    named = flags_of(run.lift, *flags)
    if "--num_calls" in flags and 9 in flags:  # What was found in the meantime is said in settings.json.
        ended = run_stage(encode, *named)
        assert ended.status == 1 and all(part in ended.message for part in says)
        assert not list((tmp_path / "results").rglob("*.png"))
        return
    refused(encode, *named, says=says, status=status)


@pytest.mark.parametrize("kind", ["single_t", "no_t"])
def test_models_that_follow_no_equation_are_refused(refused, others, given, kind):
    says = (others[kind], f"a '{kind}' model", "reads 2 scales and predicts 1", "Neither latents nor")
    refused(encode, *flags_of(others[kind], "--input", "mine"), says=says)


def test_other_images_come_to_the_size_and_colours_of_the_model(stage, run, given, tmp_path):
    """Grey and 16-bit ones, and with --resize those of another size, as training brought them there."""
    (tmp_path / "odd").mkdir()
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save("odd/grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save("odd/deep.png")
    Image.fromarray(given[0].permute(1, 2, 0).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()).save(
        "odd/two.png"
    )
    stage(encode, *flags_of(run.lift, "--input", "odd", "--resize", "--output", "out"))
    found = load_latents("out/latents.npz")
    assert found.names == ("deep", "grey", "two") and found.fingerprints[0] == found.fingerprints[1]
    assert torch.equal(found.scales[0][0], found.scales[0][1])
    assert found.fingerprints[1] == fingerprint_array(np.broadcast_to(grey, (3, 16, 16)))


def test_broken_networks_are_refused(run, given, tmp_path):
    content = torch.load(run.baseline, weights_only=True)
    for tensor in content["model_state"].values():
        tensor *= np.nan
    torch.save(content, tmp_path / "nan.pth")
    ended = run_stage(encode, *flags_of("nan.pth", "--input", "mine", "--output", "out"))
    assert ended.status == 1 and "makes an image NaN or infinite" in ended.message
    assert not list((tmp_path / "out").glob("*.png"))


def test_help_shows_the_commands(stage):
    output = stage(encode, "--help").output
    assert output.startswith("usage: encode.py") and encode.__doc__.strip().splitlines()[0] in output
