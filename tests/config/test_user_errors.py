"""What is told in a sentence, and what keeps its traceback."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from launch import _app, submit
from olmoearth_jax import modalities, platforms
from olmoearth_jax.config import ConfigError, load_json

ROOT = Path(__file__).resolve().parents[2]


def caught(call) -> BaseException:
    with pytest.raises(Exception) as found:
        call()
    return found.value


def inside_ours(body: str):
    """Calls code as if it stood in one of our files."""
    names: dict = {}
    source = f"def call():\n    {body}\n"
    exec(compile(source, str(ROOT / "olmoearth_jax" / "some.py"), "exec"), names)
    return caught(names["call"])


FAULTS = [
    "list(zip([1], [], strict=True))",
    "for pair in zip([1], [1, 2], strict=True): pass",
    "[1].index(2)",
    "'a'.index('b')",
    "a, b = [1]",
    "int('x')",
    "float('x')",
    "b'\\xff'.decode()",
    "__import__('numpy').zeros(3).reshape(2)",
    "__import__('json').loads('{')",
    "raise KeyError('a')",
    "raise TypeError('a')",
    "import os; os.lseek(0, -1, 77)",
]
SENTENCES = [
    "raise ValueError('a sentence')",
    "raise OSError('a sentence')",
    "try: int('x')\n    except ValueError as e: raise ValueError('a sentence') from e",
    "try: raise ValueError('a sentence')\n    finally: print()",
    "try: raise ValueError('a sentence')\n    except ValueError: raise",
    "with __import__('io').StringIO(): raise ValueError('a sentence')",
    "open('/nowhere/at/all')",
    "__import__('os').mkdir('/dev/null/x')",
    "__import__('pathlib').Path('/nowhere/at/all').read_text()",
]


@pytest.mark.parametrize("body", FAULTS)
def test_faults_of_the_program_keep_their_traceback(body):
    assert not _app.is_users(inside_ours(body))


@pytest.mark.parametrize("body", SENTENCES)
def test_sentences_of_ours_and_refusals_of_the_system_are_told(body):
    assert _app.is_users(inside_ours(body))


def test_errors_of_libraries_are_no_sentences():
    source = compile("def call(): raise ValueError('a library')", "/lib/other.py", "exec")
    names: dict = {}
    exec(source, names)
    assert not _app.is_users(caught(names["call"]))
    assert not _app.is_users(ValueError("never raised"))
    assert _app.is_users(OSError(errno.ENOSPC, "No space left on device"))


def test_sentences_of_real_code():
    for call in (
        lambda: modalities.get("nope"),
        lambda: load_json("/nowhere"),
        lambda: submit._render.Mount.parse("x"),
    ):
        assert _app.is_users(caught(call))
    assert _app.is_users(ConfigError("a"))


def test_a_fault_in_a_verb_is_printed_with_its_traceback():
    program = (
        "from launch import _app\n"
        "body = compile('def verb(c): return [1].index(2)', _app.__file__, 'exec')\n"
        "exec(body)\n"
        "_app.run(verb)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--config=configs/nano.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "ValueError" in done.stderr and "error: " not in done.stderr


@pytest.mark.parametrize(
    "limits, wanted", [((24, 24), None), ((24, 4096), 1024), ((24, -1), 1024), ((24, 100), 100)]
)
def test_a_low_limit_of_open_files_is_lifted_or_told(monkeypatch, limits, wanted):
    given = []
    monkeypatch.setattr(platforms.resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(platforms.resource, "setrlimit", lambda which, new: given.append(new))
    if wanted is None:
        with pytest.raises(ValueError, match="may open 24 files at a time, and a run needs 64"):
            platforms.check_open_files()
    else:
        platforms.check_open_files()
        assert given == [(wanted, limits[1])]
    limits = (4096, 4096)
    given.clear()
    platforms.check_open_files()
    assert given == []
