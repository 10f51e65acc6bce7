"""A database that goes, comes back, or changes under its readers."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from uuid import uuid4

import psycopg
import pytest
from conftest import ROOT
from sqlalchemy import make_url
from test_server import Load


class Forwarder:
    """A TCP forwarder to a server, which can be cut and mended."""

    def __init__(self, host, port):
        self.target = (host, port)
        self.connections = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.mend()

    def mend(self):
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, args=[self.listener], daemon=True).start()

    def accept(self, listener):
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self.target)
                self.connections += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source, sink):
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """Refuse new connections and close those that stand."""
        for connection in [self.listener, *self.connections]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self.connections.clear()


@pytest.fixture
def forwarder(database_url):
    """A forwarder to PostgreSQL."""
    url = make_url(database_url)
    forwarder = Forwarder(url.host, url.port or 5432)
    yield forwarder
    forwarder.cut()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_database_that_goes_and_comes_back(
    start_server, seed, paths, forwarder, database_url
):
    """503 at once, one line in the log for each, and 200 again with no restart."""
    url = make_url(database_url).set(host="127.0.0.1", port=forwarder.port)
    server = start_server("--workers", "2", DATABASE_URL=url.render_as_string(False))

    def statuses():
        return {
            server.get(path, seed.bearer).status
            for path in [*paths, "/health_check"] * 4
        }

    for _ in range(2):
        assert statuses() == {200}
        forwarder.cut()
        started = time.monotonic()
        assert statuses() == {503}
        assert time.monotonic() - started < 5
        refused = server.get("/api/jobs", seed.bearer)
        assert json.loads(refused.body)["error"] == "Service Unavailable"
        assert refused.headers["Retry-After"] == "5"
        forwarder.mend()
        # Idle connections that were cut are replaced without a caller noticing.
        assert statuses() == {200}
    log = server.log()
    assert "Traceback" not in log and seed.bearer["Authorization"][7:] not in log
    assert log.count("The database cannot be read") == 2 * (4 * (len(paths) + 1) + 1)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_database_that_restarts_under_load(
    start_server, seed, paths, forwarder, database_url
):
    """Busy workers answer 503 while it is away, and cut no client off."""
    url = make_url(database_url).set(host="127.0.0.1", port=forwarder.port)
    server = start_server("--workers", "2", DATABASE_URL=url.render_as_string(False))
    with Load(server, paths, seed.bearer) as load:
        load.wait_for(100)
        forwarder.cut()
        load.wait_for(100)
        forwarder.mend()
        load.wait_for(200)
    assert {status for status, _ in load.answers} <= {200, 503}
    assert {status for status, _ in load.answers[-50:]} == {200}
    assert load.cut == []
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_statement_that_takes_too_long_is_given_up(
    start_server, app, seed, database_url
):
    """The table is locked: 503 within the statement timeout, not a hung worker."""
    server = start_server()
    with psycopg.connect(database_url) as connection:
        connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        started = time.monotonic()
        assert server.get("/api/jobs", seed.bearer).status == 503
        assert time.monotonic() - started < 10
    assert server.get("/api/jobs", seed.bearer).status == 200


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_locked_sqlite_is_unavailable(start_server, seed, database_url):
    server = start_server()
    path = make_url(database_url).database
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("BEGIN EXCLUSIVE")
        assert server.get("/api/jobs", seed.bearer).status == 503
        connection.execute("ROLLBACK")
    assert server.get("/api/jobs", seed.bearer).status == 200


@pytest.fixture
def start_import(database_url, tmp_path):
    """A function that starts an import in a process of its own."""

    def start(state):
        path = tmp_path / f"{uuid4()}.json"
        path.write_text(json.dumps(state))
        return subprocess.Popen(
            [sys.executable, "-m", "flask", "import-project", str(path)],
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": database_url},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def test_killed_import_leaves_the_database_as_it_was(
    start_import, import_state, new_state, client, seed
):
    state = new_state(jobs=2000)
    import_state(state, "you@example.org")
    for workflow in state["workflows"]:
        for job in workflow["jobs"]:
            job["body"] += "changed"
    before = client.get("/api/jobs?page_size=100", headers=seed.bearer).data
    for delay in (0.5, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4):
        process = start_import(state | {"workflows": state["workflows"][:900]})
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        after = client.get("/api/jobs?page_size=100", headers=seed.bearer).data
        assert (after == before) == (output == "")
        if output:
            break
    # Nothing holds a lock: the same import goes through.
    import_state(state)


def test_readers_see_one_state_while_imports_write(
    start_server, import_state, new_state, bearer
):
    """Every answer is 200, and its count and its data are of the same state."""
    small, large = new_state(jobs=4), new_state(jobs=40)
    large["id"] = small["id"]
    import_state(small, "you@example.org")
    server = start_server()
    paths = ["/api/jobs?page_size=100", "/api/jobs?page_size=100&page=1"]
    with Load(server, paths, bearer("you@example.org")) as load:
        for _ in range(5):
            import_state(large)
            import_state(small)
        load.wait_for(10)
    assert load.cut == []
    assert {status for status, _ in load.answers} == {200}
    totals = set()
    for _, body in load.answers:
        answer = json.loads(body)
        assert len(answer["data"]) == answer["meta"]["total_entries"]
        totals.add(answer["meta"]["total_entries"])
    assert totals == {4, 40}


def test_last_pages_are_of_one_state_too(start_server, import_state, new_state, bearer):
    small, large = new_state(jobs=11), new_state(jobs=40)
    large["id"] = small["id"]
    import_state(small, "you@example.org")
    server = start_server()
    paths = ["/api/jobs?page_size=10&page=2"]
    with Load(server, paths, bearer("you@example.org")) as load:
        for _ in range(5):
            import_state(large)
            import_state(small)
        load.wait_for(10)
    sizes = {
        (answer["meta"]["total_entries"], len(answer["data"]))
        for answer in (json.loads(body) for _, body in load.answers)
    }
    assert sizes == {(11, 1), (40, 10)}


def test_two_imports_follow_each_other(
    start_import, new_state, client, bearer, flask, import_state
):
    first, second = new_state(jobs=1000), new_state(jobs=900)
    second["id"] = first["id"]
    import_state(new_state(jobs=0) | {"id": first["id"]}, "you@example.org")
    processes = [start_import(state) for state in (first, second)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    answer = client.get("/api/jobs", headers=bearer("you@example.org")).json
    total = answer["meta"]["total_entries"]
    winner, loser = (1000, 900) if total == 1000 else (900, 1000)
    assert total == winner
    assert any(f"{loser} jobs deleted" in output for output in outputs)
