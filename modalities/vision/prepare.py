"""Questions about images as WebDataset shards: scenes that are drawn, or people's own images and videos."""

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from modalities.prepare import Drafts, Range, bounded, contents, known, read_drafts, record_bytes, within, write_drafts
from modalities.records import Message, media_parts, read_source
from modalities.vision import video
from modalities.vision.draw import FONTS, Look, draw, handwriting, random_look, worn
from modalities.vision.media import decode, encode, suffix
from modalities.vision.records import Drawn, file_name, image_draft, scene_draft
from modalities.vision.tasks import SCENES, scenes
from xmodal_opd.types import SampleError

LIMITS = {"rotation": (0, 180), "blur": (0, 100), "texture": (0, 255), "jpeg": (1, 95)}


@dataclass(frozen=True)
class Sight:
    """How every image is made to look; all of it goes into the index. None: slight, and as it falls, for scenes; not at
    all for people's own images."""

    seed: int = 0
    split: str = "train"  # whose fonts and handwriting
    rotation: Range = None  # degrees, to either side
    blur: Range = None  # standard deviation, in pixels
    texture: Range = None  # standard deviation of grain, in grey levels of 255
    jpeg: Range = None  # quality, 1 to 95


def prepare(
    folder: str | Path,
    kind: str = "scenes",
    file: str | Path | None = None,
    *,
    count: int = 2000,
    families: Sequence[str] = tuple(SCENES),
    instruction: str = "",
    per_shard: int = 256,
    workers: int | None = None,
    progress: bool = True,
    **sight: Any,
) -> dict[str, Any]:
    """Make shards in `folder`, or keep those that are there when the settings are the same; returns their index.

    kind: "scenes" (`count` questions of `families`), or "images" (records of a JSON-lines `file`; see
    `modalities.vision.records`). `sight`: fields of `Sight`. `workers`: processes, by default one for each core; the
    bytes do not depend on it. Raises ValueError as `write_shards` does, and for settings that make no sense.
    """
    options = Sight(**sight)
    check(options)
    drafts = _scenes(options, count, families, instruction) if kind == "scenes" else _lines(kind, file, instruction)
    base = Path(file).parent if file else Path()
    files = [source for draft in drafts if isinstance(draft, Drawn) for source in draft.files.values()]
    handwritten = kind == "scenes" and "digits" in families
    return write_drafts(
        folder,
        kind,
        drafts,
        partial(render, options, base),
        asdict(options) | contents(files, base, "image"),
        ready=partial(handwriting, options.split) if handwritten else tuple,
        per_shard=per_shard,
        workers=workers,
        progress=progress,
    )


def check(options: Sight) -> None:
    """Raises ValueError for a split that there is not, and for a number out of its bounds."""
    if options.split not in FONTS:
        raise ValueError(f"there are no fonts for split {options.split!r}; have: {', '.join(FONTS)}")
    bounded(options, LIMITS)


# ---- what to ask


def _scenes(options: Sight, count: int, families: Sequence[str], instruction: str) -> Drafts:
    known(families, SCENES, count)
    asked = islice(scenes(options.seed, options.split, families), count)
    return [scene_draft(scene, options.split, instruction) for scene in asked]


def _lines(kind: str, file: str | Path | None, instruction: str) -> Drafts:
    if kind != "images" or file is None:
        raise ValueError(f"kind is scenes, or images with a file of records; got {kind!r} and {file}")
    return read_drafts(file, image_draft, instruction)


# ---- how it looks


def render(options: Sight, base: Path, job: tuple[int, Drawn | str]) -> dict[str, bytes] | str:
    """Files of one sample, or why it is refused; a pure function of its arguments."""
    number, draft = job
    if isinstance(draft, str):
        return draft
    rng = random.Random(f"{options.seed} {number}")
    try:
        if draft.scene is None:
            files, student = _read(options, base, draft, rng)
            return {"json": record_bytes(replace(draft, student=student), {}), **files}
        look = _as_asked(random_look(rng, options.split), options, rng)
        image = draw(draft.scene, look)
    except SampleError as error:
        return f"{draft.where}: {error}"
    meta = {"font": look.font, "width": image.width, "height": image.height}
    return {"json": record_bytes(draft, meta), file_name("image", 0): encode(image)}


def _read(options: Sight, base: Path, draft: Drawn, rng: random.Random) -> tuple[dict[str, bytes], list[Message]]:
    """(files, the student's messages that name them). Raises SampleError for what cannot be decoded."""
    files, student = {}, deepcopy(draft.student)
    for part in media_parts(student):
        kind = part["type"]
        name, data = part[kind], read_source(draft.files[part[kind]], base, kind)
        if kind == "video":
            video.decode(data, fps=1, most=1)  # refused here, not when it is trained on
        else:
            data = _image(options, data, rng)
            told = name.replace(".png", suffix(data))
            name = name if told in draft.files else told  # a gif may be a video, too
        part[kind], files[name] = name, data
    return files, student


def _image(options: Sight, data: bytes, rng: random.Random) -> bytes:
    """The bytes as they are, or a PNG file where the options change how images look."""
    image = decode(data)
    if all(getattr(options, name) is None for name in LIMITS):
        return data
    return encode(worn(image, _as_asked(Look(seed=rng.getrandbits(32)), options, rng)))


def _as_asked(look: Look, options: Sight, rng: random.Random) -> Look:
    """The look with what the options say in place of its own."""
    asked = {name: within(value, rng) for name in LIMITS if (value := getattr(options, name)) is not None}
    if "rotation" in asked:
        asked["rotation"] *= rng.choice((-1, 1))
    if "jpeg" in asked:
        asked["jpeg"] = round(asked["jpeg"])
    return replace(look, **asked)
