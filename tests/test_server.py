"""A real gunicorn: clients that misbehave, signals, logs."""

import json
import os
import signal
import threading
import time
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection, HTTPException

import pytest


class Load:
    """Clients that ask in turn until they are told to stop, and what they got."""

    def __init__(self, server, paths, headers, clients=4):
        self.server, self.paths, self.headers = server, paths, headers
        self.answers, self.cut = [], []
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
                try:
                    response = self.server.get(path, self.headers)
                    self.answers.append((response.status, response.body))
                except (OSError, HTTPException) as error:
                    self.cut.append(error)

    def wait_for(self, count):
        """Return when so many more answers have come."""
        count += len(self.answers)
        self.server.wait_until(lambda: len(self.answers) >= count)


def test_workers_connect_after_they_were_forked(start_server, seed, paths):
    """And several of them serve at once, with keep-alive or without."""
    server = start_server("--workers", "2")
    with Load(server, paths, seed.bearer, clients=8) as load:
        load.wait_for(400)
    assert {status for status, _ in load.answers} == {200}
    assert load.cut == []
    assert len(server.workers()) == 2


def test_killed_worker_is_replaced(start_server, seed, paths):
    """Its own requests are cut, all others are answered."""
    server = start_server("--workers", "2")
    with Load(server, paths, seed.bearer) as load:
        for _ in range(3):
            load.wait_for(50)
            victim = server.workers()[0]
            os.kill(victim, signal.SIGKILL)
            server.wait_until(
                lambda victim=victim: (
                    victim not in server.workers() and len(server.workers()) == 2
                )
            )
        load.wait_for(200)
    assert {status for status, _ in load.answers} == {200}
    assert len(load.cut) <= 3 * 4


def test_stopping_cuts_no_answer_off(start_server, seed, paths):
    server = start_server("--workers", "2")
    with Load(server, paths, seed.bearer) as load:
        load.wait_for(100)
        server.stop()
    assert {status for status, _ in load.answers} == {200}
    for _, body in load.answers:
        assert json.loads(body)["data"]
    # Those that came too late were refused or closed without one byte of an answer.
    assert {type(error).__name__ for error in load.cut} <= {
        "ConnectionRefusedError",
        "ConnectionResetError",
        "RemoteDisconnected",
    }


