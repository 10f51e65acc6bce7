"""SQLite files and PostgreSQL servers in states that nobody wishes for."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest
from conftest import ROOT, RUN, free_port, postgresql_only, sqlite_only, wait_until
from sqlalchemy import make_url
from test_faults import Forwarder
from test_server import Load

from app import create_app
from database import db


def file_of(database_url):
    return Path(make_url(database_url).database)


def new_token(database_url):
    """The token of a demo that is made anew in the database, as a header."""
    app = create_app({"DATABASE_URL": database_url})
    line = app.test_cli_runner().invoke(args=["demo"]).stdout.splitlines()[0]
    with app.app_context():
        db.engine.dispose()
    return {"Authorization": f"Bearer {line.removeprefix('Token: ')}"}


@sqlite_only
@pytest.mark.parametrize("by", ["removal", "rename"])
def test_replaced_file_is_served_alone(start_server, database_url, tmp_path, by):
    """From the next request on, by all workers."""
    old = new_token(database_url)
    server = start_server("--workers", "2")
    for _ in range(20):
        assert server.get("/api/jobs", old).status == 200
    # Its log of writes must not be taken for that of the file that comes.
    new_token(database_url)
    if by == "rename":
        other = f"sqlite:///{tmp_path}/other.db"
        new = new_token(other)
        os.replace(file_of(other), file_of(database_url))
    else:
        file_of(database_url).unlink()
        assert server.get("/api/jobs", old).status == 503
        for left in tmp_path.glob("jobs.db*"):
            left.unlink()
        new = new_token(database_url)
    for _ in range(20):
        assert server.get("/api/jobs", old).status == 401
        assert server.get("/api/jobs", new).status == 200


@sqlite_only
@pytest.mark.parametrize("content", [b"no database" * 1000, b""])
def test_file_that_is_no_database_is_unavailable(
    seed, client, database_url, content, caplog
):
    """With a line that names it, for the health check too."""
    file_of(database_url).write_bytes(content)
    for path in ("/api/jobs", "/health_check"):
        caplog.clear()
        assert client.get(path, headers=seed.bearer).status_code == 503
        [record] = caplog.records
        assert str(file_of(database_url)) in record.message and not record.exc_info


# As another user, who may not even read where Python is: so all is used before.
ASK_AS_ANOTHER = """
import os, sys
from app import create_app
app = create_app({"DATABASE_URL": sys.argv[1]})
app.test_client().get("/nothing")
app.logger.error("begins")
if os.getuid() == 0:
    os.setuid(65534)
