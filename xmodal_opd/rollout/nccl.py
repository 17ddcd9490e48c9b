"""Weights from GPU to GPU: rank 0 broadcasts an exported folder to the workers of a vLLM server, which need not see it.

The other side is the `nccl` weight transfer of vLLM 0.32, one tensor at a time; both sides need the same NCCL. Written
after that side's code and not yet run: it takes a GPU here and another there.
"""

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.cuda import nccl

from xmodal_opd import dist
from xmodal_opd.background import later
from xmodal_opd.serving import Server, Session

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of safetensors, as vLLM calls them
Link = Any  # an NCCL communicator of rank 0 here and the workers of one server


async def join(session: Session, server: Server, workers: int) -> Link:
    """A new link to a server: all sides enter at once, so its request and our call run side by side."""
    unique = nccl.unique_id()
    entering = later(enter, unique, 1 + workers)
    await session.call(server, "/init_weight_transfer_engine", {"init_info": invitation(unique, workers)})
    return await asyncio.wrap_future(entering)


async def send(session: Session, server: Server, folder: Path, link: Link) -> None:
    """Bring the weights of an exported folder to a server that is paused."""
    await session.call(server, "/start_weight_update")
    sending = later(broadcast, folder, link)
    await session.call(server, "/update_weights", {"update_info": contents(folder)})
    await asyncio.wrap_future(sending)
    await session.call(server, "/finish_weight_update")


def invitation(unique: bytes, workers: int) -> dict[str, Any]:
    """What a server's workers need to enter, behind rank 0."""
    shared = base64.b64encode(unique).decode()
    return {"nccl_unique_id_b64": shared, "rank_offset": 1, "world_size": 1 + workers, "packed": False}


def contents(folder: Path) -> dict[str, list]:
    """Name, type and shape of every tensor, in the order in which `broadcast` sends them."""
    names, dtypes, shapes = [], [], []
    for file in files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(name)
                names.append(name)
                dtypes.append(DTYPES[part.get_dtype()])
                shapes.append(list(part.get_shape()))
    return {"names": names, "dtype_names": dtypes, "shapes": shapes}


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def weights(folder: Path, device: str) -> Iterator[Tensor]:
    """The tensors on `device`, one at a time."""
    for file in files(folder):
        with safe_open(file, "pt", device) as tensors:
            yield from (tensors.get_tensor(name) for name in tensors.keys())  # noqa: SIM118 - not a mapping


def enter(unique: bytes, size: int) -> Link:
    """Returns once all `size` sides are there and have added up one number, as vLLM's do on entering."""
    torch.cuda.set_device(dist.local_rank())
    link = nccl.init_rank(size, unique, 0)
    nccl.all_reduce([torch.zeros(1, device="cuda")], comms=[link])
    torch.cuda.synchronize()
    return link


def broadcast(folder: Path, link: Link) -> None:
    torch.cuda.set_device(dist.local_rank())
    for weight in weights(folder, f"cuda:{dist.local_rank()}"):
        nccl.broadcast([weight], comms=[link])
    torch.cuda.synchronize()
