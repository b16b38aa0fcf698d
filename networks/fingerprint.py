"""What tells one set of weights from another."""

import hashlib

import torch


def weights_fingerprint(state: dict[str, torch.Tensor]) -> str:
    """16 hex digits of the sha256 over names and values of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]
