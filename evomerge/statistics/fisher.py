"""The diagonal Fisher information of a model's weights.

Matena & Raffel 2022, Merging models with Fisher-weighted averaging (arXiv 2111.09832), §3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from evomerge.errors import CheckpointError
from evomerge.randomness import generator
from evomerge.statistics.texts import Sequence


def add_squared_gradients(
    model: nn.Module, log_likelihoods: Iterable[Callable[[], Tensor]]
) -> tuple[dict[nn.Parameter, Tensor], int]:
    """Return Σ (∂ log p / ∂θ)² over examples, by parameter, and the number of examples.

    Each example has a backward pass of its own: squares of sums over examples have cross terms. A gradient
    is squared, added and dropped as soon as it is complete, so that there are never all of them.

    Args:
        model: whose parameters are meant.
        log_likelihoods: for each example a function that returns its log-likelihood, a scalar.
    """
    sums = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}

    def take(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        sums[parameter].addcmul_(parameter.grad, parameter.grad)
        parameter.grad = None

    handles = []
    for parameter in sums:
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
    count = 0
    try:
        for log_likelihood in log_likelihoods:
            log_likelihood().backward()  # type: ignore[no-untyped-call]
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)
    return sums, count


def log_likelihood(model: nn.Module, sequence: Sequence, *, sampled: bool, place: str) -> Tensor:
    """Return Σ_t log p(y_t | x_<t) over a sequence's answer tokens.

    Args:
        model: a causal language model.
        sequence: its tokens; those from `start` on are the answer.
        sampled: draw y_t from the model's own distribution instead of taking the token that follows. The draw
            depends on the sequence's line alone.
        place: named in errors.

    Raises:
        CheckpointError: it is not a finite number.
    """
    ids = sequence.ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, sequence.start - 1 : -1]
    log_p = torch.log_softmax(logits.float(), dim=-1)
    targets = ids[0, sequence.start :]
    if sampled:
        cumulated = log_p.detach().double().exp().cumsum(dim=-1)
        draws = generator(0, "fisher labels", sequence.line).random(len(cumulated))
        below = cumulated < torch.from_numpy(draws).to(ids.device)[:, None] * cumulated[:, -1:]
        targets = below.sum(dim=-1)
    total = log_p.gather(-1, targets[:, None]).sum()
    if not torch.isfinite(total):
        raise CheckpointError(f"{place}: the log-likelihood of line {sequence.line} is not finite")
    return total
