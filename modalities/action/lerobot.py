"""LeRobotDataset v3, as the package `lerobot` 0.6.1 writes and reads it: a frame for every action of an episode, with
what was seen before it. Episodes in a simulator become such a dataset, and such a dataset decisions in shards.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from modalities.action.adapter import QUESTION
from modalities.action.environment import Observation
from modalities.shards import write_shards
from modalities.vision import media as sight

IMAGES, STATE, ACTION, TEXT = "observation.images.", "observation.state", "action", "state_text"
LAYOUT = 2  # of what is in a decision's meta
DECODER = "pyav"  # of videos: it brings its own codecs, where torchcodec needs ffmpeg's libraries
STATISTICS = "dataset_statistics.json"  # beside shards: what load_normalizer reads
ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
KINDS = ("min", "max", "mean", "std", "q01", "q99")

Ask = Callable[..., Any]  # a command of modalities/action/worker.py and its arguments -> the answer


@dataclass(frozen=True)
class Step:
    """What was seen, the action [size] that was then taken, and what came of it."""

    seen: Observation
    action: np.ndarray
    success: bool
    done: bool


def library() -> Any:
    """The class LeRobotDataset, without a progress bar for every episode. Raises ImportError with what to install."""
    try:
        from datasets import disable_progress_bars
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise ImportError(f"lerobot datasets need lerobot ({error}): pip install 'xmodal-opd[lerobot]'") from error
    disable_progress_bars()
    return LeRobotDataset


# ---- episodes -> a dataset


def replayed(ask: Ask, task: str, start: int, actions: Iterable[np.ndarray]) -> list[Step]:
    """The steps of an episode of known actions [size], taken one by one: what lies within a chunk is seen as well."""
    left = iter(actions)
    return played(ask, task, start, lambda: next(left, None))


def played(ask: Ask, task: str, start: int, choose: Callable[[], np.ndarray | None]) -> list[Step]:
    """The steps of an episode until it is done, or `choose` has no more actions."""
    seen, steps = ask("reset", task, start), []
    while not seen["done"] and (action := choose()) is not None:
        after = ask("act", np.asarray(action)[None])
        steps.append(Step(seen, np.asarray(action, np.float32), after["success"], after["done"]))
        seen = after
    return steps


def write(
    folder: str | Path, episodes: Iterable[Sequence[Step]], *, fps: int, robot: str, video: bool = False
) -> tuple[int, int]:
    """A new dataset in `folder`, images in its parquet files or, with `video`, in mp4; returns (episodes, frames).

    What was saved when `episodes` fails or is interrupted is a whole dataset. Raises ValueError for a folder that is
    there already, and for no episodes.
    """
    create, folder, count, dataset = library().create, Path(folder), 0, None
    if folder.exists():
        raise ValueError(f"{folder} is there already; give another folder, or delete it")
    try:
        for steps in episodes:
            kinds = features(steps[0].seen, steps[0].action, video)
            if dataset is None:
                about = {"root": folder, "robot_type": robot, "use_videos": video, "video_backend": DECODER}
                dataset = create(folder.name, fps, kinds, **about)
            for step in steps:
                dataset.add_frame(frame(step, kinds))
            dataset.save_episode(parallel_encoding=False)
            count += 1
    finally:
        if dataset is not None:
            dataset.finalize()
    if dataset is None:
        raise ValueError(f"there are no episodes to write to {folder}")
    return count, dataset.num_frames


def features(seen: Observation, action: np.ndarray, video: bool) -> dict[str, dict[str, Any]]:
    """lerobot's description of a frame. The state in words is under a name that its policies take for no input."""
    kind, axes = "video" if video else "image", ["height", "width", "channels"]
    cameras = {IMAGES + name: spec(kind, image.shape, axes) for name, image in seen["images"].items()}
    numbers = {STATE: seen["state"], ACTION: action}
    rows = {name: spec("float32", value.shape, [f"{i}" for i in range(len(value))]) for name, value in numbers.items()}
    flags = {name: spec("bool", (1,), None) for name in ("next.success", "next.done")}
    return cameras | rows | flags | ({TEXT: spec("string", (1,), None)} if seen["text"] else {})


