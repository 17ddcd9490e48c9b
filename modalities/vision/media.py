"""Image files and bytes -> RGB images."""

import base64
import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from xmodal_opd.types import SampleError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 50_000_000  # a page scanned at 600 dpi has 35 million; a few kilobytes can claim any number
LONGEST_SIDE = 100  # times the shorter one: the processors cut images into tiles or patches, and refuse from 200 on
UNREADABLE = (OSError, SyntaxError, ValueError, LookupError, EOFError, struct.error, Image.DecompressionBombError)


def decode(source: bytes | str | Path) -> Image.Image:
    """Bytes or file (png, jpeg, webp, gif, bmp, tiff; the first frame) -> RGB image, upright, transparency on white.

    Raises SampleError for an image that is unreadable, or of a size no model reads; its size is known before its
    pixels are.
    """
    what = f"image of {len(source)} bytes" if isinstance(source, bytes) else f"image file {source}"
    where = io.BytesIO(source) if isinstance(source, bytes) else source
    quiet = warnings.catch_warnings(action="ignore")  # about bombs, which `check` refuses, and odd metadata
    try:
        with quiet, Image.open(where, formats=FORMATS) as file:
            check(file.size, what)
            return on_white(ImageOps.exif_transpose(file))
    except SampleError:
        raise
    except UNREADABLE as error:
        raise SampleError(f"{what} cannot be decoded as png, jpeg, webp, gif, bmp or tiff ({reason(error)})") from None


def reason(error: Exception) -> str:
    """Why it is unreadable; of bytes that nothing reads Pillow tells where they lie in memory."""
    return "it is none of these, or broken" if isinstance(error, UnidentifiedImageError) else str(error)


def check(size: tuple[int, int], what: str) -> None:
    """Raises SampleError when an image of this width and height is too big or too thin."""
    width, height = size
    if width * height > MOST_PIXELS:
        raise SampleError(f"{what} has {width} x {height} pixels, over {MOST_PIXELS:,}; scale it down")
    if max(size) > LONGEST_SIDE * min(size):
        raise SampleError(f"{what} has {width} x {height} pixels: one side is over {LONGEST_SIDE} times the other")


def on_white(image: Image.Image) -> Image.Image:
    """RGB; of grey in 16 bits the upper 8, where Pillow would make white of all that is over 255."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page.convert("RGB")


def blank(image: Image.Image) -> Image.Image:
    """Mid-grey of the same size, which takes as many tokens and says nothing."""
    return Image.new("RGB", image.size, (128, 128, 128))


def degraded(image: Image.Image) -> Image.Image:
    """A tenth of the width and height by bilinear interpolation, and back to its size by repeating pixels. VA-OPD,
    arXiv:2605.21924."""
    small = image.resize((max(1, image.width // 10), max(1, image.height // 10)), Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.NEAREST)


def from_array(pixels: np.ndarray) -> Image.Image:
    """uint8 [height, width, 3] -> RGB image. Raises SampleError for other numbers."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise SampleError(f"the image is {pixels.dtype} {list(pixels.shape)}, not uint8 [height, width, 3]")
    check((pixels.shape[1], pixels.shape[0]), "the image")
    return Image.fromarray(np.ascontiguousarray(pixels))


def scaled(image: Image.Image, size: int) -> Image.Image:
    """Square, `size` pixels a side, by Lanczos interpolation over 3 lobes, whatever its shape was; itself if it is."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)


def middle(image: Image.Image, area: float) -> Image.Image:
    """The middle part of an image, of that share of its area and of its shape, back to its size by bilinear
    interpolation from corner to corner, as `tf.image.crop_and_resize` does."""
    side = area**0.5
    shift = [(1 - side) / 2 * (length - 1) + (1 - side) / 2 for length in image.size]  # pixels count from their middle
    affine = (side, 0.0, shift[0], 0.0, side, shift[1])
    return image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)


def shown(pixels: np.ndarray, size: int, jpeg: bool, lobes: int) -> np.ndarray:
    """uint8 [height, width, 3] -> [size, size, 3] by Lanczos interpolation over 3 lobes or bilinear (1), and through a
    JPEG file first: what models see that were trained on records which were."""
    image = from_array(pixels)
    if jpeg:
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=95)  # TensorFlow's
        image = Image.open(file, formats=("JPEG",))
    how = {3: Image.Resampling.LANCZOS, 1: Image.Resampling.BILINEAR}[lobes]
    return np.asarray(image.resize((size, size), how) if image.size != (size, size) else image)


def suffix(data: bytes) -> str:
    """What the name of a file of these bytes, which `decode` reads, ends in: ".png", ".jpeg", …"""
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        return f".{file.format or 'png'}".lower()


def encode(image: Image.Image) -> bytes:
    """A PNG file."""
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def data_url(image: Image.Image) -> str:
    """An image for a request, as it is."""
    return f"data:image/png;base64,{base64.b64encode(encode(image)).decode()}"
