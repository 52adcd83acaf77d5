from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.cli import main
from evomerge.errors import CheckpointError, UserError
from evomerge.merging import Materializer, merge, open_parents, pin, plan_merge
from evomerge.merging.streams import Arena, StreamedTensor
from evomerge.recipe import Recipe, load_recipe
from tests.adapters import make_adapter
from tests.merging.helpers import make_recipe, read
from tests.models import make_model

SETTINGS = {
    "linear": {"parameters": {"weight": {"x": 0.75, "y": 0.5}, "normalize": False}},
    "task_arithmetic": {"parameters": {"weight": {"x": 0.75, "y": 0.5}}},
    "ties": {"parameters": {"weight": {"x": 0.75, "y": 0.5}, "density": 0.4}},
    "slerp": {"parameters": {"t": 0.3}},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bfloat16 base, two adapters, and the adapted models written out in float32."""
    folder = tmp_path_factory.mktemp("adapted")
    base = make_model(folder / "base", dtype=torch.bfloat16)
    zoo = {"base": base}
    for seed, name in enumerate("xy", start=1):
        zoo[name] = make_adapter(folder / name, base, seed, r=4 * seed, modules_to_save=["norm"])
        recipe = make_recipe({"base": base}, merge=COPY, output={"dtype": "float32"})
        source = {"source": str(base), "adapter": str(zoo[name])}
        data = recipe.to_dict() | {"models": {"base": source}}
        zoo[name.upper()] = merge(Recipe.from_dict(data), folder / name.upper())
    return zoo


COPY = {"method": "linear", "inputs": ["base"], "parameters": {"weight": 1.0}}


def adapters_of(zoo: dict[str, Path]) -> dict[str, dict[str, str]]:
    return {
        "base": {"source": str(zoo["base"])},
        **{name: {"source": str(zoo["base"]), "adapter": str(zoo[name])} for name in "xy"},
    }


def run_merge(recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Merge in a process of its own, whose stderr is what a user sees."""
    command = [sys.executable, "-m", "evomerge", "merge", str(recipe), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def recipe_over(models: dict[str, dict[str, str]], method: str, **parts: object) -> Recipe:
    base = {} if method in ("linear", "slerp") else {"base": "base"}
    body = {"method": method, "inputs": ["x", "y"], **base, **SETTINGS[method]}
    return Recipe.from_dict({"models": models, "merges": {"merged": body}, **parts})


@pytest.mark.parametrize("method", SETTINGS)
def test_merging_adapters_is_merging_the_adapted_models(zoo, tmp_path, method):
    written = {name: {"source": str(zoo[name.upper()])} for name in "xy"}
    full = recipe_over({"base": {"source": str(zoo["base"])}, **written}, method, output={"dtype": "float32"})
    low = recipe_over(adapters_of(zoo), method, output={"dtype": "float32"})
    expected = read(merge(full, tmp_path / "full"))
    actual = read(merge(low, tmp_path / "low", threads=2))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_output_keeps_the_base_dtypes(zoo, tmp_path):
    out = read(merge(recipe_over(adapters_of(zoo), "ties"), tmp_path / "out"))
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}


def test_adapters_are_merged_from_the_command_line(zoo, tmp_path, capsys):
    recipe = recipe_over(adapters_of(zoo), "ties")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    pinned = load_recipe(tmp_path / "out" / "evomerge_recipe.yaml")
    assert pinned.models["x"].adapter == str(zoo["x"])
    assert pinned.models["x"].sha256
    again = merge(pinned, tmp_path / "again")
    assert all(torch.equal(tensor, read(again)[name]) for name, tensor in read(tmp_path / "out").items())


@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_adapter_folders_alone_lie_on_the_base(zoo, tmp_path, method):
    models = {"base": str(zoo["base"]), "x": str(zoo["x"]), "y": str(zoo["y"])}
    out = read(merge(recipe_over(models, method), tmp_path / "out"))
    expected = read(merge(recipe_over(adapters_of(zoo), method), tmp_path / "expected"))
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())


def test_an_adapter_alone_lies_on_the_merges_base_and_not_on_its_own(zoo, tmp_path):
    moved = make_model(tmp_path / "moved", seed=9, dtype=torch.bfloat16)
    recipe = recipe_over({"base": str(moved), "x": str(zoo["x"]), "y": str(zoo["y"])}, "ties")
    opened = open_parents(recipe)
    assert opened["x"].path == moved
    assert opened["x"].base is opened["base"] is opened["y"].base


