"""Processes: two curves alpha and sigma over time, what networks predict of them, and the DDIM step.

`x_t = alpha_t x0 + sigma_t eps` with `SNR_t = alpha_t^2 / sigma_t^2`. Divided by alpha every process is the same
diffusion, `x / alpha = x0 + (sigma / alpha) eps`, of which DDIM is Euler's method in sigma / alpha.

    vp      sqrt(abar), sqrt(1 - abar)  variance preserving, with a noise schedule (arXiv 2006.11239)
    sub_vp  sqrt(abar), 1 - abar        (arXiv 2011.13456, eq. 29)
    ve      1, sigma                    variance exploding, log sigma even in t (arXiv 2011.13456, appendix C)
    flow    1 - tau, tau                straight lines, tau = t / (T - 1) (arXiv 2209.03003, 2210.02747)

Timesteps are numbers from 0 to T - 1; between whole ones log SNR is interpolated. Tables are float64 and cast once,
where they meet an image.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from images.representation import REPRESENTATIONS, Images

# Noisy images and timesteps by scale, and where the model has classes those of the images, to predictions by scale.
Denoiser = Callable[..., Images]
CLEAN = -1
# Said where a learned variance is asked of a network that has none.
NO_VARIANCE = (
    "This model has not learnt the variance of its steps; pass --variance beta or beta_tilde, or train one with "
    "--objective hybrid or vlb."
)
PREDICTION_TYPES = ("epsilon", "x0", "v", "velocity", "score")
PROCESSES = ("vp", "sub_vp", "ve", "flow")
SCHEDULED_PROCESSES = ("vp", "sub_vp")  # Those that a noise schedule describes.
COLD = "cold"  # What a process without noise is called (`diffusion.cold`).
VE_SIGMAS = (0.02, 100.0)  # Of images in [-1, 1]; twice those of arXiv 2011.13456, whose images are in [0, 1].
ZERO_TERMINAL_SUFFIX = "_zero_terminal"


def _cosine_betas(num_steps: int, max_beta: float, min_beta: float = 0.0) -> torch.Tensor:
    edges = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - curve[1:] / curve[:-1]).clamp(min_beta, max_beta)


BETA_SCHEDULES = {
    "cosine_clipped": lambda n: _cosine_betas(n, max_beta=0.02, min_beta=1e-4),
    "cosine": lambda n: _cosine_betas(n, max_beta=0.999),
    "cosine_report": lambda n: _cosine_betas(n, max_beta=0.9999, min_beta=1e-4),
    "linear": lambda n: torch.linspace(1e-4, 0.02, n, dtype=torch.float64),
}
SCHEDULE_NAMES = tuple(BETA_SCHEDULES) + tuple(name + ZERO_TERMINAL_SUFFIX for name in BETA_SCHEDULES)


def schedule_name(process: str, beta_schedule: str | None) -> str:
    """One name for a process and its noise schedule: "cosine" of vp, "sub_vp_cosine", "ve", "flow".

    This is what configs, maps and schedule files hold as `beta_schedule`.
    """
    if process not in SCHEDULED_PROCESSES:
        return process
    return beta_schedule if process == "vp" else f"{process}_{beta_schedule}"


def split_schedule_name(name: str) -> tuple[str, str | None]:
    """The process and the noise schedule of a name of `schedule_name`; the latter is None where there is none."""
    if name in (*PROCESSES, COLD) and name not in SCHEDULED_PROCESSES:
        return name, None
    return ("sub_vp", name.removeprefix("sub_vp_")) if name.startswith("sub_vp_") else ("vp", name)


ALL_SCHEDULES = tuple(dict.fromkeys(schedule_name(process, name) for process in PROCESSES for name in SCHEDULE_NAMES))


def make_alphas_cumprod(beta_schedule: str, num_train_timesteps: int = 1000) -> torch.Tensor:
    """The table abar_t, float64 `[num_train_timesteps]`, decreasing.

    `cosine` (arXiv 2102.09672, eq. 17, s = 0.008) with betas at most 0.999; `cosine_clipped` the same with
    betas clipped to [1e-4, 0.02]; `cosine_report` clipped to [1e-4, 0.9999], as the preset `ddpm_report` has it;
    `linear` 1e-4..0.02 (arXiv 2006.11239). The suffix `_zero_terminal`
    shifts and scales sqrt(abar) so that the last SNR is exactly 0 and the first is kept (arXiv 2305.08891,
    algorithm 1). Raises ValueError for another name.
    """
    base = beta_schedule.removesuffix(ZERO_TERMINAL_SUFFIX)
    if base not in BETA_SCHEDULES:
        raise ValueError(f"Unknown beta schedule '{beta_schedule}'; choose one of {', '.join(SCHEDULE_NAMES)}.")
    alphas_cumprod = torch.cumprod(1 - BETA_SCHEDULES[base](num_train_timesteps), dim=0)
    if base != beta_schedule:
        root = alphas_cumprod.sqrt()
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas_cumprod


def parts_of(outputs: Images, xs: Images) -> tuple[Images, Images | None]:
    """What networks return of noisy images `[B, C, H, W]`, as predictions and what is said of the variance of a step.

    Outputs of 2C channels are both, one after the other; those of C are predictions, and the rest is None.
    """
    if outputs[0].shape[1] != 2 * xs[0].shape[1]:
        return outputs, None
    halves = [output.chunk(2, dim=1) for output in outputs]
    return tuple(zip(*halves, strict=True))


def predictions_alone(denoise: Denoiser) -> Denoiser:
    """A denoiser without what it says of variances: for all that is about clean images."""

    def call(xs: Images, ts: Images, *labels: torch.Tensor | None) -> Images:
        return parts_of(denoise(xs, ts, *labels), xs)[0]

    return call


class Curves(NamedTuple):
    """A process at some times: alpha, sigma, and their derivatives by tau = t / (T - 1), float64."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    d_alpha: torch.Tensor | None  # None where they are not asked for.
    d_sigma: torch.Tensor | None


