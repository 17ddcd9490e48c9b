"""What others did, in the place of what the student would do: nothing is sampled, and no simulator runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from xmodal_opd.rollout.env import Acting
from xmodal_opd.types import Pair, Rollout, Sampling


@dataclass(frozen=True)
class Demonstrated:
    """One rollout for each decision, of its `meta.actions`. Their log-probs are 0, for what was done was certain; the
    trainer computes its own."""

    adapter: Acting
    exact: ClassVar[bool] = False

    def generate(self, pairs: Sequence[Pair], samplings: Mapping[str, Sampling], seed: int) -> dict[str, list[Rollout]]:
        """The same actions for every sampling, whose view alone matters, pair by pair."""
        return {
            name: [self.rollout(pair, group, sampling.view) for group, pair in enumerate(pairs)]
            for name, sampling in samplings.items()
        }

    def rollout(self, pair: Pair, group: int, view: str) -> Rollout:
        tokens = self.adapter.ids(pair.meta["actions"])
        size = self.adapter.size(pair.views[view])
        return Rollout(pair, tokens, [0.0] * len(tokens), self.adapter.decode(tokens), True, group, size)

    def sync(self) -> None:
        """Nothing to do: no model answers."""
