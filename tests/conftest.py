"""Fixtures: databases of both kinds, the service with rows to read, and gunicorn."""

import json
import os
from contextlib import ExitStack
from functools import partial
from shutil import copy2, copyfile
from tempfile import gettempdir
from types import SimpleNamespace
from uuid import uuid4

import psycopg
import pytest
from servers import ROOT, files_in_image, running_server
from sqlalchemy import create_engine, insert, make_url, text

from admin import write_transaction
from app import create_app
from database import db

# Hypothesis stores tables of characters, which take seconds to create, in this folder.
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{gettempdir()}/hypothesis"


def pytest_xdist_auto_num_workers(config):
    """Return two processes per core, since many tests wait, but none on one core."""
    return os.cpu_count() * 2 if os.cpu_count() > 1 else 0


def pytest_collection_modifyitems(items):
    """Begin with files that have tests which start processes: they take the longest."""
    slow = {"checkout", "hosts", "start_server"}
    items.sort(key=lambda item: slow.isdisjoint(item.fixturenames))


def pytest_generate_tests(metafunc):
    """Run a test on both databases, unless it has the mark of one."""
    if "database_url" in metafunc.fixturenames:
        both = ("sqlite", "postgresql")
        marked = [kind for kind in both if metafunc.definition.get_closest_marker(kind)]
        metafunc.parametrize("database_url", marked or both, indirect=True)


@pytest.fixture(scope="session")
def postgresql_server():
    """A connection to the server that TEST_DATABASE_URL names."""
    url = os.environ.get("TEST_DATABASE_URL")
    if not url:
        assert not os.environ.get("CI"), "CI must set TEST_DATABASE_URL"
        pytest.skip("needs TEST_DATABASE_URL, the URL of a PostgreSQL server")
    with psycopg.connect(url, autocommit=True) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_url(postgresql_server):
    """The URL of a PostgreSQL database that only this process uses."""
    name = f"jobs_test_{uuid4().hex[:12]}"
    postgresql_server.execute(f"CREATE DATABASE {name}")
    url = make_url(os.environ["TEST_DATABASE_URL"]).set(database=name)
    yield url.render_as_string(hide_password=False)
    postgresql_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def sqlite_tables(tmp_path_factory):
    """A SQLite file with empty tables; a copy is faster than creating tables again."""
    path = tmp_path_factory.mktemp("tables") / "jobs.db"
    run_command(create_app({"DATABASE_URL": f"sqlite:///{path}"}), "init-db")
    return path


@pytest.fixture
def database_url(request, tmp_path):
    """The URL of a database with empty tables, of each kind."""
    if request.param == "sqlite":
        path = tmp_path / "jobs.db"
        copyfile(request.getfixturevalue("sqlite_tables"), path)
        return f"sqlite:///{path}"
    url = request.getfixturevalue("postgresql_url")
    with psycopg.connect(url, autocommit=True) as connection:
        query = "SELECT table_name, column_name FROM information_schema.columns"
        found = connection.execute(f"{query} WHERE table_schema = 'public'").fetchall()
        tables = db.metadata.tables.values()
        if {*found} == {(t.name, column.name) for t in tables for column in t.columns}:
            connection.execute("DELETE FROM users; DELETE FROM projects")
        else:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
            run_command(create_app({"DATABASE_URL": url}), "init-db")
    return url


@pytest.fixture
def execute(database_url):
    """A function that runs SQL without the service, and returns the rows."""
    url = database_url.replace("postgresql:", "postgresql+psycopg:")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")

    def run(sql, **values):
        with engine.connect() as connection:
            result = connection.execute(text(sql), values)
            return result.all() if result.returns_rows else None

    yield run
    engine.dispose()


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
def app(make_app):
    """The service on a database whose tables are empty."""
    return make_app()


@pytest.fixture
def client(app):
    """A client that sends no credentials, unless a test passes them."""
    return app.test_client()


