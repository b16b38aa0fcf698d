"""The first four convolutions of VGG19, whose features say how alike two images look.

VGG19 is that of arXiv 1409.1556, trained on ImageNet, with the weights and the layers of torchvision.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import VGG19_Weights, vgg19

from checkpoint import weights_fingerprint
from runtime.errors import need_file

# `features[:9]`: the first two stages without their last pooling, convolutions 0, 2, 5 and 7 and a ReLU after each.
NUM_LAYERS = 9
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # Of images in [0, 1].
WAY_OUT = "pass --vgg_weights FILE, the weights of torchvision's vgg19, or --perceptual_weight 0"


class VGG(nn.Module):
    """Features of images, `[B, 1 or 3, H, W]` in [-1, 1] -> `[B, 128, H/2, W/2]` (floor); made by `load_vgg`.

    Images are brought to [0, 1] and to the mean and deviation of ImageNet, a single channel counting for all three. The
    weights have no gradient, the images do. `fingerprint` names the weights.
    """

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers
        self.fingerprint = weights_fingerprint(layers.state_dict())
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)  # [3, 1, 1]
        self.register_buffer("deviation", torch.tensor(IMAGENET_DEVIATION)[:, None, None], persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        colours = ((images + 1) / 2).expand(-1, 3, -1, -1)  # [B, 3, H, W]
        return self.layers((colours - self.mean) / self.deviation)  # [B, 128, H/2, W/2]


def load_vgg(weights: str | Path | None) -> VGG:
    """The network on the CPU in fp32, frozen.

    weights: a state dict of torchvision's `vgg19`, of the whole network or of its `features` alone; None takes the copy
    in the torch hub cache, downloading it when it is not there. No random number is drawn.

    Raises FileNotFoundError if there is no file `weights`, ValueError if it is damaged or of another network, and
    RuntimeError if the download failed.
    """
    state = _download() if weights is None else _read(Path(weights))
    place = VGG19_Weights.IMAGENET1K_V1.url if weights is None else weights
    with torch.device("meta"):
        layers = vgg19(weights=None, init_weights=False).features
    found = {
        name.removeprefix("features."): value for name, value in state.items() if not name.startswith("classifier.")
    }
    # All of its layers are compared, as the first four convolutions of VGG16 have the same shapes.
    expected = {name: value.shape for name, value in layers.state_dict().items()}
    if {name: value.shape for name, value in found.items()} != expected:
        raise ValueError(f"{place} does not hold the weights of torchvision's vgg19; {WAY_OUT}.")
    layers = layers[:NUM_LAYERS]
    used = {name: found[name].float() for name in layers.state_dict()}
    if not all(value.isfinite().all() for value in used.values()):
        raise ValueError(f"{place} is damaged, as it holds weights that are not finite; {WAY_OUT}.")
    layers.load_state_dict(used, assign=True)
    return VGG(layers.requires_grad_(False)).eval()


def _download() -> Mapping[str, torch.Tensor]:
    try:
        return VGG19_Weights.IMAGENET1K_V1.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:
        # Network, disk and unpickling raise errors of many types, and the way out is the same.
        raise RuntimeError(
            f"the perceptual loss needs the weights of VGG19, which could not be had from "
            f"{VGG19_Weights.IMAGENET1K_V1.url} ({type(error).__name__}); {WAY_OUT}."
        ) from error


def _read(file: Path) -> Mapping[str, torch.Tensor]:
    need_file(file, "VGG weights file", WAY_OUT)
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged or foreign file fails in as many ways as it has bytes.
        raise ValueError(
            f"the VGG weights file {file} cannot be read as a torch state dict ({type(error).__name__}); {WAY_OUT}."
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{file} is not a state dict of named tensors; {WAY_OUT}.")
    return state
