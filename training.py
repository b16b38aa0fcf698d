"""The one training loop: step, EMA, precision, resume, checkpoints, logs and sample grids.

Noise, timesteps and order of images depend on (seed, step) alone, so a resumed run sees what an
uninterrupted one would have seen.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import cli
from checkpoint import FILE_STEMS, build_model, checkpoint_file, read_checkpoint, save_checkpoint
from data import ImageSet, TwoScaleBatches, to_uint8
from device import autocast, memory_format, select_device
from path import diagonal
from plots import save_image_grid
from safe_write import replacing
from sampler import image_seeds, sample_seeds, scale_shapes
from scheduler import PREDICTION_TYPES, SCHEDULE_NAMES, DDIMScheduler

METRICS_FILE = "metrics.jsonl"
MIN_EPSILON_SNR = 1e-6  # Below it, the error of a noise prediction is amplified a thousand times and more.
GRID_IMAGES = 32
GRID_STEPS = 18
# What may differ between a run and its resumption; everything else in the config must be the same.
RESUMABLE_KEYS = frozenset({"epochs", "dataset"})  # The data themselves are compared by their fingerprint.


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of both training stages; the defaults are the published settings."""
    cli.add_data_arguments(parser)
    cli.add_device_arguments(parser)
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--epochs", type=cli.positive_int, default=2000, help="passes over the data (2000)")
    add("--batch_size", type=cli.positive_int, default=64, help="images per step (64)")
    add("--lr", type=cli.positive_float, default=1e-4, help="AdamW learning rate (1e-4)")
    add("--lr_schedule", choices=("constant", "cosine"), default="constant", help="cosine decays to 0")
    add("--weight_decay", type=cli.unit_interval, default=0.01, help="AdamW weight decay (0.01)")
    add("--grad_clip", type=cli.positive_float, default=1.0, help="largest gradient norm (1.0)")
    add("--ema_decay", type=cli.unit_interval, default=0.9999, help="EMA decay per step; 0 keeps no EMA (0.9999)")
    add("--hidden_dims", type=cli.hidden_dims, default=(64, 128, 256, 512), help="64,128,256,512")
    add("--beta_schedule", choices=SCHEDULE_NAMES, default="cosine_clipped", help="(cosine_clipped)")
    add("--prediction_type", choices=PREDICTION_TYPES, default="epsilon", help="(epsilon)")
    add("--flip", action="store_true", help="mirror images at random (off, as published)")
    add("--seed", type=cli.seed, default=42, help="initial weights, order, noise, timesteps (42)")
    add("--save_every", type=cli.positive_int, default=200, help="epochs between checkpoints (200)")
    add("--log_every", type=cli.positive_int, default=50, help="steps between rows of metrics.jsonl (50)")
    add("--output_dir", default="checkpoints", help="checkpoints go here (checkpoints)")
    add("--log_dir", default="logs", help="metrics, TensorBoard and sample grids go to a folder here (logs)")
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


def diffusion_loss(
    model: nn.Module,
    model_type: str,
    scheduler: DDIMScheduler,
    x_64: torch.Tensor,
    x_32: torch.Tensor,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Mean squared error per predicted scale, `loss_64` and where predicted `loss_32`, float32 scalars.

    x_64 `[B, C, H, W]`, x_32 `[B, C, H/2, W/2]` in [-1, 1]. Timesteps are uniform over the schedule and
    independent per scale (equal for `shared_t`); each scale has its own noise.
    """
    batch, device = len(x_64), x_64.device
    t_64, t_32 = torch.randint(
        scheduler.num_train_timesteps, (2, batch), generator=generator, device=device
    )  # [B] twice
    if model_type == "shared_t":
        t_32 = t_64
    noise_64 = torch.randn(x_64.shape, generator=generator, device=device)  # [B, C, H, W]
    noise_32 = torch.randn(x_32.shape, generator=generator, device=device)  # [B, C, H/2, W/2]
    z_64 = scheduler.add_noise(x_64, noise_64, t_64)
    z_32 = scheduler.add_noise(x_32, noise_32, t_32)
    if model_type in ("dual", "shared_t"):
        clocks = (t_64, t_32) if model_type == "dual" else (t_64,)
        prediction_64, prediction_32 = model(z_64, z_32, *clocks)
        loss_32 = F.mse_loss(prediction_32.float(), scheduler.target(x_32, noise_32, t_32))
    else:
        inputs = {"baseline": (z_64, t_64), "single_t": (z_64, z_32, t_64), "no_t": (z_64, z_32)}
        prediction_64, loss_32 = model(*inputs[model_type]), None
    losses = {"loss_64": F.mse_loss(prediction_64.float(), scheduler.target(x_64, noise_64, t_64))}
    return losses if loss_32 is None else losses | {"loss_32": loss_32}


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`, without a last one that is being written or that a crash cut short."""
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricsLog:
    """Rows of `metrics.jsonl` and the same values in TensorBoard; a resumed run drops rows it will redo."""

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / METRICS_FILE
        rows = read_metrics(self.file) if self.file.exists() else []
        with replacing(self.file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= first_step))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, row: dict[str, float]) -> None:
        """Append one row and show its numbers on the board."""
        with open(self.file, "a") as stream:
            stream.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self.board.add_scalar(name, value, row["step"])


