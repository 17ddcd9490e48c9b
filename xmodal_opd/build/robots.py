"""From a recipe of modality action to its live parts: start states, workers, adapter and sampler."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedModel

from modalities.action.adapter import ActionAdapter
from modalities.action.tokens import GRIPPERS, ActionTokens, load_normalizer
from modalities.vision import video
from xmodal_opd import dist, models, schema
from xmodal_opd.consistency import hint
from xmodal_opd.data import INDEX
from xmodal_opd.objective import pick
from xmodal_opd.rollout.depth import DEPTHS, FULL, Depth
from xmodal_opd.rollout.env import EnvSampler
from xmodal_opd.rollout.episode import Film
from xmodal_opd.rollout.workers import Workers
from xmodal_opd.types import Pair

WORKER = "modalities.action.worker"
FPS = 8.0  # of films, one frame to a decision


@dataclass(frozen=True)
class Starts:
    """Start states as pairs without views: these come with what is seen. The order is a pure function of (seed, epoch),
    and position p of it is rank p % world's."""

    tasks: tuple[str, ...]
    numbers: range
    seed: int = 0
    shuffle: bool = False
    rank: int = 0
    world: int = 1

    def pairs(self, adapter: object, position: int = 0, epochs: int | None = None) -> Iterator[tuple[int, Pair]]:
        """(position to go on from, start state), this rank's."""
        size = len(self.tasks) * len(self.numbers)
        for epoch in count(position // size) if epochs is None else range(position // size, epochs):
            for place, (task, start) in enumerate(self.order(epoch), epoch * size):
                if place >= position and place % self.world == self.rank:
                    meta = {"task": task, "start": start, "modality": "action"}
                    yield place + 1, Pair(f"{task}/{start}", {}, None, meta)

    def order(self, epoch: int) -> list[tuple[str, int]]:
        every = [(task, start) for start in self.numbers for task in self.tasks]
        return Random(f"{self.seed} {epoch}").sample(every, len(every)) if self.shuffle else every


def starts(recipe: schema.ActionRecipe, seed: int, rank: int, world: int) -> tuple[Starts, Starts]:
    """(start states to learn from, shuffled without end; those of the test, in order). Raises ValueError where the two
    meet."""
    part = recipe.data
    if part.test > part.first and not part.demonstrations:
        raise ValueError(
            f"data.test is {part.test} start states of each task, and those to learn from begin at number "
            f"{part.first}: they would meet; set data.first to a number that is not lower"
        )
    learnt = Starts(tuple(part.tasks), range(part.first, part.first + part.train), seed, True, rank, world)
    return learnt, Starts(tuple(part.tasks), range(part.test))


def action_tokens(robot: schema.Robot, end: int) -> ActionTokens:
    """end: the id after the last action token, which is the size of the real vocabulary."""
    meaning = None
    if robot.statistics:
        meaning = load_normalizer(robot.statistics, robot.key or None, robot.normalization)
    return ActionTokens(end, robot.chunk, robot.size, meaning, GRIPPERS[robot.gripper])


def adapter(recipe: schema.ActionRecipe, processor: Any, limit: int, **chat: Any) -> ActionAdapter:
    robot, tokenizer = recipe.robot, getattr(processor, "tokenizer", processor)
    return ActionAdapter(
        processor,
        limit,
        tokens=action_tokens(robot, len(tokenizer)),
        cameras=robot.cameras,
        image_size=robot.image_size,
        crop=robot.crop,
        proprio=robot.proprio,
        privileged="teacher" in named_views(recipe),
        **chat,
    )


def named_views(recipe: schema.ActionRecipe) -> set[str]:
    """The views that anything in the recipe reads."""
    taught = {view for source in schema.sources(recipe) for _, view in schema.teachers_of(source).values()}
    seen = {part.view for part in (*recipe.rollout.samplings.values(), *recipe.objective.values())}
    return {schema.instructor(recipe)[1]} | taught | seen


def sampler(recipe: schema.ActionRecipe, student: PreTrainedModel, acting: ActionAdapter, whole: Any) -> EnvSampler:
    robot = recipe.robot
    depth(recipe, 0)  # refused here, before anything is played
    command = [robot.python or sys.executable, "-m", WORKER, robot.name, json.dumps(robot.options)]
    root = {"PYTHONPATH": str(Path(models.__file__).parents[1])} if robot.python else {}
    return EnvSampler(
        student,
        acting,
        Workers(command, share(robot.workers, dist.rank(), dist.world()), robot.timeout, root, robot.name),
        width=acting.tokens.width,
        whole=whole,
        **policy(recipe, acting),
    )


def share(workers: int, rank: int, world: int) -> int:
    """How many of the workers are a rank's: as good as equally many, and one where there are fewer than ranks."""
    return max(1, workers // world + (rank < workers % world))


def policy(recipe: schema.ActionRecipe, acting: ActionAdapter) -> dict[str, Any]:
    """What makes a distribution over actions of a model, sampled and scored: the window of the vocabulary, the token
    that stands for those predicted at once (None where one follows the other), and the temperature."""
    stands = acting.tokenizer.pad_token_id if recipe.robot.decoding == "parallel" else None
    return {"among": acting.tokens.among, "placeholder": stands, "temperature": recipe.robot.temperature}


def depth(recipe: schema.ActionRecipe, step: int) -> Depth:
    """Which decisions are the student's in a training step. Raises ValueError for a depth that there is not, and for a
    judge where the outcome is another's."""
    if recipe.robot.depth is None:
        return FULL
    found = pick("depth", DEPTHS, recipe.robot.depth)(step)
    if found.forced and recipe.judge:
        raise ValueError(
            "robot.depth opad takes the expert's actions, so the outcome the judge would see is the expert's; take out "
            "the judge or the depth"
        )
    return found


def refuse_other_chunk(recipe: schema.ActionRecipe) -> None:
    """Raises ValueError where the index of the demonstrations tells of chunks that are not the robot's."""
    index, chunk = Path(recipe.data.demonstrations or "", INDEX), recipe.robot.chunk
    found = json.loads(index.read_text()).get("settings", {}).get("chunk", chunk) if index.is_file() else chunk
    if found != chunk:
        raise ValueError(
            f"{recipe.data.demonstrations} has decisions of {found} actions, and robot.chunk is {chunk}; make them by "
            f"tools/prepare_shards.py lerobot --chunk {chunk}, or set robot.chunk={found}"
        )


def refuse_mismatch(recipe: schema.ActionRecipe, about: Mapping[str, Any]) -> None:
    """Raises ValueError where the simulator, `about` which a worker tells, has not the actions and tasks of the
    recipe."""
    robot, tasks = recipe.robot, about["tasks"]
    if about["size"] != robot.size:
        raise ValueError(
            f"robot.size is {robot.size}, but an action in {robot.name} has {about['size']} numbers; set robot.size to "
            "it, for a policy that was trained on such actions"
        )
    if unknown := [task for task in recipe.data.tasks if task not in tasks]:
        raise ValueError(
            f"data.tasks names {unknown[0]!r}{hint(unknown[0], tasks)}, which {robot.name} has not; it has: "
            f"{', '.join(tasks)}"
        )


def filming(recipe: schema.ActionRecipe, folder: Path | None) -> Film | None:
    number = recipe.robot.videos
    return Film(folder, video.encode, number, FPS) if number and folder else None
