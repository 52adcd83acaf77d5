"""Lets `python -m evomerge` be the command line."""

import sys

from evomerge.cli import main

sys.exit(main())
