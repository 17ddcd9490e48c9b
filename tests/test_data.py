"""Shards -> samples: order, positions, ranks, sources, and what happens to what is broken."""

import functools
import http.server
import io
import itertools
import json
import logging
import tarfile
import threading

import pytest

from modalities.shards import describe, tar_bytes
from xmodal_opd.data import Shards, parse
from xmodal_opd.types import Pair, SampleError

COUNTS = (4, 7, 2)


def sample(name, **fields):
    views = {
        "student": [{"role": "user", "content": [{"type": "audio", "audio": "question.flac"}]}],
        "teacher": [{"role": "user", "content": [{"type": "text", "text": name}]}],
    }
    record = {"views": views, "answer": name, "meta": {"name": name}, **fields}
    return {"json": json.dumps(record).encode(), "question.flac": name.encode() * 300}


def write(folder, counts=COUNTS, index=True, spoil=lambda name, files: files):
    folder.mkdir(parents=True, exist_ok=True)
    for s, count in enumerate(counts):
        names = [f"s{s}n{n}" for n in range(count)]
        (folder / f"part-{s}.tar").write_bytes(tar_bytes({name: spoil(name, sample(name)) for name in names}))
    if index:
        write_index(folder)
    return str(folder)


def write_index(folder):
    entries = [describe(path) for path in sorted(folder.glob("*.tar"))]
    (folder / "index.json").write_text(json.dumps({"shardlist": entries}))


def keys(samples, count=None):
    return [s["__key__"] for s in itertools.islice(samples, count)]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data")


# ---- samples


def test_a_sample_holds_views_answer_meta_and_raw_media(folder):
    first = next(Shards(folder, shuffle=False).samples())
    assert first["__key__"] == "s0n0" and first["__url__"].endswith("part-0.tar")
    assert first["views"]["teacher"][0]["content"] == [{"type": "text", "text": "s0n0"}]
    assert (first["answer"], first["meta"]) == ("s0n0", {"modality": "audio", "name": "s0n0"})
    assert first["media"] == {"question.flac": b"s0n0" * 300}


@pytest.mark.parametrize(
    ("kinds", "modality"),
    [([], "text"), (["image"], "image"), (["image", "audio", "image"], "audio+image"), (["video"], "video")],
)
def test_the_media_of_the_students_view_are_the_modality_where_no_meta_says(kinds, modality):
    content = [{"type": "text", "text": "What?"}, *({"type": kind, kind: f"{kind}.x"} for kind in kinds)]
    views = {"student": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]}
    media = {f"{kind}.x": b"x" for kind in kinds} | {"__key__": "k", "__url__": "u"}
    for meta, told in (({}, modality), ({"modality": "mine"}, "mine")):
        record = json.dumps({"views": views, "meta": meta}).encode()
        assert parse({"json": record, **media})["meta"] == {"modality": told}


def test_file_names_keep_their_capitals(tmp_path):
    views = {"student": [{"role": "user", "content": [{"type": "image", "image": "Left.PNG"}]}]}
    (tmp_path / "x.tar").write_bytes(
        tar_bytes({"a": {"json": json.dumps({"views": views}).encode(), "Left.PNG": b"x"}})
    )
    assert next(Shards(str(tmp_path)).samples())["media"] == {"Left.PNG": b"x"}


def test_a_number_as_answer_becomes_text_and_none_stays_none(tmp_path):
    answers = {"a": 7, "b": None}
    (tmp_path / "x.tar").write_bytes(tar_bytes({name: sample(name, answer=a) for name, a in answers.items()}))
    assert [s["answer"] for s in Shards(str(tmp_path), shuffle=False).samples(epochs=1)] == ["7", None]


# ---- order and position


def test_without_shuffling_one_epoch_is_the_plain_order(folder):
    everything = [f"s{s}n{n}" for s, count in enumerate(COUNTS) for n in range(count)]
    assert keys(Shards(folder, shuffle=False).samples(epochs=1)) == everything


