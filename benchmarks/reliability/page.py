"""Write the tables of docs/reliability.md from results/reliability.json: no figure there is typed by hand.

    python -m benchmarks.reliability.page

A part or case without a result says that it has not been run. The text around the tables is left alone.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability import corruptions, faults, kills, memory, payloads, reshards, resumes

HERE = Path(__file__).parents[1]
PAGE = HERE.parent / "docs" / "reliability.md"
RESULTS = HERE / "results" / "reliability.json"
BEGIN, END = "<!-- {} from benchmarks/results, by benchmarks/reliability -->", "<!-- end of {} -->"
GOOD, UNKNOWN = "good", "not run"
GROWTH = 0.01  # of memory over 300 steps
Cases = dict[str, dict[str, Any]]


def verdict(part: str, result: dict[str, Any]) -> str:
    """`good`, or what is not as it should be."""
    return ", ".join(_problems(part, result)) or GOOD


def _problems(part: str, result: dict[str, Any]) -> Iterator[str]:
    if part == "kills":
        yield from (f"{result[name]} {name}" for name in kills.BAD if result[name])
    elif part == "corruptions":
        yield from (f"{result[name]} {name}" for name in corruptions.BAD if result[name])
    elif part == "resumes":
        if result["difference"] != 0 or result["other tensors"]:
            yield result.get("message") or f"differs by {result['difference']}, {result['other tensors']} tensors"
    elif part == "reshards":
        yield from (f"{name}: failed" for name, cell in result["cells"].items() if cell["outcome"] == "failed")
    elif part == "payloads":
        for name, row in result["payloads"].items():
            if row["executed"]:
                yield f"{name}: executed by {', '.join(row['executed'])}"
            if not row["harmful"]:
                yield f"{name}: harms nobody"
    elif part == "memory":
        if result["growth"] >= GROWTH or result["more descriptors"]:
            yield f"grows by {result['growth']:.2%}, {result['more descriptors']} more descriptors"
    elif not result["good"]:
        yield "not tried" if result["good"] is None else "failed"


def _kills(found: Cases) -> list[str]:
    names = ("kills", "inside a write", "lost", "wrong", "ends", *kills.AFTER)
    heads = ["", "kills", "inside a write", "lost", "half-written accepted", "runs to the end", *kills.AFTER]
    lines = _head(heads)
    for name, category in kills.CATEGORIES.items():
        case = found.get(name)
        lines.append(_line([category.what, *((case[key] for key in names) if case else [UNKNOWN])]))
    total = [sum(case[key] for case in found.values()) for key in names]
    return [*lines, _line(["**all**", *total])]


def _corruptions(found: Cases) -> list[str]:
    verified = ["`verify` names the file", "finds it, unnamed", "misses it"]
    read = ["the next job names it", "refuses, unnamed", "does without, same result", "**silently wrong**"]
    lines = _head(["", "files", "damages", *verified, *read])
    names = ("files", *corruptions.OUTCOMES)
    for name, artefact in corruptions.ARTEFACTS.items():
        case = found.get(name)
        lines.append(_line([artefact.what, *((case[key] for key in names) if case else [UNKNOWN])]))
    total = [sum(case[key] for case in found.values()) for key in names]
    return [*lines, _line(["**all**", *total])]


def _resumes(found: Cases) -> list[str]:
    lines = _head(["", "ranks", "figures", "largest difference", "tensors", "that differ"])
    for name in resumes.NAMES:
        case, row = found.get(name), resumes.ROWS.get(name)
        what, ranks = (row.what, row.ranks) if row else (resumes.WHAT_BACK, 1)
        values: list[Any] = [UNKNOWN]
        if case:
            shown = case["difference"] is not None
            keys = ("figures", "difference", "tensors", "other tensors")
            values = [f"{case[key]:g}" for key in keys] if shown else ["", "refused or failed"]
        lines.append(_line([what, ranks, *values]))
    return lines


def _reshards(found: Cases) -> list[str]:
    lines = _head(["saved on \\ goes on on", *reshards.NAMES])
    for saved in reshards.NAMES:
        cells = found.get(saved, {}).get("cells", {})
        lines.append(_line([saved, *(_cell(cells.get(name)) for name in reshards.NAMES)]))
    return lines


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return UNKNOWN
    if cell["outcome"] == "goes on":
        return f"{cell['difference']:.0e}" if cell["difference"] else "0"
    return f"refused, {cell['seconds']:.0f} s" if cell["outcome"] == "refused" else "**failed**"


def _payloads(found: Cases) -> list[str]:
    lines = _head(["payload", "harms whoever believes it", "readers", "executed by", "ends in a stack trace"])
    shown = {name: row for case in found.values() for name, row in case["payloads"].items()}
    for name in payloads.NAMES:
        row = shown.get(name)
        values: list[Any] = [UNKNOWN]
        if row:
            executed = ", ".join(row["executed"]) or 0
            values = ["yes" if row["harmful"] else "**no**", row["readers"], executed, len(row["traceback"])]
        lines.append(_line([f"`{name}`", *values]))
    rows = shown.values()
    readings = sum(row["readers"] for row in rows)
    executed = sum(len(row["executed"]) for row in rows)
    traces = sum(len(row["traceback"]) for row in rows)
    return [
        *lines,
        _line([f"**{len(rows)} payloads**", sum(row["harmful"] for row in rows), readings, executed, traces]),
    ]


def _memory(found: Cases) -> list[str]:
    lines = _head(["", "steps", "memory, MB", "growth", "descriptors", "more at the end"])
    for name, (what, _) in memory.CASES.items():
        case = found.get(name)
        values: list[Any] = [UNKNOWN]
        if case:
            growth = f"{case['growth']:+.2%}"
            values = [
                case["steps"],
                f"{case['bytes'] / 1e6:.0f}",
                growth,
                case["descriptors"],
                case["more descriptors"],
            ]
        lines.append(_line([what, *values]))
    return lines


def _faults(found: Cases) -> list[str]:
    lines = _head(["", "as it should be", "status", "seconds", "what it says"])
    for name in faults.NAMES:
        case = found.get(name)
        if not case:
            lines.append(_line([name, UNKNOWN]))
            continue
        good = {True: "yes", False: "**no**", None: "could not be tried"}[case["good"]]
        seconds = f"{case['seconds']:.1f}" if "seconds" in case else ""
        line = case.get("line", "").replace("|", "\\|")
        lines.append(_line([name, good, case.get("status", ""), seconds, f"`{line[:160]}`" if line else ""]))
    return lines


TABLES: dict[str, Callable[[Cases], list[str]]] = {
    "kills": _kills,
    "corruptions": _corruptions,
    "resumes": _resumes,
    "reshards": _reshards,
    "payloads": _payloads,
    "memory": _memory,
    "faults": _faults,
}


def _head(names: list[str]) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(part: str, results: dict[str, Any]) -> str:
    """One part's, and when it was measured and where."""
    found: Cases = results.get("parts", {}).get(part, {})
    dates = sorted({case["on"] for case in found.values()})
    minutes = sum(case["took"] for case in found.values()) / 60
    when = f"{dates[-1]}, {minutes:.0f} minutes of one core or two" if dates else UNKNOWN
    where = f", {results['machine']}, {results['cores']} cores" if dates and "machine" in results else ""
    return "\n".join([*TABLES[part](found), "", f"{when}{where}."])


def page(text: str, results: dict[str, Any]) -> str:
    """The page with these tables in the places of its own."""
    for part in TABLES:
        begin, end = BEGIN.format(part), END.format(part)
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{table(part, results)}\n{end}{after}"
    return text


def write(results: dict[str, Any]) -> None:
    """Bring docs/reliability.md up to date."""
    PAGE.write_text(page(PAGE.read_text(), results))


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text()))
