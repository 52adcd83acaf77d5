"""Training one model on a mixture of skills, on one thread."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from settings import Settings, Shape, Training
from skills import SKILLS, Item, draw_splits, held_out_keys, stream
from tokenizer import build_tokenizer, save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

IGNORED = -100
REPORTS = 4


def new_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """A model of this shape with random weights."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        **vars(shape),
        vocab_size=len(tokenizer),
        num_key_value_heads=shape.num_attention_heads,
        tie_word_embeddings=False,
        initializer_range=0.03,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def training_items(training: Training, settings: Settings) -> Iterator[Item]:
    """Yield items of the mixture for ever, none of which any split holds."""
    rng = random.Random(f"{training.seed} {training.name} mixture")
    streams = {
        name: stream(
            SKILLS[name],
            random.Random(f"{training.seed} {training.name} {name}"),
            held_out_keys(draw_splits(SKILLS[name], settings.splits, settings.seed)),
        )
        for name in training.shares
    }
    names, shares = list(training.shares), list(training.shares.values())
    while True:
        yield next(streams[rng.choices(names, shares)[0]])


class Batches:
    """Items as padded token batches; only the answer and the line end after it are to be learned."""

    def __init__(self, items: Iterator[Item], size: int) -> None:
        self.items = items
        self.size = size
        self.tokenizer = build_tokenizer()

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input ids and labels, both [batch, length]; labels are `IGNORED` outside the answer."""
        rows = []
        for _ in range(self.size):
            item = next(self.items)
            rows.append((self.tokenizer.encode(item.prompt), self.tokenizer.encode(item.answer + "\n")))
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((self.size, length), self.tokenizer.pad_token_id)
        labels = torch.full((self.size, length), IGNORED)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        return ids, labels


def pace(training: Training, step: int) -> float:
    """What the learning rates are multiplied by in a step: a linear warm-up, a constant part, a linear fall."""
    rising = min(1.0, (step + 1) / training.warmup)
    falling = min(1.0, (training.steps - step) / (training.steps * (1 - training.hold)))
    return rising * falling


def make_optimizers(model: LlamaForCausalLM, training: Training) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizers, each with its learning rate. From random weights, Muon learns in a third of AdamW's steps."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = training.matrix_rate is not None and parameter.ndim == 2 and ".layers." in name
        (matrices if is_matrix else others).append(parameter)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adam, training.rate)]
    if training.matrix_rate is not None:
        optimizers.append((torch.optim.Muon(matrices, weight_decay=0.0), training.matrix_rate))
    return optimizers


def put_layers(model: LlamaForCausalLM, layers: torch.nn.ModuleList) -> None:
    """Let the model go through these layers."""
    model.model.layers = layers
    model.config.num_hidden_layers = len(layers)


def random_depth(layers: torch.nn.ModuleList, training: Training, rng: random.Random) -> torch.nn.ModuleList:
    """The layers that one step goes through, in order: of those between the first and the last, some twice or not."""
    path = [layers[0]]
    for layer in layers[1:-1]:
        chance = rng.random()
        path += [layer] * (
            0 if chance < training.drop else 2 if chance < training.drop + training.repeat else 1
        )
    return torch.nn.ModuleList([*path, layers[-1]])


def train(training: Training, settings: Settings, parent: Path | None, out: Path) -> None:
    """Train one model and save its weights, configs and tokenizer in the folder `out`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(parent) if parent else new_model(settings.shape, training.seed)
    model.train()
    if training.layers is not None:
        model.requires_grad_(False)
        model.model.layers[slice(*training.layers)].requires_grad_(True)
    layers = model.model.layers
    rng = random.Random(f"{training.seed} {training.name} layers")
    batches = Batches(training_items(training, settings), training.batch)
    optimizers = make_optimizers(model, training)
    start = time.monotonic()
    for step in range(training.steps):
        ids, labels = next(batches)
        if training.drop or training.repeat:
            put_layers(model, random_depth(layers, training, rng))
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        learned = labels[:, 1:] != IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * pace(training, step)
            optimizer.step()
            optimizer.zero_grad()
        done = step + 1
        if done * REPORTS // training.steps > step * REPORTS // training.steps:
            speed = done / (time.monotonic() - start)
            left = (training.steps - done) / speed
            print(
                f"{training.name:<10}  step {done}/{training.steps}  loss {loss.item():.3f}"
                f"  {speed:.1f} steps/s  {left:.0f} s left",
                flush=True,
            )
    put_layers(model, layers)
    model.save_pretrained(out)
    save_tokenizer(out)
