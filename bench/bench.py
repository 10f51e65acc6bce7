"""Compare the service with two smaller apps and with another version of itself."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any, NamedTuple

from data import (
    CACHE,
    JOB,
    LARGE_PROJECT,
    PROJECT,
    ROOT,
    bearer,
    new_database,
    prepare,
    project_file,
    state_file,
)
from plain_app import COUNT, FIRST_PAGE
from servers import Server, gunicorn, process_memory, request, worker_memory

from app import create_app
from database import db
from project_files import load_project_file

LIBRARIES = (
    "click, flask, flask_sqlalchemy, gevent, marshmallow, orjson, psycopg, "
    "sqlalchemy, sqlalchemy.orm, werkzeug.middleware.proxy_fix, yaml_rs"
)
PATHS = {
    "GET /api/jobs": "/api/jobs",
    "GET /api/jobs?project_id=ID": f"/api/jobs?project_id={PROJECT}",
    "GET /api/jobs/ID": f"/api/jobs/{JOB}",
}
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


class Load(NamedTuple):
    """The results of wrk: requests per second, and milliseconds per request."""

    rate: float
    p50: float
    p99: float


def load(
    server: Server,
    path: str,
    user: str,
    seconds: int,
    clients: int = 1,
    close: bool = True,
) -> Load:
    """Run wrk with clients that close, or keep, their connections after a response."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}", "--timeout=30s"]
    command += ["--latency", "-H", f"Authorization: {bearer(user)}"]
    command += ["-H", "Connection: close"] if close else []
    command.append(f"http://127.0.0.1:{server.port}{path}")
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    errors = re.findall("(?:Non-2xx|Socket errors).*", output)
    if errors:
        raise SystemExit(f"{path}: {'; '.join(errors)}")
    rate = float(re.search(r"Requests/sec: +([\d.]+)", output)[1])
    if not rate:
        raise SystemExit(f"{path}: no response within {seconds} s.")
    times = re.findall(r"(?:50|99)% +([\d.]+)([a-z]+)", output)
    return Load(rate, *(float(number) * UNITS[unit] for number, unit in times))


def timed(call: Callable[[], Any], times: int) -> float:
    """Return the median milliseconds of so many calls in this process."""
    durations = []
    for _ in range(times):
        start = perf_counter()
        call()
        durations.append(perf_counter() - start)
    return median(durations) * 1000


def alternate(rounds: int, *calls: Callable[[], Any]) -> list[tuple]:
    """Make all calls in each round; return the results of each call."""
    return list(zip(*([call() for call in calls] for _ in range(rounds)), strict=True))


def fetch(server: Server, path: str, user: str) -> bytes:
    """Return the body of a response that must be a 200."""
    response, body = request(server.port, path, Authorization=bearer(user))
    if response.status != 200:
        raise SystemExit(f"{path}: {response.status} {body.decode()}")
    return body


def main() -> None:
    """Print the results as one table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--import-jobs", type=int, default=8000)
    parser.add_argument("--database", default="sqlite", help="sqlite or a URL")
    parser.add_argument("--sync", action="store_true", help="use sync workers")
    parser.add_argument("--against", type=Path, help="the directory of another version")
    parser.add_argument("--seconds", type=int, default=3, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.folders = [ROOT, options.against] if options.against else [ROOT]
    options.suffix = f", against {options.against}" if options.against else ""
    if not shutil.which("wrk"):
        raise SystemExit("bench needs wrk in PATH. Install wrk first.")
    # Other processes slow the static app more than the service: the ratios look better.
    load_before = os.getloadavg()[0]
    database = prepare(options.database, options.jobs)
    rows = measure_servers(database, options)
    if options.jobs != 1000:
        rows.append(measure_in_process(database, options))
    for jobs in (1000, options.import_jobs):
        rows.append(measure_import(jobs, options.database, options.rounds))
    rows += measure_import_command(options)
    rows.append(measure_module_import(database))
    rows.append(measure_start(database, options))
    kind = "SQLite" if options.database == "sqlite" else "PostgreSQL"
    workers = "sync" if options.sync else "as shipped"
    conditions = f"workers {workers}, load before {load_before:.1f}"
    print(f"{options.jobs} jobs, {kind}, {conditions}\n")
    print("| | service | compared with | ratio | p50 ms | p99 ms |")
    print("|---|--:|--:|--:|--:|--:|")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def measure_servers(database: str, options: Namespace) -> list[list[str]]:
    """Return the rows that need running servers."""
    workers = ["--worker-class", "sync", "--threads", "1"] if options.sync else []
    serve = partial(gunicorn, "wsgi:app", *workers, DATABASE_URL=database)
    plain = ["plain_app:create_app()", "--pythonpath", "bench", *workers]
    responses = CACHE / "responses"
    responses.mkdir(exist_ok=True)
    with serve() as service:
        for number, path in enumerate(PATHS.values()):
            (responses / str(number)).write_bytes(fetch(service, path, "small"))
        with (
            gunicorn(
                "static_app:app",
                "--no-control-socket",
                folder=ROOT / "bench",
                RESPONSES=str(responses),
            ) as static_app,
            gunicorn(*plain, DATABASE_URL=database) as plain_app,
        ):
            against = options.against
            with serve(folder=against) if against else nullcontext() as other:
                rows = compare_loads(service, static_app, plain_app, other, options)
                rows += measure_keep_alive(service, other, options)
            rows += measure_pages(service, database, options)
            rows.append(measure_large_bodies(service, options))
            servers = service, static_app
            sizes = [[mean(worker_memory(one).values())] for one in servers]
    rows.append(row("PSS per worker, against the static app", "MB", *sizes))
    rows += [measure_memory(serve, number, options) for number in (2, 4)]
    return rows


def compare_loads(
    service: Server,
    static_app: Server,
    plain_app: Server,
    other: Server | None,
    options: Namespace,
) -> list[list[str]]:
    """Compare the small user's requests with those to the other servers."""
    rows = []
    for number, (name, path) in enumerate(PATHS.items()):
        targets = {"the static app": (static_app, f"/{number}")}
        if path == "/api/jobs":
            targets["the plain app"] = plain_app, path
        if other:
            targets[options.against] = other, path
        calls = [
            partial(load, *target, "small", options.seconds, 32)
            for target in ((service, path), *targets.values())
        ]
        loads, *other_loads = alternate(options.rounds, *calls)
        for against, theirs in zip(targets, other_loads, strict=True):
            title = f"{name}, 32 clients, against {against}"
            rates = [[one.rate for one in each] for each in (loads, theirs)]
            rows.append(row(title, "/s", *rates, loads=loads))
    return rows


