"""The vLLM engine, for real: weights swapped in place answer like weights read from disk, and like transformers."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.config import Engine, load_config
from evomerge.engines import open_host
from evomerge.engines.hf import HFEngine
from evomerge.errors import CandidateFailed, EngineLost, UserError
from evomerge.evaluation.requests import Generation, Loglikelihood, Rolling
from evomerge.merging import merge, open_parents, output_tokenizer, pin
from evomerge.recipe import Recipe
from evomerge.searching.run import resume, search
from tests.merging.helpers import make_recipe
from tests.models import make_family
from tests.searching.records import canonical
from tests.tasks import make_config, make_tasks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

OPTIONS: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16}
CHOICES = [
    Loglikelihood("What is it? " * count, answer)
    for count in (0, 1, 9, 40)
    for answer in ("yes", " no, not at all", "maybe")
]
TEXTS = [Rolling("the quick brown fox " * count) for count in (1, 5, 30)]
PROMPTS = [
    Generation("hello " * count, stops, 12) for count in (1, 3, 40) for stops in ((), ("e",), ("\n", "q"))
]
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied llama in bfloat16": ("llama", {"tied": True, "dtype": torch.bfloat16}),
    "tied qwen2": ("qwen2", {"tied": True}),
    "gemma3": ("gemma3_text", {"tied": True, **GEMMA}),
}


class Models:
    """A family of one kind, the recipes over it, and a host of each engine."""

    def __init__(self, folder: Path, kind: str, options: dict[str, Any]) -> None:
        self.family = make_family(folder, kind=kind, hidden=128, layers=2, **options)
        self.folder = folder
        self.dtype = options.get("dtype", torch.float32)
        recipe = self._unpinned(0.3)
        self.checkpoints = open_parents(recipe)
        self.tokenizer = output_tokenizer(recipe, self.checkpoints)

    def _unpinned(self, weight: float) -> Recipe:
        return make_recipe(
            self.family,
            merge={
                "method": "task_arithmetic",
                "base": "base",
                "inputs": ["a", "b", "c"],
                "parameters": {"weight": weight},
            },
        )

    def recipe(self, weight: float) -> Recipe:
        return pin(self._unpinned(weight), self.checkpoints)

    def host(self, engine: str = "vllm", *, max_length: int = 200) -> Any:
        settings = Engine(
            type=engine,  # type: ignore[arg-type]
            device="cpu",
            batch_tokens=512,
            max_length=max_length,
            options=OPTIONS if engine == "vllm" else {},
        )
        return open_host(settings, self.checkpoints, self.tokenizer)


def answers(engine: Any) -> Any:
    return engine.loglikelihood(CHOICES), engine.loglikelihood_rolling(TEXTS), engine.generate(PROMPTS)


def fresh_engine(models: Models, folder: Path, generation_config: Any = None) -> Any:
    """Start vLLM on a merged model on disk, the usual way."""
    from evomerge.engines.vllm import VLLMEngine

    return VLLMEngine(
        folder,
        models.tokenizer,
        generation_config=generation_config,
        dtype=models.dtype,
        device="cpu",
        batch_tokens=512,
        max_length=200,
        options=OPTIONS,
        load_format="safetensors",
    )


@pytest.fixture(scope="module", params=list(KINDS))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    kind, options = KINDS[request.param]
    return Models(tmp_path_factory.mktemp("models"), kind, dict(options))


@pytest.fixture(scope="module")
def host(models: Models) -> Iterator[Any]:
    host = models.host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def swapped(models: Models, host: Any) -> dict[float, Any]:
    """The answers of two recipes, swapped in place; back and forth they stay the same."""
    seen: dict[float, Any] = {}
    for weight in (0.3, 2.0, 0.3, -1.0, 2.0):
        started = time.perf_counter()
        engine = host.hold(models.recipe(weight))
        print(f"{weight}: held in {time.perf_counter() - started:.2f} s")
        found = answers(engine)
        assert seen.setdefault(weight, found) == found
    return seen


def test_scores_agree_with_the_hugging_face_engine(models: Models, swapped: dict[float, Any]) -> None:
    exact = models.dtype == torch.float32
    hf = models.host("hf")
    for weight, (choices, texts, generated) in swapped.items():
        expected, expected_texts, expected_generated = answers(hf.hold(models.recipe(weight)))
        for (mine, greedy), (its, its_greedy), request in zip(choices, expected, CHOICES, strict=True):
            assert mine == pytest.approx(its, **({"rel": 1e-5} if exact else {"abs": 0.5})), request
            assert greedy == its_greedy or not exact
        assert texts == pytest.approx(expected_texts, rel=1e-5 if exact else 5e-3)
        if exact:
            assert generated == expected_generated


def test_a_swapped_engine_answers_like_a_fresh_one(
    models: Models, swapped: dict[float, Any], host: Any, tmp_path: Path
) -> None:
    host.close()
    for weight in (2.0, -1.0):
        folder = merge(models.recipe(weight), tmp_path / f"merged{weight}")
        fresh = fresh_engine(models, folder)
        found = answers(fresh)
        fresh.close()
        assert found == swapped[weight]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("llama"), "llama", {})


@pytest.fixture
def held(llama: Models) -> Iterator[Any]:
    host = llama.host()
    yield host
    host.close()


def test_a_prefix_cache_that_is_not_emptied_is_noticed(llama: Models, held: Any) -> None:
    engine = held.hold(llama.recipe(0.3))
    engine.forget = lambda: None
    with pytest.raises(EngineLost, match="prefix cache that other weights have filled"):
        held.hold(llama.recipe(2.0))
    assert held.hold(llama.recipe(2.0)) is not engine, "an engine that is lost is not asked again"


def test_a_prefix_cache_that_cannot_be_emptied_is_a_loss(llama: Models, held: Any) -> None:
    engine = held.hold(llama.recipe(0.3))
    engine._llm.reset_prefix_cache = lambda: False
    with pytest.raises(EngineLost, match="does not empty its prefix cache"):
        engine.generate(PROMPTS)


def test_weights_that_are_not_finite_fail_their_candidate_only(llama: Models, held: Any) -> None:
    before = answers(held.hold(llama.recipe(0.3)))
    # So large that the merged weights are infinite, after the first tensors.
    with pytest.raises(CandidateFailed, match="the merged weights are not finite"):
        held.hold(llama.recipe(1e39))
    assert answers(held.hold(llama.recipe(0.3))) == before
    # Finite weights whose logits are not.
    with pytest.raises(CandidateFailed, match="a logit is not finite"):
        held.hold(llama.recipe(1e18))
    assert answers(held.hold(llama.recipe(0.3))) == before


def test_other_weights_under_the_same_recipe_are_a_loss(llama: Models, held: Any) -> None:
    held.hold(llama.recipe(0.3))
    held.hold(llama.recipe(2.0))
    held._sentinels[llama.recipe(0.3).hash] = held._sentinels[llama.recipe(2.0).hash]
    with pytest.raises(EngineLost, match="otherwise than it did before with the same weights"):
        held.hold(llama.recipe(0.3))


def test_the_longest_texts_that_fit_agree_with_the_hugging_face_engine(llama: Models) -> None:
    texts = [Rolling("abc " * 150), Rolling("x" * 511)]
    ask = [Loglikelihood("y" * 600, "zzz"), Loglikelihood("q", "w" * 400)]
    ours, hf = llama.host(max_length=512), llama.host("hf", max_length=510)
    try:
        mine, its = ours.hold(llama.recipe(0.3)), hf.hold(llama.recipe(0.3))
        assert mine.max_length == 510
        assert mine.loglikelihood_rolling(texts) == pytest.approx(its.loglikelihood_rolling(texts), rel=1e-5)
        for (a, _), (b, _) in zip(mine.loglikelihood(ask), its.loglikelihood(ask), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
    finally:
        ours.close()


def test_another_form_of_the_model_starts_another_engine(llama: Models, held: Any) -> None:
    def path(layers: tuple[int, ...]) -> Recipe:
        hops = [{"model": "a", "layer": layer} for layer in layers]
        return pin(make_recipe(llama.family, path=hops), llama.checkpoints)

    first = held.hold(llama.recipe(0.3))
    expected = answers(first)
    for layers in ((0, 1, 1), (1, 0)):
        engine = held.hold(path(layers))
        assert engine is not first
        hf = llama.host("hf").hold(path(layers))
        for (mine, _), (its, _) in zip(engine.loglikelihood(CHOICES), hf.loglikelihood(CHOICES), strict=True):
            assert mine == pytest.approx(its, rel=1e-5)
    assert answers(held.hold(llama.recipe(0.3))) == expected


def test_a_kind_that_cannot_be_swapped_in_place_is_refused(tmp_path: Path) -> None:
    moe = Models(tmp_path, "mixtral", {})
    host = moe.host()
    try:
        with pytest.raises(UserError, match=r"does not take weights of this kind of model in place"):
            host.hold(moe.recipe(0.3))
    finally:
        host.close()


def test_stop_strings_and_penalties_are_those_of_the_hugging_face_engine(
    llama: Models, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = merge(llama.recipe(0.3), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = GenerationConfig(repetition_penalty=1.4, eos_token_id=[1, 77], temperature=0.7, do_sample=True)
    model.generation_config = config
    hf = HFEngine(model, llama.tokenizer, batch_tokens=512, max_length=200)
    free = [text.text for text in hf.generate([Generation(f"prompt {i}", (), 24) for i in range(8)])]
    stops = [(text[len(text) // 2 :][:2] or "x", "</s>") if i % 2 else () for i, text in enumerate(free)]
    requests = [Generation(f"prompt {i}", stop, 24) for i, stop in enumerate(stops)]
    engine = fresh_engine(llama, folder, config)
    try:
        expected = hf.generate(requests)
        assert engine.generate(requests) == expected
        assert len({answer.truncated for answer in expected}) == 2
        hf.model.generation_config = other = GenerationConfig(repetition_penalty=1.1, eos_token_id=1)
        engine.set_generation(other)
        renewed = hf.generate(requests)
        assert renewed != expected
        assert engine.generate(requests) == renewed
    finally:
        engine.close()


def test_starting_draws_nothing_from_the_global_generators(llama: Models, held: Any) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    held.hold(llama.recipe(0.3)).generate(PROMPTS)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def config(llama: Models, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("config")
        engine = {"type": "vllm", "device": "cpu", "batch_tokens": 512, "max_length": 200, "options": OPTIONS}
        return make_config(folder, llama.family, tasks, engine=engine, **changes)

    return make


@pytest.fixture(scope="module")
def finished(config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return search(config(), run=tmp_path_factory.mktemp("finished") / "run")


def test_a_search_ends_and_resumes(finished: Any) -> None:
    assert finished.results["candidates"] == 12
    assert finished.results["winner"]["test"]["n"] == 32
    before = canonical(finished.path)
    (finished.path / "results.json").unlink()
    resume(finished.path)
    assert canonical(finished.path) == before


def test_ray_workers_give_the_same_search(finished: Any, config: Callable[..., Path], tmp_path: Path) -> None:
    run = search(config(workers={"type": "ray", "count": 2, "cpus": 0.4}), run=tmp_path / "run")
    assert list(run.candidates().fitness) == list(finished.candidates().fitness)
    assert run.results["winner"]["test"]["mean"] == finished.results["winner"]["test"]["mean"]


def test_an_engine_that_crashes_is_made_anew(
    finished: Any, config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    generate, calls = vllm.LLM.generate, 0

    def failing(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise RuntimeError("the device is gone")
        return generate(self, *args, **options)

    monkeypatch.setattr(vllm.LLM, "generate", failing)
    run = search(config(), run=tmp_path / "run")
    assert calls > 60
    assert "the device is gone" in (run.path / "log.jsonl").read_text()
    assert list(run.candidates().fitness) == list(finished.candidates().fitness)


def test_the_options_of_the_config_are_vllms_own(config: Callable[..., Path]) -> None:
    from evomerge.engines import check_engine

    settings = load_config(config()).engine
    check_engine(settings)
    with pytest.raises(UserError, match="did you mean 'max_num_seqs'"):
        check_engine(settings.model_copy(update={"options": {"max_num_sequences": 2}}))
    with pytest.raises(UserError, match="this build of vLLM runs on 'cpu', not on 'cuda'"):
        _start_on("cuda")


def _start_on(device: str) -> None:
    from evomerge.engines.vllm import _start

    _start(device, model="x")
