"""train_ddpm.sh and eval_ddpm.sh with a stand-in for Python: what they train and score, and what they refuse."""

import pytest

import aggregate_results
import eval_fid_batch
import generate_with_path_30
import make_figures
import report
import train_baseline
from test_stages import defaults, parsed, run_script

SETS = {"cifar10": "uoft-cs/cifar10", "mnist": "ylecun/mnist"}
# What the report says of its training, beside the preset.
REPORT = {"resolution": 32, "epochs": 100, "batch_size": 64, "lr": 2e-4, "weight_decay": 0.0, "save_every": 20}
CHANGES = {
    "perceptual": {"perceptual_weight": 0.0},
    "features": {"feature_weight": 0.0},
    "both": {"perceptual_weight": 0.0, "feature_weight": 0.0},
    "attention": {"network": "ddpm_unet_plain"},
    "schedule": {"beta_schedule": "linear"},
}
ORDER = [None, *CHANGES]
SAMPLERS = [("ancestral", [1000]), ("ddim", [50, 100]), ("dpmpp_2m", [20])]


def expected(name, ablation=None, **changes):
    """The settings of a training of `train_ddpm.sh`."""
    run = f"ddpm_{name}" + (f"_without_{ablation}" if ablation else "")
    places = {"run": run, "output_dir": f"checkpoints/{run}", "log_dir": f"checkpoints/{run}/logs"}
    usual = defaults(train_baseline, "--preset", "ddpm_report") | REPORT | {"dataset": SETS[name]}
    usual |= {"pad": "black"} if name == "mnist" else {}
    return usual | places | CHANGES.get(ablation, {}) | changes


def trainings(commands):
    calls = [parsed(command) for command in commands]
    assert all(module is train_baseline for module, _ in calls)
    return [flags for _, flags in calls]


# Training


@pytest.mark.parametrize("name", SETS)
def test_the_model_of_the_report_is_trained_with_its_settings(checkout, name):
    ended, commands = run_script(checkout, "train_ddpm.sh", name)
    assert ended.returncode == 0, ended.stderr
    [flags] = trainings(commands)
    assert flags == expected(name)
    said = {"network": "ddpm_unet", "beta_schedule": "cosine_report", "prediction_type": "epsilon"}
    said |= {"perceptual_weight": 0.1, "feature_weight": 0.05, "classes": None, "objective": "denoising"}
    assert {name: flags[name] for name in said} == said


def test_every_ablation_is_a_run_of_its_own(checkout):
    ended, commands = run_script(checkout, "train_ddpm.sh", "cifar10", "--ablation", "all")
    assert ended.returncode == 0, ended.stderr
    assert trainings(commands) == [expected("cifar10", ablation) for ablation in ORDER]
    (checkout / "commands").unlink()
    ended, commands = run_script(checkout, "train_ddpm.sh", "mnist", "--ablation", "attention", "none", "--wandb")
    assert ended.returncode == 0, ended.stderr
    assert trainings(commands) == [expected("mnist", ablation, wandb=True) for ablation in ("attention", None)]


def test_weights_of_vgg_go_where_the_perceptual_term_is(checkout):
    ended, commands = run_script(checkout, "train_ddpm.sh", "cifar10", "--ablation", "all", VGG_WEIGHTS="my vgg.pth")
    assert ended.returncode == 0, ended.stderr
    given = [flags["vgg_weights"] for flags in trainings(commands)]
    assert given == [None if ablation in ("perceptual", "both") else "my vgg.pth" for ablation in ORDER]


def test_settings_come_from_the_environment(checkout):
    settings = {"DATASET": "a folder", "RESOLUTION": "16", "EPOCHS": "3", "BATCH_SIZE": "8", "LR": "0.1", "SEED": "7"}
    settings |= {"HIDDEN_DIMS": "8,16", "LIMIT": "5", "DEVICE": "cpu", "EMA_DECAY": "0.5", "SAVE_EVERY": "1"}
    ended, commands = run_script(
        checkout, "train_ddpm.sh", "cifar10", **settings, TRAIN_ARGS="--weight_decay 0.2 --resume auto"
    )
    assert ended.returncode == 0, ended.stderr
    changes = {"dataset": "a folder", "resolution": 16, "epochs": 3, "batch_size": 8, "lr": 0.1, "seed": 7, "limit": 5}
    changes |= {"hidden_dims": [8, 16], "device": "cpu", "ema_decay": 0.5, "save_every": 1}
    assert trainings(commands) == [expected("cifar10", **changes, weight_decay=0.2, resume="auto")]


