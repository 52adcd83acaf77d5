"""The vLLM engine where there is no vLLM: its options, its sentinel, and who is told what."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from evomerge.config import Engine, load_config
from evomerge.engines import check_engine, default_batch_tokens, open_host, packing_name, vllm_options
from evomerge.engines.vllm import Sentinel, _prompt_scores
from evomerge.engines.vllm_check import write_weights
from evomerge.engines.vllm_host import _max_length, _Whole
from evomerge.errors import CandidateFailed, UserError
from evomerge.merging import open_parents, plan_merge
from tests.merging.helpers import make_recipe
from tests.tasks import make_config, make_tasks


@dataclass
class EngineArgs:
    """Stands for vLLM's class of the same name: only its fields count."""

    max_num_seqs: int = 1
    enforce_eager: bool = False
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.EngineArgs = EngineArgs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_options, "installed", lambda: True)
    for name in (
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_NO_USAGE_STATS",
        "DO_NOT_TRACK",
        "VLLM_LOGGING_LEVEL",
    ):
        monkeypatch.delenv(name, raising=False)


def settings(**options: Any) -> Engine:
    return Engine(type="vllm", device="cpu", batch_tokens=512, max_length=64, options=options)


def test_without_vllm_the_user_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_options, "installed", lambda: False)
    for ask in (lambda: check_engine(settings()), lambda: open_host(settings(), {}, None)):
        with pytest.raises(
            UserError, match=r"engine.type: vllm is not installed here; .*scripts/vllm_environment"
        ):
            ask()


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_num_sequences", 4, r"no such engine argument \(did you mean 'max_num_seqs'\?\)"),
        ("max_model_len", 4, "cannot be set here: write engine.max_length"),
        ("dtype", "half", "cannot be set here: write engine.dtype"),
        ("load_format", "auto", "cannot be set here: weights are handed over in memory"),
        ("quantization", "fp8", "not supported: candidates swap their weights in one plain model"),
        ("tensor_parallel_size", 2, "2 is not supported: a worker holds its model on one device"),
    ],
)
def test_options_that_are_not_the_users_to_set_are_refused(name: str, value: object, said: str) -> None:
    with pytest.raises(UserError, match=rf"^engine.options.{name}: .*{said}"):
        check_engine(settings(**{name: value}))


@pytest.mark.usefixtures("fake_vllm")
def test_engine_arguments_are_accepted_and_telemetry_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    check_engine(settings(max_num_seqs=8, enforce_eager=True, tensor_parallel_size=1))
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == os.environ["DO_NOT_TRACK"] == "1"


def test_the_config_takes_options_for_vllm_only(tmp_path: Path, family: dict[str, Path]) -> None:
    tasks = make_tasks(tmp_path / "tasks")
    good = make_config(
        tmp_path, family, tasks, name="good", engine={"type": "vllm", "options": {"max_num_seqs": 8}}
    )
    assert load_config(good).engine.options == {"max_num_seqs": 8}
    bad = make_config(tmp_path, family, tasks, name="bad", engine={"options": {"max_num_seqs": 8}})
    with pytest.raises(UserError, match=r"engine.*options: .*max_num_seqs.* is for vLLM; write type: vllm"):
        load_config(bad)


def test_batches_are_named_by_engine_and_budget() -> None:
    assert packing_name(settings()) == "vllm-v1:512"
    assert default_batch_tokens("vllm", "cpu") < default_batch_tokens("vllm", "cuda")
    assert vllm_options.defaults("cpu", 16)["max_num_seqs"] == 16


@pytest.mark.parametrize(
    ("device", "options", "size"),
    [
        ("cpu", {}, 1 << 30),
        ("cuda", {}, None),
        ("cpu", {"gpu_memory_utilization": 0.5}, None),
        ("cuda", {"kv_cache_memory_bytes": 5}, 5),
    ],
)
def test_the_size_of_the_cache_is_known_where_it_is_not_a_share(
    device: str, options: dict[str, Any], size: int | None
) -> None:
    assert vllm_options.cache_bytes(device, options) == size


