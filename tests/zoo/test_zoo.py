"""The model zoo: items that do not leak, a tokenizer that survives loading, builds that repeat and are kept."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "build_zoo"
MODELS = ("base", "arithmetic", "text", "ordering")
SPLITS = ("search", "validation", "test")
GENERATED = {"add", "reverse", "sort", "next"}
CHOSEN = {"larger": 2, "vowels": 4}


def build(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--tiny", "--jobs", "1", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zoo") / "first"
    result = build(out)
    assert result.returncode == 0, result.stderr
    return out


def children_seconds() -> float:
    """Return the processor time of the processes that were started from here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def rows(zoo: Path, skill: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (zoo / "tasks" / "data" / f"{skill}_{split}.jsonl").open()]


def right_answer(skill: str, prompt: str) -> str:
    """The answer, worked out from the prompt alone."""
    question = prompt.removesuffix("=")
    if skill == "add":
        return str(sum(int(number) for number in question.split("+")))
    words = question.split()[1:]
    word = words[0]
    match skill:
        case "larger":
            return max(words, key=int)
        case "reverse":
            return "".join(reversed(word))
        case "vowels":
            return str(sum(word.count(vowel) for vowel in "aeiou"))
        case "sort":
            return "".join(sorted(word))
        case "next":
            return "".join("a" if letter == "z" else chr(ord(letter) + 1) for letter in word)
    raise ValueError(skill)


@pytest.mark.parametrize("skill", sorted(GENERATED | set(CHOSEN)))
def test_every_item_has_the_right_answer_and_splits_share_none(zoo: Path, skill: str) -> None:
    seen: Counter[str] = Counter()
    for split in SPLITS:
        for row in rows(zoo, skill, split):
            answer = row["choices"][row["gold"]] if skill in CHOSEN else row["answer"]
            assert answer == right_answer(skill, row["prompt"])
            seen[row["prompt"]] += 1
    assert len(seen) == 80 + 100 + 180
    assert max(seen.values()) == 1


def test_splits_do_not_leak_by_order(zoo: Path) -> None:
    def question(skill: str, prompt: str) -> tuple[str, ...]:
        body = prompt.removesuffix("=").split(" ", 1)[-1]
        if skill == "add":
            return tuple(sorted(body.split("+")))
        return tuple(sorted(body.split() if skill == "larger" else body))

    for skill in ("add", "larger", "sort", "vowels"):
        groups = [{question(skill, row["prompt"]) for row in rows(zoo, skill, split)} for split in SPLITS]
        assert not groups[0] & groups[1]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]


