"""Every Python example runs and checks itself."""

import sys
from pathlib import Path

import pytest
from isolation import run_process

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "python"
ARGUMENTS = {"oversubscribe.py": ["--device", "8", "--array", "8", "--piece", "1"]}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name):
    output = run_process([sys.executable, "-W", "error", str(EXAMPLES / name), *ARGUMENTS.get(name, [])], 120)
    assert "#" in output
