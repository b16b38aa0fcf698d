"""What rows say of a training is what its settings were, whatever they are and however old the checkpoint is."""

from pathlib import Path

import pytest

from checkpoint import MODEL_CLASSES, LoadedModel, build_model, build_scheduler
from evaluation.training_columns import TRAINING_FIELDS, describe_training
from planning.presets import PRESETS
from result_rows import OTHER_TRAINING, TRAINING
from training.settings import TrainingSettings


def loaded(step=30, without=(), more=None, **settings):
    """A model as `load_model` returns it, of settings of a training."""
    config = TrainingSettings(**{"model_type": "dual", "hidden_dims": (8, 16)} | settings).recorded()
    config |= {"channels": 3, "num_train_timesteps": 1000, "precision": "bf16", "data_fingerprint": "feed"}
    config |= {"epoch": 2, "step": step, "weights": "raw"} | (more or {})
    config = {name: value for name, value in config.items() if name not in without}
    return LoadedModel(build_model(config), build_scheduler(config), config, "c0ffee", Path("model.pth"))


def test_the_rows_of_the_tests_have_every_column():
    assert tuple(TRAINING) == tuple(OTHER_TRAINING) == TRAINING_FIELDS
    assert not set(TRAINING.items()) & set(OTHER_TRAINING.items())


def test_every_setting_is_said():
    model = loaded(
        lr=1e-5, batch_size=10, weight_decay=0.5, grad_clip=2.0, ema_decay=0.0, seed=7, resolution=16, flip=True,
        timestep_weights="sigma2", t_law="log_normal", times="real", lr_schedule="cosine", epochs=40,
        loss_weights=(1.0, 0.25), perceptual_weight=0.2, feature_weight=0.0, prediction_type="x0",
        beta_schedule="linear", ema_rampup_ratio=0.25, t_pairs="follow:2", replan_every=7, replan_images=30,
        classes="label", network="ddpm_unet", label_dropout=0.2, more={"run": "mine", "class_names": ["cat", "dog"]},
    )  # fmt: skip
    assert describe_training(model, 150) == {
        "run": "mine",
        "preset": "",
        "process": "vp linear",
        "prediction": "x0",
        "loss_weights": "[1,0.25]",
        "perceptual_weight": "0.2",
        "feature_weight": "0",
        "objective": "denoising",
        "vlb_weight": "none",
        "student": "none",
        "teacher": "none",
        "student_images": "none",
        "teacher_calls": "none",
        "consistency": "none",
        "consistency_solver": "none",
        "degradation": "none",
        "severity_schedule": "none",
        "input_noise": "none",
        "min_snr_gamma": "none",
        "timestep_weights": "sigma2",
        "t_law": "log_normal:-1.2,1.2",
        "times": "real",
        "coupling": "independent",
        "start_data": "noise",
        "lr": "1e-05",
        "lr_schedule": "cosine over 40 epochs",
        "classes": "[cat,dog]",
        "label_dropout": "0.2",
        "batch_size": "10",
        "weight_decay": "0.5",
        "grad_clip": "2",
        "ema_decay": "0",
        "ema_rampup_ratio": "0.25",
        "replan_every": "7",
        "replan_images": "30",
        "network": "ddpm_unet",
        "hidden_dims": "[8,16]",
        "parameters": str(sum(value.numel() for value in model.model.state_dict().values())),
        "resolution": "16",
        "latents": "none",
        "training_images": "150",
        "training_data": "feed",
        "flip": "yes",
        "training_precision": "bf16",
        "training_seed": "7",
        "images_seen": "300",
    } | ({"preset": "published (changed)"} if "preset" in model.config else {})


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model_type", MODEL_CLASSES)
@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
def test_a_preset_is_known_by_what_it_sets(preset, model_type, representation):
    kind = MODEL_CLASSES[model_type]
    if representation == "residual" and kind.num_predictions == 1 and not kind.coarse_given:
        return
    if PRESETS[preset]["objective"] == "consistency" and kind.num_predictions < kind.num_scales:
        return
    if preset == "cold" and model_type != "baseline":  # Which degrades one scale.
        return
    chosen = {"model_type": model_type, "preset": preset, "representation": representation}
    named, unnamed = loaded(**chosen, more={"preset": preset}), loaded(**chosen, without=["preset"])
    assert describe_training(named, None)["preset"] == describe_training(unnamed, None)["preset"] == preset
    # The pairs of timesteps are in a column of their own.
    if model_type == "dual" and PRESETS[preset]["objective"] != "consistency":  # Which has pairs of its own.
        assert describe_training(loaded(**chosen, t_pairs="same", without=["preset"]), None)["preset"] == preset
    if preset == "cold":  # Of which all that can be chosen has columns of its own.
        other = loaded(**chosen, t_law="importance", more={"preset": preset})
        assert describe_training(other, None)["preset"] == "cold (changed)"
        return
    changes = [{"prediction_type": "x0"}, {"process": "ve" if preset == "flow" else "flow", "prediction_type": "v"}]
    changes[1]["objective"] = "denoising"  # The only one of that process.
    if preset not in ("ncsn", "ve", "flow"):
        changes.append({"beta_schedule": "cosine" if "linear" in PRESETS[preset]["beta_schedule"] else "linear"})
    changes += [{"loss_weights": (1.0, 0.5)}] if MODEL_CLASSES[model_type].num_predictions > 1 else []
    for change in changes:
        assert describe_training(loaded(**chosen | change, without=["preset"]), None)["preset"] == ""
        other = loaded(**chosen | change, more={"preset": preset})
        assert describe_training(other, None)["preset"] == f"{preset} (changed)"


def test_an_old_checkpoint_says_what_it_can():
    """Those from before there were choices made them as published."""
    new = ["representation", "loss_weights", "min_snr_gamma", "run", "preset", "data_fingerprint", "ema_rampup_ratio"]
    new += ["timestep_weights", "t_law", "times", "objective", "vlb_weight", "network", "student"]
    new += ["consistency", "consistency_solver"]
    new += ["perceptual_weight", "feature_weight", "latents", "coupling", "start_dataset"]
    old = loaded(without=new)
    said, new = describe_training(old, None), describe_training(loaded(more={"preset": "published"}), 99)
    silent = {name: "" for name in ("run", "training_images", "training_data")}
    assert said == new | silent


def test_the_coupling_of_noise_and_images_is_said():
    of_flow = {"preset": "flow"}
    assert describe_training(loaded(**of_flow, coupling="independent"), None)["coupling"] == "independent"
    assert describe_training(loaded(**of_flow, coupling="ot"), None)["coupling"] == "ot"
    assert describe_training(loaded(**of_flow, more={"coupling": "pairs"}), None)["coupling"] == "pairs"