class Trainer:
    """Everything a run is made of: weights, EMA, optimizer, schedule, data and position.

    Raises ValueError if `output_dir` or the log folder holds an earlier run that `--resume` does not continue,
    if a resumed run differs in anything but the place of the data and, at constant rate, the epochs, and for a
    resolution that the levels of the model do not divide.
    """

    def __init__(self, model_type: str, args: argparse.Namespace, images: ImageSet, device: torch.device):
        self.args, self.device = args, device
        self.config = {
            "model_type": model_type,
            "hidden_dims": list(args.hidden_dims),
            "channels": images.channels,
            "data_fingerprint": images.fingerprint,
            "num_train_timesteps": 1000,
        } | {
            name: getattr(args, name)
            for name in (
                "dataset", "resolution", "resize_filter", "limit", "skip_bad_images", "beta_schedule",
                "prediction_type", "flip", "epochs", "batch_size", "lr", "lr_schedule", "weight_decay",
                "grad_clip", "ema_decay", "seed", "precision",
            )
        }  # fmt: skip
        self.last_file = checkpoint_file(args.output_dir, model_type, "last")
        self.log_dir = Path(args.log_dir) / FILE_STEMS[model_type]
        self.scheduler = DDIMScheduler(beta_schedule=args.beta_schedule, prediction_type=args.prediction_type).to(
            device
        )
        self.batches = TwoScaleBatches(images, args.batch_size, args.seed, device, args.flip)
        torch.manual_seed(args.seed)
        self.model = build_model(self.config).to(device, memory_format=memory_format(device))
        if args.resolution % self.model.unet.stride:
            raise ValueError(
                f"--resolution {args.resolution} must be a multiple of {self.model.unet.stride} for the "
                f"{len(args.hidden_dims)} levels of --hidden_dims; use fewer levels or another --resolution."
            )
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if args.ema_decay > 0 else None
        self.update_ema = get_ema_multi_avg_fn(args.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        total_steps = args.epochs * len(self.batches)
        factors = {
            "constant": lambda step: 1.0,
            "cosine": lambda step: (1 + math.cos(math.pi * step / total_steps)) / 2,
        }
        self.lr_schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factors[args.lr_schedule])
        self.epoch = self.step = 0
        self.lr = args.lr  # Of the last step.
        if args.resume == "required" or (args.resume == "auto" and self.last_file.exists()):
            self._resume()
        else:
            self._refuse_to_overwrite()

    def _refuse_to_overwrite(self) -> None:
        taken = sorted(self.last_file.parent.glob(self.last_file.name.replace("_last", "_*")))
        log = self.log_dir / METRICS_FILE
        # With --resume auto a log without a checkpoint is of a run that stopped before its first save.
        if self.args.resume is None and log.exists():
            taken.append(log)
        if taken:
            raise ValueError(
                f"{taken[0]} exists already; pass --resume to continue its run, or another --output_dir and --log_dir."
            )

    def _resume(self) -> None:
        if not self.last_file.exists():
            raise FileNotFoundError(f"{self.last_file} does not exist; leave --resume out to start a new run.")
        content = read_checkpoint(self.last_file, self.device)
        saved = content["config"]
        # A cosine schedule depends on where it ends.
        free = RESUMABLE_KEYS - ({"epochs"} if saved.get("lr_schedule") == "cosine" else set())
        # The fingerprint comes last, so that the flag that changed the data is named rather than it.
        for key in sorted(self.config.keys() | saved.keys(), key=lambda key: (key == "data_fingerprint", key)):
            if key not in free and saved.get(key) != self.config.get(key):
                raise ValueError(
                    f"{self.last_file} was trained with {key} = {saved.get(key)}, not {self.config.get(key)}; "
                    "resume with the same value or start in another --output_dir."
                )
        if "optimizer" not in content:
            raise ValueError(f"{self.last_file} holds no optimizer state; resume needs the _last.pth of a run.")
        self.model.load_state_dict(content["model_state"])
        if self.ema is not None:
            self.ema.load_state_dict(content["ema_state"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.lr_schedule.load_state_dict(content["lr_schedule"])
        self.epoch, self.step = content["epoch"], content["step"]

    def train_step(self, x_64: torch.Tensor, x_32: torch.Tensor) -> dict[str, torch.Tensor]:
        """One optimizer and EMA step; returns the losses and the gradient norm, on the device."""
        generator = step_generator(self.args.seed, self.step, self.device)
        with autocast(self.device, self.args.precision):
            losses = diffusion_loss(self.model, self.config["model_type"], self.scheduler, x_64, x_32, generator)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        self.optimizer.step()
        self.lr = self.lr_schedule.get_last_lr()[0]
        self.lr_schedule.step()
        if self.ema is not None:
            with torch.no_grad():
                self.update_ema(list(self.ema.parameters()), list(self.model.parameters()), self.step)
        self.step += 1
        return {name: value.detach() for name, value in losses.items()} | {"grad_norm": grad_norm}

    def save(self) -> Path:
        """Write the snapshot of this epoch and the resume file; returns the snapshot's name."""
        snapshot = {
            "model_state": self.model.state_dict(),
            "ema_state": None if self.ema is None else self.ema.state_dict(),
            "config": self.config,
            "epoch": self.epoch,
            "step": self.step,
        }
        file = checkpoint_file(self.args.output_dir, self.config["model_type"], self.epoch)
        save_checkpoint(file, snapshot)
        rest = {"optimizer": self.optimizer.state_dict(), "lr_schedule": self.lr_schedule.state_dict()}
        save_checkpoint(self.last_file, snapshot | rest)
        return file

    @torch.no_grad()
    def sample_grids(self) -> list[torch.Tensor]:
        """Samples of the EMA (else raw) weights along the t-uniform diagonal, uint8, one tensor per scale."""
        model = (self.model if self.ema is None else self.ema).eval()
        path = diagonal(GRID_STEPS, "uniform_t", num_scales=model.num_scales)
        shapes = scale_shapes(model.num_scales, self.config["channels"], self.config["resolution"])
        seeds = image_seeds(self.args.seed, GRID_IMAGES)
        with autocast(self.device, self.args.precision):
            [(_, samples)] = sample_seeds(model.denoise, self.scheduler, path, seeds, shapes, GRID_IMAGES, self.device)
        self.model.train()
        return [to_uint8(images).cpu() for images in samples.images]


def train(model_type: str, args: argparse.Namespace) -> None:
    """Train one model to `args.epochs` epochs, saving every `args.save_every` and at the end."""
    device = select_device(args.device)
    images = cli.load_training_images(args)
    trainer = Trainer(model_type, args, images, device)
    if trainer.epoch >= args.epochs:
        print(f"{trainer.last_file} is done: {trainer.epoch} of {args.epochs} epochs.")
        return
    # A place that cannot be written to is found out now rather than at the first save.
    trainer.last_file.parent.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(trainer.log_dir, trainer.step)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{model_type}: {parameters:,} parameters, {len(images)} images of '{images.name}' at "
        f"{args.resolution}x{args.resolution}, {len(trainer.batches)} steps per epoch, {device}"
    )
    if args.prediction_type == "epsilon" and trainer.scheduler.snr[-1] < MIN_EPSILON_SNR:
        print(
            f"warning: at t=999 schedule '{args.beta_schedule}' has so little signal that a noise prediction says "
            "nothing of the image there; --prediction_type v does."
        )
    total = args.epochs * len(trainer.batches)
    totals: dict[str, torch.Tensor] = {}
    window_steps, window_start = 0, time.perf_counter()
    with tqdm(total=total, initial=trainer.step, unit="step", desc=model_type) as bar:
        while trainer.epoch < args.epochs:
            for x_64, x_32 in trainer.batches.epoch(trainer.epoch):
                for name, value in trainer.train_step(x_64, x_32).items():
                    totals[name] = totals.get(name, 0) + value
                window_steps += 1
                bar.update()
                epoch_ends = trainer.step % len(trainer.batches) == 0
                if trainer.step % args.log_every == 0 or epoch_ends:
                    seconds = time.perf_counter() - window_start
                    row = {name: (value / window_steps).item() for name, value in totals.items()}
                    row |= {
                        "images_per_second": round(window_steps * args.batch_size / seconds, 1),
                        "lr": trainer.lr,
                    }
                    bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k not in ("lr", "grad_norm")})
                    log.write({"step": trainer.step, "epoch": trainer.epoch} | row)
                    totals, window_steps, window_start = {}, 0, time.perf_counter()
            trainer.epoch += 1
            if trainer.epoch % args.save_every == 0 or trainer.epoch == args.epochs:
                file = trainer.save()
                for scale, grid in zip(("fine", "coarse"), trainer.sample_grids(), strict=False):
                    save_image_grid(grid.numpy(), trainer.log_dir / f"samples_{trainer.epoch}ep_{scale}.png", columns=8)
                    log.board.add_images(f"samples_{scale}", grid, trainer.step)
                log.board.flush()
                bar.write(f"epoch {trainer.epoch}: saved {file}")
                window_start = time.perf_counter()
    log.board.close()
