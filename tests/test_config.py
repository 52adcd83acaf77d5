"""The search config: what is accepted, what it means, and one sentence for every mistake."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evomerge.config import Config, load_config, parse_config
from evomerge.errors import UserError
from evomerge.schema import parse_yaml
from evomerge.space_config import Groups, ParameterSpec, Smooth

EXAMPLE = """\
version: 1
name: quickstart
models:
  base: ./zoo/base
  experts: {arithmetic: ./zoo/arithmetic, text: ./zoo/text, ordering: ./zoo/ordering}   # or a list
space:
  type: coefficients
  method: ties                        # see `evomerge methods`
  parameters:                         # a literal is fixed; {range, initial, log, integer} or {choices} is searched
    weight: {range: [-0.2, 1.2], initial: 0.4, per: expert, depth: {smooth: 2}, roles: all}
    density: {range: [0.1, 1.0], initial: 0.6, per: shared, depth: global}
    lambda: 1.0
optimizer: {type: cma, sigma: 0.2}    # genotypes live in [0, 1] of `range`, sigma too; population: auto
budget: {candidates: 300}             # a ceiling; and / or item_evaluations, hours
suite:
  include: [./zoo/tasks]
  tasks:
    - {task: zoo_add, metric: exact_match, weight: 1.0}
splits: {search: search, validation: validation, test: test}
workers: {type: ray, count: auto, cpus: 1, gpus: auto, address: null}
seed: 0
"""

JARGON = re.compile(
    r"[Ii]nput should|value_error|valid (dictionary|tuple|string|integer|number|boolean)|instance of|validation error|"
    r"ParameterSpec|ModelRef|TaskSpec|Smooth\b|function-|literal\[|NoneType|Traceback|pydantic|None|True\b|False\b"
)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str = EXAMPLE) -> Path:
        path = tmp_path / "search.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert not JARGON.search(message), message
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def with_changes(*overrides: str) -> Config:
    return parse_config(parse_yaml(EXAMPLE, None), Path("/nowhere/search.yaml"), overrides)


def test_the_example_means_what_it_says(write: Any, tmp_path: Path) -> None:
    config = load_config(write())
    assert config.name == "quickstart"
    assert list(config.models.experts) == ["arithmetic", "text", "ordering"]
    assert config.models.base.path == str(tmp_path / "zoo" / "base")
    (weight,) = config.space.parameters["weight"]
    assert (weight.range, weight.initial, weight.per) == ((-0.2, 1.2), 0.4, "expert")
    assert weight.depth == Smooth(smooth=2)
    (lambda_,) = config.space.parameters["lambda"]
    assert lambda_.value == 1.0
    assert not lambda_.searched
    assert config.budget.candidates == 300
    assert config.budget.hours is None
    assert config.suite.include == (str(tmp_path / "zoo" / "tasks"),)
    assert config.workers.address is None
    assert not config.uses_hub


def test_the_quickstart_config_is_accepted() -> None:
    path = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    config = load_config(path)
    assert config.name == "quickstart"
    assert config.models.base.path == str(path.parent.parent / "zoo" / "base")


def test_a_short_config_gets_documented_defaults(write: Any) -> None:
    path = write(
        "version: 1\n"
        "models: {base: ./b, experts: [./x, {path: ./y, revision: null}]}\n"
        "space: {method: linear, parameters: {weight: {range: [0, 1]}}}\n"
        "budget: {hours: 1}\n"
        "suite: {tasks: [arc_easy]}\n"
    )
    config = load_config(path)
    assert list(config.models.experts) == ["x", "y"]
    assert (config.name, config.seed, config.optimizer.type, config.optimizer.sigma) == (
        "search",
        0,
        "cma",
        0.2,
    )
    assert config.suite.tasks[0].task == "arc_easy"
    assert config.suite.tasks[0].weight == 1.0
    assert (config.splits.search, config.splits.validation, config.splits.test) == (
        "search",
        "validation",
        "test",
    )
    assert (config.workers.type, config.workers.count) == ("ray", "auto")


def test_paths_are_relative_to_the_config_and_bare_names_may_be_hub_ids(write: Any, tmp_path: Path) -> None:
    (tmp_path / "beside").mkdir()
    (tmp_path / "elsewhere").mkdir()
    text = EXAMPLE.replace("./zoo/base", "beside").replace("./zoo/text", "../abs/../text")
    text = text.replace("./zoo/arithmetic", "org/model").replace("./zoo/ordering", "~/models/ordering")
    config = load_config(write(text))
    assert config.models.base.path == str(tmp_path / "beside")
    assert config.models.experts["text"].path == str(tmp_path.parent / "text")
    assert config.models.experts["arithmetic"].path == "org/model"
    assert config.models.experts["ordering"].path == str(Path.home() / "models" / "ordering")
    assert config.uses_hub


def test_an_adapter_from_the_hub_uses_the_hub_too(write: Any) -> None:
    text = EXAMPLE.replace("base: ./zoo/base", "base: {path: ./zoo/base, adapter: org/lora}")
    config = load_config(write(text))
    assert config.models.base.adapter == "org/lora"
    assert config.uses_hub


def test_an_unknown_home_folder_is_a_mistake_of_the_user(write: Any) -> None:
    message = refusal(write(EXAMPLE.replace("./zoo/base", "~nobody-of-that-name/base")))
    assert "~nobody-of-that-name/base: there is no such home folder" in message


AWKWARD = """\
    weight:
      - {range: [-0.30000000000000004, 1.2345678901234567], initial: 0.1, per: text, depth: {groups: 3}, roles: [mlp]}
      - {range: [1e-3, 1e2], log: true, per: expert, depth: layers, tensors: "*.weight"}
