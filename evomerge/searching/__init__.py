"""The search: a run directory, a driver, and what comes out at the end."""
