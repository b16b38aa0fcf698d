"""Which timesteps a training draws how often, and how much the error at each of them counts.

Laws of `--t_law`, of the clock that leads in the pairs of the regime:

    uniform          every timestep alike
    log_normal:M,S   log(sigma / alpha) normal with mean M and deviation S (arXiv 2206.00364, table 1: -1.2,1.2)
    logit_normal:M,S logit(tau) likewise, tau = t / (T - 1) (arXiv 2403.03206, section 3.1: 0,1)
    importance       in proportion to the root mean square of the loss there, by which it is divided again, so that what
                     is minimised in the mean stays the same (arXiv 2102.09672, eq. 18)

Weights of `--timestep_weights`, times the squared error of the clean image, SNR = alpha^2 / sigma^2:

    published       those that make it the squared error of the prediction
    sigma2          SNR: the error of the noise, sigma^2 times that of the score (arXiv 1907.05600, section 4.2)
    edm             SNR + 1 / SIGMA_DATA^2 (arXiv 2206.00364, table 1)
    truncated_snr   max(SNR, 1): the larger of the errors of the noise and of the clean image (arXiv 2202.00512, eq. 9)
    likelihood      -dSNR / dtau, of which the bound of the likelihood is made (arXiv 2107.00630, eq. 13; 2101.09258)

Shapes: T training timesteps, B images of a step.
"""

import math
from collections.abc import Callable

import torch

from scheduler import DDIMScheduler

UNIFORM = "uniform"
IMPORTANCE = "importance"
NORMAL_LAWS = {"log_normal": (-1.2, 1.2), "logit_normal": (0.0, 1.0)}  # With their usual mean and deviation.
LAWS = (UNIFORM, *NORMAL_LAWS, IMPORTANCE)
TIMESTEP_WEIGHTS = ("published", "sigma2", "edm", "likelihood", "truncated_snr")
SIGMA_DATA = 0.5  # The deviation of pixels of images in [-1, 1] (arXiv 2206.00364).

BINS = 100  # Of timesteps whose losses are averaged together, for importance.
FEWEST = 10  # Losses seen in every bin before it matters.
MEMORY = 100  # Losses of a bin that its mean is over, in the long run.
UNIFORM_SHARE = 0.01  # Of the draws, so that no timestep is left out.


def parse_law(text: str) -> tuple[str, float, float]:
    """The name, mean and deviation of a law such as `log_normal:-1.2,1.2`, the usual ones where they are left out.

    Raises ValueError for any other text.
    """
    name, colon, parameters = text.partition(":")
    mean, deviation = NORMAL_LAWS.get(name, (0.0, 0.0))
    try:
        if name not in LAWS or (colon and name not in NORMAL_LAWS):
            raise ValueError(text)
        if colon:
            mean, deviation = map(float, parameters.split(","))
        if not math.isfinite(mean) or (name in NORMAL_LAWS and not 0 < deviation < math.inf):
            raise ValueError(text)
    except ValueError as error:
        raise ValueError(
            f"'{text}' is no law of timesteps; choose one of {UNIFORM}, log_normal:MEAN,DEVIATION, "
            f"logit_normal:MEAN,DEVIATION, {IMPORTANCE}."
        ) from error
    return name, mean, deviation


def law_name(text: str) -> str:
    """One text for all that name the same law, such as `log_normal:-1.2,1.2` for `log_normal`."""
    name, mean, deviation = parse_law(text)
    numbers = ",".join(repr(number).removesuffix(".0") for number in (mean, deviation))
    return f"{name}:{numbers}" if name in NORMAL_LAWS else name


def densities(law: str, scheduler: DDIMScheduler) -> torch.Tensor:
    """How likely each timestep is under a law, relative to uniform: float64 `[T]`, mean 1.

    That of timestep k is of the times from k to k + 1, in units of (T - 1) / T: all of [0, T - 1] belong to one of
    them. Raises ValueError for a law that gives all of them next to nothing.
    """
    name, mean, deviation = parse_law(law)
    count, device = scheduler.num_train_timesteps, scheduler.log_snr.device
    edges = torch.arange(count + 1, dtype=torch.float64, device=device) * (count - 1) / count
    if name not in NORMAL_LAWS:
        return torch.ones(count, dtype=torch.float64, device=device)
    values = torch.logit(edges / (count - 1)) if name == "logit_normal" else -scheduler.log_snr_at(edges) / 2
    shares = torch.special.ndtr((values - mean) / deviation).diff()
    if not shares.sum() > 1e-6:
        raise ValueError(
            f"--t_law {law} draws no timestep of the process '{scheduler.process_name}', which has "
            f"{-scheduler.log_snr_at(edges[1]).item() / 2:.3g} to {-scheduler.log_snr_at(edges[-2]).item() / 2:.3g} "
            "as log(sigma / alpha); choose another mean or a larger deviation."
        )
    return shares / shares.mean()


