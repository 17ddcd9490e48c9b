#!/usr/bin/env python
"""Install RoboTwin 2.0's runtime in an environment of its own, for CPU, and print the path of its Python.

    python tools/eval_robot.py --suite robotwin --python "$(python tools/install_robotwin.py)" ...

It lives in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache), takes 2 GB and needs Python 3.11. A second call
finds what the first one made. All of it is packages: the runtime and SAPIEN, a pair of Franka Pandas out of
ManiSkill's wheel, and SwiftShader, which draws without a GPU, out of Debian's chromium-common. RoboTwin's objects,
textures and robots are on a hub, and in no package: without them only the tasks that need boxes alone run, and results
are not comparable with published ones. `bin/robotwin-download-assets --output FOLDER` of the environment fetches them;
ROBOTWIN_ASSETS_ROOT=FOLDER then says where they are.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

if __package__ in (None, ""):  # run as a program, not from its package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import environments
from tools.environments import TORCH, install_torch, made, run

RUNTIME = "rlinf-robotwin-runtime==0.1.3"  # without what it declares: it runs without CUDA, open3d and warp
PINS = ["setuptools>=77.0.3,<81", "gymnasium==0.29.1", "numpy==1.26.4", "scipy==1.10.1", "sapien==3.0.0b1"]
PINS += ["mplib==0.2.1", "transforms3d==0.4.2", "trimesh==4.4.3", "yourdfpy==0.0.60", "toppra==0.6.3"]
PINS += ["imageio==2.38.1", "opencv-python==4.9.0.80", "pyyaml", "pillow", "matplotlib", "huggingface-hub"]
MANISKILL = "mani-skill==3.0.1"
PANDA = "mani_skill/assets/robots/panda/"
NEEDED = ("panda_v2.urdf", "panda_v2.srdf", "franka_description/")  # of the Panda
DRIVER = ("libvk_swiftshader.so", "vk_swiftshader_icd.json")
# where a wrist camera is, looking along the fingers; RoboTwin looks for a link of this name
CAMERA = """  <link name="camera"/>
  <joint name="camera_joint" type="fixed">
    <origin rpy="0 -1.5707963 3.1415927" xyz="0.035 0 0.036"/>
    <parent link="panda_hand"/>
    <child link="camera"/>
  </joint>
</robot>
"""
JOINTS = [f"panda_joint{number}" for number in range(1, 8)]
HOME = [0, 0.19634954, 0, -2.61799388, 0, 2.94159265, 0.78539816]
EMBODIMENT = {  # what RoboTwin asks of a robot, in the numbers of its documentation for a Franka, for both arms
    "urdf_path": "./panda_v2.urdf",
    "srdf_path": "./panda_v2.srdf",
    "joint_stiffness": 1000,
    "joint_damping": 200,
    "gripper_stiffness": 1000,
    "gripper_damping": 200,
    "move_group": ["panda_hand"] * 2,
    "ee_joints": ["panda_hand_joint"] * 2,
    "arm_joints_name": [JOINTS] * 2,
    "gripper_name": [{"base": "panda_finger_joint1", "mimic": [["panda_finger_joint2", 1.0, 0.0]]}] * 2,
    "gripper_bias": 0.1,
    "gripper_scale": [0.0, 0.04],
    "homestate": [HOME] * 2,
    "delta_matrix": [[0, 0, 1], [0, -1, 0], [1, 0, 0]],
    "global_trans_matrix": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
    "robot_pose": [[0, -0.65, 0.75, 0.707, 0, 0, 0.707]] * 2,
    "planner": "mplib_RRT",
    "dual_arm": False,
    "rotate_lim": [0.1, 0.8],
    "grasp_perfect_direction": ["right", "left"],
    "static_camera_list": [
        {"name": "head_camera", "position": [-0.032, -0.45, 1.35], "forward": [0, 0.6, -0.8], "left": [-1, 0, 0]}
    ],
}


def install(folder: Path) -> Path:
    """The Python of the environment in `folder`, see environments.made. Raises RuntimeError without Debian's apt-get
    where no Vulkan driver is named."""
    embodiment = json.dumps(EMBODIMENT)
    return made(folder, "\n".join([TORCH, RUNTIME, *PINS, MANISKILL, CAMERA, embodiment, " ".join(DRIVER)]), build)


def build(python: Path) -> None:
    share = python.parents[1] / "share" / "robotwin"
    fetch_driver(share / "swiftshader")
    install_torch(python)
    run(python, "-m", "pip", "install", "-q", *PINS)
    run(python, "-m", "pip", "install", "-q", "--no-deps", RUNTIME)
    fetch_pandas(python, share / "assets")


def fetch_pandas(python: Path, assets: Path) -> None:
    """A folder of assets that has a robot, and nothing else."""
    with tempfile.TemporaryDirectory() as aside:
        run(python, "-m", "pip", "download", "-q", "--no-deps", "-d", aside, MANISKILL)
        (wheel,) = Path(aside).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            names = [name for name in packed.namelist() if name.startswith(tuple(PANDA + kind for kind in NEEDED))]
            packed.extractall(aside, names)
        panda = assets / "embodiments" / "franka-panda"
        shutil.copytree(Path(aside) / PANDA, panda)
    urdf = panda / EMBODIMENT["urdf_path"]
    urdf.write_text(urdf.read_text().replace("</robot>", CAMERA))
    (panda / "config.yml").write_text(json.dumps(EMBODIMENT, indent=1))  # which is YAML, too
    for arm in ("left", "right"):  # of another planner, and read all the same
        (panda / f"curobo_{arm}_tmp.yml").write_text("robot_cfg: {}\n")
    for empty in ("objects", "background_texture"):
        (assets / empty).mkdir()


def fetch_driver(folder: Path) -> None:
    """SwiftShader, unless VK_ICD_FILENAMES names a driver of this machine's."""
    if os.environ.get("VK_ICD_FILENAMES"):
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError(
            "SwiftShader, which draws without a GPU, comes out of Debian's package chromium-common, and there is no "
            "apt-get here: name a Vulkan driver by VK_ICD_FILENAMES=/…/icd.json and try again"
        )
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as aside:
        fetch = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", "chromium-common")
        try:
            run(*fetch, cwd=Path(aside))
        except subprocess.CalledProcessError:  # lists of packages that are old, or not there yet
            run("apt-get", "-qq", "update")
            run(*fetch, cwd=Path(aside))
        (package,) = Path(aside).glob("*.deb")
        run("dpkg-deb", "-x", package, aside)
        for name in DRIVER:
            shutil.copy(Path(aside) / "usr/lib/chromium" / name, folder)
        (folder / "version.txt").write_text(package.name.split("_")[1])


if __name__ == "__main__":
    sys.exit(environments.main("robotwin", __doc__, install))
