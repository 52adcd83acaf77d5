"""The space of layer paths through a pool of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from evomerge.config import Config
from evomerge.errors import UserError, at
from evomerge.layers_config import MERGED
from evomerge.recipe import Hop, Merge, Recipe, Source
from evomerge.spaces.baselines import recipe_models, whole_model
from evomerge.spaces.describe import describe_recipe
from evomerge.spaces.edits import Edits
from evomerge.spaces.genotype import Genotype, Variation, check_length
from evomerge.spaces.indicators import Indicators
from evomerge.spaces.paths import Step
from evomerge.spaces.units import to_value

SMALLEST_DEPTH = 3
"""With fewer layers there is none between the first and the last, which stay."""


class PathSpace:
    """Maps genotypes to recipes with a path.

    The first and the last layer of every path are those of the pool's first model, which also gives embeddings,
    final norm, head and tokenizer. Equal paths are equal recipes: a scale stands only where a path jumps, and a
    path that is all layers of the first model in order is that model's own recipe.

    Attributes:
        coordinates, initial: as the genome lays them out (`Edits`, `Indicators`).
        variation: the genome's.
        anchor: the recipe of the pool's first model, with `stop_early`.
        longest: layers of the longest path that a genotype may stand for.
    """

    def __init__(
        self,
        config: Config,
        *,
        num_layers: int,
        sources: Mapping[str, Source],
        merged: Recipe | None = None,
        file: Path | str | None = None,
    ) -> None:
        """Lay out the coordinates.

        Args:
            config: a validated config whose space is of layers.
            num_layers: number of layers of each model.
            sources: name → source for ``base`` and every expert.
            merged: what the pool's name ``merged`` stands for: a recipe of one merge.
            file: the config file, for messages.

        Raises:
            UserError: the models are too shallow, or the limits of a path's length exclude the first model.
        """
        assert config.layers is not None, "the config searches layer paths"
        self._config = config
        self._space = config.layers
        self._where = "space" if config.coefficients is None else "space.layers"
        self._sources = sources
        self._layers = num_layers
        self._merged = merged
        if num_layers < SMALLEST_DEPTH:
            raise UserError(
                f"{at(file, f'{self._where}.pool')}the models have {num_layers} layers; a search over layer paths "
                f"needs {SMALLEST_DEPTH} or more, since the first and the last one stay"
            )
        genome = Edits if self._space.genome == "edits" else Indicators
        try:
            self._genome: Edits | Indicators = genome(self._space, num_layers)
        except ValueError as error:
            raise UserError(f"{at(file)}{self._where}.{error}") from None
        self.coordinates = tuple(self._genome.coordinates)
        self.initial = self._genome.initial
        self.longest = self._genome.longest
        self.variation: Variation | None = self._genome
        stands = self._space.pool[0] != MERGED or merged is not None
        self.anchor: Recipe | None = self._first() if self._space.stop_early and stands else None

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return len(self.coordinates)

    def decode(self, genotype: Genotype) -> Recipe:
        """Return the recipe of a genotype.

        Raises:
            ValueError: wrong length, or a number outside its coordinate's domain.
        """
        check_length(genotype, self.dimension)
        for coordinate, number in zip(self.coordinates, genotype, strict=True):
            to_value(coordinate, number)
        return self._recipe(self._genome.steps(genotype))

    def with_merged(self, merged: Recipe) -> PathSpace:
        """Return the space with what the pool's name ``merged`` stands for."""
        return PathSpace(self._config, num_layers=self._layers, sources=self._sources, merged=merged)

    def probe(self, *, scale: float = 1.0) -> Recipe:
        """Return a recipe with every layer of every model of the pool, to see whether they can share a path.

        Args:
            scale: of the second hop, so that all that follow take it up.
        """
        models = range(len(self._space.pool))
        steps = [Step(model, layer) for model in models for layer in range(self._layers)]
        steps[1] = replace(steps[1], scale=scale)
        return self._recipe([*steps, Step(0, self._layers - 1)])

    def penalty(self, recipe: Recipe) -> float:
        """Return `length_penalty` for each layer more than one model has; negative for a shorter path."""
        length = self._layers if recipe.path is None else len(recipe.path)
        return self._space.length_penalty * (length - self._layers)

    def describe(self, what: Genotype | Recipe) -> str:
        """Return the path of a genotype or recipe in words."""
        return describe_recipe(what if isinstance(what, Recipe) else self.decode(what))

    def _recipe(self, steps: list[Step] | tuple[Step, ...]) -> Recipe:
        if list(steps) == [Step(0, layer) for layer in range(self._layers)]:
            return self._first()
        names = [self._space.pool[step.model] for step in steps]
        merges: dict[str, Merge] = {}
        used = {name for name in names if name in self._sources}
        if self._merged is not None and not used.issuperset(names):
            merges |= self._merged.merges
            used |= set(self._merged.models)
        models = recipe_models(self._config, self._sources, used)
        hops = [
            Hop(merge=name, layer=step.layer, scale=step.scale)
            if name in merges
            else Hop(model=name, layer=step.layer, scale=step.scale)
            for name, step in zip(names, steps, strict=True)
        ]
        return Recipe(
            models=models, merges=merges, path=tuple(hops), output=self._config.form, seed=self._config.seed
        )

    def _first(self) -> Recipe:
        name = self._space.pool[0]
        if self._merged is not None and name in self._merged.merges:
            return self._merged
        return whole_model(self._config, self._sources, name)
