#!/usr/bin/env python
"""Serve a policy to simulators on this machine: over HTTP for tools/eval_robot.py, over websockets as openpi and
RoboTwin's XPolicyLab speak, and over TCP as RoboTwin's own evaluation does.

    python tools/serve_policy.py RUN/checkpoints/step-000020 --recipe configs/vla_opd.yaml --size 4 --port 8000
    python tools/eval_robot.py --suite metaworld --policy http://127.0.0.1:8000 --output runs/served

The port is HTTP's; openpi's, TCP's and XPolicyLab's follow. Only this machine can reach them. POST /act takes
{"episode", "task", "start", "observation"} and answers with actions [C, size], both as xmodal_opd/wire.py writes
messages; POST /reset takes {"episode"}; GET / tells in JSON what is served.
"""

import argparse
import contextlib
import io
import json
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a program, not from its package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from modalities.action import clients
from modalities.action.environment import AssetError, Observation
from tools.policies import make
from tools.policies.seats import Policy, Seat, Together
from xmodal_opd import wire

HOST = "127.0.0.1"
CAMERAS = {  # how openpi's and XPolicyLab's simulators call the cameras of ours
    "observation/image": "agentview",
    "observation/wrist_image": "robot0_eye_in_hand",
    "cam_head": "head_camera",
    "cam_left_wrist": "left_camera",
    "cam_right_wrist": "right_camera",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("policy", help="what --policy of eval_robot.py takes")
    top.add_argument("--recipe", help="of the model, where it is one of ours")
    top.add_argument("--size", type=int, required=True, help="numbers in an action: 7 for LIBERO, 4 for Meta-World")
    top.add_argument("--port", type=int, default=8000, help="of HTTP; the next three follow (default: %(default)s)")
    return top


class Served:
    """One policy, asked from many connections."""

    def __init__(self, policy: Policy, name: str):
        self.policy, self.together = policy, Together(policy)
        self.about = {"policy": name, "identity": policy.identity, "units": "simulator"}

    def reset(self, episode: str) -> None:
        self.policy.reset(episode)

    def act(self, episode: str, observation: Observation, task: str = "", start: int = 0) -> np.ndarray:
        return np.asarray(self.together.act(Seat(episode, task, start, observation, unserved)), np.float64)


def unserved() -> np.ndarray:
    raise AssetError("an expert lives in its simulator and cannot be served; take --policy expert there")


# ---- HTTP


def http_server(served: Served, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, json.dumps(served.about).encode(), "application/json")

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                self.answer(200, called(served, self.path, wire.receive(io.BytesIO(data))))
            except Exception as error:  # whatever it is, the simulator is told
                self.answer(400, f"{type(error).__name__}: {error}".encode(), "text/plain; charset=utf-8")

        def answer(self, status: int, body: bytes, kind: str = "application/octet-stream") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing for every request."""

    return ThreadingHTTPServer((HOST, port), Handler)


def called(served: Served, path: str, message: Mapping[str, Any]) -> bytes:
    if path not in ("/act", "/reset"):
        raise ValueError(f"there is no {path}; there are /act and /reset")
    if path == "/reset":
        answer = served.reset(message["episode"])
    else:
        seat = (message["episode"], message["observation"], message.get("task", ""), message.get("start", 0))
        answer = served.act(*seat)
    out = io.BytesIO()
    wire.send(out, answer)
    return out.getvalue()


# ---- websockets and TCP


class Client:
    """One connection: the episode it runs, and what it sees now."""

    def __init__(self, served: Served, name: str):
        self.served, self.episode, self.turns = served, name, 0
        self.seen: Mapping[str, Any] | None = None
        self.reset()

    def reset(self, _message: Any = None) -> None:
        self.served.reset(self.episode)
        self.turns, self.seen = 0, None

    def update_obs(self, message: Mapping[str, Any]) -> None:
        self.seen = message

    def get_action(self, _message: Any = None) -> np.ndarray:
        if self.seen is None:
            raise ValueError("get_action comes after update_obs")
        observation = observed(self.seen, self.turns)
        self.turns += 1
        return self.served.act(self.episode, observation)


def observed(message: Mapping[str, Any], steps: int) -> Observation:
    """What openpi's, XPolicyLab's or RoboTwin's simulator sends, in our words. Raises KeyError for what is missing."""
    if "prompt" in message:
        images = {ours: message[name] for name, ours in CAMERAS.items() if name in message}
        state, instruction = message["observation/state"], message["prompt"]
    elif "vision" in message:
        images = {CAMERAS.get(name, name): camera["color"] for name, camera in message["vision"].items()}
        of, sides = message["state"], ("left_arm", "left_ee", "right_arm", "right_ee")
        state = np.concatenate([of[f"{side}_joint_state"] for side in sides if f"{side}_joint_state" in of])
        instruction = message["instruction"]
    else:
        cameras = {name: of for name, of in message["observation"].items() if isinstance(of, Mapping) and "rgb" in of}
        images = {name: of["rgb"] for name, of in cameras.items()}
        state, instruction = message["joint_action"]["vector"], message["instruction"]
    return Observation(
        images={str(name): np.asarray(image) for name, image in images.items()},
        state=np.asarray(state, np.float32),
        text="",
        instruction=str(instruction),
        success=False,
        done=False,
        steps=steps,
    )


def openpi_server(served: Served, port: int) -> Any:
    def handle(connection: Any, client: Client) -> None:
        connection.send(clients.pack(served.about))
        for raw in connection:
            client.update_obs(clients.unpack(raw))
            try:
                connection.send(clients.pack({"actions": client.get_action()}))
            except Exception as error:  # whatever it is, the simulator is told, as text: that is how openpi does it
                connection.send(f"{type(error).__name__}: {error}")

    return socket_server(served, port, handle)


def xpolicylab_server(served: Served, port: int) -> Any:
    def handle(connection: Any, client: Client) -> None:
        for raw in connection:
            message = clients.unpack(raw)
            if message["message_type"] == "close":
                break
            connection.send(clients.pack(framed(client, message), "xpolicylab"))

    return socket_server(served, port, handle)


def socket_server(served: Served, port: int, handle: Callable[[Any, Client], None]) -> Any:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.server import serve

    def greeted(connection: Any) -> None:
        with contextlib.suppress(ConnectionClosed):
            handle(connection, Client(served, str(connection.remote_address)))

    return serve(greeted, HOST, port, compression=None, max_size=clients.LARGEST, ping_timeout=None)


def framed(client: Client, message: Mapping[str, Any]) -> dict[str, Any]:
    """XPolicyLab's answer to one of its requests."""
    kind, payload = message["message_type"], message.get("payload", {})
    back = {name: value for name, value in message.items() if name not in ("message_type", "payload")}
    try:
        return {"message_type": clients.ANSWERS[kind], **back, "payload": told(client, kind, payload)}
    except Exception as error:  # whatever it is, the simulator is told
        code = {"reset": "reset_failed", "infer": "infer_failed"}.get(kind, "internal")
        reason = f"there is no request {kind!r}" if kind not in clients.ANSWERS else f"{type(error).__name__}: {error}"
        return {"message_type": "error", **back, "payload": {"code": code, "message": reason, "details": {}}}


def told(client: Client, kind: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "reset":
        client.reset()
    if kind == "infer":
        client.update_obs(payload["observation"])
        return {"actions": client.get_action()}
    return {"ok": True}


CALLS = {"update_obs": Client.update_obs, "get_action": Client.get_action, "reset": Client.reset}
CALLS |= {"reset_model": Client.reset}


def tcp_server(served: Served, port: int) -> socketserver.ThreadingTCPServer:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            client = Client(served, str(self.client_address))
            with contextlib.suppress(EOFError, OSError):
                while True:
                    clients.write_message(self.request, replied(client, clients.read_message(self.request)))

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    return Server((HOST, port), Handler)


def replied(client: Client, message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("cmd") not in CALLS:
        return {"error": f"there is no {message.get('cmd')!r}; there are: {', '.join(CALLS)}"}
    try:
        return {"res": CALLS[message["cmd"]](client, message.get("obs"))}
    except Exception as error:  # whatever it is, the simulator is told
        return {"error": f"{type(error).__name__}: {error}"}


# ---- all of them

SERVERS = {"http": http_server, "openpi": openpi_server, "tcp": tcp_server, "xpolicylab": xpolicylab_server}


@contextlib.contextmanager
def serving(policy: Policy, name: str, ports: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Within, the policy is served; the ports by the names of SERVERS, 0 for any that is free."""
    served = Served(policy, name)
    servers = {kind: SERVERS[kind](served, port) for kind, port in ports.items()}
    for server in servers.values():
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {kind: port_of(server) for kind, server in servers.items()}
    finally:
        for server in servers.values():
            server.shutdown()
            getattr(server, "server_close", server.shutdown)()


def port_of(server: Any) -> int:
    return server.socket.getsockname()[1]


def main() -> int:
    options = parser().parse_args()
    ports = {kind: options.port + number for number, kind in enumerate(SERVERS)}
    try:
        policy = make(options.policy, size=options.size, rules=None, recipe=options.recipe)
        with serving(policy, options.policy, ports):
            for kind, port in ports.items():
                print(f"{kind:12} {'http' if kind == 'http' else 'tcp' if kind == 'tcp' else 'ws'}://{HOST}:{port}")
            print("Ctrl-C ends it", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError, RuntimeError, ImportError, KeyError) as error:
        print(f"serve_policy: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
