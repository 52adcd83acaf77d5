"""TIES: trim, elect sign, disjoint merge.

Yadav et al. 2023, TIES-Merging: resolving interference when merging models (arXiv 2306.01708), §3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from evomerge.methods import native
from evomerge.methods.kernels import Sparse, Sparsify, Values
from evomerge.methods.norms import RESCALE, rescaled
from evomerge.methods.operands import STRIP, Chunk, Operands
from evomerge.methods.reductions import order_statistics
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.task_arithmetic import LAMBDA, NORMALIZE

WEIGHT = Parameter(
    "weight", "expert", "Factor of the expert's trimmed task vector, in the election and in the mean.", 1.0
)
ELECT = Parameter(
    "elect",
    "shared",
    "What decides an element's sign: the sum of the weighted entries, the number of entries of each sign, or "
    "the entry of largest magnitude (of equal ones the first input's).",
    "sum",
    kind="choice",
    choices=("sum", "count", "max"),
    dialects=("paper",),
)
MERGE = Parameter(
    "merge",
    "shared",
    "What becomes of the entries with the elected sign: their mean, their sum, or the largest of them.",
    "mean",
    kind="choice",
    choices=("mean", "sum", "max"),
    dialects=("paper",),
)
NORMALIZE_AGREEING = replace(
    NORMALIZE,
    default=True,
    doc="Divide each element's sum by the weights of the inputs that have the elected sign.",
)
TRIM = Parameter(
    "trim",
    "shared",
    "Whether density is a share of each tensor's entries or of the whole model's (of the tensors that are merged "
    "with trim: global).",
    "tensor",
    kind="choice",
    choices=("tensor", "global"),
    dialects=("paper",),
)
DIFFERS = (
    "paper averages over the number of entries that have the elected sign, and where the votes are equal takes "
    "the majority sign of the tensor; mergekit sums them, divided by their weights with normalize, and takes "
    "equal votes for +."
)


def trim(operands: Operands, values: Values) -> Sparse:
    """Step 1: keep the |τ_k| that reach the ⌊density · n⌋-th largest (at least the first), n being the number of
    the tensor's entries, or with `trim` = ``global`` of the whole model's (`Operands.thresholds`), as in the
    authors' code.

    Entries equal to that value are all kept, so that the result depends on no order.
    """
    below = []
    smallest = dict.fromkeys(range(len(operands.inputs)), 0.0)
    if values.get("trim") == "global" and operands.thresholds is not None:
        smallest.update(enumerate(operands.thresholds))
    else:
        ranks = [(k, rank_of(density, operands.size)) for k, density in enumerate(values["density"])]
        wanted = [(k, rank) for k, rank in ranks if rank < operands.size]
        found = order_statistics(operands, wanted)
        smallest.update((k, value) for (k, _), value in zip(wanted, found, strict=True))
    for k in smallest:
        least = torch.tensor(smallest[k], dtype=operands.dtype)
        below.append(torch.nextafter(least, torch.tensor(-1.0, dtype=operands.dtype)).item())

    def keep(k: int, delta: Tensor, start: int) -> None:
        if below[k] >= 0:
            torch.hardshrink(delta, below[k], out=delta)

    trims = tuple(native.Trim(low) if low >= 0 else None for low in below)
    return Sparse((1.0,) * len(operands.inputs), keep, trims)


def rank_of(density: float, n: int) -> int:
    """Return which of n magnitudes, the largest being 1, is the smallest that a trim keeps."""
    return max(1, math.floor(density * n + 1e-9))


def trim_or_drop(operands: Operands, values: Values) -> Sparse:
    """Step 1 of dialect mergekit: as `trim`, but density 0 keeps nothing."""
    scales = tuple(float(density > 0) for density in values["density"])
    return replace(trim(operands, values), scales=scales)


class Term(NamedTuple):
    """One input's part in a disjoint merge.

    Attributes:
        k: index of the input.
        vote: factor of τ̂_k in the election.
        factor: factor of τ̂_k in the merge.
        weight: its share of the divisor of a weighted mean.
    """

    k: int
    vote: float
    factor: float
    weight: float


_ELECT = ("sum", "count", "max")
_MERGE = ("mean", "weighted", "sum", "max")


@dataclass(frozen=True)
class Rule:
    """How signs are elected and how agreeing entries are merged.

    Attributes:
        elect: ``sum``, ``count`` or ``max``, as parameter `elect`.
        merge: ``mean`` (divides by the number of entries), ``weighted`` (by their weights), ``sum``, ``max``.
        tie: the sign where neither wins: the tensor's ``majority``, or always ``positive``.
    """

    elect: Literal["sum", "count", "max"]
    merge: Literal["mean", "weighted", "sum", "max"]
    tie: Literal["majority", "positive"]


def paper_rule(values: Values) -> Rule:
    """The authors' rule, with the variants that their code has too."""
    return Rule(values["elect"], values["merge"], "majority")


