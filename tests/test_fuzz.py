"""Everything that reads files of others, fed with spoilt ones in processes of their own."""

import re
import subprocess
import sys

import pytest

from tools import _fuzz_parsers

SECONDS = 30.0


@pytest.mark.slow
def test_half_a_minute_of_spoilt_files_ends_without_an_unclear_error_a_crash_or_a_hang():
    each = SECONDS / len(_fuzz_parsers.PARSERS)
    command = [sys.executable, "-m", "tools.fuzz", f"--seconds={each}", "--seed=15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    lines = re.findall(r"(\w+): (\d+) cases with seed 15, (\d+) wrong", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name, _, _ in lines] == list(_fuzz_parsers.PARSERS)
    assert all(int(tried) > 0 and wrong == "0" for _, tried, wrong in lines)
