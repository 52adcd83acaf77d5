"""docs/methods.md: a section for every method, with what the registry says of it."""

from __future__ import annotations

import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from evomerge.methods import all_methods
from evomerge.methods.describe import markdown_entry

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))


def test_every_method_has_a_section_and_no_other() -> None:
    missing, unknown = set(all_methods()) - set(SECTIONS), set(SECTIONS) - set(all_methods())
    assert not missing, (
        f"docs/methods.md: write a section (formula, use, passes) for {', '.join(sorted(missing))}"
    )
    assert not unknown, f"docs/methods.md: no such methods: {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("name", list(all_methods()))
def test_a_section_says_formula_and_cost_and_what_the_registry_says(name: str) -> None:
    section = SECTIONS.get(name, "")
    assert f"<!-- {name}: from the registry -->\n" in section
    assert re.search(
        r"^\*\*Formula\.\*\* .*θ|^\*\*Formula\.\*\* .*\bW =|^\*\*Formula\.\*\* `", section, re.MULTILINE
    )
    assert re.search(r"pass|factorisation", section.partition("<!-- end -->")[2])
    for parameter in all_methods()[name].parameters:
        assert f"- `{parameter.name}` (" in section


def test_the_page_is_up_to_date_with_the_registry() -> None:
    loader = SourceFileLoader("methods_page", str(ROOT / "scripts" / "methods_page"))
    spec = spec_from_loader("methods_page", loader)
    assert spec is not None
    script = module_from_spec(spec)
    loader.exec_module(script)
    assert script.filled(PAGE) == PAGE, "run scripts/methods_page"


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", PAGE, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= headings
    for target in re.findall(r"\]\((?!#|http)([^)]*)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


def test_an_unknown_method_has_no_entry() -> None:
    with pytest.raises(ValueError, match="unknown merge method"):
        markdown_entry("nothing")
