"""Robots: real worker processes with the toy table, and the real small model that decides what they do."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from families import omni

from modalities.action.adapter import ActionAdapter
from modalities.action.tokens import ActionTokens
from modalities.action.toy import Toy
from modalities.vision import video
from xmodal_opd.hidden import head, hidden_repeated
from xmodal_opd.models import load_model, load_processor
from xmodal_opd.rollout.decode import decode, sample
from xmodal_opd.rollout.depth import DEPTHS, Depth, expert_actions
from xmodal_opd.rollout.env import EnvSampler, drawn
from xmodal_opd.rollout.episode import Film
from xmodal_opd.rollout.workers import Failed, Lost, Workers, surroundings
from xmodal_opd.scoring.forward import Responses, statistics
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Pair, SampleError, Sampling

PAIRS = [Pair(f"{task}/{n}", {}, None, {"task": task, "start": n}) for task in ("reach", "push") for n in (0, 1)]
GREEDY, WARM = Sampling(1, 0.0), Sampling(2, 1.0)


def workers(count=2, name="toy", timeout=60.0, env=None, **options):
    command = [sys.executable, "-m", "modalities.action.worker", name, json.dumps(options)]
    path = os.pathsep.join(["tests", os.getcwd()])
    return Workers(command, count, timeout, {"PYTHONPATH": path, **(env or {})}, name)


def troubled(fault, count=2, timeout=60.0, once=""):
    return workers(count, "trouble:Trouble", timeout, fault=fault, once=str(once))


@pytest.fixture(scope="module")
def pool():
    """Workers with the toy, and no process of theirs left behind."""
    with_toy = workers(horizon=8)
    yield with_toy
    with_toy.close()


@pytest.fixture(scope="module")
def brain():
    """The model in the package, and an adapter whose actions are the last 256 ids of its vocabulary: chunks of 3."""
    processor = load_processor("default")
    tokens = ActionTokens(end=len(processor.tokenizer), chunk=3, size=3)
    return load_model("default"), ActionAdapter(processor, 512, tokens=tokens, cameras=["top"], image_size=56)


def sampler(brain, workers, placeholder=5, **more):
    model, adapter = brain
    tokens = adapter.tokens
    return EnvSampler(model, adapter, workers, tokens.width, tokens.among, placeholder, **{"temperature": 1.6} | more)


def told(rollouts):
    return [(r.pair.key, r.tokens, r.group, r.episode, r.turn, r.pair.meta) for r in rollouts]


# ---- the table


@pytest.mark.parametrize("task", Toy.tasks)
def test_the_expert_succeeds_from_every_start_and_a_hand_that_rests_from_none(task):
    toy = Toy()
    for start in range(40):
        seen = toy.reset(task, start)
        while not seen["done"]:
            seen = toy.act(toy.expert()[None])
        assert seen["success"] and seen["steps"] < toy.horizon
        toy.reset(task, start)
        seen = toy.act(np.zeros((100, 3)))
        assert seen["done"] and not seen["success"] and seen["steps"] == toy.horizon


def test_a_start_state_is_the_same_each_time_and_like_no_other():
    texts = [Toy().reset(task, start)["text"] for task in Toy.tasks for start in range(100)]
    assert texts == [Toy().reset(task, start)["text"] for task in Toy.tasks for start in range(100)]
    assert len(set(texts)) == len(texts)


def test_the_text_says_where_the_picture_has_things():
    toy = Toy()
    seen = toy.reset("carry", 3)
    image = seen["images"]["top"]
    assert image.shape == (56, 56, 3) and image.dtype == np.uint8
    colour = seen["instruction"].split()[2]
    x, y = (int(word) for word in seen["text"].split(f"{colour} block ")[1].split(",")[0].split())
    red, green, blue = image[y * 56 // 256, x * 56 // 256]
    assert {"red": red > 200 > green, "green": green > 150 > red, "blue": blue > 200, "yellow": green > 180}[colour]


def test_a_task_and_a_start_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="no task 'fly'; there are: reach, push, carry"):
        Toy().reset("fly", 0)
    with pytest.raises(ValueError, match="from 0 on, not -1"):
        Toy().reset("push", -1)


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (np.full((1, 3), np.nan), "with NaN or infinity in it"),
        (np.zeros((1, 5)), r"of shape \(1, 5\)"),
        (np.zeros(3), r"of shape \(3,\)"),
        (np.zeros((0, 3)), r"of shape \(0, 3\)"),
    ],
)
def test_what_is_no_chunk_of_actions_moves_nothing(actions, words):
    toy = Toy()
    before = toy.reset("push", 0)
    with pytest.raises(ValueError, match=rf"a chunk of actions is \[C, 3\] finite numbers, not one {words}"):
        toy.act(actions)
    assert toy.observed()["text"] == before["text"] and toy.steps == 0


# ---- workers


def test_workers_answer_as_the_environment_would_here(pool):
    here, there = Toy(horizon=8), pool.ask({0: ["reset", "push", 7], 1: ["reset", "reach", 2]})
    assert there[0]["text"] == here.reset("push", 7)["text"] and there[1]["instruction"].startswith("touch")
    action = pool.ask({0: ["expert"]})[0]
    assert (action == here.expert()).all()
    seen, same = pool.ask({0: ["act", action[None]]})[0], here.act(here.expert()[None])
    assert seen["text"] == same["text"] and (seen["images"]["top"] == same["images"]["top"]).all()
    assert pool.about() == {"size": 3, "tasks": ["reach", "push", "carry"], "facts": {}}


def test_requests_to_several_workers_run_at_the_same_time():
    pool = troubled("sleep", count=3)
    pool.ask({n: ["reset", "push", n] for n in range(3)})
    pool.ask({n: ["act", np.zeros((1, 3))] for n in range(3)})
    began = time.monotonic()
    for worker in pool.all:
        worker.timeout = 2.0
    answers = pool.ask({n: ["act", np.zeros((1, 3))] for n in range(3)})
    assert time.monotonic() - began < 5.9 and all("no answer within 2 s" in str(a) for a in answers.values())
    assert pool.lost == 3
    pool.close()


def test_a_worker_that_is_killed_is_started_anew(pool):
    pool.ask({0: ["reset", "push", 0]})
    before = pool.lost
    os.kill(pool.all[0].link.process.pid, signal.SIGKILL)
    (lost,) = pool.ask({0: ["frame"]}).values()
    assert isinstance(lost, Lost) and "killed by signal 9" in str(lost) and pool.lost == before + 1
    assert pool.ask({0: ["reset", "push", 0]})[0]["steps"] == 0


def test_what_a_worker_last_printed_is_in_the_reason():
    pool = troubled("die", count=1)
    pool.ask({0: ["reset", "push", 0]})
    pool.ask({0: ["act", np.zeros((1, 3))]})
    assert "status 3; it last printed: the renderer fell over" in str(pool.ask({0: ["act", np.zeros((1, 3))]})[0])


def test_noise_between_the_messages_is_a_lost_worker_and_much_printing_is_none():
    pool = troubled("noise", count=1)
    pool.ask({0: ["reset", "push", 0]})
    pool.ask({0: ["act", np.zeros((1, 3))]})
    assert "noise" in str(pool.ask({0: ["act", np.zeros((1, 3))]})[0])
    pool = troubled("chatter", count=1)
    pool.ask({0: ["reset", "push", 0]})
    pool.ask({0: ["act", np.zeros((1, 3))]})
    assert pool.ask({0: ["act", np.zeros((1, 3))]})[0]["steps"] == 2
    assert len(pool.all[0].link.printed) <= 4000
    pool.close()


def test_an_environment_that_refuses_is_named_with_its_reason(pool):
    with pytest.raises(
        Failed, match="environment 'toy' cannot reset: there is no task 'fly'; there are: reach"
    ) as error:
        pool.ask({0: ["reset", "fly", 0]})
    assert error.value.kind == "ValueError" and "Traceback" in error.value.__notes__[0]
    assert pool.ask({0: ["reset", "push", 0]})[0]["steps"] == 0


def test_what_is_missing_on_the_machine_is_one_sentence():
    with pytest.raises(Failed, match="cannot start: the meshes are not here; pip install meshes") as error:
        workers(1, "trouble:Missing").about()
    assert error.value.kind == "AssetError"
    with pytest.raises(Failed, match="cannot start: there is no environment 'robo'; there are: toy"):
        workers(1, "robo").about()
    with pytest.raises(RuntimeError, match=r"'broken' does not start: it ended with status 1; .*SyntaxError"):
        Workers([sys.executable, "-c", "import no module"], 1, 60.0, name="broken").about()
    with pytest.raises(Failed, match="No such file or directory: '/no/python'"):
        Workers(["/no/python"], 1, 9.0).about()


def test_closing_leaves_no_process(pool):
    pool.ask({n: ["reset", "push", n] for n in range(2)})
    processes = [worker.link.process for worker in pool.all]
    pool.close()
    assert all(process.poll() is not None for process in processes)


RUN = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has jobs in the background ignore it
from xmodal_opd.rollout.workers import Workers
command = [sys.executable, "-m", "modalities.action.worker", "trouble:Trouble", '{"fault": "sleep"}']
pool = Workers(command, 2, 600)
pool.ask({n: ["reset", "push", n] for n in range(2)})
pool.ask({n: ["act", [[0, 0, 0]]] for n in range(2)})
print(*[worker.link.process.pid for worker in pool.all], flush=True)
threading.Timer(0.5, os.kill, (os.getpid(), int(sys.argv[1]))).start()
pool.ask({n: ["act", [[0, 0, 0]]] for n in range(2)})
"""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_no_process_outlives_a_run_that_is_ended_while_its_workers_hang(number):
    run, around = [sys.executable, "-c", RUN, str(int(number))], surroundings({"PYTHONPATH": f"tests{os.pathsep}."})
    found = subprocess.run(run, capture_output=True, text=True, env=around, timeout=120)
    assert found.returncode == -number and len(found.stdout.split()) == 2
    for pid in map(int, found.stdout.split()):
        wait_for_end(pid)


