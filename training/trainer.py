"""The one training loop: step, precision, EMA, many processes, resume, checkpoints, logs and sample grids.

What a run computes depends on its settings alone: images, noise and timesteps of a step are functions of (seed, step),
so a run that was stopped anywhere and resumed ends with the bits of one that was not, and N processes see what one
would see. docs/training.md says what is promised and where the time goes.
"""

import argparse
import copy
import json
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import cli
from checkpoint import (
    FILE_STEMS,
    MODEL_CLASSES,
    build_model,
    build_scheduler,
    bytes_of,
    checkpoint_file,
    read_resume_file,
    save_checkpoint,
)
from data import ImageSet, TwoScaleBatches, to_float, to_uint8
from diffusion.sampler import coarse_feed, image_seeds, sample_seeds, scale_shapes
from figures.images import save_image_grid
from images.representation import OVERCOMPLETE, REPRESENTATIONS, Overcomplete
from paths.families import diagonal, log_snr_shift
from paths.schedule_file import save_schedule
from planning.regimes import TimestepPairs, default_regime, parse_regime, resolve_regime
from planning.replanning import replan
from runtime.device import (
    autocast,
    choose_kernels,
    compile_or_not,
    compiling_failed,
    is_out_of_memory,
    memory_format,
    resolve_compile,
    resolve_precision,
)
from runtime.distributed import Processes
from runtime.safe_write import remove_temporaries, versions
from scheduler import PREDICTION_TYPES, SCHEDULE_NAMES, DDIMScheduler
from training.memory_estimate import for_batch, saved_bytes
from training.presets import PRESETS, preset_help, with_preset
from training.run_log import METRICS_FILE, SETTINGS_FILE, RunLog