print(app.test_client().get("/health_check").status_code)
"""


@pytest.mark.parametrize(
    ("folder_mode", "file_mode", "culprit"),
    [(0o755, 0o644, "folder"), (0o777, 0o600, "file"), (0o555, 0o444, "folder")],
)
def test_right_that_is_missing_is_told(folder_mode, file_mode, culprit):
    """Which file, and to whom, where WAL wants more than to read."""
    if os.getuid() != 0 and file_mode == 0o644:
        pytest.skip("needs to be another user, which root alone can become")
    # pytest's own folders are closed to others.
    folder = Path(mkdtemp(prefix=RUN))
    path = folder / "jobs.db"
    new_token(f"sqlite:///{path}")
    path.chmod(file_mode)
    folder.chmod(folder_mode)
    done = subprocess.run(
        [sys.executable, "-c", ASK_AS_ANOTHER, f"sqlite:///{path}"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        check=True,
        text=True,
    )
    folder.chmod(0o755)
    rmtree(folder)
    assert done.stdout == "503\n"
    _, line = done.stderr.splitlines()
    named = {"folder": folder, "file": path}[culprit]
    assert f"cannot be read: {path}: " in line
    assert f"({named} must be readable and writable for this user)" in line


@sqlite_only
def test_log_names_the_database_and_no_password(make_app, tmp_path, caplog):
    port = free_port()
    for url, name in (
        (f"sqlite:///{tmp_path}/no/x.db", f"(this user sees no folder {tmp_path}/no)"),
        (f"postgresql://you:s3cret@127.0.0.1:{port}/jobs", f"127.0.0.1:{port}, jobs: "),
        (f"postgresql://you:s3cret@/jobs?host=127.0.0.1:{port}&password=s3cret",
         f"127.0.0.1:{port}, jobs: "),
    ):  # fmt: skip
        caplog.clear()
        app = make_app(DATABASE_URL=url)
        assert app.test_client().get("/health_check").status_code == 503
        [record] = caplog.records
        assert name in record.message and "s3cret" not in record.message
        result = app.test_cli_runner().invoke(args=["list-tokens"])
        assert name in result.stderr and "s3cret" not in result.stderr


@sqlite_only
def test_writer_waits_for_a_lock_that_was_there_before(flask, database_url):
    """Of another program, which keeps a rollback journal."""
    done = []
    with closing(sqlite3.connect(file_of(database_url), isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        waiter = threading.Thread(target=lambda: done.append(flask("init-db")))
        waiter.start()
        # Longer than readers wait.
        waiter.join(2)
        assert done == []
        other.execute("ROLLBACK")
        waiter.join()
    assert done == [""]


@sqlite_only
def test_locked_file_holds_nobody_up(start_server, seed, database_url):
    """A hundred requests at once are refused, and others are answered meanwhile."""
    server = start_server()
    with closing(sqlite3.connect(file_of(database_url), isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        with Load(server, ["/api/jobs"], seed.bearer, clients=100) as load:
            load.wait_for(100)
            assert server.get("/api/openapi.json").status == 200
        other.execute("ROLLBACK")
    assert {answer.status for answer in load.answers} == {503}
    assert max(answer.seconds for answer in load.answers) < 20
    assert server.get("/api/jobs", seed.bearer).status == 200


class Freezer(Forwarder):
    """A forwarder to a server that stands still while its machine acknowledges."""

    def __init__(self, host, port):
        self.flows = threading.Event()
        self.flows.set()
        super().__init__(host, port)

    def pump(self, source, sink):
        super().pump(Waiting(source, self.flows), sink)


class Waiting:
    """A socket that gives what it receives when it may."""

    def __init__(self, source, flows):
        self.source, self.flows = source, flows

    def recv(self, size):
        data = self.source.recv(size)
        self.flows.wait()
        return data


@postgresql_only
def test_database_that_hangs_is_given_up(start_server, seed, paths, database_url):
    """503 whatever it does, and 200 with the right answers when it goes on."""
    url = make_url(database_url)
    freezer = Freezer(url.host, url.port or 5432)
    url = url.set(host="127.0.0.1", port=freezer.port)
    server = start_server(DATABASE_URL=url.render_as_string(False))
    expected = [server.get(path, seed.bearer).body for path in paths]
    freezer.flows.clear()
    with Load(server, paths, seed.bearer, clients=12) as load:
        wait_until(lambda: len(load.answers) >= 12)
    freezer.flows.set()
    assert {answer.status for answer in load.answers} == {503}
    assert max(answer.seconds for answer in load.answers) < 15
    for _ in range(3):
        assert [server.get(path, seed.bearer).body for path in paths] == expected
    assert "No answer within" in server.log() and "Traceback" not in server.log()
    freezer.cut()


@postgresql_only
def test_writers_see_each_other_whatever_the_default_isolation(
    make_app, database_url, new_state
):
    """Of a role, say: here in the URL."""
    level = "default_transaction_isolation=serializable"
    url = make_url(database_url).update_query_dict({"options": f"-c {level}"})
    make_app().test_cli_runner().invoke(args=["init-db"])
    command = [sys.executable, "-m", "flask", "import-project", "-"]
    environment = os.environ | {
        "DATABASE_URL": url.render_as_string(False),
        "JOBS_TEST_RUN": RUN,
    }
    project = new_state(jobs=0)
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        process.stdin.write(json.dumps(project))
        process.stdin.close()
    said = [process.stdout.read() for process in processes]
    for process in processes:
        process.stdout.close()
    assert [process.wait() for process in processes] == [0, 0, 0], said


@pytest.mark.parametrize("argument", ["connect_timeout", "tcp_user_timeout"])
def test_argument_of_the_url_goes_before_ours(argument):
    app = create_app({"DATABASE_URL": f"postgresql://h/d?{argument}=7"})
    url = app.config["SQLALCHEMY_DATABASE_URI"]
    assert url.query[argument] == "7"
    assert argument not in app.config["SQLALCHEMY_ENGINE_OPTIONS"]["connect_args"]
