from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from evomerge.checkpoints import AdaptedCheckpoint, open_checkpoint
from evomerge.checkpoints.adapter_base import base_doubt
from tests.adapters import make_adapter
from tests.models import make_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter trained on it: do not write into them."""
    folder = tmp_path_factory.mktemp("made")
    base = make_model(folder / "tiny-llama")
    return base, make_adapter(folder / "adapter", base, r=2)


def doubt(
    made: tuple[Path, Path],
    tmp_path: Path,
    *,
    said: str | None,
    called: str | None = None,
    folder: str = "mine",
    original: str | None = None,
    said_revision: str | None = None,
    revision: str | None = None,
) -> str | None:
    """Lay the adapter, which says that it belongs to `said`, on the base in a folder of some name."""
    base, adapter = (
        Path(shutil.copytree(path, tmp_path / name))
        for path, name in zip(made, (folder, "lora"), strict=True)
    )
    for file, change in (
        (adapter / "adapter_config.json", {"base_model_name_or_path": said, "revision": said_revision}),
        (base / "config.json", {} if original is None else {"_name_or_path": original}),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    opened = open_checkpoint(str(base), adapter=str(adapter))
    assert isinstance(opened, AdaptedCheckpoint)
    return base_doubt(opened, called or str(base), revision)


CACHED = f"hub/models--Qwen--Qwen2.5-0.5B/snapshots/{COMMIT}"


@pytest.mark.parametrize(
    "names",
    [
        {"said": None},
        {"said": "org/tiny", "folder": "tiny"},
        {"said": "org/Tiny", "called": "ORG/tiny"},
        {"said": "mirror/tiny", "called": "org/tiny"},
        {"said": "tiny", "called": "org/tiny"},
        {"said": "org/tiny", "original": "org/tiny"},
        {"said": "/somebody/models/tiny/", "folder": "tiny"},
        {"said": "C:\\models\\tiny", "folder": "tiny"},
        {"said": "unsloth/tiny-unsloth-bnb-4bit", "called": "org/tiny"},
        {"said": "Qwen/Qwen2.5-0.5B", "folder": CACHED},
        {"said": f"/elsewhere/{CACHED}", "called": "Qwen/Qwen2.5-0.5B"},
        {"said": "org/tiny", "called": "org/tiny", "said_revision": "main", "revision": COMMIT},
        {"said": "org/tiny", "called": "org/tiny", "said_revision": COMMIT, "revision": COMMIT[:9]},
        {"said": "org/tiny", "called": "org/tiny", "said_revision": COMMIT},
    ],
)
def test_names_that_agree_raise_no_doubt(made, tmp_path, names):
    assert doubt(made, tmp_path, **names) is None


def test_the_folder_it_was_trained_on_raises_no_doubt_under_another_name(made, tmp_path):
    (tmp_path / "linked").symlink_to(made[0])
    opened = open_checkpoint(str(tmp_path / "linked"), adapter=str(made[1]))
    assert isinstance(opened, AdaptedCheckpoint)
    assert base_doubt(opened, str(tmp_path / "linked")) is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"said": "org/tiny-7b", "called": "org/tiny-8b"}, "mean nothing on another"),
        ({"said": "org/tiny", "original": "org/other"}, "mean nothing on another"),
        ({"said": "org/tiny", "folder": CACHED}, "mean nothing on another"),
        ({"said": "org/tiny"}, "right only if both are the same model"),
        ({"said": "/somebody/run-7/final", "called": "org/tiny"}, "right only if both are the same model"),
        (
            {"said": "org/tiny", "called": "org/tiny", "said_revision": COMMIT, "revision": COMMIT[::-1]},
            f"at revision '{COMMIT}', here it lies on revision '{COMMIT[::-1]}' of 'org/tiny'",
        ),
        (
            {"said": "org/tiny", "called": "org/tiny", "said_revision": "v1", "revision": "v2"},
            "at revision 'v1', here it lies on revision 'v2' of 'org/tiny'",
        ),
    ],
)
def test_names_that_disagree_are_told(made, tmp_path, names, words):
    sentence = doubt(made, tmp_path, **names)
    assert sentence is not None
    assert sentence.startswith(f"{tmp_path / 'lora'}: the adapter was trained on '{names['said']}'")
    assert names.get("called", str(tmp_path / names.get("folder", "mine"))) in sentence
    assert words in sentence
