"""Databases that become unavailable, hang, or change while clients read."""

import copy
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path

import psycopg
import pytest
from load import Load
from servers import ROOT, TIMEOUT, free_port, wait_until
from sqlalchemy import make_url, update

from admin import write_transaction
from database import db
from models import Project


class Forwarder:
    """A TCP forwarder to a server, which can disconnect, listen again, and block."""

    def __init__(self, url):
        self.target = (url.host, url.port or 5432)
        self.connections, self.port = [], free_port()
        self.flows = threading.Event()
        self.flows.set()
        self.listen()

    def listen(self):
        """Accept connections on the forwarder's port."""
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, args=[self.listener], daemon=True).start()

    def accept(self, listener):
        """Connect each client to the server."""
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self.target)
                self.connections += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source, sink):
        """Copy bytes in one direction, except while ``flows`` is cleared."""
        with suppress(OSError):
            while data := source.recv(65536):
                self.flows.wait()
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def disconnect(self):
        """Reject new connections and close the existing ones."""
        for connection in [self.listener, *self.connections]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self.connections.clear()


@pytest.fixture
def forwarder(database_url):
    """A forwarder to PostgreSQL."""
    forwarder = Forwarder(make_url(database_url))
    yield forwarder
    forwarder.disconnect()


@pytest.mark.postgresql
def test_database_can_hang_and_restart(start_server, database_url, forwarder, seed):
    """Each request is then a 503, and a 200 without a restart of the service.

    The forwarder acknowledges all bytes, so TCP reports no error while it hangs.
    """
    url = make_url(database_url).set(host="127.0.0.1", port=forwarder.port)
    server = start_server(url.render_as_string(False), "--workers", "2")

    def statuses():
        paths = [*seed.paths, "/health_check"] * 4
        return {server.get(path, seed.auth_header).status for path in paths}

    expected = [server.get(path, seed.auth_header).body for path in seed.paths]
    with Load(server, seed.paths, seed.auth_header) as load:
        load.wait_for(50)
        forwarder.disconnect()
        load.wait_for(50)
        assert statuses() == {503}
        forwarder.listen()
        load.wait_for(100)
    assert load.statuses() == {200, 503} and load.disconnected == []
    assert {response.status for response in load.responses[-50:]} == {200}
    forwarder.flows.clear()
    with Load(server, seed.paths, seed.auth_header, clients=12) as load:
        wait_until(lambda: "No response within 9 seconds" in server.log())
        assert load.statuses() <= {503}
        forwarder.flows.set()
    assert max(response.seconds for response in load.responses) < 15
    for _ in range(3):
        bodies = [server.get(path, seed.auth_header).body for path in seed.paths]
        assert bodies == expected
    log = server.log()
    assert "Connection refused" in log and "Traceback" not in log
    assert seed.token not in log


