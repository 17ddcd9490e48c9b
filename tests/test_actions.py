"""Actions as tokens and back, and what a robot sees as views. Golden numbers by hand."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from modalities.action.adapter import ActionAdapter
from modalities.action.tokens import CENTRES, GRIPPERS, ActionTokens, Normalizer, load_normalizer
from modalities.vision import media as sight
from xmodal_opd.models import load_model, load_processor
from xmodal_opd.types import SampleError

PLAIN = ActionTokens(end=32000, chunk=2, size=3)
STATISTICS = {
    "libero_spatial_no_noops": {
        "action": {
            "min": [-0.9, -1.0, 0.0],
            "max": [0.9, 3.0, 1.0],
            "q01": [-0.5, 0.0, 0.0],
            "q99": [0.5, 2.0, 1.0],
            "mean": [0.1, 1.0, 0.5],
            "std": [0.2, 0.5, 0.5],
            "mask": [True, True, False],
        },
        "num_trajectories": 432,
    },
    "bridge_orig": {"action": {"min": [-1.0], "max": [1.0]}},
}


def test_ids_of_actions_are_openvlas():
    """arXiv:2406.09246: the id is the vocabulary's size less the number of edges at or below the value, 1 to 256."""
    assert PLAIN.among == slice(31744, 32000) and PLAIN.width == 6
    assert PLAIN.ids(np.array([[-1.0, 0.0, 1.0]])) == [31999, 31872, 31744]
    assert PLAIN.ids(np.array([[-7.0, 7.0, -1 + 2 / 255]])) == [31999, 31744, 31998]
    assert PLAIN.ids(np.array([[-0.5, 0.25, 0.5]])) == [31936, 31840, 31808]  # ⌊0.5 · 127.5⌋ + 1 = 64, 160, 192


def test_the_last_two_ids_decode_to_one_value():
    values = PLAIN.actions([31999, 31872, 31744, 31745, 31998, 31808])
    assert values.shape == (2, 3)
    assert values[0].tolist() == pytest.approx([-254 / 255, 0, 254 / 255])
    assert values[1].tolist() == pytest.approx([254 / 255, -252 / 255, 128 / 255])
    assert len(CENTRES) == 255


def test_a_value_comes_back_within_half_a_bin():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (200, 3))
    many = replace(PLAIN, chunk=200)
    assert np.abs(many.actions(many.ids(actions)) - actions).max() <= 1 / 255 + 1e-12
    ids = rng.integers(31744, 32000, 300).tolist()
    same = [31745 if id == 31744 else id for id in ids]
    assert many.ids(many.actions(ids)) == same


