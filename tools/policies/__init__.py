"""What can drive a robot in `tools/eval_robot.py`: our own models, servers, lerobot's policies, experts, recordings.

A policy sees seats, the episodes that wait for a decision, and answers each with a chunk of actions [C, size] in the
simulator's units. It is told when an episode begins, and may be asked for several at once.
"""

from pathlib import Path

from modalities.action.protocols import Protocol as Rules
from tools.policies.models import Lerobot, Model
from tools.policies.scripted import Expert, Nothing, Recorded
from tools.policies.seats import Policy
from tools.policies.served import Http, OpenPi


def looks(spec: str) -> bool:
    """Whether the policy of this name looks at pictures."""
    return not (spec in ("expert", "nothing") or spec.startswith("recorded:"))


def make(spec: str, *, size: int, rules: Rules | None, recipe: str | None, holds: bool = False) -> Policy:
    """The policy of a name, see eval_robot.py. holds: actions are the state that is to be. Raises ValueError for a name
    that is none."""
    if spec == "expert":
        return Expert()
    if spec == "nothing":
        return Nothing(None if holds else [0.0] * (size - 1) + [-1.0 if rules else 0.0], 8)
    if spec.startswith("recorded:"):
        return Recorded(Path(spec.removeprefix("recorded:")))
    if spec.startswith(("http://", "https://")):
        return Http(spec, rules)
    if spec.startswith(("ws://", "wss://")):
        return OpenPi(spec, rules)
    if spec.startswith("lerobot:"):
        return Lerobot(Path(spec.removeprefix("lerobot:")), rules)
    if Path(spec).is_dir():
        return Model(Path(spec), recipe, rules)
    raise ValueError(
        f"there is no policy {spec!r}; there are: a model folder, http://…, ws://…, lerobot:FOLDER, "
        "recorded:FILE.jsonl, expert, nothing"
    )
