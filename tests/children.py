"""Training in processes of their own, with functions that get in their way at chosen steps."""

import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from unittest import mock

import torch

import cli
import distill
import train_lift
from training import showing
from training.trainer import Trainer

# Children start from a process that has imported everything and run nothing, so that each takes no time to start.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_lift", "distill", "eval_fid_batch", "pytest", "torch.utils.tensorboard"])


def train_in_child(flags, patches, ready, stage=train_lift):
    """What a child does: train on one thread, with attributes replaced by what `patches` make of them."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    showing.GRID_STEPS = 2
    for place, name, make in patches:
        owner = pkgutil.resolve_name(place)
        setattr(owner, name, make(getattr(owner, name)))
    if ready is not None:
        ready.set()
    with mock.patch.object(sys, "argv", [f"{stage.__name__}.py", *map(str, flags)]):
        cli.run_stage(stage.main)


def distill_in_child(flags, patches, ready):
    """Likewise with `distill.py`."""
    train_in_child(flags, patches, ready, distill)


class Always:
    """Makes a constant another one."""

    def __init__(self, value):
        self.value = value

    def __call__(self, before):
        return self.value


class KillAt:
    """Makes a function that kills its process when it is called for the n-th time, before or after its work."""

    def __init__(self, call, after=False):
        self.call, self.after = call, after

    def __call__(self, function):
        count = 0

        def killing(*args, **kwargs):
            nonlocal count
            count += 1
            if count == self.call and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if count == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return killing


class SleepAt:
    """Makes a `train_step` that says that it has come to a step by a file, and then takes very long."""

    def __init__(self, step, file):
        self.step, self.file = step, file

    def __call__(self, train_step):
        def sleeping(trainer, *batch):
            if trainer.step == self.step:
                self.file.touch()
                for _ in range(1200):
                    time.sleep(0.1)
            return train_step(trainer, *batch)

        return sleeping


class SignalAt:
    """Makes a `train_step` in which its process gets a signal at each of these steps."""

    def __init__(self, *steps, number=signal.SIGUSR1):
        self.steps, self.number = steps, number

    def __call__(self, train_step):
        def signalled(trainer, *batch):
            if trainer.step in self.steps:
                os.kill(os.getpid(), self.number)
            return train_step(trainer, *batch)

        return signalled


def signalling(*steps, number=signal.SIGTERM):
    """A patch by which this very process gets a signal at each of these steps."""
    return mock.patch.object(Trainer, "train_step", SignalAt(*steps, number=number)(Trainer.train_step))
