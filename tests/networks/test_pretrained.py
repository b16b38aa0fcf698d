"""Exported models: what a folder holds, that it gives the model back, and what is refused."""

import copy
import hashlib
import importlib.util
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin
from safetensors import safe_open

import export
import train_baseline
from checkpoint import MODEL_CLASSES, build_model, load_model, save_checkpoint, weights_fingerprint
from conftest import ROOT
from data import read_png, to_uint8
from diffusion.sampler import image_seeds, sample_seeds, scale_shapes
from networks import pretrained
from paths.families import diagonal, log_snr_shift
from paths.path import Path as SamplingPath
from paths.schedule_file import save_schedule
from scheduler import DDIMScheduler

ALONE = ["model.pt2", "noise.pt", "sample.py", "schedule.json"]
LOADED = ["config.json", "model.safetensors"]
FILES = sorted(["README.md", *LOADED, *ALONE])


def config(model_type="dual", **changes):
    return {
        "model_type": model_type,
        "hidden_dims": [8, 16],
        "channels": 3,
        "data_fingerprint": "0123456789abcdef",
        "num_train_timesteps": 1000,
        "dataset": "huggan/AFHQv2",
        "resolution": 16,
        "resize_filter": "bilinear",
        "limit": None,
        "skip_bad_images": False,
        "beta_schedule": "cosine_clipped",
        "prediction_type": "epsilon",
        "flip": True,
        "epochs": 400,
        "batch_size": 64,
        "lr": 1e-4,
        "lr_schedule": "constant",
        "weight_decay": 0.01,
        "grad_clip": 1.0,
        "ema_decay": 0.9999,
        "ema_rampup_ratio": 0.05,
        "seed": 42,
        "precision": "bf16",
    } | changes


def content(model_type="dual", ema=True, seed=0, **changes):
    torch.manual_seed(seed)
    state = build_model(config(model_type, **changes)).state_dict()
    ema_state = {name: value * 0.5 for name, value in state.items()} if ema else None
    return {
        "model_state": state,
        "ema_state": ema_state,
        "config": config(model_type, **changes),
        "epoch": 300,
        "step": 12345,
    }


@pytest.fixture(autouse=True)
def program(request, monkeypatch):
    """Tests that run no program do without, since exporting takes seconds; those that do name this fixture."""
    if "program" not in inspect.signature(request.function).parameters:
        monkeypatch.setattr(export, "program_bytes", lambda *args: b"program")


@pytest.fixture
def exported(stage, tmp_path):
    """`exported(model_type, ...)`: the folder of an exported model."""

    def run(model_type="dual", *flags, out=None, **changes) -> Path:
        checkpoint, folder = tmp_path / f"{model_type}.pth", out or tmp_path / "exports" / model_type
        save_checkpoint(checkpoint, content(model_type, **changes))
        stage(export, checkpoint, folder, *flags)
        return folder

    return run


@pytest.fixture(scope="session")
def intact(stage, tmp_path_factory):
    """An exported dual model, to be copied."""
    folder = tmp_path_factory.mktemp("export")
    save_checkpoint(folder / "dual.pth", content())
    stage(export, folder / "dual.pth", folder / "dual")
    return folder / "dual"


@pytest.fixture
def folder(intact, tmp_path):
    """A copy of an exported dual model."""
    return shutil.copytree(intact, tmp_path / "dual")


# What a script can sample from noise alone.
IMAGE_MAKERS = [name for name, kind in MODEL_CLASSES.items() if not kind.coarse_given]


def inputs(model_type):
    g = torch.Generator().manual_seed(1)
    x_64, x_32 = torch.randn(2, 3, 16, 16, generator=g), torch.randn(2, 3, 8, 8, generator=g)
    t_64, t_32 = torch.randint(1000, (2, 2), generator=g)
    return {
        "baseline": (x_64, t_64),
        "dual": (x_64, x_32, t_64, t_32),
        "shared_t": (x_64, x_32, t_64),
        "cascade": (x_64, x_32, t_64, t_32),
        "single_t": (x_64, x_32, t_64),
        "no_t": (x_64, x_32),
    }[model_type]


