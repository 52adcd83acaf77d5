"""The engine's own promises: same bits on repeat, savings that change nothing, clear refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.engines import generation, packing, prefixes
from evomerge.engines.decoding import Stops
from evomerge.engines.encoding import Encoder
from evomerge.engines.hf import HFEngine, default_batch_tokens, default_max_length, packing_name
from evomerge.engines.packing import group_by_prefix, pack_prompts, pack_scores
from evomerge.errors import CandidateFailed, UserError
from evomerge.evaluation.requests import Generated, Generation, Loglikelihood
from tests.evaluation.tiny import documents

CPU = torch.device("cpu")
Answers = tuple[list[tuple[float, bool]], list[Generated]]
CHOICES = [
    Loglikelihood(row["question"] * (1 + i % 3), " " + choice)
    for i, row in enumerate(documents(15))
    for choice in row["choices"]
]
PROMPTS = [Generation(row["question"] * (1 + i % 3), ("e",), 3 + i) for i, row in enumerate(documents(15))]


def test_the_same_requests_give_the_same_bits(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=300)
    first = engine.loglikelihood(CHOICES), engine.generate(PROMPTS)
    engine.loglikelihood(CHOICES[:7])
    again = HFEngine(model, tokenizer, batch_tokens=300)
    assert (engine.loglikelihood(CHOICES), engine.generate(PROMPTS)) == first
    assert (again.loglikelihood(CHOICES), again.generate(PROMPTS)) == first


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3000), st.permutations(range(len(CHOICES))), st.permutations(range(len(PROMPTS))))
def test_batch_size_and_order_change_no_more_than_rounding(
    model: Any, tokenizer: Any, alone: Answers, budget: int, order: list[int], prompts: list[int]
) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=budget)
    scores = engine.loglikelihood([CHOICES[i] for i in order])
    np.testing.assert_allclose([s for s, _ in scores], [alone[0][i][0] for i in order], rtol=1e-5)
    assert [greedy for _, greedy in scores] == [alone[0][i][1] for i in order]
    assert engine.generate([PROMPTS[i] for i in prompts]) == [alone[1][i] for i in prompts]


@pytest.fixture(scope="module")
def alone(model: Any, tokenizer: Any) -> Answers:
    """Return the answers to every request asked by itself."""
    engine = HFEngine(model, tokenizer, batch_tokens=1)
    return (
        [engine.loglikelihood([request])[0] for request in CHOICES],
        [engine.generate([request])[0] for request in PROMPTS],
    )


def test_new_weights_in_place_give_new_answers(family: dict[str, Path], tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32)
    expert = AutoModelForCausalLM.from_pretrained(family["a"], dtype=torch.float32)
    engine = HFEngine(live, tokenizer, batch_tokens=300)
    base = engine.loglikelihood(CHOICES)
    with torch.no_grad():
        for parameter, other in zip(live.parameters(), expert.parameters(), strict=True):
            parameter.copy_(other)
    engine.weights_changed()
    swapped = engine.loglikelihood(CHOICES)
    assert swapped != base
    assert swapped == HFEngine(expert, tokenizer, batch_tokens=300).loglikelihood(CHOICES)


def test_a_model_whose_head_is_more_than_linear_is_scored_by_its_full_logits(
    family: dict[str, Path], tokenizer: Any
) -> None:
    from transformers import LlamaForCausalLM

    class Capped(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 3 * torch.tanh(out.logits / 3)
            return out

    model = Capped.from_pretrained(family["base"], dtype=torch.float32)
    engine = HFEngine(model, tokenizer, batch_tokens=300)
    assert "paths=plain" in engine.fingerprint
    ids = torch.tensor([tokenizer.encode(CHOICES[0].context + CHOICES[0].continuation)])
    count = len(tokenizer.encode(CHOICES[0].continuation))
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)[-count - 1 : -1].gather(1, ids[0, -count:, None])
    assert engine.loglikelihood(CHOICES[:1])[0][0] == pytest.approx(float(logprobs.sum()), rel=1e-5)


def test_a_model_whose_masks_are_not_understood_is_scored_the_plain_way(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from evomerge.engines import live
    from tests.models import make_model

    model = AutoModelForCausalLM.from_pretrained(
        make_model(tmp_path / "m", kind="mistral", layers=2, sliding_window=8), dtype=torch.float32
    )
    right = HFEngine(model, tokenizer, batch_tokens=4096)
    assert "paths=head+tree" in right.fingerprint
    masks = live.masks

    def one_too_far(*args: Any, windows: dict[str, int], **kwargs: Any) -> Any:
        return masks(*args, windows={kind: window + 1 for kind, window in windows.items()}, **kwargs)

    monkeypatch.setattr("evomerge.engines.live.masks", one_too_far)
    plain = HFEngine(model, tokenizer, batch_tokens=4096)
    assert "paths=head " in plain.fingerprint
    assert model.config.sliding_window == 8
    np.testing.assert_allclose(
        [logprob for logprob, _ in plain.loglikelihood(CHOICES)],
        [plain.loglikelihood([request])[0][0] for request in CHOICES],
        rtol=1e-5,
    )
    monkeypatch.undo()
    np.testing.assert_allclose(
        [logprob for logprob, _ in plain.loglikelihood(CHOICES)],
        [logprob for logprob, _ in right.loglikelihood(CHOICES)],
        rtol=1e-5,
    )
    assert plain.generate(PROMPTS) == right.generate(PROMPTS)


def test_a_broken_model_makes_no_engine(family: dict[str, Path], tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[9] = math.nan
    with pytest.raises(CandidateFailed, match="not finite"):
        HFEngine(model, tokenizer, batch_tokens=300)


def test_bf16_scores_are_summed_in_float32(family: dict[str, Path], tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.bfloat16)
    engine = HFEngine(model, tokenizer, batch_tokens=300)
    assert "dtype=bfloat16" in engine.fingerprint
    values = [logprob for logprob, _ in engine.loglikelihood(CHOICES)]
    coarse = [float(torch.tensor(value).bfloat16()) for value in values]
    assert all(map(math.isfinite, values))
    assert values != coarse


def test_fingerprint_and_packing_tell_what_the_numbers_depend_on(
    family: dict[str, Path], model: Any, tokenizer: Any
) -> None:
    from transformers import AutoTokenizer

    engine = HFEngine(model, tokenizer, batch_tokens=300)
    assert engine.packing == packing_name(300) == "hf-v2:300"
    other = AutoTokenizer.from_pretrained(family["base"])
    assert HFEngine(model, other, batch_tokens=300).fingerprint == engine.fingerprint
    other.add_tokens(["merge"])
    changed = [
        HFEngine(model, tokenizer, batch_tokens=301),
        HFEngine(model, tokenizer, batch_tokens=300, max_length=100),
        HFEngine(model, other, batch_tokens=300),
    ]
    assert len({engine.fingerprint, *(e.fingerprint for e in changed)}) == 4
    for name in ("torch=", "transformers=", "lm-eval=", "device=cpu/", "dtype=float32", "attention=sdpa"):
        assert name in engine.fingerprint


def test_defaults(model: Any, tokenizer: Any) -> None:
    assert default_batch_tokens("cpu") < default_batch_tokens("cuda")
    assert HFEngine(model, tokenizer, batch_tokens=64).max_length == 512
    assert default_max_length(object(), object()) == 2048
    with pytest.raises(ValueError, match="batch_tokens"):
        HFEngine(model, tokenizer, batch_tokens=0)


def test_requests_that_do_not_fit_the_model(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=64, max_length=16)
    with pytest.raises(UserError, match=r"'too long, too long.* has 24 tokens"):
        engine.loglikelihood([Loglikelihood("a", "too long, too long, long")])
    with pytest.raises(UserError, match="has 0 tokens"):
        engine.loglikelihood([Loglikelihood("a", "")])
    with pytest.raises(UserError, match="max_gen_toks 16 leaves no room"):
        engine.generate([Generation("a", (), 16)])


def test_generation_settings_that_would_be_ignored_are_refused(
    family: dict[str, Path], tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32)
    engine = HFEngine(model, tokenizer, batch_tokens=64)
    engine.generate(PROMPTS[:1])
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(UserError, match=r"generation_config\.json: no_repeat_ngram_size"):
        engine.generate(PROMPTS[:1])


def test_threads_are_told_since_they_change_bits(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=64)
    before = torch.get_num_threads()
    told = {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            told[threads] = engine.fingerprint
    finally:
        torch.set_num_threads(before)
    assert "threads" not in told[1]
    assert "/2-threads" in told[2]


def shapes_of(model: Any, do: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Return the shapes of the inputs of every forward pass meanwhile."""
    shapes: list[tuple[int, ...]] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        do()
    finally:
        hook.remove()
    return shapes


