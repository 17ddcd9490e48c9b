"""Meta-World (arXiv:1910.10897; the package `metaworld` 3.1.1 on MuJoCo 3.3.0): a robot arm over a table, some fifty
tasks, each with a scripted expert. Rendered in software, without shadows: some hundred pictures a second on one core.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from modalities.action.environment import AssetError, Observation, chunk_of
from modalities.action.offscreen import DRIVER

HORIZON = 200  # steps; experts need some 80, and the package itself stops at 500
BUFFERS = ("offsamples", "shadowsize")  # of what is drawn before it is a picture: antialiasing and shadows
NEARER = (0.75, 0.075, 0.7)  # where camera "corner2" hangs for robot learning, as in lerobot: over the table
LOOKS = {  # what each task says, and what its objects are
    "reach-v3": ("reach the red ball", "puck"),
    "reach-wall-v3": ("reach the red ball behind the wall", "puck"),
    "door-unlock-v3": ("unlock the door", "lock"),
    "button-press-topdown-v3": ("press the button from above", "button"),
    "button-press-topdown-wall-v3": ("press the button behind the wall from above", "button"),
    "button-press-v3": ("press the button on the wall", "button"),
    "drawer-close-v3": ("close the drawer", "drawer"),
    "drawer-open-v3": ("open the drawer", "drawer"),
    "door-close-v3": ("close the door", "door"),
    "door-open-v3": ("open the door", "door"),
    "window-open-v3": ("open the window", "window"),
    "window-close-v3": ("close the window", "window"),
    "faucet-open-v3": ("turn the faucet on", "faucet"),
    "faucet-close-v3": ("turn the faucet off", "faucet"),
    "handle-press-v3": ("press the handle down", "handle"),
    "plate-slide-v3": ("slide the plate into the goal", "plate"),
    "push-v3": ("push the puck to the goal", "puck"),
    "coffee-button-v3": ("press the button of the coffee machine", "button"),
}


class MetaWorld:
    """One arm, and one world for each task that was asked for. Start state n of a task is the one that seed n draws."""

    size = 4  # the hand's movement x, y, z and the gripper's force, each in [-1, 1]

    def __init__(
        self,
        camera: str = "corner2",
        width: int = 112,
        height: int = 112,
        horizon: int = HORIZON,
        moved: Sequence[float] = (0.0, 0.0, 0.0),
    ):
        """moved: how far "corner2" hangs from its place, x, y and z in metres."""
        if len(moved) != 3:
            raise ValueError(f"moved is x, y and z in metres, for example [-0.2, 0.1, 0]; got {moved}")
        try:
            import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP
        except ModuleNotFoundError as error:
            raise AssetError(f"Meta-World is not installed ({error}): pip install 'xmodal-opd[robot]'") from error
        except (
            ImportError,
            AttributeError,
            RuntimeError,
        ) as error:  # so mujoco and PyOpenGL tell that there is no driver
            raise AssetError(f"Meta-World cannot start ({error}): {DRIVER}") from error
        self.mujoco, self.classes, self.experts = mujoco, ALL_V3_ENVIRONMENTS, ENV_POLICY_MAP
        self.camera, self.shape, self.horizon, self.moved = camera, (height, width), horizon, moved
        self.tasks = tuple(self.classes)
        self.worlds: dict[str, Any] = {}
        self.renderers: dict[tuple[str, int], Any] = {}

    def reset(self, task: str, start: int) -> Observation:
        if task not in self.classes:
            raise ValueError(f"Meta-World has no task {task!r}; it has: {', '.join(self.tasks)}")
        self.task, self.world = task, self.world_of(task)
        self.seen = drawn(self.world, start)
        self.steps, self.success = 0, False
        return self.observation()

    def world_of(self, task: str) -> Any:
        if task not in self.worlds:
            world = self.classes[task]()
            world._set_task_called, world._partially_observable, world.seeded_rand_vec = True, False, True
            vars(world).pop("sawyer_observation_space", None)  # made while goals were hidden: it would cut them to zero
            world.model.cam_pos[world.model.camera("corner2").id] = np.add(NEARER, self.moved)
            self.worlds[task] = world
        return self.worlds[task]

    def act(self, actions: np.ndarray) -> Observation:
        for action in chunk_of(actions, self.size).astype(np.float32).clip(-1, 1):
            if self.over():
                break
            self.seen, _, _, _, told = self.world.step(action)
            self.steps += 1
            self.success = self.success or bool(told["success"])
        return self.observation()

    def over(self) -> bool:
        return self.success or self.steps >= self.horizon

    def observation(self) -> Observation:
        instruction, name = LOOKS.get(self.task, (self.task.removesuffix("-v3").replace("-", " "), "object"))
        done = self.over()
        return Observation(
            images={} if done else {self.camera: self.picture(*self.shape)},
            state=self.seen[:4].astype(np.float32),
            text=told_in_words(self.seen, name),
            instruction=instruction,
            success=self.success,
            done=done,
            steps=self.steps,
        )

    def picture(self, height: int, width: int) -> np.ndarray:
        """The camera's picture without shadows, reflections and sky. "corner2" hangs upside down."""
        key = self.task, height
        if key not in self.renderers:
            self.renderers[key] = self.renderer(height, width)
        renderer = self.renderers[key]
        renderer.update_scene(self.world.data, camera=self.camera)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE"):
            renderer.scene.flags[getattr(self.mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        image = renderer.render()
        return np.ascontiguousarray(image[::-1, ::-1] if self.camera == "corner2" else image)

    def renderer(self, height: int, width: int) -> Any:
        model = self.world.model
        for buffer in BUFFERS:
            setattr(model.vis.quality, buffer, 0)
        cameras = [model.camera(i).name for i in range(model.ncam)]
        if self.camera not in cameras:
            raise ValueError(f"there is no camera {self.camera!r}; there are: {', '.join(cameras)}")
        widest, highest = model.vis.global_.offwidth, model.vis.global_.offheight
        if width > widest or height > highest:
            raise ValueError(
                f"a picture of {width} x {height} is asked for; Meta-World's are {widest} x {highest} at most"
            )
        try:
            return self.mujoco.Renderer(model, height, width)
        except Exception as error:  # MuJoCo raises what the driver does
            raise AssetError(f"MuJoCo finds no way to draw ({error}); {DRIVER}") from error

    def frame(self) -> np.ndarray:
        return self.picture(240, 240)

    def expert(self) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an action is cut to [-1, 1], as it is meant to be
            return np.asarray(self.experts[self.task]().get_action(self.seen), np.float32).clip(-1, 1)

    def close(self) -> None:
        for renderer in self.renderers.values():
            renderer.close()


def drawn(world: Any, start: int) -> np.ndarray:
    """The first observation [39] of the state that seed `start` draws. A world draws while it is reset, and `reset`
    does so twice: what the first one drew is held for the second."""
    world._freeze_rand_vec = False
    world.seed(start)
    world.reset_model()
    world._freeze_rand_vec = True
    return world.reset()[0]


def told_in_words(seen: np.ndarray, name: str) -> str:
    """The state as text: where the hand is, and from it the object and the goal, in half centimetres.

    seen [39]: hand 0–2, gripper 3, object 4–6, second object 11–13, goal 36–38.
    """
    hand, found, goal = seen[:3], seen[4:7], seen[36:39]
    parts = [("hand", hand), (name, found - hand), ("goal", goal - hand)]
    grip = round(float(seen[3]) * 10)
    return f"grip {grip}, " + ", ".join(f"{who} " + " ".join(f"{round(v * 200):+d}" for v in at) for who, at in parts)
