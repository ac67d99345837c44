"""Write the figures of docs/bench/*.json into the pages that show them, between their markers; the prose is written by hand.

<!-- bench NAME --> ... <!-- end -->   the tables of one benchmark, with its date and versions
<!-- goals --> ... <!-- end -->        every goal of the page's benchmarks beside what was found
<!-- summary --> ... <!-- end -->      the same in one table, with the command that measures it
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from common import RESULTS, ROOT, shown, shown_with

PAGES = [ROOT / "docs" / name for name in ("performance.md", "reliability.md", "plan.md")]
MARKED = re.compile(r"(<!-- (bench (\w+)|goals|summary) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is not up to date")
    arguments = parser.parse_args()
    old = []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = written(before)
        if before != after:
            old.append(f"docs/{page.name}")
            if not arguments.check:
                page.write_text(after, encoding="utf-8")
    if arguments.check:
        sys.exit(f"{', '.join(old)}: not up to date: python scripts/bench/write_docs.py" if old else 0)
    print(f"written: {', '.join(old)}" if old else "every page was up to date")


def written(page: str) -> str:
    """A page with what stands between its markers written anew."""
    shown_here = sorted(match[3] for match in MARKED.finditer(page) if match[3] and (RESULTS / f"{match[3]}.json").exists())
    sections = {
        "goals": lambda: "".join(goals_of(read(name)) for name in shown_here),
        "summary": lambda: summary([read(name) for name in shown_here]),
    }
    return MARKED.sub(lambda match: f"{match[1]}\n{section(match[3]) if match[3] else sections[match[2]]()}\n{match[4]}", page)


def section(name: str) -> str:
    if not (RESULTS / f"{name}.json").exists():
        return f"Not measured yet: `python scripts/bench/{name}.py`\n"
    result = read(name)
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    seed = "" if result.get("seed") is None else f"; seed {result['seed']}"
    text = f"{result['date']}, {machine['cores']} cores, load average {machine['load_average']:.1f}; {versions}{seed}.\n"
    for table in result["tables"]:
        text += f"\n{table['title']}:\n\n" + markdown(table["columns"], table["rows"])
    return text + "".join(f"\n{note}\n" for note in result["notes"])


def summary(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        [each["name"], each["goal"], shown_with(each), "yes" if each["met"] else "**no**", f"`{result['command']}`"]
        for result in results
        for each in result["goals"]
    ]
    return markdown(["figure", "goal", "found", "met", "command"], rows)


def goals_of(result: dict[str, Any]) -> str:
    rows = [[each["name"], each["goal"], shown_with(each), "yes" if each["met"] else "**no**"] for each in result["goals"]]
    return f"\n`{result['name']}`\n\n" + markdown(["figure", "goal", "found", "met"], rows)


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *([shown(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
