"""What a recipe may say: every part and key, with its type and default, and the names inside it that others ask for.

Reading one from YAML is `config.py`, and what must fit together in it `consistency.py`. The pieces of the objective
(divergences, weights, …) are named here and looked up when the recipe is built.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STUDENT = "current"
OWN = (STUDENT, "initial", "ema")  # teachers that are the student's own weights
# pieces that read the judge's reward
REWARDED = {"reward", "stcr", "dads", "margin_shift", "margin_mask", "balance", "teacher_confidence"}
Spec = str | dict[str, dict[str, Any] | None]  # "reverse_kl" or {"jsd": {"beta": 0.5}}


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
    min_pixels: int | None = Field(default=None, ge=1)  # of an image as the model sees it, scaled; default: its own
    max_pixels: int | None = Field(default=None, ge=1)
    fps: float = Field(default=2.0, gt=0)  # frames a second that are seen of a video
    max_frames: int = Field(default=8, ge=1)  # and no more than these, evenly spaced
    trust_remote_code: bool = False


class Prepare(Part):
    """Shards of built-in questions, made on the first run and kept."""

    train: int = 4000
    test: int = 300
    seed: int = 0


class Spoken(Prepare):
    """Of modality audio (and text). An effect is a value, or lowest and highest."""

    families: list[str] = ["arithmetic", "ordering", "choice"]
    accents: list[str] = ["en-us"]
    noise_snr: float | list[float] | None = None  # dB
    reverb: float | list[float] | None = None  # seconds
    speed: float | list[float] | None = None


class Scenes(Prepare):
    """Of modality vision. Wear is a value, or lowest and highest; where none is given it is slight."""

    families: list[str] = ["rendered", "charts", "geometry", "digits"]
    rotation: float | list[float] | None = None  # degrees, to either side
    blur: float | list[float] | None = None  # standard deviation, in pixels
    texture: float | list[float] | None = None  # of grain, in grey levels of 255
    jpeg: float | list[float] | None = None  # quality, 1 to 95


class Data(Part):
    train: str
    test: str
    prepare: Spoken | None = None
    seed: int | None = None  # of the samples' order; default: train.seed


class SeenData(Data):
    prepare: Scenes | None = None


class Starts(Part):
    """Of modality action: where episodes begin. Start states are numbered, those to learn from and those to be measured
    on apart."""

    tasks: list[str] = Field(min_length=1)
    train: int = Field(default=400, ge=1)  # start states of each task
    test: int = Field(default=10, ge=1)
    first: int = Field(default=10_000, ge=1)  # number of the first to learn from; those of the test begin at 0
    demonstrations: str | None = None  # shards of decisions to learn from, where nothing is played but the test
    seed: int | None = None  # of their order; default: train.seed


class Robot(Part):
    """The world that a policy acts in, and what its actions are."""

    name: str = "metaworld"  # or toy, libero, or module:class of your own
    options: dict[str, Any] = {}  # of that environment, such as {horizon: 200}
    cameras: list[str] = Field(default=["corner2"], min_length=1)  # what the student sees, in this order
    image_size: int = Field(default=112, ge=1)  # pixels a side, to which a camera's picture is scaled
    crop: bool = False  # the middle nine tenths of the area, scaled back
    proprio: bool = False  # the numbers of the robot's state before the question, in the student's view
    size: int = Field(default=4, ge=1)  # numbers in an action
    chunk: int = Field(default=8, ge=1)  # actions in a decision
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    temperature: float = Field(default=1.0, gt=0)  # divides the logits of student and teachers, sampled and scored
    depth: Spec | None = None  # which decisions are the student's while it learns: f2b, b2f, opad; null: all
    statistics: str | None = None  # a model folder or JSON file that says what the actions of a dataset are in [-1, 1]
    key: str = ""  # which dataset's; where there is one only, it need not be named
    normalization: Literal["bounds", "quantiles", "gaussian"] = "quantiles"
    gripper: Literal["keep", "openvla"] = "keep"
    workers: int = Field(
        default=4, ge=1
    )  # processes with one environment each, in all: ranks share them, at least 1 each
    timeout: float = Field(default=120.0, gt=0)  # seconds without an answer until a worker is given up
    python: str | None = None  # of the workers, where the simulator lives in an environment of its own
    videos: int = Field(default=0, ge=0)  # episodes filmed, before and after


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
    ahead: Literal[0, 1] = 0  # vllm: 1 samples the next step's answers while this one trains; each is one step old
    samplings: dict[str, Sampling]


class Served(Part):
    """A teacher behind vLLM servers, which terms and scorers then call by its name here."""

    servers: list[str] = Field(min_length=1)  # addresses such as http://127.0.0.1:8000, all of them the same model
    model: str | None = None  # as the servers call it; default: the one they serve
    timeout: float = Field(default=300.0, gt=0)  # seconds of one attempt
    retries: int = Field(default=3, ge=0)  # more attempts, on whichever server is free
    concurrency: int = Field(default=64, ge=1)  # answers one server reads at a time
    wait: float = Field(default=600.0, gt=0)  # seconds to wait while no server answers


class Contrast(Part):
    """A teacher q₀ that another is tilted away from: log q = log_softmax((1 + alpha) log q − alpha log q₀)."""

    view: str = "blank"  # what the same model sees
    alpha: float = Field(default=1.0, ge=0)


class Target(Part):
    """Where a route leads; what is null is said beside the route."""

    model: str | None = None
    view: str | None = None


class Route(Part):
    """Every question has one of several teachers, by a field of its meta."""

    field: str
    to: dict[str, Target] = Field(min_length=1)  # value of the field -> teacher


class Source(Part):
    """A teacher: a model under a view. "current", "initial" and "ema" are the student's own weights."""

    model: str = "current"
    view: str = "teacher"
    route: Route | None = None
    contrast: Contrast | None = None

    @property
    def against(self) -> tuple[str, float] | None:
        """(view, alpha) of its contrast."""
        return None if self.contrast is None else (self.contrast.view, self.contrast.alpha)


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


