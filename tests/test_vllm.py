"""Sampling with the real vLLM on CPU, in the environment that tools/install_vllm.py makes: it says what the training
model would have said, follows its weights, and loses nothing when it is killed."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from PIL import Image

from modalities.chat import ChatAdapter
from modalities.shards import write_shards
from modalities.tasks import questions
from tools import serve_vllm
from tools.install_vllm import default_folder, install
from tools.tiny import model as tiny
from xmodal_opd import checkpoint, config, models, train
from xmodal_opd.hidden import media_tokens
from xmodal_opd.rollout import nccl
from xmodal_opd.rollout.hf import HFSampler
from xmodal_opd.rollout.vllm import VLLMSampler
from xmodal_opd.scoring.forward import Responses, statistics
from xmodal_opd.serving import Servers
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Pair, Rollout, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

APART = "sampling/sampling_logp_difference/max"
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64", "--max-model-len"]


@pytest.fixture(autouse=True)
def _open_sockets_fail_the_test_that_left_them():
    yield
    gc.collect()


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
    return VLLMSampler(pool, adapter, ends, media_tokens(model), max_tokens, export, folder)


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
    """Noise on all matrices of the language model, the embeddings among them, to which its head is tied."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.") and parameter.dim() > 1:
                parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=generator))


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


ENTERS = """
import json, sys
from vllm.distributed.weight_transfer import nccl_common, nccl_engine
entering, coming = json.load(sys.stdin)
info = nccl_common.NCCLWeightTransferInitInfo(**entering)
assert info.nccl_unique_id_bytes == bytes(range(128)) and (info.world_size, info.rank_offset) == (3, 1)
told = nccl_engine.NCCLWeightTransferUpdateInfo(**coming)
import torch
assert all(isinstance(getattr(torch, dtype), torch.dtype) for dtype in told.dtype_names)
print(len(told.names))
"""


def test_what_goes_with_weights_over_nccl_is_what_vllm_reads(python, small):
    model, processor, _, folder = small
    checkpoint.export(model, processor, folder / "sent")
    told = [nccl.invitation(bytes(range(128)), 2), nccl.contents(folder / "sent")]
    asked = subprocess.run([python, "-c", ENTERS], input=json.dumps(told), capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert int(asked.stdout.split()[-1]) == len(told[1]["names"]) > 100


def test_a_server_that_was_not_started_for_nccl_is_refused(small, two, tmp_path):
    model, processor, adapter, _ = small
    sampler = replace(sampler_for(model, processor, adapter, two, tmp_path), over_nccl=True)
    with pytest.raises(ValueError, match=r"takes no weights over NCCL; start it with --weight-transfer-config"):
        sampler.sync()


# ---- runs


@pytest.fixture(scope="module")
def written(small):
    """A recipe in text: the default model with a disturbed language model learns from the default model as it was."""
    _, processor, _, folder = small
    hurt = models.load_model("default")
    disturbed(hurt, 0.6)  # from 100 % right to 18 %
    checkpoint.export(hurt, processor, folder / "hurt")
    for split, count in (("train", 800), ("test", 60)):
        asked_for = list(islice(questions(5, split), count))
        settings = {"kind": "text", "split": split}
        write_shards(folder / split, settings, count, lambda numbers, some=asked_for: map(sample, some), progress=False)
    recipe = folder / "text.yaml"
    recipe.write_text(
        f"""
name: text
model: {{name: {folder / "hurt"}, train: [language_model]}}
data: {{train: {folder / "train"}, test: {folder / "test"}}}
rollout: {{max_tokens: 40, samplings: {{tokens: {{n: 2}}}}}}
objective: {{tokens: {{sampling: tokens, divergence: reverse_kl, teacher: {{model: default, view: teacher}}}}}}
optim: {{lr: 5e-4}}
train: {{steps: 24, prompts: 12, threads: 1}}
eval: {{kl: false}}
checkpoint: {{every: 24}}
"""
    )
    return recipe


def sample(question) -> dict[str, bytes]:
    text = [{"role": "user", "content": [{"type": "text", "text": question.prompt}]}]
    record = {"views": {"student": text, "teacher": text}, "answer": question.answer, "meta": {"task": question.task}}
    return {"json": json.dumps(record).encode()}


def run(recipe: Path, folder: Path, *overrides: str) -> tuple[dict, list[dict]]:
    """A run's summary and its metrics, step by step."""
    summary = train.train(config.load(str(recipe), [f"run_dir={folder}", *overrides]))
    return summary, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def vllm(servers: list[Running]) -> list[str]:
    return ["rollout.name=vllm", f"rollout.servers=[{', '.join(server.url for server in servers)}]"]


def test_a_run_reaches_what_it_reaches_with_the_training_models_own_answers(written, two, tmp_path):
    ends = {}
    for name, overrides in (("hf", []), ("vllm", vllm(two))):
        summary, steps = run(written, tmp_path / name, *overrides)
        kl = [step["distill/tokens"] for step in steps]
        ends[name] = (summary["student_accuracy_before"], summary["student_accuracy_after"], np.mean(kl[-8:]))
        print(f"\n{name}: right {ends[name][0]:.0%} -> {ends[name][1]:.0%}, KL {kl[0]:.2f} -> {ends[name][2]:.2f}")
        assert len(kl) == 24 and ends[name][1] > ends[name][0] + 0.2 and ends[name][2] < 0.3 * kl[0]
    assert ends["hf"][0] == ends["vllm"][0]  # greedy answers before any step
    assert abs(ends["hf"][1] - ends["vllm"][1]) < 0.2 and 0.5 < ends["hf"][2] / ends["vllm"][2] < 2
    print(f"seconds to take weights in: {np.mean([step['sync_time'] for step in steps]):.2f}")


def test_two_ranks_of_deepspeed_sample_from_the_same_servers(written, two, tmp_path):
    """Rank 0 brings the weights, gathered at ZeRO-3, while both ask; one step ahead as well."""
    for name, *keys in (("2", "engine.zero=2"), ("3", "engine.zero=3"), ("ahead", "engine.zero=3", "rollout.ahead=1")):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        recipe = ["-m", "xmodal_opd.cli", "train", str(written), f"run_dir={tmp_path / name}", *vllm(two), *keys]
        recipe += ["engine.name=deepspeed", "train.steps=3", "eval.samples=12", "checkpoint.every=3"]
        paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, *recipe], env=os.environ | paths, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        steps = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert len(steps) == 3 and not any(step["skipped"] for step in steps)
        if name == "ahead":
            assert [step["rollout/age"] for step in steps] == [0, 1, 1]
            assert steps[0][APART] < 1e-3 < steps[1][APART]  # older weights
        else:
            assert all(step[APART] < 1e-3 for step in steps)


