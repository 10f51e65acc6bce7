"""Create the databases and the files that are measured; each is always the same."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from hashlib import md5, sha256
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID
from zlib import crc32

import psycopg
from sqlalchemy import URL, insert, inspect, make_url, text
from sqlalchemy.schema import CreateIndex, CreateTable

sys.path.append(str(Path(__file__).resolve().parent.parent))

from app import create_app
from database import db, write_transaction
from models import (
    HASHED_API_TOKEN,
    Job,
    Project,
    ProjectUser,
    User,
    UserToken,
    Workflow,
)

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".bench"
MIN_JOBS = 200
# Increase this number when the rows change, so that no old database is measured.
VERSION = 2
LINE = "fn(state => ({ ...state, data: state.data.map(row => row.id) }));\n"
BODY, LARGE_BODY = (LINE * 10_000)[:600], (LINE * 10_000)[:500_000]


def make_id(kind: str, name: int | str) -> str:
    """Return a UUID that looks random, always the same for a kind and a name."""
    return str(UUID(bytes=md5(f"{kind} {name}".encode()).digest(), version=4))


def bearer(user: str) -> str:
    """Return the Authorization header of a user: small, all, or two."""
    return f"Bearer bench-token-of-the-user-{user}"


PROJECT, JOB = make_id("project", 0), make_id("job", 0)
LARGE_PROJECT, LARGE_JOB = make_id("project", -1), make_id("job", -1)


def prepare(database: str, jobs: int) -> str:
    """Return the URL of a database with so many jobs; create it if it is missing."""
    if jobs < MIN_JOBS:
        raise SystemExit(f"--jobs must be {MIN_JOBS} or more.")
    CACHE.mkdir(exist_ok=True)
    server = server_url(database)
    # A checksum of the tables is part of the name, so that a change of the tables leads
    # to a new database.
    dialect = server.get_dialect()()
    tables = db.metadata.sorted_tables
    indexes = sorted((i for t in tables for i in t.indexes), key=lambda i: i.name)
    statements = [*map(CreateTable, tables), *map(CreateIndex, indexes)]
    ddl = "".join(str(one.compile(dialect=dialect)) for one in statements)
    name = f"jobs_bench_{jobs}_{crc32(f'{VERSION} {ddl}'.encode()):08x}"
    if database == "sqlite":
        url = server.set(database=str(CACHE / f"{name}.db"))
    else:
        url = server.set(database=name)
        with connect(server) as connection:
            query = f"SELECT 1 FROM pg_database WHERE datname = '{name}'"
            if not connection.execute(query).fetchone():
                connection.execute(f"CREATE DATABASE {name}")
    database = url.render_as_string(hide_password=False)
    with create_app({"DATABASE_URL": database}).app_context():
        # Tables and rows come in one transaction: both are there, or neither.
        if not inspect(db.engine).has_table("jobs"):
            print(f"Making {name} …", file=sys.stderr)
            with write_transaction():
                fill(jobs // 20)
            if db.engine.dialect.name == "postgresql":
                with connect(url) as connection:
                    connection.execute("VACUUM ANALYZE")
        db.engine.dispose()
    return database


@contextmanager
def new_database(database: str) -> Iterator[str]:
    """Create an empty database, yield its URL, and delete it after the block."""
    if database == "sqlite":
        CACHE.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=CACHE) as folder:
            yield f"sqlite:///{folder}/jobs.db"
        return
    server, name = server_url(database), f"jobs_bench_new_{os.getpid()}"
    with connect(server) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield server.set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def server_url(database: str) -> URL:
    """Return the URL of SQLite, or of a PostgreSQL server and one of its databases."""
    if database == "sqlite":
        return make_url("sqlite://")
    url = make_url(database).set(drivername="postgresql")
    return url.set(database=url.database or "postgres")


def connect(url: URL) -> psycopg.Connection:
    """Connect to PostgreSQL in autocommit mode."""
    return psycopg.connect(url.render_as_string(hide_password=False), autocommit=True)


def fill(projects: int) -> None:
    """Create the tables, projects of 20 jobs, and project -1 with large bodies."""
    if db.engine.dialect.name == "sqlite":
        db.session.execute(text("PRAGMA cache_size = -1000000"))
    db.metadata.create_all(db.session.connection())
    numbers = range(-1, projects)
    rows = ({"id": make_id("project", n), "name": f"Project {n}"} for n in numbers)
    insert_rows(Project, rows)
    members = {"small": range(10), "all": numbers, "two": (-1, 0)}
    # These users have 10 projects each. Without them, PostgreSQL would choose plans for
    # users with thousands of projects.
    for user in range(1000):
        members[f"other-{user}"] = [(user * 10 + n) % projects for n in range(10)]
    for user, numbers in members.items():
        owned = {"user_id": make_id("user", user)}
        digest = sha256(bearer(user).removeprefix("Bearer ").encode()).digest()
        insert_rows(User, [{"id": owned["user_id"], "email": f"{user}@example.org"}])
        insert_rows(UserToken, [owned | {"token": digest, "context": HASHED_API_TOKEN}])
        member = owned | {"role": "viewer"}
        rows = (member | {"project_id": make_id("project", n)} for n in numbers)
        insert_rows(ProjectUser, rows)
    rows = (
        {
            "id": make_id("workflow", n),
            "name": f"Workflow {n}",
            "project_id": make_id("project", n // 5),
        }
        for n in range(-5, projects * 5)
    )
    insert_rows(Workflow, rows)
    insert_rows(Job, (make_job(n) for n in range(-20, projects * 20)))


def make_job(number: int) -> dict[str, Any]:
    """Return the row of a job; each workflow has four jobs."""
    # The times are random, so that jobs are not inserted in the order of a list.
    time = datetime(2024, 1, 1) + timedelta(days=200) * Random(number).random()
    return {
        "id": make_id("job", number),
        "name": f"Job {number}",
        "workflow_id": make_id("workflow", number // 4),
        "inserted_at": time,
        "updated_at": time,
        "body": LARGE_BODY if number < 0 else BODY,
    }


def insert_rows(model: type, rows: Iterable[dict[str, Any]]) -> None:
    """Insert rows in batches of 5,000."""
    rows = iter(rows)
    while batch := list(islice(rows, 5000)):
        db.session.execute(insert(model.__table__), batch)


def state_file(jobs: int) -> bytes:
    """Return the state file of a project with so many jobs, four per workflow."""
    project = {"id": make_id("project", 0), "name": "Project 0", "workflows": {}}
    for number in range(0, jobs, 4):
        project["workflows"][f"workflow-{number // 4}"] = {
            "id": make_id("workflow", number // 4),
            "name": f"Workflow {number // 4}",
            "jobs": {
                f"job-{n}": {
                    "id": make_id("job", n),
                    "name": f"Job {n}",
                    "adaptor": "@openfn/language-common@latest",
                    "body": BODY,
                }
                for n in range(number, min(number + 4, jobs))
            },
        }
    return json.dumps(project).encode()


def project_file(jobs: int) -> bytes:
    """Return the project of ``state_file`` as a project file in YAML."""
    lines = ["id: project-0", "name: Project 0", "schema_version: '4.0'"]
    lines += ["openfn:", f"  uuid: {make_id('project', 0)}", "workflows:"]
    for number in range(jobs):
        if number % 4 == 0:
            lines += [f"  - name: Workflow {number // 4}", "    openfn:"]
            lines += [f"      uuid: {make_id('workflow', number // 4)}", "    steps:"]
        lines += [f"      - name: Job {number}", "        openfn:"]
        lines += [f"          uuid: {make_id('job', number)}"]
        lines += ["        adaptor: '@openfn/language-common@latest'"]
        lines += ["        expression: |-"]
        lines += [f"          {line}" for line in BODY.splitlines()]
    return "\n".join([*lines, ""]).encode()