def mergekit_rule(values: Values) -> Rule:
    """mergekit's rule."""
    return Rule("sum", "weighted" if values["normalize"] else "sum", "positive")


@dataclass(frozen=True)
class Plan:
    """A disjoint merge of one tensor, ready for its chunks."""

    sparse: Sparse
    terms: Sequence[Term]
    rule: Rule
    scale: float
    majority: Callable[[], int]


@dataclass(frozen=True)
class DisjointMerge:
    """Steps 2 and 3 on q_k = w_k τ̂_k: θ = θ_0 + λ · merge of the q_k that have the elected sign.

    Election: the elected sign of an element is the sign of Σ_k q_k (or of Σ_k sgn q_k, or of the largest
    |q_k|). Where neither sign wins, in dialect paper it is the tensor's majority: the sign of the sum of all
    elected signs, as in the authors' code (if that is 0 too, the element stays at θ_0).

    Merge: in dialect paper the mean divides by the number of q_k with the elected sign; weights do not enter
    the divisor, so that the scale of the weights is the scale of the merged delta, and negative weights are
    as good as positive ones. With all w_k = 1 this is the paper's rule. In dialect mergekit it divides by
    the sum of their w_k (by 1 where that is 0). An expert with w_k = 0 neither votes nor counts. peft elects
    from the unweighted τ̂_k, + where they cancel out, and then averages the q_k by their number: with equal
    positive weights that is the paper's rule but for elements without a winner.

    Attributes:
        sparsify: step 1.
        rule: steps 2 and 3.
    """

    sparsify: Sparsify
    rule: Callable[[Values], Rule] = paper_rule

    def prepare(self, operands: Operands, values: Values) -> Plan:
        weights: Sequence[float] = values["weight"]
        if values["lambda"] == 0 or not any(weights):
            return plan_disjoint(operands, Sparse((), lambda k, delta, start: None), [], self.rule(values), 0)
        sparse = self.sparsify(operands, values)
        factors = [w * scale for w, scale in zip(weights, sparse.scales, strict=True)]
        terms = [Term(k, c, c, w) for k, (c, w) in enumerate(zip(factors, weights, strict=True)) if c != 0]
        return plan_disjoint(operands, sparse, terms, self.rule(values), values["lambda"])

    def apply(self, plan: Plan, chunk: Chunk, out: Tensor) -> None:
        merge_disjoint(plan, chunk, out)

    def fused(self, plan: Plan) -> native.Fused | None:
        if not plan.terms:
            return native.Fused("combine", (native.Term(native.BASE),))
        return fused_disjoint(plan)


def plan_disjoint(
    operands: Operands, sparse: Sparse, terms: Sequence[Term], rule: Rule, scale: float
) -> Plan:
    """Return the plan of θ_0 + scale · (disjoint merge of the terms under a rule)."""

    @cache
    def majority() -> int:
        if rule.tie == "positive":
            return 1
        votes = 0
        fused = fused_disjoint(plan) if native.usable(operands) else None
        if fused is not None:
            votes = native.count_votes(fused, operands.fork())
            return (votes > 0) - (votes < 0)
        for chunk in operands.fork().chunks(STRIP):
            tally = _tally(sparse, terms, rule, chunk)
            votes += int(_elect(tally, rule, chunk).to(torch.int32).sum())
        return (votes > 0) - (votes < 0)

    plan = Plan(sparse, terms, rule, scale, majority)
    return plan


def fused_disjoint(plan: Plan) -> native.Fused | None:
    """Return what `merge_disjoint` computes; None where votes and entries differ or are sparse in another way."""
    rules = plan.sparse.rules
    if rules is None or any(term.vote != term.factor for term in plan.terms):
        return None
    return native.Fused(
        "disjoint",
        (
            native.Term(native.BASE),
            *(native.Term(term.k, term.factor, rules[term.k], term.weight) for term in plan.terms),
        ),
        (_ELECT.index(plan.rule.elect), _MERGE.index(plan.rule.merge), float(plan.scale)),
        plan.majority,
    )


def merge_disjoint(plan: Plan, chunk: Chunk, out: Tensor) -> None:
    """Write one chunk of a planned merge to `out`."""
    if not plan.terms:
        out.copy_(chunk.base())
        return
    rule, tally = plan.rule, _tally(plan.sparse, plan.terms, plan.rule, chunk)
    elected = _elect(tally, rule, chunk)
    if rule.elect != "max":
        tied = torch.sign(tally["vote+"], out=chunk.row("part"))
        tied.sub_(torch.abs(elected, out=out)).clamp_(min=0)
        if tied.max() > 0:
            elected.add_(tied.mul_(plan.majority()))
    merge = "max" if rule.merge == "max" else "sum"
    positive, negative = tally[f"{merge}+"], tally[f"{merge}-"]
    if rule.merge == "mean":
        for mass, number in ((positive, tally["count+"]), (negative, tally["count-"])):
            mass.div_(number.clamp_(min=1))
    elif rule.merge == "weighted":
        for mass, divisor in ((positive, tally["weight+"]), (negative, tally["weight-"])):
            mass.div_(divisor.masked_fill_(divisor == 0, 1))
    # Arithmetic on signs instead of torch.where, which branches on every element.
    positive.mul_(torch.clamp(elected, min=0, out=out))
    negative.mul_(elected.clamp_(max=0).neg_())
    torch.add(positive, negative, out=out)
    out.mul_(plan.scale).add_(chunk.base())