MIN_EPSILON_SNR = 1e-6  # Below it, the error of a noise prediction is amplified a thousand times and more.
TIMESTEP_BINS = 10
GRID_IMAGES = 32
REPLAN_EVERY, REPLAN_IMAGES = 10, 16  # Epochs and images, unless told otherwise.
GRID_STEPS = 18
SCALES = ("64", "32")
# What may differ between a run and its resumption; everything else in the config must be the same.
FREE_KEYS = frozenset({"epochs", "dataset"})  # The data themselves are compared by their fingerprint.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def add_training_arguments(parser: argparse.ArgumentParser, two_scales: bool) -> None:
    """Flags of both training stages, with those of two-scale models; the defaults are the published settings.

    Flags that a preset decides are None where they are not given (`presets.with_preset`).
    """
    cli.add_data_arguments(parser)
    cli.add_device_arguments(parser)
    group = parser.add_argument_group("training")
    add = group.add_argument
    text = f"what the flags that are not given are: {preset_help()} (published)"
    add("--preset", choices=tuple(PRESETS), default="published", help=text)
    add("--epochs", type=cli.positive_int, default=2000, help="passes over the data (2000)")
    add("--batch_size", type=cli.positive_int, default=64, help="images per step, over all processes (64)")
    add("--lr", type=cli.positive_float, default=1e-4, help="AdamW learning rate (1e-4)")
    add("--lr_schedule", choices=("constant", "cosine"), default="constant", help="cosine decays to 0")
    add("--weight_decay", type=cli.unit_interval, default=0.01, help="AdamW weight decay (0.01)")
    add("--grad_clip", type=cli.positive_float, default=1.0, help="largest gradient norm (1.0)")
    add("--ema_decay", type=cli.unit_interval, default=0.9999, help="EMA decay per step; 0 keeps no EMA (0.9999)")
    add("--hidden_dims", type=cli.hidden_dims, default=(64, 128, 256, 512), help="64,128,256,512")
    add("--beta_schedule", choices=SCHEDULE_NAMES, default=None, help="(that of the preset)")
    add("--prediction_type", choices=PREDICTION_TYPES, default=None, help="(that of the preset)")
    text = "weigh the loss by min(SNR, GAMMA) times that of the clean image; 5 is usual (all timesteps alike)"
    add("--min_snr_gamma", type=cli.positive_float, default=None, metavar="GAMMA", help=text)
    if two_scales:
        text = (
            "pairs (t_64, t_32) to train on: independent, same, shift:D, heuristic:F, band:W, path:FILE, follow:W, "
            "band:PATH,W with PATH diagonal, image, shift:D, heuristic:F or FILE; W-V changes over the run (that of "
            "the preset)"
        )
        add("--t_pairs", type=cli.checked(parse_regime), default=None, metavar="REGIME", help=text)
        text = f"epochs between plans of --t_pairs follow:W ({REPLAN_EVERY})"
        add("--replan_every", type=cli.positive_int, default=None, metavar="E", help=text)
        text = f"images whose errors are measured for them ({REPLAN_IMAGES})"
        add("--replan_images", type=cli.positive_int, default=None, metavar="N", help=text)
        text = "weights of the losses of the fine and the coarse scale; auto: by dimensions (that of the preset)"
        add("--loss_weights", type=cli.loss_weights, default=None, metavar="A,B", help=text)
        text = "the scales: image and half-size image, or half-size image and the details it lacks (overcomplete)"
        add("--representation", choices=tuple(REPRESENTATIONS), default="overcomplete", help=text)
    else:
        parser.set_defaults(
            t_pairs=None, loss_weights=None, representation="overcomplete", replan_every=None, replan_images=None
        )
    add("--flip", action="store_true", help="mirror images at random (off, as published)")
    add("--seed", type=cli.seed, default=42, help="initial weights, order, noise, timesteps (42)")
    group = parser.add_argument_group("execution (what is computed stays the same up to rounding)")
    add = group.add_argument
    cli.add_compile_argument(group)
    add("--cuda_graphs", action="store_true", help="replay the compiled network as CUDA graphs, for small batches")
    add("--accumulate", type=cli.positive_int, default=1, metavar="N", help="run a step in N parts, for less memory")
    add("--recompute", action="store_true", help="recompute activations in the backward pass, for less memory")
    add("--deterministic", action="store_true", help="deterministic kernels only, for equal bits on a GPU")
    group = parser.add_argument_group("checkpoints and logs")
    add = group.add_argument
    add("--save_every", type=cli.positive_int, default=200, help="epochs between checkpoints (200)")
    add("--resume_minutes", type=cli.positive_float, default=10.0, help="minutes between resume files (10)")
    add("--keep_last", type=cli.positive_int, default=2, metavar="K", help="resume files kept, newest first (2)")
    add("--max_bad_steps", type=cli.positive_int, default=20, help="non-finite steps in a row that end a run (20)")
    add("--log_every", type=cli.positive_int, default=50, help="steps between rows of metrics.jsonl (50)")
    add("--output_dir", default="checkpoints", help="checkpoints go here (checkpoints)")
    add("--log_dir", default="logs", help="metrics, TensorBoard and sample grids go to a folder here (logs)")
    add("--wandb", action="store_true", help="log to Weights & Biases too, if it is installed")
    add("--dry_run", action="store_true", help="print what would be run and the memory it would take, and end")
    add(
        "--resume",
        nargs="?",
        const="required",
        choices=("required", "auto"),
        help="continue from the _last.pth in --output_dir; with auto, start afresh if there is none",
    )


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of one training step, a function of seed and step only."""
    mixed = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(mixed)


class TrainingBatch(NamedTuple):
    """What one step shows the network: clean images in [-1, 1], their noise and their timesteps, image by image."""

    x_64: torch.Tensor  # [B, C, H, W], in the residual representation the residual, and so the noise
    x_32: torch.Tensor  # [B, C, H/2, W/2]
    noise_64: torch.Tensor  # [B, C, H, W]
    noise_32: torch.Tensor  # [B, C, H/2, W/2]
    t_64: torch.Tensor  # [B]
    t_32: torch.Tensor  # [B]

    def rows(self, rows: slice) -> "TrainingBatch":
        """Some of the images."""
        return TrainingBatch(*(field[rows] for field in self))


def draw_batch(
    pairs: TimestepPairs,
    x_64: torch.Tensor,
    x_32: torch.Tensor,
    generator: torch.Generator,
    representation: Overcomplete = OVERCOMPLETE,
) -> TrainingBatch:
    """Noise and timesteps for clean images x_64 `[B, C, H, W]` and x_32 `[B, C, H/2, W/2]`, their 2x2 mean.

    Each scale has its own noise, and the timesteps are pairs of the regime. Images and noise of the fine scale are
    those of the representation.
    """
    device = x_64.device
    t_64, t_32 = pairs.draw(len(x_64), generator)  # [B] twice
    noise_64 = torch.randn(x_64.shape, generator=generator, device=device)  # [B, C, H, W]
    noise_32 = torch.randn(x_32.shape, generator=generator, device=device)  # [B, C, H/2, W/2]
    clean, noise = map(representation.project, ((x_64, x_32), (noise_64, noise_32)))
    return TrainingBatch(*clean, *noise, t_64, t_32)


def diffusion_loss(
    network: nn.Module, model_type: str, scheduler: DDIMScheduler, batch: TrainingBatch
) -> dict[str, torch.Tensor]:
    """Squared error of every image per predicted scale, `loss_64` and where predicted `loss_32`, float32 `[B]`.

    Each is a mean over the dimensions of its scale: a residual has three for every four pixels.
    """
    x_64, x_32, noise_64, noise_32, t_64, t_32 = batch
    z_64 = scheduler.add_noise(x_64, noise_64, t_64)  # [B, C, H, W]
    inputs = {
        "baseline": lambda z_32: (z_64, t_64),
        "dual": lambda z_32: (z_64, z_32, t_64, t_32),
        "shared_t": lambda z_32: (z_64, z_32, t_64),
        "single_t": lambda z_32: (z_64, z_32, t_64),
        "no_t": lambda z_32: (z_64, z_32),
    }[model_type](scheduler.add_noise(x_32, noise_32, t_32))
    predictions = network(*inputs)
    targets = [scheduler.target(x_64, noise_64, t_64)]
    if isinstance(predictions, tuple):
        targets.append(scheduler.target(x_32, noise_32, t_32))
    else:
        predictions = (predictions,)
    shares = (scheduler.representation.fine_share, 1.0)
    return {
        f"loss_{scale}": F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1) / share  # [B]
        for scale, prediction, target, share in zip(SCALES, predictions, targets, shares, strict=False)
    }


def weighted_loss(
    losses: dict[str, torch.Tensor], batch: TrainingBatch, scheduler: DDIMScheduler, config: dict[str, Any]
) -> torch.Tensor:
    """What a step minimises: the means of `diffusion_loss` over images, weighed by scale and by timestep.

    config: `loss_weights`, one number per predicted scale, and `min_snr_gamma`, for weights of timesteps by
    `DDIMScheduler.min_snr_weight`, or None.
    """
    gamma = config["min_snr_gamma"]
    total = torch.zeros((), device=batch.x_64.device)
    for weight, values, t in zip(config["loss_weights"], losses.values(), (batch.t_64, batch.t_32), strict=False):
        by_image = values if gamma is None else values * scheduler.min_snr_weight(gamma, t).to(values)
        total = total + weight * by_image.mean()
    return total


class StopRequest:
    """While entered, SIGTERM, SIGINT and SIGUSR1 ask the run to end after its step: `signal` is then the name.

    Before there is something to save, which `running` says, the request ends the process at once with status 0.
    Launchers pass a signal on that the process has got already, so what comes within a second of the first is the same
    request; a later one ends the process at once, with status 128 + its number.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.running = False

    def __enter__(self) -> "StopRequest":
        # Python runs handlers between its own instructions only, and a process may hang within one: a thread reads the
        # signals as well.
        self.inbox, self.outbox = socket.socketpair()
        self.outbox.setblocking(False)
        self.fd_before = signal.set_wakeup_fd(self.outbox.fileno(), warn_on_full_buffer=False)
        self.handlers_before = {number: signal.signal(number, self._mark) for number in STOP_SIGNALS}
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.fd_before)
        self.outbox.close()  # Ends the thread.
        self.watcher.join()
        self.inbox.close()

    def _mark(self, number: int, _) -> None:
        self.signal = self.signal or signal.Signals(number).name

    def _watch(self) -> None:
        first = None
        while received := self.inbox.recv(1):
            number = received[0]
            if number not in STOP_SIGNALS:
                continue
            name = signal.Signals(number).name
            if first is not None and time.monotonic() - first > 1:
                os._exit(128 + number)
            elif first is None and not self.running:
                os.write(2, f"\nstopped by {name} before the first step; the same command starts again\n".encode())
                os._exit(0)
            elif first is None:
                first = time.monotonic()
                os.write(2, f"\n{name}: stopping after this step; once more to stop at once\n".encode())


