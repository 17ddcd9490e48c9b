"""Episodes become a LeRobotDataset that lerobot's own reader reads, and a LeRobotDataset decisions in shards."""

import json
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="pip install 'xmodal-opd[lerobot]'")

from lerobot.datasets.lerobot_dataset import LeRobotDataset

from modalities.action.lerobot import TEXT, played, replayed, write, write_decisions
from modalities.action.tokens import load_normalizer
from modalities.action.toy import Toy
from modalities.vision.media import decode
from xmodal_opd import config
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards, open_tests
from xmodal_opd.data import Shards
from xmodal_opd.hidden import head
from xmodal_opd.measure import measured
from xmodal_opd.scoring.forward import token_logp
from xmodal_opd.step import train_step
from xmodal_opd.tokens import token_batch
from xmodal_opd.train import train
from xmodal_opd.types import SampleError

STARTS = [("push", 3), ("reach", 2)]


def asking(environment):
    return lambda command, *arguments: getattr(environment, command)(*arguments)


def shown(task, start):
    """An episode of the expert."""
    toy = Toy()
    return played(asking(toy), task, start, toy.expert)


@pytest.fixture(scope="module")
def episodes():
    return [shown(*start) for start in STARTS]


@pytest.fixture(scope="module")
def folder(episodes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobot") / "toy"
    assert write(folder, episodes, fps=10, robot="toy") == (2, sum(map(len, episodes)))
    return folder


def test_what_lerobot_reads_is_what_was_done(episodes, folder):
    dataset = LeRobotDataset("toy", root=folder, video_backend="pyav")
    every = [step for steps in episodes for step in steps]
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (2, len(every), 10)
    for number in (0, 1, len(episodes[0]), len(every) - 1):
        item, step = dataset[number], every[number]
        image = item["observation.images.top"].permute(1, 2, 0) * 255
        assert np.array_equal(image.round().byte().numpy(), step.seen["images"]["top"])
        assert np.array_equal(item["action"], step.action) and item["task"] == step.seen["instruction"]
        assert np.array_equal(item["observation.state"], step.seen["state"]) and item[TEXT] == step.seen["text"]
    assert [step.success for step in every] == [bool(dataset[n]["next.success"]) for n in range(len(every))]
    assert episodes[0][-1].success and not episodes[0][0].success


def test_actions_replayed_one_by_one_show_the_same_steps(episodes):
    again = replayed(asking(Toy()), *STARTS[0], [step.action for step in episodes[0]])
    assert len(again) == len(episodes[0])
    for a, b in zip(again, episodes[0], strict=True):
        assert np.array_equal(a.seen["images"]["top"], b.seen["images"]["top"]) and a.success == b.success


def test_decisions_of_a_dataset_are_samples(episodes, folder, tmp_path):
    index = write_decisions(str(folder), tmp_path / "out", chunk=4, progress=False)
    samples = list(Shards(str(tmp_path / "out"), shuffle=False).samples(epochs=1))
    turns = [-(-len(steps) // 4) for steps in episodes]
    assert index["total"] == len(samples) == sum(turns)
    meta = samples[turns[0]]["meta"]  # the first decision of the second episode
    assert (meta["episode"], meta["turn"]) == (1, 0)
    sizes = [len(sample["meta"]["actions"]) for sample in samples[: turns[0]]]
    assert sizes == [4] * (turns[0] - 1) + [len(episodes[0]) - 4 * (turns[0] - 1)]
    third, step = samples[2], episodes[0][8]
    assert np.allclose(third["meta"]["actions"][0], step.action)
    assert np.array_equal(np.asarray(decode(third["media"]["top.png"])), step.seen["images"]["top"])
    image, words = third["views"]["student"][0]["content"]
    assert image == {"type": "image", "image": "top.png"} and step.seen["instruction"] in words["text"]
    (told,) = third["views"]["teacher"][0]["content"]
    assert told["text"] == f"{step.seen['text']}\n{words['text']}"


def test_statistics_beside_the_shards_normalize_its_actions(episodes, folder, tmp_path):
    write_decisions(str(folder), tmp_path / "out", chunk=4, text="observation.state", progress=False)
    normalizer = load_normalizer(tmp_path / "out" / "dataset_statistics.json", "toy", "bounds")
    every = np.array([step.action for steps in episodes for step in steps])
    assert np.allclose(normalizer.low, every.min(0)) and np.allclose(normalizer.high, every.max(0))
    first = next(Shards(str(tmp_path / "out"), shuffle=False).samples(epochs=1))
    numbers = " ".join(f"{x:.3f}" for x in episodes[0][0].seen["state"])
    assert first["views"]["teacher"][0]["content"][0]["text"].startswith(f"state {numbers}\n")


def test_what_is_no_dataset_is_refused(folder, episodes, tmp_path):
    with pytest.raises(ValueError, match="is there already"):
        write(folder, episodes, fps=10, robot="toy")
    with pytest.raises(ValueError, match="no episodes"):
        write(tmp_path / "none", [], fps=10, robot="toy")
    with pytest.raises(ValueError, match=r"no column 'words' for the teacher's text; it has: observation.images.top"):
        write_decisions(str(folder), tmp_path / "out", text="words")
    with pytest.raises(ValueError, match=r"no meta/info.json"):
        write_decisions(str(tmp_path), tmp_path / "out")
    for nowhere in ("/nope", str(tmp_path / "gone"), "./gone", "data/lerobot/gone"):
        with pytest.raises(ValueError, match=rf"there is no folder {nowhere}, and no dataset on the hub can have"):
            write_decisions(nowhere, tmp_path / "out")
    (tmp_path / "old" / "meta").mkdir(parents=True)
    (tmp_path / "old" / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v2.1"}))
    with pytest.raises(ValueError, match=r"is a LeRobotDataset v2\.1"):
        write_decisions(str(tmp_path / "old"), tmp_path / "out")


@pytest.mark.parametrize(
    ("column", "text"), [("action", None), ("observation.state", "observation.state"), ("observation.state", None)]
)
def test_a_number_that_is_none_is_refused_with_its_place(episodes, tmp_path, column, text):
    spoilt = list(episodes[1])
    action, state = spoilt[2].action.copy(), spoilt[2].seen["state"].copy()
    (action if column == "action" else state)[1] = np.nan
    spoilt[2] = replace(spoilt[2], action=action, seen=spoilt[2].seen | {"state": state})
    write(tmp_path / "spoilt", [episodes[0], spoilt], fps=10, robot="toy")
    with pytest.raises(
        ValueError, match=rf"column '{column}' of .*spoilt has NaN or infinity in frame 2 of episode 1,"
    ):
        write_decisions(str(tmp_path / "spoilt"), tmp_path / "out", text=text, progress=False)
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_statistics_that_are_no_numbers_are_refused(episodes, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "toy")
    stats = json.loads((tmp_path / "toy" / "meta" / "stats.json").read_text())
    stats["action"]["q01"][0] = float("nan")
    (tmp_path / "toy" / "meta" / "stats.json").write_text(json.dumps(stats))
    with pytest.raises(ValueError, match=r"meta/stats.json of .*toy has NaN or infinity as q01 of 'action'"):
        write_decisions(str(tmp_path / "toy"), tmp_path / "out", progress=False)


def test_an_interruption_leaves_a_whole_dataset(episodes, tmp_path):
    def failing():
        yield episodes[0]
        raise RuntimeError("the simulator is gone")

    with pytest.raises(RuntimeError, match="gone"):
        write(tmp_path / "part", failing(), fps=10, robot="toy")
    assert LeRobotDataset("part", root=tmp_path / "part", video_backend="pyav").num_frames == len(episodes[0])


@pytest.mark.slow
def test_images_may_be_videos(episodes, tmp_path):
    write(tmp_path / "video", episodes[:1], fps=10, robot="toy", video=True)
    dataset = LeRobotDataset("video", root=tmp_path / "video", video_backend="pyav")
    assert dataset.meta.video_keys == ["observation.images.top"] and list((tmp_path / "video").rglob("*.mp4"))
    image = (dataset[2]["observation.images.top"].permute(1, 2, 0) * 255).numpy()
    assert np.abs(image - episodes[0][2].seen["images"]["top"]).mean() < 8


# ---- learning from decisions in shards

SHOWN = """
name: shown
modality: action
model: {{name: default}}
data: {{tasks: [reach, push], test: 1, demonstrations: {shards}}}
robot: {{name: toy, options: {{horizon: 4}}, cameras: [top], image_size: 56, size: 3, chunk: 4, workers: 1}}
rollout: {{max_tokens: 12, samplings: {{shown: {{n: 1}}}}}}
objective: {{shown: {{sampling: shown, advantages: [constant], surrogate: reinforce, reduction: token}}}}
engine: {{share_prefix: false, device: cpu}}
optim: {{lr: 3.0e-3}}
train: {{steps: 8, prompts: 6}}
eval: {{kl: false}}
"""


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    shards = tmp_path_factory.mktemp("shards") / "decisions"
    write_decisions(str(folder), shards, chunk=4, progress=False)
    return shards


def recipe(shards, tmp_path, *overrides):
    (tmp_path / "shown.yaml").write_text(SHOWN.format(shards=shards))
    return config.load(str(tmp_path / "shown.yaml"), [f"run_dir={tmp_path / 'run'}", *overrides])


@pytest.fixture
def parts(shards, tmp_path):
    parts = build(recipe(shards, tmp_path))
    yield parts
    parts.sampler.workers.close()


def test_a_decision_in_shards_is_seen_as_it_is_in_the_simulator(episodes, shards, parts):
    (_, pair), *_ = Shards(str(shards), shuffle=False).pairs(parts.adapter, epochs=1)
    live = parts.adapter.observed(pair.key, episodes[0][0].seen, {})
    assert pair.views.keys() == live.views.keys() == {"student", "teacher"}
    for view, inputs in live.views.items():
        ours, theirs = (parts.adapter.batch([some]) for some in (pair.views[view], inputs))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (rollout,) = parts.sampler_at(0).generate([pair], parts.samplings, 0)["shown"]
    assert rollout.tokens == parts.adapter.ids(np.stack([step.action for step in episodes[0][:4]]))


def test_what_was_shown_is_learnt_and_its_likelihood_is_told(shards, parts):
    pairs = [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 6)]
    told = [train_step(parts, pairs, number) for number in range(8)]
    rollouts = parts.sampler_at(0).generate(pairs, parts.samplings, 0)["shown"]
    fresh = build(parts.recipe)
    with torch.no_grad():
        hidden = fresh.responses.hidden(fresh.student, rollouts, "student")
    mask = token_batch(rollouts).mask
    logp = token_logp(fresh.student, hidden, rollouts, mask, fresh.responses.among)
    assert told[0]["nll"] == pytest.approx(-(logp.sum() / mask.sum()).item(), rel=1e-4)
    assert told[-1]["nll"] < told[0]["nll"] - 0.3
    assert not {"episodes", "entropy"} & told[0].keys() and told[0]["num_tokens"] == mask.sum()


def test_a_teacher_grades_what_was_shown(shards, tmp_path):
    term = "{sampling: shown, teacher: {view: teacher}, divergence: forward_kl, reduction: token}"
    parts = build(recipe(shards, tmp_path, "objective.shown=null", f"objective.taught={term}"))
    pairs = [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 3)]
    (rollouts,) = parts.sampler_at(0).generate(pairs, parts.samplings, 0).values()
    with torch.no_grad():
        student, teacher = (parts.responses.hidden(parts.student, rollouts, view) for view in ("student", "teacher"))
        p, q = ((hidden @ head(parts.student)[parts.sampler.among].T).log_softmax(-1) for hidden in (student, teacher))
    mask = token_batch(rollouts).mask
    expected = (q.exp() * (q - p)).sum(-1)[mask].mean()
    values = train_step(parts, pairs, 0)
    parts.sampler.workers.close()
    assert values["distill/taught"] == pytest.approx(expected.item(), rel=1e-4) and values["grad_norm"] > 0


def test_a_run_on_what_was_shown_plays_the_test_alone(shards, tmp_path):
    summary = train(recipe(shards, tmp_path, "train.steps=1"))
    assert summary["episodes"] == 0 and (tmp_path / "run" / "eval" / "after.jsonl").is_file()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("judge={name: success}", "judge"),
        ("robot.depth=opad", "robot.depth"),
        ("rollout.samplings.shown.n=2", "rollout.samplings.shown.n"),
        ("objective.shown.weights=[tis]", "objective.shown.weights tis"),
    ],
)
def test_what_needs_an_episode_is_refused_where_none_is_played(shards, tmp_path, more, why):
    with pytest.raises(ValueError, match=rf"one chunk of actions for each .* so {why} would mean nothing"):
        recipe(shards, tmp_path, more)


