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
from conftest import ROOT, RUN_ID, free_port, postgresql_only, sqlite_only
from sqlalchemy import make_url
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
def test_replaced_file_is_served_alone(start_server, database_url, tmp_path):
    """From the next request on, by all workers."""
    server, path = start_server("--workers", "2"), file_of(database_url)

    def statuses(*tokens):
        return {
            tuple(server.get("/api/jobs", t).status for t in tokens) for _ in range(20)
        }

    first = new_token(database_url)
    assert statuses(first) == {(200,)}
    # Its log of writes must not be taken for that of the file that comes.
    new_token(database_url)
    second = new_token(f"sqlite:///{tmp_path}/other.db")
    os.replace(tmp_path / "other.db", path)
    assert statuses(first, second) == {(401, 200)}
    path.unlink()
    assert statuses(second) == {(503,)}
    for left in tmp_path.glob("jobs.db*"):
        left.unlink()
    third = new_token(database_url)
    assert statuses(second, third) == {(401, 200)}


@sqlite_only
@pytest.mark.parametrize("content", [b"no database" * 1000, b""])
def test_file_that_is_no_database_is_unavailable(
    seed, client, database_url, content, caplog
):
    """With a line that names it, for the health check too."""
    file_of(database_url).write_bytes(content)
    for path in ("/api/jobs", "/health_check"):
        caplog.clear()
        assert client.get(path, headers=seed.auth_header).status_code == 503
        [record] = caplog.records
        assert str(file_of(database_url)) in record.message and not record.exc_info


# As another user, who may not even read where Python is: so all is used before.
ASK_AS_ANOTHER = """
import os, sys
from app import create_app
apps = [create_app({"DATABASE_URL": url}) for url in sys.argv[1:]]
for app in apps:
    app.test_client().get("/nothing")
app.logger.error("begins")
os.setuid(65534)
for app in apps:
    print(app.test_client().get("/health_check").status_code)
"""


def test_right_that_is_missing_is_told():
    """Which file, and to whom, where WAL wants more than to read."""
    if os.getuid() != 0:
        pytest.skip("needs to become another user, which root alone can")
    rights = [(0o755, 0o644, ""), (0o777, 0o600, "jobs.db"), (0o555, 0o444, "")]
    paths, culprits = [], []
    for folder_mode, file_mode, culprit in rights:
        # pytest's own folders are closed to others.
        folder = Path(mkdtemp(prefix=RUN_ID))
        paths.append(folder / "jobs.db")
        culprits.append(folder / culprit)
        new_token(f"sqlite:///{paths[-1]}")
        paths[-1].chmod(file_mode)
        folder.chmod(folder_mode)
    done = subprocess.run(
        [sys.executable, "-c", ASK_AS_ANOTHER, *(f"sqlite:///{p}" for p in paths)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout == "503\n" * len(paths)
    _, *lines = done.stderr.splitlines()
    for path, culprit, line in zip(paths, culprits, lines, strict=True):
        assert f"cannot be read: {path}: " in line
        assert f"({culprit} must be readable and writable for this user)" in line
        path.parent.chmod(0o755)
        rmtree(path.parent)


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
def test_writer_waits_for_a_lock_that_was_there_before(run_flask, database_url):
    """Of another program, which keeps a rollback journal."""
    done = []
    with closing(sqlite3.connect(file_of(database_url), isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        waiter = threading.Thread(target=lambda: done.append(run_flask("init-db")))
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
        with Load(server, ["/api/jobs"], seed.auth_header, clients=100) as load:
            load.wait_for(100)
            assert server.get("/api/openapi.json").status == 200
        other.execute("ROLLBACK")
    assert {answer.status for answer in load.answers} == {503}
    assert max(answer.seconds for answer in load.answers) < 20
    assert server.get("/api/jobs", seed.auth_header).status == 200


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
        "JOBS_TEST_RUN": RUN_ID,
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
        for _ in range(2)
    ]
    for process in processes:
        process.stdin.write(json.dumps(project))
        process.stdin.close()
    said = [process.stdout.read() for process in processes]
    for process in processes:
        process.stdout.close()
    assert [process.wait() for process in processes] == [0, 0], said


@pytest.mark.parametrize("argument", ["connect_timeout", "tcp_user_timeout"])
def test_argument_of_the_url_goes_before_ours(argument):
    app = create_app({"DATABASE_URL": f"postgresql://h/d?{argument}=7"})
    url = app.config["SQLALCHEMY_DATABASE_URI"]
    assert url.query[argument] == "7"
    assert argument not in app.config["SQLALCHEMY_ENGINE_OPTIONS"]["connect_args"]
