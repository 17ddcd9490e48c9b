"""What `check --dry` says of a model it has not loaded."""

from pathlib import Path

import pytest

from xmodal_opd import models

SHAPES = Path(__file__).parents[1] / "configs" / "models"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Qwen2-Audio-7B-Instruct", 8_397_094_912), ("Qwen2.5-Omni-7B", 8_931_813_888)],  # of the published weights
)
def test_recorded_shapes_have_the_published_number_of_parameters(name, parameters):
    model = models.empty_model(str(SHAPES / name), "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())
