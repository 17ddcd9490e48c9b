"""What a policy of ours is, in the words of lerobot's command line."""

from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig

from xmodal_opd import config
from xmodal_opd.schema import ActionRecipe


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

    def read(self) -> ActionRecipe:
        """The recipe. Raises ValueError where there is none, and for one that is none of a robot."""
        if not self.recipe:
            raise ValueError(
                "--policy.type=xmodal needs --policy.recipe=FILE, the recipe.yaml of the run that trained it"
            )
        recipe = config.load(self.recipe, self.overrides)
        if not isinstance(recipe, ActionRecipe):
            raise ValueError(f"{self.recipe} is a recipe of modality {recipe.modality}; a policy needs one of action")
        return recipe

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.read().robot.chunk))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(lr=self.lr, weight_decay=0.0)

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """Cameras are looked for in what is seen, when it is seen."""
