"""Fixtures: databases of both kinds, the service with rows to read, and gunicorn."""

import copy
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import randrange
from shutil import copy2, copyfile, rmtree
from tempfile import gettempdir
from types import SimpleNamespace
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import insert, make_url, update

from app import create_app
from database import db, write_transaction
from models import Job, Project, ProjectUser, User, UserToken, Workflow

ROOT = Path(__file__).parent.parent

# Hypothesis stores tables of characters, which take seconds to create. Their folder is
# outside of the checkout.
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{gettempdir()}/hypothesis"

SERVER = os.environ.get(
    "TEST_DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres"
)

# All processes of a run have this name in their environment, and in the names of the
# databases, roles and folders that they create.
RUN_ID = os.environ.setdefault("JOBS_TEST_RUN", f"jobs_test_{uuid4().hex[:12]}")

# Tests wait at most this number of seconds for what an idle machine does at once.
TIMEOUT = 90

# These marks are for behaviour that is the same on both databases or exists on one.
sqlite_only, postgresql_only = (
    pytest.mark.parametrize("database_url", [kind], indirect=True)
    for kind in ("sqlite", "postgresql")
)


def with_shared_server(options="", **variables):
    """Mark a test that shares a server on SQLite with all tests of the same options.

    pytest runs these tests one after the other, since the server's scope is the run.
    """
    wanted = [(options, *variables.items())]
    server = pytest.mark.parametrize(
        "shared_server", wanted, ids=[options], indirect=True
    )
    database = pytest.mark.parametrize("database_url", ["served"], indirect=True)
    # One mark for both would give the server the scope of the database.
    return lambda test: server(database(test))


def pytest_xdist_auto_num_workers(config):
    """Return two processes per core, since many tests wait, but none on one core."""
    cores = os.cpu_count()
    return cores * 2 if cores > 1 else 0


def pytest_configure(config):
    """Have fixtures clean up after SIGTERM as they do after Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Run tests that share a server first, so that they stay in one process."""
    items.sort(key=lambda item: "shared_server" not in item.fixturenames)


def pytest_unconfigure(config):
    """Remove the processes, folders, databases and roles that this run left behind."""
    if hasattr(config, "workerinput"):
        return
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if RUN_ID.encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)
    for folder in Path(gettempdir()).glob(f"{RUN_ID}*"):
        rmtree(folder, ignore_errors=True)
    with suppress(psycopg.OperationalError), connect_to_server() as server:
        for kind, catalog, column, force in (
            ("DATABASE", "pg_database", "datname", "WITH (FORCE)"),
            ("ROLE", "pg_roles", "rolname", ""),
        ):
            query = f"SELECT {column} FROM {catalog} WHERE {column} LIKE '%{RUN_ID}%'"
            for (name,) in server.execute(query).fetchall():
                server.execute(f"DROP {kind} {name} {force}")


def connect_to_server():
    """Connect to PostgreSQL as a role that can create databases."""
    return psycopg.connect(SERVER, autocommit=True, connect_timeout=3)


@pytest.fixture(scope="session")
def postgresql_server():
    """A connection to PostgreSQL as a role that can create databases."""
    try:
        server = connect_to_server()
    except psycopg.OperationalError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs PostgreSQL, here or at TEST_DATABASE_URL: {error}")
    with server:
        yield server


@contextmanager
def new_database(server, options=""):
    """Create a database, yield its URL, and drop the database at the end."""
    name = f"{RUN_ID}_{uuid4().hex[:12]}"
    try:
        server.execute(f"CREATE DATABASE {name} {options}")
        yield make_url(SERVER).set(database=name).render_as_string(hide_password=False)
    finally:
        server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgresql_url(postgresql_server):
    """The URL of a PostgreSQL database that only this process uses."""
    with new_database(postgresql_server) as url:
        yield url


@pytest.fixture
def execute(postgresql_url):
    """A function that runs statements in PostgreSQL, without the service."""
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        yield connection.execute


DROP_TABLES = "DROP SCHEMA public CASCADE; CREATE SCHEMA public"
DELETE_ROWS = "DELETE FROM users; DELETE FROM projects"


@pytest.fixture
def empty_schema(execute):
    """A schema without tables, which is emptied again after the test."""
    execute(DROP_TABLES)
    yield
    execute(DROP_TABLES)


def run_command(app, *args, **options):
    """Run a ``flask`` command that must succeed, and return what it prints."""
    result = app.test_cli_runner().invoke(args=args, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="session")
