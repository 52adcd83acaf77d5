"""Hosts: what turns a recipe into an engine that answers with its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from evomerge.config import Engine as EngineConfig
from evomerge.evaluation.requests import Engine
from evomerge.recipe import Recipe

if TYPE_CHECKING:
    from evomerge.checkpoints import Checkpoint


class LayerEvaluations(NamedTuple):
    """Layers times tokens.

    Attributes:
        computed: those that ran.
        saved: those that were left out, since another layer path had come the same way.
    """

    computed: int = 0
    saved: int = 0


NO_LAYERS = LayerEvaluations()


class Host(Protocol):
    """Holds one model, and makes its weights those of one recipe after another."""

    def hold(self, recipe: Recipe, branches: Collection[int] = ()) -> Engine:
        """Make the weights be this recipe's, unless they are already; return the engine around them.

        An engine that was returned before answers with the new weights, or is of no more use.

        Args:
            recipe: whose weights.
            branches: after how many hops the paths of waiting recipes leave this one's: what is worth keeping.

        Raises:
            CandidateFailed: the merged weights or their logits are not finite.
            UserError: the recipe does not fit the parents.
        """

    @property
    def layer_evaluations(self) -> LayerEvaluations:
        """Those of all calls so far."""

    def close(self) -> None:
        """Let the model and its memory go. May be called twice."""


def check_engine(settings: EngineConfig) -> None:
    """Check that a config's engine is installed and knows its options.

    Raises:
        UserError: it is not, or does not.
    """
    if settings.type == "vllm":
        from evomerge.engines import vllm_options

        vllm_options.check(settings.options)


def default_batch_tokens(kind: str, device: str) -> int:
    """Return the token budget of one forward pass, of a kind of engine, where the config says ``auto``."""
    if kind == "vllm":
        from evomerge.engines import vllm_options

        return vllm_options.default_batch_tokens(device)
    from evomerge.engines import hf

    return hf.default_batch_tokens(device)


def open_host(
    settings: EngineConfig, checkpoints: Mapping[str, Checkpoint], tokenizer: Any, *, threads: int = 1
) -> Host:
    """Return the host that a config's `engine` asks for; the model is made with the first recipe.

    Args:
        settings: `device`, `batch_tokens` and `max_length` already decided.
        checkpoints: the parents, by the names that recipes use.
        tokenizer: of the merged models.
        threads: tensors that are merged at the same time; they change no bit.

    Raises:
        UserError: the engine is not installed.
    """
    if settings.type == "vllm":
        from evomerge.engines.vllm_host import VLLMHost

        return VLLMHost(settings, checkpoints, tokenizer, threads=threads)
    from evomerge.engines.hf_host import HFHost

    return HFHost(settings, checkpoints, tokenizer, threads=threads)


def packing_name(settings: EngineConfig) -> str:
    """Return name and version of an engine's batching with its token budget, as blocks carry it."""
    if settings.type == "vllm":
        from evomerge.engines import vllm_options

        return vllm_options.packing_name(int(settings.batch_tokens))
    from evomerge.engines import hf

    return hf.packing_name(int(settings.batch_tokens))