class Dual(Part):
    """A weight for every kind of sample that moves with how far the teacher is ahead, for the piece `dual`."""

    sampling: str  # whose answers tell how far
    scorer: str = "teacher"
    field: str = "modality"  # of a sample's meta, which every sample has: its kind
    rate: float = Field(default=1.0, gt=0)
    warmup: int = Field(default=10, ge=1)  # steps with samples of a kind that give the distance it is allowed
    least: float = Field(default=0.02, ge=0)  # of that distance, in nats a token
    low: float = Field(default=0.1, ge=0)
    high: float = Field(default=2.0, gt=0)


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
    minibatches: int = Field(default=1, ge=1)  # updates a step, each on its share of the answers, which are then older
    seed: int = 0
    threads: int | None = None  # CPU threads; default: all cores


class Extractor(Part):
    """A model behind an OpenAI-compatible endpoint that finds the answers in responses to a benchmark."""

    model: str
    url: str = "http://127.0.0.1:8000/v1"
    api_key_env: str | None = None  # the environment variable with its key
    timeout: float = Field(default=60.0, gt=0)  # seconds of one attempt
    retries: int = Field(default=2, ge=0)
    concurrency: int = Field(default=8, ge=1)  # requests at a time
    max_tokens: int = Field(default=128, ge=1)


class Eval(Part):
    every: int = Field(default=0, ge=0)  # steps between evaluations on `during` questions; 0: only before and after
    during: int = Field(default=100, ge=1)
    samples: int | None = Field(default=None, ge=1)  # questions before and after; default: all
    batch: int = Field(default=24, ge=1)
    kl: bool = True
    extractor: Extractor | None = None  # of benchmarks whose published evaluation asks a model; default: quick rules


class Policy(Part):
    """A policy and the view it reads."""

    model: str = STUDENT
    view: str = "teacher"


class ActionEval(Eval):
    """Of modality action: episodes, the student's and a teacher's from the same start states."""

    teacher: Policy | None = None  # default: the first that the recipe names, or the student reading the state


class Checkpoint(Part):
    every: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=1)


class Recipe(Part):
    name: str
    # of the student's view: what the model must be able to read, and for action to do
    modality: Literal["text", "audio", "vision", "action"] = "audio"
    model: Model = Model()
    data: Data
    rollout: Rollout
    teachers: dict[str, Served] = {}
    scoring: dict[str, Scorer] = {}
    judge: Judge | None = None
    dual: Dual | None = None
    objective: dict[str, Term]
    optim: Optim = Optim()
    engine: Engine = Engine()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    run_dir: str | None = None  # default: runs/NAME-DATE


class SeenRecipe(Recipe):
    """A recipe of modality vision, which prepares scenes instead of speech."""

    modality: Literal["vision"] = "vision"
    data: SeenData


class ActionRecipe(Recipe):
    """A recipe of modality action: episodes in a simulator in place of questions in shards."""

    modality: Literal["action"] = "action"  # pyright: ignore[reportIncompatibleVariableOverride]
    data: Starts  # pyright: ignore[reportIncompatibleVariableOverride]
    robot: Robot = Robot()
    eval: ActionEval = ActionEval()


