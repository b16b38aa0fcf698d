"""What the weights of a saved epoch are good for: samples of a model, or how often a classifier is right."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import OWN_SOLVERS
from data import coarse
from diffusion.cold_starts import DegradedStarts
from diffusion.sampler import (
    Callback,
    Samples,
    SeededNoise,
    coarse_feed,
    image_seeds,
    sample,
    sample_seeds,
    scale_shapes,
)
from diffusion.solvers import make_solver
from diffusion.space import side_of
from diffusion.starts import Starts
from diffusion.super_resolution import super_resolution_path
from figures.images import save_image_grid
from image_folder import evenly
from paths.families import diagonal, log_snr_shift
from planning.students import student_path
from runtime.device import autocast
from runtime.safe_write import replacing
from training.classification import CLEAN_NAME, accuracies, measured_rows
from training.run_log import RunLog
from training.stop import StopRequest
from training.trainer import Trainer

GRID_IMAGES = 32
GRID_STEPS = 18
CONSISTENCY_STEPS = 2  # Of consistency models, for which more of them are of little use.


def show_epoch(trainer: Trainer, log: RunLog | None = None, stop: StopRequest | None = None) -> None:
    """Write, and put on the board, what `shown_file` says that there is to see; samples not if a stop is asked for."""
    if trainer.model.predicts_images:
        draw_grids(trainer, log, stop)
    else:
        write_accuracy(trainer, log)


def shown_file(trainer: Trainer) -> Path:
    """The file that `show_epoch` writes last."""
    if trainer.model.predicts_images:
        return _grid_file(trainer, "fine")
    return trainer.log_dir / f"accuracy_{trainer.epoch}ep.json"


def _grid_file(trainer: Trainer, scale: str) -> Path:
    return trainer.log_dir / f"samples_{trainer.epoch}ep_{scale}.png"


@torch.no_grad()
def sample_grids(trainer: Trainer, stop: StopRequest | None = None) -> list[torch.Tensor]:
    """Samples of the EMA (else raw) weights along the t-uniform diagonal of the image, uint8, by predicted scale.

    Those of a student are along its own path; all are made by DDIM, but those of a consistency model by its own solver
    in few steps. Of a model that starts from images they are what it makes of those held out, or else of those that it
    was trained on; one of cold diffusion restores such images, and a stage of a cascade enlarges their coarse versions,
    given clean. Of latents both are decoded, the coarse one as an image of half the size; of a model with classes,
    classes take turns. Raises InterruptedError if a stop is asked for meanwhile.
    """

    def give_up_if_asked(*_) -> None:
        if stop is not None and stop.signal is not None:
            raise InterruptedError

    model, config, scheduler = trainer.averaged.eval(), trainer.config, trainer.scheduler
    objective = config["objective"]
    steps = min(GRID_STEPS, CONSISTENCY_STEPS) if objective == "consistency" else GRID_STEPS
    path = student_path(config) or diagonal(steps, "uniform_t", num_scales=model.num_scales)
    if path.kind == "diagonal" and scheduler.representation.image_lead and model.has_two_clocks():
        path = log_snr_shift(path, scheduler.representation.image_lead, scheduler.log_snr.cpu().numpy())
    names = config["class_names"]
    if model.coarse_given:
        samples = _enlarged(trainer, steps, give_up_if_asked)
        return [trainer.material.space.pixels(samples.images[0]).cpu()]
    images = starts = None
    if trainer.material.starts is not None:
        images = Starts((trainer.material.held_out_starts or trainer.material.starts).pixels)
    elif not scheduler.noise_levels:
        images = DegradedStarts(trainer.material.shown.pixels, scheduler)
    if images is not None:
        starts = partial(images.of_seeds, num_scales=model.num_scales, device=trainer.device)
    try:
        with autocast(trainer.device, config["precision"]):
            [(_, samples)] = sample_seeds(
                scheduler.denoiser(model.denoise),
                scheduler,
                path,
                image_seeds(trainer.settings.seed, GRID_IMAGES),
                scale_shapes(model.num_scales, config["channels"], side_of(config)),
                GRID_IMAGES,
                trainer.device,
                callback=give_up_if_asked,
                coarse_from=coarse_feed(model, "x0"),
                solver=make_solver(OWN_SOLVERS.get(objective, ("ddim",))[-1]),
                labels=[k % len(names) for k in range(GRID_IMAGES)] if names else None,
                starts=starts,
            )
    finally:
        trainer.model.train()
    return [trainer.material.space.pixels(images).cpu() for images in samples.images[: model.num_predictions]]


def _enlarged(trainer: Trainer, steps: int, callback: Callback) -> Samples:
    batches, device, settings = trainer.batches, trainer.device, trainer.settings
    rows = torch.from_numpy(evenly(min(GRID_IMAGES, batches.count), batches.count, "the data set")).to(device)
    images = batches.clean(rows, trainer.step)  # [B, C, R, R]
    draw = partial(SeededNoise(image_seeds(settings.seed, len(images))).draw, device=device)
    given = coarse(images)
    try:
        with autocast(device, trainer.config["precision"]):
            return sample(
                trainer.scheduler.denoiser(trainer.averaged.denoise),
                trainer.scheduler,
                super_resolution_path(diagonal(steps, "uniform_t", num_scales=1)),
                (draw(images.shape[1:]), torch.zeros_like(given)),
                callback=callback,
                labels=None if batches.labels is None else batches.labels[rows],
                given=given,
            )
    finally:
        trainer.model.train()


def draw_grids(trainer: Trainer, log: RunLog | None = None, stop: StopRequest | None = None) -> None:
    """Draw samples of both scales to files and on the board, unless asked to stop."""
    try:
        # The fine grid is written last: it says that all are there.
        for scale, grid in reversed(list(zip(("fine", "coarse"), sample_grids(trainer, stop), strict=False))):
            save_image_grid(grid.numpy(), _grid_file(trainer, scale), columns=8)
            if log is not None:
                log.images(f"samples_{scale}", grid, trainer.step)
    except InterruptedError:
        pass  # Resuming draws them.
    except OSError as error:
        tqdm.write(f"warning: {shown_file(trainer)} could not be written ({error})", file=sys.stderr)


def write_accuracy(trainer: Trainer, log: RunLog | None = None) -> None:
    """How often a classifier is right on the images held out, by timestep, to a file, on the board and the screen.

    It is that of the EMA (else raw) weights.
    """
    if trainer.material.held_out is None:
        return
    settings = trainer.settings
    try:
        with autocast(trainer.device, trainer.config["precision"]):
            classify = trainer.averaged.eval().classify
            found = accuracies(
                classify, trainer.scheduler, *trainer.material.held_out, settings.seed, settings.batch_size
            )
    finally:
        trainer.model.train()
    said = {
        "epoch": trainer.epoch,
        "step": trainer.step,
        "images": len(measured_rows(len(trainer.material.held_out[0]))),
        "accuracy": found,
    }
    try:
        with replacing(shown_file(trainer)) as temporary:
            temporary.write_text(json.dumps(said, indent=2) + "\n")
    except OSError as error:
        tqdm.write(f"warning: {shown_file(trainer)} could not be written ({error})", file=sys.stderr)
    if log is not None:
        log.scalars({f"held-out accuracy/{name}": value for name, value in found.items()}, trainer.step)
    tqdm.write(f"epoch {trainer.epoch}: held-out accuracy {found[CLEAN_NAME]:.4g} of clean images")
