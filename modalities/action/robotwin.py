"""RoboTwin 2.0 (arXiv:2506.18088): two arms over a table, fifty tasks, in SAPIEN. It runs in a Python 3.11 of its own,
and so does this file. The runtime itself is not here: whoever has it names it, and here is the protocol around it.

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
from pathlib import Path
from typing import Any

import numpy as np

from modalities.action.environment import AssetError, Observation

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
        embodiment: list[Any] | None = None,
        fast: bool = False,
        cache: str | None = None,
        runtime: str | None = None,
    ):
        """config: of task_config. embodiment: in place of the config's. fast: rendered without shadows and rays.
        runtime: module:function that takes these three and makes what knows tasks: `name`, `size`, `tasks`, `task` (a
        TASK_ENV), `setup` (its setup_demo in eval_mode) and `describe` (instructions seen and unseen)."""
        self.runtime = made(runtime, config, embodiment, fast)
        self.tasks: tuple[str, ...] = tuple(tasks or self.runtime.tasks)
        self.config, self.first, self.kind = config, 100000 * (1 + seed), instruction
        self.cache = Path(cache or default_cache())
        self.size = self.runtime.size
        self.env: Any = None

    def reset(self, task: str, start: int) -> Observation:
        if task not in self.tasks:
            raise ValueError(f"RoboTwin has no task {task!r}; there are: {', '.join(self.tasks)}")
        self.close()
        seeds = self.counted(task, start + 1)
        seed, info = seeds[start]
        self.env = self.runtime.task(task)
        self.runtime.setup(self.env, start, seed)
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
        env = self.runtime.task(task)
        try:
            self.runtime.setup(env, number, seed)
            info = env.play_once()["info"]
        except AssetError:
            raise
        except Exception as error:  # an unstable scene, or whatever a planner raises: the official loop goes on, too
            print(f"seed {seed} of {task}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return None
        finally:
            env.close_env()
        return info if env.plan_success and env.check_success() else None

    def act(self, actions: np.ndarray) -> Observation:
        if actions.ndim != 2 or actions.shape[1] != self.size or not np.isfinite(actions).all():
            raise ValueError(f"a chunk of actions is [C, {self.size}] finite numbers, not one of shape {actions.shape}")
        for action in actions:
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
        return np.asarray(self.env.get_obs()["observation"]["head_camera"]["rgb"], np.uint8)

    def expert(self) -> np.ndarray:
        raise AssetError("RoboTwin's expert plans whole episodes, not single actions; it checks start states here")

    def close(self) -> None:
        if self.env is not None:
            self.env.close_env()
            self.env = None


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xmodal-opd" / "robotwin-seeds"


def made(where: str | None, *options: Any) -> Any:
    if where is None:
        raise AssetError(
            "RoboTwin is not part of this project: name a module:function that makes one by "
            "--option runtime=…, or let RoboTwin's own evaluation ask a policy of ours: tools/deploy_policy.py"
        )
    module, _, name = where.partition(":")
    make: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return make(*options)
