"""Short videos and animations -> a few frames and their times, for models that read images; and frames -> a video."""

import io
import itertools
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from modalities.vision.media import UNREADABLE, check, on_white, reason
from xmodal_opd.types import SampleError

try:
    import av
    from av.error import FFmpegError
except ModuleNotFoundError:
    av, FFmpegError = None, OSError

NEEDS_AV = "videos need PyAV: pip install 'xmodal-opd[video]'"
LONGEST = 300.0  # seconds
MOST_FRAMES = 20_000  # of the file: five minutes at 60 a second
MOST_DECODED = 2 * 10**10  # pixels of all of them: five minutes of 1080p at 30 a second
MOST_KEPT = 2**28  # bytes of the frames that are kept
# what holds its own pictures: a playlist would open other files, or wait for a stream
CONTAINERS = {"format_whitelist": "mov,matroska,avi,flv,mpeg,mpegts,asf,ogg"}

Frame = tuple[float, Image.Image]  # seconds from the start, RGB


def decode(data: bytes, fps: float, most: int) -> list[Frame]:
    """Bytes (mp4, webm, mkv, mov, avi, …; animated gif or webp) -> its frames at `fps` a second, evenly spaced from the
    first to the last one, and no more than `most`.

    Raises SampleError for a video that is unreadable, or longer or larger than is read, and ModuleNotFoundError, naming
    the extra to install, for what PyAV would have to decode.
    """
    what = f"video of {len(data)} bytes"
    animated = data[:4] == b"GIF8" or data[8:12] == b"WEBP"
    try:
        with warnings.catch_warnings(action="ignore"):  # about bombs, which `bounded` refuses
            return animation(data, what, fps, most) if animated else film(data, what, fps, most)
    except SampleError:
        raise
    except (*UNREADABLE, FFmpegError) as error:
        raise SampleError(f"{what} cannot be decoded ({reason(error)})") from None


def chosen(times: Sequence[float], size: tuple[int, int], what: str, fps: float, most: int) -> list[int]:
    """Which frames to keep of those that begin at `times`, in seconds."""
    seconds = times[-1] - times[0]
    if seconds > LONGEST:
        raise SampleError(f"{what} is {seconds:.0f} s long, over {LONGEST:.0f} s; cut it")
    count = max(1, min(most, len(times), round(seconds * fps) + 1))
    if size[0] * size[1] * 3 * count > MOST_KEPT:
        raise SampleError(f"{what}: {count} frames of {size[0]} x {size[1]} pixels do not fit; scale it down")
    return [round(i * (len(times) - 1) / max(1, count - 1)) for i in range(count)]


def bounded(size: tuple[int, int], count: int, what: str) -> None:
    """Raises SampleError for frames that are too large or thin, or too many; before they are decoded."""
    check(size, what)
    if not count:
        raise SampleError(f"{what} has no frames")
    if count > MOST_FRAMES or size[0] * size[1] * count > MOST_DECODED:
        raise SampleError(f"{what} has {count:,} frames of {size[0]} x {size[1]} pixels; cut it, or scale it down")


def animation(data: bytes, what: str, fps: float, most: int) -> list[Frame]:
    with Image.open(io.BytesIO(data), formats=("GIF", "WEBP")) as file:
        total = getattr(file, "n_frames", 1)
        bounded(file.size, total, what)
        lengths = [at_frame(file, number).info.get("duration", 0) / 1000 for number in range(total - 1)]
        times = [0.0, *itertools.accumulate(lengths)]
        at = chosen(times, file.size, what, fps, most)
        return [(times[number], on_white(at_frame(file, number).copy())) for number in at]


def at_frame(file: Any, number: int) -> Any:
    """The animation at a frame, decoded: before that, webp does not know how long it lasts."""
    file.seek(number)
    file.load()
    return file


def film(data: bytes, what: str, fps: float, most: int) -> list[Frame]:
    if av is None:
        raise ModuleNotFoundError(NEEDS_AV)
    with av.open(io.BytesIO(data), "r", options=CONTAINERS) as file:
        if not file.streams.video:
            raise SampleError(f"{what} has no pictures")
        stream: Any = file.streams.video[0]
        size, packets = (stream.width, stream.height), itertools.islice(file.demux(stream), MOST_FRAMES + 2)
        times = sorted(float(p.pts * p.time_base) for p in packets if p.pts is not None and not p.is_discard)
    bounded(size, len(times), what)
    at = chosen(times, size, what, fps, most)
    with av.open(io.BytesIO(data), "r", options=CONTAINERS) as file:
        frames = list(pictures(file.decode(video=0), at))
    if len(frames) < len(at):
        raise SampleError(f"{what} ends early: {len(frames)} of {len(at)} frames can be decoded")
    return [(times[number] - times[0], frame) for number, frame in zip(at, frames, strict=True)]


def pictures(frames: Iterator[Any], numbers: Sequence[int]) -> Iterator[Image.Image]:
    """The frames of these numbers in the order they are shown, upright; what follows the last is not decoded."""
    wanted = set(numbers)
    for number, frame in enumerate(itertools.islice(frames, numbers[-1] + 1)):
        check((frame.width, frame.height), "a frame")
        if number in wanted:
            yield frame.to_image().rotate(frame.rotation, expand=True)


def encode(frames: Sequence[np.ndarray], fps: float) -> bytes:
    """Pictures uint8 [height, width, 3] of one size, `fps` a second -> an mp4 that browsers play.

    Raises ModuleNotFoundError, naming the extra to install, without PyAV.
    """
    if av is None:
        raise ModuleNotFoundError(NEEDS_AV)
    height, width = frames[0].shape[:2]
    even = [(0, height % 2), (0, width % 2), (0, 0)]  # its colours are halved in both directions
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("h264", rate=Fraction(fps).limit_denominator(1000), options={"threads": "1"})
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.pad(frame, even, "edge"), format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()
