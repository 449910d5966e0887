"""``python -m hmm doctor``: which engine works here, tried for real (see ``python -m hmm --help``)."""

import os
import sys

from ._native import run_command


def main() -> int:
    """Runs the command line, prints the answer, and returns the exit status."""
    terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    text, status = run_command(sys.argv[1:], [sys.executable, "-m", "hmm"], colours=terminal)
    print(text, end="", file=sys.stderr if status == 2 else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
