"""Memory and open files of an extraction and of a training run stay flat, seen from outside while they work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_benchmarks import BENCHMARKS, check_origin

PROCESSES = [f"{job}, {name}" for job in ("extract", "train") for name in ("main process", "data worker 1")]
FILES_MORE = 4  # batches on their way hold a few each
GROWTH = 1.25  # of jobs of seconds; the long ones are in docs/results/long_run.md


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="the kernel does not say who owns memory")
def test_hundreds_of_units_and_steps_leave_nothing_behind(tmp_path: Path) -> None:
    output, figure, scratch = tmp_path / "long_run.json", tmp_path / "long_run.png", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, str(BENCHMARKS / "long_run.py"), "--tiny", "--seed", "3", "--threads", "1"]
    command += ["--output", str(output), "--figure", str(figure), "--scratch", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert list(scratch.iterdir()) == []
    document = json.loads(output.read_text(encoding="utf-8"))
    check_origin(document, "long_run", str(tmp_path))
    assert list(document["curves"]) == PROCESSES
    for name, curve in document["curves"].items():
        assert curve["done"] == sorted(curve["done"]) and curve["done"][-1] >= (100 if "train" in name else 150)
        facts = document["facts"]
        first, second = (facts[f"{name}: most open files, {half} half"] for half in ("first", "second"))
        assert second <= first + FILES_MORE, name
        assert document["ratios"][f"private memory, second half / first, {name}"]["median"] < GROWTH, name
