#!/usr/bin/env python
"""Make WebDataset shards of questions that are heard or seen, or of what robots did, and re-shard, filter, merge or
look at shards.

    python tools/prepare_shards.py tasks data/spoken/train --count 4000
    python tools/prepare_shards.py text questions.jsonl data/train --accents en-us,en-gb --noise-snr 5:20
    python tools/prepare_shards.py audio recordings.jsonl data/train
    python tools/prepare_shards.py scenes data/vision/train --count 4000 --families rendered,charts --blur 0.5:1.5
    python tools/prepare_shards.py images questions.jsonl data/train
    python tools/prepare_shards.py lerobot DATASET data/demonstrations/train --chunk 8
    python tools/prepare_shards.py reshard data/train data/more data/arithmetic --where task=arithmetic
    python tools/prepare_shards.py inspect data/train -n 3

The bytes depend on the settings and the seed, not on the number of workers. Stopped at any moment and started again
with the same settings, it goes on after the last finished shard.
"""

import argparse
import operator
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

COMPARE = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tasks = commands.add_parser("tasks", help="the built-in reasoning questions, spoken")
    tasks.add_argument("--count", type=int, default=2000, help="how many (2000)")
    tasks.add_argument("--families", type=names, help="comma-separated (all: arithmetic,ordering,choice)")
    text = commands.add_parser("text", help="written questions, to be spoken: prompt or messages, and answer")
    audio = commands.add_parser("audio", help="recordings with their transcripts, in TRL's or ms-swift's form or plain")
    scenes = commands.add_parser("scenes", help="the built-in questions about pictures, drawn")
    scenes.add_argument("--count", type=int, default=2000, help="how many (2000)")
    scenes.add_argument("--families", type=names, help="comma-separated (all: rendered,charts,geometry,digits)")
    images = commands.add_parser(
        "images", help="images and videos with their text, in TRL's or ms-swift's form or plain"
    )
    for command in (text, audio, images):
        command.add_argument("file", help="one JSON record a line; paths of media are relative to it")
    for command in (tasks, text, audio, scenes, images):
        common(command)
    for command in (tasks, text, audio):
        heard(command)
    for command in (tasks, text):
        spoken(command)
    for command in (scenes, images):
        seen(command)
    robots = commands.add_parser("lerobot", help="the decisions of a LeRobotDataset of version 3")
    robots.add_argument("source", help="its folder, or its name on the hub, from where it is then fetched")
    robots.add_argument("out", help="folder to write")
    robots.add_argument("--chunk", type=int, default=8, help="actions of a decision (8)")
    robots.add_argument("--stride", type=int, help="frames from one decision to the next (as many as --chunk)")
    robots.add_argument("--text", help="the column the teacher reads (state_text, or observation.state)")
    robots.add_argument(
        "--camera",
        action="append",
        metavar="NAME=COLUMN",
        help="what the recipe calls a column of images, such as agentview=observation.images.image; those alone are "
        "kept (all, each by the end of its column's name)",
    )
    robots.add_argument("--per-shard", type=int, default=256, help="samples in a tar (256)")
    reshard = commands.add_parser("reshard", help="filter, merge or cut anew")
    reshard.add_argument("sources", nargs="+", help="folders, index.json, tars, patterns or urls")
    reshard.add_argument("out", help="folder to write")
    reshard.add_argument("--where", action="append", default=[], help="meta field = != < <= > >= value; all must hold")
    reshard.add_argument("--per-shard", type=int, default=256, help="samples in a tar (256)")
    inspect = commands.add_parser("inspect", help="show samples")
    inspect.add_argument("sources", nargs="+", help="folders, index.json, tars, patterns or urls")
    inspect.add_argument("-n", type=int, default=3, help="how many (3)")
    inspect.add_argument("--save", help="folder for their media, to look at and listen to")
    return parser


def common(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", help="folder to write")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--split", default="train", help="whose questions, voices, fonts and handwriting: train or test (train)"
    )
    command.add_argument("--instruction", default="", help="text after the question, in both views")
    command.add_argument("--per-shard", type=int, default=256, help="samples in a tar (256)")
    command.add_argument("--workers", type=int, help="processes (one for each core)")