def test_the_order_is_a_function_of_seed_and_epoch_alone(folder, tmp_path):
    moved = write(tmp_path / "elsewhere", index=False)
    orders = [keys(Shards(place, seed=3).samples(epochs=2)) for place in (folder, folder, moved)]
    assert orders[0] == orders[1] == orders[2]
    first, second = orders[0][:13], orders[0][13:]
    assert first != second and sorted(first) == sorted(second)
    assert keys(Shards(folder, seed=4).samples(), 13) != first


@pytest.mark.parametrize("index", [True, False])
def test_a_run_resumed_at_any_position_goes_on_with_the_next_sample(tmp_path, index):
    folder = write(tmp_path / "data", index=index)
    whole = list(itertools.islice(Shards(folder, seed=1).samples(), 40))
    assert [s["__position__"] for s in whole] == list(range(1, 41))
    for start in range(30):
        rest = Shards(folder, seed=1).samples(start)
        assert keys(rest, 5) == keys(whole)[start : start + 5]


def test_finished_shards_are_not_opened_on_resume(folder, monkeypatch):
    shards, opened = Shards(folder, shuffle=False), []
    monkeypatch.setattr("xmodal_opd.data.read_shard", lambda url: opened.append(url) or ([], ""))
    next(shards._slots(0, 0))  # the patch is in place
    opened.clear()
    with pytest.raises(RuntimeError, match="broken"):
        next(shards.samples(13 * 5 + 11))
    assert [url[-10:] for url in opened[:1]] == ["part-2.tar"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_see_disjoint_samples_and_together_all(folder, world):
    ranks = [Shards(folder, rank=rank, world=world).samples(epochs=6) for rank in range(world)]
    seen = [[(s["__position__"], s["__key__"]) for s in rank] for rank in ranks]
    alone = [(s["__position__"], s["__key__"]) for s in Shards(folder).samples(epochs=6)]
    assert sorted(itertools.chain(*seen)) == alone and len(alone) == 6 * 13


def test_more_ranks_than_samples_all_get_some(tmp_path):
    folder = write(tmp_path / "data", counts=(2,))
    assert all(keys(Shards(folder, rank=rank, world=5).samples(), 3) for rank in range(5))


def test_the_number_of_samples_is_known_from_an_index_or_after_an_epoch(tmp_path):
    assert len(Shards(write(tmp_path / "a"))) == 13
    shards = Shards(write(tmp_path / "b", index=False))
    with pytest.raises(TypeError, match=r"no index\.json counts those of .*part-0\.tar"):
        len(shards)
    list(shards.samples(epochs=1))
    assert len(shards) == 13


# ---- sources


def test_paths_braces_patterns_lists_and_index_files_name_the_same_shards(folder):
    sources = [
        f"{folder}/part-{{0..2}}.tar",
        f"{folder}/part-*.tar",
        f"{folder}/index.json",
        [f"{folder}/part-0.tar", f"{folder}/part-{{1,2}}.tar"],
        f"file:{folder}/part-0.tar::{folder}/part-{{1..2}}.tar",
        f"pipe:cat {folder}/part-0.tar::{folder}/part-{{1..2}}.tar",
    ]
    plain = keys(Shards(folder, shuffle=False).samples(epochs=1))
    for source in sources:
        assert keys(Shards(source, shuffle=False).samples(epochs=1)) == plain, source
    assert len(Shards(sources[0])) == 13  # the index beside the tars is used


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def test_shards_and_their_index_are_read_over_http(server, folder):
    plain = keys(Shards(folder, shuffle=False).samples(epochs=1))
    remote = Shards(f"{server}/index.json", shuffle=False)
    assert len(remote) == 13 and keys(remote.samples(epochs=1)) == plain
    assert keys(Shards(f"{server}/part-{{0..2}}.tar", shuffle=False).samples(epochs=1)) == plain


def test_a_remote_shard_that_is_not_there_stops_with_its_address(server):
    with pytest.raises(RuntimeError, match=r"1 of 1 samples are broken.*part-9\.tar: .*exit 22"):
        list(Shards(f"{server}/part-9.tar").samples(epochs=1))


def test_padding_after_the_end_of_a_tar_is_read_and_not_an_error(folder, tmp_path):
    padded = tmp_path / "padded.tar"
    padded.write_bytes((tmp_path / "data" / "part-0.tar").read_bytes() + bytes(3_000_000))
    shards = Shards(f"pipe:cat {padded}")
    assert len(keys(shards.samples(epochs=1))) == 4 and shards.skipped == 0


def test_a_pipe_that_fails_is_told_apart_from_an_empty_one(folder):
    with pytest.raises(RuntimeError, match="exit 3"):
        list(Shards(f"pipe:cat {folder}/part-0.tar; exit 3").samples(epochs=1))


def test_a_missing_shard_is_answered_with_what_exists(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"part-7\.tar: .* has part-0\.tar, part-1\.tar.*did you mean part-"):
        Shards(f"{folder}/part-7.tar")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*data/none; shards are made by tools/prepare_sh"):
        Shards(str(tmp_path / "data" / "none"))
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder .*nowhere; shards are made by tools/prepare_shards"
    ):
        Shards(str(tmp_path / "nowhere" / "x.tar"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no tar"):
        Shards(str(tmp_path / "empty"))


def test_an_index_may_not_run_a_command_or_be_nonsense(tmp_path):
    command, count = '{"shardlist": [{"url": "PIPE:touch pwned"}]}', '{"shardlist": [{"url": "a", "nsamples": "x"}]}'
    for text in (command, command.replace("PIPE", "pipe"), count, "[", "[]", '{"shardlist": [3]}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index .*index\.json cannot be used"):
            Shards(str(tmp_path))


# ---- what is broken


def spoiled(tmp_path, spoil, count=150):
    """Shards whose sample s0n3 alone is spoiled."""
    return write(tmp_path / "data", (count,), spoil=lambda name, files: spoil(files) if name == "s0n3" else files)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda files: {**files, "json": b'{"views": '}, "its .json is broken"),
        (lambda files: {**files, "json": b"\xff"}, "its .json is broken"),
        (lambda files: sample("x", meta="oops"), 'its "meta" is str, not a mapping'),
        (lambda files: {"json": files["json"]}, "view 'student' names the file 'question.flac'; the shard has none"),
        (lambda files: {"question.flac": b""}, "it has no .json file"),
        (lambda files: {**files, "json": b'{"text": "hello"}'}, 'its .json has no "views"'),
        (lambda files: {**files, "json": b'{"views": {"student": [{"role": "user"}]}}'}, "not a list of messages"),
        (lambda files: {**files, "json": b'{"views": {"student": "hello"}}'}, "not a list of messages"),
    ],
)
def test_a_broken_sample_is_counted_named_and_skipped(tmp_path, caplog, spoil, reason):
    shards = Shards(spoiled(tmp_path, spoil), shuffle=False)
    with caplog.at_level(logging.WARNING):
        seen = list(shards.samples(epochs=1))
    assert len(seen) == 149 and seen[3]["__position__"] == 5  # the broken one keeps its position
    assert (shards.seen, shards.skipped) == (150, 1)
    ((url, key), why), *more = shards.broken.items()
    assert url.endswith("part-0.tar") and key == "s0n3" and reason in why and not more
    assert "s0n3" in caplog.text and reason in caplog.text


