"""What the user reads: verdict and first fix in the first line, a table of checks and hosts, then each finding. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median_low
from typing import Any

from ds_trainer.checkpoint.layout import in_words
from ds_trainer.doctor.evidence import HERE, Evidence, Finding, Verdict
from ds_trainer.doctor.judge import CHECKS

WIDTH = 96
WORDS: dict[Verdict, str] = {"ok": "ok", "warn": "warn", "fail": "FAIL", "skip": "-"}
_NAMED = ("fail", "warn")
_WORST: tuple[Verdict, ...] = ("fail", "warn", "ok", "skip")


def verdict_line(evidence: Evidence, findings: Sequence[Finding]) -> str:
    """What is to be done first, or that nothing is."""
    failed, warned = grouped(findings, "fail"), grouped(findings, "warn")
    if evidence.alone:
        what = "this machine"
    else:
        what = f"{len(evidence.hosts)} {'host' if len(evidence.hosts) == 1 else 'hosts'} with {evidence.world_size} slots"
    if failed:
        finding, hosts = failed[0]
        more = f" ({len(failed) - 1} more below)" if len(failed) > 1 else ""
        return f"NOT FIT: {finding.check} on {_names(hosts)}: {finding.found}. Fix: {finding.fix}{more}"
    if warned:
        finding, hosts = warned[0]
        count = f"{len(warned)} warnings" if len(warned) > 1 else "1 warning"
        return f"FIT: {what}, {count}. {finding.check} on {_names(hosts)}: {finding.found}. Fix: {finding.fix}"
    return f"FIT: {what}, nothing to mend"


def as_text(evidence: Evidence, findings: Sequence[Finding]) -> str:
    """The whole report."""
    lines = [verdict_line(evidence, findings), "", *table(evidence, findings)]
    for verdict in ("fail", "warn"):
        for finding, hosts in grouped(findings, verdict):
            lines += ["", *_in_full(f"{WORDS[verdict]} {finding.check} on {_names(hosts)}: {finding.found}", "")]
            lines += _in_full(finding.rule, "  why: ") if finding.rule else []
            lines += _in_full(finding.fix, "  fix: ", break_words=False)
    if skipped := grouped(findings, "skip"):
        lines += ["", "Not looked at:"]
        lines += [line for finding, _ in skipped for line in _in_full(finding.found, f"  {finding.check}: ")]
    if evidence.collectives and evidence.collectives["answer"]:
        lines += ["", *bandwidth(evidence)]
    return "\n".join(lines)


def as_json(evidence: Evidence, findings: Sequence[Finding]) -> dict[str, Any]:
    """The same for machines, and every fact."""
    return {
        "fit": not any(finding.verdict == "fail" for finding in findings),
        "verdict": verdict_line(evidence, findings),
        "findings": [asdict(finding) for finding in findings],
        "hosts": {host.name: {"slots": host.slots, "lost": host.lost, "facts": host.facts} for host in evidence.hosts},
        "collectives": (evidence.collectives or {}).get("answer"),
    }


def table(evidence: Evidence, findings: Sequence[Finding]) -> list[str]:
    """Checks down, hosts across; where there are too many hosts for that, those that stand out by name."""
    places = [host.name for host in evidence.hosts]
    if HERE not in places and any(finding.host == HERE for finding in findings):
        places = [HERE, *places]
    cells: dict[tuple[str, str], Verdict] = {}
    for finding in findings:
        key = (finding.check, finding.host)
        cells[key] = min(cells.get(key, "skip"), finding.verdict, key=_WORST.index)
    checks = [check.name for check in CHECKS if any(name == check.name for name, _ in cells)]
    first = max(map(len, [*checks, "check"])) + 2
    widths = [max(len(place), 4) + 2 for place in places]
    if first + sum(widths) <= WIDTH:
        lines = [f"{'check':<{first}}" + "".join(f"{place:<{width}}" for place, width in zip(places, widths, strict=True))]
        for check in checks:
            words = [WORDS[cells[check, place]] if (check, place) in cells else "" for place in places]
            lines.append(f"{check:<{first}}" + "".join(f"{word:<{width}}" for word, width in zip(words, widths, strict=True)))
        return [line.rstrip() for line in lines]
    lines = []
    for check in checks:
        by_verdict: dict[Verdict, list[str]] = {}
        for place in places:
            if (check, place) in cells:
                by_verdict.setdefault(cells[check, place], []).append(place)
        told = [
            f"{WORDS[each]}: {_names(by_verdict[each])}"
            if each in ("fail", "warn")
            else f"{len(by_verdict[each])} {WORDS[each]}"
            for each in _WORST
            if each in by_verdict
        ]
        lines += _in_full("; ".join(told), f"{check:<{first}}")
    return lines


def bandwidth(evidence: Evidence) -> list[str]:
    """The collectives over all ranks: bandwidth by size, and the slowest rank."""
    assert evidence.collectives is not None
    answer = evidence.collectives["answer"]
    rows = {(name, size): per_second for name, size, _, per_second in answer["bandwidth"]}
    names, sizes = list(dict.fromkeys(name for name, _ in rows)), list(dict.fromkeys(size for _, size in rows))
    library = "NCCL" if answer["device"] == "cuda" else "gloo"
    lines = [f"Collectives over {evidence.world_size} ranks ({library}), bytes a second that the slowest link carries"]
    lines.append(f"  {'size':<12}" + "".join(f"{name:<16}" for name in names))
    for size in sizes:
        lines.append(f"  {_size(size):<12}" + "".join(f"{in_words(int(rows[name, size])) + '/s':<16}" for name in names))
    alone = answer["alone"]
    slowest = max(range(len(alone)), key=alone.__getitem__)
    times = alone[slowest] / median_low(alone)
    where = f"{slowest} on {evidence.hosts_by_rank[slowest]}, {times:.2f} times as long as the rank in the middle"
    lines += _in_full(f"{where}, for one product of matrices", "  slowest rank: ")
    return [line.rstrip() for line in lines]


def grouped(findings: Iterable[Finding], verdict: Verdict) -> list[tuple[Finding, list[str]]]:
    """Findings with a verdict, those that say the same of several hosts together."""
    groups: dict[tuple[str, ...], tuple[Finding, list[str]]] = {}
    for each in findings:
        if each.verdict == verdict:
            _, hosts = groups.setdefault((each.check, each.found, each.rule, each.fix), (each, []))
            hosts.append(each.host)
    return list(groups.values())


def _in_full(text: str, head: str, break_words: bool = True) -> list[str]:
    """Wrapped, with what follows the first line indented; a command is left in one piece, to be copied."""
    if not break_words:
        return [head + text]
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * max(2, len(head)), break_long_words=False)


def _names(hosts: Sequence[str]) -> str:
    shown = ", ".join("this machine" if host == HERE else host for host in hosts[:6])
    return shown if len(hosts) <= 6 else f"{shown} and {len(hosts) - 6} more"


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"
