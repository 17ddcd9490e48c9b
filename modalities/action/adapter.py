"""What a robot sees as views of a chat model, and what the model says as actions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modalities.action.environment import Observation
from modalities.action.tokens import ActionTokens
from modalities.chat import DERIVED, ChatAdapter, derived
from modalities.vision import media as sight
from xmodal_opd.types import Inputs, Pair, SampleError

QUESTION = "In: What action should the robot take to {}?\nOut:"  # OpenVLA's, arXiv:2406.09246


class ActionAdapter(ChatAdapter):
    """Observations as pairs: the student sees cameras, the teacher reads the state in words. And tokens as actions."""

    def __init__(
        self,
        processor: Any,
        max_tokens: int,
        *,
        tokens: ActionTokens,
        cameras: Sequence[str],
        image_size: int | None = None,
        crop: bool = False,
        proprio: bool = False,
        privileged: bool = True,
        **chat: Any,
    ):
        """cameras: which images of an observation are seen, in this order. image_size: pixels of both sides of what the
        processor gets; None leaves them as they are. crop: only the middle 0.9 of its area, as OpenVLA sees after
        training on random crops. proprio: the numbers of the state before the question. privileged: whether the
        teacher's view is made. chat: what ChatAdapter takes.
        """
        super().__init__(processor, max_tokens, "image" if cameras else "text", **chat)
        self.tokens, self.cameras, self.image_size, self.crop = tokens, tuple(cameras), image_size, crop
        self.proprio, self.privileged = proprio, privileged

    def observed(self, key: str, observation: Observation, meta: Mapping[str, Any]) -> Pair:
        """One decision: "student" is images and question, "teacher" the state's text and question.

        Raises ValueError for a camera that is not there and for a teacher's view without text, SampleError for a view
        that the model cannot read.
        """
        question = QUESTION.format(observation["instruction"].lower())
        images = [self.image(key, observation["images"], name) for name in self.cameras]
        if self.proprio and not len(observation["state"]):
            raise ValueError(f"decision {key!r} has no numbers of its state; set robot.proprio=false")
        numbers = f"{' '.join(f'{x:.3f}' for x in observation['state'])}\n" if self.proprio else ""
        views = {"student": self.asked(key, numbers + question, images)}
        if self.privileged:
            views["teacher"] = self.asked(key, f"{text_of(key, observation)}\n{question}")
        views |= {name: derived(name, views["student"]) for name in self.derive if name in DERIVED}
        return Pair(key, views, None, dict(meta))

    def pair(self, sample: Mapping[str, Any]) -> Pair:
        """A decision that others made, as `write_decisions` keeps it, seen as one in a simulator is: by the cameras and
        in the size that the robot's student sees. Raises SampleError, also for actions that no tokens stand for."""
        key, meta = sample["__key__"], sample["meta"]
        if missing := [name for name in ("observation", "actions") if name not in meta]:
            made = (
                "tools/prepare_shards.py lerobot makes such shards; those of an older version are to be deleted first"
            )
            raise SampleError(f"sample {key!r} shows no robot: its meta has no {missing[0]!r}; {made}")
        shown = {name.rpartition(".")[0]: np.asarray(sight.decode(data)) for name, data in sample["media"].items()}
        seen: Any = {**meta["observation"], "images": shown}
        if absent := [name for name in self.cameras if name not in shown]:
            have = ", ".join(sorted(shown)) or "none"
            raise SampleError(
                f"sample {key!r} was not seen by robot.cameras {absent[0]!r}; its shards have: {have}; "
                "tools/prepare_shards.py lerobot --camera NAME=COLUMN gives them other names"
            )
        self.ids(meta["actions"])
        try:
            return self.observed(key, seen, meta)
        except ValueError as error:
            raise SampleError(str(error)) from error

    def asked(self, key: str, text: str, images: Sequence[Any] = ()) -> Inputs:
        """The view of one user message, images first."""
        self.check_text(key, text)
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        return self.composed(key, [{"role": "user", "content": parts}], (), images)

    def image(self, key: str, images: Mapping[str, np.ndarray], camera: str) -> Any:
        if camera not in images:
            have = ", ".join(sorted(images)) or "none"
            raise ValueError(
                f"the robot has no camera {camera!r}; there are: {have}; others that a simulator has it draws when its "
                "options name them: robot.options.camera on metaworld, robot.options.cameras on libero and robotwin"
            )
        try:
            whole = sight.from_array(images[camera])
        except SampleError as error:
            raise SampleError(f"decision {key!r}, camera {camera!r}: {error}") from None
        whole = whole if self.image_size is None else sight.scaled(whole, self.image_size)
        return sight.middle(whole, 0.9) if self.crop else whole

    def actions(self, tokens: Sequence[int]) -> np.ndarray:
        """[C, size] in the simulator's units. Raises SampleError, see `ActionTokens`."""
        return self.tokens.actions(tokens)

    def ids(self, actions: np.ndarray) -> list[int]:
        """The tokens of actions [C, size] in the simulator's units. Raises SampleError, see `ActionTokens`."""
        return self.tokens.ids(actions)


def text_of(key: str, observation: Observation) -> str:
    if not observation["text"]:
        raise ValueError(
            f"decision {key!r} has no text of its state, which the teacher's view is made of; take an environment that "
            "tells its state, or teachers that read the view 'student' only, and where there is none "
            "eval.teacher={view: student}"
        )
    return observation["text"]
