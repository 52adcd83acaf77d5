"""What a LoRA adapter changes in one tensor, as data."""

from __future__ import annotations

from dataclasses import dataclass

from evomerge.checkpoints.header import TensorInfo

MERGE_FIRST = "merge it into its base first (peft: model.merge_and_unload().save_pretrained(folder))"


@dataclass(frozen=True)
class Part:
    """One matrix of one expert, of factors that a layer's experts have together (`target_parameters`).

    A is ``(experts · rank, in)``, expert by expert; B is ``(out, rank · experts)``, its columns in turn the
    experts'; gate and up projection are one matrix, the one's rows above the other's.

    Attributes:
        expert, experts: which of how many.
        start, stop: its rows of B.
    """

    expert: int
    experts: int
    start: int
    stop: int


@dataclass(frozen=True)
class Product:
    """A term s · B A, or s · (B A)ᵀ.

    Attributes:
        a: A, ``(rank, in)``.
        b: B, ``(out, rank)``.
        scale: s.
        transposed: whether the product is added transposed.
        part: of factors of all experts of a layer, the part that is one expert's.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    part: Part | None = None


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one tensor of its base; the parts apply in this order.

    Attributes:
        whole: takes the base's place (`modules_to_save`, trained biases, saved embeddings).
        tokens, rows: rows that take the place of those of these indices (`trainable_token_indices`).
        product: is added.
        shift, scale: scale · shift is added, a vector (`lora_bias`).
    """

    whole: TensorInfo | None = None
    tokens: TensorInfo | None = None
    rows: tuple[int, ...] = ()
    product: Product | None = None
    shift: TensorInfo | None = None
    scale: float = 1.0

    @property
    def replaces(self) -> bool:
        """Whether the result is a stored tensor as it is."""
        return self.infos == (self.whole,)

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The stored tensors that go in."""
        factors = () if self.product is None else (self.product.a, self.product.b)
        return tuple(i for i in (self.whole, self.tokens, *factors, self.shift) if i is not None)
