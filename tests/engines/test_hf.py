"""The engine's own promises: same bits on repeat, savings that change nothing, clear refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.engines.hf import HFEngine, default_batch_tokens, default_max_length, packing_name
from evomerge.engines.packing import pack_generations, pack_scores
from evomerge.errors import CandidateFailed, UserError
from evomerge.evaluation.requests import Generated, Generation, Loglikelihood
from tests.evaluation.tiny import documents

CPU = torch.device("cpu")
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


def test_batch_composition_changes_no_more_than_rounding(model: Any, tokenizer: Any) -> None:
    together = HFEngine(model, tokenizer, batch_tokens=4096)
    alone = HFEngine(model, tokenizer, batch_tokens=1)
    np.testing.assert_allclose(
        [logprob for logprob, _ in together.loglikelihood(CHOICES)],
        [alone.loglikelihood([request])[0][0] for request in CHOICES],
        rtol=1e-5,
    )
    assert together.generate(PROMPTS) == [alone.generate([request])[0] for request in PROMPTS]


def test_new_weights_in_place_give_new_answers(family: dict[str, Path], tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32)
    expert = AutoModelForCausalLM.from_pretrained(family["a"], dtype=torch.float32)
    engine = HFEngine(live, tokenizer, batch_tokens=300)
    base = engine.loglikelihood(CHOICES)
    with torch.no_grad():
        for parameter, other in zip(live.parameters(), expert.parameters(), strict=True):
            parameter.copy_(other)
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


def test_sliding_window_models_share_no_rows(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    from tests.models import make_model

    model = AutoModelForCausalLM.from_pretrained(
        make_model(tmp_path / "m", kind="mistral", layers=2, sliding_window=8), dtype=torch.float32
    )
    together, alone = (HFEngine(model, tokenizer, batch_tokens=n) for n in (4096, 1))
    assert "paths=head " in together.fingerprint
    np.testing.assert_allclose(
        [logprob for logprob, _ in together.loglikelihood(CHOICES)],
        [alone.loglikelihood([request])[0][0] for request in CHOICES],
        rtol=1e-5,
    )
    assert together.generate(PROMPTS) == [alone.generate([request])[0] for request in PROMPTS]


def test_eager_attention_takes_no_boolean_tree_mask(
    family: dict[str, Path], model: Any, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(
        family["base"], dtype=torch.float32, attn_implementation="eager"
    )
    engine = HFEngine(eager, tokenizer, batch_tokens=4096)
    assert "paths=head " in engine.fingerprint
    np.testing.assert_allclose(
        [logprob for logprob, _ in engine.loglikelihood(CHOICES)],
        [logprob for logprob, _ in HFEngine(model, tokenizer, batch_tokens=300).loglikelihood(CHOICES)],
        rtol=1e-5,
    )


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
    assert engine.packing == packing_name(300) == "hf-v1:300"
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


def test_finished_texts_leave_the_batch(model: Any, tokenizer: Any) -> None:
    sizes: list[int] = []
    engine = HFEngine(model, tokenizer, batch_tokens=4096)
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    engine.generate([Generation(f"prompt {i}", (), 2 if i < 6 else 9) for i in range(8)])
    hook.remove()
    assert sizes == [8, 8, *[2] * 7]


def test_a_stop_string_ends_the_work(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=4096)
    whole = engine.generate([Generation("prompt", (), 9)])[0]
    assert whole.truncated
    text = whole.text
    calls: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    assert engine.generate([Generation("prompt", (text[1:3],), 9)]) == [Generated(text.split(text[1:3])[0])]
    hook.remove()
    assert len(calls) < 9


def test_what_prompts_share_is_computed_once(model: Any, tokenizer: Any) -> None:
    shapes: list[tuple[int, ...]] = []
    engine = HFEngine(model, tokenizer, batch_tokens=4096)
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared = "Forty letters that every prompt begins with"
    engine.generate([Generation(f"{shared} {x}", (), 1) for x in "abc"])
    hook.remove()
    assert shapes == [(1, len(shared) + 1), (3, 1)]


tokens = st.lists(st.integers(3, 6), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(tokens, tokens), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(6, 9),
    st.booleans(),
)
def test_every_continuation_is_scored_once_behind_its_own_text(
    pairs: list[tuple[list[int], list[int]]], budget: int, max_length: int, tree: bool
) -> None:
    """Reading a batch back through its mask gives each request's (truncated) text and targets."""
    batches = pack_scores(pairs, batch_tokens=budget, max_length=max_length, tree=tree, device=CPU)
    seen = []
    for batch in batches:
        B, L = batch.ids_BL.shape
        assert B == 1 or budget >= B * L
        ends = [*batch.starts[1:], len(batch.scored_N)]
        for request, start, end in zip(batch.requests, batch.starts, ends, strict=True):
            row, place = divmod(int(batch.scored_N[end - 1]), L)
            if batch.branch_BL is None:
                text = batch.ids_BL[row, : place + 1].tolist()
            else:
                visible = batch.mask_BLL()[row, 0, place]
                text = batch.ids_BL[row][visible].tolist()
                assert batch.positions_BL is not None
                assert batch.positions_BL[row][visible].tolist() == list(range(len(text)))
            context, continuation = pairs[request]
            assert [*text, int(batch.targets_N[end - 1])] == [*context, *continuation][-(max_length + 1) :]
            assert batch.targets_N[start:end].tolist() == continuation
            seen.append(request)
    assert sorted(seen) == list(range(len(pairs)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=40), min_size=1, max_size=8),
    st.integers(1, 200),
)
def test_every_prompt_is_packed_once(prompts: list[list[int]], budget: int) -> None:
    batches = pack_generations(prompts, batch_tokens=budget, share_prefix=True, device=CPU)
    packed = {}
    for batch in batches:
        for row, length, request in zip(batch.ids_BL, batch.lengths, batch.requests, strict=True):
            assert length >= 1
            packed[request] = [*batch.prefix, *row[len(row) - length :].tolist()]
    assert [packed[i] for i in range(len(prompts))] == prompts


def test_choices_of_one_context_share_a_row() -> None:
    pairs = [
        ([1, 2, 3], [4]),
        ([1, 2, 3], [5]),
        ([1, 2, 3], [6, 7]),
        ([1, 2, 3], [6, 8]),
        ([1, 2, 3], [9, 9, 9]),
    ]
    (batch,) = pack_scores(pairs, batch_tokens=99, max_length=50, tree=True, device=CPU)
    assert batch.ids_BL.tolist() == [[1, 2, 3, 6, 9, 9]]
    rows = pack_scores(pairs, batch_tokens=99, max_length=50, tree=False, device=CPU)
    assert [batch.ids_BL.tolist() for batch in rows] == [[[1, 2, 3, 9, 9], [1, 2, 3, 6, 0]]]
