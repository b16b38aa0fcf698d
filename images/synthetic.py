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

from images.breeds import BREEDS, DEFAULTS, IRISES, SHAPES
from images.classes import Classes
from images.drawing import (
    blend_union,
    box_mean,
    colour_of,
    ellipse,
    inside,
    length_of,
    paint,
    rgb,
    rotation,
    shade,
    smoothstep,
    strands,
    value_noise,
    wave,
)

SYNTHETIC_CLASSES = ("cat", "dog", "wild")

_STREAM = 0x4C494654  # Keeps these streams apart from any other use of small integer seeds.
_CHUNK_PIXELS = 8 * 64 * 64  # Eight 64x64 images keep the working planes inside the processor cache.
_NUM_UNIFORMS = 128  # Scalar draws per image; the painters use nearly all of them.
# Nodes per side of each noise lattice: powers of two, so that a bit mask wraps coordinates.
_LATTICES = {"fur": 64, "clump": 64, "mottle": 32, "patch": 8, "backdrop": 8, "grain": 64}

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


def synthetic_classes(num_images: int) -> tuple[Classes, ...]:
    """The way in which the first so many images are divided into classes: by animal."""
    return (Classes("animal", SYNTHETIC_CLASSES, np.array([synthetic_label(i) for i in range(num_images)], np.int64)),)


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
        canvas = box_mean(canvas, factor)  # [N, 3, R, R]
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
        breed = BREEDS[name][int(value * len(BREEDS[name]))]
        rows.append({**DEFAULTS, **SHAPES[name], **breed})
    traits = {}
    for key in rows[0]:
        table = np.array([row[key] for row in rows], dtype=np.float64).reshape(len(rows), -1)
        traits[key] = [table[:, k, None, None] for k in range(table.shape[1])]  # each [N, 1, 1]
    return traits


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
        cos, sin = rotation(tilt * (0.05 + 0.10 * tilt * tilt))
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
        flow = 1.0 / (length_of(hair_u, hair_v) + 0.05)
        flow_x = (hair_u * cos - hair_v * sin) * flow
        flow_y = (hair_v * cos + hair_u * sin) * flow
        bend = value_noise(dice.lattices["mottle"], self.x * 3.0 + 7.0, self.y * 3.0 + 7.0) - 0.5
        flow_x, flow_y = flow_x - bend * flow_y, flow_y + bend * flow_x
        grid_x, grid_y = self.x * 0.5 + 0.5, self.y * 0.5 + 0.5
        self.fine = strands(dice.lattices["fur"], grid_x * 68.0, grid_y * 68.0, flow_x, flow_y)
        self.clump = strands(dice.lattices["clump"], grid_x * 40.0, grid_y * 40.0, flow_x, flow_y)
        self.mottle = value_noise(dice.lattices["mottle"], self.u * 4.5 + 11.0, self.v * 4.5 + 13.0) - 0.5
        self.blotch = value_noise(dice.lattices["mottle"], self.u * 1.9 + 3.0, self.v * 1.9 + 5.0) - 0.5

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
    first = pairs[:, 0, :, None, None] + colour_of([dice.roll(-0.08, 0.08) for _ in range(3)])
    second = pairs[:, 1, :, None, None] + colour_of([dice.roll(-0.08, 0.08) for _ in range(3)])
    backdrop, offset_x, offset_y = dice.lattices["backdrop"], dice.roll(0.0, 6.0), dice.roll(0.0, 6.0)
    cloud = value_noise(backdrop, x * 1.1 + offset_x, y * 1.1 + offset_y) - 0.5
    detail = value_noise(dice.lattices["mottle"], x * 4.0 + offset_y, y * 4.0 + offset_x) - 0.5
    ramp = 0.5 + 0.35 * (dice.roll(-1.0, 1.0) * x + dice.roll(-1.0, 1.0) * y) + 0.9 * cloud + 0.25 * detail
    canvas = first + smoothstep(ramp)[:, None] * (second - first)  # [N, 3, P, P]
    for _ in range(2):
        radius = dice.roll(0.15, 0.5)
        disc = length_of(x - dice.roll(-1.1, 1.1), y - dice.roll(-1.1, 0.4)) - radius
        strength = dice.roll(0.0, 0.5) * inside(disc, 0.16)
        paint(canvas, strength, second + colour_of([dice.roll(-0.22, 0.28) for _ in range(3)]))
    # A shelf or wall edge behind some heads gives the background a straight, slightly blurred contour.
    edge = y + dice.roll(-0.3, 0.3) * x - dice.roll(-0.7, 0.7)
    shade(canvas, 1.0 - dice.happens(0.4) * dice.roll(0.2, 0.5) * inside(-edge, 0.10))
    return canvas


