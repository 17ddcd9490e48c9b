"""RoboTwin's runtime itself, `rlinf-robotwin-runtime`, as robotwin.py asks for it. It is imported in the environment of
tools/install_robotwin.py, or in one that has the runtime, cuRobo and a GPU that traces rays.

Objects, textures and robots are on a hub and in no package. Where ROBOTWIN_ASSETS_ROOT says that they are here, all
fifty tasks run as published. Without them there are the tasks that need boxes alone, played by a pair of Franka Pandas
out of ManiSkill's wheel, whose motions mplib plans. `facts` has what is otherwise than in published results.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np

from modalities.action.environment import AssetError

SHARE = Path(sys.prefix) / "share" / "robotwin"  # where tools/install_robotwin.py puts what is no Python
BOXES = ("stack_blocks_two", "stack_blocks_three", "blocks_ranking_rgb", "blocks_ranking_size")
PANDAS = ["franka-panda", "franka-panda", 0.6]  # left, right, and how many metres are between
CAMERAS = ("head_camera", "left_camera", "right_camera")
RENDERINGS = ("reference", "fast")
MISSING = (
    f"{Path(sys.executable).parent}/robotwin-download-assets --output FOLDER fetches them from a hub, then set "
    "ROBOTWIN_ASSETS_ROOT=FOLDER"
)
INSTALL = "python tools/install_robotwin.py makes its environment; give its Python by --python, or as robot.python"

SWIFTSHADER = SHARE / "swiftshader" / "vk_swiftshader_icd.json"
if SWIFTSHADER.is_file():  # which draws without a GPU; another driver goes by the same variable
    os.environ.setdefault("VK_ICD_FILENAMES", str(SWIFTSHADER))
try:
    import sapien.core as sapien  # pyright: ignore[reportMissingImports]
    import yaml
    from robotwin.assets import validate_root  # pyright: ignore[reportMissingImports]
    from robotwin.config import load_task_config  # pyright: ignore[reportMissingImports]
    from robotwin.description.instructions import (  # pyright: ignore[reportMissingImports]
        generate_episode_descriptions,
    )
except ImportError as error:
    raise AssetError(f"RoboTwin is not installed in {sys.executable} ({error}): {INSTALL}") from error
if importlib.util.find_spec("open3d") is None:  # for point clouds, which nobody here looks at
    sys.modules["open3d"] = ModuleType("open3d")


class Runtime:
    """Scenes by their tasks' names. Raises AssetError where assets or a driver are missing."""

    def __init__(
        self,
        config: str = "demo_clean",
        embodiment: Sequence[Any] | None = None,
        render: str | None = None,
        cameras: Sequence[str] = CAMERAS,
    ):
        """embodiment: a robot with two arms, or left, right and the metres between. render: "reference" traces rays,
        "fast" leaves them and shadows out; by default the first where the assets are here, otherwise the second.
        cameras: of CAMERAS, those that take pictures; none for a policy that does not look."""
        where = os.environ.get("ROBOTWIN_ASSETS_ROOT")
        self.root = Path(checked(where)["root"] if where else SHARE)
        self.render = render or ("reference" if where else "fast")
        for name, names in ((self.render, RENDERINGS), *((camera, CAMERAS) for camera in cameras)):
            if name not in names:
                raise ValueError(f"RoboTwin has no {name!r}; there are: {', '.join(names)}")
        self.args = load_task_config(config)
        if not where and any(self.args["domain_randomization"][of] for of in ("random_background", "cluttered_table")):
            raise AssetError(f"{config} strews textures and objects, which are RoboTwin's assets: {MISSING}")
        published = self.args["embodiment"]
        robots = list(embodiment or (published if where else PANDAS))
        planner = "curobo" if where and importlib.util.find_spec("curobo") else "mplib"
        self.args |= {"eval_mode": True, "eval_video_log": False, "render_freq": 0, "planner_backend": planner}
        self.args |= self.looking(cameras) | self.embodied(robots)
        self.tasks: tuple[str, ...] = tuple(load_task_config("_eval_step_limit")) if where else BOXES
        arms = [self.args[f"{arm}_embodiment_config"]["arm_joints_name"][i] for i, arm in enumerate(("left", "right"))]
        self.size = sum(len(joints) + 1 for joints in arms)  # and a gripper
        self.name = "-".join(map(str, [*robots, planner]))
        differs = {
            "without RoboTwin's assets": not where,
            f"played by {' and '.join(dict.fromkeys(map(str, robots[:2])))}": robots != published,
            "rendered without rays and shadows": self.render == "fast",
            "in the scenes that mplib, and not cuRobo, can solve": planner == "mplib",
        }
        told = {"render": self.render, "driver": driver(rays=self.render == "reference"), "assets": where}
        told |= {"embodiment": robots, "planner": planner, "actions": "joint targets"}
        self.facts = {**told, "differs": [what for what, so in differs.items() if so]}
        os.environ["ASSETS_PATH"] = str(self.root)

    def looking(self, cameras: Sequence[str]) -> dict[str, Any]:
        """The arguments of setup_demo that say which cameras there are."""
        head, wrists = "head_camera" in cameras, bool({"left_camera", "right_camera"} & set(cameras))
        kinds = {**self.args["camera"], "collect_head_camera": head, "collect_wrist_camera": wrists}
        size = load_task_config("_camera_config")[kinds["head_camera_type"]]
        return {"camera": kinds, "head_camera_h": size["h"], "head_camera_w": size["w"]}

    def embodied(self, robots: list[Any]) -> dict[str, Any]:
        """The arguments of setup_demo that say which robots there are, one with two arms or two beside each other."""
        if len(robots) not in (1, 3):
            raise ValueError(f"an embodiment is [ROBOT] or [LEFT, RIGHT, METRES], not {robots}")
        files = load_task_config("_embodiment_config")
        arms = {"left": robots[0], "right": robots[1 % len(robots)]}
        told: dict[str, Any] = {"dual_arm_embodied": len(robots) == 1, "embodiment_name": "_".join(arms.values())}
        for arm, robot in arms.items():
            folder = self.root / files.get(robot, {"file_path": "nowhere"})["file_path"]
            if not (folder / "config.yml").is_file():
                raise AssetError(f"there is no robot {robot!r} in {self.root}: {MISSING}")
            told[f"{arm}_robot_file"] = str(folder)
            told[f"{arm}_embodiment_config"] = yaml.safe_load((folder / "config.yml").read_text())
        return told | ({"embodiment_dis": robots[2]} if len(robots) == 3 else {})

    def task(self, name: str) -> Any:
        """A TASK_ENV without a scene."""
        env = getattr(importlib.import_module(f"robotwin.envs.{name}"), name)()
        if self.render == "fast":
            env.setup_scene = functools.partial(env.setup_scene, shadow=False)
        return env

    def setup(self, env: Any, number: int, seed: int) -> None:
        """Its scene of this seed. Raises AssetError where an object is missing, which the runtime lets pass as None."""
        name = type(env).__name__
        try:
            with self.rendering():
                env.setup_demo(now_ep_num=number, seed=seed, is_test=True, task_name=name, **self.args)
        except (OSError, AttributeError) as error:
            raise AssetError(f"a scene of {name} lacks something in {self.root} ({error}): {MISSING}") from error

    def rendering(self) -> AbstractContextManager[Any]:
        """Within, new scenes are drawn without rays, if that was asked for: only some GPUs can trace them."""
        chosen = sapien.render.set_camera_shader_dir
        quickly = patch.object(sapien.render, "set_camera_shader_dir", lambda _: chosen("default"))
        return quickly if self.render == "fast" else nullcontext()

    def describe(self, task: str, info: dict[str, Any]) -> dict[str, list[str]]:
        """Instructions, seen and unseen ones."""
        return generate_episode_descriptions(task, [info], 100)[0]

    def watch(self, env: Any, see: Any) -> None:
        """While the expert plays, `see` is called with its joint targets [size], some 17 times a second."""
        env._take_picture = lambda *_: see(self.joints(env))

    def joints(self, env: Any) -> np.ndarray:
        robot = env.robot
        return np.array([*robot.get_left_arm_jointState(), *robot.get_right_arm_jointState()], np.float64)

    def frame(self, env: Any) -> np.ndarray:
        env._update_render()
        return env.cameras.get_observer_rgb()


def checked(where: str) -> dict[str, Any]:
    try:
        return validate_root(where)
    except ValueError as error:
        raise AssetError(f"ROBOTWIN_ASSETS_ROOT={where}: {error}; {MISSING}") from error


def driver(rays: bool) -> str:
    """What draws. Raises AssetError where nothing can, or not in that way."""
    try:
        told = sapien.render.get_device_summary()
    except RuntimeError as error:
        where = os.environ.get("VK_ICD_FILENAMES", "the usual places")
        raise AssetError(f"SAPIEN finds no Vulkan driver at {where} ({error}): {INSTALL}") from error
    name = told.partition("GPU:")[2].splitlines()[0].strip()
    if rays and "rayTrace:  1" not in told:
        raise AssetError(f"{name} cannot trace rays, which the benchmark's pictures need: take render='fast'")
    return name
