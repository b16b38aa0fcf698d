"""A training run: from the position of a trainer to its last epoch or a stop signal, saving and logging on the way."""

import json
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

import cli
from checkpoint import peek
from data import ImageSet
from diffusion.space import side_of
from images.sources import Classes
from networks.autoencoder import load_autoencoder
from networks.ema import USUAL_RAMPUP, ema_note
from planning.conditions import listed
from runtime.device import choose_kernels, is_out_of_memory
from runtime.distributed import Processes
from runtime.progress import Progress
from runtime.safe_write import remove_temporaries, versions
from runtime.settings import lines_of
from training import showing
from training.memory import out_of_memory_message, peak_memory, training_memory
from training.objective import MEASURE_NAMES
from training.objectives import WITH_TEACHER
from training.resume import placed
from training.run_log import RunLog
from training.settings import TrainingSettings
from training.stop import StopRequest
from training.teaching import Teaching
from training.trainer import Trainer
from training.vgg import load_vgg

SHOWN_CLASSES = 3
MIN_EPSILON_SNR = 1e-6  # Below it, the error of a noise prediction is amplified a thousand times and more.


def describe(trainer: Trainer, images: ImageSet) -> str:
    """What a run is and where it writes, in a line each, and what there is to know about it, in one line each."""
    parameters = sum(p.numel() for p in trainer.parameters)
    execution = trainer.execution
    details = [str(trainer.device), trainer.config["precision"]]
    details += [f"{execution['processes']} processes"] * (execution["processes"] > 1)
    details += [f"{execution['accumulate']} parts per step"] * (execution["accumulate"] > 1)
    details += ["compiled"] * trainer.compile
    names = trainer.config["class_names"]
    details += [f"{len(names)} classes"] if names else []
    notes = list(trainer.notes)
    if trainer.settings.prediction_type == "epsilon" and trainer.scheduler.snr[-1] < MIN_EPSILON_SNR:
        notes.append(
            f"warning: at t=999 schedule '{trainer.settings.beta_schedule}' has so little signal that a noise "
            "prediction says nothing of the image there; --prediction_type v does."
        )
    notes += classes_note(images) if trainer.material.labels is None else unseen_note(names, trainer.material.labels)
    if trainer.ema is not None and (note := ema_note(trainer.config, trainer.settings.epochs * len(trainer.batches))):
        notes.append(f"warning: {note}; pass --ema_rampup_ratio {USUAL_RAMPUP}, or a lower --ema_decay.")
    size = f"{trainer.settings.resolution}x{trainer.settings.resolution}{latents_words(trainer)}"
    line = (
        f"{trainer.model_type}: {parameters:,} parameters, {shown_words(trainer, images)} at {size}, "
        f"{len(trainer.batches)} steps per epoch, {', '.join(details)}"
    )
    where = f"run {trainer.settings.run}: checkpoints in {trainer.last_file.parent}, logs in {trainer.log_dir}"
    return "\n".join([line, where, *notes])


def shown_words(trainer: Trainer, images: ImageSet) -> str:
    """What the network is shown: the images of a data set, or stored pairs of a teacher that was trained on them."""
    count = f"{len(images)} images of '{images.name}'"
    if (starts := trainer.material.starts) is not None:
        return f"from {len(starts)} images of '{starts.name}' to {count}"
    return f"{trainer.batches.count} pairs of a teacher of {count}" if trainer.is_paired else count


def latents_words(trainer: Trainer) -> str:
    """What the network sees of the images, where that is not their pixels."""
    if trainer.settings.latents is None:
        return ""
    channels, side = trainer.config["channels"], side_of(trainer.config)
    return f" as {channels}x{side}x{side} latents of '{trainer.settings.latents}'"


def classes_note(images: ImageSet) -> list[str]:
    """The line that says that labels are not used, if the data set has any."""

    def words(classes: Classes) -> str:
        shown = [textwrap.shorten(name, 30, placeholder="...") for name in classes.present[:SHOWN_CLASSES]]
        more = ", ..." * (len(classes.present) > SHOWN_CLASSES)
        return f"{len(classes.present):,} classes by {classes.by} ({', '.join(shown)}{more})"

    found = " and ".join(words(classes) for classes in images.classes if len(classes.present) > 1)
    text = f"note: the images have {found}; the model is trained without them (unconditionally)"
    return [f"{text}; pass --classes to tell it"] if found else []


def unseen_note(names: Sequence[str], labels: np.ndarray) -> list[str]:
    """The line that says of which classes no image is trained on, if there are such."""
    seen = {*np.unique(labels).tolist()}
    unseen = [name for k, name in enumerate(names) if k not in seen]
    text = (
        f"warning: no image of {listed(unseen)} is among those that are trained on, so that nothing is learned of what "
        "it looks like; take more images with --limit, or hold out another number with --holdout."
    )
    return [text] if unseen else []


