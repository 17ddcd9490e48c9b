"""Questions weighed by how often the student answers them rightly: the rule, and the whole tool on a small model."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools import balance_difficulty as tool
from xmodal_opd import config
from xmodal_opd.build.shards import training_shards
from xmodal_opd.data import Shards

PROGRAM = Path(__file__).parents[1] / "tools" / "balance_difficulty.py"


def counted(*bins: int) -> dict[int, int | None]:
    """Questions with 0, 1, 2 … right answers, mixed."""
    counts = [k for k, n in enumerate(bins) for _ in range(n)]
    return {(13 * place) % len(counts): k for place, k in enumerate(counts)}


@pytest.mark.parametrize(
    "bins, shape, after",
    [
        ((30, 2, 10, 6, 40), "u", (30, 8, 10, 10, 40)),  # 2 questions come four times, and 4 of 6 twice
        ((50, 2, 10, 6, 9), "j", (50, 8, 10, 10, 10)),  # one of those always right twice
        ((5, 0, 0, 0, 0), "j", (5, 0, 0, 0, 0)),
        ((3, 0, 4, 0, 9), "u", (3, 0, 4, 0, 9)),
    ],
)
def test_the_band_is_filled_up_to_its_largest_bin_and_nothing_is_dropped(bins, shape, after):
    counts = counted(*bins)
    assert tool.shape_of(counts, 4) == shape
    repeats = tool.weigh(counts, tool.band(shape, 4), cap=4, seed=0)
    assert min(repeats) >= 1 and max(repeats) <= 4
    assert Counter(tool.histogram(counts, repeats)) == Counter({str(k): n for k, n in enumerate(after)})
    assert repeats == tool.weigh(dict(reversed(counts.items())), tool.band(shape, 4), cap=4, seed=0)
    within = [sorted(r for place, r in enumerate(repeats) if counts[place] == k) for k in range(5)]
    assert all(some[-1] - some[0] <= 1 for some in within if some)


def test_a_question_that_could_not_be_asked_comes_as_often_as_before():
    counts = {0: None, 1: 1, 2: 2, 3: 2}
    assert tool.weigh(counts, tool.band("u", 4), cap=4, seed=0) == [1, 2, 1, 1]
    assert tool.histogram(counts) == {"1": 1, "2": 2, "broken": 1}


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """Runs the tool in this process on the tiny world: (what it printed, the index)."""

    def call(*more):
        output = tmp_path / "there" / "index-balanced.json"
        arguments = [world["recipe"], "--samples", "3", "--batch", "7", "--temperature", "2", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["balance_difficulty", *arguments, *more])
        tool.main()
        return capsys.readouterr().out, output

    return call


def lucky(prompts, completions, key, **columns):
    """Right by a hash of key and answer: a random model's answers are never right."""
    return [float((len(k) + sum(map(ord, k + c))) % 3 == 0) for k, c in zip(key, completions, strict=True)]


