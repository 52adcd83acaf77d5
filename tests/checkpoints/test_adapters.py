from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from evomerge.checkpoints import Checkpoint, adapted, open_checkpoint
from evomerge.errors import CheckpointError
from tests.adapters import adapted_model, make_adapter, merged_weights
from tests.models import VOCAB, make_model

Q = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

VARIETIES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rank one": {"r": 1, "targets": "all-linear"},
    "rank above the width": {"r": 40, "lora_alpha": 3},
    "rank-stabilised": {"r": 9, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"down_proj": 6, r".*\.0\.self_attn\.q_proj": 2},
        "alpha_pattern": {"q_proj": 32, "layers.3.mlp.down_proj": 1},
    },
    "embeddings": {"r": 4, "targets": ["q_proj", "embed_tokens", "lm_head"]},
    "saved modules": {"r": 4, "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "all biases": {"r": 4, "bias": "all"},
    "own biases": {"r": 4, "bias": "lora_only"},
    "bias of the product": {"r": 4, "targets": ["q_proj"], "lora_bias": True},
    "tokens": {"r": 4, "trainable_token_indices": [1, 7, 258]},
    "tokens by module": {"r": 4, "trainable_token_indices": {"embed_tokens": [5, 3]}},
    "some layers": {"r": 4, "layers_to_transform": [0, 2]},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
    "mica": {"r": 4, "init_lora_weights": "mica"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 (it has biases), untied: do not write into it."""
    return make_model(tmp_path_factory.mktemp("base") / "base", kind="qwen2")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter on it: do not write into it."""
    return make_adapter(tmp_path_factory.mktemp("adapter") / "plain", base, r=4, lora_alpha=8)


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def on(base: Path, adapter: Path) -> Checkpoint:
    return open_checkpoint(str(base), adapter=str(adapter))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


@pytest.mark.parametrize("variety", VARIETIES)
def test_an_adapted_model_has_the_weights_that_peft_merges(base: Path, tmp_path: Path, variety: str) -> None:
    folder = make_adapter(tmp_path / "adapter", base, **VARIETIES[variety])
    checkpoint, expected = on(base, folder), merged_weights(base, folder)
    assert checkpoint.tensors.keys() == expected.keys()
    plain = open_checkpoint(str(base))
    assert any(difference(plain.tensor(name), expected[name]) > 1e-3 for name in expected)
    for name, tensor in expected.items():
        assert checkpoint.tensor(name).shape == tensor.shape
        assert difference(checkpoint.tensor(name), tensor) <= 1e-6, name


def test_the_product_is_that_of_the_formula(base: Path, adapter: Path) -> None:
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{DOWN.removesuffix('weight')}lora_{x}.weight"].double() for x in "AB")
    expected = open_checkpoint(str(base)).tensor(DOWN).double() + 8 / 4 * (b @ a)
    assert difference(on(base, adapter).tensor(DOWN), expected) < 1e-6


def test_only_what_the_adapter_names_changes(base: Path, adapter: Path) -> None:
    checkpoint, plain = on(base, adapter), open_checkpoint(str(base))
    changed = {n for n in plain.tensors if not torch.equal(checkpoint.tensor(n), plain.tensor(n))}
    assert changed == {n for n in plain.tensors if "q_proj.weight" in n or "down_proj" in n}
    assert {name for name in plain.tensors if not checkpoint.mapped(name)} == changed
    assert checkpoint.path == base


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_reading_is_wider_than_the_base(tmp_path: Path, stored: torch.dtype) -> None:
    base = make_model(tmp_path / "base", dtype=stored)
    checkpoint = on(base, make_adapter(tmp_path / "adapter", base, r=4, modules_to_save=["lm_head"]))
    wide = torch.promote_types(stored, torch.float32)
    assert checkpoint.read_dtype(Q) == checkpoint.tensor(Q).dtype == wide
    assert checkpoint.tensors[Q].dtype == checkpoint.dtype == stored
    unchanged = "model.layers.0.self_attn.k_proj.weight"
    assert checkpoint.read_dtype(unchanged) == checkpoint.tensor(unchanged).dtype == stored
    assert checkpoint.read_dtype(HEAD) == checkpoint.tensor(HEAD).dtype
    with pytest.raises(ValueError, match="must be flat, contiguous and of that dtype"):
        checkpoint.read_into(Q, 0, torch.empty(8, dtype=torch.int32))
    with pytest.raises(ValueError, match="has 1024 elements, not 1020 to 1028"):
        checkpoint.read_into(Q, 1020, torch.empty(8, dtype=wide))


def test_half_precision_factors_are_multiplied_in_float32(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", dtype=torch.bfloat16)
    folder = make_adapter(tmp_path / "adapter", base, r=4, dtype=torch.bfloat16)
    stored = load_file(folder / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{Q.removesuffix('weight')}lora_{x}.weight"] for x in "AB")
    assert a.dtype == torch.bfloat16
    expected = open_checkpoint(str(base)).tensor(Q).double() + 2 * (b.double() @ a.double())
    assert difference(on(base, folder).tensor(Q), expected) < 1e-6


@pytest.mark.parametrize("block", [1, 40, 64, 96, 1000, 1 << 18])
def test_the_bits_do_not_depend_on_how_a_tensor_is_read(
    base: Path, adapter: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapted, "BLOCK", block)
    generator = torch.Generator().manual_seed(block)
    for name in (Q, DOWN):
        checkpoint = on(base, adapter)
        whole = checkpoint.tensor(name).view(-1)
        pieces = torch.empty_like(whole)
        position = 0
        while position < len(whole):
            size = min(1 + int(torch.randint(200, (), generator=generator)), len(whole) - position)
            checkpoint.read_into(name, position, pieces[position : position + size])
            position += size
        assert torch.equal(pieces, whole)
        backwards = [checkpoint.read_into(name, s, torch.empty(64)) for s in range(len(whole) - 64, -1, -64)]
        assert torch.equal(torch.cat(backwards[::-1]), whole)


def test_the_bits_do_not_depend_on_torch_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted, "BLOCK", 9 * 256)
    base = make_model(tmp_path / "base", hidden=128, layers=1)
    checkpoint = on(base, make_adapter(tmp_path / "adapter", base, r=16))
    name = "model.layers.0.mlp.down_proj.weight"
    one = checkpoint.tensor(name)
    for threads in (2, 3, 4):
        try:
            torch.set_num_threads(threads)
            several = on(base, base.parent / "adapter").tensor(name)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        assert torch.equal(several, one)


def test_threads_read_at_the_same_time(base: Path, adapter: Path) -> None:
    checkpoint = on(base, adapter)
    expected = {name: checkpoint.tensor(name) for name in (Q, DOWN)}
    wrong = []

    def read(name: str) -> None:
        for start in range(0, 1024, 37):
            part = checkpoint.read_into(name, start, torch.empty(37 if start + 37 <= 1024 else 1024 - start))
            if not torch.equal(part, expected[name].view(-1)[start : start + len(part)]):
                wrong.append((name, start))

    threads = [threading.Thread(target=read, args=(name,)) for name in (Q, DOWN) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_adapted_checkpoint_survives_pickling(base: Path, adapter: Path) -> None:
    checkpoint = on(base, adapter)
    expected = checkpoint.tensor(Q)
    assert torch.equal(pickle.loads(pickle.dumps(checkpoint)).tensor(Q), expected)


def test_gpt2_stores_its_matrices_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=1)
    )
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(tmp_path / "adapter", tmp_path / "base", targets=["c_attn", "c_proj", "c_fc"], r=4)
    expected = merged_weights(tmp_path / "base", folder)
    checkpoint = on(tmp_path / "base", folder)
    square, wide = "transformer.h.0.attn.c_proj.weight", "transformer.h.1.mlp.c_fc.weight"
    for name in (square, wide):
        assert difference(checkpoint.tensor(name), expected[name]) < 1e-6


def test_names_are_found_behind_the_prefixes_of_wrappers(base: Path, adapter: Path) -> None:
    expected = on(base, adapter).tensor(Q)
    weights = load_file(adapter / "adapter_model.safetensors")
    for prefix in (
        "base_model.model.model.language_model.",
        "base_model.model.module.model.",
        "base_model.model.",
    ):
        renamed = {prefix + n.removeprefix("base_model.model.model."): t for n, t in weights.items()}
        save_file(renamed, adapter / "adapter_model.safetensors")
        assert torch.equal(on(base, adapter).tensor(Q), expected)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"]])
def test_factors_of_all_experts_are_taken_apart(tmp_path: Path, kind: str, parameters: list[str]) -> None:
    base = make_model(tmp_path / "base", kind=kind, layers=2)
    targets = [f"mlp.experts.{name}" for name in parameters]
    folder = make_adapter(
        tmp_path / "adapter", base, r=2, lora_alpha=3, targets=["q_proj"], target_parameters=targets
    )
    live, checkpoint = merged_weights(base, folder), on(base, folder)
    names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    plain = open_checkpoint(str(base))
    for layer in range(2):
        experts = live[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = live[f"model.layers.{layer}.mlp.experts.down_proj"]
        for expert in range(3):
            gate, up = experts[expert].chunk(2)
            for projection, expected in zip(names, (gate, up, down[expert]), strict=True):
                name = f"model.layers.{layer}.{block}.experts.{expert}.{projection}.weight"
                assert difference(checkpoint.tensor(name), expected) < 1e-6
                fused = "down_proj" if projection in ("w2", "down_proj") else "gate_up_proj"
                assert torch.equal(checkpoint.tensor(name), plain.tensor(name)) is (fused not in parameters)


def test_factors_of_another_number_of_experts_are_told(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", kind="qwen3_moe", layers=2)
    other = make_model(tmp_path / "other", kind="qwen3_moe", layers=2, num_experts=4)
    folder = make_adapter(
        tmp_path / "adapter", base, r=2, targets=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    with pytest.raises(
        CheckpointError, match=r"lora_B.weight' of shape \[32, 6\] fit no matrix of the 4 experts"
    ):
        on(other, folder)


def test_an_adapter_of_a_multimodal_model_changes_all_its_parts(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", kind="gemma3", tied=True)
    folder = make_adapter(tmp_path / "adapter", base, r=2, targets="all-linear")
    expected, checkpoint = merged_weights(base, folder), on(base, folder)
    factors = load_file(folder / "adapter_model.safetensors")
    assert len(checkpoint.changes) == len(factors) // 2
    for module in {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in factors}:
        reduced = module.replace("language_model.", "")
        outside = "outside:" + module.removeprefix("model.")
        name = f"{outside if 'vision' in module else reduced}.weight"
        assert difference(checkpoint.tensor(name), expected[f"{module}.weight"]) < 1e-6


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"targets": ["q_proj"]}, True),
        ({"trainable_token_indices": [4, 9]}, True),
        ({"targets": ["embed_tokens"]}, False),
        ({"targets": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"targets": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True),
    ],
    ids=str,
)
def test_on_a_tied_base_the_logits_are_those_of_peft(
    tmp_path: Path, config: dict[str, Any], tied: bool
) -> None:
    base = make_model(tmp_path / "base", tied=True)
    folder = make_adapter(tmp_path / "adapter", base, r=4, size=0.3, **config)
    checkpoint = on(base, folder)
    assert checkpoint.tied is tied
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert (HEAD in checkpoint.tensors) is not tied
    ids = torch.tensor([[4, 9, 77, 3]])
    with torch.no_grad():
        expected = adapted_model(base, folder)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=tied)
        weights = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
        left = model.load_state_dict(weights, strict=False)
        assert not left.unexpected_keys
        assert set(left.missing_keys) <= {HEAD}
        assert difference(model(ids).logits, expected) < 1e-4


def test_an_adapter_folder_knows_its_base(base: Path, adapter: Path) -> None:
    alone = open_checkpoint(str(adapter))
    assert (alone.name, alone.path) == ("adapter", base)
    assert torch.equal(alone.tensor(Q), on(base, adapter).tensor(Q))


def test_an_adapter_folder_lies_on_the_base_that_is_given(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=5, kind="qwen2")
    given = open_checkpoint(str(adapter), base=open_checkpoint(str(other)))
    assert given.path == other
    assert torch.equal(given.tensor(Q), on(other, adapter).tensor(Q))


@pytest.mark.parametrize(
    ("there", "message"), [("/no/where", "/no/where: no such folder"), (None, "is missing")]
)
def test_an_adapter_whose_base_is_not_found_is_told(
    adapter: Path, edit_json: Callable[..., None], there: str | None, message: str
) -> None:
    edit_json(adapter / "adapter_config.json", lambda c: c.update(base_model_name_or_path=there))
    with pytest.raises(
        CheckpointError, match=rf"base_model_name_or_path: .*{message}.*source: MODEL, adapter"
    ):
        open_checkpoint(str(adapter))


def test_the_content_hash_tells_bases_adapters_and_scales_apart(
    base: Path, adapter: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    first = on(base, adapter).sha256
    assert first != open_checkpoint(str(base)).sha256
    copy = shutil.copytree(adapter, tmp_path / "elsewhere")
    edit_json(copy / "adapter_config.json", lambda c: c.update(inference_mode=False, lora_dropout=0.5))
    assert on(base, copy).sha256 == first
    edit_json(copy / "adapter_config.json", lambda c: c.update(lora_alpha=9))
    assert on(base, copy).sha256 != first
    other = make_model(tmp_path / "other", seed=5, kind="qwen2")
    assert on(other, adapter).sha256 != first
    weights = load_file(adapter / "adapter_model.safetensors")
    weights[next(iter(weights))][0, 0] += 1
    save_file(weights, adapter / "adapter_model.safetensors")
    assert on(base, adapter).sha256 != first


def test_a_nan_in_an_adapter_is_told(base: Path, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[name][0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"adapter_model.safetensors: tensor '{name}' has 1 NaN values"
    ):
        on(base, adapter).check_finite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type: 'LOHA' is no LoRA adapter.*merge_and_unload"),
        ({"peft_type": None}, "peft_type: None is no LoRA adapter"),
        (
            {"use_dora": True},
            r"use_dora: DoRA is not plain LoRA; merge it into its base first.*merge_and_unload",
        ),
        ({"use_qalora": True}, "QALoRA is not plain LoRA"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "layer replication is not plain LoRA"),
        (
            {"target_parameters": ["mlp.experts.down_proj"], "alpha_pattern": {"q_proj": 1}},
            "alpha_pattern: ranks and scales of their own are not read for target_parameters",
        ),
        ({"alora_invocation_tokens": [3]}, "activated LoRA works on some tokens only"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base's weights too"),
        ({"r": 8}, r"shapes \[4, .*but adapter_config.json gives rank 8 to 'model.layers.0"),
        ({"r": "four"}, "r: 'four' is not a number"),
        ({"r": 0}, "r: 0 is not a rank"),
        ({"lora_alpha": True}, "lora_alpha: True is not a number"),
        ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern.q_proj: None is not a number"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
    ],
)
def test_adapters_that_need_another_formula_are_refused(
    base: Path, adapter: Path, edit_json: Callable[..., None], changes: dict[str, Any], message: str
) -> None:
    edit_json(adapter / "adapter_config.json", lambda config: config.update(changes))
    with pytest.raises(CheckpointError, match=rf"^{adapter}.*{message}"):
        on(base, adapter)


def test_weights_of_dora_are_refused_by_name(
    base: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    folder = make_adapter(tmp_path / "dora", base, r=4, use_dora=True)
    edit_json(folder / "adapter_config.json", lambda config: config.pop("use_dora"))
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector' belongs to DoRA.*merge_and_unload"):
        on(base, folder)


Weights = dict[str, torch.Tensor]
KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop(KEY + "B.weight"),
            "LoRA factors of 'model.layers.1.self_attn.q_proj' are incomplete",
        ),
        (
            lambda w: w.update({KEY + "E": w[KEY + "A.weight"].clone()}),
            "is not a weight that LoRA adapters have",
        ),
        (
            lambda w: w.update({KEY + "A.weight": torch.zeros(4, 48), KEY + "B.weight": torch.zeros(48, 4)}),
            r"\[4, 48\] and .* of shape \[48, 4\] make no change of 'model.layers.1.self_attn.q_proj.weight', "
            r"which has shape \[32, 32\].*; the adapter was trained on .*base",
        ),
        (
            lambda w: w.update({"base_model.model.model.layers.9.mlp.up_proj.weight": torch.zeros(4)}),
            r"changes 'model.layers.9.mlp.up_proj.weight', which .* lacks \(did you mean 'model.layers",
        ),
        (
            lambda w: w.update({"base_model.model.lm_head.weight": torch.zeros(VOCAB + 5, 32)}),
            "has 264 rows, .*259: the vocabulary was resized for this adapter; merge it",
        ),
        (
            lambda w: w.update(
                {KEY + "A.weight": torch.zeros(4, 32, 1, 1), KEY + "B.weight": torch.zeros(32, 4, 1, 1)}
            ),
            "adapters of convolutions cannot be used",
        ),
        (
            lambda w: w.update({KEY + "A.weight": torch.zeros(4, 32, dtype=torch.int8)}),
            "has dtype I8, which cannot be merged",
        ),
        (
            lambda w: w.update({KEY + "A.default.weight": torch.zeros(4, 32)}),
            "are the same weight",
        ),
        (Weights.clear, "holds no LoRA weights"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    base: Path, adapter: Path, change: Callable[[Weights], Any], message: str
) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        on(base, adapter)


def test_folders_that_are_no_adapters_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"^{base}: is not a LoRA adapter: there is no adapter_config.json"
    ):
        open_checkpoint(str(base), adapter=str(base))
    with pytest.raises(CheckpointError, match=f"^{adapter}: is a LoRA adapter itself"):
        open_checkpoint(str(adapter), adapter=str(adapter))
    with pytest.raises(CheckpointError, match=r"^/no/where: no such folder"):
        open_checkpoint(str(base), adapter="/no/where")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"only pickled weights \(adapter_model.bin\).*evomerge convert"
    ):
        on(base, adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: there is no adapter_model.safetensors"):
        on(base, adapter)
    (adapter / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: not valid JSON"):
        on(base, adapter)
