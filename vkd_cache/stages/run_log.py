"""The log that a job leaves beside the cache it writes: what it was asked for, and at its end what it did."""

import dataclasses
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from vkd_cache.cache.writer import CacheWriter
from vkd_cache.runtime import JobSplit, hardware, library_versions


class RunLog:
    """`runs/<command>-<time>-<process>-<i>of<n>.json`: there from the start of the job, with a summary from its end on.

    The process is in its name because jobs that are started together begin within a microsecond.
    """

    def __init__(self, writer: CacheWriter, command: str, split: JobSplit, asked: Mapping[str, Any]) -> None:
        """`asked`: what the user asked for, JSON values.

        Raises:
            CacheError: the cache cannot be written.
        """
        now = datetime.now(UTC)
        self._writer = writer
        self._name = f"{command}-{now:%Y%m%dT%H%M%S%f}-{os.getpid()}-{split.index}of{split.count}.json"
        self._document = {
            "command": command,
            **asked,
            "worker": dataclasses.asdict(split),
            "fingerprint": writer.manifest.fingerprint(),
            "versions": library_versions(),
            "hardware": hardware(),
            "removed": list(writer.leftovers),
        }
        self._write(None)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Add what the job did, JSON values; errors as at the start."""
        self._write(summary)

    def _write(self, summary: Mapping[str, Any] | None) -> None:
        written = datetime.now(UTC).isoformat(timespec="seconds")
        document = {**self._document, "written": written, "summary": summary}
        self._writer.write_run_log(self._name, json.dumps(document, indent=2).encode())
