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
import time
from contextlib import closing, suppress
from glob import glob
from types import SimpleNamespace
from uuid import uuid4

import psycopg
import pytest
from conftest import (
    ROOT,
    TIMEOUT,
    free_port,
    postgresql_only,
    running_server,
    sqlite_only,
    wait_until,
)
from sqlalchemy import event, make_url
from test_server import Load, assert_that_two_workers_serve

from database import db, write_transaction


class Forwarder:
    """A TCP forwarder to a server, which can disconnect, listen again, and block."""

    def __init__(self, host, port):
        self.target = (host, port)
        self.connections = []
        self.flows = threading.Event()
        self.flows.set()
        self.port = free_port()
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


@pytest.fixture(scope="module")
def forwarder(postgresql_url):
    """A forwarder to PostgreSQL."""
    url = make_url(postgresql_url)
    forwarder = Forwarder(url.host, url.port or 5432)
    yield forwarder
    forwarder.disconnect()


@pytest.fixture(scope="module")
def shared_server(postgresql_url, forwarder, tmp_path_factory):
    """The server of these tests, which reaches PostgreSQL through the forwarder."""
    url = make_url(postgresql_url).set(host="127.0.0.1", port=forwarder.port)
    log_path = tmp_path_factory.mktemp("served") / "gunicorn.log"
    options = ["--workers", "2"]
    with running_server(url.render_as_string(False), log_path, *options) as server:
        yield server


@postgresql_only
def test_workers_connect_after_they_were_forked(server, seed, paths):
    """Each worker opens its connections after the fork, and two workers serve."""
    assert_that_two_workers_serve(server, paths, seed.auth_header)


@postgresql_only
def test_unavailable_database_is_a_503_until_it_is_back(server, seed, paths, forwarder):
    """Each 503 comes at once with a line in the log, and recovery needs no restart."""

    def statuses():
        return {
            server.get(path, seed.auth_header).status
            for path in [*paths, "/health_check"] * 4
        }

    for _ in range(2):
        assert statuses() == {200}
        forwarder.disconnect()
        started = time.monotonic()
        assert statuses() == {503}
        assert time.monotonic() - started < 5
        response = server.get("/api/jobs", seed.auth_header)
        assert json.loads(response.body)["error"] == "Service Unavailable"
        assert response.headers["Retry-After"] == "5"
        forwarder.listen()
        # The service replaces closed idle connections, and no client notices.
        assert statuses() == {200}
    log = server.log()
    assert "Traceback" not in log and seed.auth_header["Authorization"][7:] not in log
    assert log.count("The database cannot be read") == 2 * (4 * (len(paths) + 1) + 1)


@postgresql_only
def test_connections_that_break_at_once_are_a_503(app, seed, execute, caplog):
    """If the replacement of a broken connection breaks too, the response is 503."""

    def terminate(connection, _):
        execute("SELECT pg_terminate_backend(%s, 9999)", [connection.info.backend_pid])

    with app.app_context():
        db.engine.dispose()
        event.listen(db.engine, "connect", terminate)
    response = app.test_client().get("/api/jobs", headers=seed.auth_header)
    assert response.status_code == 503
    [record] = caplog.records
    assert record.exc_info is None


@postgresql_only
def test_database_can_restart_under_load(server, seed, paths, forwarder):
    """While the database restarts, workers return 503 and disconnect no client."""
    with Load(server, paths, seed.auth_header) as load:
        load.wait_for(50)
        forwarder.disconnect()
        load.wait_for(50)
        forwarder.listen()
        load.wait_for(100)
    assert {response.status for response in load.responses} <= {200, 503}
    assert {response.status for response in load.responses[-50:]} == {200}
    assert load.disconnected == []
    assert "Traceback" not in server.log()


@postgresql_only
def test_database_that_hangs_times_out(server, seed, paths, forwarder):
    """While the database hangs, responses are 503; afterwards they are correct again.

    The forwarder acknowledges all bytes meanwhile, so TCP reports no error.
    """
    expected = [server.get(path, seed.auth_header).body for path in paths]
    forwarder.flows.clear()
    try:
        with Load(server, paths, seed.auth_header, clients=12) as load:
            wait_until(lambda: len(load.responses) >= 12)
    finally:
        forwarder.flows.set()
    assert {response.status for response in load.responses} == {503}
    assert max(response.seconds for response in load.responses) < 15
    for _ in range(3):
        assert [server.get(path, seed.auth_header).body for path in paths] == expected
    assert "No response within" in server.log() and "Traceback" not in server.log()


@postgresql_only
def test_statement_that_takes_too_long_times_out(server, seed, database_url):
    """A query of a locked table is a 503 after the statement timeout."""
    with psycopg.connect(database_url) as connection:
        connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        assert server.get("/api/jobs", seed.auth_header).status == 503
    assert server.get("/api/jobs", seed.auth_header).status == 200


@sqlite_only
def test_locked_sqlite_is_unavailable(make_app, app, seed, database_url):
    client = make_app(DATABASE_URL=f"{database_url}?timeout=1").test_client()
    path = make_url(database_url).database
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("BEGIN EXCLUSIVE")
        assert client.get("/api/jobs", headers=seed.auth_header).status_code == 503
        connection.execute("ROLLBACK")
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == 200


