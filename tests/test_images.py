"""What becomes of image files, and which are refused."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from modalities.vision.media import decode, encode
from xmodal_opd.types import SampleError


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has this many pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def checkered(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*itertools.product(["PNG", "BMP", "TIFF"], ["RGB", "L", "P", "1"]), ("GIF", "L"), ("GIF", "P"), ("WEBP", "RGB")],
)
def test_lossless_files_come_back_pixel_by_pixel_as_rgb(kind, mode):
    image = checkered(mode)
    read = decode(file_of(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert read.mode == "RGB" and np.array_equal(np.asarray(read), np.asarray(image.convert("RGB")))
    assert np.array_equal(np.asarray(decode(encode(read))), np.asarray(read))


def test_photographs_are_turned_upright_and_transparency_lies_on_white(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: a quarter turn clockwise
    assert decode(file_of(checkered(), "JPEG", exif=turned)).size == (24, 40)
    glass = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    glass.putpixel((1, 2), (0, 0, 255, 255))
    path = tmp_path / "glass.png"
    path.write_bytes(file_of(glass, "PNG"))
    read = decode(path)
    assert read.getpixel((0, 0)) == (255, 255, 255) and read.getpixel((1, 2)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"junk", r"image of 4 bytes cannot be decoded as png, jpeg.* \(it is none of these, or broken\)$"),
        (b"", r"image of 0 bytes cannot be decoded"),
        (file_of(checkered(), "PNG")[:200], r"cannot be decoded"),
        (file_of(checkered(), "JPEG")[:300], r"cannot be decoded"),
        (claiming(20_000, 20_000), r"cannot be decoded .*400000000 pixels\) exceeds limit"),
        (claiming(10_000, 9_000), r"has 10000 x 9000 pixels, over 50,000,000; scale it down"),
        (file_of(Image.new("RGB", (301, 3)), "PNG"), r"has 301 x 3 pixels: one side is over 100 times the other"),
        (file_of(checkered(), "PPM"), r"cannot be decoded"),
    ],
    ids=["junk", "empty", "cut png", "cut jpeg", "bomb", "big", "thin", "another format"],
)
def test_files_that_are_no_use_are_refused_with_the_reason(data, message):
    with pytest.raises(SampleError, match=message):
        decode(data)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SampleError, match=r"image file .*gone.png cannot be decoded.*No such file"):
        decode(tmp_path / "gone.png")
