"""Whether vLLM, given weights in place, answers as with the same weights read from disk.

vLLM's reload is exact for most kinds of models, but not for all on every device: what it has packed for its
kernels may stay as it was (experts on the CPU in vLLM 0.32, for one). So the first model of each kind is
answered for by a second vLLM that reads the merged weights the usual way, in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from evomerge.engines.vllm import Sentinel, VLLMEngine
from evomerge.environment import cache_folder, prepare
from evomerge.errors import CandidateFailed, EngineLost, EvomergeError, UserError

SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Kind:
    """What decides whether a swap is exact: a model's form and what runs it, but not its weights.

    Attributes:
        config: the model's Hugging Face config.
        dtype: name of the weights' number format.
        device, batch_tokens, max_length, options: as for `VLLMEngine`.
    """

    config: dict[str, Any]
    dtype: str
    device: str
    batch_tokens: int
    max_length: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def marker(self) -> Path:
        """The file in the user's cache that says that swaps of this kind have been found exact."""
        import vllm

        hardware = (
            torch.cuda.get_device_name() if self.device == "cuda" else torch.backends.cpu.get_cpu_capability()
        )
        text = json.dumps(
            [asdict(self), vllm.__version__, torch.__version__, hardware], sort_keys=True, default=str
        )
        return cache_folder() / "vllm" / hashlib.sha256(text.encode()).hexdigest()[:32]


def write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors beside a model's config, in files of about `SHARD_BYTES`."""
    from safetensors.torch import save_file

    shard: dict[str, torch.Tensor] = {}
    number = size = 0
    for name, tensor in tensors:
        shard[name] = tensor
        size += tensor.nbytes
        if size >= SHARD_BYTES:
            save_file(shard, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
            shard, size, number = {}, 0, number + 1
    if shard:
        save_file(shard, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})


def answer_from_disk(folder: Path, kind: Kind) -> Sentinel:
    """Return what a vLLM of its own, in another process, answers with the weights of a folder.

    Raises:
        CandidateFailed: a logit is not finite.
        UserError: vLLM does not know the model, or refuses an option.
        EngineLost: it failed.
    """
    task = {"folder": str(folder), **{key: value for key, value in asdict(kind).items() if key != "config"}}
    done = subprocess.run(
        [sys.executable, "-m", "evomerge.engines.vllm_check"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [""]
    try:
        answer = json.loads(lines[-1])
    except ValueError:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EngineLost(f"a vLLM that reads its weights from disk failed: {said}") from None
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    if "lost" in answer:
        raise EngineLost(answer["lost"])
    if "failed" in answer:
        raise CandidateFailed(answer["failed"])
    return Sentinel(*(tuple(answer[name]) for name in ("prompt", "tokens", "logprobs")))


def main() -> None:
    """Read a task from standard input, write the sentinel's answer to standard output."""
    prepare()
    task = json.load(sys.stdin)
    from evomerge.checkpoints.tokenizer import load_tokenizer

    folder = Path(task.pop("folder"))
    dtype = getattr(torch, task.pop("dtype"))
    try:
        tokenizer = load_tokenizer(folder)
        engine = VLLMEngine(
            folder, tokenizer, generation_config=None, dtype=dtype, load_format="safetensors", **task
        )
        print(json.dumps(asdict(engine.sentinel())), flush=True)
        engine.close()
    except EngineLost as error:
        print(json.dumps({"lost": str(error)}))
    except CandidateFailed as error:
        print(json.dumps({"failed": str(error)}))
    except EvomergeError as error:
        print(json.dumps({"mistake": str(error)}))


if __name__ == "__main__":
    main()