def _coat(scene: _Scene) -> tuple[np.ndarray, np.ndarray]:
    dice, u, v, pixel = scene.dice, scene.u, scene.v, scene.pixel
    nose_u, nose_v, eye_u, eye_v = scene.nose_u, scene.nose_v, scene.eye_u, scene.eye_v
    side_u = np.abs(nose_u)
    tone, warmth = dice.roll(0.86, 1.12), dice.roll(-0.07, 0.07)
    tint = colour_of([tone * (1.0 + warmth), tone, tone * (1.0 - warmth)])
    base, dark, pale = (colour_of(scene.traits[name]) * tint for name in ("base", "dark", "pale"))

    coat = base * (1.0 + 0.22 * scene.blotch + 0.16 * scene.mottle)[:, None]  # [N, 3, P, P]
    # The back of the head is darker than the face, and the chest is paler.
    paint(coat, 0.35 * smoothstep((-0.15 - v) * 0.9), 0.7 * base + 0.3 * dark)
    paint(coat, 0.5 * smoothstep((v - 0.85) * 1.6) * inside(np.abs(u) - 0.45, 0.5), pale)

    # Markings, softest first; `ragged` breaks their contours into locks of hair.
    ragged = 0.45 * scene.clump + 0.08 * scene.mottle
    cap = 0.05 + 0.5 * np.abs(eye_u) + eye_v + ragged
    paint(coat, scene.trait("widow") * smoothstep((0.12 - cap) * 3.5), dark)
    ring = length_of(nose_u * 1.45, (nose_v - 0.22) * 1.3) + ragged
    paint(coat, scene.trait("mask") * smoothstep((dice.roll(0.95, 1.25) - ring) * 1.8), dark)
    cheek = nose_v - 0.33 + 0.42 * np.abs(side_u - 0.42) + ragged
    bridge = smoothstep((side_u - 0.10) * 7.0 - 3.0 * np.maximum(0.2 - nose_v, 0.0))
    bridge = np.maximum(bridge, smoothstep((nose_v - 0.65) * 4.0))
    paint(coat, scene.trait("face") * smoothstep(cheek * 4.0 + 0.35) * bridge, pale)
    brow = ellipse(np.abs(eye_u) - 0.29, eye_v + 0.37, 0.15, 0.10) + 0.5 * ragged
    paint(coat, scene.trait("brows") * inside(brow, 0.12), pale)

    soft = 2.0 * pixel
    patch_x, patch_y = dice.roll(0.0, 8.0), dice.roll(0.0, 8.0)
    patch = value_noise(dice.lattices["patch"], u * 1.25 + patch_x, v * 1.25 + patch_y)
    eye_side = 2.0 * dice.happens(0.5) - 1.0
    around_eye = inside(length_of(eye_u - eye_side * 0.45, eye_v + 0.15) - 0.38, 0.35)
    patch = patch + 0.45 * around_eye - 0.55 * inside(side_u - 0.16, 0.25) * smoothstep(nose_v + 0.7)
    second = value_noise(dice.lattices["patch"], u * 0.9 + patch_y, v * 0.9 + patch_x)
    patch_colour = dark + (smoothstep((second - 0.45) * 9.0) * dice.happens(0.5))[:, None] * (
        rgb(0.80, 0.48, 0.22) - dark
    )
    paint(coat, scene.trait("patch") * inside(0.56 - patch + 0.4 * ragged, 0.09), patch_colour)

    # Blaze: a pale stripe that widens from the forehead to the muzzle.
    half = dice.roll(0.03, 0.12) + dice.roll(0.30, 0.60) * smoothstep((nose_v + 0.15) * 1.1)
    reach = smoothstep((nose_v + dice.roll(0.45, 0.95)) * 4.0)
    blaze = inside(side_u - half + 0.5 * ragged + 0.12 * scene.blotch, soft) * reach
    paint(coat, scene.trait("blaze") * dice.happens(0.85) * blaze, pale)

    # Tabby: upright lines on the forehead, sideways lines on cheeks and body.
    warp = 0.9 * scene.blotch + 0.35 * scene.mottle
    upright = wave(eye_u * (3.1 + 0.9 * eye_v) + 0.5 + 0.45 * warp)
    upright = upright * smoothstep((-0.22 - eye_v) * 5.0) * smoothstep((0.68 - np.abs(eye_u)) * 5.0)
    sideways = wave(v * 2.7 - 1.1 * np.abs(u) + 0.3 + 0.6 * warp)
    sideways = sideways * smoothstep((np.abs(eye_u) - 0.55) * 5.0) * smoothstep((v + 0.15) * 5.0)
    tabby = smoothstep((np.maximum(upright, sideways) + 1.1 * ragged - 0.30) * 2.6)
    paint(coat, scene.trait("tabby") * dice.roll(0.65, 1.0) * tabby, dark)

    # Tiger: short bars curving over the forehead and around the cheeks, each with its own length.
    arc = length_of(eye_u, eye_v - 0.30)
    beat = 3.7 * arc + 0.9 * warp + dice.roll(0.0, 1.0)
    # The bars of one ring share a number, which shifts where along the ring they start and stop.
    ring_number = np.floor(beat)
    swing = eye_u / (np.abs(eye_u) + np.abs(eye_v - 0.30) + 0.05)
    gaps = wave(swing * 2.6 + 0.37 * ring_number + 0.5 * scene.mottle)
    bar = wave(beat) - 0.42 - 0.45 * (1.0 - gaps) + 0.5 * ragged
    band = smoothstep((arc - 0.60) * 8.0)
    band = band * smoothstep((np.abs(eye_u) - 0.28 + np.maximum(-eye_v, 0.0)) * 6.0)
    paint(coat, scene.trait("tiger") * smoothstep(bar * 4.0) * band, dark)

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
    spot = length_of(column_u - column - 0.30 - 0.40 * shift_u, v * cells - row - 0.30 - 0.40 * shift_v)
    spot = (spot - 0.14 - 0.16 * grow + 0.35 * ragged) / cells
    clear = smoothstep((length_of(nose_u, nose_v - 0.45) - 0.38) * 6.0)
    paint(coat, scene.trait("spots") * inside(spot, soft) * clear, dark)

    tear = np.abs(np.abs(eye_u) - 0.27 - 0.10 * eye_v) - 0.030
    span = smoothstep((eye_v + 0.02) * 6.0) * smoothstep((0.62 - eye_v) * 6.0)
    paint(coat, scene.trait("tear") * inside(tear, soft) * span, dark)

    pad_u, pad_v, pad_a, pad_b = scene.traits["pad"]
    pale_muzzle = blend_union(
        ellipse(side_u - 0.9 * pad_u, nose_v - pad_v, 1.15 * pad_a, 1.2 * pad_b),
        ellipse(nose_u, nose_v - scene.traits["chin"][2], scene.traits["chin"][0], scene.traits["chin"][1]),
        0.12,
    )
    pale_muzzle = scene.trait("muzzle") * inside(pale_muzzle + 0.4 * ragged, 0.14)
    paint(coat, dice.roll(0.75, 1.0) * pale_muzzle, pale)

    hair = dice.roll(0.35, 1.0) * (0.75 * scene.fine + 0.65 * scene.clump)
    coat = coat * (1.0 + hair)[:, None] + (0.16 * hair)[:, None]
    return coat, dark


