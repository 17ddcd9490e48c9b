#!/usr/bin/env python
"""Build the small default policy from nothing: a 1.4-million-parameter Qwen2.5-Omni thinker that acts in Meta-World. It
acts well on the state in words, of which it saw many demonstrations; it sees where things are, and has hardly begun to
act by the camera, from two demonstrations of each task: that is the gap a first run of `configs/vla_opd.yaml` closes.

    MUJOCO_GL=egl python tools/build_tiny_robot.py xmodal_opd/assets/tiny_robot --seed 0
    MUJOCO_GL=egl python tools/build_tiny_robot.py runs/expert --expert   # one that does act by the camera: a teacher

Demonstrations are the scripted experts'. Each lesson (`tools/tiny/acting.py`) is a pure function of the one before
and the seed, and is kept in --work, so that a stopped build goes on.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/tiny_robot"), help="where finished lessons are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--expert", action="store_true", help="the one that acts well by the camera, to teach others")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tools.tiny.acting import EXPERT, STUDENT, new_policy
    from tools.tiny.lessons import save, teach

    model, adapter = new_policy(arguments.seed)
    teach(model, adapter, EXPERT if arguments.expert else STUDENT, arguments.work, arguments.seed)
    save(model, adapter.processor, arguments.folder)


if __name__ == "__main__":
    main()