def head(answer):
    """The status of a raw answer, or none where there was no answer."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else None


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


def test_garbage_is_refused(start_server, tmp_path):
    """By gunicorn, with a 4xx of its own or none, and the next request is answered."""
    server = start_server()
    for request in GARBAGE:
        with suppress(ConnectionResetError):
            status = head(server.send(request))
            assert status is None or status in (400, 414, 431, 501, 505), request[:50]
        assert server.get("/nothing").status == 404
    assert "Traceback" not in server.log()


def test_head_that_is_too_long_is_refused(start_server):
    """Though each of its fields were short enough for gunicorn."""
    fields = (b"X: " + b"x" * 8000 + b"\r\n") * 20
    answer = start_server().send(b"GET / HTTP/1.1\r\nHost: h\r\n" + fields + b"\r\n")
    assert head(answer) == 431


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


def test_odd_request_gets_its_answer(start_server, seed):
    """In JSON, and without a link to elsewhere."""
    server = start_server()
    token = seed.bearer["Authorization"].encode()
    for target, headers, expected in ODD_REQUESTS:
        if b"Host:" not in headers.partition(b"-Host")[0]:
            headers += b"Host: jobs.example\r\n"
        answer = server.send(
            b"GET " + target + b" HTTP/1.1\r\nConnection: close\r\n"
            b"Authorization: " + token + b"\r\n" + headers + b"\r\nbody!"
        )
        assert (head(answer), target) == (expected, target), answer
        assert b"application/json" in answer
        assert b"evil" not in answer and b"https:" not in answer
    assert "Traceback" not in server.log()


def test_slow_clients_do_not_starve_the_others(start_server, seed):
    """Twenty send a header byte by byte, and never come to its end."""
    server = start_server()
    stop = threading.Event()

    def dribble(connection):
        with suppress(OSError):
            for byte in b"GET /api/jobs HTTP/1.1\r\n" + b"X: " + b"x" * 500:
                connection.sendall(bytes([byte]))
                if stop.wait(0.1):
                    return

    with ExitStack() as stack:
        threads = []
        for _ in range(20):
            connection = stack.enter_context(server.connect())
            threads.append(threading.Thread(target=dribble, args=[connection]))
            threads[-1].start()
        time.sleep(1)
        for _ in range(20):
            assert server.get("/api/jobs", seed.bearer).status == 200
        stop.set()
        for thread in threads:
            thread.join()


HALF_HEAD = b"GET /api/jobs HTTP/1.1\r\nX: "
DAWDLERS = {
    "sends nothing": b"",
    "sends half a head": HALF_HEAD,
    "sends half a head that is too long": HALF_HEAD + b"x" * 70_000,
    "sends no body": b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n",
    "does not hang up": b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("request_", DAWDLERS.values(), ids=DAWDLERS.keys())
def test_dawdlers_hold_nobody_up(start_server, seed, request_):
    """Not even more of them than there are threads; each is cut off in the end."""
    server = start_server()
    with ExitStack() as stack:
        dawdlers = [stack.enter_context(server.connect()) for _ in range(20)]
        for dawdler in dawdlers:
            dawdler.sendall(request_)
        begin = time.monotonic()
        for _ in range(20):
            assert server.get("/api/jobs", seed.bearer).status == 200
        assert time.monotonic() - begin < 5
        for dawdler in dawdlers:
            with suppress(ConnectionResetError):
                while dawdler.recv(65536):
                    pass
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_answers_that_nobody_reads_are_given_up(
    start_server, import_state, new_state, bearer
):
    """As many as there are threads, of a size that no buffer takes."""
    state = new_state()
    job = state["workflows"][0]["jobs"][0]
    job["body"] = "x" * 10_000_000
    import_state(state, "you@example.org")
    headers = bearer("you@example.org")
    server = start_server()
    request = (
        f"GET /api/jobs/{job['id']} HTTP/1.1\r\nHost: h\r\n"
        f"Authorization: {headers['Authorization']}\r\n\r\n"
    )
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(server.connect()).sendall(request.encode())
        time.sleep(1)
        assert server.get("/api/jobs", headers).status == 200


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_body_that_nobody_reads_costs_no_answer(start_server):
    server = start_server()
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request("POST", "/api/jobs", body=b"x" * 5_000_000)
        assert connection.getresponse().status == 405


def test_connection_serves_one_request_after_another(start_server, seed):
    """However they are cut into packets."""
    server = start_server()
    token = seed.bearer["Authorization"].encode()
    first = b"GET /api/jobs HTTP/1.1\r\nHost: h\r\nAuthorization: " + token
    last = first + b"\r\nConnection: close\r\n\r\n"
    first += b"\r\n\r\n"
    with server.connect() as connection:
        for piece in (
            first[:9],
            first[9:-1],
            first[-1:] + first + last[:-2],
            last[-2:],
        ):
            connection.sendall(piece)
            time.sleep(0.2)
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.count(b"Connection: close") == 1


def test_access_log_has_a_line_a_request_without_the_token(start_server, seed):
    server = start_server("--access-logfile", "-")
    token = seed.bearer["Authorization"].removeprefix("Bearer ")
    requests = [
        ("/api/jobs?page=1", seed.bearer, 200),
        ("/api/jobs?page=0", seed.bearer, 400),
        ("/api/jobs", {"Authorization": "Bearer s3cret"}, 401),
        ("/nothing", {}, 404),
    ]
    for path, headers, status in requests:
        assert server.get(path, headers).status == status
    server.stop()
    log = server.log()
    # But for those that asked whether the server was up.
    started = log.count('"GET /api/openapi.json')
    assert log.count('"GET ') - started == len(requests)
    for path, _, status in requests:
        assert f'"GET {path} HTTP/1.1" {status}' in log
    assert token not in log and "s3cret" not in log
    assert "ERROR" not in log and "Traceback" not in log
