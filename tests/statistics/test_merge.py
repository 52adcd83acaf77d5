"""Merging with fisher, regmean and regmean++ from a recipe to a folder, against the same done by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from evomerge.checkpoints.names import parse
from evomerge.errors import CheckpointError, UserError
from evomerge.merging import Materializer, merge, open_parents, pin, plan_merge
from evomerge.merging.binding import bind
from evomerge.recipe import Recipe, load_recipe
from tests.adapters import make_adapter
from tests.merging.helpers import digests, make_recipe, read, read64, rewrite
from tests.merging.speakers import BYTES, EMBEDDING, HEAD, SPECIAL, write_model, write_tokenizer
from tests.models import make_model
from tests.statistics.helpers import encode, inputs_of, load, mean_squares, write_texts

TEXTS = {
    "a": ["one and one is two", "three and four make seven", "ten"],
    "b": ["a cat sat on a mat", "dogs bark at night, and cats do not", "birds", "x"],
}
METHODS = ("fisher", "regmean", "regmean++")
ALPHA, RIDGE = 0.7, 1e-4


def make_parents(folder: Path, kind: str = "llama", **options: Any) -> dict[str, Path]:
    """Write two experts that differ much, and their texts."""
    options = {"layers": 3, "kind": kind, **options}
    models = {name: make_model(folder / name, seed=k + 1, **options) for k, name in enumerate("ab")}
    for name, texts in TEXTS.items():
        write_texts(folder / f"{name}.jsonl", texts)
    return models


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_parents(tmp_path_factory.mktemp("parents"))


def recipe_of(
    models: dict[str, Path], method: str, *, data: dict[str, Any] | None = None, **parameters: Any
) -> Recipe:
    folder = next(iter(models.values())).parent
    texts = {name: str(folder / f"{name}.jsonl") for name in models}
    return make_recipe(
        models,
        merge={
            "method": method,
            "inputs": list(models),
            "data": {"texts": texts, **(data or {})},
            "parameters": parameters,
        },
    )


def solve(weights: list[np.ndarray], grams: list[np.ndarray], shares: tuple[float, ...]) -> np.ndarray:
    """(Σ w W Ĝ) (Σ w Ĝ)⁻¹ with NumPy, weights as (out, in)."""
    total = sum(s * g for s, g in zip(shares, grams, strict=True))
    ridge = RIDGE * np.trace(total) / sum(shares) / len(total)
    damped = [ALPHA * g + (1 - ALPHA) * np.diag(np.diag(g)) + ridge * np.eye(len(g)) for g in grams]
    right = sum(s * w @ g for s, w, g in zip(shares, weights, damped, strict=True))
    left = sum(s * g for s, g in zip(shares, damped, strict=True))
    return np.linalg.solve(left, right.T).T


def merge_linears(
    models: list[Any], rows: list[dict[str, torch.Tensor]], shares: tuple[float, ...], layer: int | None
) -> dict[str, torch.Tensor]:
    """Return the merged weights of one layer's (or all layers') linear modules."""
    merged = {}
    modules = [dict(model.named_modules()) for model in models]
    for name, module in modules[0].items():
        position = parse(f"{name}.weight").position
        if not isinstance(module, torch.nn.Linear | Conv1D) or not isinstance(position, int):
            continue
        if layer not in (None, position):
            continue
        turned = isinstance(module, Conv1D)
        own = [m[name].weight.detach().double().numpy() for m in modules]
        grams = [(x[name].T @ x[name] / len(x[name])).numpy() for x in rows]
        solved = solve([w.T if turned else w for w in own], grams, shares)
        merged[f"{name}.weight"] = torch.from_numpy(solved.T if turned else solved)
    return merged


def mean(models: list[Any], shares: tuple[float, ...]) -> dict[str, torch.Tensor]:
    states = [model.state_dict() for model in models]
    return {
        name: sum(s * state[name].double() for s, state in zip(shares, states, strict=True)) / sum(shares)
        for name in states[0]
    }


def compare(merged: Path, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, tensor in read64(merged).items():
        scale = float(expected[name].abs().max())
        assert float((tensor - expected[name].double()).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_regmean_is_what_the_formula_gives(tmp_path: Path, kind: str) -> None:
    models = make_parents(tmp_path, kind, layers=2)
    shares = (1.0, 2.0)
    recipe = recipe_of(
        models, "regmean", weight=dict(zip("ab", shares, strict=True)), alpha=ALPHA, ridge=RIDGE
    )
    out = merge(recipe, tmp_path / "out")
    loaded = [load(path) for path in models.values()]
    rows = [inputs_of(m, encode(models[name], TEXTS[name])) for m, name in zip(loaded, models, strict=True)]
    compare(out, mean(loaded, shares) | merge_linears(loaded, rows, shares, None), 1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_regmean_plus_plus_runs_on_the_merged_layers_below(tmp_path: Path, kind: str) -> None:
    models = make_parents(tmp_path, kind)
    shares = (1.0, 0.5)
    recipe = recipe_of(
        models, "regmean++", weight=dict(zip("ab", shares, strict=True)), alpha=ALPHA, ridge=RIDGE
    )
    out = merge(recipe, tmp_path / "out")

    loaded = [load(path) for path in models.values()]
    merged = mean(loaded, shares)
    for layer in range(3):
        # Whole forward passes of each expert with everything below the layer replaced by the merge.
        hybrids, rows = [], []
        for name, path in models.items():
            hybrid = load(path)
            below = {
                key: tensor.float()
                for key, tensor in merged.items()
                if (position := parse(key).position) == "pre"
                or (isinstance(position, int) and position < layer)
            }
            hybrid.load_state_dict(below, strict=False)
            hybrids.append(load(path))
            rows.append(inputs_of(hybrid, encode(path, TEXTS[name])))
        merged |= merge_linears(hybrids, rows, shares, layer)
    compare(out, merged, 1e-3)
    plain = merge(recipe_of(models, "regmean", alpha=ALPHA, ridge=RIDGE), tmp_path / "plain")
    key = next(name for name in merged if "2" in name and "mlp" in name and name.endswith("proj.weight"))
    assert not torch.allclose(read64(out)[key], read64(plain)[key], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher_is_what_the_formula_gives(parents: dict[str, Path], tmp_path: Path, normalize: bool) -> None:
    out = merge(recipe_of(parents, "fisher", normalize=normalize, floor=1e-3), tmp_path / "out")
    loaded = [load(path) for path in parents.values()]
    fishers = [
        mean_squares(m, encode(parents[name], TEXTS[name])) for m, name in zip(loaded, parents, strict=True)
    ]
    squares = [
        float(torch.cat([f.reshape(-1) for f in fisher.values()]).square().mean()) for fisher in fishers
    ]
    units = [np.sqrt(s if normalize else np.mean(squares)) for s in squares]
    states = [model.state_dict() for model in loaded]
    expected = {}
    for name in fishers[0]:
        weights = [(f[name] / u).clamp(min=1e-3) for f, u in zip(fishers, units, strict=True)]
        total = sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
        expected[name] = total / sum(weights)
    compare(out, expected, 2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_output_loads_and_equals_the_live_model(
    parents: dict[str, Path], tmp_path: Path, method: str
) -> None:
    recipe = recipe_of(parents, method)
    out = merge(recipe, tmp_path / "out")
    load(out)
    checkpoints = open_parents(recipe)
    pinned = pin(recipe, checkpoints)
    live = bind(Materializer(checkpoints).materialize(pinned), plan_merge(pinned, checkpoints))
    assert digests({name: tensor.data for name, tensor in live.items()}) == digests(read(out))


@pytest.mark.parametrize("method", METHODS)
def test_the_written_recipe_makes_the_same_bytes_from_fresh_statistics(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    out = merge(recipe_of(parents, method), tmp_path / "out")
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "empty cache"))
    recipe = load_recipe(out / "evomerge_recipe.yaml")
    assert all(text.sha256 for text in recipe.main.data.texts.values())
    again = merge(recipe, tmp_path / "again", threads=3)
    assert digests(read(again)) == digests(read(out))


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_kept_and_used_again(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    told: list[str] = []
    recipe = recipe_of(parents, method)
    one = merge(recipe, tmp_path / "one", report=lambda what, done, total: told.append(what))
    assert told
    told.clear()
    other = merge(recipe, tmp_path / "two", report=lambda what, done, total: told.append(what))
    assert not told
    assert digests(read(one)) == digests(read(other))


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_other_parameters_need_no_new_statistics(
    parents: dict[str, Path], tmp_path: Path, method: str
) -> None:
    merge(recipe_of(parents, method), tmp_path / "one")
    told: list[str] = []
    merge(
        recipe_of(parents, method, weight={"a": 0.3, "b": 1.0}),
        tmp_path / "two",
        report=lambda what, done, total: told.append(what),
    )
    assert not told


def test_a_merge_with_kept_statistics_does_without_the_code_that_runs_models(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(parents, "regmean")
    merge(recipe, tmp_path / "one")
    monkeypatch.setitem(sys.modules, "evomerge.statistics.collect", None)
    monkeypatch.delattr("evomerge.statistics.collect")
    merge(recipe, tmp_path / "two")
    assert digests(read(tmp_path / "one")) == digests(read(tmp_path / "two"))
    with pytest.raises(ImportError):
        merge(recipe_of(parents, "fisher"), tmp_path / "three")


def test_paths_of_texts_are_relative_to_the_recipe(tmp_path: Path) -> None:
    models = make_parents(tmp_path, layers=1)
    assert models
    (tmp_path / "recipe.yaml").write_text(
        "evomerge: 1\nmodels: {a: ./a, b: ./b}\n"
        "merges: {m: {method: regmean, inputs: [a, b], data: {texts: ./a.jsonl, samples: 2}}}\n"
    )
    out = merge(tmp_path / "recipe.yaml", tmp_path / "out")
    assert (out / "model.safetensors").is_file()


def test_methods_with_and_without_data_mix_by_rule(parents: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(parents, "regmean++")
    rules = [{"layers": [0], "method": "linear"}, {"layers": [2], "method": "fisher"}]
    mixed = recipe.to_dict()
    mixed["merges"]["merged"]["rules"] = rules
    mixed["merges"]["merged"]["parameters"] = {"weight": 1.0}
    out = read64(merge(Recipe.from_dict(mixed), tmp_path / "out"))
    loaded = [read64(path) for path in parents.values()]
    name = "model.layers.{}.mlp.down_proj.weight"
    torch.testing.assert_close(
        out[name.format(0)], sum(m[name.format(0)] for m in loaded) / 2, rtol=1e-5, atol=1e-6
    )
    fisher = read64(merge(recipe_of(parents, "fisher"), tmp_path / "fisher"))
    assert torch.equal(out[name.format(2)], fisher[name.format(2)])
    assert not torch.allclose(out[name.format(1)], sum(m[name.format(1)] for m in loaded) / 2)


def test_experts_without_tokens_are_averaged_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = make_parents(tmp_path, "qwen3_moe", layers=1, num_experts=8, num_experts_per_tok=1)
    for name in models:
        write_texts(tmp_path / f"{name}.jsonl", ["xy"])
    out = read64(merge(recipe_of(models, "regmean"), tmp_path / "out"))
    assert "experts that saw no token of the texts are averaged" in caplog.text
    loaded = [read64(path) for path in models.values()]
    averaged = [
        name
        for name in out
        if ".experts." in name and torch.allclose(out[name], sum(m[name] for m in loaded) / 2, atol=1e-6)
    ]
    assert len(averaged) >= 3 * 4


@pytest.mark.parametrize("method", METHODS)
def test_identical_experts_give_that_expert(tmp_path: Path, method: str) -> None:
    models = make_parents(tmp_path, layers=1)
    models["b"] = models["a"]
    out = merge(recipe_of(models, method), tmp_path / "out")
    assert digests(read(out)) == digests(read(models["a"]))


def test_the_hash_covers_texts_and_settings_but_not_where_the_file_is(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    def hashed(method: str = "regmean", **data: Any) -> str:
        recipe = recipe_of(parents, method)
        plain = recipe.to_dict()
        plain["merges"]["merged"]["data"] |= data
        recipe = Recipe.from_dict(plain)
        return pin(recipe, open_parents(recipe)).hash

    first = hashed()
    moved = {}
    for name in parents:
        moved[name] = str(tmp_path / f"moved_{name}")
        Path(moved[name]).write_bytes((parents["a"].parent / f"{name}.jsonl").read_bytes())
    assert hashed(texts=moved) == first
    assert len({first, hashed(samples=2), hashed(max_length=9), hashed(texts=moved["a"])}) == 4
    assert hashed(labels="sampled") == first
    assert hashed("fisher", labels="sampled") != hashed("fisher")


def test_data_that_no_method_needs_changes_no_hash(parents: dict[str, Path]) -> None:
    with_data = recipe_of(parents, "linear", weight=1.0)
    plain = with_data.to_dict()
    del plain["merges"]["merged"]["data"]
    checkpoints = open_parents(with_data)
    assert pin(with_data, checkpoints).hash == pin(Recipe.from_dict(plain), checkpoints).hash


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"merges\.merged: regmean needs data for every input; add e\.g\. data: \{texts: "),
        ({"texts": {"a": "x"}}, r"merges\.merged\.data\.texts: the input 'b' has none"),
        ({"texts": {"a": "x", "b": "y", "q": "z"}}, r"data\.texts: 'q' is not an input of the merge"),
        ({"texts": "x", "sample": 3}, r"unknown key 'sample' \(did you mean 'samples'\?\)"),
        ({"texts": "x", "samples": 0}, "samples: 0 is not accepted"),
        ({"texts": "x", "max_length": 1}, "max_length: 1 is not accepted"),
        ({"texts": "x", "labels": "true"}, "labels: 'true' is not accepted"),
        ({"key": "x"}, "texts: this key is required"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    parents: dict[str, Path], data: dict[str, Any] | None, message: str
) -> None:
    plain = recipe_of(parents, "regmean").to_dict()
    plain["merges"]["merged"]["data"] = data
    if data is None:
        del plain["merges"]["merged"]["data"]
    with pytest.raises(UserError, match=message):
        Recipe.from_dict(plain)


def test_regmean_plus_plus_does_not_go_with_a_path(parents: dict[str, Path]) -> None:
    plain = recipe_of(parents, "regmean++").to_dict()
    plain["path"] = [{"merge": "merged", "layer": 0}]
    with pytest.raises(UserError, match=r"regmean\+\+ merges all layers in order; leave out 'path'"):
        Recipe.from_dict(plain)


def test_other_texts_than_the_pinned_ones_are_refused(tmp_path: Path) -> None:
    models = make_parents(tmp_path, layers=1)
    out = merge(recipe_of(models, "regmean"), tmp_path / "out")
    write_texts(tmp_path / "a.jsonl", ["something else"])
    with pytest.raises(UserError, match=r"a\.jsonl: the recipe expects the sha256"):
        merge(out / "evomerge_recipe.yaml", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_weights_that_are_not_finite_are_told_before_anything_is_run(tmp_path: Path) -> None:
    models = make_parents(tmp_path, layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    damaged = read(models["b"])[name]
    damaged[0, 0] = float("nan")
    rewrite(models["b"], {name: damaged})
    with pytest.raises(CheckpointError, match="has 1 NaN values"):
        merge(recipe_of(models, "fisher"), tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_overflow_are_told(tmp_path: Path, method: str) -> None:
    models = make_parents(tmp_path, layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(models["b"], {name: 1e38 * read(models["b"])[name].sign()})
    with pytest.raises(CheckpointError, match="not finite"):
        merge(recipe_of(models, method), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_statistics_are_told(parents: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("EVOMERGE_CACHE", str(cache))
    recipe = recipe_of(parents, "regmean")
    merge(recipe, tmp_path / "one")
    folders = list((cache / "statistics").iterdir())
    assert len(folders) == 2
    (folders[0] / "about.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not describe statistics; remove the folder"):
        merge(recipe, tmp_path / "two")


def test_the_command_tells_what_it_does(parents: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    from evomerge.cli import main

    (tmp_path / "recipe.yaml").write_text(recipe_of(parents, "regmean").to_yaml())
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "Gram matrices of a: 100 %" in captured.err
    assert captured.out.strip() == str(tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["model_type"] == "llama"


def test_statistics_computed_ahead_are_found_by_the_merge(
    parents: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    from evomerge.cli import main

    for name, path in parents.items():
        texts = str(path.parent / f"{name}.jsonl")
        assert main(["statistics", str(path), "--data", texts, "--kind", "gram"]) == 0
        captured = capsys.readouterr()
        assert Path(captured.out.strip()).is_dir()
        assert f"Gram matrices of {name}: 100 %" in captured.err
    told: list[str] = []
    merge(recipe_of(parents, "regmean"), tmp_path / "out", report=lambda what, done, total: told.append(what))
    assert not told


def test_the_statistics_command_tells_mistakes(parents: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    from evomerge.cli import main

    texts = str(parents["a"].parent / "a.jsonl")
    (tmp_path / "taken").mkdir()
    for arguments, message in (
        (["--out", str(tmp_path / "taken")], "exists already; name a new folder"),
        (["--samples", "0"], "samples: 0 is not accepted: give a number greater than 0"),
        (["--key", "texts"], "line 1: has no key 'texts' (did you mean 'text'?)"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    ):
        assert main(["statistics", str(parents["a"]), "--data", texts, "--kind", "fisher", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_run_as_the_models_that_they_make(tmp_path: Path, method: str) -> None:
    base = make_model(tmp_path / "base", seed=1, layers=2)
    recipe: dict[str, Any] = {"models": {}, "merges": {}}
    written = {}
    for k, name in enumerate("ab"):
        adapter = make_adapter(tmp_path / f"lora_{name}", base, k + 1, r=4)
        source = {"source": str(base), "adapter": str(adapter)}
        recipe["models"][name] = source
        copy = {"method": "linear", "inputs": [name], "parameters": {"weight": 1.0}}
        written[name] = merge(
            Recipe.from_dict({"models": {name: source}, "merges": {"m": copy}}), tmp_path / name
        )
        write_texts(tmp_path / f"{name}.jsonl", TEXTS[name])
    whole = recipe_of(written, method)
    recipe["merges"] = whole.to_dict()["merges"]
    low = read(merge(Recipe.from_dict(recipe), tmp_path / "low"))
    assert digests(low) == digests(read(merge(whole, tmp_path / "whole")))


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_other_vocabularies_are_matched_by_token(tmp_path: Path, method: str) -> None:
    orders = {"a": [*SPECIAL, *BYTES], "b": [*reversed(BYTES), *SPECIAL]}
    ids = {name: write_tokenizer(tmp_path / name, order=order) for name, order in orders.items()}
    models = {name: write_model(tmp_path / name, ids[name], seed) for seed, name in enumerate("ab")}
    for name in "ab":
        write_texts(tmp_path / f"{name}.jsonl", TEXTS[name])
    # The second model once more, in the order of the first one's tokens: the merge has to be the same.
    sorted_b = write_model(tmp_path / "b2", ids["a"], 1)
    write_tokenizer(sorted_b, order=orders["a"])
    rows = [ids["b"][token] for token, _ in sorted(ids["a"].items(), key=lambda item: item[1])]
    weights = read(models["b"])
    rewrite(sorted_b, {**weights, EMBEDDING: weights[EMBEDDING][rows], HEAD: weights[HEAD][rows]})
    write_texts(tmp_path / "b2.jsonl", TEXTS["b"])
    short = {"max_length": 48}
    aligned = read64(merge(recipe_of(models, method, data=short), tmp_path / "aligned"))
    plain = read64(
        merge(recipe_of({"a": models["a"], "b2": sorted_b}, method, data=short), tmp_path / "plain")
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(aligned[name], tensor, rtol=1e-3, atol=1e-4)
