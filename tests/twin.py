"""A stand-in for RoboTwin's runtime: its protocol is real, its physics are three lines. Two arms of one joint each; the
task is done when both stand at the target that the seed draws. Every third seed is one that its expert cannot solve."""

import numpy as np


class Task:
    def setup_demo(self, now_ep_num, seed, is_test, **args):
        assert is_test and args["eval_mode"]
        if seed % 3 == 0:
            raise RuntimeError("unstable")
        self.seed, self.open = seed, True
        self.target = np.random.default_rng(seed).uniform(0.5, 1.0)
        self.joints = np.zeros(4)
        self.take_action_cnt, self.step_lim, self.eval_success, self.plan_success = 0, 6, False, seed % 5 != 0
        self.instruction = None

    def play_once(self):
        for part in (0, 0, 0.5, 1):
            self.joints = np.array([self.target * part, 1, self.target * part, 1])
            self._take_picture()
        return {"info": {"{A}": f"block/{self.seed}"}}

    def check_success(self):
        return bool((abs(self.joints[[0, 2]] - self.target) < 0.01).all())

    def set_instruction(self, instruction):
        self.instruction = instruction

    def get_instruction(self):
        return self.instruction

    def get_obs(self):
        image = np.full((8, 8, 3), int(255 * self.target), np.uint8)
        joints = {"left_arm": self.joints[:1], "left_gripper": self.joints[1]}
        joints |= {"right_arm": self.joints[2:3], "right_gripper": self.joints[3], "vector": self.joints.copy()}
        cameras = {f"{name}_camera": {"rgb": image, "depth": None} for name in ("head", "left", "right")}
        return {"observation": cameras, "joint_action": joints}

    def take_action(self, action, action_type):
        assert action_type == "qpos" and self.open and self.take_action_cnt < self.step_lim
        self.joints = self.joints + np.clip(np.asarray(action) - self.joints, -0.3, 0.3)
        self.take_action_cnt += 1
        self.eval_success = self.eval_success or self.check_success()

    def _take_picture(self): ...

    def close_env(self, clear_cache=False):
        self.open = False


class Runtime:
    name, size, tasks = "twin", 4, ("lift",)

    def __init__(self, config, render="fast", cameras=("head_camera",)):
        self.facts = {"render": render, "actions": "joint targets", "differs": ["three lines of physics"]}
        self.cameras = cameras
        self.args = {"eval_mode": True, "task_config": config}

    def task(self, name):
        return Task()

    def setup(self, env, number, seed):
        env.setup_demo(now_ep_num=number, seed=seed, is_test=True, **self.args)

    def watch(self, env, see):
        env._take_picture = lambda: see(env.joints)

    def frame(self, env):
        return env.get_obs()["observation"]["head_camera"]["rgb"]

    def describe(self, task, info):
        return {"seen": [f"lift {info['{A}']}"], "unseen": [f"raise {info['{A}']}, way {i}" for i in range(100)]}
