"""What a search holds where, and the refusal of what cannot fit."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from evomerge import memory as machine
from evomerge.checkpoints.tokenizer import load_tokenizer
from evomerge.cli import main
from evomerge.config import Config, load_config
from evomerge.engines import open_host, reordering
from evomerge.errors import UserError
from evomerge.memory import available_memory, copy_bandwidth
from evomerge.merging import Materializer
from evomerge.recipe import Hop, Recipe
from evomerge.searching import memory as planned
from evomerge.searching.memory import check_fits, plan_memory, size
from evomerge.searching.run import executor_for, resume, search
from evomerge.searching.setup import Setup, set_up
from tests.allocations import Allocations
from tests.models import make_family
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


def test_weights_in_another_order_are_counted(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reordering, "_possible", lambda device, dtype: dtype == torch.bfloat16)
    plain = plan_memory(setup_of(config))
    assert plain.working.reordered == 0
    assert "reordered" not in plain.lines()[0]
    memory = plan_memory(setup_of(config, "output.dtype=bfloat16"))
    # All but embedding and norms, with the head.
    assert memory.live_bytes / 2 < memory.working.reordered <= memory.live_bytes
    assert memory.working.total > memory.working.reordered
    assert "reordered weights" in memory.lines()[0]


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
    both = one + sum(layers.values())
    assert memory.live_bytes == both
    assert "live model at most" in memory.lines()[0]
    assert "moves at most" in memory.lines()[1]
    assert "shared hops" in memory.lines()[0]
    unshared = plan_memory(setup_of(config, space, "optimizer={}", "engine.prefix_sharing=0"))
    assert memory.working.total - unshared.working.total == memory.working.beginnings > 0
    assert "shared hops" not in unshared.lines()[0]
    little = plan_memory(setup_of(config, space, "optimizer={}", "engine.prefix_sharing=1e-6"))
    assert little.working.beginnings == 1000
    searched = "coefficients: {method: linear, parameters: {weight: {range: [0, 1], per: expert}}}"
    space = f"space={{type: coefficients+layers, {searched}, layers: {{pool: [a, merged]}}}}"
    memory = plan_memory(setup_of(config, space, "optimizer={type: random}"))
    assert memory.live_bytes == both


@pytest.fixture
def talkers(tmp_path: Path, tasks: Path) -> Path:
    """A search over paths of up to 12 layers, through two models of four, that answer in up to 16 tokens."""
    family = make_family(tmp_path / "long", hidden=64)
    config = make_config(
        tmp_path,
        family,
        shutil.copytree(tasks, tmp_path / "asked"),
        space={"type": "layers", "pool": ["a", "b"], "repeats": 4, "max_layers": 12},
        optimizer={"type": "edits", "population": 6},
        suite={"include": ["./asked"], "tasks": [{"task": "tiny_a", "metric": "exact_match"}]},
    )
    task = tmp_path / "asked" / "tiny_a.yaml"
    kind = {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
    kwargs = {"until": ["\n\n\n"], "max_gen_toks": 16, "do_sample": False}
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    changed = yaml.safe_load(task.read_text()) | kind | {"generation_kwargs": kwargs, "metric_list": [metric]}
    del changed["doc_to_choice"]
    task.write_text(yaml.safe_dump(changed))
    return config


def measured(setup: Setup, layers: int) -> tuple[int, int]:
    """Hold a path of so many layers and answer all questions; return the bytes of weights and of the work."""
    hops = [("a", 0), *(((("a", "b")[i // 4 % 2]), i % 4) for i in range(1, layers - 1)), ("a", 3)]
    recipe = setup.space.decode(setup.space.initial)
    models = {name: setup.sources[name] for name in "ab"}
    path = tuple(Hop(model=model, layer=layer) for model, layer in hops)
    recipe = Recipe(models=models, path=path, output=recipe.output)
    host = open_host(setup.config.engine, setup.checkpoints, load_tokenizer(setup.checkpoints["a"].path))
    engine = host.hold(recipe)
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in engine.model.parameters()}  # type: ignore[attr-defined]
    with Allocations() as work:
        engine.generate(list(setup.suite.requests()))
    host.close()
    return sum(weights.values()), work.peak


def test_the_deepest_path_is_counted_not_the_first_model(talkers: Path) -> None:
    setup = setup_of(talkers)
    memory = plan_memory(setup)
    assert memory.longest_path == 12
    assert "paths of up to 12 layers" in memory.lines()[0]
    weights, work = measured(setup, 12)
    assert memory.live_bytes == weights
    assert work / 2 < memory.working.total < 2 * work
    shallow = plan_memory(setup_of(talkers, "space={type: layers, pool: [a, b], max_layers: 4}"))
    _, work = measured(setup, 4)
    assert work / 2 < shallow.working.total < 2 * work
    assert memory.working.keys_and_values == 3 * (shallow.working.keys_and_values or 0)


def test_scales_keep_folded_matrices_besides(talkers: Path) -> None:
    setup = setup_of(talkers, "space.scale={range: [0.5, 2.0]}")
    materializer = Materializer(setup.checkpoints)
    numbers = np.random.default_rng(0)
    space, genotype = setup.space, setup.space.initial
    assert space.variation is not None
    for _ in range(60):
        genotype = space.variation.mutate(genotype, numbers)
        materializer.materialize(space.decode(genotype))
    plain = plan_memory(setup_of(talkers)).live_bytes
    assert plain < materializer.shared_bytes <= plan_memory(setup).live_bytes


def test_memory_that_cannot_hold_the_deepest_path_is_refused(
    talkers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = plan_memory(setup_of(talkers))
    text = memory.working.one_text
    assert text > plan_memory(setup_of(talkers, "space.max_layers=4")).working.one_text
    limited(monkeypatch, memory.live_bytes + text - 1)
    for command in (["plan"], ["search", "--run", str(tmp_path / "run")]):
        assert main([command[0], str(talkers), *command[1:]]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1] == (
            f"evomerge: workers.count: 1 live model of {size(memory.live_bytes)}, with {size(text)} of keys and values "
            f"of the longest text in a path of 12 layers, cannot fit into the {size(memory.live_bytes + text - 1)} of "
            "host memory that are available; lower max_layers of the space, set a shorter engine.max_length, write a "
            "shorter number format (output.dtype: bfloat16), merge smaller models, or use a machine with more host "
            "memory"
        )
    assert not (tmp_path / "run").exists()
    limited(monkeypatch, memory.live_bytes + text)
    assert main(["plan", str(talkers)]) == 0


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
    least = live + plan_memory(setup).working.one_text
    monkeypatch.setattr(planned, "_gpus", lambda: (3 * least, 2 * least))
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
