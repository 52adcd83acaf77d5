"""What a search holds where, and the refusal of what cannot fit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge import memory as machine
from evomerge.cli import main
from evomerge.config import Config, load_config
from evomerge.errors import UserError
from evomerge.memory import available_memory, copy_bandwidth
from evomerge.searching import memory as planned
from evomerge.searching.memory import check_fits, plan_memory, size
from evomerge.searching.run import executor_for, resume, search
from evomerge.searching.setup import Setup, set_up
from tests.tasks import make_config

GIB = 1 << 30


@pytest.fixture
def config(family: dict[str, Path], tasks: Path, tmp_path: Path) -> Path:
    return make_config(tmp_path, family, tasks, budget={"candidates": 4})


def setup_of(config: Path, *overrides: str) -> Setup:
    return set_up(load_config(config, overrides), file=config)


def tensor_bytes(folder: Path) -> int:
    """Read the size of a checkpoint's tensors from its file, by itself."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    )


def test_parents_live_model_and_swap_are_counted_in_bytes(config: Path, family: dict[str, Path]) -> None:
    memory = plan_memory(setup_of(config))
    sizes = {name: tensor_bytes(path) for name, path in family.items()}
    assert memory.parents == sizes
    assert memory.parent_bytes == sum(sizes.values())
    assert memory.live_bytes == sizes["base"]
    # task_arithmetic reads base and experts and writes the live model.
    assert memory.swap_bytes == sum(sizes.values()) + sizes["base"]
    assert memory.swap_seconds == memory.swap_bytes / memory.bandwidth
    assert (memory.live_in, memory.parents_in, memory.workers) == ("host memory", "page cache", 1)
    assert plan_memory(setup_of(config, "output.dtype=float16")).live_bytes == sizes["base"] // 2
    assert memory.working.total > 0


