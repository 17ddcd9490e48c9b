"""What a recipe says must fit together: names that point inside it exist, and no part asks for what another rules out.

Every check raises ValueError in one sentence: where, what was found, what exists, what to do.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xmodal_opd.schema import OWN, ActionRecipe, Recipe, Source, judged, piece_name, teachers_of


def check(path: str, recipe: Recipe) -> None:
    """Every check there is, in order; the file's name goes before what one of them says."""
    try:
        for each in (check_terms, check_sampling, check_dual, check_robot, check_teachers, check_judge, check_gates):
            each(recipe)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_terms(recipe: Recipe) -> None:
    samplings = recipe.rollout.samplings
    if not recipe.objective:
        raise ValueError("the objective has no term, so there is nothing to train for")
    for name, term in recipe.objective.items():
        if term.sampling not in samplings:
            have = ", ".join(samplings) or "none"
            raise ValueError(
                f"objective.{name}.sampling names {term.sampling!r}{hint(term.sampling, samplings)}; "
                f"rollout.samplings has: {have}"
            )
        still = {model for model, _ in teachers_of(term.teacher).values()} - {"current"}
        if not term.teacher.stop_gradient and still:
            raise ValueError(
                f"objective.{name}.teacher.stop_gradient=false needs a teacher that moves: model current, "
                f"not {min(still)!r}"
            )


def check_sampling(recipe: Recipe) -> None:
    if (recipe.rollout.name == "vllm") != bool(recipe.rollout.servers):
        raise ValueError(
            f"rollout.servers is {recipe.rollout.servers} and rollout.name is {recipe.rollout.name!r}; vllm "
            "needs the addresses of its servers, such as [http://127.0.0.1:8000], and hf has none"
        )
    if recipe.rollout.ahead and recipe.rollout.name == "hf":
        raise ValueError(
            "rollout.ahead is 1 and rollout.name is 'hf', which samples with the weights and the device that "
            "train: there is nothing to overlap; use rollout.name=vllm, or rollout.ahead=0"
        )


def check_judge(recipe: Recipe) -> None:
    """Whoever reads a reward needs a judge, and that one answer to compare with."""
    if recipe.judge and recipe.judge.reference and recipe.judge.reference.n != 1:
        raise ValueError(f"judge.reference.n is {recipe.judge.reference.n}; the judge compares with one answer")
    if recipe.judge is None and (needs := judged(recipe)):
        piece = next(iter(needs.values()))
        raise ValueError(f"the objective uses {piece!r}, which reads the reward, but the recipe has no judge")


def check_gates(recipe: Recipe) -> None:
    """What a gate reads of a sampling's answers, the judge must have seen."""
    seen = judged(recipe)
    for name, spec in ((n, weight) for n, term in recipe.objective.items() for weight in term.weights):
        options = (spec if isinstance(spec, dict) else {}).get("gate") or {}
        score = options.get("score", "text_reward")  # the default of the piece
        sampling = score.removesuffix("_reward")
        if piece_name(spec) == "gate" and sampling != score and sampling not in seen:
            raise ValueError(
                f"objective.{name} has the weight 'gate' on {score!r}, what the judge says of the answers of "
                f"{sampling!r}, and it sees those of: {', '.join(seen) or 'none'}; it sees a sampling that a term "
                "reads with a piece that asks for its reward, such as the advantage reward"
            )


def check_robot(recipe: Recipe) -> None:
    """What tells of the whole vocabulary at temperature 1 tells nothing of a policy over actions, and a decision is
    sampled whole."""
    if not isinstance(recipe, ActionRecipe):
        return
    if recipe.teachers:
        raise ValueError(
            f"teachers.{min(recipe.teachers)} is behind servers, which tell log-probs of a whole vocabulary "
            "at temperature 1, and a robot's are of action tokens alone; name a folder or hub name as the teacher"
        )
    if recipe.rollout.name != "hf":
        raise ValueError(f"rollout.name is {recipe.rollout.name!r}, but a robot's policy samples with hf only")
    chunk, size, most = recipe.robot.chunk, recipe.robot.size, recipe.rollout.max_tokens
    if chunk * size > most:
        raise ValueError(
            f"a decision is robot.chunk {chunk} x robot.size {size} = {chunk * size} tokens, and "
            f"rollout.max_tokens is {most}; set it to {chunk * size}, or take shorter chunks"
        )
    if recipe.data.demonstrations:
        check_demonstrations(recipe)


