"""The recipe: YAML files, merged, overridden from the command line, and checked to the last key before anything runs.

`include:` (a list; later files win; relative to the including file) -> the file -> `key.sub=value`. The pieces of the
objective (divergences, weights, …) are named here and looked up when the recipe is built.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROOTS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")  # installed wheel, checkout
OWN = ("current", "initial", "ema")  # teachers that are the student's own weights
Spec = str | dict[str, dict[str, Any] | None]  # "reverse_kl" or {"jsd": {"beta": 0.5}}


class Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, as YAML 1.2 does."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

PIECES = ("divergence", "surrogate", "reduction", "scale", "schedule", "name")  # keys that hold {piece: options}

# when a run goes on; not eval.samples: what was measured before is compared with what is measured after
MAY_CHANGE = ("train.steps", "train.threads", "eval.every", "eval.during", "eval.batch", "checkpoint.")
MAY_CHANGE += ("engine.device", "engine.micro_tokens", "engine.zero", "engine.offload", "engine.config", "run_dir")
SERVING = ("servers", "sync_folder", "transfer", "timeout", "retries", "concurrency", "wait")
MAY_CHANGE += tuple(f"rollout.{key}" for key in SERVING)
MAY_CHANGE += ("teachers.",)  # where they are


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(Part):
    """Low-rank adapters on linear layers; what they adapt rests."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)  # what the adapter adds is scaled by alpha / rank
    targets: Literal["all-linear"] | list[str] = "all-linear"  # or ends of layer names, such as [q_proj, v_proj]
    parts: list[str] = Field(default=["all"], min_length=1)  # where: roles or pieces of names, as in model.train


class Model(Part):
    name: str = "default"  # a folder, a hub name, or the small model in the package
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # roles, or pieces of names, of what moves; null: everything, or with lora nothing but the adapter
    train: list[str] | None = Field(default=None, min_length=1)
    lora: Lora | None = None
    max_prompt_tokens: int | None = None  # default: what the model reads, less the longest answer
    trust_remote_code: bool = False


class Prepare(Part):
    """Shards of built-in spoken questions, made on the first run and kept."""

    train: int = 4000
    test: int = 300
    families: list[str] = ["arithmetic", "ordering", "choice"]
    accents: list[str] = ["en-us"]
    seed: int = 0
    noise_snr: float | list[float] | None = None  # dB, or lowest and highest
    reverb: float | list[float] | None = None  # seconds
    speed: float | list[float] | None = None


class Data(Part):
    train: str
    test: str
    prepare: Prepare | None = None
    seed: int | None = None  # of the samples' order; default: train.seed


class Sampling(Part):
    n: int = Field(default=1, ge=1)
    temperature: float = Field(1.0, ge=0)  # 0 is greedy
    view: str = "student"


class Rollout(Part):
    name: Literal["hf", "vllm"] = "hf"
    max_tokens: int = Field(default=200, ge=1)
    batch_tokens: int = Field(default=16384, ge=1)  # hf: prompt and answer tokens decoded together, padding included
    servers: list[str] = []  # vllm: addresses such as http://127.0.0.1:8000
    sync_folder: str | None = None  # vllm: where weights go, which all servers see; default: the run folder
    transfer: Literal["folder", "nccl"] = "folder"  # vllm: servers read the weights there, or are sent them, GPU to GPU
    timeout: float = Field(default=300.0, gt=0)  # vllm: seconds of one attempt
    retries: int = Field(default=3, ge=0)  # vllm: more attempts, on whichever server is free
    concurrency: int = Field(default=64, ge=1)  # vllm: questions one server holds at a time
    wait: float = Field(default=600.0, gt=0)  # vllm: seconds to wait while no server answers
    ahead: Literal[0, 1] = 0  # vllm: 1 samples the next step's answers while this one trains; each is one update old
    samplings: dict[str, Sampling]


