"""WebDataset shards -> samples. The order is a pure function of (seed, epoch), and a position is one integer.

Position p is the p-th sample of the endless sequence epoch 0, epoch 1, ...; broken samples count, so that a resumed
run lands on the same one. Rank r of w takes the positions with p % w == r and resumes from its own. Each epoch
shuffles the shards, then the samples inside each shard: a shard is held in memory whole (keep it below some 10^4
samples and 1 GB), and every rank reads every shard. With counts (index.json) finished shards are skipped unread;
without, the first epoch counts.
"""

import difflib
import glob
import json
import logging
import os
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from xmodal_opd import dist
from xmodal_opd.types import Adapter, Pair, SampleError

INDEX = "index.json"  # the "wids" form: {"shardlist": [{"url", "nsamples", ...}]}
TOLERATED = 0.01  # share of broken samples
ENOUGH = 100  # samples to see before that share means anything
MAKES = "shards are made by tools/prepare_shards.py, as a recipe's header tells, or by data.prepare where it has one"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    url: str  # a path, or anything webdataset opens: http(s)://, pipe:, file:
    samples: int | None  # None: no index says
    repeats: tuple[int, ...] | None = None  # how often each sample comes in an epoch, where an index says so; else once

    @property
    def slots(self) -> int | None:
        """Positions of the shard in an epoch."""
        return self.samples if self.repeats is None else sum(self.repeats)


# ---- where the shards are


def find_shards(source: str | Sequence[str]) -> list[Shard]:
    """Shards of a folder, an index (.json), a path or url with {0..9} braces (local: or *), or a list of these.

    Raises FileNotFoundError naming what is missing and what exists.
    """
    shards = [shard for one in ([source] if isinstance(source, str) else source) for shard in _expand(one)]
    for shard in shards:
        if _local(shard.url) and not os.path.exists(shard.url):
            raise FileNotFoundError(_missing(Path(shard.url)))
    return shards


def _expand(source: str) -> list[Shard]:
    if os.path.isdir(source):
        source = os.path.join(source, INDEX if os.path.exists(os.path.join(source, INDEX)) else "*.tar")
    if source.endswith(".json") and not source.startswith("pipe:"):
        return _indexed(source)
    urls = [url for pattern in expand_urls(source) for url in sorted(glob.glob(pattern)) or [pattern]]
    beside = {os.path.join(os.path.dirname(url), INDEX) for url in urls if _local(url)}
    known = {shard.url: shard for index in beside if os.path.exists(index) for shard in _indexed(index)}
    return [known.get(url) or Shard(url, None) for url in urls]


