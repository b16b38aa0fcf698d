"""A classifier as the network of scores: what it is shown, and distances, scores and shares that are known."""

import numpy as np
import pytest
import scipy.linalg
import torch

import eval_fid_batch
import train_baseline
import train_classifier
from checkpoint import LoadedClassifier, build_model, build_scheduler, load_classifier
from data import ImageSet, fingerprint_array, load_images, split_holdout, to_float
from evaluation.feature_metrics import accuracy, inception_score
from evaluation.inception import Features, extract
from evaluation.jobs import EvaluationSettings
from evaluation.judge import Judge, load_judge
from evaluation.reference_set import from_images
from evaluation.results_table import METRIC_VALUES, read_rows
from evaluation.scoring import Generated, Scorer, judged, needs_inception
from image_folder import evenly
from images.sources import Classes

NAMES = ("cat", "dog", "wild")
CONFIG = {"hidden_dims": [8, 16], "channels": 3, "resolution": 16, "num_train_timesteps": 1000, "prediction_type": "x0"}
CONFIG |= {"class_names": list(NAMES), "run": "pets"}


def pixels(count, seed=0, size=16, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), np.uint8)


def image_set(array, labels=None, name="data"):
    classes = () if labels is None else (Classes("animal", NAMES, np.asarray(labels)),)
    return ImageSet(array, name, fingerprint_array(array), classes)


def made(kind="classifier", schedule="cosine", **changes):
    config = CONFIG | {"model_type": kind, "beta_schedule": schedule} | changes
    torch.manual_seed(1)
    model = build_model(config).eval().requires_grad_(False)
    return LoadedClassifier(model, build_scheduler(config), config, "0123456789abcdef", None)


def generated(array, labels=None):
    return Generated(torch.from_numpy(array), None, 1, None if labels is None else torch.as_tensor(labels))


# What it is shown


@pytest.mark.parametrize("schedule", ["cosine", "ve", "flow"])
def test_it_sees_the_image_itself_at_the_first_timestep(schedule):
    loaded, images = made(schedule=schedule), torch.from_numpy(pixels(5))
    seen = Judge(loaded)(images)
    x = to_float(images) / (1 + 0.02**2) ** 0.5 if schedule == "ve" else to_float(images)
    expected = loaded.model.features(x, torch.zeros(5))
    assert torch.allclose(seen.pool, expected, atol=1e-6)
    assert torch.allclose(seen.logits, loaded.model(x, torch.zeros(5)), atol=1e-6)
    assert seen.pool.shape == (5, Judge(loaded).num_features) and seen.logits.shape == (5, 3)


@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
def test_of_two_scales_it_sees_the_pair_of_the_image(representation):
    loaded, images = made("classifier_pair", representation=representation), torch.from_numpy(pixels(3))
    small = torch.nn.functional.avg_pool2d(to_float(images), 2)
    fine = to_float(images)
    if representation == "residual":
        fine = fine - small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    t = torch.zeros(3)
    assert torch.allclose(Judge(loaded)(images).pool, loaded.model.features(fine, small, t, t), atol=1e-6)


def test_it_says_which_network_it_is():
    judge = Judge(made())
    assert (judge.label, judge.fingerprint, judge.resize) == ("pets-0123456789abcdef", "0123456789abcdef", "none")
    assert Judge(made(run=None)).label == "classifier-0123456789abcdef"


def test_images_unlike_those_of_its_training_are_refused():
    judge = Judge(made())
    with pytest.raises(ValueError, match="trained on images of side 16, not 32"):
        judge.check(32, 3)
    with pytest.raises(ValueError, match="trained on images of channels 3, not 1"):
        judge(torch.from_numpy(pixels(2, channels=1)))
    array = pixels(12, size=32)
    images = image_set(array)
    with pytest.raises(ValueError, match="of side 16, not 32"):
        Scorer(["fd"], 12, from_images(images, "train"), images, judge=judge)


# Scores that are known


