"""Compare the service with a plain app and with another version of itself."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime, timedelta
from hashlib import sha256
from http.client import HTTPConnection
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import NAMESPACE_OID, uuid5
from zlib import crc32

import psycopg
import yaml_rs
from sqlalchemy import insert, inspect, make_url
from sqlalchemy.schema import CreateIndex, CreateTable

sys.path.append(str(Path(__file__).resolve().parent.parent))

import admin
import models
from app import create_app
from database import db
from project_files import load_project_file

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".bench"
# Increase this number when the rows change, so that no old database is measured.
DATA_VERSION = 3
BODY = "fn(state => ({ ...state, data: state.data.map(row => row.id) }));\n" * 9
THIS, PLAIN = "this version", "the plain app"
UNITS = {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000}

# Linux counts the memory of the process that starts a command as memory of the command.
# This small process starts it, so that the peak memory is not that of the benchmark.
MEASURE_COMMAND = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
seconds = time.perf_counter() - start
print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


class Server(NamedTuple):
    """A running gunicorn: the process id of its master, and its port."""

    pid: int
    port: int


def main() -> None:
    """Print the conditions, then each row of the table as soon as it is measured."""
    # SIGTERM raises SystemExit, so that the servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = parse_options()
    kind = options.database.partition(":")[0]
    print(f"{options.jobs} jobs, {kind}, load before {os.getloadavg()[0]:.1f}\n")
    database = prepare(options.database, options.jobs)
    header = [THIS, *(f"{name} | ratio" for name in [*options.versions, PLAIN][1:])]
    print(f"| | {' | '.join(header)} |")
    print(f"|---|{'--:|' * (2 * len(header) - 1)}", flush=True)
    compare_requests(database, options)
    for workers in (2, 4):
        titles = [f"PSS of master and {workers} workers, MB"]
        arguments = workers, database, options.seconds
        compare(options, titles, measure_memory, options.versions, *arguments)
    compare_imports(options)


def parse_options() -> Namespace:
    """Return the options, with the versions and the columns of the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--database", default="sqlite", help="sqlite or a URL")
    parser.add_argument("--against", type=Path, help="the directory of another version")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each round")
    parser.add_argument("--jobs", type=int, default=1000, help="200 or more")
    parser.add_argument("--import-jobs", type=int, default=8000)
    options = parser.parse_args()
    if options.jobs < 200:
        parser.error("--jobs must be 200 or more.")
    options.versions = {THIS: ROOT}
    if options.against:
        options.versions[str(options.against)] = options.against
    return options


def compare_requests(database: str, options: Namespace) -> None:
    """Compare lists and jobs on new connections, and lists with keep-alive."""
    project, job = make_id("project", 0), make_id("job", 0)
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(gunicorn(folder, database, "wsgi:app"))
            for name, folder in options.versions.items()
        }
        plain_app = "plain_app:create_app()", "--pythonpath", "bench"
        plain = {PLAIN: stack.enter_context(gunicorn(ROOT, database, *plain_app))}
        for title, path, targets in (
            ("GET /api/jobs", "/api/jobs", servers | plain),
            ("GET /api/jobs?project_id=ID", f"/api/jobs?project_id={project}", servers),
            ("GET /api/jobs/ID", f"/api/jobs/{job}", servers),
        ):
            arguments = path, options.seconds, "Connection: close"
            compare(options, [f"{title}, /s"], measure_load, targets, *arguments)
        title = "GET /api/jobs, keep-alive"
        titles = [f"{title}, /s", f"{title}, p99 in ms"]
        arguments = "/api/jobs", options.seconds, "Connection: keep-alive"
        compare(options, titles, measure_load, servers, *arguments)


def compare_imports(options: Namespace) -> None:
    """Compare the time and the peak memory of ``flask import-project``."""
    document = project_file(0, options.import_jobs)
    contents = {"JSON": json.dumps(document), "YAML": yaml_rs.dumps(document) + "\n"}
    for form, content in contents.items():
        file = CACHE / f"project.{form.lower()}"
        file.write_text(content)
        title = f"import of {options.import_jobs} jobs in {form}"
        titles = [f"{title}, s", f"{title}, peak memory in MB"]
        arguments = file, options.database
        compare(options, titles, measure_import, options.versions, *arguments)