def test_a_chunk_that_is_not_the_robots_is_refused_before_anything_is_read(shards, tmp_path):
    with pytest.raises(ValueError, match=r"has decisions of 4 actions, and robot.chunk is 2; make them .*--chunk 2"):
        open_shards(recipe(shards, tmp_path, "robot.chunk=2"))


def test_cameras_have_names_with_dots_or_those_that_one_gives_them(episodes, tmp_path, parts):
    images = [{"head.left": s.seen["images"]["top"], "wrist.left": s.seen["images"]["top"][::-1]} for s in episodes[0]]
    steps = [replace(step, seen={**step.seen, "images": some}) for step, some in zip(episodes[0], images, strict=True)]
    write(tmp_path / "two", [steps], fps=10, robot="toy")
    write_decisions(str(tmp_path / "two"), tmp_path / "both", chunk=4, progress=False)
    (sample,) = islice(Shards(str(tmp_path / "both"), shuffle=False).samples(epochs=1), 1)
    assert sample["media"].keys() == {"head.left.png", "wrist.left.png"}
    named = {"observation.images.wrist.left": "top"}
    write_decisions(str(tmp_path / "two"), tmp_path / "one", chunk=4, cameras=named, progress=False)
    (_, pair), *_ = Shards(str(tmp_path / "one"), shuffle=False).pairs(parts.adapter, epochs=1)
    seen = {**episodes[0][0].seen, "images": {"top": images[0]["wrist.left"]}}
    live = parts.adapter.batch([parts.adapter.observed("", seen, {}).views["student"]])
    assert torch.equal(parts.adapter.batch([pair.views["student"]])["pixel_values"], live["pixel_values"])
    with pytest.raises(
        ValueError, match=r"no column 'nose' for the camera 'top'; it has: observation.images.head.left"
    ):
        write_decisions(str(tmp_path / "two"), tmp_path / "none", cameras={"nose": "top"}, progress=False)