def test_finished_texts_leave_the_batch(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=4096)
    requests = [Generation(f"prompt {i}", (), 2 if i < 6 else 9) for i in range(8)]
    assert shapes_of(model, lambda: engine.generate(requests)) == [(1, 64), (8, 1), *[(2, 1)] * 7]


def test_a_text_that_is_done_makes_room_for_the_next_prompt(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Generation(f"{i}{' long' * (i % 3)} prompt", (), 2 + i * 5 % 7) for i in range(9)]
    engine = HFEngine(model, tokenizer, batch_tokens=1)
    together = engine.generate(requests)
    monkeypatch.setitem(generation.ROWS, "cpu", 3)
    engine = HFEngine(model, tokenizer, batch_tokens=1)
    shapes = shapes_of(model, lambda: engine.generate(requests))
    assert engine.generate(requests) == together
    steps = [rows for rows, tokens in shapes if tokens == 1]
    assert max(steps) == 3
    # 36 tokens; the first of each text comes from its prompt.
    assert sum(steps) == sum(request.max_tokens - 1 for request in requests)
    assert steps.count(3) >= len(steps) - 3


def test_only_tokens_that_may_complete_a_stop_string_are_looked_at(tokenizer: Any) -> None:
    def suspects(*stops: str) -> set[int]:
        known = Stops(stops, Encoder(tokenizer))
        return {token for token in range(259) if known.may_complete(token)}

    (b,), (dot,), (end,) = (tokenizer.encode(text, add_special_tokens=False) for text in ("b", ".", ">"))
    found = suspects("ab.", "</s>")
    assert {dot, end} < found
    assert b not in found
    # A byte of a longer character shows nothing by itself.
    assert set(tokenizer.encode("\N{GREEK SMALL LETTER ALPHA}", add_special_tokens=False)) < found
    assert len(found) < 150
    # Decoders may drop a space.
    assert suspects("a ") == set(range(259))


