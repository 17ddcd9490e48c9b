"""Recipes of modality action: start states, what they may say, and a run of them from beginning to end."""

import json
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xmodal_opd import config, dist, dry, report, statistics
from xmodal_opd.build.robots import Starts, action_tokens, adapter, sampler, share, starts
from xmodal_opd.collect import once, question_rewards
from xmodal_opd.models import folder_of, load_model, load_processor
from xmodal_opd.train import train
from xmodal_opd.types import Pair, Rollout

ROBOT = "configs/vla_opd.yaml"
LARGE = ("configs/vla_opd_libero.yaml", "configs/vla_opd_robotwin.yaml")


def test_start_states_come_shuffled_and_go_on_from_any_position():
    some = Starts(("a", "b"), range(100, 103), seed=1, shuffle=True)
    first = list(islice(some.pairs(None), 15))
    assert first[7:] == list(islice(some.pairs(None, first[6][0]), 8))
    epoch = [pair.key for _, pair in first[:6]]
    assert sorted(epoch) == [f"{task}/{n}" for task in "ab" for n in (100, 101, 102)]
    assert epoch != [pair.key for _, pair in first[6:12]], "another epoch, another order"
    assert first[0][1].meta == {"task": epoch[0][0], "start": int(epoch[0][2:]), "modality": "action"}


def test_ranks_share_start_states_without_a_double():
    every = [list(Starts(("a", "b"), range(4), rank=r, world=2).pairs(None, epochs=1)) for r in (0, 1)]
    keys = [pair.key for some in every for _, pair in some]
    assert len(keys) == len(set(keys)) == 8
    assert [key for _, pair in every[0] for key in [pair.key]] == ["a/0", "a/1", "a/2", "a/3"]


def test_test_and_training_start_states_never_meet():
    recipe = config.load(ROBOT)
    learnt, measured = starts(recipe, 0, 0, 1)
    assert not set(learnt.numbers) & set(measured.numbers)
    with pytest.raises(ValueError, match=r"data.test is 20 start states .* begin at number 5: they would meet"):
        starts(config.load(ROBOT, ["data.first=5"]), 0, 0, 1)


@pytest.mark.parametrize("path", LARGE)
def test_recipes_of_the_papers_size_resolve(path):
    lines = "\n".join(dry.dry(config.load(path), devices=8))
    assert "8.29 B parameters" in lines and "64 start states" in lines and "512 episodes" in lines
    assert "8 at temperature 1.6" in lines
    assert {LARGE[0]: "64 workers in all, each with a simulator; 8 a process", LARGE[1]: "32 workers"}[path] in lines


def test_the_robotwin_recipe_sees_what_its_paper_does():
    robot = config.load(LARGE[1]).robot
    assert (robot.options["config"], robot.options["instruction"]) == ("demo_randomized", "seen")
    assert robot.crop and robot.proprio and robot.cameras == robot.options["cameras"] == ["head_camera"]


@pytest.mark.parametrize(
    ("workers", "world", "expected"), [(64, 8, [8] * 8), (10, 4, [3, 3, 2, 2]), (2, 3, [1, 1, 1]), (6, 1, [6])]
)
def test_ranks_share_the_workers_of_a_recipe(workers, world, expected):
    assert [share(workers, rank, world) for rank in range(world)] == expected


def test_a_sampler_has_its_ranks_workers_and_an_adapter_the_state(tmp_path, monkeypatch):
    recipe = toy(tmp_path, "vla_opd_full", "robot.workers=5", "robot.proprio=true")
    acting = adapter(recipe, load_processor("default"), 512)
    monkeypatch.setattr(dist, "world", lambda: 3)
    monkeypatch.setattr(dist, "rank", lambda: 2)
    assert acting.proprio
    assert sampler(recipe, load_model("default"), acting, nullcontext).workers.count == 1


def test_one_dataset_needs_no_key(tmp_path):
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"mine": {"action": {"q01": [0.0] * 3, "q99": [1.0] * 3}}}))
    recipe = toy(tmp_path, "vla_opd_full", f"robot.statistics={path}")
    tokens = action_tokens(recipe.robot, 1000)
    assert tokens.normalizer and tokens.normalizer.high == (1.0, 1.0, 1.0)


