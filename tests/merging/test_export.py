from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.cli import main
from evomerge.errors import CheckpointError, InfrastructureError, UserError
from evomerge.merging import merge, open_parents, pin
from evomerge.recipe import load_recipe
from tests.merging.helpers import make_recipe, read, rewrite
from tests.models import make_family

TIES = {
    "method": "ties",
    "base": "base",
    "inputs": ["a", "b"],
    "parameters": {"weight": {"a": 0.75, "b": 0.5}, "density": 0.5},
}


def test_the_folder_loads_with_plain_transformers_and_generates(family, tmp_path):
    out = merge(make_recipe(family, merge=TIES), str(tmp_path / "deep" / "out"))
    assert out == tmp_path / "deep" / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("12+34=", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 10)
    loaded = model.state_dict()
    for name, tensor in read(out).items():
        assert torch.equal(loaded[name], tensor)


def test_shards_hold_the_same_tensors_as_one_file(family, tmp_path):
    recipe = make_recipe(family, merge=TIES)
    one, many = merge(recipe, tmp_path / "one"), merge(recipe, tmp_path / "many", max_shard_size="40KB")
    assert len(list(one.glob("*.safetensors"))) == 1
    assert len(list(many.glob("*.safetensors"))) > 3
    whole, parts = read(one), read(many)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    model = AutoModelForCausalLM.from_pretrained(many)
    assert torch.equal(model.lm_head.weight, whole["lm_head.weight"])


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_the_written_recipe_is_pinned_and_makes_the_same_bytes_again(family, tmp_path, method):
    out = merge(make_recipe(family, merge={**TIES, "method": method}, seed=4), tmp_path / "out")
    recipe = load_recipe(out / "evomerge_recipe.yaml")
    assert all(source.sha256 and len(source.sha256) == 64 for source in recipe.models.values())
    again = merge(out / "evomerge_recipe.yaml", tmp_path / "again", threads=2)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert load_recipe(again / "evomerge_recipe.yaml") == recipe


def test_a_recipe_file_may_name_its_models_relative_to_itself(family, tmp_path):
    shutil.copytree(family["a"], tmp_path / "zoo" / "a")
    file = tmp_path / "zoo" / "recipe.yaml"
    file.write_text(
        "evomerge: 1\nmodels: {a: ./a}\n"
        "merges: {m: {method: linear, inputs: [a], parameters: {weight: 1.0}}}\n"
    )
    out = merge(file, tmp_path / "out")
    written, source = read(out), read(family["a"])
    assert all(torch.equal(written[name], source[name]) for name in source)


def test_a_parent_that_is_not_the_pinned_one_is_refused(family, tmp_path):
    recipe = make_recipe(family, merge=TIES)
    pinned = pin(recipe, open_parents(recipe))
    expected, found = pinned.models["a"].sha256, pinned.models["c"].sha256
    moved = pinned.models["a"].model_copy(update={"source": str(family["c"])})
    swapped = pinned.model_copy(update={"models": {**pinned.models, "a": moved}})
    with pytest.raises(UserError, match=rf"models\.a\.sha256: .*{expected}.*{found}"):
        merge(swapped, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_what_the_recipe_pins_is_verified_and_the_rest_is_pinned(family):
    recipe = make_recipe(family, merge=TIES)
    checkpoints = open_parents(recipe)
    complete = pin(recipe, checkpoints)
    partial = recipe.model_copy(update={"models": {**recipe.models, "b": complete.models["b"]}})
    assert pin(partial, checkpoints) == complete


@pytest.mark.parametrize("place", ["", "inside", "inside/deeper"])
def test_an_output_in_a_parents_folder_is_refused(family, tmp_path, place):
    shutil.copytree(family["a"], tmp_path / "a")
    recipe = make_recipe({**family, "a": tmp_path / "a"}, merge=TIES)
    with pytest.raises(UserError, match="lies in the folder of the model 'a'"):
        merge(recipe, tmp_path / "a" / place)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="lies in the folder of the model 'a'"):
        merge(recipe, link / place)


