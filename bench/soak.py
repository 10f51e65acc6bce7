"""Ask the service for everything, at full load, and count what goes wrong."""

import argparse
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from http.client import HTTPException
from itertools import repeat
from random import Random
from statistics import mean, quantiles
from time import monotonic
from typing import NamedTuple

from data import JOB, LARGE_JOB, LARGE_PROJECT, PROJECT, bearer, make_id, prepare
from servers import Server, ask, gunicorn, memory

CLIENTS = 16
UNKNOWN = make_id("unknown", 0)


class Request(NamedTuple):
    """A request and the status that its answer must have."""

    status: int
    path: str
    method: str = "GET"
    headers: dict[str, str] = {}


def requests(server: Server) -> list[Request]:
    """One request for each route, page and fault that is asked for."""
    small, everything, two = (
        {"Authorization": bearer(user)} for user in ("small", "all", "two")
    )
    project, job = f"/api/projects/{PROJECT}/jobs", f"/api/jobs/{JOB}"
    _, body = ask(server.port, "/api/jobs", **everything)
    last = json.loads(body)["meta"]["total_pages"]
    wanted = [
        Request(200, "/health_check"),
        Request(200, "/api/openapi.json"),
        Request(200, "/api/jobs", "GET", everything),
        Request(200, f"/api/jobs?page={last}", "GET", everything),
        Request(200, f"/api/jobs/{LARGE_JOB}", "GET", two),
        Request(200, f"/api/jobs?project_id={LARGE_PROJECT}", "GET", two),
        Request(401, "/api/jobs"),
        Request(401, job, "GET", {"Authorization": "Bearer wrong"}),
        Request(404, "/nowhere"),
    ]
    for status, path in (
        (200, "/api/jobs"),
        (200, "/api/jobs?page=2"),
        (200, "/api/jobs?page=3&page_size=50"),
        (200, "/api/jobs?page=1000"),
        (200, f"/api/jobs?project_id={PROJECT}"),
        (200, project),
        (200, f"{project}?page=2"),
        (200, job),
        (200, f"{project}/{JOB}"),
        (400, "/api/jobs?page=0"),
        (400, "/api/jobs?projectid=1"),
        (400, "/api/jobs/1"),
        (403, f"/api/jobs/{LARGE_JOB}"),
        (403, f"/api/jobs?project_id={LARGE_PROJECT}"),
        (404, f"/api/jobs/{UNKNOWN}"),
        (404, f"/api/projects/{UNKNOWN}/jobs"),
    ):
        wanted.append(Request(status, path, "GET", small))
    for path in ("/api/jobs", project, job):
        response, _ = ask(server.port, path, **small)
        tag = {"If-None-Match": response.headers["ETag"]}
        wanted.append(Request(304, path, "GET", small | tag))
        wanted.append(Request(200, path, "HEAD", small))
        wanted.append(Request(405, path, "POST", small))
    return wanted


def drive(
    port: int, wanted: list[Request], seconds: float, seed: int
) -> tuple[list[float], Counter[str]]:
    """The milliseconds of each request of one client, and its errors."""
    random, times, errors = Random(seed), [], Counter()
    end = monotonic() + seconds
    while (start := monotonic()) < end:
        request = random.choice(wanted)
        name = f"{request.method} {request.path}"
        try:
            response, _ = ask(port, request.path, request.method, **request.headers)
            if response.status != request.status:
                errors[f"{name}: {response.status}, not {request.status}"] += 1
        except (OSError, HTTPException) as error:
            errors[f"{name}: {error!r}"] += 1
        times.append((monotonic() - start) * 1000)
    return times, errors


def main() -> None:
    """Print one report; exit with 1 where there were errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--database", default="sqlite", help="sqlite or a URL")
    options = parser.parse_args()
    database = prepare(options.database, options.jobs)
    times, errors = [], Counter()
    with gunicorn("wsgi:app", DATABASE_URL=database) as server:
        clients = [repeat(server.port), repeat(requests(server))]
        with ProcessPoolExecutor(CLIENTS) as pool:
            list(pool.map(drive, *clients, repeat(10), range(CLIENTS)))
            before = memory(server)
            seconds = repeat(options.minutes * 60)
            for some, faults in pool.map(drive, *clients, seconds, range(CLIENTS)):
                times += some
                errors += faults
            after = memory(server)
    if before.keys() != after.keys():
        errors["A worker ended."] += 1
    cuts = quantiles(times, n=100)
    print(f"requests  {len(times)}, {len(times) / options.minutes / 60:.0f} a second")
    print(f"errors    {errors.total()}")
    print(f"ms        p50 {cuts[49]:.1f}, p99 {cuts[98]:.1f}, most {max(times):.1f}")
    sizes = [mean(sizes.values()) for sizes in (before, after)]
    print(f"PSS       {sizes[0]:.1f} MB a worker at first, {sizes[1]:.1f} MB at last")
    for error, count in errors.most_common(20):
        print(f"{count:9} {error}")
    raise SystemExit(bool(errors))


if __name__ == "__main__":
    main()
