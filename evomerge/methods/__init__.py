"""Merge methods: one small file a family, over shared kernels, in one registry."""

from evomerge.methods import (
    arcee_fusion,
    breadcrumbs,
    dare,
    della,
    fisher,
    isotropic,
    karcher,
    knots,
    linear,
    magmax,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    regmean,
    sce,
    slerp,
    task_arithmetic,
    ties,
    tsv,
    wudi,
)
from evomerge.methods.cache import TensorCache
from evomerge.methods.chunks import TensorMerge, merge_chunks
from evomerge.methods.describe import methods_table
from evomerge.methods.masks import MaskKey
from evomerge.methods.registry import MergeMethod, Parameter, all_methods, get_method
from evomerge.methods.statistics import Statistic

__all__ = [
    "MaskKey",
    "MergeMethod",
    "Parameter",
    "Statistic",
    "TensorCache",
    "TensorMerge",
    "all_methods",
    "arcee_fusion",
    "breadcrumbs",
    "dare",
    "della",
    "fisher",
    "get_method",
    "isotropic",
    "karcher",
    "knots",
    "linear",
    "magmax",
    "merge_chunks",
    "methods_table",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "regmean",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
    "tsv",
    "wudi",
]
