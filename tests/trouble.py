"""Environments that misbehave, for workers of their own: they sleep, raise, print and die where a test asks them to."""

import os
import sys
import time

import numpy as np

from modalities.action.environment import AssetError
from modalities.action.toy import Toy


class Trouble(Toy):
    """The toy, and in its second chunk what `fault` says: in the first worker of a run only if `once` names a file that
    the first one makes."""

    def __init__(self, fault: str, once: str = ""):
        super().__init__(horizon=8)
        self.fault, self.once = fault, once

    def act(self, actions: np.ndarray):
        if self.steps and self.first():
            getattr(self, self.fault)()
        return super().act(actions)

    def first(self) -> bool:
        if not self.once:
            return True
        try:
            os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            return False

    def sleep(self):
        time.sleep(600)

    def die(self):
        print("the renderer fell over", file=sys.stderr, flush=True)
        os._exit(3)

    def refuse(self):
        raise ValueError("there is no such action")

    def stumble(self):
        raise ArithmeticError("the arm left the table")

    def noise(self):
        """Onto the messages: the only pipe above the standard streams."""
        for number in range(3, 20):
            try:
                os.write(number, b"warning: a driver prints where it likes")
            except OSError:
                continue

    def chatter(self):
        for _ in range(4000):
            print("simulated warning " * 10, file=sys.stderr)

    def stand(self):
        self.step = lambda action: None


class Missing:
    def __init__(self):
        raise AssetError("the meshes are not here; pip install meshes")
