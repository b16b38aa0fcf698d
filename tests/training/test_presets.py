import pytest
import torch

import train_baseline
import train_lift
from checkpoint import checkpoint_file, read_checkpoint, save_checkpoint
from conftest import LAST, RUN, assert_same
from planning.presets import PRESETS, balanced_weights, fits_preset, loss_weights_of, preset_help, preset_of
from training.settings import TrainingSettings

PAIRS = {"overcomplete": "band:diagonal,1", "residual": "band:image,1"}


@pytest.mark.parametrize("representation", PAIRS)
def test_balanced_weights_are_shares_of_dimensions(representation):
    # Values of a 64x64 image of three channels that are free: every 2x2 block of the details sums to 0.
    image = torch.randn(3, 64, 64, dtype=torch.float64)
    fine = image.numel() - (image.numel() // 4 if representation == "residual" else 0)
    coarse = 3 * 32 * 32
    assert balanced_weights(representation) == pytest.approx((fine / (fine + coarse), coarse / (fine + coarse)))
    assert sum(balanced_weights(representation)) == 1


def of_preset(preset, model_type, representation, **changed):
    """The config of a run of a preset."""
    improved = preset == "improved"
    config = {"prediction_type": "v", "beta_schedule": "cosine", "ema_rampup_ratio": 0.05} if improved else {
        "prediction_type": "epsilon", "beta_schedule": "cosine_clipped", "ema_rampup_ratio": 0.0
    }  # fmt: skip
    two = model_type in ("dual", "shared_t")
    balanced = (0.75, 0.25) if representation == "residual" else (0.8, 0.2)
    weights = (balanced if improved else (1.0, 1.0)) if two else (1.0,)
    return config | {"model_type": model_type, "representation": representation, "loss_weights": weights} | changed


@pytest.mark.parametrize("preset", ["published", "improved"])  # Of which files from before there were names are.
@pytest.mark.parametrize(
    ("model_type", "representation"),
    [("dual", "overcomplete"), ("dual", "residual"), ("shared_t", "residual"), ("baseline", "overcomplete")],
)
def test_a_config_fits_the_preset_that_it_has_all_of(preset, model_type, representation):
    config = of_preset(preset, model_type, representation)
    other = next(name for name in PRESETS if name != preset)
    assert fits_preset(preset, config) and not fits_preset(other, config)
    # Pairs of timesteps do not count, everything else does.
    assert fits_preset(preset, config | {"t_pairs": "band:7"})
    changed = {"prediction_type": "x0", "beta_schedule": "linear", "ema_rampup_ratio": 0.5, "loss_weights": (1.0, 3.0)}
    for name, value in changed.items():
        assert not fits_preset(preset, config | {name: value}), name
    # Lists are how files have them, and what a file does not say is as it was before it could be said.
    assert fits_preset(preset, config | {"loss_weights": list(config["loss_weights"])})
    unsaid = {name: value for name, value in config.items() if name not in ("loss_weights", "representation")}
    said = preset == "improved" and model_type != "baseline"
    assert fits_preset(preset, unsaid) == (not said)
    assert loss_weights_of(unsaid) == ((1.0,) if model_type == "baseline" else (1.0, 1.0))
    assert loss_weights_of(config) == config["loss_weights"]


def test_a_config_without_a_preset_is_of_the_one_that_predicts_alike():
    assert [preset_of({"prediction_type": kind}) for kind in ("epsilon", "v", "x0")] == [
        "published",
        "improved",
        "published",
    ]
    assert preset_of({"preset": "published", "prediction_type": "v"}) == "published" == preset_of({})


def test_without_a_preset_a_run_is_as_published(trainer):
    config = trainer().config
    assert (config["prediction_type"], config["beta_schedule"]) == ("epsilon", "cosine_clipped")
    assert (config["t_pairs"], config["loss_weights"]) == ("independent", [1.0, 1.0])
    assert config["representation"] == "overcomplete" and config["preset"] == "published"
    assert config["ema_rampup_ratio"] == 0


def test_an_improved_run(trainer):
    run = trainer("--preset", "improved")
    assert (run.scheduler.prediction_type, run.scheduler.beta_schedule) == ("v", "cosine")
    assert run.config["ema_rampup_ratio"] == 0.05
    assert run.config["t_pairs"] == "band:diagonal,1" and run.config["loss_weights"] == pytest.approx([0.8, 0.2])


def test_flags_win_over_a_preset(trainer):
    flags = ("--t_pairs", "same", "--loss_weights", "1,3", "--prediction_type", "epsilon", "--beta_schedule", "linear")
    flags += ("--ema_rampup_ratio", "0")
    for order in (("--preset", "improved", *flags), (*flags, "--preset", "improved")):
        config = trainer(*order).config
        assert (config["prediction_type"], config["beta_schedule"]) == ("epsilon", "linear")
        assert (config["t_pairs"], config["loss_weights"]) == ("same", [1.0, 3.0])
        assert config["ema_rampup_ratio"] == 0


def test_improved_models_of_other_types(stage, tiny, cache, tmp_path):
    for model, pairs, weights in (
        ("shared_t", "same", [0.8, 0.2]),
        ("single_t", "independent", [1.0]),
        ("baseline", None, [1.0]),
    ):
        flags = [*tiny(tmp_path), "--cache_dir", cache, "--preset", "improved"]
        stage(*([train_baseline, *flags] if model == "baseline" else [train_lift, *flags, "--model", model]))
        config = read_checkpoint(checkpoint_file(tmp_path / "checkpoints", model, 2))["config"]
        assert (config["t_pairs"], config["prediction_type"]) == (pairs, "v") and config["beta_schedule"] == "cosine"
        assert config["loss_weights"] == pytest.approx(weights)


def test_auto_weights_are_those_of_the_representation(stage, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--loss_weights", "auto", "--dry_run"]
    for representation, said in (("overcomplete", "[0.8, 0.2]"), ("residual", "[0.75, 0.25]")):
        output = stage(train_lift, *flags, "--representation", representation).output
        assert f"loss_weights = {said}\n" in output and f"representation = {representation}\n" in output
    output = stage(train_lift, *flags, "--representation", "residual", "--preset", "improved").output
    assert "t_pairs = band:image,1\n" in output
    assert "loss_weights = [1.0]" in stage(train_lift, *flags, "--model", "no_t").output


def test_a_preset_is_what_it_sets(stage, refused, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache]
    stage(train_lift, *flags, "--preset", "improved")
    last = checkpoint_file(tmp_path / "checkpoints", "dual", "last")
    refused(train_lift, *flags, "--resume", says=["resume with the same value"])
    spelt = ["--prediction_type", "v", "--beta_schedule", "cosine", "--loss_weights", "0.8,0.2"]
    spelt += ["--ema_rampup_ratio", 0.05, "--t_pairs", "band:diagonal,1"]
    stage(train_lift, *flags, "--resume", *spelt, "--epochs", 3)
    assert read_checkpoint(last)["epoch"] == 3


def test_runs_from_before_there_were_representations_go_on_over_complete(stage, refused, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache]
    stage(train_lift, *flags)
    last = checkpoint_file(tmp_path / "checkpoints", "dual", "last")
    content = read_checkpoint(last)
    del content["config"]["representation"]
    save_checkpoint(last, content)
    refused(train_lift, *flags, "--resume", "--epochs", 3, "--representation", "residual", says=["representation ="])
    stage(train_lift, *flags, "--resume", "--epochs", 3)
    assert read_checkpoint(last)["config"]["representation"] == "overcomplete"


def test_runs_from_before_there_was_a_ramp_up_go_on_without(stage, refused, tiny, cache, tmp_path, straight):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN]
    stage(train_lift, *flags)
    content = read_checkpoint(tmp_path / LAST)
    del content["config"]["ema_rampup_ratio"]
    save_checkpoint(tmp_path / LAST, content)
    flags += ["--resume", "--epochs", 4]
    refused(train_lift, *flags, "--ema_rampup_ratio", 0.05, says=["ema_rampup_ratio = 0.0, not 0.05", "same value"])
    stage(train_lift, *flags)
    assert_same(*(read_checkpoint(place / LAST)["ema_state"] for place in (tmp_path, straight())))


def test_improved_runs_from_before_are_resumed_by_their_folder_as_they_were(stage, tiny, cache, tmp_path):
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, "--preset", "improved", "--ema_rampup_ratio", 0)
    content = read_checkpoint(tmp_path / LAST)
    del content["settings"]
    for name in ("ema_rampup_ratio", "preset", "run"):
        del content["config"][name]
    save_checkpoint(tmp_path / LAST, content)
    more = ["--log_dir", tmp_path / "logs", "--cache_dir", cache, "--precision", "fp32"]
    stage(train_lift, "--resume", tmp_path / "checkpoints", "--epochs", 3, *more)
    config = read_checkpoint(tmp_path / LAST)["config"]
    assert (config["preset"], config["ema_rampup_ratio"], config["epochs"]) == ("improved", 0, 3)