@pytest.fixture
def start_import(database_url, tmp_path):
    """A function that starts an import in a new process."""
    processes = []

    def start(state, stdout=subprocess.PIPE):
        path = tmp_path / f"{uuid4()}.json"
        path.write_text(json.dumps(state))
        process = subprocess.Popen(
            [sys.executable, "-m", "flask", "import-project", str(path)],
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": database_url},
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def open_files(process):
    """Yield the open files of a process, except those that it closes meanwhile."""
    for link in glob(f"/proc/{process.pid}/fd/*"):
        with suppress(FileNotFoundError):
            yield os.readlink(link)


@pytest.fixture
def import_locks(database_url, request):
    """A function that counts the imports with the write lock, and those that wait."""
    if database_url.startswith("sqlite"):
        path = make_url(database_url).database

        def count_locks(process):
            has_opened = path in open_files(process)
            with closing(sqlite3.connect(path, timeout=0)) as connection:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError:
                    return 1, has_opened
            return 0, has_opened
    else:
        execute = request.getfixturevalue("execute")

        def count_locks(process):
            return execute(
                "SELECT count(*) FILTER (WHERE granted), "
                "count(*) FILTER (WHERE NOT granted) "
                "FROM pg_locks JOIN pg_database ON oid = database "
                "WHERE locktype = 'advisory' AND datname = current_database()"
            ).fetchone()

    return count_locks


@pytest.fixture
def import_pair(new_state, import_state, client, auth_header):
    """A state that is imported, a changed one, and a look at which the service has."""
    before = new_state(jobs=500)
    import_state(before, "you@example.org")
    after = copy.deepcopy(before)
    del after["workflows"][-50:]
    for workflow in after["workflows"]:
        for job in workflow["jobs"]:
            job["body"] += "changed"
    headers = auth_header("you@example.org")
    paths = ["/api/jobs", f"/api/jobs/{before['workflows'][0]['jobs'][0]['id']}"]

    def look():
        page, job = (client.get(path, headers=headers).json for path in paths)
        body = job["data"]["attributes"]["body"]
        return page["meta"]["total_entries"], body.endswith("changed")

    return SimpleNamespace(before=before, after=after, look=look)


OLD, NEW = (500, False), (400, True)


def kill(process):
    """Kill a process and return what it printed."""
    process.kill()
    return process.communicate()[0]


def test_import_killed_before_it_has_the_lock_changes_nothing(
    app, start_import, import_pair, import_locks
):
    with app.app_context(), write_transaction():
        process = start_import(import_pair.after)
        wait_until(lambda: import_locks(process) == (1, True))
        assert kill(process) == ""
    assert import_pair.look() == OLD


def test_import_killed_while_it_writes_changes_nothing(
    start_import, import_state, import_pair, import_locks
):
    for _ in range(10):
        process = start_import(import_pair.after)
        wait_until(lambda p=process: import_locks(p)[0] or p.poll() is not None)
        process.send_signal(signal.SIGSTOP)
        is_writing, _ = import_locks(process)
        output = kill(process)
        wait_until(lambda p=process: not import_locks(p)[0])
        # If the process had no lock when it was killed, or had committed, try again.
        if is_writing and import_pair.look() != NEW:
            break
        import_state(import_pair.before)
    assert (is_writing, output, import_pair.look()) == (1, "", OLD)
    # No process has the lock any more, so the same import succeeds.
    assert "400 jobs updated" in import_state(import_pair.after)
    assert import_pair.look() == NEW


def test_import_killed_before_its_output_has_changed_everything(
    start_import, import_pair
):
    """A full pipe blocks the import where it prints its summary, after its commit."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for size in (65536, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * size)
    os.set_blocking(writer, True)
    process = start_import(import_pair.after, stdout=writer)
    os.close(writer)
    wait_until(lambda: import_pair.look() == NEW)
    kill(process)
    with open(reader) as output:
        assert set(output.read()) == {"x"}
    assert import_pair.look() == NEW


def test_readers_see_one_state_while_imports_write(
    start_server, import_state, new_state, auth_header
):
    """Every response is 200, and its count and its data are of the same state.

    This holds for first and last pages.
    """
    small, large = new_state(jobs=11), new_state(jobs=40)
    large["id"] = small["id"]
    import_state(small, "you@example.org")
    server = start_server()
    paths = ["/api/jobs?page_size=100", "/api/jobs?page_size=10&page=2"]
    with Load(server, paths, auth_header("you@example.org")) as load:
        for _ in range(3):
            for state in (large, small):
                import_state(state)
                # These are more responses than clients, so some requests began
                # after the import.
                load.wait_for(10)
    assert load.disconnected == []
    assert {response.status for response in load.responses} == {200}
    sizes = set()
    for response in load.responses:
        page = json.loads(response.body)
        meta, count = page["meta"], len(page["data"])
        sizes.add((meta["page_size"], meta["total_entries"], count))
    assert sizes == {(100, 11, 11), (100, 40, 40), (10, 11, 1), (10, 40, 10)}


def test_concurrent_imports_run_one_after_the_other(
    app, start_import, import_locks, import_state, new_state, client, auth_header
):
    first, second = new_state(jobs=300), new_state(jobs=200)
    second["id"] = first["id"]
    import_state(new_state(jobs=0) | {"id": first["id"]}, "you@example.org")
    with app.app_context(), write_transaction():
        process = start_import(first)
        wait_until(lambda: import_locks(process) == (1, True))
    # The lock is free now, and both imports compete for it.
    output = import_state(second) + process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0, output
    page = client.get("/api/jobs", headers=auth_header("you@example.org")).json
    total = page["meta"]["total_entries"]
    assert total in (300, 200)
    # The later import deletes the jobs of the earlier one.
    assert f"{500 - total} jobs deleted" in output