def test_classes_are_another_run(checkout):
    for script in ("train_ddpm.sh", "eval_ddpm.sh"):
        ended, _ = run_script(checkout, script, "mnist", CLASSES="yes")
        assert ended.returncode == 2 and "CLASSES='yes' is neither 0 nor 1" in ended.stderr
    ended, commands = run_script(checkout, "train_ddpm.sh", "mnist", "--ablation", "schedule", CLASSES="1")
    assert ended.returncode == 0, ended.stderr
    [flags] = trainings(commands)
    assert flags["classes"] is not None and flags["run"] == "ddpm_mnist_classes_without_schedule"


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"RUN": "mine"}, ("mine{}", "checkpoints/mine{}", "checkpoints/mine{}/logs")),
        ({"CHECKPOINT_DIR": "here"}, ("ddpm_mnist{}", "here{}", "checkpoints/ddpm_mnist/logs{}")),
        ({"CHECKPOINT_DIR": "a", "LOG_DIR": "a/b"}, ("ddpm_mnist{}", "a{}", "a{}/b")),
    ],
)
def test_runs_and_places_have_the_name_of_the_ablation_behind_them(checkout, settings, places):
    ended, commands = run_script(checkout, "train_ddpm.sh", "mnist", "--ablation", "none", "features", **settings)
    assert ended.returncode == 0, ended.stderr
    for flags, suffix in zip(trainings(commands), ("", "_without_features"), strict=True):
        found = tuple(flags[name] for name in ("run", "output_dir", "log_dir"))
        assert found == tuple(place.format(suffix) for place in places)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name the data set, cifar10 or mnist"),
        (["imagenet"], "unknown data set 'imagenet'"),
        (["cifar10", "mnist"], "unknown argument 'mnist'"),
        (["cifar10", "--ablation"], "--ablation needs a name"),
        (["cifar10", "--ablation", "--wandb"], "--ablation needs a name"),
        (["cifar10", "--ablation", "attention", "colour"], "unknown ablation 'colour'"),
        (["mnist", "--resume"], "unknown argument '--resume'"),
    ],
)
def test_training_refuses_what_it_does_not_know(checkout, arguments, says):
    ended, commands = run_script(checkout, "train_ddpm.sh", *arguments)
    assert ended.returncode == 2 and says in ended.stderr and ended.stderr.count("\n") == 1 and commands == []


# Scores


@pytest.fixture
def models(checkout):
    """`models(*ends)` makes empty checkpoints, each behind `checkpoints/ddpm_`, in the checkout, which it returns."""

    def make(*ends):
        for end in ends:
            file = checkout / f"checkpoints/ddpm_{end}ep.pth"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        return checkout

    return make


def calls_of(commands, module):
    return [flags for found, flags in map(parsed, commands) if found is module]


def scored(commands):
    """The calls of eval_fid_batch.py that score."""
    return [call for call in calls_of(commands, eval_fid_batch) if call["write_reference"] is None]


def files(*ends):
    return [f"checkpoints/ddpm_{end}ep.pth" for end in ends]


def test_the_last_epoch_of_every_run_is_scored_by_every_sampler_and_set_against_the_targets(models):
    ends = ("cifar10/baseline_100", "cifar10_without_both/baseline_100", "cifar10_without_attention/baseline_80")
    checkout = models(*ends, "cifar10/baseline_20", "mnist/baseline_100")
    ended, commands = run_script(checkout, "eval_ddpm.sh", "cifar10")
    assert ended.returncode == 0, ended.stderr
    results = "results/ddpm_cifar10"
    usual = defaults(eval_fid_batch, "--checkpoint", *files(*ends)) | {"output": f"{results}/fid_results.csv"}
    usual |= {"model_type": None, "checkpoint_dir": None, "heatmap_dir": None}
    usual |= {"metrics": ["fid", "is"], "weights": ["ema"]}
    assert scored(commands) == [
        usual | {"solver": solver, "num_steps": steps, "eta": 0.0 if solver == "ddim" else None}
        for solver, steps in SAMPLERS
    ]
    generated = calls_of(commands, generate_with_path_30)
    assert [call["checkpoint"] for call in generated] == files(*ends)
    assert {(call["solver"], call["num_steps"], call["ema"], call["num_images"]) for call in generated} == {
        ("dpmpp_2m", 20, True, 64)
    }
    [figure] = calls_of(commands, make_figures)
    names = ["DDPM, epoch 100", "without both, epoch 100", "without attention, epoch 80"]
    assert [text.partition("=")[0] for text in figure["inputs"]] == names
    assert [text.partition("=")[2] for text in figure["inputs"]] == [call["output"] for call in generated]
    assert figure["output"] == f"{results}/samples_100ep_ema.png" and figure["real"] == f"{results}/training_images"
    [page], [table] = calls_of(commands, report), calls_of(commands, aggregate_results)
    assert page["targets"] == table["targets"] == "cifar10"
    assert page["output"] == f"{results}/report.html" and table["output"] == f"{results}/fid_table"
    assert page["results"] == table["input"][0] == f"{results}/fid_results.csv"


