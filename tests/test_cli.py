"""The other commands, on a random tiny model and real spoken shards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import serve_vllm
from xmodal_opd.cli import main


def test_check_builds_everything_and_runs_the_objective_once(world, capsys, tmp_path):
    assert main(["check", world["recipe"]]) == 0
    printed = capsys.readouterr().out
    assert "Qwen2_5OmniThinkerForConditionalGeneration, 1.1 M parameters, 0.2 M train" in printed
    assert "views student, teacher" in printed and "alignment" in printed and "distill/tokens" in printed


def test_check_needs_no_shards_where_the_recipe_says_how_to_make_them(world, capsys, tmp_path):
    overrides = [f"data.train={tmp_path / 'none'}", "data.prepare={train: 9, test: 3}"]
    assert main(["check", world["recipe"], *overrides]) == 0
    assert not (tmp_path / "none").exists() and "alignment" in capsys.readouterr().out


def test_eval_measures_an_exported_folder_question_by_question(world, capsys, tmp_path):
    model = str(world["folder"] / "model")
    assert main(["eval", world["recipe"], "--checkpoint", model, "--output", str(tmp_path / "answers.jsonl")]) == 0
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(records) == 6 and {r["task"] for r in records} == {"arithmetic", "ordering", "choice"}
    assert all(r["token_kl"] >= 0 and isinstance(r["student"], str) for r in records)
    assert "arithmetic" in capsys.readouterr().out


def test_errors_are_one_sentence_on_standard_error(world, capsys, tmp_path):
    cases = {
        f"data.train={tmp_path}": "no shard",
        "model.name=/nowhere": "no model at '/nowhere'",
        "model.train=[audoi]": "which nothing here matches",
        "judge.name=mtch": "unknown judge 'mtch'; did you mean 'match'",
        "objective.tokens.weights=[tip]": "no scorer computed 'student_entropy'",
        "objective.tokens.teacher.model=/gone": "no model at '/gone'",
        "objective.tokens.teacher={model: initial, stop_gradient: false}": "needs a teacher that moves",
    }
    for override, message in cases.items():
        assert main(["check", world["recipe"], override]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("xmodal-opd: ") and message in error, error


def test_a_sample_without_answer_stops_a_judge_that_needs_one(world, capsys, tmp_path):
    from webdataset import TarWriter

    from xmodal_opd.data import Shards

    sample = next(Shards(str(world["folder"] / "train"), shuffle=False).samples())
    with TarWriter(str(tmp_path / "no-answer.tar")) as tar:
        for i in range(4):
            record = {"views": sample["views"], "meta": {}}
            tar.write({"__key__": f"k{i}", "json": json.dumps(record).encode(), **sample["media"]})
    overrides = [f"data.train={tmp_path / 'no-answer.tar'}", "judge={name: {match: {to: answer}}}"]
    assert main(["check", world["recipe"], *overrides]) == 1
    assert "sample 'k0' has none; add `answer` to the shard" in capsys.readouterr().err


def test_programs_say_what_they_take():
    command = [sys.executable, "-m", "xmodal_opd.cli", "--help"]
    assert b"train" in subprocess.run(command, check=True, capture_output=True).stdout
    tool = Path(__file__).parents[1] / "tools" / "prepare_shards.py"
    assert b"reshard" in subprocess.run([sys.executable, tool, "--help"], check=True, capture_output=True).stdout


def test_overrides_may_stand_behind_options(capsys):
    assert main(["check", "cord_audio", "--dry", "--devices", "1", "optim.lr=3e-3", "optim.schedule=nothing"]) == 1
    assert "unknown schedule 'nothing'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["check", "cord_audio", "--dry", "--device", "1", "train.steps=1", "--stesp"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_what_follows_two_dashes_is_vllms():
    own, more = serve_vllm.split(["default", "--servers", "2", "--", "--dtype", "float32"])
    assert serve_vllm.parser().parse_args(own).servers == 2
    assert more == ["--dtype", "float32"]


def test_a_reader_that_has_read_enough_is_no_error():
    shown = subprocess.Popen(
        [sys.executable, "-u", "-m", "xmodal_opd.cli", "show", "cord_audio"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert shown.stdout and shown.stderr
    shown.stdout.close()
    assert shown.wait(60) == 141 and shown.stderr.read() == ""
    shown.stderr.close()
