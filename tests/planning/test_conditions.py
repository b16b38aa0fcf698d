"""Flags of classes and guidance: what they mean for a model, what is refused, and the calls that are counted."""

import json

import pytest
import torch

import generate_with_path_30
from checkpoint import build_model, load_classifier, load_model, save_checkpoint
from diffusion.guidance import ClassifierFree, ClassifierGuided, Unconditional
from planning.conditions import ClassSettings, Guidance, guidance_of

NAMES = ["cat", "dog", "wild"]
CONFIG = {
    "hidden_dims": [8, 16],
    "channels": 1,
    "resolution": 16,
    "num_train_timesteps": 1000,
    "beta_schedule": "cosine_clipped",
    "prediction_type": "epsilon",
    "dataset": "synthetic",
    "seed": 42,
}


@pytest.fixture
def write(tmp_path):
    """`write(model_type, **config)` is the file of a checkpoint with random weights."""

    def make(model_type, ema=False, **changes):
        config = CONFIG | {"model_type": model_type} | changes
        torch.manual_seed(len(list(tmp_path.iterdir())))
        model = build_model(config)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        state = model.state_dict()
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
        averaged = {name: value + 1 for name, value in state.items()} if ema else None
        content = {"model_state": state, "ema_state": averaged, "config": config, "epoch": 1, "step": 1}
        save_checkpoint(file, content)
        return file

    return make


def conditions(file, **flags):
    return ClassSettings(**{k: str(v) if k == "classifier" else v for k, v in flags.items()}).conditions(
        load_model(file)
    )


def test_a_model_with_classes_is_told_and_guided(write):
    model, classifier = write("dual", class_names=NAMES), write("classifier", class_names=NAMES)
    found = conditions(model, classifier=classifier, classifier_scale=2.5, guidance_scale=3.0, classes=("dog",))
    assert (found.indices, found.null, found.told, found.calls) == ((1,), 3, True, 3)
    fingerprint = load_classifier(classifier).fingerprint
    assert found.label == f"class dog, guidance 3, classifier {fingerprint} 2.5"
    assert found.said == {"classes": ["dog"], "guidance": found.label} and found.suffix == "_dog_g3_c2.5"
    loaded = load_model(model)
    told = found.told_classes(loaded.denoise)
    assert isinstance(told, ClassifierFree)
    guided = found.guided(told, loaded)
    assert isinstance(guided, ClassifierGuided) and guided.calls == 3 and guided.denoise is told


def test_a_model_without_classes_has_those_of_the_classifier(write):
    model, classifier = write("baseline"), write("classifier", class_names=NAMES)
    found = conditions(model, classifier=classifier)
    assert (found.names, found.indices, found.told, found.calls) == (tuple(NAMES), (0, 1, 2), False, 2)
    assert found.label.startswith("classifier ") and found.suffix == "_c1"
    assert found.labels([0, 1, 2, 3]) == [0, 1, 2, 0]
    loaded = load_model(model)
    assert isinstance(found.told_classes(loaded.denoise), Unconditional)
    # Without a classifier nothing of it is left.
    assert (conditions(model).names, conditions(model).label, conditions(model).calls) == ((), "", 1)


def test_of_a_classifier_the_averaged_weights_are_taken(write):
    file = write("classifier", ema=True, class_names=NAMES, ema_decay=0.0)
    model = build_model(CONFIG | {"model_type": "classifier", "class_names": NAMES})
    raw = torch.load(file, weights_only=True)["model_state"]["head.bias"]
    assert torch.equal(load_classifier(file).model.head.bias, raw + 1) and model.num_classes == 3


@pytest.mark.parametrize("schedule", ["cosine_clipped", "ve", "flow"])
def test_guidance_moves_by_the_gradient_of_what_the_network_is_shown(write, schedule):
    """Of ve, whose networks see scaled images, that of the images themselves: by the chain rule."""
    changes = {"beta_schedule": schedule, "prediction_type": "x0"}
    loaded = load_model(write("baseline", **changes))
    file = write("classifier", class_names=NAMES, **changes)
    found = conditions(loaded.file, classifier=file, classifier_scale=4.0)
    guided = found.guided(found.told_classes(loaded.denoise), loaded)
    x, t, labels = torch.randn(3, 1, 16, 16), torch.full((3,), 600), torch.arange(3)
    alpha, sigma = loaded.scheduler.scales(t, x)
    network = load_classifier(file).model
    factor = (1 + sigma.square()).rsqrt() if schedule == "ve" else torch.ones_like(sigma)
    shown = (x * factor).requires_grad_()
    log_p = network(shown, t).log_softmax(1)[torch.arange(3), labels]
    [gradient] = torch.autograd.grad(log_p.sum(), shown)
    before, after = loaded.denoise((x,), (t,))[0], guided((x,), (t,), labels)[0]
    expected = 4 * sigma.square() / alpha * gradient * factor
    assert expected.abs().max() > 1e-4
    assert torch.allclose(after - before, expected, rtol=1e-3, atol=1e-6 * before.abs().max().item())


