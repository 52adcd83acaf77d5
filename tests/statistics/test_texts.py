"""Texts: what is read, how it becomes tokens, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.checkpoints import open_checkpoint
from evomerge.data_config import Data
from evomerge.errors import CheckpointError, UserError
from evomerge.statistics.texts import read_sequences, read_texts
from tests.models import make_model
from tests.statistics.helpers import encode, write_texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("texts") / "model", layers=1)


def sequences(model: Path, file: Path, **settings: object) -> list[list[int]]:
    data = Data.model_validate({"texts": str(file), **settings})
    return [s.ids[0].tolist() for s in read_sequences(data, "a", open_checkpoint(model))]


def test_the_first_samples_are_used_and_cut(model: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "t.jsonl", ["abcdef", "ghi", "jkl"])
    assert sequences(model, file, samples=2, max_length=4) == [
        encode(model, ["abcd"])[0][0].tolist(),
        encode(model, ["ghi"])[0][0].tolist(),
    ]


def test_an_answer_is_kept_and_its_prompt_cut(model: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "t.jsonl", ["xyz"], question=["abcdef "])
    (sequence,) = read_sequences(
        Data(texts=str(file), prompt="question", max_length=6), "a", open_checkpoint(model)
    )
    assert sequence.ids[0].tolist() == encode(model, ["ef xyz"])[0][0].tolist()
    assert sequence.start == 2
    (sequence,) = read_sequences(
        Data(texts=str(file), prompt="question", max_length=2), "a", open_checkpoint(model)
    )
    assert sequence.ids[0].tolist() == encode(model, ["yz"])[0][0].tolist()
    assert sequence.start == 1


def test_empty_lines_are_skipped_and_lines_counted(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert read_texts(file, "text", None, 10) == [(1, None, "a"), (3, None, "b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; write one JSON object"),
        ("\n \n", "is empty"),
        ('{"text": "a"}\n{"text": ', "line 2: is not JSON"),
        ('["a"]', "line 1: is no JSON object"),
        ('{"texts": "a"}', r"line 1: has no key 'text' \(did you mean 'texts'\?\); set the data's 'key'"),
        ('{"q": 1}', r"line 1: has no key 'text' \(there are: q\)"),
        ('{"text": ""}', "line 1: 'text' should be some text"),
        ('{"text": 3}', "line 1: 'text' should be some text, it is 3"),
        ('{"text": null}', "it is null"),
        (b"\xff\xfe", r"is not UTF-8 text"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_texts(file, "text", None, 10)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "nothing.jsonl"
    with pytest.raises(UserError, match="no such file of texts"):
        read_texts(file, "text", None, 10)
    with pytest.raises(UserError, match="no such file of texts"):
        Data(texts=str(file)).pinned()


def test_more_tokens_than_positions_are_refused(model: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "t.jsonl")
    with pytest.raises(CheckpointError, match="has 512 positions; set the data's max_length"):
        sequences(model, file, max_length=513)


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "bare", layers=1, tokenizer=False)
    with pytest.raises(CheckpointError, match="tokenizer"):
        sequences(folder, write_texts(tmp_path / "t.jsonl"))


def test_changed_texts_are_not_the_pinned_ones(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "t.jsonl")
    pinned = Data(texts=str(file)).pinned()
    write_texts(file, ["other"])
    with pytest.raises(
        UserError, match=r"t\.jsonl: the recipe expects the sha256 \w+, the file has \w+; give"
    ):
        pinned.pinned()
