"""Tables in Markdown of what the benchmarks print with ``--json``."""

from __future__ import annotations

from typing import Any

from rich.filesize import decimal

from cpucache.errors import InputError

_NAMES = {
    "full": "full prefill",
    "standalone": 'standalone (`anchor="none"`)',
    "standalone+recompute:0.1": "standalone, recompute 0.1",
    "fast": "`fast`: slices as they are",
    "balanced": "`balanced`: recompute 0.1",
    "recompute:0.2": "recompute 0.2",
    "refined": "`fast`, after refining",
}
_SHORT = ("full", "standalone", "fast", "balanced", "refined")


def accuracy(result: dict[str, Any], *, short: bool) -> list[str]:
    """Returns the table of ``cpucache bench accuracy``. ``short``: with fewer columns and variants, for docs/."""
    variants = {each["variant"]: each for each in result["variants"]}
    measures = list(result["variants"][0]["scores"])
    titles = [title for name in measures for title in (_title(name), "against full")]
    head = ["", *titles, "KL, mean (median)", "same answer", "TTFT, of full", "of floor", "again, of floor"]
    rows = [[*head]]
    for name, each in variants.items():
        if short and name not in _SHORT:
            continue
        cells = [_NAMES.get(name, name)]
        for measure in measures:
            score = each["scores"][measure]
            cells.append(f"{score['mean']:.1f}")
            if "difference" in score:
                cells.append(f"{score['difference']:+.1f} ({score['low']:+.1f}, {score['high']:+.1f})")
            else:
                cells.append("")
        if name == "full":
            cells += ["", "", f"1 ({each['ttft']['median_ms'] / 1000:.1f} s)", "", ""]
        else:
            cells += [f"{each['kl']:.3f} ({each['kl_median']:.3f})", f"{each['same']:.0%}"]
            cells += [f"{each['ttft_to_full']:.3f}", f"{each['ttft_to_floor']:.2f}", f"{each['again_to_floor']:.2f}"]
        rows.append(cells)
    if short:
        keep = [0, 1, 2, len(head) - 5, len(head) - 4, len(head) - 3]
        rows = [[row[index] for index in keep] for row in rows]
    return _markdown(rows)


def ttft(result: dict[str, Any], *, short: bool) -> list[str]:
    """Returns the table of ``cpucache bench ttft``. ``short``: with fewer columns, for docs/."""
    floor, other = result["floor"]["median_ms"], result["other_floor"]["median_ms"]
    series = {
        "the floor": (result["floor"], floor),
        "exact, in the schema's order, from RAM": (result["ram"], floor),
        "exact, from disk": (result["disk"], floor),
        "the floor of other orders": (result["other_floor"], other),
        "another order, never asked before, `fast`": (result["other"], other),
        "  asked again": (result["other_again"], other),
        "  `balanced`": (result["balanced"], other),
        "  after refining": (result["refined"], other),
        **{f"full prefill, {name}": (each, floor) for name, each in result["full"].items()},
        "encoding, once": (result["encode"], floor),
    }
    rows = [["", "time to first token", "min", "max", "times the floor"]]
    for name, (each, base) in series.items():
        if "median_ms" in each:
            times = [_time(each[key]) for key in _KEYS]
            rows.append([name, *times, f"{each['median_ms'] / base:.2f}"])
    return _markdown([[row[0], row[1], row[4]] for row in rows] if short else rows)


def servers(result: dict[str, Any], **_: object) -> list[str]:
    """Returns the table of ``cpucache bench server``."""
    # Documents in other orders are measured on request.
    kinds = list(result["servers"][0].get("permuted", {}))
    orders = [f"orders, {kind}" for kind in kinds]
    rows = [
        ["", "prefix, p50 (p95)", "tok/s", "of four", "first round", "last round", "restarted", *orders, "failures"]
    ]
    for each in result["servers"]:
        speed = each["tokens_per_second"]
        times = [each["prefix"], each["rounds"][0], each["warm"], each["restarted"]]
        times += [each["permuted"][kind] for kind in kinds]
        told = [f"{_time(found['p50'])} ({_time(found['p95'])})" if found else "" for found in times]
        rows.append(
            [each["name"], told[0], f"{speed['one']:.0f}", f"{speed['four']:.0f}", *told[1:], str(each["failures"])]
        )
    return _markdown(rows)


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.0f} ms"


_KEYS = ("median_ms", "min_ms", "max_ms")


def _title(measure: str) -> str:
    return {"f1": "F1", "exact_match": "EM", "rouge_l": "ROUGE-L"}.get(measure, measure)


def _markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def sessions(result: dict[str, Any], **_: object) -> list[str]:
    """Returns the table of ``cpucache bench sessions``."""
    rows = [["turn", "tokens", "new", "recomputed", "in the context", "from RAM", "from disk", "disk : context"]]
    for number, each in enumerate(result["turns"], 1):
        times = [
            each[name]["median_ms"] if each.get(name) else None for name in ("recompute", "in_context", "ram", "disk")
        ]
        told = ["" if found is None else _time(found) for found in times]
        ratio = each["disk"]["median_ms"] / each["in_context"]["median_ms"]
        rows.append([str(number), f"{each['tokens']:,}", str(each["new_tokens"]), *told, f"{ratio:.2f}"])
    return _markdown(rows)


def encode(result: dict[str, Any], **_: object) -> list[str]:
    """Returns the table of ``cpucache bench encode``."""
    rows = [["", "tokens", "slices", "state", "encoding", "tok/s", "times full prefill", "again"]]
    for each in result["schemas"]:
        ratio = each["ratios"].get("encode_to_full")
        rows.append(
            [
                each["schema"],
                f"{each['tokens']:,}",
                str(each["slices"]),
                decimal(each["bytes"]),
                _time(each["encode"]["median_ms"]),
                f"{each['tokens_per_second']:.0f}",
                f"{ratio:.2f}" if ratio else "",
                _time(each["again"]["median_ms"]),
            ]
        )
    return _markdown(rows)


def table(result: Any, *, short: bool = False) -> list[str]:
    """Returns the lines of the table of a result.

    Args:
        result: The object that a benchmark has printed.
        short: Fewer columns, for the pages in docs/.

    Raises:
        InputError: It is no result of a benchmark that a table is known of.
    """
    if isinstance(result, dict):
        for name, make in _TABLES.items():
            if name in result:
                return make(result, short=short)
    raise InputError("not a result of `cpucache bench ttft|encode|sessions|server|accuracy --json`")


_TABLES = {"variants": accuracy, "servers": servers, "schemas": encode, "turns": sessions, "floor": ttft}
"""Functions that make tables, by a name that only their results have."""