def test_the_class_score_of_uniform_and_of_sure_predictions():
    assert inception_score(torch.zeros(50, 4), metric="cs") == pytest.approx((1.0, 0.0), abs=1e-9)
    sure = 100 * torch.nn.functional.one_hot(torch.arange(6000) % 3).float()
    mean, sd = inception_score(sure, metric="cs")
    assert mean == pytest.approx(3.0, abs=0.01) and 0 < sd < 0.02
    assert inception_score(sure[:1].expand(50, -1), metric="cs")[0] == pytest.approx(1.0)


def test_accuracy_is_the_share_of_the_likeliest():
    logits = torch.tensor([[3.0, 1, 2], [0, 5, 1], [1, 0, 0.5], [0, 0, 9]])
    assert accuracy(logits, [0, 1, 2, 2]) == 0.75 and accuracy(logits, [1, 0, 1, 0]) == 0.0
    with pytest.raises(ValueError, match="need a label each"):
        accuracy(logits, [0, 1])
    with pytest.raises(ValueError, match="not finite"):
        accuracy(logits * torch.nan, [0, 1, 2, 2])


def by_hand(one, other):
    """The Fréchet distance of two sets of features, by the square root of a matrix."""
    means = one.mean(0) - other.mean(0)
    covs = [np.cov(each, rowvar=False) for each in (one, other)]
    return means @ means + np.trace(covs[0] + covs[1] - 2 * scipy.linalg.sqrtm(covs[0] @ covs[1]).real)


class Channels:
    """A judge by the means of the channels: these are its features, and the largest is the likeliest class."""

    fingerprint, resize, num_features, label, class_names = "f" * 16, "none", 3, "channels-" + "f" * 16, NAMES

    def check(self, resolution, channels):
        pass

    def __call__(self, images):
        pool = images.float().mean((2, 3))
        return Features(pool, 0.1 * pool)


def scorer(metrics, count, cache, reference="train", held_out=15, judge=None, **options):
    array = pixels(75, seed=3)
    labels = extract(Channels(), array).pool.argmax(1).numpy()
    labels[::4] = (labels[::4] + 1) % 3  # Every fourth image is called what it is not.
    training = image_set(array[held_out:], labels[held_out:])
    others = image_set(array[:held_out], labels[:held_out]) if held_out else None
    compared = from_images(training if reference == "train" else others, reference)
    return Scorer(
        metrics, count, compared, training, None, "cpu", cache, judge or Channels(), others, **options
    ), training, others  # fmt: skip


def test_distance_and_floor_are_those_computed_by_hand(tmp_path):
    judge = Judge(made())
    found, training, others = scorer(["fd"], 40, tmp_path, judge=judge)
    array = pixels(40, seed=9)
    values = found.score("fd", generated(array))
    features = [extract(judge, each).pool.double().numpy() for each in (array, training.pixels, others.pixels)]
    assert values["fd"] == pytest.approx(by_hand(features[0], features[1]), rel=1e-3, abs=2e-6)
    assert values["fd_real"] == pytest.approx(by_hand(features[2], features[1]), rel=1e-3, abs=2e-6)
    assert found.floors["fd"] == 15
    assert found.settings["fd"] == {"metric": "fd", "metric_features": judge.label, "resize": "none"}
    # Statistics and features of the reference are kept by the weights of the judge.
    assert (tmp_path / f"fid_reference_{training.fingerprint}_{judge.fingerprint}_none.npz").exists()


def test_the_floor_has_as_many_images_as_were_generated(tmp_path):
    found, training, others = scorer(["fd", "cs"], 12, tmp_path)
    values = found.score("fd", generated(pixels(12, seed=9)))
    chosen = others.pixels[evenly(12, 15, "")]
    features = [extract(Channels(), each).pool.double().numpy() for each in (chosen, training.pixels)]
    assert values["fd_real"] == pytest.approx(by_hand(*features), rel=1e-5)
    assert found.floors == {"fd": 12, "cs": 12}
    assert found.score("cs", generated(pixels(12, seed=9)))["class_score_real"] == pytest.approx(
        inception_score(extract(Channels(), chosen).logits)[0], abs=1e-6
    )