def _head_distance(scene: _Scene) -> np.ndarray:
    u, v = scene.u, scene.v
    skull, cheek, snout = (scene.jitter(name, 0.05) for name in ("skull", "cheek", "snout"))
    distance = ellipse(u, v, skull[0], skull[1])
    cheeks = ellipse(u - 0.05 * scene.yaw, v - cheek[2], cheek[0], cheek[1])
    distance = blend_union(distance, cheeks, 0.18)
    snouts = ellipse(u - 0.18 * scene.yaw, v - 0.07 * scene.pitch - snout[2], snout[0], snout[1])
    return blend_union(distance, snouts, 0.16)


def _paint_body(canvas: np.ndarray, scene: _Scene, coat: np.ndarray) -> None:
    lean = scene.dice.roll(-0.35, 0.35)
    body = ellipse(scene.u - lean, scene.v - 1.75, scene.dice.roll(0.95, 1.35), scene.dice.roll(1.0, 1.3))
    neck = ellipse(scene.u - 0.4 * lean, scene.v - 0.75, scene.dice.roll(0.60, 0.82), 0.85)
    body = blend_union(body, neck, 0.25) + 0.20 * scene.clump + 0.06 * scene.fine
    under_chin = inside(ellipse(scene.u - 0.1 * scene.yaw, scene.v - 0.62, 0.95, 0.78), 0.7)
    light = 0.92 - 0.38 * under_chin + 0.16 * scene.light_x * scene.u
    paint(canvas, inside(body, 1.6 * scene.pixel), coat * light[:, None])


