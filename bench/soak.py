"""Send every kind of request at full load, and count the wrong responses."""

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
from servers import Server, gunicorn, request, worker_memory

CLIENTS = 16
UNKNOWN = make_id("unknown", 0)


class Expected(NamedTuple):
    """A request and the status that its response must have."""

    status: int
    path: str
    method: str = "GET"
    headers: dict[str, str] = {}


def expected_requests(server: Server) -> list[Expected]:
    """Return a request for each route, each kind of page and each kind of error."""
    small, everything, two = (
        {"Authorization": bearer(user)} for user in ("small", "all", "two")
    )
    project, job = f"/api/projects/{PROJECT}/jobs", f"/api/jobs/{JOB}"
    _, body = request(server.port, "/api/jobs", **everything)
    last = json.loads(body)["meta"]["total_pages"]
    wanted = [
        Expected(200, "/health_check"),
        Expected(200, "/api/openapi.json"),
        Expected(200, "/api/jobs", "GET", everything),
        Expected(200, f"/api/jobs?page={last}", "GET", everything),
        Expected(200, f"/api/jobs/{LARGE_JOB}", "GET", two),
        Expected(200, f"/api/jobs?project_id={LARGE_PROJECT}", "GET", two),
        Expected(401, "/api/jobs"),
        Expected(401, job, "GET", {"Authorization": "Bearer wrong"}),
        Expected(404, "/nowhere"),
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
        wanted.append(Expected(status, path, "GET", small))
    for path in ("/api/jobs", project, job):
        response, _ = request(server.port, path, **small)
        tag = {"If-None-Match": response.headers["ETag"]}
        wanted.append(Expected(304, path, "GET", small | tag))
        wanted.append(Expected(200, path, "HEAD", small))
        wanted.append(Expected(405, path, "POST", small))
    return wanted


def send_requests(
    port: int, wanted: list[Expected], seconds: float, seed: int
) -> tuple[list[float], Counter[str]]:
    """Send requests as one client; return the milliseconds of each, and the errors."""
    random, times, errors = Random(seed), [], Counter()
    end = monotonic() + seconds
    while (start := monotonic()) < end:
        status, path, method, headers = random.choice(wanted)
        name = f"{method} {path}"
        try:
            response, _ = request(port, path, method, **headers)
            if response.status != status:
                errors[f"{name}: {response.status}, not {status}"] += 1
        except (OSError, HTTPException) as error:
            errors[f"{name}: {error!r}"] += 1
        times.append((monotonic() - start) * 1000)
    return times, errors


def main() -> None:
    """Print one report; exit with 1 if there were errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--database", default="sqlite", help="sqlite or a URL")
    options = parser.parse_args()
    database = prepare(options.database, options.jobs)
    times, errors = [], Counter()
    with gunicorn("wsgi:app", DATABASE_URL=database) as server:
        clients = [repeat(server.port), repeat(expected_requests(server))]
        with ProcessPoolExecutor(CLIENTS) as pool:
            list(pool.map(send_requests, *clients, repeat(10), range(CLIENTS)))
            before = worker_memory(server)
            seconds = repeat(options.minutes * 60)
            results = pool.map(send_requests, *clients, seconds, range(CLIENTS))
            for client_times, client_errors in results:
                times += client_times
                errors += client_errors
            after = worker_memory(server)
    if before.keys() != after.keys():
        errors["A worker stopped."] += 1
    cuts = quantiles(times, n=100)
    print(f"requests  {len(times)}, {len(times) / options.minutes / 60:.0f} a second")
    print(f"errors    {errors.total()}")
    print(f"ms        p50 {cuts[49]:.1f}, p99 {cuts[98]:.1f}, max {max(times):.1f}")
    sizes = [mean(sizes.values()) for sizes in (before, after)]
    print(
        f"PSS       {sizes[0]:.1f} MB a worker at the start, {sizes[1]:.1f} at the end"
    )
    for error, count in errors.most_common(20):
        print(f"{count:9} {error}")
    raise SystemExit(bool(errors))


if __name__ == "__main__":
    main()
