"""The table of results.jsonl, and the figure where matplotlib is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from arms import ARMS, DEFAULTS, EXPERTS

from evomerge.evaluation.statistics import Comparison, Table, compare_all, score

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import unpacked  # noqa: E402
from readme import put_tables  # noqa: E402

RESULTS = HERE / "results.jsonl"
TARGET = "maths_fr"
SKILLS = (TARGET, "maths_en", "reading_fr", "ordering_en")
TEXTS = ("english_text", "french_text")
HEADS = ("French maths", "English maths", "French reading", "ordering", "English text", "French text")
GRID_BEST = "best of the grid"
PARENTS = ("base", *EXPERTS, "uniform", "initial")
UNSEARCHED = (*PARENTS, *DEFAULTS, GRID_BEST)
MAIN = "task_arithmetic"
"""The search of configs/smollm2_crosslingual.yaml, whose winner is compared with the models that need no search."""

SEED = 0


def mean_table(lines: Sequence[dict[str, Any]]) -> Table:
    """Return each test item's score, the mean over the lines (the seeds of a search)."""
    tables = [unpacked(line["test"]) for line in lines]
    return {
        task: {item: mean(table[task][item] for table in tables) for item in items}
        for task, items in tables[0].items()
    }


def of(table: Table, *tasks: str) -> Table:
    return {task: table[task] for task in tasks}


def report_lines(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the lines by row of the table, in its order."""
    order = [*UNSEARCHED, *(arm.name for arm in ARMS)]
    return {name: found for name in order if (found := [line for line in lines if line["name"] == name])}


def differences(main: Table, rows: dict[str, Table], task: str) -> dict[str, Comparison]:
    """Return main minus each row on one task, with intervals that hold for all rows together."""
    return compare_all(
        of(main, task), {name: of(t, task) for name, t in rows.items()}, {task: 1.0}, seed=SEED
    )


def shown(comparison: Comparison) -> str:
    low, high = comparison.ci95_simultaneous or comparison.ci95
    text = f"{comparison.delta:+.3f} [{low:+.3f}, {high:+.3f}]"
    if comparison.resolved:
        return text
    needed = f"; {comparison.needed_items} items would tell" if comparison.needed_items else ""
    return f"{text} (not resolved{needed})"


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """Return the table."""
    rows = report_lines(lines)
    tables = {name: mean_table(found) for name, found in rows.items()}
    text = []
    if MAIN in tables:
        others = {name: table for name, table in tables.items() if name != MAIN}
        against = differences(tables[MAIN], others, TARGET)
    else:
        against = {}
    text.append("| | " + " | ".join(HEADS) + f" | {MAIN} − it, French maths |")
    text.append("|---" * (len(HEADS) + 2) + "|")
    for name, found in rows.items():
        seeds = f", {len(found)} seeds" if "seed" in found[0] else ""
        cells = [f"**{name}**{seeds}" if "seed" in found[0] else name]
        cells += [_cell(found, task, 3) for task in SKILLS] + [_cell(found, task, 2) for task in TEXTS]
        cells.append(shown(against[name]) if name in against else "")
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def _cell(found: Sequence[dict[str, Any]], task: str, digits: int) -> str:
    means = [mean(map(float, line["test"][task])) for line in found]
    spread = (
        f" ({min(means):.{digits}f} to {max(means):.{digits}f})" if len(means) > 1 and task == TARGET else ""
    )
    return f"{mean(means):.{digits}f}{spread}"


def figure(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw French maths of every model, each seed a dot, with the mean's interval, if matplotlib is there."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    rows = report_lines(lines)
    fig, axes = plt.subplots(figsize=(7.5, 0.32 * len(rows) + 1.1), layout="constrained")
    for y, found in enumerate(reversed(rows.values())):
        searched = "seed" in found[0]
        colour = "tab:blue" if searched else "0.45"
        scored = score(of(mean_table(found), TARGET), {TARGET: 1.0}, seed=SEED)
        axes.plot(scored.ci95, [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
        for line in found:
            axes.plot(mean(map(float, line["test"][TARGET])), y, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_xlabel("French maths on test, share solved (95 % interval of the mean)")
    axes.set_xlim(-0.02, 1.0)
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    fig.savefig(path, dpi=130)


def write_report(lines: Sequence[dict[str, Any]]) -> None:
    """Put the table between the marks of README.md, and draw the figure."""
    put_tables(HERE / "README.md", f"\n{markdown(lines)}\n\n")
    figure(lines, HERE / "french_maths.png")
