"""Making shards: every form of record, the same bytes however they are made, and what is refused."""

import base64
import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from webdataset.compat import WebDataset

from modalities.audio.media import encode, read
from modalities.audio.prepare import prepare
from modalities.audio.speech import voices
from modalities.tasks import Question, split_of
from tools import prepare_shards
from xmodal_opd.data import Shards

TOOL = Path(__file__).parents[1] / "tools" / "prepare_shards.py"
SETTINGS = {"count": 130, "per_shard": 26, "seed": 7, "accents": ["en-us"], "progress": False}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare_shards", *map(str, arguments)])
        code = 0
        try:
            prepare_shards.main()
        except SystemExit as stop:
            code = 1
            print(stop, file=sys.stderr)
        return code, *capsys.readouterr()

    return call


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def samples(folder):
    return list(Shards(str(folder), shuffle=False).samples(epochs=1))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "out"
    prepare(folder, workers=1, **SETTINGS)
    return folder


def lines(tmp_path, *records):
    path = tmp_path / "records.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.fixture
def recordings(tmp_path):
    """Files a.wav (0.5 s), b.flac (0.25 s) beside the records."""
    for name, seconds in (("a.wav", 0.5), ("b.flac", 0.25)):
        wave = 0.3 * np.sin(np.arange(int(16_000 * seconds)) / 20)
        (tmp_path / name).write_bytes(encode(wave.astype(np.float32), 16_000))
    return tmp_path


def prepared(tmp_path, kind, *records, **options):
    prepare(tmp_path / "out", kind, lines(tmp_path, *records), progress=False, workers=1, **options)
    return samples(tmp_path / "out")


# ---- built-in tasks


