"""Weights over NCCL, as far as that goes without a GPU: what is announced is what would be sent."""

import torch

from xmodal_opd import checkpoint, models
from xmodal_opd.rollout import nccl


def test_tensors_are_sent_in_the_order_and_shape_in_which_they_are_announced(tmp_path):
    model = models.load_model("default").bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(nccl.files(tmp_path)) > 1
    checkpoint.as_served(tmp_path)
    told, sent = nccl.contents(tmp_path), list(nccl.weights(tmp_path, "cpu"))
    assert told["shapes"] == [list(weight.shape) for weight in sent]
    assert told["dtype_names"] == ["bfloat16"] * len(sent)
    named = dict(zip(told["names"], sent, strict=True))
    torch.testing.assert_close(named["thinker.audio_tower.conv1.weight"], model.audio_tower.conv1.weight)
    assert named.keys() == {f"thinker.{name}" for name in model.state_dict()}
