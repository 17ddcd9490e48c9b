"""What lies between lerobot's batches and the policy: nothing but the device. Units are the adapter's business."""

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    make_policy_processor_pipelines,
)

from lerobot_policy_xmodal.configuration_xmodal import XmodalConfig


def make_xmodal_pre_post_processors(
    config: XmodalConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    before = [RenameObservationsProcessorStep(rename_map={}), AddBatchDimensionProcessorStep()]
    before += [DeviceProcessorStep(device=config.device)]
    return make_policy_processor_pipelines(input_steps=before, output_steps=[DeviceProcessorStep(device="cpu")])
