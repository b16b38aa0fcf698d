"""Degradations of images, which cold diffusion learns to undo (arXiv 2208.09392): D(x, s) of severity s in [0, 1].

D(x, 0) is x to the bit, and D is continuous in s. A text names one with its extent, which says how far it goes:

    blur:S       a Gaussian kernel of deviation s S pixels, the image reflected at its border
    means:K      LIFT's 2x2 mean s K times over, brought back by nearest neighbours; as often as the side allows down to
                 one value, unless it is said
    pixelate:N   blocks of up to N x N pixels, of every whole side on the way, each of its mean colour; at the right
                 and the bottom border they may be smaller
    mask:S       a hole in the middle, grey 0, with soft edges: x (1 - exp(-r^2 / (2 d^2))), d = S s / (1 - s)
    grey:A       a fade to the image's own mean colour, of which at s = 1 a share A is done

Between two whole numbers of means, or two sides of blocks, both are blended linearly. The deviation of the hole is S
pixels at s = 1/2, and at s = 1 all is gone. The mean colour is that of each channel, so that images of one channel fade
too, as they would not to their luminance.

Shapes: B images, C channels, H x W pixels.
"""

import math

import torch

REACH = 6  # Of the kernel of a blur, in its largest deviations.


class Degradation:
    """D(x, s), by its extent. Raises ValueError for an extent that there cannot be."""

    name: str
    whole = False  # Whether the extent is a whole number.
    least = 0  # What the extent is above.

    def __init__(self, extent: float):
        if not self.least < extent < math.inf or (self.whole and extent != int(extent)):
            raise ValueError(f"the extent of {self.name} is {extent:g}; {self.needs()}.")
        self.extent = int(extent) if self.whole else float(extent)

    @classmethod
    def needs(cls) -> str:
        """What an extent has to be, as words."""
        return f"it must be {'a whole number' if cls.whole else 'a finite number'} above {cls.least:g}"

    @staticmethod
    def usual(side: int) -> float:
        """The extent of images of a side unless it is said."""
        return side / 4

    def check(self, side: int) -> None:
        """Raise ValueError for an extent that images of a side cannot have."""

    def __str__(self) -> str:
        return f"{self.name}:{repr(self.extent).removesuffix('.0')}"

    def __call__(self, x: torch.Tensor, severity: float | torch.Tensor) -> torch.Tensor:
        """D(x, s) like x `[B, C, H, W]`; severity: in [0, 1], a number or float64 `[B]`.

        Raises ValueError outside of it, but not for tensors on GPUs, which would have to be waited for.
        """
        if isinstance(severity, torch.Tensor):
            if severity.device.type == "cpu" and not ((severity >= 0) & (severity <= 1)).all():
                low, high = severity.min().item(), severity.max().item()
                raise ValueError(f"Severities lie in [0, 1]; got {low:g} to {high:g}.")
        elif not 0 <= severity <= 1:
            raise ValueError(f"Severities lie in [0, 1]; got {severity:g}.")
        else:
            severity = torch.full((len(x),), float(severity), dtype=torch.float64, device=x.device)
        changed = self._degrade(x, severity).to(x.dtype)
        return torch.where(severity.view(-1, 1, 1, 1) > 0, changed, x)

    def _degrade(self, x: torch.Tensor, severity: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _along_both(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    # Matrices [B, H, H] and [B, W, W] of each image; in float64, which no autocast and no TF32 rounds.
    return rows[:, None] @ x.double() @ columns[:, None].mT


class Blur(Degradation):
    """The kernel exp(-k^2 / (2 d^2)) at whole k, normed, along both axes: in cosines it multiplies each mode."""

    name = "blur"

    def _degrade(self, x: torch.Tensor, severity: torch.Tensor) -> torch.Tensor:
        return _along_both(x, *(self._matrix(side, severity) for side in x.shape[2:]))

    def _matrix(self, side: int, severity: torch.Tensor) -> torch.Tensor:
        options = {"dtype": torch.float64, "device": severity.device}
        deviation = (self.extent * severity).clamp(min=1e-3)[:, None]  # [B, 1]; below it nothing is seen of a blur.
        offsets = torch.arange(math.ceil(REACH * self.extent) + 1, **options)  # [R]
        weights = (-(offsets**2) / (2 * deviation**2)).exp() * (1 + (offsets > 0))  # [B, R], k and -k together
        waves = torch.arange(side, **options) * (math.pi / side)  # [n]
        gains = weights / weights.sum(1, keepdim=True) @ (offsets[:, None] * waves).cos()  # [B, n]
        # Even about the edges of the outer pixels, as an image that is reflected there.
        modes = (waves[:, None] * (torch.arange(side, **options) + 0.5)).cos() * (2 / side) ** 0.5  # [n, n]
        modes[0] *= 0.5**0.5
        return modes.T @ (gains[:, :, None] * modes)  # [B, n, n]


class _Blocks(Degradation):
    """Blocks of mean colour in levels, whose sides grow."""

    whole = True

    @property
    def levels(self) -> int:
        """How many there are above the image itself."""
        return self.extent

    def sides(self, levels: torch.Tensor) -> torch.Tensor:
        """Of the blocks of levels, int64 `[B]`."""
        raise NotImplementedError

    def _degrade(self, x: torch.Tensor, severity: torch.Tensor) -> torch.Tensor:
        place = severity * self.levels
        below = place.floor().clamp(max=self.levels - 1)  # [B]
        share = (place - below).view(-1, 1, 1, 1)
        lower, upper = (self._means(x, self.sides(below.long() + k)) for k in (0, 1))
        return (1 - share) * lower + share * upper

    def _means(self, x: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
        matrices = []
        for count in x.shape[2:]:
            block = torch.arange(count, device=x.device) // sides[:, None]  # [B, n]
            same = (block[:, :, None] == block[:, None]).double()  # [B, n, n]
            matrices.append(same / same.sum(2, keepdim=True))
        return _along_both(x, *matrices)


class Means(_Blocks):
    """The 2x2 mean, again and again."""

    name = "means"

    @staticmethod
    def usual(side: int) -> float:
        return (side & -side).bit_length() - 1  # As often as 2 divides it.

    def check(self, side: int) -> None:
        most = self.usual(side)
        if self.extent > most:
            raise ValueError(f"{self} halves a side of {side} pixels more often than the {most} times that it can be.")

    def sides(self, levels: torch.Tensor) -> torch.Tensor:
        return 2**levels


class Pixelate(_Blocks):
    """Blocks of 2x2, 3x3, ... pixels."""

    name, least = "pixelate", 1

    @staticmethod
    def usual(side: int) -> float:
        return max(2, side // 4)

    def check(self, side: int) -> None:
        if self.extent > side:
            raise ValueError(f"{self} has blocks that are larger than an image of {side}x{side} pixels.")

    @property
    def levels(self) -> int:
        return self.extent - 1

    def sides(self, levels: torch.Tensor) -> torch.Tensor:
        return levels + 1


class Mask(Degradation):
    """A hole that grows from the middle."""

    name = "mask"

    def _degrade(self, x: torch.Tensor, severity: torch.Tensor) -> torch.Tensor:
        down, right = (torch.arange(n, dtype=torch.float64, device=x.device) - (n - 1) / 2 for n in x.shape[2:])
        # The mean over a pixel, so that the one in the middle of an odd side goes as gently as the others.
        squares = down[:, None] ** 2 + right**2 + 1 / 6  # [H, W]
        severity = severity.view(-1, 1, 1, 1).clamp(min=1e-9)
        kept = -torch.expm1(-squares * (1 - severity) ** 2 / (2 * (self.extent * severity) ** 2))  # [B, 1, H, W]
        return x * kept


class Grey(Degradation):
    """A fade to the mean colour of the image."""

    name = "grey"

    @staticmethod
    def usual(side: int) -> float:
        return 1.0

    @classmethod
    def needs(cls) -> str:
        return "it must be above 0 and at most 1"

    def __init__(self, extent: float):
        if extent > 1:
            raise ValueError(f"the extent of {self.name} is {extent:g}; {self.needs()}.")
        super().__init__(extent)

    def _degrade(self, x: torch.Tensor, severity: torch.Tensor) -> torch.Tensor:
        share = (self.extent * severity).view(-1, 1, 1, 1)
        wide = x.double()
        return (1 - share) * wide + share * wide.mean((2, 3), keepdim=True)


DEGRADATIONS: dict[str, type[Degradation]] = {kind.name: kind for kind in (Blur, Means, Pixelate, Mask, Grey)}


def parse_degradation(text: str) -> tuple[str, float | None]:
    """The name and the extent of a text such as `blur:8`; None for the usual one. Raises ValueError for other texts."""
    name, colon, extent = text.partition(":")
    try:
        if name not in DEGRADATIONS:
            raise ValueError("there is none of that name")
        return name, DEGRADATIONS[name](float(extent)).extent if colon else None
    except ValueError as error:
        known = ", ".join(f"{known}[:EXTENT]" for known in DEGRADATIONS)
        reason = str(error).removesuffix(".")
        if "could not convert" in reason:
            reason = f"'{extent}' is no number"
        raise ValueError(f"'{text}' is no degradation ({reason}); choose one of {known}.") from error


def make_degradation(text: str, side: int) -> Degradation:
    """The degradation that a text names, for images of a side; `str` of it is one text for all that name the same.

    Raises ValueError for what `parse_degradation` refuses, and for an extent that such images cannot have.
    """
    name, extent = parse_degradation(text)
    kind = DEGRADATIONS[name]
    made = kind(kind.usual(side) if extent is None else extent)
    made.check(side)
    return made
