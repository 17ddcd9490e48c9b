"""Messages between processes over a pair of streams: JSON, and numpy arrays as raw bytes behind it. No pickle: a
worker may run another Python and another numpy, and what it sends is data and nothing else.
"""

import json
import math
import struct
from typing import Any, Protocol, runtime_checkable

import numpy as np

LARGEST = 2**30  # bytes of one message; a length beyond it is noise on the stream
ARRAY = "__array__"
KINDS = "biuf"  # of what numpy can hold, what travels


@runtime_checkable
class Source(Protocol):
    """What messages come from: any binary stream."""

    def read(self, size: int, /) -> bytes:
        """Fewer bytes than `size` only at the end."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Where messages go: any binary stream."""

    def write(self, data: Any, /) -> Any: ...

    def flush(self) -> None: ...


def send(stream: Sink, message: Any) -> None:
    """Write one message: what JSON can say, with numpy arrays of numbers anywhere in it.

    Raises TypeError for anything else, before a byte is written.
    """
    arrays: list[np.ndarray] = []
    head = json.dumps(message, default=lambda value: lifted(value, arrays)).encode()
    stream.write(struct.pack(">I", len(head)) + head)
    for array in arrays:
        stream.write(array.data.cast("B") if array.size else b"")
    stream.flush()


def lifted(value: Any, arrays: list[np.ndarray]) -> Any:
    """What stands in the JSON for an array (its bytes follow) or a numpy number."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in KINDS:
        raise TypeError(f"a message holds JSON and arrays of numbers, not {type(value).__name__}")
    arrays.append(np.ascontiguousarray(value))
    return {ARRAY: len(arrays) - 1, "dtype": value.dtype.str, "shape": list(value.shape)}


def receive(stream: Source) -> Any:
    """The next message. Raises EOFError when the other side is gone, ValueError for what is no message."""
    (size,) = struct.unpack(">I", exactly(stream, 4))
    if size > LARGEST:
        raise ValueError(f"a message of {size} bytes is noise on the stream: something else writes to it")
    specs: dict[int, tuple[np.dtype, tuple[int, ...]]] = {}
    message = json.loads(exactly(stream, size), object_hook=lambda found: noted(found, specs))
    arrays = [read_array(stream, *specs[i]) for i in range(len(specs))]
    return placed(message, arrays) if arrays else message


def noted(found: dict[str, Any], specs: dict[int, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, Any]:
    if ARRAY in found:
        specs[found[ARRAY]] = np.dtype(found["dtype"]), tuple(found["shape"])
    return found


def read_array(stream: Source, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if dtype.kind not in KINDS or not 0 <= size <= LARGEST:
        raise ValueError(f"an array of {dtype} {shape} does not travel")
    return np.frombuffer(exactly(stream, size), dtype).reshape(shape)


def placed(message: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(message, dict):
        if ARRAY in message:
            return arrays[message[ARRAY]]
        return {name: placed(value, arrays) for name, value in message.items()}
    return [placed(value, arrays) for value in message] if isinstance(message, list) else message


def exactly(stream: Source, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("the other side closed the stream")
    return data
