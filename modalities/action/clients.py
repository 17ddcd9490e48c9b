"""How a simulator asks a policy that runs elsewhere: RoboTwin's two ways and openpi's, as their servers and clients
speak them. Standard library and numpy, for RoboTwin's own Python (3.11); websockets and msgpack only for `Socket`.

RoboTwin over TCP (script/eval_policy_client.py): 4 bytes of length and JSON, {"cmd", "obs"} -> {"res"}, arrays in
base64. RoboTwin over a websocket (XPolicyLab): msgpack frames with a message type and who asks. openpi: msgpack; the
server greets with what it is, then an observation goes in and {"actions"} comes out.
"""

import base64
import contextlib
import json
import socket
import uuid
from typing import Any

import numpy as np

LARGEST = 2**30  # bytes of one message
KINDS = "biuf"  # of what numpy can hold, what travels
ANSWERS = {  # XPolicyLab's requests and what they are answered with
    "hello": "hello_ack",
    "prepare_case": "prepare_case_ack",
    "reset": "reset_result",
    "infer": "infer_result",
    "trial_end": "trial_end_ack",
    "heartbeat": "heartbeat_ack",
}


class Refused(RuntimeError):
    """The policy's side said why it does not answer."""


# ---- JSON over TCP


def to_json(message: Any) -> bytes:
    return json.dumps(message, default=json_array).encode()


def json_array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in KINDS:
        raise TypeError(f"a message holds JSON and arrays of numbers, not {type(value).__name__}")
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"__numpy_array__": True, "data": data, "dtype": str(value.dtype), "shape": value.shape}


def from_json(data: bytes) -> Any:
    def array(found: dict[str, Any]) -> Any:
        if "__numpy_array__" not in found:
            return found
        return array_of(base64.b64decode(found["data"]), found["dtype"], found["shape"])

    return json.loads(data, object_hook=array)


def array_of(data: bytes, kind: str, shape: Any) -> np.ndarray:
    dtype = np.dtype(kind)
    if dtype.kind not in KINDS:
        raise ValueError(f"an array of {dtype} does not travel")
    return np.frombuffer(data, dtype).reshape(shape)


def read_message(connection: socket.socket) -> Any:
    """Raises EOFError when the other side is gone, ValueError for what is no message."""
    size = int.from_bytes(exactly(connection, 4), "big")
    if size > LARGEST:
        raise ValueError(f"a message of {size} bytes is no message: something else speaks on this port")
    return from_json(exactly(connection, size))


def exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        some = connection.recv(min(size - len(data), 2**20))
        if not some:
            raise EOFError("the other side closed the connection")
        data += some
    return bytes(data)


def write_message(connection: socket.socket, message: Any) -> None:
    data = to_json(message)
    connection.sendall(len(data).to_bytes(4, "big") + data)


class Tcp:
    """RoboTwin's client: any method of the model by its name."""

    def __init__(self, host: str, port: int, timeout: float = 60.0):
        self.connection = socket.create_connection((host, port), timeout)

    def call(self, name: str, observation: Any = None) -> Any:
        """Raises Refused with what the server said, OSError and EOFError when it is gone."""
        write_message(self.connection, {"cmd": name, "obs": observation})
        reply = read_message(self.connection)
        if "res" not in reply:
            raise Refused(str(reply.get("error", reply)))
        return reply["res"]

    def close(self) -> None:
        self.connection.close()


# ---- msgpack over a websocket


def pack(message: Any, spelling: str = "openpi") -> bytes:
    """spelling: how arrays are written, as openpi does it or as the package msgpack_numpy, which XPolicyLab uses."""
    import msgpack

    return bytes(msgpack.packb(message, default=SPELLINGS[spelling]) or b"")


def openpi_array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    value = travelling(value)
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def numpy_array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    value = travelling(value)
    return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": value.tobytes()}


def travelling(value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in KINDS:
        raise TypeError(f"a message holds arrays of numbers, not {type(value).__name__}")
    return value


SPELLINGS = {"openpi": openpi_array, "xpolicylab": numpy_array}


def unpack(data: bytes) -> Any:
    """Either spelling. Raises ValueError for arrays of anything but numbers."""
    import msgpack

    return msgpack.unpackb(data, object_hook=unpacked, strict_map_key=False)


def unpacked(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return array_of(found[b"data"], found[b"dtype"], found[b"shape"])
    if found.get(b"nd"):
        return array_of(found[b"data"], found[b"type"], found[b"shape"])
    if b"__npgeneric__" in found:
        return found[b"data"]
    return array_of(found[b"data"], found[b"type"], ())[()].item() if b"nd" in found else found


def connect(url: str, timeout: float) -> Any:
    """A websocket, to be entered, that carries large messages, past any proxy. Raises OSError when nobody listens."""
    from websockets.sync.client import connect as websocket

    return websocket(url, open_timeout=timeout, compression=None, max_size=LARGEST, proxy=None, ping_timeout=None)


def broken() -> tuple[type[Exception], ...]:
    """What a websocket raises when it breaks."""
    from websockets.exceptions import WebSocketException

    return (WebSocketException,)


class OpenPi:
    """openpi's client: an observation in, a chunk of actions out."""

    def __init__(self, url: str, timeout: float = 60.0):
        self.open, self.timeout = contextlib.ExitStack(), timeout
        self.socket = self.open.enter_context(connect(url, timeout))
        self.about: dict[str, Any] = unpack(self.socket.recv(timeout))

    def infer(self, observation: dict[str, Any]) -> np.ndarray:
        self.socket.send(pack(observation))
        reply = self.socket.recv(self.timeout)
        if isinstance(reply, str):  # a traceback: that is how openpi's server says that it failed
            raise Refused(reply.strip().splitlines()[-1])
        return np.asarray(unpack(reply)["actions"])

    def close(self) -> None:
        self.open.close()


class Socket:
    """RoboTwin's client for XPolicyLab's server."""

    def __init__(self, url: str, timeout: float = 60.0, evaluation: str = "robotwin"):
        self.open, self.timeout, self.who = contextlib.ExitStack(), timeout, {"evaluation_id": evaluation}
        self.socket = self.open.enter_context(connect(url, timeout))
        self.about = self.ask("hello", {})

    def ask(self, kind: str, payload: dict[str, Any], **who: Any) -> dict[str, Any]:
        """The payload of the answer. Raises Refused with the server's reason."""
        frame = {"message_type": kind, "request_id": str(uuid.uuid4()), **self.who, **who, "payload": payload}
        self.socket.send(pack(frame, "xpolicylab"))
        reply = unpack(self.socket.recv(self.timeout))
        if reply["message_type"] != ANSWERS[kind] or reply["request_id"] != frame["request_id"]:
            raise Refused(str(reply["payload"].get("message", reply)))
        return reply["payload"]

    def call(self, name: str, observation: Any = None) -> Any:
        """What the client over TCP does: `update_obs` keeps an observation, and `get_action` asks with it."""
        if name == "update_obs":
            self.seen = observation
            return None
        if name == "get_action":
            return self.ask("infer", {"observation": self.seen})["actions"]
        return self.ask(name, observation or {}).get("result")

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the other side may be gone already
            frame = {"message_type": "close", "request_id": str(uuid.uuid4()), **self.who, "payload": {}}
            self.socket.send(pack(frame, "xpolicylab"))
        self.open.close()
