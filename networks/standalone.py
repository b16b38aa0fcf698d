"""Sample from this folder along a schedule, with PyTorch alone: writes samples/{seed}.png.

    python sample.py
    python sample.py --seeds 7 8 9 --schedule schedule.json --output samples

The seeds of noise.pt give the images that LIFT makes of them. So do others where NumPy is installed; without it PyTorch
draws their noise, which gives other images of the same model.
"""

import argparse
import json
import math
import struct
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent


def draws_of(seed, stored):
    """A function (C, H, W) -> noise [C, H, W], to be called in the order in which LIFT draws."""
    if seed in stored["seeds"]:
        draws = iter(stored["draws"])
        return lambda shape: next(draws)[stored["seeds"].index(seed)]
    try:
        import numpy
    except ImportError:
        generator = torch.Generator().manual_seed(seed)
        return lambda shape: torch.randn(shape, generator=generator)
    generator = numpy.random.default_rng(seed)
    return lambda shape: torch.from_numpy(generator.standard_normal(shape, dtype=numpy.float32))


def up(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def split(image, residual):
    """The scales of an image [B, C, H, W]: itself, or what its 2x2 mean leaves, and that mean."""
    mean = F.avg_pool2d(image, 2)
    return [image - up(mean) if residual else image, mean]


@torch.no_grad()
def sample(network, config, schedule, seeds, stored):
    """Images [B, C, H, W] in [-1, 1] by DDIM (arXiv 2010.02502, eq. 12) along the points of a schedule."""
    residual = schedule["num_scales"] == 2 and config.get("representation") == "residual"
    # abar = sigmoid(log SNR) of every point and scale; null stands for pure noise.
    log_snr = [[-math.inf if v is None else v for v in point] for point in schedule["log_snr"]]
    abar = torch.tensor(log_snr, dtype=torch.float64).sigmoid()  # [N + 1, scales]
    if schedule["solver"]["end"] == "clean":
        abar[-1] = 1
    size, draws = config["resolution"], [draws_of(seed, stored) for seed in seeds]

    def draw(scale):
        shape = (config["channels"], size >> scale, size >> scale)
        return torch.stack([draw(shape) for draw in draws])

    xs = [draw(scale) for scale in range(schedule["num_scales"])]
    if residual:
        xs[0] = xs[0] - up(F.avg_pool2d(xs[0], 2))
    for k, point in enumerate(schedule["points"][:-1]):
        now, after = abar[k : k + 2].float()  # [scales] each
        predictions = network(xs, [torch.full((len(seeds),), t) for t in point])
        x0s = []
        for x, prediction, a in zip(xs, predictions, now, strict=False):
            if config["prediction_type"] == "epsilon":
                prediction = (x - (1 - a).sqrt() * prediction) / a.sqrt()
            elif config["prediction_type"] == "v":
                prediction = a.sqrt() * x - (1 - a).sqrt() * prediction
            x0s.append(prediction)
        # The image that the scales compose stays in [-1, 1].
        x0s = split((x0s[0] + up(x0s[1])).clamp(-1, 1), True) if residual else [x0.clamp(-1, 1) for x0 in x0s]
        moved = []
        for x, x0, a, b in zip(xs, x0s, now, after, strict=False):
            moved.append(x if a == b else b.sqrt() * x0 + (1 - b).sqrt() * (x - a.sqrt() * x0) / (1 - a).sqrt())
        # A coarse image that is not predicted is made of the fine one, noised again.
        for b in after[len(moved) :]:
            mean = F.avg_pool2d(x0s[0], 2)
            moved.append(mean if b == 1 else b.sqrt() * mean + (1 - b).sqrt() * draw(1))
        xs = moved
    return xs[0] + up(xs[1]) if residual else xs[0]


def write_png(image, file):
    """Write uint8 [C, H, W], of one or three channels."""
    channels, height, width = image.shape
    rows = bytes(v for row in image.permute(1, 2, 0).flatten(1).tolist() for v in (0, *row))
    head = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="(those of noise.pt)")
    parser.add_argument("--schedule", type=Path, default=HERE / "schedule.json", help="a schedule file of LIFT")
    parser.add_argument("--output", type=Path, default=Path("samples"))
    args = parser.parse_args()
    config, schedule = (json.loads(file.read_text()) for file in (HERE / "config.json", args.schedule))
    solver = schedule["solver"]
    if schedule["num_scales"] != config["num_scales"] or (solver.get("name", "ddim"), solver.get("eta")) != ("ddim", 0):
        raise SystemExit(f"error: {args.schedule} is of another kind of model, or of a solver other than DDIM.")
    stored = torch.load(HERE / "noise.pt", weights_only=True)
    if schedule["points"] != stored["points"] and config["num_predictions"] < config["num_scales"]:
        stored["seeds"] = []  # Noise is drawn on the way, as often as the schedule says.
    network = torch.export.load(HERE / "model.pt2").module()
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds or stored["seeds"]:
        [image] = sample(network, config, schedule, [seed], stored)
        write_png(((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), args.output / f"{seed:012d}.png")


if __name__ == "__main__":
    main()
