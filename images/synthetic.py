"""Built-in data set `synthetic`: procedural animal faces in three classes, a stand-in for AFHQ.

    from images.synthetic import synthetic_images
    images = synthetic_images(48)                       # uint8 [48, 3, 64, 64]

Each image is painted back to front (background, body, ears, head, markings, eyes, muzzle, whiskers) from
masks with analytic soft edges about one pixel wide, so nothing needs supersampling. The pixels are the same
on every machine: randomness comes from the raw PCG64 stream, whose values NumPy guarantees, and the image
arithmetic uses only operations that IEEE 754 rounds exactly (+ - * / sqrt, floor, comparisons), one
element at a time. Powers, trigonometry and reductions are absent because their last bit depends on the
maths library and on the width of the vector unit.
"""

import numpy as np

SYNTHETIC_CLASSES = ("cat", "dog", "wild")

_STREAM = 0x4C494654  # Keeps these streams apart from any other use of small integer seeds.
_CHUNK_PIXELS = 8 * 64 * 64  # Eight 64x64 images keep the working planes inside the processor cache.
_NUM_UNIFORMS = 128  # Scalar draws per image; the painters use nearly all of them.
# Nodes per side of each noise lattice: powers of two, so that a bit mask wraps coordinates.
_LATTICES = {"fur": 64, "clump": 64, "mottle": 32, "patch": 8, "backdrop": 8, "grain": 64}

# Geometry is in head units: the head is about one unit in radius, u points right and v down.
_SHAPES = {
    "cat": dict(
        skull=(0.93, 0.84), cheek=(1.00, 0.60, 0.27), snout=(0.50, 0.40, 0.58),
        ear=(0.60, -0.50, 0.92, 0.40), ear_lean=0.24, ear_round=0.0, flop=0.0,
        eye=(0.42, -0.05, 0.215, 0.165), eye_slant=0.16, pupil=(0.065, 0.15), iris_mix=0.5,
        pad=(0.155, 0.50, 0.215, 0.165), chin=(0.22, 0.16, 0.70), nose=(0.095, 0.075, 0.36), whisker=0.75,
    ),
    "dog": dict(
        size=1.08, skull=(0.77, 0.82), cheek=(0.70, 0.58, 0.26), snout=(0.47, 0.52, 0.60),
        ear=(0.74, -0.50, 0.92, 0.31), ear_lean=-0.20, ear_round=1.0, flop=1.0,
        eye=(0.35, -0.15, 0.145, 0.115), eye_slant=-0.06, pupil=(0.075, 0.075),
        pad=(0.20, 0.62, 0.27, 0.25), chin=(0.27, 0.18, 0.90), nose=(0.19, 0.135, 0.43), whisker=0.12,
    ),
    "wild": dict(
        skull=(0.86, 0.86), cheek=(0.94, 0.62, 0.30), snout=(0.48, 0.42, 0.64),
        ear=(0.68, -0.55, 0.44, 0.32), ear_lean=0.40, ear_round=1.0, flop=0.0,
        eye=(0.38, -0.13, 0.150, 0.100), eye_slant=0.22, pupil=(0.055, 0.055),
        pad=(0.19, 0.58, 0.25, 0.20), chin=(0.25, 0.18, 0.82), nose=(0.165, 0.105, 0.42), whisker=0.55,
    ),
}  # fmt: skip

_FOX_SHAPE = dict(
    skull=(0.80, 0.72), cheek=(1.00, 0.46, 0.20), snout=(0.31, 0.52, 0.56), ear=(0.55, -0.42, 0.98, 0.35),
    ear_lean=0.20, ear_round=0.12, eye=(0.36, -0.06, 0.135, 0.095), pad=(0.11, 0.62, 0.18, 0.17),
    chin=(0.16, 0.14, 0.82), nose=(0.105, 0.085, 0.52),
)  # fmt: skip
_PRICKED = dict(flop=0.0, ear=(0.52, -0.48, 0.88, 0.31), ear_lean=0.12, ear_round=0.1, cheek=(0.82, 0.56, 0.22))