def _paint_mane(canvas: np.ndarray, scene: _Scene, dark: np.ndarray) -> None:
    base = colour_of(scene.traits["base"])
    ruff = ellipse(scene.u, scene.v - 0.20, scene.dice.roll(1.25, 1.45), scene.dice.roll(1.25, 1.5))
    hair = 1.0 * scene.clump + 0.4 * scene.fine + 0.4 * scene.blotch
    inner = smoothstep((length_of(scene.u, scene.v - 0.1) - 0.75) * 1.7)
    colour = (0.60 * base + 0.40 * dark) + (0.75 * inner)[:, None] * (0.9 * dark - 0.60 * base)
    colour = colour * (1.0 + 1.5 * hair + 0.15 * scene.light_x * scene.u)[:, None]
    paint(canvas, scene.trait("mane") * inside(ruff + 0.35 * hair, 4.0 * scene.pixel), colour)


def _paint_ears(canvas: np.ndarray, scene: _Scene, coat: np.ndarray, dark: np.ndarray) -> None:
    dice, u, v = scene.dice, scene.ear_u, scene.ear_v
    ear_u, ear_v, length, half = scene.jitter("ear", 0.05)
    sign = np.where(u > 0.0, 1.0, -1.0)
    lean = scene.trait("ear_lean") + dice.roll(-0.07, 0.07) + sign * dice.roll(-0.06, 0.06)
    cos, sin = rotation(0.5 * lean)
    side = np.abs(u) - ear_u
    along = (side * sin - (v - ear_v) * cos) / length  # 0 at the base, 1 at the tip
    across = side * cos + (v - ear_v) * sin
    pointed = (np.abs(across) - half * (1.0 - along) * (1.0 + 0.6 * along)) * 0.85
    pointed = np.maximum(pointed, (-0.5 - along) * length)
    rounded = ellipse(across, (along - 0.35) * length, half, 0.65 * length)
    ear = pointed + scene.trait("ear_round") * (rounded - pointed)
    shown = 1.0 - scene.trait("flop")
    edge = ear + 0.16 * scene.clump + 0.06 * scene.fine
    light = 0.84 + 0.14 * scene.light_x * u
    paint(canvas, shown * inside(edge, 1.3 * scene.pixel), coat * light[:, None])
    tip = scene.trait("dark_ear") * smoothstep(along * 1.5) * shown
    paint(canvas, tip * inside(edge, 1.3 * scene.pixel), dark * (1.0 + 1.2 * scene.fine)[:, None])
    # The hollow of the ear: pink or dusky skin, deepest towards the head, crossed by pale tufts.
    flesh = 0.5 * colour_of(scene.traits["pale"]) + rgb(0.22, 0.08, 0.07)
    depth = (0.62 + 0.45 * smoothstep(along) + 1.4 * scene.clump)[:, None]
    hollow = inside(ear + 0.10 + 0.3 * scene.clump, 0.09) * smoothstep(along * 3.0 + 0.5)
    paint(canvas, shown * 0.85 * hollow, flesh * depth)


