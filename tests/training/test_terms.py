"""Further terms of the loss: what they compare, how they are weighed, and runs that are trained with them."""

import copy
import functools
import shutil
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchvision.models import vgg16, vgg19

import train_baseline
import train_lift
from checkpoint import MODEL_CLASSES, read_checkpoint, save_checkpoint
from conftest import LAST, LOG, assert_same, read_log
from data import coarse
from images.representation import REPRESENTATIONS
from runtime.device import autocast
from scheduler import DDIMScheduler
from training.memory import saved_bytes, training_memory
from training.objective import Denoising, TrainingBatch
from training.run import write_row
from training.settings import TrainingSettings
from training.terms import FeatureMatching, Perceptual
from training.timesteps import Importance
from training.vgg import load_vgg

WEIGHTS_NAME = "vgg19-dcbb9e9d.pth"
CPU = torch.device("cpu")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_state(build=vgg19, seed=0):
    """Weights of the convolutions of a network of torchvision, of a size that keeps the signal alive."""
    with torch.device("meta"):
        layers = build(weights=None, init_weights=False).features
    state = layers.to_empty(device="cpu").state_dict()
    for value in state.values():
        value.normal_(0, (2 / value[0].numel()) ** 0.5 if value.ndim == 4 else 0.1, generator=rng(seed))
    return state


@pytest.fixture(scope="module")
def vgg_state():
    return random_state()


