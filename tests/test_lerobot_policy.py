"""Our policy in lerobot: found by its name, the same decisions as our own runner's, and a real lerobot-eval."""

import copy
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot", reason="pip install 'xmodal-opd[lerobot]'")

from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

from modalities.action.lerobot import played
from modalities.action.toy import Toy
from xmodal_opd import config, inspect, measure
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards, open_tests
from xmodal_opd.statistics import wilson_interval
from xmodal_opd.step import train_step
from xmodal_opd.types import Pair, Sampling

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "plugins" / "lerobot_policy_xmodal"
TOY = """
include: [{root}/configs/methods/vla_opd_full.yaml]
name: toy
modality: action
model: {{name: default}}
data: {{tasks: [reach, push], train: 6, test: 2}}
robot: {{name: toy, cameras: [top], image_size: 56, size: 3, chunk: 4, workers: 2}}
rollout: {{max_tokens: 12, samplings: {{episodes: {{n: 2}}}}}}
engine: {{device: cpu}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "toy.yaml"
    path.write_text(TOY.format(root=ROOT))
    return str(path)


@pytest.fixture(scope="module")
def policy(recipe):
    sys.path.append(str(PLUGIN))
    importlib.import_module("lerobot_policy_xmodal")  # which lerobot's commands do themselves where it is installed
    settings = make_policy_config("xmodal", recipe=recipe, device="cpu", push_to_hub=False)
    return get_policy_class("xmodal")(settings).eval()


def batch_of(seen, key="observation.image"):
    """What lerobot makes of an observation."""
    image = torch.from_numpy(seen["images"]["top"]).permute(2, 0, 1)[None] / 255
    return {key: image, "observation.state": torch.from_numpy(seen["state"])[None], "task": [seen["instruction"]]}


def test_it_acts_as_our_own_runner_does(policy, recipe):
    parts = inspect.measured(config.load(recipe), None)
    start = Pair("push/1", {}, None, {"task": "push", "start": 1})
    turns = parts.sampler.generate([start], {"a": Sampling(temperature=0.0)}, seed=0)["a"]
    parts.sampler.workers.close()
    before, after = make_pre_post_processors(policy.config)
    toy, taken = Toy(), []
    seen = toy.reset("push", 1)
    policy.reset()
    while not seen["done"]:
        action = after(policy.select_action(before(batch_of(seen))))
        taken.append(action[0].numpy())
        seen = toy.act(action.numpy())
    wanted = np.concatenate([parts.adapter.actions(turn.tokens) for turn in turns])
    assert np.allclose(np.stack(taken), wanted, atol=1e-6)


def test_it_learns_what_a_dataset_of_lerobots_shows(policy):
    toy = Toy()
    steps = played(lambda command, *rest: getattr(toy, command)(*rest), "push", 1, toy.expert)
    actions = torch.from_numpy(np.stack([step.action for step in steps[:4]]))[None]
    batch = batch_of(steps[0].seen) | {"action": actions, "action_is_pad": torch.tensor([[False, False, False, True]])}
    loss, told = policy(batch)
    tokens = torch.tensor(policy.acting.ids(actions[0].numpy()))
    logits = policy.predicted(batch, tokens[None])
    wanted = torch.nn.functional.cross_entropy(logits[0, :9], tokens[:9] - policy.sampler.among.start)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) == told["loss"]
    loss.backward()
    assert policy.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_what_lerobot_trained_teaches_in_a_recipe(policy, recipe, tmp_path):
    trained = copy.deepcopy(policy)
    with torch.no_grad():
        trained.model.get_input_embeddings().weight += 0.05
    trained.save_pretrained(tmp_path / "theirs")
    export = importlib.import_module("lerobot_policy_xmodal.export").export
    export(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    with pytest.raises(ValueError, match="is there already"):
        export(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    for source, found in ((tmp_path / "ours", "None"), (tmp_path / "none", "no config.json")):
        with pytest.raises(ValueError, match=rf"no folder of a policy of type xmodal.*: found {found}"):
            export(str(source), str(tmp_path / "other"))
    teacher = f"objective.episodes.teacher={{model: {tmp_path / 'ours'}, view: student}}"
    parts = build(config.load(recipe, [teacher, "data.test=1"]))
    learnt, told = parts.models[str(tmp_path / "ours")].state_dict(), trained.model.state_dict()
    assert learnt.keys() == told.keys() and all(torch.equal(learnt[name], told[name]) for name in told)
    pairs = [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 1)]
    values = train_step(parts, pairs, 0)
    parts.sampler.workers.close()
    assert values["distill/episodes"] > 1e-3 and values["grad_norm"] > 0


def test_a_camera_that_lerobot_has_not_is_named(policy):
    seen = Toy().reset("push", 1)
    batch = batch_of(seen, "observation.images.front") | {"observation.images.wrist": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(
        ValueError, match=r"camera 'top'; there are: observation.images.front, observation.images.wrist"
    ):
        policy.predict_action_chunk(batch)
    with pytest.raises(ValueError, match=r"needs --policy\.recipe"):
        get_policy_class("xmodal")(replace(policy.config, recipe=""))


EPISODES, TASK = 20, "button-press-topdown-wall-v3"
SAYS = {"Bypass a wall and press a button from the top": "press the button behind the wall from above"}
LEROBOT_EVAL = """
import mujoco
from lerobot.envs.metaworld import MetaworldEnv
from lerobot.scripts.lerobot_eval import main

