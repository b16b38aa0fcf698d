"""Random folders of valid, odd and damaged files: what is read of them is what a model says that knows no reader.

    (ulimit -n 64; RANDOM_FOLDERS=500 python -m pytest tests/images/test_random_folders.py)     # in place of 20

The model knows a folder from what was put there, its pixels from plain Pillow, NumPy and torchvision, and the rules
from docs/data.md.
"""

import gc
import io
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision import transforms

import data
from data import load_images

SIDE = 16
COUNT = int(os.environ.get("RANDOM_FOLDERS", "20"))
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "#102030": (16, 32, 48)}
PARTS = {"train", "test", "testing", "val", "valid", "validation", "dev", "eval", "holdout"}
OTHERS, SAMPLE, FIGURE = range(3)
FIT = transforms.Compose([transforms.Resize(SIDE), transforms.CenterCrop(SIDE)])
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


class Bad(Exception):
    """An image that is to be refused, with this in the message."""


@dataclass
class Entry:
    """An image by its name: where it lies, below the folder or in a zip; what it shows, or why it shows nothing."""

    place: tuple[str, ...]
    shown: np.ndarray | Bad  # uint8 [H, W] or [H, W, 3], on the background of the folder
    origin: int = OTHERS


@dataclass
class Plan:
    """A folder and what is known of it."""

    root: Path
    rng: np.random.Generator
    background: tuple[int, int, int]
    entries: list[Entry] = field(default_factory=list)
    members: list[Entry] = field(default_factory=list)
    zips: dict[tuple[str, ...], int] = field(default_factory=dict)  # How many of its files are no images.
    left_out: int = 0
    tables: int = 0

    def pixels(self, channels: int = 3, odd_size: bool = True) -> np.ndarray:
        """Noise of the size of the model or, at times, of another."""
        width, height = self.rng.integers(8, 40, 2) if odd_size and self.rng.random() < 0.3 else (SIDE, SIDE)
        return self.rng.integers(0, 256, (height, width, channels)[: 2 + (channels > 1)], dtype=np.uint8)