def read_json(file: Path):
    return json.loads(file.read_text())


def change_config(folder: Path, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(read_json(file) | changes))


# What comes back


@pytest.mark.parametrize("model_type", MODEL_CLASSES)
@pytest.mark.parametrize("ema", [False, True])
def test_a_model_comes_back_as_it_was(exported, model_type, ema):
    folder = exported(model_type, *["--ema"] * ema)
    state = content(model_type)["ema_state" if ema else "model_state"]
    model = MODEL_CLASSES[model_type].from_pretrained(folder)
    assert type(model) is MODEL_CLASSES[model_type] and not model.training
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    expected = build_model(config(model_type))
    expected.load_state_dict(state)
    with torch.no_grad():
        got, wanted = (torch.cat([x.flatten() for x in m(*inputs(model_type))]) for m in (model, expected.eval()))
    assert torch.equal(got, wanted) and got.std() > 0
    assert model.config == read_json(folder / "config.json")


def test_both_orders_of_the_arguments_are_one_export(stage, tmp_path):
    save_checkpoint(tmp_path / "model.pth", content())
    ended = stage(export, tmp_path / "model.pth", "--ema", tmp_path / "a")
    stage(export, tmp_path / "model.pth", tmp_path / "b", "--ema")
    stage(export, tmp_path / "model.pth", tmp_path / "raw")
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == FILES
    a, b, raw = ([(tmp_path / out / name).read_bytes() for name in FILES] for out in ("a", "b", "raw"))
    same_weights = [name for name, x, y in zip(FILES, a, b, strict=True) if x == y]
    assert same_weights == FILES
    independent = {"model.pt2", "noise.pt", "sample.py"}
    assert {name for name, x, y in zip(FILES, a, raw, strict=True) if x == y} == independent
    parameters = sum(value.numel() for value in content()["model_state"].values())
    assert ended.output == (
        f"LIFTDualTimestepModel with {parameters:,} parameters, ema weights of epoch 300, in {tmp_path / 'a'}: "
        "model.safetensors, config.json, README.md, and for PyTorch alone model.pt2, schedule.json, noise.pt, "
        f"sample.py; path diagonal {diagonal(18).fingerprint()}\n"
    )


@pytest.mark.parametrize("model_type", ["baseline", "dual"])
def test_the_config_holds_what_sampling_needs_and_the_training(exported, model_type):
    folder = exported(model_type, "--ema")
    weights = (folder / "model.safetensors").read_bytes()
    assert read_json(folder / "config.json") == config(model_type) | {
        "class_name": MODEL_CLASSES[model_type].__name__,
        "num_scales": MODEL_CLASSES[model_type].num_scales,
        "num_predictions": MODEL_CLASSES[model_type].num_predictions,
        "epoch": 300,
        "step": 12345,
        "weights": "ema",
        "weights_fingerprint": weights_fingerprint(content(model_type)["ema_state"]),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == content(model_type)["ema_state"].keys()


def test_files_are_as_readable_as_others(exported, tmp_path):
    (tmp_path / "other").touch()
    folder = exported()
    assert {(folder / name).stat().st_mode for name in FILES} == {(tmp_path / "other").stat().st_mode}


def test_no_place_of_files_is_told(exported, tmp_path, monkeypatch):
    images = tmp_path / "private" / "cats64"
    images.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for k, dataset in enumerate([str(images), "private/cats64", "../gone/cats64", "/gone/cats64"]):
        folder = exported(out=tmp_path / "exports" / str(k), dataset=dataset, cache_dir=str(tmp_path))
        assert read_json(folder / "config.json")["dataset"] == "cats64"
        for name in FILES:
            told = (folder / name).read_bytes()
            assert str(tmp_path).encode() not in told and b"private" not in told and b"gone" not in told
    for dataset in ("huggan/AFHQv2", "synthetic", "mnist"):
        assert export.public_dataset_name(dataset) == dataset


def test_the_mixin_changes_nothing_else():
    for model_type, model_class in MODEL_CLASSES.items():
        more = {} if model_type == "baseline" else {"representation": "overcomplete"}
        more |= {"network": "unet", "num_classes": 0, "learned_variance": False}
        assert list(inspect.signature(model_class).parameters) == ["hidden_dims", "channels", *more]
        model = build_model(config(model_type, channels=1))
        assert model.state_dict().keys() == content(model_type)["model_state"].keys()
        assert model.config == {"hidden_dims": (8, 16), "channels": 1} | more
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is model_class and other.config == model.config
            assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


# The hub


def test_a_model_that_was_never_exported_is_saved_too(tmp_path):
    model_class = MODEL_CLASSES["single_t"]
    model = model_class(hidden_dims=(8, 24), channels=1)
    model.save_pretrained(tmp_path / "model", config={"note": "mine"})
    again = model_class.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert again.config == model.config | {"hidden_dims": [8, 24]}
    assert again.config["class_name"] == "SingleTimestepModel" and again.config["note"] == "mine"
    assert ModelCard.load(tmp_path / "model" / "README.md").data.tags == ["model_hub_mixin", "pytorch_model_hub_mixin"]


@pytest.fixture
def hub(monkeypatch):
    """What is pushed lands in this dict of repositories, each a dict of files."""
    uploads = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **kwargs):
            uploads[repo_id] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    return uploads


