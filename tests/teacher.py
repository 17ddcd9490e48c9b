"""A teacher behind HTTP: a real model that answers in vLLM's form, without vLLM."""

import base64
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import soundfile
import torch


class Refused(Exception):
    """The server answers with this status."""


@dataclass
class Teacher:
    """model and processor of one folder; `spoil` may change a reply, or raise Refused."""

    model: Any
    processor: Any
    spoil: Callable[[dict[str, Any]], None] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/models":
            return {"data": [{"id": "expert"}]}
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return {"tokens": ids, "count": len(ids)}
        with self.lock:
            self.asked.append(body)
            media = body.get("content_parts") or []
            told = self.read(body.get("prompt") or body["token_ids"], media, body.get("sampling_params") or body)
            if self.spoil:
                self.spoil(told)
        return {"choices": [told]} if path == "/v1/completions" else {**told, "choices": [{}]}

    @torch.no_grad()
    def read(self, ids: list[int], media: list[dict[str, str]], how: dict[str, Any]) -> dict[str, Any]:
        """Log-probs of every token of the prompt, and the likeliest ones."""
        waves = [soundfile.read(io.BytesIO(base64.b64decode(m["url"].partition(",")[2])))[0] for m in media]
        features, ids = {}, list(ids)
        if waves:
            token = self.processor.audio_token
            laid = [
                dict(self.processor(text=[token], audio=[wave], sampling_rate=16000, return_tensors="pt"))
                for wave in waves
            ]
            whole = self.processor(
                text=[token] * len(waves), audio=waves, sampling_rate=16000, return_tensors="pt", padding=True
            )
            features = {k: v for k, v in whole.items() if k not in ("input_ids", "attention_mask")}
            mark, expanded = self.tokenizer.convert_tokens_to_ids(token), iter(laid)
            ids = [t for i in ids for t in (next(expanded)["input_ids"][0].tolist() if i == mark else [i])]
        inputs = torch.tensor([ids])
        logits = self.model(input_ids=inputs, attention_mask=torch.ones_like(inputs), **features).logits[0]
        logp = logits.float().log_softmax(-1)
        places: list[dict[str, Any] | None] = [None]
        for row, token in zip(logp, ids[1:], strict=False):
            top = row.topk(how["prompt_logprobs"]).indices.tolist()
            rank = {token: int((row > row[token]).sum()) + 1} | {t: n + 1 for n, t in enumerate(top)}
            places.append({str(t): {"logprob": row[t].item(), "rank": r} for t, r in rank.items()})
        return {"prompt_token_ids": ids, "prompt_logprobs": places}


class Quiet(ThreadingHTTPServer):
    """Says nothing of those who hang up: they found an error in another reply."""

    daemon_threads = True
    request_queue_size = 128  # all of a step knock at once, on a busy machine

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(teacher: Teacher) -> Iterator[Teacher]:
    """The teacher on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send(200, {} if self.path == "/health" else teacher.reply(self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.send(200, teacher.reply(self.path, body))
            except Refused as refused:
                self.send(refused.args[0], {"error": "refused"})

        def send(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    teacher.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield teacher
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
