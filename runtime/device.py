"""The hardware a stage runs on: device names, precision, memory layout, and networks compiled for it."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
# One image in one network call counts one. An estimate of where a GPU regains the minute that compiling takes.
MIN_COMPILED_CALLS = 500_000


def select_device(name: str | None) -> torch.device:
    """The device for `0`, `cuda:1`, `cpu`, or None for the first GPU if there is one.

    `0` and `cuda` fall back to the CPU on a machine without a GPU, so published commands run anywhere.
    Raises ValueError for a GPU index that does not exist or a name that is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda:0" if count else "cpu")
    text = f"cuda:{name}" if name.isdigit() else name
    if text == "cpu":
        return torch.device("cpu")
    index_text = "0" if text == "cuda" else text.removeprefix("cuda:")
    if not text.startswith("cuda") or not index_text.isdigit():
        raise ValueError(f"--device {name} is not a device; give a GPU index such as 0, cuda:1, or cpu.")
    index = int(index_text)
    if count == 0 and index == 0:
        return torch.device("cpu")
    if index >= count:
        raise ValueError(f"--device {name} does not exist: this machine has {count} GPU(s); use cpu or a lower index.")
    return torch.device(f"cuda:{index}")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware: on GPUs with native bf16, on CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # Older than torch 2.10, which cannot tell emulated bf16 apart.
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_precision(device: torch.device, precision: str) -> str:
    """One of PRECISIONS but "auto", which is bf16 where that is fast and else fp32."""
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return precision


def autocast(device: torch.device, precision: str = "auto"):
    """A context in which models run at one of PRECISIONS."""
    dtype = AUTOCAST_DTYPES.get(resolve_precision(device, precision))
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def exact_autocast(device: torch.device, precision: str = "auto") -> Iterator[None]:
    """`autocast` for adaptive steps: GPUs would round what convolutions of fp32 read to 10 bits, which steps follow."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), autocast(device, precision):
        yield


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A context without autocast, in which GPUs round no factor of an fp32 matrix product to the 10 bits of TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_kernels(device: torch.device, deterministic: bool) -> None:
    """For this process: TF32 for what is fp32 on GPUs, the fastest convolutions, or deterministic kernels only."""
    torch.use_deterministic_algorithms(deterministic)
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not deterministic
    # The backward pass of this attention kernel adds in any order.
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels-last on GPUs and on CPUs without AVX-512, plain on CPUs with it.

    Measured with these models: on AVX2 channels-last samples 1.3 times as fast and trains as fast; on AVX-512
    it trains 30 % slower in bf16 and 14 % slower in fp32.
    """
    plain = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.contiguous_format if plain else torch.channels_last


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch or Python says that memory has run out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def resolve_compile(device: torch.device, choice: bool | None, calls: float = math.inf) -> bool:
    """Whether to compile: as chosen, and for None on GPUs that run at least MIN_COMPILED_CALLS images through it.

    On a CPU with AVX2 a compiled network samples as fast as an eager one, and compiling takes 40 s.
    """
    return (device.type == "cuda" and calls >= MIN_COMPILED_CALLS) if choice is None else choice


def compile_or_not(call: Callable, rehearse: Callable[[Callable], None], **options) -> tuple[Callable, str]:
    """`call` as `torch.compile` makes it with these options, and an empty text; or `call` itself, and what failed.

    rehearse: calls what it is given in the way it will be called, as the first call compiles and shows whether this
    machine can. Raises what says that memory has run out, which is no fault of the compiler.
    """
    try:
        compiled = torch.compile(call, **options)
        rehearse(compiled)
    except Exception as error:  # Compilers and drivers fail in ways of their own.
        if is_out_of_memory(error):
            raise
        return call, f"{type(error).__name__}: {error}".split("\n")[0]
    return compiled, ""


def compiling_failed(reason: str) -> str:
    """The sentence that says so."""
    return f"note: compiling failed ({reason}); going on without"
