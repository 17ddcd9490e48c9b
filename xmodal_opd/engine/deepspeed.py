"""Any number of ranks over DeepSpeed: ZeRO 0 to 3, offload, bfloat16 with float32 masters.

The loss of a step is the sum over ranks, where DeepSpeed takes the mean; a step has as many backward passes as it
needs, so the boundary is ours (`managed_gradient_accumulation`). Written against deepspeed 0.19.8; what is private
there and used here: `parameter_offload` (hooks, persistent parameters) and the optimisers' lazy link to their state.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    set_z3_leaf_module,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from xmodal_opd import dist

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# on a CPU, ranks would compile a way through shared memory for minutes, and wait there for ever for one that was killed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"  # the float32 weight
FILE = "optimizer-{:05d}-of-{:05d}.safetensors"


class Root(nn.Module):
    """What DeepSpeed takes for the model: one forward is one micro-batch, whatever of the student it runs."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student
        self.work: Callable[[], Any] = lambda: None

    def forward(self) -> Any:
        return self.work()


class DeepSpeedEngine:
    """The Engine of several ranks.

    Under ZeRO-3 ranks must gather parameters in one order. So the output projection, which is read outside of any
    forward, and all that lies beside the language model, whose layers run once a clip or image, stay whole on every
    rank; their gradients and optimiser state are divided.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: dict[str, Any],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
        schedule: Callable[[int], float],
        autocast: bool = False,
    ):
        self.model, self.clip, self.lr, self.schedule, self.autocast = model, clip, lr, schedule, autocast
        self.stage = config["zero_optimization"]["stage"]
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=lr, betas=betas, weight_decay=weight_decay)
        self.norm, self.inside = 0.0, False
        if self.stage == 0:
            self.optimizer.register_step_pre_hook(lambda *_: self.clip_or_drop())
        self.root = Root(model)
        self.engine: Any = deepspeed.initialize(
            model=self.root,
            model_parameters=list(self.named.values()),  # pyright: ignore[reportArgumentType]
            optimizer=self.optimizer,
            config=config,
            dist_init_required=False,
        )[0]
        if self.stage == 3:
            for part in beside_the_language_model(model):  # after DeepSpeed's own hooks on gradients, which stay
                set_z3_leaf_module(part, True)
            take_out_hooks(self.engine.optimizer.parameter_offload)
            self.engine.optimizer.parameter_offload.setup_zero_stage3_hooks()
            self.keep_whole()

    def run[T](self, forward: Callable[[], T]) -> T:
        self.root.work = forward
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.autocast):
            return self.engine()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * dist.world())

    def step(self, step: int) -> dict[str, float]:
        """Clip and update at the schedule's rate. A gradient that is not finite is dropped: `skipped` is then 1."""
        rate = self.lr * self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm()) if self.stage else self.norm
        if self.stage == 3:
            self.keep_whole()
        return {"grad_norm": norm, "learning_rate": rate, "skipped": float(not math.isfinite(norm))}

    def clip_or_drop(self) -> None:
        """Stage 0, before the optimiser: without gradients it leaves everything as it is."""
        self.norm = float(nn.utils.clip_grad_norm_(self.named.values(), self.clip))
        if not math.isfinite(self.norm):
            self.optimizer.zero_grad(set_to_none=True)

    # ---- where the parameters are

    @contextmanager
    def whole(self, write: bool = False) -> Iterator[None]:
        if self.stage < 3 or self.inside:
            yield
            return
        offload = self.engine.optimizer.parameter_offload
        offload.partition_all_parameters()
        take_out_hooks(offload)
        self.inside = True
        try:
            with deepspeed.zero.GatheredParameters(list(self.model.parameters()), modifier_rank=0 if write else None):
                yield
        finally:
            self.inside = False
            offload.setup_zero_stage3_hooks()
            self.keep_whole()

    def keep_whole(self) -> None:
        """Gather the parameters that no submodule gives back: see the class. DeepSpeed's own small ones are of them."""
        model, persistent = self.model, self.engine.optimizer.persistent_parameters
        beside = [p for part in beside_the_language_model(model) for p in part.parameters()]
        head: Any = model.get_output_embeddings()
        for p in [head.weight, *beside]:
            if not p.ds_persist:
                p.ds_persist = True
                persistent.append(p)
        for p in persistent:
            p.is_external_param = True  # without it, how long they stay depends on what the rank ran before
        absent = [p for p in persistent if p.ds_status != ZeroParamStatus.AVAILABLE]
        if absent:
            absent[0].all_gather(absent)

    # ---- the optimiser's state, by parameter: the same at every stage and number of ranks

    def save(self, folder: Path) -> None:
        """Float32 weights and moments of every parameter; each rank writes its share of them into one file."""
        mine: dict[str, Tensor] = {}
        for number, (name, p) in enumerate(self.named.items()):
            for key in (MASTER, *MOMENTS):
                value = self.read(p, key)  # every rank takes part
                if number % dist.world() == dist.rank():
                    mine[f"{name} {key}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        steps = [int(self.optimizer.state[p]["step"]) for p in self.flats() if self.optimizer.state.get(p)]
        save_file(mine, folder / FILE.format(dist.rank() + 1, dist.world()), {"step": str(max(steps, default=0))})

    def load(self, folder: Path) -> None:
        files = sorted(folder.glob("optimizer-*.safetensors"))
        saved = [safe_open(file, "pt") for file in files]
        where = {key: file for file in saved for key in file.keys()}  # noqa: SIM118 - not a mapping
        lacking = [name for name in self.named if f"{name} {MASTER}" not in where]
        if lacking:
            raise ValueError(
                f"{folder} has no optimiser state of {lacking[0]} for engine.name=deepspeed; go on with the engine "
                "and the recipe it was written by"
            )
        self.make_state(float(saved[0].metadata()["step"]))
        for name, p in self.named.items():
            for key in (MASTER, *MOMENTS):
                self.write(p, key, where[f"{name} {key}"].get_tensor(f"{name} {key}").to(self.engine.device))

    def flats(self) -> list[Tensor]:
        """What the optimiser takes for parameters: this rank's stretches of all of them, in float32."""
        if self.stage == 3:
            return self.engine.optimizer.fp32_partitioned_groups_flat
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def make_state(self, step: float) -> None:
        """The optimiser's state as it is after its first step, to be filled."""
        for flat in self.flats():
            self.optimizer.state[flat] = {"step": torch.tensor(step)} | {k: torch.zeros_like(flat) for k in MOMENTS}
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def read(self, p: nn.Parameter, key: str) -> Any:
        if self.stage == 0:
            return p if key == MASTER else self.optimizer.state[p][key]
        return safe_get_full_fp32_param(p) if key == MASTER else safe_get_full_optimizer_state(p, key)

    def write(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage == 0:
            self.read(p, key).data.copy_(value)
        elif key == MASTER:
            safe_set_full_fp32_param(p, value)
        else:
            safe_set_full_optimizer_state(p, value, key)


def take_out_hooks(offload: Any) -> None:
    offload._remove_module_hooks()
    offload.forward_hooks.clear()
    offload.backward_hooks.clear()


def beside_the_language_model(model: PreTrainedModel) -> list[nn.Module]:
    """Encoders and projectors: the modules on the way down to the one that embeds tokens which do not hold it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    decoder = next(m for m in model.modules() if any(child is embedding for child in m.children()))
    holders = [m for m in model.modules() if m is not decoder and any(part is decoder for part in m.modules())]
    beside = [child for m in holders for child in m.children() if not any(part is decoder for part in child.modules())]
    return [m for m in beside if m is not head and any(True for _ in m.parameters())]
