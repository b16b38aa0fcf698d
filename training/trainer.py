"""The state of a training run and its step: weights, EMA, optimizer, data, position, and what checkpoints hold of it.

What a run computes depends on its settings alone: images, noise and timesteps of a step are functions of (seed, step),
so a run that was stopped anywhere and resumed ends with the bits of one that was not, and N processes see what one
would see. docs/training.md says what is promised and where the time goes.
"""

import copy
import functools
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from checkpoint import (
    build_model,
    build_scheduler,
    checkpoint_file,
    save_checkpoint,
    weights_fingerprint,
)
from data import ImageSet
from images.representation import Images
from networks.autoencoder import Autoencoder
from networks.ema import ema_decay_after
from paths.schedule_file import save_schedule
from planning.regimes import parse_regime, resolve_regime
from planning.replanning import replan
from planning.replay import replay
from runtime.device import (
    autocast,
    compile_or_not,
    compiling_failed,
    memory_format,
    resolve_compile,
    resolve_precision,
)
from runtime.distributed import Processes
from runtime.safe_write import versions
from scheduler import predictions_alone
from training.classification import Classification
from training.material import Material
from training.objective import MEASURE_NAMES, Networks, TrainingBatch, step_generator
from training.objectives import OBJECTIVES
from training.pair_batches import PairBatches
from training.resume import earlier_run
from training.settings import REPLAN_EVERY, REPLAN_IMAGES, TrainingSettings
from training.teaching import Teaching
from training.terms import Term, terms_of
from training.vgg import VGG, load_vgg

TIMESTEP_BINS = 10
# What may differ between a run and its resumption; everything else in the config must be the same. The data themselves
# and the autoencoder are compared by their fingerprints, presets by what they set.
FREE_KEYS = frozenset(
    {"epochs", "dataset", "dataset_is_here", "start_dataset", "start_dataset_is_here"}
    | {"latents", "latents_is_here", "run", "preset"}
)


