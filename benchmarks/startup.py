"""How long `mdiff --help` and `mdiff models` take against a bare Python that imports click, in turn, in one call.

    python benchmarks/startup.py

The claim: at most three times.
"""

import statistics
import subprocess
import sys
import time

RUNS = 15
PEER = [sys.executable, "-c", "import click"]
OURS = {name: [sys.executable, "-m", "mdiff", name] for name in ("--help", "models", "plugins")}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    for name, command in OURS.items():
        pairs = [(seconds(command), seconds(PEER)) for _ in range(RUNS + 1)][1:]
        ours, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"mdiff {name:8} {ours * 1e3:6.0f} ms   python + click {peer * 1e3:6.0f} ms   ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
