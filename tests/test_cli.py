"""The command line from outside: help at once, one message for a mistake, an exit code that says which kind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import click
import pytest

import vkd_cache
from vkd_cache import console
from vkd_cache.cli import cli, guarded
from vkd_cache.errors import BrokenImageError, CacheMismatchError, ConfigError, TeacherError, VkdCacheError

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "module": [sys.executable, "-m", "vkd_cache"],
    "checkout": [sys.executable, str(ROOT / "cli.py")],
    "installed": [str(Path(sys.executable).parent / "vkd-cache")],
}


def run(*arguments: str, program: str = "module", folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAMS[program], *arguments], capture_output=True, text=True, cwd=folder, check=False)


def fails(*arguments: str, code: int = 2) -> str:
    """The message of a command that must fail with `code`, say so on stderr alone, and show no traceback."""
    result = run(*arguments)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr


def test_three_ways_to_the_same_program() -> None:
    outputs = {name: run("--help", program=name).stdout for name in PROGRAMS}
    assert len(set(outputs.values())) == 1, outputs
    assert run("--version", program="checkout").stdout == f"vkd-cache, version {vkd_cache.__version__}\n"


def test_checkout_program_works_from_any_folder(tmp_path: Path) -> None:
    assert run("extract", "--help", program="checkout", folder=tmp_path).returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.commands)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from vkd_cache.cli import cli\n"
        f"cli.main({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'timm', 'zarr', 'PIL', 'matplotlib', 'webdataset', 'fsspec'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage: " in result.stdout


def test_importing_the_package_imports_no_part_of_it() -> None:
    script = "import sys, vkd_cache; sys.exit(sorted(m for m in sys.modules if m.startswith('vkd_cache.')) or 0)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert set(vkd_cache.__all__) <= set(dir(vkd_cache))
    with pytest.raises(AttributeError, match="no attribute 'open_cach'"):
        vkd_cache.open_cach  # noqa: B018


def test_unknown_names_come_with_a_suggestion() -> None:
    assert "Did you mean 'extract'?" in fails("extrct")
    assert "'--views'" in fails("extract", "--vews", "3")
    assert "did you mean 'demo'?" in fails("extract", "dmo")


def test_wrong_values_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[views]\nsize_pixel = 3\n[train]\nlr = -1\n")
    message = fails("train", str(path), "--epochs", "0")
    assert f"Error: {path}: [views] unknown key 'size_pixel'; did you mean 'size_px'?" in message
    assert f"{path}: [train] lr: found -1.0, expected from 0.0 to 1e+30" in message
    assert "command line: [train] epochs: found 0, expected from 1 to 1000000" in message
    assert "'fp8' is not one of 'off', 'bf16', 'fp16'" in fails("train", "--amp", "fp8")
    assert "'many' is not a valid integer" in fails("train", "--epochs", "many")
    assert "found '3/3', expected I/N" in fails("extract", "demo", "--worker", "3/3")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["extract"], ["[source] train (--source)", "[cache] url (--cache)", "[teacher] name (--teacher)"]),
        (["train", "--source", "x"], ["[student] name (--student)", "[train] output (--output)"]),
        (["train", "--source", "x", "--student", "s", "--output", "o"], ["[cache] url (--cache)"]),
        (["train", "--source", "x", "--student", "s", "--output", "o", "--live-teacher"], ["[teacher] name"]),
        (["eval", "--checkpoint", "x.pt"], ["[source] val (--source)"]),
        (["eval", "--source", "x", "--teacher"], ["[teacher] name (--teacher)"]),
        (["eval", "--cache", "--json"], ["[cache] url (--cache)"]),
        (["verify", "s3://bucket/cache", "--pixels"], ["[source] train (--source)"]),
        (["compare", "--steps", "3"], ["[cache] url (--cache)", "[student] name (--student)", "[teacher] name"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_nobody_said_is_asked_for(arguments: list[str], named: list[str]) -> None:
    message = fails(*arguments)
    assert message.startswith(f"Error: {arguments[0]}: nothing says ")
    for entry in named:
        assert entry in message


def test_eval_of_nothing() -> None:
    assert "give --checkpoint FILE, --teacher or --cache" in fails("eval", "demo")


def test_verify_of_something_that_is_neither_cache_nor_pipeline() -> None:
    message = fails("verify", "caches/in1k")
    assert "caches/in1k: no such cache directory. As a pipeline: " in message
    assert "Missing argument 'CACHE|PIPELINE'" in fails("verify")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("run.toml: no"), 2, "Error: run.toml: no\n"),
        (VkdCacheError("a"), 1, "Error: a\n"),
        (CacheMismatchError("cache: b\n  c"), 1, "Error: cache: b\n  c\n"),
        (TeacherError("d"), 1, "Error: d\n"),
        (BrokenImageError("e"), 1, "Error: e\n"),
        (
            PermissionError(13, "Permission denied", "/data/x"),
            1,
            "Error: /data/x: Permission denied. Give another path, or have the right to use this one.\n",
        ),
        (
            OSError(28, "No space left on device"),
            1,
            "Error: No space left on device. What is complete is intact: make room, and run the same command again "
            "(train: --resume auto).\n",
        ),
        (ConnectionError(), 1, "Error: ConnectionError\n"),
        (KeyboardInterrupt(), 130, "Error: interrupted.\n"),
        (click.UsageError("f"), 2, "Error: f\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise error

    assert guarded(command) == code
    assert capsys.readouterr() == ("", message)


def test_success_and_partial_failure_pass_through() -> None:
    assert guarded(lambda: None) == 0
    assert guarded(lambda: 3) == 3


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


def test_compiling_without_a_compiler_is_a_message() -> None:
    program = (
        "import sys, torch; from vkd_cache.cli import guarded\n"
        "twice = torch.compile(lambda values: (values + 1) * 2)\n"
        "sys.exit(guarded(lambda: int(twice(torch.ones(8))[0])))"
    )
    nowhere = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | nowhere, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: compile = true: torch.compile found no working compiler")
    assert "Traceback" not in done.stderr


def test_too_little_memory_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def gpu() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def cpu() -> int:
        return len(torch.empty(2**60))

    def python() -> int:
        return len(bytearray(2**60))

    for command in (gpu, cpu, python):
        assert guarded(command) == 1
        assert "out of memory" in (message := capsys.readouterr().err)
        assert message.endswith("Use a smaller --batch-size.\n")


def test_a_file_where_a_folder_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        assert guarded(lambda path=path: path.mkdir(exist_ok=True)) == 1  # type: ignore[misc]
        assert capsys.readouterr().err.endswith(", where a folder is needed. Give another path.\n")


def test_a_long_temporary_folder_works_or_is_a_message() -> None:
    """Sockets have short names: multiprocessing, which runs the data workers, says no more than that."""
    program = (
        "import sys; from multiprocessing import forkserver; from vkd_cache.cli import guarded\n"
        "sys.exit(guarded(forkserver.ensure_running))"
    )
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        for length, code in [(75, 0), (76, 1)]:
            folder = Path(short) / ("é" + "x" * (length - len(short) - 3))
            folder.mkdir()
            done = subprocess.run(
                [sys.executable, "-c", program],
                env=os.environ | {"TMPDIR": str(folder)},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == code
            assert (f"temporary files is {str(folder)!r}, {length} bytes" in done.stderr) == bool(code)
            assert "Traceback" not in done.stderr


def test_interrupting_a_process_gives_one_line() -> None:
    script = (
        "import time; from vkd_cache.cli import cli, guarded; import sys\n"
        "@cli.command()\n"
        "def wait() -> None:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(60)\n"
        "sys.exit(guarded(lambda: cli.main(['wait'], standalone_mode=False)))\n"
    )
    arguments = [sys.executable, "-c", script]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        message = process.stderr.read()
    assert process.returncode == 130
    assert message.strip() == "Error: interrupted."


def test_warnings_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        warnings.simplefilter("always")
        warnings.warn("tars/000.tar:\n  only one class", UserWarning, stacklevel=1)
        return 0

    assert guarded(command) == 0
    assert capsys.readouterr() == ("", "Warning: tars/000.tar: only one class\n")


@pytest.fixture
def _loud() -> object:
    yield
    console.set_quiet(False)


@pytest.mark.usefixtures("_loud")
def test_console_keeps_results_apart_from_talk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0.0)
    with console.track("Extract", 4) as progress:
        progress.advance(1)
        progress.detail("data [40%]")
        with console.track("Inner", 0, "units"):
            pass
        progress.advance(3)
    assert progress.done == 4
    console.say("[red]done[/red]")
    console.show_table("Accuracy", ["model", "top-1"], [["student [a]", "78.3"]])
    out, err = capsys.readouterr()
    assert "Extract: 1/4 images (25%), " in err and "ETA" in err
    assert "Extract: 4 images in 0.0 s, " in err and "| data [40%]" in err
    assert "Inner: 0 units in 0.0 s, 0 units/s" in err
    assert err.endswith("[red]done[/red]\n")
    assert out.startswith("Accuracy\n") and "student [a]" in out and "78.3" in out
    console.set_quiet(True)
    with console.track("Silent", 2) as progress:
        progress.advance(2)
    console.say("silent")
    console.show_table("", ["a"], [["b"]])
    assert progress.done == 2
    assert capsys.readouterr() == ("", "")
    console.warn("heard")
    assert capsys.readouterr() == ("", "Warning: heard\n")


def test_a_document_as_tables(capsys: pytest.CaptureFixture[str]) -> None:
    document = {
        "ok": True,
        "cache": {"bytes": 12, "loss": 0.25},
        "gaps": [0.0] * 100,
        "results": [{"what": "student", "top1": 0.5}, {"what": "teacher", "top5": None}],
    }
    console.show_document("Report", json.loads(json.dumps(document)))
    out = capsys.readouterr().out
    for text in ("cache.bytes", "12", "0.25", "yes", "100 values", "Report: results", "student", "top5"):
        assert text in out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.3, "42 s"), (185, "3:05"), (3723.2, "1:02:03")]
)
def test_clock(seconds: float, text: str) -> None:
    assert console.clock(seconds) == text


def test_an_interrupt_while_text_is_executed_has_the_same_exit_code(tmp_path: Path) -> None:
    """`python -m` would end by SIGINT itself: CPython remembers an interrupt that left exec() of a text."""
    (tmp_path / "interrupted_import.py").write_text(
        "import os, signal, sys\n"
        "from vkd_cache.cli import guarded\n"
        "text = 'os.kill(os.getpid(), signal.SIGINT)\\nwhile True: pass'\n"
        "sys.exit(guarded(lambda: exec(text)))\n"
    )
    command = [sys.executable, "-m", "interrupted_import"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (130, "Error: interrupted.\n")
