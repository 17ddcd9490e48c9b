"""Judges: does a response reach the answer it should?

A judge has TRL's reward signature, `def reward(prompts, completions, **columns) -> list[float | None]`, and may be
async. Columns are lists with one entry per completion: `key`, `answer` (of the shard), `meta`, `finished`, and, when
the recipe asks the judge to compare with it, `reference`: the model's own answer to the text. None means that the judge
could not decide: the response is left out and counted, never taken for wrong. `fail(reason)` lets a judge say why.
"""

import asyncio
import hashlib
import inspect
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal

from xmodal_opd.objective import Spec, name_of, options_of, outside, pick
from xmodal_opd.scoring.answers import announced, extract, plain, same_answers, without_thoughts
from xmodal_opd.scoring.endpoint import Endpoint, endpoint_at, replies_of
from xmodal_opd.scoring.layouts import LAYOUTS, reached
from xmodal_opd.scoring.maths import require_maths
from xmodal_opd.serving import Failure
from xmodal_opd.types import Rollout

Rewards = list[float | None]
Reward = Callable[..., Any]  # prompts, completions, **columns -> Rewards, or an awaitable of them
Ask = Callable[[list[str]], list[str]]  # greedy answers of the run's own model to prompts in text
Target = Literal["answer", "reference"]

QUESTION = """Do the two responses below reach the same final answer? Look only at the final answers, not at the way \
there nor at the wording. Reply with the single digit 1 if they are the same and 0 if they are not.

{prompt}Response 1:
{response}

Response 2:
{target}

1 or 0?"""
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
COLUMNS = ("prompts", "completions", "key", "answer", "meta", "finished", "reference", "fail")


# ---- what the loop calls


def build_judge(spec: Spec, ask: Ask | None = None) -> Reward:
    """The judge a recipe names: "match", {"llm": {"model": …}} or "module:function", a TRL reward of your own.

    `ask` answers prompts in text with the run's own model; only `self` needs it. Raises ValueError naming what exists.
    """
    name = name_of(spec)
    return load(name, options_of("judge", spec)) if ":" in name else pick("judge", JUDGES, spec)(ask)


def load(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """The TRL reward "module:function", with `options` bound. Raises ValueError when it cannot take the columns."""
    reward = outside("judge", name)
    if not callable(reward) or not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(reward).parameters.values()):
        raise ValueError(f"judge {name!r} must be a TRL reward: a function (prompts, completions, **columns)")
    needs = [p.name for p in inspect.signature(reward).parameters.values() if p.default is p.empty and p.kind in NAMED]
    if lacking := [column for column in needs if column not in {*COLUMNS, *(options or {})}]:
        raise ValueError(f"judge {name!r} needs the column {lacking[0]!r}; there are: {', '.join(COLUMNS)}")
    return partial(reward, **options) if options else reward


def judge(
    reward: Reward,
    rollouts: Sequence[Rollout],
    references: Sequence[str | None] | None = None,
) -> tuple[Rewards, dict[str, int]]:
    """Rewards of the rollouts, and how often each reason kept the judge from deciding (its sum is the count of None).

    references: the model's own text answer for each rollout, when that is what the judge compares with.
    The prompts it sees are `meta["question"]`, else empty. Blocks, but may run in a thread, which is
    how a judge overlaps with a forward. Raises ValueError when the judge returns something other than one number or
    None per completion; what the judge itself raises passes through.
    """
    columns: dict[str, Any] = {
        "key": [r.pair.key for r in rollouts],
        "answer": [r.pair.answer for r in rollouts],
        "meta": [dict(r.pair.meta) for r in rollouts],
        "finished": [r.finished for r in rollouts],
    }
    if references is not None:
        columns["reference"] = list(references)
    asked = [r.pair.meta.get("question", "") for r in rollouts]
    reasons: list[str] = []
    returned = reward(prompts=asked, completions=[r.text for r in rollouts], fail=reasons.append, **columns)
    rewards = checked(_wait(returned) if inspect.isawaitable(returned) else returned, columns["key"], _name(reward))
    unexplained = rewards.count(None) - len(reasons)
    return rewards, dict(Counter(reasons) + Counter({"undecided": unexplained}))