def kind_of(tree: Mapping[str, Any]) -> type[Recipe]:
    """What a tree of keys is to be read as: the modality decides what `data` may say."""
    return {"vision": SeenRecipe, "action": ActionRecipe}.get(str(tree.get("modality")), Recipe)


def learnt_from(recipe: Recipe) -> str:
    """The shards of training samples; of a robot's recipe those of demonstrations, "" where it has none."""
    return recipe.data.demonstrations or "" if isinstance(recipe, ActionRecipe) else recipe.data.train


def order_seed(recipe: Recipe) -> int:
    """What the order of training samples depends on."""
    return recipe.train.seed if recipe.data.seed is None else recipe.data.seed


def views(recipe: Recipe) -> set[str]:
    """The views that the recipe names, and the two that are evaluated."""
    routed = [source for source in sources(recipe) if source.route]
    return views_of_all(recipe) | {view for source in routed for _, view in teachers_of(source).values()}


def views_of_all(recipe: Recipe) -> set[str]:
    """The views that every question must have, whoever teaches it."""
    asked = [*recipe.rollout.samplings.values(), recipe.judge.reference if recipe.judge else None]
    alone, contrasts = [s for s in sources(recipe) if not s.route], [s.contrast for s in sources(recipe)]
    parts = (*recipe.objective.values(), *alone, *contrasts, *asked)
    return {"student", "teacher", *(part.view for part in parts if part is not None)}


def views_of_its_teachers(recipe: Recipe, meta: Mapping[str, Any]) -> set[str]:
    """The views that a question of that meta must have for the teachers it is routed to. Raises ValueError when it is
    routed to none."""
    return {teacher_of(source, meta)[1] for source in sources(recipe) if source.route}


def teachers(recipe: Recipe) -> set[str]:
    """Names of the models whose numbers terms and scorers use, the student's own ("current", …) among them."""
    compared = {instructor(recipe)[0]} if isinstance(recipe, ActionRecipe) else set()
    return compared | {model for source in sources(recipe) for model, _ in teachers_of(source).values()}


def sources(recipe: Recipe) -> list[Source]:
    return [*(t.teacher for t in recipe.objective.values() if t.divergence), *recipe.scoring.values()]


def teachers_of(source: Source) -> dict[str, tuple[str, str]]:
    """(model, view) by the value of the route's field; the only one, under "", where there is no route."""
    if source.route is None:
        return {"": (source.model, source.view)}
    return {value: (to.model or source.model, to.view or source.view) for value, to in source.route.to.items()}


def teacher_of(source: Source, meta: Mapping[str, Any]) -> tuple[str, str]:
    """(model, view) that teaches a question of that meta. Raises ValueError when its route leads nowhere."""
    there, field = teachers_of(source), source.route.field if source.route else None
    value = "" if field is None else str(meta.get(field))
    if value not in there:
        found = f"meta.{field} is {value!r}" if field in meta else f"meta has no field {field!r}"
        raise ValueError(f"no teacher: its {found}, and the recipe has routes to teachers for {', '.join(there)}")
    return there[value]


def kind_in(dual: Dual, meta: Mapping[str, Any]) -> str:
    """Of which kind a sample of that meta is. Raises ValueError when the meta does not say."""
    if dual.field not in meta:
        raise ValueError(f"no dual weight: its meta has no field {dual.field!r} (has: {', '.join(meta) or 'none'})")
    return str(meta[dual.field])


def instructor(recipe: Recipe) -> tuple[str, str]:
    """(model, view) that an evaluation of episodes holds against the student: `eval.teacher`, the first teacher the
    recipe names, or the student itself reading."""
    if isinstance(recipe, ActionRecipe) and recipe.eval.teacher:
        return recipe.eval.teacher.model, recipe.eval.teacher.view
    return next((there for source in sources(recipe) for there in teachers_of(source).values()), ("current", "teacher"))


def judged(recipe: Recipe) -> dict[str, str]:
    """The samplings whose answers the judge sees, each with one piece of the objective that asks for its reward. Where
    there is a judge, it also sees what a teacher's log-ratio grades, for the metrics `order/…`."""
    asking = REWARDED | ({"teacher_logratio"} if recipe.judge else set())
    return {
        term.sampling: name
        for term in recipe.objective.values()
        for name in map(piece_name, [*term.weights, *term.advantages])
        if name in asking
    }


def piece_name(spec: Spec) -> str:
    return spec if isinstance(spec, str) else next(iter(spec), "")