def test_what_is_pushed_is_what_was_exported(exported, hub, tmp_path):
    folder = exported("shared_t", "--ema")
    model = MODEL_CLASSES["shared_t"].from_pretrained(folder)
    files = {name: (folder / name).read_bytes() for name in FILES}
    model.push_to_hub("me/lift")
    model.save_pretrained(tmp_path / "copy", push_to_hub=True, repo_id="me/copy")
    for repo in ("me/lift", "me/copy"):
        card = hub[repo].pop("README.md").decode()
        assert hub[repo] == {name: files[name] for name in LOADED}
        # What PyTorch alone needs is pushed as the folder that export.py wrote, and not by a model.
        assert card.partition("## Sampling")[0] == files["README.md"].decode().partition("## Sampling")[0]
        assert "sample.py" not in card and "LIFTBaselineModel.from_pretrained(" in card


def test_changed_weights_do_not_claim_the_old_training(exported, tmp_path):
    model_class = MODEL_CLASSES["baseline"]
    model = model_class.from_pretrained(exported("baseline"))
    with torch.no_grad():
        model.unet.stem.bias.add_(1)
    model.save_pretrained(tmp_path / "changed")
    again = model_class.from_pretrained(tmp_path / "changed")
    assert torch.equal(again.unet.stem.bias, model.unet.stem.bias)
    assert again.config.keys() == {*pretrained.MODEL_KEYS, "class_name", "weights_sha256"}
    assert "How these weights were trained is not recorded." in (tmp_path / "changed" / "README.md").read_text()


def test_a_card_that_exists_is_not_overwritten_by_save_pretrained(folder):
    (folder / "README.md").write_text("mine")
    MODEL_CLASSES["dual"].from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    MODEL_CLASSES["dual"].from_pretrained(folder)


def test_a_hub_id_is_downloaded(folder, monkeypatch):
    asked = []

    def snapshot_download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(folder)

    monkeypatch.setattr(pretrained, "snapshot_download", snapshot_download)
    model = MODEL_CLASSES["dual"].from_pretrained("me/lift", revision="v1", token="secret")
    assert weights_fingerprint(model.state_dict()) == model.config["weights_fingerprint"]
    [(args, kwargs)] = asked
    assert args == ("me/lift",) and sorted(kwargs["allow_patterns"]) == LOADED
    assert (kwargs["revision"], kwargs["token"], kwargs["local_files_only"]) == ("v1", "secret", False)


# What is refused when reading


@pytest.mark.parametrize("model_type", MODEL_CLASSES)
def test_another_model_is_refused_by_name(exported, model_type):
    folder, name = exported(model_type), MODEL_CLASSES[model_type].__name__
    for other in MODEL_CLASSES.values():
        if other.__name__ != name:
            message = f"^{re.escape(str(folder))} holds a {name}, not a {other.__name__}; load it with {name}.from_"
            with pytest.raises(ValueError, match=message):
                other.from_pretrained(folder)


