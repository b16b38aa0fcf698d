"""The Inception network of FID: pool features and class logits of images, in one pass.

Images are uint8 arrays or tensors [N, C, H, W] with one or three channels. The network is the one of pytorch-fid,
whose weights file `pt_inception-2015-12-05-6726825d.pth` is also that of torch-fidelity. The filter by which an image
reaches 299x299 pixels changes every score (arXiv 2104.11222), so it is part of what names one.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import weights_fingerprint
from runtime.device import memory_format
from runtime.errors import need_file

INPUT_SIZE = 299
NUM_FEATURES = 2048
RESIZES = ("pytorch-fid", "clean", "bicubic-antialias")


class Features(NamedTuple):
    """What a network says of N images: `pool` [N, D] and `logits` [N, classes], float32 on the CPU.

    Of Inception D is 2048 and there are 1008 classes.
    """

    pool: torch.Tensor
    logits: torch.Tensor


class FeatureNetwork(Protocol):
    """A network by whose features images are compared, such as Inception: uint8 [B, C, H, W] to Features.

    `fingerprint` names its weights, `resize` the filter by which images reach it, and `num_features` is D.
    """

    fingerprint: str
    resize: str
    num_features: int

    def __call__(self, pixels: torch.Tensor) -> Features: ...


def network_input(pixels: torch.Tensor, resize: str) -> torch.Tensor:
    """Images as the network takes them, resized and scaled to about [-1, 1] as the original of each filter does.

    pytorch-fid: bilinear in [0, 1] without antialiasing, then 2x - 1, as the package of that name.
    clean: bicubic with antialiasing, which is Pillow's filter in floating point, clipped to [0, 255], then
        (x - 128) / 128, as mode "clean" of clean-fid (arXiv 2104.11222).
    bicubic-antialias: the same without clipping.
    Every filter leaves an image of 299x299 as it is.

    Args:
        pixels: uint8 [B, C, H, W]; C = 1 is repeated to 3.
        resize: one of RESIZES.

    Returns:
        float32 [B, 3, 299, 299] on the device of `pixels`.
    """
    size = (INPUT_SIZE, INPUT_SIZE)
    pixels = pixels.expand(-1, 3, -1, -1)  # [B, 3, H, W]
    if resize == "pytorch-fid":
        return 2 * F.interpolate(pixels.float() / 255, size, mode="bilinear", align_corners=False) - 1
    # In float32 the weights of this filter would be up to 0.01 grey levels from Pillow's, which are float64.
    x = F.interpolate(pixels.double(), size, mode="bicubic", align_corners=False, antialias=True)  # [B, 3, 299, 299]
    if resize == "clean":
        x = x.clamp(0, 255)
    return ((x - 128) / 128).float()


class Inception(nn.Module):
    """Maps uint8 [B, C, H, W] on any device to Features; made by `load_inception`.

    `fingerprint` is 16 hexadecimal digits that name the weights, equal on every device; `resize` is one of RESIZES;
    `num_features` is 2048. It computes in fp32, whatever the autocast of the caller, and without gradients. It changes
    no setting of the process, so that a thread may call it beside one that samples.
    """

    num_features = NUM_FEATURES

    def __init__(self, trunk: nn.Module, class_weights: torch.Tensor, device: torch.device | str, resize: str):
        super().__init__()
        self.resize = resize
        self.trunk = trunk
        self.register_buffer("class_weights", class_weights.float())  # [1008, 2048]
        self.fingerprint = weights_fingerprint(self.state_dict())
        self.eval().to(device, memory_format=memory_format(torch.device(device)))

    def embed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool features [B, 2048] and logits [B, 1008] of scaled images float32 [B, 3, 299, 299].

        The logits lack the bias of the last layer, as in the code of the authors of the Inception score
        (arXiv 1606.03498) and in torch-fidelity's `logits_unbiased`.
        """
        pool = self.trunk(x)[0].flatten(1)
        # TF32, which stages allow for their own matrix products, has no part in those of float64.
        return pool, (pool.double() @ self.class_weights.double().T).float()

    @torch.inference_mode()
    def forward(self, pixels: torch.Tensor) -> Features:
        """Features of uint8 [B, C, H, W]."""
        device = self.class_weights.device
        with torch.autocast(device.type, enabled=False):
            pool, logits = self.embed(network_input(pixels.to(device), self.resize))
        return Features(pool.cpu(), logits.cpu())


