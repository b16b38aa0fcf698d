"""What a run trains on: images, or their latents, or stored pairs; their classes; images that lines start from."""

from typing import Any

import cli
from checkpoint import network_class
from data import ImageSet, TwoScaleBatches, fingerprint_labels
from diffusion.pairs import Pairs
from diffusion.space import LatentSpace, PixelSpace, Space, side_of
from images.sources import is_here
from networks.autoencoder import Autoencoder, load_autoencoder
from networks.blocks import Backbone
from runtime.distributed import Processes
from training.latent_batches import LatentBatches
from training.mapping_batches import MappingBatches
from training.pair_batches import PairBatches
from training.settings import TrainingSettings


class Material:
    """The images of a run and what belongs to them.

    Attributes: `space`, where the run takes place; `labels`, int `[N]`, or None for a model that is not told of
    classes; `held_out`, images and labels by which a classifier is measured, or None; `starts`, images that lines start
    from in place of noise, and `held_out_starts`, those of them held out, or None; `shown`, the images held out, or
    else those that are trained on, for samples that need some; `said`, what the config says of all of it. Raises what
    `load_autoencoder`, `LatentSpace`, `ImageSet.divided` and `cli.load_start_parts` raise.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        images: ImageSet,
        processes: Processes,
        held_out: ImageSet | None = None,
        autoencoder: Autoencoder | None = None,  # what `load_autoencoder` makes of the settings, if that has been done
        pairs: Pairs | None = None,  # of noise and image, in place of the images
    ):
        self._settings, self._images, self._device, self._pairs = settings, images, processes.device, pairs
        self.said: dict[str, Any] = {
            "dataset_is_here": is_here(settings.dataset),
            "channels": images.channels,
            "data_fingerprint": images.fingerprint,
        }
        self.shown = images if held_out is None else held_out
        self._divide(held_out)
        self._place(autoencoder)
        self._start()

    def _divide(self, held_out: ImageSet | None) -> None:
        settings = self._settings
        self.labels = self.held_out = None
        if settings.classes is None:
            self.said |= {"class_names": None, "labels_fingerprint": None}
            return
        classes = self._images.divided(None if settings.classes == cli.ANY_CLASSES else settings.classes)
        self.labels = classes.labels
        if held_out is not None and not network_class(settings.model_type).predicts_images:
            labels = next(way.labels for way in held_out.classes if way.by == classes.by)
            known = labels >= 0
            self.held_out = (held_out.pixels[known], labels[known]) if known.any() else None
        self.said |= {"class_names": list(classes.names), "labels_fingerprint": fingerprint_labels(classes)}

    def _place(self, autoencoder: Autoencoder | None) -> None:
        self.space: Space = PixelSpace()
        self.said["latents_fingerprint"] = None
        if self._settings.latents is not None:
            autoencoder = autoencoder or load_autoencoder(self._settings.latents)
            self.space = LatentSpace(autoencoder, self._images.channels, self._device)
            self.said |= self.space.said()

    def _start(self) -> None:
        settings = self._settings
        self.starts = self.held_out_starts = None
        self.said["start_fingerprint"] = None
        if settings.start_dataset is not None:
            self.starts, self.held_out_starts = cli.load_start_parts(settings, self._images.channels)
            self.said["start_dataset_is_here"] = is_here(settings.start_dataset)
            self.said["start_fingerprint"] = self.starts.fingerprint

    def check_side(self, network: Backbone, config: dict[str, Any]) -> None:
        """Raise ValueError for a resolution, or a side of latents, that levels or patches do not divide."""
        resolution, stride, reason = self._settings.resolution, network.stride, network.stride_reason
        if isinstance(self.space, PixelSpace):
            if resolution % stride:
                raise ValueError(f"--resolution {resolution} must be a multiple of {stride} {reason}")
            return
        downscale, side = config["latents_downscale"], side_of(config)
        if resolution % (2 * downscale):
            raise ValueError(
                f"--resolution {resolution} must be a multiple of {2 * downscale}, so that its latents, one value for "
                f"{downscale}x{downscale} pixels, and their 2x2 means have whole sizes."
            )
        if side % stride:
            raise ValueError(
                f"--resolution {resolution} has latents of {side}x{side}, whose side must be a multiple of {stride} "
                f"{reason}"
            )

    def batches(self) -> TwoScaleBatches | PairBatches:
        """Shuffled batches of it, on the device; raises what their classes raise."""
        settings, images = self._settings, self._images
        options = settings.batch_size, settings.seed, self._device
        if self._pairs is not None:
            return PairBatches(self._pairs, *options)
        if self.starts is not None:
            return MappingBatches(images, self.starts, *options, settings.flip)
        if isinstance(self.space, PixelSpace):
            return TwoScaleBatches(images, *options, settings.flip, self.labels)
        return LatentBatches(self.space, settings.cache_dir, images, *options, settings.flip, self.labels)
