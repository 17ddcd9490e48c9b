"""Recipes: merging, overrides, and what a typing mistake is told."""

from inspect import signature
from pathlib import Path

import pytest
import yaml

from xmodal_opd import config, schema
from xmodal_opd.build import build_term
from xmodal_opd.cli import main
from xmodal_opd.objective.weights import WEIGHTS

CORD = str(Path(__file__).parents[1] / "configs" / "cord_audio.yaml")


def load(*overrides):
    return config.load(CORD, overrides)


def test_later_wins_includes_then_file_then_command_line(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 1, prompts: 2}\nname: a\n")
    (tmp_path / "b.yaml").write_text("train: {steps: 3}\n")
    (tmp_path / "c.yaml").write_text("include: [a.yaml, b.yaml]\nname: c\n")
    assert config.read(tmp_path / "c.yaml") == {"train": {"steps": 3, "prompts": 2}, "name": "c"}
    recipe = load(
        "train.steps=7", "optim.lr=1e-4", "objective.sequences=null", "judge=null", "rollout.samplings.sequences=null"
    )
    assert (recipe.train.steps, recipe.optim.lr, list(recipe.objective)) == (7, 1e-4, ["tokens"])
    assert list(recipe.rollout.samplings) == ["tokens"]


def test_a_recipe_is_found_by_its_name_alone():
    assert config.load("cord_audio").name == "cord_audio"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.step=3",
            r"unknown key 'train.step' \(did you mean 'steps'\?\); keys here: minibatches, prompts, seed, ",
        ),
        ("objective.tokens.weigths=[]", r"unknown key 'objective.tokens.weigths' \(did you mean 'weights'\?\)"),
        ("objective.tokens.sampling=tokns", r"did you mean 'tokens'.*rollout.samplings has: tokens, sequences"),
        ("optim.lr=fast", "'optim.lr' is 'fast'"),
        ("judge=null", "uses 'reward', which reads the reward, but the recipe has no judge"),
        (
            "objective.tokens.weights=[gate]",
            "has the weight 'gate' on 'text_reward', what the judge says of the answers of 'text', and it sees those "
            "of: sequences; it sees a sampling that a term reads",
        ),
        (
            "objective.tokens.weights=[{gate: {score: tokens_reward}}]",
            "the answers of 'tokens', and it sees those of: sequences",
        ),
        (
            "objective.tokens.teacher.route={field: task, to: {choice: null}}",
            r"'objective.tokens.teacher.route.to.choice' is None, not a mapping of keys to values; keys here: model, v",
        ),
        ("rollout=hf", "'rollout' is 'hf', not a mapping of keys to values; keys here: ahead, batch_tokens, "),
        ("train.steps", "cannot read 'train.steps' as an override"),
        ("engine.name=deepsped", "'engine.name' is 'deepsped'"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(override, message):
    with pytest.raises(ValueError, match=message):
        load(override)


def test_a_gate_on_what_the_judge_sees_stands():
    load("objective.tokens.weights=[{gate: {score: sequences_reward}}]", "objective.tokens.scale=2.0")
    assert signature(WEIGHTS["gate"]).parameters["score"].default == "text_reward", "which consistency.py repeats"


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe 'cord_audo'.*did you mean 'cord_audio'"):
        config.load("cord_audo")
    for text, message in (("a: [", "is not YAML"), ("- a", "not a mapping"), ("include: [x.yaml]", "no file")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            config.load(str(tmp_path / "bad.yaml"))
    (tmp_path / "loop.yaml").write_text("include: [loop.yaml]")
    with pytest.raises(ValueError, match="includes itself"):
        config.load(str(tmp_path / "loop.yaml"))


def test_unknown_pieces_name_the_term_and_what_exists():
    term = load("objective.tokens.divergence=revers_kl").objective["tokens"]
    with pytest.raises(
        ValueError, match=r"objective.tokens: unknown divergence 'revers_kl'; did you mean 'reverse_kl'"
    ):
        build_term("tokens", term)


@pytest.mark.parametrize("ratio", [-1, -0.5, ".nan"])
def test_a_number_below_the_least_of_an_option_is_refused_before_anything_is_loaded(ratio):
    term = load(f"objective.sequences.weights=[{{balance: {{ratio: {ratio}}}}}]").objective["sequences"]
    with pytest.raises(ValueError, match="sequences: weight 'balance': option ratio is a number from 0 on; found"):
        build_term("sequences", term)
    for fits in (0, 1.5, ".inf"):
        build_term("x", load(f"objective.sequences.weights=[{{balance: {{ratio: {fits}}}}}]").objective["sequences"])


@pytest.mark.parametrize("arguments", [["train", "nowhere"], ["show", CORD, "x.y=1"], ["report", "nowhere"]])
def test_the_command_ends_with_a_sentence_and_a_code(arguments, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("xmodal-opd: ") and "\n" not in error and "Traceback" not in error


def test_show_prints_what_load_reads(capsys, tmp_path):
    assert main(["show", CORD, "train.steps=2"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert config.load(str(tmp_path / "shown.yaml")) == load("train.steps=2")


def test_a_piece_takes_the_place_of_another_with_its_options():
    recipe = load("judge.name={llm: {model: m}}", "optim.schedule={linear: {warmup: 3}}", "train.seed=4")
    assert recipe.judge.name == {"llm": {"model": "m"}} and recipe.optim.schedule == {"linear": {"warmup": 3}}
    assert load("optim.schedule={cosine: {warmup: 9}}").optim.schedule["cosine"] == {"warmup": 9, "final": 0.1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=[", r"the value of train.steps=\[ is not YAML"),
        ("run_dir=!!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
        ("checkpoint.every=0", "'checkpoint.every' is 0: .*greater than or equal to 1"),
        ("train.prompts=0", "'train.prompts' is 0"),
        ("eval.samples=0", "'eval.samples' is 0"),
        ("judge.reference.n=4", "judge.reference.n is 4; the judge compares with one answer"),
        ("objective.tokens.teacher={model: ema, stop_gradient: false}", "needs a teacher that moves"),
    ],
)
def test_values_that_cannot_be_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load(override)


def test_an_include_may_be_one_name_or_none(tmp_path):
    (tmp_path / "a.yaml").write_text("include: b.yaml\nname: a\n")
    (tmp_path / "b.yaml").write_text("include:\nname: b\ntrain: {steps: 3}\n")
    assert config.read(tmp_path / "a.yaml") == {"name": "a", "train": {"steps": 3}}


def test_every_key_of_a_recipe_is_on_the_page_about_recipes():
    page = (Path(CORD).parent / "README.md").read_text()

    def names(part):
        for name, field in part.model_fields.items():
            yield name
            if inner := config._inner(field.annotation):
                yield from names(inner)

    assert [name for name in names(schema.Recipe) if name not in page] == []


def test_a_run_older_than_a_key_goes_on_with_its_default_and_one_that_cannot_be_read_does_not(tmp_path):
    recipe, path = config.load("cord_audio"), tmp_path / "recipe.yaml"
    tree = yaml.safe_load(config.dump(recipe))
    del tree["model"]["max_frames"]
    path.write_text(yaml.safe_dump(tree))
    config.refuse_another_recipe(path, recipe)
    path.write_text(yaml.safe_dump(tree | {"gone": 1}))
    with pytest.raises(ValueError, match=r"is not a recipe that this version reads \(at gone\)"):
        config.refuse_another_recipe(path, recipe)