# Coat colours are RGB in [0, 1]: the base, the markings, and the pale parts (muzzle, chest, blaze).
_BREEDS = {
    "cat": (
        dict(base=(0.56, 0.47, 0.36), dark=(0.20, 0.15, 0.11), pale=(0.86, 0.80, 0.70), tabby=0.9,
             muzzle=0.8, iris=(0.62, 0.66, 0.22), skin=(0.72, 0.42, 0.38)),
        dict(base=(0.85, 0.54, 0.26), dark=(0.62, 0.30, 0.10), pale=(0.97, 0.88, 0.74), tabby=0.8,
             muzzle=0.85, iris=(0.78, 0.58, 0.18), skin=(0.88, 0.56, 0.52)),
        dict(base=(0.45, 0.48, 0.53), dark=(0.30, 0.32, 0.37), pale=(0.60, 0.63, 0.67), tabby=0.15,
             muzzle=0.5, iris=(0.86, 0.60, 0.16), skin=(0.30, 0.30, 0.34)),
        dict(base=(0.13, 0.12, 0.13), dark=(0.06, 0.05, 0.06), pale=(0.94, 0.93, 0.91), blaze=0.95,
             muzzle=0.97, iris=(0.58, 0.74, 0.32), skin=(0.86, 0.56, 0.56)),
        dict(base=(0.86, 0.78, 0.66), dark=(0.24, 0.17, 0.14), pale=(0.90, 0.84, 0.74), mask=0.95,
             muzzle=0.0, dark_ear=1.0, iris=(0.38, 0.62, 0.90), skin=(0.26, 0.18, 0.17)),
        dict(base=(0.93, 0.91, 0.87), dark=(0.28, 0.23, 0.21), pale=(0.97, 0.96, 0.94), patch=0.95,
             muzzle=0.7, iris=(0.48, 0.68, 0.40), skin=(0.90, 0.60, 0.58)),
    ),
    "dog": (
        dict(base=(0.82, 0.62, 0.36), dark=(0.62, 0.41, 0.20), pale=(0.92, 0.79, 0.58), dark_ear=0.6,
             muzzle=0.5),
        dict(base=(0.62, 0.38, 0.20), dark=(0.38, 0.21, 0.11), pale=(0.96, 0.94, 0.90), blaze=0.95,
             muzzle=0.95, dark_ear=0.9),
        dict(base=(0.27, 0.21, 0.19), dark=(0.11, 0.09, 0.08), pale=(0.42, 0.35, 0.31), muzzle=0.5,
             iris=(0.52, 0.32, 0.14)),
        dict(base=(0.33, 0.34, 0.37), dark=(0.14, 0.14, 0.16), pale=(0.95, 0.95, 0.95), muzzle=0.97,
             brows=0.9, face=0.85, widow=0.8, iris=(0.45, 0.70, 0.92), eye_slant=0.14, **_PRICKED),
        dict(base=(0.94, 0.93, 0.90), dark=(0.13, 0.11, 0.10), pale=(0.97, 0.96, 0.94), spots=0.95,
             muzzle=0.5, dark_ear=0.85, spot_size=0.75),
        dict(base=(0.93, 0.90, 0.85), dark=(0.46, 0.28, 0.16), pale=(0.97, 0.96, 0.93), patch=0.95,
             muzzle=0.6, dark_ear=0.9),
        dict(base=(0.19, 0.15, 0.14), dark=(0.08, 0.07, 0.07), pale=(0.74, 0.44, 0.20), muzzle=0.92,
             brows=0.95, face=0.45, **_PRICKED),
    ),
    "wild": (
        dict(base=(0.83, 0.43, 0.15), dark=(0.20, 0.11, 0.08), pale=(0.97, 0.93, 0.87), face=0.95,
             muzzle=0.9, dark_ear=0.85, iris=(0.80, 0.52, 0.16), **_FOX_SHAPE),
        dict(base=(0.88, 0.53, 0.20), dark=(0.09, 0.06, 0.05), pale=(0.97, 0.94, 0.89), tiger=1.0,
             muzzle=0.95, brows=0.9, face=0.65, dark_ear=0.7, iris=(0.80, 0.68, 0.28)),
        dict(base=(0.84, 0.65, 0.36), dark=(0.14, 0.09, 0.06), pale=(0.96, 0.91, 0.80), spots=0.95,
             muzzle=0.9, tear=0.55, spot_size=0.50, iris=(0.66, 0.68, 0.30)),
        dict(base=(0.78, 0.58, 0.33), dark=(0.36, 0.20, 0.10), pale=(0.93, 0.84, 0.68), mane=1.0,
             muzzle=0.85, iris=(0.80, 0.55, 0.18)),
        dict(base=(0.47, 0.44, 0.41), dark=(0.20, 0.18, 0.17), pale=(0.90, 0.87, 0.81), face=0.75,
             muzzle=0.85, brows=0.5, widow=0.6, iris=(0.86, 0.68, 0.22),
             **{**_FOX_SHAPE, "snout": (0.38, 0.52, 0.58), "skull": (0.82, 0.78), "cheek": (0.98, 0.54, 0.22),
                "ear": (0.56, -0.46, 0.80, 0.32), "pad": (0.14, 0.62, 0.22, 0.20),
                "nose": (0.145, 0.105, 0.50)}),
        dict(base=(0.60, 0.58, 0.56), dark=(0.15, 0.14, 0.14), pale=(0.95, 0.94, 0.92), spots=0.8,
             muzzle=0.9, face=0.4, spot_size=0.55, iris=(0.60, 0.74, 0.72)),
    ),
}  # fmt: skip

_DEFAULTS = dict(
    tabby=0.0, tiger=0.0, spots=0.0, patch=0.0, mask=0.0, blaze=0.0, face=0.0, brows=0.0, widow=0.0,
    tear=0.0, mane=0.0, muzzle=0.0, dark_ear=0.0, spot_size=0.6, iris_mix=0.0, size=1.0,
    iris=(0.32, 0.18, 0.09), skin=(0.10, 0.08, 0.09),
)  # fmt: skip

_IRISES = ((0.58, 0.68, 0.24), (0.80, 0.62, 0.18), (0.42, 0.70, 0.46), (0.45, 0.66, 0.84))

_BACKDROPS = (
    ((0.36, 0.47, 0.24), (0.66, 0.72, 0.42)),
    ((0.70, 0.64, 0.56), (0.90, 0.87, 0.82)),
    ((0.24, 0.21, 0.20), (0.46, 0.39, 0.33)),
    ((0.42, 0.53, 0.66), (0.78, 0.84, 0.89)),
    ((0.52, 0.32, 0.24), (0.78, 0.58, 0.42)),
    ((0.10, 0.11, 0.13), (0.30, 0.32, 0.35)),
    ((0.60, 0.52, 0.34), (0.82, 0.74, 0.52)),
    ((0.30, 0.42, 0.42), (0.58, 0.68, 0.66)),
)


def synthetic_label(index: int) -> int:
    """Class of image `index`, as a position in `SYNTHETIC_CLASSES`: the classes take turns."""
    return index % len(SYNTHETIC_CLASSES)


