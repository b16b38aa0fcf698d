"""Local score machines: the best denoisers of a training set that see a window around each pixel.

Of a noisy image x_t = α x + σ n let u = x_t / α and γ = α² / σ². Pixel p of the clean image is estimated from the
window Ω_p of u, P pixels wide and high, by a mean over candidates q, windows of training images φ,

    x̂(p) = Σ_q w_q φ(q) / Σ_q w_q,    w_q = exp(-γ/2 Σ_{o: p+o ∈ Ω_p} |u(p + o) - φ(q + o)|²),

which is the posterior mean if the window is a candidate, each equally likely, in noise (arXiv 2412.20292). What differs
is which places q of every training image are candidates:

    ls      q = p: the local score machine, which may do something else at every place
    els     every q: the equivariant local score machine, which does the same everywhere
    bbels   every q whose window the border cuts as it cuts that of p: ELS whose equivariance the border breaks

With circular borders images are tori. Windows as wide as the torus are all of it, each pixel once; LS is then the ideal
denoiser of the images, and ELS that of all their shifts. With borders of zeros there is no noise outside the image, so
that pixels of Ω_p out there say nothing and do not count. Candidates of ELS that reach over the border are continued
with zeros there, and count like others: it does not know where borders are. What is exact for a network that pads with
zeros, and so sees which pixels are without noise, is bbELS: in the interior it takes windows from the interior, at a
row (or column) near an edge those from the same row (column), at a corner those from the same place. The paper has ELS
on the torus and bbELS for zeros. A window of 2 max(H, W) - 1 is the whole image from every pixel; LS and bbELS are then
the ideal denoiser.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from images.representation import OVERCOMPLETE
from runtime.device import full_precision
from scheduler import DDIMScheduler
from truth.posterior_mean import ExactDenoiser, signal_and_noise

MACHINES = ("ls", "els", "bbels")
BORDERS = ("zeros", "circular")
MEMORY_MIB = {"cpu": 8, "cuda": 1024}  # On a CPU blocks of numbers should stay in the cache.
# Numbers of a window up to which products of windows take less time than shifted images; on a CPU with AVX-512.
PRODUCTS_UP_TO = 150
# Rounding of a logit that products may have; above it differences are taken, which round less.
PRODUCT_ERROR = 1e-3
# Beyond these the mean over candidates does not change any more, and squares of u or their weights would overflow.
LOG_SNR_RANGE = (-60.0, 45.0)
# Candidates further below the best count like this: no sum changes, and numbers do not become too small to be fast.
LEAST_LOGIT = -60.0


@dataclasses.dataclass(frozen=True)
class WindowTable:
    """The window of the nearest noise level of a table: what calibration finds, as machines take it.

    levels: a log SNR for each scale, finite, no two the same; sides: a window for each level, odd. Of levels equally
    near the first counts. Raises ValueError for a table that is none.
    """

    levels: tuple[tuple[float, ...], ...]
    sides: tuple[int, ...]

    def __post_init__(self) -> None:
        scales = {len(level) for level in self.levels}
        finite = all(math.isfinite(log_snr) for level in self.levels for log_snr in level)
        distinct = len(set(self.levels)) == len(self.levels) == len(self.sides)
        if len(scales) != 1 or 0 in scales or not finite or not distinct:
            raise ValueError(
                f"A table of windows needs different levels of finite log SNRs, and a window for each; got "
                f"{list(self.levels)} and {list(self.sides)}."
            )

    def __call__(self, *log_snrs: float) -> int:
        low, high = LOG_SNR_RANGE
        place = [min(max(log_snr, low), high) for log_snr in log_snrs]
        return self.sides[min(range(len(self.levels)), key=lambda k: math.dist(self.levels[k], place))]


class LocalDenoiser(ExactDenoiser):
    """A local score machine of `images` `[N, C, H, W]`, of one scale, whose prediction is that of the scheduler.

    machine: of MACHINES. window: the side P of the window in pixels, odd, for every noise level, or what gives it for a
    log SNR (of pure noise -inf), such as a `WindowTable`. borders: of BORDERS. memory_mib: about what all intermediate
    arrays may take beside images, batch and result, but at least what one image needs; None for MEMORY_MIB of the
    device. All candidates of all images count, in the dtype of the images. Every row of a batch is computed by itself,
    so that it does not depend on the others. No gradients pass.

    Work for each row: LS O(N C H W); ELS and bbELS O(N (HW)²) of shifted images, or O(N C P² (HW)²) in matrix products,
    whichever is faster where both are accurate. Raises ValueError for unknown names, images of another shape, bbELS
    without borders, a window that is not odd, and a scheduler of the residual pair, which has no single scale.
    """

    num_scales = num_predictions = 1

    def __init__(
        self,
        scheduler: DDIMScheduler,
        images: torch.Tensor,
        machine: str,
        window: int | Callable[[float], int],
        borders: str = "zeros",
        memory_mib: float | None = None,
    ):
        super().__init__(scheduler)
        check_machine(machine, borders, memory_mib)
        if images.ndim != 4 or not images.is_floating_point() or 0 in images.shape:
            raise ValueError(f"Images must be float [N, C, H, W]; got {images.dtype} {list(images.shape)}.")
        if scheduler.representation is not OVERCOMPLETE:
            raise ValueError("A local score machine has one scale; its scheduler must be overcomplete.")
        self.machine, self.borders, self.memory_mib = machine, borders, memory_mib
        self.window = window
        self.register_buffer("images", images.clone())
        self.largest = images.abs().max().item() ** 2
        if not callable(window):
            self.window_at(0.0)

    def window_at(self, log_snr: float) -> int:
        """The side of the window at a log SNR; raises ValueError unless it is odd and positive."""
        return window_side(self.window, log_snr)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The prediction `[B, C, H, W]` at noisy images x like it and timesteps t, int64 or float64 `[B]`."""
        place = self._at(t)
        log_snr, size, _ = place
        wide = x.to(torch.promote_types(x.dtype, self.log_snr.dtype))
        x0 = self.posterior_mean(wide / size[:, None, None, None], log_snr)
        return self._prediction(wide, x0, place).to(x.dtype)

    def denoise(self, xs: tuple[torch.Tensor], ts: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """One scale, one clock, the form the sampler calls."""
        return (self(*xs, *ts),)

    @torch.no_grad()
    def posterior_mean(self, x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """x̂ `[B, C, H, W]` float64, of variance-preserving noisy images like it and their log SNRs `[B]`."""
        if x.shape[1:] != self.images.shape[1:]:
            raise ValueError(f"Noisy images are {list(x.shape[1:])}, those of training {list(self.images.shape[1:])}.")
        clean, precisions = self.in_units_of_images(x, log_snr)
        sides = [self.window_at(each) for each in log_snr.tolist()]
        result = torch.empty_like(x, dtype=torch.float64)
        with full_precision(x.device):
            for side in set(sides):
                rows = [k for k, other in enumerate(sides) if other == side]
                candidates = self.images, self.images, self.largest
                window = Window(*candidates, self.machine, side, self.borders, self.memory_mib)
                sums = window.sums([clean[k] for k in rows], [precisions[k] for k in rows])
                for k, each in zip(rows, sums, strict=True):
                    result[k] = each.mean / each.total
        return result

    def in_units_of_images(self, x: torch.Tensor, log_snr: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
        """u = x / α `[B, C, H, W]` in the dtype of the images, and γ of each row, 0 of pure noise."""
        log_snr = log_snr.double().clamp(max=LOG_SNR_RANGE[1])
        signal = signal_and_noise(log_snr)[0][:, None, None, None]
        is_noise = log_snr < LOG_SNR_RANGE[0]
        clean = torch.where(is_noise[:, None, None, None], 0.0, x.double() / signal).to(self.images.dtype)
        return clean, torch.where(is_noise, 0.0, log_snr.exp()).tolist()


def check_machine(machine: str, borders: str, memory_mib: float | None) -> None:
    """Raise ValueError unless there is such a machine with such borders, and any memory is positive."""
    for kind, name, names in (("local score machine", machine, MACHINES), ("borders", borders, BORDERS)):
        if name not in names:
            raise ValueError(f"Unknown {kind} '{name}'; choose one of {', '.join(names)}.")
    if machine == "bbels" and borders == "circular":
        raise ValueError("Circular borders cut no window, so that bbels would be els; choose els, or zeros.")
    if memory_mib is not None and not memory_mib > 0:
        raise ValueError(f"memory_mib is {memory_mib} but must be above 0.")


def window_side(window: int | Callable[..., int], *log_snrs: float) -> int:
    """The side of a window, or what gives it for a log SNR per scale; raises ValueError unless odd and positive."""
    side = window(*log_snrs) if callable(window) else window
    if side != int(side) or side < 1 or side % 2 == 0:
        level = ", ".join(f"{log_snr:g}" for log_snr in log_snrs)
        raise ValueError(f"The window at log SNR {level} is {side}, but its side must be odd and positive.")
    return int(side)


@dataclasses.dataclass(frozen=True)
class _Piece:
    # Neighbouring places of one axis; if free, all of them are candidates for each, else each is for itself.
    low: int
    high: int
    free: bool

    def __len__(self) -> int:
        return self.high - self.low


class _Sums:
    """The streamed log-sum-exp of one noisy image: the largest logit so far, and sums relative to it."""

    def __init__(self, image: torch.Tensor, precision: float, channels: int, collapsed: tuple[bool, bool]):
        self.image, self.precision = image, precision  # [C, H, W], γ
        # Along an axis on which all windows are one, places have their weights in common.
        shape = [1 if one else size for one, size in zip(collapsed, image.shape[1:], strict=True)]
        self.top = image.new_full(shape, -math.inf)
        self.total = image.new_zeros(shape, dtype=torch.float64)
        self.mean = image.new_zeros(channels, *image.shape[1:], dtype=torch.float64)  # Of the values.

    def weights(self, place: tuple[slice, slice], logits: torch.Tensor) -> torch.Tensor:
        """Weights `[h, w, n]` of the logits of a block, written over them; sums at the place are brought to theirs."""
        top = torch.maximum(self.top[place], logits.amax(2))
        factor = (self.top[place] - top).double().exp()
        self.top[place] = top
        self.total[place] *= factor
        self.mean[:, place[0], place[1]] *= factor
        return logits.sub_(top[:, :, None]).clamp_(min=LEAST_LOGIT).exp_()

    def add(self, place: tuple[slice, slice], total: torch.Tensor, mean: torch.Tensor) -> None:
        self.total[place] += total
        self.mean[:, place[0], place[1]] += mean


class Window:
    """A machine at one side of the window: what all its candidates add up to.

    images `[N, C, H, W]`: what noisy ones are compared with. values `[N, C', H, W]`: what candidates stand for, of
    which the mean is taken; often the images. largest: the square of the largest number in the images. products_factor:
    by how much larger than PRODUCTS_UP_TO windows may be that are multiplied. The rest is as of `LocalDenoiser`.
    """

    def __init__(
        self,
        images: torch.Tensor,
        values: torch.Tensor,
        largest: float,
        machine: str,
        side: int,
        borders: str,
        memory_mib: float | None,
        products_factor: int = 1,
    ):
        self.products_up_to = products_factor * PRODUCTS_UP_TO
        self.images, self.values, self.largest = images, values, largest
        self.circular = borders == "circular"
        self.side, self.reach = side, side // 2
        self.shape = self.images.shape[2:]
        memory = memory_mib or MEMORY_MIB.get(self.images.device.type, MEMORY_MIB["cuda"])
        self.numbers = memory * 2**20 / self.images.element_size()  # That intermediate arrays may hold.
        # Whether every window is the whole of the torus, by axis.
        self.whole = tuple(self.circular and side >= size for size in self.shape)
        self.members = [self._members(size) for size in self.shape]
        self.pieces = [self._pieces(machine, size) for size in self.shape]
        self.zeros_count = machine == "els" and not self.circular

    def _members(self, size: int) -> torch.Tensor:
        # [places, places], whether the second is in the window of the first; one row where that is the same for all.
        places = torch.arange(size, device=self.images.device)
        distance = (places[:, None] - places).abs()
        if self.circular:
            distance = torch.minimum(distance, size - distance)
        members = (distance <= self.reach).to(self.images.dtype)
        return members[:1] if self.circular and self.side >= size else members

    def _pieces(self, machine: str, size: int) -> list[_Piece]:
        if machine != "bbels":
            return [_Piece(0, size, machine == "els")]
        if size <= 2 * self.reach:
            return [_Piece(0, size, False)]
        edges = (0, self.reach, size - self.reach, size)
        pieces = [_Piece(low, high, k == 1) for k, (low, high) in enumerate(itertools.pairwise(edges))]
        return [piece for piece in pieces if len(piece)]

    def sums(self, images: Sequence[torch.Tensor], precisions: Sequence[float]) -> list[_Sums]:
        """The total of the weights and their mean times it, each for one of the noisy images `[C, H, W]`, u of γ."""
        channels = self.values.shape[1]
        sums = [_Sums(*each, channels, self.whole) for each in zip(images, precisions, strict=True)]
        for part in itertools.product(*self.pieces):
            by_products = [each for each in sums if self._products_serve(part, each.precision)]
            self._add_products(part, by_products)
            self._add_shifts(part, [each for each in sums if each not in by_products])
        return sums

    def _products_serve(self, part: tuple[_Piece, _Piece], precision: float) -> bool:
        # Windows of one torus must hold no pixel twice, and logits |u|² - 2uφ + |φ|² must not round too much.
        size = self.images.shape[1] * self.side**2
        if not all(piece.free for piece in part) or size > self.products_up_to or any(self.whole):
            return False
        signal = precision * size * self.largest  # At most γ |φ|²; beside it u has noise.
        return (signal + math.sqrt(signal * size)) * torch.finfo(self.images.dtype).eps <= PRODUCT_ERROR

    def _add_shifts(self, part: tuple[_Piece, _Piece], sums: list[_Sums]) -> None:
        # All pairs of a place and a candidate at one offset are one difference of images, summed over windows.
        if not sums:
            return
        channels, num_values = self.images.shape[1], self.values.shape[1]
        margins = [self._margin(piece) for piece in part]
        area = math.prod(size + sum(margin) for size, margin in zip(self.shape, margins, strict=True))
        continued_channels = channels if self.values is self.images else channels + num_values
        numbers = continued_channels * area + (channels + num_values + 4) * math.prod(self.shape)
        for chunk, chunk_values in self._chunks(int(self.numbers / numbers)):
            continued = self._continued(chunk, margins).permute(1, 2, 3, 0).contiguous()  # [C, H', W', n]
            all_values = continued
            if chunk_values is not chunk:
                all_values = self._continued(chunk_values, margins).permute(1, 2, 3, 0).contiguous()  # [C', H', W', n]
            for (i, rows), (j, columns) in itertools.product(*map(self._offsets, part)):
                i, j = i + margins[0][0], j + margins[1][0]
                y, x = self._reached(rows, 0), self._reached(columns, 1)
                candidates = continued[:, y.start + i : y.stop + i, x.start + j : x.stop + j]
                values = all_values[:, rows.start + i : rows.stop + i, columns.start + j : columns.stop + j]
                across, along = self.members[0][rows, y], self.members[1][columns, x]
                for each in sums:
                    squares = (candidates - each.image[:, y, x, None]).square_()
                    squares = squares[0] if channels == 1 else squares.sum(0)  # [y, x, n]
                    squares = (across @ squares.flatten(1)).unflatten(1, squares.shape[1:])  # [h, x, n]
                    logits = torch.matmul(-each.precision / 2 * along, squares)  # [h, w, n]
                    weights = each.weights((rows, columns), logits)
                    each.add((rows, columns), weights.sum(2), (weights * values).sum(3))

    def _chunks(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Images and their values, at most that many at once, but at least one.
        images = self.images.split(max(1, count))
        values = images if self.values is self.images else self.values.split(max(1, count))
        return zip(images, values, strict=True)

    def _margin(self, piece: _Piece) -> tuple[int, int]:
        # How far images are continued before and behind, so that a shift of them is a slice.
        if not piece.free or not (self.circular or self.zeros_count):
            return 0, 0
        return (0 if self.circular else len(piece) - 1), len(piece) - 1

    def _continued(self, images: torch.Tensor, margins: Sequence[tuple[int, int]]) -> torch.Tensor:
        (top, bottom), (left, right) = margins
        return F.pad(images, (left, right, top, bottom), mode="circular" if self.circular else "constant")

    def _offsets(self, piece: _Piece) -> Iterator[tuple[int, slice]]:
        # From places to candidates, with the places that have one there.
        if not piece.free:
            yield 0, slice(piece.low, piece.high)
        elif self.circular:
            yield from ((offset, slice(piece.low, piece.high)) for offset in range(len(piece)))
        else:
            for offset in range(1 - len(piece), len(piece)):
                yield offset, slice(max(piece.low, piece.low - offset), min(piece.high, piece.high - offset))

    def _reached(self, places: slice, axis: int) -> slice:
        # What windows around places hold.
        if self.circular:
            return places
        return slice(max(0, places.start - self.reach), min(self.shape[axis], places.stop + self.reach))

    def _add_products(self, part: tuple[_Piece, _Piece], sums: list[_Sums]) -> None:
        # Logits are products of windows, up to what all candidates of a place have in common.
        if not sums:
            return
        rows, columns = part
        height, width = len(rows), len(columns)
        margins = [(self.reach, self.reach) if self.circular or self.zeros_count else (0, 0)] * 2
        queries = [each.precision * self._queries(each.image, margins).view(height, width, -1) for each in sums]
        places = height * width
        numbers = self.numbers / 2
        count = max(1, int(min(numbers / (3 * queries[0].shape[2] * places), numbers / (width * places))))
        block = max(1, int(numbers / (count * width * places)))  # Rows of places at once.
        for chunk, values in self._chunks(count):
            keys = self._keys(self._continued(chunk.transpose(0, 1), margins))  # [K, candidates]
            values = values[:, :, rows.low : rows.high, columns.low : columns.high].transpose(0, 1).flatten(1)
            values = F.pad(values, (0, 0, 0, 1), value=1.0)  # [C' + 1, candidates]
            for each, query in zip(sums, queries, strict=True):
                for start in range(0, height, block):
                    some = query[start : start + block]  # [h, W, K]
                    place = slice(rows.low + start, rows.low + start + len(some)), slice(columns.low, columns.high)
                    logits = (some.flatten(0, 1) @ keys).unflatten(0, some.shape[:2])  # [h, W, candidates]
                    weights = each.weights(place, logits)
                    found = (values @ weights.flatten(0, 1).T).unflatten(1, some.shape[:2])  # [C' + 1, h, W]
                    each.add(place, found[-1], found[:-1])

    def _queries(self, image: torch.Tensor, margins: list[tuple[int, int]]) -> torch.Tensor:
        # Windows of u, and by which of -|φ|²/2 of every pixel they are to be multiplied, as far as that is not all.
        windows = self._windows(self._continued(image[:, None], margins))
        if self.zeros_count:
            inside = self._windows(self._continued(torch.ones_like(image[:1, None]), margins))
        else:
            inside = torch.ones_like(windows[:1])
        return torch.cat([windows, inside]).T  # [places, K]

    def _keys(self, images: torch.Tensor) -> torch.Tensor:
        windows = self._windows(images)  # [C P², candidates]
        squares = windows.square()
        if self.zeros_count:
            squares = squares.unflatten(0, (len(images), -1))  # [C, P², candidates]
        return torch.cat([windows, squares.sum(0, keepdim=not self.zeros_count) / -2])

    def _windows(self, images: torch.Tensor) -> torch.Tensor:
        # [C P², n H' W'] of images [C, n, H, W], at all places whose window lies within them.
        windows = images.unfold(2, self.side, 1).unfold(3, self.side, 1)  # [C, n, H', W', P, P]
        return windows.permute(0, 4, 5, 1, 2, 3).flatten(3).flatten(0, 2)
