"""Write the figures of docs/bench/*.json into docs/performance.md, between its markers; the prose is written by hand.

<!-- bench NAME --> ... <!-- end -->   the tables of one benchmark, with its date and versions
<!-- goals --> ... <!-- end -->        every goal beside what was found
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from common import RESULTS, ROOT, shown, shown_with

PAGE = ROOT / "docs" / "performance.md"
MARKED = re.compile(r"(<!-- (bench (\w+)|goals) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is not up to date")
    arguments = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = MARKED.sub(lambda match: f"{match[1]}\n{section(match[3])}\n{match[4]}", before)
    if arguments.check:
        sys.exit("docs/performance.md is not up to date: python scripts/bench/write_docs.py" if before != after else 0)
    PAGE.write_text(after, encoding="utf-8")
    print("docs/performance.md is written" if before != after else "docs/performance.md was up to date")


def section(name: str | None) -> str:
    if name is None:
        # Not of what another page shows.
        names = sorted(match[3] for match in MARKED.finditer(PAGE.read_text(encoding="utf-8")) if match[3])
        return "".join(goals_of(read(name)) for name in names)
    result = read(name)
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    text = f"{result['date']}, {machine['cores']} cores, load average {machine['load_average']:.1f}; {versions}.\n"
    for table in result["tables"]:
        text += f"\n{table['title']}:\n\n" + markdown(table["columns"], table["rows"])
    return text + "".join(f"\n{note}\n" for note in result["notes"])


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
