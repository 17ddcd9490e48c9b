"""What lessons are made of: an example, its loss, a fit, what was learnt; and how they follow one another."""

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.nn.functional import cross_entropy, ctc_loss
from torch.nn.utils.rnn import pad_sequence

from xmodal_opd.hidden import hidden_repeated
from xmodal_opd.rollout.hf import decode
from xmodal_opd.tokens import pad

REPEAT = "Repeat what was said."


def example(adapter, question, wave=None, repeat: bool = False):
    """(view, answer ids): answer the question, or repeat it. As text, or as a waveform at 16 kHz."""
    parts = [{"type": "text", "text": question.prompt}] if wave is None else [{"type": "audio"}]
    parts += [{"type": "text", "text": REPEAT}] if repeat else []
    ids = adapter.tokenizer(question.prompt if repeat else question.response)["input_ids"]
    messages = [{"role": "user", "content": parts}]
    view = adapter.laid_out(question.instance, messages, [] if wave is None else [wave])
    return view, [*ids, adapter.tokenizer.eos_token_id]


def answer_loss(model, adapter, examples):
    """Mean negative log-likelihood of the answers' tokens."""
    views, answers = zip(*examples, strict=True)
    tokens = pad(answers, -100.0, torch.long)
    prompts = adapter.batch(views)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_repeated(model, prompts, tokens.clamp(min=0))
        logits = model.get_output_embeddings()(hidden)
    return cross_entropy(logits.float().transpose(1, 2), tokens, ignore_index=-100)


def fit(
    model, loss_of: Callable[[], Any], steps: int, rate: float, name: str, warmup: int = 50, final: float = 0.1
) -> None:
    """AdamW with a short warm-up and a linear decay to the part `final`."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=rate, weight_decay=0.01)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warmup) * (1 - (1 - final) * s / steps)
    )
    model.train()
    for step in track(range(steps), name):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        shape.step()
        if (step + 1) % 50 == 0:
            print(f"{name} {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()


def teach(
    model: Any,
    adapter: Any,
    lessons: Mapping[str, Callable[[Any, Any, int], None]],
    work: Path,
    seed: int,
    learnt: Callable[[], object] | None = None,
) -> None:
    """The lessons in their order, each from where the one before ended and the seed; what is kept in `work` is not
    learnt again. After each, what is `learnt` is printed."""
    began = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    for name, lesson in lessons.items():
        kept = work / f"{name}.pt"
        if not kept.exists():
            torch.manual_seed(seed)
            model.requires_grad_(True)
            lesson(model, adapter, seed)
            torch.save(model.state_dict(), kept)
        model.load_state_dict(torch.load(kept, weights_only=True))
        print(f"after {name}, {time.monotonic() - began:.0f} s" + (f": {learnt()}" if learnt else ""), flush=True)


def save(model: Any, processor: Any, folder: Path) -> None:
    """As a Hugging Face folder, in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {size:.1f} MB")


def accuracy(model, adapter, asked: list) -> dict[str, float]:
    """Share of right final answers per task, greedily; asked: (task, view, answer)."""
    right: dict[str, list[bool]] = {"all": []}
    for some in itertools.batched(asked, 24):
        prompts = adapter.batch([view for _, view, _ in some])
        eos = [adapter.tokenizer.eos_token_id]
        ids, _ = decode(model, prompts, torch.arange(len(some)), torch.zeros(len(some)), max_tokens=40, eos=eos)
        for (task, _, wanted), answer in zip(some, ids, strict=True):
            ok = adapter.decode(answer).rpartition("answer: ")[2] == wanted
            right.setdefault(task, []).append(ok)
            right["all"].append(ok)
    return {task: round(sum(v) / len(v), 3) for task, v in right.items()}


def aligned(logits, targets: list[list[int]], blank: int):
    """Mean CTC loss, per token, of logits ([length, vocabulary] of each) against their tokens."""
    logp = pad_sequence([one.log_softmax(-1) for one in logits])
    lengths, sizes = (torch.tensor([len(one) for one in some]) for some in (logits, targets))
    return ctc_loss(logp, pad(targets, 0.0, torch.long), lengths, sizes, blank=blank, zero_infinity=True)
