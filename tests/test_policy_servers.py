"""Policies that are served, and RoboTwin's way of asking them: real servers and clients on this machine, and a
stand-in for RoboTwin's runtime behind its real protocol."""

import json
import socket
import threading

import numpy as np
import pytest

from modalities.action import clients
from modalities.action.environment import AssetError, make
from modalities.action.protocols import PROTOCOLS
from modalities.action.robotwin import RoboTwin
from tools import deploy_policy, eval_robot
from tools.policies.seats import Seat
from tools.policies.served import Http, OpenPi, Unreachable
from tools.serve_policy import serving


class Looker:
    """A policy of the stand-in: both joints to where the brightness of the picture says, in chunks of two."""

    identity, threads = {"weights": "none"}, False

    def __init__(self):
        self.begun: list[str] = []

    def reset(self, key):
        self.begun.append(key)

    def act(self, seats):
        return [self.aim(seat.seen) for seat in seats]

    def aim(self, seen):
        if not seen["instruction"]:
            raise ValueError("nobody said what to do")
        target = seen["images"]["head_camera"][0, 0, 0] / 255 if "head_camera" in seen["images"] else 0.5
        return np.tile([target, 1.0, target, 1.0], (2, 1))


@pytest.fixture
def served():
    policy = Looker()
    with serving(policy, "looker", dict.fromkeys(("http", "openpi", "tcp", "xpolicylab"), 0)) as ports:
        yield policy, ports


def twin(tmp_path, **options) -> RoboTwin:
    return RoboTwin(runtime="twin:Runtime", cache=str(tmp_path), **options)


def test_only_seeds_that_the_expert_solves_count_and_they_are_kept(tmp_path):
    env = twin(tmp_path)
    seen = env.reset("lift", 2)
    kept = [json.loads(line) for line in next(tmp_path.glob("lift-demo_clean-*.json")).read_text().splitlines()]
    assert [seed for seed, info in kept if info] == [100001, 100003, 100004]
    assert [seed for seed, info in kept if not info] == [100000, 100002]
    assert seen["instruction"].startswith("raise block/100004, way ") and not seen["done"] and seen["steps"] == 0
    again = twin(tmp_path, instruction="seen")
    assert again.reset("lift", 2)["instruction"] == "lift block/100004"
    assert twin(tmp_path).reset("lift", 2)["instruction"] == seen["instruction"]
    assert twin(tmp_path, seed=1).counted("lift", 1)[0][0] >= 200000


def test_actions_end_at_success_or_at_the_step_limit(tmp_path):
    env = twin(tmp_path)
    target = env.reset("lift", 0)["images"]["head_camera"][0, 0, 0] / 255
    end = env.act(np.tile([target, 1, target, 1], (6, 1)))
    assert end["success"] and end["done"] and end["steps"] < 6
    env.reset("lift", 0)
    end = env.act(np.zeros((9, 4)))
    assert not end["success"] and end["done"] and end["steps"] == 6
    with pytest.raises(ValueError, match=r"\[C, 4\] finite numbers"):
        env.act(np.zeros((1, 14)))
    short = twin(tmp_path, horizon=2)
    short.reset("lift", 0)
    assert short.act(np.zeros((9, 4)))["steps"] == 2 and "2 steps in an episode at most" in short.facts["differs"]
    with pytest.raises(ValueError, match="no task 'sink'"):
        env.reset("sink", 0)


def test_what_the_expert_did_is_played_again_as_actions(tmp_path):
    env = twin(tmp_path)
    seen = env.reset("lift", 1)
    targets = []
    while not seen["done"]:
        targets.append(env.expert()[0])
        seen = env.act(env.expert()[None])
    assert seen["success"] and targets[0] == pytest.approx(targets[1] / 2) and len(set(targets)) == 2
    assert env.reset("lift", 0)["steps"] == 0 and env.expert()[0] != targets[0]
    env.scene = ("lift", 0, 100000)
    env.script = []
    with pytest.raises(RuntimeError, match="the expert of lift did not solve seed 100000 once more"):
        env.expert()


def test_a_missing_runtime_is_told_in_a_sentence():
    with pytest.raises(AssetError, match=r"not installed in .*tools/install_robotwin.py makes its environment"):
        make("robotwin", {})


@pytest.mark.parametrize("protocol", ["tcp", "xpolicylab"])
def test_robotwins_own_evaluation_asks_our_server(tmp_path, served, protocol):
    policy, ports = served
    model = deploy_policy.get_model({"port": ports[protocol], "protocol": protocol})
    env = twin(tmp_path)
    for start in (0, 1):
        env.reset("lift", start)
        deploy_policy.reset_model(model)
        while env.env.take_action_cnt < env.env.step_lim and not env.env.eval_success:
            deploy_policy.eval(env.env, model, env.env.get_obs())
        assert env.env.eval_success
    assert len(policy.begun) >= 2
    env.env.set_instruction("")
    with pytest.raises(clients.Refused, match="nobody said what to do"):
        env.env.take_action_cnt, env.env.eval_success = 0, False
        deploy_policy.eval(env.env, model, env.env.get_obs())
    model.close()


