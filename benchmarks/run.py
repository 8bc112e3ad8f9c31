"""``make bench``: suites of measurements, each in a process of its own.

``python -m benchmarks.run prune gate --threads 2 --rounds 5``; what one suite alone understands,
such as ``--batches 1 8``, can follow the name of one suite.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from rich.console import Console

from benchmarks.environment import ROOT

SUITES = {
    "prune": "benchmarks.prune",
    "gate": "benchmarks.gating",
    "score": "benchmarks.score",
    "compile": "benchmarks.compile_time",
    "memory": "benchmarks.memory",
    "scale": "benchmarks.scale",
    "budget": "benchmarks.budget",
    "predict": "benchmarks.predict",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "only", nargs="*", choices=[*SUITES, []], metavar="SUITE", help="default: all"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="default: what each suite needs")
    arguments, others = parser.parse_known_args()
    if others and len(arguments.only) != 1:
        parser.error(f"{' '.join(others)}: name the one suite that this is for")
    console = Console()
    for name in arguments.only or SUITES:
        console.rule(name)
        command = [sys.executable, "-m", SUITES[name], "--threads", str(arguments.threads)]
        if arguments.rounds is not None:
            command += ["--rounds", str(arguments.rounds)]
        subprocess.run([*command, *others], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