@pytest.mark.parametrize(
    ("wanted", "positions", "length"), [(64, 512, 64), (512, 512, 510), (None, 512, 510), (70, None, 70)]
)
def test_the_longest_input_leaves_vllm_two_positions(
    wanted: int | None, positions: int | None, length: int
) -> None:
    config = {} if positions is None else {"max_position_embeddings": positions}
    assert _max_length(Engine(type="vllm", max_length=wanted), config) == length
    assert _max_length(Engine(type="vllm", max_length=wanted), {"text_config": config}) == length


def test_sentinels_agree_up_to_rounding_and_ties() -> None:
    one = Sentinel((-1.0, -2.0), (5, 6, 7), (-0.1, -0.7, -0.2))
    assert one.agrees(Sentinel((-1.0, -2.001), (5, 6, 7), (-0.1, -0.701, -0.2)), 0.01)
    assert one.agrees(Sentinel((-1.0, -2.0), (5, 9, 1), (-0.1, -0.7, -3.0)), 0.01), "a tie, then another text"
    assert not one.agrees(Sentinel((-1.0, -2.0), (5, 9, 7), (-0.1, -0.9, -0.2)), 0.01)
    assert not one.agrees(Sentinel((-1.0, -2.5), (5, 6, 7), (-0.1, -0.7, -0.2)), 0.01)


def test_a_failed_merge_still_gives_vllm_every_tensor(family: dict[str, Path]) -> None:
    recipe = make_recipe(
        family, merge={"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": 0.5}}
    )
    plan = plan_merge(recipe, open_parents(recipe))

    def merged() -> Any:
        yield plan.jobs[0].name, torch.ones(plan.jobs[0].shape)
        raise CandidateFailed("not finite")

    whole = _Whole(plan, merged())
    given = dict(whole)
    assert list(given) == [job.name for job in plan.jobs]
    assert all(given[job.name].shape == job.shape for job in plan.jobs)
    assert str(whole.failure) == "not finite"


def test_weights_are_written_in_files_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr("evomerge.engines.vllm_check.SHARD_BYTES", 100)
    tensors = {f"t{i}": torch.full((15,), float(i)) for i in range(5)}
    write_weights(tmp_path, tensors.items())
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@dataclass
class Flat:
    """The part of vLLM's `FlatLogprobs` that is read: positions with several (token, log-probability)."""

    positions: list[list[tuple[int, float]]]

    @property
    def start_indices(self) -> list[int]:
        return [sum(map(len, self.positions[:i])) for i in range(len(self.positions))]

    @property
    def end_indices(self) -> list[int]:
        return [sum(map(len, self.positions[: i + 1])) for i in range(len(self.positions))]

    @property
    def token_ids(self) -> list[int]:
        return [token for position in self.positions for token, _ in position]

    @property
    def logprobs(self) -> list[float]:
        return [logprob for position in self.positions for _, logprob in position]


def test_of_equally_likely_tokens_the_first_is_greedy() -> None:
    likeliest = (7, -0.5), (9, -0.5), (3, -2.0), (4, -3.0)
    uniform = [(token, -1.0) for token in (5, 6, 7, 8)]
    found = Flat(
        [
            [],
            [(7, -0.5), *likeliest],
            [(9, -0.5), *likeliest],
            [(3, -2.0), *likeliest],
            [(11, -9.0), *likeliest],
            [(5, -1.0), *uniform],
            [(2, -0.1), (2, -0.1), (7, -3.0), (8, -3.0), (9, -3.0)],
            [(2, math.nan), *((token, math.nan) for token in (2, 7, 8, 9))],
        ]
    )
    logprobs, greedy = _prompt_scores(found)
    assert logprobs[:-1] == [-0.5, -0.5, -2.0, -9.0, -1.0, -0.1]
    assert math.isnan(logprobs[-1])
    assert greedy == [True, False, False, False, False, True, False]
