"""A proxy before a server of the S3 protocol: it counts the bytes that a client reads, and can misbehave."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a port of this machine. `n_bytes` counts what it has sent of bodies.

    `busy` requests are answered by 503, `cut` bodies end in the middle, and `stalled` ones stop there and stay open.
    Only requests for the contents of a file (`GET /bucket/name`) are treated so.
    """

    daemon_threads = True

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.reset()

    def reset(self, *, busy: int = 0, cut: int = 0, stalled: int = 0, after: int = 0) -> None:
        """Count anew, and misbehave so many times, from the file request number `after` on."""
        with self.lock:
            self.n_bytes = 0
            self.after = after
            self.faults = {"busy": busy, "cut": cut, "stalled": stalled}

    def fault(self) -> str | None:
        """Return what is wrong with the next answer."""
        with self.lock:
            if self.after:
                self.after -= 1
                return None
            for name, left in self.faults.items():
                if left:
                    self.faults[name] -= 1
                    return name
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        is_file = self.command == "GET" and self.path.partition("?")[0].count("/") >= 2
        fault = self.server.fault() if is_file else None
        if fault == "busy":
            self.send_error(503)
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            behind.putheader(name, value)
        behind.endheaders()
        answer = behind.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        default = "0" if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", answer.getheader("content-length") or default)
        self.end_headers()
        sent = body[: len(body) // 2] if fault else body
        self.wfile.write(sent)
        with self.server.lock:
            self.server.n_bytes += len(sent)
        if fault == "stalled":
            self.server.over.wait()
        if fault:
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def proxy_before(port: int) -> Iterator[Proxy]:
    """Run a proxy before a port."""
    proxy = Proxy(port)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.over.set()
        proxy.shutdown()
        proxy.server_close()
