"""Sampling with the real vLLM on CPU, in the environment that tools/install_vllm.py makes: it says what the training
model would have said, follows its weights, and loses nothing when it is killed."""

import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from modalities.chat import ChatAdapter
from modalities.tasks import questions
from tools import serve_vllm
from tools.install_vllm import default_folder, install
from xmodal_opd import checkpoint, models
from xmodal_opd.rollout.hf import HFSampler
from xmodal_opd.rollout.vllm import VLLMSampler
from xmodal_opd.scoring.forward import Responses, statistics
from xmodal_opd.serving import Servers
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Pair, Rollout, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64", "--max-model-len"]


# ---- servers


@pytest.fixture(scope="session")
def python() -> Path:
    return install(default_folder())


class Running:
    """A vLLM server of this test."""

    def __init__(self, python: Path, folder: Path, length: int, *more: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.python, self.folder, self.more = python, folder, [*FLAGS, str(length), *more]
        self.log = folder.with_name(f"{folder.name}-{self.port}.log")
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = serve_vllm.start(self.python, str(self.folder), self.port, self.more, log=self.log)

    def wait(self) -> "Running":
        try:
            serve_vllm.wait(self.process, self.port, 300)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.log.read_text()[-3000:]}") from None
        return self

    def kill(self) -> None:
        serve_vllm.stop(self.process, signal.SIGKILL)


@contextmanager
def serving(python: Path, folder: Path, count: int, length: int, *more: str) -> Iterator[list[Running]]:
    running = [Running(python, folder, length, *more) for _ in range(count)]
    try:
        yield [server.wait() for server in running]
    finally:
        for server in running:
            server.kill()


def sampler_for(model, processor, adapter, servers: list[Running], folder: Path, max_tokens: int = 24) -> VLLMSampler:
    def export(to: Path) -> None:
        checkpoint.export(model, processor, to)
        checkpoint.as_served(to)

    ends = [processor.tokenizer.eos_token_id if hasattr(processor, "tokenizer") else processor.eos_token_id]
    pool = Servers([server.url for server in servers], timeout=60.0)
    return VLLMSampler(pool, adapter, ends, models.media_tokens(model), max_tokens, export, folder)


def differences(model, adapter, rollouts: list[Rollout]) -> torch.Tensor:
    """|log-prob of the server - log-prob of the training model| of every token."""
    batch = token_batch(rollouts)
    with torch.no_grad():
        hidden = Responses(adapter, share=False).hidden(model, rollouts, "student")
        logp, _ = statistics(model, hidden, rollouts, batch.mask)
    return (logp - batch.student_logp).abs()[batch.mask]


def distribution(name: str, gaps: torch.Tensor) -> None:
    at = ", ".join(f"{q:.0%} {gaps.quantile(q):.1e}" for q in (0.5, 0.9, 0.99))
    print(
        f"\n|logp of vLLM - of trainer|, {name}: {len(gaps)} tokens, mean {gaps.mean():.1e}, {at}, max {gaps.max():.1e}"
    )


def disturbed(model, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * parameter.std() * noise if parameter.dim() > 1 else 0 * noise)


# ---- the default model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The default model, its processor and adapter, and a folder to work in."""
    processor = models.load_processor("default")
    return models.load_model("default"), processor, ChatAdapter(processor, 512), tmp_path_factory.mktemp("vllm")


def asked(adapter, count: int, split: str = "train", seed: int = 3, audio: bool = True) -> list[Pair]:
    """Questions, the student's view of noise of different lengths or of the text itself."""
    pairs = []
    for i, q in enumerate(islice(questions(seed, split), count)):
        text = [{"role": "user", "content": [{"type": "text", "text": q.prompt}]}]
        spoken = [{"role": "user", "content": [{"type": "audio", "audio": "q"}]}]
        wave = np.random.default_rng(i).normal(0, 0.1, 8000 + 2400 * (i % 16)).astype(np.float32)
        views = {"teacher": adapter.laid_out(str(i), text)}
        views["student"] = adapter.laid_out(str(i), spoken, [wave]) if audio else views["teacher"]
        pairs.append(Pair(f"q{i}", views, q.answer))
    return pairs


@pytest.fixture(scope="module")
def two(python, small):
    """Two servers of the default model."""
    *_, folder = small
    shutil.copytree(models.folder_of("default"), folder / "served")
    checkpoint.as_served(folder / "served")
    with serving(python, folder / "served", 2, 512) as servers:
        yield servers


SAMPLINGS = {"one": Sampling(1, 1.0), "four": Sampling(4, 1.5), "greedy": Sampling(2, 0.0)}


def test_servers_say_what_the_training_model_would_and_follow_its_weights(small, two, tmp_path):
    _, processor, adapter, _ = small
    model = models.load_model("default")
    sampler = sampler_for(model, processor, adapter, two, tmp_path)
    here = HFSampler(model, adapter, sampler.eos, sampler.max_tokens)
    pairs, before = asked(adapter, 12), []
    for state in ("as built", "disturbed"):
        sampler.sync()
        answers = sampler.generate(pairs, SAMPLINGS, seed=1)
        gaps = differences(model, adapter, [r for some in answers.values() for r in some])
        distribution(f"speech, {state}", gaps)
        assert gaps.max() < 1e-3 and gaps.mean() < 1e-5
        greedy = here.generate(pairs, {"greedy": SAMPLINGS["greedy"]}, seed=0)["greedy"]
        assert [r.tokens for r in answers["greedy"]] == [r.tokens for r in greedy]
        assert [(r.prompt_tokens, r.finished, r.group) for r in answers["greedy"]] == [
            (r.prompt_tokens, r.finished, r.group) for r in greedy
        ]
        before.append([r.tokens for r in answers["greedy"]])
        disturbed(model, 0.5)
    assert before[0] != before[1]
    assert not {t for some in answers.values() for r in some for t in r.tokens} & set(sampler.banned)


def test_answers_are_a_function_of_the_seed(small, two, tmp_path):
    model, processor, adapter, _ = small
    sampler = sampler_for(model, processor, adapter, two, tmp_path)
    sampler.sync()
    once, again, other = (sampler.generate(asked(adapter, 8), SAMPLINGS, seed) for seed in (1, 1, 2))
    same = [a.tokens == b.tokens for name in SAMPLINGS for a, b in zip(once[name], again[name], strict=True)]
    assert sum(same) >= len(same) - 1  # sums in another order may turn one token
    assert [r.tokens for r in once["four"]] != [r.tokens for r in other["four"]]
    assert len({tuple(r.tokens) for r in once["four"][:4]}) > 1  # answers of a group differ
