"""An HTTP proxy in front of a store that loses, cuts and refuses as a seeded schedule says, and counts requests.

A newcomer's trap: what befalls a request depends on the seed, the method, the object and how often it was asked for,
never on the order in which processes come, so that a schedule is the same however many of them there are.
"""

import contextlib
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

FAULTS = {
    "error": "500 InternalError, nothing done",
    "slow_down": "503 SlowDown, nothing done",
    "silence": "no answer until the client gives up, nothing done",
    "cut_request": "connection reset in the middle of the request, nothing done",
    "lost": "done, and the connection reset instead of an answer",
    "cut": "done, and the connection reset in the middle of the answer's body",
    "short": "done, and the answer's body ends early",
}
_SILENCE_S = 20.0
_ANSWERS = {"error": (500, "InternalError"), "slow_down": (503, "SlowDown")}


class FaultProxy:
    """Listens on loopback in threads of this process; a context manager.

    Attributes:
        endpoint: its URL.
        rates: probability of each of `FAULTS`, by name; may be changed at any time.
        script: what befalls the next requests of a kind, before anything is drawn; '' for nothing.
        puts_until_outage: once so many PUTs were asked for, every request is refused.
        counts: requests by kind: GET, HEAD, PUT, DELETE, LIST; `sent` and `received`: bytes of bodies.
        asked: (kind, path) of every request, in order.
        injected: faults by name.
    """

    def __init__(self, port: int, seed: int = 0, rates: Mapping[str, float] | None = None) -> None:
        self.rates = dict(rates or {})
        self.script: dict[str, list[str]] = {}
        self.puts_until_outage = float("inf")
        self.counts: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.asked: list[tuple[str, str]] = []
        self._seed = seed
        self._times: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy, self._server.store_port = self, port
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def forget(self) -> None:
        """Count from zero."""
        with self._lock:
            self.counts.clear()
            self.injected.clear()
            self.asked.clear()

    def fate(self, method: str, target: str) -> str:
        """Count a request, and say what befalls it: one of `FAULTS`, or ''."""
        kind = "LIST" if method == "GET" and "list-type" in parse_qs(urlsplit(target).query) else method
        path = urlsplit(target).path
        with self._lock:
            self.counts[kind] += 1
            self.asked.append((kind, path))
            self._times[kind, path] += 1
            if self.script.get(kind):
                return self.script[kind].pop(0)
            if self.counts["PUT"] > self.puts_until_outage:
                self.injected["slow_down"] += 1
                return "slow_down"
            drawn = random.Random(f"{self._seed} {kind} {path} {self._times[kind, path]}").random()
            for name, rate in self.rates.items():
                drawn -= rate
                if drawn < 0:
                    self.injected[name] += 1
                    return name
        return ""

    def add(self, name: str, num_bytes: int) -> None:
        """Count bytes."""
        with self._lock:
            self.counts[name] += num_bytes


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: FaultProxy
    store_port: int

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        fate = self.server.proxy.fate(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if fate == "cut_request":
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        self.server.proxy.add("sent", length)
        if fate == "silence":
            self._stay_silent()
            return
        if fate in _ANSWERS:
            self._refuse(*_ANSWERS[fate])
            return
        status, headers, answer = self._ask_store(body)
        if fate == "lost" or (fate == "cut" and not answer):
            self._reset()
            return
        self._answer(fate, status, headers, answer)

    def _answer(self, fate: str, status: int, headers: list[tuple[str, str]], answer: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        declared = {name.lower(): value for name, value in headers}.get("content-length")
        self.send_header("Content-Length", declared if self.command == "HEAD" and declared else str(len(answer)))
        self.end_headers()
        if fate in ("cut", "short") and answer:
            self.wfile.write(answer[: len(answer) // 2])
            self.close_connection = True
            if fate == "cut":
                self._reset()
            return
        self.wfile.write(answer)
        self.server.proxy.add("received", len(answer))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

    def _ask_store(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        store = http.client.HTTPConnection("127.0.0.1", self.server.store_port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        with contextlib.closing(store):
            store.request(self.command, self.path, body, headers | {"Connection": "close"})
            response = store.getresponse()
            return response.status, response.getheaders(), response.read()

    def _refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected {code}</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _stay_silent(self) -> None:
        self.close_connection = True
        self.connection.settimeout(_SILENCE_S)
        with contextlib.suppress(OSError):
            self.connection.recv(1)

    def _reset(self) -> None:
        """Close so that the client sees a reset connection, not an end."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
