#!/usr/bin/env python
"""Time a recipe's training step with the prompt shared by a group and with the prompt repeated for every answer.

    python tools/bench_step.py configs/cord_audio.yaml --group 8 --repeats 5

Prints seconds of sampling, of loss and gradient, their ratio, and how far the two gradients are apart.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import islice
from pathlib import Path


def measure(recipe_path: str, overrides: list[str], group: int, repeats: int) -> dict[str, dict[str, float]]:
    """{"shared": …, "repeated": …} with seconds (medians) and the gradient's relative difference from "repeated"."""
    import torch

    from xmodal_opd import config, step
    from xmodal_opd.build import build, open_shards
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
        times = [one_step(step, parts, pairs) for _ in range(repeats + 1)][1:]
        gradients[name] = torch.cat([p.grad.flatten() for p in parts.engine.parameters if p.grad is not None])
        figures[name] = {kind: statistics.median(t[kind] for t in times) for kind in times[0]}
    apart = (gradients["shared"] - gradients["repeated"]).norm() / gradients["repeated"].norm()
    figures["shared"]["gradient difference"] = float(apart)
    figures["shared"]["times faster"] = (
        figures["repeated"]["loss and gradient"] / figures["shared"]["loss and gradient"]
    )
    return figures


def one_step(step, parts, pairs) -> dict[str, float]:
    """Seconds of sampling, and of loss and gradient, of one step that changes nothing."""
    parts.student.zero_grad()
    began = time.perf_counter()
    sampled, _ = step.sample(parts, pairs, 0)
    middle = time.perf_counter()
    step.backward(parts, sampled, 0)
    return {"sampling": middle - began, "loss and gradient": time.perf_counter() - middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--group", type=int, default=8, help="answers to each question in every sampling (8)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; the median counts (5)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    figures = measure(arguments.recipe, arguments.overrides, arguments.group, arguments.repeats)
    for name, values in figures.items():
        print(f"{name:10}" + "  ".join(f"{kind} {value:.3g}" for kind, value in values.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
