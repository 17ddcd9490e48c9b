"""Actions as tokens: 256 bins for every number, at the end of a window of the vocabulary, and a dataset's statistics
between a model's [−1, 1] and a simulator's own units.

OpenVLA, arXiv:2406.09246, whose 256 values are the edges of 255 bins: the last two ids decode to one value. A chunk of
actions is `chunk` · `size` tokens, as in OpenVLA-OFT, arXiv:2502.19645.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xmodal_opd.types import SampleError

BINS = 256
EDGES = np.linspace(-1, 1, BINS)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2  # 255
LEAST = 1e-8  # added to a width, as published
FILES = ("dataset_statistics.json", "config.json")  # of a checkpoint, where it keeps its statistics

Kind = Literal["bounds", "quantiles", "gaussian"]
KINDS: dict[str, tuple[str, str]] = {"bounds": ("min", "max"), "quantiles": ("q01", "q99"), "gaussian": ("mean", "std")}


@dataclass(frozen=True)
class Normalizer:
    """Numbers of an action between [−1, 1] and the dataset's units, one by one; where `mask` is false they are raw.

    bounds, quantiles: ½ (a + 1)(high − low + 1e-8) + low. gaussian: a (std + 1e-8) + mean, with mean as `low` and std
    as `high`.
    """

    kind: Kind
    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.low) == len(self.high) == len(self.mask):
            low, high = KINDS[self.kind]
            sizes = f"{low} of {len(self.low)}, {high} of {len(self.high)} and mask of {len(self.mask)} numbers"
            raise ValueError(f"the statistics of actions have {sizes}; they need one of each for every number")

    def undo(self, actions: np.ndarray) -> np.ndarray:
        """[.., size] in [−1, 1] -> the dataset's units."""
        low, high = np.array(self.low), np.array(self.high)
        if self.kind == "gaussian":
            return np.where(self.mask, actions * (high + LEAST) + low, actions)
        return np.where(self.mask, 0.5 * (actions + 1) * (high - low + LEAST) + low, actions)

    def apply(self, actions: np.ndarray) -> np.ndarray:
        """[.., size] in the dataset's units -> [−1, 1], clipped, but for the gaussian; 0 where low is high."""
        low, high = np.array(self.low), np.array(self.high)
        if self.kind == "gaussian":
            return np.where(self.mask, (actions - low) / (high + LEAST), actions)
        scaled = np.clip(2 * (actions - low) / (high - low + LEAST) - 1, -1, 1)
        return np.where(self.mask, np.where(low == high, 0, scaled), actions)


def load_normalizer(source: str | Path, key: str | None, kind: Kind = "quantiles") -> Normalizer:
    """The statistics `key` of a checkpoint's folder or a JSON file: {key: {"action": {"q01": […], …, "mask": […]}}}, in
    a config.json under "norm_stats". The suffix "_no_noops" is tried as well; where there is one key, None means it.

    Raises ValueError when there are none of that key or kind, naming those that exist, and where they are no numbers.
    """
    every = statistics(Path(source))
    wanted = [*every] if key is None and len(every) == 1 else [key, f"{key}_no_noops"]
    name = next((name for name in wanted if name in every), None)
    if name is None:
        have = ", ".join(sorted(every))
        asked = (
            "action statistics of several datasets, and a key must name one"
            if key is None
            else f"no action statistics {key!r}"
        )
        raise ValueError(f"{source} has {asked}; there are: {have}")
    found, (low, high) = part(every[name], "action", f"the statistics {name!r} of {source}"), KINDS[kind]
    if low not in found or high not in found:
        have = ", ".join(sorted(found)) or "nothing"
        raise ValueError(f"the action statistics {name!r} of {source} have no {low} and {high}; there are: {have}")
    mask = found.get("mask", [True] * len(numbers(found[low])))
    if not numbers(found[low]) or not numbers(found[high]) or not isinstance(mask, list):
        raise ValueError(
            f"the action statistics {name!r} of {source} have a {low}, {high} or mask that is no list of numbers"
        )
    return Normalizer(kind, tuple(found[low]), tuple(found[high]), tuple(mask))


def statistics(source: Path) -> Mapping[str, Any]:
    """What a file or a checkpoint's folder says of its datasets, by key. Raises ValueError when it says nothing."""
    files = [source / name for name in FILES] if source.is_dir() else [source]
    for file in files:
        if file.is_file():
            try:
                found = json.loads(file.read_text())
            except ValueError as error:
                raise ValueError(f"{file} is no JSON: {error}") from None
            every = part(found, "norm_stats", str(file), {} if file.name == "config.json" else found)
            if every:
                return every
    raise ValueError(
        f"{source} has no action statistics; give a JSON file of them, or the folder of a checkpoint with "
        "dataset_statistics.json, or with norm_stats in its config.json"
    )


