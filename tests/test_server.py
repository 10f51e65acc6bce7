"""Test a real gunicorn: clients that misbehave, workers that die, the access log."""

import os
import signal
import socket
import threading
import time
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection, HTTPException
from typing import NamedTuple

from conftest import TIMEOUT, sqlite_only, wait_until, with_shared_server

BUNDLE = "/api/docs/swagger-ui-bundle.js"


class TimedResponse(NamedTuple):
    """A response, the time of its request, and how many seconds it took."""

    status: int
    body: bytes
    began: float
    seconds: float


class Load:
    """Clients that send requests until the block ends, and the responses they got.

    Each client pauses for some seconds between two requests. The shorter the pause, the
    more requests are served at any moment, and the slower everything else becomes.
    """

    def __init__(self, server, paths, headers, clients=4, pause=0.05):
        self.server, self.paths, self.headers = server, paths, headers
        self.pause = pause
        self.responses, self.disconnected = [], []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.run) for _ in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def run(self):
        while not self.stopped.is_set():
            for path in self.paths:
                began = time.monotonic()
                try:
                    got = self.server.get(path, self.headers)
                except (OSError, HTTPException) as error:
                    self.disconnected.append(error)
                else:
                    seconds = time.monotonic() - began
                    response = TimedResponse(got.status, got.body, began, seconds)
                    self.responses.append(response)
                self.stopped.wait(self.pause)

    def wait_for(self, count):
        """Return as soon as that many more responses have arrived."""
        count += len(self.responses)
        wait_until(lambda: len(self.responses) >= count)


def assert_that_two_workers_serve(server, paths, headers):
    """Check that several clients get their responses and none is disconnected."""
    with Load(server, paths, headers, clients=8) as load:
        load.wait_for(100)
    assert {response.status for response in load.responses} == {200}
    assert load.disconnected == []
    wait_until(lambda: len(server.workers()) == 2)


@with_shared_server("--workers 2")
def test_workers_connect_after_they_were_forked(server, seed, paths):
    """Two workers serve eight clients at once from a database file."""
    assert_that_two_workers_serve(server, paths, seed.auth_header)


@with_shared_server("--workers 2")
def test_killed_worker_is_replaced(server, seed, paths):
    """Only the requests of the killed worker have no response."""
    with Load(server, paths, seed.auth_header) as load:
        for _ in range(2):
            load.wait_for(50)
            victim = server.workers()[0]
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda victim=victim: victim not in server.workers())
            wait_until(lambda: len(server.workers()) == 2)
        load.wait_for(50)
    assert {response.status for response in load.responses} == {200}
    assert len(load.disconnected) <= 2 * 4


def status_of(response):
    """Return the status of a raw response, or None if it is empty."""
    return int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/1.") else None


GARBAGE = [
    b"",
    b"\r\n\r\n",
    b"\x00\xff\xfe" * 1000,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: x\r\n" * 10_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nX\x00: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@with_shared_server()
def test_garbage_is_rejected(server):
    """The client gets an error or no response, and the next request is served."""
    for request in GARBAGE:
        with suppress(ConnectionResetError):
            status = status_of(server.send(request))
            assert status is None or status in (400, 414, 431, 501, 505), request[:50]
        assert server.get("/nothing").status == 404
    assert "Traceback" not in server.log()


ODD_REQUESTS = [
    (b"/api/jobs/%", b"", 400),
    (b"/api/jobs/%zz%00%ff", b"", 400),
    (b"/api/jobs/%2f", b"", 404),
    (b"/api/jobs?page=%zz", b"", 400),
    (b"/api/jobs?%00=%ff&=&&;", b"", 400),
    (b"/api/jobs?" + b"a=1&" * 900, b"", 400),
    (b"/api/jobs#x", b"", 200),
    (b"http://other.example/api/jobs", b"", 200),
    (b"//api/jobs", b"", 404),
    (b"/api/../api/jobs", b"", 404),
    (b"/api/jobs", b"Authorization: Bearer x\r\n", 401),
    (b"/api/jobs", b"If-None-Match: \xff\"'\r\n", 200),
    (b"/api/jobs", b"If-Modified-Since: x\r\nRange: bytes=0-1\r\n", 200),
    (b"/api/jobs", b"X-Forwarded-Proto: https\r\nX-Forwarded-Host: e.x\r\n", 200),
    (b"/api/jobs", b"SCRIPT_NAME: /evil\r\nScript-Name: /evil\r\n", 200),
    (b"/api/jobs", b"Accept: text/html\r\nContent-Type: \xff\r\n", 200),
    (b"/api/jobs", b"Content-Length: 5\r\n", 200),
    (b"/api/jobs", b"Host: a b<>\r\n", 400),
    (b"/api/jobs", b"Host: evil.com/x\r\n", 400),
    (b"/api/jobs", b"Host:\r\n", 400),
    (b"/api/jobs", b"Host: \xff\r\n", 400),
]


@with_shared_server()
def test_odd_request_gets_a_json_response(server, seed):
    """Every response has the right status and no link to another host."""
    token = seed.auth_header["Authorization"].encode()
    for target, headers, expected in ODD_REQUESTS:
        if b"Host:" not in headers.partition(b"-Host")[0]:
            headers += b"Host: jobs.example\r\n"
        response = server.send(
            b"GET " + target + b" HTTP/1.1\r\nConnection: close\r\n"
            b"Authorization: " + token + b"\r\n" + headers + b"\r\nbody!"
        )
        assert (status_of(response), target) == (expected, target), response
        assert b"application/json" in response
        assert b"evil" not in response and b"https:" not in response
    assert "Traceback" not in server.log()


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


@with_shared_server()
def test_slow_clients_block_no_others(server, seed):
    """Other clients get their responses while slow clients still send."""
    with ExitStack() as stack:
        for request in SLOW_CLIENTS * 20:
            stack.enter_context(server.connect()).sendall(request)
        slow = [stack.enter_context(server.connect()) for _ in range(20)]
        for byte in PARTIAL_HEADERS + b"x" * 20:
            for connection in slow:
                connection.sendall(bytes([byte]))
            assert server.get("/api/jobs", seed.auth_header).status == 200
    assert "Traceback" not in server.log()


@sqlite_only
def test_slow_clients_are_disconnected(start_server):
    """If the server did not close these connections, recv() would time out."""
    server = start_server("--keep-alive", "1")
    with ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in SLOW_CLIENTS]
        for client, request in zip(clients, SLOW_CLIENTS, strict=True):
            client.sendall(request)
        for client in clients:
            with suppress(ConnectionResetError):
                while client.recv(65536):
                    pass
    assert "Traceback" not in server.log()


