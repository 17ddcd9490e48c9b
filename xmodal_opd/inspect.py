"""What can be done with a recipe short of training: check that it holds together, and measure its model."""

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from xmodal_opd import config, evaluate
from xmodal_opd.build import Parts, build, open_tests, prepare_shards
from xmodal_opd.data import Shards
from xmodal_opd.step import train_step
from xmodal_opd.train import PROBE, aligned
from xmodal_opd.types import Pair


def check(recipe: config.Recipe) -> Iterator[str]:
    """Build everything on the CPU, read a few samples, and run sampling, scoring and the objective once; one line
    for each. Raises as `train` would."""
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"device": "cpu"})})
    parts = build(recipe)
    moving = sum(p.numel() for p in parts.student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in parts.student.parameters())
    yield f"model      {type(parts.student).__name__}, {total / 1e6:.1f} M parameters, {moving / 1e6:.1f} M train"
    yield f"teachers   {', '.join(sorted(parts.models))}"
    pairs = probe(parts)
    yield f"data       {len(pairs)} samples of {recipe.data.train}: views {', '.join(sorted(pairs[0].views))}"
    parts = aligned(parts, pairs)
    how = "shared by" if parts.responses.share else "repeated for"
    yield f"alignment  sampler and training forward agree; prompts are {how} their answers"
    for name, value in train_step(parts, pairs, 0).items():
        yield f"{name:30} {value:.5g}"


def probe(parts: Parts) -> list[Pair]:
    """A few training pairs; where the shards are still to be made, a handful in a temporary folder."""
    data = parts.recipe.data
    if data.prepare is None or Path(data.train).is_dir():
        shards = Shards(data.train, views=config.views(parts.recipe))
        return [pair for _, pair in islice(shards.pairs(parts.adapter), PROBE)]
    with tempfile.TemporaryDirectory() as folder:
        prepare_shards(data.prepare, folder, "train", PROBE)
        return [pair for _, pair in islice(Shards(folder).pairs(parts.adapter), PROBE)]


def evaluate_only(recipe: config.Recipe, checkpoint: str | None, output: str) -> list[dict[str, Any]]:
    """Records of the recipe's test questions under its model, or under an exported folder; kept at `output`."""
    if checkpoint:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": checkpoint})})
    parts = build(recipe.model_copy(update={"objective": {}, "scoring": {}, "judge": None}))  # no teacher is needed
    pairs = [pair for _, pair in islice(open_tests(recipe).pairs(parts.adapter, epochs=1), recipe.eval.samples)]
    parts = aligned(parts, pairs[:PROBE])
    settings = recipe.eval
    records = evaluate.evaluate(
        pairs, parts.sampler, parts.responses, parts.right, batch=settings.batch, kl=settings.kl
    )
    evaluate.write(records, Path(output))
    return records
