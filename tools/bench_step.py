#!/usr/bin/env python
"""Time a recipe's training step: where its seconds go, its peak memory, tokens per second.

    python tools/bench_step.py configs/cord_audio.yaml --repeats 5
    python tools/bench_step.py configs/cord_audio.yaml --group 8      # a shared prompt against a repeated one

The first prints seconds and share of each part of real training steps, after one that warms up; the shares add up to
the whole, since a part's time leaves out what is timed inside it (features and encoder are parts of their own wherever
they run). The second prints seconds of sampling, of loss and gradient, and how far the two gradients are apart.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

# ---- where the time of a step goes


class Clock:
    """Seconds by part, each without the parts inside it. What other threads do beside the step counts apart."""

    def __init__(self, settle: Callable[[], Any]):
        self.settle = settle  # waits for the device, so that its work counts where it was asked for
        self.spent: dict[str, float] = defaultdict(float)
        self.inside: list[str] = []
        self.since = 0.0

    def turn(self) -> None:
        """What passed since the last turn belongs to the part the clock is in."""
        self.settle()
        now = time.perf_counter()
        if self.inside:
            self.spent[self.inside[-1]] += now - self.since
        self.since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            began = time.perf_counter()
            yield
            self.spent[f"({name}, beside)"] += time.perf_counter() - began
            return
        self.turn()
        self.inside.append(name)
        try:
            yield
        finally:
            self.turn()
            self.inside.pop()

    def timed(self, function: Callable, name: str | Callable[..., str]) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args, **options)):
                return function(*args, **options)

        return call


def which(_self: Any, _model: Any, _rollouts: Any, _view: str, grad: bool = False) -> str:
    """The forward of answers, with gradient or without."""
    return "student forward" if grad else "teacher"


@contextmanager
def watched(parts: Any, clock: Clock) -> Iterator[None]:
    """Within, the parts of a step are timed from outside."""
    from xmodal_opd import collect, models, step
    from xmodal_opd.scoring.forward import Responses

    places = [
        (type(parts.sampler), "generate", "sampling"),
        (type(parts.sampler), "sync", "sync"),
        (type(parts.adapter), "batch", "features"),
        *((kind, "forward", "encoder") for kind in {type(e) for e in models.encoders(parts.student)}),
        (collect, "rewards_of", "judge"),
        (collect, "local_scores", "teacher"),
        (Responses, "hidden", which),
        (step, "micro_loss", "objective"),
        (type(parts.engine), "backward", "backward"),
        (type(parts.engine), "step", "optimiser"),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name), part)))
        yield


def split(recipe_path: str, overrides: list[str], repeats: int) -> dict[str, Any]:
    """Means over `repeats` training steps: seconds and shares by part, tokens per second, peak memory in bytes."""
    import torch

    from xmodal_opd import config
    from xmodal_opd.build import build
    from xmodal_opd.build.shards import open_shards, training_pairs
    from xmodal_opd.cli import quiet
    from xmodal_opd.step import train_step

    quiet()
    recipe = config.load(recipe_path, overrides)
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    torch.manual_seed(recipe.train.seed)
    parts = build(recipe)
    pairs = training_pairs(parts, open_shards(recipe)[0], 0)
    clock = Clock(torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)
    tokens = peak = 0
    with watched(parts, clock):
        for number in range(repeats + 1):
            if number == 1:
                clock.spent.clear()
                tokens = 0
                forget_peak()
            with clock.part("other"):
                with clock.part("data wait"):
                    taken = [pair for _, pair in islice(pairs, recipe.train.prompts)]
                tokens += train_step(parts, taken, number)["num_tokens"]
            peak = peak_memory()
    seconds = {name: spent / repeats for name, spent in clock.spent.items()}
    whole = sum(spent for name, spent in seconds.items() if not name.startswith("("))
    return {
        "recipe": recipe.name,
        "steps": repeats,
        "seconds": seconds | {"whole step": whole},
        "share": {name: spent / whole for name, spent in seconds.items()},
        "tokens per second": tokens / repeats / whole,
        "peak bytes": peak,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def forget_peak() -> None:
    """The peak counts from here on, where the system can do that."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5")


def peak_memory() -> int:
    """Bytes: of the device, or of the whole process on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if (status := Path("/proc/self/status")).exists():
        return 1024 * int(next(x for x in status.read_text().splitlines() if x.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(figures: dict[str, Any]) -> str:
    rows = sorted(figures["share"].items(), key=lambda row: -row[1])
    lines = [f"{name:20}{figures['seconds'][name]:9.3f} s{share:8.1%}" for name, share in rows]
    lines += [
        f"{'whole step':20}{figures['seconds']['whole step']:9.3f} s",
        f"{figures['tokens per second']:.0f} sampled tokens a second, at most {figures['peak bytes'] / 2**30:.2f} GiB",
        f"{figures['threads']} threads, load of the machine {figures['load']:.1f}",
    ]
    return "\n".join(lines)


# ---- a prompt shared by its answers against one repeated for each


def compare(recipe_path: str, overrides: list[str], group: int, repeats: int) -> dict[str, dict[str, float]]:
    """{"shared": …, "repeated": …} with seconds (medians) and the gradient's relative difference from "repeated"."""
    import torch

    from xmodal_opd import config
    from xmodal_opd.build import build
    from xmodal_opd.build.shards import open_shards
    from xmodal_opd.cli import quiet

    quiet()
    answers = [f"rollout.samplings.{name}.n={group}" for name in config.load(recipe_path, overrides).rollout.samplings]
    figures, gradients = {}, {}
    for name in ("repeated", "shared"):
        share = f"engine.share_prefix={'true' if name == 'shared' else 'false'}"
        recipe = config.load(recipe_path, [*overrides, *answers, share])
        torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
        parts = build(recipe)
        pairs = [pair for _, pair in islice(open_shards(recipe)[0].pairs(parts.adapter), recipe.train.prompts)]
        times = [one_step(parts, pairs) for _ in range(repeats + 1)][1:]
        gradients[name] = torch.cat([p.grad.flatten() for p in parts.student.parameters() if p.grad is not None])
        figures[name] = {kind: statistics.median(t[kind] for t in times) for kind in times[0]}
    apart = (gradients["shared"] - gradients["repeated"]).norm() / gradients["repeated"].norm()
    figures["shared"]["gradient difference"] = float(apart)
    figures["shared"]["times faster"] = (
        figures["repeated"]["loss and gradient"] / figures["shared"]["loss and gradient"]
    )
    return figures


def one_step(parts, pairs) -> dict[str, float]:
    """Seconds of sampling, and of loss and gradient, of one step that changes nothing."""
    from xmodal_opd import collect, step

    parts.student.zero_grad()
    began = time.perf_counter()
    sampled, _ = collect.sample(parts, pairs, 0)
    middle = time.perf_counter()
    step.backward(parts, sampled, step.judged(parts, sampled, 0))
    return {"sampling": middle - began, "loss and gradient": time.perf_counter() - middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--group", type=int, help="compare shared with repeated prompts, this many answers to each")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (5)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if arguments.group:
        figures = compare(arguments.recipe, arguments.overrides, arguments.group, arguments.repeats)
        for name, values in figures.items():
            print(f"{name:10}" + "  ".join(f"{kind} {value:.3g}" for kind, value in values.items()))
    else:
        figures = split(arguments.recipe, arguments.overrides, arguments.repeats)
        print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