def test_who_reads_no_words_is_held_against_itself(shards, tmp_path):
    parts = build(recipe(shards, tmp_path, "eval.teacher={view: student}"))
    assert not parts.adapter.privileged and parts.instructor == (parts.student, "student")
    (record,) = measured(parts, [pair for _, pair in islice(open_tests(parts.recipe).pairs(None), 1)])
    parts.sampler.workers.close()
    assert record["text"] == record["student"] and record["text_correct"] == record["student_correct"]


def test_shards_that_show_no_robot_and_cameras_that_are_not_there_are_told(folder, shards, tmp_path, parts):
    (sample,) = islice(Shards(str(shards), shuffle=False).samples(epochs=1), 1)
    with pytest.raises(SampleError, match=r"shows no robot: its meta has no 'actions'; tools/prepare_shards.py"):
        parts.adapter.pair(sample | {"meta": {"observation": {}}})
    with pytest.raises(SampleError, match=r"was not seen by robot.cameras 'top'; its shards have: side; .*--camera"):
        parts.adapter.pair(sample | {"media": {"side.png": sample["media"]["top.png"]}})
    parts.adapter.proprio, meta = True, sample["meta"]
    with pytest.raises(SampleError, match=r"no numbers of its state; set robot.proprio=false"):
        parts.adapter.pair(sample | {"meta": meta | {"observation": meta["observation"] | {"state": []}}})
    parts.adapter.proprio = False
    with pytest.raises(SampleError, match=r"one decision of this robot is \[1 to 4, 3\]"):
        parts.adapter.pair(sample | {"meta": {**sample["meta"], "actions": [[0.0, 0.0]]}})