def _paint_head(canvas: np.ndarray, scene: _Scene, coat: np.ndarray, head: np.ndarray) -> None:
    u, v = scene.u, scene.v
    # A dome lit from above: brightest towards the light, darker where the surface turns away.
    dome = smoothstep(-head * 1.9)
    light = 0.78 + 0.26 * dome + 0.20 * (scene.light_x * u + scene.light_y * v) * (1.0 - 0.4 * dome)
    snout = ellipse(scene.nose_u, scene.nose_v - 0.50, 0.42, 0.46)
    light = light + 0.10 * inside(snout, 0.5) - 0.10 * inside(np.abs(snout) - 0.02, 0.2)
    crease = np.abs(np.abs(scene.nose_u) - 0.17) - 0.02
    light = light - 0.10 * inside(crease, 0.16) * inside(np.abs(scene.nose_v - 0.12) - 0.15, 0.3)
    edge = head + 0.16 * scene.clump + 0.06 * scene.fine
    shade(canvas, 1.0 - 0.28 * inside(head - 0.06, 0.28))
    paint(canvas, inside(edge, 1.4 * scene.pixel), coat * light[:, None])


def _paint_eyes(canvas: np.ndarray, scene: _Scene) -> None:
    dice, u, v, pixel = scene.dice, scene.eye_u, scene.eye_v, scene.pixel
    eye_u, eye_v, half_a, half_b = scene.jitter("eye", 0.07)
    half_b = half_b * dice.roll(0.78, 1.12)
    side = np.where(u > 0.0, 1.0, -1.0)
    cos, sin = rotation(0.5 * (scene.trait("eye_slant") + dice.roll(-0.06, 0.06)))
    a = (np.abs(u) - eye_u) / (1.0 - 0.16 * scene.yaw * side)
    b = v - eye_v
    a, b = a * cos - b * sin, a * sin + b * cos
    # An almond is the overlap of two discs of radius rho, one per lid.
    rho = (half_a * half_a + half_b * half_b) / (2.0 * half_b)
    almond = length_of(a, np.abs(b) + rho - half_b) - rho

    shade(canvas, 1.0 - 0.30 * inside(almond - 0.04, 0.26))
    lid = rgb(0.07, 0.055, 0.05)
    corner = length_of(a + 1.05 * half_a, b - 0.25 * half_b) - 0.035
    paint(canvas, 0.9 * inside(np.minimum(almond - 0.038, corner), 1.2 * pixel), lid)

    other_iris = np.array(IRISES)[dice.choose(len(IRISES))][:, :, None, None]  # [N, 3, 1, 1]
    mixed = dice.roll() < scene.trait("iris_mix")
    iris = np.where(mixed[:, None], other_iris, colour_of(scene.traits["iris"]))  # [N, 3, 1, 1]
    iris = iris * colour_of([dice.roll(0.88, 1.12) for _ in range(3)])
    gaze_u, gaze_v = dice.roll(-0.03, 0.03), dice.roll(-0.02, 0.02)
    ball_a, ball_b = a - side * gaze_u, b - gaze_v
    rays = 0.72 + 0.36 * smoothstep(0.5 + ball_b / (1.6 * half_b)) + 0.8 * scene.fine
    limb = 1.0 - 0.45 * inside(-(length_of(ball_a, ball_b) - 0.85 * half_a), 0.06)
    eye = inside(almond, pixel)
    paint(canvas, eye, iris * (rays * limb)[:, None])
    slit, tall = scene.traits["pupil"]
    dilation = dice.roll(0.0, 0.9)
    pupil = ellipse(ball_a, ball_b, slit + (tall - slit) * dilation * dilation, tall)
    paint(canvas, eye * inside(pupil, pixel), rgb(0.03, 0.03, 0.035))
    lid_shadow = inside(b + 0.62 * half_b, 0.6 * half_b)
    shade(canvas, 1.0 - 0.35 * eye * lid_shadow)

    # Catch-lights sit on the same side in both eyes, so they are not mirrored.
    light_u = np.where(scene.light_x > 0.0, 1.0, -1.0) * 0.26 * half_a
    spark = length_of(a * side - light_u, b + 0.34 * half_b) - dice.roll(0.032, 0.050)
    paint(canvas, 0.95 * eye * inside(spark, 1.1 * pixel), rgb(1.0, 1.0, 1.0))
    glow = length_of(a * side + 1.1 * light_u, b - 0.45 * half_b) - 0.03
    paint(canvas, 0.35 * eye * inside(glow, 1.4 * pixel), rgb(0.85, 0.90, 1.0))


