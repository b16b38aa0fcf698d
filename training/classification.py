"""What a classifier of noisy images is shown, what it minimises, and how often it is right.

    L = E -log p(label | x_t, t),  x_t = alpha x_0 + sigma eps      (arXiv 2105.05233, section 4.1)

Images, noise and timesteps of a step are those of the training of a model of images.

Shapes: B images, K classes.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from data import coarse, to_float
from diffusion.sampler import SeededNoise
from images.representation import Images
from scheduler import DDIMScheduler
from training.objective import Noising, TrainingBatch

# Noisy images as the network is shown them, and timesteps, by scale, to logits [B, K].
Classifier = Callable[[Images, Images], torch.Tensor]
LEVELS = 11  # Timesteps, evenly over the process, at which accuracy is measured.
MEASURED = 5_000  # Images that it is measured on, at most: a standard error of 0.7 % or less.
CLEAN_NAME = "clean"


class Classification(Noising):
    """The cross-entropy of the label of an image, given its noisy scales and their timesteps. Needs labels."""

    evaluates = "classify"

    def losses(self, classify: Classifier, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        """`cross_entropy`, in nats, and `accuracy`, 1 where the likeliest class is right, of every image, `[B]`."""
        logits = classify(self.noised(batch)[1], (batch.t_64, batch.t_32)).float()  # [B, K]
        return {
            "cross_entropy": F.cross_entropy(logits, batch.labels, reduction="none"),
            "accuracy": (logits.argmax(1) == batch.labels).float(),
        }

    def drives(self, losses: dict[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
        return losses["cross_entropy"]

    def minimised(self, losses: dict[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
        """What a step minimises: the mean cross-entropy."""
        values = self.drives(losses, batch)
        return (values if batch.share is None else values * batch.share.to(values)).mean()


def measured_rows(count: int) -> np.ndarray:
    """Which of so many images accuracy is measured on, int64: all, or MEASURED of them, evenly."""
    return np.linspace(0, count - 1, min(count, MEASURED)).round().astype(np.int64)


@torch.no_grad()
def accuracies(
    classify: Classifier,
    scheduler: DDIMScheduler,  # on the device of the network
    pixels: np.ndarray,  # uint8 [N, C, R, R]
    labels: np.ndarray,  # [N]
    seed: int,
    batch_size: int,
) -> dict[str, float]:
    """The share of images whose likeliest class is right: of clean images, and of noisy ones at LEVELS timesteps.

    The images are those of `measured_rows`. Keys are CLEAN_NAME, where the network sees the image itself and is told
    t = 0, and the timesteps, which both scales have. The noise of an image depends on seed and place alone, so that all
    networks are shown the same.
    """
    device, last = scheduler.alphas.device, scheduler.num_train_timesteps - 1
    times = [round(k * last / (LEVELS - 1)) for k in range(LEVELS)]
    right = dict.fromkeys((CLEAN_NAME, *map(str, times)), 0)
    rows = measured_rows(len(pixels))
    for start in range(0, len(rows), batch_size):
        places = rows[start : start + batch_size]
        x = to_float(torch.from_numpy(pixels[places]).to(device))  # [B, C, R, R]
        truth = torch.from_numpy(labels[places]).to(device)  # [B]
        pair = x, coarse(x)
        drawn = SeededNoise([(seed, int(place)) for place in places])
        noise = tuple(drawn.draw(each.shape[1:], device) for each in pair)
        clean, noise = map(scheduler.representation.project, (pair, noise))
        for name in right:
            t = torch.full((len(x),), 0 if name == CLEAN_NAME else int(name), device=device)
            noisy = clean if name == CLEAN_NAME else map(scheduler.add_noise, clean, noise, (t, t))
            zs = tuple(scheduler.shown(each, t) for each in noisy)
            right[name] += (classify(zs, (t, t)).argmax(1) == truth).sum().item()
    return {name: count / len(rows) for name, count in right.items()}
