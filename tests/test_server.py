"""Clients that misbehave, workers that die, and the log, on a real gunicorn."""

import os
import signal
import socket
from contextlib import ExitStack, suppress

import pytest
from load import Load
from servers import wait_until

BUNDLE = "/api/docs/swagger-ui-bundle.js"


@pytest.fixture(autouse=True)
def log(server):
    """A function that returns the log of the test, which must have no traceback."""
    start = len(server.log())
    yield lambda: server.log()[start:]
    assert "Traceback" not in server.log()[start:]
    assert server.get("/health_check").status == 200


def test_killed_worker_is_replaced(server, seeded):
    """Two workers serve eight clients, and only requests of a killed one are lost."""
    with Load(server, seeded.paths, seeded.auth_header, clients=8) as load:
        load.wait_for(50)
        victim = server.workers()[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in server.workers())
        wait_until(lambda: len(server.workers()) == 2)
        load.wait_for(50)
    assert load.statuses() == {200}
    assert len(load.disconnected) <= 8


def status_of(response):
    """Return the status of a raw response, or None if it is empty."""
    return int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/1.") else None


GARBAGE = [
    b"\r\n\r\n",
    b"\x00\xff\xfe" * 1000,
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: x\r\n" * 10_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,
]


def test_garbage_is_rejected(server):
    """The client gets an error or no response, and the next request is served."""
    for request in GARBAGE:
        with suppress(ConnectionResetError):
            status = status_of(server.send(request))
            assert status is None or status in (400, 414, 431, 501, 505), request[:50]
        assert server.get("/nothing").status == 404


ODD_REQUESTS = [
    (b"/api/jobs/%zz%00%ff", b"", 400),
    (b"/api/jobs?%00=%ff&=&&;", b"", 400),
    (b"/api/jobs?" + b"a=1&" * 900, b"", 400),
    (b"http://other.example/api/jobs", b"", 200),
    (b"/api/../api/jobs", b"", 404),
    (b"/api/jobs", b"If-None-Match: \xff\"'\r\n", 200),
    (b"/api/jobs", b"X-Forwarded-Proto: https\r\nX-Forwarded-Host: e.x\r\n", 200),
    (b"/api/jobs", b"SCRIPT_NAME: /evil\r\nScript-Name: /evil\r\n", 200),
    (b"/api/jobs", b"Host: evil.com/x\r\n", 400),
    (b"/api/jobs", b"Host: \xff\r\n", 400),
]


def test_odd_request_gets_a_json_response(server, seeded):
    """Every response has the right status and no link to another host."""
    token = seeded.auth_header["Authorization"].encode()
    for target, headers, expected in ODD_REQUESTS:
        if not headers.startswith(b"Host:"):
            headers += b"Host: jobs.example\r\n"
        response = server.send(
            b"GET " + target + b" HTTP/1.1\r\nConnection: close\r\n"
            b"Authorization: " + token + b"\r\n" + headers + b"\r\nbody!"
        )
        assert (status_of(response), target) == (expected, target), response
        assert b"application/json" in response
        links = response.partition(b"\r\n\r\n")[2]
        assert b"https:" not in links and b'"http://evil' not in links


PARTIAL_HEADERS = b"GET /api/jobs HTTP/1.1\r\nX: "
# These clients send nothing, incomplete headers, too long headers, no body, or do not
# close the connection.
SLOW_CLIENTS = [
    b"",
    PARTIAL_HEADERS,
    PARTIAL_HEADERS + b"x" * 70_000,
    b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
]


def test_slow_clients_block_no_others_and_are_disconnected(server, seeded):
    """If the server did not close these connections, recv() would time out."""
    with ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(100)]
        for client, request in zip(clients, SLOW_CLIENTS * 20, strict=True):
            client.sendall(request)
        trickling = stack.enter_context(server.connect())
        for byte in PARTIAL_HEADERS:
            trickling.sendall(bytes([byte]))
            assert server.get("/api/jobs", seeded.auth_header).status == 200
        for client in clients:
            with suppress(ConnectionResetError):
                while client.recv(65536):
                    pass


def test_clients_that_do_not_read_block_no_others(server, seeded):
    """Six bundles of 1.4 MB do not fit into the buffers of a connection."""
    request = f"GET {BUNDLE} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
    with ExitStack() as stack:
        for _ in range(20):
            reader = stack.enter_context(server.connect())
            reader.sendall(request * 6)
            # The first byte shows that the response has begun.
            assert reader.recv(1) == b"H"
        for _ in range(20):
            assert server.get("/api/jobs", seeded.auth_header).status == 200


def test_connection_serves_several_requests(server, seeded):
    """The requests of a connection may be split into packets anywhere."""
    token = seeded.auth_header["Authorization"].encode()
    first = b"GET /api/jobs HTTP/1.1\r\nHost: h\r\nAuthorization: " + token
    last = first + b"\r\nConnection: close\r\n\r\n"
    requests = first + b"\r\n\r\n" + first + b"\r\n\r\n" + last
    for size in (1, 7, len(first), len(requests)):
        with server.connect() as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(0, len(requests), size):
                connection.sendall(requests[start : start + size])
            responses = b"".join(iter(lambda c=connection: c.recv(65536), b""))
        assert responses.count(b"HTTP/1.1 200 OK") == 3
        assert responses.count(b"Connection: close") == 1


def test_log_has_a_line_for_each_request_and_no_token(server, seeded, log):
    """Query strings are left out, and a path cannot begin a line of the log."""
    token = seeded.token
    requests = [
        (f"/api/jobs/{seeded.job_ids[0]}", {}, f"/api/jobs/{seeded.job_ids[0]}", 200),
        (f"/api/jobs?token={token}", {}, "/api/jobs", 400),
        (f"/api/jobs/y?%61ccess_token={token}", {}, "/api/jobs/y", 400),
        ("/api/jobs/z", {"Authorization": f"Basic {token}"}, "/api/jobs/z", 401),
        ("/x", {"User-Agent": token, "Referer": f"http://h/?{token}"}, "/x", 404),
        ("/a%0ab%85%c3%a9", {}, r"/a\nb\x85\xc3\xa9", 404),
    ]
    for path, headers, _, status in requests:
        assert server.get(path, seeded.auth_header | headers).status == status
    # gunicorn logs a request after its response, and may log it after the next one.
    lines = [f"\"GET '{path}' HTTP/1.1\" {code} " for _, _, path, code in requests]
    wait_until(lambda: all(line in log() for line in lines))
    assert [log().count(line) for line in lines] == [1] * len(lines)
    assert token not in log() and "ERROR" not in log()
