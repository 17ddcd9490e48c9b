"""DeepSpeed and several ranks against one plain process: the same numbers, files and ends. Launched for real."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from xmodal_opd import config
from xmodal_opd.build import build
from xmodal_opd.build.engines import launch
from xmodal_opd.checkpoint import latest
from xmodal_opd.engine.deepspeed_config import settings

ROOT = Path(__file__).parents[1]
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # even the smallest parameter is divided
LIMIT = 600  # seconds until a launch counts as hanging


def environment():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def command(*program: str, processes: int = 2) -> list[str]:
    return [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc-per-node={processes}", *program]


def launched(arguments: list[str]) -> str:
    """What a launch printed. Fails when it does, or hangs."""
    output = subprocess.STDOUT, subprocess.PIPE
    done = subprocess.run(
        arguments, env=environment(), cwd=ROOT, text=True, timeout=LIMIT, stderr=output[0], stdout=output[1]
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def tasks(world, folder: Path, *named: str, processes: int = 2) -> str:
    return launched(
        command(str(ROOT / "tests" / "ranks.py"), world["recipe"], str(folder), *named, processes=processes)
    )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> str:
    """The keys of ZeRO-3 with every parameter divided, whatever its size."""
    path = tmp_path_factory.mktemp("config") / "deepspeed.json"
    path.write_text(json.dumps(SHARDED))
    return f"engine.zero=3 engine.config={path}"


STAGES = {"0": "engine.zero=0", "1": "engine.zero=1", "2": "engine.zero=2", "3": "SHARDED"}
RUNS = {"2": STAGES["2"]}
REST = {stage: STAGES[stage] for stage in "013"}
LEADS = '{"arithmetic":{"model":"initial"},"ordering":{"view":"student"},"choice":{}}'
ROUTED = f'objective.tokens.teacher.route={{"field":"task","to":{LEADS}}}'
REST |= {"2-routed": f"engine.zero=2 {ROUTED}"}  # some micro-batches have no question of a teacher on one rank, or any
REST |= {"2-mixed": "engine.zero=2 mixed", "3-mixed": "SHARDED mixed engine.share_prefix=false"}  # rank 1 hears nothing
PARTS = "train.minibatches=2"
REST |= {"2-parts": f"engine.zero=2 {PARTS}"}
OFFLOAD = {"2-offload": "engine.zero=2 engine.offload=[optimizer]"}
OFFLOAD |= {"3-offload": "SHARDED engine.offload=[optimizer,parameters]"}
LITTLE = "engine.activation_checkpointing=true engine.share_prefix=false"
MORE = {**OFFLOAD, "2-little": f"engine.zero=2 {LITTLE}", "3-little": f"SHARDED {LITTLE}"}
ADAPTED = 'model.train=null model.lora={"rank":4}'
LORA = {"2-lora": f"engine.zero=2 {ADAPTED}", "3-lora": f"SHARDED {ADAPTED}"}
COARSE = {f"{stage}-bf16": f"{STAGES[stage]} model.dtype=bfloat16" for stage in "123"}


def steps_of(runs: dict[str, str], sharded: str) -> list[str]:
    return [f"steps in={name} {keys.replace('SHARDED', sharded)}" for name, keys in runs.items()]


@pytest.fixture(scope="module")
def two_ranks(world, tmp_path_factory, sharded):
    """The folder of one launch of two processes that did all that the default tests look at."""
    folder = tmp_path_factory.mktemp("two")
    tasks(world, folder, *steps_of(RUNS, sharded))
    return folder


@pytest.fixture(scope="module")
def two_ranks_more(world, tmp_path_factory, sharded):
    folder = tmp_path_factory.mktemp("more")
    tasks(world, folder, "pieces in=.", *steps_of(REST | MORE | COARSE | LORA, sharded))
    return folder


@pytest.fixture(scope="module")
def one_process(world):
    """Metrics and weights after the same three steps in engine/plain.py: plain, mixed, routed, or in minibatches."""

    @cache
    def done(kind):
        parts = ranks.built(world["recipe"], *{"routed": (ROUTED,), "parts": (PARTS,)}.get(kind, ()))
        told = ranks.advance(parts, range(3), kind == "mixed")
        return told, ranks.weights_of(parts)

    return done


def same_as(folder: Path, told, expected) -> None:
    """The saved model, an ordinary folder, has the weights `expected` to 2e-5, where three updates move them by 3e-4
    and Adam divides a gradient's last bits by its size; its steps measured what `told` says."""
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(latest(folder))
    ours = dict(model.named_parameters())
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=2e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    for here, there in zip(json.loads((folder / "metrics.json").read_text()), told, strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-6)


