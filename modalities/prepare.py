"""Drafts of samples -> shards, in parallel: what the preparing of every modality shares."""

import json
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from hashlib import file_digest, sha256
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from modalities.records import INLINE, Draft, opened, read_lines
from modalities.shards import write_shards
from xmodal_opd.types import SampleError

Range = float | Sequence[float] | None  # one value, or lowest and highest
Drafts = list[Draft | str]  # a record that cannot be used is the reason why
Reader = Callable[[Mapping[str, Any], str, str], Draft]  # (record, where it is, instruction)
Render = Callable[[tuple[int, Any]], Mapping[str, bytes] | str]  # (number, draft) -> its files, or why it is refused


def write_drafts(
    folder: str | Path,
    kind: str,
    drafts: Drafts,
    render: Render,
    settings: Mapping[str, Any],
    *,
    ready: Callable[[], object],
    per_shard: int,
    workers: int | None,
    progress: bool,
) -> dict[str, Any]:
    """Shards of the drafts in `folder`, or those that are there when the settings are the same; returns their index.

    render: a pure function. ready: raises here what each worker would raise. workers: processes, by default one for
    each core; the bytes do not depend on it. Raises ValueError as `write_shards` does.
    """
    settings = {"kind": kind, "records": digest(drafts), "per_shard": per_shard, **settings}

    def samples(numbers: Sequence[int]) -> Iterator[Mapping[str, bytes] | str]:
        ready()
        return _map(render, [(n, drafts[n]) for n in numbers], workers or os.cpu_count() or 1)

    return write_shards(folder, settings, len(drafts), samples, per_shard, progress)


def digest(drafts: Iterable[Draft | str]) -> str:
    """A name for the contents: the same questions, in the same order, in the same words."""
    plain = [draft if isinstance(draft, str) else asdict(draft) for draft in drafts]
    return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def contents(sources: Iterable[str], base: Path, kind: str) -> dict[str, str]:
    """{"media": a name for what the files of these sources hold}: shards are of other settings when one is another
    picture or recording under the same name. Nothing where no source is a file; what a record holds itself is in its
    digest."""
    told = [_content(source, base, kind) for source in sources if not source.startswith(("data:", INLINE))]
    return {"media": sha256("".join(told).encode()).hexdigest()[:16]} if told else {}


def _content(source: str, base: Path, kind: str) -> str:
    """A digest of a file, or why it cannot be read: that is told when its sample is made."""
    try:
        with Path(str(opened(source, base, kind))).open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except (SampleError, OSError) as error:
        return str(error)


def read_drafts(file: str | Path, read: Reader, instruction: str) -> Drafts:
    """A draft for each record of a JSON-lines file."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file of records {file}")
    lines = read_lines(Path(file).read_text("utf-8"), Path(file).name)
    return [_draft(read, where, record, instruction) for where, record in lines]


def _draft(read: Reader, where: str, record: Any, instruction: str) -> Draft | str:
    if isinstance(record, str):
        return f"{where}: {record}"
    try:  # what writes tables as JSON lines writes null where a record has no such field
        return read({name: value for name, value in record.items() if value is not None}, where, instruction)
    except SampleError as error:
        return f"{where}: {error}"
    except (TypeError, KeyError, AttributeError) as error:
        return f"{where}: a field is not of the form it should have ({error!r})"


def known(families: Sequence[str], have: Mapping[str, Any], count: int) -> None:
    """Raises ValueError for a task that there is not, and for a number of questions that makes no sense."""
    if count < 1:
        raise ValueError(f"count is {count}; it is a number of questions from 1 on")
    if unknown := [name for name in families if name not in have]:
        raise ValueError(f"there is no task {unknown[0]!r}; have: {', '.join(have)}")


def record_bytes(draft: Draft, meta: Mapping[str, Any]) -> bytes:
    """The sample's JSON; `meta` is what was learnt of its media. A record's own `source` stays."""
    views = {"student": draft.student, "teacher": draft.teacher}
    record = {"views": views, "answer": draft.answer, "meta": {"source": draft.where, **draft.meta, **meta}}
    return json.dumps(record, ensure_ascii=False).encode()


def bounded(options: Any, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raises ValueError for an effect that is out of its bounds, or neither a value nor lowest and highest."""
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        ends = () if value is None else (value,) if isinstance(value, (int, float)) else tuple(value)
        fits = all(least <= end <= most for end in ends) and list(ends) == sorted(ends)
        if not fits or (ends != (value,) and len(ends) not in (0, 2)):
            raise ValueError(f"{name} is {value}; it is a number from {least} to {most}, or lowest and highest")


def within(value: float | Sequence[float], rng: random.Random) -> float:
    return value if isinstance(value, (int, float)) else rng.uniform(*value)


# ---- in parallel


def _map(each: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> Iterator[Any]:
    workers = min(workers, 1 + len(jobs) // 128)  # a process takes seconds to start
    if workers == 1:
        yield from _alone(each, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_work) as pool:
        yield from pool.map(each, jobs, chunksize=16)


def _alone(each: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in a fixed order
    try:
        yield from map(each, jobs)
    finally:
        torch.set_num_threads(threads)


def _begin_work() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a killed parent would leave its workers waiting on each other's pipes for ever
    if parent := parent_process():
        parent.join()
        os._exit(1)