def load_inception(weights: str | Path | None, device: torch.device | str, resize: str = "pytorch-fid") -> Inception:
    """The Inception network of FID, frozen and in evaluation mode.

    Args:
        weights: state-dict file of pytorch-fid (`pt_inception-2015-12-05-6726825d.pth`), read without network
            access; None takes the copy in the torch hub cache, downloading it when it is not there.
        device: where the network goes.
        resize: the filter by which images reach 299x299, one of RESIZES (see `network_input`).

    Raises:
        FileNotFoundError: there is no file `weights`.
        ValueError: `weights` is damaged or holds something else, or `resize` is none of RESIZES.
        RuntimeError: pytorch-fid is not installed, or the download failed.
    """
    if resize not in RESIZES:
        raise ValueError(f"'{resize}' is not a filter for the Inception network: choose one of {', '.join(RESIZES)}.")
    try:
        import pytorch_fid.inception as library
    except ImportError as error:
        raise RuntimeError(
            "FID needs the package pytorch-fid: run `pip install pytorch-fid` or use --metrics swd."
        ) from error

    if weights is None:
        state = _download_weights(library.FID_WEIGHTS_URL)
    else:
        state = _read_weights(Path(weights))

    # The constructor always asks this function for its weights, so handing it ours is the one way to the same
    # network without a second download.
    fetch_weights = library.load_state_dict_from_url
    library.load_state_dict_from_url = lambda *args, **kwargs: state
    try:
        trunk = library.InceptionV3(resize_input=False, normalize_input=False)
    except RuntimeError as error:
        raise ValueError(
            f"{weights or library.FID_WEIGHTS_URL} does not hold the Inception weights of pytorch-fid: "
            f"get them from {library.FID_WEIGHTS_URL} or use --metrics swd."
        ) from error
    finally:
        library.load_state_dict_from_url = fetch_weights
    # The library drops the last layer, which the Inception score needs.
    return Inception(trunk, state["fc.weight"], device, resize)


def _download_weights(url: str) -> Mapping[str, torch.Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:
        # Network, disk and unpickling raise errors of many types, and the way out is the same.
        raise RuntimeError(
            f"FID needs the Inception weights, which could not be downloaded from {url} "
            f"({type(error).__name__}): pass --inception_weights FILE or use --metrics swd."
        ) from error


def _read_weights(file: Path) -> Mapping[str, torch.Tensor]:
    need_file(file, "Inception weights file", "correct --inception_weights or use --metrics swd")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged or foreign file fails in as many ways as it has bytes.
        raise ValueError(
            f"The Inception weights file {file} cannot be read as a torch state dict "
            f"({type(error).__name__}): fetch it again or use --metrics swd."
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(
            f"{file} is not a state dict of named tensors: "
            f"pass the weights file of pytorch-fid to --inception_weights or use --metrics swd."
        )
    return state


def stream(
    network: FeatureNetwork,
    pixels: np.ndarray | torch.Tensor,  # uint8 [N, C, H, W]
    batch_size: int = 64,
) -> Iterator[Features]:
    """Features of `pixels`, `batch_size` images at a time, in order.

    Raises ValueError when there is no image or they are not uint8 [N, 1 or 3, H, W].
    """
    dtype = str(pixels.dtype).removeprefix("torch.")
    if dtype != "uint8" or pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or len(pixels) == 0:
        raise ValueError(
            f"A network of features needs at least one image, uint8 of shape [N, 1 or 3, H, W], "
            f"but is given {dtype} of shape {list(pixels.shape)}."
        )
    for start in range(0, len(pixels), batch_size):
        batch = pixels[start : start + batch_size]  # [B, C, H, W]
        # A copy, because a read-only memory map cannot back a tensor.
        yield network(batch if isinstance(batch, torch.Tensor) else torch.from_numpy(np.array(batch)))


def extract(
    network: FeatureNetwork,
    pixels: np.ndarray | torch.Tensor,  # uint8 [N, C, H, W]
    batch_size: int = 64,
) -> Features:
    """Features of all `pixels`, in order, from `batch_size` images per call; raises as `stream`."""
    return Features(*(torch.cat(parts) for parts in zip(*stream(network, pixels, batch_size), strict=True)))
