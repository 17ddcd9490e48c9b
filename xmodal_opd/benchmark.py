"""A model's greedy answers to benchmarks, kept question by question, so that a run that was killed goes on."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import batched, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from xmodal_opd import evaluate
from xmodal_opd.data import ENOUGH, TOLERATED
from xmodal_opd.scoring.benchmarks import Verdict
from xmodal_opd.scoring.rules import Doc
from xmodal_opd.types import Adapter, Pair, Rollout, SampleError, Sampler, Sampling

Read = Callable[[], Mapping[str, Any]]  # a sample as shards have it; raises SampleError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """`questions`: key and sample of each, read once and when it is asked for."""

    name: str
    questions: Iterable[tuple[str, Read]]
    count: int
    score: Callable[[Sequence[str], Sequence[Doc]], list[Verdict]]


@dataclass
class Tally:
    """How many questions were seen, and which are broken."""

    name: str
    seen: dict[str, int] = field(default_factory=dict)  # key -> place in the benchmark, from 0
    broken: dict[str, str] = field(default_factory=dict)

    def skip(self, key: str, reason: str) -> None:
        log.warning("left out of %s: %s", self.name, reason)
        self.broken[key] = reason
        self.check(ENOUGH)

    def check(self, enough: int) -> None:
        """Raises RuntimeError when more than 1 % of at least `enough` questions are broken."""
        if len(self.seen) >= enough and len(self.broken) > TOLERATED * len(self.seen):
            share = f"{len(self.broken)} of {len(self.seen)} questions of {self.name} are broken"
            named = "; ".join(list(self.broken.values())[-3:])
            raise RuntimeError(f"{share}, more than {TOLERATED:.0%}; the last ones: {named}")


def answer(
    benchmarks: Sequence[Benchmark],
    adapter: Adapter,
    sampler: Sampler,
    output: Path,
    *,
    batch: int,
    run: Mapping[str, Any],
    view: str = "student",
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Records of all questions, of the first `limit` of each benchmark, each with its `place` in the benchmark from 0;
    those that `output` holds are not asked again.

    `run` is what the answers depend on; it goes into every record, and an output of another run is refused. Raises
    RuntimeError when more than 1 % of a benchmark's questions are broken; what was answered stays.
    """
    records, places = kept(output, run), dict[tuple[str, str], int]()
    with output.open("a", encoding="utf-8") as file:
        for benchmark in benchmarks:
            tally = Tally(benchmark.name)
            done = {r["key"] for r in records if r["benchmark"] == benchmark.name}
            total = min(benchmark.count, limit or benchmark.count)
            todo = watched(islice(benchmark.questions, limit), benchmark.name, total)
            for some in batched(pairs(todo, adapter, done, tally), batch):
                rollouts = sampler.generate(some, {"": Sampling(temperature=0.0, view=view)}, seed=0)[""]
                verdicts = benchmark.score([r.text for r in rollouts], [r.pair.meta["doc"] for r in rollouts])
                new = [record(benchmark.name, *one, run) for one in zip(rollouts, verdicts, strict=True)]
                file.write("".join(json.dumps(r) + "\n" for r in new))
                file.flush()
                records += new
            tally.check(1)
            places |= {(benchmark.name, key): place for key, place in tally.seen.items()}
    records = [r | {"place": places.get((r["benchmark"], r["key"]))} for r in records]
    return [r for r in records if r["place"] is not None]  # the output may hold more


def watched[T](questions: Iterable[T], name: str, total: int) -> Iterable[T]:
    """The same, with a bar on a terminal."""
    console = Console(stderr=True)
    return track(questions, name, total, console=console, transient=True, disable=not console.is_terminal)


def pairs(questions: Iterable[tuple[str, Read]], adapter: Adapter, done: set[str], tally: Tally) -> Iterator[Pair]:
    """Those that are still to be answered; broken ones are counted and left out."""
    for key, read in questions:
        tally.seen.setdefault(key, len(tally.seen))
        if key in done:
            continue
        try:
            yield adapter.pair(read())
        except SampleError as error:
            tally.skip(key, str(error))


def record(name: str, rollout: Rollout, verdict: Verdict, run: Mapping[str, Any]) -> dict[str, Any]:
    """One question: what was asked and answered, the answer that was read (`extracted`) and how, right or wrong."""
    pair = rollout.pair
    return {
        "benchmark": name,
        "key": pair.key,
        "task": pair.meta["task"],
        "question": pair.meta["question"],
        "answer": pair.answer,
        "response": rollout.text,
        "finished": rollout.finished,
        **verdict._asdict(),
        **run,
    }


def kept(output: Path, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The decided records an output holds. A line that a kill tore, undecided ones, and those of other weights that
    were at the same place are taken out of the file.

    Raises ValueError when they are of another run.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    text = output.read_text(encoding="utf-8") if output.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        records = [r for line in lines if (r := json.loads(line))["correct"] is not None]
        fixed = [(name, value) for name, value in run.items() if name != "weights"]
        other = next(((name, r[name], value) for r in records for name, value in fixed if r[name] != value), None)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{output} is not a file of answers to benchmarks; name another with --output") from None
    if other:
        raise ValueError(
            f"{output} holds answers with {other[0]} {other[1]!r}, and this run has {other[2]!r}; name another file "
            "with --output"
        )
    here = [r for r in records if r.get("weights") == run.get("weights")]
    if len(here) < len(records):
        log.warning(
            "%s: %d answers are of weights that are no longer there: asked anew", output, len(records) - len(here)
        )
    if text:
        evaluate.write(here, output)
    return here
