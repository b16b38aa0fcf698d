"""Checkpoints of untrained models of synthetic images, in several sizes that fit together."""

import torch

from checkpoint import build_model, save_checkpoint
from data import load_images, split_holdout

IMAGES, HOLDOUT = 20, 6


class Models:
    """Called as `(model_type, resolution, **config)`, the file of such a model, which is written once."""

    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"

    def __call__(self, model_type, resolution, **changes):
        images, _ = split_holdout(load_images("synthetic", resolution, self.cache, limit=IMAGES), HOLDOUT)
        config = {
            "model_type": model_type,
            "hidden_dims": [8, 16],
            "channels": 3,
            "resolution": resolution,
            "num_train_timesteps": 1000,
            "beta_schedule": "cosine",
            "prediction_type": "v",
            "dataset": "synthetic",
            "limit": IMAGES,
            "holdout": HOLDOUT,
            "resize_filter": "bilinear",
            "skip_bad_images": False,
            "data_fingerprint": images.fingerprint,
            "batch_size": 4,
            "run": "mine",
        } | changes
        words = [model_type, resolution, *(v for v in changes.values() if isinstance(v, str | int))]
        words += ["told"] * ("class_names" in changes)
        file = self.folder / f"{'_'.join(map(str, words))}.pth"
        if not file.exists():
            torch.manual_seed(len(words) + resolution)
            state = build_model(config).state_dict()
            if "embed_class.table.weight" in state:
                state["embed_class.table.weight"] *= 30
            kept = {"config": config, "epoch": 1, "step": 10}
            save_checkpoint(file, {"model_state": state, "ema_state": None} | kept)
        return file
