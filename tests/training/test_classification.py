"""Classifiers in training: what is minimised, what is measured, exact resume, and stages that take none."""

import json
import math

import numpy as np
import pytest
import torch

import compute_heatmap_30
import compute_trajectories
import encode
import eval_fid_batch
import export
import generate_with_path_30
import train_classifier
import train_lift
from checkpoint import load_classifier, load_model, read_checkpoint
from conftest import assert_same
from data import to_float
from scheduler import DDIMScheduler
from training.classification import CLEAN_NAME, MEASURED, Classification, accuracies, measured_rows
from training.objective import Denoising, TrainingBatch
from training.settings import TrainingSettings

CONFIG = {"t_pairs": None, "t_pairs_points": None}
SCHEDULER = DDIMScheduler(1000, "linear", "x0")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=6):
    x = torch.rand(count, 1, 4, 4, generator=rng(1)) * 2 - 1
    return x, torch.nn.functional.avg_pool2d(x, 2), torch.arange(count) % 3


# What a step shows and minimises


def test_cross_entropy_and_accuracy_of_known_logits():
    x, x_32, labels = images()
    logits = torch.randn(6, 3, generator=rng(2), dtype=torch.float64)
    seen = {}

    def classify(xs, ts):
        seen.update(xs=xs, ts=ts)
        return logits

    objective = Classification(CONFIG, SCHEDULER)
    batch = objective.draw(x, x_32, rng(3), labels=labels)
    losses = objective.losses(classify, batch)
    rows = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    by_hand = -np.log(rows[np.arange(6), labels.numpy()])
    np.testing.assert_allclose(losses["cross_entropy"], by_hand, rtol=1e-6)
    assert losses["accuracy"].tolist() == (rows.argmax(1) == labels.numpy()).tolist()
    assert objective.minimised(losses, batch).item() == pytest.approx(by_hand.mean(), rel=1e-6)
    for shown, clean, noise, t in zip(seen["xs"], (x, x_32), (batch.noise_64, batch.noise_32), seen["ts"], strict=True):
        assert torch.allclose(shown, SCHEDULER.add_noise(clean, noise, t))
    assert torch.equal(batch.clock("cross_entropy"), batch.t_64) and torch.equal(batch.labels, labels)


@pytest.mark.parametrize("law", ["uniform", "log_normal", "importance"])
def test_images_noise_and_timesteps_are_those_of_the_training_of_models(law):
    x, x_32, labels = images()
    config = CONFIG | {"t_law": law, "times": "real", "loss_weights": [1.0]}
    told = config | {"class_names": ["a", "b", "c"], "label_dropout": 0.5}
    ours = Classification(config, SCHEDULER).draw(x, x_32, rng(3), labels=labels)
    theirs = Denoising(told, SCHEDULER).draw(x, x_32, rng(3), labels=labels)
    assert_same(ours._replace(labels=None), theirs._replace(labels=None))


def test_an_image_counts_for_how_it_was_drawn():
    objective = Classification(CONFIG, SCHEDULER)
    zeros = torch.zeros(2)
    batch = TrainingBatch(*[zeros] * 6, share=torch.tensor([1.0, 3.0]), labels=torch.tensor([0, 1]))
    assert objective.minimised({"cross_entropy": torch.tensor([5.0, 2.0])}, batch) == (5 + 6) / 2


def test_accuracy_by_timestep_of_a_rule_that_is_right_below_one():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 1, 4, 4), np.uint8)
    truth = np.arange(7) % 2
    answers = torch.tensor(truth)
    shown = {}

    def classify(xs, ts):
        t, start = int(ts[0][0]), shown.setdefault("start", 0)
        shown.setdefault((t, start), []).append(xs)
        right = answers[start : start + len(xs[0])] if t < 500 else 1 - answers[start : start + len(xs[0])]
        if t == 999:
            shown["start"] = (start + len(xs[0])) % 7
        return torch.nn.functional.one_hot(right, 2).float()

    found = accuracies(classify, SCHEDULER, pixels, truth, seed=0, batch_size=4)
    assert list(found)[:2] == [CLEAN_NAME, "0"] and list(found)[-1] == "999" and len(found) == 12
    assert all(value == (0.0 if name != CLEAN_NAME and int(name) >= 500 else 1.0) for name, value in found.items())
    # The first of both calls at t = 0 shows the images themselves.
    assert torch.equal(shown[0, 0][0][0], to_float(torch.from_numpy(pixels[:4])))
    assert not torch.equal(shown[0, 0][1][0], shown[0, 0][0][0])
    other = {}
    accuracies(lambda xs, ts: other.setdefault(len(other), xs)[0][:, 0, 0, :2], SCHEDULER, pixels, truth, 0, 4)
    assert torch.equal(other[1][0], shown[0, 0][1][0])
    # However many are shown at once.
    wider = {}
    accuracies(lambda xs, ts: wider.setdefault(len(wider), xs)[0][:, 0, 0, :2], SCHEDULER, pixels, truth, 0, 7)
    assert torch.equal(wider[1][0][:4], other[1][0]) and torch.equal(wider[1][0][4:], other[13][0])