def _paint_muzzle(canvas: np.ndarray, scene: _Scene) -> None:
    dice, u, v, pixel = scene.dice, scene.nose_u, scene.nose_v, scene.pixel
    side = np.abs(u)
    pad_u, pad_v, pad_a, pad_b = scene.traits["pad"]
    chin_a, chin_b, chin_v = scene.traits["chin"]
    nose_a, nose_b, nose_v = scene.jitter("nose", 0.07)
    skin = colour_of(scene.traits["skin"])
    shadow = rgb(0.10, 0.06, 0.06)

    # Two pads and a chin, each lit from above and dark underneath.
    pads = ellipse(side - pad_u, v - pad_v, pad_a, pad_b)
    chin = ellipse(u, v - chin_v, chin_a, chin_b)
    puff = inside(pads, 0.16)
    shade(canvas, 1.0 + puff * (0.07 - 0.9 * (v - pad_v) * puff))
    shade(canvas, 1.0 - 0.24 * inside(np.abs(chin) - 0.01, 0.10) * smoothstep((v - chin_v) * 6.0 + 0.3))

    # Mouth: two arcs hanging from the foot of the nose; some dogs pant.
    open_mouth = dice.happens(0.45) * scene.trait("flop")
    line_v = pad_v + 0.55 * pad_b
    hang = ellipse(side - 0.95 * pad_u, v - line_v, 0.95 * pad_u, 0.62 * pad_b)
    below = smoothstep((v - line_v) * 10.0 + 0.2)
    gape = dice.roll(0.12, 0.20)
    cavity = ellipse(u, v - line_v - 0.60 * gape - 0.05, 1.15 * pad_u, gape + 0.05)
    cavity = np.maximum(cavity, 0.55 * pad_b * 0.6 - (v - line_v) - 0.25 * side)
    paint(canvas, open_mouth * inside(cavity, 1.2 * pixel), shadow)
    tongue = ellipse(u - dice.roll(-0.06, 0.06), v - line_v - gape - 0.06, 0.62 * pad_u, 0.95 * gape)
    tongue = np.maximum(tongue, 0.40 * pad_b - (v - line_v))
    pink = rgb(0.86, 0.42, 0.46)
    groove = 1.0 - 0.25 * inside(np.abs(u) - 0.01, 2.0 * pixel)
    paint(canvas, open_mouth * inside(tongue, 1.2 * pixel), pink * groove[:, None])
    paint(canvas, 0.72 * below * inside(np.abs(hang) - 0.012, 1.3 * pixel), shadow)
    groove = np.maximum(side - 0.008, np.maximum(nose_v + 0.5 * nose_b - v, v - line_v - 0.05))
    paint(canvas, 0.65 * inside(groove, 1.4 * pixel), shadow)

    # Nose: an ellipse that narrows downwards, with nostrils and a wet highlight.
    taper = u * (1.0 + 0.42 * (v - nose_v) / nose_b)
    nose = ellipse(taper, v - nose_v, nose_a, nose_b)
    shade(canvas, 1.0 - 0.22 * inside(nose - 0.02, 0.12))
    gloss = (1.0 - 0.35 * (v - nose_v) / nose_b)[:, None]
    paint(canvas, inside(nose, 1.1 * pixel), skin * gloss)
    nostril = ellipse(side - 0.52 * nose_a, v - nose_v - 0.25 * nose_b, 0.26 * nose_a, 0.24 * nose_b)
    paint(canvas, 0.8 * inside(nostril, pixel), 0.3 * skin)
    wet_u, wet_v = u - 0.15 * nose_a * scene.light_x, v - nose_v + 0.48 * nose_b
    wet = ellipse(wet_u, wet_v, 0.38 * nose_a, 0.16 * nose_b)
    paint(canvas, 0.45 * inside(wet, 1.3 * pixel), rgb(0.92, 0.93, 0.97))

    # Follicles: rows of dark dots on the pads.
    dot_u, dot_v = (side - pad_u) * 11.0, (v - pad_v) * 11.0 + 0.4 * side
    dot_u, dot_v = dot_u - np.floor(dot_u) - 0.5, dot_v - np.floor(dot_v) - 0.5
    dots = (length_of(dot_u, dot_v) - 0.22) * (1.0 / 11.0)
    dots = inside(dots, pixel) * inside(pads + 0.07, 0.06)
    shade(canvas, 1.0 - 0.20 * dots)


