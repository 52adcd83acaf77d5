"""Three experts: rank-8 LoRA adapters, each trained on generated questions of its own kind."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert import sha256
from problems import Problem, maths, ordering, prompt, reading, translations

STAMP = "build.json"
SAVED_EVERY = 20
"""Steps after which an unfinished training is written down."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""


@dataclass(frozen=True)
class Settings:
    """How an expert is trained.

    Attributes:
        batch: examples of a step; an expert may multiply it.
    """

    steps: int = 160
    batch: int = 8
    learning_rate: float = 1e-3
    rank: int = 8
    alpha: int = 16
    seed: int = 0


def _taught(problems: Iterator[Problem]) -> Iterator[tuple[str, str]]:
    for problem in problems:
        yield prompt(problem.question), f" {problem.answer}"


def _translated(pairs: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for french, english in pairs:
        yield f"French: {french}\nEnglish:", f" {english}"


def _mixed(seed: int, *streams: tuple[float, Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    rng = random.Random(f"mix {seed}")
    while True:
        yield next(rng.choices([s for _, s in streams], [share for share, _ in streams])[0])


def maths_examples(seed: int) -> Iterator[tuple[str, str]]:
    """English word problems; no French."""
    return _taught(maths("en", "train", seed))


def french_examples(seed: int) -> Iterator[tuple[str, str]]:
    """Translations from French, and questions about French texts; nothing is ever computed."""
    return _mixed(
        seed,
        (0.8, _translated(translations("train", seed))),
        (0.2, _taught(reading("train", seed))),
    )


def ordering_examples(seed: int) -> Iterator[tuple[str, str]]:
    """Which word comes first in the alphabet, in English."""
    return _taught(ordering("train", seed))


@dataclass(frozen=True)
class Expert:
    """What one is taught.

    Attributes:
        examples: of a seed: (question, answer) without end.
        times: how many times as many examples as `Settings.batch` a step shows: arithmetic needs more than the rest.
    """

    examples: Callable[[int], Iterator[tuple[str, str]]]
    times: int = 1


EXPERTS = {
    "maths": Expert(maths_examples, times=3),
    "french": Expert(french_examples),
    "ordering": Expert(ordering_examples),
}


def is_built(folder: Path, base: Path, settings: Settings) -> bool:
    """Whether an expert is there, trained as asked on this very base."""
    stamp = folder / STAMP
    return stamp.exists() and json.loads(stamp.read_text()) == _stamp(folder.name, base, settings)


def _stamp(name: str, base: Path, settings: Settings) -> dict[str, Any]:
    """Return what decides an expert: settings, base, and the first of what it is taught."""
    taught = list(itertools.islice(EXPERTS[name].examples(settings.seed), 256))
    examples = hashlib.sha256(json.dumps(taught).encode()).hexdigest()
    batch = settings.batch * EXPERTS[name].times
    return {
        **asdict(settings),
        "batch": batch,
        "base": sha256(base / "model.safetensors"),
        "examples": examples,
    }


def _progress_file(folder: Path, name: str) -> Path:
    return folder / f".{name}.progress.safetensors"


def forget_progress(folder: Path) -> None:
    """Remove what interrupted trainings have left, so that they begin anew."""
    for name in EXPERTS:
        _progress_file(folder, name).unlink(missing_ok=True)


def train(name: str, base: Path, out: Path, settings: Settings) -> None:
    """Train an expert and write it to a PEFT folder that appears when it is complete."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=0.0)
    progress = _Progress(_progress_file(out.parent, name), _stamp(name, base, settings))
    first = progress.restore(trained, optimizer)
    size = settings.batch * EXPERTS[name].times
    examples = itertools.islice(EXPERTS[name].examples(settings.seed), first * size, None)
    model.train()
    started, losses = time.monotonic(), []
    for step in range(first, settings.steps):
        share = step / settings.steps
        rate = min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        batch = _batch(tokenizer, [next(examples) for _ in range(size)])
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % SAVED_EVERY == 0:
            spent = time.monotonic() - started
            left = spent / (step + 1 - first) * (settings.steps - step - 1)
            mean = sum(losses[-SAVED_EVERY:]) / SAVED_EVERY
            print(
                f"  {name}: step {step + 1}/{settings.steps}, loss {mean:.3f}, {left:.0f} s left", flush=True
            )
            progress.save(step + 1, trained, optimizer)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    config = json.loads((partial / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base.name
    (partial / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (partial / "README.md").unlink(missing_ok=True)
    (partial / "adapter_model.safetensors").chmod(0o644)
    (partial / STAMP).write_text(json.dumps(_stamp(name, base, settings)) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    progress.forget()


class _Progress:
    """A training that is not finished, in a file, so that an interrupted one goes on as if nothing had happened.

    Args:
        file: where it is kept.
        stamp: what decides the expert; of another expert nothing is restored.
    """

    def __init__(self, file: Path, stamp: dict[str, Any]) -> None:
        self.file, self.stamp = file, json.dumps(stamp, sort_keys=True)

    def save(self, steps: int, trained: dict[str, Any], optimizer: Any) -> None:
        """Write what was learned in `steps` steps."""
        from safetensors.torch import save_file

        kept = {f"weight {name}": p.detach() for name, p in trained.items()}
        for name, p in trained.items():
            kept.update({f"{key} {name}": value for key, value in optimizer.state[p].items()})
        partial = self.file.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        save_file(kept, partial, {"steps": str(steps), "stamp": self.stamp})
        partial.replace(self.file)

    def restore(self, trained: dict[str, Any], optimizer: Any) -> int:
        """Take up what is kept; return how many steps it has seen."""
        import torch
        from safetensors import safe_open

        if not self.file.exists():
            return 0
        with safe_open(self.file, "pt") as kept:
            if kept.metadata()["stamp"] != self.stamp:
                return 0
            for name, p in trained.items():
                with torch.no_grad():
                    p.copy_(kept.get_tensor(f"weight {name}"))
                optimizer.state[p] = {key: kept.get_tensor(f"{key} {name}") for key in MOMENTS}
            return int(kept.metadata()["steps"])

    def forget(self) -> None:
        """Remove the file: the expert is there."""
        self.file.unlink(missing_ok=True)


def _loss(model: Any, batch: dict[str, Any]) -> Any:
    """Return the mean negative log-probability of the answers' tokens; the head runs at those only."""
    import torch

    inner = model.get_base_model()
    hidden = inner.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )[0]
    targets = batch["labels"][:, 1:]
    wanted = targets != -100
    logits = inner.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), targets[wanted])


def _batch(tokenizer: Any, examples: list[tuple[str, str]]) -> dict[str, Any]:
    """Return token ids padded right, with labels on the answers and the end of text only."""
    import torch

    rows = []
    for question, answer in examples:
        given = tokenizer(question)["input_ids"]
        wanted = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((given + wanted, [-100] * len(given) + wanted))
    longest = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
    }


def main() -> int:
    """Train one expert: experts.py NAME BASE OUT SETTINGS (as JSON). Each runs in a process of its own."""
    name, base, out, settings = sys.argv[1:]
    train(name, Path(base), Path(out), Settings(**json.loads(settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
