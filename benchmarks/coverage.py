"""``make zoo``: every encoder of a zoo, and what pruning and gating make of it.

    python -m benchmarks.coverage --zoo FOLDER [--only REGEX] [--sample N] [--plan-only] [--fresh]

``FOLDER`` (or the environment variable ``TOKENPASS_ZOO``) holds ``zoo.py`` with the list ``ZOO``
and ``zoo.csv`` with what a probe saw in each. Results are kept as they come, so a run that was
stopped goes on where it was; ``--fresh`` measures again. Writes docs/coverage.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.coverage_table import write_page
from benchmarks.coverage_worker import Row, load, serve
from benchmarks.environment import RESULTS, environment

LIMIT = 1800.0
"""Seconds that an encoder may take; generous, for machines that do other things as well."""


class Worker:
    """A process that measures one encoder after another; a new one after a crash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: Any = None
        self._connection: Connection[Any, Any]

    def measure(self, name: str, *, numerics: bool) -> Row:
        if self._process is None:
            self._start()
        try:
            self._connection.send((name, numerics))
            if self._connection.poll(LIMIT):
                return dict(self._connection.recv())
            reason = f"took more than {LIMIT:.0f} s"
        except (EOFError, OSError):
            self._process.join()
            reason = f"the process ended with code {self._process.exitcode}"
        self.stop()
        return {"error": reason}

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, self._path), daemon=True)
        self._process.start()
        other.close()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def expectations(folder: Path) -> dict[str, dict[str, str]]:
    """What the probe saw, by name."""
    path = folder / "zoo.csv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def sampled(names: list[str], seen: dict[str, dict[str, str]], count: int) -> list[str]:
    """``count`` encoders whose attentions look most different, evenly over the zoo."""
    signatures: dict[object, str] = {}
    for name in names:
        row = seen.get(name, {})
        key = tuple(row.get(k) for k in ("spellings", "tokens_q_k", "layout", "prefix_tokens"))
        signatures.setdefault(key, name)
    distinct = list(signatures.values())
    step = max(1.0, len(distinct) / count)
    return [distinct[int(place * step)] for place in range(min(count, len(distinct)))]


def _size(seen: dict[str, str]) -> int:
    """Operations in an encoder's graphs: small ones first, so that most rows are there soon."""
    return int(seen.get("nodes_total") or 0)


def known(row: Row, *, numerics: bool) -> bool:
    """Whether an encoder was measured before, as far as is asked for."""
    looked = "error" in row or "prune" in row
    prune, gate = row.get("prune", {}), row.get("gate", {})
    ran = {"full", "reduced"} <= prune.keys() and "full" in gate
    return looked and (not numerics or ran or "error" in row or "left" in row)


def read(path: Path) -> dict[str, Row]:
    """What was measured before."""
    if not path.exists():
        return {}
    found: dict[str, Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return found


def write(path: Path, rows: dict[str, Row]) -> None:
    """An encoder a line, so that changes can be read."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = json.dumps(environment())
    path.write_text(f'{{"environment": {facts},\n"rows": {{\n{lines}\n}}}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=os.environ.get("TOKENPASS_ZOO"))
    parser.add_argument("--only", default="", help="a regular expression on names")
    parser.add_argument("--sample", type=int, help="this many encoders with distinct graphs")
    parser.add_argument("--plan-only", action="store_true", help="compile and run nothing")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--results", type=Path, default=RESULTS / "coverage.json")
    arguments = parser.parse_args()
    if arguments.zoo is None:
        parser.error("no zoo: give --zoo or set TOKENPASS_ZOO")
    seen = expectations(arguments.zoo)
    names = [entry.name for entry in load(arguments.zoo / "zoo.py").ZOO]
    chosen = [name for name in names if re.search(arguments.only, name)]
    if arguments.sample:
        chosen = sampled(chosen, seen, arguments.sample)
    rows = read(arguments.results)
    worker, console = Worker(arguments.zoo / "zoo.py"), Console()
    commit = str(environment()["commit"])
    for name in sorted(chosen, key=lambda name: _size(seen.get(name, {}))):
        if arguments.fresh or not known(rows.get(name, {}), numerics=not arguments.plan_only):
            rows[name] = worker.measure(name, numerics=not arguments.plan_only)
            rows[name]["commit"] = commit
            write(arguments.results, rows)
            console.print(_line(name, rows[name], seen.get(name, {})), highlight=False)
    worker.stop()
    write_page({name: rows.get(name, {}) for name in names}, seen)


def _line(name: str, row: Row, seen: dict[str, str]) -> str:
    def part(key: str) -> str:
        found = row.get(key, {})
        error = found.get("full")
        number = "" if error is None else f" {error:.1e}"
        bad = f" {found['error']}" if "error" in found else ""
        return f"{key} {found.get('converted')}/{found.get('blocks')}{number}{bad}"

    found = row.get("prune", {}).get("attentions")
    attentions = f"{found}/{seen.get('attn_all_graphs')}"
    return f"{name}: {attentions}, {part('prune')}, {part('gate')} {row.get('error', '')}"


if __name__ == "__main__":
    main()