def test_resuming_after_a_broken_sample_repeats_and_loses_nothing(tmp_path):
    folder = spoiled(tmp_path, lambda files: {"json": b"{"})
    whole = list(Shards(folder, seed=5).samples(epochs=1))
    for cut in (0, 10, 60, 148):
        assert keys(Shards(folder, seed=5).samples(whole[cut]["__position__"], epochs=1)) == keys(whole[cut + 1 :])


class Picky:
    """An adapter that refuses some samples."""

    def __init__(self, refused):
        self.refused = refused

    def pair(self, sample):
        if sample["__key__"] in self.refused:
            raise SampleError("the audio is silent")
        return Pair(sample["__key__"], {}, sample["answer"])

    def text(self, prompt):
        return {}

    def size(self, view):
        raise AssertionError("data asks for pairs only")

    def batch(self, views):
        return {}

    def served(self, view):
        return [], []

    def decode(self, tokens):
        return ""


def test_what_the_adapter_refuses_counts_as_broken(tmp_path):
    shards = Shards(write(tmp_path / "data", (150,)), shuffle=False)
    pairs = list(shards.pairs(Picky({"s0n3"}), epochs=1))
    assert [position for position, _ in pairs[:5]] == [1, 2, 3, 5, 6] and len(pairs) == 149
    assert list(shards.broken.values()) == ["the audio is silent"] and shards.skipped == 1


