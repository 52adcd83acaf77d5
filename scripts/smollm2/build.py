"""Build SmolLM2-135M-Instruct as an ordinary Hugging Face folder. Nothing is downloaded here."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from convert import build_base

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/build_smollm2", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "smollm2", help="where it goes (default: smollm2/)"
    )
    parser.add_argument("--force", action="store_true", help="build again what is already there")
    options = parser.parse_args()
    try:
        build_base((options.out / "base").resolve(), force=options.force)
    except PackageNotFoundError as error:
        print(
            f"build_smollm2: {sys.executable} lacks the package {error.name}; run scripts/build_smollm2, "
            "which installs it",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(f"build_smollm2: {options.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
