"""Every command on files that were changed at random, for as long as you like.

    python tests/torture/torture_fuzz.py --minutes 10
    python tests/torture/torture_fuzz.py --seed 1234 --rounds 1        # one finding again

A small data set (as tars and as COCO), a cache in each backend, a pipeline and a checkpoint are made once. Each round
changes one of their files: single bytes, values of documents (sealed again, as their maker could), stored columns, or
the fields of a checkpoint; then the commands that read it are run. They succeed or say what is wrong in one message.
A traceback, a crash, a hang or 1.5 GB more than a command needs is a finding, printed with its seed.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from cache_samples import replace_unit, unit_file  # noqa: E402
from coco_samples import write_coco  # noqa: E402
from hostile_bombs import tar_member  # noqa: E402
from hostile_samples import ABSURD, document_of, places  # noqa: E402

from vkd_cache.cache.documents import seal  # noqa: E402
from vkd_cache.cache.reader import open_cache  # noqa: E402
from vkd_cache.cache.schema import Manifest  # noqa: E402
from vkd_cache.cache.writer import CacheWriter  # noqa: E402
from vkd_cache.cli import main as vkd_cache  # noqa: E402
from vkd_cache.errors import VkdCacheError  # noqa: E402
from vkd_cache.sealing import sealed  # noqa: E402

ALLOWED_BYTES = 3 * 2**29
ROUNDS_A_PROCESS = 40
ROUND_LIMIT_S = 120

Random = random.Random


def make_material(folder: Path) -> None:
    """The files that are changed later, each made by the program itself."""
    import timm
    from PIL import Image
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True)
    digits, content = load_digits(), b""
    for number in range(24):
        buffer = io.BytesIO()
        image = Image.fromarray((digits.images[number] * 15).astype(np.uint8)).resize((40, 36))
        image.convert("RGB").save(buffer, "JPEG")
        for suffix, data in (("jpg", buffer.getvalue()), ("cls", b"%d" % digits.target[number])):
            content += tar_member(f"{number:03d}.{suffix}", len(data), data)
    (folder / "a.tar").write_bytes(content + bytes(1024))
    write_coco(folder / "coco")
    (folder / "run.toml").write_text(
        "[source]\ntrain = \"a.tar\"\n[views]\nsize_px = 32\n[teacher]\nname = \"test_resnet\"\n"
        "weights = \"teacher.pt\"\nnum_classes = 10\n[cache]\nurl = \"cache-zarr\"\ndtype = \"float16\"\n"
        "[extract]\nbatch_size = 8\nworkers = 0\ndevice = \"cpu\"\n[student]\nname = \"test_vit\"\n"
        "[train]\nepochs = 1\nbatch_size = 8\nworkers = 0\ndevice = \"cpu\"\noutput = \"run\"\neval_every = 0\n"
    )  # fmt: skip
    (folder / "coco.toml").write_text(
        "[source]\ntrain = \"coco\"\n[views]\nrecipe = \"vidt\"\nscales = [64]\nmax_size_px = 96\ncrop_scales = []\n"
        "[student]\nname = \"vidt_swin_nano\"\n[loss]\nfeature_weight = 0.0\n"
        "[train]\nbatch_size = 2\nepochs = 1\noutput = \"detector\"\n"
    )
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), folder / "teacher.pt")
    with contextlib.chdir(folder):
        for backend in ("zarr", "webdataset"):
            expect(0, "extract", "run.toml", "--cache", f"cache-{backend}", "--backend", backend)
        expect(0, "train", "run.toml")
    for what in ("checkpoint", "coco", "run.toml", "cache-zarr", "cache-webdataset"):  # or nothing would be tried
        shutil.copytree(folder, folder.with_name("tried"))
        with contextlib.chdir(folder.with_name("tried")):
            for arguments in commands_for(what):
                expect(0, *arguments)
        shutil.rmtree(folder.with_name("tried"))


def expect(code: int, *arguments: str) -> None:
    """Run a command that has to end so."""
    found, said = command(*arguments)
    if found != code:
        raise SystemExit(f"{arguments}: ended with {found}: {said}")


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a command, in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            vkd_cache(list(arguments))
        except SystemExit as ended:
            return int(ended.code or 0), said.getvalue()


# ------------------------------------------------------------------------------------------------------- changes


def flip(rng: Random, data: bytes) -> bytes:
    """A few bytes changed, cut out or doubled."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, count = rng.randrange(len(changed) + 1), rng.choice([1, 1, 2, 4, 8, 64])
        what = rng.choice([b"\0" * count, b"\xff" * count, rng.randbytes(count), struct.pack("<Q", 2**63 - 1)])
        changed[at : at + rng.choice([len(what), 0, count])] = rng.choice([what, what, b""])
    return bytes(changed)


