"""Tiny random instances of real model classes, with their real processors, made once a session."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from families import FAMILIES, omni
from PIL import Image

from modalities.chat import ChatAdapter
from modalities.tasks import questions
from tools.tiny import model as tiny
from xmodal_opd.models import attend_in_blocks
from xmodal_opd.types import Pair


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    texts = [f"user\nassistant\n{q.prompt} {q.response}" for q in itertools.islice(questions(0, "train"), 500)]
    return tiny.make_tokenizer(texts)


ROOT = Path(__file__).parents[1]
BRIEF = ("eval.samples=1", "eval.kl=false", "eval.every=0")  # a run that is about something else than what it measures


LONG = {"gemma3n", "granite_speech", "voxtral"}  # what hears takes each of them as long as three others take


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in FAMILIES],
)
def family(request, tokenizer):
    """(name, model, processor, adapter) of each supported class."""
    model, processor = FAMILIES[request.param].make(tokenizer)
    return request.param, attend_in_blocks(model.eval()), processor, ChatAdapter(processor, 512)


def noise(number: int) -> np.ndarray:
    """Seconds of noise, of another length for every number."""
    return np.random.default_rng(number).normal(0, 0.1, 8000 + 2400 * number).astype(np.float32)


def picture(number: int) -> Image.Image:
    """Pixels of noise, of another size for every number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (60 + 8 * number, 90, 3), dtype=np.uint8))


def make_pairs(adapter: ChatAdapter, count: int) -> list[Pair]:
    """Questions under a view of what the model reads best, sound, sight or text, and a text view."""
    kind = next((kind for kind in ("audio", "image") if kind in adapter.reads), None)
    pairs = []
    for i, q in enumerate(itertools.islice(questions(1, "train"), count)):
        text = {"type": "text", "text": q.prompt}
        media = {"audio": ([noise(i)], []), "image": ([], [picture(i)]), None: ([], [])}[kind]
        asked = [{"type": kind}, *([text] if kind == "image" else [])] if kind else [text]
        views = {
            "student": adapter.laid_out(str(i), [{"role": "user", "content": asked}], *media),
            "teacher": adapter.laid_out(str(i), [{"role": "user", "content": [text]}]),
        }
        pairs.append(Pair(f"q{i}", views, q.answer, {"task": q.task}))
    return pairs


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer):
    """A folder with a random tiny model and spoken shards, and a recipe on them: {"folder", "recipe"}."""
    from modalities.audio.prepare import prepare

    folder = tmp_path_factory.mktemp("world")
    model, processor = omni(tokenizer)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for split, count in (("train", 24), ("test", 6)):
        prepare(folder / split, count=count, split=split, accents=["en-us"], per_shard=8, progress=False, workers=1)
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        f"""
include: [{ROOT / "configs" / "methods" / "cord.yaml"}]
name: tiny
model: {{name: {folder / "model"}, train: [audio_tower]}}
data: {{train: {folder / "train"}, test: {folder / "test"}}}
rollout: {{max_tokens: 8}}
optim: {{lr: 1e-3}}
train: {{steps: 4, prompts: 3, threads: 1}}
eval: {{every: 2, during: 3}}
checkpoint: {{every: 1, keep: 2}}
"""
    )
    return {"folder": folder, "recipe": str(recipe)}


def with_method(world, folder: Path, method: str) -> str:
    """The recipe of `world` with another method of configs/methods, written into `folder`."""
    tree = yaml.safe_load(Path(world["recipe"]).read_text())
    tree["include"] = [str(ROOT / "configs" / "methods" / f"{method}.yaml")]
    (folder / f"{method}.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / f"{method}.yaml")
