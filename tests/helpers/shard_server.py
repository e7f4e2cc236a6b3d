"""A web server of shards on this machine, with ranges and ETags as object stores have them, that fails as it is told."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Request(NamedTuple):
    """A request that came."""

    moment: float
    method: str
    name: str
    range: str | None


class Server(BaseHTTPRequestHandler):
    """Serves files by name; each entry of `faults` spoils one request.

    A number is a status; "silent" never answers, "refused" closes the connection, "half" stops in the middle, "drip" sends a
    byte at a time, and "short" half of the bytes as if that were all. "whole" is the complete file, whatever was asked for,
    "page" a page of the server's own, "elsewhere" the bytes before, "other state" those of another file, "long" more than it
    states, and "nonsense" is no HTTP.
    """

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    tags: dict[str, str]
    """ETag of each file; by default its name."""
    faults: list[str | int]
    seen: list[Request]
    over: threading.Event
    retry_after: str | None
    honours_tags: bool

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name, wanted = self.path.strip("/"), self.headers.get("Range")
        self.seen.append(Request(time.monotonic(), self.command, name, wanted))
        fault = self.faults.pop(0) if self.faults else 200
        if fault == "silent":
            self.over.wait(20)
        if fault in ("silent", "refused"):
            self.close_connection = True
            return
        if fault == "nonsense":
            self.wfile.write(b"<html>\r\n\r\n")
            self.close_connection = True
            return
        content, tag = self.files[name], f'"{self.tags.get(name, name)}"'
        first, last = 0, len(content) - 1
        if wanted:
            low, high = wanted.removeprefix("bytes=").split("-")
            first, last = int(low), min(int(high), last)
        body = content[first : last + 1]
        status = fault if isinstance(fault, int) and fault >= 400 else 206 if wanted else 200
        if self.honours_tags and self.headers.get("If-Match", tag) != tag:
            status = 412
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "elsewhere":
            first, last = first - 512, last - 512
            body = content[first : last + 1]
        if fault == "other state":
            body, tag = bytes(len(body)), '"other"'
        if fault in ("whole", "page"):
            body, wanted, status = content if fault == "whole" else b"<html>back soon</html>", None, 200
        self.send_response(status)
        if status >= 400 and self.retry_after is not None:
            self.send_header("Retry-After", self.retry_after)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body) - 100 * (fault == "long")))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self._send(body, fault)

    def _send(self, body: bytes, fault: str | int) -> None:
        if fault == "half":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.over.wait(20)
        elif fault == "drip":
            for place in range(len(body)):
                if self.over.wait(0.1):
                    return
                self.wfile.write(body[place : place + 1])
                self.wfile.flush()
        else:
            self.wfile.write(body)


@contextmanager
def serving(content: Mapping[str, bytes]) -> Iterator[tuple[str, type[Server]]]:
    """Context with the URL of a server of these files, and its handler."""

    class Own(Server):
        files, tags, faults, seen, over = dict(content), {}, [], [], threading.Event()
        retry_after, honours_tags = None, True

    with ThreadingHTTPServer(("127.0.0.1", 0), Own) as httpd:
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}", Own
        finally:
            Own.over.set()
            httpd.shutdown()