def measure_keep_alive(
    service: Server, other: Server | None, options: Namespace
) -> list[list[str]]:
    """Measure the small user's list for clients that keep their connections."""
    servers = [service, other] if other else [service]
    target = "/api/jobs", "small", options.seconds, 32, False
    loads = alternate(options.rounds, *(partial(load, one, *target) for one in servers))
    title = f"GET /api/jobs, 32 clients, keep-alive{options.suffix}"
    rates = [[one.rate for one in each] for each in loads]
    p99s = [[one.p99 for one in each] for each in loads]
    rates_row = row(title, "/s", *rates, loads=loads[0])
    return [rates_row, row(f"{title}: p99", "ms", *p99s)]


def measure_memory(
    serve: Callable[..., Any], workers: int, options: Namespace
) -> list[str]:
    """Measure the memory of a master and so many workers after the usual load."""
    sizes = []
    for folder in options.folders:
        with serve("--workers", str(workers), folder=folder) as server:
            load(server, "/api/jobs", "small", options.seconds, 32)
            size = process_memory(server.pid) + sum(worker_memory(server).values())
            sizes.append([size])
    return row(f"PSS of master and {workers} workers{options.suffix}", "MB", *sizes)


def measure_pages(
    service: Server, database: str, options: Namespace
) -> list[list[str]]:
    """Measure pages of all projects; on SQLite, compare them with a plain join."""
    total = json.loads(fetch(service, "/api/jobs", "all"))["meta"]["total_pages"]
    numbers = {"first": 1, "middle": total // 2, "last": total}
    calls = [
        partial(load, service, f"/api/jobs?page={number}", "all", options.seconds)
        for number in numbers.values()
    ]
    title = "GET /api/jobs, all projects, {} page, 1 client"
    is_sqlite = options.database == "sqlite"
    if is_sqlite:
        title += ", against a plain join"
        calls.append(partial(plain_join, database.removeprefix("sqlite:///")))
    loads = alternate(options.rounds, *calls)
    joins = loads.pop() if is_sqlite else ()
    return [
        row(title.format(page), "ms", [one.p50 for one in each], joins, each)
        for page, each in zip(numbers, loads, strict=True)
    ]


def plain_join(file: str) -> float:
    """Return the milliseconds that SQLite needs for the first page and the total."""
    with closing(sqlite3.connect(file)) as connection:
        run, values = connection.execute, {"email": "all@example.org"}
        return timed(
            lambda: [run(one, values).fetchall() for one in (FIRST_PAGE, COUNT)], 10
        )


def measure_large_bodies(service: Server, options: Namespace) -> list[str]:
    """Compare the list of jobs that have bodies of 500 kB with a usual list."""
    calls = [
        partial(load, service, f"/api/jobs?project_id={one}", "two", options.seconds)
        for one in (LARGE_PROJECT, PROJECT)
    ]
    loads = alternate(options.rounds, *calls)
    times = [[one.p50 for one in each] for each in loads]
    return row("list of 500 kB bodies, against a usual one", "ms", *times)


def measure_in_process(database: str, options: Namespace) -> list[str]:
    """Measure the small user's list without a server; compare it with 1,000 jobs."""
    calls = []
    for url in (database, prepare(options.database, 1000)):
        client = create_app({"DATABASE_URL": url}).test_client()
        headers = {"Authorization": bearer("small")}
        get = partial(client.get, "/api/jobs", headers=headers)
        if get().status_code != 200:
            raise SystemExit(f"{url}: the list in process is not a 200.")
        calls.append(partial(timed, get, 100))
    title = f"GET /api/jobs, in process, among {options.jobs} jobs, against 1000"
    return row(title, "ms", *alternate(20, *calls))


def measure_import(jobs: int, database: str, rounds: int) -> list[str]:
    """Compare the import into an empty database with only reading the file."""
    file = state_file(jobs)
    read = partial(timed, partial(load_project_file, file), 1)
    calls = partial(seconds_to_import, file, database), lambda: read() / 1000
    title = f"import of {jobs} new jobs, against reading the file"
    return row(title, "s", *alternate(rounds, *calls))


def seconds_to_import(file: bytes, database: str) -> float:
    """Return the seconds that the command takes in this process, on a new database."""
    with new_database(database) as url:
        app = create_app({"DATABASE_URL": url})
        invoke = app.test_cli_runner().invoke
        invoke(args=["init-db"])
        start = perf_counter()
        result = invoke(args=["import-project", "-"], input=file)
        seconds = perf_counter() - start
        with app.app_context():
            db.engine.dispose()
    if result.exit_code:
        raise SystemExit(f"import-project: {result.output}")
    return seconds


def measure_import_command(options: Namespace) -> list[list[str]]:
    """Measure the time and the peak memory of ``flask import-project``."""
    rows = []
    jobs = options.import_jobs
    for form, content in ("JSON", state_file(jobs)), ("YAML", project_file(jobs)):
        file = CACHE / f"import.{form.lower()}"
        file.write_bytes(content)
        calls = [
            partial(run_import_command, folder, file, options.database)
            for folder in options.folders
        ]
        results = alternate(options.rounds, *calls)
        title = f"flask import-project, {jobs} new jobs in {form}{options.suffix}"
        for unit, values in ("s", 0), ("MB", 1):
            pairs = [[one[values] for one in each] for each in results]
            rows.append(row(title, unit, *pairs))
    return rows


def run_import_command(folder: Path, file: Path, database: str) -> list[float]:
    """Return the seconds and the peak memory in MB of the command in a checkout."""
    flask = [sys.executable, "-m", "flask"]
    command = [sys.executable, "-c", MEASURE_COMMAND, *flask]
    command += ["import-project", file, "--member", "small@example.org"]
    with new_database(database) as url:
        where = {"cwd": folder, "env": os.environ | {"DATABASE_URL": url}}
        subprocess.check_output([*flask, "init-db"], **where)
        return [float(one) for one in subprocess.check_output(command, **where).split()]


def measure_module_import(database: str) -> list[str]:
    """Compare the import of the service with that of its libraries only."""
    calls = [partial(time_to_import, one, database) for one in ("wsgi", LIBRARIES)]
    return row("import wsgi, against its libraries", "ms", *alternate(9, *calls))


def measure_start(database: str, options: Namespace) -> list[str]:
    """Measure the start of two workers."""
    calls = [partial(time_to_first_response, one, database) for one in options.folders]
    title = f"start of two workers{options.suffix}"
    return row(title, "ms", *alternate(options.rounds, *calls))


def time_to_first_response(folder: Path, database: str) -> float:
    """Return the milliseconds from the command to the first response."""
    start = perf_counter()
    with gunicorn("wsgi:app", folder=folder, DATABASE_URL=database):
        return (perf_counter() - start) * 1000


def time_to_import(modules: str, database: str) -> float:
    """Return the milliseconds that an import takes in a new interpreter."""
    code = f"from time import time as t; s = t(); import {modules}; print(t() - s)"
    command, variables = [sys.executable, "-c", code], {"DATABASE_URL": database}
    output = subprocess.check_output(command, cwd=ROOT, env=os.environ | variables)
    return float(output) * 1000


def row(
    title: str,
    unit: str,
    values: Sequence[float],
    others: Sequence[float] = (),
    loads: Sequence[Load] = (),
) -> list[str]:
    """Return a row: medians of the values, the others, the ratios and the loads."""
    cells = [title, f"{format_number(median(values))} {unit}", "", "", "", ""]
    if others:
        ratios = [one / other for one, other in zip(values, others, strict=True)]
        cells[2:4] = f"{format_number(median(others))} {unit}", f"{median(ratios):.2f}"
    if loads:
        _, *times = zip(*loads, strict=True)
        cells[4:] = [format_number(median(one)) for one in times]
    return cells


def format_number(value: float) -> str:
    """Return the number with about three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


if __name__ == "__main__":
    main()
