"""Meta-World for real: start states, experts, pictures, and words for what is there."""

import sys
from ctypes.util import find_library

import numpy as np
import pytest

from modalities.action.environment import AssetError, make
from modalities.action.metaworld import LOOKS, MetaWorld, told_in_words
from xmodal_opd.rollout.workers import Failed, Workers

TASK = "coffee-button-v3"


@pytest.fixture(scope="module")
def world():
    world = MetaWorld(width=56, height=56)
    try:
        world.reset(TASK, 0)
    except AssetError as error:
        pytest.skip(str(error))
    yield world
    world.close()


def test_a_start_state_is_its_number(world):
    first = world.reset(TASK, 3)
    world.act(np.ones((5, 4)))
    again, other = world.reset(TASK, 3), world.reset(TASK, 4)
    assert first["text"] == again["text"] != other["text"]
    assert (first["images"]["corner2"] == again["images"]["corner2"]).all()
    assert first["images"]["corner2"].shape == (56, 56, 3) and first["images"]["corner2"].std() > 20


def test_the_expert_succeeds_and_doing_nothing_does_not(world):
    seen = world.reset(TASK, 0)
    while not seen["done"]:
        seen = world.act(world.expert()[None])
    assert seen["success"] and 20 < seen["steps"] < 60 and not seen["images"]
    world.reset(TASK, 0)
    seen = world.act(np.zeros((250, 4)))
    assert seen["done"] and not seen["success"] and seen["steps"] == 200


def test_an_action_that_is_no_number_is_refused_before_mujoco_resets_its_physics(world):
    before = world.reset(TASK, 3)["text"]
    with pytest.raises(ValueError, match=r"\[C, 4\] finite numbers, not one with NaN or infinity in it"):
        world.act(np.full((1, 4), np.nan))
    with pytest.raises(ValueError, match=r"\[C, 4\] finite numbers, not one of shape \(1, 7\)"):
        world.act(np.zeros((1, 7)))
    assert world.observation()["text"] == before and world.steps == 0


def test_a_camera_that_hangs_elsewhere_sees_the_same_state_in_another_picture(world):
    nearer = MetaWorld(width=56, height=56, moved=(-0.2, 0.12, -0.13))
    here, there = world.reset(TASK, 3), nearer.reset(TASK, 3)
    nearer.close()
    assert here["text"] == there["text"]
    assert (here["images"]["corner2"] != there["images"]["corner2"]).mean() > 0.5
    with pytest.raises(ValueError, match=r"moved is x, y and z .*; got \[0.1\]"):
        make("metaworld", {"moved": [0.1]})


def test_goals_are_seen_at_every_step(world):
    """Meta-World hides them by a bound made before one can say otherwise."""
    world.reset("reach-v3", 1)
    goal = world.seen[36:39].copy()
    world.act(np.zeros((2, 4)))
    assert goal.any() and np.allclose(world.seen[36:39], goal)


def test_the_text_is_where_things_are_from_the_hand():
    seen = np.zeros(39)
    seen[:4], seen[4:7], seen[36:39] = (0.1, 0.6, 0.2, 1.0), (0.0, 0.8, 0.1), (0.0, 0.8, 0.0)
    assert told_in_words(seen, "button") == "grip 10, hand +20 +120 +40, button -20 +40 -20, goal -20 +40 -40"


def test_unknown_tasks_and_cameras_are_named(world):
    with pytest.raises(ValueError, match=r"no task 'fly-v3'; it has: .*reach-v3"):
        world.reset("fly-v3", 0)
    with pytest.raises(ValueError, match=r"no camera 'moon'; there are: .*corner2"):
        MetaWorld(camera="moon").reset(TASK, 0)
    with pytest.raises(AssetError, match=r"no environment 'mars'; there are: .*metaworld"):
        make("mars", {})


def test_every_task_with_words_of_its_own_exists(world):
    assert set(LOOKS) <= set(world.tasks)


@pytest.mark.parametrize(
    ("around", "words"),
    [
        ({"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}, r"Meta-World cannot start \(.*PYOPENGL_PLATFORM"),
        ({"MUJOCO_GL": "crayons"}, r"Meta-World cannot start \(.*crayons"),
        pytest.param(
            {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"},
            r"Meta-World cannot start \(",
            marks=pytest.mark.skipif(bool(find_library("OSMesa")), reason="libosmesa6 is here"),
        ),
    ],
    ids=["two platforms", "no platform", "no osmesa"],
)
def test_a_driver_that_is_not_there_is_told_with_what_to_install(around, words):
    command = [sys.executable, "-m", "modalities.action.worker", "metaworld", "{}"]
    with pytest.raises(Failed, match=words + r".*apt-get install .*libosmesa6$") as told:
        Workers(command, 1, 120.0, around, name="metaworld").about()
    assert told.value.kind == "AssetError"


def test_a_picture_larger_than_meta_worlds_is_refused(world):
    with pytest.raises(ValueError, match=r"^a picture of 4000 x 112 is asked for; Meta-World's are \d+ x \d+ at most$"):
        MetaWorld(width=4000).reset(TASK, 0)
