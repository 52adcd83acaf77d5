"""The same mergekit YAML, merged by mergekit 0.1.5 and by us, gives the same tensors up to one bfloat16 step.

Every document gets ``dtype: float32, out_dtype: bfloat16``. In them ``base``, ``a``, ``b``, ``c`` stand for
the models of a family.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge.mergekit import from_mergekit
from evomerge.merging import merge
from tests.merging.helpers import read
from tests.models import make_model

Family = dict[str, Path]
Merge = Callable[[str, Family, Path], dict[str, torch.Tensor]]

SHARE = 0.999


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_relatives(folder: Path, **options: Any) -> Family:
    """Write a base and three experts whose task vectors have a large common part, as those of fine-tunes have."""
    options |= {"hidden": 16, "layers": 4, "tokenizer": False}
    base = make_model(folder / "base", seed=1, **options)
    common = make_model(folder / "common", seed=2, base=base, noise=0.03, **options)
    experts = {
        name: make_model(folder / name, seed=10 + i, base=common, noise=0.015, **options)
        for i, name in enumerate("abc")
    }
    return {"base": base, **experts}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def family(kind: str) -> Family:
        if kind not in made:
            name, _, variant = kind.partition(" ")
            made[kind] = make_relatives(tmp_path_factory.mktemp(name), kind=name, tied=variant == "tied")
        return made[kind]

    return family


@pytest.fixture(scope="module")
def peer() -> Merge:
    """Merge by mergekit, in this process."""
    config = pytest.importorskip("mergekit.config")
    run_merge = pytest.importorskip("mergekit.merge").run_merge
    options = pytest.importorskip("mergekit.options").MergeOptions

    def merge_(text: str, family: Family, out: Path) -> dict[str, torch.Tensor]:
        logging.disable(logging.CRITICAL)
        try:
            run_merge(
                config.MergeConfiguration.model_validate(document(text, family)),
                str(out),
                options(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0),
            )
        finally:
            logging.disable(logging.NOTSET)
        return read(out)

    return merge_


def document(text: str, family: Family) -> dict[str, Any]:
    """Parse a YAML and put the family's folders in place of the models' names."""

    def place(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                key: str(family[item]) if key in ("model", "base_model") and item in family else place(item)
                for key, item in node.items()
            }
        return [place(item) for item in node] if isinstance(node, list) else node

    return {"dtype": "float32", "out_dtype": "bfloat16", **place(yaml.safe_load(text))}


def ours(text: str, family: Family, out: Path) -> dict[str, torch.Tensor]:
    return read(merge(from_mergekit(document(text, family)).recipe, out, threads=1))


def steps(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the distance of two bfloat16 tensors in steps between neighbouring numbers."""
    order = [t.view(torch.int16).int() for t in (x, y)]
    order = [torch.where(t < 0, -(t & 0x7FFF), t) for t in order]
    return (order[0] - order[1]).abs()


