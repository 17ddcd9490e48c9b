"""LIBERO for real: episodes in the simulator, with its own initial states, bodies and pictures."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from modalities.action.environment import AssetError, make
from tools import eval_robot

with warnings.catch_warnings(action="ignore"):  # robosuite's own
    try:
        from modalities.action.libero import HORIZONS, Libero
    except AssetError as missing:
        pytest.skip(str(missing), allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[1]
TIMEOUT = ("--timeout", "600")


def run(*more: str, output: Path, suite: str = "libero_object", policy: str = "expert") -> int:
    words = ["--suite", suite, "--policy", policy, "--output", str(output), *TIMEOUT, *more]
    return eval_robot.measure(eval_robot.parser().parse_args(words))


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "episodes.jsonl").read_text().splitlines()][1:]


def test_the_expert_puts_things_into_the_basket_and_a_policy_that_does_nothing_does_not(tmp_path):
    assert run("--tasks", "0,2", "--episodes-per-task", "1", output=tmp_path / "expert") == 0
    assert [r["success"] for r in records(tmp_path / "expert")] == [True, True]
    assert all(50 < r["steps"] < 280 for r in records(tmp_path / "expert"))
    assert run("--tasks", "0", "--episodes-per-task", "1", output=tmp_path / "nothing", policy="nothing") == 0
    assert [(r["success"], r["steps"]) for r in records(tmp_path / "nothing")] == [(False, 280)]


@pytest.mark.parametrize("suite", [name for name in HORIZONS if name != "libero_object"])
def test_an_episode_of_each_other_suite_runs_to_its_horizon(tmp_path, suite):
    more = ("--option", 'render="fast"', "--tasks", "0", "--episodes-per-task", "1")
    assert run(*more, output=tmp_path, suite=suite, policy="nothing") == 0
    assert [(r["success"], r["steps"]) for r in records(tmp_path)] == [(False, HORIZONS[suite])]


def test_pictures_of_chunks_are_those_of_single_steps_and_a_soft_reset_starts_where_a_hard_one_does():
    rng = np.random.default_rng(0)
    chunks = [np.concatenate([rng.uniform(-1, 1, (4, 6)), np.ones((4, 1))], 1) for _ in range(2)]
    seen: dict[bool, list] = {}
    for hard in (False, True):
        env = Libero("libero_goal", pixels=64, hard_reset=hard)
        seen[hard] = []
        for start in (0, 1):
            seen[hard].append(env.reset(env.tasks[0], start))
            for chunk in chunks:
                if hard:  # every step on its own, as the benchmark does
                    for action in chunk:
                        last = env.act(action[None])
                else:
                    last = env.act(chunk)
                seen[hard].append(last)
        env.close()
    for number, (soft, hard) in enumerate(zip(seen[False], seen[True], strict=True)):
        assert np.abs(soft["state"] - hard["state"]).max() < 1e-7, f"observation {number}"
        assert all((soft["images"][name] == hard["images"][name]).all() for name in soft["images"])
    assert (seen[False][1]["images"]["agentview"] != seen[False][2]["images"]["agentview"]).any()


def test_who_does_not_wait_sees_the_initial_state():
    env = Libero("libero_object", pixels=64, render="fast", wait=0)
    seen = env.reset(env.tasks[0], 3)
    assert {name: image.shape for name, image in seen["images"].items()} == dict.fromkeys(env.cameras, (64, 64, 3))
    assert seen["steps"] == 0 and np.abs(seen["images"]["agentview"].astype(int) - env.frame()).mean() < 1
    after = env.act(np.tile([1.0, 0, 0, 0, 0, 0, -1], (3, 1)))
    assert after["steps"] == 3 and (after["images"]["agentview"] != seen["images"]["agentview"]).any()
    env.close()


def test_a_start_state_is_the_same_whatever_ran_before_and_fixtures_move_with_the_turn():
    env = Libero("libero_goal", cameras=(), wait=1)
    task = env.tasks[0]
    in_order = [env.reset(task, start)["text"] for start in (0, 1, 2)]
    assert [env.reset(task, start)["text"] for start in (2, 0, 1)] == [in_order[2], in_order[0], in_order[1]]
    other = Libero("libero_goal", cameras=(), wait=1)
    assert other.reset(task, 2)["text"] == in_order[2]
    places = {text.split("wooden_cabinet_1 ")[1].split(";")[0] for text in in_order}
    assert len(places) == 3
    first = Libero("libero_goal", cameras=(), wait=1, fixtures="first")
    assert first.reset(task, 1)["text"].split("wooden_cabinet_1 ")[1].split(";")[0] in places
    with pytest.raises(ValueError, match="initial states 0 to 49, not 50"):
        env.reset(task, 50)
    with pytest.raises(ValueError, match="no task 'pick'; there are: open_the_middle"):
        env.reset("pick", 0)
    with pytest.raises(AssetError, match="there is no scripted expert for 'open_the_middle"):
        env.expert()
    with pytest.raises(ValueError, match="with NaN or infinity in it"):
        env.act(np.full((1, 7), np.nan))
    with pytest.raises(ValueError, match=r"\[C, 7\] finite numbers, not one of shape \(1, 6\)"):
        env.act(np.zeros((1, 6)))


def test_fast_pictures_are_others_and_unknown_names_are_refused():
    pictures = {}
    for render in ("reference", "fast"):
        env = Libero("libero_object", pixels=64, render=render)
        pictures[render] = env.reset(env.tasks[0], 0)["images"]["agentview"].astype(int)
        env.close()
    assert 0 < abs(pictures["reference"] - pictures["fast"]).mean() < 40
    with pytest.raises(ValueError, match="no suite 'libero_100'; there are: libero_spatial"):
        Libero("libero_100")
    with pytest.raises(ValueError, match="no rendering 'best'"):
        Libero(render="best")
    with pytest.raises(ValueError, match="no camera 'corner'; there are: frontview"):
        env = Libero(cameras=("corner",))
        env.reset(env.tasks[0], 0)


@pytest.mark.parametrize(
    "around, words",
    [
        ({"__EGL_VENDOR_LIBRARY_FILENAMES": "/nowhere"}, "OpenGL driver"),
        ({"LIBERO_CONFIG_PATH": "CONFIG"}, "LIBERO's assets are not at /nowhere"),
    ],
)
def test_a_missing_driver_and_missing_meshes_are_told_in_a_sentence(tmp_path, monkeypatch, around, words):
    (tmp_path / "config.yaml").write_text("assets: /nowhere\n")
    for name, value in around.items():
        monkeypatch.setenv(name, str(tmp_path) if value == "CONFIG" else value)
    with pytest.raises(RuntimeError, match=words):
        run("--tasks", "0", "--episodes-per-task", "1", output=tmp_path / "out")


def test_a_killed_run_goes_on_and_a_killed_worker_costs_only_its_episode(tmp_path):
    words = ["--suite", "libero_object", "--policy", "nothing", "--tasks", "0", "--option", "horizon=40"]
    words += ["--episodes-per-task", "3", "--output", str(tmp_path), *TIMEOUT]
    command, path = [sys.executable, "tools/eval_robot.py", *words], tmp_path / "episodes.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    wait_for(lambda: path.is_file() and path.read_bytes().count(b"\n") >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = path.read_bytes()
    assert 1 <= finished.count(b"\n") - 1 < 3
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    worker = wait_for(lambda: workers_of(process.pid))
    os.kill(worker, signal.SIGKILL)
    assert process.wait(600) == 0
    assert path.read_bytes().startswith(finished) and len(records(tmp_path)) == 3


def workers_of(pid: int) -> int | None:
    """A worker of this process that has its simulator."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent, memory = int(stat.read_text().rsplit(")", 1)[1].split()[1]), stat.with_name("statm").read_text()
        except (OSError, ProcessLookupError):
            continue
        if parent == pid and int(memory.split()[1]) * 4096 > 600 * 2**20:
            return int(stat.parent.name)
    return None


def wait_for(found):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("it never came")


def test_make_finds_it_by_name():
    assert isinstance(make("libero", {"suite": "libero_10"}), Libero)
