"""The live page's server: what it answers to raw requests, and what it refuses."""

import json
import socket
import threading

import pytest

from worldloom.view.server import LiveServer

PAGE = "<p>page</p>"


def answer(request, body):
    if body == "wrong":
        raise ValueError("body is wrong; expected another")
    if body == "broken":
        raise RuntimeError("the\nmodel")
    return {"request": request, "body": body}


@pytest.fixture(scope="module")
def server():
    with LiveServer(PAGE, answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def exchange(server, head, body=b"", address="127.0.0.1"):
    """Send the lines of a request as they are; return (status, headers, body)."""
    with socket.create_connection((address, server.server_port), timeout=20) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
        connection.shutdown(socket.SHUT_WR)
        data = b""
        while part := connection.recv(2**16):
            data += part
    lines, _, rest = data.partition(b"\r\n\r\n")
    first, *fields = lines.decode().split("\r\n")
    return int(first.split()[1]), dict(field.split(": ", 1) for field in fields), rest.decode()


def get(server, path="/", host="127.0.0.1:PORT", *more):
    port = str(server.server_port)
    fields = [] if host is None else [f"Host: {host.replace('PORT', port)}"]
    return exchange(server, [f"GET {path} HTTP/1.1", *fields, *more])


def post(server, path="/step", body=b"{}", without=(), **changes):
    own = f"127.0.0.1:{server.server_port}"
    fields = {"Host": own, "Origin": f"http://{own}", "Content-Type": "application/json"}
    fields |= {"Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): str(value) for name, value in changes.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if name not in without]
    lines = [line.replace("PORT", str(server.server_port)) for line in lines]
    return exchange(server, [f"POST {path} HTTP/1.1", *lines], body)


@pytest.mark.parametrize("host", ["127.0.0.1:PORT", "localhost:PORT", "LOCALHOST:PORT"])
def test_the_page_is_served_under_its_own_names(server, host):
    status, headers, body = get(server, "/", host)
    assert (status, body) == (200, PAGE)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers and headers["Server"].strip() == "worldloom"


@pytest.mark.parametrize(
    "host",
    [
        *(None, "", "evil.example", "evil.example:PORT", "127.0.0.1", "localhost", "localhost:1"),
        *("127.0.0.1.evil.example:PORT", "127.0.0.2:PORT", "[::1]:PORT", "0.0.0.0:PORT"),
        *("evil.example@127.0.0.1:PORT", "127.0.0.1:PORT, evil.example", "127.0.0.1:PORT."),
    ],
)
def test_other_hosts_get_nothing(server, host):
    status, _, body = get(server, "/", host)
    assert status == 403 and body == "403 Forbidden\n"


def test_two_hosts_get_nothing(server):
    own = f"Host: 127.0.0.1:{server.server_port}"
    assert get(server, "/", "127.0.0.1:PORT", "Host: evil.example")[0] == 403
    assert get(server, "/", "127.0.0.1:PORT", own)[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        *("/start", "/step", "/index.html", "/?x", "/../etc/passwd", "/..%2f..%2fetc/passwd"),
        *("/config.yaml", "/%2e%2e/config.yaml", "http://127.0.0.1/", "*", "/\\", "/live.js"),
    ],
)
def test_there_is_nothing_but_the_page(server, path):
    status, _, body = get(server, path)
    assert status == 404 and body == "404 Not Found\n"


@pytest.mark.parametrize(
    "method", ["HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"]
)
def test_other_methods_are_refused(server, method):
    head = [f"{method} / HTTP/1.1", f"Host: 127.0.0.1:{server.server_port}"]
    status, headers, body = exchange(server, head)
    assert status == 501 and "Allow" not in headers and PAGE not in body


@pytest.mark.parametrize("origin", ["http://127.0.0.1:PORT", "http://localhost:PORT"])
@pytest.mark.parametrize("request_name", ["start", "step"])
def test_the_page_can_act(server, request_name, origin):
    status, headers, body = post(server, f"/{request_name}", b'{"node": 3}', Origin=origin)
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert json.loads(body) == {"request": request_name, "body": {"node": 3}}


@pytest.mark.parametrize(
    "origin",
    [
        *("null", "", "http://evil.example", "https://127.0.0.1:PORT", "http://127.0.0.1:1"),
        *("http://127.0.0.1", "http://127.0.0.1:PORT/", "http://127.0.0.1:PORT.evil.example"),
    ],
)
def test_other_sites_cannot_act(server, origin):
    assert post(server, Origin=origin)[0] == 403


def test_what_lacks_an_origin_or_has_another_host_cannot_act(server):
    assert post(server, without=["Origin"])[0] == 403
    assert post(server, without=["Host"])[0] == 403
    assert post(server, Host="evil.example:PORT", Origin="http://evil.example:PORT")[0] == 403


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"path": "/other"}, 404),
        ({"path": "/"}, 404),
        ({"path": "/step/"}, 404),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"without": ["Content-Type"]}, 415),
        ({"without": ["Content-Length"]}, 411),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": "1e3"}, 411),
        ({"Content_Length": "00000000000000000000000000000005"}, 411),
        ({"Content_Length": str(2**20 + 1)}, 413),
        ({"Transfer_Encoding": "chunked"}, 411),
        ({"body": b""}, 400),
        ({"body": b"{"}, 400),
        ({"body": b"\xff\xfe"}, 400),
        ({"body": b"[" * 100_000}, 400),
    ],
)
def test_requests_of_another_form_are_refused(server, changes, status):
    found, headers, _ = post(server, **changes)
    assert found == status and headers["Connection"] == "close"


def test_errors_are_one_line_and_the_server_goes_on(server):
    status, _, body = post(server, body=b'"wrong"')
    assert status == 400 and json.loads(body) == {"error": "body is wrong; expected another"}
    status, _, body = post(server, body=b'"broken"')
    assert status == 500 and json.loads(body) == {"error": "RuntimeError: the model"}
    assert get(server)[0] == 200


def test_only_this_machine_can_connect(server):
    assert server.server_address[0] == "127.0.0.1"
    own = socket.gethostbyname(socket.gethostname())
    if own.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError):
        exchange(server, ["GET / HTTP/1.1"], address=own)


def test_a_connection_is_used_again(server):
    own = f"127.0.0.1:{server.server_port}"
    request = f"GET / HTTP/1.1\r\nHost: {own}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        for _ in range(2):
            connection.sendall(request)
            data = b""
            while PAGE.encode() not in data:
                data += connection.recv(2**16)
            assert data.startswith(b"HTTP/1.1 200")