@with_shared_server()
def test_clients_that_do_not_read_block_no_others(
    server, import_state, new_state, auth_header
):
    """A response of 10 MB does not fit into the buffers of a connection."""
    state = new_state()
    job = state["workflows"][0]["jobs"][0]
    job["body"] = "x" * 10_000_000
    import_state(state, "you@example.org")
    headers = auth_header("you@example.org")
    request = (
        f"GET /api/jobs/{job['id']} HTTP/1.1\r\nHost: h\r\n"
        f"Authorization: {headers['Authorization']}\r\n\r\n"
    )
    with ExitStack() as stack:
        for _ in range(20):
            reader = stack.enter_context(server.connect())
            reader.sendall(request.encode())
            # The first byte shows that the response has begun.
            assert reader.recv(1) == b"H"
        for _ in range(20):
            assert server.get("/api/jobs", headers).status == 200


@with_shared_server()
def test_slow_reader_gets_the_whole_response(server):
    """A client that reads 20 kB a second opens its receive window after 6 seconds.

    A time limit of 5 seconds for sending disconnected this client.
    """
    expected = server.get(BUNDLE).body
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 131_072)
        reader.settimeout(TIMEOUT)
        reader.connect(("127.0.0.1", server.port))
        request = f"GET {BUNDLE} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
        reader.sendall(request.encode())
        parts = []
        for _ in range(40):
            parts.append(reader.recv(4096))
            time.sleep(0.2)
        parts += iter(lambda: reader.recv(65536), b"")
    assert b"".join(parts).partition(b"\r\n\r\n")[2] == expected


@with_shared_server()
def test_unread_request_body_does_not_prevent_the_response(server):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    with closing(connection):
        connection.request("POST", "/api/jobs", body=b"x" * 5_000_000)
        assert connection.getresponse().status == 405


@with_shared_server()
def test_connection_serves_several_requests(server, seed):
    """The requests of a connection may be split into packets anywhere."""
    token = seed.auth_header["Authorization"].encode()
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


@with_shared_server()
def test_access_log_has_a_line_for_each_request(server, seed):
    """A path is logged without query string, and its control characters are escaped."""
    job = seed.job_ids[0]
    requests = [
        (f"/api/jobs/{job}", seed.auth_header, f"/api/jobs/{job}", 200),
        ("/api/jobs/x?page=1", seed.auth_header, "/api/jobs/x", 400),
        ("/api/jobs/y", {"Authorization": "Bearer s3cret"}, "/api/jobs/y", 401),
        ("/a%0ab%85%c3%a9", {}, r"/a\nb\x85\xc3\xa9", 404),
    ]
    for path, headers, _, status in requests:
        assert server.get(path, headers).status == status
    # gunicorn logs a request after its response, and may log it after the next one.
    lines = [f"\"GET '{path}' HTTP/1.1\" {code} " for _, _, path, code in requests]
    wait_until(lambda: all(line in server.log() for line in lines))
    log = server.log()
    assert [log.count(line) for line in lines] == [1] * len(lines)
    assert "s3cret" not in log and "page=1" not in log
    assert "ERROR" not in log and "Traceback" not in log
