"""A method of the dialect ``paper`` in mergekit's words: exact where mergekit can say it, else with a note."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evomerge.errors import UserError
from evomerge.mergekit.differences import of_method
from evomerge.methods.registry import get_method

Values = Mapping[str, Any]
"""As in a job: a tuple with one value per input for parameters of expert scope, else one value."""

_ELECTIONS = ("ties", "dare_ties", "della", "breadcrumbs_ties")


@dataclass
class Peer:
    """One tensor's merge in mergekit's words.

    Attributes:
        method: mergekit's name.
        own: parameters with a value per input.
        shared: the others.
        notes: where the result differs, one sentence each.
    """

    method: str
    own: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def translated(name: str, dialect: str, values: Values, *, transposed: bool = False) -> Peer:
    """Return what mergekit calls a merge.

    Args:
        name, dialect, values: of the merge.
        transposed: whether the tensor is kept as (in, out), which mergekit does not look at.

    Raises:
        UserError: mergekit has no such method, or not this use of it.
    """
    method = get_method(name)
    if "mergekit" not in method.dialects:
        raise UserError(f"mergekit has no method '{name}'; export a recipe, or the model itself")
    peer = Peer(name, notes=list(of_method(name)))
    for parameter in method.parameters_in(dialect):
        place = peer.shared if parameter.scope == "shared" else peer.own
        place[parameter.name] = values[parameter.name]
    if dialect == "paper":
        _from_paper(peer, transposed)
    return peer


def _from_paper(peer: Peer, transposed: bool) -> None:
    name, own, shared = peer.method, peer.own, peer.shared
    if name in ("dare_linear", "dare_ties"):
        # mergekit's rescaling goes by the tensor's sum of magnitudes; 1 / density goes into the weights.
        pairs = zip(own["weight"], own["density"], strict=True)
        own["weight"] = tuple(w / d if d > 0 else 0.0 for w, d in pairs)
        shared["rescale"] = False
    elif name in ("della", "della_linear"):
        shared["rescale"] = True
        peer.notes.append(
            f"{name}: mergekit scales a tensor's kept entries by one factor, not each by its own probability"
        )
    elif name in ("breadcrumbs", "breadcrumbs_ties"):
        shared["rescale"] = False
        peer.notes.append(f"{name}: mergekit ranks the entries of a whole tensor, not within each row")
    elif name == "ties":
        shared["rescale"] = False
        if shared.pop("trim") != "tensor":
            raise UserError("ties: mergekit trims each tensor by itself, not the whole model")
        if 0 in own["density"]:
            peer.notes.append("ties: with density 0 mergekit keeps nothing, the recipe the largest entry")
    if name in _ELECTIONS:
        _elected(peer)
    elif name in ("task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"):
        shared["normalize"] = False
    elif name == "nuslerp":
        axis = shared.pop("axis")
        shared |= {"nuslerp_flatten": axis == "none", "nuslerp_row_wise": (axis == "in") != transposed}
    elif name == "karcher":
        if len(set(own.pop("weight"))) > 1:
            raise UserError("karcher: mergekit weighs all models equally; these have weights of their own")
    elif name == "model_stock":
        if not shared.pop("clamp"):
            peer.notes.clear()
        if shared["filter_wise"] and transposed:
            peer.notes.append(
                "model_stock: where a layer is kept as (in, out), mergekit's filters are the weights of each input"
            )
    elif name == "sce" and shared["select_topk"] < 1:
        peer.notes.append("sce: mergekit merges the selected entries only, and weighs the models by them")


def _elected(peer: Peer) -> None:
    """TIES: the mean over the entries that agree is mergekit's `normalize` where the weights are equal."""
    name, own, shared = peer.method, peer.own, peer.shared
    elect, merge = shared.pop("elect"), shared.pop("merge")
    if elect != "sum":
        raise UserError(f"{name}: mergekit elects signs by sum only, not by {elect}")
    if merge == "max":
        raise UserError(f"{name}: mergekit has no disjoint merge by {merge}")
    shared["normalize"] = merge == "mean"
    peer.notes.append(
        f"{name}: where positive and negative mass are equal, mergekit takes +, not the tensor's majority"
    )
    if merge == "sum":
        return
    weights = [w for w in own["weight"] if w != 0]
    if len(set(weights)) == 1:
        own["weight"] = tuple(1.0 if w != 0 else 0.0 for w in own["weight"])
        shared["lambda"] *= weights[0]
    elif weights:
        shared["lambda"] *= sum(weights) / len(weights)
        peer.notes.append(
            f"{name}: where only some models agree on a sign, mergekit divides by their weights, not their number; "
            "the models' weights differ, so such entries come out at another scale"
        )
