"""House rules as tests: imports go down only, heavy libraries have one home, public functions say what they do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [  # a module imports only from lines above its own
    {"types", "serving", "schema", "lmms", "wire"},
    {"dist", "hidden", "consistency"},
    {"objective", "background", "data", "tokens", "config", "metrics", "history", "statistics", "provenance", "duals"}
    | {"models", "engine"},
    {"lora", "encoders", "report", "figures"},
    {"checkpoint", "rollout", "scoring"},
    {"evaluate", "selftest"},
    {"benchmark", "episodes"},
    {"build"},
    {"teachers"},
    {"collect", "dry"},
    {"step", "measure"},
    {"train"},
    {"inspect"},
    {"cli"},
]
HOMES = {
    "webdataset": {"xmodal_opd/data.py"},
    "pydantic": {"xmodal_opd/config.py", "xmodal_opd/schema.py"},
    "yaml": {"xmodal_opd/config.py", "modalities/action/robotwin_runtime.py"},
    "espeakng_loader": {"modalities/audio/speech.py"},
    "PIL": {f"modalities/vision/{name}.py" for name in ("media", "draw", "video")},
    "av": {"modalities/vision/video.py"},
    "httpx": {"xmodal_opd/serving.py"},
    "anyio": {"xmodal_opd/serving.py"},
    "peft": {"xmodal_opd/lora.py"},
    "matplotlib": {"xmodal_opd/figures.py", "modalities/vision/draw.py"},
    "sklearn": {"modalities/vision/draw.py"},
    "deepspeed": {"xmodal_opd/engine/deepspeed.py"},
    "pyarrow": {"modalities/rows.py"},
    "lerobot": {"modalities/action/lerobot.py"},
}
SOURCES = sorted([*(ROOT / "xmodal_opd").rglob("*.py"), *(ROOT / "modalities").rglob("*.py")])


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def part(path: Path) -> str:
    return path.relative_to(ROOT / "xmodal_opd").parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    inside = path.is_relative_to(ROOT / "xmodal_opd")
    for name in imports(path):
        words = name.split(".")
        if not inside:
            assert words[0] != "xmodal_opd" or words[1:2] in ([], ["types"], ["wire"]), (
                f"{path}: an adapter knows only the types"
            )
        elif words[0] == "xmodal_opd" and len(words) > 1 and path.name != "cli.py" and part(path) != "__init__":
            other = words[1]
            if other != part(path) and any(other in names for names in LAYERS):
                assert layer(other) < layer(part(path)), f"{part(path)} may not import {other}"
        elif words[0] == "modalities":
            assert part(path) == "build", f"{path}: only build/ names concrete adapters"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_have_one_home(path):
    for name in imports(path):
        home = HOMES.get(name.split(".")[0])
        assert home is None or str(path.relative_to(ROOT)) in home, f"{name} belongs in {home}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path):
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(path.read_text()))


def test_about_half_the_functions_are_ten_lines_or_fewer_and_none_is_long():
    sizes = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    short = sum(size <= 10 for size in sizes.values())
    assert short >= len(sizes) / 2, f"{short} of {len(sizes)} functions have ten lines or fewer"
    assert not {name: size for name, size in sizes.items() if size > 60}
    assert len((ROOT / "xmodal_opd" / "train.py").read_text().splitlines()) <= 210


def test_help_comes_without_heavy_imports():
    code = (
        "import sys, xmodal_opd.cli as c; c.parser(); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_method_table_of_the_readme_names_every_recipe():
    readme = (ROOT / "README.md").read_text()
    missing = [p.stem for p in (ROOT / "configs" / "methods").glob("*.yaml") if f"methods/{p.stem}.yaml" not in readme]
    assert not missing


def test_the_tables_of_pieces_in_the_readme_of_recipes_are_complete():
    from xmodal_opd.objective.advantages import ADVANTAGES
    from xmodal_opd.objective.divergences import DIVERGENCES, SAMPLED
    from xmodal_opd.objective.surrogates import SURROGATES
    from xmodal_opd.objective.weights import WEIGHTS

    text = (ROOT / "configs" / "README.md").read_text()
    pieces = [*DIVERGENCES, *SAMPLED, *WEIGHTS, *ADVANTAGES, *SURROGATES]
    assert not [name for name in pieces if f"`{name}`" not in text]
