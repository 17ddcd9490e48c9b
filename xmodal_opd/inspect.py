"""What can be done with a recipe short of training: check that it holds together, and measure its model."""

import tempfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from xmodal_opd import benchmark, checkpoint, evaluate, schema
from xmodal_opd.build import Parts, build
from xmodal_opd.build.shards import (
    open_benchmark,
    open_shards,
    open_tests,
    prepare_shards,
    refuse_view,
    training_shards,
)
from xmodal_opd.build.student import load_processor, load_student
from xmodal_opd.data import Shards
from xmodal_opd.lora import is_adapter
from xmodal_opd.measure import PROBE, aligned
from xmodal_opd.measure import measured as act_or_answer
from xmodal_opd.models import folder_of
from xmodal_opd.step import train_step
from xmodal_opd.types import Pair


def check(recipe: schema.Recipe) -> Iterator[str]:
    """Build everything on the CPU, read a few samples, and run sampling, scoring and the objective once; one line
    for each. Raises as `train` would."""
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"device": "cpu"})})
    parts = build(recipe)
    moving = sum(p.numel() for p in parts.student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in parts.student.parameters())
    yield f"model      {type(parts.student).__name__}, {total / 1e6:.1f} M parameters, {moving / 1e6:.1f} M train"
    yield f"teachers   {', '.join(sorted([*parts.models, *parts.served]))}"
    pairs = probe(parts)
    yield f"data       {read(recipe, pairs)}"
    parts = aligned(parts, starts(parts) if recipe.modality == "action" else pairs)
    how = "shared by" if parts.responses.share else "repeated for"
    yield f"alignment  sampler and training forward agree; prompts are {how} their answers"
    for name, value in train_step(parts, pairs, 0).items():
        yield f"{name:30} {value:.5g}"


def read(recipe: schema.Recipe, pairs: list[Pair]) -> str:
    if not isinstance(recipe, schema.ActionRecipe):
        return f"{len(pairs)} samples of {recipe.data.train}: views {', '.join(sorted(pairs[0].views))}"
    if recipe.data.demonstrations:
        return f"{len(pairs)} decisions of {recipe.data.demonstrations}: views {', '.join(sorted(pairs[0].views))}"
    return f"{len(pairs)} start states of {', '.join(recipe.data.tasks)} in {recipe.robot.name}"


def starts(parts: Parts) -> list[Pair]:
    """A few start states of the test."""
    return [pair for _, pair in islice(open_tests(parts.recipe).pairs(parts.adapter, epochs=1), PROBE)]


def probe(parts: Parts) -> list[Pair]:
    """A few training pairs; where the shards are still to be made, a handful in a temporary folder."""
    if isinstance(parts.recipe, schema.ActionRecipe):
        training, _ = open_shards(parts.recipe)
        return [pair for _, pair in islice(training.pairs(parts.adapter), PROBE)]
    data = parts.recipe.data
    if data.prepare is None or Path(data.train).is_dir():
        return [pair for _, pair in islice(training_shards(parts.recipe).pairs(parts.adapter), PROBE)]
    with tempfile.TemporaryDirectory() as folder:
        prepare_shards(data.prepare, folder, "train", PROBE)
        return [pair for _, pair in islice(Shards(folder).pairs(parts.adapter), PROBE)]


def evaluate_only(
    recipe: schema.Recipe, folder: str | None, output: str, limit: int | None = None
) -> list[dict[str, Any]]:
    """Records of the recipe's test questions (the first `limit`) under its model, or under a checkpoint or exported
    folder; kept at `output`."""
    parts = measured(recipe, folder)
    recipe = parts.recipe
    tests = open_tests(recipe).pairs(parts.adapter, epochs=1)
    pairs = [pair for _, pair in islice(tests, limit or recipe.eval.samples)]
    parts = aligned(parts, pairs[:PROBE])
    records = act_or_answer(parts, pairs)
    evaluate.write(records, Path(output))
    return records


def measured(recipe: schema.Recipe, folder: str | None, judged: bool = False) -> Parts:
    """The parts that a model is measured with, a checkpoint's in place of the recipe's, and with its judge where the
    measure is to be the recipe's own; no teacher is loaded."""
    recipe = of_checkpoint(recipe, folder)
    nothing = {"objective": {}, "scoring": {}, "teachers": {}} | ({} if judged else {"judge": None})
    parts = build(recipe.model_copy(update=nothing))
    if recipe.model.lora and folder:
        checkpoint.load_weights(Path(folder), parts.student)
    return parts


def evaluate_benchmarks(
    recipe: schema.Recipe,
    folder: str | None,
    sources: Mapping[str, str],
    output: str,
    *,
    view: str = "student",
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Records of benchmarks ({name: file, folder or pattern}) under the recipe's model or a checkpoint, kept at
    `output`, where an earlier run of the same may have left some. Raises ValueError for a robot's recipe."""
    if recipe.modality == "action":
        raise ValueError(
            f"{recipe.name} is a recipe of modality action, whose model answers with actions, and a benchmark asks "
            "questions about images; take a recipe of modality vision"
        )
    refuse_view(view)
    samplings = {"answer": schema.Sampling(temperature=0, view=view)}
    recipe = recipe.model_copy(
        update={"modality": "vision", "rollout": recipe.rollout.model_copy(update={"samplings": samplings})}
    )
    benchmarks = [open_benchmark(recipe, name, source) for name, source in sources.items()]
    extractor = recipe.eval.extractor.model if recipe.eval.extractor else None
    model = folder or recipe.model.name
    run = {"model": model, "weights": checkpoint.stamp(Path(folder_of(model))), "view": view}
    run |= {
        "max_tokens": recipe.rollout.max_tokens,
        "extractor": extractor,
        "min_pixels": recipe.model.min_pixels,
        "max_pixels": recipe.model.max_pixels,
    }
    benchmark.kept(Path(output), run)
    parts = measured(recipe, folder)
    parts.sampler.sync()
    return benchmark.answer(
        benchmarks, parts.adapter, parts.sampler, Path(output), batch=recipe.eval.batch, run=run, view=view, limit=limit
    )


def export(recipe: schema.Recipe, folder: str | None, output: str) -> None:
    """Write the recipe's model, or its checkpoint at `folder`, as a plain Hugging Face folder, its adapter merged.

    Raises ValueError when `output` is there already.
    """
    if Path(output).exists():
        raise ValueError(f"{output} is there already; name a folder that is not")
    recipe = of_checkpoint(recipe, folder)
    student = load_student(recipe)
    if recipe.model.lora and folder:
        checkpoint.load_weights(Path(folder), student)
    checkpoint.export(student, load_processor(recipe), Path(output))


def of_checkpoint(recipe: schema.Recipe, folder: str | None) -> schema.Recipe:
    """The recipe for a checkpoint: a whole model takes the place of the recipe's, an adapter joins it.

    Raises ValueError when the folder holds an adapter and the recipe has none.
    """
    if folder is None:
        return recipe
    if not is_adapter(Path(folder)):
        whole = {"name": folder, "lora": None, "train": None}
        return recipe.model_copy(update={"model": recipe.model.model_copy(update=whole)})
    if recipe.model.lora is None:
        raise ValueError(f"{folder} holds an adapter, and the recipe has no model.lora; use its run's own recipe.yaml")
    return recipe
