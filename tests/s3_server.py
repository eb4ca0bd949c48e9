"""A real S3 protocol server (moto) as a process of its own on loopback, and what tests ask of it directly.

A newcomer's trap: it keeps everything in memory and knows no credentials until `require_credentials`, so tests tell
themselves apart by their buckets.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Recognisable, so that a test can look for them in everything that a run leaves behind.
ACCESS_KEY = "AKIAVKDCACHETESTKEY0"
SECRET = "vkdcache/Secret+that/must+never/be/written01"
NOBODY = {
    "AWS_ACCESS_KEY_ID": "AKIANOBODYNOBODYNOBO",
    "AWS_SECRET_ACCESS_KEY": "wrong/Secret+that/must+not/be/written02",
}
_START_S = 60.0


class S3Server:
    """A running server.

    Attributes:
        endpoint: its URL.
        port: where it listens on loopback.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.endpoint = f"http://127.0.0.1:{port}"
        self._client: Any = None

    @property
    def client(self) -> Any:
        """A boto3 client: what others than ours see in the store."""
        if self._client is None:
            import boto3

            credentials = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET}
            self._client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **credentials)
        return self._client

    def make_bucket(self, name: str) -> str:
        """The URL of a new bucket."""
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Content of every object below `prefix`, by its path from there."""
        found = {}
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                body = self.client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
                found[entry["Key"].removeprefix(prefix).lstrip("/")] = body
        return found

    def upload(self, folder: Path, bucket: str, prefix: str = "") -> None:
        """Put every file below `folder`."""
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            key = "/".join(part for part in (prefix, path.relative_to(folder).as_posix()) if part)
            self.client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    @contextlib.contextmanager
    def require_credentials(self, bucket: str) -> Iterator[dict[str, str]]:
        """Refuse whoever has no right; yields the environment of a user who may only read `bucket`."""
        import boto3

        keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET}
        iam = boto3.client("iam", endpoint_url=self.endpoint, region_name="us-east-1", **keys)
        iam.create_user(UserName=bucket)
        made = iam.create_access_key(UserName=bucket)["AccessKey"]
        statement = {
            "Effect": "Allow",
            "Action": ["s3:GetObject", "s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
        }
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=bucket, PolicyName="read", PolicyDocument=policy)
        self._allow_without_credentials("0")
        try:
            yield {"AWS_ACCESS_KEY_ID": made["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"]}
        finally:
            self._allow_without_credentials("inf")

    def _allow_without_credentials(self, num_requests: str) -> None:
        url = f"{self.endpoint}/moto-api/reset-auth"
        request = urllib.request.Request(url, num_requests.encode(), {"Content-Type": "text/plain"})
        urllib.request.urlopen(request, timeout=30).close()


def environment(endpoint: str) -> dict[str, str]:
    """What a user sets to reach a store, and nothing of this machine's own configuration."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    }


@contextlib.contextmanager
def running_server(log: Path) -> Iterator[S3Server]:
    """Start a server; what it says goes to the file `log`."""
    server = S3Server(free_port())
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(server.port)]
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | environment(server.endpoint))
    try:
        _wait_for(server, process, log)
        yield server
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(server: S3Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.endpoint}/moto-api/", timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text(errors='replace')}")
