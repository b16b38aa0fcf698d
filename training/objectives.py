"""What a training may minimise, by what `--objective` calls it."""

from training.objective import Denoising
from training.variational import Hybrid, Variational

OBJECTIVES: dict[str, type[Denoising]] = {"denoising": Denoising, "hybrid": Hybrid, "vlb": Variational}
