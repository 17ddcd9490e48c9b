"""What is saved stays good, whatever happens while the next checkpoint is written or read."""

import json
import pickle
import resource

import pytest
import torch
from families import omni

from xmodal_opd import checkpoint, config, train
from xmodal_opd.engine.plain import PlainEngine


def plain(model):
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "clip": 1.0}
    return PlainEngine(model, **options, schedule=lambda step: 1.0)


@pytest.fixture
def saved(tokenizer, tmp_path):
    model, processor = omni(tokenizer)
    engine = plain(model)
    checkpoint.save(tmp_path, model, processor, engine, {"step": 1, "position": 3}, keep=2)
    return tmp_path, model, processor, engine


def test_a_checkpoint_comes_back_whole(saved, tokenizer):
    run, model, _, _ = saved
    other, _ = omni(tokenizer)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    state = checkpoint.load(checkpoint.latest(run), other, plain(other))
    assert state == {"step": 1, "position": 3}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_one(saved):
    run, model, processor, engine = saved
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # no file above 1 MB, as on a disk that is nearly full
    try:
        with pytest.raises(
            OSError, match=r"step 2 could not be written.*the last good checkpoint is .*step-000001; make room"
        ):
            checkpoint.save(run, model, processor, engine, {"step": 2}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.latest(run).name == "step-000001"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-000001"]
    checkpoint.save(run, model, processor, engine, {"step": 2}, keep=1)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-000002"]


def test_what_a_killed_writer_left_behind_is_not_taken_for_a_checkpoint(saved):
    run, model, processor, engine = saved
    (run / "checkpoints" / "step-000002.writing").mkdir()
    assert checkpoint.latest(run).name == "step-000001"
    checkpoint.save(run, model, processor, engine, {"step": 2}, keep=2)
    assert checkpoint.latest(run).name == "step-000002"


def test_a_checkpoint_of_another_model_is_refused(saved, tokenizer):
    run, *_ = saved
    folder = checkpoint.latest(run)
    state = json.loads((folder / "trainer.json").read_text())
    state["shapes"]["lm_head.weight"] = [7, 7]
    (folder / "trainer.json").write_text(json.dumps(state))
    model, _ = omni(tokenizer)
    with pytest.raises(ValueError, match=r"checkpoint of another model: .* is \[7, 7\] there"):
        checkpoint.load(folder, model, plain(model))
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no trainer\.json"):
        checkpoint.load(run, model, plain(model))


def test_a_run_folder_is_not_written_over_and_resuming_nothing_says_so(world, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(ValueError, match="already holds a run; go on with it by --resume"):
        train.run_folder(config.load(world["recipe"], [f"run_dir={tmp_path}"]), resume=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"nothing to resume: no checkpoint in runs/tiny-\*"):
        train.run_folder(config.load(world["recipe"]), resume=True)


@pytest.mark.parametrize("resume, place", [(False, "run_dir=mine"), (True, "run_dir=mine"), (True, "run_dir=null")])
def test_checkpoints_without_their_recipe_are_neither_gone_on_with_nor_written_among(
    world, tmp_path, monkeypatch, resume, place
):
    monkeypatch.chdir(tmp_path)
    for run in ("mine", "runs/tiny-1"):
        (tmp_path / run / "checkpoints" / "step-000009").mkdir(parents=True)
        (tmp_path / run / "checkpoints" / "latest").write_text("step-000009")
    with pytest.raises(ValueError, match=r"(mine|runs/tiny-1) holds checkpoints, but not the recipe\.yaml they are of"):
        train.run_folder(config.load(world["recipe"], [place]), resume)


def test_three_steps_in_a_row_without_a_finite_gradient_stop_the_run():
    state, bad = {"skipped": 0}, {"skipped": 1.0, "loss/tokens": float("nan"), "loss/judge": 0.0}
    for expected in (1, 2):
        state["skipped"] = train.skipped_in_a_row(bad, state, 0)
        assert state["skipped"] == expected
    assert train.skipped_in_a_row({"skipped": 0.0}, state, 0) == 0
    with pytest.raises(RuntimeError, match=r"3 steps in a row, up to step 10.*not finite: loss/tokens\)"):
        train.skipped_in_a_row(bad, state, 9)


def test_a_checkpoint_with_code_in_it_is_not_run(saved, tokenizer):
    run, model, *_ = saved
    folder = checkpoint.latest(run)
    torch.save({"state": Surprise()}, folder / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        checkpoint.load(folder, model, plain(model))
    assert not (run / "surprise").exists()


class Surprise:
    def __reduce__(self):
        return (open, ("surprise", "w"))