@pytest.fixture(scope="module")
def vgg_file(vgg_state, tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / "features.pth"
    torch.save(vgg_state, file)
    return file


@pytest.fixture(scope="module")
def vgg(vgg_file):
    return load_vgg(vgg_file)


def batch_of(images, scheduler, t_64, t_32=None, seed=1):
    """A step that shows these clean images `[B, C, H, W]`, in the representation of the process."""
    t_64 = torch.as_tensor(t_64)
    noise = [torch.randn(x.shape, dtype=x.dtype, generator=rng(seed)) for x in (images, coarse(images))]
    project = scheduler.representation.project
    clean, noise = project((images, coarse(images))), project(tuple(noise))
    return TrainingBatch(*clean, *noise, t_64, t_64 if t_32 is None else torch.as_tensor(t_32))


def images_of(count, channels=3, side=16, seed=0):
    return torch.rand(count, channels, side, side, dtype=torch.float64, generator=rng(seed)) * 2 - 1


def objective(scheduler, *terms, pairs="independent", **config):
    return Denoising({"t_pairs": pairs, "t_pairs_points": None} | config, scheduler, terms)


class Pixels:
    """The mean squared error of the images themselves."""

    name, weight, network = "features", 0.5, nn.Identity()

    def distance(self, images):
        self.images = images
        return (images.predicted - images.true).square().flatten(1).mean(1)


def true_answers(scheduler, batch):
    """What an exact network predicts, scale by scale."""
    return (
        scheduler.target(batch.x_64, batch.noise_64, batch.t_64),
        scheduler.target(batch.x_32, batch.noise_32, batch.t_32),
    )


# The predicted clean image


@pytest.mark.parametrize("times", [torch.int64, torch.float64])
def test_the_clean_image_of_a_known_noise_is_clamped_and_weighed_by_abar(times):
    scheduler = DDIMScheduler(beta_schedule="cosine_report")
    batch = batch_of(images_of(4), scheduler, torch.tensor([3, 300, 600, 999]).to(times))
    # Errors of the noise, of which those of the clean image are sigma / alpha as large.
    error = torch.randn(batch.x_64.shape, dtype=torch.float64, generator=rng(2)).requires_grad_()
    term = Pixels()
    losses = objective(scheduler, term).losses(lambda zs, ts: (batch.noise_64 + error,), batch)
    table = scheduler.alphas_cumprod[[3, 300, 600, 999]]
    alpha, sigma = (root.sqrt()[:, None, None, None] for root in (table, 1 - table))
    x0 = batch.x_64 - sigma / alpha * error.detach()
    outside = x0.abs() > 1
    assert outside[2].any() and not outside[2].all() and outside[3].float().mean() > 0.99
    # The prediction is looked at in the precision of the images.
    torch.testing.assert_close(term.images.predicted, x0.clamp(-1, 1), rtol=1e-6, atol=1e-6)
    assert term.images.predicted.abs().max() == 1
    squares = (x0.clamp(-1, 1) - batch.x_64).square()
    torch.testing.assert_close(losses["features"], table * squares.flatten(1).mean(1), rtol=1e-6, atol=1e-12)
    losses["features"].sum().backward()
    assert not error.grad[outside].any() and (error.grad[~outside] != 0).all()
    inside = table[:, None, None, None] * 2 * (x0 - batch.x_64) / batch.x_64[0].numel() * -sigma / alpha
    torch.testing.assert_close(error.grad[~outside], inside[~outside], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "sub_vp_linear", "ve", "flow"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v", "velocity", "score"])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_an_exact_prediction_of_any_type_is_the_image_itself(name, prediction_type, representation):
    if name == "flow" and prediction_type in ("epsilon", "score"):
        return
    scheduler = DDIMScheduler(beta_schedule=name, prediction_type=prediction_type, representation=representation)
    images = 0.9 * images_of(3)
    batch = batch_of(images, scheduler, [0, 400, 800], [500, 20, 990])
    term = Pixels()
    answers = true_answers(scheduler, batch)
    losses = objective(scheduler, term).losses(lambda zs, ts: answers, batch)
    torch.testing.assert_close(term.images.predicted, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(term.images.true, images)
    assert losses["features"].max() < 1e-9
    # What is weighed is the share of the signal at the clock of the fine scale.
    losses = objective(scheduler, term).losses(lambda zs, ts: tuple(0 * answer for answer in answers), batch)
    share = scheduler.alphas[batch.t_64] ** 2 / (scheduler.alphas[batch.t_64] ** 2 + scheduler.sigmas[batch.t_64] ** 2)
    torch.testing.assert_close(losses["features"], share * term.distance(term.images))
    whole = scheduler.alpha_bar_at(batch.t_64)
    torch.testing.assert_close(scheduler.alpha_bar_at(batch.t_64.double()), whole)
    torch.testing.assert_close(whole, share)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_both_predictions_have_a_gradient_where_both_compose_the_image(representation):
    scheduler = DDIMScheduler(prediction_type="x0", representation=representation)
    images = 0.5 * images_of(2)
    batch = batch_of(images, scheduler, [10, 700], [500, 20])
    predictions = [(0.9 * x).requires_grad_() for x in (batch.x_64, batch.x_32)]
    losses = objective(scheduler, Pixels()).losses(lambda zs, ts: predictions, batch)
    torch.testing.assert_close(
        losses["features"], scheduler.alphas_cumprod[batch.t_64] * 0.01 * images.square().flatten(1).mean(1)
    )
    losses["features"].sum().backward()
    assert predictions[0].grad.any()
    assert (predictions[1].grad is not None and predictions[1].grad.any()) == (representation == "residual")


def test_a_learned_variance_is_no_part_of_the_image():
    scheduler = DDIMScheduler()
    batch = batch_of(images_of(2), scheduler, [10, 300])
    found = []
    for more in ([], [torch.full_like(batch.x_64, 7.0)]):
        term = Pixels()
        prediction = torch.cat([batch.noise_64 * 0.5, *more], dim=1)
        with mock.patch.object(Denoising, "distance", lambda *each, reduction: torch.zeros(2, 1)):
            objective(scheduler, term).losses(lambda zs, ts, prediction=prediction: (prediction,), batch)
        found.append(term.images.predicted)
    assert torch.equal(*found)


# Weights


def test_terms_add_to_what_is_minimised_by_their_weights_alone():
    scheduler = DDIMScheduler(beta_schedule="linear")
    batch = batch_of(images_of(4), scheduler, [1, 200, 500, 900], [7, 7, 7, 7])
    plain = {"loss_64": torch.rand(4, generator=rng(3)), "loss_32": torch.rand(4, generator=rng(4))}
    values = torch.rand(4, generator=rng(5))
    config = {"timestep_weights": "likelihood", "loss_weights": [0.3, 0.7]}
    without = objective(scheduler, **config).minimised(plain, batch).item()
    for share in (None, torch.tensor([1, 0.5, 2, 0.1]).double()):
        drawn = batch._replace(share=share)
        term = Pixels()
        added = []
        for term.weight in (0.5, 1.5):
            one = objective(scheduler, term, **config)
            added.append(one.minimised(plain | {"features": values}, drawn) - one.minimised(plain, drawn))
        # No weight by timestep, but the one by which an image was drawn.
        expected = (values if share is None else values * share.float()).mean().item()
        assert [each.item() for each in added] == pytest.approx([0.5 * expected, 1.5 * expected], rel=1e-5)
    assert objective(scheduler, Pixels(), **config).minimised(plain, batch).item() == without


def test_importance_learns_of_terms_too():
    scheduler = DDIMScheduler(beta_schedule="linear")
    batch = batch_of(images_of(2), scheduler, [100, 700])
    one = objective(scheduler, Pixels(), pairs=None, t_law="importance", loss_weights=[1.0])
    losses = {"loss_64": torch.tensor([3.0, 1.0]), "features": torch.tensor([2.0, 8.0])}
    with mock.patch.object(Importance, "observe") as observe:
        one.observe(losses, batch, torch.tensor(True), torch.clone)
    assert observe.call_args.args[0].tolist() == [4, 5]


# The features


@pytest.mark.parametrize("channels", [1, 3])
def test_the_perceptual_loss_is_that_of_torchvision(vgg, vgg_state, channels):
    with torch.device("meta"):
        library = vgg19(weights=None, init_weights=False)
    library.features.load_state_dict(vgg_state, assign=True)
    library.features.double()
    seen, convolutions = [], [layer for layer in library.features if isinstance(layer, nn.Conv2d)]
    convolutions[3].register_forward_hook(lambda layer, inputs, output: seen.append(output.clone().relu()))
    scheduler = DDIMScheduler()
    batch = batch_of(images_of(3, channels, 32), scheduler, [10, 300, 800])
    prediction = torch.randn(batch.x_64.shape, dtype=torch.float64, generator=rng(6))
    term = Perceptual(0.1, copy.deepcopy(vgg).double())
    losses = objective(scheduler, term).losses(lambda zs, ts: (prediction,), batch)
    alpha, sigma = (each[batch.t_64][:, None, None, None] for each in (scheduler.alphas, scheduler.sigmas))
    x0 = (alpha * batch.x_64 + sigma * (batch.noise_64 - prediction)) / alpha
    mean, deviation = (torch.tensor(each)[:, None, None] for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for x in (x0.clamp(-1, 1), batch.x_64):
        grey = x.repeat(1, 3 // channels, 1, 1)
        library.features((grey * 0.5 + 0.5 - mean) / deviation)
    assert seen[0].shape == (3, 128, 16, 16)
    expected = alpha.flatten() ** 2 * (seen[0] - seen[1]).square().mean((1, 2, 3))
    # The mean and the deviation of ImageNet are kept in fp32.
    torch.testing.assert_close(losses["perceptual"], expected, rtol=1e-5, atol=0)
    assert expected.min() > 1e-4


def network(model_type, representation="overcomplete", seed=0):
    torch.manual_seed(seed)
    two = MODEL_CLASSES[model_type].num_scales > 1
    options = {"representation": representation} if two else {}
    return MODEL_CLASSES[model_type]((8, 16), 3, **options)


def watched(model, xs, ts):
    """The outputs of the encoder and the middle, as they pass by in the whole network."""
    found = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: found.append(output))
        for module in (*(level.attention for level in model.unet.down), model.unet.middle2)
    ]
    with torch.no_grad():
        model.denoise(xs, ts)
    for hook in hooks:
        hook.remove()
    return found


KINDS = [(name, "overcomplete") for name in MODEL_CLASSES] + [("dual", "residual"), ("shared_t", "residual")]


@pytest.mark.parametrize("process", ["cosine", "ve"])
@pytest.mark.parametrize("model_type, representation", KINDS)
def test_feature_matching_sees_what_passes_by_in_the_network(model_type, representation, process):
    scheduler = DDIMScheduler(beta_schedule=process, prediction_type="x0", representation=representation)
    t_32 = None if MODEL_CLASSES[model_type].one_clock else [500, 20]
    batch = batch_of(images_of(2).float(), scheduler, [10, 700], t_32)
    ema = network(model_type, representation).requires_grad_(False)
    predicted = 0.8 * images_of(2, seed=9).float()
    predictions = [x.requires_grad_() for x in scheduler.representation.split(predicted)]
    predictions = predictions[: ema.num_predictions]
    term = FeatureMatching(0.05, ema, scheduler)
    losses = objective(scheduler, term).losses(lambda zs, ts: predictions, batch)
    # Both are noised by hand, as alike as can be.
    seen = []
    for clean in (scheduler.representation.split(predicted), (batch.x_64, batch.x_32)):
        shown = []
        for x, noise, t in zip(clean, (batch.noise_64, batch.noise_32), (batch.t_64, batch.t_32), strict=True):
            alpha, sigma = (each[t].float()[:, None, None, None] for each in (scheduler.alphas, scheduler.sigmas))
            noisy = alpha * x + sigma * noise
            shown.append(noisy / (1 + sigma**2).sqrt() if process == "ve" else noisy)
        seen.append(watched(ema, shown, (batch.t_64, batch.t_32)))
    assert len(seen[0]) == 3
    distances = [(one - other).square().mean((1, 2, 3)) for one, other in zip(*seen, strict=True)]
    expected = scheduler.alphas_cumprod[batch.t_64].float() * sum(distances) / 3
    assert expected.min() > 1e-6
    torch.testing.assert_close(losses["features"], expected, rtol=1e-4, atol=0)
    losses["features"].sum().backward()
    assert predictions[0].grad.any()
    assert all(weights.grad is None for weights in ema.parameters())


@pytest.mark.parametrize("model_type, representation", KINDS)
def test_features_of_an_exact_prediction_are_the_same(model_type, representation):
    scheduler = DDIMScheduler(beta_schedule="cosine", representation=representation)
    batch = batch_of(0.9 * images_of(3).float(), scheduler, [10, 400, 900], [10, 400, 900])
    ema = network(model_type, representation).requires_grad_(False)
    one = objective(scheduler, FeatureMatching(0.05, ema, scheduler))
    answers = true_answers(scheduler, batch)[: ema.num_predictions]
    assert one.losses(lambda zs, ts: answers, batch)["features"].max() < 1e-8
    other = one.losses(lambda zs, ts: tuple(-answer for answer in answers), batch)["features"]
    assert other.min() > 1e-6


def test_every_image_is_compared_by_itself(vgg):
    scheduler = DDIMScheduler()
    batch = batch_of(images_of(4).float(), scheduler, [3, 300, 600, 950], [5, 20, 700, 999])
    ema = network("dual").requires_grad_(False)
    one = objective(scheduler, Perceptual(0.1, vgg), FeatureMatching(0.05, ema, scheduler))

    def denoise(zs, ts):
        return tuple(z.tanh() for z in zs)

    together = one.losses(denoise, batch)
    assert list(together) == ["loss_64", "loss_32", "perceptual", "features"]
    assert all(values.dtype == torch.float32 and values.shape == (4,) for values in together.values())
    for k in range(4):
        alone = one.losses(denoise, batch.rows(slice(k, k + 1)))
        for name, values in alone.items():
            torch.testing.assert_close(values, together[name][k : k + 1], rtol=1e-4, atol=1e-7)


def test_half_precision_is_for_features_and_not_for_their_differences(vgg):
    scheduler = DDIMScheduler()
    batch = batch_of(images_of(4).float(), scheduler, [3, 300, 500, 700])
    ema = network("baseline").requires_grad_(False)
    one = objective(scheduler, Perceptual(0.1, vgg), FeatureMatching(0.05, ema, scheduler))
    prediction = torch.randn(batch.x_64.shape, generator=rng(6))
    full = one.losses(lambda zs, ts: (prediction,), batch)
    kinds = []
    hook = vgg.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with autocast(CPU, "bf16"):
        half = one.losses(lambda zs, ts: (prediction.bfloat16(),), batch)
    hook.remove()
    assert kinds == [torch.bfloat16] * 2
    for name in ("perceptual", "features"):
        assert half[name].dtype == torch.float32
        assert not torch.equal(half[name], full[name])
        torch.testing.assert_close(half[name], full[name], rtol=0.1, atol=1e-4)


# Weights of VGG19


def test_a_file_of_the_whole_network_or_of_its_features_is_taken(vgg, vgg_state, tmp_path):
    whole = {f"features.{name}": value for name, value in vgg_state.items()}
    whole |= {"classifier.0.weight": torch.zeros(1).expand(4096, 25088), "classifier.0.bias": torch.zeros(4096)}
    torch.save(whole, tmp_path / "whole.pth")
    before = torch.get_rng_state()
    loaded = load_vgg(tmp_path / "whole.pth")
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(loaded.layers.state_dict(), vgg.layers.state_dict())
    assert loaded.fingerprint == vgg.fingerprint and not loaded.training
    assert len([layer for layer in loaded.layers if isinstance(layer, nn.Conv2d)]) == 4
    assert isinstance(loaded.layers[-1], nn.ReLU)
    assert not any(weights.requires_grad for weights in loaded.parameters())
    torch.save({name: value.half() for name, value in vgg_state.items()}, tmp_path / "half.pth")
    assert {value.dtype for value in load_vgg(tmp_path / "half.pth").state_dict().values()} == {torch.float32}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints" / WEIGHTS_NAME


def test_without_a_file_the_weights_are_those_torchvision_downloads(no_network, vgg, vgg_file):
    no_network.parent.mkdir(parents=True)
    shutil.copy(vgg_file, no_network)
    assert load_vgg(None).fingerprint == vgg.fingerprint


def test_weights_that_cannot_be_had_end_the_run_before_it_begins(refused, tiny, cache, no_network, tmp_path):
    no_network.parent.mkdir(parents=True)  # The library makes it.
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--perceptual_weight", 0.1]
    says = ("could not be had from https://download.pytorch.org", WEIGHTS_NAME, "OSError", "pass --vgg_weights FILE")
    for script in (train_baseline, train_lift):
        refused(script, *flags, says=says, keeps=(cache,))


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "list", "vgg16", "fewer", "wider", "nan"])
def test_files_of_anything_else_are_refused(refused, tiny, cache, tmp_path, vgg_file, vgg_state, kind):
    file = tmp_path / "weights.pth"
    if kind == "text":
        file.write_text("hello")
    elif kind == "cut":
        file.write_bytes(vgg_file.read_bytes()[:1_000_000])
    elif kind != "missing":
        few = {name: value for name, value in vgg_state.items() if int(name.split(".")[0]) < 9}
        contents = {
            "list": lambda: [1, 2],
            "vgg16": lambda: random_state(vgg16),
            "fewer": lambda: few,
            "wider": lambda: vgg_state | {"7.bias": torch.zeros(129)},
            "nan": lambda: vgg_state | {"7.bias": torch.full((128,), float("nan"))},
        }
        torch.save(contents[kind](), file)
    words = {"missing": "does not exist", "text": "cannot be read", "cut": "cannot be read", "list": "no state dict"}
    words |= {"list": "is not a state dict", "nan": "is damaged"}
    says = (file, words.get(kind, "does not hold the weights of torchvision's vgg19"), "--vgg_weights FILE")
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--perceptual_weight", 0.1, "--vgg_weights", file]
    refused(train_lift, *flags, says=says, keeps=(cache,))


# Settings


def test_settings_that_have_no_term_are_refused(refused, tiny, tmp_path):
    flags = tiny(tmp_path)
    says = ("--feature_weight compares features of the EMA network, of which --ema_decay 0 keeps none",)
    refused(train_lift, *flags, "--feature_weight", 0.05, "--ema_decay", 0, says=says, status=2)
    refused(train_lift, *flags, "--preset", "ddpm_report", "--ema_decay", 0, says=says, status=2)
    says = ("--vgg_weights belongs to --perceptual_weight",)
    refused(train_lift, *flags, "--vgg_weights", "x.pth", says=says, status=2)
    for value in (-0.1, "nan", "inf", "much"):
        refused(train_lift, *flags, "--perceptual_weight", value, says=("is not a number of at least 0",), status=2)


def test_the_preset_of_the_report():
    made = TrainingSettings(model_type="baseline", preset="ddpm_report")
    said = {"prediction_type": "epsilon", "beta_schedule": "cosine_report", "process": "vp", "times": "whole"}
    said |= {"perceptual_weight": 0.1, "feature_weight": 0.05, "timestep_weights": "published", "t_law": "uniform"}
    assert {name: getattr(made, name) for name in said} == said
    # What the command says wins, and other presets have no terms.
    assert made.but(perceptual_weight=0.0).perceptual_weight == 0
    for preset in ("published", "improved", "flow"):
        other = made.but(preset=preset)
        assert (other.perceptual_weight, other.feature_weight) == (0, 0)


def test_a_run_without_terms_is_as_before(trainer):
    run = trainer("--feature_weight", 0)
    assert list(run.objective.terms) == [] and run.config["vgg_fingerprint"] is None
    assert list(run.train_step(*next(run.batches.epoch(0)))) == ["loss_64", "loss_32", "grad_norm"]
    assert training_memory(run)["VGG"] == 0


# Runs


@pytest.fixture
def flags(vgg_file):
    return ["--perceptual_weight", 0.3, "--vgg_weights", vgg_file, "--feature_weight", 0.2, "--ema_decay", 0.5]


def resume_file(folder):
    content = read_checkpoint(next(folder.rglob("*_last.pth")))
    return content | {"execution": {}, "settings": {}}  # How it was come by.


@pytest.mark.parametrize(
    "more", [["--preset", "ddpm_report"], ["--representation", "residual", "--preset", "improved", "--times", "real"]]
)
@pytest.mark.parametrize("script", [train_baseline, train_lift])
def test_a_stopped_run_ends_as_one_in_one_go(stage, tiny, cache, tmp_path, flags, script, more):
    more = [
        *flags,
        "--cache_dir",
        cache,
        "--lr",
        0.003,
        *(more if script is train_lift else more[:2] * (more[0] == "--preset")),
    ]
    stage(script, *tiny(tmp_path / "whole"), *more)
    stage(script, *tiny(tmp_path / "parts"), *more, "--epochs", 1)
    stage(script, *tiny(tmp_path / "parts"), *more, "--resume")
    whole, parts = resume_file(tmp_path / "whole"), resume_file(tmp_path / "parts")
    assert_same(parts, whole)
    logs = [next((tmp_path / name).rglob("metrics.jsonl")).read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    without = [*more[len(flags) :], "--ema_decay", 0.5, "--perceptual_weight", 0, "--feature_weight", 0]
    stage(script, *tiny(tmp_path / "without"), *without)
    assert any(
        not torch.equal(value, whole["model_state"][name])
        for name, value in resume_file(tmp_path / "without")["model_state"].items()
    )


def test_a_run_is_resumed_with_its_terms_alone(stage, refused, tiny, cache, tmp_path, flags, vgg_file, vgg_state):
    base = [*tiny(tmp_path), "--cache_dir", cache]
    stage(train_lift, *base, *flags, "--epochs", 1)
    kept = (cache,)
    for name, value in (("perceptual_weight", 0.3), ("feature_weight", 0.2)):
        says = (f"{name} = {value}, not 0.7;",)
        refused(train_lift, *base, *flags, "--resume", f"--{name}", 0.7, says=says, keeps=kept)
    # The weights of VGG19 count by what they are, wherever they lie.
    torch.save(vgg_state | {"7.bias": vgg_state["7.bias"] + 1}, tmp_path / "other.pth")
    other = [*base, *flags, "--resume", "--vgg_weights", tmp_path / "other.pth"]
    refused(train_lift, *other, says=("vgg_fingerprint = ", "--vgg_weights with the weights of then"), keeps=kept)
    shutil.copy(vgg_file, tmp_path / "other.pth")
    stage(train_lift, *other)
    # By its folder alone, with the file that it named.
    stage(train_lift, "--resume", tmp_path / "checkpoints", "--epochs", 3, "--cache_dir", cache)
    assert read_checkpoint(tmp_path / LAST)["config"]["perceptual_weight"] == 0.3


def test_a_run_from_before_there_were_terms_goes_on_without(stage, refused, tiny, cache, tmp_path):
    base = [*tiny(tmp_path), "--cache_dir", cache]
    stage(train_lift, *base, "--epochs", 1)
    content = read_checkpoint(tmp_path / LAST)
    for name, value in {"perceptual_weight": 0, "feature_weight": 0, "vgg_fingerprint": None}.items():
        assert content["config"].pop(name) == value
        content["settings"].pop(name, None)
    save_checkpoint(tmp_path / LAST, content)
    refused(train_lift, *base, "--resume", "--feature_weight", 1, says=("feature_weight = 0.0, not 1.0;",))
    stage(train_lift, *base, "--resume")


def test_terms_are_logged_apart(stage, tiny, cache, tmp_path, flags):
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, *flags)
    rows = read_log(tmp_path)
    assert all(row["perceptual"] > 0 and row["features"] > 0 for row in rows) and len(rows) == 6
    events = EventAccumulator(str(tmp_path / LOG / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    for name, title in (("perceptual", "perceptual loss"), ("features", "feature loss")):
        assert [event.value for event in events.Scalars(title)] == pytest.approx([row[name] for row in rows], rel=1e-6)
        assert any(tag.startswith(f"{title} by timestep/") for tag in tags)


def test_terms_are_in_the_line_of_progress_and_in_bins_of_the_fine_clock(trainer, flags):
    run = trainer(*flags, "--batch_size", 12)
    batch = run.draw(*next(run.batches.epoch(0)))
    with torch.no_grad():
        losses = run.objective.losses(run.model.denoise, batch)
    run.train_step(*next(run.batches.epoch(0)))
    with mock.patch.object(run, "row", mock.Mock(return_value=run.row())) as row:
        bar = mock.Mock()
        write_row(run, None, bar, mock.Mock(images_per_second=lambda size: 1.0))
    values, curves = row.return_value
    [line] = bar.set_postfix_str.call_args.args
    for name, title in (("perceptual", "perceptual loss"), ("features", "feature loss")):
        assert values[name] == pytest.approx(losses[name].mean().item(), rel=1e-4)
        assert f"{title} {values[name]:.4g}" in line
        for k in range(10):
            chosen = losses[name][(batch.t_64 >= 100 * k) & (batch.t_64 < 100 * (k + 1))]
            found = curves.get(f"{title} by timestep/{100 * k:03d}-{100 * k + 99:03d}")
            assert found == (pytest.approx(chosen.mean().item(), rel=1e-4) if len(chosen) else None)


def test_the_features_are_those_of_the_ema_as_it_is_by_then(trainer):
    run = trainer("--feature_weight", 1, "--ema_decay", 0.5, "--lr", 0.01)
    [term] = run.objective.terms
    assert term.network is run.ema
    batch = run.draw(*next(run.batches.epoch(0)))
    before = run.objective.losses(run.model.denoise, batch)["features"]
    frozen = [weights.clone() for weights in run.ema.parameters()]
    weights = run.model.state_dict()
    kept = {name: value.clone() for name, value in weights.items()}
    run.train_step(*next(run.batches.epoch(0)))
    assert any(not torch.equal(*pair) for pair in zip(frozen, run.ema.parameters(), strict=True))
    assert all(each.grad is None for each in run.ema.parameters())
    run.model.load_state_dict(kept)
    assert not torch.equal(run.objective.losses(run.model.denoise, batch)["features"], before)


def test_a_step_in_parts_or_recomputed_is_the_same(trainer, flags):
    values = [
        run.train_step(*next(run.batches.epoch(0)))
        for run in (trainer(*flags, *more) for more in ([], ["--accumulate", 2], ["--recompute"]))
    ]
    for name in ("perceptual", "features", "grad_norm"):
        whole, parts, again = (each[name].item() for each in values)
        assert whole == pytest.approx(parts, rel=1e-4) and whole == pytest.approx(again, rel=1e-5)


def test_what_terms_look_through_is_compiled_with_the_network_or_stays_as_it_is(trainer, flags):
    plain, compiler = trainer(*flags), torch.compile
    expected = plain.train_step(*next(plain.batches.epoch(0)))
    with mock.patch.object(torch, "compile", functools.partial(compiler, backend="aot_eager")):
        run = trainer(*flags, "--compile")
        assert all(hasattr(term.look, "_torchdynamo_orig_callable") for term in run.objective.terms[1:])
        assert run.objective.terms[0].look is not run.objective.terms[0].network
        found = run.train_step(*next(run.batches.epoch(0)))
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4)
    assert run.compile and not run.notes

    def failing(call, **options):
        if call is run.ema.features or getattr(call, "__name__", "") == "features":
            raise RuntimeError("no features")
        return compiler(call, backend="aot_eager")

    with mock.patch.object(torch, "compile", failing):
        run = trainer(*flags, "--compile")
        assert run.notes == ["note: compiling failed (RuntimeError: no features); going on without"]
        assert run.objective.terms[1].look == run.ema.features
        found = run.train_step(*next(run.batches.epoch(0)))
    assert found["features"].item() == pytest.approx(expected["features"].item(), rel=1e-4)


# Memory


def test_weights_of_other_networks_are_not_counted_as_kept():
    model, other = nn.Sequential(nn.Linear(10, 20), nn.SiLU()), nn.Sequential(nn.Linear(20, 30), nn.Tanh())
    other.requires_grad_(False)
    x = torch.zeros(3, 10)
    # The input of the linear map and that of the SiLU; of the frozen one nothing but what its Tanh returns.
    assert saved_bytes(model, lambda: other(model(x)), others=[other]) == 3 * (10 + 20 + 30) * 4
    assert saved_bytes(model, lambda: other(model(x))) == 3 * (10 + 20 + 30) * 4 + 20 * 30 * 4


def test_memory_of_a_run_is_that_of_its_terms_too(trainer, flags, vgg):
    plain, both = training_memory(trainer("--ema_decay", 0.5)), training_memory(trainer(*flags))
    only = training_memory(trainer(*flags[:4]))
    weights = sum(value.numel() * 4 for value in vgg.layers.state_dict().values())
    assert (plain["VGG"], both["VGG"], only["VGG"]) == (0, weights, weights)
    assert both["EMA"] == plain["EMA"]
    # Maps of 64 channels at 16x16 pixels after two convolutions, at 8x8 of 128 after two more, and what is pooled.
    more = (only["activations"] - plain["activations"]) / 4
    assert 4 * (2 * 64 * 256 + 2 * 128 * 64) <= more < 4 * 2.5 * (2 * 64 * 256 + 2 * 128 * 64)
    assert only["activations"] < both["activations"] < plain["activations"] * 2 + 4 * more
    again = trainer(*flags, "--recompute")
    assert training_memory(again)["activations"] < 0.8 * both["activations"]
    assert again.model.unet.recompute and again.ema.unet.recompute
