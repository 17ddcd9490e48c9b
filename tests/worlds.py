"""Worlds that go wrong, for workers to run: the toy, and one start state of it that dies, hangs or raises."""

import os
import time
from pathlib import Path

from modalities.action.toy import Toy


class Broken(Toy):
    """Start state `at` of the task "push" goes wrong, the first `times` times."""

    def __init__(self, how: str, marks: str, at: int = 1, times: int = 1):
        super().__init__()
        self.how, self.marks, self.at, self.times = how, Path(marks), at, times

    def reset(self, task, start):
        if task == "push" and start == self.at and len(list(self.marks.iterdir())) < self.times:
            (self.marks / str(time.time_ns())).touch()
            if self.how == "dies":
                os._exit(9)
            if self.how == "hangs":
                time.sleep(60)
            raise RuntimeError("the arm fell off")
        return super().reset(task, start)
