"""From what a caller has of a picture to the pixels that the vision tower reads.

Sizes and pixels are those of transformers' Gemma 4 image processor (5.24, its form for Pillow):
bicubic to the largest size of the same aspect ratio that has both sides a multiple of one soft
token's and as many soft tokens as may be. Transparent parts are white here; the reference shows the
colours that they hide. Letters: P patches.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from stat import S_ISDIR, S_ISFIFO, S_ISREG
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_diffgemma.config import SOFT_TOKENS, VisionConfig
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.reading import shown

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_FILE = 256_000_000
"""Most bytes of a file with a picture."""
LARGEST_PICTURE = 178_956_970
"""Most pixels of a picture; Pillow takes more for an attack, too."""

_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_PNG = "save it as PNG or JPEG"


@dataclass(frozen=True)
class Picture:
    """A picture in the size that the vision tower reads.

    Attributes:
        pixels: [height, width, 3] uint8.
        patch_size: pixels of a side of a patch.
        pooling: patches of a side of the square that becomes one soft token.
    """

    pixels: np.ndarray
    patch_size: int
    pooling: int

    @property
    def columns(self) -> int:
        """Patches in a row."""
        return self.pixels.shape[1] // self.patch_size

    @property
    def soft_tokens(self) -> int:
        """Places that it takes in a prompt, without the two marks around it."""
        rows = self.pixels.shape[0] // self.patch_size
        return rows * self.columns // self.pooling**2

    @cached_property
    def key(self) -> str:
        """A fingerprint of its pixels: equal for equal pictures only."""
        shape = f"{self.pixels.shape} {self.patch_size} {self.pooling} "
        return hashlib.sha256(shape.encode() + self.pixels.tobytes()).hexdigest()

    @cached_property
    def patches(self) -> np.ndarray:
        """[P, 3 · side²] uint8: patches row by row; within one row, column, colour."""
        side, (height, width, _) = self.patch_size, self.pixels.shape
        cut = self.pixels.reshape(height // side, side, width // side, side, 3)
        return np.ascontiguousarray(cut.transpose(0, 2, 1, 3, 4)).reshape(-1, 3 * side * side)


def read_picture(
    source: Any,
    vision: VisionConfig,
    soft_tokens: int | None = None,
    *,
    name: str | None = None,
) -> Picture:
    """The picture in a file, in bytes, in a Pillow image or in an array.

    Args:
        source: a path; the bytes of a file; a Pillow image; an array [height, width],
            [height, width, 1], [..., 3] or [..., 4] of uint8, of uint16, of booleans, or of numbers
            from 0 to 1; or a `Picture`, which is handed back.
        soft_tokens: most soft tokens of the picture, one of `SOFT_TOKENS`; None takes the
            checkpoint's own number.
        name: what an error calls it; None takes its path, or "the picture".

    Raises:
        PromptError: it is no picture, damaged, or too large.
        UsageError: `soft_tokens` is none that the tower was trained for.
    """
    soft_tokens = checked_soft_tokens(soft_tokens, vision)
    if isinstance(source, Picture):
        return source
    path = Path(source) if isinstance(source, (str, Path)) else None
    name = name or ("the picture" if path is None else str(source))
    image = _as_image(source, path, name)
    width, height = image.size
    size = target_size(height, width, soft_tokens, vision)
    patches, most = max(size) // vision.patch_size, vision.position_embedding_size
    if patches > most:
        raise PromptError(
            f"{name} would be {patches} patches long, and this model's tower knows {most}; crop "
            "it, or lower image_tokens."
        )
    pixels = np.asarray(_resized(image, size))
    return Picture(np.ascontiguousarray(pixels), vision.patch_size, vision.pooling_kernel_size)


def checked_soft_tokens(soft_tokens: int | None, vision: VisionConfig) -> int:
    """Most soft tokens of a picture; None takes the checkpoint's own number.

    Raises:
        UsageError: `soft_tokens` is no number that the tower was trained for.
    """
    if soft_tokens is None:
        return vision.soft_tokens
    if isinstance(soft_tokens, bool) or soft_tokens not in (*SOFT_TOKENS, vision.soft_tokens):
        known = ", ".join(map(str, SOFT_TOKENS))
        raise UsageError(f"image_tokens must be one of {known}, not {shown(soft_tokens)}.")
    return soft_tokens


def target_size(height: int, width: int, soft_tokens: int, vision: VisionConfig) -> tuple[int, int]:
    """Height and width that a picture is brought to, smaller or larger: the largest multiples of a
    soft token's side that keep the aspect ratio, rounded down, and take `soft_tokens` at most."""
    side = vision.side_multiple
    factor = math.sqrt(soft_tokens * side**2 / (height * width))
    down = int(factor * height / side)
    across = int(factor * width / side)
    if down == 0:
        down, across = 1, min(width // height, soft_tokens)
    elif across == 0:
        down, across = min(height // width, soft_tokens), 1
    return down * side, across * side


def _as_image(source: Any, path: Path | None, name: str) -> Image:
    """An RGB image, upright."""
    from PIL import Image as Pillow

    if path is not None:
        source = _read_file(path, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        opened = _opened(bytes(source), name)
        return _decoded(opened, name)
    if isinstance(source, Pillow.Image):
        _check_size(source.size, name)
        return _decoded(source, name)
    if hasattr(source, "__array__") or hasattr(source, "tolist"):
        return Pillow.fromarray(_as_bytes(np.asarray(source), name), "RGB")
    raise PromptError(
        f"{name} must be a path, the bytes of a file, a Pillow image or an array, not of the type "
        f"{type(source).__name__}."
    )


def _read_file(path: Path, name: str) -> bytes:
    if str(path).startswith(("http:", "https:", "data:")):
        raise PromptError(f"{name[:60]} is a URL, and none is opened; give a file.")
    try:
        status = path.stat()
        if (S_ISREG(status.st_mode) and status.st_size <= LARGEST_FILE) or S_ISFIFO(status.st_mode):
            with path.open("rb") as file:
                return file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise PromptError(f"{name} is not there; check its name.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"{name} cannot be read ({reason}).") from None
    if S_ISDIR(status.st_mode):
        raise PromptError(f"{name} is a folder; name a picture in it.")
    if S_ISREG(status.st_mode):
        raise PromptError(_too_many_bytes(name))
    raise PromptError(f"{name} is a device or a socket; give a file.")


def _opened(data: bytes, name: str) -> Image:
    """A picture of which no more than its header is read."""
    from PIL import Image as Pillow

    if not data:
        raise PromptError(f"{name} is empty (0 bytes); give a picture.")
    if len(data) > LARGEST_FILE:
        raise PromptError(_too_many_bytes(name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Pillow.open(BytesIO(data))
    except Pillow.DecompressionBombError:
        raise PromptError(_too_many_pixels(name)) from None
    except Exception as error:  # decoders raise what they like at damaged headers
        raise PromptError(_no_picture(data, name, error)) from None
    _check_size(image.size, name)
    return image


def _no_picture(data: bytes, name: str, error: Exception) -> str:
    from PIL import UnidentifiedImageError

    head = data[:1024].lstrip().lower()
    if b"<svg" in head:
        return f"{name} is an SVG, which has no pixels; {_PNG}."
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        return f"{name} is a HEIC picture, which cannot be read here; {_PNG}."
    if isinstance(error, UnidentifiedImageError):
        return f"{name} is not a picture that can be read; {_PNG}."
    return f"{name} is a damaged picture ({_one_line(error)}); {_PNG} again."


def _decoded(image: Image, name: str) -> Image:
    """The first frame as RGB, upright, over white."""
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if getattr(image, "n_frames", 1) > 1:
                image.seek(0)
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise PromptError(f"{name} does not fit in memory; make it smaller.") from None
    except Exception as error:  # as in `_opened`
        truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
        what = "is truncated" if truncated else f"is a damaged picture ({_one_line(error)})"
        raise PromptError(f"{name} {what}; {_PNG} again.") from None


def _as_rgb(image: Image) -> Image:
    from PIL import Image as Pillow

    if image.mode.startswith("I") or image.mode == "F":
        return Pillow.fromarray(_as_bytes(_deep(np.asarray(image)), "the picture"), "RGB")
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Pillow.new("RGBA", image.size, (255, 255, 255, 255))
        return Pillow.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _deep(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits as a file has them: 16 bits where any needs them."""
    if values.dtype.kind == "f":
        finite = np.nan_to_num(values)
        return np.clip(finite if finite.max(initial=0) <= 1 else finite / 255, 0, 1)
    deep = values.dtype.itemsize == 2 or values.max(initial=0) > 255
    return np.clip(values, 0, 65535 if deep else 255).astype(np.uint16 if deep else np.uint8)


def _as_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """An array of numbers as [height, width, 3] uint8."""
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4) or 0 in values.shape:
        raise PromptError(
            f"{name} is an array of shape {list(values.shape)}; it must be [height, width, 3], or "
            "with 1 or 4 in place of 3."
        )
    _check_size((values.shape[1], values.shape[0]), name)
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) + 128) // 257
    elif values.dtype == bool:
        values = values * np.uint8(255)
    elif values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):
            raise PromptError(f"{name} is an array of numbers; they must go from 0 to 1.")
        values = np.rint(values * 255)
    elif values.dtype != np.uint8:
        raise PromptError(
            f"{name} is an array of {values.dtype}; give uint8, uint16 or numbers from 0 to 1."
        )
    if values.shape[2] == 4:
        alpha = values[..., 3:].astype(np.float32) / 255
        values = np.rint(values[..., :3] * alpha + 255 * (1 - alpha))
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)), np.uint8)


def _resized(image: Image, size: tuple[int, int]) -> Image:
    from PIL.Image import Resampling

    height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), resample=Resampling.BICUBIC)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if not width or not height:
        raise PromptError(f"{name} has no pixels; give another.")
    if width * height > LARGEST_PICTURE:
        raise PromptError(_too_many_pixels(name, f" {width} × {height}"))


def _too_many_pixels(name: str, size: str = "") -> str:
    most = LARGEST_PICTURE // 1_000_000
    return (
        f"{name} has{size or ' too many'} pixels, and pictures have {most} million at most; make "
        "it smaller."
    )


def _too_many_bytes(name: str) -> str:
    return f"{name} has more than {LARGEST_FILE // 10**6} MB; make it smaller."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:80].rstrip(".") or type(error).__name__
