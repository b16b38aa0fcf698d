"""train.sh and slurm_train.sbatch with stand-ins for Python, srun and scontrol: what starts, where, and how it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import train_baseline
import train_lift
from conftest import ROOT
from test_stages import defaults, parsed

SBATCH = ROOT / "scripts/slurm_train.sbatch"
SECONDS = 60  # Far longer than anything here takes, so that a busy machine fails no test.

# Each command writes what happens to it into the file `events`. A training runs until the file `end`, or one for it
# alone, is there, whatever signals it gets.
COMMANDS = """\
import json, os, signal, subprocess, sys, time

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


def write(what, who, **more):
    line = json.dumps({"what": what, "who": who, **more}) + "\\n"
    file = os.open(os.environ["PLACE"] + "/events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line.encode())


def note_signals(who, *signals, then=lambda number: None):
    for number in signals:
        signal.signal(number, lambda number, _: (write("signal", who, name=signal.Signals(number).name), then(number)))


def python(arguments):
    if arguments[0] == "-c":
        print(os.environ.get("GPUS", 0))
        return 0
    if arguments[0] == "-m":
        return torchrun(arguments)
    who = arguments[0].removesuffix(".py")
    note_signals(who, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    write("start", who, command=arguments, environment={name: os.environ.get(name) for name in NAMES})
    ends = [f"{os.environ['PLACE']}/end{suffix}" for suffix in ("", "_" + who)]
    deadline = time.monotonic() + 120
    while not any(map(os.path.exists, ends)) and time.monotonic() < deadline:
        time.sleep(0.01)
    write("end", who)
    return int(os.environ.get("STATUS_" + who, 0))


def torchrun(arguments):
    [script] = [i for i, word in enumerate(arguments) if word.endswith(".py")]
    [count] = [int(word.partition("=")[2]) for word in arguments if word.startswith("--nproc_per_node=")]
    handled = os.environ.get("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT").split(",")
    note_signals("torchrun", *(getattr(signal, name) for name in handled), then=lambda number: os._exit(1))
    write("torchrun", "torchrun", command=arguments[:script])
    workers = [
        subprocess.Popen(
            [sys.argv[0], *arguments[script:]], start_new_session=True, env=os.environ | {"RANK": str(rank)}
        )
        for rank in range(count)
    ]
    return max([worker.wait() for worker in workers])


def srun(arguments):
    options = []
    while arguments[0].startswith("-"):
        options.append(arguments.pop(0))
    write("srun", "srun", options=options, folder=os.getcwd())
    nodes, tasks = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    running = []
    for rank in range(nodes * tasks):
        places = {"PROCID": rank, "NTASKS": nodes * tasks, "LOCALID": rank % tasks, "NODEID": rank // tasks}
        environment = os.environ | {f"SLURM_{name}": str(value) for name, value in places.items()}
        running.append(subprocess.Popen(arguments, env=environment))
    note_signals("srun", signal.SIGUSR1, then=lambda number: [task.send_signal(number) for task in running])
    note_signals("srun", signal.SIGTERM, then=lambda number: [task.kill() for task in running])
    return max([task.wait() % 256 for task in running])


def scontrol(arguments):
    write("scontrol", "scontrol", command=arguments)
    if arguments[:2] == ["show", "hostnames"]:
        print(*(f"node-{chr(97 + i)}" for i in range(int(os.environ["SLURM_NNODES"]))), sep="\\n")
    elif arguments[:2] == ["show", "job"]:
        print(f"JobId={arguments[2]} JobName=lift\\n   JobState={os.environ['JOB_STATE']} Reason=None Requeue=1")
    return 0


sys.exit(globals()[os.path.basename(sys.argv[0])](sys.argv[1:]))
"""


@pytest.fixture
def scripts(checkout):
    """A checkout whose `start(file, *arguments, **settings)` runs a script of it in the background."""
    for name in ("python", "srun", "scontrol"):
        command = checkout / ".venv/bin" / name
        command.write_text(f"#!{sys.executable} -IS\n{COMMANDS}")
        command.chmod(0o755)
    started = []

    def start(file, *arguments, **settings):
        environment = {"PATH": os.environ["PATH"], "PYTHON": "false", "PLACE": str(checkout), **settings}
        # Bash traps no signal that was ignored when it started, as SIGINT is for a pytest in the background.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(
                ["bash", file, *arguments],
                cwd=checkout,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        started.append(process)
        return process

    def events(what):
        file = checkout / "events"
        rows = map(json.loads, file.read_text().splitlines()) if file.exists() else []
        return [SimpleNamespace(**row) for row in rows if row["what"] == what]

    def wait_for(what, count):
        """The events of a kind, once there are so many."""
        deadline = time.monotonic() + SECONDS
        while len(found := events(what)) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} times '{what}'"
            time.sleep(0.01)
        return found

    def end(process, who=None):
        """Let the trainings end, or one of them only; with a process, its status and what it printed."""
        (checkout / ("end" if who is None else f"end_{who}")).touch()
        if process is not None:
            out, err = process.communicate(timeout=SECONDS)
            return SimpleNamespace(status=process.returncode, out=out, err=err)

    yield SimpleNamespace(start=start, events=events, wait_for=wait_for, end=end, folder=checkout)
    (checkout / "end").touch()
    for process in started:
        process.communicate(timeout=SECONDS)


def names(events):
    return [event.who for event in events]


# train.sh


def test_one_gpu_is_trained_on_without_torchrun(scripts):
    ended = scripts.end(scripts.start("scripts/train.sh", "lift"))
    assert ended.status == 0, ended.err
    [run] = scripts.events("start")
    assert parsed(run.command) == (train_lift, defaults(train_lift))
    assert run.environment["RANK"] is None and scripts.events("torchrun") == []


def test_some_flags_are_of_both_models_and_some_of_lift_alone(scripts):
    settings = {"TRAIN_ARGS": "--preset improved", "LIFT_ARGS": "--representation residual --t_pairs band:2"}
    assert scripts.end(scripts.start("scripts/train.sh", "both", **settings)).status == 0
    baseline, lift = scripts.events("start")
    assert parsed(baseline.command)[1] == defaults(train_baseline, "--preset", "improved")
    flags = ("--preset", "improved", "--representation", "residual", "--t_pairs", "band:2")
    assert parsed(lift.command)[1] == defaults(train_lift, *flags)


def test_several_gpus_are_trained_on_through_torchrun(scripts):
    ended = scripts.end(scripts.start("scripts/train.sh", "both", GPUS_PER_JOB="4"))
    assert ended.status == 0, ended.err
    launches, runs = scripts.events("torchrun"), scripts.events("start")
    assert [run.command for run in launches] == [
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "--"]
    ] * 2
    assert names(runs) == ["train_baseline"] * 4 + ["train_lift"] * 4
    for run, module in zip(runs, [train_baseline] * 4 + [train_lift] * 4, strict=True):
        assert parsed(run.command) == (module, defaults(module))
        # All GPUs that are visible, as many as there are.
        assert run.environment["CUDA_VISIBLE_DEVICES"] is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"GPUS_PER_JOB": "0"}, "GPUS_PER_JOB='0'"),
        ({"GPUS_PER_JOB": "two"}, "GPUS_PER_JOB='two'"),
        ({"GPUS_PER_JOB": "2", "DEVICE": "0"}, "DEVICE='0'"),
    ],
)
def test_numbers_of_gpus_that_make_no_sense_are_refused(scripts, settings, says):
    ended = scripts.end(scripts.start("scripts/train.sh", **settings))
    assert ended.status == 2 and says in ended.err and ended.err.count("\n") == 1
    assert scripts.events("start") == []


@pytest.mark.parametrize(
    ("settings", "devices", "visible"),
    [
        ({"GPUS": "2"}, ("0", "1"), (None, None)),
        ({"GPUS": "2", "CUDA_VISIBLE_DEVICES": "5,3"}, ("0", "1"), ("5,3", "5,3")),
        ({"GPUS": "5", "GPUS_PER_JOB": "2"}, (None, None), ("0,1", "2,3")),
        (
            {"GPUS": "4", "GPUS_PER_JOB": "2", "CUDA_VISIBLE_DEVICES": "7,3,GPU-8a,GPU-2c"},
            (None, None),
            ("7,3", "GPU-8a,GPU-2c"),
        ),
    ],
)
def test_both_train_side_by_side_where_there_are_gpus_for_both(scripts, settings, devices, visible):
    process = scripts.start("scripts/train.sh", **settings)
    count = int(settings.get("GPUS_PER_JOB", 1))
    # None has ended yet when both have started.
    runs = scripts.wait_for("start", 2 * count)
    assert scripts.end(process).status == 0
    for module, device, gpus in zip((train_baseline, train_lift), devices, visible, strict=True):
        mine = [run for run in runs if run.who == module.__name__]
        assert len(mine) == count
        for run in mine:
            assert parsed(run.command) == (module, defaults(module) | {"device": device})
            assert run.environment["CUDA_VISIBLE_DEVICES"] == gpus


@pytest.mark.parametrize(
    "settings", [{}, {"GPUS": "1"}, {"GPUS": "3", "GPUS_PER_JOB": "2"}, {"GPUS": "2", "DEVICE": "cpu"}]
)
def test_both_train_one_after_the_other_elsewhere(scripts, settings):
    assert scripts.end(scripts.start("scripts/train.sh", **settings)).status == 0
    count = int(settings.get("GPUS_PER_JOB", 1))
    lines = [json.loads(line) for line in (scripts.folder / "events").read_text().splitlines()]
    order = [(row["who"], row["what"]) for row in lines if row["what"] in ("start", "end")]
    assert all(who == "train_baseline" for who, _ in order[: 2 * count])
    assert all(who == "train_lift" for who, _ in order[2 * count :]) and len(order) == 4 * count


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_request_to_stop_reaches_the_training_and_starts_no_other(scripts, number, gpus):
    process = scripts.start("scripts/train.sh", GPUS_PER_JOB=str(gpus))
    scripts.wait_for("start", gpus)
    process.send_signal(number)
    scripts.wait_for("signal", gpus)
    # The training saves now; the script waits for it.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert scripts.end(process).status == 0
    assert names(scripts.events("start")) == ["train_baseline"] * gpus
    received = scripts.events("signal")
    assert names(received) == ["train_baseline"] * gpus and {event.name for event in received} == {"SIGTERM"}


@pytest.mark.parametrize("gpus", [1, 2])
def test_ctrl_c_of_a_terminal_stops_the_same_way(scripts, gpus):
    process = scripts.start("scripts/train.sh", GPUS_PER_JOB=str(gpus))
    scripts.wait_for("start", gpus)
    os.killpg(process.pid, signal.SIGINT)
    # The processes of torchrun are in groups of their own, which the terminal does not reach.
    expected = ["SIGINT", "SIGTERM"] if gpus == 1 else ["SIGTERM", "SIGTERM"]
    assert sorted(event.name for event in scripts.wait_for("signal", 2)) == expected
    assert scripts.end(process).status == 0
    assert names(scripts.events("start")) == ["train_baseline"] * gpus
    assert names(scripts.events("signal")) == ["train_baseline"] * 2


def test_every_request_is_passed_on_so_that_a_second_can_stop_at_once(scripts):
    process = scripts.start("scripts/train.sh", "lift")
    scripts.wait_for("start", 1)
    for count in (1, 2):
        process.terminate()
        scripts.wait_for("signal", count)
    assert scripts.end(process).status == 0
    assert len(scripts.events("signal")) == 2


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_request_to_stop_reaches_both_trainings_side_by_side(scripts, gpus):
    process = scripts.start("scripts/train.sh", GPUS=str(2 * gpus), GPUS_PER_JOB=str(gpus))
    scripts.wait_for("start", 2 * gpus)
    process.terminate()
    received = scripts.wait_for("signal", 2 * gpus)
    assert sorted(names(received)) == ["train_baseline"] * gpus + ["train_lift"] * gpus
    assert scripts.end(process).status == 0


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_training_that_fails_ends_the_script_with_its_status(scripts, gpus, stopped):
    process = scripts.start("scripts/train.sh", GPUS_PER_JOB=str(gpus), STATUS_train_baseline="3")
    scripts.wait_for("start", gpus)
    if stopped:
        process.terminate()
        scripts.wait_for("signal", gpus)
    assert scripts.end(process).status == 3
    assert names(scripts.events("start")) == ["train_baseline"] * gpus


@pytest.mark.parametrize(("first", "second"), [("train_lift", "train_baseline"), ("train_baseline", "train_lift")])
def test_one_that_fails_side_by_side_leaves_the_other_alone(scripts, first, second):
    process = scripts.start("scripts/train.sh", GPUS="2", **{f"STATUS_{first}": "3"})
    scripts.wait_for("start", 2)
    scripts.end(None, first)
    scripts.wait_for("end", 1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    ended = scripts.end(process, second)
    assert ended.status == 1 and "status 3" in ended.err
    assert names(scripts.events("end")) == [first, second] and scripts.events("signal") == []


# train_ddpm.sh


@pytest.mark.parametrize("gpus", [1, 2])
def test_ablations_train_one_after_the_other_until_a_request_to_stop(scripts, gpus):
    process = scripts.start(
        "scripts/train_ddpm.sh", "cifar10", "--ablation", "none", "both", "attention", GPUS_PER_JOB=str(gpus)
    )
    scripts.wait_for("start", gpus)
    process.terminate()
    scripts.wait_for("signal", gpus)
    # The training saves now; the script waits for it.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert scripts.end(process).status == 0
    assert names(scripts.events("start")) == names(scripts.events("signal")) == ["train_baseline"] * gpus
    assert len(scripts.events("torchrun")) == (gpus > 1)


def test_an_ablation_that_fails_keeps_the_others_from_starting(scripts):
    process = scripts.start("scripts/train_ddpm.sh", "mnist", "--ablation", "all", STATUS_train_baseline="3")
    assert scripts.end(process).status == 3 and len(scripts.events("start")) == 1


# slurm_train.sbatch


@pytest.fixture
def submit(scripts):
    """Run the job script as SLURM does, as a copy elsewhere, on two nodes with two tasks each."""
    copy = scripts.folder / "spool/slurm_script"
    copy.parent.mkdir()
    shutil.copy(SBATCH, copy)
    # These lie where those of the cluster would, and Python in .venv.
    (scripts.folder / "bin").mkdir()
    for name in ("srun", "scontrol"):
        shutil.move(scripts.folder / ".venv/bin" / name, scripts.folder / "bin")

    def start(*arguments, **settings):
        slurm = {"JOB_ID": 1234567, "NNODES": 2, "NTASKS_PER_NODE": 2, "JOB_NODELIST": "node-[a-b]"}
        slurm |= {"SUBMIT_DIR": scripts.folder, "CPUS_PER_TASK": 8}
        environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        path = f"{scripts.folder / 'bin'}:{os.environ['PATH']}"
        return scripts.start(copy, *arguments, **environment, **{"JOB_STATE": "RUNNING", "PATH": path} | settings)

    return start


def requeued(scripts):
    return [event.command[1:] for event in scripts.events("scontrol") if event.command[0] == "requeue"]


def test_tasks_know_their_places(scripts, submit):
    ended = scripts.end(submit("lift", CUDA_VISIBLE_DEVICES="0,1"))
    assert ended.status == 0, ended.err
    tasks = [task.environment for task in scripts.events("start")]
    tasks.sort(key=lambda environment: int(environment["RANK"]))
    ports = {int(environment.pop("MASTER_PORT")) for environment in tasks}
    assert len(ports) == 1 and 1024 < min(ports) < 32768
    common = {"WORLD_SIZE": "4", "MASTER_ADDR": "node-a", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert tasks == [
        {"RANK": str(rank), "LOCAL_RANK": str(local_rank)} | common for rank, local_rank in enumerate((0, 1, 0, 1))
    ]
    [step] = scripts.events("srun")
    assert step.options == ["--kill-on-bad-exit=1"] and step.folder == str(scripts.folder)


@pytest.mark.parametrize("named", ["MODEL", "argument"])
@pytest.mark.parametrize("module", [train_baseline, train_lift], ids=lambda module: module.__name__)
def test_jobs_train_with_the_defaults_of_the_stages_and_resume(scripts, submit, module, named):
    name = module.__name__.removeprefix("train_")
    process = submit(name) if named == "argument" else submit(MODEL=name)
    assert scripts.end(process).status == 0
    for task in scripts.wait_for("start", 4):
        assert parsed(task.command) == (module, defaults(module) | {"resume": "auto"})


def test_jobs_take_the_settings_of_the_scripts(scripts, submit):
    settings = {"EPOCHS": "7", "HIDDEN_DIMS": "8,16", "LIMIT": "5", "DEVICE": "cpu", "TRAIN_ARGS": "--flip --resume"}
    assert scripts.end(submit("lift", **settings)).status == 0
    assert scripts.end(submit("lift", LIFT_ARGS="--representation residual")).status == 0
    assert parsed(scripts.events("start")[-1].command)[1]["representation"] == "residual"
    changes = {"epochs": 7, "hidden_dims": [8, 16], "limit": 5, "device": "cpu", "flip": True, "resume": "auto"}
    assert parsed(scripts.events("start")[0].command) == (train_lift, defaults(train_lift) | changes)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_job_that_is_stopped_saves_and_goes_back_into_the_queue(scripts, submit, number):
    process = submit("lift")
    scripts.wait_for("start", 4)
    process.send_signal(number)
    # srun and its four tasks.
    received = scripts.wait_for("signal", 5)
    assert {event.name for event in received} == {"SIGUSR1"}
    # SLURM may ask more than once; a second signal would keep the training from saving.
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert requeued(scripts) == []
    assert scripts.end(process).status == 0
    assert requeued(scripts) == [["1234567"]] and len(scripts.events("signal")) == 5


def test_a_job_that_is_done_stays_out_of_the_queue(scripts, submit):
    assert scripts.end(submit("lift")).status == 0
    assert requeued(scripts) == []


@pytest.mark.parametrize("stopped", [False, True])
def test_a_job_that_fails_stays_out_of_the_queue(scripts, submit, stopped):
    process = submit("baseline", STATUS_train_baseline="3")
    scripts.wait_for("start", 4)
    if stopped:
        process.send_signal(signal.SIGUSR1)
        scripts.wait_for("signal", 5)
    assert scripts.end(process).status == 3
    assert requeued(scripts) == []


def test_a_job_that_was_cancelled_stays_out_of_the_queue(scripts, submit):
    process = submit("lift", JOB_STATE="CANCELLED")
    scripts.wait_for("start", 4)
    process.terminate()
    scripts.wait_for("signal", 5)
    assert scripts.end(process).status == 0
    assert requeued(scripts) == []


@pytest.mark.parametrize(
    ("arguments", "settings", "says"),
    [
        ((), {}, "''"),
        (("both",), {}, "'both'"),
        (("lift", "baseline"), {}, "'baseline'"),
        (("lift",), {"SLURM_JOB_ID": ""}, "sbatch"),
    ],
)
def test_jobs_refuse_what_they_do_not_know(scripts, arguments, settings, says):
    ended = scripts.end(scripts.start("scripts/slurm_train.sbatch", *arguments, **settings))
    assert ended.status == 2 and says in ended.err and ended.err.count("\n") == 1
    assert scripts.events("srun") == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_job_script_explains_itself_without_doing_anything(scripts, flag):
    assert os.access(SBATCH, os.X_OK)
    ended = scripts.end(scripts.start("scripts/slurm_train.sbatch", flag))
    assert ended.status == 0 and "./scripts/slurm_train.sbatch" in ended.out
    assert "SBATCH" not in ended.out and "set -euo" not in ended.out and not ended.out.startswith("#")
    assert not (scripts.folder / "events").exists()


def test_sbatch_finds_its_options():
    lines = SBATCH.read_text().splitlines()
    # sbatch reads no options after the first line that is not a comment.
    comments = lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    options = [line.removeprefix("#SBATCH ") for line in comments if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= set(options)
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)
    assert sum("#SBATCH" in line for line in lines) == len(options)
    subprocess.run(["bash", "-n", SBATCH], check=True)
