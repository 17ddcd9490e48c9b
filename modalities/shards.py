"""Samples -> WebDataset tars with an index.json beside them. Knows no modality.

The bytes depend on the samples alone: not on the clock, the user, the number of workers or an interruption. A shard
is written aside, fsynced and renamed; the index comes last. Started again with the same settings, it keeps finished
shards.
"""

import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

INDEX, UNFINISHED = "index.json", "index.json.part"
TOLERATED = 0.01  # share of records that may be refused

Files = Mapping[str, bytes]  # one sample: extension -> contents, "json" among them
Render = Callable[[Sequence[int]], Iterable[Files | str]]  # sample numbers -> their files, or why one is refused


log = logging.getLogger(__name__)


def write_shards(
    folder: str | Path,
    settings: Mapping[str, Any],
    total: int,
    render: Render,
    per_shard: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Write samples 0..total-1 to `folder`/shard-*.tar and return the index: counts, checksums, settings.

    Raises ValueError when the folder holds shards of other settings, when there are no records, and when more than 1 %
    of them are refused (each is named in a warning).
    """
    folder, plain = Path(folder), json.loads(json.dumps(settings))
    shards = _plan(total, per_shard)
    kept = _claim(folder, plain, list(shards))
    todo = {name: numbers for name, numbers in shards.items() if name not in kept}
    done = read_index(folder)
    if not todo and done and "shardlist" in done:  # another run may be reading them
        return done
    refused = sum(len(shards[name]) - count_samples(folder / name) for name in kept)
    rendered = iter(render([n for numbers in todo.values() for n in numbers]) if todo else ())
    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        samples = bar.track(rendered, total=sum(map(len, todo.values())), description=f"writing {folder}")
        for name, numbers in todo.items():
            good, bad = _split(zip(numbers, islice(samples, len(numbers)), strict=True))
            refused += len(bad)
            _check(refused, total, bad)
            _write_aside(folder / name, tar_bytes({f"{n:08d}": files for n, files in good.items()}))
    return _publish(folder, plain, shards)


def _split(samples: Iterable[tuple[int, Files | str]]) -> tuple[dict[int, Files], list[str]]:
    good, bad = {}, []
    for number, files in samples:
        if isinstance(files, str):
            log.warning("skipped %s", files)
            bad.append(files)
        else:
            good[number] = files
    return good, bad


def _plan(total: int, per_shard: int) -> dict[str, range]:
    if total < 1 or per_shard < 1:
        raise ValueError(f"nothing to write: {total} records, {per_shard} to a shard")
    starts = range(0, total, per_shard)
    return {f"shard-{i:06d}.tar": range(at, min(at + per_shard, total)) for i, at in enumerate(starts)}


def _check(refused: int, total: int, last: Sequence[str]) -> None:
    if refused > TOLERATED * total:
        named = "; ".join(last[-3:])
        raise ValueError(
            f"{refused} of {total} records cannot be used, more than {TOLERATED:.0%}; the last ones: {named}"
        )


# ---- keeping what an earlier run finished


def _claim(folder: Path, settings: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Names of finished shards; marks the folder as these settings' own. Raises ValueError when it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    found = read_index(folder)
    have = [name for name in names if (folder / name).exists()]
    if found is None:
        if next(folder.glob("*.tar"), None):
            raise ValueError(f"{folder} holds tars of unknown origin; give another folder, or delete them")
        _write_aside(folder / UNFINISHED, json.dumps({"settings": settings}).encode())
        return []
    if different := differences(found.get("settings", {}), settings):
        raise ValueError(f"{folder} holds shards of other settings ({different}); give another folder, or delete it")
    sizes = {entry["url"]: entry["filesize"] for entry in found.get("shardlist", [])}
    return [name for name in have if (size := (folder / name).stat().st_size) == sizes.get(name, size)]


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """The index of finished shards, of an unfinished run (no "shardlist"), or None."""
    for name in (INDEX, UNFINISHED):
        if (path := Path(folder, name)).exists():
            try:
                return json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is broken ({error}); delete it, and its shards, to make them anew") from None
    return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """ "seed: 0, now 1" for each setting that differs; "" when none does."""
    names = sorted({*old, *new})
    return ", ".join(f"{n}: {old.get(n)!r}, now {new.get(n)!r}" for n in names if old.get(n) != new.get(n))


def _publish(folder: Path, settings: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    shards = [describe(folder / name) for name in names]
    index = {
        "__kind__": "wids-shard-index-v1",  # webdataset's own form, with sha256 and what follows added
        "wids_version": 1,
        "shardlist": shards,
        "total": sum(shard["nsamples"] for shard in shards),
        "settings": settings,
    }
    _write_aside(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False).encode())
    (folder / UNFINISHED).unlink(missing_ok=True)
    return index


def describe(path: Path) -> dict[str, Any]:
    """Index entry of one shard."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    return {"url": path.name, "nsamples": count_samples(path), "filesize": size, "sha256": digest}


def count_samples(path: Path) -> int:
    with tarfile.open(path) as tar:
        return len({name.partition(".")[0] for name in tar.getnames()})


# ---- bytes


def tar_bytes(samples: Mapping[str, Files]) -> bytes:
    """A tar of {key: {extension: contents}} with nothing in it that depends on when or by whom it was made."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in samples.items():
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")  # time, user and group are zero
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _write_aside(path: Path, data: bytes) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.aside")  # two runs may be making the same shards
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); the shards before it are good: go on after") from error
    if os.name == "posix":
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