class Trainer:
    """Everything a run is made of: weights, EMA, optimizer, schedule, data and position.

    A step with a loss or gradient that is not finite leaves weights and optimizer as they were and is counted; the EMA
    takes those weights once more.

    Raises ValueError if `output_dir` or the log folder holds an earlier run that `--resume` does not continue, if a
    resumed run differs in anything but the place of the data and, at constant rate, the epochs, for a resolution that
    the levels of the model do not divide, for a batch that processes and parts cannot share evenly, for CUDA graphs
    where there can be none, and for residual scales of a model that does not predict both.
    """

    def __init__(self, model_type: str, args: argparse.Namespace, images: ImageSet, processes: Processes):
        args = with_preset(args, model_type)
        self.args, self.processes, self.device = args, processes, processes.device
        self.config = {
            "model_type": model_type,
            "hidden_dims": list(args.hidden_dims),
            "channels": images.channels,
            "data_fingerprint": images.fingerprint,
            "num_train_timesteps": 1000,
            "precision": resolve_precision(self.device, args.precision),
        } | {
            name: getattr(args, name)
            for name in (
                "dataset", "resolution", "resize_filter", "limit", "holdout", "skip_bad_images", "beta_schedule",
                "prediction_type", "min_snr_gamma", "flip", "epochs", "batch_size", "lr", "lr_schedule", "weight_decay",
                "grad_clip", "ema_decay", "seed", "representation",
            )
        }  # fmt: skip
        # What runs have that say nothing of it: those from before there was a choice.
        self.defaults = {
            "t_pairs": default_regime(model_type),
            "t_pairs_points": None,
            "loss_weights": [1.0] * MODEL_CLASSES[model_type].num_predictions,
            "min_snr_gamma": None,
            "representation": "overcomplete",
            "replan_every": None,
            "replan_images": None,
        }
        self.config |= {"loss_weights": list(args.loss_weights or self.defaults["loss_weights"])}
        self.config |= resolve_regime(args.t_pairs, model_type) | self._replanning(images)
        if len(self.config["loss_weights"]) != len(self.defaults["loss_weights"]):
            raise ValueError(f"a '{model_type}' model has the loss of the fine scale alone; leave --loss_weights out.")
        if args.representation == "residual" and len(self.defaults["loss_weights"]) == 1:
            raise ValueError(
                f"a '{model_type}' model predicts the fine scale alone, of which no image can be composed; train a "
                "dual or shared_t model, or leave --representation residual out."
            )
        self.compile = resolve_compile(self.device, args.compile)
        if args.cuda_graphs and not (self.compile and self.device.type == "cuda"):
            raise ValueError(f"--cuda_graphs needs a compiled network on a GPU, not {self.device}; leave it out.")
        if args.cuda_graphs and args.accumulate > 1:
            # A graph replayed for the second part would write over the gradients of the first.
            raise ValueError("--cuda_graphs and --accumulate exclude each other; leave one of them out.")
        self.execution = {
            "device": self.device.type,
            "processes": processes.count,
            "accumulate": args.accumulate,
            "compile": self.compile,
            "cuda_graphs": args.cuda_graphs,
            "deterministic": args.deterministic,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
        }
        self.last_file = checkpoint_file(args.output_dir, model_type, "last")
        self.log_dir = Path(args.log_dir) / FILE_STEMS[model_type]
        self.notes: list[str] = []
        self.damaged: list[Path] = []  # Newer than the resume file that this run goes on from.
        self.owed: dict[Path, dict] = {}  # Snapshots that a full disk kept from being written.
        saved = self._find_earlier_run()
        self.scheduler = build_scheduler(self.config).to(self.device)
        self.pairs = TimestepPairs(self.config, self.scheduler)
        self.batches = TwoScaleBatches(images, args.batch_size, args.seed, self.device, args.flip)
        if args.batch_size % (processes.count * args.accumulate):
            raise ValueError(
                f"--batch_size {args.batch_size} cannot be split evenly over {processes.count} process(es) with "
                f"--accumulate {args.accumulate}."
            )
        self.part_size = args.batch_size // (processes.count * args.accumulate)
        torch.manual_seed(args.seed)
        self.model = build_model(self.config).to(self.device, memory_format=memory_format(self.device))
        if args.resolution % self.model.unet.stride:
            raise ValueError(
                f"--resolution {args.resolution} must be a multiple of {self.model.unet.stride} for the "
                f"{len(args.hidden_dims)} levels of --hidden_dims; use fewer levels or another --resolution."
            )
        self.model.unet.recompute = args.recompute
        self.parameters = list(self.model.parameters())
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if args.ema_decay > 0 else None
        self.ema_parameters = [] if self.ema is None else list(self.ema.parameters())
        self.update_ema = get_ema_multi_avg_fn(args.ema_decay)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        total_steps = args.epochs * len(self.batches)
        factors = {
            "constant": lambda step: 1.0,
            "cosine": lambda step: (1 + math.cos(math.pi * step / total_steps)) / 2,
        }
        self.lr_schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factors[args.lr_schedule])
        self.lr = args.lr  # Of the last step.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config["precision"] == "fp16")
        self.step = 0
        # Sums over the steps since the last row of the log, and counts of skipped steps, all on the device.
        self.window: dict[str, torch.Tensor] = {}
        self.bad_steps = {
            name: torch.zeros((), dtype=torch.int64, device=self.device) for name in ("total", "in_row", "longest")
        }
        self.unwritten_rows: dict[str, str] = {}
        if saved is not None:
            self._restore(saved)
        self.network: nn.Module = self.model  # What a step calls: the model, compiled and shared as asked for.

    @property
    def epoch(self) -> int:
        """Completed passes over the data."""
        return self.step // len(self.batches)

    @property
    def model_type(self) -> str:
        """The kind of model, a key of `checkpoint.MODEL_CLASSES`."""
        return self.config["model_type"]

    def _replanning(self, images: ImageSet) -> dict[str, int | None]:
        """What the config says of plans in the course of the run: None, but for `follow`."""
        names = {"replan_every": REPLAN_EVERY, "replan_images": min(REPLAN_IMAGES, len(images))}
        given = {name: getattr(self.args, name) for name in names}
        if not (self.args.t_pairs or "").startswith("follow:"):
            if any(given.values()):
                raise ValueError("--replan_every and --replan_images belong to --t_pairs follow:W; leave them out.")
            return given
        if (given["replan_images"] or 0) > len(images):
            raise ValueError(f"--replan_images exceeds the {len(images)} images of '{images.name}'; choose fewer.")
        return {name: given[name] or default for name, default in names.items()}

    @property
    def settings(self) -> dict:
        """What of the config decides what is computed, and is the same in every part of a run."""
        pairs = self.config["t_pairs"]
        timed = self.args.lr_schedule == "cosine" or (pairs is not None and parse_regime(pairs).changes)
        free = FREE_KEYS - ({"epochs"} if timed else set())  # What happens by the share of the run depends on its end.
        return {name: value for name, value in self.config.items() if name not in free}

    def _find_earlier_run(self) -> dict | None:
        """The content of the resume file if this run continues one, after comparing the settings."""
        resume, found = self.args.resume, versions(self.last_file)
        log_file, settings_file = self.log_dir / METRICS_FILE, self.log_dir / SETTINGS_FILE
        saved = None
        if resume is not None and found:
            saved, file, self.damaged = read_resume_file(self.last_file)
            if self.args.precision == "auto":
                self.config["precision"] = saved["config"]["precision"]
            self._compare(saved["config"], f"{file} was trained")
            self.notes += [f"warning: {name} is damaged; going on from {file}" for name in self.damaged]
            self.notes += self._differences(saved["execution"])
        elif resume == "required":
            hint = "leave --resume out to start a new run" if not settings_file.exists() else "pass --resume auto"
            raise FileNotFoundError(f"{self.last_file} does not exist; {hint}.")
        else:
            taken = sorted(self.last_file.parent.glob(self.last_file.name.replace("_last", "_*")))
            if taken and resume == "auto":
                raise ValueError(f"{taken[0]} exists, but no {self.last_file} to resume; pass another --output_dir.")
            if taken:
                raise ValueError(
                    f"{taken[0]} exists already; pass --resume to continue its run, or another --output_dir and "
                    "--log_dir."
                )
            if resume is None and log_file.exists() and log_file.stat().st_size:
                raise ValueError(
                    f"{log_file} exists already; pass --resume auto to start its run again, or another --log_dir."
                )
        # The rows of another run would be lost. Without a resume file they are of a run that ended before its first.
        if settings_file.exists() and log_file.exists() and log_file.stat().st_size:
            self._compare(json.loads(settings_file.read_text()), f"{log_file} is of a run")
        return saved

    def _compare(self, saved: dict, what: str) -> None:
        """Raise ValueError, naming the first setting that differs from a saved one."""
        settings, saved = self.settings, self.defaults | saved
        # What follows from another flag comes last, so that the flag is named.
        for key in sorted(settings, key=lambda key: (key == "data_fingerprint", key == "epochs", key)):
            if saved.get(key) != settings[key]:
                file = " (--t_pairs with the schedule file of its path)" if "path:" in str(saved.get(key)) else ""
                raise ValueError(
                    f"{what} with {key} = {saved.get(key)}, not {settings[key]}; resume with the same value{file} or "
                    "start in another --output_dir and --log_dir."
                )

    def _differences(self, before: dict) -> list[str]:
        """A sentence about each way in which a resumed run is executed differently."""
        notes = []
        for key, value in self.execution.items():
            if before.get(key, value) == value:
                continue
            consequence = "other noise is drawn from here on" if key == "device" else "roundings may differ"
            notes.append(f"note: {key} is {value} and was {before[key]}, so that {consequence}")
        return notes

    def _restore(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model_state"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema_state"])
        self.optimizer.load_state_dict(saved["optimizer"])
        # On another device the layout of the weights may be another one, which the fused kernel needs for both.
        for parameter, state in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(parameter).copy_(state[name])
        self.lr_schedule.load_state_dict(saved["lr_schedule"])
        self.scaler.load_state_dict(saved["loss_scaler"])
        self.step = saved["step"]
        self.window = {name: value.to(self.device) for name, value in saved["window"].items()}
        self.bad_steps = {name: value.to(self.device) for name, value in saved["bad_steps"].items()}
        self.unwritten_rows = saved["unwritten_rows"]
        if saved.get("regime_state") is not None:
            for name in ("before_32", "log_snr_32"):
                self.pairs = self.pairs.moved_to(saved["regime_state"][name])

    def prepare(self) -> None:
        """Compile the network and share it among the processes; before the first step."""
        if self.compile:
            mode = "reduce-overhead" if self.args.cuda_graphs else None
            self.network, reason = compile_or_not(self.model, self._rehearse, mode=mode)
            [failed] = self.processes.any(bool(reason))
            if failed:
                self.notes.append(compiling_failed(reason or "in another process"))
                self.network, self.compile, self.execution["compile"] = self.model, False, False
        if self.processes.count > 1:
            devices = None if self.device.type == "cpu" else [self.device]
            self.network = DistributedDataParallel(self.network, devices, gradient_as_bucket_view=True)
            # The first backward pass orders the sums over processes for all that follow, in a resumed run as well.
            self._rehearse(self.network)

    def _rehearse(self, network: nn.Module) -> None:
        """Compute gradients as in a step, and forget them."""
        batch = self.draw(*next(self.batches.epoch(0)))
        self._backward(batch.rows(slice(self.part_size)), network)
        self.optimizer.zero_grad(set_to_none=True)

    def draw(self, x_64: torch.Tensor, x_32: torch.Tensor) -> TrainingBatch:
        """This process's share of a step: noise is drawn for all images of the step, so that shares do not matter."""
        generator = step_generator(self.args.seed, self.step, self.device)
        progress = min(1.0, self.step / max(1, self.args.epochs * len(self.batches) - 1))
        batch = draw_batch(self.pairs.at(progress), x_64, x_32, generator, self.scheduler.representation)
        return batch.rows(self.processes.share(len(x_64)))

    def _backward(self, part: TrainingBatch, network: nn.Module) -> dict[str, torch.Tensor]:
        """Add the gradient of one part to that of the step; returns the losses per image."""
        with autocast(self.device, self.config["precision"]):
            losses = diffusion_loss(network, self.model_type, self.scheduler, part)
        loss = weighted_loss(losses, part, self.scheduler, self.config) / self.args.accumulate
        self.scaler.scale(loss).backward()
        return {name: values.detach() for name, values in losses.items()}

    def _update(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The optimizer step, unless loss or gradient is not finite; returns the gradient norm and whether it was."""
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.parameters])
        good = torch.isfinite(grad_norm) & torch.isfinite(loss)
        # By these two the loss scaler of PyTorch talks to its fused optimizers: they divide the gradient by the one,
        # and leave out the step for the other, without asking the host. Here the first one clips.
        self.optimizer.grad_scale = ((grad_norm + 1e-6) / self.args.grad_clip).clamp(min=1)
        self.optimizer.found_inf = (~good).float()
        self.optimizer.step()
        self.scaler.update()
        self.lr = self.lr_schedule.get_last_lr()[0]
        self.lr_schedule.step()
        return grad_norm, good

    def _average(self) -> None:
        if self.ema is not None:
            self.update_ema(self.ema_parameters, self.parameters, self.step)

    def train_step(self, x_64: torch.Tensor, x_32: torch.Tensor) -> dict[str, torch.Tensor]:
        """One optimizer and EMA step on all images of the step; returns the mean losses and the gradient norm.

        Nothing here waits for the device, on which the values returned are.
        """
        batch = self.draw(x_64, x_32)
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for start in range(0, len(batch.x_64), self.part_size):
            last = start + self.part_size == len(batch.x_64)
            # Processes exchange gradients once a step.
            with nullcontext() if last or self.processes.count == 1 else self.network.no_sync():
                parts.append(self._backward(batch.rows(slice(start, start + self.part_size)), self.network))
        losses = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # [B / processes] each
        sums = [self._bin_sums(values, batch, name) for name, values in losses.items()]
        sums = self.processes.sum(torch.stack(sums))  # [scales, 2, bins]
        means = sums[:, 0].sum(1) / self.args.batch_size  # [scales]
        grad_norm, good = self._update(means.sum())
        self._average()
        self.step += 1
        values = dict(zip(losses, means, strict=True)) | {"grad_norm": grad_norm}
        self._count(values | {"good_steps": good.float(), "bins": sums}, good)
        return values

    def _bin_sums(self, losses: torch.Tensor, batch: TrainingBatch, name: str) -> torch.Tensor:
        """Sum and number of the losses `[B]` of a scale whose timestep is in each bin: `[2, bins]`."""
        t = batch.t_64 if name == "loss_64" else batch.t_32
        bins = F.one_hot(t * TIMESTEP_BINS // self.scheduler.num_train_timesteps, TIMESTEP_BINS).float()  # [B, bins]
        # A product would spread a loss that is not finite over all bins.
        return torch.stack([torch.where(bins > 0, losses[:, None], 0).sum(0), bins.sum(0)])

    def _count(self, values: dict[str, torch.Tensor], good: torch.Tensor) -> None:
        """Add a step to the sums since the last row of the log, or to the count of skipped ones."""
        for name, value in values.items():
            value = torch.where(good, value, 0)
            self.window[name] = self.window[name] + value if name in self.window else value
        bad = self.bad_steps
        bad["total"] += ~good
        bad["in_row"] = (bad["in_row"] + 1) * ~good
        bad["longest"] = torch.maximum(bad["longest"], bad["in_row"])

    def row(self) -> tuple[dict[str, float], dict[str, float]]:
        """Close the window: means since the last row, for the log, and mean losses per timestep bin, for the board.

        This waits for the device. A window without a good step has no losses, a bin without an image none either.
        """
        sums = self.window.pop("bins").tolist()  # [scales, 2, bins]
        totals = dict(zip(self.window, torch.stack(list(self.window.values())).tolist(), strict=True))
        self.window = {}
        good_steps = totals.pop("good_steps")
        row = {name: total / good_steps for name, total in totals.items()} if good_steps else {}
        row |= {"lr": self.lr, "bad_steps": self.bad_steps["total"].item()}
        width = self.scheduler.num_train_timesteps // TIMESTEP_BINS
        curves = {
            f"{name}_by_t/{k * width:03d}-{(k + 1) * width - 1:03d}": total / count
            for name, bins in zip(totals, sums, strict=False)
            for k, (total, count) in enumerate(zip(*bins, strict=True))
            if count
        }
        return {"step": self.step, "epoch": (self.step - 1) // len(self.batches)} | row, curves

    def check_bad_steps(self) -> None:
        """Raise RuntimeError, naming the last good checkpoint, after too many steps in a row that were not finite."""
        longest = self.bad_steps["longest"].item()
        if longest >= self.args.max_bad_steps:
            kept = versions(self.last_file)
            raise RuntimeError(
                f"the loss or gradient was not finite in {longest} steps in a row up to step {self.step}, which were "
                f"skipped; the last good checkpoint is {kept[0] if kept else '(none yet)'}. Lower --lr, or train with "
                "--precision bf16 or fp32, in another --output_dir."
            )

    def snapshot(self) -> dict:
        """What a checkpoint of any kind holds."""
        return {
            "model_state": self.model.state_dict(),
            "ema_state": None if self.ema is None else self.ema.state_dict(),
            "config": self.config,
            "epoch": self.epoch,
            "step": self.step,
            "regime_state": self.pairs.state,
        }

    def save_resume_file(self) -> None:
        """Write `_last.pth`, of which `--keep_last` versions are kept; raises OSError if that fails."""
        rest = {
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
            "loss_scaler": self.scaler.state_dict(),
            "window": self.window,
            "bad_steps": self.bad_steps,
            "unwritten_rows": self.unwritten_rows,
            "execution": self.execution,
        }
        save_checkpoint(self.last_file, self.snapshot() | rest, self.args.keep_last)

    @property
    def replan_due(self) -> bool:
        """Whether the path of `--t_pairs follow:W` is planned again after this step."""
        every = self.config["replan_every"]
        return every is not None and self.step > 0 and self.step % (every * len(self.batches)) == 0

    def replan(self) -> None:
        """Move the band of `--t_pairs follow:W` to the path planned with the EMA (else raw) weights, and log that."""
        chosen = np.random.default_rng((self.args.seed, self.step)).choice(
            len(self.batches.pixels), self.config["replan_images"], replace=False
        )
        images = to_float(self.batches.pixels[torch.from_numpy(np.sort(chosen)).to(self.device)])  # [B, C, H, W]
        model = (self.model if self.ema is None else self.ema).eval()
        try:
            curve, path = replan(
                model.denoise,
                self.scheduler,
                images,
                self.pairs.state["log_snr_32"].numpy(),
                self.pairs.follow_width,
                self.args.seed,
                lambda: autocast(self.device, self.config["precision"]),
                self.processes,
            )
        finally:
            self.model.train()
        self.pairs = self.pairs.moved_to(torch.from_numpy(curve))
        if not self.processes.is_main:
            return
        file, schedule = self.log_dir / f"path_{self.epoch}ep.json", self.config["beta_schedule"]
        solver = {"name": "ddim", "eta": 0.0, "end": "clean"}
        try:
            save_schedule(path, file, self.scheduler.log_snr.cpu().numpy(), solver, "kl", beta_schedule=schedule)
        except OSError as error:
            tqdm.write(f"warning: {file} could not be written ({error})", file=sys.stderr)

    @torch.no_grad()
    def sample_grids(self, stop: StopRequest | None = None) -> list[torch.Tensor]:
        """Samples of the EMA (else raw) weights along the t-uniform diagonal of the image, uint8, by predicted scale.

        Raises InterruptedError if a stop is asked for meanwhile.
        """

        def give_up_if_asked(*_) -> None:
            if stop is not None and stop.signal is not None:
                raise InterruptedError

        model = (self.model if self.ema is None else self.ema).eval()
        path = diagonal(GRID_STEPS, "uniform_t", num_scales=model.num_scales)
        if self.scheduler.representation.image_lead and self.model_type == "dual":
            log_snr = self.scheduler.log_snr.cpu().numpy()
            path = log_snr_shift(path, self.scheduler.representation.image_lead, log_snr)
        shapes = scale_shapes(model.num_scales, self.config["channels"], self.config["resolution"])
        seeds = image_seeds(self.args.seed, GRID_IMAGES)
        arguments = (model.denoise, self.scheduler, path, seeds, shapes, GRID_IMAGES, self.device)
        try:
            with autocast(self.device, self.config["precision"]):
                [(_, samples)] = sample_seeds(
                    *arguments, callback=give_up_if_asked, coarse_from=coarse_feed(model, "x0")
                )
        finally:
            self.model.train()
        return [to_uint8(images).cpu() for images in samples.images[: model.num_predictions]]

    def _grid_file(self, scale: str) -> Path:
        return self.log_dir / f"samples_{self.epoch}ep_{scale}.png"

    def draw_grids(self, log: RunLog | None = None, stop: StopRequest | None = None) -> None:
        """Draw samples of both scales to files and on the board, unless asked to stop."""
        try:
            # The fine grid is written last: it says that all are there.
            for scale, grid in reversed(list(zip(("fine", "coarse"), self.sample_grids(stop), strict=False))):
                save_image_grid(grid.numpy(), self._grid_file(scale), columns=8)
                if log is not None:
                    log.images(f"samples_{scale}", grid, self.step)
        except InterruptedError:
            pass  # Resuming draws them.
        except OSError as error:
            tqdm.write(f"warning: {self._grid_file('fine')} could not be written ({error})", file=sys.stderr)

    @property
    def snapshot_due(self) -> bool:
        """Whether a saved epoch ends at this step."""
        ends = self.step > 0 and self.step % len(self.batches) == 0
        return ends and (self.epoch % self.args.save_every == 0 or self.epoch == self.args.epochs)

    @property
    def snapshot_file(self) -> Path:
        """The checkpoint of this epoch."""
        return checkpoint_file(self.args.output_dir, self.model_type, self.epoch)

    def save_snapshots(self) -> None:
        """Write the checkpoint of this epoch if it is due, and those that could not be written before.

        Raises OSError if that fails; it is tried again at the next call.
        """
        if self.snapshot_due:
            self.owed[self.snapshot_file] = self.snapshot()
        try:
            for file, content in list(self.owed.items()):
                save_checkpoint(file, content)
                del self.owed[file]
                tqdm.write(f"epoch {content['epoch']}: saved {file}")
        except OSError:
            # Training changes these weights in place.
            self.owed = {file: copy.deepcopy(content) for file, content in self.owed.items()}
            raise

    def make_up_for_a_kill(self, log: RunLog | None = None, stop: StopRequest | None = None) -> None:
        """Write what belongs to this step, comes after its resume file, and is not there."""
        if not self.snapshot_due:
            return
        try:
            if not self.snapshot_file.exists():
                self.save_snapshots()
        except OSError as error:
            tqdm.write(f"warning: {error}", file=sys.stderr)
        if not self._grid_file("fine").exists():
            self.draw_grids(log, stop)


def describe(trainer: Trainer, images: ImageSet) -> str:
    """What a run is, in one line, and what there is to know about it, in one line each."""
    parameters = sum(p.numel() for p in trainer.parameters)
    execution = trainer.execution
    details = [str(trainer.device), trainer.config["precision"]]
    details += [f"{execution['processes']} processes"] * (execution["processes"] > 1)
    details += [f"{execution['accumulate']} parts per step"] * (execution["accumulate"] > 1)
    details += ["compiled"] * trainer.compile
    notes = list(trainer.notes)
    if trainer.args.prediction_type == "epsilon" and trainer.scheduler.snr[-1] < MIN_EPSILON_SNR:
        notes.append(
            f"warning: at t=999 schedule '{trainer.args.beta_schedule}' has so little signal that a noise prediction "
            "says nothing of the image there; --prediction_type v does."
        )
    line = (
        f"{trainer.model_type}: {parameters:,} parameters, {len(images)} images of '{images.name}' at "
        f"{trainer.args.resolution}x{trainer.args.resolution}, {len(trainer.batches)} steps per epoch, "
        f"{', '.join(details)}"
    )
    return "\n".join([line, *notes])


def training_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes that one process keeps during a step, by what they are for, without the working space of kernels."""
    weights = bytes_of(trainer.model.state_dict())
    recomputed = trainer.model.unet.blocks() if trainer.model.unet.recompute else []

    def measure(images: int) -> int:
        def forward() -> dict[str, torch.Tensor]:
            batch = trainer.draw(*next(trainer.batches.epoch(0))).rows(slice(images))
            with autocast(trainer.device, trainer.config["precision"]):
                return diffusion_loss(trainer.model, trainer.model_type, trainer.scheduler, batch)

        return saved_bytes(trainer.model, forward, recomputed)

    # What recomputing leaves out is counted by what it would keep.
    trainer.model.unet.recompute = False
    activations = for_batch(measure, trainer.part_size)
    trainer.model.unet.recompute = bool(recomputed)
    return {
        "weights": weights,
        "gradients": weights,
        "AdamW": 2 * weights,
        "EMA": 0 if trainer.ema is None else weights,
        "data set": trainer.batches.pixels.nbytes,
        "activations": activations,
    }


def describe_dry_run(trainer: Trainer) -> str:
    """What `--dry_run` prints below the description: options as resolved, position and memory."""
    options = vars(trainer.args) | trainer.config | trainer.execution | {"device": str(trainer.device)}
    memory = training_memory(trainer)
    total = trainer.args.epochs * len(trainer.batches)
    return "\n".join(
        [
            *(f"  {name} = {value}" for name, value in sorted(options.items())),
            f"position: step {trainer.step} of {total}",
            f"memory per process, without the working space of kernels: {sum(memory.values()) / 2**30:.3f} GiB",
            *(f"  {name:<12}{size / 2**30:8.3f} GiB" for name, size in memory.items()),
        ]
    )


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: on its GPU, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def out_of_memory_message(args: argparse.Namespace, processes: int) -> str:
    """What failed and which flags help."""
    # The next number of parts that divides the batch, if there is one.
    parts = range(args.accumulate + 1, args.batch_size // processes + 1)
    accumulate = next((n for n in parts if args.batch_size % (processes * n) == 0), None)
    ways = [f"--accumulate {accumulate} or more"] * (accumulate is not None)
    ways += ["--recompute"] * (not args.recompute) + ["--precision bf16"] * (args.precision in ("auto", "fp32"))
    return (
        f"out of memory with a batch of {args.batch_size} images at {args.resolution}x{args.resolution} "
        f"({processes} process(es), --accumulate {args.accumulate}); use {', '.join(ways)}, more GPUs, a smaller "
        "--batch_size, or smaller --hidden_dims."
    )


def train(model_type: str, args: argparse.Namespace) -> None:
    """Train one model to `args.epochs` epochs, saving every `args.save_every`, at a stop signal and at the end.

    Raises what `Trainer` raises, RuntimeError if memory runs out or too many steps in a row are not finite, OSError if
    the last save fails, and ValueError if another process trains in the same folders.
    """
    with StopRequest() as stop:
        processes = Processes(args.device)
        choose_kernels(processes.device, args.deterministic)
        images = cli.load_training_images(args)
        try:
            if args.dry_run:
                trainer = Trainer(model_type, args, images, processes)
                if processes.is_main:
                    print(describe(trainer, images), describe_dry_run(trainer), sep="\n")
            else:
                with locked(model_type, args) if processes.is_main else nullcontext():
                    _run(Trainer(model_type, args, images, processes), images, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RuntimeError(out_of_memory_message(args, processes.count)) from error
        processes.close()


@contextmanager
def locked(model_type: str, args: argparse.Namespace) -> Iterator[None]:
    """Keep other processes from training where this one does; raises ValueError if one is there already."""
    with ExitStack() as stack:
        for folder in (Path(args.output_dir), Path(args.log_dir) / FILE_STEMS[model_type]):
            # A place that cannot be written to is found out now rather than at the first save.
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(folder / f"{FILE_STEMS[model_type]}.lock", timeout=0))
            except Timeout as error:
                raise ValueError(f"another process is training in {folder}; wait for it or stop it.") from error
        yield


def _run(trainer: Trainer, images: ImageSet, stop: StopRequest) -> None:
    """From the trainer's position to its last epoch, or to a stop signal."""
    args, processes, is_main = trainer.args, trainer.processes, trainer.processes.is_main
    total_steps = args.epochs * len(trainer.batches)
    # Nobody writes before everybody has read.
    if not processes.agree(json.dumps([trainer.step, total_steps, trainer.settings], sort_keys=True)):
        raise ValueError(
            f"the processes found different data, settings or versions of {trainer.last_file}; give all of them the "
            "same files and flags."
        )
    if is_main:
        remove_temporaries(trainer.last_file.parent, FILE_STEMS[trainer.model_type] + "_")
        remove_temporaries(trainer.log_dir, "")
        for file in trainer.damaged:
            # It must not take the place of a whole version when the next one is saved.
            file.rename(file.with_name(f"{file.name}.damaged"))
    if trainer.step >= total_steps:
        if is_main:
            trainer.make_up_for_a_kill()
            print(*trainer.notes, f"{trainer.last_file} is done: {trainer.epoch} of {args.epochs} epochs.", sep="\n")
        return
    trainer.prepare()
    with ExitStack() as stack:
        log = None
        if is_main:
            log = RunLog(trainer.log_dir, trainer.step, trainer.settings, args.wandb, trainer.unwritten_rows)
            stack.callback(log.close)
            print(describe(trainer, images))
        bar = stack.enter_context(progress_bar(trainer, total_steps))
        stop.running = True
        if log is not None:
            trainer.make_up_for_a_kill(log, stop)
        stopped = _loop(trainer, log, bar, stop)
    if is_main and stopped:
        print(
            f"stopped by {stop.signal or 'another process'} after step {trainer.step} of {total_steps}, saved in "
            f"{trainer.last_file}; the same command with --resume auto goes on from there."
        )


def progress_bar(trainer: Trainer, total_steps: int) -> tqdm:
    """Epoch, step, losses, images/s and the time left; a line now and then where nobody watches."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    hidden = not trainer.processes.is_main
    return tqdm(total=total_steps, initial=trainer.step, unit="step", mininterval=seconds, disable=hidden)


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


def _loop(trainer: Trainer, log: RunLog | None, bar: tqdm, stop: StopRequest) -> bool:
    """Every step from the trainer's position on; returns whether a signal ended it."""
    args, processes = trainer.args, trainer.processes
    steps_per_epoch = len(trainer.batches)
    clock, last_save = Clock(), time.monotonic()
    [stopping] = processes.any(stop.signal is not None)
    while trainer.epoch < args.epochs and not stopping:
        bar.set_description(f"{trainer.model_type} epoch {trainer.epoch + 1}/{args.epochs}")
        for x_64, x_32 in trainer.batches.epoch(trainer.epoch, trainer.step % steps_per_epoch):
            trainer.train_step(x_64, x_32)
            clock.steps += 1
            bar.update()
            if trainer.step % args.log_every == 0 or trainer.step % steps_per_epoch == 0:
                write_row(trainer, log, bar, clock)
                trainer.check_bad_steps()
                clock.restart()
            if trainer.replan_due:
                # Before anything of this step is saved, which the new path belongs to.
                trainer.replan()
                clock.restart()
            overdue = processes.is_main and time.monotonic() - last_save > 60 * args.resume_minutes
            stopping, save_due = processes.any(stop.signal is not None, overdue)
            if trainer.snapshot_due or save_due or stopping:
                trainer.check_bad_steps()
                if log is not None:
                    save(trainer, log, must=stopping or trainer.epoch == args.epochs)
                if trainer.snapshot_due and not stopping:
                    if log is not None:
                        trainer.draw_grids(log, stop)
                    [stopping] = processes.any(stop.signal is not None)
                last_save = time.monotonic()
                clock.restart()
            if stopping:
                break
    return stopping


def write_row(trainer: Trainer, log: RunLog | None, bar: tqdm, clock: Clock) -> None:
    """Close the window of the log and show it everywhere."""
    row, curves = trainer.row()
    speed = {
        "images_per_second": round(clock.images_per_second(trainer.args.batch_size), 1),
        "memory_gib": round(peak_memory(trainer.device) / 2**30, 3),
    }
    if log is not None:
        log.write(row, speed, curves)
    shown = {key: row[key] for key in ("loss_64", "loss_32", "bad_steps") if row.get(key)}
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
