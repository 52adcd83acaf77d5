"""Multimodal models: the language model is merged, the rest copied; and other forms of one model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from evomerge.checkpoints import open_checkpoint
from evomerge.checkpoints.names import is_outside
from evomerge.errors import CheckpointError
from evomerge.extraction import extract_lora
from evomerge.merging import Materializer, merge, open_parents, plan_merge
from evomerge.merging.binding import bind
from tests.merging.helpers import digests, make_recipe, read, rewrite
from tests.merging.speakers import write_tokenizer
from tests.models import VOCAB, make_model

IDS = torch.randint(3, VOCAB - 3, (2, 9), generator=torch.Generator().manual_seed(1))
LINEAR = {
    "method": "linear",
    "base": "base",
    "inputs": ["a", "b"],
    "parameters": {"weight": {"a": 0.25, "b": 0.75}},
}
TIES = {"method": "ties", "base": "base", "inputs": ["a", "b"], "parameters": {"density": 0.4}}
PREFIX = {"published": "language_model.model.", "live": "model.language_model."}


def language(folder: Path) -> dict[str, torch.Tensor]:
    """The language model's tensors of a folder in any form, by the text model's names."""
    tensors = read(folder)
    prefix = next((p for p in PREFIX.values() if any(name.startswith(p) for name in tensors)), "model.")
    return {"model." + n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def outside(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in read(folder).items() if not n.startswith((*PREFIX.values(), "lm_head"))}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Multimodal and text-only fine-tunes of the same language model, tied: do not write into them."""
    folder = tmp_path_factory.mktemp("gemma3")
    options = {"layers": 2, "tied": True, "tokenizer": False}
    base = make_model(folder / "base", seed=1, kind="gemma3", **options)
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    (base / "processor_config.json").write_text('{"processor_class": "Gemma3Processor"}')
    found = {"base": base}
    for seed, name in enumerate(("wrapper a", "wrapper b")):
        found[name] = make_model(folder / name, seed=seed, base=base, kind="gemma3", **options)
    found["live base"] = make_model(
        folder / "live", seed=9, base=base, noise=0.0, kind="gemma3", live_form=True, **options
    )
    for name in ("base", "wrapper a", "wrapper b"):
        found["text " + name[-1].replace("e", "base")] = text_model(found[name], folder / f"text {name}")
    return found