def checked(returned: Any, keys: Sequence[str], name: str) -> Rewards:
    """One float or None per sample; a NaN counts as None. Raises ValueError naming the judge and the sample."""
    if isinstance(returned, str) or not hasattr(returned, "__iter__"):
        raise ValueError(
            f"judge {name!r} returned {type(returned).__name__}, not a list with one reward per completion"
        )
    values = [v.item() if hasattr(v, "item") else v for v in returned]
    if len(values) != len(keys):
        raise ValueError(f"judge {name!r} returned {len(values)} rewards for {len(keys)} completions")
    for value, key in zip(values, keys, strict=True):
        if value is not None and (not isinstance(value, Real) or abs(float(value)) == float("inf")):
            raise ValueError(
                f"judge {name!r} returned {value!r} for sample {key!r}; a reward is a finite number or None"
            )
    return [None if v is None or v != v else float(v) for v in values]


# ---- the judges


def match(ask: Ask | None = None, *, to: Target | None = None, maths: bool = False) -> Reward:
    """1 when the final answers are the same by rule, 0 when not (CORD's J(y, ŷ), arXiv:2601.16547 Eq. 8).

    to: compare with the shard's `answer` or the model's own `reference`; default: the reference when there is one.
    maths: LaTeX too, through `math-verify`.
    """
    if maths:
        require_maths()

    def reward(prompts, completions, *, fail=_ignore, **columns) -> Rewards:
        compare, targets = _targets("match", to, columns, len(completions))
        answers = [None if t is None else extract(t) if compare == "reference" else announced(t) or t for t in targets]
        same = same_answers(list(zip(completions, answers, strict=True)), maths)
        return [_decided(verdict, "mathematics took too long", fail) for verdict in same]

    return reward


def accuracy_format(
    ask: Ask | None = None, *, layout: Literal["tags", "marker"] = "tags", format: float = 0.5, maths: bool = True
) -> Reward:
    """1 for the shard's answer, and `format` more for the layout, right or wrong. APO, arXiv:2506.21655, from its code.

    layout: `<think>…</think><answer>…</answer>` ("tags"), or reasoning that ends in "answer: …" ("marker"). The answer
    is compared by rule, then by `math-verify` where `maths`; a gold from a to f as a letter, and the answer may name no
    other; of several numbers in a row none is the answer. Two things of that code are not kept: a gold that math-verify
    cannot read rewards everybody there and is compared as words here; what takes too long is undecided, not 0.
    """
    if not 0 <= format < 1:
        raise ValueError(
            f"judge 'accuracy_format': format is {format}; give 0 or more and less than 1: a reward of 1 means right"
        )
    if maths:
        require_maths()

    def reward(prompts, completions, *, fail=_ignore, **columns) -> Rewards:
        _, targets = _targets("accuracy_format", "answer", columns, len(completions))
        kept, answer = LAYOUTS[layout]
        same = reached(
            [(answer(text), plain(gold or "")) for text, gold in zip(completions, targets, strict=True)], maths
        )
        rewards = [None if s is None else s + format * kept(text) for s, text in zip(same, completions, strict=True)]
        return [_decided(value, "mathematics took too long", fail) for value in rewards]

    return reward


def self_judge(ask: Ask | None = None, *, to: Target | None = None) -> Reward:
    """1 or 0 as the run's own model, reading the text, says. Anything else it says leaves the response undecided."""
    if ask is None:
        raise ValueError("judge 'self' needs the run's model to ask, and there is none here; use 'match' or 'llm'")

    def reward(prompts, completions, *, fail=_ignore, **columns) -> Rewards:
        questions = _questions("self", to, prompts, completions, columns)
        todo = list(dict.fromkeys(q for q in questions if q is not None))  # none: other ranks may have some, and wait
        told = dict(zip(todo, map(verdict, ask(todo)), strict=True))
        return [0.0 if q is None else _decided(told[q], "reply is neither 1 nor 0", fail) for q in questions]

    return reward


def llm(
    ask: Ask | None = None,
    *,
    model: str,
    url: str = "http://127.0.0.1:8000/v1",
    api_key_env: str | None = None,
    to: Target | None = None,
    timeout: float = 60.0,
    retries: int = 2,
    concurrency: int = 8,
    max_tokens: int = 16,
) -> Reward:
    """1 or 0 as a model behind an OpenAI-compatible endpoint says, at temperature 0; equal requests are asked once.

    timeout: seconds for one attempt, slow bodies included. retries: more attempts after a time-out, a lost connection,
    a 5xx or a 429. Once `concurrency` requests in a row have used up their attempts the endpoint is taken for down
    until the next step, so a step never waits much longer than (retries + 1) * timeout for a dead one. api_key_env: the
    environment variable with the key.
    """
    endpoint = endpoint_at("judge 'llm'", url, model, api_key_env, timeout, retries, concurrency, max_tokens)
    known: dict[bytes, float] = {}

    async def reward(prompts, completions, *, fail=_ignore, **columns) -> Rewards:
        questions = _questions("llm", to, prompts, completions, columns)
        keys = [None if q is None else hashlib.blake2b(q.encode()).digest() for q in questions]
        todo = {
            k: q for k, q in zip(keys, questions, strict=True) if k is not None and q is not None and k not in known
        }
        replies = dict(zip(todo, await ask_all(endpoint, list(todo.values())), strict=True))
        known.update({k: v for k, v in replies.items() if isinstance(v, float)})
        return [0.0 if k is None else _decided(known.get(k), str(replies.get(k)), fail) for k in keys]

    return reward


