"""Where a run came from: the command, the code's commit, the packages."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("xmodal-opd", "torch", "torchaudio", "transformers", "tokenizers", "webdataset", "numpy", "soundfile")


def provenance(command: str) -> dict[str, object]:
    """JSON-ready facts that let somebody repeat a run."""
    packages = {name: found for name in PACKAGES if (found := version_of(name))}
    return {
        "command": command,
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {platform.system()}",
        "packages": packages,
    }


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, marked "+" when files were changed since; None outside a checkout."""
    here = Path(__file__).parent
    ask = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=False)  # noqa: E731
    head = ask("rev-parse", "HEAD")
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if ask("status", "--porcelain", "--untracked-files=no").stdout else "")


def command_line() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