def synthetic_images(num_images: int, resolution: int = 64, start: int = 0) -> np.ndarray:
    """Images `start` to `start + num_images - 1` of the procedural data set.

    Image i depends on i and the resolution only, and is bit-identical on every machine; its class is
    `synthetic_label(i)`. Below 64 pixels an image is painted at the smallest multiple of `resolution` that
    reaches 64 and box-averaged before rounding, so the 32-pixel image is the 2x2 mean of the 64-pixel one
    to within rounding.

    Args:
        num_images: how many images, at least 0.
        resolution: side length R in pixels, a positive multiple of 16.
        start: index of the first image, at least 0.

    Returns:
        uint8 array [num_images, 3, R, R], RGB in 0..255.

    Raises:
        ValueError: if `resolution` is not a positive multiple of 16, or a count or index is negative.
    """
    if resolution < 16 or resolution % 16:
        raise ValueError(f"synthetic resolution {resolution} must be a positive multiple of 16, such as 64.")
    if num_images < 0 or start < 0:
        raise ValueError(f"synthetic needs num_images and start of at least 0, got {num_images} and {start}.")
    factor = -(-64 // resolution)
    painted = resolution * factor
    chunk = max(1, _CHUNK_PIXELS // (painted * painted))
    images = np.empty((num_images, 3, resolution, resolution), dtype=np.uint8)
    for first in range(0, num_images, chunk):
        last = min(first + chunk, num_images)
        canvas = _render(range(start + first, start + last), painted)  # [N, 3, P, P]
        canvas = _box_mean(canvas, factor)  # [N, 3, R, R]
        images[first:last] = np.floor(np.minimum(np.maximum(canvas, 0.0), 1.0) * 255.0 + 0.5)
    return images


class _Dice:
    """Per-image random numbers: scalars in call order, and named square lattices, all uniform in [0, 1)."""

    def __init__(self, indices: range) -> None:
        total = _NUM_UNIFORMS + sum(side * side for side in _LATTICES.values())
        raw = [np.random.PCG64(np.random.SeedSequence([_STREAM, i])).random_raw(total) for i in indices]
        # The top 53 bits fit a float64 exactly, so the division by 2^53 loses nothing.
        stream = (np.stack(raw) >> np.uint64(11)).astype(np.float64) * (1.0 / 9007199254740992.0)
        self.uniforms = stream[:, :_NUM_UNIFORMS]
        self.lattices, offset = {}, _NUM_UNIFORMS
        for name, side in _LATTICES.items():
            self.lattices[name] = stream[:, offset : offset + side * side].reshape(-1, side, side)
            offset += side * side
        self.position = 0

    def roll(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        values = self.uniforms[:, self.position]
        self.position += 1
        return (low + (high - low) * values)[:, None, None]  # [N, 1, 1]

    def choose(self, count: int) -> np.ndarray:
        return np.floor(self.roll(0.0, count)).astype(np.int64)[:, 0, 0]  # [N]

    def happens(self, probability: float) -> np.ndarray:
        return (self.roll() < probability).astype(np.float64)  # [N, 1, 1]


def _traits(indices: range, dice: _Dice) -> dict[str, list[np.ndarray]]:
    breed_roll = dice.roll()[:, 0, 0]
    rows = []
    for index, value in zip(indices, breed_roll, strict=True):
        name = SYNTHETIC_CLASSES[synthetic_label(index)]
        breed = _BREEDS[name][int(value * len(_BREEDS[name]))]
        rows.append({**_DEFAULTS, **_SHAPES[name], **breed})
    traits = {}
    for key in rows[0]:
        table = np.array([row[key] for row in rows], dtype=np.float64).reshape(len(rows), -1)
        traits[key] = [table[:, k, None, None] for k in range(table.shape[1])]  # each [N, 1, 1]
    return traits


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.maximum(x, 0.0)
    np.minimum(x, 1.0, out=x)
    weight = x * -2.0
    weight += 3.0
    x *= x
    weight *= x
    return weight


def _inside(distance: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    x = distance / width
    return _smoothstep(np.subtract(0.5, x, out=x))


def _length(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(a * a + b * b)


def _ellipse(u: np.ndarray, v: np.ndarray, a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    # Not the exact distance, but right to first order near the edge, where the mask changes.
    p, q = u / a, v / b
    radius = _length(p, q)
    slope = _length(p / a, q / b)
    return radius * (radius - 1.0) / np.maximum(slope, 1e-9)


def _blend_union(d1: np.ndarray, d2: np.ndarray, k: float) -> np.ndarray:
    overlap = np.maximum(k - np.abs(d1 - d2), 0.0)
    return np.minimum(d1, d2) - overlap * overlap * (0.25 / k)


def _rotation(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # The rational parametrisation of the circle by t = tan(angle / 2) avoids sine and cosine.
    norm = 1.0 / (1.0 + t * t)
    return (1.0 - t * t) * norm, 2.0 * t * norm


def _value_noise(lattice: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # x and y are in lattice cells; the lattice repeats, so any coordinate is valid.
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


def _strands(lattice: np.ndarray, x: np.ndarray, y: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
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


def _wave(phase: np.ndarray) -> np.ndarray:
    p = phase - np.floor(phase)
    q = p * (1.0 - p)
    return 16.0 * q * q  # period 1, range [0, 1]


def _colour(channels: list[np.ndarray]) -> np.ndarray:
    return np.stack(channels, axis=1)  # [N, 3, 1, 1]


def _rgb(red: float, green: float, blue: float) -> np.ndarray:
    return np.array([red, green, blue])[None, :, None, None]  # [1, 3, 1, 1]


def _paint(canvas: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> None:
    change = colour - canvas
    change *= alpha[:, None]
    canvas += change


def _shade(canvas: np.ndarray, gain: np.ndarray) -> None:
    canvas *= gain[:, None]


def _box_mean(canvas: np.ndarray, factor: int) -> np.ndarray:
    total = 0.0
    for dy in range(factor):
        for dx in range(factor):
            total = total + canvas[..., dy::factor, dx::factor]
    return total * (1.0 / (factor * factor))


class _Scene:
    """Pose, coordinates and hair of one chunk of images; planes are [N, P, P], scalars [N, 1, 1]."""

    def __init__(self, indices: range, size: int) -> None:
        self.dice = dice = _Dice(indices)
        self.traits = _traits(indices, dice)
        axis = (np.arange(size) + 0.5) * (2.0 / size) - 1.0
        self.x = np.broadcast_to(axis[None, None, :], (len(indices), size, size))
        self.y = np.broadcast_to(axis[None, :, None], (len(indices), size, size))

        scale = self.trait("size") * dice.roll(0.70, 0.88)
        centre_x, centre_y = dice.roll(-0.09, 0.09), dice.roll(0.02, 0.16)
        tilt, turn, nod = dice.roll(-1.0, 1.0), dice.roll(-1.0, 1.0), dice.roll(-1.0, 1.0)
        cos, sin = _rotation(tilt * (0.05 + 0.10 * tilt * tilt))
        dx, dy = self.x - centre_x, self.y - centre_y
        self.u = (dx * cos + dy * sin) / (scale * dice.roll(0.94, 1.06))
        self.v = (dy * cos - dx * sin) / scale
        self.yaw = turn * (0.4 + 0.6 * turn * turn)
        self.pitch = nod
        self.pixel = 1.3 * (2.0 / size) / scale  # Edge width: a little over one pixel, in head units.
        self.light_x, self.light_y = dice.roll(-1.0, 1.0), dice.roll(-1.0, -0.3)

        # Parts nearer to the viewer shift further as the head turns.
        self.eye_u, self.eye_v = self.u - 0.12 * self.yaw, self.v - 0.05 * self.pitch
        self.nose_u, self.nose_v = self.u - 0.25 * self.yaw, self.v - 0.10 * self.pitch
        self.ear_u, self.ear_v = self.u + 0.07 * self.yaw, self.v + 0.05 * self.pitch

        # Hair grows away from a point between the eyes and the nose.
        hair_u, hair_v = self.nose_u, self.nose_v - 0.15
        flow = 1.0 / (_length(hair_u, hair_v) + 0.05)
        flow_x = (hair_u * cos - hair_v * sin) * flow
        flow_y = (hair_v * cos + hair_u * sin) * flow
        bend = _value_noise(dice.lattices["mottle"], self.x * 3.0 + 7.0, self.y * 3.0 + 7.0) - 0.5
        flow_x, flow_y = flow_x - bend * flow_y, flow_y + bend * flow_x
        grid_x, grid_y = self.x * 0.5 + 0.5, self.y * 0.5 + 0.5
        self.fine = _strands(dice.lattices["fur"], grid_x * 68.0, grid_y * 68.0, flow_x, flow_y)
        self.clump = _strands(dice.lattices["clump"], grid_x * 40.0, grid_y * 40.0, flow_x, flow_y)
        self.mottle = _value_noise(dice.lattices["mottle"], self.u * 4.5 + 11.0, self.v * 4.5 + 13.0) - 0.5
        self.blotch = _value_noise(dice.lattices["mottle"], self.u * 1.9 + 3.0, self.v * 1.9 + 5.0) - 0.5

    def jitter(self, name: str, amount: float) -> list[np.ndarray]:
        return [value * self.dice.roll(1.0 - amount, 1.0 + amount) for value in self.traits[name]]

    def trait(self, name: str) -> np.ndarray:
        return self.traits[name][0]


def _render(indices: range, size: int) -> np.ndarray:
    scene = _Scene(indices, size)
    canvas = _backdrop(scene)  # [N, 3, P, P]
    coat, dark = _coat(scene)
    head = _head_distance(scene)
    _paint_body(canvas, scene, coat)
    _paint_mane(canvas, scene, dark)
    _paint_ears(canvas, scene, coat, dark)
    _paint_head(canvas, scene, coat, head)
    _paint_eyes(canvas, scene)
    _paint_muzzle(canvas, scene)
    _paint_flop_ears(canvas, scene, coat, dark)
    _paint_whiskers(canvas, scene)
    return _expose(canvas, scene)


def _backdrop(scene: _Scene) -> np.ndarray:
    dice, x, y = scene.dice, scene.x, scene.y
    pairs = np.array(_BACKDROPS)[dice.choose(len(_BACKDROPS))]  # [N, 2, 3]
    first = pairs[:, 0, :, None, None] + _colour([dice.roll(-0.08, 0.08) for _ in range(3)])
    second = pairs[:, 1, :, None, None] + _colour([dice.roll(-0.08, 0.08) for _ in range(3)])
    backdrop, offset_x, offset_y = dice.lattices["backdrop"], dice.roll(0.0, 6.0), dice.roll(0.0, 6.0)
    cloud = _value_noise(backdrop, x * 1.1 + offset_x, y * 1.1 + offset_y) - 0.5
    detail = _value_noise(dice.lattices["mottle"], x * 4.0 + offset_y, y * 4.0 + offset_x) - 0.5
    ramp = 0.5 + 0.35 * (dice.roll(-1.0, 1.0) * x + dice.roll(-1.0, 1.0) * y) + 0.9 * cloud + 0.25 * detail
    canvas = first + _smoothstep(ramp)[:, None] * (second - first)  # [N, 3, P, P]
    for _ in range(2):
        radius = dice.roll(0.15, 0.5)
        disc = _length(x - dice.roll(-1.1, 1.1), y - dice.roll(-1.1, 0.4)) - radius
        strength = dice.roll(0.0, 0.5) * _inside(disc, 0.16)
        _paint(canvas, strength, second + _colour([dice.roll(-0.22, 0.28) for _ in range(3)]))
    # A shelf or wall edge behind some heads gives the background a straight, slightly blurred contour.
    edge = y + dice.roll(-0.3, 0.3) * x - dice.roll(-0.7, 0.7)
    _shade(canvas, 1.0 - dice.happens(0.4) * dice.roll(0.2, 0.5) * _inside(-edge, 0.10))
    return canvas


def _coat(scene: _Scene) -> tuple[np.ndarray, np.ndarray]:
    dice, u, v, pixel = scene.dice, scene.u, scene.v, scene.pixel
    nose_u, nose_v, eye_u, eye_v = scene.nose_u, scene.nose_v, scene.eye_u, scene.eye_v
    side_u = np.abs(nose_u)
    tone, warmth = dice.roll(0.86, 1.12), dice.roll(-0.07, 0.07)
    tint = _colour([tone * (1.0 + warmth), tone, tone * (1.0 - warmth)])
    base, dark, pale = (_colour(scene.traits[name]) * tint for name in ("base", "dark", "pale"))

    coat = base * (1.0 + 0.22 * scene.blotch + 0.16 * scene.mottle)[:, None]  # [N, 3, P, P]
    # The back of the head is darker than the face, and the chest is paler.
    _paint(coat, 0.35 * _smoothstep((-0.15 - v) * 0.9), 0.7 * base + 0.3 * dark)
    _paint(coat, 0.5 * _smoothstep((v - 0.85) * 1.6) * _inside(np.abs(u) - 0.45, 0.5), pale)

    # Markings, softest first; `ragged` breaks their contours into locks of hair.
    ragged = 0.45 * scene.clump + 0.08 * scene.mottle
    cap = 0.05 + 0.5 * np.abs(eye_u) + eye_v + ragged
    _paint(coat, scene.trait("widow") * _smoothstep((0.12 - cap) * 3.5), dark)
    ring = _length(nose_u * 1.45, (nose_v - 0.22) * 1.3) + ragged
    _paint(coat, scene.trait("mask") * _smoothstep((dice.roll(0.95, 1.25) - ring) * 1.8), dark)
    cheek = nose_v - 0.33 + 0.42 * np.abs(side_u - 0.42) + ragged
    bridge = _smoothstep((side_u - 0.10) * 7.0 - 3.0 * np.maximum(0.2 - nose_v, 0.0))
    bridge = np.maximum(bridge, _smoothstep((nose_v - 0.65) * 4.0))
    _paint(coat, scene.trait("face") * _smoothstep(cheek * 4.0 + 0.35) * bridge, pale)
    brow = _ellipse(np.abs(eye_u) - 0.29, eye_v + 0.37, 0.15, 0.10) + 0.5 * ragged
    _paint(coat, scene.trait("brows") * _inside(brow, 0.12), pale)

    soft = 2.0 * pixel
    patch_x, patch_y = dice.roll(0.0, 8.0), dice.roll(0.0, 8.0)
    patch = _value_noise(dice.lattices["patch"], u * 1.25 + patch_x, v * 1.25 + patch_y)
    eye_side = 2.0 * dice.happens(0.5) - 1.0
    around_eye = _inside(_length(eye_u - eye_side * 0.45, eye_v + 0.15) - 0.38, 0.35)
    patch = patch + 0.45 * around_eye - 0.55 * _inside(side_u - 0.16, 0.25) * _smoothstep(nose_v + 0.7)
    second = _value_noise(dice.lattices["patch"], u * 0.9 + patch_y, v * 0.9 + patch_x)
    patch_colour = dark + (_smoothstep((second - 0.45) * 9.0) * dice.happens(0.5))[:, None] * (
        _rgb(0.80, 0.48, 0.22) - dark
    )
    _paint(coat, scene.trait("patch") * _inside(0.56 - patch + 0.4 * ragged, 0.09), patch_colour)

    # Blaze: a pale stripe that widens from the forehead to the muzzle.
    half = dice.roll(0.03, 0.12) + dice.roll(0.30, 0.60) * _smoothstep((nose_v + 0.15) * 1.1)
    reach = _smoothstep((nose_v + dice.roll(0.45, 0.95)) * 4.0)
    blaze = _inside(side_u - half + 0.5 * ragged + 0.12 * scene.blotch, soft) * reach
    _paint(coat, scene.trait("blaze") * dice.happens(0.85) * blaze, pale)

    # Tabby: upright lines on the forehead, sideways lines on cheeks and body.
    warp = 0.9 * scene.blotch + 0.35 * scene.mottle
    upright = _wave(eye_u * (3.1 + 0.9 * eye_v) + 0.5 + 0.45 * warp)
    upright = upright * _smoothstep((-0.22 - eye_v) * 5.0) * _smoothstep((0.68 - np.abs(eye_u)) * 5.0)
    sideways = _wave(v * 2.7 - 1.1 * np.abs(u) + 0.3 + 0.6 * warp)
    sideways = sideways * _smoothstep((np.abs(eye_u) - 0.55) * 5.0) * _smoothstep((v + 0.15) * 5.0)
    tabby = _smoothstep((np.maximum(upright, sideways) + 1.1 * ragged - 0.30) * 2.6)
    _paint(coat, scene.trait("tabby") * dice.roll(0.65, 1.0) * tabby, dark)

    # Tiger: short bars curving over the forehead and around the cheeks, each with its own length.
    arc = _length(eye_u, eye_v - 0.30)
    beat = 3.7 * arc + 0.9 * warp + dice.roll(0.0, 1.0)
    # The bars of one ring share a number, which shifts where along the ring they start and stop.
    ring_number = np.floor(beat)
    swing = eye_u / (np.abs(eye_u) + np.abs(eye_v - 0.30) + 0.05)
    gaps = _wave(swing * 2.6 + 0.37 * ring_number + 0.5 * scene.mottle)
    bar = _wave(beat) - 0.42 - 0.45 * (1.0 - gaps) + 0.5 * ragged
    band = _smoothstep((arc - 0.60) * 8.0)
    band = band * _smoothstep((np.abs(eye_u) - 0.28 + np.maximum(-eye_v, 0.0)) * 6.0)
    _paint(coat, scene.trait("tiger") * _smoothstep(bar * 4.0) * band, dark)

    # Spots: one per cell of a staggered grid, small enough to stay inside its cell.
    cells = 1.0 / (scene.trait("spot_size") * dice.roll(0.42, 0.52))
    row = np.floor(v * cells)
    column_u = u * cells + 0.5 * (row - 2.0 * np.floor(row * 0.5))
    column = np.floor(column_u)
    lattice, side = dice.lattices["clump"], _LATTICES["clump"]
    offset = (np.arange(len(lattice)) * (side * side))[:, None, None]
    cell = offset + (row.astype(np.int64) & (side - 1)) * side
    place = column.astype(np.int64)
    shift_u, shift_v, grow = (np.take(lattice, cell + ((place + k) & (side - 1))) for k in (0, 17, 29))
    spot = _length(column_u - column - 0.30 - 0.40 * shift_u, v * cells - row - 0.30 - 0.40 * shift_v)
    spot = (spot - 0.14 - 0.16 * grow + 0.35 * ragged) / cells
    clear = _smoothstep((_length(nose_u, nose_v - 0.45) - 0.38) * 6.0)
    _paint(coat, scene.trait("spots") * _inside(spot, soft) * clear, dark)

    tear = np.abs(np.abs(eye_u) - 0.27 - 0.10 * eye_v) - 0.030
    span = _smoothstep((eye_v + 0.02) * 6.0) * _smoothstep((0.62 - eye_v) * 6.0)
    _paint(coat, scene.trait("tear") * _inside(tear, soft) * span, dark)

    pad_u, pad_v, pad_a, pad_b = scene.traits["pad"]
    pale_muzzle = _blend_union(
        _ellipse(side_u - 0.9 * pad_u, nose_v - pad_v, 1.15 * pad_a, 1.2 * pad_b),
        _ellipse(nose_u, nose_v - scene.traits["chin"][2], scene.traits["chin"][0], scene.traits["chin"][1]),
        0.12,
    )
    pale_muzzle = scene.trait("muzzle") * _inside(pale_muzzle + 0.4 * ragged, 0.14)
    _paint(coat, dice.roll(0.75, 1.0) * pale_muzzle, pale)

    hair = dice.roll(0.35, 1.0) * (0.75 * scene.fine + 0.65 * scene.clump)
    coat = coat * (1.0 + hair)[:, None] + (0.16 * hair)[:, None]
    return coat, dark


def _head_distance(scene: _Scene) -> np.ndarray:
    u, v = scene.u, scene.v
    skull, cheek, snout = (scene.jitter(name, 0.05) for name in ("skull", "cheek", "snout"))
    distance = _ellipse(u, v, skull[0], skull[1])
    cheeks = _ellipse(u - 0.05 * scene.yaw, v - cheek[2], cheek[0], cheek[1])
    distance = _blend_union(distance, cheeks, 0.18)
    snouts = _ellipse(u - 0.18 * scene.yaw, v - 0.07 * scene.pitch - snout[2], snout[0], snout[1])
    return _blend_union(distance, snouts, 0.16)


def _paint_body(canvas: np.ndarray, scene: _Scene, coat: np.ndarray) -> None:
    lean = scene.dice.roll(-0.35, 0.35)
    body = _ellipse(scene.u - lean, scene.v - 1.75, scene.dice.roll(0.95, 1.35), scene.dice.roll(1.0, 1.3))
    neck = _ellipse(scene.u - 0.4 * lean, scene.v - 0.75, scene.dice.roll(0.60, 0.82), 0.85)
    body = _blend_union(body, neck, 0.25) + 0.20 * scene.clump + 0.06 * scene.fine
    under_chin = _inside(_ellipse(scene.u - 0.1 * scene.yaw, scene.v - 0.62, 0.95, 0.78), 0.7)
    light = 0.92 - 0.38 * under_chin + 0.16 * scene.light_x * scene.u
    _paint(canvas, _inside(body, 1.6 * scene.pixel), coat * light[:, None])


def _paint_mane(canvas: np.ndarray, scene: _Scene, dark: np.ndarray) -> None:
    base = _colour(scene.traits["base"])
    ruff = _ellipse(scene.u, scene.v - 0.20, scene.dice.roll(1.25, 1.45), scene.dice.roll(1.25, 1.5))
    hair = 1.0 * scene.clump + 0.4 * scene.fine + 0.4 * scene.blotch
    inner = _smoothstep((_length(scene.u, scene.v - 0.1) - 0.75) * 1.7)
    colour = (0.60 * base + 0.40 * dark) + (0.75 * inner)[:, None] * (0.9 * dark - 0.60 * base)
    colour = colour * (1.0 + 1.5 * hair + 0.15 * scene.light_x * scene.u)[:, None]
    _paint(canvas, scene.trait("mane") * _inside(ruff + 0.35 * hair, 4.0 * scene.pixel), colour)


def _paint_ears(canvas: np.ndarray, scene: _Scene, coat: np.ndarray, dark: np.ndarray) -> None:
    dice, u, v = scene.dice, scene.ear_u, scene.ear_v
    ear_u, ear_v, length, half = scene.jitter("ear", 0.05)
    sign = np.where(u > 0.0, 1.0, -1.0)
    lean = scene.trait("ear_lean") + dice.roll(-0.07, 0.07) + sign * dice.roll(-0.06, 0.06)
    cos, sin = _rotation(0.5 * lean)
    side = np.abs(u) - ear_u
    along = (side * sin - (v - ear_v) * cos) / length  # 0 at the base, 1 at the tip
    across = side * cos + (v - ear_v) * sin
    pointed = (np.abs(across) - half * (1.0 - along) * (1.0 + 0.6 * along)) * 0.85
    pointed = np.maximum(pointed, (-0.5 - along) * length)
    rounded = _ellipse(across, (along - 0.35) * length, half, 0.65 * length)
    ear = pointed + scene.trait("ear_round") * (rounded - pointed)
    shown = 1.0 - scene.trait("flop")
    edge = ear + 0.16 * scene.clump + 0.06 * scene.fine
    light = 0.84 + 0.14 * scene.light_x * u
    _paint(canvas, shown * _inside(edge, 1.3 * scene.pixel), coat * light[:, None])
    tip = scene.trait("dark_ear") * _smoothstep(along * 1.5) * shown
    _paint(canvas, tip * _inside(edge, 1.3 * scene.pixel), dark * (1.0 + 1.2 * scene.fine)[:, None])
    # The hollow of the ear: pink or dusky skin, deepest towards the head, crossed by pale tufts.
    flesh = 0.5 * _colour(scene.traits["pale"]) + _rgb(0.22, 0.08, 0.07)
    depth = (0.62 + 0.45 * _smoothstep(along) + 1.4 * scene.clump)[:, None]
    hollow = _inside(ear + 0.10 + 0.3 * scene.clump, 0.09) * _smoothstep(along * 3.0 + 0.5)
    _paint(canvas, shown * 0.85 * hollow, flesh * depth)


def _paint_head(canvas: np.ndarray, scene: _Scene, coat: np.ndarray, head: np.ndarray) -> None:
    u, v = scene.u, scene.v
    # A dome lit from above: brightest towards the light, darker where the surface turns away.
    dome = _smoothstep(-head * 1.9)
    light = 0.78 + 0.26 * dome + 0.20 * (scene.light_x * u + scene.light_y * v) * (1.0 - 0.4 * dome)
    snout = _ellipse(scene.nose_u, scene.nose_v - 0.50, 0.42, 0.46)
    light = light + 0.10 * _inside(snout, 0.5) - 0.10 * _inside(np.abs(snout) - 0.02, 0.2)
    crease = np.abs(np.abs(scene.nose_u) - 0.17) - 0.02
    light = light - 0.10 * _inside(crease, 0.16) * _inside(np.abs(scene.nose_v - 0.12) - 0.15, 0.3)
    edge = head + 0.16 * scene.clump + 0.06 * scene.fine
    _shade(canvas, 1.0 - 0.28 * _inside(head - 0.06, 0.28))
    _paint(canvas, _inside(edge, 1.4 * scene.pixel), coat * light[:, None])


def _paint_eyes(canvas: np.ndarray, scene: _Scene) -> None:
    dice, u, v, pixel = scene.dice, scene.eye_u, scene.eye_v, scene.pixel
    eye_u, eye_v, half_a, half_b = scene.jitter("eye", 0.07)
    half_b = half_b * dice.roll(0.78, 1.12)
    side = np.where(u > 0.0, 1.0, -1.0)
    cos, sin = _rotation(0.5 * (scene.trait("eye_slant") + dice.roll(-0.06, 0.06)))
    a = (np.abs(u) - eye_u) / (1.0 - 0.16 * scene.yaw * side)
    b = v - eye_v
    a, b = a * cos - b * sin, a * sin + b * cos
    # An almond is the overlap of two discs of radius rho, one per lid.
    rho = (half_a * half_a + half_b * half_b) / (2.0 * half_b)
    almond = _length(a, np.abs(b) + rho - half_b) - rho

    _shade(canvas, 1.0 - 0.30 * _inside(almond - 0.04, 0.26))
    lid = _rgb(0.07, 0.055, 0.05)
    corner = _length(a + 1.05 * half_a, b - 0.25 * half_b) - 0.035
    _paint(canvas, 0.9 * _inside(np.minimum(almond - 0.038, corner), 1.2 * pixel), lid)

    other_iris = np.array(_IRISES)[dice.choose(len(_IRISES))][:, :, None, None]  # [N, 3, 1, 1]
    mixed = dice.roll() < scene.trait("iris_mix")
    iris = np.where(mixed[:, None], other_iris, _colour(scene.traits["iris"]))  # [N, 3, 1, 1]
    iris = iris * _colour([dice.roll(0.88, 1.12) for _ in range(3)])
    gaze_u, gaze_v = dice.roll(-0.03, 0.03), dice.roll(-0.02, 0.02)
    ball_a, ball_b = a - side * gaze_u, b - gaze_v
    rays = 0.72 + 0.36 * _smoothstep(0.5 + ball_b / (1.6 * half_b)) + 0.8 * scene.fine
    limb = 1.0 - 0.45 * _inside(-(_length(ball_a, ball_b) - 0.85 * half_a), 0.06)
    eye = _inside(almond, pixel)
    _paint(canvas, eye, iris * (rays * limb)[:, None])
    slit, tall = scene.traits["pupil"]
    dilation = dice.roll(0.0, 0.9)
    pupil = _ellipse(ball_a, ball_b, slit + (tall - slit) * dilation * dilation, tall)
    _paint(canvas, eye * _inside(pupil, pixel), _rgb(0.03, 0.03, 0.035))
    lid_shadow = _inside(b + 0.62 * half_b, 0.6 * half_b)
    _shade(canvas, 1.0 - 0.35 * eye * lid_shadow)

    # Catch-lights sit on the same side in both eyes, so they are not mirrored.
    light_u = np.where(scene.light_x > 0.0, 1.0, -1.0) * 0.26 * half_a
    spark = _length(a * side - light_u, b + 0.34 * half_b) - dice.roll(0.032, 0.050)
    _paint(canvas, 0.95 * eye * _inside(spark, 1.1 * pixel), _rgb(1.0, 1.0, 1.0))
    glow = _length(a * side + 1.1 * light_u, b - 0.45 * half_b) - 0.03
    _paint(canvas, 0.35 * eye * _inside(glow, 1.4 * pixel), _rgb(0.85, 0.90, 1.0))


def _paint_muzzle(canvas: np.ndarray, scene: _Scene) -> None:
    dice, u, v, pixel = scene.dice, scene.nose_u, scene.nose_v, scene.pixel
    side = np.abs(u)
    pad_u, pad_v, pad_a, pad_b = scene.traits["pad"]
    chin_a, chin_b, chin_v = scene.traits["chin"]
    nose_a, nose_b, nose_v = scene.jitter("nose", 0.07)
    skin = _colour(scene.traits["skin"])
    shadow = _rgb(0.10, 0.06, 0.06)

    # Two pads and a chin, each lit from above and dark underneath.
    pads = _ellipse(side - pad_u, v - pad_v, pad_a, pad_b)
    chin = _ellipse(u, v - chin_v, chin_a, chin_b)
    puff = _inside(pads, 0.16)
    _shade(canvas, 1.0 + puff * (0.07 - 0.9 * (v - pad_v) * puff))
    _shade(canvas, 1.0 - 0.24 * _inside(np.abs(chin) - 0.01, 0.10) * _smoothstep((v - chin_v) * 6.0 + 0.3))

    # Mouth: two arcs hanging from the foot of the nose; some dogs pant.
    open_mouth = dice.happens(0.45) * scene.trait("flop")
    line_v = pad_v + 0.55 * pad_b
    hang = _ellipse(side - 0.95 * pad_u, v - line_v, 0.95 * pad_u, 0.62 * pad_b)
    below = _smoothstep((v - line_v) * 10.0 + 0.2)
    gape = dice.roll(0.12, 0.20)
    cavity = _ellipse(u, v - line_v - 0.60 * gape - 0.05, 1.15 * pad_u, gape + 0.05)
    cavity = np.maximum(cavity, 0.55 * pad_b * 0.6 - (v - line_v) - 0.25 * side)
    _paint(canvas, open_mouth * _inside(cavity, 1.2 * pixel), shadow)
    tongue = _ellipse(u - dice.roll(-0.06, 0.06), v - line_v - gape - 0.06, 0.62 * pad_u, 0.95 * gape)
    tongue = np.maximum(tongue, 0.40 * pad_b - (v - line_v))
    pink = _rgb(0.86, 0.42, 0.46)
    groove = 1.0 - 0.25 * _inside(np.abs(u) - 0.01, 2.0 * pixel)
    _paint(canvas, open_mouth * _inside(tongue, 1.2 * pixel), pink * groove[:, None])
    _paint(canvas, 0.72 * below * _inside(np.abs(hang) - 0.012, 1.3 * pixel), shadow)
    groove = np.maximum(side - 0.008, np.maximum(nose_v + 0.5 * nose_b - v, v - line_v - 0.05))
    _paint(canvas, 0.65 * _inside(groove, 1.4 * pixel), shadow)

    # Nose: an ellipse that narrows downwards, with nostrils and a wet highlight.
    taper = u * (1.0 + 0.42 * (v - nose_v) / nose_b)
    nose = _ellipse(taper, v - nose_v, nose_a, nose_b)
    _shade(canvas, 1.0 - 0.22 * _inside(nose - 0.02, 0.12))
    gloss = (1.0 - 0.35 * (v - nose_v) / nose_b)[:, None]
    _paint(canvas, _inside(nose, 1.1 * pixel), skin * gloss)
    nostril = _ellipse(side - 0.52 * nose_a, v - nose_v - 0.25 * nose_b, 0.26 * nose_a, 0.24 * nose_b)
    _paint(canvas, 0.8 * _inside(nostril, pixel), 0.3 * skin)
    wet_u, wet_v = u - 0.15 * nose_a * scene.light_x, v - nose_v + 0.48 * nose_b
    wet = _ellipse(wet_u, wet_v, 0.38 * nose_a, 0.16 * nose_b)
    _paint(canvas, 0.45 * _inside(wet, 1.3 * pixel), _rgb(0.92, 0.93, 0.97))

    # Follicles: rows of dark dots on the pads.
    dot_u, dot_v = (side - pad_u) * 11.0, (v - pad_v) * 11.0 + 0.4 * side
    dot_u, dot_v = dot_u - np.floor(dot_u) - 0.5, dot_v - np.floor(dot_v) - 0.5
    dots = (_length(dot_u, dot_v) - 0.22) * (1.0 / 11.0)
    dots = _inside(dots, pixel) * _inside(pads + 0.07, 0.06)
    _shade(canvas, 1.0 - 0.20 * dots)


def _paint_flop_ears(canvas: np.ndarray, scene: _Scene, coat: np.ndarray, dark: np.ndarray) -> None:
    dice, u, v = scene.dice, scene.ear_u, scene.ear_v
    ear_u, ear_v, length, half = scene.jitter("ear", 0.10)
    sign = np.where(u > 0.0, 1.0, -1.0)
    cos, sin = _rotation(0.5 * (dice.roll(-0.05, 0.45) + sign * dice.roll(-0.10, 0.10)))
    side, down = np.abs(u) - ear_u, v - ear_v
    along = (side * sin + down * cos) / length  # 0 at the root, 1 at the tip
    across = side * cos - down * sin
    width = half * (0.80 + 0.35 * _smoothstep(along))
    ear = _ellipse(across + 0.05, (along - 0.42) * length, width, 0.56 * length)
    shown = scene.trait("flop")
    _shade(canvas, 1.0 - 0.35 * shown * _inside(ear - 0.05, 0.20))
    mask = shown * _inside(ear + 0.14 * scene.clump + 0.05 * scene.fine, 1.4 * scene.pixel)
    dark_hair = dark * (1.0 + 1.3 * scene.clump)[:, None]
    colour = coat + (0.9 * scene.trait("dark_ear"))[:, None] * (dark_hair - coat)
    fold = _smoothstep(-ear * 3.5)
    light = 0.66 + 0.26 * fold + 0.14 * scene.light_x * u - 0.18 * _smoothstep(along - 0.3)
    _paint(canvas, mask, colour * light[:, None])


def _paint_whiskers(canvas: np.ndarray, scene: _Scene) -> None:
    dice, u, v, pixel = scene.dice, scene.nose_u, scene.nose_v, scene.pixel
    sign = np.where(u > 0.0, 1.0, -1.0)
    pad_u, pad_v = scene.traits["pad"][:2]
    out = np.abs(u) - pad_u
    strength = scene.trait("whisker") * dice.roll(0.5, 1.1)
    white = _rgb(0.97, 0.96, 0.93)
    mask = 0.0
    for k in range(4):
        slope = dice.roll(-0.10, 0.10) + 0.18 * (k - 1.5) + sign * dice.roll(-0.07, 0.07)
        curve = dice.roll(-0.05, 0.22)
        height = pad_v + 0.045 * (k - 1.5) + out * (slope + curve * out)
        line = np.abs(v - height) - 0.006
        fade = _smoothstep((out - 0.02) * 8.0) * _smoothstep((dice.roll(0.75, 1.15) - out) * 2.5)
        mask = np.maximum(mask, _inside(line, 1.1 * pixel) * fade)
    _paint(canvas, np.minimum(strength, 0.85) * mask, white)


def _expose(canvas: np.ndarray, scene: _Scene) -> np.ndarray:
    dice = scene.dice
    gain = dice.roll(0.82, 1.18)
    corner = scene.x * scene.x + scene.y * scene.y
    sweep = 1.0 + 0.14 * (scene.light_x * scene.x + scene.light_y * scene.y)
    _shade(canvas, gain * sweep * (1.0 - dice.roll(0.0, 0.13) * corner))
    noise = _value_noise(dice.lattices["grain"], scene.x * 32.0 + 31.5, scene.y * 32.0 + 31.5) - 0.5
    canvas += (dice.roll(0.01, 0.06) * noise)[:, None]
    # A gentle S-curve between straight and full contrast.
    clipped = np.minimum(np.maximum(canvas, 0.0), 1.0)
    return clipped + dice.roll(0.0, 0.8)[:, None] * (_smoothstep(clipped) - clipped)
