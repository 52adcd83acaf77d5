"""mergekit's YAML, in and out."""

from evomerge.mergekit.reading import Reading, from_mergekit, is_mergekit, open_recipe, read_mergekit

__all__ = ["Reading", "from_mergekit", "is_mergekit", "open_recipe", "read_mergekit"]