def test_epochs_samplers_and_flags_reach_the_scores(models):
    checkout = models("mnist/baseline_20", "mnist/baseline_40", "mnist_without_features/baseline_40")
    settings = {"SAMPLERS": "heun:9 ddim:10", "METRICS": "swd", "WEIGHTS": "raw ema", "NUM_IMAGES": "12", "ETA": "1"}
    settings |= {"SAMPLE_IMAGES": "3", "DEVICE": "cpu"}
    ended, commands = run_script(checkout, "eval_ddpm.sh", "mnist", "20", "--multi-seed", "40", "--force", **settings)
    assert ended.returncode == 0, ended.stderr
    calls = scored(commands)
    ends = files("mnist/baseline_20", "mnist/baseline_40", "mnist_without_features/baseline_40")
    assert [(call["solver"], call["num_steps"], call["eta"]) for call in calls] == [
        ("heun", [9], None),
        ("ddim", [10], 1),
    ]
    for call in calls:
        assert call["checkpoint"] == ends and call["force"] and call["seeds"] == [42, 43, 44, 45, 46]
        assert (call["metrics"], call["weights"], call["num_images"]) == (["swd"], ["raw", "ema"], 12)
    generated = calls_of(commands, generate_with_path_30)
    assert [call["ema"] for call in generated] == [False] * 3 + [True] * 3
    assert {call["num_images"] for call in generated} == {3} and len({call["output"] for call in generated}) == 6
    assert [call["targets"] for call in calls_of(commands, report)] == ["mnist"]


def metrics_of(command):
    start = command.index("--metrics") + 1
    return command[start : next(k for k in range(start, len(command)) if command[k].startswith("--"))]


def test_a_judge_is_asked_beside_the_metrics(models):
    ended, commands = run_script(models("mnist/baseline_9"), "eval_ddpm.sh", "mnist", JUDGE="my judge.pth")
    assert ended.returncode == 0, ended.stderr
    calls = [(call["metrics"], call["judge"]) for call in scored(commands)]
    assert calls == [(["fid", "is", "fd", "cs"], "my judge.pth")] * len(SAMPLERS)


@pytest.mark.parametrize(
    ("settings", "again"),
    [({}, None), ({"METRICS": "fid swd"}, ["swd"]), ({"JUDGE": "f", "METRICS": "kid nn is"}, ["nn", "fd", "cs"])],
)
def test_without_inception_what_needs_none_is_measured_and_the_status_says_so(models, settings, again):
    checkout = models("cifar10/baseline_9")
    python = checkout / ".venv/bin/python"
    lines = python.read_text().splitlines()
    fails = 'for word in "$@"; do [[ $word =~ ^(fid|kid|is)$ ]] && { echo "no weights" >&2; exit 1; }; done\n'
    writes = (
        "[[ $* != *--metrics* ]] || { mkdir -p results/ddpm_cifar10; touch results/ddpm_cifar10/fid_results.csv; }\n"
    )
    python.write_text("\n".join(lines) + "\n" + fails + writes)
    ended, commands = run_script(checkout, "eval_ddpm.sh", "cifar10", **settings, SAMPLERS="ddim:5 heun:5")
    assert ended.returncode == 1 and "--inception_weights FILE" in ended.stderr.splitlines()[-1]
    asked = [metrics_of(command) for command in commands if "--metrics" in command]
    metrics = settings.get("METRICS", "fid is").split() + (["fd", "cs"] if "JUDGE" in settings else [])
    assert asked == ([metrics] if again is None else [metrics, again]) * 2
    # Samples are there in any case, tables and the page where there is a score.
    stages = [command[0] for command in commands]
    assert "generate_with_path_30.py" in stages and ("report.py" in stages) is (again is not None)


@pytest.mark.parametrize(
    ("arguments", "settings", "says"),
    [
        ([], {}, "name the data set"),
        (["mnist"], {}, "no checkpoint in checkpoints/ddpm_mnist: train with train_ddpm.sh mnist"),
        (["cifar10", "7"], {}, "no checkpoint of epoch 7 in checkpoints/ddpm_cifar10"),
        (["cifar10", "last"], {}, "'last' is not an epoch"),
        (["cifar10", "--ema"], {}, "unknown flag '--ema'"),
        (["cifar10"], {"SAMPLERS": "ddim"}, "SAMPLERS: 'ddim' is not SOLVER:STEPS"),
        (["cifar10"], {"SAMPLERS": "ddim:10,"}, "SAMPLERS: 'ddim:10,' is not SOLVER:STEPS"),
    ],
)
def test_scoring_refuses_what_it_does_not_know(models, arguments, settings, says):
    ended, commands = run_script(models("cifar10/baseline_9"), "eval_ddpm.sh", *arguments, **settings)
    assert ended.returncode == 2 and says in ended.stderr and ended.stderr.count("\n") == 1 and commands == []
