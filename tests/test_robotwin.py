"""RoboTwin for real: scenes in SAPIEN, its own expert and its own judgement, in the environment that
tools/install_robotwin.py makes. Ten minutes, and 2 GB the first time: XMODAL_ROBOTWIN=1 pytest -s -m slow FILE.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import environments, eval_robot
from tools.install_robotwin import install
from tools.serve_policy import serving
from xmodal_opd.rollout.workers import Failed, Workers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("XMODAL_ROBOTWIN"), reason="XMODAL_ROBOTWIN=1 installs and runs RoboTwin"),
]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def python() -> str:
    return str(install(environments.default_folder("robotwin")))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> str:
    """Where those are that the expert has solved."""
    return str(tmp_path_factory.mktemp("seeds"))


def measured(python: str, seeds: str, output: Path, policy: str, *more: str) -> tuple[list[dict], dict]:
    """Episodes and results of one task."""
    words = ["--suite", "robotwin", "--python", python, "--tasks", "stack_blocks_two", "--timeout", "600"]
    words += ["--option", f"cache={json.dumps(seeds)}"]
    words += ["--policy", policy, "--output", str(output), *more]
    assert eval_robot.measure(eval_robot.parser().parse_args(words)) == 0
    lines = (output / "episodes.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines], json.loads((output / "eval_info.json").read_text())


def test_the_expert_stacks_blocks_and_who_does_nothing_does_not(python, seeds, tmp_path, capsys):
    two = ("--episodes-per-task", "2")
    episodes, info = measured(python, seeds, tmp_path / "expert", "expert", *two, "--record")
    assert [r["success"] for r in episodes] == [True, True] and all(100 < r["steps"] < 800 for r in episodes)
    setting = info["xmodal_opd"]["setting"]
    assert setting["versions"]["sapien"] == "3.0.0b1" and setting["versions"]["rlinf-robotwin-runtime"] == "0.1.3"
    assert setting["facts"]["render"] == "fast" and "SwiftShader" in setting["facts"]["driver"]
    assert "not comparable with published results: without RoboTwin's assets" in capsys.readouterr().out
    recorded = f"recorded:{tmp_path / 'expert' / 'actions.jsonl'}"
    again, _ = measured(python, seeds, tmp_path / "again", recorded, *two)
    assert [(r["success"], r["steps"]) for r in again] == [(r["success"], r["steps"]) for r in episodes]
    nothing, _ = measured(python, seeds, tmp_path / "nothing", "nothing", "--episodes-per-task", "1")
    assert [(r["success"], r["steps"]) for r in nothing] == [(False, 800)]
    with capsys.disabled():
        for name, some in {"expert": episodes, "recorded": again, "nothing": nothing}.items():
            print(f"\n{name}: {[(r['success'], r['steps'], r['seconds']) for r in some]}", end="")


def test_a_seed_is_the_same_scene_and_cameras_see_both_arms_move(python, seeds):
    around = {"PYTHONPATH": str(ROOT)}
    options = {"cache": seeds, "horizon": 20}
    command = [python, "-m", "modalities.action.worker", "robotwin", json.dumps(options)]
    pool = Workers(command, 1, 600.0, around, name="robotwin")
    about = pool.about()
    assert about["size"] == 16 and about["tasks"][0] == "stack_blocks_two" and len(about["tasks"]) == 4
    assert about["facts"]["differs"][-1] == "20 steps in an episode at most"
    first = pool.ask({0: ["reset", "stack_blocks_two", 0]})[0]
    assert {name: image.shape for name, image in first["images"].items()} == dict.fromkeys(
        ("head_camera", "left_camera", "right_camera"), (240, 320, 3)
    )
    assert "block" in first["instruction"] and first["state"].shape == (16,) and not first["success"]
    target = np.array(first["state"], np.float64)
    target[[0, 8]], target[[7, 15]] = (0.1, -0.1), 0  # the first joint of both arms, and both grippers
    moved = pool.ask({0: ["act", np.tile(target, (4, 1))]})[0]
    assert moved["steps"] == 4 and np.abs(moved["state"] - target).max() < 1e-3
    assert all((moved["images"][name] != first["images"][name]).any() for name in first["images"])
    again = pool.ask({0: ["reset", "stack_blocks_two", 0]})[0]
    assert again["instruction"] == first["instruction"]
    assert all((again["images"][name] == first["images"][name]).all() for name in first["images"])
    end = pool.ask({0: ["act", np.tile(target, (30, 1))]})[0]
    assert end["steps"] == 20 and end["done"] and not end["success"]
    assert pool.ask({0: ["frame"]})[0].shape == (480, 640, 3)
    pool.close()


class Waving:
    """A policy that moves the first joint of both arms, and says what it was shown."""

    identity, threads = {}, False

    def __init__(self):
        self.seen: list[dict] = []

    def reset(self, key): ...

    def act(self, seats):
        self.seen += [seat.seen for seat in seats]
        return [np.array([seat.seen["state"]] * 2) + 0.05 * np.isin(np.arange(16), (0, 8)) for seat in seats]


def test_robotwins_own_evaluation_asks_our_server_in_a_real_scene(python, seeds):
    code = """if 1:
        import sys
        from modalities.action.robotwin import RoboTwin
        from tools import deploy_policy

        env = RoboTwin(cache=sys.argv[2])
        env.reset("stack_blocks_two", 0)
        model = deploy_policy.get_model({"port": sys.argv[1]})
        deploy_policy.reset_model(model)
        for _ in range(2):
            deploy_policy.eval(env.env, model, env.env.get_obs())
        print("\\n", env.env.take_action_cnt, env.env.eval_success)
    """
    policy = Waving()
    with serving(policy, "waving", {"tcp": 0}) as ports:
        command = [python, "-c", code, str(ports["tcp"]), seeds]
        told = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert told.stdout.splitlines()[-1].split() == ["4", "False"], told.stderr
    first, second = policy.seen
    assert set(first["images"]) == {"head_camera", "left_camera", "right_camera"} and "block" in first["instruction"]
    moved = second["state"] - first["state"]
    assert moved[[0, 8]] == pytest.approx([0.05, 0.05], abs=1e-3) and abs(np.delete(moved, [0, 8])).max() < 1e-3
    assert (first["images"]["head_camera"] != second["images"]["head_camera"]).any()


@pytest.mark.parametrize(
    "options, around, words",
    [
        ({"config": "demo_randomized"}, {}, "demo_randomized strews textures and objects, which are RoboTwin's assets"),
        ({"embodiment": ["aloha-agilex"]}, {}, "there is no robot 'aloha-agilex'"),
        ({"render": "reference"}, {}, "SwiftShader.* cannot trace rays"),
        ({"render": "best"}, {}, "RoboTwin has no 'best'; there are: reference, fast"),
        ({}, {"ROBOTWIN_ASSETS_ROOT": "/nowhere"}, "ROBOTWIN_ASSETS_ROOT=/nowhere: .*robotwin-download-assets"),
        ({}, {"VK_ICD_FILENAMES": "/nowhere"}, "no Vulkan driver at /nowhere"),
    ],
)
def test_what_is_missing_is_told_in_a_sentence(python, options, around, words):
    command = [python, "-m", "modalities.action.worker", "robotwin", json.dumps(options)]
    with pytest.raises(Failed, match=words):
        Workers(command, 1, 600.0, {"PYTHONPATH": str(ROOT), **around}, name="robotwin").about()


def test_with_assets_there_are_fifty_tasks_and_an_object_that_is_missing_is_told(python, seeds, tmp_path):
    """The assets themselves are on a hub; here is a folder that has their names, and a robot."""
    for name in ("background_texture", "objects", "embodiments/aloha-agilex"):
        (tmp_path / "assets" / name).mkdir(parents=True)
    pandas = Path(python).parents[1] / "share/robotwin/assets/embodiments/franka-panda"
    (tmp_path / "assets/embodiments/franka-panda").symlink_to(pandas)
    options = {"cache": seeds, "embodiment": ["franka-panda", "franka-panda", 0.6], "render": "fast"}
    command = [python, "-m", "modalities.action.worker", "robotwin", json.dumps({**options, "cameras": []})]
    around = {"PYTHONPATH": str(ROOT), "ROBOTWIN_ASSETS_ROOT": str(tmp_path)}
    pool = Workers(command, 1, 600.0, around, name="robotwin")
    about = pool.about()
    assert len(about["tasks"]) == 50 and about["facts"]["assets"] == str(tmp_path)
    assert "without RoboTwin's assets" not in about["facts"]["differs"]
    assert pool.ask({0: ["reset", "stack_blocks_two", 0]})[0]["images"] == {}
    with pytest.raises(Failed, match=r"a scene of place_empty_cup lacks something in .*-download-assets") as told:
        pool.ask({0: ["reset", "place_empty_cup", 0]})
    assert told.value.kind == "AssetError"
    pool.close()


def test_the_installer_finds_what_it_made_and_prints_its_python(python):
    command = [sys.executable, "tools/install_robotwin.py"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == python