class Trainer:
    """Everything a run is made of: weights, EMA, optimizer, schedule, data and position.

    A step with a loss or gradient that is not finite leaves weights and optimizer as they were and is counted; the EMA
    takes those weights once more. vgg, autoencoder: what `load_vgg` and `load_autoencoder` make of the settings, if
    that has been done before. teaching: the teacher of a student, from whose weights it starts.

    Raises ValueError if `output_dir` or the log folder holds an earlier run that `--resume` does not continue, if a
    resumed run differs in anything but the places of data and autoencoder and, at constant rate, the epochs, for a
    resolution that the levels or patches of the model do not divide, or whose latents they do not, for a batch that
    processes and parts cannot share evenly, for CUDA graphs where there can be none, for a regime that the model cannot
    be trained with, for a teacher that is none of such a student, and what `load_vgg`, `load_autoencoder`,
    `LatentSpace` and its `posteriors` raise.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        images: ImageSet,
        processes: Processes,
        vgg: VGG | None = None,
        held_out: ImageSet | None = None,  # by which a classifier is measured
        autoencoder: Autoencoder | None = None,
        teaching: Teaching | None = None,
    ):
        self.settings, self.processes, self.device = settings, processes, processes.device
        pairs = None if teaching is None else teaching.pairs
        self.material = Material(settings, images, processes, held_out, autoencoder, pairs)
        self.config = settings.recorded() | {
            "num_train_timesteps": 1000,
            "precision": resolve_precision(self.device, settings.precision),
            **self.material.said,
        }
        if vgg is None and settings.perceptual_weight:
            vgg = load_vgg(settings.vgg_weights)
        # The weights count by what they are, as their file may lie elsewhere when the run is resumed.
        self.config["vgg_fingerprint"] = None if vgg is None else vgg.fingerprint
        objective = Classification if settings.objective is None else OBJECTIVES[settings.objective]
        if objective.learned_variance:  # Configs that do not say it are of models without.
            self.config["learned_variance"] = True
        if teaching is not None:
            teaching.check(self.config)
            self.config |= {"teacher_fingerprint": teaching.teacher.fingerprint} | teaching.said
        self.scheduler = build_scheduler(self.config)
        read = functools.partial(replay, scheduler=self.scheduler, resolution=settings.resolution)
        self.config |= resolve_regime(settings.t_pairs, settings.model_type, read) | self._replanning(images)
        self.compile = resolve_compile(self.device, settings.compile)
        if settings.cuda_graphs and not (self.compile and self.device.type == "cuda"):
            raise ValueError(f"--cuda_graphs needs a compiled network on a GPU, not {self.device}; leave it out.")
        self.execution = {
            "device": self.device.type,
            "processes": processes.count,
            "accumulate": settings.accumulate,
            "compile": self.compile,
            "cuda_graphs": settings.cuda_graphs,
            "deterministic": settings.deterministic,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
        }
        self.last_file = checkpoint_file(settings.output_dir, settings.model_type, "last", settings.student)
        self.log_dir = Path(settings.log_dir) / settings.stem
        self.notes: list[str] = []
        self.damaged: list[Path] = []  # Newer than the resume file that this run goes on from.
        self.owed: dict[Path, dict] = {}  # Snapshots that a full disk kept from being written.
        saved = None
        earlier = earlier_run(settings, self.identity, self.execution, self.last_file, self.log_dir)
        if earlier is not None:
            saved, self.damaged, self.notes = earlier
            if settings.precision == "auto":
                self.config["precision"] = saved["config"]["precision"]
        self.scheduler = self.scheduler.to(self.device)
        if settings.batch_size % (processes.count * settings.accumulate):
            raise ValueError(
                f"--batch_size {settings.batch_size} cannot be split evenly over {processes.count} process(es) with "
                f"--accumulate {settings.accumulate}."
            )
        self.part_size = settings.batch_size // (processes.count * settings.accumulate)
        torch.manual_seed(settings.seed)
        self.model = build_model(self.config).to(self.device, memory_format=memory_format(self.device))
        if teaching is not None:
            self.model.load_state_dict(teaching.teacher.model.state_dict())
        self.material.check_side(self.model.unet, self.config)
        self.batches = self.material.batches()
        self.model.unet.recompute = settings.recompute
        self.parameters = list(self.model.parameters())
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if settings.ema_decay > 0 else None
        self.ema_parameters = [] if self.ema is None else list(self.ema.parameters())
        if vgg is not None:
            vgg.to(self.device, memory_format=memory_format(self.device))
        terms = terms_of(self.config, self.scheduler, self.ema, vgg)
        networks = Networks(self.model, None if teaching is None else teaching.teacher.denoise)
        self.objective = objective(self.config, self.scheduler, terms, networks)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        total_steps = settings.epochs * len(self.batches)
        factors = {
            "constant": lambda step: 1.0,
            "cosine": lambda step: (1 + math.cos(math.pi * step / total_steps)) / 2,
        }
        self.lr_schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factors[settings.lr_schedule])
        self.lr = settings.lr  # Of the last step.
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
    def is_paired(self) -> bool:
        """Whether images come with the noise that they were made of."""
        return isinstance(self.batches, PairBatches)

    @property
    def averaged(self) -> nn.Module:
        """The model with EMA weights, or if there are none the model."""
        return self.model if self.ema is None else self.ema

    @property
    def model_type(self) -> str:
        """The kind of model, a key of `checkpoint.MODEL_CLASSES`."""
        return self.config["model_type"]

    def _replanning(self, images: ImageSet) -> dict[str, int | None]:
        """What the config says of plans in the course of the run: None, but for `follow`."""
        settings = self.settings
        if not settings.follows:
            return {"replan_every": None, "replan_images": None}
        if (settings.replan_images or 0) > len(images):
            raise ValueError(f"--replan_images exceeds the {len(images)} images of '{images.name}'; choose fewer.")
        count = settings.replan_images or min(REPLAN_IMAGES, len(images))
        return {"replan_every": settings.replan_every or REPLAN_EVERY, "replan_images": count}

    @property
    def identity(self) -> dict:
        """What of the config decides what is computed, and is the same in every part of a run."""
        pairs = self.config["t_pairs"]
        timed = self.settings.lr_schedule == "cosine" or (pairs is not None and parse_regime(pairs).changes)
        timed |= self.settings.objective is not None and OBJECTIVES[self.settings.objective].timed
        free = FREE_KEYS - ({"epochs"} if timed else set())  # What happens by the share of the run depends on its end.
        return {name: value for name, value in self.config.items() if name not in free}

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
        self.objective.restore(saved)

    def prepare(self) -> None:
        """Compile the network and share it among the processes; before the first step."""
        if self.compile:
            mode = "reduce-overhead" if self.settings.cuda_graphs else None
            self.network, reason = compile_or_not(self.model, self._rehearse, mode=mode)
            [failed] = self.processes.any(bool(reason))
            if failed:
                self.notes.append(compiling_failed(reason or "in another process"))
                self.network, self.compile, self.execution["compile"] = self.model, False, False
            else:
                self._compile_terms()
        if self.processes.count > 1:
            devices = None if self.device.type == "cpu" else [self.device]
            self.network = DistributedDataParallel(self.network, devices, gradient_as_bucket_view=True)
            # The first backward pass orders the sums over processes for all that follow, in a resumed run as well.
            self._rehearse(self.network)

    def _compile_terms(self) -> None:
        for term in self.objective.terms:
            eager = term.look

            def rehearse(look: Callable, term: Term = term) -> None:
                term.look = look
                self._rehearse(self.network)

            compiled, reason = compile_or_not(eager, rehearse)
            [failed] = self.processes.any(bool(reason))
            term.look = eager if failed else compiled
            if failed:
                self.notes.append(compiling_failed(reason or "in another process"))

    def _rehearse(self, network: nn.Module) -> None:
        """Compute gradients as in a step, and forget them."""
        batch = self.draw(*next(self.batches.epoch(0)))
        self._backward(batch.rows(slice(self.part_size)), network)
        self.optimizer.zero_grad(set_to_none=True)

    def draw(
        self,
        x_64: torch.Tensor,
        x_32: torch.Tensor,
        labels: torch.Tensor | None = None,
        noise: Images | None = None,  # of stored pairs, which have theirs, or images to start from
    ) -> TrainingBatch:
        """This process's share of a step: noise is drawn for all images of the step, so that shares do not matter."""
        generator = step_generator(self.settings.seed, self.step, self.device)
        progress = min(1.0, self.step / max(1, self.settings.epochs * len(self.batches) - 1))
        batch = self.objective.draw(x_64, x_32, generator, progress, labels, noise)
        return batch.rows(self.processes.share(len(x_64)))

    def losses(self, batch: TrainingBatch, network: nn.Module) -> dict[str, torch.Tensor]:
        """The losses of every image `[B]` by name, with `network` called in place of the model."""
        evaluate = getattr(self.model, self.objective.evaluates)
        return self.objective.losses(functools.partial(evaluate, network=network), batch)

    def _backward(self, part: TrainingBatch, network: nn.Module) -> dict[str, torch.Tensor]:
        """Add the gradient of one part to that of the step; returns the losses per image."""
        with autocast(self.device, self.config["precision"]):
            losses = self.losses(part, network)
        loss = self.objective.minimised(losses, part)
        self.scaler.scale(loss / self.settings.accumulate).backward()
        return {name: values.detach() for name, values in losses.items()}

    def _update(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The optimizer step, unless loss or gradient is not finite; returns the gradient norm and whether it was."""
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.parameters])
        good = torch.isfinite(grad_norm) & torch.isfinite(loss)
        # By these two the loss scaler of PyTorch talks to its fused optimizers: they divide the gradient by the one,
        # and leave out the step for the other, without asking the host. Here the first one clips.
        self.optimizer.grad_scale = ((grad_norm + 1e-6) / self.settings.grad_clip).clamp(min=1)
        self.optimizer.found_inf = (~good).float()
        self.optimizer.step()
        self.scaler.update()
        self.lr = self.lr_schedule.get_last_lr()[0]
        self.lr_schedule.step()
        return grad_norm, good

    def _average(self) -> None:
        if self.ema is not None:
            decay = ema_decay_after(self.step, self.settings.ema_decay, self.settings.ema_rampup_ratio)
            get_ema_multi_avg_fn(decay)(self.ema_parameters, self.parameters, self.step)

    def train_step(
        self,
        x_64: torch.Tensor,
        x_32: torch.Tensor,
        labels: torch.Tensor | None = None,
        noise: Images | None = None,
    ) -> dict[str, torch.Tensor]:
        """One optimizer and EMA step on all images of the step; returns the mean losses and the gradient norm.

        labels: the classes of the images, int64 `[B]`, for a model that is told of them. noise: of both scales, if it
        is not to be drawn.
        Nothing here waits for the device, on which the values returned are.
        """
        batch = self.draw(x_64, x_32, labels, noise)
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
        means = sums[:, 0].sum(1) / self.settings.batch_size  # [scales]
        grad_norm, good = self._update(means.sum())
        self._average()
        self.objective.observe(losses, batch, good, self.processes.sum)
        self.step += 1
        values = dict(zip(losses, means, strict=True)) | {"grad_norm": grad_norm}
        self._count(values | {"good_steps": good.float(), "bins": sums}, good)
        return values

    def _bin_sums(self, losses: torch.Tensor, batch: TrainingBatch, name: str) -> torch.Tensor:
        """Sum and number of the losses `[B]` of a scale whose timestep is in each bin: `[2, bins]`."""
        t = batch.clock(name).long()
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
            f"{MEASURE_NAMES[name]} by timestep/{k * width:03d}-{(k + 1) * width - 1:03d}": total / count
            for name, bins in zip(totals, sums, strict=False)
            for k, (total, count) in enumerate(zip(*bins, strict=True))
            if count
        }
        return {"step": self.step, "epoch": (self.step - 1) // len(self.batches)} | row, curves

    def check_bad_steps(self) -> None:
        """Raise RuntimeError, naming the last good checkpoint, after too many steps in a row that were not finite."""
        longest = self.bad_steps["longest"].item()
        if longest >= self.settings.max_bad_steps:
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
            "steps_per_epoch": len(self.batches),
            "regime_state": self.objective.pairs.state,
        }

    def save_resume_file(self) -> None:
        """Write `_last.pth`, of which `--keep_last` versions are kept; raises OSError if that fails."""
        rest = {
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
            "objective_state": self.objective.state,
            "loss_scaler": self.scaler.state_dict(),
            "window": self.window,
            "bad_steps": self.bad_steps,
            "unwritten_rows": self.unwritten_rows,
            "execution": self.execution,
            "settings": self.settings.given(),
        }
        save_checkpoint(self.last_file, self.snapshot() | rest, self.settings.keep_last)

    @property
    def replan_due(self) -> bool:
        """Whether the path of `--t_pairs follow:W` is planned again after this step."""
        every = self.config["replan_every"]
        return every is not None and self.step > 0 and self.step % (every * len(self.batches)) == 0

    def replan(self) -> None:
        """Move the band of `--t_pairs follow:W` to the path planned with the EMA (else raw) weights, and log that."""
        chosen = np.random.default_rng((self.settings.seed, self.step)).choice(
            self.batches.count, self.config["replan_images"], replace=False
        )
        images = self.batches.clean(torch.from_numpy(np.sort(chosen)).to(self.device), self.step)  # [B, C, H, W]
        model, pairs = self.averaged.eval(), self.objective.pairs
        denoise = self.scheduler.denoiser(model.denoise)
        try:
            curve, path = replan(
                predictions_alone(denoise) if model.learned_variance else denoise,
                self.scheduler,
                images,
                pairs.state["log_snr_32"].numpy(),
                pairs.follow_width,
                self.settings.seed,
                lambda: autocast(self.device, self.config["precision"]),
                self.processes,
            )
        finally:
            self.model.train()
        self.objective.pairs = pairs.moved_to(torch.from_numpy(curve))
        if not self.processes.is_main:
            return
        file = self.log_dir / f"path_{self.epoch}ep.json"
        try:
            save_schedule(
                path,
                file,
                self.scheduler.log_snr.cpu().numpy(),
                solver={"name": "ddim", "eta": 0.0, "end": "clean"},
                criterion="kl",
                model_fingerprint=weights_fingerprint(model.state_dict()),
                weights="raw" if self.ema is None else "ema",
                epoch=self.epoch,
                **{
                    key: self.config.get(key)
                    for key in ("data_fingerprint", "beta_schedule", "representation", "resolution", "run")
                },
            )
        except OSError as error:
            tqdm.write(f"warning: {file} could not be written ({error})", file=sys.stderr)

    @property
    def snapshot_due(self) -> bool:
        """Whether a saved epoch ends at this step."""
        ends = self.step > 0 and self.step % len(self.batches) == 0
        # A student has one checkpoint, that of its end.
        saves = self.settings.student is None and self.epoch % self.settings.save_every == 0
        return ends and (saves or self.epoch == self.settings.epochs)

    @property
    def snapshot_file(self) -> Path:
        """The checkpoint of this epoch."""
        return checkpoint_file(self.settings.output_dir, self.model_type, self.epoch, self.settings.student)

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
