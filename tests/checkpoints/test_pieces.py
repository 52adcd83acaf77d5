"""Files written in pieces hold what was filled in, around the page cache or through it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from evomerge.checkpoints import CheckpointWriter, pieces
from evomerge.checkpoints.pieces import PAGE, PIECE, Buffer, PieceFile, PiecePool
from evomerge.errors import InfrastructureError
from tests.merging.helpers import read

LAYOUT = [
    ("a", (3,), torch.float32),
    ("b", (PIECE + 5, 1), torch.bfloat16),
    ("empty", (0,), torch.bfloat16),
    ("c", (7, 11), torch.bfloat16),
    ("d", (PAGE // 2,), torch.bfloat16),
]


def fill(folder: Path, donor: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    expected = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape, dtype in LAYOUT}
    with CheckpointWriter(folder, LAYOUT, config={"model_type": "llama"}, donor=donor) as writer:
        for name, shape, dtype in LAYOUT:
            end = 0
            for start, piece in writer.pieces(name):
                assert (start, piece.dtype) == (end, dtype)
                end += piece.numel()
                piece.copy_(expected[name].view(-1)[start:end])
            assert end == torch.Size(shape).numel()
        writer.commit()
    return expected


@pytest.mark.parametrize("support", ["direct", "none", "at open only"])
def test_every_byte_arrives(support: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if support == "none":
        monkeypatch.setattr(pieces, "_DIRECT", 0)
    if support == "at open only":
        write_at = pieces.write_at

        def refuse(descriptor: int, data: memoryview, position: int) -> None:
            if descriptor in direct:
                raise OSError(errno.EINVAL, "not here")
            write_at(descriptor, data, position)

        direct: set[int] = set()
        start = PieceFile.__init__

        def remember(self: PieceFile, path: Path, descriptor: int) -> None:
            start(self, path, descriptor)
            direct.add(self._direct or -1)

        monkeypatch.setattr(pieces, "write_at", refuse)
        monkeypatch.setattr(PieceFile, "__init__", remember)
    expected = fill(tmp_path / "out", tmp_path)
    written = read(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor)


@pytest.mark.parametrize("position", [0, 8, PAGE - 2, PAGE, 3 * PAGE + 24])
@pytest.mark.parametrize("nbytes", [1, 2, PAGE - 8, PAGE, 3 * PAGE + 100])
def test_bytes_land_where_they_belong(position: int, nbytes: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xff" * (position + nbytes + 10))
    descriptor = os.open(path, os.O_RDWR)
    file = PieceFile(path, descriptor)
    data = Buffer().at(position, nbytes)
    data.copy_(torch.arange(nbytes, dtype=torch.int64).to(torch.uint8))
    file.write(data.numpy().data, position)
    file.close()
    os.close(descriptor)
    expected = b"\xff" * position + bytes(i % 256 for i in range(nbytes)) + b"\xff" * 10
    assert path.read_bytes() == expected


def test_a_full_disk_met_by_a_writing_thread_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: PieceFile, data: memoryview, position: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PieceFile, "write", full)
    with pytest.raises(InfrastructureError, match="the disk is full"):
        fill(tmp_path / "out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_buffers_are_used_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    pool = PiecePool(2)
    file = PieceFile(path, descriptor)
    seen = set()
    for i in range(20):
        buffer = pool.take()
        seen.add(id(buffer))
        buffer.at(i * PAGE, PAGE).fill_(i)
        pool.submit(file, buffer, i * PAGE, PAGE)
    pool.wait()
    pool.close()
    assert len(seen) <= 2
    assert path.read_bytes() == b"".join(bytes([i]) * PAGE for i in range(20))
    file.close()
    os.close(descriptor)


def waiting(pool: PiecePool, threads: int) -> tuple[list[threading.Thread], list[BaseException]]:
    """Start threads that wait for a buffer of a pool that has none; return them, and what they are going to raise."""
    raised: list[BaseException] = []

    def take() -> None:
        try:
            pool.take()
        except BaseException as error:
            raised.append(error)

    started = [threading.Thread(target=take, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    return started, raised


def ended(threads: list[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(timeout=10)
    return not any(thread.is_alive() for thread in threads)


def test_every_thread_that_waits_for_a_buffer_meets_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    file, pool, go_on = PieceFile(path, descriptor), PiecePool(1), threading.Event()

    def full(data: memoryview, position: int) -> None:
        go_on.wait(10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file, "write", full)
    pool.submit(file, pool.take(), 0, PAGE)
    threads, raised = waiting(pool, 3)
    go_on.set()
    assert ended(threads)
    assert [getattr(error, "errno", None) for error in raised] == [errno.ENOSPC] * 3
    pool.close()
    file.close()
    os.close(descriptor)


def test_a_closed_pool_keeps_no_thread_waiting(tmp_path: Path) -> None:
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    file, pool = PieceFile(path, descriptor), PiecePool(1)
    buffer = pool.take()
    threads, raised = waiting(pool, 3)
    pool.close()
    with pytest.raises(RuntimeError):
        pool.submit(file, buffer, 0, PAGE)
    assert ended(threads)
    assert len(raised) == 3
    assert path.read_bytes() == b""
    file.close()
    os.close(descriptor)


def test_threads_may_find_out_together_that_direct_writes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    file = PieceFile(path, descriptor)
    if file._direct is None:
        pytest.skip("no O_DIRECT here")
    together, write_at, direct = threading.Barrier(2, timeout=10), pieces.write_at, file._direct

    def refuse(fd: int, data: memoryview, position: int) -> None:
        if fd != direct:
            return write_at(fd, data, position)
        together.wait()
        os.fstat(fd)
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(pieces, "write_at", refuse)
    pool = PiecePool(2)
    for i in range(2):
        buffer = pool.take()
        buffer.at(i * PAGE, PAGE).fill_(i + 1)
        pool.submit(file, buffer, i * PAGE, PAGE)
    pool.wait()
    pool.close()
    assert path.read_bytes() == b"\1" * PAGE + b"\2" * PAGE
    os.fstat(direct)
    file.close()
    os.close(descriptor)
