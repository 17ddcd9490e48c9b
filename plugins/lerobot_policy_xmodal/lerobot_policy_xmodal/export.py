"""A policy that lerobot trained, as a model folder of ours: a teacher in recipes, or a student that goes on from there.

python -m lerobot_policy_xmodal.export outputs/train/mine/checkpoints/last/pretrained_model runs/mine/model
"""

import sys
from pathlib import Path

from lerobot_policy_xmodal.modeling_xmodal import XmodalPolicy
from xmodal_opd import checkpoint


def export(source: str, folder: str) -> None:
    """Raises ValueError where the new folder is there already, OSError and ValueError where the source is no policy."""
    if Path(folder).exists():
        raise ValueError(f"{folder} is there already; give another folder, or delete it")
    policy = XmodalPolicy.from_pretrained(source, strict=True)
    checkpoint.export(policy.model, policy.acting.processor, Path(folder))


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lerobot_policy_xmodal.export PRETRAINED_MODEL NEW_FOLDER")
    try:
        export(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"lerobot_policy_xmodal.export: {error}")
    print(sys.argv[2])


if __name__ == "__main__":
    main()
