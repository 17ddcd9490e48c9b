"""A policy that lerobot trained, as a model folder of ours: a teacher in recipes, or a student that goes on from there.

python -m lerobot_policy_xmodal.export outputs/train/mine/checkpoints/last/pretrained_model runs/mine/model
"""

import json
import sys
from pathlib import Path

from lerobot_policy_xmodal.configuration_xmodal import XmodalConfig
from lerobot_policy_xmodal.modeling_xmodal import XmodalPolicy
from xmodal_opd import checkpoint
from xmodal_opd.cli import quiet


def export(source: str, folder: str) -> None:
    """Raises ValueError where the new folder is there already, and where the source is no policy of ours."""
    if Path(folder).exists():
        raise ValueError(f"{folder} is there already; give another folder, or delete it")
    config = Path(source, "config.json")
    kind = json.loads(config.read_text()).get("type") if config.is_file() else "no config.json"
    if kind != XmodalConfig.get_choice_name(XmodalConfig):
        raise ValueError(f"{source} is no folder of a policy of type xmodal, as lerobot-train writes it: found {kind}")
    policy = XmodalPolicy.from_pretrained(source, strict=True)
    checkpoint.export(policy.model, policy.acting.processor, Path(folder))


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lerobot_policy_xmodal.export PRETRAINED_MODEL NEW_FOLDER")
    quiet()
    try:
        export(*sys.argv[1:])
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"lerobot_policy_xmodal.export: {error}")
    print(sys.argv[2])


if __name__ == "__main__":
    main()