def sqlite_tables(tmp_path_factory):
    """A SQLite file with empty tables; a copy is faster than creating tables again."""
    path = tmp_path_factory.mktemp("tables") / "jobs.db"
    run_command(create_app({"DATABASE_URL": f"sqlite:///{path}"}), "init-db")
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """The URL of an empty database of each kind; it has tables if ``app`` is used."""
    if request.param == "served":
        url = request.getfixturevalue("shared_server").database_url
        with closing(sqlite3.connect(make_url(url).database)) as connection:
            connection.executescript(f"PRAGMA foreign_keys = ON; {DELETE_ROWS}")
        return url
    needs_tables = "app" in request.fixturenames
    if request.param == "sqlite":
        path = tmp_path / "jobs.db"
        if needs_tables:
            copyfile(request.getfixturevalue("sqlite_tables"), path)
        return f"sqlite:///{path}"
    url, execute = map(request.getfixturevalue, ("postgresql_url", "execute"))
    found = execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    if needs_tables and {name for (name,) in found} == {*db.metadata.tables}:
        execute(DELETE_ROWS)
    else:
        execute(DROP_TABLES)
        if needs_tables:
            run_command(create_app({"DATABASE_URL": url}), "init-db")
    return url


@pytest.fixture
def make_app(database_url):
    """A function that creates the service with the database and with more settings."""
    apps = []

    def make(**config):
        apps.append(create_app({"DATABASE_URL": database_url} | config))
        return apps[-1]

    yield make
    for app in apps:
        with app.app_context():
            db.engine.dispose()


@pytest.fixture
def app_without_tables(make_app):
    """The service on a database without tables."""
    return make_app()


@pytest.fixture
def app(app_without_tables):
    """The service on a database whose tables are empty."""
    return app_without_tables


@pytest.fixture
def client(app):
    """A client that sends no credentials, unless a test passes them."""
    return app.test_client()


@pytest.fixture
def runner(app):
    """A runner of the ``flask`` commands."""
    return app.test_cli_runner()


@pytest.fixture
def run_flask(app):
    """A function that runs a command that must succeed, and returns what it prints."""
    return partial(run_command, app)


@pytest.fixture
def auth_header(run_flask):
    """A function that creates a token of a user and returns it as a header."""
    return lambda email: {
        "Authorization": f"Bearer {run_flask('create-token', email).strip()}"
    }


@pytest.fixture
def import_state(run_flask):
    """A function that imports a state file, given as Python values."""

    def run(state, *members):
        options = [word for member in members for word in ("--member", member)]
        return run_flask("import-project", "-", *options, input=json.dumps(state))

    return run


@pytest.fixture
def set_columns(app):
    """A function that sets columns of the row with an id, which no command does."""

    def run(model, row_id, **values):
        with app.app_context(), db.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("BEGIN READ WRITE")
            connection.execute(update(model).where(model.id == row_id).values(values))
            connection.commit()

    return run


@pytest.fixture
def dump(app):
    """A function that returns all rows of all tables."""

    def run():
        with app.app_context():
            return {
                model.__name__: {
                    row["id"]: dict(row)
                    for row in db.session.execute(db.select(model.__table__)).mappings()
                }
                for model in (Project, Workflow, Job, User, ProjectUser, UserToken)
            }

    return run


@pytest.fixture(scope="session")
def new_state():
    """A function that creates the state of a new project with two jobs per workflow."""

    def make(jobs=3, **project):
        bodies = [
            {"id": str(uuid4()), "name": f"Job {n}", "body": f"fn({n});"}
            for n in range(jobs)
        ]
        pairs = [bodies[n : n + 2] for n in range(0, jobs, 2)]
        workflows = [
            {"id": str(uuid4()), "name": f"Workflow {n}", "jobs": pair}
            for n, pair in enumerate(pairs)
        ]
        return {"id": str(uuid4()), "name": "Project", "workflows": workflows} | project

    return make


@pytest.fixture(scope="session")
def seeded(sqlite_tables, new_state):
    """The rows of ``seed`` by table, which the commands created once, and its ids."""
    path = sqlite_tables.with_name("seeded.db")
    copyfile(sqlite_tables, path)
    app = create_app({"DATABASE_URL": f"sqlite:///{path}"})
    ours, theirs = new_state(), new_state()
    for state, email in (ours, "you@example.org"), (theirs, "they@example.org"):
        command = ["import-project", "-", "--member", email]
        run_command(app, *command, input=json.dumps(state))
    token = run_command(app, "create-token", "you@example.org").strip()
    with app.app_context():
        with db.engine.connect() as connection:
            rows = {
                table: connection.execute(db.select(table)).mappings().all()
                for table in db.metadata.sorted_tables
            }
        db.engine.dispose()
    job_ids = [job["id"] for workflow in ours["workflows"] for job in workflow["jobs"]]
    names = SimpleNamespace(
        auth_header={"Authorization": f"Bearer {token}"},
        state=ours,
        project_id=ours["id"],
        workflow_id=ours["workflows"][0]["id"],
        job_ids=job_ids,
        foreign_project_id=theirs["id"],
        foreign_job_id=theirs["workflows"][0]["jobs"][0]["id"],
    )
    return rows, names


