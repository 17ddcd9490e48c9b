"""Sampling with vLLM servers over HTTP: token ids in, token ids out, and weights that follow the student's.

A request is one question under one sampling: `n` answers, the media sent and encoded once. It carries the ids of our
own template, one placeholder for each medium; the server lays the media out, and the ids it then has must be ours. Its
reply says for every token which weights it came from: what other weights said is asked again, so no answer is stale,
whoever restarted a server or wrote to it. Needs vLLM 0.32 started with --enable-scale-out and VLLM_SERVER_DEV_MODE=1.
"""

import asyncio
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from xmodal_opd import dist
from xmodal_opd.models import is_tied, load_config
from xmodal_opd.rollout import nccl
from xmodal_opd.serving import PROBE, Failure, Server, Servers, Session, gather
from xmodal_opd.types import Adapter, Pair, Rollout, Sampling

BANNED = -100.0  # the lowest logit bias a server takes; it reports log-probs from before
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # not the model's generation_config
DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 in its environment, which opens the paths that change weights"


@dataclass
class VLLMSampler:
    """`export` writes the student's weights into a new folder inside `folder`, which servers read, or are sent."""

    servers: Servers
    adapter: Adapter
    eos: Sequence[int]
    banned: Sequence[int]
    max_tokens: int
    export: Callable[[Path], None]
    folder: Path
    exact: ClassVar[bool] = False  # its log-probs come from other kernels than the training model's
    run: str = field(
        default_factory=lambda: uuid.uuid4().hex[:12]
    )  # two runs never take each other's weights for theirs
    count: int = 0
    over_nccl: bool = False  # weights go from GPU to GPU; else every server reads the folder
    links: dict[str, nccl.Link] = field(default_factory=dict)  # by address, of servers that were not restarted since
    proven: set[str] = field(default_factory=set)  # views whose prompts the servers lay out as we do

    def __post_init__(self) -> None:
        self.servers.ready = self.ready

    @property
    def version(self) -> str:
        return f"{self.run}-{self.count}"

    # ---- weights

    def sync(self) -> None:
        """Bring the student's weights, as they are now, to every server that answers; the others get them before they
        answer again. Every rank calls this, rank 0 does it. Raises ValueError for a server that cannot serve this run.
        """
        self.count += 1
        for server in self.servers.all:
            server.set_aside("it has older weights")
        aside = self.folder / f"{self.version}.writing"
        self.export(aside)
        if dist.rank() == 0:
            aside.rename(self.folder / self.version)
            asyncio.run(self.settle())
            self.clear(but=self.version)
        dist.gather(None)

    def clear(self, but: str = "") -> None:
        """Remove the weights this run wrote, all but one version's."""
        for old in self.folder.glob(f"{self.run}-*"):
            if old.name != but:
                shutil.rmtree(old, ignore_errors=True)

    async def settle(self) -> None:
        async with self.servers.session() as session:
            await session.settle()

    async def ready(self, session: Session, server: Server) -> None:
        """Whatever became of this server, from here on it answers with the current weights."""
        try:
            held = (await session.get(server, "/weight_info", timeout=PROBE)).json()["weight_version"]
        except Failure as failure:
            if failure.again:
                raise
            raise ValueError(f"{server.url} tells no version of its weights ({failure}); {DEV_MODE}") from None
        if not held.startswith(self.run):
            await self.inspect(session, server)
            self.links.pop(server.url, None)
        if held != self.version:
            await self.load(session, server)
        await session.call(server, "/resume")

    async def load(self, session: Session, server: Server) -> None:
        """Stop what it is saying, read the folder, forget what it computed before, and only then take the new name."""
        folder = (self.folder / self.version).resolve()
        await session.call(server, "/pause?mode=abort")
        try:
            await (self.send if self.over_nccl else self.read)(session, server, folder)
        except Failure as failure:
            raise Failure(f"it did not take the weights in {folder}: {failure} {failure.detail}", again=True) from None
        reset = await session.call(server, "/reset_prefix_cache")
        if not reset["success"]:
            raise Failure("it did not forget the prompts it knew under the old weights", again=True)
        await session.call(server, "/update_weight_version", {"new_version": self.version})

    async def read(self, session: Session, server: Server, folder: Path) -> None:
        """The server reads the folder."""
        kwargs = {"weights_path": str(folder)}
        await session.call(server, "/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})

    async def send(self, session: Session, server: Server, folder: Path) -> None:
        """Rank 0 reads the folder and sends what is in it to the server's GPUs."""
        if dist.rank() != 0:
            raise Failure("rank 0 brings it the weights, after this step", again=True)
        if server.url not in self.links:
            self.links[server.url] = await nccl.join(session, server, workers(await described(session, server)))
        await nccl.send(session, server, folder, self.links[server.url])

    async def inspect(self, session: Session, server: Server) -> None:
        """Raises ValueError when its log-probs would not be those of the policy at temperature 1, or, where it can be
        seen, when its head would not follow the weights."""
        info = await described(session, server)
        mode, folder = info["model_config"]["logprobs_mode"], info["model_config"]["model"]
        if mode != "raw_logprobs":
            raise ValueError(f"{server.url} reports {mode}; start it with --logprobs-mode raw_logprobs")
        if "cpu" in str(info["device_config"]) and seen_tied(folder):
            raise ValueError(
                f"{server.url} serves {folder}, whose head is tied to its embeddings: vLLM on CPU would keep the old "
                "head when weights change; start it by tools/serve_vllm.py, which gives the head weights of its own"
            )
        if self.over_nccl and (info.get("weight_transfer_config") or {}).get("backend") != "nccl":
            raise ValueError(f"""{server.url} takes no weights over NCCL; start it with --weight-transfer-config \
'{{"backend": "nccl"}}', or set rollout.transfer to folder""")

    # ---- answers

    def generate(self, pairs: Sequence[Pair], samplings: Mapping[str, Sampling], seed: int) -> dict[str, list[Rollout]]:
        """Rollouts per sampling, in the order of `pairs`, n to a pair; pair i's answers form group i. After a `sync`.

        Raises serving.Failure when a question stays without answers.
        """
        return asyncio.run(self.ask_all(pairs, samplings, seed))

    async def ask_all(
        self, pairs: Sequence[Pair], samplings: Mapping[str, Sampling], seed: int
    ) -> dict[str, list[Rollout]]:
        gate = asyncio.Semaphore(self.servers.concurrency * len(self.servers.all))  # media wait undecoded behind it

        async def one(session: Session, name: str, i: int) -> list[Rollout]:
            async with gate:
                number = blake2b(f"{seed} {name} {i}".encode(), digest_size=6).digest()
                return await self.ask(session, pairs[i], samplings[name], int.from_bytes(number), i)

        async with self.servers.session() as session:
            places = [(name, i) for name in samplings for i in range(len(pairs))]
            found = await gather(one(session, name, i) for name, i in places)
        self.proven |= {s.view for s in samplings.values()}
        out: dict[str, list[Rollout]] = {name: [] for name in samplings}
        for (name, _), rollouts in zip(places, found, strict=True):
            out[name] += rollouts
        return out

    async def ask(self, session: Session, pair: Pair, sampling: Sampling, seed: int, group: int) -> list[Rollout]:
        """The n answers to one question."""
        view = pair.views[sampling.view]
        ids, media = self.adapter.served(view)
        greedy = sampling.temperature == 0
        body = {
            "token_ids": ids,
            "content_parts": media or None,
            "sampling_params": self.parameters(1 if greedy else sampling.n, sampling.temperature, seed),
            "return_token_ids": True,
        }
        reply = await session.post("/inference/v1/generate", body, self.check)
        prompt = reply["prompt_token_ids"]
        if sampling.view not in self.proven:
            refuse_another_prompt(prompt, self.adapter.batch([view])["input_ids"][0].tolist(), pair.key)
        choices = reply["choices"] * (sampling.n if greedy else 1)
        return [self.rollout(pair, choice, group, len(prompt)) for choice in choices]

    def parameters(self, n: int, temperature: float, seed: int) -> dict[str, Any]:
        return NEUTRAL | {
            "n": n,
            "temperature": temperature,
            "seed": seed,
            "max_tokens": self.max_tokens,
            "logprobs": 0,  # of the sampled token alone
            "ignore_eos": True,  # an answer ends where ours do, and nowhere else
            "stop_token_ids": list(self.eos),
            "logit_bias": {str(token): BANNED for token in self.banned},
            "detokenize": False,
        }

    def check(self, reply: Mapping[str, Any]) -> None:
        """Raises Failure unless every token of every answer is whole and of the current weights."""
        for choice in reply["choices"]:
            if choice["finish_reason"] not in ("stop", "length"):
                raise Failure(f"an answer ended by {choice['finish_reason']}", again=True)
            spans = {span["version"] for span in choice["weight_versions"] or []}
            if spans != {self.version}:
                held = ", ".join(sorted(spans)) or "weights without a version"
                raise Failure(f"it answered with {held}, not with {self.version}", again=True)

    def rollout(self, pair: Pair, choice: Mapping[str, Any], group: int, prompt: int) -> Rollout:
        tokens = choice["token_ids"]
        logps = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        return Rollout(pair, tokens, logps, self.adapter.decode(tokens), tokens[-1] in self.eos, group, prompt)


def seen_tied(model: str) -> bool:
    """Whether a folder or hub name has a tied head; False where its config is out of reach."""
    try:
        return is_tied(load_config(model))
    except ValueError:
        return False


async def described(session: Session, server: Server) -> dict[str, Any]:
    """The server's own configuration."""
    return (await session.get(server, "/server_info?config_format=json")).json()["vllm_config"]


def workers(info: Mapping[str, Any]) -> int:
    """GPUs that one server's model is spread over."""
    return info["parallel_config"]["world_size"] * info["parallel_config"]["data_parallel_size"]


def refuse_another_prompt(theirs: Sequence[int], ours: Sequence[int], key: str) -> None:
    """Raises ValueError unless the server's prompt is the one that will be trained on, token for token."""
    if list(theirs) != list(ours):
        place = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        raise ValueError(
            f"the server lays out the prompt of sample {key!r} otherwise than the model's processor here: "
            f"{len(theirs)} tokens there, {len(ours)} here, different from token {place} on; "
            "serve the very folder that is trained, with its tokenizer and processor"
        )
