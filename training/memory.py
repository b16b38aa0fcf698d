"""How much memory a training step keeps, measured on one and two images rather than by running out of it."""

import resource
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from checkpoint import bytes_of
from diffusion.space import PixelSpace
from runtime.device import autocast
from training.settings import TrainingSettings
from training.trainer import Trainer


def saved_bytes(
    model: nn.Module,
    forward: Callable[[], Any],
    recomputed: Sequence[nn.Module] = (),
    others: Sequence[nn.Module] = (),  # further networks that the pass goes through
) -> int:
    """Bytes that the forward pass `forward()` of `model` keeps for its backward pass, parameters not counted.

    Of the modules in `recomputed` only the inputs are kept, and everything inside for one of them at a time.
    """
    parameters = {p.untyped_storage().data_ptr() for network in (model, *others) for p in network.parameters()}
    outside: dict[int, int] = {}
    inside: dict[nn.Module | None, dict[int, int]] = {module: {} for module in recomputed}
    current = [outside]

    def keep(place: dict[int, int], tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            place[storage.data_ptr()] = storage.nbytes()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        keep(current[-1], tensor)
        return tensor

    def enter(module: nn.Module, inputs: tuple) -> None:
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor) and torch.is_grad_enabled():
                keep(outside, tensor)
        current.append(inside[module])

    def leave(*_: Any) -> None:  # What a hook returns would be the output of the module.
        current.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in recomputed]
    hooks += [module.register_forward_hook(leave) for module in recomputed]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = forward()  # Held until the end, so that no two storages have the same address.
    finally:
        for hook in hooks:
            hook.remove()
    del result
    largest = max((sum(place[key] for key in place.keys() - outside.keys()) for place in inside.values()), default=0)
    return sum(outside.values()) + largest


def for_batch(measure: Callable[[int], int], batch_size: int) -> int:
    """`measure(n)`, bytes for n images, continued from one and two images to `batch_size`."""
    one, two = measure(1), measure(2)
    return one + (batch_size - 1) * (two - one)


def training_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes that one process keeps during a step, by what they are for, without the working space of kernels."""
    weights = bytes_of(trainer.model.state_dict())
    networks = [term.network for term in trainer.objective.terms]
    backbones = [trainer.model.unet] + [network.unet for network in networks if network is trainer.ema]
    recompute = trainer.model.unet.recompute
    recomputed = [block for backbone in backbones for block in backbone.blocks()] if recompute else []

    def measure(images: int) -> int:
        def forward() -> dict[str, torch.Tensor]:
            batch = trainer.draw(*next(trainer.batches.epoch(0))).rows(slice(images))
            with autocast(trainer.device, trainer.config["precision"]):
                return trainer.losses(batch, trainer.model)

        return saved_bytes(trainer.model, forward, recomputed, networks)

    # What recomputing leaves out is counted by what it would keep.
    for backbone in backbones:
        backbone.recompute = False
    activations = for_batch(measure, trainer.part_size)
    for backbone in backbones:
        backbone.recompute = recompute
    autoencoder = (
        {}
        if isinstance(trainer.material.space, PixelSpace)
        else {"autoencoder": trainer.material.space.autoencoder.nbytes}
    )
    return {
        "weights": weights,
        "gradients": weights,
        "AdamW": 2 * weights,
        "EMA": 0 if trainer.ema is None else weights,
        "VGG": sum(bytes_of(network.state_dict()) for network in networks if network is not trainer.ema),
        "data set": trainer.batches.nbytes,
        **autoencoder,
        "activations": activations,
    }


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: on its GPU, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def out_of_memory_message(settings: TrainingSettings, processes: int) -> str:
    """What failed and which flags help."""
    # The next number of parts that divides the batch, if there is one.
    parts = range(settings.accumulate + 1, settings.batch_size // processes + 1)
    accumulate = next((n for n in parts if settings.batch_size % (processes * n) == 0), None)
    ways = [f"--accumulate {accumulate} or more"] * (accumulate is not None)
    ways += ["--recompute"] * (not settings.recompute) + ["--precision bf16"] * (settings.precision in ("auto", "fp32"))
    return (
        f"out of memory with a batch of {settings.batch_size} images at {settings.resolution}x{settings.resolution} "
        f"({processes} process(es), --accumulate {settings.accumulate}); use {', '.join(ways)}, more GPUs, a smaller "
        "--batch_size, or smaller --hidden_dims."
    )
