"""The Hugging Face host: one live module whose parameters are written in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from evomerge.config import Engine as EngineConfig
from evomerge.engines.hf import HFEngine
from evomerge.engines.hops import SharedHops, budget
from evomerge.engines.host import LayerEvaluations
from evomerge.recipe import Recipe

if TYPE_CHECKING:
    from evomerge.checkpoints import Checkpoint


class HFHost:
    """Materialises recipes inside one live model; see `Host`.

    Args:
        settings: `device`, `batch_tokens` and `max_length` already decided.
        checkpoints: the parents, by the names that recipes use.
        tokenizer: of the merged models.
        threads: tensors that are merged at the same time.
    """

    def __init__(
        self,
        settings: EngineConfig,
        checkpoints: Mapping[str, Checkpoint],
        tokenizer: Any,
        *,
        threads: int = 1,
    ) -> None:
        from evomerge.merging import Materializer

        self._settings = settings
        self._tokenizer = tokenizer
        self._materializer = Materializer(checkpoints, device=settings.device, threads=threads)
        self._hops = SharedHops(budget(settings))
        self._engine: HFEngine | None = None
        self._held = ""

    def hold(self, recipe: Recipe, branches: Collection[int] = ()) -> HFEngine:
        """See `Host.hold`; a new engine is made only where the model's shape changes.

        Layer paths through the same models have one engine, whatever their length and order, and it computes once
        what they begin with.
        """
        if self._engine is None or self._held != recipe.hash:
            self._held = ""
            if self._engine is not None:
                self._engine.weights_changed()
            model = self._materializer.materialize(recipe)
            if self._engine is None or self._engine.model is not model:
                self._hops.clear()
                self._engine = HFEngine(
                    model,
                    self._tokenizer,
                    batch_tokens=int(self._settings.batch_tokens),
                    max_length=self._settings.max_length,
                    device=self._settings.device,
                    hops=self._hops,
                )
            self._held = recipe.hash
        self._engine.follow(self._materializer.path, branches)
        return self._engine

    @property
    def layer_evaluations(self) -> LayerEvaluations:
        """See `Host.layer_evaluations`."""
        return LayerEvaluations(self._hops.computed, self._hops.saved)

    def close(self) -> None:
        """See `Host.close`."""
        self._engine, self._held = None, ""
        self._hops.clear()