def _scheduled_curves(process: str, log_snr: torch.Tensor, slope: torch.Tensor) -> Curves:
    """vp or sub_vp from the log SNR of the schedule, log(abar / (1 - abar)), and its slope by tau."""
    abar, rest = log_snr.sigmoid(), (-log_snr).sigmoid()
    d_abar = abar * rest * slope
    alpha = abar.sqrt()
    d_alpha = alpha * rest * slope / 2
    if process == "sub_vp":
        return Curves(alpha, rest, d_alpha, -d_abar)
    sigma = rest.sqrt()
    return Curves(alpha, sigma, d_alpha, -sigma * abar * slope / 2)


def _closed_curves(process: str, tau: torch.Tensor) -> Curves:
    """ve or flow at tau in [0, 1]."""
    one = torch.ones_like(tau)
    if process == "flow":
        return Curves(1 - tau, tau, -one, one)
    low, high = VE_SIGMAS
    sigma = low * (high / low) ** tau
    return Curves(one, sigma, 0 * one, sigma * math.log(high / low))


def prediction_from(prediction_type: str, x0: torch.Tensor, epsilon: torch.Tensor, curves: Curves) -> torch.Tensor:
    """What a network of a prediction type should return for a clean image and its noise at a time of a process.

    "epsilon", "x0", "v": alpha eps - sigma x0 (arXiv 2202.00512, appendix D), "velocity": alpha' x0 + sigma' eps,
    "score": -eps / sigma.
    """
    if prediction_type == "epsilon":
        return epsilon
    if prediction_type == "x0":
        return x0
    if prediction_type == "velocity":
        return curves.d_alpha * x0 + curves.d_sigma * epsilon
    return -epsilon / curves.sigma if prediction_type == "score" else curves.alpha * epsilon - curves.sigma * x0


