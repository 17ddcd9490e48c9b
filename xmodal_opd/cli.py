"""xmodal-opd train | eval | check | export | show | report. Heavy imports come after the arguments are read."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence

OVERRIDES = "key.sub=value, such as train.steps=20 or run_dir=runs/mine"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 cannot be run (one sentence says why), 2 wrong usage, 130, 141 or 143 stopped."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and not (hasattr(arguments, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides behind an option
        arguments.overrides += rest
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        how = "the same --output" if arguments.run is evaluate else "--resume"
        print(f"stopped; what was saved stays good: go on with {how}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor is what is left to be flushed
        return 141
    except (ValueError, KeyError, RuntimeError, OSError, ImportError) as error:
        if arguments.traceback:
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"xmodal-opd: {text}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="xmodal-opd", description="On-policy distillation across modalities.")
    top.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the deepspeed launcher, which says it twice
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("train", train, "run a recipe: evaluate, train, evaluate again, and print what became of the gap"),
        ("eval", evaluate, "the recipe's test questions as the student sees them and as text"),
        ("check", check, "build everything a recipe names and run its objective once, without training"),
        ("export", export, "write a checkpoint as a plain Hugging Face folder, a LoRA adapter merged into its base"),
        ("show", show, "print the resolved recipe"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("recipe", help="a YAML file, or the name of a recipe in the package")
        command.add_argument("overrides", nargs="*", help=OVERRIDES)
        command.set_defaults(run=run)
        if name == "train":
            command.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
        if name == "check":
            command.add_argument(
                "--dry", action="store_true", help="load nothing: print parameters, memory per device, tokens per step"
            )
            command.add_argument("--devices", type=int, default=1, help="with --dry: how many it would run on (1)")
        if name in ("eval", "export"):
            command.add_argument("--checkpoint", help="a checkpoint or model folder; default: the recipe's own model")
        if name == "export":
            command.add_argument("--output", required=True, help="the folder to write, which is not there yet")
        if name == "eval":
            command.add_argument(
                "--output", help="where to write per-question JSONL; default: runs/NAME-eval-DATE.jsonl"
            )
            command.add_argument(
                "--benchmark",
                action="append",
                default=[],
                metavar="NAME=PATH",
                help="instead: a benchmark of image questions (mathvista, mathverse, mmstar, mmmu, chartqa) in "
                "parquet, JSON or JSONL; may be said again; with the same --output it goes on where it was stopped",
            )
            command.add_argument("--limit", type=int, metavar="N", help="the first N questions only, of each benchmark")
            command.add_argument("--view", help="of benchmarks: student (default), blank or degraded images")
            command.add_argument("--lmms-eval", metavar="FOLDER", help="also write them in the form of lmms-eval")
    table = commands.add_parser("report", help="a table over finished runs: mean and spread over seeds")
    table.add_argument("runs", nargs="+", help="run folders, each with a summary.json")
    table.add_argument("--figure", help="also draw the gap, or the metrics, over the steps into this PNG")
    table.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME", help="also a table of these, such as entropy"
    )
    table.set_defaults(run=report)
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
    return top


def recipe_of(arguments: argparse.Namespace):
    from xmodal_opd import config

    return config.load(arguments.recipe, arguments.overrides)


def train(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    quiet()
    from xmodal_opd import dist, report, train
    from xmodal_opd.provenance import command_line

    summary = train.train(recipe, resume=arguments.resume, command=command_line())
    if dist.rank() == 0:
        report.print_summary(summary)
        print(f"run folder: {summary['run_dir']}")
    dist.leave()
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    quiet()
    from pathlib import Path

    from xmodal_opd import inspect, lmms, report

    date = time.strftime("%Y%m%d-%H%M%S")
    output = arguments.output or f"runs/{recipe.name}-eval-{date}.jsonl"
    limit, sources = arguments.limit, benchmarks_of(arguments)
    if sources:
        print(f"answers go to {output}; after a stop the same command with --output {output} goes on", flush=True)
        view = arguments.view or "student"
        records = inspect.evaluate_benchmarks(recipe, arguments.checkpoint, sources, output, view=view, limit=limit)
        report.print_benchmarks(records)
    else:
        records = inspect.evaluate_only(recipe, arguments.checkpoint, output, limit)
        report.print_accuracies(records)
    print(f"answers: {output}")
    if arguments.lmms_eval:
        model = arguments.checkpoint or recipe.model.name
        for path in lmms.write(records, recipe.name, Path(arguments.lmms_eval), date, model):
            print(f"lmms-eval: {path}")
    return 0


def benchmarks_of(arguments: argparse.Namespace) -> dict[str, str]:
    """{name: path}. Raises ValueError for what cannot be one, and for options that belong to benchmarks alone."""
    sources = dict(word.partition("=")[::2] for word in arguments.benchmark)
    if not all(sources.values()) or len(sources) < len(arguments.benchmark):
        raise ValueError(f"--benchmark is NAME=PATH, each name once, not {', '.join(arguments.benchmark)}")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit is a number of questions from 1 on, not {arguments.limit}")
    if arguments.view and not sources:
        raise ValueError("--view is of --benchmark; the recipe's own questions are asked under both their views")
    return sources


def check(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    quiet()
    if arguments.dry:
        from xmodal_opd import dry

        lines = dry.dry(recipe, arguments.devices)
    else:
        from xmodal_opd import inspect

        lines = inspect.check(recipe)
    for line in lines:
        print(line, flush=True)
    return 0


def export(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    quiet()
    from xmodal_opd import inspect

    inspect.export(recipe, arguments.checkpoint, arguments.output)
    print(f"model folder: {arguments.output}")
    return 0


def show(arguments: argparse.Namespace) -> int:
    from xmodal_opd import config

    print(config.dump(recipe_of(arguments)), end="")
    return 0


def report(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from xmodal_opd import history, report

    runs = [Path(run) for run in arguments.runs]
    summaries = history.load_summaries(runs)
    print(report.table(summaries))
    folders = {method: [] for method in history.by_method(summaries)}
    for run, told in zip(runs, summaries, strict=True):
        folders[str(told["method"])].append(run)
    if arguments.metrics:
        print(report.metrics_table(folders, arguments.metrics))
    if arguments.figure:
        from xmodal_opd import figures

        path, names = Path(arguments.figure), arguments.metrics
        print(figures.metrics_figure(folders, names, path) if names else figures.gap_figure(folders, path))
    return 0


def quiet() -> None:
    """Libraries keep their progress bars and advice to themselves."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    of_transformers.set_verbosity_error()
    # accelerate imports DeepSpeed, where that is installed, while a model is saved; its logger then sets its own level
    logging.getLogger("DeepSpeed").addFilter(is_error)


def is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


if __name__ == "__main__":
    sys.exit(main())
