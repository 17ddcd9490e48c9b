"""What can drive a robot in `tools/eval_robot.py`: our own models, servers, lerobot's policies, experts, recordings.

A policy sees seats, the episodes that wait for a decision, and answers each with a chunk of actions [C, size] in the
simulator's units. It is told when an episode begins, and may be asked for several at once.
"""

import hashlib
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np

from modalities.action import clients
from modalities.action.environment import Observation
from modalities.action.protocols import Protocol as Rules
from xmodal_opd import wire


class Unusable(ValueError):
    """What a policy answered is no chunk of actions. The episode has failed; the others go on."""


@dataclass(frozen=True)
class Seat:
    """One episode that waits for a decision."""

    key: str  # task/start
    task: str
    start: int
    seen: Observation
    expert: Callable[[], np.ndarray]  # what the simulator's own script would do here


class Policy(Protocol):
    @property
    def identity(self) -> Mapping[str, Any]:
        """What results depend on, beside its name."""
        ...

    @property
    def threads(self) -> bool:
        """Whether `act` may be called by several threads at once."""
        ...

    def reset(self, key: str) -> None:
        """An episode begins, or begins again."""
        ...

    def act(self, seats: Sequence[Seat]) -> list[np.ndarray]: ...


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


# ---- servers


class Http:
    """tools/serve_policy.py, or whatever answers as it does."""

    threads = True

    def __init__(self, url: str, rules: Rules | None):
        self.url, self.rules = url.rstrip("/"), rules
        once = httpx.Limits(max_keepalive_connections=0)  # a connection for each decision: none is left open at the end
        self.client = httpx.Client(timeout=httpx.Timeout(600.0, connect=10.0), limits=once, trust_env=False)
        about = json.loads(self.asked("GET", "/"))
        self.identity, self.units = about.get("identity", {}), about.get("units")
        self.identity = {"policy": about.get("policy"), **self.identity}

    def reset(self, key: str) -> None:
        self.asked("POST", "/reset", {"episode": key})

    def act(self, seats: Sequence[Seat]) -> list[np.ndarray]:
        return [self.answered(seat) for seat in seats]

    def answered(self, seat: Seat) -> np.ndarray:
        seen = {**seat.seen, "images": prepared(seat.seen["images"], self.rules)}
        message = {"episode": seat.key, "task": seat.task, "start": seat.start, "observation": seen}
        actions = wire.receive(io.BytesIO(self.asked("POST", "/act", message)))
        return in_units(actions, self.rules if self.units != "simulator" else None)

    def asked(self, method: str, path: str, message: Any = None) -> bytes:
        """Raises Unreachable when nobody answers, ValueError for what the server refuses."""
        out = io.BytesIO()
        if message is not None:
            wire.send(out, message)
        try:
            reply = self.client.request(method, self.url + path, content=out.getvalue() or None)
        except httpx.HTTPError as error:
            raise Unreachable(self.url, error) from None
        if reply.status_code != 200:
            raise ValueError(f"the policy server at {self.url} refuses {path} ({reply.status_code}): {reply.text:.300}")
        return reply.content


class OpenPi:
    """openpi's server over a websocket, one connection for each thread."""

    threads = True

    def __init__(self, url: str, rules: Rules | None):
        if rules is None:
            raise ValueError("openpi's websocket protocol is known for LIBERO; serve other policies over http://")
        self.url, self.rules, self.here = url, rules, threading.local()
        about = self.connection().about
        self.units = about.get("units")
        self.identity = {name: value for name, value in about.items() if isinstance(value, str | int | float)}

    def connection(self) -> clients.OpenPi:
        if not hasattr(self.here, "connection"):
            try:
                self.here.connection = clients.OpenPi(self.url, 600.0)
            except OSError as error:
                raise Unreachable(self.url, error) from None
        return self.here.connection

    def reset(self, key: str) -> None: ...

    def act(self, seats: Sequence[Seat]) -> list[np.ndarray]:
        return [self.answered(seat) for seat in seats]

    def answered(self, seat: Seat) -> np.ndarray:
        images = prepared(seat.seen["images"], self.rules)
        message = {
            "observation/image": images["agentview"],
            "observation/wrist_image": images["robot0_eye_in_hand"],
            "observation/state": np.asarray(seat.seen["state"]),
            "prompt": seat.seen["instruction"],
        }
        try:
            actions = self.connection().infer(message)
        except (OSError, EOFError, TimeoutError, *clients.broken()) as error:
            raise Unreachable(self.url, error) from None
        return in_units(actions, self.rules if self.units != "simulator" else None)


class Unreachable(RuntimeError):
    def __init__(self, url: str, error: Exception):
        why = str(error) or type(error).__name__
        super().__init__(f"no policy server answers at {url} ({why}); start it, and run the same command again")


def prepared(images: Mapping[str, np.ndarray], rules: Rules | None) -> dict[str, np.ndarray]:
    """Pictures as the protocol shows them to a model that is served; cropping is the model's."""
    if rules is None or rules.resize is None:
        return dict(images)
    from modalities.vision import media

    return {name: media.shown(image, rules.resize, rules.jpeg, rules.lobes) for name, image in images.items()}


def in_units(actions: np.ndarray, rules: Rules | None) -> np.ndarray:
    """Actions of a server as the simulator takes them, where the protocol's models speak otherwise."""
    if rules is None or rules.gripper == "env":
        return actions
    return np.concatenate([actions[..., :-1], -np.sign(2 * actions[..., -1:] - 1)], -1)


# ---- models


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
        from xmodal_opd.rollout.env import Episode
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


class Together:
    """A policy for one thread at a time, asked by many: who waits meanwhile is answered in one batch."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.waiting: list[tuple[Seat, Future[np.ndarray]]] = []
        self.guard, self.busy = threading.Lock(), threading.Lock()

    def act(self, seat: Seat) -> np.ndarray:
        if self.policy.threads:
            return self.policy.act([seat])[0]
        answer: Future[np.ndarray] = Future()
        with self.guard:
            self.waiting.append((seat, answer))
        with self.busy:
            with self.guard:
                some, self.waiting = self.waiting, []
            if some:
                self.answer(some)
        return answer.result()

    def answer(self, some: Sequence[tuple[Seat, Future[np.ndarray]]]) -> None:
        try:
            answers = self.policy.act([seat for seat, _ in some])
        except Exception as error:  # all who wait must hear of it
            if isinstance(error, Unusable) and len(some) > 1:  # but for what one of them did: each is asked alone
                for one in some:
                    self.answer([one])
                return
            for _, future in some:
                future.set_exception(error)
            return
        for (_, future), actions in zip(some, answers, strict=True):
            future.set_result(actions)


# ---- which one


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