def test_a_decision_longer_than_an_answer_may_be_is_refused():
    with pytest.raises(
        ValueError, match=r"robot.chunk 16 x robot.size 4 = 64 tokens, and rollout.max_tokens is 32; set"
    ):
        config.load(ROBOT, ["robot.chunk=16"])
    assert config.load(ROBOT, ["robot.chunk=16", "rollout.max_tokens=64"]).rollout.max_tokens == 64


def test_what_a_robot_recipe_may_say_is_told():
    with pytest.raises(ValueError, match=r"unknown key 'robot.chunks' \(did you mean 'chunk'\?\)"):
        config.load(ROBOT, ["robot.chunks=4"])
    with pytest.raises(
        ValueError, match=r"unknown key 'data.prepare'; keys here: demonstrations, first, seed, tasks, test, train"
    ):
        config.load(ROBOT, ["data.prepare=null"])


def test_teachers_and_samplers_behind_servers_are_refused():
    with pytest.raises(ValueError, match=r"teachers\.far is behind servers, .* action tokens alone; name a folder"):
        config.load(ROBOT, ["teachers={far: {servers: ['http://127.0.0.1:1']}}"])
    with pytest.raises(ValueError, match=r"rollout\.name is 'vllm', but a robot's policy samples with hf only"):
        config.load(ROBOT, ["rollout.name=vllm", "rollout.servers=['http://127.0.0.1:1']"])


def test_a_long_episode_has_one_reward_as_a_short_one():
    pair = Pair("a", {})
    rollouts = [Rollout(pair, [1], [0.0], "", True, 0, episode=e, turn=t) for e, t in ((0, 0), (0, 1), (0, 2), (1, 0))]
    rows = once(rollouts, ["x"] * 4)
    assert rows == [0, 3]
    answers = [Rollout(pair, [1], [0.0], "", True, 0)] * 3
    assert once(answers, ["x"] * 3) == [0, 1, 2]
    means = question_rewards(rollouts, ["s"] * 4, torch.tensor([1.0, 1.0, 1.0, 0.0]), ["s"])
    assert means["s_reward"].tolist() == [0.5] * 4


def test_the_closing_table_speaks_of_a_teacher_and_episodes(capsys):
    record = {"key": "a/0", "task": "a", "text_correct": True, "student_correct": False}
    after = record | {"student_correct": True}
    summary = {"modality": "action", "episodes": 640} | statistics.summary([record] * 1, [after] * 1, 61.0)
    report.print_summary(summary)
    told = capsys.readouterr().out
    assert "teacher" in told and "text accuracy" not in told
    assert "The teacher's success after training" in told and "1 min 1 s, 640 episodes." in told
    assert json.dumps(summary)


# ---- whole runs, in the toy world, of a model that has never acted


TOY = """
include: [{root}/configs/methods/{method}.yaml]
name: toy
modality: action
model: {{name: default, train: [visual]}}
data: {{tasks: [reach, push], train: 6, test: 2}}
robot: {{name: toy, options: {{horizon: 8}}, cameras: [top], image_size: 56, size: 3, chunk: 4, workers: 2, videos: 1}}
rollout: {{max_tokens: 12, samplings: {{episodes: {{n: 2}}}}}}
engine: {{share_prefix: false, device: cpu}}
optim: {{lr: 1.0e-3}}
train: {{steps: 2, prompts: 2}}
checkpoint: {{every: 1, keep: 3}}
"""


ONE = ("data.test=1", "eval.kl=false")  # a run that is about something else than what it measures


def toy(tmp_path, method="vla_opd_full", *overrides):
    path = tmp_path / f"{method}.yaml"
    path.write_text(TOY.format(root=Path(__file__).parents[1], method=method))
    return config.load(str(path), [f"run_dir={tmp_path / 'run'}", *overrides])


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    "method", [pytest.param("vla_opd", **SLOW), "vla_opd_full", pytest.param("grpo_success", **SLOW)]
)
def test_each_estimator_trains_the_eyes_in_episodes(tmp_path, method):
    summary = train(toy(tmp_path, method, *ONE))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["episodes"] == 8 and [line["episodes"] for line in lines] == [4, 4]
    assert all(line["environment_steps"] <= 4 * 8 for line in lines)
    moved = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors")
    rest = load_file(Path(folder_of("default")) / "model.safetensors")
    same = {name for name in rest if name in moved and torch.equal(rest[name].float(), moved[name].float())}
    eyes = {name for name in rest if name.startswith("visual.")}
    assert rest.keys() - eyes <= same, "the language model stays"
    assert method == "grpo_success" or not eyes <= same  # nothing succeeds, and equal rewards teach nothing