class Served(Part):
    """A teacher behind vLLM servers, which terms and scorers then call by its name here."""

    servers: list[str] = Field(min_length=1)  # addresses such as http://127.0.0.1:8000, all of them the same model
    model: str | None = None  # as the servers call it; default: the one they serve
    timeout: float = Field(default=300.0, gt=0)  # seconds of one attempt
    retries: int = Field(default=3, ge=0)  # more attempts, on whichever server is free
    concurrency: int = Field(default=64, ge=1)  # answers one server reads at a time
    wait: float = Field(default=600.0, gt=0)  # seconds to wait while no server answers


class Source(Part):
    """A teacher: a model under a view. "current", "initial" and "ema" are the student's own weights."""

    model: str = "current"
    view: str = "teacher"


class Teacher(Source):
    stop_gradient: bool = True  # false: the student's weights also move so that its teacher view comes nearer


class Term(Part):
    """One loss term: a distillation term has a divergence (and a teacher), a policy term a surrogate."""

    sampling: str  # the one whose rollouts it reads
    view: str = "student"
    teacher: Teacher = Teacher()
    divergence: Spec | None = None
    weights: list[Spec] = []
    advantages: list[Spec] = []
    surrogate: Spec | None = None
    reduction: Spec = "sequence"
    scale: float | Spec = 1.0


class Judge(Part):
    name: Spec = "match"
    reference: Sampling | None = None  # when set, the model's own answer under this sampling is what it compares with


class Scorer(Source):
    divergence: bool = False  # also KL(student || this), over the whole vocabulary


class Optim(Part):
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: Spec = "constant"


class Engine(Part):
    name: Literal["plain", "deepspeed"] = "plain"  # plain: one process; deepspeed: any number of ranks
    zero: Literal[0, 1, 2, 3] | None = None  # of deepspeed; default: what `config` says, or 2
    offload: list[Literal["optimizer", "parameters"]] = []  # what deepspeed keeps in main memory
    config: str | None = None  # a DeepSpeed JSON file of your own
    activation_checkpointing: bool = False  # layers run twice, and remember little; prompts are then repeated
    device: str = "auto"  # "cpu", "cuda", or whichever there is
    autocast: bool = False  # bfloat16 products on float32 weights
    micro_tokens: int = Field(
        default=16384, ge=1
    )  # prompt and answer tokens in one forward with gradient, padding included
    share_prefix: bool = True
    ema_rate: float = 0.01


class Train(Part):
    steps: int = Field(default=100, ge=1)
    prompts: int = Field(default=32, ge=1)  # questions a step
    seed: int = 0
    threads: int | None = None  # CPU threads; default: all cores


class Eval(Part):
    every: int = Field(default=0, ge=0)  # steps between evaluations on `during` questions; 0: only before and after
    during: int = Field(default=100, ge=1)
    samples: int | None = Field(default=None, ge=1)  # questions before and after; default: all
    batch: int = Field(default=24, ge=1)
    kl: bool = True


class Checkpoint(Part):
    every: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=1)