def success(ask: Ask | None = None, *, value: float = 1.0) -> Reward:
    """`value` for every decision of an episode in which the task was done, else 0. SimpleVLA-RL, arXiv:2509.09674."""

    def reward(prompts: list[str], completions: list[str], meta: list[Mapping[str, Any]], **_: Any) -> Rewards:
        return [value * bool(m["success"]) if "success" in m else None for m in meta]

    return reward


JUDGES: dict[str, Callable[..., Reward]] = {
    "match": match,
    "success": success,
    "accuracy_format": accuracy_format,
    "self": self_judge,
    "llm": llm,
}


def verdict(reply: str) -> float | None:
    """1.0 or 0.0 when that is the one digit a reply settles on, thoughts apart; otherwise None."""
    said = set(re.findall(r"(?<![\w.])\d+(?![\w]|\.\d)", without_thoughts(reply)))
    return float(said.pop()) if said in ({"0"}, {"1"}) else None


async def ask_all(endpoint: Endpoint, questions: Sequence[str]) -> list[float | str]:
    """The verdict on each question, or the reason there is none."""
    replies = await replies_of(endpoint, questions)
    said = [str(reply) if isinstance(reply, Failure) else verdict(reply) for reply in replies]
    return ["reply is neither 1 nor 0" if value is None else value for value in said]


# ---- columns


def _targets(judge: str, to: Target | None, columns: Mapping[str, Any], n: int) -> tuple[Target, list[str | None]]:
    """What each completion is compared with.

    A reference without an answer (None or empty) makes every reward of its group 0, and so every centred advantage: the
    model gave nothing to agree with, and the judge did not fail. A missing `answer` is a mistake in the data.
    """
    to = to or ("reference" if "reference" in columns else "answer")
    if to not in ("answer", "reference"):
        raise ValueError(f"judge {judge!r} compares to 'answer' or 'reference', not to {to!r}")
    if to == "reference" and "reference" not in columns:
        raise ValueError(f"judge {judge!r} compares to the model's own answer, but the recipe has no judge.reference")
    targets: list[str | None] = list(columns.get(to) or [None] * n)
    for key, target in zip(columns.get("key") or [None] * n, targets, strict=True):
        if to == "answer" and not (target or "").strip():
            raise ValueError(
                f"judge {judge!r} compares to the answer, but sample {key!r} has none; add `answer` to the shard,"
                " or set judge.reference to compare with the model's own text answer"
            )
    return to, targets


def _questions(
    judge: str, to: Target | None, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Any]
) -> list[str | None]:
    """The question to ask about each completion; None where either side is empty, which is 0 without asking."""
    _, targets = _targets(judge, to, columns, len(completions))
    return [
        comparison(prompt, done, target) if done.strip() and (target or "").strip() else None
        for prompt, done, target in zip(prompts, completions, targets, strict=True)
    ]


def comparison(prompt: Any, response: str, target: str | None) -> str:
    """The question whether a response reaches the answer, which `verdict` reads the reply to."""
    shown = f"The question was:\n{prompt}\n\n" if isinstance(prompt, str) and prompt.strip() else ""
    text = QUESTION.format(prompt=shown, response=response.strip(), target=(target or "").strip())
    return text.encode(errors="replace").decode()  # half a surrogate pair cannot be sent


def _decided(value: float | bool | None, reason: str, fail: Callable[[str], Any]) -> float | None:
    if value is None:
        fail(reason)
        return None
    return float(value)


def _ignore(reason: str) -> None:
    """For callers that do not count reasons, such as TRL."""


def _name(reward: Reward) -> str:
    return getattr(getattr(reward, "func", reward), "__name__", type(reward).__name__)


def _wait(returned: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await returned

    return asyncio.run(wait())
