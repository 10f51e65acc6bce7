import json
import os
from types import SimpleNamespace
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url, update

from app import create_app
from models import db

SERVER = os.environ.get(
    "TEST_DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres"
)


@pytest.fixture(scope="session")
def postgresql_url():
    """A PostgreSQL database of this run's own."""
    try:
        server = psycopg.connect(SERVER, autocommit=True, connect_timeout=3)
    except psycopg.OperationalError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs PostgreSQL, here or at TEST_DATABASE_URL: {error}")
    name = f"jobs_test_{uuid4().hex}"
    server.execute(f"CREATE DATABASE {name}")
    yield make_url(SERVER).set(database=name).render_as_string(hide_password=False)
    server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """An empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    url = request.getfixturevalue("postgresql_url")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url


@pytest.fixture
def make_app(database_url):
    """A function that builds the service on the database, with more configuration."""
    made = []

    def make(**config):
        made.append(create_app({"DATABASE_URL": database_url} | config))
        return made[-1]

    yield make
    for app in made:
        with app.app_context():
            db.engine.dispose()


@pytest.fixture
def empty_app(make_app):
    """The service on a database without tables."""
    return make_app()


@pytest.fixture
def app(empty_app):
    """The service on a database whose tables are empty."""
    empty_app.test_cli_runner().invoke(args=["init-db"])
    return empty_app


@pytest.fixture
def client(app):
    """Requests without credentials, unless a test gives them."""
    return app.test_client()


@pytest.fixture
def runner(app):
    """The ``flask`` commands."""
    return app.test_cli_runner()


@pytest.fixture
def flask(runner):
    """A function that runs a command that must succeed, and gives what it prints."""

    def run(*args, **options):
        result = runner.invoke(args=args, **options)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def bearer(flask):
    """A function that gives a user's credentials as a header."""
    return lambda email: {
        "Authorization": f"Bearer {flask('create-token', email).strip()}"
    }


@pytest.fixture
def import_state(flask):
    """A function that imports a state, given as Python values."""

    def run(state, *members):
        options = [word for member in members for word in ("--member", member)]
        return flask("import-project", "-", *options, input=json.dumps(state))

    return run


@pytest.fixture
def set_columns(app):
    """A function that sets columns of the rows with an id, as no command does."""

    def run(model, row_id, **values):
        with app.app_context(), db.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET TRANSACTION READ WRITE")
            connection.execute(update(model).where(model.id == row_id).values(values))
            connection.commit()

    return run


@pytest.fixture
def new_state():
    """A function that makes the state of a new project, two jobs a workflow."""

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


@pytest.fixture
def seed(new_state, import_state, bearer):
    """Two projects; the bearer is a member of the first alone."""
    ours, theirs = new_state(), new_state()
    import_state(ours, "you@example.org")
    import_state(theirs, "they@example.org")
    job_ids = [job["id"] for workflow in ours["workflows"] for job in workflow["jobs"]]
    return SimpleNamespace(
        bearer=bearer("you@example.org"),
        state=ours,
        project_id=ours["id"],
        workflow_id=ours["workflows"][0]["id"],
        job_ids=job_ids,
        foreign_project_id=theirs["id"],
        foreign_job_id=theirs["workflows"][0]["jobs"][0]["id"],
    )
