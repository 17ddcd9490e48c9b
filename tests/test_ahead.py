"""Sampling one step ahead: it really overlaps, every answer is exactly one update old, and a stopped run goes on."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from conftest import BRIEF

from xmodal_opd import build, config, train
from xmodal_opd.checkpoint import latest
from xmodal_opd.models import load_model
from xmodal_opd.rollout.ahead import Ahead
from xmodal_opd.rollout.hf import HFSampler

happened: list[tuple] = []  # in this order
training = threading.Event()
interrupted = threading.Event()


class Elsewhere:
    """Stands for servers: another copy of the model, which has the weights that were last brought to it by a folder."""

    exact = False

    def __init__(self, servers, adapter, *, eos, max_tokens, export, folder, **_):
        self.export, self.folder, self.rest, self.model = export, Path(folder), (adapter, eos, max_tokens), None

    def sync(self):
        happened.append(("sync",))
        self.export(self.folder)
        self.model = load_model(str(self.folder))

    def clear(self):
        pass

    def generate(self, pairs, samplings, seed):
        if threading.current_thread() is not threading.main_thread():
            assert training.wait(60), "the training of a step waits for the answers to the next one"
        answers = HFSampler(self.model, *self.rest).generate(pairs, samplings, seed)
        if "sequences" in samplings:  # a step's, not an evaluation's
            happened.append(("answered", seed // 4099, *(pair.key for pair in pairs)))
        return answers


def judge(prompts, completions, **_):
    training.set()
    return [float(len(c) % 2) for c in completions]


def stops_in_the_second_step(prompts, completions, **_):
    syncs = len([event for event in happened if event[0] == "sync"])
    if syncs == 2 and not interrupted.is_set():  # one at the start, one after the first step
        interrupted.set()
        os.kill(os.getpid(), signal.SIGTERM)
    return judge(prompts, completions)


@pytest.fixture(scope="module", autouse=True)
def _elsewhere():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "VLLMSampler", Elsewhere)
        yield


def run(world, folder, *overrides, judged=judge):
    """Metrics of a run with the sampler elsewhere, and what happened in it."""
    happened.clear()
    training.clear()
    settings = ["rollout.name=vllm", "rollout.servers=['http://127.0.0.1:1']", f"run_dir={folder}", *BRIEF]
    settings += [f"judge={{name: '{__name__}:{judged.__name__}'}}", "optim.lr=0.01"]
    train.train(config.load(world["recipe"], [*settings, *overrides]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, list(happened)


def answered(events):
    return [event[2:] for event in events if event[0] == "answered"]


@pytest.fixture(scope="module")
def one_ahead(world, tmp_path_factory):
    """Such a run of four steps that samples one ahead."""
    return run(world, tmp_path_factory.mktemp("ahead") / "run", "rollout.ahead=1")


def test_every_answer_is_exactly_one_update_old_and_overlaps_the_training_of_the_step_before(
    world, one_ahead, tmp_path
):
    ahead, moved = one_ahead
    on_policy, events = run(world, tmp_path)
    assert [line["rollout/age"] for line in ahead] == [0, 1, 1, 1]
    assert "rollout/age" not in on_policy[0]
    apart = [line["sampling/sampling_logp_difference/mean"] for line in ahead]
    assert apart[0] < 1e-5 and min(apart[1:]) > 1e-4
    assert max(line["sampling/sampling_logp_difference/mean"] for line in on_policy) < 1e-5
    assert answered(events) == answered(moved), "the same questions in the same order"
    order = [event[0] for event in events]
    assert order == ["sync", *["answered", "sync"] * 4]
    # the first two steps are sampled with the same weights; then a step's answers come before the weights of the next
    order = [event[0] for event in moved]
    assert order == ["sync", "answered", "answered", "sync", "answered", "sync", "answered", "sync", "sync"]
    assert all("sync_time" in line for line in ahead)


def test_a_run_stopped_with_answers_ahead_asks_for_them_again(world, one_ahead, tmp_path):
    whole, events = one_ahead
    with pytest.raises(SystemExit) as stopped:
        run(world, tmp_path / "cut", "rollout.ahead=1", judged=stops_in_the_second_step)
    assert stopped.value.code == 143 and latest(tmp_path / "cut").name == "step-000002"
    before = answered(happened)
    kept = config.load(str(tmp_path / "cut" / "recipe.yaml"))
    happened.clear()
    train.train(kept, resume=True)
    after = answered(happened)
    asked = answered(events)
    assert before == asked[:3] and after == asked[2:], "the third step's questions were asked ahead, and again"
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [line["rollout/age"] for line in lines] == [0, 1, 0, 1]
    assert len(whole) == 4


def test_what_fails_ahead_reaches_the_loop_and_the_checkpoint_is_good(world, tmp_path, monkeypatch):
    generate = Elsewhere.generate

    def dies(self, pairs, samplings, seed):
        if seed // 4099 == 2:
            raise ConnectionError("the servers are gone")
        return generate(self, pairs, samplings, seed)

    monkeypatch.setattr(Elsewhere, "generate", dies)
    with pytest.raises(ConnectionError, match="the servers are gone"):
        run(world, tmp_path / "run", "rollout.ahead=1")
    assert latest(tmp_path / "run").name == "step-000002"


def test_the_training_model_cannot_sample_ahead(world):
    with pytest.raises(ValueError, match=r"rollout.ahead is 1 and rollout.name is 'hf'.* nothing to overlap"):
        config.load(world["recipe"], ["rollout.ahead=1"])
    with pytest.raises(ValueError, match=r"rollout.ahead"):
        config.load(world["recipe"], ["rollout.ahead=2"])


def test_weights_wait_for_answers():
    told, release = [], threading.Event()

    class Slow:
        exact = False

        def generate(self, pairs, samplings, seed):
            release.wait(30)
            told.append("answered")
            return {}

        def sync(self):
            told.append("synced")

    ahead = Ahead(Slow())
    ahead.begin([], {}, 7)
    threading.Timer(0.2, release.set).start()
    ahead.sync()
    assert told == ["answered", "synced"] and ahead.generate([], {}, 7) == {} and ahead.age == 1
    assert ahead.generate([], {}, 8) == {} and ahead.age == 0, "not what was asked in advance"