def test_the_records_are_of_episodes_and_some_are_filmed(tmp_path):
    train(toy(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "run" / "eval" / "after.jsonl").read_text().splitlines()]
    assert [r["key"] for r in records] == ["reach/0", "push/0", "reach/1", "push/1"]
    assert all(0 < r["student_steps"] <= 8 and r["token_kl"] > 0 for r in records)
    films = sorted(path.name for path in (tmp_path / "run" / "eval").glob("*/*.mp4"))
    assert films == ["student-reach-0.mp4"] * 2 + ["text-reach-0.mp4"] * 2


@pytest.mark.slow
def test_a_stopped_run_of_episodes_goes_on_to_the_same_bits(tmp_path):
    whole = train(toy(tmp_path, "vla_opd_full", f"run_dir={tmp_path / 'whole'}"))
    train(toy(tmp_path, "vla_opd_full", "train.steps=1"))
    again = train(toy(tmp_path), resume=True)
    weights = [
        load_file(tmp_path / run / "checkpoints" / "step-000002" / "model.safetensors") for run in ("whole", "run")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert again["episodes"] == whole["episodes"] == 8


def test_a_simulator_of_other_actions_or_tasks_is_told_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"robot.size is 2, but an action in toy has 3 numbers"):
        train(toy(tmp_path, "vla_opd_full", "robot.size=2"))
    with pytest.raises(ValueError, match=r"names 'reech' \(did you mean 'reach'\?\), which toy has not; it has: "):
        train(toy(tmp_path, "vla_opd_full", "data.tasks=[reech]", f"run_dir={tmp_path / 'other'}"))


def test_a_camera_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no camera 'left'; there are: top"):
        train(toy(tmp_path, "vla_opd_full", "robot.cameras=[left]"))


def test_another_policy_at_the_same_camera_teaches(tmp_path):
    teacher = f"{{model: {folder_of('default')}, view: student}}"
    summary = train(toy(tmp_path, "vla_opd_full", f"objective.episodes.teacher={teacher}", "train.steps=1", *ONE))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0]["distill/episodes"]) < 1e-6 and summary["episodes"] == 4, "the student is its own teacher yet"


@pytest.mark.parametrize(
    "depth, steps, led",
    [
        ("{f2b: {limit: 3, every: 1}}", [4, 8], 0),
        pytest.param("opad", [13, 13], 0, **SLOW),
        pytest.param("b2f", None, 12, **SLOW),
    ],
)
def test_a_recipe_may_say_which_decisions_are_the_students(tmp_path, depth, steps, led):
    """The expert pushes the block from start state 3 in 13 steps, which are four decisions; of two episodes a step."""
    starts = ["data.tasks=[push]", "data.train=1", "data.first=3", "data.test=1", "train.prompts=1", "eval.kl=false"]
    train(toy(tmp_path, "vla_opd_full", f"robot.depth={depth}", "robot.options={horizon: 40}", *starts))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    taken = [line["environment_steps"] for line in lines]
    assert steps is None or taken == [2 * some for some in steps]
    assert [line["num_tokens"] for line in lines] == [3 * (some - 2 * led) for some in taken]
    records = [json.loads(line) for line in (tmp_path / "run" / "eval" / "after.jsonl").read_text().splitlines()]
    assert [record["student_steps"] for record in records] == [40], "evaluations are of whole episodes"


def test_a_depth_that_is_none_and_a_judge_of_the_experts_success_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown depth 'f3b'"):
        train(toy(tmp_path, "vla_opd_full", "robot.depth=f3b"))
    with pytest.raises(ValueError, match=r"the outcome the judge would see is the expert's"):
        train(toy(tmp_path, "grpo_success", "robot.depth=opad", f"run_dir={tmp_path / 'other'}"))
