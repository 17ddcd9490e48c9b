"""Policies behind servers: our own protocol over HTTP, and openpi's over a websocket."""

import io
import json
import threading
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from modalities.action import clients
from modalities.action.protocols import Protocol as Rules
from tools.policies.seats import Seat, prepared
from xmodal_opd import wire


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


def in_units(actions: np.ndarray, rules: Rules | None) -> np.ndarray:
    """Actions of a server as the simulator takes them, where the protocol's models speak otherwise."""
    if rules is None or rules.gripper == "env":
        return actions
    return np.concatenate([actions[..., :-1], -np.sign(2 * actions[..., -1:] - 1)], -1)
