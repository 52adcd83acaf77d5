"""Chat templates, system instructions and thinking: the prompts and answers are those of lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.config import load_config
from evomerge.errors import UserError
from evomerge.evaluation.chat import PromptStyle
from evomerge.evaluation.requests import Generation
from evomerge.scoring import evaluate
from evomerge.searching.setup import set_up
from tests.evaluation.test_parity import lm_eval_samples, ours
from tests.evaluation.tiny import FakeEngine, build, documents, whole, write_task
from tests.models import make_model
from tests.tasks import make_config

TEMPLATE = (
    "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatty(family: dict[str, Path]) -> Any:
    """A tokenizer with a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family["base"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def shots(folder: Path, kind: str, **keys: Any) -> Path:
    data = {s: documents(8, 100 * i) for i, s in enumerate(("search", "validation", "test", "shots"))}
    few = {"num_fewshot": 2, "fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}}
    return write_task(folder, kind=kind, data=data, description="Be brief.", **few, **keys)


@pytest.mark.parametrize("kind", ["choice", "generate"])
@pytest.mark.parametrize("multiturn", [None, True, False])
@pytest.mark.parametrize("system", [None, "You count."])
def test_prompts_are_those_of_lm_eval(
    tmp_path: Path, model: Any, chatty: Any, kind: str, multiturn: bool | None, system: str | None
) -> None:
    path = shots(tmp_path, kind, **({"gen_prefix": "So:"} if kind == "generate" else {}))
    expected = lm_eval_samples(
        path,
        model,
        chatty,
        apply_chat_template=True,
        system_instruction=system,
        fewshot_as_multiturn=multiturn is not False,
        lm={"chat_template_args": {"enable_thinking": False}},
    )
    suite, engine, scores = ours(
        tmp_path,
        model,
        chatty,
        "tiny",
        chat_template=True,
        system_instruction=system,
        fewshot_as_multiturn=multiturn,
        chat_template_args={"enable_thinking": False},
    )
    items = {item.index: item for item in suite.items("search")}
    name = "acc" if kind == "choice" else "exact_match"
    assert [scores[s["doc_id"]].raw for s in expected] == [s[name] for s in expected]
    prompts = [suite.preview(engine, items[s["doc_id"]]).prompt for s in expected]
    assert prompts == [s["arguments"][0][0] for s in expected]
    assert prompts[0].startswith("[False]<system>You count." if system else "[False]<system>Be brief.")
    assert prompts[0].count("<assistant>") == (1 if multiturn is False else 3)


def test_a_system_instruction_without_a_chat_template(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    path = shots(tmp_path, "choice")
    expected = lm_eval_samples(path, model, tokenizer, system_instruction="You count.")
    suite, engine, _ = ours(tmp_path, model, tokenizer, "tiny", system_instruction="You count.")
    items = {item.index: item for item in suite.items("search")}
    prompts = [suite.preview(engine, items[s["doc_id"]]).prompt for s in expected]
    assert prompts == [s["arguments"][0][0] for s in expected]
    assert prompts[0].startswith("You count.\n\nBe brief.")


def test_what_follows_the_thinking_is_the_answer(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    kwargs = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    path = write_task(tmp_path, kind="generate", generation_kwargs=kwargs)
    _, engine, _ = ours(tmp_path, model, tokenizer, "tiny")
    plain = lm_eval_samples(path, model, tokenizer)
    mark = plain[0]["resps"][0][0][3:5]
    expected = lm_eval_samples(path, model, tokenizer, lm={"think_end_token": mark})
    suite, engine, _ = ours(tmp_path, model, tokenizer, "tiny", think_end_token=mark)
    items = {item.index: item for item in suite.items("search")}
    answers = [suite.preview(engine, items[s["doc_id"]]).extracted for s in expected]
    assert answers == [s["resps"][0][0] for s in expected]
    assert answers[0] != plain[0]["resps"][0][0]


def test_stop_strings_hold_for_the_answer_alone(tmp_path: Path) -> None:
    write_task(tmp_path, kind="generate")
    suite = build(tmp_path, think_end_token="</t>", splits_needed=("search",))
    engine = FakeEngine(text=lambda r: f"so\nit goes</t>\n it is {int(r.context.split()[3]) + 1}\nand on")
    assert {score.value for score in suite.score(engine, whole(suite))} == {1.0}
    assert all(isinstance(r, Generation) and r.stops == () for r in engine.asked)
    style = PromptStyle(think_end="</t>")
    assert style.answer("a\nb", ["\n"]) == "a"
    assert style.answer("x</t>y</t> z\nw", ["\n", ""]) == "z"
    assert PromptStyle().answer("x</t>y", ["\n"]) == "x</t>y"


def test_every_setting_makes_other_items(tmp_path: Path, chatty: Any) -> None:
    shots(tmp_path, "generate")
    chat: dict[str, Any] = {"chat_template": True}
    settings: list[dict[str, Any]] = [
        {},
        {"think_end_token": "</t>"},
        {"think_end_token": "</think>"},
        {"system_instruction": "You count."},
        chat,
        {**chat, "fewshot_as_multiturn": False},
        {**chat, "chat_template_args": {"enable_thinking": False}},
        {**chat, "system_instruction": "You count."},
    ]
    seen: set[str] = set()
    for setting in settings:
        suite = build(tmp_path, tokenizer=chatty, splits_needed=("search",), **setting)
        ids = {item.id for item in suite.items("search")}
        assert not ids & seen
        seen |= ids


def test_a_template_without_system_messages(
    tmp_path: Path, model: Any, chatty: Any, caplog: pytest.LogCaptureFixture
) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    chatty.chat_template = strict + TEMPLATE
    path = shots(tmp_path, "choice")
    expected = lm_eval_samples(path, model, chatty, apply_chat_template=True, fewshot_as_multiturn=True)
    suite, engine, _ = ours(tmp_path, model, chatty, "tiny", chat_template=True)
    items = {item.index: item for item in suite.items("search")}
    prompts = [suite.preview(engine, items[sample["doc_id"]]).prompt for sample in expected]
    assert prompts == [sample["arguments"][0][0] for sample in expected]
    assert "Be brief" not in prompts[0]
    assert (
        caplog.text.count("the chat template takes no system message; tasks' descriptions are dropped") == 1
    )
    with pytest.raises(
        UserError, match=r"suite\.system_instruction: the chat template takes no system message"
    ):
        build(tmp_path, tokenizer=chatty, chat_template=True, system_instruction="You count.")


def test_a_template_by_name(tmp_path: Path, chatty: Any) -> None:
    write_task(tmp_path)
    chatty.chat_template = {"default": TEMPLATE, "rag": "RAG" + TEMPLATE}
    for name, start in ((True, "<user>"), ("rag", "RAG<user>")):
        suite = build(tmp_path, tokenizer=chatty, chat_template=name, splits_needed=("search",))
        engine = FakeEngine()
        suite.score(engine, whole(suite), check_degenerate=False)
        assert all(request.context.startswith(start) for request in engine.asked)
    with pytest.raises(
        UserError, match=r"no chat template 'rga' \(did you mean 'rag'\?\); it has default, rag"
    ):
        build(tmp_path, tokenizer=chatty, chat_template="rga")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"chat_template": True, "plain": True}, "tokenizer has no chat template; set it to false, or give"),
        ({"chat_template_args": {"x": 1}}, "suite.chat_template_args: they need a chat template"),
        ({"fewshot_as_multiturn": True}, "suite.fewshot_as_multiturn: true needs a chat template"),
        (
            {"chat_template": True, "chat_template_args": {"enable_thinking": True}},
            "suite.think_end_token: this key is required with chat_template_args.enable_thinking: true",
        ),
        (
            {
                "chat_template": True,
                "chat_template_args": {"enable_thinking": True},
                "think_end_token": "</think>",
            },
            "suite.tasks.0: task 'tiny' scores given answers, before which a model cannot think",
        ),
        ({"think_end_token": "</s>"}, "'</s>' is a special token of the tokenizer"),
    ],
)
def test_settings_that_do_not_fit(
    tmp_path: Path, chatty: Any, tokenizer: Any, settings: dict[str, Any], told: str
) -> None:
    write_task(tmp_path)
    used = tokenizer if settings.pop("plain", False) else chatty
    with pytest.raises(UserError) as caught:
        build(tmp_path, tokenizer=used, **settings)
    assert str(caught.value).startswith("search.yaml: suite.")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def chat_family(tmp_path: Path) -> dict[str, Path]:
    """A base without and an expert with a chat template."""
    family = {"base": make_model(tmp_path / "base", seed=1)}
    family |= {name: make_model(tmp_path / name, seed=i, base=family["base"]) for i, name in enumerate("ab")}
    file = family["b"] / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return family


