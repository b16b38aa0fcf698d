"""What benchmarks share: which machine this is, how fast it multiplies matrices, and how time is taken on it."""

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

try:
    import diffusers
except ImportError:
    diffusers = None

CPU_FEATURES = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")
WARM_UP_STEPS = 2
PEAK_SECONDS = 0.1


def describe_machine(device: torch.device) -> str:
    """Processor, GPU and versions, in one line."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE) or [platform.machine()]
    if hasattr(torch.cpu, "get_capabilities"):
        features = [name for name in CPU_FEATURES if torch.cpu.get_capabilities().get(name)]
    else:
        features = [torch.backends.cpu.get_cpu_capability()]
    parts = [names[0], *features, f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if device.type == "cuda":
        parts += [torch.cuda.get_device_name(device), f"CUDA {torch.version.cuda}"]
    parts.append(f"torch {torch.__version__}")
    if diffusers is not None:
        parts.append(f"diffusers {diffusers.__version__}")
    return ", ".join([*parts, date.today().isoformat()])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long a call takes until the device has finished it, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


def turns(max_turns: int, max_seconds: float) -> Iterator[None]:
    """At most so many turns, of which all but the first begin within the seconds."""
    end = time.perf_counter() + max_seconds
    for turn in range(max_turns):
        if turn == 0 or time.perf_counter() < end:
            yield


def matmul_peak(dtype: torch.dtype, device: torch.device) -> tuple[float, int]:
    """FLOP/s of the fastest square matrix product, and its size; a size that takes PEAK_SECONDS is the last."""
    best, size, seconds = (0.0, 0), 512, 0.0
    while seconds < PEAK_SECONDS and size <= 16384:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(6):  # The first is slower, and never the best.
            synchronize(device)
            start = time.perf_counter()
            torch.mm(a, b)
            synchronize(device)
            seconds = time.perf_counter() - start
            best = max(best, (2 * size**3 / seconds, size))
        size *= 2
    return best
