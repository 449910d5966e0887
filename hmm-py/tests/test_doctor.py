"""``python -m hmm doctor``: the engine that it names is the one that programs get."""

import errno
import json
import os
import subprocess
import sys

import hmm
import pytest
from isolation import run_isolated

ENGINES = ["uffd", "uffd-inline", "signal"]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "hmm", *words]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=50, env=variables, check=False)


def engine_of_a_program() -> str | None:
    """The engine in a process of its own; None when no engine works."""
    code = f"""
import hmm
try:
    print(hmm.current().engine)
except hmm.Error as error:
    assert error.errno == {errno.EOPNOTSUPP}, error
    print(None)
"""
    engine = run_isolated(code).split()[-1]
    return None if engine == "None" else engine


def test_doctor_names_the_engine_of_a_program():
    result = run("doctor", "--json")
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["engine"] == engine_of_a_program()
    assert [engine["name"] for engine in report["engines"]] == ENGINES
    assert report["version"] == hmm.__version__
    assert result.returncode == (0 if report["works"] else 1)
    for engine in report["engines"]:
        assert engine["works"] == (not engine["reason"]) == bool(engine["proof"]), engine


def test_doctor_reports_a_forced_engine():
    report = json.loads(run("doctor", "--json", HMM_ENGINE="signal").stdout)
    assert report["engine"] == "signal" and report["forced"], report["reason"]


def test_an_unknown_engine_fails_with_a_clear_text():
    result = run("doctor", HMM_ENGINE="abacus")
    assert result.returncode == 1
    assert "HMM_ENGINE=abacus: unknown engine" in " ".join(result.stdout.split())


@pytest.mark.parametrize("words", [(), ("diagnose",), ("doctor", "--jsn")])
def test_words_that_make_no_sense_are_refused(words):
    result = run(*words)
    assert result.returncode == 2 and result.stdout == ""
    assert "usage: python -m hmm doctor [--json]" in result.stderr


def test_version_and_help():
    assert run("--version").stdout == f"libhmm {hmm.__version__}\n"
    assert "HMM_ENGINE" in run("--help").stdout