@pytest.fixture
def seed(app, seeded):
    """Two projects; the user of ``auth_header`` is a member of only the first."""
    rows, names = seeded
    with app.app_context(), write_transaction():
        for table in rows:
            db.session.execute(insert(table), rows[table])
    return copy.deepcopy(names)


@pytest.fixture
def paths(seed):
    """A path of each job route."""
    project, job = seed.project_id, seed.job_ids[0]
    return [
        "/api/jobs",
        f"/api/projects/{project}/jobs",
        f"/api/jobs/{job}",
        f"/api/projects/{project}/jobs/{job}",
    ]


def files_in_image():
    """Yield what the Dockerfile copies; the last rule that matches a name decides."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = re.findall(
        r"^COPY (.*) \./$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    for name in os.listdir(ROOT):
        rules = [rule for rule in ignored if fnmatch(name, rule.removeprefix("!"))]
        is_sent = not rules or rules[-1].startswith("!")
        if is_sent and any(fnmatch(name, form) for form in " ".join(copied).split()):
            yield name


@pytest.fixture
def checkout(tmp_path):
    """A folder with only what the image has, which tests can change."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    # copy2 keeps the times of files, by which make knows if it must install libraries.
    for name in files_in_image():
        copy2(ROOT / name, folder)
    return folder


def wait_until(condition, seconds=TIMEOUT):
    """Wait until a condition is true; an error of a connection counts as false."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError, HTTPException):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError(f"not in {seconds} seconds")


def free_port():
    """Return a port without a listener, outside of the range that clients use."""
    while True:
        with suppress(OSError):
            port = randrange(20_000, 32_000)
            with socket.create_server(("127.0.0.1", port)):
                return port


class Server:
    """A gunicorn on a free port of 127.0.0.1, with the project's configuration."""

    def __init__(self, database_url, log_path, *options, folder=ROOT, **variables):
        self.database_url, self.log_path, self.log_start = database_url, log_path, 0
        self.prefix = variables.get("SCRIPT_NAME", "")
        # The server must not inherit settings from the environment of the tests.
        variables = {
            "DATABASE_URL": database_url,
            "JOBS_TEST_RUN": RUN_ID,
            "PATH": os.environ["PATH"],
        } | variables
        command = ["gunicorn", "--bind", "127.0.0.1:0", *options, "wsgi:app"]
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=folder,
                env=variables,
                stderr=log,
                stdout=log,
            )

    def wait_until_it_responds(self):
        """Read the port from the log, and wait for a first response."""

        def is_listening():
            assert self.process.poll() is None, self.log()
            return re.search(r"Listening at: http://127.0.0.1:(\d+)[ ,]", self.log())

        wait_until(is_listening)
        self.port = int(is_listening()[1])
        wait_until(lambda: self.get("/api/openapi.json").status)

    def get(self, path, headers=None, method="GET"):
        """Send a request on a new connection; return the response with its ``body``."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        with closing(connection):
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            response.body = response.read()
            return response

    def connect(self):
        """Return a new connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)

    def send(self, request):
        """Send raw bytes, and return what the server sends until it disconnects."""
        with self.connect() as connection:
            connection.sendall(request)
            # The server may have closed the connection already.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def workers(self):
        """Return the ids of the worker processes."""
        pid = self.process.pid
        return [
            int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def log(self):
        """Return the log since the start of the server or of the test."""
        return self.log_path.read_bytes()[self.log_start :].decode()

    def stop(self):
        """Stop the server as an operator does; it must exit within 30 seconds."""
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@contextmanager
def running_server(database_url, log_path, *options, **variables):
    """Start a server, yield it when it responds, and stop it at the end."""
    server = Server(database_url, log_path, *options, **variables)
    try:
        server.wait_until_it_responds()
        yield server
    finally:
        server.stop()


@pytest.fixture
def start_server(database_url, tmp_path):
    """A function that starts a server with options and environment variables."""
    with ExitStack() as servers:

        def start(*options, **variables):
            log_path = tmp_path / f"gunicorn-{uuid4()}.log"
            url = variables.pop("DATABASE_URL", database_url)
            server = running_server(url, log_path, *options, **variables)
            return servers.enter_context(server)

        yield start


@pytest.fixture(scope="session")
def shared_server(request, tmp_path_factory, sqlite_tables):
    """The server of all tests that ``with_shared_server`` gives the same options."""
    folder = tmp_path_factory.mktemp("served")
    copyfile(sqlite_tables, folder / "jobs.db")
    url, log_path = f"sqlite:///{folder}/jobs.db", folder / "gunicorn.log"
    options, *variables = request.param
    options = [*options.split(), "--keep-alive", "300", "--access-logfile", "-"]
    with running_server(url, log_path, *options, **dict(variables)) as server:
        yield server


@pytest.fixture
def server(shared_server, database_url):
    """The shared server with the log of this test, which must leave it healthy."""
    shared_server.log_start = shared_server.log_path.stat().st_size
    yield shared_server
    assert shared_server.get(f"{shared_server.prefix}/health_check").status == 200
