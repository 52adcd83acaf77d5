"""The command line as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evomerge.cli import main

COMMANDS = [
    "search",
    "resume",
    "status",
    "export",
    "plan",
    "merge",
    "extract-lora",
    "convert",
    "statistics",
    "evaluate",
    "init",
    "methods",
]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    first_words = [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")
    ]
    assert [word for word in first_words if word in COMMANDS] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: evomerge {command} " in capsys.readouterr().out


def test_help_waits_for_no_library() -> None:
    code = (
        "import sys, evomerge.cli\n"
        "try: evomerge.cli.main(['merge', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'pydantic', 'rich', 'transformers', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
