"""Measure the service beside a bare Flask app that returns the same bytes."""

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
    state_file,
)
from plain_app import COUNT, FIRST_PAGE
from servers import Server, ask, gunicorn, memory

from app import create_app
from database import db
from project_files import read_state

LIBRARIES = (
    "click, flask, flask_sqlalchemy, gevent, marshmallow, orjson, psycopg, "
    "sqlalchemy, sqlalchemy.orm, werkzeug.middleware.proxy_fix, yaml"
)
PATHS = {
    "GET /api/jobs": "/api/jobs",
    "GET /api/jobs?project_id=ID": f"/api/jobs?project_id={PROJECT}",
    "GET /api/jobs/ID": f"/api/jobs/{JOB}",
}
UNITS = {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000}


class Load(NamedTuple):
    """What wrk saw: requests a second, and milliseconds a request."""

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
    """The load of so many clients, which close after each answer or go on."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}", "--timeout=30s"]
    command += ["--latency", "-H", f"Authorization: {bearer(user)}"]
    command += ["-H", "Connection: close"] if close else []
    command.append(f"http://127.0.0.1:{server.port}{path}")
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    faults = re.findall("(?:Non-2xx|Socket errors).*", output)
    if faults:
        raise SystemExit(f"{path}: {'; '.join(faults)}")
    rate = float(re.search(r"Requests/sec: +([\d.]+)", output)[1])
    if not rate:
        raise SystemExit(f"{path}: no answer within {seconds} s.")
    times = re.findall(r"(?:50|99)% +([\d.]+)([a-z]+)", output)
    return Load(rate, *(float(number) * UNITS[unit] for number, unit in times))


def timed(call: Callable[[], Any], times: int) -> float:
    """The median milliseconds of so many calls in this process."""
    durations = []
    for _ in range(times):
        start = perf_counter()
        call()
        durations.append(perf_counter() - start)
    return median(durations) * 1000


def alternate(rounds: int, *calls: Callable[[], Any]) -> list[tuple]:
    """What each call gave in so many rounds; in a round, each has its turn."""
    return list(zip(*([call() for call in calls] for _ in range(rounds)), strict=True))


def fetch(server: Server, path: str, user: str) -> bytes:
    """The body of an answer that must be a 200."""
    response, body = ask(server.port, path, Authorization=bearer(user))
    if response.status != 200:
        raise SystemExit(f"{path}: {response.status} {body.decode()}")
    return body


def main() -> None:
    """Print one table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--database", default="sqlite", help="sqlite or a URL")
    parser.add_argument("--sync", action="store_true", help="sync workers, one thread")
    parser.add_argument("--against", type=Path, help="a checkout with the same tables")
    parser.add_argument("--seconds", type=int, default=3, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not shutil.which("wrk"):
        raise SystemExit("bench needs wrk: install it, and see that it is in PATH.")
    # Other work costs the ceiling more than the service, and so flatters the ratios.
    before = os.getloadavg()[0]
    database = prepare(options.database, options.jobs)
    rows = with_servers(database, options)
    if options.jobs != 1000:
        rows.append(in_process(database, options))
    for jobs in (1000, 8000):
        rows.append(project_import(jobs, options.database, options.rounds))
    rows.append(imports(database))
    rows.append(start(database, options))
    kind = "SQLite" if options.database == "sqlite" else "PostgreSQL"
    workers = "sync" if options.sync else "as shipped"
    print(f"{options.jobs} jobs, {kind}, workers {workers}, load before {before:.1f}\n")
    print("| | service | compared with | ratio | p50 ms | p99 ms |")
    print("|---|--:|--:|--:|--:|--:|")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def with_servers(database: str, options: Namespace) -> list[list[str]]:
    """The rows that need running servers."""
    workers = ["--worker-class", "sync", "--threads", "1"] if options.sync else []
    serve = partial(gunicorn, "wsgi:app", *workers, DATABASE_URL=database)
    plain_app = ["plain_app:create_app()", "--pythonpath", "bench", *workers]
    answers = CACHE / "answers"
    answers.mkdir(exist_ok=True)
    with serve() as service:
        for number, path in enumerate(PATHS.values()):
            (answers / str(number)).write_bytes(fetch(service, path, "small"))
        with (
            gunicorn(
                "static_app:app",
                "--no-control-socket",
                folder=ROOT / "bench",
                ANSWERS=str(answers),
            ) as ceiling,
            gunicorn(*plain_app, DATABASE_URL=database) as floor,
        ):
            against = options.against
            with serve(folder=against) if against else nullcontext() as other:
                rows = side_by_side(service, ceiling, floor, other, options)
            rows.append(keep_alive(service, options))
            rows += pages(service, database, options)
            rows.append(large_bodies(service, options))
            sizes = [[mean(memory(server).values())] for server in (service, ceiling)]
    return [*rows, row("PSS a worker, against the ceiling", "MB", *sizes)]


def side_by_side(
    service: Server,
    ceiling: Server,
    floor: Server,
    other: Server | None,
    options: Namespace,
) -> list[list[str]]:
    """The small user's requests, against the ceiling and the others that can answer."""
    rows = []
    for number, (name, path) in enumerate(PATHS.items()):
        targets = {"the ceiling": (ceiling, f"/{number}")}
        if path == "/api/jobs":
            targets["the plain app"] = floor, path
        if other:
            targets[options.against] = other, path
        calls = [
            partial(load, *target, "small", options.seconds, 32)
            for target in ((service, path), *targets.values())
        ]
        ours, *others = alternate(options.rounds, *calls)
        for against, theirs in zip(targets, others, strict=True):
            title = f"{name}, 32 clients, against {against}"
            rates = [[one.rate for one in loads] for loads in (ours, theirs)]
            rows.append(row(title, "/s", *rates, loads=ours))
    return rows


def keep_alive(service: Server, options: Namespace) -> list[str]:
    """The small user's list for clients that keep their connections."""
    call = partial(load, service, "/api/jobs", "small", options.seconds, 32, False)
    (loads,) = alternate(options.rounds, call)
    rates = [one.rate for one in loads]
    return row("GET /api/jobs, 32 clients, keep-alive", "/s", rates, loads=loads)


def pages(service: Server, database: str, options: Namespace) -> list[list[str]]:
    """Pages of all projects, on SQLite against the first one of a plain join."""
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
        row(title.format(page), "ms", [one.p50 for one in ours], joins, ours)
        for page, ours in zip(numbers, loads, strict=True)
    ]