@pytest.mark.parametrize("name", ["exports/none", "none", "/none/at/all", "../none"])
def test_a_folder_that_does_not_exist_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^'{name}' is not a folder, and the hub gave no model of that name"):
        MODEL_CLASSES["dual"].from_pretrained(name)


@pytest.mark.parametrize("name", LOADED)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"^{re.escape(str(folder))} lacks {name}; "):
        MODEL_CLASSES["dual"].from_pretrained(folder)


def damage_flip(weights):
    middle = len(weights) // 2
    return weights[:middle] + bytes([weights[middle] ^ 1]) + weights[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda w: b"", lambda w: w[:5], lambda w: w[:-1], lambda w: w + b"\0", lambda w: b"text", damage_flip]
)
def test_damaged_weights_are_refused(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not the weights of its config\.json; "):
        MODEL_CLASSES["dual"].from_pretrained(folder)


def test_weights_of_another_export_are_refused(exported, tmp_path):
    folder, other = exported(out=tmp_path / "a"), exported("dual", "--ema", out=tmp_path / "b")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"is damaged or not the weights of its config\.json"):
        MODEL_CLASSES["dual"].from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_dims": [8, 24]},
        {"hidden_dims": [8, 16, 16]},
        {"hidden_dims": [7]},
        {"hidden_dims": 8},
        {"hidden_dims": "8,16"},
        {"channels": 1},
        {"channels": "three"},
        {"weights_sha256": hashlib.sha256(b"text").hexdigest()},
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(folder, changes):
    change_config(folder, **changes)
    if "weights_sha256" in changes:
        (folder / "model.safetensors").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the model that its config\.json describes"):
        MODEL_CLASSES["dual"].from_pretrained(folder)


@pytest.mark.parametrize("missing, extra", [(True, False), (False, True), (True, True)])
def test_weights_are_loaded_strictly(folder, missing, extra):
    state = content()["model_state"]
    if missing:
        state.pop("combine.0.weight")
    if extra:
        state["extra"] = torch.zeros(1)
    weights = pretrained.save(state)
    (folder / "model.safetensors").write_bytes(weights)
    change_config(folder, weights_sha256=hashlib.sha256(weights).hexdigest())
    with pytest.raises(ValueError, match="does not fit the model"):
        MODEL_CLASSES["dual"].from_pretrained(folder)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", r"config\.json is damaged \("),
        ("", r"config\.json is damaged \("),
        (
            "[]",
            r"config\.json is not that of a LIFT model: it lacks class_name, hidden_dims, channels, weights_sha256\.",
        ),
        ('{"architectures": ["ViT"], "channels": 3}', "it lacks class_name, hidden_dims, weights_sha256"),
    ],
)
def test_other_configs_are_refused(folder, text, says):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        MODEL_CLASSES["dual"].from_pretrained(folder)


