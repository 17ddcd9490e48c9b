"""What a simulated robot is to the rest: start states, observations, chunks of actions. Standard library and numpy
only, for a worker may run in another Python that has a simulator and nothing of ours.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, TypedDict

import numpy as np

ENVIRONMENTS = {  # name in a recipe -> module:class, imported in the worker alone
    "toy": "modalities.action.toy:Toy",
    "metaworld": "modalities.action.metaworld:MetaWorld",
    "libero": "modalities.action.libero:Libero",
    "robotwin": "modalities.action.robotwin:RoboTwin",
}


class AssetError(RuntimeError):
    """Something the simulator needs is missing: a mesh, a driver, a package. The message says what, and where from."""


class Observation(TypedDict):
    """What is seen before a decision. Images are rendered once for it, not at every step in between."""

    images: dict[str, np.ndarray]  # camera -> uint8 [height, width, 3]
    state: np.ndarray  # float32 [S]: proprioception, as the dataset of this robot has it
    text: str  # the whole state in words and numbers: the privileged view; empty where there is none
    instruction: str
    success: bool  # the task is done, at some step until now
    done: bool  # no more actions are taken: success, or the horizon
    steps: int  # actions taken in this episode


class Environment(Protocol):
    """One robot in one world. It may have `facts`, which stand beside its results: how it draws, what its "actions"
    are, and under "differs" a list of what makes results not comparable with published ones."""

    size: int  # numbers in an action
    tasks: tuple[str, ...]

    def reset(self, task: str, start: int) -> Observation:
        """The start state number `start` of a task: the same number is the same state, on any machine."""
        ...

    def act(self, actions: np.ndarray) -> Observation:
        """Take a chunk [C, size] of actions, in the simulator's own units, and stop where the episode is done."""
        ...

    def frame(self) -> np.ndarray:
        """A picture for people, uint8 [height, width, 3]."""
        ...

    def expert(self) -> np.ndarray:
        """The scripted expert's action [size] here and now. Raises AssetError where this simulator has none."""
        ...

    def close(self) -> None: ...


def chunk_of(actions: Any, size: int) -> np.ndarray:
    """Actions as a chunk [C, size], C at least 1. Raises ValueError for another shape, and for numbers that are none:
    a simulator would take them, and be somewhere else afterwards."""
    actions = np.asarray(actions)
    if actions.ndim != 2 or not len(actions) or actions.shape[1] != size:
        raise ValueError(f"a chunk of actions is [C, {size}] finite numbers, not one of shape {actions.shape}")
    if not np.isfinite(actions).all():
        raise ValueError(f"a chunk of actions is [C, {size}] finite numbers, not one with NaN or infinity in it")
    return actions


def make(name: str, options: Mapping[str, Any]) -> Environment:
    """An environment by its name in ENVIRONMENTS, or as module:class. Raises AssetError, naming what is missing."""
    where = name if ":" in name else ENVIRONMENTS.get(name)
    if where is None:
        raise AssetError(f"there is no environment {name!r}; there are: {', '.join(ENVIRONMENTS)}, or module:class")
    module, _, cls = where.partition(":")
    try:
        return getattr(importlib.import_module(module), cls)(**options)
    except ImportError as error:
        raise AssetError(
            f"environment {name!r} needs a package that is not here ({error}); see configs/README.md"
        ) from error