def test_beside_images_held_out_real_ones_are_those_of_the_training(tmp_path):
    found, training, others = scorer(["fd"], 20, tmp_path, reference="holdout")
    chosen = training.pixels[evenly(20, 60, "")]
    features = [extract(Channels(), each).pool.double().numpy() for each in (chosen, others.pixels)]
    assert found.score("fd", generated(pixels(20)))["fd_real"] == pytest.approx(by_hand(*features), rel=1e-5)


def test_without_images_held_out_there_is_no_floor(tmp_path):
    found, _, _ = scorer(["fd", "cs", "ca"], 12, tmp_path, held_out=0)
    array = pixels(12)
    for metric in ("fd", "cs", "ca"):
        values = found.score(metric, generated(array, np.zeros(12, int)))
        assert set(values) == set(METRIC_VALUES[metric][:-1]) and found.floors[metric] is None
    # Nor of a score, of fewer images than it needs.
    assert scorer(["cs", "fd"], 12, tmp_path, held_out=9)[0].floors == {"cs": None, "fd": 9}


def test_class_accuracy_counts_images_of_their_class(tmp_path):
    found, _, others = scorer(["ca"], 8, tmp_path)
    array = np.zeros((8, 3, 16, 16), np.uint8)
    array[np.arange(8), np.arange(8) % 3] = 200
    wrong = np.arange(8) % 3
    wrong[[0, 5]] = (wrong[[0, 5]] + 1) % 3
    values = found.score("ca", generated(array, wrong))
    labels, chosen = others.classes[0].labels, evenly(8, 15, "")
    right = extract(Channels(), others.pixels).pool.argmax(1).numpy() == labels
    assert values == {"class_accuracy": 0.75, "class_accuracy_real": round(float(right[chosen].mean()), 6)}
    assert 0 < values["class_accuracy_real"] < 1
    with pytest.raises(ValueError, match="needs images that were sampled by class"):
        found.score("ca", generated(array))


def test_precision_and_kernel_distance_by_the_judge_when_asked(tmp_path):
    assert judged(["kid", "pr", "fd", "fid"]) == {"fd"} and needs_inception(["kid"])
    assert judged(["kid", "pr", "fid"], "judge") == {"kid", "pr"} and not needs_inception(["kid", "pr"], "judge")
    found, training, _ = scorer(["pr", "kid"], 60, tmp_path, features="judge")
    same = generated(training.pixels)
    assert found.score("pr", same) == {"manifold_precision": 1.0, "manifold_recall": 1.0}
    far = generated(np.full((60, 3, 16, 16), 255, np.uint8))
    assert found.score("pr", far)["manifold_precision"] == 0.0
    assert found.score("kid", far)["kid"] > found.score("kid", same)["kid"]
    assert {one["metric_features"] for one in found.settings.values()} == {Channels.label}


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="The metric cs needs at least 10 images, not 9"):
        scorer(["cs"], 9, tmp_path)
    with pytest.raises(ValueError, match="The metric fd needs at least 2 images, not 1"):
        scorer(["fd"], 1, tmp_path)


def test_flags_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="the metric ca needs a judge; pass --judge FILE"):
        EvaluationSettings(metrics=("swd", "ca"))
    with pytest.raises(ValueError, match="--judge belongs to"):
        EvaluationSettings(metrics=("swd",), judge="x.pth")
    with pytest.raises(ValueError, match="--features belongs to"):
        EvaluationSettings(metrics=("fd",), judge="x.pth", features="judge")
    with pytest.raises(ValueError, match="the metric pr needs a judge"):
        EvaluationSettings(metrics=("pr",), features="judge")


# The stage