# ---- servers that die


def test_a_server_killed_in_the_middle_of_its_answers_loses_nothing(small, two, tmp_path):
    model, processor, adapter, _ = small
    sampler = sampler_for(model, processor, adapter, two, tmp_path, max_tokens=200)
    sampler.eos = []  # every answer runs to its end, so that there is a middle
    sampler.sync()
    pairs, plan = asked(adapter, 48, audio=False), {"a": Sampling(4, 1.5)}
    whole = sampler.generate(pairs, plan, seed=1)["a"]
    threading.Timer(0.5, two[0].kill).start()
    began = time.monotonic()
    again = sampler.generate(pairs, plan, seed=1)["a"]
    print(f"\n{len(pairs)} questions, one of two servers killed: {time.monotonic() - began:.1f} s")
    assert not sampler.servers.all[0].up and two[0].process.poll() is not None
    assert [(r.pair.key, r.group, len(r.tokens)) for r in again] == [(r.pair.key, r.group, 200) for r in whole]
    same = np.mean([a.tokens == b.tokens for a, b in zip(again, whole, strict=True)])
    assert same > 0.8  # the same seeds, but other neighbours: a sum in another order may turn a token, and all after it
    assert differences(model, adapter, again[:16]).max() < 1e-3


def test_the_only_server_may_die_and_come_back_with_other_weights_between_and_within_steps(small, two, tmp_path):
    _, processor, adapter, _ = small
    model, server = models.load_model("default"), two[1]
    sampler = sampler_for(model, processor, adapter, [server], tmp_path, max_tokens=200)
    sampler.eos = []
    disturbed(model, 0.5)
    sampler.sync()
    pairs, plan = asked(adapter, 24, audio=False), {"a": Sampling(4, 1.0)}

    def die_and_return() -> None:
        server.kill()
        server.start()  # with the weights of its folder, which are not the student's

    threading.Timer(0.5, die_and_return).start()
    began = time.monotonic()
    rollouts = sampler.generate(pairs, plan, seed=1)["a"]
    print(f"\nthe only server killed and started again: {time.monotonic() - began:.1f} s")
    assert len(rollouts) == 96 and differences(model, adapter, rollouts).max() < 1e-3
    server.kill()
    server.start()
    server.wait()  # before anybody noticed
    rollouts = sampler.generate(pairs, plan, seed=2)["a"]
    assert len(rollouts) == 96 and differences(model, adapter, rollouts).max() < 1e-3