def _paint_flop_ears(canvas: np.ndarray, scene: _Scene, coat: np.ndarray, dark: np.ndarray) -> None:
    dice, u, v = scene.dice, scene.ear_u, scene.ear_v
    ear_u, ear_v, length, half = scene.jitter("ear", 0.10)
    sign = np.where(u > 0.0, 1.0, -1.0)
    cos, sin = rotation(0.5 * (dice.roll(-0.05, 0.45) + sign * dice.roll(-0.10, 0.10)))
    side, down = np.abs(u) - ear_u, v - ear_v
    along = (side * sin + down * cos) / length  # 0 at the root, 1 at the tip
    across = side * cos - down * sin
    width = half * (0.80 + 0.35 * smoothstep(along))
    ear = ellipse(across + 0.05, (along - 0.42) * length, width, 0.56 * length)
    shown = scene.trait("flop")
    shade(canvas, 1.0 - 0.35 * shown * inside(ear - 0.05, 0.20))
    mask = shown * inside(ear + 0.14 * scene.clump + 0.05 * scene.fine, 1.4 * scene.pixel)
    dark_hair = dark * (1.0 + 1.3 * scene.clump)[:, None]
    colour = coat + (0.9 * scene.trait("dark_ear"))[:, None] * (dark_hair - coat)
    fold = smoothstep(-ear * 3.5)
    light = 0.66 + 0.26 * fold + 0.14 * scene.light_x * u - 0.18 * smoothstep(along - 0.3)
    paint(canvas, mask, colour * light[:, None])


def _paint_whiskers(canvas: np.ndarray, scene: _Scene) -> None:
    dice, u, v, pixel = scene.dice, scene.nose_u, scene.nose_v, scene.pixel
    sign = np.where(u > 0.0, 1.0, -1.0)
    pad_u, pad_v = scene.traits["pad"][:2]
    out = np.abs(u) - pad_u
    strength = scene.trait("whisker") * dice.roll(0.5, 1.1)
    white = rgb(0.97, 0.96, 0.93)
    mask = 0.0
    for k in range(4):
        slope = dice.roll(-0.10, 0.10) + 0.18 * (k - 1.5) + sign * dice.roll(-0.07, 0.07)
        curve = dice.roll(-0.05, 0.22)
        height = pad_v + 0.045 * (k - 1.5) + out * (slope + curve * out)
        line = np.abs(v - height) - 0.006
        fade = smoothstep((out - 0.02) * 8.0) * smoothstep((dice.roll(0.75, 1.15) - out) * 2.5)
        mask = np.maximum(mask, inside(line, 1.1 * pixel) * fade)
    paint(canvas, np.minimum(strength, 0.85) * mask, white)


def _expose(canvas: np.ndarray, scene: _Scene) -> np.ndarray:
    dice = scene.dice
    gain = dice.roll(0.82, 1.18)
    corner = scene.x * scene.x + scene.y * scene.y
    sweep = 1.0 + 0.14 * (scene.light_x * scene.x + scene.light_y * scene.y)
    shade(canvas, gain * sweep * (1.0 - dice.roll(0.0, 0.13) * corner))
    noise = value_noise(dice.lattices["grain"], scene.x * 32.0 + 31.5, scene.y * 32.0 + 31.5) - 0.5
    canvas += (dice.roll(0.01, 0.06) * noise)[:, None]
    # A gentle S-curve between straight and full contrast.
    clipped = np.minimum(np.maximum(canvas, 0.0), 1.0)
    return clipped + dice.roll(0.0, 0.8)[:, None] * (smoothstep(clipped) - clipped)
