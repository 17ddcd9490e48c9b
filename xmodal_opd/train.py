"""The loop: evaluate, train, save, evaluate again, and say what became of the gap."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from xmodal_opd import checkpoint, config, dist, evaluate, figures, schema, statistics
from xmodal_opd.build import Parts, build
from xmodal_opd.build.engines import launch
from xmodal_opd.build.shards import open_shards, training_pairs
from xmodal_opd.data import dealt
from xmodal_opd.measure import PROBE, aligned, evaluated
from xmodal_opd.metrics import Record, recording
from xmodal_opd.provenance import provenance
from xmodal_opd.step import train_step
from xmodal_opd.types import Pair

PATIENCE = 3  # steps in a row without a finite gradient


def train(recipe: schema.Recipe, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Run a recipe to its end in its run folder; returns the summary. With `resume`, go on from its last checkpoint.

    Every process of a launch by torchrun or deepspeed calls this; rank 0 alone writes the run folder and prints.

    Raises ValueError, RuntimeError or OSError in one sentence for what cannot be run; what was saved stays good.
    SystemExit(130 or 143) when stopped by Ctrl-C or SIGTERM, after the step and a checkpoint.
    """
    began = time.monotonic()
    launch(recipe)
    with dist.losing_a_rank_is_told():
        return train_here(recipe, resume, command, began)


def train_here(recipe: schema.Recipe, resume: bool, command: str, began: float) -> dict[str, Any]:
    run = dist.decided(run_folder(recipe, resume))
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    torch.manual_seed(recipe.train.seed)
    parts = build(recipe, run)
    training, testing = open_shards(recipe)
    state = begin(parts, run, resume, command)
    tests = [pair for _, pair in islice(testing.pairs(parts.adapter, epochs=1), recipe.eval.samples)]
    parts = aligned(parts, tests[:PROBE])
    before = evaluated(parts, tests, run / "eval" / "before.jsonl")
    if state["step"] < recipe.train.steps:
        (run / "eval" / "after.jsonl").unlink(missing_ok=True)  # of a shorter run that now goes on
    with checkpoint.room_on_disk(run), recording(run, state["step"], recipe.train.steps) as record:
        loop(parts, training_pairs(parts, training, state["position"]), tests, state, run, record, began)
        after = evaluated(parts, tests, run / "eval" / "after.jsonl")
    about = {"method": recipe.name, "seed": recipe.train.seed, "modality": recipe.modality}
    about["episodes"] = state["episodes"]
    summary = about | statistics.summary(before, after, elapsed(state, began))
    if dist.rank() == 0:
        (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        figures.curves(run)
    return summary | {"run_dir": str(run)}


def loop(
    parts: Parts,
    pairs: Iterator[tuple[int, Pair]],
    tests: list[Pair],
    state: dict[str, Any],
    run: Path,
    record: Record,
    began: float,
) -> None:
    """Steps until the recipe's last. `state` (see `begin`) is what a resumed run starts from."""
    recipe, coming = parts.recipe, None
    questions = dealt(pairs, state["position"], recipe.train.prompts // dist.world())
    with stop_requests() as stop:
        for number in range(state["step"], recipe.train.steps):
            asked, done = time.monotonic(), number + 1
            position, taken = coming or next(questions)
            coming = next(questions) if recipe.rollout.ahead and done < recipe.train.steps else None
            waited = time.monotonic() - asked
            values = train_step(parts, taken, number, coming and coming[1])
            values |= {"data_wait": waited, "step_time": time.monotonic() - asked}
            stops = [s for some in dist.gather(stop[:1]) for s in some]
            state |= {"step": done, "position": position, "skipped": skipped_in_a_row(values, state, number)}
            state["episodes"] += round(values.get("episodes", 0))
            if recipe.eval.every and done % recipe.eval.every == 0:
                values |= evaluate.accuracies(evaluated(parts, tests[: recipe.eval.during], None))
            record(done, values)
            if done % recipe.checkpoint.every == 0 or done == recipe.train.steps or stops:
                save(parts, run, state, began)
            if stops:
                dist.say(f"stopped after step {done} and saved; go on with --resume run_dir={run}")
                raise SystemExit(128 + stops[0])


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM wait for the end of the step, in the list; a second one interrupts at once."""
    stop: list[int] = []

    def note(number: int, _frame: object) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def skipped_in_a_row(values: dict[str, float], state: dict[str, Any], number: int) -> int:
    """How many steps running had no finite gradient. Raises RuntimeError at the third, naming the terms."""
    row = state["skipped"] + 1 if values["skipped"] else 0
    if row == PATIENCE:
        bad = [name for name, v in values.items() if name.startswith("loss/") and v - v != 0]
        raise RuntimeError(
            f"{PATIENCE} steps in a row, up to step {number + 1}, had no finite gradient "
            f"(terms that are not finite: {', '.join(bad) or 'none, so it is the backward pass'}); lower optim.lr or "
            "look at the data of these steps; the last checkpoint is from before them"
        )
    return row


# ---- the run folder


def run_folder(recipe: schema.Recipe, resume: bool) -> Path:
    """The recipe's run_dir, or runs/NAME-DATE. Raises ValueError when it holds a run and this is not its resumption, or
    checkpoints without the recipe they are of."""
    date = time.strftime("%Y%m%d-%H%M%S")
    run = Path(recipe.run_dir or (checkpoint.last_run(recipe.name) if resume else f"runs/{recipe.name}-{date}"))
    known = (run / "recipe.yaml").exists()
    if known and not resume:
        raise ValueError(
            f"{run} already holds a run; go on with it by --resume, or name another folder by run_dir=PATH"
        )
    if checkpoint.latest(run) and not known:
        raise ValueError(
            f"{run} holds checkpoints, but not the recipe.yaml they are of; put it back and go on with them by "
            "--resume, or name another folder by run_dir=PATH"
        )
    return run


def begin(parts: Parts, run: Path, resume: bool, command: str) -> dict[str, Any]:
    """Write what identifies the run, or with `resume` fill the parts from its last checkpoint."""
    if resume and not (run / "recipe.yaml").is_file():
        dist.say(f"nothing to resume in {run}: a new run begins there")
    elif resume:
        config.refuse_another_recipe(run / "recipe.yaml", parts.recipe)
    found = dist.decided(checkpoint.latest(run) if resume else None)
    if found:
        state = checkpoint.load(found, parts.student, parts.engine, parts.models.get("ema"))
        parts.memory.update(state.pop("memory", {}))
        return {"episodes": 0} | state
    if dist.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(config.dump(parts.recipe))
        (run / "provenance.json").write_text(json.dumps(provenance(command), indent=2) + "\n")
    return {"step": 0, "position": 0, "seconds": 0.0, "skipped": 0, "episodes": 0}


def save(parts: Parts, run: Path, state: dict[str, Any], began: float) -> None:
    checkpoint.save(
        run,
        parts.student,
        parts.processor,
        parts.engine,
        state | {"seconds": elapsed(state, began), "memory": parts.memory},
        keep=parts.recipe.checkpoint.keep,
        ema=parts.models.get("ema"),
    )


def elapsed(state: dict[str, Any], began: float) -> float:
    """Seconds of this run over all its sessions."""
    return state["seconds"] + time.monotonic() - began