def test_a_run_goes_on_when_a_server_dies(written, two, tmp_path):
    two[0].start()
    two[0].wait()

    def kill_in_a_step() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").is_file():
            time.sleep(0.05)
        two[0].kill()

    killer = threading.Thread(target=kill_in_a_step)
    killer.start()
    _, steps = run(written, tmp_path / "run", *vllm(two), "train.steps=6", "eval.samples=12")
    killer.join()
    assert two[0].process.poll() is not None
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6] and not any(step["skipped"] for step in steps)
    assert all(step[APART] < 1e-2 for step in steps)


# ---- other families


def qwen2_audio(tokenizer):
    """Random, with the heads that vLLM's CPU kernels take and the half minute its encoder wants."""
    audio = {"num_mel_bins": 80, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    config = families.HF.Qwen2AudioConfig(
        audio_config=audio | {"d_model": 64, "max_source_positions": 1500},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **LARGER},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    processor = families.HF.Qwen2AudioProcessor(
        feature_extractor=families.whisper(seconds=30), tokenizer=tokenizer, chat_template=tiny.TEMPLATE
    )
    return families.made(families.HF.Qwen2AudioForConditionalGeneration, config, tokenizer), processor


def qwen2_5_vl(tokenizer):
    """Random, with such heads."""
    tokenizer = families.tokenizer_with(tokenizer, families.VISION)
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = families.HF.Qwen2_5_VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope, **LARGER},
        vision_config={**vision, "fullatt_block_indexes": [1]},
        **families.vision_ids(tokenizer),
    )
    sizes = {"size": families.PIXELS, "patch_size": 14, "merge_size": 2}
    processor = families.HF.Qwen2_5_VLProcessor(
        image_processor=families.HF.Qwen2VLImageProcessor(**sizes),
        video_processor=families.HF.Qwen2VLVideoProcessor(**sizes),
        tokenizer=tokenizer,
        chat_template=families.template(image=families.SEEN),
    )
    return families.made(families.HF.Qwen2_5_VLForConditionalGeneration, config, tokenizer), processor


LARGER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
LARGER |= {"num_key_value_heads": 2, "max_position_embeddings": 2048}


def saved(made, folder: Path) -> None:
    model, processor = made
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def test_a_step_of_cord_on_speech_with_qwen2_audio(python, tokenizer, world, tmp_path):
    saved(qwen2_audio(tokenizer), tmp_path / "model")
    changes = [f"model.name={tmp_path / 'model'}", "model.train=[projector]", "train.steps=2", "train.prompts=3"]
    with serving(python, tmp_path / "model", 1, 1024) as servers:
        _, steps = run(Path(world["recipe"]), tmp_path / "run", *vllm(servers), *changes, "eval.every=0")
    assert [step["step"] for step in steps] == [1, 2] and not any(step["skipped"] for step in steps)
    assert all(step["grad_norm"] > 0 and step[APART] < 1e-3 for step in steps)
    before, after = (models.load_model(str(p)) for p in (tmp_path / "model", checkpoint.latest(tmp_path / "run")))
    moved = {n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not a.equal(b)}
    assert moved and all("projector" in name for name in moved)


def test_images_are_seen_as_in_training(python, tokenizer, tmp_path):
    saved(qwen2_5_vl(tokenizer), tmp_path / "model")
    model, processor = models.load_model(str(tmp_path / "model")), models.load_processor(str(tmp_path / "model"))
    adapter, pairs = ChatAdapter(processor, 512), []
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 20 * i, 90, 3), dtype=np.uint8)
        parts = [{"type": "image", "image": "x"}, {"type": "text", "text": "What is it?"}]
        view = adapter.laid_out(str(i), [{"role": "user", "content": parts}], images=[Image.fromarray(pixels)])
        pairs.append(Pair(str(i), {"student": view}))
    with serving(python, tmp_path / "model", 1, 1024) as servers:
        sampler = sampler_for(model, processor, adapter, servers, tmp_path / "weights", 12)
        for _ in range(2):
            sampler.sync()
            answers = sampler.generate(pairs, SAMPLINGS, seed=1)
            gaps = differences(model, adapter, [r for some in answers.values() for r in some])
            distribution("images", gaps)
            assert gaps.max() < 1e-3
            disturbed_everywhere(model)


def disturbed_everywhere(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
