"""A classifier trained here as the network of scores: features and class logits of images, without downloaded weights.

It stands where Inception stands: `Judge` maps uint8 images to `evaluation.inception.Features`. The classifier was
trained on noisy images; it is shown these as they are, with no noise added, and is told t = 0. What it says is of the
classes that it was trained on: it is another network than Inception, and no score of one compares with the other's.
"""

import os

import torch

from checkpoint import LoadedClassifier, load_classifier
from data import to_float
from evaluation.inception import Features


class Judge:
    """Maps uint8 [B, C, H, W] on any device to Features: `pool` [B, num_features], `logits` [B, classes]; float32.

    `fingerprint` names its weights, `label` also the run that they are of; `resize` says that images are not resized.
    It computes in fp32, whatever the autocast of the caller, and without gradients. Raises ValueError for images of
    another size or number of channels than it was trained on.
    """

    resize = "none"

    def __init__(self, classifier: LoadedClassifier):
        self.classifier, self.fingerprint = classifier, classifier.fingerprint
        self.num_features = classifier.model.num_features
        self.class_names = classifier.class_names
        self.label = f"{classifier.config.get('run') or 'classifier'}-{classifier.fingerprint}"

    def check(self, resolution: int, channels: int) -> None:
        """Raise ValueError for images that it cannot judge."""
        config = self.classifier.config
        for what, ours, theirs in (
            ("side", config["resolution"], resolution),
            ("channels", config["channels"], channels),
        ):
            if ours != theirs:
                raise ValueError(
                    f"The judge {self.classifier.file} was trained on images of {what} {ours}, not {theirs}; train one "
                    "on images like those to be judged."
                )

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> Features:
        self.check(pixels.shape[-1], pixels.shape[1])
        model, scheduler = self.classifier.model, self.classifier.scheduler
        device = scheduler.alphas.device
        with torch.autocast(device.type, enabled=False):
            x = to_float(pixels.to(device))  # [B, C, H, W]
            xs = scheduler.representation.split(x)[: model.num_scales] if model.num_scales > 1 else (x,)
            t = torch.zeros(len(x), dtype=torch.int64, device=device)
            pool = model.features(*self.classifier.shown(xs, (t,) * len(xs)))  # [B, D]
            return Features(pool.float().cpu(), model.head(pool).float().cpu())


def load_judge(file: str | os.PathLike, device: torch.device | str) -> Judge:
    """The classifier of a checkpoint as a judge, with its EMA weights if it has them; raises as `load_classifier`."""
    return Judge(load_classifier(file, device))
