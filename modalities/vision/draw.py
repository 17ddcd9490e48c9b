"""Scenes as small images: what a scene holds under a look. Fonts and handwriting of the test split are in no training
picture."""

import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from modalities.tasks import HELD_OUT
from modalities.vision.tasks import POLYGONS, Scene

FONTS = {  # of matplotlib's own; whole typefaces are held out
    "train": (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
        *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
        *("cmr10", "cmb10", "cmtt10", "STIXGeneral", "STIXGeneralBol"),
    ),
    "test": ("cmss10", "DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneralItalic"),
}
INKS = ((20, 20, 20), (20, 30, 110), (110, 20, 20), (15, 80, 40), (70, 30, 100))
PAPERS = ((255, 255, 255), (250, 244, 228), (236, 242, 250), (240, 248, 238), (235, 235, 235))
SIZES = {  # width and height in pixels, multiples of the 28 that one token of Qwen's encoders sees
    "text": (224, 112),
    "bars": (224, 112),
    "line": (224, 112),
    "polygon": (168, 112),
    "shapes": (168, 112),
    "sum": (168, 56),
}
LINE = 28  # pixels from line to line: what one token of Qwen's encoders sees
MARGIN = 6  # pixels left free on each side
SMALLEST = 9  # pixels of font: what does not fit at the look's size shrinks so far

Picture = Mapping[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class Look:
    """How a picture is drawn."""

    font: str = "DejaVuSans"  # a file of matplotlib's fonts, without .ttf
    size: int = 14  # of the font, in pixels
    ink: tuple[int, int, int] = INKS[0]
    paper: tuple[int, int, int] = PAPERS[0]
    rotation: float = 0.0  # degrees
    blur: float = 0.0  # standard deviation, in pixels
    texture: float = 0.0  # standard deviation of the paper's grain, in grey levels of 255
    jpeg: int | None = None  # quality that the picture went through, 1 to 95
    split: str = "train"  # whose handwriting
    seed: int = 0  # of places, grain and which handwritten digits


def random_look(rng: random.Random, split: str) -> Look:
    """A look in a font, and with handwriting, of one split: slightly turned, blurred, grainy and compressed."""
    return Look(
        font=rng.choice(FONTS[split]),
        size=rng.randint(13, 17),
        ink=rng.choice(INKS),
        paper=rng.choice(PAPERS),
        rotation=rng.uniform(-2, 2),
        blur=rng.uniform(0, 0.5),
        texture=rng.uniform(0, 8),
        jpeg=rng.choice((None, rng.randint(60, 95))),
        split=split,
        seed=rng.getrandbits(32),
    )


def draw(scene: Scene, look: Look) -> Image.Image:
    """The scene's picture as RGB, a pure function of its arguments (and the versions of the drawing libraries)."""
    kind = scene.picture["kind"]
    return worn(PICTURES[kind](scene.picture, look, SIZES[kind]), look)


def worn(image: Image.Image, look: Look) -> Image.Image:
    """An image on the look's paper: turned, blurred, grainy, compressed."""
    if look.rotation:
        image = image.rotate(look.rotation, Image.Resampling.BICUBIC, fillcolor=look.paper)
    if look.blur:
        image = image.filter(ImageFilter.GaussianBlur(look.blur))
    if look.texture:
        image = _grain(image, look)
    return image if look.jpeg is None else _compressed(image, look.jpeg)


def _grain(image: Image.Image, look: Look) -> Image.Image:
    """Grain as of paper: grey noise, half of it coarse."""
    rng = np.random.default_rng(look.seed)
    high, wide = image.height, image.width
    fine, coarse = rng.normal(size=(high, wide)), rng.normal(size=(math.ceil(high / 4), math.ceil(wide / 4)))
    coarse = np.kron(coarse, np.ones((4, 4)))[:high, :wide]
    grain = look.texture * (fine + coarse) / math.sqrt(2)
    return Image.fromarray((np.asarray(image) + grain[..., None]).round().clip(0, 255).astype(np.uint8))


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=quality)
    return Image.open(out).convert("RGB")


# ---- text


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file(name), size)


def font_file(name: str) -> Path:
    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")