def test_models_work_without_the_libraries(tmp_path):
    code = """
import sys
sys.modules["huggingface_hub"] = None
import torch, baseline_model, model
torch.set_num_threads(1)
x, t = torch.zeros(1, 3, 16, 16), torch.zeros(1)
baseline = baseline_model.BaselineModel((8, 16))
assert baseline(x, t).shape == x.shape
dual = model.LIFTDualTimestepModel((8, 16))
assert dual(x, x[..., :8, :8], t, t)[1].shape == (1, 3, 8, 8)
for call in (lambda: type(dual).from_pretrained("."), lambda: baseline.save_pretrained("out"),
             lambda: baseline.push_to_hub("me/lift")):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [said] = set(done.stdout.splitlines())
    assert said.startswith("Folders of models need huggingface_hub and safetensors, and one is missing (")
    assert len(done.stdout.splitlines()) == 3 and "huggingface_hub" in said.partition("(")[2]
    assert not list(tmp_path.iterdir())


# What is refused when writing


def test_an_existing_export_is_left_alone(exported, refused, tmp_path):
    folder = exported()
    refused(export, tmp_path / "dual.pth", "--ema", folder, says=[folder, "--force"])
    (folder / "config.json").unlink()
    refused(export, tmp_path / "dual.pth", "--ema", folder, says=[folder, "--force"])


def test_force_replaces_an_export_and_nothing_else(exported, stage, tmp_path):
    folder = exported()
    (folder / "samples.png").write_bytes(b"png")
    save_checkpoint(tmp_path / "other.pth", content("no_t", seed=1))
    stage(export, tmp_path / "other.pth", folder, "--force")
    model = MODEL_CLASSES["no_t"].from_pretrained(folder)
    assert weights_fingerprint(model.state_dict()) == load_model(tmp_path / "other.pth").fingerprint
    assert "# NoTimestepModel, 16×16" in (folder / "README.md").read_text()
    assert sorted(file.name for file in folder.iterdir()) == sorted([*FILES, "samples.png"])


def test_force_does_not_replace_files_that_are_no_export(refused, tmp_path):
    save_checkpoint(tmp_path / "dual.pth", content())
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README.md").write_text("about something else")
    for flags in ([], ["--force"]):
        refused(export, tmp_path / "dual.pth", folder, *flags, says=[folder, "another OUT"])
    (folder / "config.json").write_text('{"architectures": ["ViT"]}')
    refused(export, tmp_path / "dual.pth", folder, "--force", says=[folder, "no config.json of an export"])
    refused(export, tmp_path / "dual.pth", folder / "README.md", "--force", says=["README.md is a file"])


def test_an_empty_folder_or_a_new_repository_is_fine(exported, tmp_path):
    (tmp_path / "out" / ".git").mkdir(parents=True)
    (tmp_path / "out" / ".gitattributes").touch()
    MODEL_CLASSES["dual"].from_pretrained(exported(out=tmp_path / "out"))


@pytest.mark.parametrize("failing", FILES)
@pytest.mark.parametrize("force", [False, True])
def test_a_failing_write_changes_nothing(folder, refused, tmp_path, monkeypatch, failing, force):
    save_checkpoint(tmp_path / "no_t.pth", content("no_t"))
    out = folder if force else tmp_path / "new"
    write = Path.write_bytes

    def fail(file, content):
        if file.suffix == Path(failing).suffix:
            write(file, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        write(file, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    refused(export, tmp_path / "no_t.pth", out, *["--force"] * force, says=["No space left on device"])
    monkeypatch.undo()
    MODEL_CLASSES["dual"].from_pretrained(folder)


def test_bad_checkpoints_end_with_one_sentence(refused, tmp_path):
    out, file = tmp_path / "out", tmp_path / "model.pth"
    refused(export, file, out, says=["model.pth does not exist"])
    file.write_bytes(b"text")
    refused(export, file, out, says=["model.pth is damaged or not a checkpoint"])
    save_checkpoint(file, content(ema=False))
    refused(export, file, out, "--ema", says=["model.pth holds no EMA weights"])
    broken = content()
    del broken["config"]["resolution"]
    save_checkpoint(file, broken)
    refused(export, file, out, says=["model.pth does not say its resolution"])
    refused(export, file, says=["OUT"], status=2)
    assert not out.exists()


# The card


def test_the_card_says_how_the_model_was_trained(exported):
    regime = {"t_pairs": "band:2", "t_pairs_points": None, "loss_weights": [1.0, 0.25], "min_snr_gamma": 5.0}
    folder = exported("dual", "--ema", limit=5000, dataset="huggan/AFHQv2", **regime)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "lift" and card.data.pipeline_tag == "unconditional-image-generation"
    assert {"diffusion", "pytorch_model_hub_mixin"} <= set(card.data.tags)
    assert card.data.license is None
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.MULTILINE))
    assert rows == {
        "images": "`huggan/AFHQv2`, resized and cropped at the centre to 16×16",
        "number of images": "the first 5000",
        "mirrored at random": "yes",
        "epochs": "300 of 400, 12,345 steps",
        "batch size": "64",
        "optimizer": "AdamW, learning rate 0.0001 (constant), weight decay 0.01",
        "gradient clip": "norm 1",
        "pairs of timesteps": "band:2",
        "weights of the losses, fine and coarse": "1, 0.25",
        "min-SNR weights of the timesteps": "gamma 5",
        "EMA": "decay 0.9999 per step, half-life at most 0.05 of the steps",
        "precision": "bf16",
        "seed": "42",
        "weights in this folder": "EMA",
        "fingerprint of the weights": f"`{weights_fingerprint(content()['ema_state'])}`",
        "fingerprint of the images": "`0123456789abcdef`",
    }
    parameters = sum(value.numel() for value in content()["model_state"].values())
    prose = " ".join(card.text.split())
    assert f"It has {parameters:,} parameters (`hidden_dims` 8, 16) and predicts the noise on the" in prose
    assert "denoises images of 16×16 and 8×8 together, each with its own timestep." in prose


def test_the_card_says_how_images_came_to_their_size(exported):
    folder = exported("baseline", dataset="digits", pad="black")
    assert "| images | `digits`, padded with black to 16×16 |" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["pad"] == "black"


def test_the_card_of_one_loss_says_no_weights_of_it(exported):
    text = (exported("baseline", loss_weights=[1.0]) / "README.md").read_text()
    assert "weights of the losses" not in text and "| batch size | 64 |" in text and "| seed | 42 |" in text


@pytest.mark.parametrize("model_type", MODEL_CLASSES)
def test_every_card_describes_its_model(exported, model_type):
    changes = {"dataset": "synthetic", "flip": False, "ema_decay": 0.0}
    folder = exported(model_type, **changes)
    text = (folder / "README.md").read_text()
    assert "| images | `synthetic`, drawn by LIFT at 16×16 |" in text and "| EMA | none |" in text
    assert f"# {MODEL_CLASSES[model_type].__name__}, 16×16" in text
    assert "number of images" not in text and "| mirrored at random | no |" in text
    assert "| weights in this folder | raw |" in text
    assert ("only kind of path" in text) == (model_type in ("baseline", "shared_t"))
    for said in ("2×2 mean", "does not predict it", "- In training the coarse image was"):
        assert (said in " ".join(text.split())) == (model_type in ("single_t", "no_t"))
    given = "- It makes no image from noise alone: it enlarges images of 8×8, clean or with noise of a timestep"
    assert (given in " ".join(text.split())) == (model_type == "cascade")
    if model_type in IMAGE_MAKERS:
        assert max(map(len, snippet(folder).splitlines())) <= 120
    # A field that was not filled in would be left in braces.
    assert "None" not in text.partition("## Sampling")[0] and not re.search(r"\{\w*\}", text)


def snippet(folder: Path) -> str:
    [code] = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return code


def test_a_stage_of_a_cascade_is_exported_without_a_script(exported):
    folder = exported("cascade", "--ema")
    assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert "sample.py" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("model_type", IMAGE_MAKERS)
def test_the_snippet_of_the_card_calls_the_exported_network(program, exported, monkeypatch, model_type):
    folder = exported(model_type, "--ema")
    monkeypatch.chdir(folder)
    xs = inputs(model_type)[: MODEL_CLASSES[model_type].num_scales]
    ts = [torch.tensor([5, 900]), torch.tensor([70, 3])]
    # One clock reads the fine timestep.
    names = {"x": xs[0], "t": ts[0], "x_16": xs[0], "x_8": xs[-1], "t_16": ts[0], "t_8": ts[-1]}
    exec(compile(snippet(folder), "README.md", "exec"), names)
    found = [names[name] for name in ("prediction", "fine", "coarse") if name in names]
    model = build_model(config(model_type)).eval()
    model.load_state_dict(content(model_type)["ema_state"])
    with torch.no_grad():
        expected = model.denoise(tuple(xs), (ts[0], ts[0]) if model_type == "shared_t" else tuple(ts))
    assert len(found) == len(expected) == model.num_predictions
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_model_with_classes_comes_back_with_them_and_its_program_is_of_the_null_class(program, exported):
    names = ["bird", "big\ncat", "dog"]
    folder = exported("baseline", class_names=names, label_dropout=0.1)
    model = MODEL_CLASSES["baseline"].from_pretrained(folder)
    assert model.num_classes == 3 and model.config["class_names"] == names
    state = content("baseline", class_names=names)["model_state"]
    assert torch.equal(model.embed_class.table.weight, state["embed_class.table.weight"])
    x, t = inputs("baseline")
    with torch.no_grad():
        [found] = torch.export.load(folder / "model.pt2").module()([x], [t])
        without, told = (model.denoise((x,), (t,), *labels)[0] for labels in ((), (torch.tensor([1, 1]),)))
    torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-6)
    assert (found - told).abs().max() > 1e-3
    card = (folder / "README.md").read_text()
    assert "told of 3 classes in training (bird, big cat, dog)" in card
    assert "| images whose class was not told | 10% |" in card
    text = " ".join(card.split())
    assert "`model.pt2` and `sample.py` are of the null class" in text and "- It is unconditional" not in text


# With PyTorch alone


def load_script(folder):
    """The exported script as a module."""
    spec = importlib.util.spec_from_file_location("exported_sample", folder / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(folder, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
    load_script(folder).main()


def assert_those_of_lift(folder, model_type, path, seeds, settings, channels=3, **changes):
    """The PNGs in a folder are those that the sampler of this project makes, up to one grey level."""
    model = build_model(config(model_type, channels=channels, **changes)).eval()
    model.load_state_dict(content(model_type, channels=channels, **changes)["ema_state"])
    scheduler = DDIMScheduler(**settings)
    feed = "x0" if model_type in ("single_t", "no_t") else None
    shapes = scale_shapes(model.num_scales, channels, 16)
    arguments = (model.denoise, scheduler, path(model, scheduler), list(seeds), shapes, len(seeds))
    [(_, samples)] = sample_seeds(*arguments, coarse_from=feed)
    expected = to_uint8(samples.images[0])
    assert sorted(file.name for file in folder.iterdir()) == [f"{seed:012d}.png" for seed in seeds]
    for seed, image in zip(seeds, expected, strict=True):
        found = read_png(folder / f"{seed:012d}.png")
        assert (found.int() - image.int()).abs().max() <= 1
    assert expected.float().std() > 8


EPSILON = {"beta_schedule": "cosine_clipped", "prediction_type": "epsilon"}
VELOCITY = {"beta_schedule": "linear", "prediction_type": "v"}
CLEAN_IMAGE = {"beta_schedule": "cosine_zero_terminal", "prediction_type": "x0"}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("baseline", EPSILON),
        ("baseline", CLEAN_IMAGE),
        ("dual", VELOCITY),
        ("shared_t", EPSILON),
        ("single_t", CLEAN_IMAGE),
        ("single_t", EPSILON),
        ("no_t", VELOCITY),
    ],
)
def test_the_exported_script_samples_what_lift_samples(program, exported, monkeypatch, tmp_path, model_type, settings):
    folder = exported(model_type, "--ema", "--num_steps", 5, **settings)
    run_script(folder, monkeypatch, "--output", tmp_path / "stored")
    run_script(folder, monkeypatch, "--output", tmp_path / "others", "--seeds", 3, 11)

    def path(model, scheduler):
        return diagonal(5, num_scales=model.num_scales)

    for place, seeds in (("stored", image_seeds(42, 8)), ("others", (3, 11))):
        assert_those_of_lift(tmp_path / place, model_type, path, seeds, settings)


@pytest.mark.parametrize("channels", [1, 3])
def test_residual_pairs_and_schedules_of_two_clocks(program, exported, monkeypatch, tmp_path, channels):
    settings = {"beta_schedule": "cosine", "prediction_type": "v", "representation": "residual"}
    changes = {"representation": "residual", "channels": channels}
    folder = exported("dual", "--ema", **settings | changes)

    def image_diagonal(model, scheduler):
        return log_snr_shift(diagonal(18), np.log(4), scheduler.log_snr.numpy())

    run_script(folder, monkeypatch, "--output", tmp_path / "tied")
    assert_those_of_lift(tmp_path / "tied", "dual", image_diagonal, image_seeds(42, 8), settings, **changes)
    two_clocks = SamplingPath(((999, 999), (999, 700), (600, 300), (250, 300), (80, 0), (0, 0)), "by hand", {})
    table = DDIMScheduler(**settings).log_snr.numpy()
    save_schedule(two_clocks, tmp_path / "s.json", table, {"name": "ddim", "eta": 0.0, "end": "clean"})
    run_script(folder, monkeypatch, "--output", tmp_path / "apart", "--schedule", tmp_path / "s.json")
    assert_those_of_lift(tmp_path / "apart", "dual", lambda *_: two_clocks, image_seeds(42, 8), settings, **changes)


def test_a_schedule_may_end_at_the_last_noise_and_may_not_draw_any(program, exported, monkeypatch, tmp_path):
    folder, path = exported("baseline", "--ema"), diagonal(4, num_scales=1)
    table = DDIMScheduler().log_snr.numpy()
    save_schedule(path, tmp_path / "t0.json", table, {"name": "ddim", "eta": 0.0, "end": "t0"})
    save_schedule(path, tmp_path / "eta.json", table, {"name": "ddim", "eta": 1.0, "end": "clean"})
    save_schedule(diagonal(4), tmp_path / "two.json", table, {"name": "ddim", "eta": 0.0, "end": "clean"})
    run_script(folder, monkeypatch, "--schedule", tmp_path / "t0.json", "--output", tmp_path / "t0", "--seeds", 5)
    model = build_model(config("baseline")).eval()
    model.load_state_dict(content("baseline")["ema_state"])
    [(_, samples)] = sample_seeds(model.denoise, DDIMScheduler(), path, [5], [(3, 16, 16)], 1, end="t0")
    found = read_png(tmp_path / "t0/000000000005.png").int()
    assert (found - to_uint8(samples.images[0])[0].int()).abs().max() <= 1
    for name in ("eta", "two"):
        with pytest.raises(SystemExit, match="another kind of model, or of a solver"):
            run_script(folder, monkeypatch, "--schedule", tmp_path / f"{name}.json", "--output", tmp_path / name)


def test_the_script_needs_nothing_but_pytorch(program, exported, tmp_path):
    folder = exported("dual", "--ema", "--num_steps", 3)
    # What a user may have in the same place.
    (folder / "model.py").write_text("raise RuntimeError('the wrong model.py')\n")
    (folder / "scheduler.py").write_text("raise RuntimeError('the wrong scheduler.py')\n")
    block = "import sys, runpy; sys.modules |= dict.fromkeys(['numpy', 'PIL', 'torchvision', 'safetensors', 'scipy']); "
    block += "sys.path[0] = '.'; sys.argv = ['sample.py', '--seeds', '42000000', '9', '9000']; "
    block += "runpy.run_path('sample.py', run_name='__main__'); "
    block += "print(sorted(name for name in sys.modules if name in ('model', 'scheduler', 'diffusion', 'runtime')))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    names = sorted(file.name for file in (folder / "samples").iterdir())
    assert names == ["000000000009.png", "000000009000.png", "000042000000.png"]
    # Without NumPy seeds that are not stored make other images, from noise of PyTorch.
    (folder / "samples/000000000009.png").unlink()
    (folder / "samples/000000009000.png").unlink()
    path = lambda *_: diagonal(3)  # noqa: E731
    settings = {"beta_schedule": "cosine_clipped", "prediction_type": "epsilon"}
    assert_those_of_lift(folder / "samples", "dual", path, [42000000], settings)


@pytest.mark.parametrize("flags", [["--preset", "flow"], ["--preset", "improved", "--prediction_type", "velocity"]])
def test_what_the_script_does_not_know_is_not_exported(stage, refused, tiny, tmp_path, flags):
    stage(train_baseline, *tiny(tmp_path / "run"), *flags)
    [file] = (tmp_path / "run").rglob("baseline_2ep.pth")
    refused(export, file, tmp_path / "export", says=("sample.py knows vp", "velocity"))
