"""Messages between processes: what goes in comes out, and nothing else is taken for a message."""

import io
import struct

import numpy as np
import pytest

from xmodal_opd.wire import receive, send


def round_trip(message):
    stream = io.BytesIO()
    send(stream, message)
    stream.seek(0)
    return receive(stream)


def test_arrays_come_back_with_their_kinds_and_shapes():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    message = {
        "images": {"top": image},
        "state": np.array([0.5, -1.0], np.float32),
        "list": [np.zeros((0, 3)), 1, None],
    }
    back = round_trip(message)
    assert back["images"]["top"].dtype == np.uint8 and (back["images"]["top"] == image).all()
    assert back["state"].tolist() == [0.5, -1.0] and back["list"][0].shape == (0, 3) and back["list"][1:] == [1, None]


def test_numpy_numbers_are_numbers_and_a_transposed_array_keeps_its_order():
    turned = np.arange(6).reshape(2, 3).T
    back = round_trip([np.bool_(True), np.float32(0.5), turned])
    assert back[:2] == [True, 0.5] and (back[2] == turned).all()


def test_what_is_neither_json_nor_numbers_is_refused_before_a_byte_is_written():
    stream = io.BytesIO()
    for bad in (object(), np.array(["text"]), np.array([None])):
        with pytest.raises(TypeError, match="JSON and arrays of numbers"):
            send(stream, {"a": bad})
    assert not stream.getvalue()


@pytest.mark.parametrize("size", [0, 3, 20])
def test_a_stream_that_ends_early_says_so(size):
    stream = io.BytesIO()
    send(stream, {"x": np.zeros(100)})
    with pytest.raises(EOFError, match="closed the stream"):
        receive(io.BytesIO(stream.getvalue()[:size]))


def test_noise_on_the_stream_is_named():
    with pytest.raises(ValueError, match="noise on the stream"):
        receive(io.BytesIO(b"warning: something printed"))
    huge = b'{"__array__": 0, "dtype": "<f8", "shape": [1000000000000]}'
    with pytest.raises(ValueError, match="does not travel"):
        receive(io.BytesIO(struct.pack(">I", len(huge)) + huge))
