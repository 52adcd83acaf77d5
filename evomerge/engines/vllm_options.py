"""Which of vLLM's engine arguments a config may set, and what they are where it does not."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterable, Mapping
from typing import Any

from evomerge.errors import UserError, nearest
from evomerge.schema import shown

VERSION = "vllm-v1"

_KEY = "engine.options"
_CPU_CACHE_BYTES = 1 << 30
_PARALLEL = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size",
    "decode_context_parallel_size",
)  # fmt: skip
_DECIDED = {
    "model": "the recipe decides it",
    "served_model_name": "nothing is served",
    "tokenizer": "the recipe decides it (output.tokenizer)",
    "tokenizer_mode": "the recipe decides it (output.tokenizer)",
    "skip_tokenizer_init": "stop strings need the tokenizer",
    "hf_config_path": "the recipe decides it",
    "hf_overrides": "the recipe decides it",
    "config_format": "the recipe decides it",
    "dtype": "write engine.dtype",
    "max_model_len": "write engine.max_length",
    "max_num_batched_tokens": "write engine.batch_tokens",
    "generation_config": "the base model's generation_config.json decides it",
    "override_generation_config": "the base model's generation_config.json decides it",
    "load_format": "weights are handed over in memory",
    "download_dir": "weights are handed over in memory",
    "seed": "nothing is drawn",
    "logprobs_mode": "tasks score the model's own log-probabilities",
    "runner": "tasks need a model that generates",
    "convert": "tasks need a model that generates",
    "distributed_executor_backend": "the model lives in the worker's process",
}
_REFUSED = (
    "quantization", "quantization_config", "enable_lora", "lora_modules", "speculative_config", "spec_method",
    "spec_model", "spec_tokens", "cpu_offload_gb", "offload_params", "offload_group_size", "enable_sleep_mode",
    "weight_transfer_config", "kv_transfer_config", "logits_processors", "worker_cls", "trust_remote_code",
)  # fmt: skip


def installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


def require() -> None:
    """Set what vLLM reads from the environment; call it before the first import of vLLM.

    Raises:
        UserError: vLLM is not installed.
    """
    if not installed():
        raise UserError(
            "engine.type: vllm is not installed here; install it with pip install 'evomerge[vllm]' (CUDA), or make "
            "an environment for the CPU with scripts/vllm_environment; or write type: hf"
        )
    # The engine core in this process: weights are handed to it as Python objects.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def check(options: Mapping[str, Any]) -> None:
    """Check that vLLM is installed and that a config's options are engine arguments that it may set.

    Raises:
        UserError: one of them is not; names the option and what to write instead.
    """
    require()
    if not options:
        return
    import vllm

    check_names(options, (field.name for field in dataclasses.fields(vllm.EngineArgs)))


def check_names(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Check options against the names of vLLM's engine arguments; see `check`."""
    known = set(known)
    for name, value in options.items():
        place = f"{_KEY}.{name}"
        if name in _DECIDED:
            raise UserError(f"{place}: cannot be set here: {_DECIDED[name]}")
        if name in _REFUSED:
            raise UserError(f"{place}: not supported: candidates swap their weights in one plain model")
        if name in _PARALLEL and value != 1:
            raise UserError(
                f"{place}: {shown(value)} is not supported: a worker holds its model on one device; leave it out, "
                "and let workers.count use the other devices"
            )
        if name not in known:
            raise UserError(
                f"{place}: this version of vLLM has no such engine argument{nearest(name, known)}"
            )


def default_batch_tokens(device: str) -> int:
    """Return the token budget of one step where the config says ``auto``."""
    return 2048 if device == "cpu" else 8192


def packing_name(batch_tokens: int) -> str:
    """Return name and version of the batching with its token budget, as blocks carry it."""
    return f"{VERSION}:{batch_tokens}"


def cache_bytes(device: str, options: Mapping[str, Any]) -> int | None:
    """Return the size of the KV cache, or None where it is a share of the device's memory."""
    if "kv_cache_memory_bytes" in options:
        return int(options["kv_cache_memory_bytes"])
    return None if device != "cpu" or "gpu_memory_utilization" in options else _CPU_CACHE_BYTES


def defaults(device: str, batch_tokens: int) -> dict[str, Any]:
    """Return the engine arguments that a config may set, where it does not.

    All that decides which requests share a step is written down here, so that it does not depend on
    vLLM's guesses about the machine.
    """
    return {
        "max_num_seqs": min(batch_tokens, 64 if device == "cpu" else 256),
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "async_scheduling": False,
        "enforce_eager": device == "cpu",
    }
