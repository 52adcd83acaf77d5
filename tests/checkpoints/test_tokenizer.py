from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from evomerge.checkpoints import check_tokenizers, load_tokenizer, open_checkpoint, tokenizer_sha256
from evomerge.checkpoints.tokenizer import (
    CHAT_TEMPLATE_FILES,
    TOKENIZER_FILES,
    chat_templates,
    copy_tokenizer,
    read_vocabulary,
    vocabulary_digest,
)
from evomerge.errors import CheckpointError
from tests.models import make_model, make_tokenizer

EditJson = Callable[[Path, Callable[[dict[str, Any]], Any]], None]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an expert with the same tokenizer, which the test may spoil."""
    base = make_model(tmp_path / "base")
    return base, make_model(tmp_path / "x", base=base)


def check(pair: tuple[Path, Path]) -> list[str]:
    base, expert = pair
    return check_tokenizers(
        open_checkpoint(str(base), name="base"), {"x": open_checkpoint(str(expert), name="x")}
    )


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["model"]["vocab"][new] = data["model"]["vocab"].pop(old)

    return change


def test_equal_tokenizers_pass(pair: tuple[Path, Path]) -> None:
    assert check(pair) == []


def test_files_may_be_written_differently(pair: tuple[Path, Path]) -> None:
    file = pair[1] / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7, sort_keys=True))
    assert check(pair) == []


def test_other_ids_are_no_hindrance(pair: tuple[Path, Path], edit_json: EditJson) -> None:
    edit_json(pair[1] / "tokenizer.json", rename("a", "ab"))
    assert check(pair) == []


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_beside_the_vocabulary_count(
    pair: tuple[Path, Path], edit_json: EditJson, file: str
) -> None:
    before = vocabulary_digest(pair[1])
    if file == "added_tokens.json":
        (pair[1] / file).write_text('{"<tool>": 259}')
    else:
        added = {"259": {"content": "<tool>", "special": True}}
        edit_json(pair[1] / file, lambda data: data.update(added_tokens_decoder=added))
    assert read_vocabulary(pair[1]).ids["<tool>"] == 259
    assert vocabulary_digest(pair[1]) != before == vocabulary_digest(pair[0])


def test_settings_do_not_change_the_digest_of_the_vocabulary(
    pair: tuple[Path, Path], edit_json: EditJson
) -> None:
    edit_json(pair[1] / "tokenizer_config.json", lambda data: data.update(chat_template="x", padding_side=1))
    assert vocabulary_digest(pair[0]) == vocabulary_digest(pair[1])


def test_merges_are_compared_in_order(pair: tuple[Path, Path], edit_json: EditJson) -> None:
    for path, merges in zip(pair, (["a b", "c d"], [["a", "b"], ["d", "c"]]), strict=True):
        edit_json(path / "tokenizer.json", lambda data, merges=merges: data["model"].update(merges=merges))
    assert len(check(pair)) == 1
    assert "other BPE merges than that of base (number 1 is 'c d' in base, 'd c' in x)" in check(pair)[0]
    edit_json(pair[1] / "tokenizer.json", lambda data: data["model"].update(merges=[["a", "b"], ["c", "d"]]))
    assert check(pair) == []


def test_another_normalizer_is_warned_of(pair: tuple[Path, Path], edit_json: EditJson) -> None:
    edit_json(pair[1] / "tokenizer.json", lambda data: data.update(normalizer={"type": "NFC"}))
    assert len(check(pair)) == 1
    assert "the normalizer of expert 'x' is written differently from that of base" in check(pair)[0]


def test_a_checkpoint_without_tokenizer_is_accepted_with_a_warning(pair: tuple[Path, Path]) -> None:
    for file in pair[1].glob("tokenizer*"):
        file.unlink()
    assert check(pair) == [
        f"{pair[1]}: expert 'x' has no tokenizer files, so its tokens are taken to be the base's"
    ]
    assert check((pair[1], pair[0])) == [f"{pair[1]}: the base has no tokenizer files"]


def test_without_one_in_the_base_the_experts_are_compared_with_each_other(
    tmp_path: Path, edit_json: EditJson
) -> None:
    base = make_model(tmp_path / "base", tokenizer=False)
    experts = {name: open_checkpoint(str(make_model(tmp_path / name, base=base))) for name in "ab"}
    assert check_tokenizers(open_checkpoint(str(base)), experts) == [
        f"{base}: the base has no tokenizer files"
    ]
    edit_json(tmp_path / "b" / "tokenizer.json", lambda data: data.update(normalizer={"type": "NFC"}))
    warnings = check_tokenizers(open_checkpoint(str(base)), experts)
    assert "expert 'b' is written differently from that of expert 'a'" in warnings[1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": []}', '{"model": {"vocab": 3}}'])
def test_a_broken_tokenizer_is_refused(pair: tuple[Path, Path], text: str) -> None:
    (pair[1] / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"x/tokenizer.json: "):
        check(pair)


def test_the_vocabulary_is_the_one_that_transformers_loads(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert dict(read_vocabulary(tmp_path).ids) == load_tokenizer(tmp_path).get_vocab()


def test_unigram_and_separate_vocabulary_files_are_read(tmp_path: Path) -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    unigram.save(str(tmp_path / "tokenizer.json"))
    assert dict(read_vocabulary(tmp_path).ids) == {"<unk>": 0, "a": 1, "b": 2} == unigram.get_vocab()

    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    vocabulary = read_vocabulary(tmp_path)
    assert (dict(vocabulary.ids), vocabulary.merges) == ({"a": 0, "b": 1, "ab": 2}, ("a b",))


def test_the_hash_covers_names_and_bytes_of_tokenizer_and_templates(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "one")
    make_tokenizer(tmp_path / "other")
    digests = {tokenizer_sha256(tmp_path / "one")}
    assert digests == {tokenizer_sha256(tmp_path / "other")}
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja", "added_tokens.json"):
        (tmp_path / "one" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "one" / name).write_text("{}")
        digests.add(tokenizer_sha256(tmp_path / "one"))
    (tmp_path / "one" / "README.md").write_text("not a part of it")
    digests.add(tokenizer_sha256(tmp_path / "one"))
    assert len(digests) == 4


def test_loading(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "good")
    assert load_tokenizer(tmp_path / "good")("ab")["input_ids"] == [67, 68]
    with pytest.raises(CheckpointError, match="has no tokenizer files"):
        load_tokenizer(tmp_path)
    (tmp_path / "good" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="good: the tokenizer cannot be loaded: "):
        load_tokenizer(tmp_path / "good")


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize("form", ["jinja", "config", "list", "processor"])
def test_chat_templates_are_found_in_every_form(tmp_path: Path, edit_json: EditJson, form: str) -> None:
    make_tokenizer(tmp_path)
    assert chat_templates(tmp_path) == {}
    if form == "jinja":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    elif form == "processor":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    else:
        value = TEMPLATE if form == "config" else [{"name": "default", "template": TEMPLATE}]
        edit_json(tmp_path / "tokenizer_config.json", lambda data: data.update(chat_template=value))
    assert chat_templates(tmp_path) == {"default": TEMPLATE}


class TestCopy:
    def test_files_are_copied_byte_for_byte_and_nothing_else(self, tmp_path: Path) -> None:
        donor, out = tmp_path / "donor", tmp_path / "out"
        make_tokenizer(donor)
        out.mkdir()
        (donor / "additional_chat_templates").mkdir()
        for name in (*TOKENIZER_FILES, *CHAT_TEMPLATE_FILES, "README.md", "model.bin"):
            file = donor / name.replace("*", "rag")
            file.write_bytes(file.read_bytes() if file.exists() else f"{name}\r\n".encode())
        copy_tokenizer(out, donor)
        expected = {name.replace("*", "rag") for name in (*TOKENIZER_FILES, *CHAT_TEMPLATE_FILES)}
        assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == expected
        assert all((out / name).read_bytes() == (donor / name).read_bytes() for name in expected)

    @pytest.mark.parametrize("form", ["jinja", "config"])
    def test_a_chat_template_of_another_donor_replaces_the_tokenizers_own(
        self, tmp_path: Path, edit_json: EditJson, form: str
    ) -> None:
        donor, other, out = tmp_path / "donor", tmp_path / "other", tmp_path / "out"
        make_tokenizer(donor)
        make_tokenizer(other)
        out.mkdir()
        edit_json(donor / "tokenizer_config.json", lambda data: data.update(chat_template="OLD"))
        (donor / "chat_template.jinja").write_text("OLDER")
        if form == "jinja":
            (other / "chat_template.jinja").write_text(TEMPLATE)
        else:
            edit_json(other / "tokenizer_config.json", lambda data: data.update(chat_template=TEMPLATE))
        copy_tokenizer(out, donor, other)
        tokenizer = load_tokenizer(out)
        assert tokenizer.chat_template == TEMPLATE
        assert tokenizer.get_vocab() == load_tokenizer(donor).get_vocab()

    def test_a_donor_without_template_leaves_none(self, tmp_path: Path, edit_json: EditJson) -> None:
        donor, other, out = tmp_path / "donor", tmp_path / "other", tmp_path / "out"
        make_tokenizer(donor)
        make_tokenizer(other)
        out.mkdir()
        edit_json(donor / "tokenizer_config.json", lambda data: data.update(chat_template="OLD"))
        copy_tokenizer(out, donor, other)
        assert load_tokenizer(out).chat_template is None

    def test_a_template_name_that_leaves_the_folder_is_refused(
        self, tmp_path: Path, edit_json: EditJson
    ) -> None:
        donor, other, out = tmp_path / "donor", tmp_path / "other", tmp_path / "deep" / "out"
        make_tokenizer(donor)
        make_tokenizer(other)
        out.mkdir(parents=True)
        evil = [{"name": "../../evil", "template": "x"}]
        edit_json(other / "tokenizer_config.json", lambda data: data.update(chat_template=evil))
        with pytest.raises(CheckpointError, match=r"'../../evil' cannot be the name"):
            copy_tokenizer(out, donor, other)
        assert not list(tmp_path.rglob("evil*"))


def test_the_room_is_imported_without_transformers_or_the_hub() -> None:
    code = "import sys, evomerge.checkpoints; print({'transformers', 'huggingface_hub', 'ray'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
