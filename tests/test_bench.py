"""The bench tells where a step's time goes, and leaves what it timed as it was."""

import threading
import time

import pytest

from tools import bench_step
from xmodal_opd.rollout.hf import HFSampler
from xmodal_opd.scoring.forward import Responses


def test_the_parts_of_a_step_add_up_to_the_whole(world):
    before = HFSampler.generate, Responses.hidden
    figures = bench_step.split(world["recipe"], [], 1)
    assert (HFSampler.generate, Responses.hidden) == before
    named = {"data wait", "sampling", "features", "encoder", "teacher", "student forward", "objective", "backward"}
    assert named | {"optimiser", "sync", "other"} <= figures["share"].keys()
    assert sum(share for name, share in figures["share"].items() if not name.startswith("(")) == pytest.approx(1)
    assert all(figures["seconds"][name] > 0 for name in named)
    assert figures["tokens per second"] > 0 and figures["peak bytes"] > 2**20
    assert "data wait" in bench_step.table(figures)


def test_a_part_leaves_out_what_is_timed_inside_it_and_beside_it():
    clock = bench_step.Clock(lambda: None)
    beside = threading.Thread(target=clock.timed(time.sleep, "judge"), args=(0.05,))
    with clock.part("outer"):
        beside.start()
        clock.timed(time.sleep, "inner")(0.1)
        beside.join()
    assert clock.spent["inner"] >= 0.1 > clock.spent["outer"] and clock.spent["(judge, beside)"] >= 0.05
