"""Ask a model a question: scripts/ask MODEL "Julie a 12 pommes et en reçoit 7 de plus. Combien de pommes a Julie ?"

The prompt is the one that the experts of scripts/build_smollm2 were taught.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from problems import prompt


def main() -> int:
    """Print the answer's first line."""
    parser = argparse.ArgumentParser(
        prog="scripts/ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a Hugging Face model folder")
    parser.add_argument("question")
    options = parser.parse_args()
    if not (Path(options.model) / "config.json").exists():
        print(
            f"ask: {options.model}: has no config.json; name a folder that evomerge export wrote",
            file=sys.stderr,
        )
        return 2

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    asked = tokenizer(prompt(options.question), return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**asked, max_new_tokens=48, do_sample=False)
    answer = tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(answer.splitlines()[0] if answer else "(nothing)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
