"""Scoring a model on a skill's items, the way the task YAMLs ask for."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from settings import Settings
from skills import SKILLS, Item, draw_splits
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

LONGEST_ANSWER = 8


def score_model(folder: Path, settings: Settings, split: str) -> dict[str, float]:
    """The share of items answered exactly, per skill, of the model in `folder`."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        name: exact_match(model, tokenizer, draw_splits(skill, settings.splits, settings.seed)[split])
        for name, skill in SKILLS.items()
    }


@torch.inference_mode()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: list[Item]) -> float:
    """The share of items answered exactly: the likeliest choice, or the greedy line where there are no choices."""
    by_length: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        by_length[len(item.prompt)].append(item)
    right = 0
    for group in by_length.values():
        answers = choose(model, tokenizer, group) if group[0].choices else write(model, tokenizer, group)
        right += sum(answer == item.answer for answer, item in zip(answers, group, strict=True))
    return right / len(items)


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: list[Item]) -> list[str]:
    """Each item's greedy answer up to the line end. All prompts have the same length."""
    prompts = torch.tensor([tokenizer.encode(item.prompt) for item in items])
    rows = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=LONGEST_ANSWER,
        eos_token_id=tokenizer.encode("\n"),
    )
    return [line.split("\n")[0] for line in tokenizer.batch_decode(rows[:, prompts.shape[1] :])]


def choose(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: list[Item]) -> list[str]:
    """Each item's likeliest choice. All prompts have the same length, and so have all choices."""
    rows = torch.tensor([tokenizer.encode(item.prompt + choice) for item in items for choice in item.choices])
    start = len(tokenizer.encode(items[0].prompt))
    scores = model(rows).logits[:, start - 1 : -1].log_softmax(-1)
    chosen = scores.gather(-1, rows[:, start:, None]).sum((1, 2)).view(len(items), -1).argmax(-1)
    return [item.choices[index] for item, index in zip(items, chosen.tolist(), strict=True)]