def wait_for_end(pid):
    """A process whose parent is gone stays a zombie where nobody reaps it."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(200):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} outlives the run")


def test_a_worker_renders_without_a_display_unless_told_otherwise(monkeypatch):
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    assert [surroundings({})[k] for k in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "OMP_NUM_THREADS")] == ["egl", "egl", "1"]
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert surroundings({})["PYOPENGL_PLATFORM"] == "osmesa"
    assert "PYOPENGL_PLATFORM" not in surroundings({"MUJOCO_GL": "glfw"})


# ---- decoding


@pytest.mark.parametrize("placeholder", [5, None])
def test_log_probs_of_decoding_are_those_of_scoring(brain, pool, placeholder):
    model, adapter = brain
    made = sampler(brain, pool, placeholder).generate(PAIRS[1:3], {"hot": Sampling(1, 1.5), "cold": GREEDY}, seed=2)
    rollouts = [rollout for some in made.values() for rollout in some]
    among, batch = adapter.tokens.among, token_batch(rollouts)
    responses = Responses(adapter, among=among, placeholder=placeholder, temperature=1.6)
    logp, _ = statistics(model, responses.hidden(model, rollouts, "student"), rollouts, batch.mask, among)
    torch.testing.assert_close(batch.student_logp, logp, atol=2e-4, rtol=1e-4)
    lengths = adapter.batch([r.pair.views["student"] for r in rollouts])["attention_mask"].sum(1)
    assert [r.prompt_tokens for r in rollouts] == lengths.tolist()


@pytest.mark.parametrize("placeholder", [5, None])
def test_a_greedy_decision_is_the_likeliest_and_shifts_no_other(brain, placeholder):
    model, adapter = brain
    seen = [Toy().reset("push", n) for n in range(3)]
    prompts = adapter.batch([adapter.observed(str(n), o, {}).views["student"] for n, o in enumerate(seen)])
    draws = torch.from_numpy(np.stack([drawn(0, n, 0, 4) for n in range(3)]))
    call = partial(decode, model, prompts, width=4, among=adapter.tokens.among, placeholder=placeholder, policy=1.0)
    warm, _ = call(temperature=torch.tensor([1.0, 1.0, 1.0]), draws=draws)
    mixed, logps = call(temperature=torch.tensor([1.0, 0.0, 1.0]), draws=draws)
    assert warm[[0, 2]].tolist() == mixed[[0, 2]].tolist() and warm[1].tolist() != mixed[1].tolist()
    tokens = mixed[1:2] if placeholder is None else torch.full((1, 4), placeholder)
    one = adapter.batch([adapter.observed("1", seen[1], {}).views["student"]])
    logits = hidden_repeated(model, one, tokens, grad=False)[0] @ head(model)[adapter.tokens.among].T
    assert (logits.argmax(-1) + adapter.tokens.among.start).tolist() == mixed[1].tolist()
    torch.testing.assert_close(logits.log_softmax(-1).max(-1).values, logps[1], atol=1e-4, rtol=1e-4)


def test_draws_follow_the_probabilities_at_the_rows_temperature():
    logits = torch.tensor([[0.0, 1.0, -1e9, 2.0]]).expand(20000, 4)
    draws = torch.from_numpy(drawn(0, 0, 0, 20000))
    for heat in (0.5, 2.0):
        tokens, logp = sample(logits, torch.full((20000,), heat), draws)
        share = torch.bincount(tokens, minlength=4) / 20000
        torch.testing.assert_close(share, (logits[0] / heat).softmax(-1), atol=0.015, rtol=0)
        torch.testing.assert_close(logp, logits[0].log_softmax(-1)[tokens])


def test_a_model_that_caps_its_logits_has_no_temperature_and_a_window_no_media(brain, monkeypatch):
    model, adapter = brain
    prompts = adapter.batch([adapter.observed("a", Toy().reset("push", 0), {}).views["student"]])
    call = partial(decode, model, prompts, width=2, placeholder=5, temperature=torch.zeros(1))
    call = partial(call, draws=torch.zeros(1, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="ids 400 to 599 hold tokens that stand for media"):
        call(among=slice(400, 600), policy=1.0)
    _, plain = call(among=adapter.tokens.among, policy=1.0)
    monkeypatch.setattr(model.config.get_text_config(), "final_logit_softcapping", 0.5, raising=False)
    _, capped = call(among=adapter.tokens.among, policy=1.0)
    assert plain.tolist() != capped.tolist() and capped.max() < -np.log(256) + 1
    with pytest.raises(ValueError, match="caps its logits, so no temperature can divide them"):
        call(among=adapter.tokens.among, policy=1.6)


# ---- episodes


def test_episodes_do_not_depend_on_the_number_of_workers(brain):
    with_one, with_three = workers(1, horizon=8), workers(3, horizon=8)
    few, many, other = (
        sampler(brain, some).generate(PAIRS[1:3], {"two": WARM, "best": GREEDY}, seed=seed)
        for some, seed in ((with_one, 1), (with_three, 1), (with_three, 2))
    )
    assert {name: told(some) for name, some in few.items()} == {name: told(some) for name, some in many.items()}
    assert told(other["two"]) != told(many["two"])
    assert [r.tokens for r in other["best"]] == [r.tokens for r in many["best"]]
    with_one.close()
    with_three.close()


def test_rollouts_are_the_decisions_of_episodes_in_order(brain, pool):
    made = sampler(brain, pool).generate(PAIRS, {"two": WARM}, seed=1)["two"]
    order = [(r.group, r.episode, r.turn) for r in made]
    assert (
        order == sorted(order)
        and {r.group for r in made} == {0, 1, 2, 3}
        and {r.episode for r in made} == set(range(8))
    )
    for episode in range(8):
        turns = [r for r in made if r.episode == episode]
        assert [r.turn for r in turns] == list(range(len(turns))) and all(r.finished for r in turns)
        (meta,) = {json.dumps(r.pair.meta, sort_keys=True): r.pair.meta for r in turns}.values()
        assert sum(len(r.tokens) for r in turns) == 3 * meta["steps"]
        assert meta["steps"] == 8 or meta["success"]
        assert all(len(r.tokens) == len(r.logps) == 9 for r in turns[:-1])
        assert [r.pair.key for r in turns] == [
            f"{meta['task']}/{meta['start']}/{episode}/{t}" for t in range(len(turns))
        ]
        assert meta["modality"] == "action" and turns[0].pair.meta["task"] == PAIRS[turns[0].group].meta["task"]


def test_what_was_done_is_what_the_tokens_say(brain, pool):
    adapter = brain[1]
    made = sampler(brain, pool).generate(PAIRS, {"two": WARM}, seed=4)["two"]
    for episode in range(8):
        turns = [r for r in made if r.episode == episode]
        toy = Toy(horizon=8)
        seen = toy.reset(turns[0].pair.meta["task"], turns[0].pair.meta["start"])
        for rollout in turns:
            view = adapter.observed("again", seen, {}).views["teacher"]["prompt"]
            assert view == rollout.pair.views["teacher"]["prompt"]
            seen = toy.act(adapter.actions(rollout.tokens))
        assert seen["done"] and seen["success"] == turns[-1].pair.meta["success"]


def test_an_episode_can_be_cut_and_be_seen_under_another_view(brain, pool):
    cut = sampler(brain, pool, depth=Depth(longest=2))
    made = cut.generate(PAIRS, {"a": Sampling(1, 1.0, "teacher"), "b": Sampling(1, 1.0)}, seed=1)
    assert [r.turn for r in made["a"]] == [r.turn for r in made["b"]] == [0, 1] * 4
    assert all(r.pair.meta["steps"] == 6 for r in made["a"])
    lengths = [[r.prompt_tokens for r in made[name]] for name in "ab"]
    assert not set(lengths[0]) & set(lengths[1])


@pytest.mark.parametrize(
    "fault, timeout", [("die", 60.0), ("stumble", 60.0), pytest.param("sleep", 30.0, marks=pytest.mark.slow)]
)
def test_a_lost_worker_costs_an_episode_that_is_run_again_to_the_same_end(brain, pool, tmp_path, fault, timeout):
    expected = sampler(brain, pool).generate(PAIRS[1:3], {"two": WARM}, seed=1)["two"]
    bad = troubled(fault, timeout=timeout, once=tmp_path / "once")
    again = sampler(brain, bad)
    assert told(again.generate(PAIRS[1:3], {"two": WARM}, seed=1)["two"]) == told(expected)
    assert again.lost == 1
    bad.close()


def test_an_episode_that_always_loses_its_worker_ends_the_run_with_its_name(brain):
    bad = troubled("die", count=1)
    reason = r"task 'reach', start 0: its worker was lost 3 times, .*status 3; it last printed: the renderer fell over"
    with pytest.raises(RuntimeError, match=reason):
        sampler(brain, bad).generate(PAIRS, {"a": GREEDY}, seed=0)
    assert bad.lost == 3
    bad.close()
    with pytest.raises(Failed, match="environment 'trouble:Trouble' cannot act: there is no such action"):
        sampler(brain, troubled("refuse")).generate(PAIRS, {"a": GREEDY}, seed=0)


def test_a_simulator_that_stands_still_does_not_hold_the_run(brain):
    bad = troubled("stand", count=1)
    with pytest.raises(RuntimeError, match="task 'reach', start 0: 0 of 3 actions were taken, and it is not over"):
        sampler(brain, bad).generate(PAIRS[:1], {"a": GREEDY}, seed=0)
    bad.close()


def test_a_decision_that_is_no_action_is_named(brain, pool, tokenizer):
    wrong = replace(sampler(brain, pool), among=slice(0, 256))
    with pytest.raises(SampleError, match=r"task 'reach', start 0, turn 0: token [0-9]+ is no action"):
        wrong.generate(PAIRS[:1], {"a": GREEDY}, seed=0)
    broken, _ = omni(tokenizer)
    head(broken).data.fill_(float("nan"))
    nan = replace(sampler(brain, pool), model=broken, among=slice(0, 256))
    with pytest.raises(SampleError, match="task 'reach', start 0, turn 0: the model's log-probs are not finite"):
        nan.generate(PAIRS[:1], {"a": Sampling(1, 1.0, "teacher")}, seed=0)


def test_the_first_episodes_are_filmed_one_frame_for_each_decision(brain, pool, tmp_path):
    filming = sampler(brain, pool, film=Film(tmp_path / "films", video.encode, starts=1, fps=4.0))
    made = filming.generate(PAIRS[:2], {"two": WARM}, seed=1)["two"]
    plain = sampler(brain, pool).generate(PAIRS[:2], {"two": WARM}, seed=1)["two"]
    assert told(made) == told(plain)
    assert sorted(p.name for p in (tmp_path / "films").iterdir()) == ["two-reach-0.mp4"]
    frames = video.decode((tmp_path / "films" / "two-reach-0.mp4").read_bytes(), fps=4.0, most=20)
    assert len(frames) == 1 + sum(r.episode == 0 for r in made) and frames[0][1].size == (224, 224)
    toy = Toy()
    toy.reset("reach", 0)
    assert np.abs(np.asarray(frames[0][1], float) - toy.frame()).mean() < 4


# ---- depth

LONG = [Pair(f"push/{n}", {}, None, {"task": "push", "start": n}) for n in (1, 3)]  # the expert needs 14 and 13 steps


def expert_path(start):
    """What is seen before each step of the expert, and its actions."""
    toy, seen, actions = Toy(), [], []
    seen.append(toy.reset("push", start))
    while not seen[-1]["done"]:
        actions.append(toy.expert())
        seen.append(toy.act(actions[-1][None]))
    return seen, np.stack(actions)


@pytest.fixture(scope="module")
def long_pool():
    pool = workers()
    yield pool
    pool.close()


def test_an_expert_is_followed_in_workers_as_here(long_pool):
    found = expert_actions(long_pool, [("push", 1), ("push", 3), ("reach", 2)])
    assert [len(actions) for actions in found.values()] == [14, 13, 5]
    assert np.array_equal(found["push", 3], expert_path(3)[1])


def test_the_expert_takes_the_first_decisions_and_the_student_goes_on(brain, long_pool):
    plain = sampler(brain, long_pool)
    back = replace(plain, depth=DEPTHS["b2f"](5, every=5))  # 5 decisions of the expert: it takes 3 of them
    made = back.generate(LONG, {"two": WARM}, seed=2)["two"]
    for episode in range(4):
        turns = [r for r in made if r.episode == episode]
        assert [r.turn for r in turns] == list(range(3, 3 + len(turns)))
        start = turns[0].pair.meta["start"]
        toy, (seen, actions) = Toy(), expert_path(start)
        view = brain[1].observed("again", seen[9], {}).views["teacher"]["prompt"]
        assert view == turns[0].pair.views["teacher"]["prompt"] and turns[0].pair.key == f"push/{start}/{episode}/3"
        toy.reset("push", start)
        now = toy.act(actions[:9])
        for rollout in turns:
            now = toy.act(brain[1].actions(rollout.tokens))
        assert now["done"] and {k: now[k] for k in ("success", "steps")}.items() <= turns[0].pair.meta.items()
    late = replace(back, depth=DEPTHS["b2f"](20, every=5))  # it takes none
    one = {"one": Sampling(1, 1.0)}
    assert told(late.generate(LONG, one, seed=2)["one"]) == told(plain.generate(LONG, one, seed=2)["one"])


def test_every_decision_of_an_experts_episode_is_a_sample(brain, long_pool):
    """OPAD: the student sees what the expert made of the start, and what it decides is not done."""
    made = replace(sampler(brain, long_pool), depth=DEPTHS["opad"](0)).generate(LONG, {"two": WARM}, seed=2)["two"]
    assert [r.turn for r in made] == list(range(5)) * 4
    for rollout in made:
        meta, turn = rollout.pair.meta, rollout.turn
        seen, actions = expert_path(meta["start"])
        view = brain[1].observed("again", seen[3 * turn], {}).views["teacher"]["prompt"]
        assert view == rollout.pair.views["teacher"]["prompt"]
        assert len(rollout.tokens) == 3 * len(actions[3 * turn :][:3])
        assert meta["success"] and meta["steps"] == len(actions)
    assert len({tuple(r.tokens) for r in made}) > 15


def test_an_episode_that_the_expert_ends_is_dropped(brain, long_pool):
    pairs = [Pair("reach/0", {}, None, {"task": "reach", "start": 0}), *LONG]  # one decision, and five
    quick = replace(sampler(brain, long_pool), depth=Depth(lead=lambda expert: 1, longest=1))
    made = quick.generate(pairs, {"two": WARM}, seed=2)["two"]
    assert [(r.group, r.turn) for r in made] == [(1, 1)] * 2 + [(2, 1)] * 2
    with pytest.raises(RuntimeError, match="no decision was left to the student"):
        quick.generate(pairs[:1], {"two": WARM}, seed=2)


@pytest.mark.parametrize("lost_while", ["asking", "leading"])
def test_a_worker_lost_beside_an_expert_costs_nothing_else(brain, pool, tmp_path, lost_while):
    depth = DEPTHS["b2f"](0)
    good = replace(sampler(brain, pool), depth=depth)
    expected = good.generate(PAIRS[2:], {"two": WARM}, seed=1)["two"]
    bad = troubled("die", once=tmp_path / "once")
    again = replace(good, workers=bad, known=dict(good.known) if lost_while == "leading" else {})
    assert told(again.generate(PAIRS[2:], {"two": WARM}, seed=1)["two"]) == told(expected) and bad.lost == 1
    bad.close()
