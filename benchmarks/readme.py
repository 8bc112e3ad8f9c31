"""The tables of pages that come from results: ``python -m benchmarks.readme`` writes them.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks.bars import SMALL, verdicts
from benchmarks.environment import RESULTS, ROOT
from benchmarks.suite import Column, Row, rows_of
from benchmarks.tables import markdown
from benchmarks.vlm import table as vlm_table

PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "vlm.md")
KIND = "cpu"
"""Of the device that the tables are about."""

BETWEEN = re.compile(r"(<!-- table: (\w+) -->\n\n).*?(\n\n<!-- end of table -->)", re.DOTALL)


def prune() -> str:
    """ViT-S/16 at 224 x 224, batch 8."""
    columns = (
        Column("ms a batch", "median_ms", ".0f"),
        Column("of Inductor's time", "time_ratio", ".2f"),
        Column("of the FLOPs", "flops_ratio", ".2f"),
    )
    rows = [row for row in rows_of("prune", KIND) if SMALL.items() <= row.items()]
    lines = [(_variant(row), *(column.cell(row) for column in columns)) for row in rows]
    return markdown(("", *(column.title for column in columns)), lines)


def _variant(row: Row) -> str:
    names = {
        "ToMe": "ToMe (our own), r =",
        "random": "random tokens, keep",
        "tokenpass": "tokenpass, keep",
    }
    variant: str = row["variant"]
    name = names.get(variant, variant)
    return name if row["budget"] is None else f"{name} {row['budget']:g}"


def gate() -> str:
    """Frames behind gates."""
    columns = (
        Column("tokens", "tokens"),
        Column("attention", "variant"),
        Column("keep", "keep", "g"),
        Column("ms a frame", "median_ms", ".0f"),
        Column("speed-up", "speed_up", ".2f"),
        Column("FLOPs fall by", "flops_ratio", ".2f"),
    )
    rows = [row for row in rows_of("gate", KIND) if row["frames"] == "random walk"]
    titles = [column.title for column in columns]
    return markdown(titles, [[column.cell(row) for column in columns] for row in rows])


def results_of(name: str) -> Any:
    """What a measurement that is no suite has written."""
    return json.loads((RESULTS / f"{name}-{KIND}.json").read_text(encoding="utf-8"))


def vlm() -> str:
    """A vision-language model with fewer visual tokens."""
    return vlm_table(results_of("vlm")["rows"])


def video() -> str:
    """Real clips behind gates, random selection beside them."""
    results = results_of("video")
    rows = {(row["clip"], row["method"], row["keep"]): row for row in results["rows"]}
    times = {(row["clip"], row["variant"]): row for row in results["times"]}
    titles = ("clip", "keep", "FLOPs", "ms a frame", "of Inductor's time")
    lines = []
    for (clip, method, keep), row in rows.items():
        if method == "random":
            continue
        time, other = times[clip, f"keep {keep:g}"], rows[clip, "random", keep]
        lines.append(
            (
                *(clip, f"{keep:g}", f"{row['flops_share']:.2f}"),
                *(f"{time['median_ms']:.0f}", f"{time['ratio']:.2f}"),
                *(f"{found['mean_similarity']:.4f}" for found in (row, other)),
                *(f"{found['mean_error']:.4f}" for found in (row, other)),
            )
        )
    return markdown((*titles, "cosine", "random", "map error", "random"), lines)


def bars() -> str:
    """All bars."""
    return markdown(("bar", "asked", "measured", ""), verdicts(KIND))


TABLES: dict[str, Callable[[], str]] = {
    "prune": prune,
    "gate": gate,
    "video": video,
    "vlm": vlm,
    "bars": bars,
}


def filled(text: str) -> str:
    """``text`` with its tables as the results have them.

    Raises:
        KeyError: If it asks for a table that there is not.
    """
    return BETWEEN.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