def test_a_stop_string_ends_the_work(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=4096)
    whole = engine.generate([Generation("prompt", (), 9)])[0]
    assert whole.truncated
    text = whole.text
    request = Generation("prompt", (text[1:3],), 9)
    assert engine.generate([request]) == [Generated(text.split(text[1:3])[0])]
    assert len(shapes_of(model, lambda: engine.generate([request]))) < 9


SHARED = "Forty letters that every prompt begins with, and then as many again. "


def test_what_texts_share_is_computed_once_until_the_weights_change(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=256)
    P = len(SHARED)
    prompts = [Generation(f"{SHARED}{x}", (), 1) for x in "abc"]
    assert shapes_of(model, lambda: engine.generate(prompts)) == [(1, P), (1, 3)]
    assert shapes_of(model, lambda: engine.generate(prompts)) == [(1, 3)]
    choices = [Loglikelihood(f"{SHARED}{x}", f" {y}") for x in "defg" for y in "12"]
    # The context's last letter and the space of either choice.
    assert shapes_of(model, lambda: engine.loglikelihood(choices)) == [(1, 8)]
    engine.weights_changed()
    assert shapes_of(model, lambda: engine.loglikelihood(choices)) == [(1, P), (1, 8)]


def test_a_long_prefix_is_computed_in_chunks_that_another_shares(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "CHUNK", 64)
    engine = HFEngine(model, tokenizer, batch_tokens=64)
    start = SHARED * 2
    first = [Generation(f"{start}A question: {x}", (), 4) for x in "abc"]
    second = [Generation(f"{start}Another: {x}", (), 4) for x in "abc"]
    shapes = shapes_of(model, lambda: engine.generate(first))
    assert [shape for shape in shapes if shape[1] > 3] == [(1, 64), (1, 64), (1, len(start) + 12 - 128)]
    shapes = shapes_of(model, lambda: engine.generate(second))
    assert [shape for shape in shapes if shape[1] > 3] == [(1, len(start) + 9 - 128)]
    fresh = HFEngine(model, tokenizer, batch_tokens=64)
    assert fresh.generate(second) == engine.generate(second)
    monkeypatch.setattr(prefixes, "CHUNK", 10**6)
    assert HFEngine(model, tokenizer, batch_tokens=1).generate(second) == engine.generate(second)


