"""What a training may minimise, by what `--objective` calls it."""

from scheduler import COLD
from training.cold import Cold
from training.consistency import Consistency
from training.objective import Denoising
from training.progressive import Progressive
from training.variational import Hybrid, Variational

OBJECTIVES: dict[str, type[Denoising]] = {
    "denoising": Denoising,
    "hybrid": Hybrid,
    "vlb": Variational,
    "progressive": Progressive,
    "consistency": Consistency,
    COLD: Cold,
}
# Those that need a teacher, which the stages without one do not offer.
WITH_TEACHER = ("progressive",)