def test_plain_webdataset_reads_the_shards(tasks):
    urls = [str(path) for path in sorted(tasks.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        found = list(WebDataset(urls, shardshuffle=False))
    assert len(urls) == 5 and len(found) == 130 and len({sample["__key__"] for sample in found}) == 130
    assert [sample["__key__"] for sample in found] == [f"{n:08d}" for n in range(130)]
    record = json.loads(found[0]["json"])
    assert record["views"]["student"] == [{"role": "user", "content": [{"type": "audio", "audio": "question.flac"}]}]
    wave, rate = read(found[0]["question.flac"])
    assert rate == 16_000 and len(wave) / rate == pytest.approx(record["meta"]["seconds"], abs=1e-3)


def test_our_reader_gives_text_answer_and_meta(tasks):
    found = samples(tasks)
    assert len(found) == 130
    for sample in found[:9]:
        ((message,), meta) = sample["views"]["teacher"], sample["meta"]
        assert message["content"][0]["type"] == "text" and message["content"][0]["text"][0].isupper()
        assert meta["response"].endswith(f"answer: {sample['answer']}") and meta["split"] == "train"
        assert meta["voice"] in voices("train", ["en-us"])
    assert {sample["meta"]["task"] for sample in found} == {"arithmetic", "ordering", "choice"}


def test_the_splits_share_no_question_and_no_voice(tasks, tmp_path):
    prepare(tmp_path / "test", split="test", workers=1, **{**SETTINGS, "count": 20})
    for folder, split in ((tasks, "train"), (tmp_path / "test", "test")):
        for sample in samples(folder):
            meta = sample["meta"]
            assert split_of(Question(meta["task"], meta["instance"], "", "", "")) == split
            assert meta["voice"] in voices(split)


def test_the_index_has_counts_checksums_and_settings(tasks):
    index = json.loads((tasks / "index.json").read_text())
    assert [shard["nsamples"] for shard in index["shardlist"]] == [26] * 5 and index["total"] == 130
    for shard in index["shardlist"]:
        digest = subprocess.run(["sha256sum", tasks / shard["url"]], capture_output=True, text=True).stdout.split()[0]
        assert digest == shard["sha256"] and (tasks / shard["url"]).stat().st_size == shard["filesize"]
    assert index["settings"]["seed"] == 7 and index["settings"]["kind"] == "tasks"


def test_two_workers_write_the_same_bytes_as_one(tasks, tmp_path):
    prepare(tmp_path / "out", workers=2, **SETTINGS)
    assert contents(tmp_path / "out") == contents(tasks)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tasks, tmp_path):
    out = tmp_path / "out"
    options = ["--count", 130, "--per-shard", 26, "--seed", 7, "--accents", "en-us", "--workers", 1]
    process = subprocess.Popen([sys.executable, TOOL, "tasks", out, *map(str, options)])
    while not (out / "shard-000001.tar").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 2 <= len(finished) < 5 and not (out / "index.json").exists()
    prepare(out, workers=1, **SETTINGS)
    assert contents(out) == contents(tasks)
    assert all((out / name).stat().st_mtime_ns == then for name, then in finished.items())  # kept, not made again


def test_the_same_settings_keep_the_shards_and_others_are_refused(tasks):
    before = {path: path.stat().st_mtime_ns for path in tasks.glob("*.tar")}
    assert prepare(tasks, **SETTINGS)["total"] == 130
    assert {path: path.stat().st_mtime_ns for path in tasks.glob("*.tar")} == before
    for changed, named in (({"seed": 8}, "seed: 7, now 8"), ({"count": 131}, "records"), ({"noise_snr": 5.0}, "noise")):
        with pytest.raises(ValueError, match=rf"holds shards of other settings \(.*{named}.*give another folder"):
            prepare(tasks, **{**SETTINGS, **changed})


def test_a_lost_shard_is_made_again_alone(tmp_path):
    out, settings = tmp_path / "out", {**SETTINGS, "count": 6, "per_shard": 2, "workers": 1}
    prepare(out, **settings)
    before = contents(out)
    (out / "shard-000001.tar").unlink()
    (out / "shard-000002.tar").write_bytes(b"cut short")
    kept = (out / "shard-000000.tar").stat().st_mtime_ns
    prepare(out, **settings)
    assert contents(out) == before and (out / "shard-000000.tar").stat().st_mtime_ns == kept


def test_a_broken_index_and_a_full_disk_are_named_and_leave_nothing_behind(tmp_path, monkeypatch):
    settings = {**SETTINGS, "count": 2, "workers": 1}
    prepare(tmp_path / "out", **settings)
    (tmp_path / "out" / "index.json").write_text('{"shardlist')
    with pytest.raises(ValueError, match=r"index\.json is broken .*delete it"):
        prepare(tmp_path / "out", **settings)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left on device.* are good"):
        prepare(tmp_path / "full", **settings)
    assert list((tmp_path / "full").iterdir()) == []


def test_tars_of_unknown_origin_are_not_overwritten(tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds tars of unknown origin"):
        prepare(tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "count is 0; it is a number of questions from 1 on"),
        ({"count": -3}, "count is -3; it is a number of questions from 1 on"),
        ({"families": ["maths"]}, "no task 'maths'; have: arithmetic, ordering, choice"),
        ({"split": "valid"}, "no voices for split 'valid'"),
        ({"kind": "video"}, "kind is tasks, or text or audio with a file"),
        ({"noise_snr": [5]}, r"noise_snr is \[5\]; it is a number from -100 to 100, or lowest and highest"),
        ({"speed": 0}, "speed is 0; it is a number from 0.1 to 10"),
        ({"reverb": (1, 0)}, r"reverb is \(1, 0\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "out", **{**SETTINGS, **wrong})


def test_effects_change_the_sound_and_nothing_else(tmp_path):
    settings = {**SETTINGS, "count": 3, "workers": 1}
    effects = {"noise_snr": (5, 20), "reverb": 0.2, "speed": (0.9, 1.1)}
    found = {}
    for name, options in {
        "plain": {},
        "all": effects,
        **{name: {name: value} for name, value in effects.items()},
    }.items():
        prepare(tmp_path / name, **settings, **options)
        found[name] = samples(tmp_path / name)
        assert [s["views"] for s in found[name]] == [s["views"] for s in found["plain"]]
        assert [s["meta"]["voice"] for s in found[name]] == [s["meta"]["voice"] for s in found["plain"]]
    assert len({samples[0]["media"]["question.flac"] for samples in found.values()}) == 5
    assert found["reverb"][0]["meta"]["seconds"] == pytest.approx(found["plain"][0]["meta"]["seconds"] + 0.2, abs=1e-3)


# ---- written questions


def test_prompts_are_spoken_with_an_instruction_in_both_views(tmp_path):
    first, second = prepared(
        tmp_path,
        "text",
        {"prompt": "How much is two and two?", "answer": 4, "level": "easy"},
        {"prompt": "And three?", "instruction": "Say why.", "solution": "six", "meta": {"level": "hard"}},
        instruction="Answer briefly.",
    )
    assert first["views"]["student"][0]["content"][1] == {"type": "text", "text": "Answer briefly."}
    assert first["views"]["teacher"][0]["content"] == [
        {"type": "text", "text": "How much is two and two?\nAnswer briefly."}
    ]
    assert (first["answer"], first["meta"]["level"], first["meta"]["source"]) == ("4", "easy", "records.jsonl line 1")
    assert second["views"]["student"][0]["content"][1]["text"] == "Say why."
    assert second["meta"]["question"] == "And three?\nSay why."
    assert (second["answer"], second["meta"]["level"]) == ("six", "hard")


def test_the_last_user_message_is_spoken_and_the_closing_answer_is_kept_apart(tmp_path):
    system = {"role": "system", "content": "You are brief."}
    turns = [system, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    asked = {"role": "user", "content": [{"type": "text", "text": "How much is one and one?"}]}
    (sample,) = prepared(tmp_path, "text", {"messages": [*turns, asked, {"role": "assistant", "content": "two"}]})
    student, teacher = sample["views"]["student"], sample["views"]["teacher"]
    assert [m["role"] for m in student] == ["system", "user", "assistant", "user"]
    assert student[:3] == teacher[:3] and student[0]["content"] == [{"type": "text", "text": "You are brief."}]
    assert student[3]["content"] == [{"type": "audio", "audio": "question.flac"}]
    assert teacher[3]["content"] == asked["content"]
    assert sample["answer"] == sample["meta"]["response"] == "two"


def test_another_speech_engine_is_any_command(tmp_path):
    code = "import sys,numpy,soundfile;soundfile.write(sys.argv[1],numpy.full(100*len(sys.argv[2]),.3),8000)"
    command = f"{sys.executable} -c '{code}' {{out}} {{text}}"
    (sample,) = prepared(tmp_path, "text", {"prompt": "x" * 40}, command=command)
    assert sample["meta"]["seconds"] == 0.5 and sample["meta"]["voice"] == command


# ---- recordings


def conversation(*parts):
    return [{"role": "user", "content": list(parts)}]


AUDIO, TEXT = {"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "What was said?"}
HEARD = conversation({"type": "audio", "audio": "question.flac"}, TEXT)
READ = conversation({"type": "text", "text": "good morning\nWhat was said?"})
SAID = {"transcript": "good morning", "answer": "good morning"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": conversation(AUDIO, TEXT), **SAID},
        {"prompt": conversation({"type": "audio", "path": "a.wav"}, TEXT), **SAID},
        {"prompt": conversation({"type": "audio"}, TEXT), "audio": "a.wav", **SAID},
        {"messages": [{"role": "user", "content": "<audio>What was said?"}], "audios": ["a.wav"], **SAID},
        {"prompt": "<audio>\nWhat was said?", "audios": [{"path": "a.wav"}], **SAID},
        {"audio": "a.wav", "instruction": "What was said?", **SAID},
        {"audio": {"path": "a.wav", "bytes": None}, "instruction": "What was said?", **SAID},
        {
            "prompt": conversation(AUDIO, TEXT),
            "completion": [{"role": "assistant", "content": "good morning"}],
            "text": "good morning",
        },
        {"audio": "a.wav", "instruction": "What was said?", "text": "good morning", "answer": "good morning"},
        {"prompt": conversation(AUDIO, TEXT), "teacher_messages": READ, "answer": "good morning", "text": "other"},
        {
            "prompt": conversation(AUDIO, TEXT),
            "teacher_prompt": READ[0]["content"][0]["text"],
            "answer": "good morning",
        },
        {
            "messages": [
                {"role": "user", "content": "<audio>What was said?"},
                {"role": "assistant", "content": "good morning"},
            ],
            "audios": ["a.wav"],
            "transcript": ["good morning"],
        },
    ],
)
def test_every_form_of_recording_gives_the_same_two_views(recordings, record):
    (sample,) = prepared(recordings, "audio", record)
    assert sample["views"] == {"student": HEARD, "teacher": READ} and sample["answer"] == "good morning"
    wave, rate = read(sample["media"]["question.flac"])
    assert (len(wave), rate) == (8000, 16_000) and sample["meta"]["seconds"] == 0.5


def test_a_recording_may_be_in_the_record_itself(recordings):
    data = base64.b64encode((recordings / "a.wav").read_bytes()).decode()
    (sample,) = prepared(recordings, "audio", {"audio": {"bytes": data, "path": None}, "text": "x"})
    assert len(read(sample["media"]["question.flac"])[0]) == 8000


def test_another_recording_under_the_same_name_is_another_setting(recordings):
    record = {"audio": "a.wav", **SAID}
    prepared(recordings, "audio", record)
    (recordings / "a.wav").write_bytes((recordings / "b.flac").read_bytes())
    with pytest.raises(ValueError, match=r"holds shards of other settings \(media: "):
        prepared(recordings, "audio", record)


def test_several_recordings_keep_their_places(recordings):
    record = {
        "messages": [{"role": "user", "content": "First <audio> then <audio> which is longer?"}],
        "audios": ["b.flac", "a.wav"],
        "text": ["one", "two"],
        "answer": "the second",
    }
    (sample,) = prepared(recordings, "audio", record)
    content = sample["views"]["student"][0]["content"]
    assert [part.get("audio", part.get("text")) for part in content] == [
        "First", "question.flac", "then", "question2.flac", "which is longer?",
    ]  # fmt: skip
    assert [len(read(data)[0]) for data in sample["media"].values()] == [4000, 8000]
    assert sample["views"]["teacher"][0]["content"][0]["text"] == "First\none\nthen\ntwo\nwhich is longer?"


# ---- what is refused


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("text", '{"prompt": "one"', r"records\.jsonl line 2: it is not JSON"),
        ("text", "[1]", "line 2: it is not a JSON object"),
        ("text", {"question": "one"}, "line 2: it needs .*prompt.*messages"),
        ("text", {"prompt": "  "}, "line 2: it needs .*prompt"),
        ("text", {"prompt": "..."}, "line 2: nothing to speak"),
        ("text", {"prompt": conversation(AUDIO)}, "line 2: it has audio already"),
        (
            "text",
            {"messages": [{"role": "system", "content": "x"}]},
            "line 2: its messages do not end in a user message",
        ),
        *(
            ("audio", {"audio": "a.wav", "text": "x", **odd}, "line 2: a field is not of the form it should have")
            for odd in ({"meta": "x"}, {"audios": 5}, {"text": 5}, {"text": [5]})
        ),
        ("audio", {"audio": "a.wav"}, "line 2: it has no text for the teacher view; add one of teacher_messages, "),
        ("audio", {"audio": "no.wav", "text": "x"}, r"line 2: audio file .*no\.wav: no such file"),
        ("audio", {"audio": "silent.flac", "text": "x"}, r"line 2: audio file .*silent\.flac is silent"),
        ("audio", {"audio": "records.jsonl", "text": "x"}, "line 2: audio file .* cannot be decoded"),
        ("audio", {"prompt": "<audio>", "audios": ["a.wav", "b.flac"], "text": "x"}, "2 audio files and has 1 places"),
        ("audio", {"prompt": "<audio>", "audios": ["a.wav"], "text": ["x", "y"]}, "'text' has 2 texts for 1 audio"),
        ("audio", {"prompt": conversation({"type": "image"}), "text": "x"}, "part of type 'image' has no place"),
        (
            "audio",
            {"audio": "a.wav", "teacher_messages": conversation(AUDIO)},
            "holds audio, and the teacher reads text",
        ),
    ],
)
def test_a_record_that_cannot_be_used_is_named_with_its_line(recordings, kind, record, message):
    (recordings / "silent.flac").write_bytes(encode(np.zeros(8000, np.float32), 16_000))
    good = {"text": {"prompt": "one"}, "audio": {"audio": "a.wav", "text": "x"}}[kind]
    with pytest.raises(ValueError, match=rf"1 of 2 records cannot be used, more than 1%.*{message}"):
        prepared(recordings, kind, good, record)
    assert not (recordings / "out" / "index.json").exists()


def test_one_bad_record_in_a_hundred_is_left_out_and_named(recordings, caplog):
    good = {"audio": "b.flac", "text": "x"}
    found = prepared(recordings, "audio", *[good] * 60, {"audio": "no.wav", "text": "x"}, *[good] * 60, per_shard=50)
    assert len(found) == 120 and "00000060" not in {sample["__key__"] for sample in found}
    assert "skipped records.jsonl line 61: audio file" in caplog.text
    assert [shard["nsamples"] for shard in json.loads((recordings / "out/index.json").read_text())["shardlist"]] == [
        50,
        49,
        21,
    ]


def test_a_missing_file_of_records_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of records .*nothing\.jsonl"):
        prepare(tmp_path / "out", "text", tmp_path / "nothing.jsonl")


# ---- the program


def test_help_names_the_commands_and_imports_nothing_heavy():
    shown = subprocess.run([sys.executable, "-X", "importtime", TOOL, "--help"], capture_output=True, text=True)
    assert all(
        name in shown.stdout
        for name in ("tasks", "text", "audio", "scenes", "images", "reshard", "inspect", "data/train")
    )
    assert "argparse" in shown.stderr
    assert not [name for name in ("torch", "numpy", "webdataset") if name in shown.stderr]


def test_shards_are_filtered_merged_and_cut_anew(run, tasks, tmp_path):
    out = tmp_path / "out"
    code, _, error = run(
        "reshard",
        tasks,
        tasks / "shard-000000.tar",
        out,
        "--where",
        "task=arithmetic",
        "--where",
        "seconds<2.2",
        "--per-shard",
        9,
    )
    assert code == 0, error
    chosen = [s for s in samples(tasks) if s["meta"]["task"] == "arithmetic" and s["meta"]["seconds"] < 2.2]
    chosen += [s for s in chosen if s["__key__"] < "00000026"]
    found = samples(out)
    assert 9 < len(found) == len(chosen) and [s["__key__"] for s in found] == [f"{n:08d}" for n in range(len(found))]
    assert [(s["views"], s["meta"], s["media"]) for s in found] == [(s["views"], s["meta"], s["media"]) for s in chosen]
    assert len(list(out.glob("*.tar"))) == -(-len(found) // 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--where", "tsk=arithmetic"), "no sample has the meta field 'tsk'; have: instance, modality, question"),
        (("--where", "arithmetic"), "--where 'arithmetic' is not FIELD=VALUE"),
        (("--where", "task=cooking"), "nothing to write: 0 records"),
    ],
)
def test_a_filter_that_fits_nothing_says_so(run, tasks, tmp_path, arguments, message):
    code, _, error = run("reshard", tasks / "shard-000000.tar", tmp_path / "out", *arguments)
    assert code == 1 and message in error


def test_inspect_shows_text_answer_and_sound(run, tasks):
    _, shown, _ = run("inspect", tasks, "-n", 2)
    assert run("--inspect", tasks, "-n", 2)[1] == shown
    first = samples(tasks)[0]
    assert first["views"]["teacher"][0]["content"][0]["text"] in shown and f"answer: {first['answer']}" in shown
    assert f"{first['meta']['seconds']:.2f} s, 16000 Hz, peak 0." in shown
    assert "00000001 of" in shown and "00000002 of" not in shown


def test_errors_of_the_program_are_one_line(run, tmp_path):
    code, _, error = run("text", tmp_path / "no.jsonl", tmp_path / "out")
    assert (code, error) == (1, f"prepare_shards: there is no file of records {tmp_path / 'no.jsonl'}\n")