def test_it_must_be_written_where_a_model_has_a_template(
    tmp_path: Path, chat_family: dict[str, Path]
) -> None:
    write_task(tmp_path / "tasks", "texts", "rolling")
    write_task(tmp_path / "tasks", "tiny")
    suite: dict[str, Any] = {"include": [str(tmp_path / "tasks")], "tasks": ["texts", "tiny"]}
    path = make_config(tmp_path, chat_family, tmp_path / "tasks", suite=suite)

    def config(**changes: Any) -> Any:
        data = yaml.safe_load(path.read_text())
        data["suite"] |= changes
        path.write_text(yaml.safe_dump(data))
        return load_config(path)

    with pytest.raises(UserError) as caught:
        set_up(config(), file=path, weights=False)
    message = str(caught.value)
    assert message.startswith(
        f"{path}: suite.chat_template: has to be written, since 'b' has a chat template: "
        "true (with output.chat_template: b) for prompts like '<user>Question: What follows"
    )
    assert "Answer:\\n<assistant>', false for prompts like 'Question: What follows" in message
    assert "\n" not in message
    decided = set_up(config(chat_template=False), file=path, weights=False)
    assert decided.config.suite.chat_template is False
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        set_up(config(chat_template=True), file=path, weights=False)
    data = yaml.safe_load(path.read_text()) | {"output": {"chat_template": "b"}}
    path.write_text(yaml.safe_dump(data))
    setup = set_up(load_config(path), file=path, weights=False)
    assert setup.config.suite.chat_template is True
    # Texts alone have no prompts that a template could change.
    texts = config(tasks=["texts"]).model_copy(update={"output": load_config(path).output})
    texts = texts.model_copy(update={"suite": texts.suite.model_copy(update={"chat_template": None})})
    assert set_up(texts, file=path, weights=False).config.suite.chat_template is False


def test_a_model_by_itself_needs_it_written_too(tmp_path: Path, chat_family: dict[str, Path]) -> None:
    write_task(tmp_path / "tasks", "tiny")
    path = make_config(
        tmp_path,
        {name: chat_family[name] for name in ("base", "a")},
        tmp_path / "tasks",
        suite={"include": [str(tmp_path / "tasks")], "tasks": ["tiny"]},
    )
    assert evaluate(chat_family["a"], path).score["n"] == 12
    with pytest.raises(UserError, match=r"suite\.chat_template: has to be written, since '.*b' has a chat"):
        evaluate(chat_family["b"], path)
    assert evaluate(chat_family["b"], path, overrides=["suite.chat_template=true"]).score["n"] == 12
