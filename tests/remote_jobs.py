"""Shared by the tests of caches on an object store: jobs in processes of their own, and a cache there as bytes."""

import multiprocessing
import os
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import PRELOAD
from extract_jobs import extract_alone
from s3_server import S3Server

from vkd_cache.config import Config
from vkd_cache.runtime import JobSplit

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOAD)


def start_extract(
    config: Config, said: Path, split: JobSplit | None = None, settings: Mapping[str, str] | None = None
) -> BaseProcess:
    """The stage as the command line runs it, in a process with this one's AWS and fsspec environment and `settings`."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "FSSPEC_", "XDG_"))}
    environment |= settings or {}
    process = _CONTEXT.Process(target=_extract, args=(environment, config, split or JobSplit(), said))
    process.start()
    return process


def _extract(environment: Mapping[str, str], config: Config, split: JobSplit, said: Path) -> None:
    import fsspec

    os.environ.update(environment)  # the fork server has that of its own start
    fsspec.config.set_conf_env(fsspec.config.conf)
    extract_alone(config, split, said)


def remote_contents(server: S3Server, url: str) -> dict[str, bytes]:
    """The objects of a cache by path, without logs of runs."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    objects = server.objects(bucket, prefix + "/")
    return {path: data for path, data in objects.items() if not path.startswith("runs/")}
