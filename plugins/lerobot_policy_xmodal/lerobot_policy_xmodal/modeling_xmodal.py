"""A model that `xmodal-opd` trains as a policy of lerobot's: the same adapter makes its views, the same decoding its
actions. It sees as the recipe's student does; state in words, which teachers read, is nothing that lerobot has.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from lerobot_policy_xmodal.configuration_xmodal import XmodalConfig
from modalities.action.lerobot import camera_of
from xmodal_opd.hidden import head, hidden_repeated, inputs_on
from xmodal_opd.inspect import measured
from xmodal_opd.rollout.decode import decode

IMAGE, PADDED = "observation.image", "action_is_pad"


class XmodalPolicy(PreTrainedPolicy):
    config_class = XmodalConfig
    name = "xmodal"

    def __init__(self, config: XmodalConfig, **_: Any):
        super().__init__(config)
        parts = measured(config.read(), config.checkpoint)
        self.model, self.acting, self.sampler = parts.student, parts.adapter, parts.sampler
        self.acting.privileged = False  # there is no text of the state to make the teacher's view of
        self.random = np.random.default_rng(config.seed)
        self.reset()

    def reset(self) -> None:
        self.coming: deque[Tensor] = deque()

    def get_optim_params(self) -> list[Tensor]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next action [B, size]."""
        if not self.coming:
            self.coming.extend(self.predict_action_chunk(batch)[:, : self.config.n_action_steps].unbind(1))
        return self.coming.popleft()

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """[B, chunk, size] in the simulator's units."""
        prompts, sampler = self.prompts(batch), self.sampler
        rows, device = len(prompts["input_ids"]), prompts["input_ids"].device
        tokens, _ = decode(
            self.model,
            prompts,
            width=sampler.width,
            among=sampler.among,
            placeholder=sampler.placeholder,
            policy=sampler.temperature,
            temperature=torch.full((rows,), self.config.temperature, device=device),
            draws=torch.from_numpy(self.random.random((rows, sampler.width))).to(device),
        )
        chunks = [torch.from_numpy(self.acting.actions(row)) for row in tokens.tolist()]
        return torch.stack(chunks).to(device, torch.float32)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """−log p of the demonstrated tokens, a mean over those of the actions [B, chunk, size] that are not padding."""
        ids, mask = self.demonstrated(batch)
        logp = self.predicted(batch, ids).log_softmax(-1)
        logp = logp.gather(-1, (ids - self.sampler.among.start)[..., None])[..., 0]
        loss = -(logp * mask).sum() / mask.sum()
        return loss, {"loss": loss.item()}

    def predicted(self, batch: Mapping[str, Any], ids: Tensor) -> Tensor:
        """Logits [B, W, 256] of tokens, each behind those before it, or behind none where all are predicted at once."""
        sampler, prompts = self.sampler, self.prompts(batch)
        fed = ids if sampler.placeholder is None else torch.full_like(ids, sampler.placeholder)
        hidden = hidden_repeated(self.model, prompts, fed)
        return (hidden / sampler.temperature @ head(self.model)[sampler.among].T).float()

    def demonstrated(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Tokens [B, W], and which of them are of actions that were taken."""
        actions = batch[ACTION].cpu().numpy()
        ids = torch.tensor([self.acting.ids(chunk) for chunk in actions], device=batch[ACTION].device)
        taken = ~batch[PADDED] if PADDED in batch else torch.ones(actions.shape[:2], dtype=torch.bool)
        return ids, taken.to(ids.device).repeat_interleave(actions.shape[2], dim=1)

    def prompts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        views = [self.view(batch, row) for row in range(len(batch["task"]))]
        return inputs_on(self.model, self.acting.batch(views))

    def view(self, batch: Mapping[str, Any], row: int) -> Any:
        images = {camera: pixels(batch[key][row]) for camera, key in self.images(batch).items()}
        task = batch["task"][row]
        seen = {
            "images": images,
            "state": batch[OBS_STATE][row].cpu().numpy() if OBS_STATE in batch else np.zeros(0, np.float32),
            "text": "",
            "instruction": self.config.instructions.get(task, task),
        }
        return self.acting.observed(f"row {row}", seen, {}).views["student"]

    def images(self, batch: Mapping[str, Any]) -> dict[str, str]:
        """lerobot's key for each of the recipe's cameras. Raises ValueError where one has none."""
        found = {camera_of(key): key for key in batch if key.startswith(IMAGE)}
        cameras = self.acting.cameras
        if len(found) == len(cameras) == 1 and not self.config.cameras:
            return {cameras[0]: next(iter(found.values()))}
        keys = {camera: self.config.cameras.get(camera, found.get(camera, "")) for camera in cameras}
        if missing := [camera for camera, key in keys.items() if key not in batch]:
            have = ", ".join(found.values()) or "none"
            raise ValueError(
                f"there are no images for the camera {missing[0]!r}; there are: {have}; say which by --policy.cameras"
            )
        return keys


def pixels(image: Tensor) -> np.ndarray:
    """uint8 [height, width, 3] of lerobot's [3, height, width] from 0 to 1."""
    return (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
