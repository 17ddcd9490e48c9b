"""Time and memory of the weighted full-vocabulary reverse KL: by chunks (ours), dense, and chunk-and-checkpoint.

One head serves student and teacher and is frozen, as in self-distillation; the gradient goes to the student's hidden
states. Every measurement is a fresh process: memory is the most it held above its inputs in a first run, time the
best of the runs after it.

    python tools/bench_loss.py --tokens 256 2048 --hidden 512 --threads 2 --json bench.json
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE_MB = 4096 / 2**20


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(measure(args.forms[0], args.tokens[0], args.dtypes[0], args)))
        return
    results = []
    print(f"vocabulary {args.vocab:,}, hidden {args.hidden}, {args.threads} threads, best of {args.repeats}")
    print(f"{'dtype':>9} {'tokens':>7} {'form':>13} {'seconds':>9} {'MB extra':>9} {'time':>7} {'memory':>7}")
    for dtype in args.dtypes:
        for tokens in args.tokens:
            ours: dict[str, Any] = {}
            for form in args.forms:
                row = in_fresh_process(form, tokens, dtype, args)
                ours = ours or row
                results.append(row)
                print(line(row, ours), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"options": options(args), "results": results}, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048], help="response tokens N")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size H")
    parser.add_argument("--vocab", type=int, default=151_936, help="vocabulary size V")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--forms", nargs="+", default=["ours", "dense", "checkpointed"], choices=list(FORMS))
    parser.add_argument("--chunk", type=int, default=64, help="tokens per chunk of the checkpointed form")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs after the first")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def options(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if k not in ("json", "worker")}


def in_fresh_process(form: str, tokens: int, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", "--forms", form, "--tokens", str(tokens), "--dtypes", dtype]
    for name in ("hidden", "vocab", "chunk", "threads", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    row = {"form": form, "tokens": tokens, "dtype": dtype}
    return row | (json.loads(done.stdout) if done.returncode == 0 else {"failed": done.returncode})


def line(row: dict[str, Any], ours: dict[str, Any]) -> str:
    head = f"{row['dtype']:>9} {row['tokens']:>7} {row['form']:>13}"
    if "failed" in row:
        return f"{head} exit code {row['failed']} (killed by the system when memory runs out: -9)"
    ratios = "".join(f" {row[k] / ours[k]:6.2f}x" for k in ("seconds", "mb") if k in ours)
    return f"{head} {row['seconds']:>9.2f} {row['mb']:>9.0f}{ratios}"


def measure(form: str, tokens: int, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and extra MB of value and gradient, and the loss for comparison."""
    import torch

    torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    head = torch.randn(args.vocab, args.hidden, generator=g).mul_(args.hidden**-0.5).to(kind)
    student, noise = (torch.randn(tokens, args.hidden, generator=g) for _ in range(2))
    teacher, student = (student + 0.3 * noise).to(kind), student.to(kind).requires_grad_()
    weight, f = torch.rand(tokens, generator=g), FORMS[form]

    def run() -> float:
        student.grad = None
        loss = (weight * f(student, teacher, head, args.chunk)).sum()
        loss.backward()
        return loss.item()

    f(student[:2], teacher[:2], head, args.chunk).sum().backward()  # threads and workspaces exist before we look
    megabytes, loss = most_memory(run)
    seconds = min(timed(run) for _ in range(args.repeats))
    return {"seconds": seconds, "mb": megabytes, "loss": loss}


def timed(run: Callable[[], float]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def most_memory(run: Callable[[], float]) -> tuple[float, float]:
    """The most resident memory during `run` above that before it, in MB, looked at every two milliseconds."""
    before, most, done = resident_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run()
    finally:
        done.set()
        watcher.join()
    return max(most, before) - before, result


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_MB


def ours(student: Any, teacher: Any, head: Any, chunk: int) -> Any:
    from xmodal_opd.objective import vocab
    from xmodal_opd.objective.divergences import reverse_kl

    return vocab.divergence(reverse_kl, student, head, teacher, head)


def dense(student: Any, teacher: Any, head: Any, chunk: int) -> Any:
    p, q = ((h @ head.T).float().log_softmax(-1) for h in (student, teacher))
    return (p.exp() * (p - q)).sum(-1)


def checkpointed(student: Any, teacher: Any, head: Any, chunk: int) -> Any:
    import torch
    from torch.utils.checkpoint import checkpoint

    pieces = zip(student.split(chunk), teacher.split(chunk), strict=True)
    values: list[Any] = [checkpoint(dense, s, t, head, chunk, use_reentrant=False) for s, t in pieces]
    return torch.cat(values)


FORMS = {"ours": ours, "dense": dense, "checkpointed": checkpointed}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
