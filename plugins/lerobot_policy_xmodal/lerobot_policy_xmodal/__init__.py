"""Policies of xmodal-opd in lerobot: `--policy.type=xmodal --policy.recipe=RECIPE --policy.checkpoint=FOLDER`."""

from lerobot_policy_xmodal.configuration_xmodal import XmodalConfig

__all__ = ["XmodalConfig"]