def heard(command: argparse.ArgumentParser) -> None:
    command.add_argument("--speed", type=between, help="factor, or lowest:highest")
    command.add_argument("--reverb", type=between, help="seconds, or lowest:highest")
    command.add_argument("--noise-snr", type=between, help="dB, or lowest:highest")


def spoken(command: argparse.ArgumentParser) -> None:
    command.add_argument("--accents", type=names, help="comma-separated (all: en-us,en-gb,en-gb-scotland,en-029)")
    command.add_argument(
        "--tts-command", help="another speech engine: a command with {out}, and {text} or standard input"
    )


def seen(command: argparse.ArgumentParser) -> None:
    """What is not given is slight for scenes, and left alone for images."""
    command.add_argument("--rotation", type=between, help="degrees to either side, or lowest:highest")
    command.add_argument("--blur", type=between, help="standard deviation in pixels, or lowest:highest")
    command.add_argument("--texture", type=between, help="grain, in grey levels of 255, or lowest:highest")
    command.add_argument("--jpeg", type=between, help="quality of compression, 1 to 95, or lowest:highest")


def names(value: str) -> list[str]:
    return value.split(",")


def between(value: str) -> float | tuple[float, float]:
    """ "10" or "5:20"."""
    low, colon, high = value.partition(":")
    return (float(low), float(high)) if colon else float(low)


def main() -> None:
    flagged = ["inspect" if word == "--inspect" else word for word in sys.argv[1:2]]  # a flag to those who look for one
    options = vars(arguments().parse_args(flagged + sys.argv[2:]))
    command = options.pop("command")
    run = {"reshard": reshard, "inspect": inspect, "lerobot": lerobot}.get(
        command, lambda **rest: make(command, **rest)
    )
    try:
        run(**options)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"prepare_shards: {error}")
    except KeyboardInterrupt:
        print("prepare_shards: stopped; the same command goes on after the last finished shard", file=sys.stderr)
        sys.exit(130)


def make(kind: str, out: str, **options: Any) -> None:
    if kind in ("scenes", "images"):
        from modalities.vision.prepare import prepare
    else:
        from modalities.audio.prepare import prepare

    if "tts_command" in options:
        options["command"] = options.pop("tts_command")
    began = time.monotonic()
    index = prepare(out, kind, **{name: value for name, value in options.items() if value is not None})
    seconds = time.monotonic() - began
    print(
        f"{out}: {index['total']} samples in {len(index['shardlist'])} shards, {seconds:.1f} s "
        f"({index['total'] / seconds:.0f} a second)"
    )


# ---- lerobot


def lerobot(source: str, out: str, camera: list[str] | None, **options: Any) -> None:
    from modalities.action.lerobot import write_decisions

    named = [word.partition("=") for word in camera or ()]
    if odd := [name for name, _, column in named if not (name and column)]:
        raise ValueError(f"--camera {odd[0]} is not NAME=COLUMN, such as agentview=observation.images.image")
    index = write_decisions(source, out, cameras={column: name for name, _, column in named} or None, **options)
    print(f"{out}: {index['total']} decisions in {len(index['shardlist'])} shards")


# ---- reshard


def reshard(sources: list[str], out: str, where: list[str], per_shard: int) -> None:
    from modalities.shards import write_shards

    rows, digest = chosen(sources, [condition(text) for text in where])
    settings = {"kind": "reshard", "records": digest, "where": where, "per_shard": per_shard}
    index = write_shards(out, settings, len(rows), lambda numbers: fetch([rows[n] for n in numbers]), per_shard)
    print(f"{out}: {index['total']} samples in {len(index['shardlist'])} shards")


def condition(text: str) -> tuple[str, Callable[[Any], bool]]:
    """ "seconds<10" -> the field and whether a value of it fits; numbers are compared as numbers."""
    found = re.fullmatch(r"\s*([\w.-]+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", text)
    if not found:
        raise ValueError(f"--where {text!r} is not FIELD=VALUE (or !=, <, <=, >, >=)")
    field, sign, value = found.groups()

    def fits(have: Any) -> bool:
        try:
            return COMPARE[sign](float(have), float(value))
        except (TypeError, ValueError):
            return have is not None and COMPARE[sign](str(have), value)

    return field, fits


