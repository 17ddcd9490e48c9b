"""A table seen from above, in numpy alone: a hand and two coloured blocks. It answers in a millisecond or two,
for where a simulator would be in the way of what is looked at.

The table is the unit square. A step moves the hand by up to `STEP`; the third number closes it where it is over 0.
"""

import numpy as np

from modalities.action.environment import Observation, chunk_of

COLOURS = {"red": (210, 50, 45), "green": (60, 160, 70), "blue": (50, 90, 210), "yellow": (230, 190, 40)}
INSTRUCTIONS = {
    "reach": "touch the {} block",
    "push": "push the {} block onto the mark",
    "carry": "carry the {} block to the mark",
}
STEP, PARTS = 0.1, 5  # of the table's width in one action, and the parts of it between which contact is looked at
HAND, BLOCK = 0.04, 0.07  # half their width
TOUCH, NEAR = HAND + BLOCK, 0.06  # between centres, where they meet, and where a block is on the mark
APART = 0.24  # at the start, at least, between all things


class Toy:
    size = 3
    tasks = tuple(INSTRUCTIONS)

    def __init__(self, horizon: int = 40, pixels: int = 56):
        self.horizon, self.pixels = horizon, pixels

    def reset(self, task: str, start: int) -> Observation:
        if task not in self.tasks:
            raise ValueError(f"there is no task {task!r}; there are: {', '.join(self.tasks)}")
        if start < 0:
            raise ValueError(f"start states are numbered from 0 on, not {start}")
        rng = np.random.default_rng([self.tasks.index(task), start])
        self.task, self.steps, self.closed, self.success = task, 0, False, False
        self.colours = [str(name) for name in rng.permutation(list(COLOURS))[:2]]
        self.hand, self.block, self.other, self.mark = scattered(rng)
        return self.observed()

    def observed(self) -> Observation:
        done = self.success or self.steps >= self.horizon
        return {
            "images": {} if done else {"top": self.picture(self.pixels)},
            "state": np.array([*self.hand, self.closed], np.float32),
            "text": self.text(),
            "instruction": INSTRUCTIONS[self.task].format(self.colours[0]),
            "success": self.success,
            "done": done,
            "steps": self.steps,
        }

    def text(self) -> str:
        """Where everything is, from 0 to 255."""
        places = {"hand": self.hand, "mark": self.mark}
        places |= {f"{name} block": at for name, at in zip(self.colours, (self.block, self.other), strict=True)}
        told = [f"{name} {x} {y}" for name, (x, y) in ((n, np.rint(255 * at).astype(int)) for n, at in places.items())]
        return f"{', '.join(told)}, hand {'closed' if self.closed else 'open'}"

    def act(self, actions: np.ndarray) -> Observation:
        for action in np.clip(chunk_of(actions, self.size).astype(np.float64), -1, 1):
            if self.success or self.steps >= self.horizon:
                break
            self.step(action)
        return self.observed()

    def step(self, action: np.ndarray) -> None:
        reached = np.linalg.norm(self.hand - self.block) < TOUCH
        held = bool(self.task == "carry" and action[2] > 0 and reached)
        self.closed = bool(action[2] > 0)
        for _ in range(PARTS):
            before = self.hand
            self.hand = np.clip(before + STEP / PARTS * action[:2], 0, 1)
            if held:
                self.block = np.clip(self.block + self.hand - before, 0, 1)
            elif self.task == "push":
                self.block = np.clip(pushed(self.hand, self.block), 0, 1)
        self.steps += 1
        goal, within = (self.hand, TOUCH) if self.task == "reach" else (self.mark, NEAR)
        self.success = bool(np.linalg.norm(self.block - goal) < within)

    def frame(self) -> np.ndarray:
        return self.picture(224)

    def picture(self, pixels: int) -> np.ndarray:
        """uint8 [pixels, pixels, 3]: a dark ring for the mark, squares for blocks, a disc for the hand."""
        x, y = (np.arange(pixels) + 0.5) / pixels, (np.arange(pixels)[:, None] + 0.5) / pixels
        image = np.full((pixels, pixels, 3), 225, np.uint8)
        ring = np.hypot(x - self.mark[0], y - self.mark[1])
        image[(ring < BLOCK) & (ring > BLOCK - 0.03)] = 90
        for name, at in zip(self.colours, (self.block, self.other), strict=True):
            image[np.maximum(abs(x - at[0]), abs(y - at[1])) < BLOCK * 0.8] = COLOURS[name]
        image[np.hypot(x - self.hand[0], y - self.hand[1]) < HAND] = 160 if self.closed else 20
        return image

    def expert(self) -> np.ndarray:
        if self.task == "push":
            return np.array([*toward(self.hand, behind(self.hand, self.block, self.mark)), -1.0])
        hold = self.hand - self.block
        if self.task == "carry" and np.linalg.norm(hold) < TOUCH * 0.8:
            return np.array([*toward(self.hand, self.mark + hold), 1.0])
        return np.array([*toward(self.hand, self.block), -1.0])

    def close(self) -> None:
        """Nothing is held."""


def scattered(rng: np.random.Generator) -> np.ndarray:
    """Four places [4, 2], none near another, with room around them."""
    while True:
        places = rng.uniform(0.2, 0.8, (64, 4, 2))
        gaps = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1) + np.eye(4)
        if (apart := (gaps >= APART).all((1, 2))).any():
            return places[apart.argmax()]


def pushed(hand: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Where a block is once the hand has shoved it out of its way."""
    gap = block - hand
    distance = np.linalg.norm(gap)
    return block if distance >= TOUCH or distance == 0 else hand + gap * (TOUCH / distance)


def toward(hand: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """As far as one step goes, in a straight line."""
    gap = (goal - hand) / STEP
    return gap / max(1.0, float(np.linalg.norm(gap)))


def behind(hand: np.ndarray, block: np.ndarray, mark: np.ndarray) -> np.ndarray:
    """Where a hand goes next that pushes a block to the mark: around the block, behind it, and on."""
    ahead = (mark - block) / np.linalg.norm(mark - block)
    side = np.array([-ahead[1], ahead[0]])
    along, across = (hand - block) @ ahead, (hand - block) @ side
    if along < 0 and abs(across) < 0.02:
        return mark - ahead * TOUCH
    if along < -TOUCH:
        return block - ahead * (TOUCH + 0.03)
    out = np.copysign(TOUCH + 0.04, across) * side
    return block + out + ahead * (along if abs(across) < TOUCH else -TOUCH - 0.05)
