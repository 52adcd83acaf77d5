"""The config's `space` of layer paths: whose layers, how many, in which genome, with which scales."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from evomerge.schema import Auto, Frozen, Number, Positive, Whole, shown, two_ends

MERGED = "merged"
"""What a pool calls the winner of the coefficient search that comes before."""


class ScaleRange(Frozen):
    """What may multiply the residual stream at a jump: 1, and what lies whole steps from it in `range`."""

    range: tuple[Number, Number]
    step: Annotated[Number, Field(gt=0)] = 0.05

    _two_ends = field_validator("range", mode="before")(two_ends)

    @model_validator(mode="after")
    def _around_one(self) -> ScaleRange:
        low, high = self.range
        if not 0 < low <= 1 <= high or low == high:
            raise ValueError(
                f"range: {shown([low, high])} is not accepted: a path starts with the scale 1 everywhere; give "
                "two different numbers above 0 with 1 between them"
            )
        if low - 1 + self.step > 1e-9 and 1 + self.step - high > 1e-9:
            raise ValueError(
                f"step: {self.step:g} leaves no scale but 1 in [{low:g}, {high:g}]; give a smaller one"
            )
        return self


class LayerSpace(Frozen):
    """What may vary: which layers of a pool of models follow one another, and scales where the path jumps.

    Attributes:
        pool: names of experts, and `base`. The first gives embeddings, final norm, head and tokenizer, and the
            first and the last layer of every path; the search starts at its layers in order.
        repeats: how often one layer may occur in a path; with indicators the last layer, which ends each path, once
            more.
        min_layers, max_layers: a path's length; auto: half and twice the layers of the first model.
        scale: 1, or what may multiply the residual stream where a path jumps.
        genome: how a path is written down: ``edits`` of the first model's order, or ``indicators`` of EvoLLM.
        max_edits: how many edits a genome has room for.
        start: candidates of the first generation differ from the first model in one or two edits (``sparse``),
            or, with indicators, have every other layer of the layout switched on at random (``paper``).
        length_penalty: subtracted from the fitness that candidates are ranked by, for each layer more than the
            first model has, and added for each layer fewer.
        stop_early: whether a candidate that answers the first block of its generation clearly worse than the first
            model is asked no further.
    """

    type: Literal["layers"] = "layers"
    pool: tuple[str, ...] = Field(min_length=1)
    repeats: Positive = 2
    min_layers: Auto | Annotated[Whole, Field(ge=2)] = "auto"
    max_layers: Auto | Annotated[Whole, Field(ge=2)] = "auto"
    scale: Number | ScaleRange = 1.0
    genome: Literal["edits", "indicators"] = "edits"
    max_edits: Positive = 6
    start: Literal["sparse", "paper"] = "sparse"
    length_penalty: Annotated[Number, Field(ge=0)] = 0.0
    stop_early: bool = True

    @field_validator("scale", mode="before")
    @classmethod
    def _one_or_range(cls, scale: Any) -> Any:
        plain = isinstance(scale, int | float) and not isinstance(scale, bool)
        if (plain and scale != 1) or not (plain or isinstance(scale, dict | ScaleRange)):
            raise ValueError(
                f"{shown(scale)} is not accepted: give 1, or {{range: [low, high]}} to search it"
            )
        return scale

    @model_validator(mode="after")
    def _fits_itself(self) -> LayerSpace:
        for name in self.pool:
            if self.pool.count(name) > 1:
                raise ValueError(
                    f"pool: '{name}' is listed twice; 'repeats' says how often a layer may occur in a path"
                )
        if self.start == "paper" and self.genome != "indicators":
            raise ValueError("start: paper is how indicators start; set genome: indicators, or leave it out")
        low, high = self.min_layers, self.max_layers
        if low != "auto" and high != "auto" and low > high:
            raise ValueError(f"min_layers: {low} is more than max_layers, {high}")
        return self

    def lengths(self, layers: int) -> tuple[int, int]:
        """Return the least and the most layers of a path, of models with `layers` layers.

        Raises:
            ValueError: the first model itself, with which the search starts, is shorter or longer; or there is no
                other path.
        """
        low = max(2, layers // 2) if self.min_layers == "auto" else self.min_layers
        high = 2 * layers if self.max_layers == "auto" else self.max_layers
        if low > layers:
            raise ValueError(
                f"min_layers: {low} is more than the {layers} layers of '{self.pool[0]}', with which the search starts"
            )
        if high < layers:
            raise ValueError(
                f"max_layers: {high} is less than the {layers} layers of '{self.pool[0]}', with which the search "
                "starts; to rank shorter paths higher set length_penalty"
            )
        if len(self.pool) == 1 and self.repeats == 1 and low == layers:
            raise ValueError(
                f"min_layers: {low} leaves no path but '{self.pool[0]}' as it is; give less, repeats: 2, or a pool of "
                "two models"
            )
        return low, high