def compare(
    options: Namespace,
    titles: Sequence[str],
    measure: Callable[..., list[float]],
    targets: Mapping[str, Any],
    *arguments: Any,
) -> None:
    """Measure each target once a round, and print a row for each title.

    A measurement has a value for each row. A ratio is the median of the rounds' ratios.
    """
    results: dict[str, list[list[float]]] = {name: [] for name in targets}
    for _ in range(options.rounds):
        for name, target in targets.items():
            results[name].append(measure(target, *arguments))
    for index, title in enumerate(titles):
        # Markdown adds empty cells, if the plain app, the last column, is not measured.
        values, *others = [[each[index] for each in results[name]] for name in targets]
        cells = [title, f"{median(values):.1f}"]
        for other_values in others:
            ratios = [a / b for a, b in zip(values, other_values, strict=True)]
            cells += [f"{median(other_values):.1f}", f"{median(ratios):.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def measure_load(server: Server, path: str, seconds: int, header: str) -> list[float]:
    """Run wrk with 32 clients; return requests per second, and p99 in milliseconds."""
    command = ["wrk", "-t1", "-c32", f"-d{seconds}", "--timeout=30s", "--latency"]
    command += ["-H", "Authorization: Bearer small", "-H", header]
    command.append(f"http://127.0.0.1:{server.port}{path}")
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if errors := re.findall("(?:Non-2xx|Socket errors).*", output):
        raise SystemExit(f"{path}: {'; '.join(errors)}")
    rate = re.search(r"Requests/sec: +([\d.]+)", output)[1]
    p99, unit = re.search(r"99% +([\d.]+)([a-z]+)", output).groups()
    return [float(rate), float(p99) * UNITS[unit]]


def measure_memory(folder: Path, workers: int, url: str, seconds: int) -> list[float]:
    """Return the PSS in MB of a new server's master and workers after a load."""
    with gunicorn(folder, url, "wsgi:app", "--workers", str(workers)) as server:
        measure_load(server, "/api/jobs", seconds, "Connection: close")
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
        processes = [server.pid, *children.split()]
        files = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in processes]
        return [sum(int(re.search(r"Pss: +(\d+)", text)[1]) for text in files) / 1024]


def measure_import(folder: Path, file: Path, database: str) -> list[float]:
    """Return the seconds and the peak memory in MB of the import of new jobs."""
    flask = [sys.executable, "-m", "flask"]
    command = [sys.executable, "-c", MEASURE_COMMAND, *flask, "import-project", file]
    command += ["--member", "small@example.org"]
    with empty_database(database) as url:
        where = {"cwd": folder, "env": os.environ | {"DATABASE_URL": url}}
        subprocess.check_output([*flask, "init-db"], **where)
        return [float(one) for one in subprocess.check_output(command, **where).split()]


@contextmanager
def gunicorn(folder: Path, database: str, *arguments: str) -> Iterator[Server]:
    """Serve an app from a folder, with two workers by default, in the block."""
    where = {"cwd": folder, "env": os.environ | {"DATABASE_URL": database}}
    command = [sys.executable, "-m", "gunicorn", "--workers", "2", *arguments]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, number = listener.getsockname()[1], listener.fileno()
        command += ["--log-level", "warning", "--bind", f"fd://{number}"]
        process = subprocess.Popen(command, pass_fds=[number], **where)
    try:
        # This waits for the first response, or raises an error if the server stops.
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", "/")
            connection.getresponse()
        yield Server(process.pid, port)
    finally:
        process.terminate()
        process.wait()


