"""What is read as a picture, and the one line that says why something is not."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tiny_pictures import PLAIN, drawn, vision_config

from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.text import pictures
from mlx_diffgemma.text.pictures import read_picture, target_size

VISION = vision_config(PLAIN)
PICTURE = drawn(96, 144)


def saved(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source, **options) -> np.ndarray:
    return read_picture(source, VISION, **options).pixels


def flat(image: Image.Image) -> np.ndarray:
    """The colours of a picture of one colour, which no resizing changes."""
    colours = np.unique(pixels(saved(image)).reshape(-1, 3), axis=0)
    assert len(colours) == 1
    return colours[0]


def test_a_path_bytes_a_pillow_image_and_an_array_are_one_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(PICTURE))
    sources = [str(tmp_path / "a.png"), tmp_path / "a.png", saved(PICTURE),
               memoryview(saved(PICTURE)), Image.fromarray(PICTURE), PICTURE,
               PICTURE / 255]  # fmt: skip
    keys = {read_picture(source, VISION).key for source in sources}
    assert len(keys) == 1
    assert read_picture(drawn(96, 144, seed=1), VISION).key not in keys
    one = read_picture(PICTURE, VISION)
    assert read_picture(one, VISION) is one


def test_small_pictures_are_enlarged_to_whole_soft_tokens():
    assert target_size(512, 512, 280, VISION) == (768, 768)
    for soft_tokens in (70, 140, 280, 560, 1120):
        picture = read_picture(PICTURE, VISION, soft_tokens)
        height, width, _ = picture.pixels.shape
        assert height % 48 == width % 48 == 0
        assert 0.8 * soft_tokens < picture.soft_tokens <= soft_tokens
    with pytest.raises(UsageError, match="one of 70, 140, 280, 560, 1120, not 100"):
        read_picture(PICTURE, VISION, 100)


def test_orientation_alpha_palettes_depths_and_frames():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = read_picture(saved(PICTURE, "PNG", exif=exif), VISION)
    np.testing.assert_array_equal(turned.pixels, pixels(np.rot90(PICTURE, -1).copy()))

    assert flat(Image.new("RGBA", (48, 48), (0, 0, 0, 0))).tolist() == [255, 255, 255]
    assert flat(Image.new("RGBA", (48, 48), (200, 0, 0, 255))).tolist() == [200, 0, 0]
    assert flat(Image.new("LA", (48, 48), (100, 0))).tolist() == [255, 255, 255]
    palette = Image.new("P", (48, 48), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert flat(palette).tolist() == [10, 20, 30]
    palette.info["transparency"] = 1
    see_through = saved(palette, "PNG", transparency=1)
    assert np.unique(pixels(see_through)).tolist() == [255]
    assert flat(Image.new("1", (48, 48), 1)).tolist() == [255, 255, 255]
    grey = Image.fromarray(np.full((48, 48), 0x8080, np.uint16))
    assert flat(grey).tolist() == [128, 128, 128]
    ink = Image.new("CMYK", (48, 48), (0, 255, 255, 0))
    assert np.unique(pixels(saved(ink, "TIFF")).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]
    frames = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
    animated = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.unique(pixels(animated).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_no_row_lies_beyond_the_table_of_positions():
    small = vision_config({**PLAIN, "position_embedding_size": 100})
    with pytest.raises(
        PromptError, match="would be 840 patches long, and this model's tower knows 100"
    ):
        read_picture(drawn(5000, 1), small)


def test_arrays_of_other_types():
    even = read_picture(PICTURE, VISION).key
    assert read_picture(PICTURE.astype(np.uint16) * 257, VISION).key == even
    assert (
        read_picture(np.dstack([PICTURE, np.full((96, 144), 255)]).astype(np.uint8), VISION).key
        == even
    )
    black = np.zeros((48, 48), bool)
    assert np.unique(pixels(black)).tolist() == [0] and np.unique(pixels(~black)).tolist() == [255]


def huge_png(width: int, height: int) -> bytes:
    """The beginning of a PNG that promises so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (b"", "the picture is empty (0 bytes); give a picture."),
        (b"hello, this is a text", "the picture is not a picture that can be read; save it as PNG "
         "or JPEG."),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "the picture is an "
         "SVG, which has no pixels; save it as PNG or JPEG."),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "the picture is a HEIC picture, which cannot be "
         "read here; save it as PNG or JPEG."),
        (saved(PICTURE)[:700], "the picture is truncated; save it as PNG or JPEG again."),
        (saved(PICTURE, "JPEG")[:900], "the picture is truncated; save it as PNG or JPEG again."),
        (huge_png(100_000, 100_000), "the picture has too many pixels, and pictures have 178 "
         "million at most; make it smaller."),
        (Image.new("1", (13_000, 14_000)), "the picture has 13000 × 14000 pixels, and pictures "
         "have 178 million at most; make it smaller."),
        ("/nowhere/a.png", "/nowhere/a.png is not there; check its name."),
        ("/tmp", "/tmp is a folder; name a picture in it."),
        ("https://example.org/a.png", "https://example.org/a.png is a URL, and none is opened; "
         "give a file."),
        (np.zeros((8, 8, 5), np.uint8), "the picture is an array of shape [8, 8, 5]; it must be "
         "[height, width, 3], or with 1 or 4 in place of 3."),
        (np.full((8, 8, 3), 7.0), "the picture is an array of numbers; they must go from 0 to 1."),
        (np.zeros((8, 8), np.int64), "the picture is an array of int64; give uint8, uint16 or "
         "numbers from 0 to 1."),
        (7, "the picture must be a path, the bytes of a file, a Pillow image or an array, not of "
         "the type int."),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(source, line):
    with pytest.raises(PromptError) as error:
        read_picture(source, VISION)
    assert str(error.value) == line


def test_no_file_is_read_whole_before_its_size_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "LARGEST_FILE", 5_000_000)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PromptError, match="has more than 5 MB; make it smaller"):
        read_picture(tmp_path / "huge.png", VISION)
    with pytest.raises(PromptError, match="/dev/zero is a device"):
        read_picture("/dev/zero", VISION)


def test_no_pixel_is_decoded_before_their_number_is_known(monkeypatch):
    loaded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: loaded.append(self))
    with pytest.raises(PromptError, match="million"):
        read_picture(huge_png(13_000, 14_000), VISION)
    assert not loaded
