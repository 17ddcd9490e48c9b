"""How published numbers were measured: what surrounds a policy in an evaluation, as data. Standard library only.

Read from the evaluation scripts of OpenVLA-OFT (arXiv:2502.19645), openpi (arXiv:2410.24164), SimpleVLA-RL
(arXiv:2509.09674) and lerobot 0.6.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate on LIBERO.

    fixtures: LIBERO draws the places of cabinets and stoves anew at each reset, some centimetres apart, and its initial
    states do not hold them; so they depend on how often a simulator was reset since it was seeded. "turn": one
    simulator for a task, seeded once, and episode k is its reset k; "first": each episode in a simulator of its own;
    "seed": seeded with seed + k before episode k.
    """

    horizons: Mapping[str, int] = field(default_factory=lambda: HORIZONS)
    episodes: int = 50  # of each task: initial state 0, 1, …
    wait: int = 10  # steps of nothing before the first decision
    seed: int = 0
    fixtures: str = "turn"
    pixels: int = 256  # as rendered; then turned by 180 degrees
    jpeg: bool = False  # whether they go through a JPEG file
    resize: int | None = None  # pixels a side of what the policy sees
    lobes: int = 3  # of the interpolation: 3 Lanczos, 1 bilinear
    crop: bool = False  # whether the model sees the middle nine tenths of the area; it is the model's to do
    chunk: int | None = None  # actions taken of those that a decision returns; None: all
    gripper: str = "env"  # what a served policy's last number is: "env" -1 opens, "openvla" 1 opens and 0 closes


PROTOCOLS = {
    "openvla_oft": Protocol(jpeg=True, resize=224, crop=True, chunk=8, gripper="openvla"),
    "openpi": Protocol(seed=7, resize=224, lobes=1, chunk=5),
    "simplevla_rl": Protocol(
        horizons=dict.fromkeys(HORIZONS, 512),
        fixtures="first",
        jpeg=True,
        resize=224,
        crop=True,
        chunk=8,
        gripper="openvla",
    ),
    "lerobot": Protocol(horizons={**HORIZONS, "libero_spatial": 280}, seed=1000, fixtures="seed"),
}