def test_accuracy_is_measured_on_so_many_images_at_most():
    assert measured_rows(7).tolist() == list(range(7)) and measured_rows(MEASURED).tolist() == list(range(MEASURED))
    rows = measured_rows(3 * MEASURED)
    assert len(set(rows.tolist())) == MEASURED and (rows[0], rows[-1]) == (0, 3 * MEASURED - 1)
    assert set(np.diff(rows).tolist()) <= {3, 4}
    truth = np.zeros(2 * MEASURED, np.int64)
    truth[measured_rows(2 * MEASURED)[: MEASURED // 4]] = 1
    found = accuracies(
        lambda xs, ts: torch.tensor([[1.0, 0.0]]).expand(len(xs[0]), 2),
        SCHEDULER, np.zeros((2 * MEASURED, 1, 2, 2), np.uint8), truth, seed=0, batch_size=MEASURED,
    )  # fmt: skip
    assert set(found.values()) == {0.75}


# Runs


def flags(folder, cache, *more):
    words = ["--dataset", "synthetic", "--limit", 120, "--holdout", 30, "--resolution", 16, "--hidden_dims", "8,16"]
    words += ["--batch_size", 30, "--lr", 0.01, "--log_every", 1, "--device", "cpu", "--precision", "fp32"]
    places = ["--output_dir", folder / "checkpoints", "--log_dir", folder / "logs", "--cache_dir", cache]
    return [*words, "--ema_decay", 0.9, *places, *more]


@pytest.fixture(scope="module", params=["classifier", "classifier_pair"])
def trained(request, stage, cache, tmp_path_factory):
    """A run of twelve epochs, its folder and its type."""
    folder, scales = tmp_path_factory.mktemp("classifier"), 1 + (request.param == "classifier_pair")
    more = ("--classes", "animal") if scales == 1 else ()
    stage(train_classifier, *flags(folder, cache, "--scales", scales, "--epochs", 12, "--save_every", 6, *more))
    return folder, request.param


def test_a_run_says_how_often_it_is_right(trained):
    folder, kind = trained
    rows = [json.loads(line) for line in (folder / "logs" / kind / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 36 and all(0 <= row["accuracy"] <= 1 for row in rows)
    assert np.mean([row["cross_entropy"] for row in rows[:3]]) == pytest.approx(math.log(3), abs=0.2)
    assert np.mean([row["cross_entropy"] for row in rows[-6:]]) < np.mean([row["cross_entropy"] for row in rows[:6]])
    for epoch in (6, 12):
        said = json.loads((folder / "logs" / kind / f"accuracy_{epoch}ep.json").read_text())
        assert (said["epoch"], said["images"]) == (epoch, 30) and len(said["accuracy"]) == 12
    assert not list((folder / "logs" / kind).glob("*.png"))


def test_checkpoints_hold_what_others_ask_for(trained):
    folder, kind = trained
    file = folder / f"checkpoints/{kind}_12ep.pth"
    config = read_checkpoint(file)["config"]
    assert config["class_names"] == ["cat", "dog", "wild"] and len(config["labels_fingerprint"]) == 16
    assert (config["channels"], config["resolution"], config["beta_schedule"]) == (3, 16, "cosine_clipped")
    assert config["label_dropout"] is None and config["holdout"] == 30
    loaded = load_classifier(file)
    assert loaded.class_names == ("cat", "dog", "wild")
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert_same(dict(loaded.model.state_dict()), dict(read_checkpoint(file)["ema_state"]))


def test_log_probabilities_sum_to_one(trained):
    folder, kind = trained
    loaded = load_classifier(folder / f"checkpoints/{kind}_12ep.pth")
    xs = torch.randn(2, 3, 16, 16, generator=rng(1)), torch.randn(2, 3, 8, 8, generator=rng(2))
    ts = torch.full((2,), 500), torch.full((2,), 300)
    total = sum(loaded.log_probability(xs, ts, torch.full((2,), k)).exp() for k in range(3))
    assert torch.allclose(total, torch.ones(2), atol=1e-6)


def test_a_run_that_was_stopped_ends_with_the_same_bits(trained, stage, cache, tmp_path):
    folder, kind = trained
    scales = ("--scales", 1 + (kind == "classifier_pair"), "--save_every", 6)
    more = ("--classes", "animal") if kind == "classifier" else ()
    stage(train_classifier, *flags(tmp_path, cache, *scales, "--epochs", 5, *more))
    stage(train_classifier, *flags(tmp_path, cache, *scales, "--epochs", 12, "--resume", *more))
    ours, theirs = (
        read_checkpoint(place / f"checkpoints/{kind}_last.pth") | {"execution": {}, "settings": {}}
        for place in (tmp_path, folder)
    )
    assert_same(ours, theirs)
    for name in ("metrics.jsonl", "accuracy_12ep.json"):
        assert (tmp_path / "logs" / kind / name).read_bytes() == (folder / "logs" / kind / name).read_bytes()
    # A kill between checkpoint and accuracy leaves it to the next run.
    (tmp_path / "logs" / kind / "accuracy_12ep.json").unlink()
    stage(train_classifier, "--resume", tmp_path / "checkpoints", "--cache_dir", cache)
    assert (tmp_path / "logs" / kind / "accuracy_12ep.json").exists()


def test_parts_and_recomputing_change_roundings_alone(stage, cache, tmp_path):
    rows = []
    for more in ((), ("--accumulate", 3, "--recompute")):
        folder = tmp_path / str(len(more))
        stage(train_classifier, *flags(folder, cache, "--epochs", 1, *more))
        log = folder / "logs/classifier/metrics.jsonl"
        rows.append([json.loads(line)["cross_entropy"] for line in log.read_text().splitlines()])
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


def test_it_learns_what_noise_leaves_to_learn(stage, cache, tmp_path):
    """Where there is little noise it is right far more often than by chance, at the last timestep about as often."""
    words = ["--dataset", "synthetic", "--limit", 400, "--holdout", 100, "--resolution", 16, "--hidden_dims", "16,16"]
    words += ["--batch_size", 30, "--lr", 0.01, "--epochs", 16, "--device", "cpu", "--precision", "fp32"]
    words += ["--output_dir", tmp_path / "checkpoints", "--log_dir", tmp_path / "logs", "--cache_dir", cache]
    stage(train_classifier, *words, "--preset", "improved", "--ema_decay", 0.99)
    found = json.loads((tmp_path / "logs/classifier/accuracy_16ep.json").read_text())["accuracy"]
    assert min(found[name] for name in ("clean", "0", "100")) > 0.45
    assert abs(found["999"] - 1 / 3) < 0.12


# What is refused


def test_settings_of_predictions_are_refused():
    with pytest.raises(ValueError, match="predicts no image, to which --label_dropout belongs"):
        TrainingSettings(model_type="classifier", classes="any", label_dropout=0.1)
    with pytest.raises(ValueError, match="--loss_weights belongs"):
        TrainingSettings(model_type="classifier_pair", classes="any", loss_weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="trained on classes"):
        TrainingSettings(model_type="classifier")
    with pytest.raises(ValueError, match="pass --scales 2"):
        TrainingSettings(model_type="classifier", classes="any", t_pairs="same")
    with pytest.raises(ValueError, match="a classifier has none; use band"):
        TrainingSettings(model_type="classifier_pair", classes="any", t_pairs="follow:1")
    settings = TrainingSettings(model_type="classifier_pair", classes="any", representation="residual")
    assert settings.label_dropout is None and settings.loss_weights == (1.0,)
    zero = TrainingSettings(model_type="classifier", classes="any", beta_schedule="cosine_zero_terminal")
    assert zero.prediction_type == "x0"


def test_a_stage_of_models_does_not_train_one(refused, tmp_path, cache):
    refused(train_lift, "--model", "classifier", says=("invalid choice",), status=2)
    refused(train_classifier, "--scales", 3, says=("neither 1 nor 2",), status=2)
    refused(train_classifier, "--prediction_type", "v", says=("unrecognized",), status=2)


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (generate_with_path_30, ()),
        (compute_heatmap_30, ()),
        (compute_trajectories, ()),
        (eval_fid_batch, ("--metrics", "swd")),
        (encode, ("--input", ".")),
        (export, ("out",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_stage_samples_a_classifier(trained, refused, tmp_path, monkeypatch, module, more):
    folder, kind = trained
    monkeypatch.chdir(tmp_path)
    file = folder / f"checkpoints/{kind}_12ep.pth"
    where = [file, *more] if module is export else ["--checkpoint", file, *more, "--device", "cpu"]
    message = refused(module, *where, says=("is a classifier, which makes no images",), keeps=(folder,))
    assert str(file) in message


def test_a_model_is_no_classifier(run, trained):
    with pytest.raises(ValueError, match=r"is no classifier; pass a checkpoint of train_classifier\.py"):
        load_classifier(run.baseline)
    folder, kind = trained
    with pytest.raises(ValueError, match="which makes no images"):
        load_model(folder / f"checkpoints/{kind}_12ep.pth")
    with pytest.raises(FileNotFoundError, match=r"^Classifier .* does not exist; train one with train_classifier"):
        load_classifier(folder / "none.pth")


def test_a_run_of_classifiers_has_nothing_to_score(trained, refused, tmp_path, monkeypatch):
    folder, _ = trained
    monkeypatch.chdir(tmp_path)
    more = ("--checkpoint_dir", folder / "checkpoints", "--model_type")
    refused(eval_fid_batch, *more, "classifier", says=("invalid choice",), status=2)
    refused(eval_fid_batch, *more, "baseline", says=("has no baseline checkpoint",))