def _text(picture: Picture, look: Look, size: Size) -> Image.Image:
    """Wrapped text, as large as the look says or as fits, each line in the middle of its own row of tokens."""
    image, pen = _page(look, size)
    for points in range(look.size, SMALLEST - 1, -1):
        lines = wrap(picture["text"], font(look.font, points), size[0] - 2 * MARGIN).split("\n")
        widest = max(font(look.font, points).getlength(line) for line in lines)
        if widest <= size[0] - 2 * MARGIN and len(lines) * LINE <= size[1]:
            break
    else:
        raise ValueError(f"a text of {len(picture['text'])} letters does not fit in {size[0]} x {size[1]} pixels")
    for i, line in enumerate(lines):
        pen.text((MARGIN, (i + 0.5) * LINE), line, look.ink, font(look.font, points), anchor="lm")
    return image


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Lines no wider than `width` pixels, but for words that are."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return "\n".join(lines).strip()


def _page(look: Look, size: Size) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", size, look.paper)
    return image, ImageDraw.Draw(image)


# ---- charts


def _chart(picture: Picture, look: Look, size: Size) -> Image.Image:
    """Bars or a line with their labels below and their values above."""
    points = 72 / 100  # of a pixel at 100 dots an inch
    ink, paper = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in (look.ink, look.paper))
    words = FontProperties(fname=str(font_file(look.font)), size=(look.size - 1) * points)
    figure = Figure((size[0] / 100, size[1] / 100), dpi=100, facecolor=paper)
    axes = figure.add_axes((0.03, 0.2, 0.94, 0.76), facecolor=paper)
    places, values = range(len(picture["values"])), picture["values"]
    if picture["kind"] == "bars":
        axes.bar(places, values, width=0.6, color=ink, alpha=0.6)
    else:
        axes.plot(places, values, color=ink, linewidth=1.2)
        axes.plot(places, values, "o", color=ink, markersize=3, zorder=4)  # on top of the values' boxes
    for place, value in zip(places, values, strict=True):
        above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "color": ink, "font": words}
        axes.annotate(str(value), (place, value), bbox={"facecolor": paper, "edgecolor": "none", "pad": 0.2}, **above)
    axes.set(xlim=(-0.6, len(values) - 0.4), ylim=(0, 26), yticks=[])
    axes.set_xticks(places, picture["labels"], fontproperties=words, color=ink)
    axes.tick_params(length=0, pad=2)
    axes.spines[["top", "right", "left"]].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


# ---- figures


def _polygon(picture: Picture, look: Look, size: Size) -> Image.Image:
    """A rectangle or triangle to scale, each side with its label outside."""
    image, pen = _page(look, size)
    room = look.size + MARGIN  # for the labels
    corners = fit(outline(picture["sides"]), (room, room, size[0] - room, size[1] - room))
    pen.polygon(corners, outline=look.ink, width=2)
    middle = tuple(sum(values) / len(corners) for values in zip(*corners, strict=True))
    for label, a, b in zip(picture["labels"], corners, corners[1:] + corners[:1], strict=True):
        x, y = (a[0] + b[0]) / 2, (a[1] + b[1]) / 2
        far = (0.35 * look.size + 5) / math.dist((a[0], a[1]), (b[0], b[1]))
        nx, ny = (b[1] - a[1]) * far, (a[0] - b[0]) * far  # at a right angle to the side
        out = 1 if (x - middle[0]) * nx + (y - middle[1]) * ny > 0 else -1
        pen.text((x + out * nx, y + out * ny), label, look.ink, font(look.font, look.size), anchor="mm")
    return image


def outline(sides: Sequence[int]) -> list[tuple[float, float]]:
    """Corners of a rectangle, or of a triangle with its first side below, in units of length; y grows downwards."""
    a, b, c = sides[:3]
    if len(sides) == 4:
        return [(0, 0), (a, 0), (a, b), (0, b)]
    x = (a * a + c * c - b * b) / (2 * a)
    return [(0, 0), (a, 0), (x, -math.sqrt(c * c - x * x))]