def _indexed(place: str) -> list[Shard]:
    """The shards an index lists; their urls are relative to it."""
    try:
        with gopen(place) as stream:
            entries = json.loads(stream.read())["shardlist"]
        urls = [entry["url"] for entry in entries]
        if any(url.lower().startswith("pipe:") for url in urls):
            raise ValueError("it names a command")
        folder = os.path.dirname(place)
        urls = [url if "://" in url else os.path.join(folder, url) for url in urls]
        counts = [None if (n := entry.get("nsamples")) is None else int(n) for entry in entries]
        repeats = [_repeats(entry, count) for entry, count in zip(entries, counts, strict=True)]
        return [Shard(*shard) for shard in zip(urls, counts, repeats, strict=True)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the index {place} cannot be used ({error!r}); write it anew, or delete it") from None


def _repeats(entry: Mapping[str, Any], count: int | None) -> tuple[int, ...] | None:
    repeats = entry.get("repeats")
    if repeats is None:
        return None
    if len(repeats) != count or not all(isinstance(n, int) and n >= 0 for n in repeats):
        raise ValueError(f"the repeats of {entry['url']} are not {count} whole numbers from 0")
    return tuple(repeats)


def _local(url: str) -> bool:
    return len(urlparse(url).scheme) < 2  # one letter is a Windows drive


def _missing(path: Path) -> str:
    have = sorted(other.name for other in path.parent.glob("*.tar"))
    near = difflib.get_close_matches(path.name, have, 1)
    hint = f"did you mean {near[0]}?" if near else MAKES
    listed = f"{path.parent} has {', '.join(have[:8]) or 'no tar'}{', ...' if len(have) > 8 else ''}"
    folder = path.parent if path.suffix else path
    return f"no shard {path}: {listed if folder.is_dir() else f'there is no folder {folder}'}; {hint}"


# ---- one shard, one sample


def read_shard(url: str) -> tuple[list[dict[str, Any]], str]:
    """(samples as groups of files by extension, why reading stopped early or ""). Nothing is extracted to disk."""
    errors, groups = [], []

    def stop(error: Exception) -> bool:
        errors.append(error)
        return False

    try:
        with gopen(url) as stream:
            files = tar_file_expander([{"url": url, "stream": stream}], handler=stop, eof_value=None)
            groups.extend(group_by_keys(files, lcase=False, handler=stop))
    except OSError as error:
        errors.append(error)
    return groups, "; ".join(_reason(error) for error in errors)[:300]


def _reason(error: Exception) -> str:
    # webdataset appends the stream and url to the arguments, which only hide the message
    return error.args[0] if error.args and isinstance(error.args[0], str) else str(error) or repr(error)


def parse(group: Mapping[str, Any]) -> dict[str, Any]:
    """Files of one sample -> {"__key__", "__url__", "views", "answer", "meta", "media": {file name: bytes}}.

    Where the meta has no "modality", it is said by the media of the student's view. Raises SampleError for a missing or
    broken json, malformed views, or a media file that is not there.
    """
    if "json" not in group:
        raise SampleError("it has no .json file")
    try:
        record = json.loads(group["json"])
    except ValueError as error:
        raise SampleError(f"its .json is broken: {error}") from None
    media = {name: data for name, data in group.items() if name != "json" and not name.startswith("__")}
    if not isinstance(record, dict) or not isinstance(record.get("views"), dict) or not record["views"]:
        raise SampleError('its .json has no "views": {"student": [messages], "teacher": [messages]}')
    for view, messages in record["views"].items():
        _check_view(view, messages, media)
    answer, meta = record.get("answer"), record.get("meta") or {}
    if not isinstance(meta, dict):
        raise SampleError(f'its "meta" is {type(meta).__name__}, not a mapping')
    meta = {"modality": modality(record["views"].get("student", ())), **meta}
    named = {"views": record["views"], "answer": None if answer is None else str(answer), "meta": meta, "media": media}
    return {"__key__": group["__key__"], "__url__": group["__url__"], **named}


def modality(messages: Sequence[Mapping[str, Any]]) -> str:
    """What messages are made of besides words: "audio", "image", "video", "audio+image", …; "text" for words alone."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return "+".join(sorted({part["type"] for part in parts} - {"text"})) or "text"


def _check_view(view: str, messages: Any, media: Mapping[str, bytes]) -> None:
    try:
        parts = [part for m in messages if m["role"] and not isinstance(m["content"], str) for part in m["content"]]
        absent = [file for part in parts if part["type"] != "text" and (file := part[part["type"]]) not in media]
    except (TypeError, KeyError) as error:
        raise SampleError(f"view {view!r} is not a list of messages with content parts ({error!r})") from None
    if absent:
        raise SampleError(f"view {view!r} names the file {absent[0]!r}; the shard has {', '.join(media) or 'none'}")


# ---- all of them


class Shards:
    """The samples of one rank, without end; `seen`, `skipped`, `broken` {(shard, key): reason} tell what happened."""

    def __init__(
        self,
        source: str | Sequence[str],
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        views: Collection[str] = (),  # that every sample must have
        needs: Callable[[Mapping[str, Any]], Collection[str]] = lambda meta: (),  # and more, by meta; or a SampleError
    ):
        self.views, self.needs = frozenset(views), needs
        self.shards = find_shards(source)
        self.counts = [shard.slots for shard in self.shards]
        self.seed, self.shuffle, self.rank, self.world = seed, shuffle, rank, world
        self.seen, self.skipped = 0, 0
        self.broken: dict[tuple[str, str], str] = {}

    def __len__(self) -> int:
        """Samples in one epoch over all ranks, each as often as it comes. Raises TypeError while a shard without index
        has not been read."""
        known = [count for count in self.counts if count is not None]
        if len(known) < len(self.counts):
            url = self.shards[self.counts.index(None)].url
            raise TypeError(f"the number of samples is not known: no {INDEX} counts those of {url}")
        return sum(known)

    def pairs(self, adapter: Adapter, start: int = 0, epochs: int | None = None) -> Iterator[tuple[int, Pair]]:
        """(where to resume after it, pair); what the adapter refuses with SampleError counts as broken."""
        for sample in self.samples(start, epochs):
            try:
                pair = adapter.pair(sample)
            except SampleError as error:
                self._skip(sample["__url__"], sample["__key__"], str(error))
            else:
                yield sample["__position__"], pair

    def samples(self, start: int = 0, epochs: int | None = None) -> Iterator[dict[str, Any]]:
        """Samples as `parse` gives them from position `start`, each with "__position__": where to resume after it.

        Ends after epoch number `epochs`. Raises RuntimeError when more than 1 % are broken.
        """
        for position, shard, group, reason in self._walk(start, epochs):
            if (position - 1) % self.world == self.rank and (sample := self._parsed(shard, group, reason)):
                yield {**sample, "__position__": position}

    def _walk(self, start: int, epochs: int | None) -> Iterator[tuple[int, int, dict[str, Any], str]]:
        """(position after it, shard, files, why they are missing) of the samples of all ranks from `start`."""
        size = 0 if None in self.counts else len(self)
        epoch = start // size if size else 0
        position = epoch * size
        while epochs is None or epoch < epochs:
            for shard in self._order(epoch, "shards", len(self.shards)):
                count = self.counts[shard]
                if count is not None and position + count <= start:
                    position += count
                    continue
                for group, reason in self._slots(epoch, shard):
                    position += 1
                    if position > start:
                        yield position, shard, group, reason
            if not len(self):
                raise ValueError(f"no samples in {', '.join(shard.url for shard in self.shards[:8])}")
            self._check(min(ENOUGH, max(1, len(self) // self.world)))
            epoch += 1

    def _order(self, epoch: int, what: str, size: int) -> list[int]:
        order = list(range(size))
        if self.shuffle:
            random.Random(f"{self.seed} {epoch} {what}").shuffle(order)
        return order

    def _slots(self, epoch: int, shard: int) -> Iterator[tuple[dict[str, Any], str]]:
        """The samples of a shard in the epoch's order; an empty one with a reason for each that is not there."""
        url, count, repeats = self.shards[shard].url, self.shards[shard].samples, self.shards[shard].repeats
        groups, reason = read_shard(url)
        if count is None:  # one slot stands for all that could not be read
            count = self.counts[shard] = self.counts[shard] or len(groups) + bool(reason)
        if len(groups) > count:
            raise ValueError(f"{url} has {len(groups)} samples and its {INDEX} says {count}; write the index anew")
        reason = reason or f"the shard ends after {len(groups)} of {count} samples"
        places = list(range(count)) if repeats is None else [p for p, n in enumerate(repeats) for _ in range(n)]
        for slot in self._order(epoch, f"shard {shard}", len(places)):
            place = places[slot]
            yield (groups[place], "") if place < len(groups) else ({"__key__": f"number {place}"}, reason)

    def _parsed(self, shard: int, group: Mapping[str, Any], reason: str) -> dict[str, Any] | None:
        self.seen += 1
        try:
            if reason:
                raise SampleError(reason)
            sample = parse(group)
            if absent := self.views.union(self.needs(sample["meta"])) - sample["views"].keys():
                raise SampleError(f"it has no view {min(absent)!r} (has: {', '.join(sample['views'])})")
            return sample
        except SampleError as error:
            self._skip(self.shards[shard].url, group["__key__"], str(error))

    def _skip(self, url: str, key: str, reason: str) -> None:
        self.skipped += 1
        if (url, key) not in self.broken:  # every epoch meets it again
            log.warning("skipped sample %s of %s: %s", key, url, reason)
        self.broken[url, key] = reason
        self._check(ENOUGH)

    def _check(self, enough: int) -> None:
        if self.seen >= enough and self.skipped > TOLERATED * self.seen:
            named = "; ".join(f"{key} of {url}: {reason}" for (url, key), reason in list(self.broken.items())[-3:])
            raise RuntimeError(
                f"{self.skipped} of {self.seen} samples are broken, more than {TOLERATED:.0%}; the last ones: {named}"
            )


def dealt(pairs: Iterator[tuple[int, Pair]], position: int, count: int) -> Iterator[tuple[int, list[Pair]]]:
    """This rank's `count` pairs of every step, and the position where all ranks are after it: one that skipped broken
    samples is ahead, and the others leave out what it has passed, so that one number tells where every rank is."""
    while True:
        taken = list(islice(((after, pair) for after, pair in pairs if after > position), count))
        position = max(dist.gather(taken[-1][0]))
        yield position, [pair for _, pair in taken]