def kind_of(name: str) -> str:
    return next((kind for kind in ("mixed", "routed", "parts") if kind in name), "plain")


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_what_one_plain_process_trains(two_ranks, one_process, name):
    same_as(two_ranks / name, *one_process("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_they_do_at_every_stage_on_routes_in_minibatches_and_where_one_hears_nothing(two_ranks_more, one_process, name):
    same_as(two_ranks_more / name, *one_process(kind_of(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_offload_and_activation_checkpointing_change_nothing(two_ranks_more, one_process, name):
    same_as(two_ranks_more / name, *one_process("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COARSE)
def test_bfloat16_has_float32_masters(two_ranks_more, name):
    folder = two_ranks_more / name
    for told in json.loads((folder / "metrics.json").read_text()):
        assert 0 < told["grad_norm"] < 100 and not told["skipped"]
    saved = load_file(latest(folder) / "model.safetensors")
    masters = state_of(folder)
    fine = 0
    for key in [key for key in masters if key.endswith(" master")]:
        weight, master = saved[key.removesuffix(" master")], masters[key]
        assert weight.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(weight, master.bfloat16())
        fine += int((master != master.bfloat16().float()).sum())
    assert fine > 100_000


@pytest.mark.slow
@pytest.mark.parametrize("name", LORA)
def test_an_adapter_alone_trains_over_ranks(two_ranks_more, world, name):
    parts = ranks.built(world["recipe"], *ADAPTED.split())
    start = {n: p.detach().clone() for n, p in parts.student.named_parameters() if p.requires_grad}
    ranks.advance(parts, range(3))
    ours = load_file(latest(two_ranks_more / name) / "adapter_model.safetensors")
    expected = {n.replace(".default", ""): p for n, p in parts.student.named_parameters() if n in start}
    assert len(ours) == len(expected)
    for key, value in ours.items():
        theirs = expected[key.removeprefix("base_model.model.")]
        torch.testing.assert_close(value, theirs.detach(), atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
    assert any(not torch.equal(p, start[n]) for n, p in parts.student.named_parameters() if n in start)


def state_of(folder: Path, at: str = "") -> dict[str, torch.Tensor]:
    """All of the optimiser's state in a checkpoint, from every rank's file."""
    there = folder / "checkpoints" / at if at else latest(folder)
    return {k: v for file in sorted(there.glob("optimizer-*")) for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def resumed(world, tmp_path_factory, sharded):
    """Two ranks: four steps as one, and as two, a checkpoint and two. Then from that checkpoint one rank, at the next
    stage."""
    folder = tmp_path_factory.mktemp("resumed")
    keys = {stage: of.replace("SHARDED", sharded) for stage, of in STAGES.items()}
    tasks(world, folder, *(f"{task} in={stage} {of}" for stage, of in keys.items() for task in ("go_on", "resume")))
    for stage in STAGES:
        there = folder / f"one-{stage}" / "checkpoints"
        shutil.copytree(folder / stage / "checkpoints" / "step-000002", there / "step-000002")
        (there / "latest").write_text("step-000002")
    after = {"0": "1", "1": "2", "2": "3", "3": "0"}
    tasks(world, folder, *(f"resume in=one-{stage} {keys[after[stage]]}" for stage in STAGES), processes=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_resuming_is_exact_at_the_same_number_of_ranks_and_works_at_another(resumed, stage):
    whole, again, one = resumed / stage / "whole", resumed / stage, resumed / f"one-{stage}"
    weights = [load_file(latest(folder) / "model.safetensors") for folder in (whole, again, one)]
    states = [state_of(folder) for folder in (whole, again, one)]
    for expected, same, near in (weights, states):
        assert expected.keys() == same.keys() == near.keys()
        for name, value in expected.items():
            assert torch.equal(value, same[name]), name
            torch.testing.assert_close(near[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    start = state_of(again, "step-000002")
    assert any(not torch.equal(start[name], states[0][name]) for name in start)


# ---- whole runs


def run_of(world, folder: Path, *more: str) -> list[str]:
    keys = ["engine.name=deepspeed", "train.prompts=4", f"run_dir={folder}", *more]
    return ["train", world["recipe"], *keys]


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_a_message(world, tmp_path):
    arguments = ["-m", "xmodal_opd.cli", *run_of(world, tmp_path / "run", "train.steps=5000", "engine.zero=2")]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command(*arguments), env=environment(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert run.poll() is None, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.1)
        os.kill(rank_of(run.pid, 1), signal.SIGKILL)
        assert run.wait(timeout=90) != 0
    finally:
        run.kill()
    told = (tmp_path / "log").read_text()
    assert "rank 0 lost another rank of this run" in told and "--resume" in told
    assert latest(tmp_path / "run") is not None


def rank_of(launcher: int, rank: int) -> int:
    """The process that a launcher started as `rank`."""
    for line in subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True).splitlines():
        child, parent = map(int, line.split())
        if parent == launcher and f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return child
    raise AssertionError(f"no rank {rank} below process {launcher}")


@pytest.mark.slow
def test_whole_runs_by_either_launcher_and_their_resumption(world, tmp_path, sharded):
    """Four steps under the deepspeed launcher; two and two under torchrun, the second part at stage 3."""
    scripts = Path(sys.executable).parent
    by_deepspeed = [
        str(scripts / "deepspeed"),
        "--num_gpus=2",
        f"--master_port={free_port()}",
        "--module",
        "xmodal_opd.cli",
    ]
    told = launched([*by_deepspeed, *run_of(world, tmp_path / "whole", "engine.zero=2")])
    assert told.count("Gap closed") == 1 and told.count("run folder: ") == 1
    module = command("-m", "xmodal_opd.cli")
    launched([*module, *run_of(world, tmp_path / "parts", "engine.zero=2", "train.steps=2")])
    told = launched(
        [*command(str(scripts / "xmodal-opd")), *run_of(world, tmp_path / "parts", *sharded.split()), "--resume"]
    )
    assert "Gap closed" in told
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, parts)]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    for here, there in zip(*lines, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-3) and here["num_tokens"] == there["num_tokens"]
    keys = [
        [json.loads(line)["key"] for line in (f / "eval" / "after.jsonl").read_text().splitlines()]
        for f in (whole, parts)
    ]
    assert keys[0] == keys[1] and len(set(keys[0])) == 6
    assert json.loads((whole / "summary.json").read_text())["questions"] == 6
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(latest(parts))
    for name, value in load_file(latest(whole) / "model.safetensors").items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-4, rtol=0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# ---- what is refused


def test_a_file_of_ones_own_adds_to_the_recipe_and_may_not_contradict_it(tmp_path):
    def made(given, stage=2, offload=(), dtype="float32"):
        (tmp_path / "ds.json").write_text(json.dumps(given))
        return settings(stage, offload, str(tmp_path / "ds.json"), dtype=dtype, clip=1.0)

    zero = {"stage": "auto", "reduce_bucket_size": 1000}
    found = made({"zero_optimization": zero, "gradient_clipping": 1.0, "wall_clock_breakdown": True}, None)
    assert found["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000} and found["wall_clock_breakdown"]
    assert made({"zero_optimization": {"stage": 3}}, None)["zero_optimization"]["stage"] == 3
    with pytest.raises(ValueError, match=r"sets zero_optimization.stage to 3 and the recipe to 2; leave it out"):
        made({"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match=r"sets gradient_clipping to 0.5 and the recipe to 1.0"):
        made({"gradient_clipping": 0.5})
    with pytest.raises(ValueError, match="sets 'optimizer', which the recipe decides"):
        made({"optimizer": {"type": "Adam"}})
    with pytest.raises(ValueError, match=r"offload: \[parameters\] needs engine.zero of 3 or more, not 2"):
        made({}, offload=["parameters"])
    with pytest.raises(ValueError, match=r"bfloat16 with engine.zero=0 keeps no float32 weights"):
        made({}, stage=0, dtype="bfloat16")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is not a DeepSpeed JSON file"):
        settings(2, (), str(tmp_path / "broken.json"), dtype="float32", clip=1.0)


def test_processes_that_do_not_fit_the_recipe_are_refused(world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, but engine.name is plain"):
        launch(config.load(world["recipe"]))
    with pytest.raises(ValueError, match=r"train.prompts is 3 questions a step, which 2 ranks cannot share evenly"):
        launch(config.load(world["recipe"], ["engine.name=deepspeed"]))


def test_the_average_of_the_weights_is_refused_where_no_rank_has_them(world):
    teacher = "objective.tokens.teacher.model=ema"
    with pytest.raises(ValueError, match="the teacher 'ema' needs the student's weights on every rank"):
        build(config.load(world["recipe"], ["engine.name=deepspeed", "engine.zero=3", teacher]))


# ---- judged over ranks


@pytest.mark.slow
@pytest.mark.parametrize("kind, name", ranks.PIECES, ids=lambda x: x)
def test_a_piece_that_looks_at_the_whole_step_does_so_over_ranks(two_ranks_more, plain, kind, name):
    ours = torch.load(two_ranks_more / "pieces.pt", weights_only=True)[f"{kind} {name}"]
    expected = ranks.gradient(plain, kind, name)
    assert expected.norm() > 0
    torch.testing.assert_close(ours, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


@pytest.fixture(scope="module")
def plain(world):
    return ranks.built(world["recipe"])