class DDIMScheduler:
    """A process and the DDIM step between any two of its times.

    Attributes, float64 `[num_train_timesteps]`: `alphas`, `sigmas`, `snr` (from 0), `log_snr`, and `alphas_cumprod`,
    abar of the variance-preserving process of the same SNR. `prediction_type` says what the network returns: "epsilon",
    "x0", "v" (alpha eps - sigma x0), "velocity" (alpha' x0 + sigma' eps, by tau = t / (T - 1)) or "score"
    (-eps / sigma). `clip_sample` clamps every predicted clean image to [-1, 1]. `representation`, of
    `images.representation.REPRESENTATIONS`, says what the scales of an image are and which noise is theirs.
    `beta_schedule` is a name of SCHEDULE_NAMES, which vp and sub_vp have, or one of ALL_SCHEDULES, which says the
    process too; the attribute of that name is the latter.

    t is an int, int64 `[B]`, or, where it says so, float64 `[B]` from 0 to T - 1. No call changes what another returns,
    and nothing moves between devices unless `to(device)` is called. Raises ValueError for unknown names, and for
    predictions of epsilon or score where the SNR ends at 0, where noise carries no information about the image.
    """

    noise_levels = True  # Whether its times are noise levels, by which paths and maps count.
    tables = ("alphas", "sigmas", "alphas_cumprod", "snr", "log_snr")

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "cosine_clipped",
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        representation: str = "overcomplete",
        process: str | None = None,
    ):
        said, beta_schedule = split_schedule_name(beta_schedule)
        process = process or said
        for kind, name, names in (
            ("prediction type", prediction_type, PREDICTION_TYPES),
            ("representation", representation, REPRESENTATIONS),
            ("process", process, PROCESSES),
        ):
            if name not in names:
                raise ValueError(f"Unknown {kind} '{name}'; choose one of {', '.join(names)}.")
        self.representation = REPRESENTATIONS[representation]
        self.num_train_timesteps = num_train_timesteps
        self.beta_schedule = schedule_name(process, beta_schedule)
        self.prediction_type = prediction_type
        self.clip_sample = clip_sample
        self.process = process
        times = torch.arange(num_train_timesteps, dtype=torch.float64)
        self._nodes = self._slopes = None  # Made when they are first asked for.
        if process in SCHEDULED_PROCESSES:
            self.alphas_cumprod = make_alphas_cumprod(beta_schedule, num_train_timesteps)
            rest = 1 - self.alphas_cumprod
            self.alphas, self.sigmas = self.alphas_cumprod.sqrt(), rest if process == "sub_vp" else rest.sqrt()
            self.snr = self.alphas_cumprod / (rest if process == "vp" else rest.square())
            self.log_snr = self.snr.log()
        else:
            self.alphas, self.sigmas = self.curves(times)[:2]
            self.log_snr = self.log_snr_at(self.inside(times))
            self.snr = self.log_snr.exp()
        if process != "vp":
            self.alphas_cumprod = self.alphas.square() / (self.alphas.square() + self.sigmas.square())
        if prediction_type in ("epsilon", "score") and self.alphas[-1] == 0:
            raise ValueError(
                f"The process '{self.process_name}' ends at zero SNR, where a prediction of {prediction_type} is "
                "undefined; use prediction type v, velocity or x0."
            )

    @property
    def process_name(self) -> str:
        """What the process is called in rows of results, with its noise schedule if it has one."""
        return " ".join(filter(None, split_schedule_name(self.beta_schedule)))

    def to(self, device: torch.device | str) -> "DDIMScheduler":
        """A copy whose tables live on `device`, so that indexing with timesteps there moves no data."""
        moved = copy.copy(self)
        for name in self.tables:
            setattr(moved, name, getattr(self, name).to(device))
        moved._nodes = moved._slopes = None
        return moved

    def unclamped(self) -> "DDIMScheduler":
        """A copy that clamps no predicted clean image: a clamp bends the equation, and has no inverse."""
        free = copy.copy(self)
        free.clip_sample = False
        return free

    def curves(self, t: torch.Tensor) -> Curves:
        """The process at times t, float64 from 0 to T - 1 of any shape; raises ValueError outside, but not on GPUs."""
        last = self.num_train_timesteps - 1
        if t.device.type == "cpu" and ((t < 0) | (t > last)).any():  # A GPU would have to be waited for.
            raise ValueError(f"Timesteps lie in 0..{last}; got {t.min().item():g} to {t.max().item():g}.")
        if self.process not in SCHEDULED_PROCESSES:
            return _closed_curves(self.process, t / last)
        # Monotone cubic pieces (PCHIP) of log SNR.
        values, slopes = self._schedule_nodes()
        k = t.floor().long().clamp(max=len(values) - 2)
        u = t - k
        y, d = (values[k], values[k + 1]), (slopes[k], slopes[k + 1])
        c = 3 * (y[1] - y[0]) - 2 * d[0] - d[1]
        e = d[0] + d[1] - 2 * (y[1] - y[0])
        log_snr = y[0] + u * (d[0] + u * (c + u * e))
        curves = _scheduled_curves(self.process, log_snr, (d[0] + u * (2 * c + u * 3 * e)) * last)
        if len(values) > last:
            return curves
        # On the way to zero SNR sqrt(abar) falls in a straight line.
        d_alpha = -values[-1].sigmoid().sqrt() * torch.ones_like(t)
        alpha = d_alpha * (t - last)
        sigma = (1 - alpha.square()) if self.process == "sub_vp" else (1 - alpha.square()).sqrt()
        d_sigma = -2 * alpha * d_alpha if self.process == "sub_vp" else -alpha * d_alpha / sigma
        ending = Curves(alpha, sigma, last * d_alpha, last * d_sigma)
        return Curves(*(torch.where(t > last - 1, *pair) for pair in zip(ending, curves, strict=True)))

    def _schedule_nodes(self) -> torch.Tensor:
        """log SNR of the noise schedule and its slope at whole t, `[2, T]`; without the last t where that is -inf."""
        if self._nodes is None:
            schedule = make_alphas_cumprod(split_schedule_name(self.beta_schedule)[1], self.num_train_timesteps)
            values = (schedule / (1 - schedule)).log()
            values = values[values.isfinite()].numpy()
            slopes = PchipInterpolator(range(len(values)), values).derivative()(range(len(values)))
            self._nodes = torch.from_numpy(np.stack([values, slopes])).to(self.alphas.device)
        return self._nodes

    def _slope_tables(self) -> torch.Tensor:
        """Derivatives of alpha and sigma by tau at whole t, `[2, T]`."""
        if self._slopes is None:
            times = torch.arange(self.num_train_timesteps, dtype=torch.float64, device=self.alphas.device)
            self._slopes = torch.stack(self.curves(times)[2:])
        return self._slopes

    def snr_at(self, t: torch.Tensor) -> torch.Tensor:
        """SNR at times t, int64 or float64 of any shape; float64."""
        if not t.is_floating_point():
            return self.snr[t]
        curves = self.curves(t)
        return (curves.alpha / curves.sigma).square()

    def alpha_bar_at(self, t: torch.Tensor) -> torch.Tensor:
        """alpha^2 / (alpha^2 + sigma^2) at times t, int64 or float64 of any shape; float64 in [0, 1].

        Of vp it is alpha^2, of any process abar of the variance-preserving one of the same SNR.
        """
        if not t.is_floating_point():
            return self.alphas_cumprod[t]
        alpha, sigma = (each.square() for each in self.curves(t)[:2])
        return alpha / (alpha + sigma)

    def snr_slope(self, t: torch.Tensor) -> torch.Tensor:
        """The derivative of SNR by tau = t / (T - 1), at times t int64 or float64; float64."""
        alpha, sigma, d_alpha, d_sigma = self.curves(t.double())
        return 2 * alpha * (d_alpha * sigma - alpha * d_sigma) / sigma**3

    def log_snr_at(self, t: torch.Tensor) -> torch.Tensor:
        """log SNR at times t, float64 from 0 to T - 1 of any shape."""
        curves = self.curves(t)
        return 2 * (curves.alpha.log() - curves.sigma.log())

    def inside(self, t: torch.Tensor) -> torch.Tensor:
        """Timesteps t as maps and plans take them, which count in log SNR: half a timestep inside the ends of flow.

        There is no noise at its first timestep, and nothing else at its last.
        """
        return t.double().clamp(0.5, self.num_train_timesteps - 1.5) if self.process == "flow" else t

    def time_of(self, log_snr: torch.Tensor) -> torch.Tensor:
        """Times float64, like log_snr, at which the process has that log SNR; the ends of its range outside it."""
        low = torch.zeros_like(log_snr)
        high = torch.full_like(log_snr, self.num_train_timesteps - 1)
        for _ in range(60):  # Halved down to the rounding of float64.
            middle = (low + high) / 2
            cleaner = self.log_snr_at(middle) > log_snr
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        return (low + high) / 2

    def _alpha_bar(self, t: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """abar at t (an int, or int64 `[B]`) in the dtype of x and shaped to broadcast against it; CLEAN gives 1."""
        return self._looked_up(self.alphas_cumprod, 1.0, t, x)

    def _looked_up(self, table: torch.Tensor, clean: float, t: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if isinstance(t, int):
            # It stays where the table is: a number on the host goes into a kernel of a GPU without a wait, a copy not.
            return torch.as_tensor(clean if t == CLEAN else table[t], dtype=x.dtype)
        # CLEAN looks up the last entry, which is then replaced.
        values = torch.where(t == CLEAN, clean, table[t])
        return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def scales(self, t: int | torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma at t, also a float64 `[B]`, in the dtype of x and shaped to broadcast against it.

        CLEAN gives 1 and 0.
        """
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            curves = self.curves(t)
            return tuple(each.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) for each in curves[:2])
        if self.process == "vp":
            alpha_bar = self._alpha_bar(t, x)
            return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return self._looked_up(self.alphas, 1.0, t, x), self._looked_up(self.sigmas, 0.0, t, x)

    def _curves_like(self, t: int | torch.Tensor, x: torch.Tensor) -> Curves:
        if self.prediction_type != "velocity":
            return Curves(*self.scales(t, x), None, None)
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            return Curves(*(each.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) for each in self.curves(t)))
        return Curves(*self.scales(t, x), *(self._looked_up(table, 0.0, t, x) for table in self._slope_tables()))

    def prior(self, noise: torch.Tensor, t: int) -> torch.Tensor:
        """What sampling starts from at timestep t: noise as large as a noisy image, of ve as large as its noise."""
        if self.process == "vp":
            return noise
        size = self.sigmas[t] if self.process == "ve" else torch.hypot(self.alphas[t], self.sigmas[t])
        return noise * size.to(noise.dtype)

    def shown(self, x: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """What a network is shown of x: x itself; of ve x / sqrt(1 + sigma^2), whose values are of unit size."""
        return x * (1 + self.scales(t, x)[1].square()).rsqrt() if self.process == "ve" else x

    def denoiser(self, denoise: Denoiser) -> Denoiser:
        """A network as a denoiser of noisy images of this process: it is shown what `shown` makes of them."""
        if self.process != "ve":
            return denoise
        tables: dict[torch.device, DDIMScheduler] = {}

        def call(xs: Images, ts: Images, *labels: torch.Tensor | None) -> Images:
            device = xs[0].device
            if device not in tables:
                tables[device] = self.to(device)
            return denoise(tuple(map(tables[device].shown, xs, ts)), ts, *labels)

        return call

    def renoise(self, x: torch.Tensor, noise: torch.Tensor, t: int, t_back: int) -> torch.Tensor:
        """A draw at the noisier timestep t_back of the diffusion that is at x at t, with fresh noise like x.

        In the variance-preserving process of the same SNR sqrt(r) x + sqrt(1 - r) noise, r = abar(t_back) / abar(t);
        with neighbouring timesteps the last line but one of RePaint's algorithm 1 (arXiv 2201.09865).
        """
        ratio = self.alphas_cumprod[t_back].item() / self.alphas_cumprod[t].item()
        size, size_back = (math.hypot(self.alphas[k].item(), self.sigmas[k].item()) for k in (t, t_back))
        if self.process == "vp":
            size = size_back = 1.0  # But for rounding.
        return ratio**0.5 * (size_back / size) * x + (1 - ratio) ** 0.5 * size_back * noise

    def shift(self, score: torch.Tensor, t: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What a prediction at (x, t) changes by when `score` `[B, C, H, W]` is added to the score of x.

        The noise changes by -sigma score (arXiv 2105.05233, algorithm 2), the clean image by sigma^2 score / alpha.
        Where alpha is 0 x is its noise, whatever is said of the image, and nothing changes.
        """
        curves = self._curves_like(t, x)
        score = torch.where(curves.alpha > 0, score, 0.0)
        curves = curves._replace(alpha=torch.where(curves.alpha > 0, curves.alpha, 1.0))
        return prediction_from(
            self.prediction_type, curves.sigma.square() / curves.alpha * score, -curves.sigma * score, curves
        )

    def add_noise(self, x: torch.Tensor, noise: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """`alpha x + sigma noise`; x and noise `[B, C, H, W]`, t as in `scales`."""
        alpha, sigma = self.scales(t, x)
        return alpha * x + sigma * noise

    def target(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What a network of this prediction type should return for clean x and noise at timesteps t `[B]`."""
        return prediction_from(self.prediction_type, x, noise, self._curves_like(t, x))

    def error_ratio(self, t: torch.Tensor) -> torch.Tensor:
        """Squared error of the prediction for each of the clean image, at t int64 or float64 `[B]`; float64 `[B]`.

        SNR for epsilon, (alpha^2 + sigma^2)^2 / sigma^2 for v, which is SNR + 1 where variance is preserved,
        (alpha' - sigma' alpha / sigma)^2 for the velocity, SNR / sigma^2 for the score.
        """
        snr = self.snr_at(t)
        if self.prediction_type == "x0":
            return torch.ones_like(snr)
        if self.prediction_type == "epsilon":
            return snr
        if t.is_floating_point():
            alpha, sigma, *slopes = self.curves(t)
        else:
            alpha, sigma = self.alphas[t], self.sigmas[t]
        if self.prediction_type == "velocity":
            d_alpha, d_sigma = slopes if t.is_floating_point() else self._slope_tables()[:, t]
            return (d_alpha - d_sigma * alpha / sigma).square()
        if self.prediction_type == "score":
            return snr / sigma.square()
        return snr + 1 if self.process == "vp" else (alpha.square() + sigma.square()).square() / sigma.square()

    def min_snr_weight(self, gamma: float, t: torch.Tensor) -> torch.Tensor:
        """Weights float64 `[B]` that make a loss in this prediction type min(SNR, gamma) times that of the clean image.

        Min-SNR (arXiv 2303.09556, section 3.4). t: int64 or float64 `[B]`.
        """
        return self.snr_at(t).clamp(max=gamma) / self.error_ratio(t)

    def predict_x0(self, prediction: torch.Tensor, t: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The clean image `[B, C, H, W]`, not clamped, that a prediction at (x, t) stands for."""
        if self.prediction_type == "x0":
            return prediction
        alpha, sigma, d_alpha, d_sigma = self._curves_like(t, x)
        if self.prediction_type == "epsilon":
            return (x - sigma * prediction) / alpha
        if self.prediction_type == "score":
            return (x + sigma.square() * prediction) / alpha
        if self.prediction_type == "velocity":
            return (d_sigma * x - sigma * prediction) / (d_sigma * alpha - sigma * d_alpha)
        x0 = alpha * x - sigma * prediction  # arXiv 2202.00512, appendix D.
        return x0 if self.process == "vp" else x0 / (alpha.square() + sigma.square())

    def predict_epsilon(self, prediction: torch.Tensor, t: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The noise `[B, C, H, W]`, not clamped, that a prediction at (x, t) stands for."""
        if self.prediction_type == "epsilon":
            return prediction
        return self.epsilon_of(self.predict_x0(prediction, t, x), t, x)

    def epsilon_of(self, x0: torch.Tensor, t: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The noise in x whose clean image is x0: `(x - alpha x0) / sigma`; needs sigma > 0."""
        alpha, sigma = self.scales(t, x)
        return (x - alpha * x0) / sigma

    def predict_clean(
        self,
        predictions: Images,
        ts: tuple[int | torch.Tensor, ...],
        xs: Images,
        given: Images = (),  # clean scales that are known and follow those predicted
    ) -> Images:
        """The clean scales that predictions at (xs, ts) stand for, clamped as one image if the schedule clamps.

        One `[B, C, H, W]` tensor per prediction, fine first; there may be fewer predictions than scales. A clamp acts
        on the image that all of them compose, with those given, which is split again (`Representation.clamp`).
        """
        x0s = tuple(self.predict_x0(*each) for each in zip(predictions, ts, xs, strict=False))
        return self.representation.clamp(x0s + given)[: len(x0s)] if self.clip_sample else x0s

    def split_variance(self, outputs: Images, xs: Images) -> tuple[Images, Images | None]:
        """What a network returns of noisy images, as predictions and the shares v of its variances; both by scale.

        A step has the variance exp(v log beta + (1 - v) log beta_tilde) (arXiv 2102.09672, eq. 15), v = (o + 1) / 2 of
        an output o that is meant to lie in [-1, 1] and is not clamped, as in the code of that paper. v is None for a
        network that returns predictions alone. Of the residual pair a 2x2 block of the fine scale has one v, the mean:
        only noise that is even over a block stays in the subspace of details, and has three dimensions there.
        """
        predictions, said = parts_of(outputs, xs)
        if said is None:
            return predictions, None
        return predictions, self.representation.blockwise(tuple((each + 1) / 2 for each in said))

    def check_step(self, t: int | torch.Tensor, t_next: int | torch.Tensor) -> None:
        """Raise ValueError unless a step from t to t_next lowers the noise, within the schedule."""
        falls = (t_next < t) & (t_next >= CLEAN) & (t < self.num_train_timesteps)
        if not (falls if isinstance(falls, bool) else falls.all()):
            raise ValueError(
                f"A DDIM step must go from a timestep in 0..{self.num_train_timesteps - 1} to a lower one "
                f"or to {CLEAN} (clean); got {t} to {t_next}."
            )

    def step(
        self,
        noise_pred: torch.Tensor,
        t: int | torch.Tensor,
        t_next: int | torch.Tensor,
        x: torch.Tensor,
        eta: float = 0.0,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One DDIM step of an image x `[B, C, H, W]` from timestep t to t_next < t, from what the network returned.

        noise_pred: in this schedule's prediction type. The clean image is clamped by itself. The rest is as in
        `step_from`.
        """
        self.check_step(t, t_next)
        x0 = self.predict_x0(noise_pred, t, x)
        return self.step_from(x0.clamp(-1, 1) if self.clip_sample else x0, t, t_next, x, eta, noise)

    def step_from(
        self,
        x0: torch.Tensor,
        t: int | torch.Tensor,
        t_next: int | torch.Tensor,
        x: torch.Tensor,
        eta: float = 0.0,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One DDIM step of x `[B, C, H, W]` from timestep t to t_next < t (arXiv 2010.02502, eq. 12 and 16).

        x0: the clean x as predicted, from which the noise is derived. t, t_next: one for all images, or int64 `[B]`
        each; t_next is a timestep, or `CLEAN` (-1) for abar = 1. eta: 0 is deterministic DDIM, 1 the ancestral sampler
        of DDPM; above 0 it needs `noise` like x. Raises ValueError for a step that does not lower the noise, eta
        outside [0, 1], or missing noise.
        """
        self.check_step(t, t_next)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], from DDIM to DDPM; got {eta}.")
        if eta > 0 and noise is None:
            raise ValueError(f"A step with eta = {eta} needs noise of the shape of x.")
        if isinstance(t_next, int) and t_next == CLEAN:
            return x0  # Also where there was no noise any more of which a direction could be derived.
        epsilon = self.epsilon_of(x0, t, x)
        alpha_next, sigma_next = self.scales(t_next, x)
        if eta == 0:
            return alpha_next * x0 + sigma_next * epsilon
        if self.process == "vp":
            alpha_bar, alpha_bar_next = self._alpha_bar(t, x), self._alpha_bar(t_next, x)
            variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
            direction = (1 - alpha_bar_next - variance).clamp(min=0).sqrt() * epsilon
            return alpha_next * x0 + direction + variance.sqrt() * noise
        # The same, of the share of the noise that is left; in float64, as little noise is lost beside the image.
        wide = torch.empty([0] * x.ndim, dtype=torch.float64)
        (alpha, sigma), (after, left) = self.scales(t, wide), self.scales(t_next, wide)
        drawn = eta**2 * (1 - (left * alpha / (sigma * after)).square())
        kept = (1 - drawn).clamp(min=0).sqrt().to(x.dtype)
        return alpha_next * x0 + sigma_next * (kept * epsilon + drawn.sqrt().to(x.dtype) * noise)