def test_an_adapter_of_another_model_is_doubted_in_one_line(zoo, tmp_path):
    moved = make_model(tmp_path / "moved", seed=9, dtype=torch.bfloat16)
    recipe = recipe_over({"base": str(moved), "x": str(zoo["x"]), "y": str(moved)}, "ties")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    done = run_merge(tmp_path / "recipe.yaml", tmp_path / "out")
    assert done.returncode == 0
    doubts = [line for line in done.stderr.splitlines() if "was trained on" in line]
    assert doubts == [
        f"{zoo['x']}: the adapter was trained on '{zoo['base']}' (adapter_config.json), here it lies on "
        f"'{moved}'; that is right only if both are the same model"
    ]


def test_adapters_on_their_own_base_raise_no_doubt(zoo, tmp_path):
    recipe = recipe_over(adapters_of(zoo), "ties")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert "trained on" not in run_merge(tmp_path / "recipe.yaml", tmp_path / "out").stderr


def test_an_adapter_whose_targets_the_base_lacks_is_refused(zoo, tmp_path, capsys):
    foreign = make_model(tmp_path / "foreign", kind="gpt2")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        recipe_over({"base": str(foreign), "x": str(zoo["x"]), "y": str(foreign)}, "ties").to_yaml()
    )
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{zoo['x']}: the adapter changes 'model." in said
    assert f"which {foreign} lacks" in said
    assert not (tmp_path / "out").exists()


def test_the_hash_of_a_recipe_knows_content_and_not_place(zoo, tmp_path):
    recipe = recipe_over(adapters_of(zoo), "ties")
    one = pin(recipe, open_parents(recipe)).hash
    copied = adapters_of(zoo)
    for name in "xy":
        (tmp_path / name).mkdir()
        for file in zoo[name].iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        copied[name]["adapter"] = str(tmp_path / name)
    elsewhere = recipe_over(copied, "ties")
    assert pin(elsewhere, open_parents(elsewhere)).hash == one
    file = tmp_path / "x" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    assert pin(elsewhere, open_parents(elsewhere)).hash != one
    pinned = pin(recipe, open_parents(recipe))
    spoilt = pinned.model_copy(
        update={
            "models": {
                **pinned.models,
                "x": elsewhere.models["x"].model_copy(update={"sha256": pinned.models["x"].sha256}),
            }
        }
    )
    with pytest.raises(UserError, match=r"models\.x\.sha256: the recipe expects"):
        merge(spoilt, tmp_path / "out")


@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_live_models_get_the_bytes_of_the_export(zoo, tmp_path, method):
    recipe = recipe_over(adapters_of(zoo), method)
    checkpoints = open_parents(recipe)
    recipe = pin(recipe, checkpoints)
    materializer = Materializer(checkpoints, chunk=1000)
    for _ in range(2):
        model = materializer.materialize(recipe)
    exported = read(merge(recipe, tmp_path / "out", threads=2))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in exported.items())


def test_masks_of_random_methods_belong_to_the_adapted_content(zoo):
    parameters = {"weight": 0.5, "density": 0.5}
    body = {"method": "dare_linear", "base": "base", "inputs": ["x", "y"], "parameters": parameters}
    recipe = Recipe.from_dict({"models": adapters_of(zoo), "merges": {"merged": body}})
    checkpoints = open_parents(recipe)
    experts = plan_merge(recipe, checkpoints).jobs[0].masks.experts
    assert experts == (checkpoints["x"].sha256, checkpoints["y"].sha256)


def test_an_adapter_of_another_base_is_told(zoo, tmp_path):
    other = make_model(tmp_path / "other", hidden=64)
    models = {"base": str(other), "x": str(zoo["x"]), "y": str(zoo["y"])}
    with pytest.raises(CheckpointError, match=r"x: .* in .*other; the adapter was trained on .*base$"):
        merge(recipe_over(models, "ties"), tmp_path / "out")


def test_a_stream_gives_what_the_whole_tensor_has(zoo):
    checkpoint = open_parents(recipe_over(adapters_of(zoo), "ties"))["x"]
    name = "model.layers.1.mlp.down_proj.weight"
    whole = checkpoint.tensor(name).view(-1)
    stream = StreamedTensor(checkpoint, name, Arena(), 0)
    for part in (slice(0, 7), slice(5, 1700), slice(1000, whole.numel())):
        assert torch.equal(stream[part], whole[part])
    with pytest.raises(ValueError, match="consecutive"):
        stream[::3]
