"""`evomerge init` writes configs that load at once and start at the merge they were made from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.cli import main
from evomerge.config import Config, load_config
from evomerge.mergekit import from_mergekit
from evomerge.merging import merge
from evomerge.recipe import Source
from evomerge.searching.setup import set_up
from evomerge.spaces import CoefficientSpace
from tests.evaluation.tiny import write_task
from tests.merging.helpers import digests, read
from tests.models import make_family
from tests.tasks import make_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    make_family(folder / "models", hidden=16, layers=3)
    make_tasks(folder / "tasks")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(own_cache: None) -> None:
    """Keep content hashes of test checkpoints apart."""


def models(folder: Path, *names: str) -> list[str]:
    return [str(folder / "models" / name) for name in names]


def document(folder: Path, text: str) -> dict[str, Any]:
    data = yaml.safe_load(text)
    for entry in data["models"]:
        entry["model"] = str(folder / "models" / entry["model"])
    if "base_model" in data:
        data["base_model"] = str(folder / "models" / data["base_model"])
    return {"dtype": "float32", **data}


def written(folder: Path, tmp_path: Path, data: dict[str, Any]) -> Path:
    (tmp_path / "published merge.yml").write_text(yaml.safe_dump(data))
    out = tmp_path / "search.yaml"
    command = ["init", str(tmp_path / "published merge.yml"), "--tasks", "tiny_a, tiny_b", "-o", str(out)]
    assert main([*command, "--include", str(folder / "tasks")]) == 0
    return out


STARTS = {
    "ties": """
        models:
        - {model: base}
        - {model: a, parameters: {weight: 0.5, density: 0.4}}
        - {model: b, parameters: {weight: -0.3, density: 0.7}}
        base_model: base
        merge_method: ties
        parameters: {normalize: false, lambda: 1.1, int8_mask: true}
        """,
    "linear with filters": """
        models:
        - {model: a, parameters: {weight: [{filter: mlp, value: 0.2}, {filter: self_attn, value: 0.4}, {value: 1}]}}
        - {model: base, parameters: {weight: [{filter: mlp, value: 0.9}, {filter: self_attn, value: 0.1}]}}
        merge_method: linear
        parameters: {weight: 0.6}
        """,
    "slerp": """
        models: [{model: a}, {model: base}]
        base_model: base
        merge_method: slerp
        parameters: {t: [{filter: mlp, value: 1.3}, {value: 0.4}]}
        """,
    "nuslerp without a base": """
        models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.6}}]
        merge_method: nuslerp
        """,
}


@pytest.mark.parametrize("name", STARTS)
def test_the_search_starts_at_the_published_merge(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = document(folder, STARTS[name])
    config_file = written(folder, tmp_path, data)
    assert main(["plan", str(config_file)]) == 0
    assert "published-merge: " in capsys.readouterr().out
    config = load_config(config_file)
    refs = {"base": config.models.base, **config.models.experts}
    space = CoefficientSpace(
        config, num_layers=3, sources={key: Source(source=ref.path) for key, ref in refs.items()}
    )
    start = merge(space.decode(space.initial), tmp_path / "start", threads=1)
    published = merge(from_mergekit(data).recipe, tmp_path / "published", threads=1)
    assert digests(read(start)) == digests(read(published))


def test_values_over_depth_become_control_values(folder: Path, tmp_path: Path) -> None:
    data = document(
        folder,
        """
        models: [{model: a, parameters: {weight: [0.1, 0.9]}}, {model: b, parameters: {weight: 0.5}}]
        base_model: base
        merge_method: task_arithmetic
        """,
    )
    text = written(folder, tmp_path, data).read_text()
    assert "- {range: [-0.4, 1.4], initial: [0.1, 0.9], depth: {smooth: 2}, per: a}" in text
    assert "# Values over depth: the final norm and the head take the last one in a search" in text


def test_from_models_the_first_is_the_base(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "init",
        *models(folder, "base", "b", "c"),
        "--tasks",
        "tiny_a",
        "--include",
        str(folder / "tasks"),
    ]
    assert main(command) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    config = load_config(file)
    assert Path(config.models.base.path).name == "base"
    assert list(config.models.experts) == ["b", "c"]
    assert config.space.method == "task_arithmetic"
    assert main(["plan", str(file)]) == 0


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def talking(folder: Path, tmp_path: Path) -> Path:
    """The same models; ``b`` has a chat template."""
    shutil.copytree(folder, tmp_path / "talking")
    (tmp_path / "talking" / "models" / "b" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "talking"


def init(folder: Path, out: Path, *sources: str) -> Config:
    tasks = ["--tasks", "tiny_a", "--include", str(folder / "tasks"), "-o", str(out)]
    assert main(["init", *sources, *tasks]) == 0
    assert main(["plan", str(out)]) == 0
    return load_config(out)


def test_an_experts_chat_template_is_the_merged_models_and_the_prompts(talking: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.yaml"
    config = init(talking, out, *models(talking, "base", "a", "b"))
    assert config.suite.chat_template is True
    assert config.output.chat_template == "auto"
    suite = set_up(config, file=out).suite
    request = next(iter(suite.requests()))
    assert request.context.startswith("<user>tiny_a ")
    assert request.context.endswith("<assistant>")


def test_a_bases_chat_template_is_the_outputs_anyway(talking: Path, tmp_path: Path) -> None:
    config = init(talking, tmp_path / "c.yaml", *models(talking, "b", "a", "base"))
    assert config.suite.chat_template is True
    assert config.output.chat_template is None


def test_without_a_chat_template_nothing_is_said_of_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.yaml"
    assert init(folder, out, *models(folder, "base", "a")).suite.chat_template is None
    assert "chat_template" not in out.read_text()


def test_the_published_outputs_tokenizer_and_chat_template_are_kept(talking: Path, tmp_path: Path) -> None:
    data = document(
        talking,
        """
        models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
        base_model: base
        merge_method: task_arithmetic
        chat_template: chatml
        tokenizer: {source: B, pad_to_multiple_of: 8, tokens: {<s>: {source: B}}}
        """.replace("B", str(talking / "models" / "b")),
    )
    (tmp_path / "published.yml").write_text(yaml.safe_dump(data))
    config = init(talking, tmp_path / "c.yaml", str(tmp_path / "published.yml"))
    assert config.output.chat_template == "chatml"
    assert config.suite.chat_template is True
    assert config.output.vocabulary.source == "b"
    assert config.output.vocabulary.pad_to_multiple_of == 8
    assert config.output.vocabulary.tokens["<s>"].source.model == "b"


def test_a_budget_follows_the_dimension(folder: Path, tmp_path: Path) -> None:
    curve = [0.1 * i for i in range(3)]
    data = document(
        folder,
        "models: [{model: a}, {model: b}, {model: c}]\nmerge_method: task_arithmetic\nbase_model: base",
    )
    for entry in data["models"]:
        entry["parameters"] = {
            "weight": [{"filter": f, "value": curve} for f in ("mlp", "attn")] + [{"value": 1.0}]
        }
    config = load_config(written(folder, tmp_path, data))
    assert config.budget.candidates == 360


def test_tasks_without_named_splits_are_cut(folder: Path, tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path / "tasks", counts={"test": 30})
    out = tmp_path / "c.yaml"
    command = [
        "init",
        *models(folder, "base", "a"),
        "--tasks",
        "tiny_a",
        "--include",
        str(tasks),
        "-o",
        str(out),
    ]
    assert main(command) == 0
    assert load_config(out).splits.from_ == "test"
    assert main(["plan", str(out)]) == 0


def test_a_task_named_by_its_file_is_found_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    out = tmp_path / "c.yaml"
    assert (
        main(["init", "./models/base", "./models/a", "--tasks", "./tasks/tiny_a.yaml", "-o", str(out)]) == 0
    )
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(out)]) == 0


def test_a_task_with_several_filters_gets_the_metric_behind_the_first(folder: Path, tmp_path: Path) -> None:
    regex = {"function": "regex", "regex_pattern": "([0-9]+)"}
    filters = [{"name": name, "filter": [regex, {"function": "take_first"}]} for name in ("strict", "loose")]
    tasks = write_task(tmp_path / "tasks", "digits", "generate", filter_list=filters).parent
    write_task(tasks, "choice")
    out = tmp_path / "c.yaml"
    names = ["--tasks", "digits,choice", "--include", str(tasks)]
    assert main(["init", *models(folder, "base", "a"), *names, "-o", str(out)]) == 0
    assert [task.metric for task in load_config(out).suite.tasks] == ["exact_match,strict", "auto"]
    assert main(["plan", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}"], "is no file; name a mergekit YAML, or two models or more, the base first"),
        (["{a}", "./nowhere"], "./nowhere: no such folder"),
        (["{a}", "{b}", "--method", "tise"], "--method: unknown merge method 'tise' (did you mean 'ties'?)"),
        (["{a}", "{b}", "--method", "slerp"], "slerp: slerp takes exactly 2 inputs, here are 1"),
        (["{a}", "{b}", "--tasks", ","], "--tasks: is empty; name at least one lm-eval task"),
        (["{a}", "{b}", "-o", "{a}"], "exists already; name another file with -o"),
        (["{slices}"], "slices.yml: puts layers together anew; a search starts from a merge of whole models"),
        (
            ["{stock}"],
            "stock.yml: nothing in a merge by model_stock is left to search; 'evomerge merge' makes it",
        ),
        (["{steps}"], "normalize: a list over depth is not turned into a search; give one value"),
        (["{rules}"], "rules.yaml: rules by layers, roles or patterns are not turned into a search"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = models(folder, "a", "b")
    texts = {
        "slices.yml": f"slices: [{{sources: [{{model: {a}, layer_range: [1, 2]}}]}}]\n"
        "merge_method: linear\nparameters: {weight: 1}",
        "stock.yml": f"models: [{{model: {a}}}, {{model: {b}}}]\nmerge_method: model_stock\n"
        f"base_model: {folder}/models/base",
        "steps.yml": f"models: [{{model: {a}}}, {{model: {b}}}]\nmerge_method: linear\n"
        "parameters: {weight: 1, normalize: [true, false]}",
        "rules.yaml": f"evomerge: 1\nmodels: {{a: {a}, b: {b}}}\nmerges: {{m: {{method: linear, inputs: [a, b], "
        "parameters: {weight: 1}, rules: [{roles: [mlp], parameters: {weight: 2}}]}}",
    }
    places = {"a": a, "b": b}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        places[name.split(".")[0]] = str(tmp_path / name)
    given = [argument.format(**places) for argument in arguments]
    if "--tasks" not in given:
        given += ["--tasks", "tiny_a"]
    assert main(["init", *given, "--include", str(folder / "tasks")]) == 2
    assert message in capsys.readouterr().err