def agree(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    near, count = 0, 0
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype == torch.bfloat16, name
        assert tensor.shape == two[name].shape, name
        close = steps(tensor, two[name]) <= 1
        assert close.float().mean() > 0.98, f"{name}: {int((~close).sum())} of {close.numel()} differ"
        near += int(close.sum())
        count += tensor.numel()
    assert near >= SHARE * count


GOLDEN: dict[str, str] = {
    "linear": """
        models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.9}}]
        merge_method: linear
        """,
    "linear, not normalized, one weight for all, base listed": """
        models: [{model: a}, {model: base}, {model: c}]
        base_model: base
        merge_method: linear
        parameters: {weight: 0.4, normalize: false}
        """,
    "linear, base not listed counts as a model": """
        models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2}}]
        base_model: base
        merge_method: linear
        parameters: {weight: 0.5}
        """,
    "linear, gradients of several lengths, negative weights": """
        models:
        - {model: a, parameters: {weight: [0, 1]}}
        - {model: b, parameters: {weight: [1.5, -0.2, 0.3, 0.7, 1]}}
        - {model: c, parameters: {weight: [0.25]}}
        merge_method: linear
        """,
    "linear, filters on embedding, norm and head": """
        models:
        - model: a
          parameters:
            weight:
            - {filter: embed_tokens, value: 1}
            - {filter: lm_head, value: 0.2}
            - {filter: model.norm, value: 0.9}
            - {filter: layernorm, value: [1, 0]}
            - {value: [0.1, 0.5, 0.2]}
        - model: b
          parameters: {weight: [{filter: mlp, value: 1.0}, {filter: "*", value: 0.5}]}
        merge_method: linear
        parameters: {normalize: [{filter: q_proj, value: false}, {value: true}]}
        """,
    "linear, filters that fall through to the top": """
        models:
        - {model: a, parameters: {weight: [{filter: "layers.2.", value: 3}]}}
        - {model: b}
        merge_method: linear
        parameters: {weight: [{filter: self_attn, value: [0.5, 1]}, {filter: null, value: 1e-1}]}
        """,
    "linear, modules and words for numbers": """
        modules:
          default:
            models: [{model: a, parameters: {weight: "0.3"}}, {model: b}]
            parameters: {weight: "6e-1"}
        merge_method: linear
        parameters: {weight: 9.0, normalize: 0}
        """,
    "slerp": """
        models: [{model: base}, {model: a}]
        base_model: base
        merge_method: slerp
        parameters: {t: 0.3}
        """,
    "slerp, the published gradient with filters, base listed last": """
        slices:
        - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
        merge_method: slerp
        base_model: b
        parameters:
          t:
          - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
          - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
          - value: 0.5
        """,
    "slerp, base not listed": """
        models: [{model: c}]
        base_model: base
        merge_method: slerp
        parameters: {t: [0.2, 0.8]}
        """,
    "slerp, other layers of the second model, outside [0, 1]": """
        slices:
        - sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]
          parameters: {t: [{filter: mlp, value: 1.2}]}
        - sources: [{model: base, layer_range: [3, 4]}, {model: a, layer_range: [0, 1]}]
        merge_method: slerp
        base_model: base
        parameters: {t: [0.1, 0.6]}
        """,
    "task arithmetic": """
        models: [{model: a, parameters: {weight: 0.6}}, {model: b, parameters: {weight: -0.4}}, {model: base}]
        base_model: base
        merge_method: task_arithmetic
        parameters: {lambda: 0.7}
        """,
    "task arithmetic, normalized, weights that do nothing": """
        models:
        - {model: base, parameters: {weight: 7}}
        - {model: a, parameters: {weight: [0.5, 0.1], density: 0.5}}
        - {model: b, parameters: {weight: [0.2, 0.9]}}
        base_model: base
        merge_method: task_arithmetic
        parameters: {normalize: true, int8_mask: true}
        """,
    "task arithmetic by slices, each with parameters and base": """
        slices:
        - sources:
          - {model: base, layer_range: [0, 2]}
          - {model: a, layer_range: [0, 2], parameters: {weight: [0.1, 0.9]}}
          - {model: b, layer_range: [1, 3]}
          parameters: {weight: 0.3, lambda: [{filter: "layers.1.", value: 1.5}]}
        - sources:
          - {model: a, layer_range: [2, 4]}
          - {model: c, layer_range: [1, 3], parameters: {weight: -0.5}}
          - {model: b, layer_range: [0, 2], parameters: {weight: [{filter: "layers.0.", value: 2}, {value: 1}]}}
          base_model: a
        merge_method: task_arithmetic
        base_model: base
        parameters: {weight: 0.6, lambda: [0.5, 1]}
        """,
    "ties": """
        models:
        - {model: base}
        - {model: a, parameters: {weight: 0.5, density: 0.4}}
        - {model: b, parameters: {weight: 0.3, density: 0.7}}
        - {model: c, parameters: {weight: -0.2, density: 1.0}}
        base_model: base
        merge_method: ties
        parameters: {normalize: true, int8_mask: true}
        """,
    "ties, not normalized, rescaled, gradients of density and lambda": """
        models:
        - {model: a, parameters: {weight: 1, density: [1, 0.7, 0.13]}}
        - {model: b, parameters: {weight: [0, 0.3, 0.7, 1], density: [0.2, 0.6, 1]}}
        base_model: base
        merge_method: ties
        parameters: {normalize: false, rescale: true, lambda: [0.5, 1.5]}
        """,
    "ties, weights zero outside one model's layers": """
        models:
        - {model: a, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0}], density: 0.5}}
        - model: b
          parameters:
            weight: [{filter: norm, value: 0}, {filter: lm_head, value: 1}, {value: 0.8}]
            density: [{filter: self_attn, value: [0.2, 0.9]}, {value: 0.6}]
        base_model: base
        merge_method: ties
        """,
    "nuslerp": """
        models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: [0.2, 0.9]}}]
        merge_method: nuslerp
        """,
    "nuslerp of task vectors, row by row": """
        models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.5}}]
        base_model: base
        merge_method: nuslerp
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: [{filter: mlp, value: true}, {value: false}]}
        """,
    "multislerp": """
        models:
        - {model: a, parameters: {weight: 0.3}}
        - {model: b, parameters: {weight: [0.2, 0.9]}}
        - {model: c, parameters: {weight: 0.5}}
        merge_method: multislerp
        """,
    "multislerp of task vectors, not normalized": """
        models: [{model: a}, {model: base}, {model: b}]
        base_model: base
        merge_method: multislerp
        parameters: {weight: 0.4, normalize_weights: false}
        """,
    "karcher": """
        models: [{model: a}, {model: b}, {model: c}]
        merge_method: karcher
        parameters: {max_iter: 20, tol: 1e-6}
        """,
    "karcher, the base counts as a model": """
        models: [{model: a}, {model: b}]
        base_model: base
        merge_method: karcher
        """,
    "model stock": """
        models: [{model: a}, {model: b}, {model: c}]
        base_model: base
        merge_method: model_stock
        """,
    "model stock by rows of the weights, by slices": """
        slices:
        - sources:
          - &base {model: base, layer_range: [0, 3]}
          - &a {model: a, layer_range: [0, 3]}
          - &b {model: b, layer_range: [0, 3]}
        - sources: [*b, *a, *base]
          parameters: {filter_wise: false}
        base_model: base
        merge_method: model_stock
        parameters: {filter_wise: true}
        """,
}

KINDS = ("llama", "mistral", "qwen2", "llama tied")


@pytest.mark.parametrize("name", GOLDEN)
def test_the_tensors_are_those_of_mergekit(
    name: str, families: Callable[[str], Family], peer: Merge, tmp_path: Path
) -> None:
    family = families(KINDS[list(GOLDEN).index(name) % 3])
    text = GOLDEN[name]
    agree(ours(text, family, tmp_path / "ours"), peer(text, family, tmp_path / "peer"))
