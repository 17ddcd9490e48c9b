"""What a recipe learns from and is measured on: shards, start states of episodes, benchmarks."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from modalities.audio import prepare as speech
from modalities.chat import DERIVED
from modalities.rows import count, find
from modalities.vision import prepare as scenes
from modalities.vision.benchmarks import LAYOUTS, questions
from xmodal_opd import dist, schema
from xmodal_opd.background import read_ahead
from xmodal_opd.benchmark import Benchmark
from xmodal_opd.build import Parts, robots
from xmodal_opd.data import Shards
from xmodal_opd.scoring.benchmarks import Ask, score
from xmodal_opd.scoring.endpoint import asker
from xmodal_opd.types import Pair, SampleError


def open_shards(recipe: schema.Recipe) -> tuple[Shards | robots.Starts, Shards | robots.Starts]:
    """(training shards, shuffled without end; test shards, in order), made first where the recipe says how; or the
    start states of a robot's episodes, and of those to learn from what others did, where the recipe says where that is.
    """
    seed = schema.order_seed(recipe)
    if isinstance(recipe, schema.ActionRecipe):
        learnt, tests = robots.starts(recipe, seed, dist.rank(), dist.world())
        robots.refuse_other_chunk(recipe)
        return training_shards(recipe, seed) if recipe.data.demonstrations else learnt, tests
    if recipe.data.prepare is not None:
        prepare_shards(recipe.data.prepare, recipe.data.train, "train", recipe.data.prepare.train)
    return training_shards(recipe, seed), open_tests(recipe)


def training_shards(recipe: schema.Recipe, seed: int = 0, shuffle: bool = True) -> Shards:
    """This rank's training samples, as far as they are fit for the recipe's teachers."""
    views, needs = views_of_shards(recipe), partial(views_of_teachers, recipe)
    where = {"rank": dist.rank(), "world": dist.world()}
    return Shards(schema.learnt_from(recipe), seed=seed, shuffle=shuffle, views=views, needs=needs, **where)


def training_pairs(parts: Parts, shards: Shards | robots.Starts, position: int) -> Iterator[tuple[int, Pair]]:
    """This rank's pairs from a position on, those of the next step read in a thread while this one trains."""
    if isinstance(shards, robots.Starts):
        return shards.pairs(parts.adapter, position)
    adapter = copy.deepcopy(parts.adapter)  # a tokenizer that two threads share mixes up their padding
    return read_ahead(shards.pairs(adapter, position), parts.recipe.train.prompts // dist.world())


def open_tests(recipe: schema.Recipe) -> Shards | robots.Starts:
    """The test shards, in order, made first where the recipe says how; or the start states of the test."""
    if isinstance(recipe, schema.ActionRecipe):
        return robots.starts(recipe, 0, 0, 1)[1]
    if recipe.data.prepare is not None:
        prepare_shards(recipe.data.prepare, recipe.data.test, "test", recipe.data.prepare.test)
    return Shards(recipe.data.test, shuffle=False, views=views_of_shards(recipe))


def open_benchmark(recipe: schema.Recipe, name: str, source: str) -> Benchmark:
    """A benchmark in files as a hub has them. Raises ValueError for a layout that is not known, and for files that are
    not of it."""
    if name not in LAYOUTS:
        raise ValueError(f"there is no layout {name!r} of a benchmark; there are: {', '.join(LAYOUTS)}")
    files, part = find(source), recipe.eval.extractor
    next(questions(name, files))  # what is wrong with the files is told before a model is loaded
    ask: Ask | None = None if part is None else asker("eval.extractor", **part.model_dump())
    return Benchmark(name, questions(name, files), count(files), partial(score, name, ask=ask))


def refuse_view(view: str) -> None:
    """Raises ValueError for a view that a benchmark's question does not have."""
    if view not in (have := ("student", *DERIVED)):
        raise ValueError(f"a benchmark's question has no view {view!r}; it has: {', '.join(have)}")


def prepare_shards(settings: schema.Prepare, folder: str, split: str, count: int) -> None:
    """Built-in questions, spoken or drawn; shards that are there already, with the same settings, are kept."""
    if dist.rank() == 0:
        made = scenes if isinstance(settings, schema.Scenes) else speech
        made.prepare(folder, count=count, split=split, **settings.model_dump(exclude={"train", "test"}))
    dist.gather(None)


def views_of_shards(recipe: schema.Recipe) -> set[str]:
    """The views every sample must have: all but those that the adapter makes where they are missing."""
    return schema.views_of_all(recipe) - DERIVED.keys()


def views_of_teachers(recipe: schema.Recipe, meta: Mapping[str, Any]) -> set[str]:
    """The views that a training sample of that meta must have besides. Raises SampleError when none teaches it, or it
    is of no kind that has a dual weight."""
    try:
        if recipe.dual:
            schema.kind_in(recipe.dual, meta)
        return schema.views_of_its_teachers(recipe, meta) - DERIVED.keys()
    except ValueError as error:
        raise SampleError(str(error)) from None