def _tally(sparse: Sparse, terms: Sequence[Term], rule: Rule, chunk: Chunk) -> dict[str, Tensor]:
    """Return what a rule needs of each element's entries, by name, ``(m,)`` each.

    ``vote`` is what the election compares (the sum of the votes, or their number), ``lead`` the vote of
    largest magnitude; ``sum``, ``max``, ``count`` and ``weight`` are what the merge takes. All but ``lead``
    come twice: of the positive entries (+) and of the negative ones (-; sums are negative, counts are not).
    """
    rows: dict[str, Tensor] = {}

    def add(name: str, values: Tensor) -> None:
        if name in rows:
            rows[name].add_(values)
        else:
            rows[name] = chunk.row(name).copy_(values)

    plain = all(term.vote == term.factor for term in terms)
    votes = rule.elect == "sum" and not (plain and rule.merge != "max")
    for k, vote, factor, weight in terms:
        q = chunk.delta(k)
        sparse.keep(k, q, chunk.start)
        if vote != 1:
            q.mul_(vote)
        q.add_(0.0)  # Of -0.0, which clamp treats as it likes, makes 0.0.
        if rule.elect == "max":
            lead(q, rows, chunk)
        part = torch.clamp(q, min=0, out=chunk.row("part"))
        q.sub_(part)
        for half, sign, furthest in ((part, "+", torch.maximum), (q, "-", torch.minimum)):
            if votes:
                add("vote" + sign, half)
            if rule.merge == "max":
                most = rows.get("max" + sign)
                rows["max" + sign] = (
                    chunk.row("max" + sign).copy_(half) if most is None else furthest(most, half, out=most)
                )
            elif plain:
                add("sum" + sign, half)
            else:
                add("sum" + sign, torch.mul(half, factor / vote, out=chunk.row("scaled")))
            if rule.merge == "mean" or rule.elect == "count":
                add("count" + sign, half.sign_().abs_())
            elif rule.merge == "weighted":
                add("weight" + sign, half.sign_().abs_().mul_(weight))
    if rule.elect == "count":
        rows["vote+"], rows["vote-"] = rows["count+"], torch.neg(rows["count-"], out=chunk.row("vote-"))
    elif not votes and rule.elect == "sum":
        rows["vote+"], rows["vote-"] = rows["sum+"], rows["sum-"]
    return rows


def _elect(tally: dict[str, Tensor], rule: Rule, chunk: Chunk) -> Tensor:
    """Return each element's elected sign, 0 where neither wins."""
    elected = chunk.row("input")
    if rule.elect == "max":
        return torch.sign(tally["lead"], out=elected)
    return torch.add(tally["vote+"], tally["vote-"], out=elected).sign_()


def lead(q: Tensor, rows: dict[str, Tensor], chunk: Chunk) -> None:
    """Update row ``lead``, the entry of largest magnitude so far (of equal ones the first), by another input's.

    Once an entry is NaN, the lead is.
    """
    if "lead" not in rows:
        rows["lead"] = chunk.row("lead").copy_(q)
        return
    leading = rows["lead"]
    stays = torch.abs(leading).ge_(torch.abs(q)).logical_or_(leading.isnan())
    torch.where(stays > 0, leading, q, out=leading)


register(
    MergeMethod(
        name="ties",
        on_device=True,
        summary="Keep each task vector's largest entries, elect a sign per element, merge what agrees.",
        paper="Yadav et al. 2023, TIES-Merging, arXiv 2306.01708",
        inputs=(1, None),
        base="origin",
        parameters=(
            WEIGHT,
            Parameter(
                "density",
                "expert",
                "Share of each tensor's delta that survives the trim; entries equal to the smallest survivor "
                "survive too.",
                0.2,
                0.0,
                1.0,
                defaults={"mergekit": 1.0},
            ),
            TRIM,
            ELECT,
            MERGE,
            NORMALIZE_AGREEING,
            replace(RESCALE, default=False),
            LAMBDA,
        ),
        kernels={
            "paper": DisjointMerge(trim),
            "mergekit": DisjointMerge(rescaled(trim_or_drop), mergekit_rule),
        },
        differs=DIFFERS + " With density 0 paper keeps the largest entry, mergekit nothing.",
    )
)
