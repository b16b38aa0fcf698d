"""The processes of one run, as torchrun or SLURM starts them: who this one is, and what they agree on.

A process is told by RANK, WORLD_SIZE and LOCAL_RANK, and finds the others by MASTER_ADDR and MASTER_PORT; without
RANK it is alone, and everything here answers at once.
"""

import hashlib
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from runtime.device import select_device

# How long processes wait for one that waits itself: for a file that another run is making, or for a score.
PATIENCE = timedelta(days=7)
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.strip().isdecimal():
        raise ValueError(f"{name} is '{text}', which is no whole number; start with torchrun, or unset RANK.")
    return int(text)


def _place_in_run() -> tuple[int, int, int]:
    """Rank, count of processes and rank on this host, as the environment says; what is set but empty is not set."""
    if not os.environ.get("RANK"):
        return 0, 1, 0
    missing = [name for name in ENVIRONMENT if not os.environ.get(name)]
    if missing:
        raise ValueError(f"RANK is set but {', '.join(missing)} not; start with torchrun, or unset RANK.")
    rank, count, local_rank = map(_number, ENVIRONMENT)
    if rank >= count or local_rank > rank:
        raise ValueError(
            f"Of {count} process(es) (WORLD_SIZE) none has RANK {rank} and LOCAL_RANK {local_rank}; start with "
            "torchrun, or unset RANK."
        )
    return rank, count, local_rank


class Processes:
    """This process among `count`, numbered by `rank`, with a `device` of its own; `is_main` is true of the first.

    device_name: as for `select_device`; several processes on GPUs take one each, so that they accept None and "cpu"
    only. patience: how long one may be late, None for that of PyTorch (half an hour on CPUs).
    Raises ValueError for another device_name, for an environment that is no place in a run, and if a host has fewer
    GPUs than processes.
    """

    def __init__(self, device_name: str | None = None, patience: timedelta | None = None):
        self.rank, self.count, self.local_rank = _place_in_run()
        self.is_main = self.rank == 0
        self.device = self._device(device_name)
        if self.count > 1:
            # Flags and other small things of the host go by gloo, so that they never wait for the GPU.
            backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
            try:
                for name in ("MASTER_ADDR", "MASTER_PORT"):
                    if os.environ.get(name) == "":
                        raise ValueError(f"{name} is empty")
                if not dist.is_initialized():  # By an earlier run of this process.
                    dist.init_process_group(backend, timeout=patience)
            except ValueError as error:
                raise ValueError(
                    f"The {self.count} processes cannot find each other ({error}); set MASTER_ADDR and MASTER_PORT, as "
                    "torchrun does, or unset RANK."
                ) from error

    def _device(self, name: str | None) -> torch.device:
        if self.count == 1 or name == "cpu" or not torch.cuda.is_available():
            device = select_device(name)
        elif name is not None:
            raise ValueError(f"--device {name} names one GPU for {self.count} processes; leave it out or give cpu.")
        else:
            gpus = torch.cuda.device_count()
            if 1 < gpus <= self.local_rank:
                raise ValueError(
                    f"Process {self.local_rank} of this host finds {gpus} GPU(s); start at most one process per GPU."
                )
            # With one visible GPU per process, as SLURM may bind them, each calls its own cuda:0.
            device = torch.device("cuda", self.local_rank if gpus > 1 else 0)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def share(self, count: int) -> slice:
        """This process's rows of `count` rows that all processes divide evenly."""
        each = count // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true in any process."""
        if self.count == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes.bool().tolist()

    def gather(self, value: Any) -> list[Any] | None:
        """What every process has, in order of rank, for the first; None for the others. Values go by pickle."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values

    def agree(self, text: str) -> bool:
        """Whether every process says the same; waits for all of them."""
        number = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
        extremes = torch.tensor([number, -number])
        if self.count > 1:
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
        return extremes.sum().item() == 0

    def close(self) -> None:
        """Leave the group, all together: one that leaves early takes connections away from under the others."""
        if self.count > 1:
            self.any(False)
            # PyTorch 2.6 may wait for ever in taking gloo down; later ones may abort a process that ends with it.
            if self.device.type == "cuda" or torch.__version__ >= (2, 7):
                dist.destroy_process_group()
