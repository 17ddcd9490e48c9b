"""Episodes of a recipe's robot, written by the tool as a LeRobotDataset: the expert's, and a policy's as it played."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="pip install 'xmodal-opd[lerobot]'")

from lerobot.datasets.lerobot_dataset import LeRobotDataset

from modalities.action.toy import Toy
from tools import export_lerobot

RECIPE = """
include: [{root}/configs/methods/vla_opd_full.yaml]
name: toy
modality: action
model: {{name: default}}
data: {{tasks: [push], train: 2, first: 2, test: 2}}
robot: {{name: toy, options: {{horizon: 20}}, cameras: [top], image_size: 56, size: 3, chunk: 4, workers: 2}}
rollout: {{max_tokens: 12, samplings: {{episodes: {{n: 2}}}}}}
engine: {{device: cpu}}
"""


@pytest.fixture
def export(tmp_path, monkeypatch):
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(RECIPE.format(root=Path(__file__).parents[1]))

    def run(*words):
        out = tmp_path / words[-1]
        monkeypatch.setattr(sys, "argv", ["export_lerobot", str(recipe), str(out), *words[:-1]])
        export_lerobot.main()
        return LeRobotDataset(out.name, root=out, video_backend="pyav")

    return run


def test_episodes_of_an_expert_and_of_a_policy_become_datasets(export, capsys):
    shown = export("--policy", "expert", "--split", "test", "--episodes", "2", "--successes", "expert")
    assert shown.num_episodes == 2 and bool(shown[shown.num_frames - 1]["next.success"])
    assert f"expert: 2 episodes, {shown.num_frames} frames" in capsys.readouterr().out
    toy, seen = Toy(), Toy().reset("push", 1)
    first = shown.meta.episodes[1]["dataset_from_index"]
    assert np.allclose(shown[first]["observation.state"], seen["state"])
    acted = export("--policy", "teacher", "--temperature", "1", "--split", "test", "--episodes", "1", "teacher")
    toy.reset("push", 0)
    actions = np.stack([acted[n]["action"].numpy() for n in range(acted.num_frames)])
    after = toy.act(actions)
    assert after["steps"] == acted.num_frames and bool(acted[acted.num_frames - 1]["next.done"])
    shown = ("data.demonstrations=data/none", "rollout.samplings.episodes.n=1")  # learns from shards, and still plays
    assert not export("--split", "test", "--episodes", "1", *shown, "student")[0]["next.success"]


def test_a_policy_that_is_none_is_told_before_anything_is_played(export, tmp_path):
    with pytest.raises(SystemExit, match=r"there is no policy 'ghost'; there are: student, teacher, expert$"):
        export("--policy", "ghost", "--episodes", "1", "ghost")
    assert not (tmp_path / "ghost").exists()


def test_no_success_is_no_dataset(export):
    with pytest.raises(SystemExit, match="there are no episodes to write"):
        export("--episodes", "1", "--successes", "robot.options={horizon: 4}", "none")