def plain_join(file: str) -> float:
    """The milliseconds of SQLite itself for the first page and the count of all."""
    with closing(sqlite3.connect(file)) as connection:
        run, values = connection.execute, {"email": "all@example.org"}
        return timed(
            lambda: [run(one, values).fetchall() for one in (FIRST_PAGE, COUNT)], 10
        )


def large_bodies(service: Server, options: Namespace) -> list[str]:
    """The list of a project whose jobs have bodies of 500 kB, against a usual one."""
    calls = [
        partial(load, service, f"/api/jobs?project_id={one}", "two", options.seconds)
        for one in (LARGE_PROJECT, PROJECT)
    ]
    loads = alternate(options.rounds, *calls)
    times = [[one.p50 for one in each] for each in loads]
    return row("list of 500 kB bodies, against a usual one", "ms", *times)


def in_process(database: str, options: Namespace) -> list[str]:
    """The small user's list without a server, against the same among 1,000 jobs."""
    calls = []
    for url in (database, prepare(options.database, 1000)):
        client = create_app({"DATABASE_URL": url}).test_client()
        headers = {"Authorization": bearer("small")}
        get = partial(client.get, "/api/jobs", headers=headers)
        if get().status_code != 200:
            raise SystemExit(f"{url}: no list in process.")
        calls.append(partial(timed, get, 100))
    title = f"GET /api/jobs, in process, among {options.jobs} jobs, against 1000"
    return row(title, "ms", *alternate(20, *calls))


def project_import(jobs: int, database: str, rounds: int) -> list[str]:
    """The import of a project into an empty database, against reading its file."""
    file = state_file(jobs)
    read = partial(timed, partial(read_state, file), 1)
    calls = partial(seconds_to_import, file, database), lambda: read() / 1000
    title = f"import of {jobs} new jobs, against reading the file"
    return row(title, "s", *alternate(rounds, *calls))


def seconds_to_import(file: bytes, database: str) -> float:
    """What the command takes in this process, on a new database each time."""
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


def imports(database: str) -> list[str]:
    """The import of the service, against that of its libraries alone."""
    calls = [partial(import_time, one, database) for one in ("wsgi", LIBRARIES)]
    return row("import wsgi, against its libraries", "ms", *alternate(9, *calls))


def start(database: str, options: Namespace) -> list[str]:
    """The start of the service with two workers, against that of a checkout."""
    folders = [ROOT, *([options.against] if options.against else [])]
    calls = [partial(time_to_answer, folder, database) for folder in folders]
    title = "start of two workers"
    title += f", against {options.against}" if options.against else ""
    return row(title, "ms", *alternate(options.rounds, *calls))


def time_to_answer(folder: Path, database: str) -> float:
    """The milliseconds from the command to a first answer."""
    begin = perf_counter()
    with gunicorn("wsgi:app", folder=folder, DATABASE_URL=database):
        return (perf_counter() - begin) * 1000


def import_time(modules: str, database: str) -> float:
    """The milliseconds that an import takes in a fresh interpreter."""
    code = f"from time import time as t; s = t(); import {modules}; print(t() - s)"
    command, variables = [sys.executable, "-c", code], {"DATABASE_URL": database}
    output = subprocess.check_output(command, cwd=ROOT, env=os.environ | variables)
    return float(output) * 1000


def row(
    title: str,
    unit: str,
    ours: Sequence[float],
    others: Sequence[float] = (),
    loads: Sequence[Load] = (),
) -> list[str]:
    """Medians: of ours, of the others, of each round's ratio, and of the loads."""
    cells = [title, f"{format_number(median(ours))} {unit}", "", "", "", ""]
    if others:
        ratios = [one / other for one, other in zip(ours, others, strict=True)]
        cells[2:4] = f"{format_number(median(others))} {unit}", f"{median(ratios):.2f}"
    if loads:
        _, *times = zip(*loads, strict=True)
        cells[4:] = [format_number(median(one)) for one in times]
    return cells


def format_number(value: float) -> str:
    """A number with about three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


if __name__ == "__main__":
    main()
