"""Engines: models that answer a suite's requests, and the hosts that keep them on one recipe after another."""

from evomerge.engines.host import Host, open_host, packing_name

__all__ = ["Host", "open_host", "packing_name"]
