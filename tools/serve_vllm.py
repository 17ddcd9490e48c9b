#!/usr/bin/env python
"""Start vLLM servers that `rollout.name: vllm` can use, on this machine alone, and stop them with Ctrl-C.

    python tools/serve_vllm.py MODEL --servers 2 -- --dtype float32
    xmodal-opd train RECIPE rollout.name=vllm 'rollout.servers=[http://127.0.0.1:8000, http://127.0.0.1:8001]'

MODEL is what the recipe trains: a folder, a hub name, or "default" for the small model in the package. What follows
`--` goes to vLLM as it is. With GPUs, server i sees GPU i, or the i-th of CUDA_VISIBLE_DEVICES. The same by hand:

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --enable-scale-out
        --host 127.0.0.1 --port 8000
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download

if __package__ in (None, ""):  # run as a program, not from its package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.install_vllm import default_folder, install
from xmodal_opd.checkpoint import WHOLE, as_served
from xmodal_opd.models import folder_of, is_tied, load_config

ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; without it vLLM takes half of the memory


def main() -> int:
    own, more = split(sys.argv[1:])
    arguments = parser().parse_args(own)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # servers end with this program, however it ends
        signal.signal(number, interrupt)
    ports = range(arguments.port, arguments.port + arguments.servers)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        python = arguments.python or install(arguments.folder)
        with tempfile.TemporaryDirectory() as folder:
            model = servable(arguments.model, Path(folder) / "model")
            servers += [start(python, model, port, more, gpu=i) for i, port in enumerate(ports)]
            for server, port in zip(servers, ports, strict=True):
                wait(server, port, arguments.patience)
            print(f"rollout.servers=[{', '.join(f'http://127.0.0.1:{port}' for port in ports)}]", flush=True)
            for server in servers:
                server.wait()
    except KeyboardInterrupt:
        pass
    except (ValueError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"serve_vllm: {error}", file=sys.stderr)
        return 1
    finally:
        for server in servers:
            stop(server)
    return 0


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and those behind `--`, which are vLLM's."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def servable(model: str, folder: Path) -> str:
    """`model` for vLLM's command line: a copy of it in `folder` where its form must change, see `as_served`."""
    path, config = Path(folder_of(model)), load_config(folder_of(model))
    if not (is_tied(config) or config["architectures"][0] in WHOLE):
        return str(path) if path.is_dir() else model
    path = path if path.is_dir() else Path(snapshot_download(model))
    shutil.copytree(path, folder)
    as_served(folder)
    return str(folder)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("model")
    top.add_argument("--servers", type=int, default=1, help="how many (default: %(default)s)")
    top.add_argument("--port", type=int, default=8000, help="of the first; the others follow (default: %(default)s)")
    top.add_argument("--python", type=Path, help="of an environment with vLLM; default: the one of install_vllm.py")
    top.add_argument("--folder", type=Path, default=default_folder(), help=argparse.SUPPRESS)
    top.add_argument("--patience", type=float, default=600.0, help="seconds to wait for a server (default: 600)")
    return top


def start(
    python: Path, model: str, port: int, more: Sequence[str] = (), gpu: int = 0, log: Path | None = None
) -> subprocess.Popen[bytes]:
    """A server process in a group of its own; `wait` for it before use, and `stop` it."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--enable-scale-out"]
    command += ["--host", "127.0.0.1", "--port", str(port), *more]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = {"CUDA_VISIBLE_DEVICES": visible.split(",")[gpu % len(visible.split(","))] if visible else str(gpu)}
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment = {**ON_CPU, "VLLM_NO_USAGE_STATS": "1", **kept, **devices, "VLLM_SERVER_DEV_MODE": "1"}
    with open(log, "ab") if log else open(os.devnull, "ab") as out:
        return subprocess.Popen(
            command, env=environment, stdout=out if log else None, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait(server: subprocess.Popen[bytes], port: int, patience: float = 600.0) -> None:
    """Until it answers. Raises RuntimeError when it ends before, or takes too long."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the vLLM server on port {port} ended with code {server.returncode}; it says why above")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the vLLM server on port {port} was not ready after {patience:g} s")


def stop(server: subprocess.Popen[bytes], signum: int = signal.SIGTERM) -> None:
    """End a server with all its worker processes; whatever is left after ten seconds is killed."""
    for number in (signum, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            continue
    server.wait()


if __name__ == "__main__":
    sys.exit(main())
