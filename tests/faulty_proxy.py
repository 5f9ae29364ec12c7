"""An HTTP proxy before an S3 server that answers as object stores do on a bad day: 503, resets, half answers, lies."""

import dataclasses
import http.client
import http.server
import socket
import struct
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit


@dataclasses.dataclass(frozen=True)
class Request:
    """What a fault is chosen by."""

    number: int  # counts from 0
    method: str
    path: str  # with the query
    span: str  # the Range header, or ""
    age: float  # seconds since the rule was set


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to one request.

    status : answered instead of the store's answer, with S3's XML of `code`; 0 for none.
    reset : close the connection with a TCP reset before any answer.
    keep : send this fraction of the body under the store's own length, then close: a truncated answer.
    short : send this fraction of the body under a length (and range) that agrees with it: a lie.
    flip : turn a bit in the middle of the body: a lie.
    pause : wait this many seconds in the middle of the body.
    """

    status: int = 0
    code: str = ""
    reset: bool = False
    keep: float = 1.0
    short: float = 1.0
    flip: bool = False
    pause: float = 0.0


Rule = Callable[[Request], Fault | None]


def error(status: int, code: str) -> Fault:
    """An error as S3 words it."""
    return Fault(status=status, code=code)


class FaultyProxy:
    """A proxy in threads of this process; `rule` decides about each request, `seen` holds all requests so far."""

    def __init__(self, upstream: str, port: int = 0):
        self.upstream = urlsplit(upstream).netloc
        self.seen: list[Request] = []
        self._lock = threading.Lock()
        self.set(lambda request: None)
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_any(self):
                proxy._handle(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):
                pass  # the client went away, as clients of a broken store do

        self._server = Server(("127.0.0.1", port), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def set(self, rule: Rule) -> None:
        """From now on this rule holds; what was seen is forgotten."""
        with self._lock:
            self._rule, self._since, self.seen = rule, time.monotonic(), []

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = _body(handler)
        with self._lock:
            age = time.monotonic() - self._since
            span = handler.headers.get("Range", "")
            request = Request(len(self.seen), handler.command, handler.path, span, age)
            self.seen.append(request)
            fault = self._rule(request) or Fault()
        if fault.reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
            return
        if fault.status:
            _refuse(handler, fault)
            return
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            headers = {
                k: v
                for k, v in handler.headers.items()
                if k.lower() not in ("connection", "transfer-encoding", "expect")
            }
            headers["Content-Length"] = str(len(body))
            connection.request(handler.command, handler.path, body, headers)
            response = connection.getresponse()
            _answer(handler, response, response.read(), fault)
        finally:
            connection.close()


def _body(handler: http.server.BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    pieces = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        pieces.append(handler.rfile.read(size))
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return b"".join(pieces)


def _refuse(handler: http.server.BaseHTTPRequestHandler, fault: Fault) -> None:
    text = (
        f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{fault.code}, says the proxy</Message></Error>"
    )
    body = b"" if handler.command == "HEAD" else text.encode()
    handler.send_response(fault.status)
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _answer(
    handler: http.server.BaseHTTPRequestHandler, response: http.client.HTTPResponse, data: bytes, fault: Fault
) -> None:
    head = handler.command == "HEAD"
    headers = {
        k: v for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding", "server", "date")
    }
    if not head:
        if fault.flip and data:
            at = len(data) // 2
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if fault.short < 1 and data:
            data = data[: int(len(data) * fault.short)]
            if "Content-Range" in headers:
                first = int(headers["Content-Range"].split(" ")[1].split("-")[0])
                total = headers["Content-Range"].rpartition("/")[2]
                headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{total}"
        headers = {k: v for k, v in headers.items() if k.lower() != "content-length"} | {
            "Content-Length": str(len(data))
        }
    handler.send_response(response.status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    if head:
        return
    sent = data[: int(len(data) * fault.keep)]
    half = len(sent) // 2
    handler.wfile.write(sent[:half])
    if fault.pause:
        handler.wfile.flush()
        time.sleep(fault.pause)
    handler.wfile.write(sent[half:])
    if len(sent) < len(data):
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