def saved(array: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(stream, kind, **options)
    return stream.getvalue()


def plain(content: bytes) -> np.ndarray:
    """What Pillow reads, in grey if that is what it is."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def on_background(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Pixels `[H, W]` or `[H, W, 3]` over a colour; grey over a grey stays grey."""
    if colour.ndim == 2 and len(set(background)) > 1:
        colour = np.repeat(colour[..., None], 3, 2)
    behind = np.array(background if colour.ndim == 3 else background[0], float)
    share = alpha.astype(float) / 255
    share = share[..., None] if colour.ndim == 3 else share
    return np.rint(colour * share + behind * (1 - share)).astype(np.uint8)


# Kinds of images: a suffix, the bytes, and what they show or why they show nothing.

Image.init()


def formats() -> list[tuple[str, str, str]]:
    """Suffixes, formats and modes that Pillow writes and reads again by itself."""
    found = []
    for suffix, kind in [*sorted(Image.registered_extensions().items()), (".mpo", "JPEG")]:
        for mode in ("RGB", "L", "1"):
            try:
                plain(saved(np.zeros((SIDE, SIDE, 3), np.uint8), kind, mode))
            except Exception:  # Formats that are only read, or need another program.
                continue
            found.append((suffix, kind, mode))
    return found


FORMATS = formats()


def any_format(plan):
    suffix, kind, mode = FORMATS[plan.rng.integers(len(FORMATS))]
    # Icons are scaled when they are written.
    content = saved(plan.pixels(odd_size=kind not in ("ICO", "ICNS")), kind, mode)
    return suffix, content, plain(content)


def png(plan):
    array = plan.pixels(plan.rng.choice([1, 3]))
    return ".png", saved(array), array


def turned(plan):
    exif, orientation = Image.Exif(), int(plan.rng.integers(1, 9))
    exif[0x0112] = orientation
    kind = str(plan.rng.choice(["JPEG", "PNG", "WEBP", "TIFF"]))
    content = saved(plan.pixels(), kind, exif=exif)
    shown = plain(content)
    if kind == "TIFF":  # Pillow turns these by itself.
        return ".tif", content, shown
    return f".{kind.lower()}", content, TURNS[orientation](shown)


def deep(plan):
    values = plan.rng.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    shown = np.rint(values / 257).astype(np.uint8)
    suffix = str(plan.rng.choice([".pgm", ".png", ".tiff"]))
    if suffix == ".pgm":
        return suffix, b"P5\n16 16\n65535\n" + values.astype(">u2").tobytes(), shown
    return suffix, saved(values, suffix[1:].upper()), shown


def too_deep(plan):
    if plan.rng.random() < 0.3:
        return ".pfm", b"Pf\n16 16\n-1.0\n" + plan.rng.random((SIDE, SIDE), np.float32).tobytes(), Bad("16 bits")
    values = plan.pixels(1, odd_size=False).astype(plan.rng.choice([np.int32, np.float32]))
    return ".tif", saved(values, "TIFF"), Bad("more than 16 bits")


def transparent(plan):
    colour, alpha = plan.pixels(), None
    alpha = plan.rng.integers(0, 256, colour.shape[:2], dtype=np.uint8)
    content = saved(np.dstack([colour, alpha]), str(plan.rng.choice(["PNG", "TIFF"])))
    return ".png" if content[:4] == b"\x89PNG" else ".tiff", content, on_background(colour, alpha, plan.background)


def grey_with_alpha(plan):
    grey = plan.pixels(1)
    alpha = plan.rng.integers(0, 256, grey.shape, dtype=np.uint8)
    return ".png", saved(np.dstack([grey, alpha])), on_background(grey, alpha, plan.background)


def palette(plan):
    colours = plan.rng.integers(0, 256, (8, 3), dtype=np.uint8)
    index = plan.rng.integers(0, 8, (SIDE, SIDE), dtype=np.uint8)
    image = Image.fromarray(index).copy()
    image.putpalette(colours.tobytes())
    alphas = plan.rng.integers(0, 256, 8, dtype=np.uint8)
    stream = io.BytesIO()
    if plan.rng.random() < 0.5:
        image.save(stream, "PNG", transparency=alphas.tobytes())
        return ".png", stream.getvalue(), on_background(colours[index], alphas[index], plan.background)
    image.save(stream, "GIF", transparency=3)
    alpha = np.where(index == 3, 0, 255).astype(np.uint8)
    return ".gif", stream.getvalue(), on_background(colours[index], alpha, plan.background)


def animated(plan):
    frames = [Image.fromarray(plan.pixels(odd_size=False)) for _ in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return ".gif", stream.getvalue(), plain(stream.getvalue())


def damaged(plan):
    content = saved(plan.pixels(), str(plan.rng.choice(["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])))
    suffix = str(plan.rng.choice([".png", ".jpg", ".bmp", ".tif", ".webp", ".GIF"]))
    content = content[: int(plan.rng.integers(0, len(content) * 3 // 4))]
    try:
        return suffix, content, plain(content)  # The part of some that is there is enough for Pillow.
    except Exception:
        return suffix, content, Bad("")


def no_image(plan):
    texts = [
        b"",
        b"404 not found",
        b"<html></html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        bytes(99),
        b"\xff",
    ]
    return str(plan.rng.choice([".png", ".jpg", ".JPEG"])), texts[plan.rng.integers(len(texts))], Bad("")


def text_chunks(**chunks):
    info = PngInfo()
    for keyword, value in chunks.items():
        info.add_text(keyword, value)
    return info


def almost_own(plan):
    chunks = [{"Software": "LIFTED"}, {"Comment": "figure"}, {"Software": "GIMP", "Comment": "LIFT"}]
    array = plan.pixels()
    return ".png", saved(array, pnginfo=text_chunks(**chunks[plan.rng.integers(3)])), array


KINDS = [any_format] * 3 + [png] * 3 + [
    turned, deep, too_deep, transparent, grey_with_alpha, palette, animated, damaged, no_image, almost_own,
]  # fmt: skip


def own(plan):
    array = plan.pixels()
    if plan.rng.random() < 0.5:
        return ".png", saved(array, pnginfo=text_chunks(Software="LIFT")), array, SAMPLE
    return ".png", saved(array, pnginfo=text_chunks(Software="LIFT", Comment="figure")), array, FIGURE


def make_image(plan: Plan) -> tuple[str, bytes, np.ndarray | Bad, int]:
    if plan.rng.random() < 0.12:
        return own(plan)
    return (*KINDS[plan.rng.integers(len(KINDS))](plan), OTHERS)


# Names and places.


def name_of(plan: Plan, k: int, suffix: str) -> str:
    stems = [
        f"{k}",
        f"{k} a",
        f"é猫{k}",
        f"new\nline{k}",
        f"{k}[x]*?%s",
        f"-{k}",
        f"{k}.tar",
        os.fsdecode(b"\xff%d" % k),
    ]
    stem = stems[plan.rng.integers(len(stems))] if plan.rng.random() < 0.5 else f"{k}"
    if plan.rng.random() < 0.05:
        stem = f"{k}".ljust(250 - len(suffix), "n")
    return stem + (suffix.upper() if plan.rng.random() < 0.2 else suffix)


def place_of(plan: Plan, folders: list[tuple[str, ...]]) -> tuple[str, ...]:
    return folders[plan.rng.integers(len(folders))]


def put(plan: Plan, place: tuple[str, ...], content: bytes) -> Path:
    file = plan.root.joinpath(*place)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


# Files that are put into a folder. Each says what it adds to the model.


def add_image(plan, k, folders):
    suffix, content, shown, origin = make_image(plan)
    place = (*place_of(plan, folders), name_of(plan, k, suffix))
    put(plan, place, content)
    plan.entries.append(Entry(place, shown, origin))


def add_hidden(plan, k, folders):
    hidden = [(f"._{k}.png",), (f".{k}.png",), (f".checkpoints{k}", f"{k}.png"), ("__MACOSX", f"{k}.png")]
    place = (*place_of(plan, folders), *hidden[plan.rng.integers(len(hidden))])
    # A folder counts once.
    plan.left_out += not plan.root.joinpath(*place[:-1]).exists() or place[-2:-1] != ("__MACOSX",)
    put(plan, place, saved(plan.pixels()))


def add_other(plan, k, folders):
    suffix = str(plan.rng.choice([".txt", ".pdf", "", ".npy", ".svg", ".eps", ".WMF", ".pngx", ".csv~"]))
    put(plan, (*place_of(plan, folders), name_of(plan, k, suffix)), b"no image")
    plan.left_out += 1


def add_link(plan, k, folders):
    place = (*place_of(plan, folders), name_of(plan, k, ".png"))
    file = plan.root.joinpath(*place)
    file.parent.mkdir(parents=True, exist_ok=True)
    suffix, content, shown, origin = make_image(plan)
    outside = plan.root.parent / f"outside{k}"
    outside.mkdir()
    match plan.rng.integers(7):
        case 0:  # To a file.
            (outside / f"x{suffix}").write_bytes(content)
            file.symlink_to(outside / f"x{suffix}")
            plan.entries.append(Entry(place, shown, origin))
        case 1:  # To a folder, which is no image whatever its name.
            (outside / f"x{suffix}").write_bytes(content)
            file.symlink_to(outside)
            plan.entries.append(Entry((*place, f"x{suffix}"), shown, origin))
        case 2:
            file.symlink_to("gone.png")
            plan.entries.append(Entry(place, Bad("it is a link to gone.png")))
        case 3:
            file.symlink_to(file.name)
            plan.entries.append(Entry(place, Bad("it is a link to")))
        case 4:  # To itself, under a name that is no image's.
            file.with_suffix(".lnk").symlink_to(file.with_suffix(".lnk").name)
            plan.left_out += 1
        case 5:  # To what lies around it.
            file.symlink_to(plan.root if plan.rng.random() < 0.5 else plan.root.parent)
        case 6:
            os.mkfifo(file)
            plan.left_out += 1


def add_zip(plan, k, folders):
    place = (*place_of(plan, folders), name_of(plan, k, ".zip"))
    file = plan.root.joinpath(*place)
    file.parent.mkdir(parents=True, exist_ok=True)
    plan.zips[place] = 0
    with zipfile.ZipFile(file, "w", plan.rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        archive.writestr("wrapped/", b"")
        for j in range(plan.rng.integers(1, 6)):
            suffix, content, shown, origin = make_image(plan)
            # Names in archives are text.
            name = f"wrapped/{'ab'[plan.rng.integers(2)]}/{j}{suffix}"
            hidden = plan.rng.random()
            if hidden < 0.15:
                archive.writestr(f"__MACOSX/._{j}{suffix}", content)
                plan.zips[place] += 1
            elif hidden < 0.3:
                archive.writestr(f"wrapped/{j}.txt", content)
                plan.zips[place] += 1
            else:
                archive.writestr(name, content)
                plan.members.append(Entry((*place, *name.split("/")), shown, origin))


def add_table(plan, k, folders):
    put(plan, (*place_of(plan, folders), f"{k}.parquet"), b"no table")
    plan.tables += 1
    plan.left_out += 1


ADDERS: list[tuple[float, Callable]] = [
    (0.68, add_image), (0.08, add_hidden), (0.08, add_other), (0.1, add_link), (0.04, add_zip), (0.02, add_table),
]  # fmt: skip
LAYOUTS = [
    [()], [(), ("a",), ("b", "c d")], [("train",), ("test",)], [(), ("train",), ("Val", "x"), ("holdout",)],
    [("train",), ("test",), ("bus",)], [("cat",), ("test",)], [("x.png",), ("é",)],
]  # fmt: skip


def make_folder(root: Path, seed: int) -> tuple[Plan, str]:
    """A folder of 1 to 30 files, and the name of the background."""
    rng = np.random.default_rng((2025, seed))
    background = str(rng.choice(list(BACKGROUNDS)))
    plan = Plan(root, rng, BACKGROUNDS[background])
    root.mkdir()
    folders = LAYOUTS[rng.integers(len(LAYOUTS))]
    chances = np.array([chance for chance, _ in ADDERS])
    if rng.random() < 0.1:  # Archives and what lies around them.
        chances = np.array([0, 0.1, 0.1, 0, 0.8, 0])
    for k in range(rng.integers(1, 31)):
        ADDERS[rng.choice(len(ADDERS), p=chances / chances.sum())][1](plan, k, folders)
    return plan, background


def expected_of(plan: Plan) -> tuple[list[Entry], int]:
    """The images that are meant, in their order, and how many files are left out."""
    for origin in (OTHERS, SAMPLE, FIGURE):
        loose, packed = ([e for e in group if e.origin == origin] for group in (plan.entries, plan.members))
        if loose or packed:
            break
        if plan.tables:
            return [], 0
    else:
        return [], 0
    meant = sorted(loose or packed, key=lambda entry: entry.place)
    own_ones = [e for e in plan.entries if e.origin != OTHERS and not (loose and e.origin == origin)]
    tops = {entry.place[0] for entry in meant if len(entry.place) > 1}
    in_parts = {top.lower() for top in tops} <= PARTS
    if "train" not in tops and in_parts and (plan.root / "train").is_dir():
        # Only archives may hold what there is to train on.
        zips = {place: others for place, others in plan.zips.items() if place[0] == "train" and loose}
        inside = [e for e in plan.members if e.place[0] == "train" and loose]
        packed = sorted((e for e in inside if e.origin == OTHERS), key=lambda entry: entry.place)
        outside = len(meant) + len(plan.zips) - len(zips) + len(inside) - len(packed)
        return packed, plan.left_out + len(own_ones) + outside + sum(zips.values())
    left_out = plan.left_out + len(own_ones) + (len(plan.zips) if loose else sum(plan.zips.values()))
    if not [e for e in plan.entries if e.origin == OTHERS]:  # Archives were looked into.
        left_out += len([e for e in plan.members if e.origin != OTHERS and (loose or e.origin != origin)])
    if "train" in tops and in_parts:
        kept = [entry for entry in meant if entry.place[0] == "train" and len(entry.place) > 1]
        left_out += len(meant) - len(kept)
        meant = kept
    return meant, left_out


def fitted(shown: np.ndarray) -> np.ndarray:
    return np.asarray(FIT(Image.fromarray(np.ascontiguousarray(shown))))


def assert_equal(found, shown: list[np.ndarray]) -> None:
    images = [fitted(array) for array in shown]
    is_grey = all(image.ndim == 2 for image in images)
    expected = np.stack(
        [np.stack([i] * (1 if is_grey else 3), 0) if i.ndim == 2 else i.transpose(2, 0, 1) for i in images]
    )
    np.testing.assert_array_equal(found.pixels, expected)


def shown_path(plan: Plan, entry: Entry) -> str:
    return " ".join(str(plan.root.joinpath(*entry.place)).split())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_random_folder_is_read_as_the_rules_say(tmp_path, cache, capsys, monkeypatch, seed):
    plan, background = make_folder(tmp_path / f"set{seed}", seed)
    meant, left_out = expected_of(plan)
    good = [entry.shown for entry in meant if not isinstance(entry.shown, Bad)]
    bad = [entry for entry in meant if isinstance(entry.shown, Bad)]
    place, options = str(plan.root), {"background": background, "num_workers": 1 + seed % 4}

    def load(**more):
        return load_images(place, SIDE, cache, **options | more)

    open_before = len(os.listdir("/dev/fd"))
    if not meant:  # Then the library for data sets is asked, and refuses it.
        with pytest.raises((ValueError, RuntimeError), match="(?s)set"):
            load()
        return
    if bad:
        with pytest.raises(ValueError, match="cannot be read") as refused:
            load()
        message = " ".join(str(refused.value).split())
        assert message.startswith(shown_path(plan, bad[0])) and "--skip_bad_images" in message
        assert str(bad[0].shown) in message
    if not good:
        with pytest.raises(ValueError, match="holds no readable image"):
            load(skip_bad_images=True)
        return
    found = load(skip_bad_images=bool(bad))
    assert_equal(found, good)
    said = re.findall(r"note: (\d+) of the files of", capsys.readouterr().err)
    assert list(map(int, said)) == ([left_out] if left_out else [])
    # The first few, of which some may be bad; and all of them once more, from the cache.
    limit = int(plan.rng.integers(1, len(meant) + 1))
    first = [entry.shown for entry in meant[:limit] if not isinstance(entry.shown, Bad)]
    if first:
        assert_equal(load(skip_bad_images=True, limit=limit), first)
    with pytest.raises(ValueError, match=f"--limit {len(meant) + 1} asks for more images than the {len(meant)} of"):
        load(limit=len(meant) + 1)
    monkeypatch.setattr(data, "_decode_all", lambda *args: pytest.fail("decoded again"))
    assert load(skip_bad_images=bool(bad)).fingerprint == found.fingerprint
    del found  # A mapped file is open as long as its pixels are there.
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= open_before + 2  # Libraries keep some for themselves, once.


def test_the_model_meets_every_kind(tmp_path):
    """Of each kind of image, name and outcome there are some in the folders of the suite."""
    plans = []
    for seed in range(20):
        (tmp_path / f"{seed}").mkdir()
        plans.append(make_folder(tmp_path / f"{seed}/set", seed)[0])
    entries = [entry for plan in plans for entry in plan.entries + plan.members]
    assert {entry.origin for entry in entries} == {OTHERS, SAMPLE, FIGURE}
    assert {getattr(entry.shown, "ndim", 0) for entry in entries} == {0, 2, 3}
    names = [entry.place[-1] for entry in entries]
    suffixes = {name.rpartition(".")[2].lower() for name in names}
    assert len(suffixes) > 15 and {"png", "gif", "tif", "pgm", "webp"} <= suffixes
    assert all(letter in "".join(names) for letter in "\n[猫 \udcff") and max(map(len, map(os.fsencode, names))) == 250
    assert any("link" in str(entry.shown) for entry in entries if isinstance(entry.shown, Bad))
    assert len({len(plan.entries + plan.members) for plan in plans}) > 8
    assert sum(bool(expected_of(plan)[0]) for plan in plans) > 15
