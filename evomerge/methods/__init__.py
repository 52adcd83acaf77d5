"""Merge methods: one small file a family, over shared kernels, in one registry."""

from evomerge.methods import dare, linear, slerp, task_arithmetic, ties
from evomerge.methods.cache import TensorCache
from evomerge.methods.chunks import merge_chunks
from evomerge.methods.describe import methods_table
from evomerge.methods.masks import MaskKey
from evomerge.methods.registry import MergeMethod, Parameter, all_methods, get_method

__all__ = [
    "MaskKey",
    "MergeMethod",
    "Parameter",
    "TensorCache",
    "all_methods",
    "dare",
    "get_method",
    "linear",
    "merge_chunks",
    "methods_table",
    "slerp",
    "task_arithmetic",
    "ties",
]
