#!/usr/bin/env python
"""Weigh a recipe's training questions by how often its student answers them rightly: Uni-OPD's offline balance.

    python tools/balance_difficulty.py configs/uni_opd_omni.yaml
    xmodal-opd train configs/uni_opd_omni.yaml data.train=data/uni/both/train/index-balanced.json

The student answers every training question N times; k of them are right. Questions of a band of difficulty are then
repeated in each epoch, up to the size of the band's largest bin: k = 1 … N-1 where more questions are always right than
are any mid number of times (U-shaped), else k = 1 … N (mirrored J). None is dropped: arXiv:2605.03677 found that those
always or never right are needed. The target and the cap of 4 are a reconstruction, which the paper does not tell.

Written are an index that points to the same shards, and the pass counts beside it; stopped at any moment and started
again with the same settings, it goes on behind the last counted questions.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import file_digest, sha256
from itertools import groupby
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a program, not from its package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.arguments import from_one, over_zero

Counts = dict[int, int | None]  # place of a question among all -> how often it was right; None: it is broken


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe in the package")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--checkpoint", help="a checkpoint or model folder that answers; default: the recipe's model")
    parser.add_argument("--samples", type=from_one, default=8, help="answers to each question, N (8)")
    parser.add_argument("--temperature", type=over_zero, default=1.0, help="of the answers (1)")
    parser.add_argument("--cap", type=from_one, default=4, help="how often a question comes at most in an epoch (4)")
    parser.add_argument(
        "--shape", choices=("auto", "u", "j"), default="auto", help="the band: what the counts say (auto)"
    )
    parser.add_argument("--batch", type=from_one, default=24, help="questions at once (24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="the index to write; default: index-balanced.json beside the first shard")
    return parser


def main() -> None:
    options = arguments().parse_intermixed_args()
    try:
        for line in balance(options):
            print(line)
    except (ValueError, OSError, RuntimeError, ImportError, KeyError) as error:
        sys.exit(f"balance_difficulty: {error}")
    except KeyboardInterrupt:
        print("balance_difficulty: stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)


def balance(options: argparse.Namespace) -> Iterator[str]:
    """Count, weigh, write; the lines to print. Raises ValueError for shards that are weighed already, and for a robot's
    recipe, which has none."""
    from xmodal_opd import config
    from xmodal_opd.build.shards import prepare_shards
    from xmodal_opd.cli import quiet
    from xmodal_opd.data import Shards

    recipe = config.load(options.recipe, options.overrides)
    if recipe.modality == "action":
        raise ValueError(f"{options.recipe} plays episodes, modality action; weighed are questions in shards alone")
    quiet()
    if recipe.data.prepare is not None:
        prepare_shards(recipe.data.prepare, recipe.data.train, "train", recipe.data.prepare.train)
    shards = Shards(recipe.data.train, shuffle=False)
    if any(shard.repeats for shard in shards.shards):
        raise ValueError(f"{recipe.data.train} is weighed already; name the shards themselves as data.train")
    beside = Path(shards.shards[0].url).parent / "index-balanced.json"
    index = Path(options.output) if options.output else beside
    settings = settings_of(recipe, options, shards)
    counts = passes(recipe, options, shards, index.with_suffix(".passes.jsonl"), settings)
    shape = options.shape if options.shape != "auto" else shape_of(counts, options.samples)
    repeats = weigh(counts, band(shape, options.samples), options.cap, options.seed)
    table = {"before": histogram(counts), "after": histogram(counts, repeats)}
    write(index, shards, repeats, {**settings, "shape": shape, "cap": options.cap, "right": table})
    yield f"{shape.upper()}-shaped; questions by how many of {options.samples} answers are right, and after weighing"
    yield from bars(table["before"], table["after"], options.samples)
    yield f"{index}: {len(repeats)} questions, {sum(repeats)} in an epoch; set data.train={index} data.prepare=null"


# ---- how often the student is right


def settings_of(recipe: Any, options: argparse.Namespace, shards: Any) -> dict[str, Any]:
    """All that the counts depend on, as JSON: who answers, how, what is asked, and what is right."""
    from xmodal_opd.checkpoint import stamp
    from xmodal_opd.models import folder_of

    asked = {k: getattr(options, k) for k in ("checkpoint", "samples", "temperature", "batch", "seed")}
    folders = [folder_of(recipe.model.name), *filter(None, [options.checkpoint])]
    return asked | {
        "model": recipe.model.model_dump(mode="json", exclude={"train", "trust_remote_code"}),
        "weights": [stamp(Path(folder)) for folder in folders],
        "max_tokens": recipe.rollout.max_tokens,
        "judge": recipe.judge and recipe.judge.model_dump(mode="json"),
        "shards": {shard.url: shard.samples for shard in shards.shards},
        "contents": contents([shard.url for shard in shards.shards]),
    }


def contents(urls: Sequence[str]) -> str:
    """A digest of the shards of this disk, which may be made again under the same names."""
    whole = sha256()
    for path in filter(Path.is_file, map(Path, urls)):
        with path.open("rb") as file:
            whole.update(file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def passes(recipe: Any, options: argparse.Namespace, shards: Any, path: Path, settings: Mapping[str, Any]) -> Counts:
    """The pass counts of all questions, those that `path` has already and those that are counted now. Raises ValueError
    when these are not as many as the questions."""
    counts = begun(path, settings)
    with path.open("a", encoding="utf-8") as file:
        for some in answered(recipe, options, shards, len(counts)):
            file.write("".join(json.dumps([place, count]) + "\n" for place, count in some.items()))
            file.flush()
            counts |= some
    if len(counts) != known(shards):
        raise ValueError(
            f"{path} has counts of {len(counts)} questions, and the shards hold {known(shards)}; remove it, or name "
            "another --output"
        )
    return counts


def begun(path: Path, settings: Mapping[str, Any]) -> Counts:
    """The counts of an interrupted run of the same settings; a line that was cut short is dropped. Raises ValueError
    when they are of other settings."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    told = [json.loads(line) for line in lines[:-1]]  # behind the last newline is nothing, or half a line
    if told and told[0] != settings:
        other = "; ".join(differences(told[0], settings))
        raise ValueError(f"{path} holds counts of other settings ({other}); remove it, or name another --output")
    whole = told[1:] if told else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in (settings, *whole)), encoding="utf-8")
    return dict(whole)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What four settings at most were, and are now."""
    from xmodal_opd.config import flat

    old, new = flat(then), flat(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names[:4]]


def answered(recipe: Any, options: argparse.Namespace, shards: Any, start: int) -> Iterator[Counts]:
    """The counts of `batch` questions at a time, from question `start` on."""
    import torch
    from rich.progress import Progress

    from xmodal_opd import inspect

    total = known(shards)
    if start >= total:
        return
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    parts = inspect.measured(recipe, options.checkpoint, judged=True)
    with Progress(transient=True) as progress:
        task = progress.add_task("answering", total=total, completed=start)
        samples = shards.samples(start - start % options.batch, epochs=1)
        for number, some in groupby(samples, lambda sample: (sample["__position__"] - 1) // options.batch):
            first, last = number * options.batch, min((number + 1) * options.batch, total)
            counts: Counts = dict.fromkeys(range(first, last))
            counts |= right(parts, list(some), options, first)
            yield {place: count for place, count in counts.items() if place >= start}
            progress.update(task, completed=last)


def known(shards: Any) -> int:
    """How many questions there are; read once where no index tells."""
    if None in shards.counts:
        for _ in shards.samples(epochs=1):
            pass
    return len(shards)


def right(parts: Any, samples: Sequence[Mapping[str, Any]], options: argparse.Namespace, first: int) -> Counts:
    """How many answers to each sample are right, by the recipe's judge, or by the sample's answer where it has none."""
    from xmodal_opd.evaluate import is_right
    from xmodal_opd.scoring.judge import judge
    from xmodal_opd.types import SampleError, Sampling

    pairs: dict[int, Any] = {}
    for sample in samples:
        try:
            pairs[sample["__position__"] - 1] = parts.adapter.pair(sample)
        except SampleError as error:
            print(f"skipped {sample['__key__']}: {error}", file=sys.stderr)
    if not pairs:
        return {}
    asked = {"": Sampling(options.samples, options.temperature)}
    rollouts = parts.sampler.generate(list(pairs.values()), asked, options.seed * 1_000_003 + first)[""]
    if parts.judge is not None and parts.reference is None:
        passed = [value is not None and value >= 1 for value in judge(parts.judge, rollouts, None)[0]]
    else:
        passed = [is_right(rollout.pair, rollout, parts.right) for rollout in rollouts]
    sums = Counter(rollout.group for rollout, it in zip(rollouts, passed, strict=True) if it)
    return {place: sums[group] for group, place in enumerate(pairs)}


# ---- how often each question comes


def shape_of(counts: Counts, samples: int) -> str:
    """ "u" where more questions are always right than are any mid number of times, else "j"."""
    bins = Counter(counts.values())
    return "u" if bins[samples] > max((bins[k] for k in range(1, samples)), default=0) else "j"


def band(shape: str, samples: int) -> range:
    return range(1, samples if shape == "u" else samples + 1)


def weigh(counts: Counts, within: range, cap: int, seed: int) -> list[int]:
    """How often each question comes in an epoch: in every bin of the band until it is as large as the band's largest,
    at most `cap` times each; who comes once more than others is drawn from the seed."""
    repeats = dict.fromkeys(sorted(counts), 1)
    bins = {k: [place for place, count in counts.items() if count == k] for k in within}
    largest = max(map(len, bins.values()), default=0)
    for places in filter(None, bins.values()):
        each, more = divmod(min(largest, cap * len(places)), len(places))
        lucky = sorted(places, key=lambda place: random.Random(f"{seed} {place}").random())[:more]
        repeats |= dict.fromkeys(places, each) | dict.fromkeys(lucky, each + 1)
    return [repeats[place] for place in sorted(repeats)]


def histogram(counts: Counts, repeats: Sequence[int] | None = None) -> dict[str, int]:
    """Questions by pass count, each as often as it comes; "broken" is what could not be asked."""
    sums: Counter[str] = Counter()
    for i, place in enumerate(sorted(counts)):
        count = counts[place]
        sums["broken" if count is None else str(count)] += 1 if repeats is None else repeats[i]
    return dict(sorted(sums.items(), key=lambda item: (len(item[0]), item[0])))


def bars(before: Mapping[str, int], after: Mapping[str, int], samples: int) -> Iterator[str]:
    longest = max(after.values(), default=1)
    for k in [*map(str, range(samples + 1)), *({"broken"} & before.keys())]:
        yield f"{k:>6} {before.get(k, 0):6} {after.get(k, 0):6} {'#' * round(40 * after.get(k, 0) / longest)}"


def write(path: Path, shards: Any, repeats: list[int], difficulty: Mapping[str, Any]) -> None:
    """The index: whole or not at all. Shards of this disk are named from its folder."""
    entries, start = [], 0
    for shard, count in zip(shards.shards, shards.counts, strict=True):
        url = (
            shard.url
            if "://" in shard.url
            else str(Path(shard.url).resolve().relative_to(path.parent.resolve(), walk_up=True))
        )
        entries.append({"url": url, "nsamples": count, "repeats": repeats[start : start + count]})
        start += count
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": entries, "difficulty": difficulty}
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    main()