def test_a_run_too_short_for_its_ema_is_pointed_out(stage, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--dry_run"]  # Six steps.
    for more, said in (
        ((), "warning: the EMA weights still hold 100% of the initial weights after 6 steps at decay 0.9999"),
        (("--ema_decay", 0.9), "hold 53% of the initial weights after 6 steps"),
        (("--ema_decay", 0.6), None),
        (("--ema_decay", 0), None),
        (("--preset", "improved"), None),
    ):
        output = stage(train_lift, *flags, *more).output
        assert ("EMA weights" in output) == (said is not None) and (said or "") in output


@pytest.mark.parametrize("model", ["single_t", "no_t"])
def test_a_model_of_one_prediction_has_no_residual_image(refused, tiny, cache, tmp_path, model):
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--model", model, "--representation", "residual"]
    refused(train_lift, *flags, says=["no image can be composed", model], status=2)


@pytest.mark.parametrize("script", [train_lift, train_baseline])
def test_help_says_what_presets_set(stage, script):
    words = " ".join(stage(script, "--help").output.split())
    # Lines are broken within words that hold a hyphen.
    assert preset_help().replace(" ", "") in words.replace(" ", "")


def test_flags_that_help_names_are_the_whole_of_a_preset():
    said = dict(
        text.split(": ", 1) for text in preset_help().replace("as improved but for what is named, ", "").split("; ")
    )
    assert list(said) == list(PRESETS)
    for name in said.keys() - {"published", "improved"}:
        words = said[name].split()
        flags = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
        flags |= {key: float(value) for key, value in flags.items() if key.endswith("_weight")}
        model_type = "baseline" if name == "cold" else "dual"  # Which degrades one scale.
        spelt, named = (
            TrainingSettings(model_type=model_type, **given)
            for given in ({"preset": "improved"} | flags, {"preset": name})
        )
        assert {key: getattr(spelt, key) for key in PRESETS[name]} == {
            key: getattr(named, key) for key in PRESETS[name]
        }
    for name, other in (("published", "improved"), ("improved", "published")):
        differ = {key for key, value in PRESETS[name].items() if value != PRESETS[other][key]}
        assert {word.removeprefix("--") for word in said[name].split() if word.startswith("--")} == differ


def test_a_preset_counts_anew_in_a_copy():
    published = TrainingSettings(model_type="dual")
    improved = published.but(preset="improved")
    assert improved == TrainingSettings(model_type="dual", preset="improved")
    assert improved.but(representation="residual").t_pairs == "band:image,1"
    assert improved.but(model_type="single_t").loss_weights == (1.0,)
    # What was given stays.
    assert TrainingSettings(model_type="dual", t_pairs="same").but(preset="improved").t_pairs == "same"


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "shared_t", "t_pairs": "band:1"},
        {"model_type": "single_t", "t_pairs": "follow:1"},
        {"model_type": "no_t", "loss_weights": (0.5,)},
        {"model_type": "dual", "loss_weights": (1,)},
        {"model_type": "dual", "cuda_graphs": True, "accumulate": 2},
        {"model_type": "dual", "replan_every": 3},
        {"model_type": "baseline", "representation": "residual"},
    ],
)
def test_settings_that_exclude_each_other_are_refused_before_anything_is_read(values):
    with pytest.raises(ValueError, match="leave|use band"):
        TrainingSettings(**values)


def test_settings_of_a_checkpoint_make_the_same_run_again(trainer):
    run = trainer("--preset", "improved", "--representation", "residual", "--min_snr_gamma", 5)
    names = run.settings.recorded()
    again = TrainingSettings(**{name: run.config[name] for name in names})
    assert again.recorded() == names