def describe_dry_run(trainer: Trainer) -> str:
    """What `--dry_run` prints below the description: options as resolved, position and memory."""
    options = asdict(trainer.settings) | trainer.config | trainer.execution | {"device": str(trainer.device)}
    memory = training_memory(trainer)
    total = trainer.settings.epochs * len(trainer.batches)
    return "\n".join(
        [
            lines_of(options),
            f"position: step {trainer.step} of {total}",
            f"memory per process, without the working space of kernels: {sum(memory.values()) / 2**30:.3f} GiB",
            *(f"  {name:<12}{size / 2**30:8.3f} GiB" for name, size in memory.items()),
        ]
    )


def train(
    settings: TrainingSettings,
    teach: Callable[[Processes], Teaching] | None = None,
    processes: Processes | None = None,
) -> None:
    """Train one model to `epochs` epochs, saving every `save_every`, at a stop signal and at the end.

    teach: of a student, what loads its teacher onto the device of the processes; raises what it likes. processes: those
    of a stage that has more to do and closes them itself, as processes that part do not always find together again.

    Raises what `Trainer` raises, RuntimeError if memory runs out or too many steps in a row are not finite, OSError if
    the last save fails, and ValueError if another process trains in the same folders, or for an objective that needs a
    teacher without one.
    """
    if teach is None and settings.objective in WITH_TEACHER:
        raise ValueError(f"--objective {settings.objective} needs a teacher; run distill.py, or choose another.")
    with StopRequest() as stop:
        own = processes is None
        processes = Processes(settings.device) if own else processes
        choose_kernels(processes.device, settings.deterministic)
        settings, notes = placed(settings)
        # First of all, as the images may take long to be read.
        teaching = None if teach is None else teach(processes)
        vgg = load_vgg(settings.vgg_weights) if settings.perceptual_weight else None
        autoencoder = None if settings.latents is None else load_autoencoder(settings.latents)
        images, held_out = cli.load_image_parts(settings)
        try:
            if settings.dry_run:
                trainer = Trainer(settings, images, processes, vgg, held_out, autoencoder, teaching)
                trainer.notes += notes
                if processes.is_main:
                    print(describe(trainer, images), describe_dry_run(trainer), sep="\n")
            else:
                with locked(settings) if processes.is_main else nullcontext():
                    trainer = Trainer(settings, images, processes, vgg, held_out, autoencoder, teaching)
                    trainer.notes += notes
                    _run(trainer, images, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RuntimeError(out_of_memory_message(settings, processes.count)) from error
        if own:
            processes.close()


@contextmanager
def locked(settings: TrainingSettings) -> Iterator[None]:
    """Keep other processes from training where this one does; raises ValueError if one is there already."""
    with ExitStack() as stack:
        for folder in (Path(settings.output_dir), Path(settings.log_dir) / settings.stem):
            # A place that cannot be written to is found out now rather than at the first save.
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(folder / f"{settings.stem}.lock", timeout=0))
            except Timeout as error:
                raise ValueError(f"another process is training in {folder}; wait for it or stop it.") from error
        yield


def _run(trainer: Trainer, images: ImageSet, stop: StopRequest) -> None:
    """From the trainer's position to its last epoch, or to a stop signal."""
    settings, processes, is_main = trainer.settings, trainer.processes, trainer.processes.is_main
    total_steps = settings.epochs * len(trainer.batches)
    # Nobody writes before everybody has read.
    if not processes.agree(json.dumps([trainer.step, total_steps, trainer.identity], sort_keys=True)):
        raise ValueError(
            f"the processes found different data, settings or versions of {trainer.last_file}; give all of them the "
            "same files and flags."
        )
    if is_main:
        # Those of its students lie in the same folder, and may be in the making.
        remove_temporaries(trainer.last_file.parent, rf"{re.escape(settings.stem)}(_last|_\d+ep)?")
        remove_temporaries(trainer.log_dir)
        for file in trainer.damaged:
            # It must not take the place of a whole version when the next one is saved.
            file.rename(file.with_name(f"{file.name}.damaged"))
    if trainer.step >= total_steps:
        if is_main:
            make_up_for_a_kill(trainer)
            print(
                *trainer.notes, f"{trainer.last_file} is done: {trainer.epoch} of {settings.epochs} epochs.", sep="\n"
            )
        return
    trainer.prepare()
    with ExitStack() as stack:
        log = None
        if is_main:
            said = trainer.identity | {"run": settings.run}
            log = RunLog(trainer.log_dir, trainer.step, said, settings.wandb, trainer.unwritten_rows)
            stack.callback(log.close)
            print(describe(trainer, images))
        bar = stack.enter_context(progress_bar(trainer, total_steps))
        stop.running = True
        if log is not None:
            make_up_for_a_kill(trainer, log, stop)
        stopped = _loop(trainer, log, bar, stop)
    if is_main and stopped:
        print(
            f"stopped by {stop.signal or 'another process'} after step {trainer.step} of {total_steps}, saved in "
            f"{trainer.last_file}; the same command with --resume auto goes on from there."
        )