def written(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


KINDS = [  # ½ (0.5 + 1)(high − low) + low with high − low of 1 and 2, 1.8 and 4; 0.5 std + mean
    ("quantiles", [0.25, 1.5, 0.5]),
    ("bounds", [0.45, 2.0, 0.5]),
    ("gaussian", [0.2, 1.25, 0.5]),
]


@pytest.mark.parametrize("kind, expected", KINDS)
def test_statistics_of_a_dataset_undo_its_normalisation(tmp_path, kind, expected):
    normalizer = load_normalizer(written(tmp_path, "dataset_statistics.json", STATISTICS), "libero_spatial", kind)
    actions = normalizer.undo(np.full((1, 3), 0.5))
    assert actions[0].tolist() == pytest.approx(expected, abs=2e-8)
    assert normalizer.apply(actions)[0].tolist() == pytest.approx([0.5] * 3, abs=4e-8)


def test_what_lies_beyond_the_quantiles_is_clipped_and_what_never_moves_is_zero():
    normalizer = Normalizer("quantiles", (0.0, 2.0, 0.0), (1.0, 2.0, 1.0), (True, True, False))
    assert normalizer.apply(np.array([[5.0, 2.0, 5.0]]))[0].tolist() == [1, 0, 5]
    assert normalizer.undo(np.array([[1.0, 0.0, 5.0]]))[0].tolist() == pytest.approx([1, 2, 5])


def test_statistics_are_found_in_a_checkpoint_or_a_file(tmp_path):
    config = written(tmp_path / "a", "config.json", {"model_type": "openvla", "norm_stats": STATISTICS})
    file = written(tmp_path / "b", "mine.json", STATISTICS) / "mine.json"
    found = [load_normalizer(where, "libero_spatial_no_noops") for where in (config, config / "config.json", file)]
    assert found[0] == found[1] == found[2] and found[0].low == (-0.5, 0.0, 0.0)
    alone = written(tmp_path / "c", "dataset_statistics.json", {"mine": STATISTICS["libero_spatial_no_noops"]})
    assert load_normalizer(alone, None) == found[0], "where there is one, nobody needs to name it"
    whole = load_normalizer(file, "bridge_orig", "bounds")
    assert whole.mask == (True,), "without a mask every number is normalised"


def test_statistics_that_are_not_there_are_told(tmp_path):
    folder = written(tmp_path / "a", "dataset_statistics.json", STATISTICS)
    with pytest.raises(ValueError, match=r"no action statistics 'libero_goal'; there are: bridge_orig, libero_s"):
        load_normalizer(folder, "libero_goal")
    with pytest.raises(ValueError, match=r"has action statistics of several datasets, .*; there are: bridge_orig, lib"):
        load_normalizer(folder, None)
    with pytest.raises(ValueError, match=r"'bridge_orig' of .* have no q01 and q99; there are: max, min"):
        load_normalizer(folder, "bridge_orig")
    with pytest.raises(ValueError, match=r"has no action statistics; give a JSON file"):
        load_normalizer(tmp_path / "nowhere", "bridge_orig")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is no JSON"):
        load_normalizer(tmp_path / "broken.json", "bridge_orig")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], r"mine\.json: \[1, 2\] stands where statistics do"),
        ({"norm_stats": [1]}, r"mine\.json: \[1\] stands where statistics do"),
        ({"a": None}, r"the statistics 'a' of .*mine\.json: None stands where statistics do"),
        ({"a": {"action": 3}}, r"the statistics 'a' of .*mine\.json: 3 stands where statistics do"),
        ({"a": {"action": {"q01": None, "q99": [1]}}}, r"'a' of .* have a q01, q99 or mask that is no list of numbers"),
        (
            {"a": {"action": {"q01": [None], "q99": [1]}}},
            r"'a' of .* have a q01, q99 or mask that is no list of numbers",
        ),
    ],
)
def test_what_are_no_statistics_are_told_in_a_sentence(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        load_normalizer(written(tmp_path, "mine.json", content) / "mine.json", "a")


def test_libero_opens_its_gripper_with_minus_one():
    tokens = replace(PLAIN, gripper=GRIPPERS["openvla"])
    actions = tokens.actions(tokens.ids(np.array([[0.5, -0.5, -1.0], [0.5, -0.5, 1.0]])))
    assert actions[:, 2].tolist() == [-1, 1], "open is −1 and stays so"
    data = replace(PLAIN, gripper=GRIPPERS["keep"])
    assert data.actions(tokens.ids(np.array([[0.0, 0.0, -1.0]])))[0, 2] == pytest.approx(254 / 255), (
        "in the data it is 1"
    )
    assert tokens.actions(data.ids(np.array([[0.0, 0.0, 0.4]])))[0, 2] == 1, "less than half open is closed"
    assert tokens.actions(data.ids(np.array([[0.0, 0.0, 0.6]])))[0, 2] == -1


BROKEN = [
    (lambda t: t.ids(np.array([[0.0, np.nan, 0.0]])), "number 1 of action 0 is nan, which no token stands for"),
    (lambda t: t.ids(np.array([[0.0, 0.0, np.inf]])), "number 2 of action 0 is inf"),
    (lambda t: t.ids(np.zeros((1, 4))), r"shape \[1, 4\]; one decision of this robot is \[1 to 2, 3\]"),
    (lambda t: t.ids(np.zeros((3, 3))), r"shape \[3, 3\]"),
    (lambda t: t.ids(np.zeros(3)), r"shape \[3\]"),
    (lambda t: t.actions([]), "0 tokens are no whole actions; one decision of this robot is 1 to 2 actions of 3"),
    (lambda t: t.actions([31999] * 4), "4 tokens are no whole actions"),
    (lambda t: t.actions([31999] * 9), "9 tokens are no whole actions"),
    (lambda t: t.actions([31999, 32000, 31999]), "token 32000 is no action: those are ids 31744 to 31999"),
    (lambda t: t.actions([0, 31999, 31999]), "token 0 is no action"),
]


@pytest.mark.parametrize("attempt, message", BROKEN)
def test_what_is_no_action_is_refused(attempt, message):
    with pytest.raises(SampleError, match=message):
        attempt(PLAIN)


def test_statistics_of_another_robot_or_of_no_numbers_are_refused():
    with pytest.raises(ValueError, match="actions of 2 numbers, but the robot takes 3"):
        replace(PLAIN, normalizer=Normalizer("bounds", (0.0, 0.0), (1.0, 1.0), (True, True)))
    with pytest.raises(ValueError, match="min of 1, max of 2 and mask of 2 numbers"):
        Normalizer("bounds", (0.0,), (1.0, 1.0), (True, True))
    with pytest.raises(ValueError, match="256 ids, and the window would end at id 255"):
        replace(PLAIN, end=255)
    nan = replace(PLAIN, normalizer=Normalizer("bounds", (0.0,) * 3, (1.0, float("nan"), 1.0), (True,) * 3))
    with pytest.raises(SampleError, match="the action is not finite"):
        nan.actions([31999] * 3)


# ---- the adapter


@pytest.fixture(scope="module")
def processor():
    return load_processor("default")


def adapter_of(processor, **options) -> ActionAdapter:
    end = len(processor.tokenizer)
    given = {"cameras": ["front"], "image_size": 56, **options}
    return ActionAdapter(processor, 512, tokens=ActionTokens(end, 2, 4), **given)


def observation(**changes) -> Any:
    rng = np.random.default_rng(1)
    images = {name: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("front", "wrist")}
    seen = {"images": images, "state": np.array([0.5, -1.0], np.float32), "text": "hand 0.5 -1", "instruction": "Reach"}
    return seen | {"success": False, "done": False, "steps": 0} | changes


def test_an_observation_becomes_images_for_the_student_and_words_for_the_teacher(processor):
    adapter = adapter_of(processor, cameras=["wrist", "front"])
    pair = adapter.observed("reach/3/0/0", observation(), {"task": "reach", "start": 3})
    student, teacher = pair.views["student"], pair.views["teacher"]
    question = "In: What action should the robot take to reach?\nOut:"
    assert question in student["prompt"] and f"hand 0.5 -1\n{question}" in teacher["prompt"]
    assert [image.size for image in student["images"]] == [(56, 56)] * 2 and not teacher["images"]
    wrist = sight.scaled(sight.from_array(observation()["images"]["wrist"]), 56)
    assert (np.asarray(student["images"][0]) == np.asarray(wrist)).all(), "cameras come in the recipe's order"
    assert (pair.key, pair.meta["start"], pair.answer) == ("reach/3/0/0", 3, None)
    batch = adapter.batch([student, teacher])
    assert torch.isfinite(load_model("default")(**batch).logits).all()
    assert adapter.batch([student])["input_ids"].shape[1] <= adapter.size(student)


def test_the_state_may_be_in_the_students_prompt_and_the_teachers_view_left_out(processor):
    adapter = adapter_of(processor, proprio=True, privileged=False)
    pair = adapter.observed("k", observation(text=""), {})
    assert "0.500 -1.000\nIn: What action" in pair.views["student"]["prompt"] and set(pair.views) == {"student"}
    plain = adapter_of(processor, image_size=None).observed("k", observation(), {})
    assert (np.asarray(plain.views["student"]["images"][0]) == observation()["images"]["front"]).all()
    blind = adapter_of(processor, cameras=[], proprio=True).observed("k", observation(images={}), {})
    assert not blind.views["student"]["images"]


def test_views_may_be_derived_from_what_the_student_sees(processor):
    pair = adapter_of(processor, derive={"blank"}).observed("k", observation(), {})
    assert np.unique(np.asarray(pair.views["blank"]["images"][0])).tolist() == [128]
    assert pair.views["blank"]["prompt"] == pair.views["student"]["prompt"]


def test_what_cannot_be_seen_is_told(processor):
    with pytest.raises(ValueError, match=r"no camera 'top'; there are: front, wrist; .* robot.options.camera on meta"):
        adapter_of(processor, cameras=["top"]).observed("k", observation(), {})
    with pytest.raises(ValueError, match="'k' has no text of its state, which the teacher's view is made of"):
        adapter_of(processor).observed("k", observation(text=""), {})
    broken = observation(images={"front": np.zeros((4, 4), np.float32)})
    with pytest.raises(SampleError, match=r"'k', camera 'front': the image is float32 \[4, 4\], not uint8"):
        adapter_of(processor).observed("k", broken, {})
    token = adapter_of(processor).placeholders[0]
    with pytest.raises(SampleError, match="in its text"):
        adapter_of(processor).observed("k", observation(text=f"hand {token}"), {})
    with pytest.raises(SampleError, match="the model reads 512"):
        adapter_of(processor).observed("k", observation(text="hand 0.5 " * 600), {})


def test_the_crop_is_the_middle_of_the_image_from_corner_to_corner():
    """A ramp in x: pixel x of the crop lies at (1 − √0.9)/2 · 99 + √0.9 · x of the whole."""
    ramp = np.broadcast_to((2 * np.arange(100, dtype=np.uint8))[None, :, None], (100, 100, 3))
    cropped = np.asarray(sight.middle(sight.from_array(ramp), 0.9))
    at = (1 - 0.9**0.5) / 2 * 99 + 0.9**0.5 * np.arange(100)
    assert cropped.shape == (100, 100, 3)
    assert np.abs(cropped[50, :, 0] - 2 * at).max() <= 1
    assert (cropped[:, 30] == cropped[0, 30]).all()
    assert np.asarray(sight.middle(sight.from_array(ramp.swapaxes(0, 1)), 0.9))[7, 3, 0] == cropped[3, 7, 0]


def test_an_adapter_with_a_crop_sees_less(processor):
    whole, cropped = (
        np.asarray(adapter_of(processor, crop=crop).observed("k", observation(), {}).views["student"]["images"][0])
        for crop in (False, True)
    )
    assert whole.shape == cropped.shape == (56, 56, 3) and (whole != cropped).any()


def test_tokens_and_actions_are_inverse_to_each_other(processor):
    adapter = adapter_of(processor)
    actions = CENTRES[[0, 10, 100, 254]].reshape(1, 4)
    ids = adapter.ids(actions)
    assert all(adapter.tokens.among.start <= id < adapter.tokens.among.stop for id in ids)
    assert adapter.actions(ids).tolist() == actions.tolist()
