"""Python environments of their own, for programs whose pinned versions clash with this project's: made once, in the
user's cache folder, from packages. Each has an install_NAME.py beside this file."""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # where pip looks next when its own indexes lack the CPU build


def main(name: str, doc: str | None, install: Callable[[Path], Path]) -> int:
    """The command line of an installer: it prints the path of the Python, and nothing else, on standard output."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, default=default_folder(name), help="default: %(default)s")
    try:
        print(install(arguments.parse_args().folder))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"install_{name}: {error}", file=sys.stderr)
        return 1
    return 0


def default_folder(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xmodal-opd" / name


def made(folder: Path, wanted: str, build: Callable[[Path], None]) -> Path:
    """The Python of a finished environment in `folder`, made anew with Python 3.11 and filled by `build` unless it is
    stamped with `wanted`: its versions, and whatever else was put into it.

    Raises RuntimeError without Python 3.11, and CalledProcessError when pip fails.
    """
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (stamp.is_file() and stamp.read_text() == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            run(python_3_11(folder.name), "-m", "venv", folder)
            build(python)
            stamp.write_text(wanted)
    return python


def install_torch(python: Path) -> None:
    try:
        run(python, "-m", "pip", "install", "-q", TORCH)
    except subprocess.CalledProcessError:
        run(python, "-m", "pip", "install", "-q", "--extra-index-url", TORCH_INDEX, TORCH)


def python_3_11(name: str) -> str:
    for candidate in candidates():
        code = "import sys; print(sys.version_info[:2] == (3, 11))"
        told = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if told.stdout.strip() == "True":
            return candidate
    raise RuntimeError(
        f"{name} needs Python 3.11, and there is none on PATH or in ~/.pyenv/versions; "
        "install it (`pyenv install 3.11`, or your system's python3.11 with venv) and try again"
    )


def candidates() -> Iterator[str]:
    """On PATH, where pyenv's stand-in may refuse, and then in pyenv's own versions."""
    if found := shutil.which("python3.11"):
        yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from (str(path) for path in sorted((pyenv / "versions").glob("3.11*/bin/python"), reverse=True))


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Its output goes to ours on stderr, so that stdout holds the answer alone. Raises CalledProcessError."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr, env=clean, cwd=cwd)