def clean_weight(name: str, scheduler: DDIMScheduler, t: torch.Tensor) -> torch.Tensor:
    """What the squared error of the clean image counts at timesteps t, int64 or float64 `[B]`; float64 `[B]`."""
    if name == "edm":
        return scheduler.snr_at(t) + SIGMA_DATA**-2
    if name == "truncated_snr":
        return scheduler.snr_at(t).clamp(min=1)
    return -scheduler.snr_slope(t) if name == "likelihood" else scheduler.snr_at(t)


def prediction_weight(config: dict, scheduler: DDIMScheduler) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """By a config, what the squared error of the prediction counts at timesteps `[B]`; None: as much at all of them."""
    gamma, name = config.get("min_snr_gamma"), config.get("timestep_weights", "published")
    if gamma is not None:
        return lambda t: scheduler.min_snr_weight(gamma, scheduler.inside(t))
    if name == "published":
        return None

    def weight(t: torch.Tensor) -> torch.Tensor:
        t = scheduler.inside(t)
        return clean_weight(name, scheduler, t) / scheduler.error_ratio(t)

    return weight


class Importance:
    """Running means of squared losses by timestep, for each clock, and the law that follows from them.

    leads: bool `[2, T]`, which timesteps of each clock the law can make likelier (`TimestepPairs.leads`); only they
    are waited for. `state` is what a run that goes on from here has to know. Nothing here waits for a device.
    """

    def __init__(self, leads: torch.Tensor):
        count, device = leads.shape[1], leads.device
        self._leads = leads
        self._bins = torch.arange(count, device=device) * BINS // count  # [T]
        self.state = {
            "squares": torch.zeros(2, BINS, dtype=torch.float64, device=device),
            "seen": torch.zeros(2, BINS, dtype=torch.float64, device=device),
        }

    def densities(self) -> torch.Tensor:
        """As of the function of that name, for both clocks, `[2, T]`; uniform until there is enough to go by."""
        roots = self.state["squares"].sqrt()[:, self._bins] * self._leads  # [2, T]
        roots = torch.where(self._leads, roots / roots.sum(1, keepdim=True) * self._leads.sum(1, keepdim=True), 1.0)
        enough = (self.state["seen"] >= FEWEST)[:, self._bins] | ~self._leads
        known = enough.all() & roots.isfinite().all()
        return torch.where(known, UNIFORM_SHARE + (1 - UNIFORM_SHARE) * roots, 1.0)

    def observe(
        self,
        losses: torch.Tensor,  # [B], what each image adds to the loss, before it is divided
        ts: tuple[torch.Tensor, torch.Tensor],  # [B] each
        good: torch.Tensor,  # whether the step was taken
        total: Callable[[torch.Tensor], torch.Tensor],  # sums over processes
    ) -> None:
        """Take the losses of a step into the means."""
        sums = torch.zeros(2, 2, BINS, dtype=torch.float64, device=losses.device)  # squares and numbers, by clock
        values = torch.stack([losses.double().square(), torch.ones_like(losses, dtype=torch.float64)])  # [2, B]
        for clock, t in enumerate(ts):
            if t.is_floating_point():  # The timestep that it was drawn for.
                t = (t * (len(self._bins) / (len(self._bins) - 1))).clamp(max=len(self._bins) - 1)
            sums[:, clock].index_add_(1, self._bins[t.long()], values)
        squares, number = total(sums)
        seen = self.state["seen"] + number
        # Of a mean over MEMORY losses, those of a step are their share.
        share = torch.where(number > 0, number / seen.clamp(max=MEMORY).maximum(number), 0)
        mean = torch.where(number > 0, squares / number, 0)
        squares = self.state["squares"] + share * (mean - self.state["squares"])
        new = {"squares": squares, "seen": seen}
        self.state = {name: torch.where(good, value, self.state[name]) for name, value in new.items()}
