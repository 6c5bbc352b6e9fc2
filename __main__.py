"""The command `mdiff`, and `python -m mdiff`: the command line, which may be interrupted while it is imported, too."""

import sys


def main() -> int:
    """Runs the command line and returns its exit code."""
    try:
        from mdiff.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("mdiff: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