def test_bits_do_not_depend_on_what_was_asked_before(model: Any, tokenizer: Any) -> None:
    blocks = [
        tuple(Loglikelihood(f"{SHARED}{x * (2 + i)}", f" {y}") for x in "defg" for y in ("yes", "no"))
        for i in range(3)
    ]
    engine = HFEngine(model, tokenizer, batch_tokens=256)
    forwards = [engine.loglikelihood(block) for block in blocks]
    engine.weights_changed()
    assert [engine.loglikelihood(block) for block in reversed(blocks)] == forwards[::-1]
    assert [HFEngine(model, tokenizer, batch_tokens=256).loglikelihood(block) for block in blocks] == forwards


def test_prefixes_are_forgotten_beyond_their_memory(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=256)
    prompts = [Generation(f"{SHARED}{x}", (), 1) for x in "abc"]
    expected = engine.generate(prompts)
    monkeypatch.setattr(prefixes, "KEPT_BYTES", 1)
    engine.weights_changed()
    assert engine.generate(prompts) == expected
    assert not engine._prefixes._chunks


def test_the_host_says_when_the_weights_change(family: dict[str, Path], tokenizer: Any) -> None:
    from evomerge.config import Engine as EngineConfig
    from evomerge.engines import open_host
    from evomerge.merging import open_parents, pin
    from tests.merging.helpers import make_recipe

    models = {"base": family["base"], "a": family["a"]}
    recipes = {
        name: make_recipe(models, path=[{"model": name, "layer": i} for i in range(4)]) for name in models
    }
    checkpoints = open_parents(recipes["a"])
    recipes = {name: pin(recipe, checkpoints) for name, recipe in recipes.items()}
    host = open_host(EngineConfig(device="cpu", batch_tokens=256), checkpoints, tokenizer)
    prompts = tuple(Loglikelihood(f"{SHARED}{x}", " yes") for x in "abcd")
    answers = [host.hold(recipes[name]).loglikelihood(prompts) for name in ("base", "a", "base")]
    assert answers[0] == answers[2] != answers[1]


tokens = st.lists(st.integers(3, 4), min_size=1, max_size=30)
endings = st.lists(st.integers(3, 6), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(tokens, endings), min_size=1, max_size=12),
    st.integers(1, 80),
    st.integers(6, 30),
    st.booleans(),
    st.booleans(),
)
def test_every_continuation_is_scored_once_behind_its_own_text(
    pairs: list[tuple[list[int], list[int]]], budget: int, max_length: int, tree: bool, shared: bool
) -> None:
    """Reading a batch back through its mask gives each request's (truncated) text and targets."""
    if shared:
        pairs = [([3] * 20 + context, ending) for context, ending in pairs]
    batches = pack_scores(pairs, batch_tokens=budget, max_length=max_length, tree=tree, device=CPU)
    seen = []
    for batch in batches:
        inputs = batch.inputs
        B, L = inputs.ids_BL.shape
        longest = max(len(context) + len(ending) for context, ending in pairs)
        assert budget >= B * L or (B == 1 and longest >= L) or (B == 1 and inputs.tree_BL is not None)
        ends = [*batch.starts[1:], len(batch.scored_N)]
        for request, start, end in zip(batch.requests, batch.starts, ends, strict=True):
            row, place = divmod(int(batch.scored_N[end - 1]), L)
            if inputs.tree_BL is None:
                text = inputs.ids_BL[row, : place + 1].tolist()
            else:
                visible = inputs.visible_BLK()[row, place]
                whole = torch.cat([torch.tensor(inputs.prefix, dtype=torch.long), inputs.ids_BL[row]])
                text = whole[visible].tolist()
                assert inputs.positions_BL is not None
                positions = inputs.key_positions_BK()[row]
                assert positions[visible].tolist() == list(range(len(text)))
                assert inputs.positions_BL[row, place] == len(text) - 1
            context, continuation = pairs[request]
            assert [*text, int(batch.targets_N[end - 1])] == [*context, *continuation][-(max_length + 1) :]
            assert batch.targets_N[start:end].tolist() == continuation
            seen.append(request)
    assert sorted(seen) == list(range(len(pairs)))


