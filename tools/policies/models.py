"""Policies that are a model in this process: one of ours, and lerobot's."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modalities.action.protocols import Protocol as Rules
from tools.policies.seats import Seat, Unusable, prepared


class Model:
    """A model of ours, with the recipe that says what its tokens do; its likeliest actions."""

    threads = False

    def __init__(self, folder: Path, recipe: str | None, rules: Rules | None):
        from xmodal_opd import config, inspect
        from xmodal_opd.cli import quiet
        from xmodal_opd.rollout.env import EnvSampler

        if recipe is None:
            raise ValueError(f"{folder} is a model; name the recipe it was trained by with --recipe")
        quiet()
        parts = inspect.measured(config.load(recipe, []), str(folder))
        if not isinstance(parts.sampler, EnvSampler):
            raise ValueError(f"{recipe} is not of modality action; name the recipe that {folder} was trained by")
        crop = getattr(parts.adapter, "crop", False)
        if rules and rules.crop != crop:
            part = "the middle nine tenths" if rules.crop else "the whole"
            raise ValueError(
                f"the protocol has models see {part} of a picture, and the recipe has robot.crop {crop}; take another "
                "--protocol, or the crop the model was trained with"
            )
        self.sampler, self.rules, self.identity = parts.sampler, rules, {"recipe": recipe, "files": fingerprint(folder)}
        self.episodes: dict[str, Any] = {}

    def reset(self, key: str) -> None:
        self.episodes.pop(key, None)

    def act(self, seats: Sequence[Seat]) -> list[np.ndarray]:
        from xmodal_opd.types import SampleError

        episodes = [self.episode(seat) for seat in seats]
        turns = [len(episode.decisions) for episode in episodes]
        try:
            self.sampler.decide(episodes, seed=0)
        except SampleError as error:
            for episode, turn in zip(episodes, turns, strict=True):
                del episode.decisions[turn:]
            raise Unusable(str(error)) from error
        for episode in episodes:  # what was seen is not needed again, and may be large
            episode.decisions[-1] = replace(episode.decisions[-1], pair=episode.pair)
        return [episode.actions for episode in episodes]

    def episode(self, seat: Seat) -> Any:
        from xmodal_opd.rollout.episode import Episode
        from xmodal_opd.types import Pair, Sampling

        if seat.key not in self.episodes:
            pair = Pair(seat.key, {}, None, {"task": seat.task, "start": seat.start})
            greedy = Sampling(temperature=0.0)
            self.episodes[seat.key] = Episode(len(self.episodes), "eval", greedy, pair, 0, filmed=False)
        episode = self.episodes[seat.key]
        episode.seen = {**seat.seen, "images": prepared(seat.seen["images"], self.rules)}
        return episode


class Lerobot:
    """A policy of lerobot's, from the folder that its `save_pretrained` made. A chunk is asked for at a time, so its
    own queue is not used: no policies that look at several observations."""

    threads = False

    def __init__(self, folder: Path, rules: Rules | None):
        try:
            from lerobot.configs.policies import PreTrainedConfig
            from lerobot.policies.factory import get_policy_class, make_pre_post_processors
            from lerobot.utils.import_utils import register_third_party_plugins
        except ImportError as error:
            raise ValueError(f"lerobot is not installed ({error}): pip install 'xmodal-opd[lerobot]'") from error
        files = {"files": fingerprint(folder)}
        register_third_party_plugins()
        config = PreTrainedConfig.from_pretrained(folder)
        if (seen := getattr(config, "n_obs_steps", 1)) > 1:
            raise ValueError(
                f"{folder} looks at {seen} observations at a time; only policies that look at one are asked"
            )
        if getattr(config, "temporal_ensemble_coeff", None) is not None:
            raise ValueError(
                f"{folder} averages its chunks over time (temporal_ensemble_coeff), which is not done here"
            )
        self.policy = get_policy_class(config.type).from_pretrained(folder).eval()
        overrides = {"device_processor": {"device": str(config.device)}}
        self.before, self.after = make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
        self.names = list(config.image_features)
        self.chunk = getattr(config, "n_action_steps", 1)
        self.state = getattr(config.robot_state_feature, "shape", None)
        self.rules, self.identity = rules, files

    def reset(self, key: str) -> None: ...

    def act(self, seats: Sequence[Seat]) -> list[np.ndarray]:
        import torch

        with torch.inference_mode():
            actions = self.policy.predict_action_chunk(self.before(self.batch(seats)))[:, : self.chunk]
            return list(self.after(actions).float().cpu().numpy())

    def batch(self, seats: Sequence[Seat]) -> dict[str, Any]:
        """Pictures in the order of the policy's own names, from 0 to 1, channels first."""
        import torch

        has = len(seats[0].seen["state"])
        if self.state and self.state != (has,):
            raise ValueError(f"the policy reads a state of {self.state[0]} numbers, and the robot has {has}")
        batch: dict[str, Any] = {"task": [seat.seen["instruction"] for seat in seats]}
        batch["observation.state"] = torch.tensor(np.stack([seat.seen["state"] for seat in seats]), dtype=torch.float32)
        images = [list(prepared(seat.seen["images"], self.rules).values()) for seat in seats]
        if any(len(some) < len(self.names) for some in images):
            raise ValueError(f"the policy looks at {', '.join(self.names)}, and the robot has {len(images[0])} cameras")
        for place, name in enumerate(self.names):
            pixels = np.stack([some[place] for some in images])
            batch[name] = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
        return batch


def fingerprint(folder: Path) -> str:
    """Of a model's files: their names and sizes, and what stands at both ends of each."""
    if not folder.is_dir():
        raise ValueError(f"there is no model folder {folder}")
    told = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".bin")):
        told.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            told.update(file.read(2**20))
            file.seek(max(0, path.stat().st_size - 2**20))
            told.update(file.read())
    return told.hexdigest()