def test_an_output_folder_in_use_is_refused_and_left_alone(family, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        merge(make_recipe(family, merge=TIES), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="not an empty folder"):
        merge(make_recipe(family, merge=TIES), tmp_path / "out" / "notes.txt")


def test_the_recipe_is_there_as_soon_as_the_folder_is(family, tmp_path, monkeypatch):
    rename = os.rename

    def check(source, target):
        assert load_recipe(Path(source) / "evomerge_recipe.yaml").main.method == "ties"
        rename(source, target)

    monkeypatch.setattr("os.rename", check)
    merge(make_recipe(family, merge=TIES), tmp_path / "out")


def test_values_that_have_no_merge_are_named_alone(family, tmp_path):
    weights = {"weight": {"a": 0.5, "b": -0.5}}
    recipe = make_recipe(family, merge={"method": "linear", "inputs": ["a", "b"], "parameters": weights})
    with pytest.raises(CheckpointError, match=r"out: not written: .* add up to 0 and cannot be normalized$"):
        merge(recipe, tmp_path / "out")


def test_an_interrupted_command_says_that_nothing_was_written(family, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(family, merge=TIES).to_yaml())

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("evomerge.merging.FileSink.pieces", interrupt)
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 75
    assert capsys.readouterr().err == f"dialect: paper\nStopped; {tmp_path / 'out'} was not written.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_no_file_stays_open_after_a_merge(family, tmp_path):
    own = {name: Path(shutil.copytree(path, tmp_path / "own" / name)) for name, path in family.items()}

    def parents_open():
        links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return [link for link in links if link.startswith(str(tmp_path / "own"))]

    merge(make_recipe(own, merge=TIES), tmp_path / "out")
    assert parents_open() == []


def test_an_empty_output_folder_is_taken(family, tmp_path):
    (tmp_path / "out").mkdir()
    assert (merge(make_recipe(family, merge=TIES), tmp_path / "out") / "config.json").is_file()


def test_a_size_that_is_none_is_refused(family, tmp_path):
    with pytest.raises(UserError, match="'big'"):
        merge(make_recipe(family, merge=TIES), tmp_path / "out", max_shard_size="big")


def test_a_parent_with_nan_is_refused_before_anything_is_written(family, tmp_path):
    shutil.copytree(family["a"], tmp_path / "nan")
    weights = read(tmp_path / "nan")["model.norm.weight"]
    weights[7] = torch.nan
    rewrite(tmp_path / "nan", {"model.norm.weight": weights})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has 1 NaN"):
        merge(make_recipe({**family, "a": tmp_path / "nan"}, merge=TIES), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("threads", [1, 2])
def test_weights_that_overflow_leave_no_folder_behind(family, tmp_path, threads):
    recipe = make_recipe(
        family,
        merge={"method": "task_arithmetic", "base": "base", "inputs": ["a"], "parameters": {"weight": 1e30}},
        output={"dtype": "float16"},
    )
    with pytest.raises(CheckpointError, match=r"out: not written: .* not finite"):
        merge(recipe, tmp_path / "out", threads=threads)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(family, tmp_path, monkeypatch, threads):
    write, budget = os.pwrite, [3]

    def full(descriptor, data, position):
        budget[0] -= 1
        if budget[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InfrastructureError, match="the disk is full"):
        merge(make_recipe(family, merge=TIES), tmp_path / "out", threads=threads)
    assert list(tmp_path.iterdir()) == []


def test_the_output_names_whose_tokenizer_and_chat_template_go_along(family, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(family[name], tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(f"template of {name}")
    models = {**family, "a": tmp_path / "a", "b": tmp_path / "b"}
    plain = merge(make_recipe(models, merge=TIES), tmp_path / "plain")
    assert not (plain / "chat_template.jinja").exists()
    output = {"tokenizer": "a", "chat_template": "b"}
    chosen = merge(make_recipe(models, merge=TIES, output=output), tmp_path / "chosen")
    assert (chosen / "chat_template.jinja").read_text() == "template of b"
    of_tokenizer = merge(
        make_recipe(models, merge=TIES, output={"tokenizer": "a"}), tmp_path / "of_tokenizer"
    )
    assert (of_tokenizer / "chat_template.jinja").read_text() == "template of a"


def test_merging_imports_neither_transformers_nor_ray_nor_lm_eval(family, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe(family, merge=TIES).to_yaml())
    code = (
        "import sys, evomerge.merging as m\n"
        f"m.merge({str(file)!r}, {str(tmp_path / 'out')!r})\n"
        "print(sorted({'transformers', 'ray', 'lm_eval', 'datasets', 'optuna'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "out" / "model.safetensors").is_file()


MEMORY = """
import sys, torch
import evomerge.merging as m
from pathlib import Path

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

sizes = []
for recipe, out in zip(sys.argv[1::2], sys.argv[2::2]):
    m.merge(recipe, out, threads=2)
    sizes.append(peak())
print(*sizes)
"""


@pytest.fixture(scope="module")
def shallow_and_deep(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """Two families with tensors of the same sizes, so that the same buffers are full."""
    return {
        name: make_family(tmp_path_factory.mktemp(name), hidden=512, layers=layers)
        for name, layers in (("shallow", 2), ("deep", 10))
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak counter")
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_resident_memory_does_not_grow_with_the_model(shallow_and_deep, tmp_path, method):
    parameters = {"weight": 0.5} if method == "linear" else TIES["parameters"]
    base = {} if method == "linear" else {"base": "base"}
    arguments = []
    for name, models in shallow_and_deep.items():
        merged = {"method": method, "inputs": ["a", "b"], "parameters": parameters, **base}
        file = tmp_path / f"{name}.yaml"
        file.write_text(make_recipe(models, merge=merged).to_yaml())
        arguments += [str(file), str(tmp_path / f"out_{name}")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    one = {
        name: (models["base"] / "model.safetensors").stat().st_size
        for name, models in shallow_and_deep.items()
    }
    # To hold one more whole model, parent or output, would show.
    assert one["deep"] - one["shallow"] > 64 * 2**20
    assert after - before < 48 * 2**20