@pytest.mark.postgresql
def test_connections_closed_while_idle_are_replaced(client, seed, execute):
    """No client notices that the server has closed the connections of the pool."""
    for path in (*seed.paths, "/health_check"):
        assert client.get(path, headers=seed.auth_header).status_code == 200
        execute(
            "SELECT pg_terminate_backend(pid, 9999) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == 200


@pytest.mark.postgresql
def test_statement_that_takes_too_long_times_out(make_app, seed, database_url):
    """A parameter of the URL overrides the limit of 5 seconds."""
    url = f"{database_url}?options=-c%20statement_timeout=200ms"
    client = make_app(DATABASE_URL=url).test_client()
    with psycopg.connect(database_url) as connection:
        connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        assert client.get("/api/jobs", headers=seed.auth_header).status_code == 503
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == 200


@pytest.mark.sqlite
def test_locked_file_is_unavailable_until_it_is_free(
    app, client, seed, database_url, caplog
):
    with app.app_context():
        # A connection of the pool would keep the other program from locking the file.
        db.engine.dispose()
    path = make_url(database_url).database
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        for path, status in ("/api/jobs", 503), ("/api/openapi.json", 200):
            assert client.get(path, headers=seed.auth_header).status_code == status
        other.execute("ROLLBACK")
    assert "database is locked" in caplog.text
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == 200


@pytest.fixture
def start_import(database_url, tmp_path):
    """A function that starts an import in a new process."""
    processes = []

    def start(state):
        path = tmp_path / f"{len(processes)}.json"
        path.write_text(json.dumps(state))
        process = subprocess.Popen(
            [sys.executable, "-m", "flask", "import-project", str(path)],
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": database_url},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def count_locks(database_url, execute):
    """A function that counts the imports that have the write lock or wait for it."""

    def count():
        if not database_url.startswith("sqlite"):
            sql = "SELECT count(*) FROM pg_locks JOIN pg_database ON oid = database "
            sql += "WHERE locktype = 'advisory' AND datname = current_database()"
            return execute(sql)[0][0]
        path = make_url(database_url).database
        with closing(sqlite3.connect(path, timeout=0)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return 1
        return 0

    return count


def test_import_killed_while_it_writes_changes_nothing(
    start_import, import_state, new_state, dump, count_locks
):
    """No process has the lock any more, so the same import succeeds."""
    state = new_state(jobs=500)
    import_state(state, "you@example.org")
    before, changed = dump(), copy.deepcopy(state)
    del changed["workflows"][-50:]
    for workflow in changed["workflows"]:
        workflow["name"] += " (changed)"
    for _ in range(10):
        process = start_import(changed)
        wait_until(lambda p=process: count_locks() or p.poll() is not None)
        process.send_signal(signal.SIGSTOP)
        is_writing = count_locks()
        process.kill()
        output, _ = process.communicate()
        wait_until(lambda: not count_locks())
        # If the process had no lock when it was killed, or had committed, try again.
        if is_writing and dump() == before:
            break
        import_state(state)
        before = dump()
    assert (is_writing, output) == (1, "")
    assert "100 jobs deleted, 400 jobs unchanged" in import_state(changed)


def test_concurrent_imports_run_one_after_the_other(
    app, start_import, count_locks, import_state, new_state, dump
):
    """The later import sees the jobs of the earlier one, and deletes them."""
    first, second = new_state(jobs=300), new_state(jobs=200)
    second["id"] = first["id"]
    import_state(first | {"workflows": []})
    with app.app_context(), write_transaction():
        process = start_import(first)

        def is_waiting():
            # SQLite opens this file right before it waits for the lock.
            files = [
                path.resolve() for path in Path(f"/proc/{process.pid}/fd").iterdir()
            ]
            return count_locks() == 2 or any(file.match("*.db-wal") for file in files)

        wait_until(is_waiting)
        db.session.execute(update(Project).values(name="Changed meanwhile"))
    # The lock is free now, and both imports compete for it.
    output = import_state(second) + process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0, output
    total = len(dump()["jobs"])
    assert total in (300, 200)
    assert f"{500 - total} jobs deleted" in output


def test_readers_see_one_state_while_imports_write(
    start_server, database_url, import_state, new_state, auth_header
):
    """Every response is 200, and its count and its data are of the same state.

    This holds for first and last pages.
    """
    small, large = new_state(jobs=11), new_state(jobs=40)
    large["id"] = small["id"]
    import_state(small, "you@example.org")
    server = start_server(database_url)
    paths = ["/api/jobs?page_size=100", "/api/jobs?page_size=10&page=2"]
    with Load(server, paths, auth_header("you@example.org")) as load:
        for state in (large, small) * 3:
            import_state(state)
            # These are more responses than clients, so some requests began after the
            # import.
            load.wait_for(10)
    assert load.statuses() == {200} and load.disconnected == []
    sizes = set()
    for response in load.responses:
        page = json.loads(response.body)
        meta, count = page["meta"], len(page["data"])
        sizes.add((meta["page_size"], meta["total_entries"], count))
    assert sizes == {(100, 11, 11), (100, 40, 40), (10, 11, 1), (10, 40, 10)}
