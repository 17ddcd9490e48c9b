"""From YAML to a recipe: files merged, overridden from the command line, checked to the last key before anything runs.

`include:` (a list; later files win; relative to the including file) -> the file -> `key.sub=value`. What a recipe may
say is `schema.py`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from xmodal_opd.consistency import check, hint
from xmodal_opd.schema import Part, Recipe, kind_of

ROOTS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")  # installed wheel, checkout


class Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, as YAML 1.2 does."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

# keys that hold {piece: options}
PIECES = ("divergence", "surrogate", "reduction", "scale", "schedule", "name", "depth")

# when a run goes on; not eval.samples: what was measured before is compared with what is measured after
MAY_CHANGE = ("train.steps", "train.threads", "eval.every", "eval.during", "eval.batch", "checkpoint.")
MAY_CHANGE += ("engine.device", "engine.micro_tokens", "engine.zero", "engine.offload", "engine.config", "run_dir")
SERVING = ("servers", "sync_folder", "transfer", "timeout", "retries", "concurrency", "wait")
MAY_CHANGE += tuple(f"rollout.{key}" for key in SERVING)
MAY_CHANGE += ("teachers.",)  # where they are


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` (or of that name in the package), with `key.sub=value` overrides.

    Raises ValueError in one sentence: what is wrong, where, and what exists.
    """
    tree = read(find(path))
    for override in overrides:
        tree = merge(tree, parse(override))
    kind = kind_of(tree)
    try:
        recipe = kind.model_validate(prune(tree))
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(explain(e, kind) for e in error.errors())) from None
    check(path, recipe)
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


def explain(error: Mapping[str, Any], kind: type[Recipe]) -> str:
    """One pydantic error as a sentence."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = fields_at(error["loc"][:-1], kind)
        return f"unknown key {where!r}{hint(str(error['loc'][-1]), known)}; keys here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{where!r} is missing"
    if error["type"] in ("model_type", "model_attributes_type"):
        known = ", ".join(fields_at(error["loc"], kind))
        return f"{where!r} is {error['input']!r}, not a mapping of keys to values; keys here: {known}"
    return f"{where!r} is {error['input']!r}: {error['msg']}"


def fields_at(where: Sequence[str | int], kind: type[Recipe]) -> list[str]:
    """Names of the keys a part of the recipe takes."""
    part: Any = kind
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


def recorded(name: str) -> str | None:
    """The folder in the package with the config of a published model of that name, if there is one; a folder of one's
    own goes first."""
    if Path(name).is_dir():
        return None
    folders = (root / "models" / name.rpartition("/")[2] for root in ROOTS)
    return next((str(folder) for folder in folders if (folder / "config.json").is_file()), None)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def refuse_another_recipe(path: Path, recipe: Recipe) -> None:
    """A run goes on as what it was; how long, on what machine, and how often it is looked at may change. Keys that are
    younger than the run had their default in it."""
    tree = yaml.safe_load(path.read_text())
    try:
        before = kind_of(tree).model_validate(tree)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(f"{path} is not a recipe that this version reads (at {where}); begin a new run") from None
    then, now = (flat(yaml.safe_load(dump(one))) for one in (before, recipe))
    other = [k for k in sorted({*then, *now}) if then.get(k) != now.get(k) and not k.startswith(MAY_CHANGE)]
    if other:
        told = ", ".join(f"{key}: {then.get(key)!r} there, {now.get(key)!r} now" for key in other[:4])
        raise ValueError(f"{path.parent} is a run of another recipe ({told}); go on with its own {path}")


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    deep = [flat(v, f"{above}{k}.") if isinstance(v, dict) else {f"{above}{k}": v} for k, v in tree.items()]
    return {key: value for part in deep for key, value in part.items()}
