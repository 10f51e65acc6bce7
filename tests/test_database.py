"""Databases that are broken, locked, unreadable or set up in an unusual way."""

import json
import os
import re
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
    """Run the demo and return the header with its new token."""
    app = create_app({"DATABASE_URL": database_url})
    line = app.test_cli_runner().invoke(args=["demo"]).stdout.splitlines()[0]
    with app.app_context():
        db.engine.dispose()
    return {"Authorization": f"Bearer {line.removeprefix('Token: ')}"}


@sqlite_only
@pytest.mark.parametrize("content", [b"no database" * 1000, b""])
def test_file_that_is_no_database_is_unavailable(
    seed, client, database_url, content, caplog
):
    """Lists and the health check return 503, and one line in the log names the file."""
    file_of(database_url).write_bytes(content)
    for path in ("/api/jobs", "/health_check"):
        caplog.clear()
        assert client.get(path, headers=seed.auth_header).status_code == 503
        [record] = caplog.records
        assert str(file_of(database_url)) in record.message and not record.exc_info


# The other user may not be able to read Python's folder, so the script sends a request
# to load all modules before it changes its user.
REQUEST_AS_ANOTHER_USER = """
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


def test_missing_permission_is_unavailable():
    """WAL needs permission to write even to read, and the log names the file."""
    if os.getuid() != 0:
        pytest.skip("needs to become another user, which only root can")
    paths = []
    for folder_mode, file_mode in (0o755, 0o644), (0o777, 0o600), (0o555, 0o444):
        # Other users cannot enter the temporary folders of pytest.
        folder = Path(mkdtemp(prefix=RUN_ID))
        paths.append(folder / "jobs.db")
        new_token(f"sqlite:///{paths[-1]}")
        paths[-1].chmod(file_mode)
        folder.chmod(folder_mode)
    urls = [f"sqlite:///{path}" for path in paths]
    done = subprocess.run(
        [sys.executable, "-c", REQUEST_AS_ANOTHER_USER, *urls],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout == "503\n" * len(paths)
    _, *lines = done.stderr.splitlines()
    for path, line in zip(paths, lines, strict=True):
        assert re.search(
            f"cannot be read: {path}: (unable to open|attempt to write)", line
        )
        path.parent.chmod(0o755)
        rmtree(path.parent)


@sqlite_only
def test_log_names_the_database_but_no_password(make_app, tmp_path, caplog):
    port = free_port()
    for url, name in (
        (f"sqlite:///{tmp_path}/no/x.db", f"{tmp_path}/no/x.db: "),
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
@pytest.mark.parametrize(
    "parameter", ["sslmode=never", "service=never", "tcp_user_timeout=never"]
)
def test_value_that_libpq_rejects_is_unavailable(make_app, caplog, parameter):
    """The value is checked at the connection, and the log names the parameter."""
    app = make_app(DATABASE_URL=f"postgresql://you:s3cret@127.0.0.1:1/d?{parameter}")
    headers = {"Authorization": "Bearer x"}
    for path in ("/api/jobs", "/health_check"):
        caplog.clear()
        assert app.test_client().get(path, headers=headers).status_code == 503
        [record] = caplog.records
        assert parameter.partition("=")[0] in record.message and not record.exc_info
        assert "s3cret" not in record.message


@sqlite_only
def test_writer_waits_for_the_lock_of_another_program(run_flask, database_url):
    """A write command waits for a program that locks the file and does not use WAL."""
    printed = []
    with closing(sqlite3.connect(file_of(database_url), isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        waiter = threading.Thread(target=lambda: printed.append(run_flask("init-db")))
        waiter.start()
        # Readers wait for a shorter time than these two seconds.
        waiter.join(2)
        assert printed == []
        other.execute("ROLLBACK")
        waiter.join()
    assert printed == ["No table was missing.\n"]


@sqlite_only
def test_locked_file_blocks_no_other_requests(start_server, seed, database_url):
    """The server rejects 100 concurrent lists and serves the OpenAPI document."""
    server = start_server()
    with closing(sqlite3.connect(file_of(database_url), isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        with Load(server, ["/api/jobs"], seed.auth_header, clients=100) as load:
            load.wait_for(100)
            assert server.get("/api/openapi.json").status == 200
        other.execute("ROLLBACK")
    assert {response.status for response in load.responses} == {503}
    assert max(response.seconds for response in load.responses) < 20
    assert server.get("/api/jobs", seed.auth_header).status == 200


@postgresql_only
def test_concurrent_imports_succeed_whatever_the_default_isolation(
    make_app, database_url, new_state
):
    """The URL sets the default isolation level, as the settings of a role could."""
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
    outputs = [process.stdout.read() for process in processes]
    for process in processes:
        process.stdout.close()
    assert [process.wait() for process in processes] == [0, 0], outputs


@pytest.mark.parametrize("parameter", ["connect_timeout", "tcp_user_timeout"])
def test_query_parameter_of_the_url_overrides_the_default(parameter):
    app = create_app({"DATABASE_URL": f"postgresql://h/d?{parameter}=7"})
    url = app.config["SQLALCHEMY_DATABASE_URI"]
    assert url.query[parameter] == "7"
    assert parameter not in app.config["SQLALCHEMY_ENGINE_OPTIONS"]["connect_args"]
