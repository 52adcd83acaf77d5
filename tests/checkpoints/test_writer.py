from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomerge.checkpoints import Checkpoint, CheckpointWriter, open_checkpoint, parse_size
from evomerge.checkpoints.writer import plan_shards
from evomerge.errors import InfrastructureError, UserError
from evomerge.randomness import generator
from tests.models import make_model

Layout = list[tuple[str, tuple[int, ...], torch.dtype]]


def layout_of(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Layout:
    return [(name, info.shape, dtype or info.dtype) for name, info in checkpoint.tensors.items()]


def writer_for(source: Path, out: Path, **options: Any) -> CheckpointWriter:
    checkpoint = open_checkpoint(str(source))
    return CheckpointWriter(out, layout_of(checkpoint), config=checkpoint.config, donor=source, **options)


def copy_weights(source: Path, writer: CheckpointWriter, chunk: int = 777) -> None:
    checkpoint = open_checkpoint(str(source))
    for name in checkpoint.tensors:
        flat = checkpoint.tensor(name).flatten()
        for start in range(0, flat.numel(), chunk):
            writer.write(name, start, flat[start : start + chunk])


def copy(source: Path, out: Path, **options: Any) -> Path:
    with writer_for(source, out, **options) as writer:
        copy_weights(source, writer)
        return writer.commit()


def logits(path: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits


@pytest.mark.parametrize("size", [5_000_000_000, 60_000])
def test_a_copied_checkpoint_loads_with_transformers_and_gives_the_same_logits(
    any_model: Path, tmp_path: Path, size: int
) -> None:
    out = copy(any_model, tmp_path / "new" / "out", max_shard_size=size)
    assert torch.equal(logits(out), logits(any_model))
    assert open_checkpoint(str(out)).sha256 == open_checkpoint(str(any_model)).sha256
    shards = [file for file in out.glob("*.safetensors") if file.name != "model.safetensors"]
    assert bool(shards) is (out / "model.safetensors.index.json").exists() is (size == 60_000)


def test_the_folder_looks_as_transformers_writes_it(model: Path, sharded: Path, tmp_path: Path) -> None:
    single = copy(model, tmp_path / "single")
    assert {file.name for file in single.iterdir()} == {file.name for file in model.iterdir()}
    many = copy(model, tmp_path / "many", max_shard_size=100_000)
    assert {file.name for file in many.iterdir()} == {file.name for file in sharded.iterdir()}
    index, theirs = (json.loads((p / "model.safetensors.index.json").read_text()) for p in (many, sharded))
    assert index["metadata"] == theirs["metadata"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    for file in many.glob("*.safetensors"):
        assert load_file(file).keys() == {k for k, shard in index["weight_map"].items() if shard == file.name}
        assert file.stat().st_size <= 105_000


def test_companions_are_copied_byte_for_byte(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    out = copy(model, tmp_path / "out")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


def test_tokenizer_and_chat_template_may_have_other_donors(model: Path, tmp_path: Path) -> None:
    tokenizer, template = make_model(tmp_path / "t"), make_model(tmp_path / "c")
    (tokenizer / "added_tokens.json").write_text('{"<new>": 259}')
    (template / "chat_template.jinja").write_text("hello")
    out = copy(model, tmp_path / "out", tokenizer_donor=tokenizer, chat_template_donor=template)
    assert (out / "added_tokens.json").read_text() == '{"<new>": 259}'
    assert (out / "chat_template.jinja").read_text() == "hello"


def test_the_config_declares_the_dtype_that_was_written(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    config = {**checkpoint.config, "torch_dtype": "float32", "dtype": "float32"}
    layout = layout_of(checkpoint, torch.bfloat16)
    with CheckpointWriter(tmp_path / "out", layout, config=config, donor=model) as writer:
        for name, _, _ in layout:
            writer.write(name, 0, checkpoint.tensor(name).bfloat16())
        out = writer.commit()
    written = json.loads((out / "config.json").read_text())
    assert written == {**checkpoint.config, "dtype": "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_tensors_of_mixed_widths_are_aligned_and_come_back(model: Path, tmp_path: Path) -> None:
    tensors = {
        "model.odd": torch.arange(3, dtype=torch.float16),
        "model.wide": torch.arange(5, dtype=torch.float64),
        "model.scalar": torch.tensor(1.5),
        "model.empty": torch.empty(0, 7, dtype=torch.bfloat16),
    }
    layout = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with CheckpointWriter(tmp_path / "out", layout, config={}, donor=model) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor)
        file = writer.commit() / "model.safetensors"
    read = load_file(file)
    assert {k: (v.dtype, v.shape, v.tolist()) for k, v in read.items()} == {
        k: (v.dtype, v.shape, v.tolist()) for k, v in tensors.items()
    }
    header = json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert header.pop("__metadata__") == {"format": "pt"}
    assert all(h["data_offsets"][0] % tensors[name].element_size() == 0 for name, h in header.items())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), size=st.integers(1, 400), shard=st.integers(1, 3000))
def test_any_order_of_any_chunks_gives_the_same_bytes(
    tmp_path: Path, model: Path, seed: int, size: int, shard: int
) -> None:
    random = generator(seed, "test")
    tensors = {f"t{i}": torch.from_numpy(random.random((4, 50 + i))) for i in range(4)}
    layout = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    out = tmp_path / "out"
    pieces = [(name, i) for name, tensor in tensors.items() for i in range(0, tensor.numel(), size)]
    with CheckpointWriter(out, layout, config={}, donor=model, max_shard_size=shard) as writer:
        for k in random.permutation(len(pieces)):
            name, start = pieces[k]
            writer.write(name, start, tensors[name].flatten()[start : start + size])
        writer.commit()
    read = dict(itertools.chain.from_iterable(load_file(file).items() for file in out.glob("*.safetensors")))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    shutil.rmtree(out)


def test_threads_may_write_at_once(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    with writer_for(model, tmp_path / "out", max_shard_size=50_000) as writer:

        def work(names: list[str]) -> None:
            for name in names:
                flat = checkpoint.tensor(name).flatten()
                for start in range(0, flat.numel(), 100):
                    writer.write(name, start, flat[start : start + 100])

        threads = [threading.Thread(target=work, args=(list(checkpoint.tensors)[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.commit()
    assert open_checkpoint(str(tmp_path / "out")).sha256 == checkpoint.sha256


def test_shards_are_filled_in_order_and_a_large_tensor_has_its_own() -> None:
    sizes = {"a": 3, "b": 3, "c": 20, "d": 4, "e": 6, "f": 1}
    shards = plan_shards([(name, (n,), torch.float16) for name, n in sizes.items()], 20)
    assert [[name for name, _, _ in shard] for shard in shards.values()] == [
        ["a", "b"],
        ["c"],
        ["d", "e"],
        ["f"],
    ]
    assert list(shards)[1] == "model-00002-of-00004.safetensors"


class TestMistakes:
    def test_a_chunk_must_fit(self, model: Path, tmp_path: Path) -> None:
        with writer_for(model, tmp_path / "out") as writer:
            for start, chunk, message in (
                (0, torch.zeros(33), "has 32 elements, not 0 to 33"),
                (-1, torch.zeros(3), "has 32 elements, not -1 to 2"),
                (0, torch.zeros(3, dtype=torch.bfloat16), "takes contiguous chunks of torch.float32"),
                (0, torch.zeros(6)[::2], "takes contiguous chunks"),
            ):
                with pytest.raises(ValueError, match=message):
                    writer.write("model.norm.weight", start, chunk)
            with pytest.raises(KeyError, match="ghost"):
                writer.write("ghost", 0, torch.zeros(1))

    @pytest.mark.parametrize(
        ("chunks", "message"),
        [
            ([], "'model.norm.weight': element 0 was not written"),
            ([(0, 31)], "element 31 was not written"),
            ([(1, 31)], "element 0 was not written"),
            ([(0, 16), (17, 15)], "element 16 was not written"),
            ([(0, 16), (15, 17)], "element 15 was written twice"),
            ([(0, 32), (0, 32)], "element 0 was written twice"),
        ],
    )
    def test_every_element_must_be_written_once(
        self, model: Path, tmp_path: Path, chunks: list[tuple[int, int]], message: str
    ) -> None:
        layout = [("model.norm.weight", (32,), torch.float32)]
        with CheckpointWriter(tmp_path / "out", layout, config={}, donor=model) as writer:
            for start, size in chunks:
                writer.write("model.norm.weight", start, torch.zeros(size))
            with pytest.raises(ValueError, match=message):
                writer.commit()
        assert siblings(tmp_path) == {"model"}

    def test_a_layout_lists_each_tensor_once(self, model: Path, tmp_path: Path) -> None:
        for layout in ([], [("a", (1,), torch.float32)] * 2):
            with pytest.raises(ValueError, match="empty, or lists a tensor twice"):
                CheckpointWriter(tmp_path / "out", layout, config={}, donor=model)


class TestPlace:
    def test_an_empty_folder_is_used(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert copy(model, tmp_path / "out") == tmp_path / "out"

    def test_a_folder_with_files_is_refused_and_kept(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "precious").touch()
        with pytest.raises(UserError, match=f"{out}: is not empty; choose another output folder, or remove"):
            copy(model, out)
        assert [file.name for file in out.iterdir()] == ["precious"]
        assert siblings(tmp_path) == {"model", "out"}

    def test_a_file_is_refused(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "out").touch()
        with pytest.raises(UserError, match="out: is not a folder"):
            copy(model, tmp_path / "out")
        with pytest.raises(UserError, match="out/deeper: cannot be written: Not a directory"):
            copy(model, tmp_path / "out" / "deeper")

    def test_a_folder_that_appears_meanwhile_is_kept(self, model: Path, tmp_path: Path) -> None:
        with writer_for(model, tmp_path / "out") as writer:
            copy_weights(model, writer)
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").touch()
            with pytest.raises(UserError, match="appeared while the checkpoint was written"):
                writer.commit()
        assert siblings(tmp_path) == {"model", "out"}

    def test_relative_paths_are_of_the_moment_of_construction(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with writer_for(model, Path("out")) as writer:
            copy_weights(model, writer)
            monkeypatch.chdir("/")
            assert writer.commit() == tmp_path / "out"

    def test_other_users_can_read_it_as_the_umask_says(self, model: Path, tmp_path: Path) -> None:
        previous = os.umask(0o022)
        try:
            out = copy(model, tmp_path / "out")
        finally:
            os.umask(previous)
        assert out.stat().st_mode & 0o777 == 0o755
        assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}


class TestInterruption:
    def test_leaving_without_a_commit_leaves_nothing(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "new" / "folders" / "out"
        with writer_for(model, out) as writer:
            copy_weights(model, writer)
            assert not out.exists()
        assert siblings(tmp_path) == {"model"}

    def test_an_exception_leaves_nothing(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), writer_for(model, tmp_path / "out"):
            raise KeyboardInterrupt
        assert siblings(tmp_path) == {"model"}

    def test_after_kill_9_there_is_no_folder_that_looks_complete(self, model: Path, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys, pathlib; from evomerge.checkpoints import CheckpointWriter, open_checkpoint\n"
            "source = open_checkpoint(sys.argv[1])\n"
            "layout = [(name, info.shape, info.dtype) for name, info in source.tensors.items()]\n"
            "out = pathlib.Path(sys.argv[2])\n"
            "with CheckpointWriter(out, layout, config=source.config, donor=source.path) as writer:\n"
            "    for name in source.tensors: writer.write(name, 0, source.tensor(name))\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        result = subprocess.run([sys.executable, "-c", code, model, tmp_path / "out"], check=False)
        assert result.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        (left,) = (path for path in tmp_path.iterdir() if path != model)
        assert left.name.startswith(".out.")
        assert not (left / "config.json").exists()
        copy(model, tmp_path / "other")
        assert left.exists()
        copy(model, tmp_path / "out")
        assert siblings(tmp_path) == {"model", "other", "out"}

    def test_a_writer_leaves_the_folder_of_a_living_one_alone(self, model: Path, tmp_path: Path) -> None:
        with writer_for(model, tmp_path / "out") as first:
            with writer_for(model, tmp_path / "out"):
                pass
            copy_weights(model, first)
            first.commit()
        assert logits(tmp_path / "out").equal(logits(model))
        assert siblings(tmp_path) == {"model", "out"}

    def test_further_files_appear_together_with_the_checkpoint(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(source: Path, target: Path) -> None:
            assert (Path(source) / "notes.txt").read_text(encoding="utf-8") == "ü"
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        with monkeypatch.context() as patch, writer_for(model, tmp_path / "out") as writer:
            copy_weights(model, writer)
            patch.setattr("os.rename", fail)
            with pytest.raises(UserError, match="cannot be written"):
                writer.commit({"notes.txt": "ü"})
        assert siblings(tmp_path) == {"model"}


class TestFullDisk:
    MESSAGE = r"out: the disk is full: the checkpoint needs 214,912 bytes, [\d,]+ are free; make room"

    @pytest.fixture(autouse=True)
    def _leaves_nothing_behind(self, model: Path, tmp_path: Path) -> Iterator[None]:
        yield
        assert siblings(tmp_path) == {"model"}

    def test_found_before_anything_is_written(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=213_000)
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(InfrastructureError, match=self.MESSAGE.replace(r"[\d,]+", "213,000")):
            copy(model, tmp_path / "new" / "out")

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_found_while_space_is_reserved(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        calls: list[int] = []

        def reserve(descriptor: int, offset: int, size: int) -> None:
            calls.append(size)
            if len(calls) == 2:
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr("os.posix_fallocate", reserve)
        with pytest.raises(InfrastructureError, match=self.MESSAGE):
            copy(model, tmp_path / "out", max_shard_size=100_000)

    def test_found_while_writing(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.pwrite

        def fill(descriptor: int, data: memoryview, offset: int) -> int:
            if offset > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data, offset)

        monkeypatch.setattr("os.pwrite", fill)
        with pytest.raises(InfrastructureError, match=self.MESSAGE):
            copy(model, tmp_path / "out")


def test_short_writes_are_continued(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda fd, data, offset: write(fd, data[: len(data) // 2 + 1], offset))
    out = copy(model, tmp_path / "out")
    theirs, ours = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_file_systems_that_cannot_reserve_are_written_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("os.posix_fallocate", refuse)
    assert torch.equal(logits(copy(model, tmp_path / "out")), logits(model))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 5 * 10**8),
        ("100kb", 10**5),
        ("2GiB", 2**31),
        ("1.5G", 15 * 10**8),
        ("123", 123),
        (456, 456),
        ("1T", 10**12),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 parsecs", "0", "0.1B", "5GBB", None, "1e9"])
def test_sizes_that_are_not_understood(text: Any) -> None:
    with pytest.raises(UserError, match=r"size .* is not understood; write it like 5GB"):
        parse_size(text)


def siblings(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