def changed(rng: Random, document: Any) -> Any:
    """A document with some of its values replaced, removed or moved."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 3])):
        there = places(document)
        if not there:
            break
        *way, last = rng.choice(there)
        holder = document
        for step in way:
            holder = holder[step]
        if rng.random() < 0.2:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(rng.choice([*ABSURD, rng.randrange(-(2**40), 2**40), rng.random() * 1e6]))
    return document


def spoil_manifest(rng: Random, folder: Path) -> str:
    name = rng.choice(["cache-zarr", "cache-webdataset"])
    body = changed(rng, document_of(folder / name / "manifest.json"))
    (folder / name / "manifest.json").write_bytes(seal(body))
    with contextlib.suppress(VkdCacheError):
        fingerprint = Manifest.from_json(body).fingerprint()
        for record in (folder / name / "records").rglob("*.json"):
            record.write_bytes(seal({**document_of(record), "fingerprint": fingerprint}))
    return name


def spoil_record(rng: Random, folder: Path) -> str:
    name = rng.choice(["cache-zarr", "cache-webdataset"])
    record = next((folder / name / "records").rglob("*.json"))
    record.write_bytes(seal(changed(rng, document_of(record))))
    return name


def spoil_unit(rng: Random, folder: Path) -> str:
    name = rng.choice(["cache-zarr", "cache-webdataset"])
    replace_unit(folder / name, flip(rng, unit_file(folder / name, 0).read_bytes()))
    return name


def spoil_columns(rng: Random, folder: Path) -> str:
    name = rng.choice(["cache-zarr", "cache-webdataset"])
    cache = open_cache(str(folder / name))
    unit = cache.read(0, 0)
    columns = {column: np.array(values) for column, values in unit.columns.items()}
    for column in rng.sample(sorted(set(columns) - {"key_bytes", "key_offsets"}), rng.choice([1, 1, 2])):
        values = columns[column].reshape(-1)
        limits = np.finfo(values.dtype) if values.dtype.kind == "f" else np.iinfo(values.dtype)
        entry = rng.choice([limits.min, limits.max, 0, 1, rng.randrange(200)] + [np.nan] * (values.dtype.kind == "f"))
        values[rng.randrange(len(values)) :: rng.choice([1, 7, 10**6])] = entry
    nodes = {spec.name: unit.node(spec.name) for spec in cache.manifest.nodes}
    with contextlib.suppress(VkdCacheError):
        CacheWriter(cache.storage, cache.manifest).publish(0, 0, columns, nodes)
    return name


def spoil_bytes(rng: Random, folder: Path) -> str:
    cache = rng.choice(["cache-zarr", "cache-webdataset"])
    path = rng.choice(sorted(path for path in (folder / cache).rglob("*") if path.is_file()))
    path.write_bytes(flip(rng, path.read_bytes()))
    return cache


def spoil_checkpoint(rng: Random, folder: Path) -> str:
    path = folder / "run" / "last.pt"
    if rng.random() < 0.4:
        path.write_bytes(flip(rng, path.read_bytes()))
        return "checkpoint"
    state = torch.load(path, weights_only=True)
    part = rng.choice(["config", "standing", "window", "identity", "views", "num_classes", "optimizer", "student"])
    if part == "student":
        state[part][rng.choice(sorted(state[part]))] = rng.choice([torch.zeros(3), torch.zeros(()), "x", None])
    else:
        state |= changed(rng, {part: state.get(part)})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(sealed(buffer.getvalue()))
    return "checkpoint"


def spoil_file(name: str) -> Callable[[Random, Path], str]:
    def spoil(rng: Random, folder: Path) -> str:
        (folder / name).write_bytes(flip(rng, (folder / name).read_bytes()))
        return name

    return spoil


def spoil_coco(rng: Random, folder: Path) -> str:
    path = rng.choice(sorted((folder / "coco" / "annotations").iterdir()))
    path.write_text(json.dumps(changed(rng, json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    return "coco"


CHANGES = (
    spoil_manifest, spoil_manifest, spoil_record, spoil_unit, spoil_columns, spoil_columns, spoil_bytes,
    spoil_checkpoint, spoil_checkpoint, spoil_file("a.tar"), spoil_file("run.toml"), spoil_file("teacher.pt"),
    spoil_coco,
)  # fmt: skip
SMALL = ("--device", "cpu", "--workers", "0")


def commands_for(what: str) -> list[list[str]]:
    """The commands that read what was changed."""
    if what == "checkpoint":
        student = ["eval", "--checkpoint", "run/last.pt", "--source", "a.tar", *SMALL]
        return [student, ["train", "run.toml", "--resume", "auto", "--epochs", "1"]]
    if what == "coco":
        return [["train", "coco.toml", "--plain", "--dry-run", *SMALL]]
    if what in ("run.toml", "a.tar", "teacher.pt"):
        return [["extract", "run.toml", "--cache", "new"], ["verify", "cache-zarr", "--source", "a.tar", "--pixels"]]
    return [
        ["verify", what, "--source", "a.tar", "--pixels", "--teacher", "--teacher-weights", "teacher.pt", *SMALL],
        ["eval", "--cache", what, *SMALL],
        ["train", "run.toml", "--cache", what, "--output", "other"],
        ["convert", what, "converted", "--backend", "zarr"],
        ["extract", "run.toml", "--cache", what, "--backend", what.removeprefix("cache-"), "--views", "2"],
    ]


# -------------------------------------------------------------------------------------------------------- rounds


def one_round(material: Path, seed: int) -> list[str]:
    """The findings of one change."""
    rng, found = Random(seed), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "work"
        shutil.copytree(material, folder)
        change = rng.choice(CHANGES)
        try:
            what = change(rng, folder)
        except (ValueError, OverflowError, TypeError):  # nothing that can be written down
            return []
        for arguments in commands_for(what):
            started = time.monotonic()
            signal.alarm(ROUND_LIMIT_S)
            try:
                with contextlib.chdir(folder):
                    code, said = command(*arguments)
                print(f"{change.__name__}, {arguments[0]}: {code} {said.strip().splitlines()[-1:]}", flush=True)
                if "Traceback" in said:
                    found.append(f"a traceback: {said[-2000:]}")
                elif code not in (0, 1, 2, 3):
                    found.append(f"exit code {code}: {said[-500:]}")
                elif "out of memory" in said:
                    found.append(f"out of memory: {said[-500:]}")
            except BaseException:  # noqa: BLE001 - any of them is what is looked for
                found.append(traceback.format_exc(limit=-8))
            signal.alarm(0)
            if time.monotonic() - started > ROUND_LIMIT_S / 2:
                found.append(f"took {time.monotonic() - started:.0f} s")
            if found:
                return [f"seed {seed}: {arguments} after {what}: {text}" for text in found]
    return []


def child(material: Path, first: int, count: int) -> int:
    """Rounds of one process, whose memory is bounded; each begins with a line that says which it is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    one_round(material, -1)  # what is imported is there before the limit
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + ALLOWED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in range(first, first + count):
        print(f"seed {seed}", flush=True)
        for finding in one_round(material, seed):
            print(f"FINDING {json.dumps(finding)}", flush=True)
    return 0


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {ROUND_LIMIT_S} s")