@settings(max_examples=200, deadline=None)
@given(st.lists(tokens, min_size=1, max_size=12), st.integers(1, 200), st.integers(1, 5), st.booleans())
def test_every_prompt_is_packed_once(prompts: list[list[int]], budget: int, most: int, shared: bool) -> None:
    if shared:
        prompts = [[3] * 20 + prompt for prompt in prompts]
    packed = {}
    for batch in pack_prompts(prompts, batch_tokens=budget, most=most, device=CPU):
        assert len(batch.requests) <= most
        flat = batch.inputs.ids_BL.flatten()
        P = len(batch.inputs.prefix)
        for row, request in enumerate(batch.requests):
            own = batch.owner_M == row
            assert batch.column_M[own].tolist() == list(range(P, batch.lengths[row]))
            assert batch.flat_M[own][-1] == batch.last_N[row]
            packed[request] = [*batch.inputs.prefix, *flat[batch.flat_M[own]].tolist()]
    assert [packed[i] for i in range(len(prompts))] == prompts


@settings(max_examples=300, deadline=None)
@given(st.lists(tokens, min_size=1, max_size=14), st.integers(1, 60), st.integers(1, 8))
def test_prefixes_save_what_they_promise(texts: list[list[int]], least: int, shortest: int) -> None:
    packing_shortest = packing.SHORTEST_PREFIX
    packing.SHORTEST_PREFIX = shortest
    try:
        groups = group_by_prefix([tuple(text) for text in texts], least)
    finally:
        packing.SHORTEST_PREFIX = packing_shortest
    assert sorted(number for _, members in groups for number in members) == list(range(len(texts)))
    for length, members in groups:
        assert len({tuple(texts[number][:length]) for number in members}) == 1
        assert all(len(texts[number]) > length for number in members)
        if length:
            assert length >= shortest
            assert (len(members) - 1) * length >= least


def test_prefixes_of_several_tasks_and_of_a_text_with_several_questions() -> None:
    few_shot, other, passage = [1] * 40, [2] * 30, [3] * 50
    texts = [
        *([*few_shot, 5, i] for i in range(10, 14)),
        *([*few_shot, *passage, i] for i in range(20, 24)),
        *([*other, i] for i in range(30, 34)),
        [9, 9, 9],
    ]
    groups = group_by_prefix([tuple(text) for text in texts], 60)
    # The fifth token is common to the first four, but nothing is gained by a group for it.
    assert groups == [(90, [4, 5, 6, 7]), (41, [0, 1, 2, 3]), (30, [8, 9, 10, 11]), (0, [12])]
    # Saving less, the others of a group are joined to the group around it.
    assert group_by_prefix([tuple(text) for text in texts], 160) == [
        (40, [4, 5, 6, 7, 0, 1, 2, 3]),
        (0, [8, 9, 10, 11, 12]),
    ]


def test_choices_of_one_context_share_a_row() -> None:
    pairs = [
        ([1, 2, 3], [4]),
        ([1, 2, 3], [5]),
        ([1, 2, 3], [6, 7]),
        ([1, 2, 3], [6, 8]),
        ([1, 2, 3], [9, 9, 9]),
    ]
    (batch,) = pack_scores(pairs, batch_tokens=99, max_length=50, tree=True, device=CPU)
    assert batch.inputs.ids_BL.tolist() == [[1, 2, 3, 6, 9, 9]]
    rows = pack_scores(pairs, batch_tokens=99, max_length=50, tree=False, device=CPU)
    assert [batch.inputs.ids_BL.tolist() for batch in rows] == [[[1, 2, 3, 9, 9], [1, 2, 3, 6, 0]]]


def test_masks_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long context with choices becomes a prefix; a long text among shorter ones is computed alone."""
    monkeypatch.setattr(packing, "MASK_CELLS", 400)
    monkeypatch.setattr(packing, "FULL_ROW", 8)
    options: Any = {"batch_tokens": 4096, "max_length": 500, "tree": True, "device": CPU}
    context = list(range(100))
    (batch,) = pack_scores([(context, [1, 2]), (context, [2, 3])], **options)
    assert len(batch.inputs.prefix) == 99
    assert batch.inputs.ids_BL.tolist() == [[99, 1, 2]]
    shared = [7] * 20
    texts = [([*shared, i], [1]) for i in range(60)]
    batches = pack_scores([*texts, ([*shared, *range(200)], [1])], **options)
    masked = [batch.inputs for batch in batches if batch.inputs.tree_BL is not None]
    assert all(inputs.visible_BLK().numel() <= 400 for inputs in masked)
    assert [tuple(batch.inputs.ids_BL.shape) for batch in batches if batch.inputs.tree_BL is None] == [
        (1, 220)
    ]