def fit(corners: Sequence[tuple[float, float]], box: tuple[int, int, int, int]) -> list[tuple[float, float]]:
    """The same figure, as large as fits in a box of pixels (left, top, right, bottom), in its middle."""
    (left, right), (top, bottom) = ((min(values), max(values)) for values in zip(*corners, strict=True))
    scale = min((box[2] - box[0]) / (right - left), (box[3] - box[1]) / (bottom - top))
    x = (box[0] + box[2] - scale * (left + right)) / 2
    y = (box[1] + box[3] - scale * (top + bottom)) / 2
    return [(x + scale * a, y + scale * b) for a, b in corners]


def _shapes(picture: Picture, look: Look, size: Size) -> Image.Image:
    """Shapes apart from each other, on the cells of a grid, each a little off its middle and turned."""
    image, pen = _page(look, size)
    rng = random.Random(look.seed)
    shapes = picture["shapes"]
    columns, rows = (len(shapes), 1) if len(shapes) <= 3 else (3, 2) if len(shapes) <= 6 else (5, 2)
    wide, high = (size[0] - 2 * MARGIN) / columns, (size[1] - 2 * MARGIN) / rows
    cells = rng.sample([(i, j) for j in range(rows) for i in range(columns)], len(shapes))
    for shape, (i, j) in zip(shapes, cells, strict=True):
        radius = min(wide, high) * rng.uniform(0.34, 0.44)
        free = (wide / 2 - radius, high / 2 - radius)
        x = MARGIN + (i + 0.5) * wide + rng.uniform(-0.8, 0.8) * free[0]
        y = MARGIN + (j + 0.5) * high + rng.uniform(-0.8, 0.8) * free[1]
        if shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=look.ink, width=2)
        else:
            upright = 45 if shape == "square" else 0
            turned = upright + rng.uniform(-15, 15)
            pen.regular_polygon((x, y, radius), POLYGONS[shape], turned, outline=look.ink, width=2)
    return image


# ---- handwriting


def _sum(picture: Picture, look: Look, size: Size) -> Image.Image:
    """Handwritten digits with plain strokes for the signs between them."""
    image, pen = _page(look, size)
    rng = random.Random(look.seed)
    pool = handwriting(look.split)
    signs = [*picture["signs"], "="]
    wide = (size[0] - 2 * MARGIN) // 6  # three digits and three signs
    high = min(wide + 8, size[1] - 2 * MARGIN)
    for place, (term, sign) in enumerate(zip(picture["terms"], signs, strict=True)):
        left, top = MARGIN + 2 * place * wide, (size[1] - high) // 2 + rng.randint(-2, 2)
        strokes = Image.fromarray(rng.choice(pool[term])).resize((wide, high), Image.Resampling.BICUBIC)
        image.paste(look.ink, (left, top), strokes)
        for stroke in _strokes(sign, left + 1.5 * wide, size[1] / 2, look.size / 3):
            pen.line(stroke, look.ink, width=2)
    return image


def _strokes(sign: str, x: float, y: float, reach: float) -> list[list[tuple[float, float]]]:
    """Lines of "+", "-" or "=" around a middle; not every font has a minus sign."""
    heights = (y - reach / 2, y + reach / 2) if sign == "=" else (y,)
    level = [[(x - reach, h), (x + reach, h)] for h in heights]
    return [*level, [(x, y - reach), (x, y + reach)]] if sign == "+" else level


@cache
def handwriting(split: str) -> dict[int, list[np.ndarray]]:
    """{digit: its 8 x 8 images, strokes bright on black} of one split, from scikit-learn's handwritten digits. Raises
    ModuleNotFoundError naming the extra to install."""
    try:
        from sklearn.datasets import load_digits  # takes seconds to import
    except ModuleNotFoundError:
        raise ModuleNotFoundError("handwritten digits need scikit-learn: pip install 'xmodal-opd[vision]'") from None
    images, labels = load_digits(return_X_y=True)
    ours = [i for i in range(len(labels)) if (i % HELD_OUT == 0) == (split == "test")]
    bright = (images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    return {digit: [bright[i] for i in ours if labels[i] == digit] for digit in range(10)}


PICTURES: dict[str, Callable[[Picture, Look, Size], Image.Image]] = {
    "text": _text,
    "bars": _chart,
    "line": _chart,
    "polygon": _polygon,
    "shapes": _shapes,
    "sum": _sum,
}
