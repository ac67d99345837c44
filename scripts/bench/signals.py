"""Ask a run of two ranks to end: every signal in every phase to every target under each launcher, and see what is left.

Checked in each case: the exit code and the step in exit.json, one last word on the terminal, no checkpoint twice, and that no
process of the run is alive at the end (found by a mark in their environment). The run is held up in its phase by a fault point.
`tests/faults/test_signals.py` takes a sample of the same cases.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import ROOT, finish, goal, versions

sys.path.insert(0, str(ROOT / "tests"))
from helpers import write_corpus, write_run
from signal_cases import Case, all_cases, run_case

GRACE_SECONDS = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case; prints, writes no results")
    parser.add_argument("--only", default="", metavar="WORDS", help="only cases with all these words, as 'deepspeed saving'")
    arguments = parser.parse_args()
    chosen = [case for case in all_cases() if all(word in str(case) for word in arguments.only.split())][:: arguments.every]
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        write_corpus(corpus)
        found = {}
        for number, case in enumerate(chosen):
            found[case] = attempt(case, corpus, Path(scratch) / str(number))
            print(f"{number + 1}/{len(chosen)} {case}: {found[case]['seconds']} s {found[case]['wrong'] or ''}", flush=True)
    report(found, whole=len(chosen) == len(all_cases()))


def attempt(case: Case, corpus: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    held_out = {"sources": [{"path": str(corpus / "texts.jsonl"), "format": "text"}], "every_steps": 4, "max_rows": 8}
    config = write_run(corpus, folder, train={"max_steps": 12}, checkpoint={"every_steps": 4}, evaluate=held_out)
    try:
        return run_case(case, config, folder)
    except (AssertionError, OSError) as error:
        return {"seconds": float("nan"), "wrong": [str(error).splitlines()[0]]}


def report(found: dict[Case, dict[str, Any]], *, whole: bool) -> None:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for case, each in found.items():
        groups[case.launcher, case.phase].append(each)
    rows = [
        [launcher, phase, sum(not each["wrong"] for each in group), len(group), max(each["seconds"] for each in group)]
        for (launcher, phase), group in groups.items()
    ]
    right = sum(not each["wrong"] for each in found.values())
    slowest = max(each["seconds"] for each in found.values())
    finish(
        "signals",
        quick=not whole,
        goals=[
            goal("signals: cases that end as they should", len(found), right, "cases", at_least=True),
            goal("signals: slowest end of all processes", GRACE_SECONDS, slowest, "s"),
        ],
        tables=[
            {
                "title": "Asked to end: signals x targets by launcher and phase; seconds until no process is left",
                "columns": ["launcher", "phase", "right", "cases", "slowest, s"],
                "rows": rows,
            }
        ],
        packages=versions("torch", "deepspeed"),
        notes=[f"wrong: {case}: {'; '.join(each['wrong'])}" for case, each in found.items() if each["wrong"]],
    )
    sys.exit(right != len(found))


if __name__ == "__main__":
    main()