def test_more_than_one_percent_broken_stops_the_run(tmp_path):
    folder = write(tmp_path / "data", (300,))
    bad = Picky({"s0n5", "s0n6", "s0n200"})
    shards = Shards(folder, shuffle=False)
    with pytest.raises(RuntimeError, match=r"3 of 201 samples are broken, more than 1%.*s0n200 of .*silent"):
        list(shards.pairs(bad, epochs=1))


def test_few_samples_are_judged_at_the_end_of_the_epoch_and_not_before(tmp_path):
    shards = Shards(write(tmp_path / "data", (20,)), shuffle=False)
    pairs = shards.pairs(Picky({"s0n0"}))
    assert len(list(itertools.islice(pairs, 19))) == 19
    with pytest.raises(RuntimeError, match=r"1 of 20 samples are broken"):
        next(pairs)
    late = Shards(write(tmp_path / "other", (150,)), shuffle=False).pairs(Picky({"s0n149"}), start=145)
    assert len(list(itertools.islice(late, 100))) == 100  # five samples before the epoch's end prove nothing


@pytest.mark.parametrize("index", [True, False])
def test_a_truncated_shard_is_named_and_its_whole_samples_are_used(tmp_path, index):
    folder = write(tmp_path / "data", (400,), index=index)
    path = tmp_path / "data" / "part-0.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmember("s0n397.question.flac").offset_data + 100  # in the middle of the last but two
    path.write_bytes(whole[:end])
    shards = Shards(folder, shuffle=False)
    assert keys(shards.samples(epochs=1)) == [f"s0n{n}" for n in range(397)]
    assert shards.skipped == (3 if index else 2)  # without an index one stands for all that is lost
    assert any("unexpected end of data" in why for why in shards.broken.values())
    assert shards.broken[str(path), "s0n397"].startswith("view 'student' names the file")


def test_a_shard_cut_between_two_samples_is_found_out_by_its_index(tmp_path):
    folder = write(tmp_path / "data", (300,))
    (tmp_path / "data" / "part-0.tar").write_bytes(tar_bytes({f"s0n{n}": sample(f"s0n{n}") for n in range(298)}))
    shards = Shards(folder)
    assert len(keys(shards.samples(epochs=1))) == 298
    assert set(shards.broken.values()) == {"the shard ends after 298 of 300 samples"}


def test_an_index_that_counts_too_few_is_not_believed(tmp_path):
    folder = write(tmp_path / "data", (5,))
    (tmp_path / "data" / "part-0.tar").write_bytes(tar_bytes({f"s0n{n}": sample(f"s0n{n}") for n in range(6)}))
    with pytest.raises(ValueError, match=r"has 6 samples and its index\.json says 5; write the index anew"):
        list(Shards(folder).samples(epochs=1))


def test_garbage_instead_of_a_tar_stops_with_its_name(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 1000)
    with pytest.raises(RuntimeError, match=r"x\.tar"):
        list(Shards(str(tmp_path)).samples())


