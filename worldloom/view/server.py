"""The server of the live page: this machine only, one page, and its two requests.

A page of another site can send requests to 127.0.0.1 as well. The server therefore answers only
requests whose Host header is its own address (a name of another site that points to 127.0.0.1 is
none) and, for requests that act, whose Origin header is the page's. It opens no files.
"""

import json
import logging
import re
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
LONGEST = 2**20  # bytes of a request
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

# Answers a request, by its name and its body; raises ValueError for one that does not fit.
Answer = Callable[[str, Any], dict[str, Any]]


class LiveServer(ThreadingHTTPServer):
    """Serves a page at "/", and `answer` for POST requests to "/start" and "/step".

    page: HTML. port: 0 for a free one.
    address: URL of the page.

    Raises:
        OSError: the port is in use.
    """

    daemon_threads = True
    requests = ("start", "step")

    def __init__(self, page: str, answer: Answer, port: int = 0) -> None:
        super().__init__((ADDRESS, port), _Handler)
        self.page, self._answer = page.encode(), answer
        self._lock = threading.Lock()  # the model answers one request at a time
        self.hosts = tuple(f"{host}:{self.server_port}" for host in (ADDRESS, "localhost"))
        self.address = f"http://{self.hosts[0]}/"

    def answer(self, request: str, body: Any) -> tuple[HTTPStatus, dict[str, Any]]:
        """Return the status and the answer to a request."""
        try:
            with self._lock:
                return HTTPStatus.OK, self._answer(request, body)
        except ValueError as error:
            return HTTPStatus.BAD_REQUEST, {"error": str(error)}
        except Exception as error:  # of the model; the page goes on
            log.warning("the model failed", exc_info=True)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return HTTPStatus.INTERNAL_SERVER_ERROR, {"error": text}


class _Handler(BaseHTTPRequestHandler):
    """Checks a request before anything else, and answers it."""

    server: LiveServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "worldloom", ""
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s\n"
    timeout = 60  # seconds until an idle connection is closed
    # An answer is one packet: the second of two would wait for the first one's acknowledgement.
    disable_nagle_algorithm, wbufsize = True, -1

    def do_GET(self) -> None:
        """Return the page."""
        if not self._has_own_host():
            self._refuse(HTTPStatus.FORBIDDEN)
        elif self.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")

    def do_POST(self) -> None:
        """Answer a request of the page."""
        origins = [f"http://{host}" for host in self.server.hosts]
        kind = (self.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
        length = self.headers.get_all("Content-Length", [])
        sized = len(length) == 1 and re.fullmatch("[0-9]{1,9}", length[0].strip()) is not None
        if not self._has_own_host() or self.headers.get_all("Origin", []) not in (
            [origin] for origin in origins
        ):
            self._refuse(HTTPStatus.FORBIDDEN)
        elif self.path not in [f"/{name}" for name in self.server.requests]:
            self._refuse(HTTPStatus.NOT_FOUND)
        elif kind != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif not sized or "Transfer-Encoding" in self.headers:
            self._refuse(HTTPStatus.LENGTH_REQUIRED)
        elif int(length[0]) > LONGEST:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            self._answer(self.rfile.read(int(length[0])))

    def _answer(self, data: bytes) -> None:
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        status, answer = self.server.answer(self.path[1:], body)
        text = json.dumps(answer, allow_nan=False, separators=(",", ":"))
        self._send(status, text.encode(), "application/json")

    def _has_own_host(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        return len(hosts) == 1 and hosts[0].strip().lower() in self.server.hosts

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer with a status alone, and close the connection: its rest is not read."""
        self.close_connection = True
        self._send(status, f"{status.value} {status.phrase}\n".encode(), self.error_content_type)

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {**HEADERS, "Content-Type": kind, "Content-Length": str(len(data))}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal shows the address of the page."""
