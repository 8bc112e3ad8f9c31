"""``make bench``: speed, gating, compile time and memory, each in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys

from rich.console import Console

from benchmarks.environment import ROOT

BENCHMARKS = ("speed", "gating", "compile_time", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "only", nargs="*", choices=BENCHMARKS, default=BENCHMARKS, help="default: all"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    console = Console()
    for name in arguments.only:
        console.rule(name)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--threads", str(arguments.threads)]
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
