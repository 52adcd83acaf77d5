"""Which chat template the output has, and what the built-in ones write."""

from __future__ import annotations

import shutil

import pytest
from transformers import AutoTokenizer

from evomerge.checkpoints.chat_templates import BUILT_IN
from evomerge.errors import UserError
from evomerge.merging import merge, open_parents, plan_merge
from evomerge.recipe import load_recipe
from tests.merging.helpers import make_recipe
from tests.models import make_model

MEAN = {"method": "linear", "inputs": ["a", "b", "c"], "parameters": {"weight": 1.0}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    """Three models with the templates ``{{ 1 }}``, ``{{ 2 }}``, ``{{ 2 }}``."""
    folder = tmp_path_factory.mktemp("talkers")
    made = make_model(folder / "made", layers=1)
    models = {name: shutil.copytree(made, folder / name) for name in "abc"}
    for name, text in zip("abc", ("{{ 1 }}", "{{ 2 }}", "{{ 2 }}"), strict=True):
        (folder / name / "chat_template.jinja").write_text(text)
    return models


def template(talkers, out, choice):
    merge(make_recipe(talkers, merge=MEAN, output={"chat_template": choice}), out)
    return AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("b", "{{ 2 }}"),
        ("a", "{{ 1 }}"),
        ("auto", "{{ 2 }}"),
        ("{{ 3 }}", "{{ 3 }}"),
        ("chatml", BUILT_IN["chatml"]),
    ],
)
def test_a_name_auto_or_a_text(talkers, tmp_path, choice, expected):
    assert template(talkers, tmp_path / "out", choice) == expected


def test_by_default_it_is_the_tokenizers(talkers, tmp_path):
    out = merge(make_recipe(talkers, merge=MEAN, output={"tokenizer": "b"}), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ 2 }}"


def test_a_models_name_comes_before_a_built_in_one(talkers, tmp_path):
    models = {**talkers, "chatml": talkers["c"]}
    assert template(models, tmp_path / "out", "chatml") == "{{ 2 }}"


def test_a_file_is_read_when_the_recipe_is(talkers, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ 4 }}\n")
    file = tmp_path / "recipe.yaml"
    recipe = make_recipe(talkers, merge=MEAN, output={"chat_template": "./mine.jinja"})
    file.write_text(recipe.to_yaml())
    assert load_recipe(file).output.chat_template == "{{ 4 }}\n"
    (tmp_path / "mine.jinja").unlink()
    with pytest.raises(UserError, match=r"mine.jinja: no such chat template"):
        load_recipe(file)


def test_control_tokens_that_the_tokenizer_lacks_are_told(talkers):
    recipe = make_recipe(talkers, merge=MEAN, output={"chat_template": "chatml"})
    warnings = plan_merge(recipe, open_parents(recipe)).warnings
    assert warnings[-1].startswith("the chat template writes <|im_start|>, <|im_end|>, which the output's")


def test_models_without_a_template(family):
    recipe = make_recipe(family, merge=MEAN, output={"chat_template": "auto"})
    plan = plan_merge(recipe, open_parents(recipe))
    assert plan.chat_templates is None
    assert plan.warnings == ("output.chat_template: auto: none of the models has a chat template",)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "chatmll",
            "output.chat_template: no model is called 'chatmll'.*; give a model's name, auto, one of alpaca",
        ),
        ("{% for x in %}", "output.chat_template: line 1: not a Jinja template: Expected an expression"),
    ],
)
def test_what_is_no_template(talkers, tmp_path, choice, message):
    with pytest.raises(UserError, match=message):
        template(talkers, tmp_path / "out", choice)


CONVERSATIONS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n"
    "### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n"
    "[|assistant|]",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_formats(talkers, name):
    tokenizer = AutoTokenizer.from_pretrained(talkers["a"])
    tokenizer.chat_template = BUILT_IN[name]
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert text == CONVERSATIONS[name]