def test_the_tool_counts_weighs_and_goes_on_where_it_was_stopped(run, world, monkeypatch):
    mine = ["judge={name: 'test_balance:lucky', reference: null}"]
    printed, index = run(*mine)
    tree = json.loads(index.read_text())
    repeats = [n for entry in tree["shardlist"] for n in entry["repeats"]]
    assert len(repeats) == 24 and set(repeats) <= {1, 2, 3, 4} and max(repeats) > 1
    before, after = tree["difficulty"]["right"]["before"], tree["difficulty"]["right"]["after"]
    assert sum(before.values()) == 24 and sum(after.values()) == sum(repeats) and len(before) > 2
    assert f"24 questions, {sum(repeats)} in an epoch" in printed and tree["difficulty"]["samples"] == 3
    shards = training_shards(config.load(world["recipe"], [f"data.train={index}"]))
    names = [s["__key__"] for s in Shards(str(world["folder"] / "train"), shuffle=False).samples(epochs=1)]
    seen = Counter(s["__key__"] for s in shards.samples(epochs=1))
    assert seen == Counter(dict(zip(names, repeats, strict=True)))

    counts = index.with_suffix(".passes.jsonl")
    whole, lines = counts.read_text(), counts.read_text().splitlines()
    counts.write_text("\n".join(lines[:10]) + "\n" + lines[10][:3])  # stopped in the middle of a line and of a batch
    index.unlink()
    asked = []
    monkeypatch.setattr(tool, "right", counting(tool.right, asked))
    run(*mine)
    assert counts.read_text() == whole and json.loads(index.read_text()) == tree
    assert asked == [7, 7, 3], "the batch it was stopped in, and what comes after"
    run(*mine)
    assert len(asked) == 3, "nothing is asked again"
    with pytest.raises(SystemExit, match=r"holds counts of other settings .*remove it, or name another --output"):
        run(*mine, "--seed", "1")
    with pytest.raises(SystemExit, match=r"other settings \(max_tokens: 8 there, 5 now\)"):
        run(*mine, "rollout.max_tokens=5")
    with pytest.raises(SystemExit, match=r"other settings \(judge.name.*there, .*match.* now"):
        run("judge={name: match}")
    with pytest.raises(SystemExit, match="is weighed already; name the shards themselves"):
        run(*mine, f"data.train={index}")


def test_counts_are_of_these_very_questions_and_weights(run, world, tmp_path):
    shards, model = tmp_path / "shards", tmp_path / "model"
    shutil.copytree(world["folder"] / "train", shards)
    shutil.copytree(world["folder"] / "model", model)
    mine = [f"data.train={shards}", f"model.name={model}"]
    _, index = run(*mine)
    before = index.read_text()
    shutil.copy(shards / "shard-000000.tar", shards / "shard-000002.tar")  # as many questions under the same name
    with pytest.raises(SystemExit, match=r"other settings \(contents: '\w+' there, '\w+' now\)"):
        run(*mine)
    shutil.copy(world["folder"] / "train" / "shard-000002.tar", shards)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # trained on, as far as its time tells
    with pytest.raises(SystemExit, match=r"other settings \(weights: "):
        run(*mine)
    assert index.read_text() == before


def test_counts_of_more_questions_than_there_are_weigh_nothing(run):
    _, index = run()
    counts = index.with_suffix(".passes.jsonl")
    counts.write_text(counts.read_text() + "[24, 1]\n")
    with pytest.raises(SystemExit, match="has counts of 25 questions, and the shards hold 24; remove it"):
        run()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--cap", "0"], "argument --cap: '0' is not a whole number from 1 on"),
        (["--cap", "-1"], "argument --cap: '-1' is not a whole number from 1 on"),
        (["--samples", "0"], "argument --samples: '0' is not a whole number from 1 on"),
        (["--batch", "0"], "argument --batch: '0' is not a whole number from 1 on"),
        (["--temperature", "-1"], "argument --temperature: '-1' is not a number over 0"),
        (["--temperature", "nan"], "argument --temperature: 'nan' is not a number over 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(run, capsys, more, told):
    with pytest.raises(SystemExit):
        run(*more)
    assert told in capsys.readouterr().err


def test_a_recipe_of_episodes_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["balance_difficulty", "vla_opd"])
    with pytest.raises(SystemExit, match="vla_opd plays episodes, modality action; weighed are questions in shards"):
        tool.main()


def test_libraries_keep_their_bars_to_themselves(run, monkeypatch):
    asked = []
    monkeypatch.setattr("xmodal_opd.cli.quiet", lambda: asked.append(1))
    monkeypatch.setattr(tool, "right", lambda parts, samples, options, first: asked.append(2) or {})
    run()
    assert asked[:2] == [1, 2]


def counting(right, asked):
    def wrapped(parts, samples, *rest):
        asked.append(len(samples))
        return right(parts, samples, *rest)

    return wrapped


def test_help_is_quick():
    code = "import sys, tools.balance_difficulty as t; t.arguments(); print({'torch', 'rich'} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROGRAM.parents[1])
    assert out.stdout.strip() == "set()"