def test_no_samples_at_all_is_said_and_not_waited_for(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_bytes({}))
    with pytest.raises(ValueError, match=r"no samples in .*x\.tar"):
        next(Shards(str(tmp_path)).samples())


def test_members_that_point_outside_are_never_written(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in {"../evil.json": sample("x")["json"], "../evil.question.flac": b"x"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(out.getvalue())
    list(Shards(str(tmp_path / "in")).samples(epochs=1))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.tar"]


def test_a_sample_without_a_view_the_recipe_names_is_skipped_by_name(tmp_path):
    def spoil(name, files):
        return (
            sample(name, views={"student": json.loads(files["json"])["views"]["student"]}) if name == "s0n3" else files
        )

    shards = Shards(write(tmp_path / "data", (150,), spoil=spoil), shuffle=False, views={"student", "teacher"})
    assert len(keys(shards.samples(epochs=1))) == 149
    assert list(shards.broken.values()) == ["it has no view 'teacher' (has: student)"]


# ---- an index that weighs


def weighed(folder, repeats, name="weighed/index-balanced.json"):
    """An index in a folder of its own that says how often every sample of every shard comes."""
    path, start, entries = folder.parent / name, 0, []
    for place in sorted(folder.glob("*.tar")):
        count = describe(place)["nsamples"]
        url = f"../{folder.name}/{place.name}"
        entries.append({"url": url, "nsamples": count, "repeats": repeats[start : start + count]})
        start += count
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"shardlist": entries}))
    return str(path)


REPEATS = [1, 3, 0, 1, 2, 1, 1, 1, 4, 1, 1, 1, 2]


def test_a_weighed_index_repeats_samples_in_every_epoch(folder, tmp_path):
    index, names = weighed(tmp_path / "data", REPEATS), keys(Shards(folder, shuffle=False).samples(epochs=1))
    wanted = sorted(name for name, n in zip(names, REPEATS, strict=True) for _ in range(n))
    shards = Shards(index, seed=2)
    epochs = [keys(shards.samples(epoch * 19, epochs=epoch + 1)) for epoch in range(3)]
    assert len(shards) == 19 and all(sorted(epoch) == wanted for epoch in epochs) and epochs[0] != epochs[1]
    whole = list(Shards(index, seed=2).samples(epochs=2))
    for start in (0, 5, 18, 19, 30):
        rest = Shards(index, seed=2).samples(start, epochs=2)
        assert [(s["__position__"], s["__key__"]) for s in rest] == [
            (s["__position__"], s["__key__"]) for s in whole[start:]
        ]
    ranks = [Shards(index, seed=2, rank=rank, world=3).samples(epochs=3) for rank in range(3)]
    dealt = sorted((s["__position__"], s["__key__"]) for rank in ranks for s in rank)
    assert dealt == [(i + 1, key) for i, key in enumerate(key for epoch in epochs for key in epoch)]


@pytest.mark.parametrize("repeats", [[1, 1], [1.5] * 13, [-1] * 13, ["2"] * 13])
def test_repeats_that_are_none_are_refused(folder, tmp_path, repeats):
    with pytest.raises(
        ValueError, match=r"cannot be used .*the repeats of .*part-0.tar are not 4 whole numbers from 0"
    ):
        Shards(weighed(tmp_path / "data", repeats))


def test_a_broken_sample_that_is_repeated_is_named_once_and_counted_as_often(tmp_path, caplog):
    spoil = lambda name, files: {**files, "json": b"{"} if name == "s0n7" else files  # noqa: E731
    write(tmp_path / "data", (1500,), spoil=spoil)
    shards = Shards(weighed(tmp_path / "data", [4 if n == 7 else 1 for n in range(1500)]), shuffle=False)
    assert len(list(shards.samples(epochs=1))) == 1499 and shards.skipped == 4
    assert [r.message for r in caplog.records if "s0n7" in r.message] == [
        f"skipped sample s0n7 of {next(iter(shards.broken))[0]}: its .json is broken: "
        + next(iter(shards.broken.values())).partition(": ")[2]
    ]