@pytest.fixture(scope="module")
def place(stage, cache, tmp_path_factory):
    """A model told of classes and one that is not, and a judge of the same images, in a folder."""
    folder = tmp_path_factory.mktemp("judged")
    words = ["--dataset", "synthetic", "--limit", 60, "--holdout", 12, "--resolution", 16, "--hidden_dims", "8,16"]
    words += ["--batch_size", 16, "--epochs", 1, "--device", "cpu", "--precision", "fp32", "--cache_dir", cache]
    for name, module, more in (
        ("told", train_baseline, ("--classes",)),
        ("free", train_baseline, ()),
        ("judge", train_classifier, ()),
    ):
        stage(module, *words, "--output_dir", folder / name, "--log_dir", folder / name, *more)
    return folder


def files(place):
    return place / "told/baseline_1ep.pth", place / "free/baseline_1ep.pth", place / "judge/classifier_1ep.pth"


def test_rows_say_which_network_and_what_real_images_have(place, stage, cache, tmp_path):
    told, _, judge = files(place)
    flags = ["--checkpoint", told, "--judge", judge, "--num_images", 12, "--num_steps", 2, "--device", "cpu"]
    flags += ["--metrics", "fd", "cs", "ca", "pr", "swd", "--features", "judge", "--cache_dir", cache]
    ended = stage(eval_fid_batch, *flags, "--output", tmp_path / "table.csv")
    rows = {row["metric"]: row for row in read_rows(tmp_path / "table.csv")}
    label = load_judge(judge, "cpu").label
    assert label.endswith(load_classifier(judge).fingerprint) and label.startswith("classifier-published-16px")
    assert {rows[metric]["metric_features"] for metric in ("fd", "cs", "ca", "pr")} == {label}
    assert rows["swd"]["metric_features"].startswith("swd") and rows["swd"]["floor_images"] == ""
    for metric in ("fd", "cs", "ca"):
        assert all(rows[metric][field] for field in METRIC_VALUES[metric])
        assert rows[metric]["floor_images"] == "12" and rows[metric]["resize"] == "none"
    assert rows["pr"]["floor_images"] == "" and rows["pr"]["manifold_recall"]
    assert "class_accuracy" in ended.output and "held out" not in ended.notes
    # The floor, once more, from the parts of the data themselves.
    training, held_out = split_holdout(load_images("synthetic", 16, cache, limit=60), 12)
    features = [extract(load_judge(judge, "cpu"), each.pixels) for each in (held_out, training)]
    assert float(rows["fd"]["fd_real"]) == pytest.approx(
        by_hand(*(each.pool.double().numpy() for each in features)), abs=2e-5
    )
    share = accuracy(features[0].logits, held_out.classes[0].labels)
    assert float(rows["ca"]["class_accuracy_real"]) == pytest.approx(share, abs=1e-6)
    assert stage(eval_fid_batch, *flags, "--output", tmp_path / "table.csv").output.count("scored already") == 1


def test_what_cannot_be_judged_is_refused(place, refused, stage, cache, tmp_path):
    told, free, judge = files(place)
    table = tmp_path / "table.csv"
    flags = ["--num_images", 12, "--num_steps", 2, "--device", "cpu", "--cache_dir", cache, "--output", table]
    keeps = (place,)

    def says(*words, model=free, by=judge, metrics=("ca",)):
        which = ("--checkpoint", model, "--judge", by, "--metrics", *metrics)
        refused(eval_fid_batch, *which, *flags, says=words, keeps=keeps)

    says("needs images sampled by class", "--classifier")
    says("is no classifier", by=told, metrics=("fd",))
    says("does not exist", by=tmp_path / "none.pth", metrics=("fd",))
    # Guided by the classifier itself, images of a model without classes are of its classes.
    guided = ["--checkpoint", free, "--judge", judge, "--classifier", judge, "--metrics", "ca", *flags]
    assert "class_accuracy" in stage(eval_fid_batch, *guided).output
    [row] = read_rows(table)
    assert row["guidance"].startswith("classifier ") and row["nfe"] == "4"
