"""What runs beside the loop: the same results, errors that surface, and an overlap proven by the order of events."""

import threading
from itertools import islice

import pytest
import torch

from xmodal_opd import collect, config, step
from xmodal_opd.background import later, now, read_ahead
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards

SCORED = "scoring.teacher={view: teacher}"


def prepared(world, *overrides):
    parts = build(config.load(world["recipe"], [SCORED, *overrides]))
    return parts, [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 2)]


def judged_by(function):
    return f"judge={{name: '{__name__}:{function}'}}"


scoring_began = threading.Event()


def waits_for_the_teacher(prompts, completions, **_):
    assert scoring_began.wait(30), "the teacher's forward did not begin while the judge was at work"
    return [float(len(c) % 2) for c in completions]


def by_length(prompts, completions, **_):
    return [float(len(c) % 2) for c in completions]


async def breaks(prompts, completions, **_):
    raise RuntimeError("the judge lost its mind")


def test_the_judge_works_while_the_teacher_reads(world, monkeypatch):
    scores = collect.local_scores

    def noted(*args):
        scoring_began.set()
        return scores(*args)

    scoring_began.clear()
    monkeypatch.setattr(collect, "local_scores", noted)
    parts, pairs = prepared(world, judged_by("waits_for_the_teacher"))
    sampled, metrics = collect.sample(parts, pairs, 0)
    assert 0 < metrics["reward"] < 1 and "teacher_logp" in sampled.batch.scores


def test_a_judge_beside_the_teacher_gives_the_same_step(world, monkeypatch):
    taken = {}
    for how in (later, now):
        monkeypatch.setattr(collect, "later", how)
        parts, pairs = prepared(world, judged_by("by_length"))
        taken[how] = step.train_step(parts, pairs, 0), {n: p.clone() for n, p in parts.student.named_parameters()}
    (values, weights), (expected, wanted) = taken.values()
    assert values == expected and all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_what_the_judge_raises_reaches_the_loop(world):
    parts, pairs = prepared(world, judged_by("breaks"))
    with pytest.raises(RuntimeError, match="lost its mind"):
        step.train_step(parts, pairs, 0)


def test_a_judge_that_asks_the_student_does_not_run_beside_it(world, monkeypatch):
    asked_in = []
    parts, pairs = prepared(world, "judge={name: self}")
    rewards = collect.rewards_of

    def noted(*args):
        asked_in.append(threading.current_thread())
        return rewards(*args)

    monkeypatch.setattr(collect, "rewards_of", noted)
    collect.sample(parts, pairs, 0)
    assert asked_in == [threading.main_thread()]


def test_the_next_items_are_read_while_the_last_are_used():
    second = threading.Event()

    def items():
        for number in range(7):
            if number == 3:
                second.set()
            yield number

    ahead = read_ahead(items(), 2)
    assert next(ahead) == 0
    assert second.wait(30), "the second two were not read while the first were in use"
    assert list(ahead) == [1, 2, 3, 4, 5, 6]


def test_what_reading_raises_is_raised_where_its_items_are_due():
    def items():
        yield from range(3)
        raise RuntimeError("more than 1 % of the samples are broken")

    ahead = read_ahead(items(), 2)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(RuntimeError, match="are broken"):
        next(ahead)


def test_a_loop_that_ends_early_leaves_no_reader_behind():
    began, go = threading.Event(), threading.Event()

    def items():
        yield from range(2)
        began.set()
        go.wait(5)
        yield from range(2)

    ahead = read_ahead(items(), 2)
    next(ahead)
    assert began.wait(5)
    threading.Timer(0.2, go.set).start()
    ahead.close()
    assert go.is_set()