def text_model(wrapper: Path, folder: Path) -> Path:
    """Save the language model of a multimodal folder as the text model that it is."""
    whole = AutoModelForImageTextToText.from_pretrained(wrapper)
    config = whole.config.text_config
    config.tie_word_embeddings = True
    text = AutoModelForCausalLM.from_config(config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.save_pretrained(folder)
    return folder


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def pick(models, **names):
    return {name: models[folder] for name, folder in names.items()}


WRAPPED = {"base": "base", "a": "wrapper a", "b": "wrapper b"}


@pytest.mark.parametrize("merged", [LINEAR, TIES], ids=["linear", "ties"])
def test_of_multimodal_models_the_language_model_is_merged_and_the_rest_copied(
    models, tmp_path, merged, caplog
):
    recipe = make_recipe(pick(models, **WRAPPED), merge=merged)
    with caplog.at_level(logging.WARNING, "evomerge"):
        checkpoints = open_parents(recipe)
        out = merge(recipe, tmp_path / "out")
    assert "only the language model of expert 'a' is merged; its" in caplog.text
    assert (
        "tensors outside the language model are copied from 'base' as they are: multi_modal_projector (2), vision"
        in caplog.text
    )
    assert digests(outside(out)) == digests(outside(models["base"]))
    text = make_recipe(
        {"base": models["text base"], "a": models["text a"], "b": models["text b"]}, merge=merged
    )
    assert digests(language(out)) == digests(language(merge(text, tmp_path / "text")))

    loaded, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    live = Materializer(checkpoints).materialize(recipe)
    assert type(live) is type(loaded)
    assert digests({n: t.data for n, t in bind(live, plan_merge(recipe, checkpoints)).items()}) == digests(
        read(out)
    )
    with torch.no_grad():
        assert torch.equal(live(IDS).logits, loaded(IDS).logits)


def test_the_merged_model_sees_pictures(models, tmp_path):
    out = merge(make_recipe(pick(models, **WRAPPED), merge=LINEAR), tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(out)
    ids = torch.tensor([[5, 257, 258, 258, 258, 258, 256, 7]])
    pictures = torch.randn(2, 1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        one, other = (model(ids, pixel_values=p, token_type_ids=(ids == 258).long()).logits for p in pictures)
    assert one.isfinite().all()
    assert not torch.equal(one[:, -1], other[:, -1])


def test_what_is_copied_and_how_pictures_are_prepared_goes_along(models, tmp_path):
    out = merge(make_recipe(pick(models, **WRAPPED), merge=LINEAR), tmp_path / "out")
    listed = (out / "evomerge_copied_tensors.txt").read_text().splitlines()
    assert listed[0] == "# Outside the language model; copied from 'base' as they are."
    assert sorted(listed[1:]) == sorted(outside(models["base"]))
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (out / name).read_bytes() == (models["base"] / name).read_bytes()


def test_a_text_model_merges_into_a_multimodal_base(models, tmp_path):
    mixed = pick(models, base="base", a="text a", b="wrapper b")
    out = merge(make_recipe(mixed, merge=TIES), tmp_path / "mixed")
    assert digests(read(out)) == digests(
        read(merge(make_recipe(pick(models, **WRAPPED), merge=TIES), tmp_path / "w"))
    )


def test_a_multimodal_expert_merges_into_a_text_base(models, tmp_path, caplog):
    mixed = pick(models, base="text base", a="wrapper a", b="text b")
    with caplog.at_level(logging.WARNING, "evomerge"):
        out = merge(make_recipe(mixed, merge=TIES), tmp_path / "mixed")
    assert "only the language model of expert 'a' is merged; its 34 other tensors (multi_modal" in caplog.text
    texts = {"base": models["text base"], "a": models["text a"], "b": models["text b"]}
    assert digests(read(out)) == digests(read(merge(make_recipe(texts, merge=TIES), tmp_path / "t")))
    assert not (out / "evomerge_copied_tensors.txt").exists()
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "Gemma3ForCausalLM"


def test_the_output_has_the_form_of_its_base(models, tmp_path):
    published = merge(make_recipe(pick(models, **WRAPPED), merge=LINEAR), tmp_path / "published")
    recipe = make_recipe(pick(models, base="live base", a="wrapper a", b="wrapper b"), merge=LINEAR)
    live = merge(recipe, tmp_path / "live")
    assert set(read(live)) == set(read(models["live base"]))
    assert digests(language(live)) == digests(language(published))
    logits = [AutoModelForImageTextToText.from_pretrained(folder)(IDS).logits for folder in (published, live)]
    assert torch.equal(*logits)
    Materializer(open_parents(recipe)).materialize(recipe)


def test_an_output_format_changes_the_language_model_only(models, tmp_path):
    recipe = make_recipe(pick(models, **WRAPPED), merge=LINEAR, output={"dtype": "bfloat16"})
    out = merge(recipe, tmp_path / "out")
    assert {tensor.dtype for tensor in language(out).values()} == {torch.bfloat16}
    assert digests(outside(out)) == digests(outside(models["base"]))
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_fused_and_separate_experts_merge_with_each_other(tmp_path, kind):
    options = {"kind": kind, "layers": 2, "tokenizer": False}
    base = make_model(tmp_path / "base", seed=1, **options)
    folders = {
        "base": base,
        "fused base": make_model(tmp_path / "fused base", base=base, noise=0.0, live_form=True, **options),
    }
    for seed, name in enumerate("ab"):
        folders[name] = make_model(tmp_path / name, seed=seed, base=base, **options)
        folders["fused " + name] = make_model(
            tmp_path / f"fused {name}", seed=seed, base=base, live_form=True, **options
        )
    separate = merge(make_recipe(pick(folders, base="base", a="a", b="b"), merge=TIES), tmp_path / "separate")
    mixed = make_recipe(pick(folders, base="fused base", a="a", b="fused b"), merge=TIES)
    out = merge(mixed, tmp_path / "mixed")
    assert digests(read(out)) == digests(read(separate))
    live = Materializer(open_parents(mixed)).materialize(mixed)
    with torch.no_grad():
        assert torch.equal(live(IDS).logits, AutoModelForCausalLM.from_pretrained(out)(IDS).logits)


def test_an_unknown_model_type_merges_to_disk_by_rule(tmp_path):
    folders = {
        n: make_model(tmp_path / n, s, layers=2, tokenizer=False) for s, n in enumerate(("base", "a", "b"))
    }
    known = merge(make_recipe(folders, merge=TIES), tmp_path / "known")
    for folder in folders.values():
        edit(folder, lambda config: config.update(model_type="unheard_of"))
    recipe = make_recipe(folders, merge=TIES)
    out = merge(recipe, tmp_path / "unknown")
    assert digests(read(out)) == digests(read(known))
    with pytest.raises(
        CheckpointError, match=r"'unheard_of' cannot be built: this version of transformers .* disk"
    ):
        Materializer(open_parents(recipe)).materialize(recipe)


def test_fused_and_separate_experts_of_an_unknown_model_type_are_refused(tmp_path):
    folders = {}
    for name, live_form in (("base", True), ("a", False), ("b", False)):
        folders[name] = make_model(tmp_path / name, kind="qwen3_moe", live_form=live_form, tokenizer=False)
        edit(folders[name], lambda config: config.update(model_type="unheard_of"))
    with pytest.raises(
        CheckpointError, match="'a' has a tensor of each expert of a layer, the base one tensor of all"
    ):
        open_parents(make_recipe(folders, merge=TIES))


def test_tensors_that_transformers_would_not_load_are_copied_and_not_scored(models, tmp_path):
    shutil.copytree(models["base"], tmp_path / "base")
    extra = {
        "vision_tower.seen": torch.tensor([3, 4]),
        "vision_tower.flag": torch.tensor([True]),
        "vision_tower.scalar": torch.tensor(0.5, dtype=torch.float16),
    }
    rewrite(tmp_path / "base", extra)
    recipe = make_recipe({**pick(models, **WRAPPED), "base": tmp_path / "base"}, merge=LINEAR)
    out = read(merge(recipe, tmp_path / "out"))
    assert all(
        torch.equal(out[name], tensor) and out[name].dtype == tensor.dtype for name, tensor in extra.items()
    )
    materializer = Materializer(open_parents(recipe))
    assert materializer.materialize(recipe) is materializer.materialize(recipe)


def test_an_adapter_extracted_from_a_multimodal_model_is_that_of_its_language_model(models, tmp_path):
    extract_lora(models["wrapper a"], models["base"], tmp_path / "adapter", rank=64, save_rest=True)
    adapted = open_checkpoint(models["base"], adapter=str(tmp_path / "adapter"))
    tuned = open_checkpoint(models["wrapper a"])
    for name in adapted.tensors:
        if not is_outside(name):
            assert torch.allclose(adapted.tensor(name), tuned.tensor(name), atol=1e-5), name
        else:
            assert torch.equal(adapted.tensor(name), open_checkpoint(models["base"]).tensor(name))


def test_a_multimodal_model_gets_the_rows_of_a_union(models, tmp_path):
    expert = AutoModelForImageTextToText.from_pretrained(models["wrapper a"])
    expert.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    expert.save_pretrained(tmp_path / "expert")
    parents = {"base": shutil.copytree(models["text base"], tmp_path / "base"), "a": tmp_path / "expert"}
    wrapper = {**parents, "base": shutil.copytree(models["base"], tmp_path / "wrapper")}
    ids = {name: write_tokenizer(path) for name, path in wrapper.items()}
    write_tokenizer(parents["base"])
    ids["a"] = write_tokenizer(tmp_path / "expert", (), ["<new>"])
    merged = {"method": "linear", "base": "base", "inputs": ["base", "a"], "parameters": {"weight": 0.5}}
    for kind, folders in ((AutoModelForImageTextToText, wrapper), (AutoModelForCausalLM, parents)):
        recipe = make_recipe(folders, merge=merged, output={"tokenizer": "union"})
        out = merge(recipe, tmp_path / kind.__name__)
        rows = kind.from_pretrained(out).get_input_embeddings().weight
        assert len(rows) == VOCAB + 1
        theirs = expert.get_input_embeddings().weight
        assert torch.equal(rows[-1], theirs[ids["a"]["<new>"]])
        own = language(folders["base"])["model.embed_tokens.weight"]
        torch.testing.assert_close(rows[:VOCAB], (own + theirs[:VOCAB]) / 2, rtol=1e-6, atol=1e-6)
