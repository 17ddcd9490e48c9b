"""A model measured as its recipe says: on questions or in episodes, by all ranks together, after a self-test."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from xmodal_opd import dist, episodes, evaluate, schema
from xmodal_opd.build import Parts
from xmodal_opd.build.robots import filming, refuse_mismatch
from xmodal_opd.rollout.env import EnvSampler
from xmodal_opd.selftest import sharing
from xmodal_opd.teachers import try_teachers
from xmodal_opd.types import Pair, Sampling

PROBE = 4  # questions


def evaluated(parts: Parts, tests: list[Pair], path: Path | None) -> list[dict[str, Any]]:
    """Records of the test questions, divided among the ranks and kept at `path`: a resumed run reads what it wrote."""
    if dist.decided(path is not None and path.is_file()):
        return dist.decided(evaluate.read(path) if path is not None and dist.rank() == 0 else [])
    with parts.engine.whole():
        records = measured(parts, evaluate.share(tests), path and path.with_suffix(""))
    records = evaluate.joined(records, len(tests))
    if path is not None and dist.rank() == 0:
        evaluate.write(records, path)
    return records


def measured(parts: Parts, tests: list[Pair], folder: Path | None = None) -> list[dict[str, Any]]:
    """Records of this rank's test questions, or of episodes from its start states, films of which go to `folder`."""
    alone, options = replace(parts.responses, together=False), parts.recipe.eval.model_dump(include={"batch", "kl"})
    if isinstance(parts.recipe, schema.ActionRecipe) and isinstance(parts.sampler, EnvSampler):
        sampler = replace(parts.sampler, film=filming(parts.recipe, folder))
        return episodes.evaluate(tests, sampler, alone, parts.instructor, **options)
    return evaluate.evaluate(tests, parts.student, parts.sampler, alone, parts.right, **options)


def aligned(parts: Parts, pairs: list[Pair]) -> Parts:
    """The parts, after the self-test on a few questions; with prompts repeated where this model cannot share them."""
    if isinstance(parts.recipe, schema.ActionRecipe) and isinstance(parts.sampler, EnvSampler):
        refuse_mismatch(parts.recipe, parts.sampler.workers.about())
    parts.sampler.sync()
    with parts.engine.whole():
        sampled = parts.sampler.generate(pairs, {"test": Sampling(n=2)}, seed=parts.recipe.train.seed)["test"]
        responses, why = sharing(parts.student, parts.responses, sampled)
    try_teachers(parts, sampled)
    if why:
        dist.say(f"prompts are repeated for every answer, which is slower: {why}")
    return replace(parts, responses=responses)
