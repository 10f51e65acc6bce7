"""Measure the service beside a bare Flask app that returns the same bytes."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from statistics import mean, median
from typing import NamedTuple

from data import CACHE, JOB, LARGE_PROJECT, PROJECT, ROOT, bearer, prepare
from servers import Server, ask, gunicorn, memory

LIBRARIES = (
    "click, flask, flask_sqlalchemy, marshmallow, sqlalchemy, sqlalchemy.orm, "
    "werkzeug.middleware.proxy_fix"
)
LISTS = {
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


def load(server: Server, path: str, user: str, seconds: int, clients: int) -> Load:
    """The load of so many clients, each request on a new connection."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}", "--latency"]
    for header in ("Connection: close", f"Authorization: {bearer(user)}"):
        command += ["-H", header]
    command.append(f"http://127.0.0.1:{server.port}{path}")
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    faults = re.findall("(?:Non-2xx|Socket errors).*", output)
    if faults:
        raise SystemExit(f"{path}: {'; '.join(faults)}")
    rate = float(re.search(r"Requests/sec: +([\d.]+)", output)[1])
    if not rate:
        raise SystemExit(f"{path}: no answer within {seconds} s.")
    times = dict(re.findall(r"(50|99)% +([\d.]+[a-z]+)", output))
    return Load(rate, milliseconds(times["50"]), milliseconds(times["99"]))


def milliseconds(duration: str) -> float:
    """A duration as wrk writes it, such as 1.25ms."""
    number, unit = re.fullmatch(r"([\d.]+)([a-z]+)", duration).groups()
    return float(number) * UNITS[unit]


def fetch(server: Server, path: str, user: str) -> bytes:
    """The body of an answer that must be a 200."""
    response, body = ask(server.port, path, Authorization=bearer(user))
    if response.status != 200:
        raise SystemExit(f"{path}: {response.status} {body.decode()}")
    return body


def import_time(modules: str, database: str) -> float:
    """The milliseconds that an import takes in a fresh interpreter."""
    code = f"from time import time as t; s = t(); import {modules}; print(t() - s)"
    output = subprocess.check_output(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": database},
    )
    return float(output) * 1000


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--database", default="sqlite", help="sqlite or a URL")
    parser.add_argument("--sync", action="store_true", help="sync workers, one thread")
    parser.add_argument("--seconds", type=int, default=3, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not shutil.which("wrk"):
        raise SystemExit("bench needs wrk: install it, and see that it is in PATH.")
    # Other work costs the ceiling more than the service, and so flatters the ratios.
    before = os.getloadavg()[0]
    database = prepare(options.database, options.jobs)
    answers = CACHE / "answers"
    answers.mkdir(exist_ok=True)
    threads = ["--worker-class", "sync", "--threads", "1"] if options.sync else []
    with gunicorn("wsgi:app", *threads, DATABASE_URL=database) as service:
        for number, path in enumerate(LISTS.values()):
            (answers / str(number)).write_bytes(fetch(service, path, "small"))
        with gunicorn(
            "ceiling:app",
            "--no-control-socket",
            folder=ROOT / "bench",
            ANSWERS=str(answers),
        ) as ceiling:
            rows = measure(service, ceiling, options.seconds, options.rounds)
    postgresql = database.startswith("postgresql")
    libraries = f"{LIBRARIES}, psycopg" if postgresql else LIBRARIES
    times = [
        (import_time("wsgi", database), import_time(libraries, database))
        for _ in range(9)
    ]
    rows.append(compared("import wsgi, against its libraries", times, "ms"))
    kind = "PostgreSQL" if postgresql else "SQLite"
    workers = "sync" if options.sync else "as shipped"
    print(f"{options.jobs} jobs, {kind}, workers {workers}, load before {before:.1f}\n")
    print("| | service | compared with | ratio | p50 ms | p99 ms |")
    print("|---|--:|--:|--:|--:|--:|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def measure(
    service: Server, ceiling: Server, seconds: int, rounds: int
) -> list[list[str]]:
    """The rows of the table that come from running servers."""
    for number, path in enumerate(LISTS.values()):
        load(ceiling, f"/{number}", "small", 1, 32)
        load(service, path, "small", 1, 32)
    pairs = {name: [] for name in LISTS}
    for _ in range(rounds):
        for number, (name, path) in enumerate(LISTS.items()):
            least = load(ceiling, f"/{number}", "small", seconds, 32)
            pairs[name].append((load(service, path, "small", seconds, 32), least))
    rows = []
    for name, loads in pairs.items():
        rates = [(ours.rate, least.rate) for ours, least in loads]
        row = compared(f"{name}, 32 clients, against the ceiling", rates, "/s")
        p50, p99 = (median(ours[place] for ours, _ in loads) for place in (1, 2))
        rows.append([*row[:4], f"{p50:.1f}", f"{p99:.1f}"])
    last = json.loads(fetch(service, "/api/jobs", "all"))["links"]["last"]
    last = "/api/jobs?" + last.partition("?")[2]
    for name, path in (("first", "/api/jobs"), ("last", last)):
        fetch(service, path, "all")
        one = load(service, path, "all", seconds, 1)
        name = f"GET /api/jobs, all projects, {name} page, 1 client"
        row = [name, f"{one.p50:.1f} ms", "", ""]
        rows.append([*row, f"{one.p50:.1f}", f"{one.p99:.1f}"])
    times = [
        [
            load(service, f"/api/jobs?project_id={id_}", "two", seconds, 1).p50
            for id_ in (LARGE_PROJECT, PROJECT)
        ]
        for _ in range(rounds)
    ]
    rows.append(compared("list of 500 kB bodies, against a usual one", times, "ms"))
    sizes = [mean(memory(server).values()) for server in (service, ceiling)]
    rows.append(compared("PSS a worker, against the ceiling", [sizes], "MB"))
    return rows


def compared(name: str, pairs: list, unit: str) -> list[str]:
    """A row with the medians of ours, of the others, and of their ratios."""
    ours, others = (median(values) for values in zip(*pairs, strict=True))
    ratio = median(one / other for one, other in pairs)
    digits = 0 if ours >= 100 else 1
    values = [f"{value:.{digits}f} {unit}" for value in (ours, others)]
    return [name, *values, f"{ratio:.2f}", "", ""]


if __name__ == "__main__":
    main()