def run_command(app, *args, **options):
    """Run a ``flask`` command that must succeed, and return what it prints."""
    result = app.test_cli_runner().invoke(args=args, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def run_flask(app):
    """A function that runs a command that must succeed, and returns what it prints."""
    return partial(run_command, app)


@pytest.fixture
def fail_flask(app):
    """A function that runs a command that must fail, and returns the error lines."""

    def run(*args, **options):
        result = app.test_cli_runner().invoke(args=args, **options)
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        # An exception other than SystemExit would be a traceback.
        assert isinstance(result.exception, SystemExit)
        return result.stderr.removeprefix("Error: ").splitlines()

    return run


@pytest.fixture
def auth_header(run_flask):
    """A function that creates a token of a user and returns it as a header."""

    def run(email):
        return {"Authorization": f"Bearer {run_flask('create-token', email).strip()}"}

    return run


@pytest.fixture
def import_state(run_flask):
    """A function that imports a state file, given as Python values."""

    def run(state, *members):
        options = [f"--member={member}" for member in members]
        return run_flask("import-project", "-", *options, input=json.dumps(state))

    return run


@pytest.fixture
def dump(execute):
    """A function that returns all rows of all tables, by table and id."""

    def rows_of(table):
        rows = execute(f"SELECT * FROM {table}")
        return {str(row.id): row._asdict() for row in rows}

    return lambda: {table: rows_of(table) for table in db.metadata.tables}


@pytest.fixture(scope="session")
def new_state():
    """A function that creates the state of a new project with two jobs per workflow."""

    def make(jobs=3, **project):
        bodies = [
            {"id": str(uuid4()), "name": f"Job {n}", "body": f"fn({n});"}
            for n in range(jobs)
        ]
        workflows = [
            {"id": str(uuid4()), "name": f"Workflow {n}", "jobs": bodies[n : n + 2]}
            for n in range(0, jobs, 2)
        ]
        return {"id": str(uuid4()), "name": "Project", "workflows": workflows} | project

    return make


@pytest.fixture(scope="session")
def seeded(sqlite_tables, new_state):
    """A SQLite file with the caller's project and a foreign one, its rows and names."""
    path = sqlite_tables.with_name("seeded.db")
    copyfile(sqlite_tables, path)
    app = create_app({"DATABASE_URL": f"sqlite:///{path}"})
    own, foreign = new_state(), new_state()
    for state, email in (own, "you@example.org"), (foreign, "they@example.org"):
        command = ["import-project", "-", "--member", email]
        run_command(app, *command, input=json.dumps(state))
    token = run_command(app, "create-token", "you@example.org").strip()
    with app.app_context():
        rows = {
            table: db.session.execute(db.select(table)).mappings().all()
            for table in db.metadata.sorted_tables
        }
        db.session.remove()
        db.engine.dispose()
    job_ids = [job["id"] for workflow in own["workflows"] for job in workflow["jobs"]]
    return SimpleNamespace(
        path=path,
        rows=rows,
        auth_header={"Authorization": f"Bearer {token}"},
        token=token,
        project_id=own["id"],
        workflow_id=own["workflows"][0]["id"],
        job_ids=job_ids,
        foreign_project_id=foreign["id"],
        foreign_job_id=foreign["workflows"][0]["jobs"][0]["id"],
        # A path of each job route.
        paths=[
            "/api/jobs",
            f"/api/projects/{own['id']}/jobs",
            f"/api/jobs/{job_ids[0]}",
            f"/api/projects/{own['id']}/jobs/{job_ids[0]}",
        ],
    )


@pytest.fixture
def seed(app, seeded):
    """The names of the two projects, which are in the database of the test."""
    with app.app_context(), write_transaction():
        for table, rows in seeded.rows.items():
            db.session.execute(insert(table), rows)
    return seeded


@pytest.fixture
def seeded_url(seeded, tmp_path):
    """The URL of a copy of the seeded file."""
    copyfile(seeded.path, tmp_path / "jobs.db")
    return f"sqlite:///{tmp_path}/jobs.db"


@pytest.fixture
def checkout(tmp_path):
    """A folder with only what the image has, which tests can change."""
    (tmp_path / "checkout").mkdir()
    # copy2 keeps the times of files, by which make knows if it must install libraries.
    for name in files_in_image():
        copy2(ROOT / name, tmp_path / "checkout")
    return tmp_path / "checkout"


@pytest.fixture
def start_server(tmp_path):
    """A function that starts a server on a database, with options and variables."""
    with ExitStack() as servers:

        def start(url, *options, **variables):
            log_path = tmp_path / f"gunicorn-{uuid4()}.log"
            server = running_server(url, log_path, *options, **variables)
            return servers.enter_context(server)

        yield start


@pytest.fixture(scope="module")
def server(seeded, tmp_path_factory):
    """A server of two workers on a copy of the seeded file, for reading."""
    folder = tmp_path_factory.mktemp("server")
    copyfile(seeded.path, folder / "jobs.db")
    options = ["--workers", "2", "--access-logfile", "-"]
    url, log_path = f"sqlite:///{folder}/jobs.db", folder / "gunicorn.log"
    with running_server(url, log_path, *options) as server:
        yield server
