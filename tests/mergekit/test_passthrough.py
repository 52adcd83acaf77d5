"""The frankenmerges that people publish: the bytes of `evomerge merge` are those of mergekit 0.1.5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from evomerge.cli import main
from evomerge.mergekit import from_mergekit, to_mergekit
from evomerge.merging import merge, open_parents
from tests.mergekit.conftest import Family, Peer
from tests.merging.helpers import digests, make_recipe, read
from tests.models import VOCAB, make_model

IDS = torch.randint(3, VOCAB - 3, (1, 9), generator=torch.Generator().manual_seed(0))


def slices(*ranges: tuple[str, int, int], **parameters: Any) -> list[dict[str, Any]]:
    return [{"sources": [{"model": m, "layer_range": [i, j], **parameters}]} for m, i, j in ranges]


# Every second slice begins where the other model's ends or before, as in alpindale/goliath-120b.
GOLIATH = slices(
    *(("xwin", 0, 16), ("euryale", 8, 24), ("xwin", 17, 32), ("euryale", 25, 40), ("xwin", 33, 48)),
    *(("euryale", 41, 56), ("xwin", 49, 64), ("euryale", 57, 72), ("xwin", 65, 80)),
)
SILENT = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
LAYOUTS: dict[str, tuple[str, int, list[dict[str, Any]], int]] = {
    "depth up-scaling, upstage/SOLAR-10.7B": ("mistral", 32, slices(("a", 0, 24), ("a", 8, 32)), 48),
    "interleaving, alpindale/goliath-120b": ("llama", 80, GOLIATH, 137),
    "layers removed": ("llama", 32, slices(("a", 0, 21), ("a", 29, 32)), 24),
    "one layer three times": ("gemma2", 6, slices(("a", 0, 4), *[("a", 3, 4)] * 2, ("a", 4, 6)), 8),
    "slices scaled as a whole": (
        "llama", 8, [*slices(("a", 0, 5)), *slices(("b", 3, 5), parameters={"scale": 0.7}), *slices(("a", 5, 8))], 10,
    ),
    "new layers that add nothing at first": (
        "llama", 6, [*slices(("a", 0, 3)), *slices(("a", 2, 3), parameters={"scale": SILENT}), *slices(("a", 3, 6))], 7,
    ),
    "scales by tensor, negative, of two models": (
        "mistral", 6, [
            *slices(("a", 0, 3)),
            *slices(("b", 2, 4), parameters={"scale": [{"filter": "o_proj", "value": -0.3}, {"value": [1.0, 1.5]}]}),
            *slices(("a", 4, 6), parameters={"scale": [{"filter": "input_layernorm", "value": -1.0}]}),
        ], 7,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[tuple[str, int, str], Path] = {}

    def of(kind: str, layers: int) -> Family:
        options = {"kind": kind, "layers": layers, "hidden": 16, "dtype": torch.bfloat16, "tokenizer": False}
        if kind == "llama" and layers == 80:
            names: tuple[str, ...] = ("xwin", "euryale")
        else:
            names = ("a", "b")
        for seed, name in enumerate(names):
            if (kind, layers, name) not in made:
                folder = tmp_path_factory.mktemp(f"{kind}-{layers}-{name}")
                made[kind, layers, name] = make_model(folder / name, seed, **options)
        return {name: made[kind, layers, name] for name in names}

    return of


def document(layout: list[dict[str, Any]], family: Family) -> dict[str, Any]:
    def place(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: str(family[item]) if key == "model" else place(item) for key, item in node.items()}
        return [place(item) for item in node] if isinstance(node, list) else node

    return {"slices": place(layout), "merge_method": "passthrough", "dtype": "bfloat16"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_bytes_are_those_of_mergekit(name, models, peer: Peer, tmp_path):
    kind, depth, layout, hops = LAYOUTS[name]
    data = document(layout, models(kind, depth))
    file = tmp_path / "mergekit.yaml"
    file.write_text(yaml.safe_dump(data))
    assert main(["merge", str(file), str(tmp_path / "ours")]) == 0
    ours = read(tmp_path / "ours")
    if kind == "gemma2":
        # It writes the weights before it finds that the config's `layer_types` have the old length.
        with pytest.raises(StrictDataclassError, match="num_hidden_layers"):
            peer(data, tmp_path / "theirs")
        assert digests(ours) == digests(read(tmp_path / "theirs"))
        return
    theirs = peer(data, tmp_path / "theirs")
    if name == "new layers that add nothing at first":
        # A scale of 0 leaves it the signs of negative weights: −0.
        theirs = {name: tensor + 0.0 for name, tensor in theirs.items()}
        ours = {name: tensor + 0.0 for name, tensor in ours.items()}
    assert digests(ours) == digests(theirs)

    recipe = from_mergekit(data).recipe
    assert len(recipe.path) == hops
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")]
    assert [config["num_hidden_layers"] for config in configs] == [hops, hops]
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_written_for_mergekit_and_read_again_it_is_the_same(name, models, tmp_path):
    kind, depth, layout, _ = LAYOUTS[name]
    recipe = from_mergekit(document(layout, models(kind, depth))).recipe
    written = to_mergekit(recipe, open_parents(recipe))
    assert written.notes == ()
    again = from_mergekit(yaml.safe_load(written.to_yaml())).recipe
    one, other = (merge(r, tmp_path / n, threads=1) for r, n in ((recipe, "one"), (again, "other")))
    assert digests(read(one)) == digests(read(other))
    if "scale" not in str(layout):
        assert again.path == recipe.path
        assert [piece["sources"][0]["layer_range"] for piece in written.document["slices"]] == _joined(layout)


def _joined(layout: list[dict[str, Any]]) -> list[list[int]]:
    """The layout's ranges; neighbours that go on in one model are one."""
    found: list[tuple[str, list[int]]] = []
    for piece in layout:
        source = piece["sources"][0]
        first, end = source["layer_range"]
        if found and found[-1][0] == source["model"] and found[-1][1][1] == first:
            found[-1][1][1] = end
        else:
            found.append((source["model"], [first, end]))
    return [span for _, span in found]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_residual_scales_of_a_recipe_reach_mergekit_as_scales_of_tensors(kind, models, peer: Peer, tmp_path):
    family = models(kind, 6)
    hops = [("a", 0, 1.0), ("b", 1, 0.8), ("b", 1, -1.5), ("b", 2, 1.0), ("a", 3, 1.2), ("a", 5, -0.5)]
    path = [{"model": name, "layer": layer, "scale": scale} for name, layer, scale in hops]
    recipe = make_recipe(family, path=path)
    written = to_mergekit(recipe, open_parents(recipe))
    assert written.notes == ()
    data = yaml.safe_load(written.to_yaml())
    ours = digests(read(merge(recipe, tmp_path / "ours", threads=1)))
    assert digests(peer(data, tmp_path / "theirs")) == ours
    assert digests(read(merge(from_mergekit(data).recipe, tmp_path / "back", threads=1))) == ours