class Recipe(Part):
    name: str
    modality: Literal["text", "audio", "vision"] = "audio"  # of the student's view: what the model must be able to read
    model: Model = Model()
    data: Data
    rollout: Rollout
    teachers: dict[str, Served] = {}
    scoring: dict[str, Scorer] = {}
    judge: Judge | None = None
    objective: dict[str, Term]
    optim: Optim = Optim()
    engine: Engine = Engine()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    run_dir: str | None = None  # default: runs/NAME-DATE


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` (or of that name in the package), with `key.sub=value` overrides.

    Raises ValueError in one sentence: what is wrong, where, and what exists.
    """
    tree = read(find(path))
    for override in overrides:
        tree = merge(tree, parse(override))
    try:
        recipe = Recipe.model_validate(prune(tree))
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(explain(e) for e in error.errors())) from None
    check_references(path, recipe)
    return recipe


def find(path: str) -> Path:
    for folder in (Path("."), *ROOTS, *(root.parent for root in ROOTS)):
        for name in (path, f"{path}.yaml"):
            if (folder / name).is_file():
                return folder / name
    have = sorted({p.stem for root in ROOTS for p in root.glob("*.yaml")})
    raise ValueError(f"no recipe {path!r}{hint(Path(path).stem, have)}; recipes in the package: {', '.join(have)}")


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file with what it includes."""
    if path.resolve() in seen:
        raise ValueError(f"{path} includes itself through {' -> '.join(p.name for p in seen)}")
    try:
        tree = yaml.load(path.read_text(), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}, not a mapping of keys to values")
    merged: dict[str, Any] = {}
    includes = tree.pop("include", None) or []
    for include in [includes] if isinstance(includes, str) else includes:
        other = path.parent / include
        if not other.is_file():
            raise ValueError(f"{path} includes {include!r}, but there is no file {other}")
        merged = merge(merged, read(other, (*seen, path.resolve())))
    return merge(merged, tree)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings; anything else is replaced, and so is a piece by another piece."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        both = both and not (key in PIECES and list(value) != list(out[key]))
        out[key] = merge(out[key], value) if both else value
    return out


def parse(override: str) -> dict[str, Any]:
    """`a.b=1e-4` -> {"a": {"b": 1e-4}}; the value is YAML."""
    keys, equals, text = override.partition("=")
    if not equals or not keys:
        raise ValueError(f"cannot read {override!r} as an override; write key.sub=value, such as train.steps=20")
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {keys}={text} is not YAML: {' '.join(str(error).split())}") from None
    for key in reversed(keys.split(".")):
        value = {key: value}
    return value


def prune(tree: dict[str, Any]) -> dict[str, Any]:
    """`objective.judge: null` takes an included term (sampling, scorer) out again."""
    tree = dict(tree)
    for key in ("objective", "scoring", "teachers"):
        if isinstance(tree.get(key), dict):
            tree[key] = {name: value for name, value in tree[key].items() if value is not None}
    rollout = tree.get("rollout")
    if isinstance(rollout, dict) and isinstance(rollout.get("samplings"), dict):
        kept = {name: value for name, value in rollout["samplings"].items() if value is not None}
        tree["rollout"] = {**rollout, "samplings": kept}
    return tree


def explain(error: Mapping[str, Any]) -> str:
    """One pydantic error as a sentence."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = fields_at(error["loc"][:-1])
        return f"unknown key {where!r}{hint(str(error['loc'][-1]), known)}; keys here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{where!r} is missing"
    return f"{where!r} is {error['input']!r}: {error['msg']}"


def fields_at(where: Sequence[str | int]) -> list[str]:
    """Names of the keys a part of the recipe takes."""
    part: Any = Recipe
    for key in where:
        annotation = part.model_fields[key].annotation if _is_part(part) and key in part.model_fields else None
        part = _inner(annotation) or part
    return sorted(part.model_fields)


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Part)


def _inner(annotation: Any) -> Any:
    """The Part inside `Part`, `Part | None` or `dict[str, Part]`."""
    if _is_part(annotation):
        return annotation
    return next((a for a in getattr(annotation, "__args__", ()) if _is_part(a)), None)


def check_references(path: str, recipe: Recipe) -> None:
    """Names that point inside the recipe must exist."""
    samplings = recipe.rollout.samplings
    for name, term in recipe.objective.items():
        if term.sampling not in samplings:
            have = ", ".join(samplings) or "none"
            raise ValueError(
                f"{path}: objective.{name}.sampling names {term.sampling!r}{hint(term.sampling, samplings)}; "
                f"rollout.samplings has: {have}"
            )
        if not term.teacher.stop_gradient and term.teacher.model != "current":
            raise ValueError(
                f"{path}: objective.{name}.teacher.stop_gradient=false needs a teacher that moves: model current, "
                f"not {term.teacher.model!r}"
            )
    if (recipe.rollout.name == "vllm") != bool(recipe.rollout.servers):
        raise ValueError(
            f"{path}: rollout.servers is {recipe.rollout.servers} and rollout.name is {recipe.rollout.name!r}; vllm "
            "needs the addresses of its servers, such as [http://127.0.0.1:8000], and hf has none"
        )
    if recipe.rollout.ahead and recipe.rollout.name == "hf":
        raise ValueError(
            f"{path}: rollout.ahead is 1 and rollout.name is 'hf', which samples with the weights and the device that "
            "train: there is nothing to overlap; use rollout.name=vllm, or rollout.ahead=0"
        )
    if not recipe.objective:
        raise ValueError(f"{path}: the objective has no term, so there is nothing to train for")
    check_teachers(path, recipe)
    judged = [n for n, t in recipe.objective.items() if any(piece_name(a) == "reward" for a in t.advantages)]
    if recipe.judge and recipe.judge.reference and recipe.judge.reference.n != 1:
        raise ValueError(f"{path}: judge.reference.n is {recipe.judge.reference.n}; the judge compares with one answer")
    if judged and recipe.judge is None:
        raise ValueError(f"{path}: objective.{judged[0]} uses the advantage 'reward', but the recipe has no judge")


def check_teachers(path: str, recipe: Recipe) -> None:
    """Served teachers have names of their own, and where there are some a bare name must be one of them or a folder."""
    if taken := [name for name in recipe.teachers if name in OWN or "/" in name]:
        raise ValueError(f"{path}: teachers.{taken[0]} is the name of a model already; give the served teacher another")
    asked = {f"objective.{n}.teacher.model": t.teacher.model for n, t in recipe.objective.items() if t.divergence}
    asked |= {f"scoring.{name}.model": scorer.model for name, scorer in recipe.scoring.items()}
    for where, name in asked.items():
        if recipe.teachers and name not in (*OWN, *recipe.teachers) and "/" not in name and not Path(name).is_dir():
            have = ", ".join(recipe.teachers)
            raise ValueError(f"{path}: {where} names {name!r}{hint(name, recipe.teachers)}; teachers has: {have}")
    for name, scorer in recipe.scoring.items():
        if scorer.divergence and scorer.model in recipe.teachers:
            raise ValueError(
                f"{path}: scoring.{name}.divergence needs the whole vocabulary of {scorer.model!r}, and a served "
                "teacher tells its likeliest tokens only; set it to false, or name a folder or hub name as the teacher"
            )


def views(recipe: Recipe) -> set[str]:
    """The views every sample must have: those the recipe names, and the two that are evaluated."""
    asked = [*recipe.rollout.samplings.values(), recipe.judge.reference if recipe.judge else None]
    parts = (*recipe.objective.values(), *sources(recipe), *asked)
    return {"student", "teacher", *(part.view for part in parts if part is not None)}


def teachers(recipe: Recipe) -> set[str]:
    """Names of the models whose numbers terms and scorers use, the student's own ("current", …) among them."""
    return {source.model for source in sources(recipe)}


def sources(recipe: Recipe) -> list[Source]:
    return [*(t.teacher for t in recipe.objective.values() if t.divergence), *recipe.scoring.values()]


def recorded(name: str) -> str | None:
    """The folder in the package with the config of a published model of that name, if there is one; a folder of one's
    own goes first."""
    if Path(name).is_dir():
        return None
    folders = (root / "models" / name.rpartition("/")[2] for root in ROOTS)
    return next((str(folder) for folder in folders if (folder / "config.json").is_file()), None)


def piece_name(spec: Spec) -> str:
    return spec if isinstance(spec, str) else next(iter(spec), "")


def hint(word: str, words: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def refuse_another_recipe(path: Path, recipe: Recipe) -> None:
    """A run goes on as what it was; how long, on what machine, and how often it is looked at may change."""
    then, now = (flat(yaml.safe_load(text)) for text in (path.read_text(), dump(recipe)))
    other = [k for k in sorted({*then, *now}) if then.get(k) != now.get(k) and not k.startswith(MAY_CHANGE)]
    if other:
        told = ", ".join(f"{key}: {then.get(key)!r} there, {now.get(key)!r} now" for key in other[:4])
        raise ValueError(f"{path.parent} is a run of another recipe ({told}); go on with its own {path}")


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    deep = [flat(v, f"{above}{k}.") if isinstance(v, dict) else {f"{above}{k}": v} for k, v in tree.items()]
    return {key: value for part in deep for key, value in part.items()}
