"""A cache on S3 behind a lossy network, its workers killed at random moments, for as long as you like.

    python tests/torture/torture_s3.py --minutes 10

A round draws how often each fault comes (none to one request in ten, all together up to a third) and one to three
workers, kills them at random moments and starts them again until they are done, and compares every object with the
cache in a folder. Then it verifies that cache, trains from it behind the same faults, and converts it into a folder:
weights, losses and bytes are those of the folder. A round takes half a minute; the last one is finished.
"""

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import for_minutes
from extract_jobs import contents
from fault_proxy import FAULTS, FaultProxy
from remote_jobs import remote_contents, start_extract
from s3_server import S3Server
from test_remote_cache import BUCKETS, NUM_UNITS, PATIENCE_S, proxy
from train_runs import log, same_value

from vkd_cache.config import Config
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.checkpoints import read_checkpoint
from vkd_cache.stages.convert import ConvertRequest, convert
from vkd_cache.stages.convert_plan import Wish
from vkd_cache.stages.train import train
from vkd_cache.stages.verify import VerifyRequest, verify

__all__ = ["proxy"]  # a fixture
MakeConfig = Callable[..., Config]


def test_s3_for_minutes(
    tiny_config: MakeConfig,
    small_cache: Path,
    s3_environment: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    until: float,
) -> None:
    """Rounds until the time is up."""
    trained = tmp_path / "from-a-folder"
    train(tiny_config(cache={"url": str(small_cache)}, train={"output": str(trained)}), JobSplit())
    webdataset = Wish(backend="webdataset")
    convert(ConvertRequest(source=str(small_cache), target=str(tmp_path / "converted"), wish=webdataset), JobSplit())
    kills = 0
    for number in itertools.count():
        rng = np.random.default_rng(number)
        url = s3_environment.make_bucket(next(BUCKETS)) + "/cache"
        proxy.rates = dict(zip(FAULTS, rng.uniform(0, 0.1, len(FAULTS)).tolist(), strict=True))
        proxy.rates |= {"silence": proxy.rates["silence"] / 5}  # each costs its client a second
        total = sum(proxy.rates.values())
        proxy.rates = {name: rate * min(1.0, 0.33 / total) for name, rate in proxy.rates.items()}
        config = tiny_config(
            cache={"url": url}, views={"count": "2"}, train={"output": str(tmp_path / f"round{number}")}
        )
        kills += extract_by_mortals(config, rng, tmp_path / "said")
        assert remote_contents(s3_environment, url) == contents(small_cache)
        assert verify(config, VerifyRequest(url=url, source=config.source.train, pixels=True)).exit_code == 0
        train(config, JobSplit())
        one, other = (read_checkpoint(folder / "last.pt") for folder in (Path(config.train.output), trained))
        assert all(same_value(one[name], other[name]) for name in ("student", "optimizer", "standing"))
        assert log(Path(config.train.output)) == log(trained)
        target = tmp_path / f"converted{number}"
        convert(ConvertRequest(source=url, target=str(target), wish=webdataset), JobSplit())
        assert contents(target) == contents(tmp_path / "converted")
        faults = sum(proxy.injected.values())
        print(f"round {number + 1}: {kills} kills, {faults} faults in {len(proxy.asked)} requests so far, all the same")
        if time.monotonic() > until:
            return


def extract_by_mortals(config: Config, rng: np.random.Generator, said: Path) -> int:
    """Run workers that die, until there is nothing left to do; the number of deaths."""
    count, kills = int(rng.integers(1, 4)), 0
    waiting = list(range(count))
    while waiting:
        jobs = {index: start_extract(config, said, JobSplit(index=index, count=count)) for index in waiting}
        deadly = kills < NUM_UNITS
        for job in jobs.values():
            job.join(float(rng.uniform(0.2, 4.0)) if deadly else PATIENCE_S)
            if job.exitcode is None and deadly:
                job.kill()
                job.join()
                kills += 1
        waiting = [index for index, job in jobs.items() if job.exitcode != 0]
        failed = [job.exitcode for job in jobs.values() if job.exitcode not in (0, -9)]
        assert not failed, said.read_text()
    return kills


if __name__ == "__main__":
    for_minutes.main(__file__, __doc__)
