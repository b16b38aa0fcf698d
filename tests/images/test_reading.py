"""One image file: which way up, what is under its transparency, how many bits, and what is refused with a reason."""

import io
import os
import struct
import zipfile

import numpy as np
import PIL
import pytest
from PIL import Image

from images.reading import (
    SPLITS,
    Archives,
    UnreadableImageError,
    WrongSizeError,
    find_images,
    find_members,
    is_split,
    read_bytes,
    read_image,
    read_mask,
    reads_as_ever,
)

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 8), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def read(content, **options):
    return np.asarray(read_image(content, **options))


# What is seen of an image whose EXIF says so: rows and columns, by the table of the standard.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
    0: lambda a: a,
    9: lambda a: a,
}


@pytest.mark.parametrize(
    ("kind", "pixels"), [("PNG", COLOUR), ("PNG", GREY), ("TIFF", COLOUR), ("TIFF", GREY), ("WEBP", COLOUR)]
)
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_as_their_exif_says(orientation, pixels, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(pixels, kind, exif=exif, **{"lossless": True} if kind == "WEBP" else {})
    np.testing.assert_array_equal(read(content), UPRIGHT[orientation](pixels))
    assert kind == "TIFF" or reads_as_ever(content) == (orientation in (0, 1, 9) and kind != "PNG")


def test_damaged_exif_harms_no_picture():
    jpeg = encoded(COLOUR, "JPEG", quality=95)
    plain = read(jpeg)
    for rubbish in (b"", b"II*\0", b"MM\0*\xff\xff\xff\xff", bytes(RNG.integers(0, 256, 60, dtype=np.uint8))):
        np.testing.assert_array_equal(read(encoded(COLOUR, "JPEG", quality=95, exif=b"Exif\0\0" + rubbish)), plain)


def test_twelve_bits_use_all_of_the_range():
    values = np.arange(4096).reshape(64, 64)
    # Two values lie in three bytes. Tags: width, height, bits, compression, photometric, place, samples, rows, bytes.
    first, second = values.reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    tags = {
        256: 64,
        257: 64,
        258: 12,
        259: 1,
        262: 1,
        273: 200,
        277: 1,
        278: 64,
        279: len(packed),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    image = read_image(head.ljust(200, b"\0") + packed)
    np.testing.assert_array_equal(image, np.rint(values / 4095 * 255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_divided_by_257_and_rounded(kind):
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    content = b"P5\n256 256\n65535\n" + deep.astype(">u2").tobytes() if kind == "PPM" else encoded(deep, kind)
    image = read_image(content)
    assert image.mode == "L" and not reads_as_ever(content)
    np.testing.assert_array_equal(image, np.rint(deep / 257).astype(np.uint8))


def test_a_pgm_of_few_levels_uses_all_of_the_range():
    content = b"P5\n4 1\n1023\n" + np.array([0, 341, 682, 1023], ">u2").tobytes()
    np.testing.assert_array_equal(read(content), [[0, 85, 170, 255]])


@pytest.mark.parametrize("values", [np.int32, np.float32])
def test_more_than_16_bits_are_refused(values):
    content = encoded((GREY * 200).astype(values), "TIFF")
    with pytest.raises(UnreadableImageError, match="more than 16 bits.*save it with 8 or 16 bits"):
        read_image(content)
    assert not reads_as_ever(content)


def over(colour, alpha, behind):
    alpha = alpha[..., None] / 255
    return np.rint(colour * alpha + np.array(behind) * (1 - alpha)).astype(np.uint8)


@pytest.mark.parametrize("behind", [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
def test_transparency_shows_the_background(behind):
    alpha = RNG.integers(0, 256, (5, 8), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    content = encoded(np.dstack([COLOUR, alpha]))
    found = read(content, background=behind)
    np.testing.assert_array_equal(found, over(COLOUR, alpha, behind))
    assert (found[0] == behind).all() and (found[1] == COLOUR[1]).all()
    assert not reads_as_ever(content)


def test_grey_with_alpha_stays_grey_on_grey():
    alpha = RNG.integers(0, 256, (5, 8), dtype=np.uint8)
    content = encoded(Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(alpha))))
    for level in (255, 0, 77):
        image = read_image(content, background=(level,) * 3)
        assert image.mode == "L"
        np.testing.assert_array_equal(image, over(GREY[..., None], alpha, (level,))[..., 0])
    assert read_image(content, background=(255, 0, 0)).mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "I;16", "1"])
def test_one_value_that_stands_for_transparent(mode):
    if mode == "I;16":
        image, key, shown = Image.fromarray(GREY.astype(np.uint16) * 257), int(GREY[2, 3]) * 257, GREY
        hidden = GREY == GREY[2, 3]
    elif mode == "RGB":
        image, key, shown = Image.fromarray(COLOUR), tuple(map(int, COLOUR[2, 3])), COLOUR
        hidden = (COLOUR == COLOUR[2, 3]).all(-1)
    elif mode == "P":
        image = Image.fromarray(GREY // 64, "P")
        image.putpalette([0, 0, 0, 50, 60, 70, 200, 100, 0, 9, 9, 9])
        key, shown, hidden = 2, np.asarray(image.convert("RGB")), GREY // 64 == 2
    elif mode == "1":
        image, key = Image.fromarray(GREY > 100), 0
        shown, hidden = np.where(GREY > 100, 255, 0), GREY <= 100
    else:
        image, key, shown, hidden = Image.fromarray(GREY), int(GREY[2, 3]), GREY, GREY == GREY[2, 3]
    found = read(encoded(image, transparency=key), background=(128, 128, 128))
    assert hidden.any() and found.ndim == shown.ndim
    np.testing.assert_array_equal(found, np.where(hidden[..., None] if shown.ndim == 3 else hidden, 128, shown))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_ordinary_images_are_as_pillow_converts_them(mode):
    image = Image.fromarray(COLOUR).convert(mode)
    for kind in ("PNG", "JPEG", "TIFF", "GIF"):
        if (kind, mode) in {("PNG", "CMYK"), ("PNG", "YCbCr"), ("JPEG", "P"), ("GIF", "CMYK"), ("GIF", "YCbCr")}:
            continue
        if (kind, mode) == ("TIFF", "YCbCr") and int(PIL.__version__.split(".")[0]) < 12:
            continue  # Pillow could not read its own.
        content = encoded(image, kind)
        with Image.open(io.BytesIO(content)) as opened:
            expected = np.asarray(opened.convert("RGB"))
            grey = opened.mode in ("1", "L")
        found = read_image(content)
        np.testing.assert_array_equal(found.convert("RGB"), expected)
        assert (found.mode == "L") == grey and reads_as_ever(content)


def test_what_shows_behind_is_white_unless_told_otherwise():
    clear = np.zeros((3, 4, 4), np.uint8)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(clear, "RGBA")))[..., :3], np.full((3, 4, 3), 255))


def test_a_size_is_that_of_the_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(COLOUR, exif=exif)
    assert read_image(content, (5, 8)).size == (5, 8)
    with pytest.raises(WrongSizeError, match="is 5x8 and not 8x5"):
        read_image(content, (8, 5))


def test_any_damage_has_a_reason():
    whole = [encoded(COLOUR.repeat(9, 0).repeat(9, 1), kind) for kind in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP")]
    for content in whole:
        for _ in range(60):
            damaged = bytearray(content[: RNG.integers(len(content))] if RNG.random() < 0.5 else content)
            for place in RNG.integers(0, max(1, len(damaged)), 20):
                damaged[place : place + 1] = bytes([RNG.integers(256)])
            try:
                read_image(bytes(damaged))
            except UnreadableImageError as error:
                assert str(error)
            reads_as_ever(bytes(damaged))
    with pytest.raises(UnreadableImageError, match="empty"):
        read_image(b"")


# Masks


def mask_png(levels, alpha):
    return encoded(Image.merge("LA", [Image.fromarray(a.astype(np.uint8)) for a in (levels, alpha)]).convert("RGBA"))


def test_what_is_transparent_in_a_mask_is_the_opposite_of_what_is_drawn():
    drawn = RNG.random((8, 8)) < 0.4
    alpha = np.where(drawn, 255, 0)
    rubbish = RNG.integers(0, 256, (8, 8))
    for level, known in ((255, drawn), (0, ~drawn)):
        levels = np.where(drawn, level, rubbish)
        np.testing.assert_array_equal(read_mask(mask_png(levels, alpha), ((8, 8),)) > 127, known)
    # White and black drawn: what is transparent was left to be painted.
    levels = np.where(drawn, np.where(np.arange(8) < 4, 255, 0), rubbish)
    np.testing.assert_array_equal(read_mask(mask_png(levels, alpha), ((8, 8),)) > 127, drawn & (np.arange(8) < 4)[None])
    # Without transparency alpha says nothing.
    np.testing.assert_array_equal(read_mask(mask_png(rubbish, 0 * alpha + 255), ((8, 8),)), rubbish)
    with pytest.raises(UnreadableImageError, match="transparent all over"):
        read_mask(mask_png(rubbish, 0 * alpha), ((8, 8),))


@pytest.mark.parametrize(
    ("drawn", "behind"),
    # A value and its alpha each: of what covers more than half, whether any is brighter than half.
    [
        ([(0, 128), (255, 127)], 255),
        ([(0, 127), (255, 128)], 0),
        ([(127, 255), (0, 255)], 255),
        ([(128, 255), (0, 255)], 0),
    ],
)
def test_half_is_neither_drawn_nor_bright(drawn, behind):
    levels, alpha = np.zeros((2, 8, 8), np.uint8)
    (levels[0, 0], alpha[0, 0]), (levels[0, 1], alpha[0, 1]) = drawn
    found = read_mask(mask_png(levels, alpha), ((8, 8),))
    assert (found[1:] == behind).all()
    for k, (value, cover) in enumerate(drawn):
        assert found[0, k] == round((value * cover + behind * (255 - cover)) / 255)


# Folders


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(GREY))


def names_of(folder):
    return [str(file.relative_to(folder)) for file in find_images(folder).files]


def test_hidden_files_and_litter_are_left_out_and_counted(tmp_path):
    make(tmp_path, "b.PNG", "a/c.jfif", "a/d.gif", "._b.png", ".ipynb_checkpoints/b.png", "__MACOSX/b.png")
    make(tmp_path, "a/.thumbnails/c.png", "Thumbs.db", "notes.txt", "a/model.h5", "figure.eps", "movie.mpg", "README")
    found = find_images(tmp_path)
    assert names_of(tmp_path) == ["a/c.jfif", "a/d.gif", "b.PNG"]
    assert found.left_out == {"hidden": 5, ".txt": 1, ".h5": 1, ".eps": 1, ".mpg": 1, "no suffix": 1}
    # The place itself may be hidden.
    make(tmp_path, ".own/set/a.png")
    assert names_of(tmp_path / ".own/set") == ["a.png"]


def test_links_are_followed_once(tmp_path):
    make(tmp_path, "set/a/1.png", "far/2.png", "far/deep/3.png", "out.png")
    folder = tmp_path / "set"
    (folder / "0").symlink_to(tmp_path / "far")
    (folder / "a/up").symlink_to(folder)
    (folder / "a/higher").symlink_to(tmp_path)
    (folder / "b").symlink_to(folder / "a")
    (tmp_path / "far/back").symlink_to(folder / "a")
    (folder / "self").symlink_to("self")
    (folder / "one.png").symlink_to(tmp_path / "out.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "nowhere").symlink_to(tmp_path / "missing")
    assert names_of(folder) == ["0/2.png", "0/deep/3.png", "a/1.png", "gone.png", "one.png"]
    assert find_images(folder).left_out == {"broken links": 2}
    with pytest.raises(UnreadableImageError, match="link to nowhere.png, which is not there"):
        read_bytes(folder / "gone.png")


def test_what_is_no_file_is_never_waited_for(tmp_path):
    make(tmp_path, "a.png", "folder.png/b.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert names_of(tmp_path) == ["a.png", "folder.png/b.png"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"train"}, True),
        ({"train", "test"}, True),
        ({"train", "Val", "test"}, True),
        (set(SPLITS), True),
        ({"bus", "car", "train"}, False),
        ({"train", "test", "exam"}, False),
        ({"test", "val"}, False),
        (set(), False),
    ],
)
def test_train_is_a_part_among_parts_only(names, expected):
    assert is_split(names) == expected


def test_archives_are_read_as_folders_are(tmp_path):
    for name in ("one", "two"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for inside in ("b/2.png", "a/1.png", "__MACOSX/a/._1.png", "notes.txt"):
                archive.writestr(inside, f"{name} {inside}")
    members, left_out = find_members(tmp_path / "one.zip")
    assert [member.name for member in members] == ["a/1.png", "b/2.png"] and left_out == {"hidden": 1, ".txt": 1}
    archives = Archives()
    for name in ("one", "two", "two", "one"):
        assert archives.read(tmp_path / f"{name}.zip", "b/2.png") == f"{name} b/2.png".encode()
    content = bytearray((tmp_path / "two.zip").read_bytes())
    content[content.index(b"two a/1")] ^= 1
    (tmp_path / "two.zip").write_bytes(content)
    with pytest.raises(UnreadableImageError, match="CRC"):
        Archives().read(tmp_path / "two.zip", "a/1.png")
    (tmp_path / "one.zip").write_bytes(content[:20])
    with pytest.raises(UnreadableImageError, match="one.zip is a damaged archive"):
        find_members(tmp_path / "one.zip")