def test_a_classifier_that_does_not_fit_is_refused(write):
    model = write("dual", class_names=NAMES)

    def says(words, file=model, **changes):
        other = {"model_type": "classifier", "class_names": NAMES} | changes
        with pytest.raises(ValueError, match=words):
            conditions(file, classifier=write(**other))

    says("trained on images at side 32, but .* on 16", resolution=32)
    says("on channels 3, but .* on 1", channels=3)
    says("on timesteps 500", num_train_timesteps=500)
    says("on the process vp linear, but .* on vp cosine_clipped", beta_schedule="linear")
    says("knows the classes cat, lion, but .* cat, dog, wild", class_names=["cat", "lion"])
    says("knows the classes dog, cat, wild", class_names=["dog", "cat", "wild"])
    says("is no classifier", model_type="dual")
    says("makes one; train one with --scales 1", write("baseline"), model_type="classifier_pair")
    says("makes one; train one with --scales 1", write("single_t"), model_type="classifier_pair")
    residual = write("dual", representation="residual")
    says("fine scale of .* is a residual; train one with --scales 2", residual)
    says("reads the pair 'overcomplete', but .* makes 'residual'", residual, model_type="classifier_pair")
    fitting = write("classifier_pair", class_names=NAMES, representation="residual")
    assert conditions(residual, classifier=fitting).calls == 2


def test_flags_that_say_nothing_are_refused(write):
    with pytest.raises(ValueError, match="--classifier_scale belongs to --classifier"):
        ClassSettings(classifier_scale=2.0)
    model, classifier = write("baseline"), write("classifier", class_names=NAMES)
    with pytest.raises(ValueError, match="only --classifier guides it; leave --guidance_scale out"):
        conditions(model, classifier=classifier, guidance_scale=2.0)
    with pytest.raises(ValueError, match=rf"--class lion is no class of {classifier}, which has cat, dog, wild"):
        conditions(model, classifier=classifier, classes=("lion",))
    with pytest.raises(ValueError, match="says nothing to it"):
        conditions(model, classes=("cat",))


@pytest.mark.parametrize(("model_type", "kind"), [("baseline", "classifier"), ("dual", "classifier_pair")])
def test_images_are_sampled_with_a_classifier(stage, refused, write, tmp_path, monkeypatch, model_type, kind):
    monkeypatch.chdir(tmp_path)
    model, classifier = write(model_type), write(kind, class_names=NAMES)
    flags = ["--checkpoint", model, "--num_images", 3, "--num_steps", 4, "--device", "cpu", "--precision", "fp32"]
    guided = [*flags, "--classifier", classifier]
    said = stage(generate_with_path_30, *guided, "--classifier_scale", 30, "--output", "guided").output
    assert "8 network calls each" in said
    stage(generate_with_path_30, *guided, "--classifier_scale", 0, "--output", "zero")
    stage(generate_with_path_30, *flags, "--output", "plain")
    names = [f"{seed:012d}.png" for seed in sorted(int(f.stem) for f in (tmp_path / "plain").glob("[0-9]*.png"))]
    assert len(names) == 3
    for name in names:
        plain, zero, moved = ((tmp_path / folder / name).read_bytes() for folder in ("plain", "zero", "guided"))
        assert plain == zero and plain != moved
    settings = json.loads((tmp_path / "guided/settings.json").read_text())
    assert settings["classes"] == NAMES and settings["guidance"].endswith(" 30")
    assert "guidance" not in json.loads((tmp_path / "plain/settings.json").read_text())
    said = stage(generate_with_path_30, *guided[:4], *guided[6:], "--num_calls", 10, "--output", "counted").output
    assert "10 network calls each" in said
    few = [*guided[:4], *guided[6:], "--num_calls", 1, "--output", "x"]
    refused(generate_with_path_30, *few, says=("2 network calls",), status=2)
    refused(generate_with_path_30, *flags, "--classifier", model, "--output", "x", says=("is no classifier",))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 1e-7, 2.5e8])
def test_the_scale_is_read_from_what_rows_call_it(write, scale):
    odd = ["cat, guidance 2", "dog"]
    model, plain, classifier = (
        write("baseline", class_names=odd),
        write("baseline"),
        write("classifier", class_names=odd),
    )
    calls = 1 if scale in (0, 1) else 2
    every, one = conditions(model, guidance_scale=scale), conditions(model, guidance_scale=scale, classes=(odd[0],))
    assert guidance_of(every.label) == Guidance("guidance", scale, calls)
    assert guidance_of(one.label) == Guidance("class cat, guidance 2, guidance", scale, calls)
    name = f"classifier {load_classifier(classifier).fingerprint}"
    by_it = {"classifier": classifier, "classifier_scale": scale}
    assert guidance_of(conditions(plain, **by_it).label) == Guidance(name, scale, 2)
    for own in (0.0, 1.0, 3.0):
        found = conditions(model, guidance_scale=own, classes=("dog",), **by_it)
        assert guidance_of(found.label) == Guidance(f"class dog, guidance {own:g}, {name}", scale, found.calls)


@pytest.mark.parametrize(
    "text", ["", "guidance", "guidance -1", "guidance 1,5", "class cat", "classifier c0ffee", "scale 3"]
)
def test_what_names_no_scale_is_refused(text):
    with pytest.raises(ValueError, match="no scale of guidance|no guidance is named"):
        guidance_of(text)


def test_what_files_and_rows_call_classes_of_any_name(write):
    model = write("baseline", class_names=["a/b", "c\nd", "../e"])
    found = conditions(model, classes=("a/b", "c\nd"), guidance_scale=2.0)
    assert (found.label, found.suffix) == ("class a/b+c d, guidance 2", "_a-b-c-d_g2")
    assert conditions(model, classes=("../e",)).suffix == "_..-e"


def test_scales_that_differ_are_called_differently(write):
    model = write("baseline", class_names=NAMES)
    scales = (0.0, 0.1, 2.0, 2.0000001, 1e-7, 1e6, 1e20)
    found = {scale: conditions(model, guidance_scale=scale) for scale in scales}
    assert {scale: guidance_of(one.label).scale for scale, one in found.items()} == {scale: scale for scale in scales}
    assert len({one.suffix for one in found.values()}) == len(scales)
    assert found[2.0].label == "guidance 2"
