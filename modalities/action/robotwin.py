"""RoboTwin 2.0 (arXiv:2506.18088): two arms over a table, fifty tasks, in SAPIEN. It runs in a Python 3.11 of its own,
and so does this file. Here is the protocol; the scenes are made by robotwin_runtime.py, or by whatever else is named.

The order of things is script/eval_policy.py's: seeds from 100000 (1 + seed) on; one counts where the expert solves it;
the scene is set up again, an instruction is drawn, and actions are taken until the task is done or its steps are used
up. Start state k is the k-th seed that counts. Which do is kept in `cache`, for an expert takes half a minute. One
thing is otherwise: what draws the instruction is seeded with the scene's seed, so that it is the same again.
"""

import fcntl
import importlib
import json
import os
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from modalities.action.environment import AssetError, Observation, chunk_of

MOST = 1000  # seeds tried for one start state
Seeds = list[tuple[int, dict[str, Any]]]  # those that count, and what their scenes are made of


class RoboTwin:
    """Tasks by their names. Actions are joint targets: left arm, left gripper, right arm, right gripper."""

    def __init__(
        self,
        tasks: list[str] | None = None,
        config: str = "demo_clean",
        seed: int = 0,
        instruction: str = "unseen",
        horizon: int | None = None,
        cache: str | None = None,
        runtime: str = "modalities.action.robotwin_runtime:Runtime",
        **scenes: Any,
    ):
        """config: of task_config. horizon: in place of the task's own step limit. cache: a folder for seeds that count.
        scenes: options of the runtime, a module:function that makes what robotwin_runtime.py has."""
        self.runtime = made(runtime, config, scenes)
        self.tasks: tuple[str, ...] = tuple(tasks or self.runtime.tasks)
        self.config, self.first, self.kind, self.horizon = config, 100000 * (1 + seed), instruction, horizon
        self.cache = Path(cache or default_cache())
        self.size = self.runtime.size
        others = [f"{horizon} steps in an episode at most"] if horizon else []
        self.facts = {**self.runtime.facts, "differs": [*self.runtime.facts["differs"], *others]}
        self.env: Any = None
        self.scene: tuple[str, int, int] = ("", 0, 0)  # task, start and seed
        self.script: list[np.ndarray] = []  # the expert's actions in this episode, once it was asked

    def reset(self, task: str, start: int) -> Observation:
        if task not in self.tasks:
            raise ValueError(f"RoboTwin has no task {task!r}; there are: {', '.join(self.tasks)}")
        self.close()
        seeds = self.counted(task, start + 1)
        seed, info = seeds[start]
        self.env, self.scene, self.script = self.runtime.task(task), (task, start, seed), []
        self.runtime.setup(self.env, start, seed)
        self.env.step_lim = self.horizon or self.env.step_lim
        random.seed(seed)
        np.random.seed(seed)
        self.env.set_instruction(instruction=str(np.random.choice(self.runtime.describe(task, info)[self.kind])))
        return self.observation()

    def counted(self, task: str, count: int) -> Seeds:
        """The first `count` seeds that the expert solves, and more where they are known."""
        path = self.cache / f"{task}-{self.config}-{self.runtime.name}-{self.first}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another worker may be at it
            file.seek(0)
            told = [json.loads(line) for line in file]
            while sum(info is not None for _, info in told) < count:
                if len(told) >= MOST + count:
                    raise RuntimeError(f"the expert of {task} solved none of {MOST} scenes from seed {self.first} on")
                seed = self.first + len(told)
                told.append([seed, self.solved(task, count - 1, seed)])
                file.write(json.dumps(told[-1]) + "\n")
                file.flush()
        return [(seed, info) for seed, info in told if info is not None]

    def solved(self, task: str, number: int, seed: int) -> dict[str, Any] | None:
        """What the scene of a seed is made of, where the expert solves it."""
        try:
            return self.played(task, number, seed, [])
        except AssetError:
            raise
        except Exception as error:  # an unstable scene, or whatever a planner raises: the official loop goes on, too
            print(f"seed {seed} of {task}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return None

    def played(self, task: str, number: int, seed: int, script: list[np.ndarray]) -> dict[str, Any] | None:
        """The same, and `script` gets the expert's joint targets on the way."""
        env = self.runtime.task(task)
        try:
            self.runtime.setup(env, number, seed)
            self.runtime.watch(env, script.append)
            info = env.play_once()["info"]
            return info if env.plan_success and env.check_success() else None
        finally:
            env.close_env()

    def act(self, actions: np.ndarray) -> Observation:
        for action in chunk_of(actions, self.size):
            if self.over():
                break
            self.env.take_action(action, action_type="qpos")
        return self.observation()

    def over(self) -> bool:
        return bool(self.env.eval_success) or self.env.take_action_cnt >= self.env.step_lim

    def observation(self) -> Observation:
        seen = self.env.get_obs()
        cameras = {name: of for name, of in seen["observation"].items() if isinstance(of, dict) and "rgb" in of}
        return Observation(
            images={name: np.asarray(of["rgb"], np.uint8) for name, of in cameras.items()},
            state=np.asarray(seen["joint_action"]["vector"], np.float32),
            text="",
            instruction=str(self.env.get_instruction()),
            success=bool(self.env.eval_success),
            done=self.over(),
            steps=int(self.env.take_action_cnt),
        )

    def frame(self) -> np.ndarray:
        return self.runtime.frame(self.env)

    def expert(self) -> np.ndarray:
        """The joint targets that the expert had after as many actions as were taken in this episode. It plans a whole
        episode, in another scene of the same seed, and what it did is played again: it cannot take over from others."""
        if not self.script:
            script: list[np.ndarray] = []
            if self.played(*self.scene, script) is None:
                raise RuntimeError(f"the expert of {self.scene[0]} did not solve seed {self.scene[2]} once more")
            self.script = [after for before, after in pairwise(script) if (after != before).any()]
        return self.script[min(self.env.take_action_cnt, len(self.script) - 1)]

    def close(self) -> None:
        if self.env is not None:
            self.env.close_env()
            self.env = None


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xmodal-opd" / "robotwin-seeds"


def made(where: str, config: str, scenes: dict[str, Any]) -> Any:
    module, _, name = where.partition(":")
    make: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return make(config, **scenes)
