from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from evomerge import extraction
from evomerge.checkpoints import open_checkpoint
from evomerge.cli import main
from evomerge.errors import CheckpointError, UserError
from evomerge.extraction import extract_lora, leading_factors
from tests.adapters import adapted_model, make_adapter
from tests.merging.helpers import read, rewrite
from tests.models import make_model

IDS = torch.tensor([[4, 9, 77, 3, 250]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def best_error(delta: torch.Tensor, rank: int) -> float:
    """The relative error of the best approximation of a rank, from the singular values."""
    values = torch.linalg.svdvals(delta.double())
    return float((values[rank:].square().sum() / values.square().sum()).sqrt())


def relative(delta: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> float:
    return float((delta.double() - b.double() @ a.double()).norm() / delta.double().norm())


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_small_matrices_get_the_best_approximation(shape: tuple[int, int], rank: int) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    b, a = leading_factors(delta, rank)
    assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
    assert relative(delta, b, a) == pytest.approx(best_error(delta, rank), abs=1e-6)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1))


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_subspace_iteration_comes_close_to_the_best(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "EXACT_SIDE", 0)
    generator = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(300, 300, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(400, 300, generator=generator))[0]
    delta = (u * torch.arange(1, 301).pow(-decay)) @ v.T
    b, a = leading_factors(delta, 32)
    assert best_error(delta, 32) <= relative(delta, b, a) * (1 + 1e-5)
    assert relative(delta, b, a) <= best_error(delta, 32) * 1.01


@pytest.mark.parametrize("side", [0, 1024])
def test_a_matrix_of_the_rank_is_found_exactly(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "EXACT_SIDE", side)
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(200, 8, generator=generator) @ torch.randn(8, 300, generator=generator)
    assert relative(delta, *leading_factors(delta, 8)) < 1e-6
    assert relative(delta, *leading_factors(delta, 20)) < 1e-6
    b, _ = leading_factors(delta, 20, error=1e-4)
    assert b.shape[1] == 8


def test_the_smallest_rank_within_an_error_is_taken() -> None:
    delta = torch.randn(60, 80, generator=torch.Generator().manual_seed(3))
    b, a = leading_factors(delta, 60, error=0.3)
    rank = b.shape[1]
    assert relative(delta, b, a) <= 0.3 < best_error(delta, rank - 1)
    assert leading_factors(delta, 5, error=0.3)[0].shape[1] == 5


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_full_rank_and_the_rest_reproduce_the_model(tmp_path: Path, kind: str, tied: bool) -> None:
    base = make_model(tmp_path / "base", kind=kind, tied=tied)
    tuned = make_model(tmp_path / "tuned", seed=1, base=base, kind=kind, tied=tied)
    found = extract_lora(tuned, base, tmp_path / "lora", rank=64, save_rest=True)
    assert found.error < 1e-5
    assert {part.how for part in found.parts} == {"lora", "saved"}
    expected = read(tuned)
    checkpoint = open_checkpoint(str(tmp_path / "lora"))
    assert checkpoint.tied is tied
    for name in checkpoint.tensors:
        assert torch.allclose(checkpoint.tensor(name), expected[name], atol=1e-6), name
    by_peft = logits(adapted_model(base, tmp_path / "lora"))
    assert torch.allclose(by_peft, logits(AutoModelForCausalLM.from_pretrained(tuned)), atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_neox", "phi3", "gemma3_text"])
def test_other_architectures_load_with_peft_too(tmp_path: Path, kind: str) -> None:
    base = make_model(tmp_path / "base", kind=kind)
    tuned = make_model(tmp_path / "tuned", seed=1, base=base, kind=kind)
    assert extract_lora(tuned, base, tmp_path / "lora", rank=64, save_rest=True).error < 1e-5
    by_peft = logits(adapted_model(base, tmp_path / "lora"))
    assert torch.allclose(by_peft, logits(AutoModelForCausalLM.from_pretrained(tuned)), atol=1e-4)
    whole, adapted = open_checkpoint(tuned), open_checkpoint(tmp_path / "lora")
    for name in whole.tensors:
        assert torch.allclose(whole.tensor(name), adapted.tensor(name), atol=1e-6), name


def test_of_a_multimodal_model_the_language_part_is_extracted(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", kind="gemma3", tied=True)
    tuned = make_model(tmp_path / "tuned", seed=1, base=base, kind="gemma3", tied=True)
    found = extract_lora(tuned, base, tmp_path / "lora", rank=64, save_rest=True)
    assert [part.kind for part in found.parts if part.how == "not covered"] == ["outside the language model"]
    by_peft = logits(adapted_model(base, tmp_path / "lora"))
    assert torch.allclose(by_peft, logits(AutoModelForCausalLM.from_pretrained(tuned)), atol=1e-4)


def test_an_adapter_comes_back_from_the_model_that_it_makes(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, r=4, targets="all-linear")
    found = extract_lora(adapter, base, tmp_path / "lora", rank=4)
    assert found.error < 1e-5
    assert {part.kind for part in found.parts} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    one, other = (logits(adapted_model(base, folder)) for folder in (adapter, tmp_path / "lora"))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("options", [{"alpha": 3.0}, {"error": 0.5}, {"alpha": 64.0, "error": 0.4}], ids=str)
def test_scales_and_smaller_ranks_are_what_peft_reads(tmp_path: Path, options: dict[str, Any]) -> None:
    base = make_model(tmp_path / "base")
    tuned = make_model(tmp_path / "tuned", seed=1, base=base)
    found = extract_lora(tuned, base, tmp_path / "lora", rank=20, **options)
    name = "model.layers.2.mlp.up_proj.weight"
    model = adapted_model(base, tmp_path / "lora").merge_and_unload()
    before, wanted = read(base)[name], read(tuned)[name]
    got = model.state_dict()[name] - before
    [part] = [part for part in found.parts if part.kind == "up_proj"]
    assert float((wanted - before - got).norm() / (wanted - before).norm()) == pytest.approx(
        part.error, abs=0.1
    )
    assert torch.allclose(open_checkpoint(str(tmp_path / "lora")).tensor(name), before + got, atol=1e-6)
    if "error" in options:
        assert part.error <= options["error"] + 1e-6


def test_what_is_not_covered_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_model(tmp_path / "base")
    tuned = make_model(tmp_path / "tuned", seed=1, base=base)
    assert main(["extract-lora", str(tuned), str(base), str(tmp_path / "lora"), "--rank", "32"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{tmp_path / 'lora'}\n")
    for kind in ("embedding", "norm"):
        assert any(kind in line and "NOT COVERED" in line for line in text.splitlines())
    assert "--save-rest" in text
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["modules_to_save"] is None


def test_layers_that_did_not_change_get_no_factors(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    tuned = make_model(tmp_path / "tuned")
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(tuned, {name: read(tuned)[name] * 1.5})
    found = extract_lora(tuned, base, tmp_path / "lora", rank=32, error=0.01)
    assert [(part.kind, part.tensors) for part in found.parts] == [("down_proj", 4)]
    checkpoint = open_checkpoint(str(tmp_path / "lora"))
    assert set(checkpoint.changes) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)}
    assert torch.equal(checkpoint.tensor(name.replace("1", "2")), read(base)[name.replace("1", "2")])
    assert torch.allclose(
        logits(adapted_model(base, tmp_path / "lora")),
        logits(AutoModelForCausalLM.from_pretrained(tuned)),
        atol=0.05,
    )


def test_gpt2_layers_lie_the_other_way_round(tmp_path: Path) -> None:
    settings = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=1)
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        GPT2LMHeadModel(settings).save_pretrained(tmp_path / name)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert extract_lora(tuned, base, tmp_path / "lora", rank=64, save_rest=True).error < 1e-5
    expected = logits(AutoModelForCausalLM.from_pretrained(tuned))
    assert torch.allclose(logits(adapted_model(base, tmp_path / "lora")), expected, atol=1e-4)


def test_half_precision_factors_tell_their_own_error(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", dtype=torch.bfloat16)
    tuned = make_model(tmp_path / "tuned", seed=1, base=base, dtype=torch.bfloat16)
    found = extract_lora(tuned, base, tmp_path / "lora", rank=64, dtype="bfloat16")
    linear = [part.error for part in found.parts if part.how == "lora"]
    assert all(1e-4 < error < 1e-2 for error in linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--rank 0: should be 1 or more"),
        ({"error": 1.0}, "--error 1: should be from 0 up to 1"),
        ({"alpha": 0.0}, "--alpha 0: should be a number above 0"),
        ({"dtype": "int8"}, "--dtype int8: should be one of float32, bfloat16, float16"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        extract_lora(tmp_path, tmp_path, tmp_path / "out", **{"rank": 4, **options})


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    other = make_model(tmp_path / "other", hidden=64)
    with pytest.raises(CheckpointError, match="'model' has hidden_size 64, the base 32"):
        extract_lora(other, base, tmp_path / "lora", rank=4)
    with pytest.raises(CheckpointError, match=r"the same weights as .*nothing to extract"):
        extract_lora(base, base, tmp_path / "lora", rank=4)
    with pytest.raises(UserError, match="is not an empty folder"):
        extract_lora(base, base, other, rank=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]