def part(found: Any, name: str, where: str, otherwise: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """What is under a name, or what is to be where nothing is. Raises ValueError where that is no mapping."""
    value = found.get(name, otherwise or {}) if isinstance(found, Mapping) else found
    if not isinstance(value, Mapping):
        raise ValueError(
            f'{where}: {value!r:.40} stands where statistics do; they are {{KEY: {{"action": {{"q01": […], …}}}}}}'
        )
    return value


def numbers(value: Any) -> list[float]:
    """The value, if it is a list of numbers; otherwise nothing."""
    return value if isinstance(value, list) and all(isinstance(x, int | float) for x in value) else []


@dataclass(frozen=True)
class Gripper:
    """The last number of an action, x in the dataset, as the simulator takes it: scale · x + shift, or its sign."""

    scale: float = 1.0
    shift: float = 0.0
    binary: bool = False

    def undo(self, actions: np.ndarray) -> np.ndarray:
        """[.., size] of the dataset -> of the simulator."""
        value = self.scale * actions[..., -1:] + self.shift
        return np.concatenate([actions[..., :-1], np.sign(value) if self.binary else value], -1)

    def apply(self, actions: np.ndarray) -> np.ndarray:
        """[.., size] of the simulator -> of the dataset."""
        return np.concatenate([actions[..., :-1], (actions[..., -1:] - self.shift) / self.scale], -1)


GRIPPERS = {
    "keep": Gripper(),
    "openvla": Gripper(-2, 1, True),  # data: 1 open, 0 closed; simulator: −1 open, 1 closed. −sign(2x − 1), as OFT does
}


@dataclass(frozen=True)
class ActionTokens:
    """A chunk of actions as ids. `end` is the id after the last of the window."""

    end: int
    chunk: int
    size: int
    normalizer: Normalizer | None = None
    gripper: Gripper = GRIPPERS["keep"]

    def __post_init__(self) -> None:
        if self.end < BINS:
            raise ValueError(f"actions need {BINS} ids, and the window would end at id {self.end}; give a later end")
        if self.normalizer and len(self.normalizer.low) != self.size:
            have = len(self.normalizer.low)
            raise ValueError(f"the statistics are of actions of {have} numbers, but the robot takes {self.size}")

    @property
    def among(self) -> slice:
        """The window of the vocabulary that action tokens are chosen from."""
        return slice(self.end - BINS, self.end)

    @property
    def width(self) -> int:
        """Tokens of a whole chunk."""
        return self.chunk * self.size

    def ids(self, actions: np.ndarray) -> list[int]:
        """Tokens of at most a chunk of actions [C, size] in the simulator's units.

        Raises SampleError for another shape, and for numbers that are none.
        """
        actions = np.asarray(actions, np.float64)
        if actions.ndim != 2 or actions.shape[1] != self.size or not 1 <= len(actions) <= self.chunk:
            wanted = f"[1 to {self.chunk}, {self.size}]"
            raise SampleError(f"actions have the shape {list(actions.shape)}; one decision of this robot is {wanted}")
        if not np.isfinite(actions).all():
            step, place = np.argwhere(~np.isfinite(actions))[0]
            raise SampleError(f"number {place} of action {step} is {actions[step, place]}, which no token stands for")
        actions = self.gripper.apply(actions)
        if self.normalizer:
            actions = self.normalizer.apply(actions)
        return (self.end - np.digitize(np.clip(actions, -1, 1), EDGES)).reshape(-1).tolist()

    def actions(self, ids: Sequence[int]) -> np.ndarray:
        """Actions [C, size] in the simulator's units: the centres of their bins.

        Raises SampleError for what is not at most a chunk of whole actions, and for ids outside the window.
        """
        if not ids or len(ids) % self.size or len(ids) > self.width:
            wanted = f"1 to {self.chunk} actions of {self.size}"
            raise SampleError(f"{len(ids)} tokens are no whole actions; one decision of this robot is {wanted}")
        if outside := [id for id in ids if not self.end - BINS <= id < self.end]:
            raise SampleError(f"token {outside[0]} is no action: those are ids {self.end - BINS} to {self.end - 1}")
        places = np.clip(self.end - np.asarray(ids) - 1, 0, len(CENTRES) - 1)
        actions = CENTRES[places].reshape(-1, self.size)
        if self.normalizer:
            actions = self.normalizer.undo(actions)
        if not np.isfinite(actions).all():
            raise SampleError("the action is not finite: the dataset's statistics have a number that is none")
        return self.gripper.undo(actions)