def main() -> int:
    """Rounds until the time is over; the number of findings decides the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=0, help="this many instead of --minutes")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--verbose", action="store_true", help="say how each command ended")
    parser.add_argument("--child", nargs=3, metavar=("MATERIAL", "FIRST", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(Path(given.child[0]), int(given.child[1]), int(given.child[2]))
    seed, done, findings, until = given.seed, 0, 0, time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as scratch:
        material = Path(scratch) / "material"
        make_material(material)
        while done < given.rounds if given.rounds else time.monotonic() < until:
            count = min(ROUNDS_A_PROCESS, given.rounds - done) if given.rounds else ROUNDS_A_PROCESS
            arguments = [sys.executable, __file__, "--child", str(material), str(seed), str(count)]
            patience_s = 2 * ROUND_LIMIT_S * count
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            ran = subprocess.run(
                arguments, capture_output=True, text=True, check=False, timeout=patience_s, env=environment
            )
            lines = ran.stdout.splitlines()
            if given.verbose:
                print(ran.stdout)
            for line in lines:
                if line.startswith("FINDING "):
                    findings += 1
                    print(json.loads(line.removeprefix("FINDING ")), flush=True)
            if ran.returncode:
                findings += 1
                last = next((line for line in reversed(lines) if line.startswith("seed ")), "before the first seed")
                print(f"{last}: the process ended with {ran.returncode}: {ran.stderr[-1500:]}", flush=True)
            seed, done = seed + count, done + count
    print(f"{done} rounds from seed {given.seed}: {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
