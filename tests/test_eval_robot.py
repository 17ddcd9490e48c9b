"""The evaluation of robots: what is counted, what survives, what is refused. Real workers, with the toy's world."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from modalities.action.protocols import HORIZONS, PROTOCOLS
from tools import eval_robot
from tools.policies import make
from tools.policies.scripted import Expert, Nothing, Recorded
from tools.policies.seats import Seat, Together, Unusable, prepared
from tools.policies.served import in_units
from xmodal_opd import config
from xmodal_opd.statistics import wilson_interval

ROOT = Path(__file__).parents[1]


def run(*more: str, output: Path, suite: str = "toy", policy: str = "expert") -> int:
    words = ["--suite", suite, "--policy", policy, "--output", str(output), *more]
    return eval_robot.measure(eval_robot.parser().parse_args(words))


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "episodes.jsonl").read_text().splitlines()][1:]


def test_an_expert_is_measured_filmed_and_recorded_in_lerobots_form(tmp_path, capsys):
    assert run("--episodes-per-task", "2", "--workers", "2", "--video", "1", "--record", output=tmp_path) == 0
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert {"per_task", "per_group", "overall"} < set(info)
    told = {(t["task_group"], t["task_id"], len(t["metrics"]["successes"])) for t in info["per_task"]}
    assert told == {("toy", 0, 2), ("toy", 1, 2), ("toy", 2, 2)}
    names = {"sum_rewards", "max_rewards", "successes", "video_paths", "predicted_video_paths"}
    assert all(set(t["metrics"]) == names for t in info["per_task"])
    group = {"avg_sum_reward", "avg_max_reward", "pc_success", "n_episodes", "video_paths", "predicted_video_paths"}
    assert set(info["per_group"]["toy"]) == group and set(info["overall"]) == group | {"eval_s", "eval_ep_s"}
    assert info["overall"]["pc_success"] == 100 and info["overall"]["n_episodes"] == 6
    assert info["xmodal_opd"]["suite"]["success_ci"] == list(wilson_interval(6, 6))
    assert info["xmodal_opd"]["setting"]["versions"]["numpy"] == np.__version__
    films = sorted(Path(path) for path in info["overall"]["video_paths"])
    assert len(films) == 3 and films[0] == tmp_path / "videos" / "toy_0" / "eval_episode_0.mp4"
    assert all(b"ftyp" in film.read_bytes()[:12] for film in films)
    assert "100.0" in capsys.readouterr().out
    before = records(tmp_path)
    replayed = tmp_path / "replayed"
    assert run("--episodes-per-task", "2", output=replayed, policy=f"recorded:{tmp_path / 'actions.jsonl'}") == 0
    steps = {f"{r['task']}/{r['start']}": r["steps"] for r in before}
    assert {f"{r['task']}/{r['start']}": r["steps"] for r in records(replayed)} == steps
    assert all(r["success"] for r in records(replayed))


def test_nothing_fails_every_episode(tmp_path):
    assert run("--episodes-per-task", "1", "--tasks", "push,2", output=tmp_path, policy="nothing") == 0
    assert [(r["task"], r["success"], r["steps"]) for r in records(tmp_path)] == [
        ("push", False, 40),
        ("carry", False, 40),
    ]


def test_a_second_run_does_what_is_left_and_refuses_other_settings(tmp_path):
    run("--episodes-per-task", "1", "--tasks", "reach", output=tmp_path)
    first = (tmp_path / "episodes.jsonl").read_text()
    torn = first + '{"task": "reach", "start": 1, "succ'  # what a kill leaves
    (tmp_path / "episodes.jsonl").write_text(torn)
    run("--episodes-per-task", "2", "--tasks", "reach", output=tmp_path)
    assert (tmp_path / "episodes.jsonl").read_text().startswith(first)
    assert [r["start"] for r in records(tmp_path)] == [0, 1]
    with pytest.raises(ValueError, match=r"holds episodes with options .* 20.* name another --output"):
        run("--option", "horizon=20", output=tmp_path)
    with pytest.raises(ValueError, match="holds episodes with policy 'expert', and this run has 'nothing'"):
        run(output=tmp_path, policy="nothing")


def test_actions_that_a_kill_tore_are_dropped_and_those_before_and_after_can_be_played(tmp_path):
    run("--episodes-per-task", "2", "--tasks", "reach", "--record", output=tmp_path)
    actions, episodes = tmp_path / "actions.jsonl", tmp_path / "episodes.jsonl"
    episodes.write_text("".join(episodes.read_text().splitlines(keepends=True)[:2]))
    actions.write_text(actions.read_text()[:-20])
    run("--episodes-per-task", "2", "--tasks", "reach", "--record", output=tmp_path)
    assert sorted(Recorded(actions).actions) == ["reach/0", "reach/1"]
    episodes.write_text("no JSON\n")
    with pytest.raises(ValueError, match=r"episodes.jsonl is no file of this program .* name another --output"):
        run(output=tmp_path)


def test_a_model_is_measured_in_the_world_of_its_recipe():
    def asked(*more, suite="metaworld"):
        return eval_robot.parser().parse_args(["--suite", suite, "--policy", "p", "--output", "o", *more])

    recipe, of = ["--recipe", "configs/vla_opd.yaml"], dict(config.load("vla_opd").robot.options)
    assert of["moved"] and eval_robot.environment(asked(*recipe), None) == ("metaworld", of)
    shorter = eval_robot.environment(asked(*recipe, "--option", "horizon=9"), None)
    assert shorter == ("metaworld", {**of, "horizon": 9})
    assert eval_robot.environment(asked(*recipe, suite="toy"), None) == ("toy", {})
    usual = {"ws://127.0.0.1:1": "openpi", "lerobot:here": "lerobot", "http://127.0.0.1:1": "openvla_oft"}
    for policy, name in usual.items():
        assert eval_robot.protocol_of(asked("--policy", policy, suite="libero_10")) == name
    assert eval_robot.protocol_of(asked("--protocol", "openpi", suite="libero_10")) == "openpi"


def test_a_killed_run_loses_nothing_that_was_finished(tmp_path):
    words = ["--suite", "toy", "--policy", "nothing", "--episodes-per-task", "200", "--output", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "tools/eval_robot.py", *words], cwd=ROOT, start_new_session=True)
    path = tmp_path / "episodes.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.is_file() and path.read_bytes().count(b"\n") > 5):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = path.read_bytes().count(b"\n") - 1
    assert 5 <= done < 600
    finished = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    run("--episodes-per-task", "3", output=tmp_path, policy="nothing")
    assert path.read_bytes().startswith(finished)
    keys = [f"{r['task']}/{r['start']}" for r in records(tmp_path)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    "how, why",
    [("dies", "status 9"), ("raises", "fell off"), pytest.param("hangs", "no answer", marks=pytest.mark.slow)],
)
def test_an_episode_whose_worker_is_lost_is_counted_and_run_again(tmp_path, how, why, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    marks = tmp_path / "marks"
    marks.mkdir()
    options = [f'how="{how}"', f'marks="{marks}"', "times=1"]
    more = [word for option in options for word in ("--option", option)]
    suite = "worlds:Broken"
    assert run(*more, "--episodes-per-task", "2", "--timeout", "5", output=tmp_path / "out", suite=suite) == 0
    assert {f"{r['task']}/{r['start']}": r["lost"] for r in records(tmp_path / "out")}["push/1"] == 1
    assert all(r["success"] for r in records(tmp_path / "out"))
    assert "1 times a worker was lost" in capsys.readouterr().out
    for mark in marks.iterdir():
        mark.unlink()
    more[-1] = "times=3"
    assert run(*more, "--episodes-per-task", "2", "--timeout", "5", output=tmp_path / "other", suite=suite) == 1
    left = {f"{r['task']}/{r['start']}" for r in records(tmp_path / "other")}
    assert len(left) == 5 and "push/1" not in left
    out = " ".join(capsys.readouterr().out.split())
    assert "given up, and not counted: push/1: its worker was lost 3 times" in out and why in out
    assert run(*more, "--episodes-per-task", "2", "--timeout", "5", output=tmp_path / "other", suite=suite) == 0


def test_actions_that_are_no_numbers_fail_their_episode_and_those_of_another_robot_end_the_run(tmp_path, capsys):
    recording = tmp_path / "actions.jsonl"
    lines = [{"task": "reach", "start": 0, "actions": [[0.0, float("nan"), 0.0]]}]
    recording.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        run("--episodes-per-task", "2", "--tasks", "reach", output=tmp_path / "a", policy=f"recorded:{recording}") == 0
    )
    errors = [r["error"] for r in records(tmp_path / "a")]
    assert errors == ["the policy's action holds nan", f"{recording} has no action for step 0"]
    assert "2 episodes failed by the policy's answer" in capsys.readouterr().out
    recording.write_text(json.dumps({"task": "reach", "start": 0, "actions": [[0.0, 0.0]]}) + "\n")
    with pytest.raises(ValueError, match=r"actions have the shape \[1, 2\]; this robot takes \[C, 3\]"):
        run("--episodes-per-task", "1", "--tasks", "reach", output=tmp_path / "b", policy=f"recorded:{recording}")


def test_wrong_words_are_refused_in_a_sentence(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no task 'pull'; there are 0 to 2: reach, push, carry"):
        run("--tasks", "pull", output=tmp_path)
    with pytest.raises(ValueError, match="--protocol is of LIBERO"):
        run("--protocol", "openpi", output=tmp_path)
    with pytest.raises(ValueError, match="--option takes NAME=JSON"):
        run("--option", "horizon", output=tmp_path)
    with pytest.raises(ValueError, match="horizon is a number of steps from 1 on, not -5"):
        run("--option", "horizon=-5", output=tmp_path)
    with pytest.raises(SystemExit):
        run("--workers", "0", output=tmp_path)
    assert "argument --workers: '0' is not a whole number from 1 on" in capsys.readouterr().err
    assert eval_robot.chosen(["reach", "push"], "reach,push,0") == ["reach", "push"]
    with pytest.raises(ValueError, match="there is no policy 'best'"):
        make("best", size=3, rules=None, recipe=None)
    with pytest.raises(RuntimeError, match="no environment 'mars'"):
        run(output=tmp_path, suite="mars")
    (tmp_path / "bad.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match="is no recording"):
        Recorded(tmp_path / "bad.jsonl")


def test_protocols_are_the_published_ones():
    oft, pi, simple, lerobot = (PROTOCOLS[n] for n in ("openvla_oft", "openpi", "simplevla_rl", "lerobot"))
    assert [HORIZONS[f"libero_{name}"] for name in ("spatial", "object", "goal", "10", "90")] == [
        220,
        280,
        300,
        520,
        400,
    ]
    assert (oft.horizons, oft.seed, oft.chunk, oft.resize, oft.crop, oft.jpeg) == (HORIZONS, 0, 8, 224, True, True)
    assert (lerobot.seed, lerobot.chunk, lerobot.resize, lerobot.jpeg) == (1000, None, None, False)
    assert (pi.horizons, pi.seed, pi.chunk, pi.resize, pi.crop) == (HORIZONS, 7, 5, 224, False)
    assert set(simple.horizons.values()) == {512} and simple.fixtures == "first"
    assert lerobot.horizons["libero_spatial"] == 280 and lerobot.seed == 1000 and lerobot.fixtures == "seed"
    assert all((p.episodes, p.wait, p.pixels) == (50, 10, 256) for p in PROTOCOLS.values())


def test_a_served_openvla_opens_its_gripper_with_1_and_libero_with_minus_1():
    actions = np.array([[0.5, 1.0], [0.5, 0.0], [0.5, 0.7]])
    assert in_units(actions, PROTOCOLS["openvla_oft"]).tolist() == [[0.5, -1], [0.5, 1], [0.5, -1]]
    assert in_units(actions, PROTOCOLS["openpi"]) is actions


def test_pictures_are_shown_as_the_protocol_has_them():
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    shown = {name: prepared({"a": image}, PROTOCOLS[name])["a"] for name in PROTOCOLS}
    assert shown["lerobot"] is image
    assert all(shown[name].shape == (224, 224, 3) for name in ("openpi", "openvla_oft", "simplevla_rl"))
    assert (shown["openpi"] != shown["openvla_oft"]).any()


class Counting:
    """A policy that is slow, and not for threads."""

    identity, threads = {}, False

    def __init__(self):
        self.batches: list[int] = []

    def reset(self, key): ...

    def act(self, seats):
        self.batches.append(len(seats))
        time.sleep(0.1)
        return [np.full((1, 3), seat.start) for seat in seats]


def test_episodes_that_wait_for_a_policy_are_answered_in_one_batch():
    policy = Counting()
    together, answers = Together(policy), {}

    def ask(start: int) -> None:
        answers[start] = together.act(Seat(f"a/{start}", "a", start, {}, lambda: np.zeros(3)))

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {start: int(answer[0, 0]) for start, answer in answers.items()} == {start: start for start in range(6)}
    assert sum(policy.batches) == 6 and len(policy.batches) <= 3


def test_a_policy_that_raises_is_heard_by_all_who_wait():
    class Failing(Counting):
        def act(self, seats):
            raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        Together(Failing()).act(Seat("a/0", "a", 0, {}, lambda: np.zeros(3)))


def test_an_answer_that_is_no_action_is_its_own_episodes_alone():
    class Partly(Counting):
        def act(self, seats):
            if any(seat.start == 1 for seat in seats):
                raise Unusable("not finite")
            return super().act(seats)

    together, told = Together(Partly()), {}
    seats = [Seat(f"a/{start}", "a", start, {}, lambda: np.zeros(3)) for start in range(3)]
    waiting = [(seat, Future()) for seat in seats]
    together.answer(waiting)
    for seat, future in waiting:
        told[seat.start] = "failed" if future.exception() else int(future.result()[0, 0])
    assert told == {0: 0, 1: "failed", 2: 2}


def test_simple_policies_answer_with_chunks():
    seat = Seat("a/0", "a", 0, {}, lambda: np.array([0.1, 0.2, 0.3]))
    assert Expert().act([seat])[0].tolist() == [[0.1, 0.2, 0.3]]
    assert make("nothing", size=7, rules=PROTOCOLS["openpi"], recipe=None).act([seat])[0][0].tolist() == [0] * 6 + [-1]
    assert Nothing([0.0], 3).act([seat])[0].shape == (3, 1)
    still = Seat("a/0", "a", 0, {"state": np.array([1.0, 2.0])}, seat.expert)
    assert make("nothing", size=2, rules=None, recipe=None, holds=True).act([still])[0].tolist() == [[1.0, 2.0]] * 8


def test_help_comes_at_once():
    code = "import sys, tools.eval_robot as e; e.parser(); print([m for m in ('torch', 'mujoco') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert told.stdout.strip() == "[]", told.stderr