def test_the_evaluation_runs_robotwin_with_a_served_policy(tmp_path, served, monkeypatch, capsys):
    _, ports = served
    monkeypatch.setenv("PYTHONPATH", "tests")
    words = ["--suite", "robotwin", "--policy", f"http://127.0.0.1:{ports['http']}", "--episodes-per-task", "2"]
    words += [
        "--option",
        'runtime="twin:Runtime"',
        "--option",
        f'cache="{tmp_path}"',
        "--output",
        str(tmp_path / "out"),
    ]
    assert eval_robot.measure(eval_robot.parser().parse_args(words)) == 0
    info = json.loads((tmp_path / "out" / "eval_info.json").read_text())
    assert info["overall"]["pc_success"] == 100 and info["overall"]["n_episodes"] == 2
    assert info["xmodal_opd"]["setting"]["identity"] == {"policy": "looker", "weights": "none"}
    assert info["xmodal_opd"]["setting"]["facts"]["render"] == "fast"
    assert "not comparable with published results: three lines of physics" in capsys.readouterr().out
    words[3:4], words[-1:] = ["nothing"], [str(tmp_path / "still")]
    assert eval_robot.measure(eval_robot.parser().parse_args(words)) == 0
    records = (tmp_path / "still" / "episodes.jsonl").read_text().splitlines()[1:]
    assert [(r["success"], r["steps"], r["error"]) for r in map(json.loads, records)] == [(False, 6, None)] * 2


def seat(**images) -> Seat:
    state = np.arange(8, dtype=np.float32)
    seen = {"images": images, "state": state, "instruction": "pick", "steps": 0, "success": False, "done": False}
    return Seat("a/0", "a", 0, {**seen, "text": ""}, lambda: np.zeros(4))


def test_openpis_protocol_goes_both_ways(served):
    _, ports = served
    picture = np.full((256, 256, 3), 100, np.uint8)
    policy = OpenPi(f"ws://127.0.0.1:{ports['openpi']}", PROTOCOLS["openpi"])
    assert policy.identity == {"policy": "looker", "units": "simulator"}
    actions = policy.act([seat(agentview=picture, robot0_eye_in_hand=picture)])[0]
    assert actions.tolist() == [[0.5, 1.0, 0.5, 1.0]] * 2  # in the simulator's units, so the gripper stays
    client = clients.OpenPi(f"ws://127.0.0.1:{ports['openpi']}")
    with pytest.raises(clients.Refused, match="KeyError: 'observation/state'"):
        client.infer({"prompt": "pick"})
    client.close()
    policy.connection().close()


def test_a_server_that_is_gone_and_one_that_refuses_are_told_in_a_sentence(served):
    _, ports = served
    policy = Http(f"http://127.0.0.1:{ports['http']}", None)
    empty = seat()
    empty.seen["instruction"] = ""
    with pytest.raises(ValueError, match=r"refuses /act \(400\): ValueError: nobody said what to do"):
        policy.act([empty])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = free.getsockname()[1]
    with pytest.raises(Unreachable, match=r"no policy server answers at http://127\.0\.0\.1"):
        Http(f"http://127.0.0.1:{nobody}", None)
    with pytest.raises(Unreachable, match="start it, and run the same command again"):
        OpenPi(f"ws://127.0.0.1:{nobody}", PROTOCOLS["openpi"])
    with pytest.raises(ValueError, match="known for LIBERO"):
        OpenPi("ws://127.0.0.1:1", None)
    model = clients.Tcp("127.0.0.1", ports["tcp"])
    with pytest.raises(clients.Refused, match="there is no 'delete'; there are: update_obs"):
        model.call("delete")
    with pytest.raises(clients.Refused, match="get_action comes after update_obs"):
        model.call("get_action")
    model.close()


def test_frames_of_xpolicylab_are_answered_in_kind(served):
    _, ports = served
    client = clients.Socket(f"ws://127.0.0.1:{ports['xpolicylab']}")
    assert client.about == {"ok": True} and client.ask("heartbeat", {}) == {"ok": True}
    assert client.ask("trial_end", {"success": True}, trial_id="t")["ok"]
    client.who = {"evaluation_id": "e", "step": 3}
    client.socket.send(
        clients.pack({"message_type": "infer", "request_id": "r", "step": 3, "payload": {}}, "xpolicylab")
    )
    back = clients.unpack(client.socket.recv(10))
    assert (back["message_type"], back["request_id"], back["step"]) == ("error", "r", 3)
    assert back["payload"]["code"] == "infer_failed" and "observation" in back["payload"]["message"]
    client.close()


@pytest.mark.parametrize("spelling", ["openpi", "xpolicylab"])
def test_arrays_travel_by_msgpack_in_either_spelling(spelling):
    message = {
        "a": np.arange(6, dtype=np.uint8).reshape(2, 3).T,
        "b": [np.float32(0.5), "x", None],
        "c": np.zeros((0, 2)),
    }
    back = clients.unpack(clients.pack(message, spelling))
    assert back["a"].tolist() == message["a"].tolist() and back["b"] == [0.5, "x", None] and back["c"].shape == (0, 2)
    with pytest.raises(TypeError, match="arrays of numbers, not object"):
        clients.pack({"a": object()}, spelling)
    with pytest.raises(ValueError, match="does not travel"):
        clients.unpack(clients.pack({b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": b"x"}))


def test_arrays_travel_by_json_over_tcp():
    ours, theirs = socket.socketpair()
    message = {"cmd": "update_obs", "obs": {"rgb": np.arange(12, dtype=np.uint8).reshape(2, 2, 3), "n": np.int64(3)}}
    sender = threading.Thread(target=clients.write_message, args=(ours, message))
    sender.start()
    back = clients.read_message(theirs)
    sender.join()
    assert back["obs"]["rgb"].tolist() == message["obs"]["rgb"].tolist() and back["obs"]["n"] == 3
    ours.sendall(b"GET / HTTP/1.1")
    with pytest.raises(ValueError, match="something else speaks on this port"):
        clients.read_message(theirs)
    ours.close()
    with pytest.raises(EOFError):
        clients.exactly(theirs, 1000)
    theirs.close()
