"""For RoboTwin's own evaluation, which looks for this file in policy/NAME: it asks the server of serve_policy.py.

    ln -s …/tools policy/xmodal && python script/eval_policy.py --config policy/xmodal/deploy_policy.yml \\
        --overrides --task_name stack_blocks_two --policy_name xmodal --port 8002 --protocol tcp

Its three functions are those that script/eval_policy.py calls. It needs `modalities` and `xmodal_opd` of this project
on PYTHONPATH, and nothing but numpy (and, for `--protocol xpolicylab`, websockets and msgpack).
"""

from typing import Any

import numpy as np

from modalities.action.clients import Socket, Tcp

CAMERAS = {"head_camera": "cam_head", "left_camera": "cam_left_wrist", "right_camera": "cam_right_wrist"}


def get_model(usr_args: dict[str, Any]) -> Any:
    """A client; `host`, `port` and `protocol` (tcp or xpolicylab) are keys of deploy_policy.yml."""
    host, port = usr_args.get("host", "127.0.0.1"), int(usr_args["port"])
    if usr_args.get("protocol", "tcp") == "tcp":
        return Tcp(host, port, float(usr_args.get("timeout", 600)))
    return Socket(f"ws://{host}:{port}", float(usr_args.get("timeout", 600)))


def encode_obs(observation: dict[str, Any], instruction: str, model: Any) -> dict[str, Any]:
    """What of RoboTwin's observation travels, in the words of the protocol."""
    cameras = {name: of["rgb"] for name, of in observation["observation"].items() if name in CAMERAS and "rgb" in of}
    if isinstance(model, Tcp):
        images = {name: {"rgb": image} for name, image in cameras.items()}
        joints = {"vector": np.asarray(observation["joint_action"]["vector"], np.float32)}
        return {"observation": images, "joint_action": joints, "instruction": instruction}
    joints = observation["joint_action"]
    state = {
        f"{side}_{theirs}_joint_state": np.atleast_1d(np.asarray(joints[f"{side}_{ours}"], np.float32))
        for side in ("left", "right")
        for ours, theirs in (("arm", "arm"), ("gripper", "ee"))
    }
    vision = {CAMERAS[name]: {"color": image, "shape": image.shape[:2]} for name, image in cameras.items()}
    return {"data_format_version": "v1.0", "instruction": instruction, "vision": vision, "state": state}


def eval(TASK_ENV: Any, model: Any, observation: dict[str, Any]) -> None:
    """One decision: its chunk of joint targets is taken, as far as the task lets it."""
    model.call("update_obs", encode_obs(observation, TASK_ENV.get_instruction(), model))
    for action in np.atleast_2d(model.call("get_action")):
        if TASK_ENV.eval_success or TASK_ENV.take_action_cnt >= TASK_ENV.step_lim:
            break
        TASK_ENV.take_action(action, action_type="qpos")


def reset_model(model: Any) -> None:
    model.call("reset")