def chosen(sources: list[str], conditions: Sequence[tuple[str, Callable[[Any], bool]]]) -> tuple[list[Any], str]:
    """((shard, place in it) of each sample that fits, or why it is broken; a digest of them all)."""
    from xmodal_opd.data import parse
    from xmodal_opd.types import SampleError

    rows, digest, fields = [], sha256(), set()
    for url, place, group in groups(sources):
        try:
            meta = parse(group)["meta"]
        except SampleError as error:
            rows.append(f"{group.get('__key__', '')} of {url}: {error}")
            continue
        fields |= set(meta)
        if all(fits(meta.get(field)) for field, fits in conditions):
            rows.append((url, place))
            digest.update(group["json"])
    if unknown := [field for field, _ in conditions if field not in fields]:
        raise ValueError(f"no sample has the meta field {unknown[0]!r}; have: {', '.join(sorted(fields)) or 'none'}")
    return rows, digest.hexdigest()[:16]


def groups(sources: list[str]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(shard, place in it, files) of every sample."""
    from xmodal_opd.data import find_shards, read_shard

    for shard in find_shards(sources):
        found, reason = read_shard(shard.url)
        if reason:
            raise ValueError(f"{shard.url} cannot be read to its end: {reason}")
        for place, group in enumerate(found):
            yield shard.url, place, group


def fetch(rows: Sequence[Any]) -> Iterator[Mapping[str, bytes] | str]:
    """Files of the chosen samples, one shard in memory at a time."""
    from xmodal_opd.data import read_shard

    now, found = None, []
    for row in rows:
        if isinstance(row, str):
            yield row
            continue
        url, place = row
        if url != now:
            now, found = url, read_shard(url)[0]
        yield {name: data for name, data in found[place].items() if not name.startswith("__")}


# ---- inspect


def inspect(sources: list[str], n: int, save: str | None) -> None:
    from xmodal_opd.data import Shards

    shards = Shards(sources, shuffle=False)
    for sample in shards.samples(epochs=1):
        print(f"{sample['__key__']} of {sample['__url__']}")
        for name, messages in sample["views"].items():
            print(f"  {name}: {' | '.join(shown(message) for message in messages)}")
        print(f"  answer: {sample['answer']}\n  meta: {sample['meta']}")
        kinds = {p[p["type"]]: p["type"] for m in chain(*sample["views"].values()) for p in parts_of(m)}
        for name, data in sample["media"].items():
            print(f"  {name}: {measured(kinds.get(name), data)}")
            if save:
                keep(Path(save), f"{sample['__key__']}.{name}", data)
        n -= 1
        if not n:
            break


def parts_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def shown(message: Mapping[str, Any]) -> str:
    said = (part["text"] if part["type"] == "text" else f"<{part[part['type']]}>" for part in parts_of(message))
    return f"{message['role']}: {' '.join(said)}"


def measured(kind: str | None, data: bytes) -> str:
    """What a file holds: seconds of sound, pixels of an image, both of a video."""
    from modalities.audio.media import read
    from modalities.vision import video
    from modalities.vision.media import decode, suffix
    from xmodal_opd.types import SampleError

    try:
        if kind == "audio":
            wave, rate = read(data)
            return f"{len(wave) / rate:.2f} s, {rate} Hz, peak {abs(wave).max():.2f}, {len(data)} bytes"
        if kind == "image":
            image = decode(data)
            return f"{image.width} x {image.height} pixels, {suffix(data).strip('.')}, {len(data)} bytes"
        if kind == "video":
            (*_, (seconds, frame)) = video.decode(data, fps=1000, most=2)  # the first and the last
            return f"{seconds:.2f} s, {frame.width} x {frame.height} pixels, {len(data)} bytes"
    except SampleError as error:
        return f"{len(data)} bytes; {error}"
    return f"{len(data)} bytes"


def keep(folder: Path, name: str, data: bytes) -> None:
    """A file in the folder, wherever the name of a tar's member points."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / re.sub(r"[/\\]", "_", name)).write_bytes(data)


if __name__ == "__main__":
    main()
