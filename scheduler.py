"""Noise schedules, signal-to-noise ratio, prediction conversions and the DDIM step.

A variance-preserving diffusion (arXiv 2006.11239): `x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps` with
`SNR_t = abar_t / (1 - abar_t)`. Tables are float64 and cast once, where they meet an image.
"""

import copy
import math

import torch

from images.representation import REPRESENTATIONS, Images

CLEAN = -1
PREDICTION_TYPES = ("epsilon", "x0", "v")
ZERO_TERMINAL_SUFFIX = "_zero_terminal"


def _cosine_betas(num_steps: int, max_beta: float, min_beta: float = 0.0) -> torch.Tensor:
    edges = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - curve[1:] / curve[:-1]).clamp(min_beta, max_beta)


BETA_SCHEDULES = {
    "cosine_clipped": lambda n: _cosine_betas(n, max_beta=0.02, min_beta=1e-4),
    "cosine": lambda n: _cosine_betas(n, max_beta=0.999),
    "linear": lambda n: torch.linspace(1e-4, 0.02, n, dtype=torch.float64),
}
SCHEDULE_NAMES = tuple(BETA_SCHEDULES) + tuple(name + ZERO_TERMINAL_SUFFIX for name in BETA_SCHEDULES)


def make_alphas_cumprod(beta_schedule: str, num_train_timesteps: int = 1000) -> torch.Tensor:
    """The table abar_t, float64 `[num_train_timesteps]`, decreasing.

    `cosine` (arXiv 2102.09672, eq. 17, s = 0.008) with betas at most 0.999; `cosine_clipped` the same with
    betas clipped to [1e-4, 0.02]; `linear` 1e-4..0.02 (arXiv 2006.11239). The suffix `_zero_terminal`
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


def x0_from_epsilon(x, epsilon, alpha_bar):
    """Clean image from noise: `(x - sqrt(1 - abar) eps) / sqrt(abar)`; needs abar > 0."""
    return (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()


def epsilon_from_x0(x, x0, alpha_bar):
    """Noise from clean image: `(x - sqrt(abar) x0) / sqrt(1 - abar)`; needs abar < 1."""
    return (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()


def x0_from_v(x, v, alpha_bar):
    """Clean image from velocity: `sqrt(abar) x - sqrt(1 - abar) v` (arXiv 2202.00512, appendix D)."""
    return alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * v


def v_from_x0_epsilon(x0, epsilon, alpha_bar):
    """Velocity: `sqrt(abar) eps - sqrt(1 - abar) x0` (arXiv 2202.00512, appendix D)."""
    return alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0


class DDIMScheduler:
    """A noise schedule and the DDIM step between any two of its timesteps.

    Attributes, float64 `[num_train_timesteps]`: `alphas_cumprod`, `snr` (0 to inf), `log_snr`.
    `prediction_type` says what the network returns: "epsilon", "x0" or "v". `clip_sample` clamps every
    predicted clean image to [-1, 1]. `representation`, of `images.representation.REPRESENTATIONS`, says what the scales
    of an image are and which noise is theirs. Nothing is kept between calls and nothing moves between devices unless
    `to(device)` is called. Raises ValueError for unknown names, and for ε-prediction on a schedule with zero
    terminal SNR, where noise carries no information about the image.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "cosine_clipped",
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        representation: str = "overcomplete",
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"Unknown prediction type '{prediction_type}'; choose one of {', '.join(PREDICTION_TYPES)}."
            )
        if representation not in REPRESENTATIONS:
            raise ValueError(f"Unknown representation '{representation}'; choose one of {', '.join(REPRESENTATIONS)}.")
        self.representation = REPRESENTATIONS[representation]
        self.num_train_timesteps = num_train_timesteps
        self.beta_schedule = beta_schedule
        self.prediction_type = prediction_type
        self.clip_sample = clip_sample
        self.alphas_cumprod = make_alphas_cumprod(beta_schedule, num_train_timesteps)
        if prediction_type == "epsilon" and self.alphas_cumprod[-1] == 0:
            raise ValueError(
                f"Schedule '{beta_schedule}' ends at zero SNR, where noise prediction is undefined; "
                "use prediction type v or x0."
            )
        self.snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        self.log_snr = self.snr.log()

    @property
    def process(self) -> str:
        """What it is called in rows of results: variance preserving, and its noise schedule."""
        return f"vp {self.beta_schedule}"

    def to(self, device: torch.device | str) -> "DDIMScheduler":
        """A copy whose tables live on `device`, so that indexing with timesteps there moves no data."""
        moved = copy.copy(self)
        for name in ("alphas_cumprod", "snr", "log_snr"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def _alpha_bar(self, t: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """abar at t (an int, or `[B]`) in the dtype of x and shaped to broadcast against it; CLEAN gives 1."""
        if isinstance(t, int):
            # It stays where the table is: a number on the host goes into a kernel of a GPU without a wait, a copy not.
            return torch.as_tensor(1.0 if t == CLEAN else self.alphas_cumprod[t], dtype=x.dtype)
        # CLEAN looks up the last entry, which is then replaced.
        values = torch.where(t == CLEAN, 1.0, self.alphas_cumprod[t])
        return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def add_noise(self, x: torch.Tensor, noise: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """`sqrt(abar_t) x + sqrt(1 - abar_t) noise`; x and noise `[B, C, H, W]`, t an int or int64 `[B]`."""
        alpha_bar = self._alpha_bar(t, x)
        return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise

    def target(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What a network of this prediction type should return for clean x and noise at timesteps t `[B]`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "x0":
            return x
        return v_from_x0_epsilon(x, noise, self._alpha_bar(t, x))

    def min_snr_weight(self, gamma: float, t: torch.Tensor) -> torch.Tensor:
        """Weights float64 `[B]` that make a loss in this prediction type min(SNR, gamma) times that of the clean image.

        Min-SNR (arXiv 2303.09556, section 3.4): an error of the clean image counts SNR times in the noise and SNR + 1
        times in the velocity. t: int64 `[B]`.
        """
        snr = self.snr[t]
        return snr.clamp(max=gamma) / {"epsilon": snr, "v": snr + 1, "x0": 1}[self.prediction_type]

    def predict_x0(self, prediction: torch.Tensor, t: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The clean image `[B, C, H, W]`, not clamped, that a prediction at (x, t) stands for."""
        if self.prediction_type == "x0":
            return prediction
        convert = x0_from_epsilon if self.prediction_type == "epsilon" else x0_from_v
        return convert(x, prediction, self._alpha_bar(t, x))

    def predict_epsilon(self, prediction: torch.Tensor, t: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The noise `[B, C, H, W]`, not clamped, that a prediction at (x, t) stands for."""
        if self.prediction_type == "epsilon":
            return prediction
        return epsilon_from_x0(x, self.predict_x0(prediction, t, x), self._alpha_bar(t, x))

    def predict_clean(self, predictions: Images, ts: tuple[int | torch.Tensor, ...], xs: Images) -> Images:
        """The clean scales that predictions at (xs, ts) stand for, clamped as one image if the schedule clamps.

        One `[B, C, H, W]` tensor per scale, fine first; there may be fewer predictions than scales. A clamp acts on
        the image that all of them compose, which is split again (`Representation.clamp`).
        """
        x0s = tuple(self.predict_x0(*each) for each in zip(predictions, ts, xs, strict=False))
        return self.representation.clamp(x0s) if self.clip_sample else x0s

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
        alpha_bar, alpha_bar_next = self._alpha_bar(t, x), self._alpha_bar(t_next, x)
        epsilon = epsilon_from_x0(x, x0, alpha_bar)
        if eta == 0:
            return alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next).sqrt() * epsilon
        if noise is None:
            raise ValueError(f"A step with eta = {eta} needs noise of the shape of x.")
        variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
        direction = (1 - alpha_bar_next - variance).clamp(min=0).sqrt() * epsilon
        return alpha_bar_next.sqrt() * x0 + direction + variance.sqrt() * noise
