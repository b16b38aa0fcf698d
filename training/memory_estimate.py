"""How much memory a training step keeps, measured on one and two images rather than by running out of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def saved_bytes(model: nn.Module, forward: Callable[[], Any], recomputed: Sequence[nn.Module] = ()) -> int:
    """Bytes that the forward pass `forward()` of `model` keeps for its backward pass, parameters not counted.

    Of the modules in `recomputed` only the inputs are kept, and everything inside for one of them at a time.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
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
            if tensor is not None:
                keep(outside, tensor)
        current.append(inside[module])

    hooks = [module.register_forward_pre_hook(enter) for module in recomputed]
    hooks += [module.register_forward_hook(lambda *_: current.pop() and None) for module in recomputed]
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