def prepare(database: str, jobs: int) -> str:
    """Return the URL of a database with so many jobs; create it if it is missing."""
    # A checksum of the tables is part of the name, so that a change of the tables leads
    # to a new database.
    tables = db.metadata.sorted_tables
    indexes = [index for table in tables for index in table.indexes]
    statements = [*map(CreateTable, tables), *map(CreateIndex, indexes)]
    definition = f"{DATA_VERSION} {sorted(map(str, statements))}"
    name = f"jobs_bench_{jobs}_{crc32(definition.encode()):08x}"
    CACHE.mkdir(exist_ok=True)
    url = f"sqlite:///{CACHE / name}.db"
    if database != "sqlite":
        url = database_url(database, name)
        with suppress(psycopg.errors.DuplicateDatabase):
            execute(database, f"CREATE DATABASE {name}")
    with create_app({"DATABASE_URL": url}).app_context():
        # Tables and rows come in one transaction: both are there, or neither.
        if not inspect(db.engine).has_table("jobs"):
            print(f"Making {name} …", file=sys.stderr)
            with admin.write_transaction():
                admin.create_tables()
                insert_projects(jobs // 20)
                insert_users(jobs // 20)
        # When the last connection is closed, SQLite moves the rows into the main file.
        db.engine.dispose()
    if database != "sqlite":
        execute(url, "VACUUM ANALYZE")
    return url


@contextmanager
def empty_database(database: str) -> Iterator[str]:
    """Create an empty database, yield its URL, and delete the database at the end."""
    if database == "sqlite":
        with TemporaryDirectory(dir=CACHE) as folder:
            yield f"sqlite:///{folder}/jobs.db"
        return
    name = f"jobs_bench_new_{os.getpid()}"
    execute(database, f"CREATE DATABASE {name}")
    try:
        yield database_url(database, name)
    finally:
        execute(database, f"DROP DATABASE {name} WITH (FORCE)")


def database_url(server: str, name: str) -> str:
    """Return the URL of another database on the same server."""
    return make_url(server).set(database=name).render_as_string(hide_password=False)


def execute(url: str, statement: str) -> None:
    """Execute a statement on PostgreSQL that must not be in a transaction."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


def make_id(kind: str, number: int) -> str:
    """Return a UUID that looks random, always the same for a kind and a number."""
    return str(uuid5(NAMESPACE_OID, f"{kind} {number}"))


def project_file(number: int, jobs: int) -> dict[str, Any]:
    """Return the project file of a project with so many jobs, four in each workflow."""
    steps = [
        {
            "name": f"Job {job}",
            "openfn": {"uuid": make_id("job", job)},
            "adaptor": "@openfn/language-common@latest",
            "expression": BODY,
        }
        for job in range(number * jobs, (number + 1) * jobs)
    ]
    workflows = [
        {
            "name": f"Workflow {step}",
            "openfn": {"uuid": make_id(f"workflow in project {number}", step)},
            "steps": steps[step : step + 4],
        }
        for step in range(0, jobs, 4)
    ]
    uuid = make_id("project", number)
    project = {"name": f"Project {number}", "openfn": {"uuid": uuid}}
    return project | {"schema_version": "4.0", "workflows": workflows}


def insert_projects(projects: int) -> None:
    """Insert projects of 20 jobs."""
    random = Random(0)
    for number in range(projects):
        content = json.dumps(project_file(number, 20)).encode()
        project, workflows, jobs = load_project_file(content)
        for job in jobs:
            # The times are random, so that no list has the order of the insertions.
            created = datetime(2024, 1, 1) + timedelta(days=200) * random.random()
            job |= {"inserted_at": created, "updated_at": created}
        db.session.execute(insert(models.Project), [project])
        db.session.execute(insert(models.Workflow), workflows)
        db.session.execute(insert(models.Job), jobs)


def insert_users(projects: int) -> None:
    """Insert the user who sends the requests and 1,000 others, each in ten projects.

    A user's token is the name. PostgreSQL chooses its plans from statistics, which are
    realistic only with the other users.
    """
    users, tokens, members = [], [], []
    for number, name in enumerate(["small", *(f"other-{n}" for n in range(1, 1001))]):
        owned = {"user_id": make_id("user", number)}
        digest = sha256(name.encode()).digest()
        users.append({"id": owned["user_id"], "email": f"{name}@example.org"})
        tokens.append(owned | {"context": models.HASHED_API_TOKEN, "token": digest})
        for index in range(number * 10, number * 10 + 10):
            project_id = make_id("project", index % projects)
            members.append(owned | {"project_id": project_id, "role": "viewer"})
    db.session.execute(insert(models.User), users)
    db.session.execute(insert(models.UserToken), tokens)
    db.session.execute(insert(models.ProjectUser), members)


if __name__ == "__main__":
    main()