made = MetaworldEnv._ensure_env

def made_as_ours(self):  # lerobot has no options for where its camera hangs, for shadows and sky, for its 500 steps
    fresh = self._env is None
    made(self)
    if fresh:
        model = self._env.model
        model.cam_pos[2] += {moved}
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        scene = self._env.mujoco_renderer._get_viewer("rgb_array").scn
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE"):
            scene.flags[getattr(mujoco.mjtRndFlag, "mjRND_" + flag)] = 0
        self._max_episode_steps = {horizon}

MetaworldEnv._ensure_env = made_as_ours
main()
"""


@pytest.mark.slow
@pytest.mark.skipif("XMODAL_LEROBOT" not in os.environ, reason="takes three minutes, and reaches into lerobot's world")
def test_lerobot_eval_counts_the_successes_that_our_own_runner_counts(tmp_path):
    """In the same world, but for its pictures: 480 x 480 there, scaled down; 112 x 112 here. With shadows and a sky,
    which the policy never saw, 0 of 20 succeeded there, and 8 of 20 here."""
    pytest.importorskip("metaworld", reason="pip install 'xmodal-opd[robot]'")
    options = [f"data.tasks=[{TASK}]", f"data.test={EPISODES}", "eval.kl=false"]
    parts = inspect.measured(config.load("configs/vla_opd.yaml", options), None)
    pairs = [pair for _, pair in open_tests(parts.recipe).pairs(parts.adapter, epochs=1)]
    ours = sum(record["student_correct"] for record in measure.measured(parts, pairs))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", PLUGIN]
    subprocess.run(install, check=True)
    command = [
        *(sys.executable, "-c", LEROBOT_EVAL.format(**parts.recipe.robot.options)),
        "--policy.type=xmodal",
        f"--policy.recipe={ROOT / 'configs' / 'vla_opd.yaml'}",
        f"--policy.instructions={json.dumps(SAYS)}",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--env.type=metaworld",
        f"--env.task={TASK}",
        f"--eval.n_episodes={EPISODES}",
        "--eval.batch_size=2",
        "--eval.use_async_envs=false",
        f"--output_dir={tmp_path / 'out'}",
    ]
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    about = {"MUJOCO_GL": "egl", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    subprocess.run(command, check=True, env={**os.environ, **about})
    told = json.loads((tmp_path / "out" / "eval_info.json").read_text())["overall"]
    assert told["n_episodes"] == EPISODES
    theirs = round(told["pc_success"] / 100 * EPISODES)
    (low, high), (least, most) = wilson_interval(ours, EPISODES), wilson_interval(theirs, EPISODES)
    assert low <= most and least <= high, f"{ours} and {theirs} of {EPISODES}"