"""


@pytest.mark.parametrize("awkward", [False, True])
def test_a_normalised_config_reads_back_as_itself(write: Any, tmp_path: Path, awkward: bool) -> None:
    text = EXAMPLE
    if awkward:
        weight = next(line for line in EXAMPLE.splitlines(keepends=True) if "weight: {range" in line)
        text = EXAMPLE.replace(weight, AWKWARD)
        text = text.replace("base: ./zoo/base", "base: {path: org/base, revision: '1234e56'}")
        text = text.replace(
            "splits: {search: search, validation: validation, test: test}", "splits: {from: test}"
        )
        text = text.replace(
            "weight: 1.0}",
            "weight: 0.1, gen_kwargs: {until: ['1e5', null, no], max_gen_toks: 3}, num_fewshot: 2}",
        )
    config = load_config(write(text))
    elsewhere = tmp_path / "run"
    elsewhere.mkdir()
    resolved = elsewhere / "config.resolved.yaml"
    resolved.write_text(config.to_yaml())
    assert load_config(resolved) == config
    assert load_config(resolved).to_yaml() == config.to_yaml()


W, P = "space.parameters.weight", "space.parameters"
POSITIVE = "is not accepted: give a number greater than 0"
DEPTHS = "is not accepted: give global, layers, {groups: n} with n >= 1, or {smooth: b} with b >= 2"
MISTAKES = [
    # unknown keys
    ("modles={a: 1}", "unknown key 'modles' (did you mean 'models'?)"),
    ("budget={candidtes: 3}", "budget: unknown key 'candidtes' (did you mean 'candidates'?)"),
    (f"{W}={{rnge: [0, 1]}}", f"{W}: unknown key 'rnge' (did you mean 'range'?)"),
    (f"{W}=[{{range: [0, 1]}}, {{rnge: [0, 1]}}]", f"{W}.1: unknown key 'rnge' (did you mean 'range'?)"),
    ("suite.tasks.0={task: a, wieght: 1}", "suite.tasks.0: unknown key 'wieght' (did you mean 'weight'?)"),
    ("models.base={path: x, adpter: y}", "models.base: unknown key 'adpter' (did you mean 'adapter'?)"),
    # the method and its parameters
    ("space.method=tise", "space.method: unknown merge method 'tise' (did you mean 'ties'?); known: "),
    (f"{P}.wieght=0.3", f"{P}: ties has no parameter 'wieght' (did you mean 'weight'?)"),
    (f"{P}.density={{range: [0.1, 1.5]}}", f"{P}.density.range: 1.5 lies outside [0, 1]"),
    (f"{P}.density=-0.1", f"{P}.density: -0.1 lies outside [0, 1]"),
    (f"{P}.weight=high", f"{P}.weight: 'high' is not a finite number"),
    (f"{P}.lambda=.inf", f"{P}.lambda: inf is not accepted: give a finite number"),
    (
        f"{P}.lambda={{range: [0, 1], per: expert}}",
        f"{P}.lambda.per: 'expert' is not accepted: ties has one lambda for",
    ),
    (
        f"{W}.per=aritmetic",
        f"{W}.per: 'aritmetic' is neither expert, shared nor an expert's name (did you mean 'arit",
    ),
    (
        f"{P}={{weight: 1.0}}",
        f"{P}: nothing is searched; give at least one parameter a range, or use 'evomerge merge'",
    ),
    (f"{P}.weight=[]", f"{W}: is empty; write a plain value or {{range: [low, high]}}"),
    (
        f"{P}.weight=",
        f"{W}: nothing is given; write a plain value, {{range: [low, high]}} or {{choices: [...]}}",
    ),
    (
        f"{P}={{weight: {{choices: [0.1, 0.2]}}}}",
        f"{W}: choices need optimizer.type catcma, tpe or random; cma",
    ),
    (
        f"{P}={{weight: {{choices: [0.1]}}}}",
        f"{W}.choices: [0.1] is not accepted: give two or more different values",
    ),
    (
        f"{P}={{weight: {{choices: [0, 1], range: [0, 1]}}}}",
        f"{W}: range and choices exclude each other; give one of",
    ),
    (
        f"{P}={{weight: {{choices: [0, 1], initial: 0.3}}}}",
        f"{W}.initial: 0.3 is not one of the choices [0, 1]",
    ),
    (
        "space={method: slerp, parameters: {t: {range: [0, 1]}}}",
        "space.method: slerp takes exactly 2 inputs, here are 3;",
    ),
    ("space={method: linear, parameters: {}}", "space.parameters: linear needs 'weight'"),
    ("space.base=false", "space.base: false is not accepted: ties cannot do without one; leave it out"),
    ("space.dialect=mergkit", "space.dialect: 'mergkit' is not accepted: give paper or mergekit"),
    # ranges
    (f"{W}.range=[1.2, -0.2]", f"{W}.range: [1.2, -0.2] is empty; the first number must be the smaller one"),
    (f"{W}.range=[1, 1]", f"{W}.range: [1, 1] is empty"),
    (f"{W}.range=[1]", f"{W}.range: [1] is not accepted: give two numbers, [low, high]"),
    (f"{W}.range=0.5", f"{W}.range: 0.5 is not accepted: give two numbers, [low, high]"),
    (f"{W}.range=[low, 1]", f"{W}.range.0: 'low' is not accepted: give a number"),
    (f"{W}.range=[0, .inf]", f"{W}.range.1: inf is not accepted: give a finite number"),
    (f"{W}.initial=2", f"{W}.initial: 2 lies outside the range [-0.2, 1.2]"),
    (f"{W}.initial=true", f"{W}.initial: true lies outside the range [-0.2, 1.2]"),
    (f"{W}.log=true", f"{W}.range: [-0.2, 1.2] is not accepted: with log it must start above 0"),
    (f"{P}.lambda={{value: 1, log: true}}", f"{P}.lambda.log: needs a range"),
    (f"{P}.lambda={{value: 1, initial: 1}}", f"{P}.lambda.initial: a fixed value has none; leave it out"),
    # depth and roles
    (f"{W}.depth={{smooth: 1}}", f"{W}.depth.smooth: 1 is not accepted: give a number of at least 2"),
    (f"{W}.depth={{groups: 0}}", f"{W}.depth.groups: 0 {POSITIVE}"),
    (f"{W}.depth={{smoth: 2}}", f"{W}.depth: {{smoth: 2}} {DEPTHS}"),
    (f"{W}.depth={{smooth: 2, groups: 2}}", f"{W}.depth: {{smooth: 2, groups: 2}} {DEPTHS}"),
    (f"{W}.depth=layer", f"{W}.depth: 'layer' {DEPTHS}"),
    (f"{W}.depth=3", f"{W}.depth: 3 {DEPTHS}"),
    (
        f"{W}.roles=[attn]",
        f"{W}.roles: unknown role 'attn' (did you mean 'attention'?); roles: attention, mlp, ",
    ),
    (f"{W}.roles=attention", f"{W}.roles: 'attention' is not accepted: give all, or a list of roles"),
    # budget and optimizer
    ("budget.candidates=0", f"budget.candidates: 0 {POSITIVE}"),
    ("budget.candidates=-3", f"budget.candidates: -3 {POSITIVE}"),
    ("budget.candidates=many", "budget.candidates: 'many' is not accepted: give a whole number"),
    ("budget.candidates=2.5", "budget.candidates: 2.5 is not accepted: give a whole number"),
    ("budget.candidates=true", "budget.candidates: true is not accepted: give a whole number"),
    ("budget={}", "budget: is empty; give at least one of candidates, item_evaluations, hours"),
    ("budget={hours: 0}", f"budget.hours: 0 {POSITIVE}"),
    ("budget=300", "budget: 300 is not accepted: give a mapping of keys to values"),
    ("budget=", "budget: is empty; give a mapping of keys to values"),
    (
        "optimizer.type=cmaes",
        "optimizer.type: 'cmaes' is not accepted: give cma, catcma, edits, tpe or random",
    ),
    ("optimizer.sigma=0", f"optimizer.sigma: 0 {POSITIVE}"),
    ("optimizer.sigma=2", "optimizer.sigma: 2 is not accepted: give a number of at most 1"),
    (
        "optimizer.population=0",
        "optimizer.population: 0 is not accepted: give auto or a number greater than 0",
    ),
    (
        "optimizer.population=many",
        "optimizer.population: 'many' is not accepted: give auto or a whole number",
    ),
    # models
    ("models={experts: [./x]}", "models.base: this key is required"),
    ("models.experts={}", "models.experts: is empty; give at least 1 entry"),
    (
        "models.experts=[./a/x, ./b/x]",
        "models.experts: two experts are called 'x'; write a mapping of names to models",
    ),
    (
        "models.experts=[../..]",
        "models.experts: '../..' gives the expert no name; write a mapping of names to models",
    ),
    ("models.experts=[3]", "models.experts: 3 gives the expert no name"),
    ("models.experts={3: ./x}", "models.experts.3: this name is not text; put it in quotes"),
    (
        "models.experts={x: 3}",
        "models.experts.x: 3 is not accepted: give a folder, a hub id or {path: ..., revision: ...",
    ),
    ("models.experts={x: ''}", "models.experts.x: '' is not accepted: give some text"),
    *(
        (
            f"models.experts={{{name}: ./x}}",
            f"models.experts: '{name}' is a reserved name; call the expert something",
        )
        for name in ("base", "initial", "uniform", "merge", "expert", "shared", "mean", "winner")
    ),
    (
        "models.experts={x: {path: ./x, trust_remote_code: true}}",
        "models.experts.x.trust_remote_code: true is not accepted: models are built by transformers' own code",
    ),
    # suite and splits
    ("suite.tasks=[]", "suite.tasks: is empty; give at least 1 entry"),
    ("suite={include: []}", "suite.tasks: this key is required"),
    ("suite.tasks=zoo_add", "suite.tasks: 'zoo_add' is not accepted: give a list"),
    (
        "suite.tasks=[zoo_add, {task: zoo_add, weight: 2}]",
        "suite.tasks: two tasks are called 'zoo_add:auto'; give one of them another metric or name",
    ),
    ("suite.tasks=[3]", "suite.tasks.0: 3 is not accepted: give a task's name or {task: ..., metric: ...}"),
    ("suite.tasks=[{metric: acc}]", "suite.tasks.0.task: this key is required"),
    ("suite.tasks.0.weight=0", f"suite.tasks.0.weight: 0 {POSITIVE}"),
    ("suite.tasks.0.weight=-1", f"suite.tasks.0.weight: -1 {POSITIVE}"),
    (
        "suite.items_per_candidate=0",
        "suite.items_per_candidate: 0 is not accepted: give auto or a number greater than",
    ),
    (
        "suite.fewshot_as_multiturn=maybe",
        "suite.fewshot_as_multiturn: 'maybe' is not accepted: give true or false",
    ),
    (
        "splits={search: a, validation: a, test: b}",
        "splits: ['a', 'a', 'b'] is not accepted: search, validation and t",
    ),
    (
        "splits={search: a}",
        "splits: 'validation' is missing; name three data splits, or give 'from' to cut one",
    ),
    (
        "splits={from: test, search: a}",
        "splits: 'from' takes the place of search, validation and test; give one or",
    ),
    (
        "splits.fractions={search: 0.2, validation: 0.2, test: 0.6}",
        "splits.fractions: they cut the data split that '",
    ),
    (
        "splits={from: test, fractions: {search: 0.5}}",
        "splits.fractions: search 0.5, validation 0.2 and test 0.2 add up to 0.9, not to 1",
    ),
    (
        "splits={from: t, fractions: {search: 1.5}}",
        "splits.fractions.search: 1.5 is not accepted: give a number less tha",
    ),
    # the rest
    ("workers.type=rai", "workers.type: 'rai' is not accepted: give ray or local"),
    ("workers.count=0", "workers.count: 0 is not accepted: give auto or a number greater than 0"),
    ("workers.gpus=-1", "workers.gpus: -1 is not accepted: give auto or a number of at least 0"),
    ("output.dtype=bf16", "output.dtype: 'bf16' is not accepted: give float32, bfloat16 or float16"),
    ("engine.device=gpu", "engine.device: 'gpu' is not accepted: give auto, cpu or cuda"),
    ("seed=-1", "seed: -1 is not accepted: give a number of at least 0"),
    ("name=my run", "name: 'my run' is not accepted: it names the run's folder; use letters, digits, "),
    ("name=../x", "name: '../x' is not accepted"),
    ("version=2", "version: 2 is not known; this evomerge reads version 1"),
    ("version=one", "version: 'one' is not known; this evomerge reads version 1"),
]


@pytest.mark.parametrize(("override", "expected"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_is_told_in_one_sentence(write: Any, override: str, expected: str) -> None:
    assert refusal(write(), [override]).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            EXAMPLE.replace("version: 1\n", ""),
            "version: this key is required; write 'version: 1' as the first line",
        ),
        (EXAMPLE + "seed: 1\n", "line 22: not valid YAML: the key 'seed' is written twice"),
        (EXAMPLE.replace("]", "", 1), "line "),
        ("", "this config is empty"),
        ("- version: 1\n", "a config is a mapping of keys to values, this is a list"),
        (EXAMPLE.replace("seed: 0", "sed: 0"), "unknown key 'sed' (did you mean 'seed'?)"),
    ],
)
def test_a_broken_file_is_told_in_one_sentence(write: Any, text: str, expected: str) -> None:
    assert refusal(write(text)).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("budget.candidates", "write it as key=value, e.g. --set budget.candidates=100"),
        ("=3", "write it as key=value, e.g. --set budget.candidates=100"),
        ("seed.x=3", "'seed' is the plain value 0, it has no key 'x'"),
        (
            "suite.tasks.5.weight=1",
            "'suite.tasks' is a list of 1; '5' is not the number of an entry (0 to 0)",
        ),
        ("suite.tasks.x=1", "'suite.tasks' is a list of 1; 'x' is not the number of an entry (0 to 0)"),
        ("seed=[", "line 1: not valid YAML: "),
    ],
)
def test_a_bad_override_is_named_by_itself(write: Any, override: str, expected: str) -> None:
    assert refusal(write(), [override]).startswith(f"--set {override}: {expected}")


def test_overrides_reach_every_place() -> None:
    config = with_changes(
        "budget.candidates=64",
        "optimizer.sigma=1e-3",
        "suite.tasks.0.weight=2e0",
        "space.parameters.weight.depth={groups: 4}",
        "space.parameters.lambda=0.5",
        "engine.device=cpu",
        "name=other",
    )
    assert config.budget.candidates == 64
    assert config.optimizer.sigma == 0.001
    assert config.suite.tasks[0].weight == 2.0
    assert config.space.parameters["weight"][0].depth == Groups(groups=4)
    assert config.space.parameters["lambda"][0].value == 0.5
    assert config.engine.device == "cpu"
    assert config.name == "other"


def test_an_override_fills_an_empty_key_and_knows_names_with_dots() -> None:
    data = parse_yaml(EXAMPLE.replace("arithmetic:", "math-2.5:"), None)
    data["budget"] = None
    config = parse_config(data, Path("/x/c.yaml"), ["budget.hours=2", "models.experts.math-2.5=/m/new"])
    assert config.budget.hours == 2
    assert config.models.experts["math-2.5"].path == "/m/new"
    assert data["budget"] is None


def test_an_override_changes_one_user_of_a_yaml_anchor_only(write: Any) -> None:
    text = EXAMPLE.replace("weight: {range: [-0.2, 1.2]", "weight: &same {range: [0, 1]", 1)
    text = re.sub(r"density: \{.*\}", "density: *same", text)
    config = load_config(write(text), ["space.parameters.weight.range=[0.3, 0.9]"])
    assert config.space.parameters["weight"][0].range == (0.3, 0.9)
    assert config.space.parameters["density"][0].range == (0.0, 1.0)


def test_later_overrides_win() -> None:
    assert with_changes("seed=1", "seed=2").seed == 2


def test_a_config_cannot_be_changed() -> None:
    config = with_changes()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_a_literal_is_fixed_and_everything_else_is_searched() -> None:
    specs = [ParameterSpec.model_validate(data) for data in (1, {"range": [0, 1]}, {"choices": [1, 2]})]
    assert [spec.searched for spec in specs] == [False, True, True]
    assert isinstance(specs[0].value, float)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_configs_that_come_along_are_valid(path: Path) -> None:
    assert load_config(path).suite.tasks
