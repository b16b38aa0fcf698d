"""Masks with soft edges, noise and paint, of which the animals of `images.synthetic` are drawn.

Planes are float64 [N, P, P] and scalars [N, 1, 1], canvases [N, 3, P, P]. All of it keeps to operations that IEEE 754
rounds exactly, one element at a time, so that pixels are the same on every machine.
"""

import numpy as np


def smoothstep(x: np.ndarray) -> np.ndarray:
    """0 up to x = 0, 1 from x = 1 on, and 3x² - 2x³ in between."""
    x = np.maximum(x, 0.0)
    np.minimum(x, 1.0, out=x)
    weight = x * -2.0
    weight += 3.0
    x *= x
    weight *= x
    return weight


def inside(distance: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """Mask of the points of negative distance to an edge, which is soft over a width."""
    x = distance / width
    return smoothstep(np.subtract(0.5, x, out=x))


def length_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """√(a² + b²)."""
    return np.sqrt(a * a + b * b)


def ellipse(u: np.ndarray, v: np.ndarray, a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """Signed distance to the ellipse of half axes a and b about the origin, negative inside."""
    # Not the exact distance, but right to first order near the edge, where the mask changes.
    p, q = u / a, v / b
    radius = length_of(p, q)
    slope = length_of(p / a, q / b)
    return radius * (radius - 1.0) / np.maximum(slope, 1e-9)


def blend_union(d1: np.ndarray, d2: np.ndarray, k: float) -> np.ndarray:
    """Distance to the union of two shapes whose seam is rounded over k."""
    overlap = np.maximum(k - np.abs(d1 - d2), 0.0)
    return np.minimum(d1, d2) - overlap * overlap * (0.25 / k)


def rotation(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the angle with t = tan(angle / 2)."""
    # The rational parametrisation of the circle avoids sine and cosine.
    norm = 1.0 / (1.0 + t * t)
    return (1.0 - t * t) * norm, 2.0 * t * norm


def value_noise(lattice: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Lattices [N, L, L] interpolated at coordinates in cells; they repeat, so that any coordinate is valid."""
    num, side, _ = lattice.shape
    flat = lattice.reshape(-1)
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = x - x0, y - y0
    fx, fy = fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy)
    column, row = x0.astype(np.int64) & (side - 1), y0.astype(np.int64) & (side - 1)
    right = (column + 1) & (side - 1)
    below = (row + 1) & (side - 1)
    base = (np.arange(num) * (side * side))[:, None, None]
    row, below = row * side + base, below * side + base
    top = np.take(flat, row + column)
    top = top + fx * (np.take(flat, row + right) - top)
    bottom = np.take(flat, below + column)
    bottom = bottom + fx * (np.take(flat, below + right) - bottom)
    return top + fy * (bottom - top)


def strands(lattice: np.ndarray, x: np.ndarray, y: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Means, about 0, of lattices [N, L, L] at five points along a direction field (dx, dy), coordinates in cells."""
    # Averaging noise along a direction field (line integral convolution) draws hair lying along the field.
    num, side, _ = lattice.shape
    flat = lattice.reshape(-1)
    base = (np.arange(num) * (side * side))[:, None, None]
    total = 0.0
    for k in range(-2, 3):
        column = np.floor(x + k * dx).astype(np.int64) & (side - 1)
        row = np.floor(y + k * dy).astype(np.int64) & (side - 1)
        total = total + np.take(flat, base + row * side + column)
    return total * 0.2 - 0.5


def wave(phase: np.ndarray) -> np.ndarray:
    """A smooth wave of period 1 and range [0, 1]."""
    p = phase - np.floor(phase)
    q = p * (1.0 - p)
    return 16.0 * q * q


def colour_of(channels: list[np.ndarray]) -> np.ndarray:
    """Three channels [N, 1, 1] as one colour [N, 3, 1, 1]."""
    return np.stack(channels, axis=1)


def rgb(red: float, green: float, blue: float) -> np.ndarray:
    """A colour of all images, [1, 3, 1, 1]."""
    return np.array([red, green, blue])[None, :, None, None]


def paint(canvas: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> None:
    """Lay a colour over a canvas in place, as opaque as alpha."""
    change = colour - canvas
    change *= alpha[:, None]
    canvas += change


def shade(canvas: np.ndarray, gain: np.ndarray) -> None:
    """Multiply a canvas by a gain in place."""
    canvas *= gain[:, None]


def box_mean(canvas: np.ndarray, factor: int) -> np.ndarray:
    """Means of the blocks of factor x factor pixels."""
    total = 0.0
    for dy in range(factor):
        for dx in range(factor):
            total = total + canvas[..., dy::factor, dx::factor]
    return total * (1.0 / (factor * factor))
