"""What layer paths that begin alike share changes no bit of any answer."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.tokenizer import load_tokenizer
from evomerge.config import Engine as EngineConfig
from evomerge.engines import generation, hops
from evomerge.engines.hf_host import HFHost
from evomerge.evaluation.requests import Generation, Loglikelihood, Rolling
from evomerge.merging import open_parents, pin
from evomerge.recipe import Recipe
from evomerge.workers.queue import take
from evomerge.workers.work import Work
from tests.merging.helpers import make_recipe
from tests.models import make_model
from tests.searching.records import make_blocks

LAYERS = 4
BLOCK = make_blocks(1)[0]
EXAMPLES = "What all of these prompts begin with, longer than a window. "
PAIRS = tuple(
    Loglikelihood(EXAMPLES * (k % 2) + "abc" * k, " " + end) for k in (1, 4, 9) for end in ("yes", "no")
)
TEXTS = (
    Rolling("some text to be read, with more tokens than a window of the model has " * 3),
    Rolling("short"),
)
PROMPTS = tuple(Generation(f"{EXAMPLES}{'x' * i} question?", ("#", "qq"), 5 + 3 * (i % 3)) for i in range(6))
# Its weights run over the layers of it that a path has: the same layer is another one in another path.
MEAN = {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": {"a": 0.3, "b": [0.5, 0.9]}}}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tied": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "gemma2": WINDOWS,
    "gemma3_text": {**WINDOWS, "dtype": torch.bfloat16},
}


def random_paths(seed: int, count: int, sources: str = "abm") -> list[list[tuple[str, int, float]]]:
    """Return paths that branch off from each other anywhere, some with scales, some as long as they may be."""
    draw = random.Random(seed)
    paths = [[("a", layer, 1.0) for layer in range(LAYERS)]]
    while len(paths) < count:
        old = draw.choice(paths)
        keep = draw.randrange(1, len(old))
        rest = [
            (draw.choice(sources), draw.randrange(LAYERS), draw.choice((1.0, 1.0, 0.8, 1.25)))
            for _ in range(draw.randrange(4))
        ]
        paths.append([*old[:keep], *rest, ("a", LAYERS - 1, 1.0)])
    return paths


def recipe_of(models: dict[str, Path], path: list[tuple[str, int, float]]) -> Recipe:
    steps = [{"merge" if n == "m" else "model": n, "layer": i, "scale": scale} for n, i, scale in path]
    merges = {"m": MEAN} if any(name == "m" for name, _, _ in path) else {}
    recipe = make_recipe(models, path=steps, merges=merges)
    return pin(recipe, open_parents(recipe))


def everything(engine: Any) -> Any:
    return engine.loglikelihood(PAIRS), engine.loglikelihood_rolling(TEXTS), engine.generate(PROMPTS)


def readings(engine: Any) -> Any:
    return engine.loglikelihood(PAIRS), engine.loglikelihood_rolling(TEXTS)


class Searched:
    """Answers of paths as a worker gives them, in its order, and what its engine did.

    Attributes:
        most: bytes that were kept at once.
        computed, saved: layer evaluations.
    """

    def __init__(
        self, models: dict[str, Path], recipes: list[Recipe], ask: Any = everything, **settings: Any
    ) -> None:
        self.host = host_of(models, recipes, **settings)
        self.most = self.computed = self.saved = 0
        self.answers: dict[str, Any] = {}
        queue = deque(Work(r.hash, (r,), BLOCK) for r in {r.hash: r for r in recipes}.values())
        held = None
        while queue:
            work = take(queue, held)
            (held,) = work.recipes
            engine = self.host.hold(held, work.branches)
            before = self.host.layer_evaluations
            self.answers[held.hash] = ask(engine)
            after = self.host.layer_evaluations
            self.computed += after.computed - before.computed
            self.saved += after.saved - before.saved
            self.most = max(self.most, self.host._hops.nbytes)


def host_of(models: dict[str, Path], recipes: list[Recipe], **settings: Any) -> HFHost:
    engine = EngineConfig(device="cpu", batch_tokens=128, max_length=160, **settings)
    return HFHost(engine, open_parents(recipes[0]), load_tokenizer(models["a"]))


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    options = {"kind": request.param, "layers": LAYERS, **KINDS[request.param]}
    a = make_model(folder / "a", 1, **options)
    return {"a": a, "b": make_model(folder / "b", 2, base=a, noise=0.1, **options)}


def test_every_answer_is_the_one_that_a_path_gives_alone(family, monkeypatch):
    # Texts wait for others to end.
    monkeypatch.setitem(generation.ROWS, "cpu", 4)
    recipes = [recipe_of(family, path) for path in random_paths(3, 7)]
    alone = Searched(family, recipes, prefix_sharing=0)
    assert alone.saved == alone.most == 0
    shared = Searched(family, recipes)
    assert shared.answers == alone.answers
    assert shared.computed + shared.saved == alone.computed
    # Steps of generation are nobody else's; what is read is shared where two paths begin alike.
    assert shared.saved > 0.2 * alone.computed
    little = Searched(family, recipes, prefix_sharing=shared.most / 3e9)
    assert little.answers == alone.answers
    assert 0 < little.saved < shared.saved
    assert little.most <= shared.most / 3


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llamas")
    return {name: make_model(folder / name, seed) for seed, name in enumerate("ab")}


def test_each_different_beginning_is_computed_once_and_then_let_go(llamas):
    paths = random_paths(5, 20, "ab")
    recipes = [recipe_of(llamas, path) for path in paths]
    shared = Searched(llamas, recipes, readings)
    beginnings = {tuple(path[:hops]) for path in paths for hops in range(1, len(path) + 1)}
    whole = sum(len(path) for path in {tuple(path) for path in paths})
    assert len(beginnings) < 0.7 * whole
    assert shared.computed / (shared.computed + shared.saved) == len(beginnings) / whole
    assert shared.host._hops.nbytes == 0
    assert not shared.host._hops._uses


def test_merges_of_one_name_and_other_weights_share_nothing(llamas):
    path = [("m", 0, 1.0), ("m", 1, 1.0), ("a", 3, 1.0)]
    one = recipe_of(llamas, path)
    other = one.model_copy(
        update={"merges": {"m": one.merges["m"].model_copy(update={"parameters": {"weight": 0.5}})}}
    )
    host, alone = host_of(llamas, [one]), host_of(llamas, [one], prefix_sharing=0)
    for recipe in (one, other, one):
        assert everything(host.hold(recipe, [2, 3])) == everything(alone.hold(recipe))
    assert host.layer_evaluations.saved == 0
    everything(host.hold(one, [2]))
    saved = host.layer_evaluations.saved
    everything(host.hold(one, [2]))
    assert host.layer_evaluations.saved > saved


def test_a_path_may_be_the_beginning_of_another(llamas):
    short = [("a", 0, 1.0), ("b", 1, 1.0), ("a", 3, 1.0)]
    recipes = [recipe_of(llamas, path) for path in (short, [*short, ("a", 2, 1.0), ("a", 3, 1.0)], short[:2])]
    shared, alone = Searched(llamas, recipes), Searched(llamas, recipes, prefix_sharing=0)
    assert shared.answers == alone.answers
    assert shared.saved > 0


def test_an_engine_whose_layers_cannot_be_left_out_runs_them_all(llamas, monkeypatch):
    recipes = [recipe_of(llamas, path) for path in random_paths(3, 5)]
    alone = Searched(llamas, recipes, prefix_sharing=0)
    monkeypatch.setattr(hops._Known, "forward", lambda self, *inputs, **settings: 2 * self._output)
    broken = Searched(llamas, recipes)
    assert broken.answers == alone.answers
    assert (broken.computed, broken.saved) == (alone.computed, 0)


def test_a_model_without_a_path_is_one_too(llamas):
    path = recipe_of(llamas, [("a", 0, 1.0), ("a", 1, 1.0), ("b", 2, 1.0), ("a", 3, 1.0)])
    copy = make_recipe(llamas, merge={"method": "linear", "inputs": ["a"], "parameters": {"weight": 1.0}})
    host = host_of(llamas, [path])
    host.hold(path, ())
    readings(host.hold(pin(copy, open_parents(copy)), [2]))
    before = host.layer_evaluations
    readings(host.hold(path, ()))
    after = host.layer_evaluations
    assert after.saved - before.saved == after.computed - before.computed > 0


def test_the_budget_is_counted_in_gigabytes():
    assert hops.budget(EngineConfig(device="cpu")) == 10**9
    assert hops.budget(EngineConfig(device="cuda")) == 4 * 10**9
    assert hops.budget(EngineConfig(device="cpu", prefix_sharing=0.5)) == 5 * 10**8
    with pytest.raises(ValueError, match=r"prefix_sharing: 2 is not for vLLM"):
        EngineConfig(type="vllm", prefix_sharing=2)
