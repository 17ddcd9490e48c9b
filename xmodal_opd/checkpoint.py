"""Checkpoints: a folder written aside, flushed to disk and renamed; `latest` moves last. What is saved stays good.

Randomness is a pure function of (seed, step), so no generator state is kept: the step and the data position suffice.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from xmodal_opd import dist, lora
from xmodal_opd.models import is_tied
from xmodal_opd.types import Engine

WHOLE = {  # the class and kind of the whole model, by the class of the part that writes text
    "Qwen2_5OmniThinkerForConditionalGeneration": ("Qwen2_5OmniModel", "qwen2_5_omni"),
    "Qwen3OmniMoeThinkerForConditionalGeneration": ("Qwen3OmniMoeForConditionalGeneration", "qwen3_omni_moe"),
}


def save(
    run: Path,
    model: PreTrainedModel,
    processor: Any,
    engine: Engine,
    state: Mapping[str, Any],
    *,
    keep: int,
    ema: nn.Module | None = None,
) -> Path:
    """Write `run/checkpoints/step-N` (a Hugging Face folder and the trainer's state), N = state["step"].

    Every rank calls this; the folder is on a disk they share. Rank 0 writes all but the engine's own files.
    Raises OSError with what was being written and what is still good, and leaves no half-written folder.
    """
    folder = run / "checkpoints" / f"step-{state['step']:06d}"
    aside, first = folder.with_suffix(".writing"), dist.rank() == 0
    try:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.gather(None)
        engine.save(aside)
        with engine.whole():
            if first:
                write(model, processor, aside)
                if ema is not None:
                    save_file(trained(ema, model), aside / "ema.safetensors")
                (aside / "trainer.json").write_text(json.dumps({**state, "shapes": shapes(model)}))
        dist.gather(None)
        if first:
            publish(run, aside, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the disk says
        if dist.is_loss(error):
            raise
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"checkpoint of step {state['step']} could not be written to {folder.parent}: {reason}; {what_is_left(run)}"
        ) from error
    if first:
        for old in sorted((run / "checkpoints").glob("step-??????"))[:-keep]:
            shutil.rmtree(old)
    return folder


def publish(run: Path, aside: Path, folder: Path) -> None:
    """Flush what was written aside, and let it be the latest."""
    flush(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    point(run, folder)


def what_is_left(run: Path) -> str:
    good = latest(run)
    kept = f"the last good checkpoint is {good}" if good else "no checkpoint was saved before"
    return f"{kept}; make room and run with --resume"


@contextmanager
def room_on_disk(run: Path) -> Iterator[None]:
    """Whatever could not be written within because the disk is full: OSError with what is still good."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or run
        raise OSError(f"the disk is full, and {where} could not be written; {what_is_left(run)}") from error


def write(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """A checkpoint's weights: the whole model, or of a LoRA student only what trains."""
    if lora.layers(model):
        lora.save(model, folder)
        processor.save_pretrained(folder)
    else:
        export(model, processor, folder)


def stamp(folder: Path) -> str | None:
    """What tells the weights in a folder from those that were there before: names, sizes and times of their files, as
    a digest. None where there are none, as for a hub's name."""
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    told = [(file.name, (at := file.stat()).st_size, at.st_mtime_ns) for file in files]
    return sha256(json.dumps(told).encode()).hexdigest()[:16] if told else None


def export(
    model: PreTrainedModel, processor: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Weights, config, tokenizer, processor and chat template, as `from_pretrained` and servers such as vLLM read
    them. An adapter is merged into what is written; the model itself stays as it is.

    state: the model's weights, where it does not hold them whole itself.
    """
    model.save_pretrained(folder, state_dict=lora.merged_state(model, state))
    processor.save_pretrained(folder)


def as_served(folder: Path) -> None:
    """Turn the exported model in `folder` into what vLLM serves and reloads: a thinker into the checkpoint of the whole
    model it is a part of, and a head tied to the embeddings into one of its own, which vLLM on CPU otherwise leaves as
    it was when weights are reloaded. Other models stay as they are."""
    config = json.loads((folder / "config.json").read_text())
    whole, tied = WHOLE.get(config["architectures"][0]), is_tied(config)
    if not (whole or tied):
        return
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = False
    before = "thinker." if whole else ""
    places: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        embeddings = [tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
        if tied and embeddings:
            tensors["lm_head.weight"] = embeddings[0].clone()
        tensors = {f"{before}{name}": tensor for name, tensor in tensors.items()}
        save_file(tensors, file.with_suffix(".renamed"), {"format": "pt"})
        file.with_suffix(".renamed").replace(file)
        places |= dict.fromkeys(tensors, file.name)
    for index in folder.glob("*.safetensors.index.json"):
        index.write_text(json.dumps({**json.loads(index.read_text()), "weight_map": places}))
    if whole:
        outside = {"architectures": [whole[0]], "model_type": whole[1], "enable_audio_output": False}
        config = {**outside, "dtype": config["dtype"], "tie_word_embeddings": False, "thinker_config": config}
    (folder / "config.json").write_text(json.dumps(config))


def trained(copy: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of `copy` that train in `model`; the others are the model's own."""
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.detach().contiguous() for name, p in copy.named_parameters() if name in moving}


def flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def point(run: Path, folder: Path) -> None:
    aside = run / "checkpoints" / "latest.writing"
    aside.write_text(folder.name)
    flush(aside.parent)
    aside.replace(aside.with_name("latest"))


def latest(run: Path) -> Path | None:
    """The newest finished checkpoint of a run, if there is one."""
    pointer = run / "checkpoints" / "latest"
    folder = run / "checkpoints" / pointer.read_text().strip() if pointer.is_file() else None
    return folder if folder and folder.is_dir() else None


def last_run(name: str) -> Path:
    """The folder of the newest checkpoint of that recipe under runs/. Raises ValueError where there is none."""
    runs = sorted(Path("runs").glob(f"{name}-*/checkpoints/latest"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise ValueError(f"nothing to resume: no checkpoint in runs/{name}-*; name the run with run_dir=PATH")
    return runs[-1].parents[1]


def load(folder: Path, model: PreTrainedModel, engine: Engine, ema: nn.Module | None = None) -> dict[str, Any]:
    """Fill `model`, `engine` (and `ema`) from a checkpoint; returns the trainer's state. Every rank calls this.

    Raises ValueError when it is not a checkpoint, or one of another model.
    """
    if not (folder / "trainer.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no trainer.json; expected a folder like step-000100")
    state = json.loads((folder / "trainer.json").read_text())
    with engine.whole(write=True):
        refuse_another_model(folder, state.pop("shapes"), shapes(model))
        load_weights(folder, model)
    if ema is not None:
        ema.load_state_dict(load_file(folder / "ema.safetensors"), strict=False)
    engine.load(folder)
    return state


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Read the weights of a checkpoint of the same recipe, or of an exported folder of the same class, into `model`."""
    if lora.layers(model):
        return lora.load(folder, model)
    other = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(other.state_dict())


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in model.named_parameters()}


def refuse_another_model(folder: Path, saved: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> None:
    for name in [*saved, *here]:
        if saved.get(name) != here.get(name):
            raise ValueError(
                f"{folder} is a checkpoint of another model: {name} is {saved.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} in this recipe's model; use the recipe.yaml of its own run folder"
            )