def test_training_items_are_in_no_split(zoo: Path) -> None:
    source = """
import itertools, json, sys
from settings import full_settings
from train import training_items
settings = full_settings()
prompts = {model.name: [item.prompt for item in itertools.islice(training_items(model, settings), 20000)]
           for model in settings.models}
json.dump(prompts, sys.stdout)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts" / "zoo")}
    result = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=environment, check=True
    )
    skills = GENERATED | set(CHOSEN)
    held_out = {row["prompt"] for skill in skills for split in SPLITS for row in rows(zoo, skill, split)}
    for prompts in json.loads(result.stdout).values():
        assert not held_out & set(prompts)


def test_tokenizer_survives_being_loaded(zoo: Path) -> None:
    from transformers import AutoTokenizer

    files = {(zoo / name / "tokenizer.json").read_bytes() for name in MODELS}
    assert len(files) == 1
    tokenizer = AutoTokenizer.from_pretrained(zoo / "text")
    stored = json.loads((zoo / "text" / "tokenizer.json").read_text())["model"]["vocab"]
    for text in ("12+34=46\n", "reverse abcd=dcba\n", "  ä \t€ "):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.convert_ids_to_tokens(ids) == [
            next(token for token, index in stored.items() if index == id_) for id_ in ids
        ]


def test_models_load_as_float32_and_differ(zoo: Path) -> None:
    from safetensors.numpy import load_file

    weights = {name: load_file(zoo / name / "model.safetensors") for name in MODELS}
    for name in MODELS:
        assert weights[name].keys() == weights["base"].keys()
        assert {str(tensor.dtype) for tensor in weights[name].values()} == {"float32"}
        assert json.loads((zoo / name / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert (zoo / name / "generation_config.json").is_file()
    for expert in MODELS[1:]:
        assert any((weights[expert][key] != weights["base"][key]).any() for key in weights["base"])


def test_same_build_twice_gives_the_same_bytes(zoo: Path) -> None:
    again = zoo.with_name("again")
    result = build(again)
    assert result.returncode == 0, result.stderr
    files = [path.relative_to(zoo) for path in zoo.rglob("*") if path.is_file()]
    assert len(files) > 20
    for file in files:
        assert (zoo / file).read_bytes() == (again / file).read_bytes(), file


def test_second_call_returns_at_once_and_a_lost_model_is_made_again(zoo: Path) -> None:
    weights = zoo / "text" / "model.safetensors"
    before = weights.read_bytes(), (zoo / "base" / "model.safetensors").stat().st_mtime_ns
    used = children_seconds()
    assert "up to date" in build(zoo).stdout
    assert children_seconds() - used < 2

    (zoo / "text" / "zoo_stamp.json").write_text('{"stamp": "of older code"}')
    assert "built in" in build(zoo).stdout
    assert (weights.read_bytes(), (zoo / "base" / "model.safetensors").stat().st_mtime_ns) == before


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "out" / "tasks" / "notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    result = build(tmp_path / "out")
    assert result.returncode == 2
    assert str(theirs.parent) in result.stderr
    assert theirs.read_text() == "mine"


def test_tiny_needs_a_folder() -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "--out" in result.stderr


def test_tasks_load_in_lm_eval_and_every_index_is_right_equally_often(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.chdir(zoo / "tasks")
    from lm_eval.tasks import TaskManager

    names = [f"zoo_{skill}" for skill in sorted(GENERATED | set(CHOSEN))]
    manager = TaskManager(include_path=str(zoo / "tasks"), include_defaults=False)
    tasks = manager.load(names)["tasks"]
    assert sorted(tasks) == names
    for skill in GENERATED:
        task = tasks[f"zoo_{skill}"]
        document = task.test_docs()[0]
        assert task.config.output_type == "generate_until"
        assert task.config.generation_kwargs["until"] == ["\n"]
        assert task.doc_to_text(document) == document["prompt"]
        assert task.process_results(document, [document["answer"]]) == {"exact_match": 1.0}
        assert task.process_results(document, [document["answer"] + "x"]) == {"exact_match": 0.0}
        longest = max(len(row["answer"]) for split in SPLITS for row in rows(zoo, skill, split))
        assert longest < task.config.generation_kwargs["max_gen_toks"]
    for skill, choices in CHOSEN.items():
        task = tasks[f"zoo_{skill}"]
        assert task.config.output_type == "multiple_choice"
        assert "acc" in {metric["metric"] for metric in task.config.metric_list}
        for split in SPLITS:
            golds = Counter(row["gold"] for row in rows(zoo, skill, split))
            assert sorted(golds) == list(range(choices))
            assert max(golds.values()) - min(golds.values()) <= 1


def test_experts_of_the_deep_zoo_differ_from_their_base_in_middle_layers_only(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    result = build(tmp_path / "deep", "--deep")
    assert result.returncode == 0, result.stderr
    weights = {name: load_file(tmp_path / "deep" / name / "model.safetensors") for name in MODELS}
    config = json.loads((tmp_path / "deep" / "base" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    for expert in MODELS[1:]:
        changed = {key for key, value in weights[expert].items() if (value != weights["base"][key]).any()}
        places = {key.split(".")[2] for key in changed}
        assert places == {"1", "2", "3"}, changed
    assert len(rows(tmp_path / "deep", "add", "test")) > 180


def test_a_step_at_random_depth_keeps_the_ends_and_leaves_out_or_repeats_the_others() -> None:
    source = """
import json, random, sys
import torch
from settings import Training
from train import random_depth
layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(6))
training = Training("base", None, {}, 1, 0.1, 0, drop=0.3, repeat=0.2)
rng = random.Random(0)
names = {id(layer): place for place, layer in enumerate(layers)}
json.dump([[names[id(l)] for l in random_depth(layers, training, rng)] for _ in range(2000)], sys.stdout)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts" / "zoo")}
    result = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=environment, check=True
    )
    paths = json.loads(result.stdout)
    assert all(path == sorted(path) and path.count(0) == path.count(5) == 1 for path in paths)
    times = Counter(path.count(layer) for path in paths for layer in range(1, 5))
    assert set(times) == {0, 1, 2}
    assert times[0] / 8000 == pytest.approx(0.3, abs=0.02)
    assert times[2] / 8000 == pytest.approx(0.2, abs=0.02)