def make_up_for_a_kill(trainer: Trainer, log: RunLog | None = None, stop: StopRequest | None = None) -> None:
    """Write what belongs to the trainer's step, comes after its resume file, and is not there."""
    if not trainer.snapshot_due:
        return
    try:
        # That of a student has one name at all epochs, and may be of an earlier end.
        if peek(trainer.snapshot_file).get("epoch") != trainer.epoch:
            trainer.save_snapshots()
    except OSError as error:
        tqdm.write(f"warning: {error}", file=sys.stderr)
    if not showing.shown_file(trainer).exists():
        showing.show_epoch(trainer, log, stop)


def progress_bar(trainer: Trainer, total_steps: int) -> Progress:
    """Epoch, step, losses, images/s and the time left."""
    return Progress(total=total_steps, initial=trainer.step, unit="step", disable=not trainer.processes.is_main)


class Clock:
    """Steps, and the seconds that they took without saving and sampling."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin again."""
        self.steps, self.start = 0, time.perf_counter()

    def images_per_second(self, batch_size: int) -> float:
        """Of the steps since the start."""
        return self.steps * batch_size / (time.perf_counter() - self.start)


def _loop(trainer: Trainer, log: RunLog | None, bar: Progress, stop: StopRequest) -> bool:
    """Every step from the trainer's position on; returns whether a signal ended it."""
    settings, processes = trainer.settings, trainer.processes
    steps_per_epoch = len(trainer.batches)
    clock, last_save = Clock(), time.monotonic()
    [stopping] = processes.any(stop.signal is not None)
    while trainer.epoch < settings.epochs and not stopping:
        bar.set_description(f"{trainer.model_type} epoch {trainer.epoch + 1}/{settings.epochs}")
        for batch in trainer.batches.epoch(trainer.epoch, trainer.step % steps_per_epoch):
            trainer.train_step(*batch)
            clock.steps += 1
            bar.update()
            if trainer.step % settings.log_every == 0 or trainer.step % steps_per_epoch == 0:
                write_row(trainer, log, bar, clock)
                trainer.check_bad_steps()
                clock.restart()
            if trainer.replan_due:
                # Before anything of this step is saved, which the new path belongs to.
                trainer.replan()
                clock.restart()
            overdue = processes.is_main and time.monotonic() - last_save > 60 * settings.resume_minutes
            stopping, save_due = processes.any(stop.signal is not None, overdue)
            if trainer.snapshot_due or save_due or stopping:
                trainer.check_bad_steps()
                if log is not None:
                    save(trainer, log, must=stopping or trainer.epoch == settings.epochs)
                if trainer.snapshot_due and not stopping:
                    if log is not None:
                        showing.show_epoch(trainer, log, stop)
                    [stopping] = processes.any(stop.signal is not None)
                last_save = time.monotonic()
                clock.restart()
            if stopping:
                break
    return stopping


def write_row(trainer: Trainer, log: RunLog | None, bar: Progress, clock: Clock) -> None:
    """Close the window of the log and show it everywhere."""
    row, curves = trainer.row()
    speed = {
        "images_per_second": round(clock.images_per_second(trainer.settings.batch_size), 1),
        "memory_gib": round(peak_memory(trainer.device) / 2**30, 3),
    }
    if log is not None:
        log.write(row, speed, curves)
    names = MEASURE_NAMES | {"bad_steps": "bad steps"}
    shown = {name: row[key] for key, name in names.items() if row.get(key)}
    shown["images/s"] = speed["images_per_second"]
    bar.set_postfix_str(", ".join(f"{key} {value:.4g}" for key, value in shown.items()))


def save(trainer: Trainer, log: RunLog, must: bool) -> None:
    """Write the rows of the log, the resume file and the snapshots that are due, in this order.

    If that fails the run goes on and tries again at the next save, unless it `must` succeed: OSError is raised then.
    Rows that cannot be written go into the resume file instead.
    """
    problems, lost = [], False
    try:
        log.flush()
    except OSError as error:
        problems.append(error)
    trainer.unwritten_rows = log.unwritten_rows
    for write in (trainer.save_resume_file, trainer.save_snapshots):
        try:
            write()
        except OSError as error:
            problems.append(error)
            lost = must
    if not problems:
        return
    kept = versions(trainer.last_file)
    last = f"the last good checkpoint is {kept[0] if kept else '(none yet)'}"
    if lost:
        raise OSError(f"{problems[-1]}; {last}") from problems[-1]
    for problem in problems:
        tqdm.write(f"warning: {problem}; {last}; training goes on and tries again at the next save", file=sys.stderr)