def test_layer_paths_hold_all_layers_of_the_pool_at_most(config: Path, family: dict[str, Path]) -> None:
    one = tensor_bytes(family["a"])
    with (family["a"] / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    layers: dict[str, int] = {}
    for name, entry in header.items():
        if ".layers." in name:
            number = name.split(".layers.")[1].split(".")[0]
            layers[number] = layers.get(number, 0) + entry["data_offsets"][1] - entry["data_offsets"][0]
    space = "space={type: layers, pool: [a, b]}"
    memory = plan_memory(setup_of(config, space, "optimizer={}"))
    assert memory.shared_layers
    # The last layer stands twice in what is planned.
    both = one + sum(layers.values())
    assert both <= memory.live_bytes <= both + max(layers.values())
    assert "live model at most" in memory.lines()[0]
    assert "moves at most" in memory.lines()[1]
    searched = "coefficients: {method: linear, parameters: {weight: {range: [0, 1], per: expert}}}"
    space = f"space={{type: coefficients+layers, {searched}, layers: {{pool: [a, merged]}}}}"
    memory = plan_memory(setup_of(config, space, "optimizer={type: random}"))
    assert memory.shared_layers
    assert both <= memory.live_bytes <= both + max(layers.values())


def test_the_plan_says_it_in_words_and_numbers(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config)]) == 0
    said = capsys.readouterr().out
    assert "4 parents" in said
    assert "kept in the page cache; 1 x live model" in said
    assert "swap        moves" in said
    assert main(["plan", str(config), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)["memory"]
    assert numbers["swap_seconds"] > 0
    assert set(numbers["parents"]) == {"base", "a", "b", "c"}
    assert numbers["working"]["activations"] > 0


def test_what_a_run_has_measured_is_told_when_it_goes_on(config: Path, tmp_path: Path) -> None:
    run = search(config, run=tmp_path / "run")
    assert run.results["merge_seconds"] > 0
    assert run.results["score_seconds"] > 0
    said: list[str] = []
    display = type(
        "Display", (), {"show": lambda *_: None, "close": lambda _: None, "say": lambda _, t: said.append(t)}
    )
    resume(run.path, budget={"candidates": 8}, display=display())
    (plan,) = [text for text in said if "swap" in text]
    assert "of a candidate's time so far" in " ".join(plan.split())


def limited(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(planned, "available_memory", lambda: available)


def test_more_workers_than_fit_are_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live = plan_memory(setup_of(config)).live_bytes
    limited(monkeypatch, int(2.5 * live))
    overrides = ["--set", "workers.type=ray", "--set", "workers.count=4"]
    for command in (["plan"], ["search", "--run", str(tmp_path / "run")]):
        assert main([command[0], str(config), *command[1:], *overrides]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said == (
            f"evomerge: workers.count: 4 live models of {size(live)} cannot fit into the "
            f"{size(int(2.5 * live))} of host memory that are available; lower it to 2 or less"
        )
    assert not (tmp_path / "run").exists()


def test_one_model_too_many_says_what_would_help(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"output.dtype: bfloat16.*or use a machine with more host memory"):
        check_fits(plan_memory(setup_of(config)))


def test_parents_beyond_memory_are_warned_of(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = plan_memory(setup_of(config))
    limited(monkeypatch, memory.worker_host_bytes + memory.parent_bytes - 1)
    tight = plan_memory(setup_of(config))
    assert tight.parents_in == "disk"
    (warning,) = tight.warnings()
    assert "each swap reads them from disk" in warning
    limited(monkeypatch, memory.worker_host_bytes + memory.parent_bytes)
    assert plan_memory(setup_of(config)).warnings() == []


def test_automatic_workers_are_as_many_as_fit(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    setup = setup_of(config, "workers.type=ray")
    limited(monkeypatch, 100 * GIB)
    memory = plan_memory(setup)
    assert memory.workers == 16
    limited(monkeypatch, 3 * memory.worker_host_bytes + 10)
    assert plan_memory(setup).workers == 3
    limited(monkeypatch, 10)
    assert plan_memory(setup).workers == 1
    limited(monkeypatch, 2 * memory.worker_host_bytes)
    assert executor_for(setup, config)._config.count == 2  # type: ignore[attr-defined]
    assert plan_memory(setup_of(config, "workers.type=ray", "workers.cpus=4")).workers == 2
    assert plan_memory(setup_of(config, "workers.type=ray", "workers.address=10.0.0.1:6379")).workers is None


def on_gpus(setup: Setup, **workers: object) -> Setup:
    config: Config = setup.config
    changed = config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"device": "cuda"}),
            "workers": config.workers.model_copy(update={"type": "ray", **workers}),
        }
    )
    return replace(setup, config=changed)


def test_live_models_share_a_gpu_only_if_they_fit(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(config)
    live = plan_memory(setup).live_bytes
    monkeypatch.setattr(planned, "_gpus", lambda: (3 * live, 2 * live))
    memory = plan_memory(on_gpus(setup))
    assert (memory.live_in, memory.workers_per_gpu) == ("GPU memory", 1)
    assert memory.worker_host_bytes == memory.process_bytes
    check_fits(memory)
    check_fits(plan_memory(on_gpus(setup, gpus=0.5)))
    with pytest.raises(
        UserError, match=r"workers.gpus: 4 live models of .* cannot fit .* a larger share of it"
    ):
        check_fits(plan_memory(on_gpus(setup, gpus=0.25)))
    monkeypatch.setattr(planned, "_gpus", lambda: (live - 1,))
    with pytest.raises(UserError, match=r"workers.gpus: 1 live model of .* more GPU memory"):
        check_fits(plan_memory(on_gpus(setup)))


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_available_memory_is_the_kernels_or_the_control_groups(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal:  16777216 kB\nMemAvailable:  8388608 kB\n")
    assert available_memory(tmp_path) == 8 * GIB
    write(tmp_path, "proc/self/cgroup", "0::/jobs/7\n")
    group = "sys/fs/cgroup/jobs/7"
    write(tmp_path, f"{group}/memory.max", "max\n")
    write(tmp_path, f"{group}/memory.current", f"{GIB}\n")
    assert available_memory(tmp_path) == 8 * GIB
    write(tmp_path, f"{group}/memory.max", f"{4 * GIB}\n")
    write(tmp_path, f"{group}/memory.stat", f"anon 5\ninactive_file {GIB // 2}\nactive_file 0\nslab 9\n")
    assert available_memory(tmp_path) == 4 * GIB - GIB + GIB // 2
    write(tmp_path, "sys/fs/cgroup/jobs/memory.max", f"{2 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/jobs/memory.current", f"{GIB}\n")
    assert available_memory(tmp_path) == GIB


def test_a_containers_own_group_is_at_the_top(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemAvailable:  8388608 kB\n")
    write(tmp_path, "proc/self/cgroup", "0::/host/path/of/it\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{2 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", f"{GIB // 2}\n")
    assert available_memory(tmp_path) == 2 * GIB - GIB // 2


def test_old_control_groups_are_read_too(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemAvailable:  8388608 kB\n")
    write(tmp_path, "proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/x\n")
    write(tmp_path, "sys/fs/cgroup/memory/x/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory/x/memory.usage_in_bytes", f"{GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory/x/memory.stat", f"total_inactive_file {GIB // 4}\n")
    assert available_memory(tmp_path) == GIB + GIB // 4


def test_this_machine_can_be_asked() -> None:
    available = available_memory()
    assert available is None or 0 < available < 1 << 50
    assert copy_bandwidth(0.01) > 1e8
    assert machine.available_memory(Path("/nowhere")) is not None