def check_demonstrations(recipe: ActionRecipe) -> None:
    """Of what was shown there is one answer to each observation, which nobody sampled, and no outcome."""
    weights = [(name, piece_name(weight)) for name, term in recipe.objective.items() for weight in term.weights]
    idle = [f"rollout.samplings.{name}.n" for name, some in recipe.rollout.samplings.items() if some.n > 1]
    idle += [f"objective.{name}.weights {weight}" for name, weight in weights if weight in ("tis", "mismatch_mask")]
    idle += ["judge"] if recipe.judge else []
    idle += ["robot.depth"] if recipe.robot.depth else []
    if idle:
        raise ValueError(
            "data.demonstrations shows one chunk of actions for each observation, nothing is sampled and no "
            f"episode is played in training, so {idle[0]} would mean nothing; take it out, or the demonstrations"
        )


def check_dual(recipe: Recipe) -> None:
    samplings, part = recipe.rollout.samplings, recipe.dual
    if part and (part.sampling not in samplings or part.scorer not in recipe.scoring):
        raise ValueError(
            f"dual reads the answers of a sampling ({', '.join(samplings)}) and the score of a scorer "
            f"({', '.join(recipe.scoring) or 'none'}); found {part.sampling!r} and {part.scorer!r}"
        )
    asking = [n for n, term in recipe.objective.items() if "dual" in map(piece_name, term.weights)]
    if asking and part is None:
        raise ValueError(
            f"objective.{asking[0]} has the weight 'dual', which the recipe's part `dual:` makes, but it has "
            "none; give it one, such as dual: {sampling: NAME, scorer: NAME}"
        )


def check_teachers(recipe: Recipe) -> None:
    """Served teachers have names of their own, and where there are some a bare name must be one of them or a folder."""
    if taken := [name for name in recipe.teachers if name in OWN or "/" in name]:
        raise ValueError(f"teachers.{taken[0]} is the name of a model already; give the served teacher another")
    if idle := [n for n, t in recipe.objective.items() if not t.divergence and (t.teacher.route or t.teacher.contrast)]:
        raise ValueError(
            f"objective.{idle[0]} is a policy term, which asks no teacher, so its teacher's route or contrast "
            "would do nothing; give it to the scorer that its advantages read"
        )
    sources = {f"objective.{n}.teacher": t.teacher for n, t in recipe.objective.items() if t.divergence}
    sources |= {f"scoring.{name}": scorer for name, scorer in recipe.scoring.items()}
    for where, name in ((w, n) for place, source in sources.items() for w, n in named(place, source)):
        if recipe.teachers and name not in (*OWN, *recipe.teachers) and "/" not in name and not Path(name).is_dir():
            have = ", ".join(recipe.teachers)
            raise ValueError(f"{where} names {name!r}{hint(name, recipe.teachers)}; teachers has: {have}")
    for name, scorer in recipe.scoring.items():
        served = {model for model, _ in teachers_of(scorer).values()} & recipe.teachers.keys()
        if scorer.divergence and served:
            raise ValueError(
                f"scoring.{name}.divergence needs the whole vocabulary of {min(served)!r}, and a served "
                "teacher tells its likeliest tokens only; set it to false, or name a folder or hub name as the teacher"
            )


def named(place: str, source: Source) -> list[tuple[str, str]]:
    """Where a recipe names a source's models, and as what."""
    if source.route is None:
        return [(f"{place}.model", source.model)]
    return [(f"{place}.route.to.{value}.model", model) for value, (model, _) in teachers_of(source).items()]


def hint(word: str, words: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
