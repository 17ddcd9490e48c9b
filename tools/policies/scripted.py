"""Policies that are no model: nothing, the simulator's own script, and what was recorded."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.policies.seats import Seat, Unusable


class Nothing:
    """The policy that fails: it stays where it is."""

    identity: Mapping[str, Any] = {}
    threads = True

    def __init__(self, rest: Sequence[float] | None, chunk: int):
        """rest: the action that does nothing; None where actions are what the state is to be, which then stays."""
        self.rest, self.chunk = rest, chunk

    def reset(self, key: str) -> None: ...

    def act(self, seats: Sequence[Seat]) -> list[np.ndarray]:
        rests = [seat.seen["state"] if self.rest is None else self.rest for seat in seats]
        return [np.tile(np.asarray(rest, np.float64), (self.chunk, 1)) for rest in rests]


class Expert:
    """The simulator's own script, one action at a time."""

    identity: Mapping[str, Any] = {}
    threads = True

    def reset(self, key: str) -> None: ...

    def act(self, seats: Sequence[Seat]) -> list[np.ndarray]:
        return [np.asarray(seat.expert())[None] for seat in seats]


class Recorded:
    """Actions of a JSONL file, as `eval_robot.py --record` writes it: {"task", "start", "actions"} a line."""

    threads = True

    def __init__(self, path: Path):
        data = path.read_bytes()
        self.identity = {"sha256": hashlib.sha256(data).hexdigest()}
        try:
            lines = [json.loads(line) for line in data.splitlines()]
            self.actions = {f"{r['task']}/{r['start']}": np.array(r["actions"], np.float64) for r in lines}
        except (ValueError, KeyError, TypeError) as error:
            why = f"every line has task, start and actions ({error})"
            raise ValueError(f"{path} is no recording, where {why}") from None
        self.path = path

    def reset(self, key: str) -> None: ...

    def act(self, seats: Sequence[Seat]) -> list[np.ndarray]:
        return [self.rest(seat) for seat in seats]

    def rest(self, seat: Seat) -> np.ndarray:
        left = self.actions.get(seat.key, np.zeros((0, 0)))[seat.seen["steps"] :]
        if not len(left):
            raise Unusable(f"{self.path} has no action for step {seat.seen['steps']}")
        return left
