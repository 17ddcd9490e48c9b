"""What a policy of ours is, in the words of lerobot's command line."""

from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig


@PreTrainedConfig.register_subclass("xmodal")
@dataclass
class XmodalConfig(PreTrainedConfig):
    recipe: str = ""  # of modality action: the run's own recipe.yaml, or a recipe in the package
    overrides: list[str] = field(default_factory=list)  # key.sub=value, on top of it
    checkpoint: str | None = None  # a checkpoint or model folder; default: the recipe's own model
    cameras: dict[str, str] = field(
        default_factory=dict
    )  # the recipe's name of a camera -> lerobot's key of its images
    instructions: dict[str, str] = field(default_factory=dict)  # lerobot's words for a task -> those of the training
    n_action_steps: int | None = None  # of a chunk, before the next decision; default: all of it
    temperature: float = 0.0  # on top of the recipe's own; 0 takes the likeliest action
    seed: int = 0  # of what is drawn
    lr: float = 1e-4  # of lerobot-train
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=dict)  # the recipe's statistics do that

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        from lerobot_policy_xmodal.modeling_xmodal import read

        return list(range(read(self).robot.chunk))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(lr=self.lr, weight_decay=0.0)

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """Cameras are looked for in what is seen, when it is seen."""
