#!/usr/bin/env python
"""Play episodes of a recipe's robot, and write them as a LeRobotDataset of version 3, which lerobot can train on.

    python tools/export_lerobot.py configs/vla_opd.yaml data/lerobot/expert --policy expert --episodes 50
    python tools/export_lerobot.py runs/mine/recipe.yaml data/lerobot/mine --checkpoint runs/mine/checkpoints/NAME

A dataset has a frame for every action, and a decision is several. What a policy decided is therefore taken once more,
one action after the other, so that what it did not look at is in the dataset as well.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import batched, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of modality action: a YAML file, or the name of a recipe in the package")
    parser.add_argument("out", help="folder to write, which is not there yet")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--policy", default="student", help="student, teacher (reads the state), or expert (student)")
    parser.add_argument("--checkpoint", help="a checkpoint or model folder; default: the recipe's own model")
    parser.add_argument("--episodes", type=int, default=10, help="how many are played (10)")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="whose start states (train)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the policy, 0: greedy (0)")
    parser.add_argument("--successes", action="store_true", help="leave out the episodes that did not succeed")
    parser.add_argument("--fps", type=int, default=80, help="actions a second; Meta-World's are 80, LIBERO's 20 (80)")
    parser.add_argument("--video", action="store_true", help="images as mp4 instead of png")
    return parser


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    options = arguments().parse_intermixed_args()
    try:
        count, frames = export(options)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"export_lerobot: {error}")
    print(f"{options.out}: {count} episodes, {frames} frames")


def export(options: argparse.Namespace) -> tuple[int, int]:
    """(episodes, frames) written."""
    from rich.progress import track

    from modalities.action.lerobot import write
    from xmodal_opd import config, inspect, schema

    recipe = config.load(options.recipe, options.overrides)
    if not isinstance(recipe, schema.ActionRecipe):
        raise ValueError(f"{options.recipe} is a recipe of modality {recipe.modality}; robots have recipes of action")
    parts: Any = inspect.measured(recipe, options.checkpoint)
    try:
        refuse_policy(parts.adapter, options.policy)
        played = track(episodes(parts, options), "episodes", options.episodes, transient=True)
        kept = (steps for steps in played if steps[-1].success or not options.successes)
        return write(options.out, kept, fps=options.fps, robot=recipe.robot.name, video=options.video)
    finally:
        parts.sampler.workers.close()


def refuse_policy(adapter: Any, policy: str) -> None:
    """Raises ValueError for a policy that is neither a view nor the expert."""
    have = ["student", *(["teacher"] if adapter.privileged else []), *adapter.derive, "expert"]
    if policy not in have:
        raise ValueError(f"there is no policy {policy!r}; there are: {', '.join(have)}")


def episodes(parts: Any, options: argparse.Namespace) -> Iterator[list[Any]]:
    """The steps of each."""
    from modalities.action.lerobot import played, replayed
    from xmodal_opd import schema
    from xmodal_opd.build.robots import starts

    own = starts(parts.recipe, schema.order_seed(parts.recipe), 0, 1)[options.split == "test"]
    pairs = [pair for _, pair in islice(own.pairs(parts.adapter), options.episodes)]
    ask = asking(parts.sampler.workers)
    if options.policy == "expert":
        for pair in pairs:
            yield played(ask, pair.meta["task"], pair.meta["start"], lambda: ask("expert"))
        return
    for some in batched(pairs, parts.sampler.workers.count):
        for turns in decided(parts, some, options):
            meta, actions = turns[0].pair.meta, np.concatenate([parts.adapter.actions(r.tokens) for r in turns])
            steps = replayed(ask, meta["task"], meta["start"], actions)
            if (steps[-1].success, len(steps)) != (meta["success"], meta["steps"]):
                raise RuntimeError(
                    f"task {meta['task']!r}, start {meta['start']}: the same actions ended otherwise when they were "
                    "taken again; a simulator that does not repeat itself cannot be exported"
                )
            yield steps


def decided(parts: Any, pairs: Sequence[Any], options: argparse.Namespace) -> list[list[Any]]:
    """The decisions of one episode from each start state."""
    from xmodal_opd.types import Sampling

    sampling = Sampling(temperature=options.temperature, view=options.policy)
    made = parts.sampler.generate(pairs, {"export": sampling}, seed=parts.recipe.train.seed)["export"]
    return [list(turns) for _, turns in groupby(made, key=lambda r: r.episode)]


def asking(workers: Any) -> Callable[..., Any]:
    """One worker's answers. Raises Lost where it is lost."""
    from xmodal_opd.rollout.workers import Lost

    def ask(*request: Any) -> Any:
        answer = workers.ask({0: list(request)})[0]
        if isinstance(answer, Lost):
            raise answer
        return answer

    return ask


if __name__ == "__main__":
    main()
