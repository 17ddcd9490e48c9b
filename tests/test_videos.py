"""What becomes of videos: which frames are seen, when they were, and what is refused."""

import io

import av
import numpy as np
import pytest
import torch
from PIL import Image

from modalities.chat import ChatAdapter
from modalities.vision import video
from xmodal_opd.types import SampleError


def grey(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A frame as bright as its number."""
    return Image.new("RGB", size, (12 * number,) * 3)


def film(count: int, codec: str = "mpeg4", kind: str = "mp4", size: tuple[int, int] = (64, 48)) -> bytes:
    """Ten frames a second."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(count):
            file.mux(stream.encode(av.VideoFrame.from_image(grey(number, size))))
        file.mux(stream.encode())
    return out.getvalue()


def animated(count: int, kind: str, milliseconds: int = 100) -> bytes:
    out = io.BytesIO()
    frames = [grey(number) for number in range(count)]
    more = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=milliseconds, **more)
    return out.getvalue()


def numbers(frames: list[video.Frame]) -> list[int]:
    """Which frames these are, by their brightness."""
    return [round(float(np.asarray(image).mean()) / 12) for _, image in frames]


FILES = {
    "mp4": film(21),
    "h264 with frames out of order": film(21, codec="libx264"),
    "mkv": film(21, kind="matroska"),
    "gif": animated(21, "GIF"),
    "webp": animated(21, "WEBP"),
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_two_seconds_are_seen_at_the_rate_and_in_the_number_of_the_recipe(data):
    """21 frames, one every tenth of a second, the last at 2.0 s."""
    assert numbers(video.decode(data, 2.0, 8)) == [0, 5, 10, 15, 20]
    assert [seconds for seconds, _ in video.decode(data, 2.0, 8)] == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert numbers(video.decode(data, 10.0, 3)) == [0, 10, 20]
    assert numbers(video.decode(data, 0.1, 8)) == [0] and numbers(video.decode(data, 99.0, 99)) == [*range(21)]


def test_an_image_that_does_not_move_is_one_frame():
    assert numbers(video.decode(animated(1, "GIF"), 2.0, 8)) == [0]
    assert numbers(video.decode(film(1), 2.0, 8)) == [0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"junk", "video of 4 bytes cannot be decoded"),
        (b"", "video of 0 bytes cannot be decoded"),
        (b"GIF8" + b"junk", r"cannot be decoded \(it is none of these, or broken\)$"),
        (film(21)[:900], "cannot be decoded"),
        (animated(21, "GIF")[:300], "cannot be decoded"),
        (animated(4, "GIF").rpartition(b"!\xf9\x04")[0] + b"!\xf9\x04", "cannot be decoded"),
        (animated(4, "GIF", 120_000), "is 360 s long, over 300 s; cut it"),
        (film(2, size=(1300, 12)), "has 1300 x 12 pixels: one side is over 100 times the other"),
    ],
    ids=["junk", "empty", "junk gif", "cut mp4", "cut gif", "gif cut in a block", "long", "thin"],
)
def test_videos_that_are_no_use_are_refused_with_the_reason(data, message):
    with pytest.raises(SampleError, match=message):
        video.decode(data, 99.0, 8)


def test_a_playlist_opens_no_other_file(tmp_path, monkeypatch):
    (tmp_path / "secret.mp4").write_bytes(film(21))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SampleError, match="cannot be decoded"):
        video.decode(b"ffconcat version 1.0\nfile 'secret.mp4'\n", 2.0, 8)


def test_sounds_alone_are_no_video_and_bounds_hold(monkeypatch):
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    with pytest.raises(SampleError, match="has no pictures"):
        video.decode(out.getvalue(), 2.0, 8)
    for data in (film(21), animated(21, "WEBP")):
        for name, value, message in (
            ("MOST_FRAMES", 20, r"has 2\d frames of 64 x 48 pixels; cut it"),
            ("MOST_DECODED", 60_000, "has 21 frames of 64 x 48 pixels; cut it, or scale it down"),
            ("MOST_KEPT", 30_000, "5 frames of 64 x 48 pixels do not fit; scale it down"),
        ):
            with monkeypatch.context() as patch, pytest.raises(SampleError, match=message):
                patch.setattr(video, name, value)
                video.decode(data, 2.0, 8)


def test_every_family_that_reads_images_reads_short_videos(family):
    _, model, processor, adapter = family
    ask = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What moved?"}]
    sample = {"__key__": "k", "views": {"student": [{"role": "user", "content": ask}]}, "media": {"a.mp4": film(21)}}
    adapter = ChatAdapter(processor, 2048, derive=["degraded"], fps=1.0, max_frames=2)
    if "image" not in adapter.reads:
        with pytest.raises(SampleError, match=r"'k' has a video, but .* reads text.* only"):
            adapter.pair(sample)
        return
    pair = adapter.pair(sample)
    view = pair.views["student"]
    assert len(view["images"]) == len(pair.views["degraded"]["images"]) == 2
    assert view["prompt"].index("0.0 s:") < view["prompt"].index("2.0 s:") < view["prompt"].index("What moved?")
    batch = adapter.batch([view])
    assert batch["input_ids"].shape[1] <= adapter.size(view) and len(adapter.served(view)[1]) == 2
    with torch.no_grad():
        first = model(**batch).logits[0, -1]
        other = model(**adapter.batch([{**view, "images": view["images"][::-1]}])).logits[0, -1]
    assert torch.isfinite(first).all() and not torch.equal(first, other)
    with pytest.raises(SampleError, match=r"'k', video 'a.mp4': video of 4 bytes cannot be decoded"):
        adapter.pair({**sample, "media": {"a.mp4": b"junk"}})