def spec(kind: str, shape: tuple[int, ...], names: list[str] | None) -> dict[str, Any]:
    return {"dtype": kind, "shape": tuple(shape), "names": names}


def frame(step: Step, kinds: Mapping[str, Any]) -> dict[str, Any]:
    images = {IMAGES + name: image for name, image in step.seen["images"].items()}
    flags = {"next.success": np.array([step.success]), "next.done": np.array([step.done])}
    words = {TEXT: step.seen["text"]} if TEXT in kinds else {}
    state = np.asarray(step.seen["state"], np.float32)
    return images | flags | words | {STATE: state, ACTION: step.action, "task": step.seen["instruction"]}


# ---- a dataset -> decisions in shards


@dataclass(frozen=True)
class Decision:
    """A frame in which is decided, and the one before which the chunk of actions ends."""

    episode: int
    turn: int
    frame: int
    until: int


def write_decisions(
    source: str,
    folder: str | Path,
    *,
    chunk: int = 8,
    stride: int | None = None,
    text: str | None = None,
    cameras: Mapping[str, str] | None = None,
    per_shard: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Shards of the decisions of a dataset (a folder, or a name on the hub); returns their index.

    Every `stride`-th frame (default: every `chunk`-th, as an episode is decided) with `chunk` actions from there on, or
    as many as are left, in `meta.actions` [C, size] in the dataset's units. Their statistics lie beside the shards.
    What was seen is in `meta.observation`, as a simulator tells it, with the images beside it: a robot's recipe reads
    that. Views, for all others: the student has the cameras and the instruction, the teacher the column `text`
    (default: the state in words where there is one, else the state's numbers) and the instruction. cameras: names by
    the dataset's keys of images (default: all, by what is behind `observation.images.`). Raises ValueError for what the
    dataset has not.
    """
    dataset = opened(source)
    column = text or (TEXT if TEXT in dataset.features else STATE)
    shown = dict(cameras or {key: camera_of(key) for key in dataset.meta.camera_keys})
    wanted = [
        (column, "the teacher's text"),
        (ACTION, "the actions"),
        *((key, f"the camera {shown[key]!r}") for key in shown),
    ]
    for name, what in wanted:
        if name not in dataset.features:
            raise ValueError(f"{source} has no column {name!r} for {what}; it has: {', '.join(dataset.features)}")
    read = {ACTION, column, STATE} & set(dataset.features)
    places, actions = decisions(dataset, chunk, stride or chunk), finite(dataset, read)
    told = {kind: np.asarray(dataset.meta.stats[ACTION][kind]) for kind in KINDS}
    if broken := [kind for kind in KINDS if not np.isfinite(told[kind]).all()]:
        raise ValueError(
            f"meta/stats.json of {source} has NaN or infinity as {broken[0]} of {ACTION!r}; compute it anew"
        )
    settings = {"kind": "lerobot", "layout": LAYOUT, "records": digest(dataset), "chunk": chunk, "text": column}
    settings |= {"stride": stride or chunk, "cameras": shown}

    def render(numbers: Sequence[int]) -> Iterator[Mapping[str, bytes]]:
        return (sample(dataset, places[n], actions, column, shown) for n in numbers)

    index = write_shards(folder, settings, len(places), render, per_shard, progress)
    numbers = {kind: values.tolist() for kind, values in told.items()}
    Path(folder, STATISTICS).write_text(json.dumps({Path(source).name: {"action": numbers}}))
    return index


def opened(source: str) -> Any:
    """Raises ValueError for a folder that is not there, or holds no dataset of version 3."""
    here = Path(source).is_dir()
    if not here and not ON_THE_HUB.fullmatch(source):
        raise ValueError(f"there is no folder {source}, and no dataset on the hub can have that name, as OWNER/NAME")
    if here and not Path(source, "meta", "info.json").is_file():
        raise ValueError(f"{source} holds no LeRobotDataset: it has no meta/info.json")
    version = json.loads(Path(source, "meta", "info.json").read_text()).get("codebase_version") if here else "v3.0"
    if not str(version).startswith("v3"):
        raise ValueError(
            f"{source} is a LeRobotDataset {version}; version 3 is read, and lerobot has a script that converts"
        )
    where = {"repo_id": Path(source).name, "root": source} if here else {"repo_id": source}
    return library()(**where, video_backend=DECODER)


def decisions(dataset: Any, chunk: int, stride: int) -> list[Decision]:
    if chunk < 1 or stride < 1:
        raise ValueError(f"a chunk of {chunk} actions every {stride} frames is none; both are at least 1")
    bounds = [(row["dataset_from_index"], row["dataset_to_index"]) for row in dataset.meta.episodes]
    return [
        Decision(episode, turn, at, min(at + chunk, last))
        for episode, (first, last) in enumerate(bounds)
        for turn, at in enumerate(range(first, last, stride))
    ]


def finite(dataset: Any, columns: Iterable[str]) -> np.ndarray:
    """The actions [frames, size]. Raises ValueError where one of the columns has a number that is none."""
    rows = dataset.hf_dataset.select_columns([*columns, "episode_index", "frame_index"]).with_format("numpy")[:]
    for name in sorted(columns):
        values = np.stack(rows[name])
        broken = np.argwhere(~np.isfinite(values)) if np.issubdtype(values.dtype, np.floating) else np.empty((0, 1))
        if len(broken):
            row = int(broken[0, 0])
            where = f"frame {rows['frame_index'][row]} of episode {rows['episode_index'][row]}"
            raise ValueError(
                f"column {name!r} of {dataset.root} has NaN or infinity in {where}, and {len(broken)} such numbers in "
                "all; leave out what is broken"
            )
    return np.stack(rows[ACTION])


def digest(dataset: Any) -> str:
    """A name for the contents."""
    parts = [Path(dataset.root, "meta", name).read_bytes() for name in ("info.json", "stats.json")]
    return sha256(b"".join(parts)).hexdigest()[:16]


def camera_of(key: str) -> str:
    """A camera's name in a dataset's key of its images, which may have dots."""
    return key.removeprefix(IMAGES).removeprefix("observation.")


def sample(
    dataset: Any, place: Decision, actions: np.ndarray, column: str, cameras: Mapping[str, str]
) -> dict[str, bytes]:
    """The files of one decision."""
    item = dataset[place.frame]
    images = {f"{name}.png": picture(item[key]) for key, name in cameras.items()}
    question, words = QUESTION.format(item["task"].lower()), in_words(item[column])
    parts = [{"type": "image", "image": name} for name in images]
    state = np.asarray(item[STATE]).tolist() if STATE in item else []
    meta = {
        "task": item["task"],
        "episode": place.episode,
        "turn": place.turn,
        "modality": "action",
        "observation": {"instruction": item["task"], "state": state, "text": words},
        "actions": actions[place.frame : place.until].tolist(),
    }
    views = {"student": asked(question, parts), "teacher": asked(f"{words}\n{question}")}
    record = {"views": views, "answer": None, "meta": meta}
    return {"json": json.dumps(record, ensure_ascii=False).encode(), **images}


def asked(text: str, images: Sequence[Mapping[str, str]] = ()) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def in_words(value: Any) -> str:
    """A column of words as it is, one of numbers with three decimals."""
    return value if isinstance(value, str) else f"state {' '.join(f'{x:.3f}' for x in np.ravel(np.asarray(value)))}"


def picture(image: Any) -> bytes:
    """A PNG of lerobot's image, float [3, height, width] from 0 to 1."""
    pixels = np.rint(np.asarray(image) * 255).astype(np.uint8)
    return sight.encode(sight.from_array(pixels.transpose(1, 2, 0)))
