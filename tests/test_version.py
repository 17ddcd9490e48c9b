"""Weights and their versions, against a small server that keeps one as vLLM does: no answer is too old."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from xmodal_opd.rollout.vllm import VLLMSampler
from xmodal_opd.serving import Servers
from xmodal_opd.types import Pair, Sampling

PLAN = {"a": Sampling(2, 1.0), "greedy": Sampling(2, 0.0)}


class Echo:
    """The adapter of prompts that are ids."""

    def pair(self, sample):
        return Pair(sample["__key__"], sample["views"])

    def text(self, prompt):
        return {"ids": [len(prompt)]}

    def size(self, view):
        return len(view["ids"])

    def served(self, view):
        return view["ids"], []

    def batch(self, views):
        return {"input_ids": torch.tensor([v["ids"] for v in views])}

    def decode(self, tokens):
        return " ".join(map(str, tokens))


class Held:
    """What a server holds, and how it lies."""

    def __init__(self):
        self.version, self.mode, self.loads, self.asked, self.more = "default", "raw_logprobs", [], [], []
        self.forget_after = 0  # answers, after which it is a server just started

    def get(self, path: str) -> Any:
        if path.startswith("/server_info"):
            return {
                "vllm_config": {"model_config": {"logprobs_mode": self.mode, "model": "m"}, "device_config": "cuda"}
            }
        return {"weight_version": self.version}

    def post(self, path: str, body: Any) -> Any:
        if path == "/collective_rpc":
            self.loads.append(body["kwargs"]["weights_path"])
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/inference/v1/generate":
            return self.answer(body)
        return {"success": True}

    def answer(self, body: Any) -> Any:
        self.asked.append(body)
        if len(self.asked) == self.forget_after:
            self.version = "default"
        logps = {"content": [{"logprob": -0.5}, {"logprob": -0.25}]}
        spans = [{"version": self.version, "start": 0, "end": 2}]
        choice = {"finish_reason": "stop", "token_ids": [7, 9], "logprobs": logps, "weight_versions": spans}
        prompt = body["token_ids"] + self.more
        return {"prompt_token_ids": prompt, "choices": [choice] * body["sampling_params"]["n"]}


@contextmanager
def serving(held: Held) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(held.get(self.path))

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.reply(held.post(self.path, json.loads(data) if data else None))

        def reply(self, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def sampler(url: str, folder) -> VLLMSampler:
    pool = Servers([url], timeout=20.0, wait=5.0)
    return VLLMSampler(pool, Echo(), [9], [3], 8, lambda to: to.mkdir(parents=True), folder)  # pyright: ignore


PAIRS = [Pair(f"q{i}", {"student": {"ids": [i, i + 1]}}) for i in range(5)]


def test_answers_come_as_asked_and_greedy_ones_once(tmp_path):
    held = Held()
    with serving(held) as url:
        ours = sampler(url, tmp_path)
        ours.sync()
        answers = ours.generate(PAIRS, PLAN, seed=1)
    assert [(r.pair.key, r.group, r.prompt_tokens) for r in answers["a"]] == [
        (f"q{i}", i, 2) for i in range(5) for _ in "12"
    ]
    assert all((r.tokens, r.logps, r.finished) == ([7, 9], [-0.5, -0.25], True) for r in answers["greedy"])
    asked = [body["sampling_params"] for body in held.asked]
    assert sorted((p["n"], p["temperature"]) for p in asked) == [(1, 0.0)] * 5 + [(2, 1.0)] * 5
    assert len({p["seed"] for p in asked}) == 10 and all(p["logit_bias"] == {"3": -100.0} for p in asked)


def test_every_sync_is_a_new_folder_and_only_the_last_is_kept(tmp_path):
    held = Held()
    with serving(held) as url:
        ours = sampler(url, tmp_path)
        ours.sync()
        ours.sync()
        assert held.version == ours.version and len(set(held.loads)) == 2
        assert [p.name for p in tmp_path.iterdir()] == [ours.version]
        ours.clear()
    assert not list(tmp_path.iterdir())


def test_a_server_started_again_gets_the_weights_before_what_it_says_is_used(tmp_path):
    held = Held()
    with serving(held) as url:
        ours = sampler(url, tmp_path)
        ours.sync()
        held.forget_after = 3
        answers = ours.generate(PAIRS, PLAN, seed=1)
    assert len(answers["a"]) == 10 and len(held.loads) == 2 and len(held.asked) > 10 and held.version == ours.version


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    held = Held()
    with serving(held) as url:
        ours = sampler(url, tmp_path)
        ours.sync()
        held.more = [4]
        with pytest.raises(ValueError, match="3 tokens there, 2 here"):
            ours.generate(PAIRS, PLAN, seed=1)
        held.version, held.mode = "default", "processed_logprobs"
        with pytest.raises(ValueError, match="--logprobs-mode raw_logprobs"):
            ours.sync()
