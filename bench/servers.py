"""Start gunicorn on 127.0.0.1, send single requests, and read memory sizes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import NamedTuple

from data import CACHE, ROOT


class Server(NamedTuple):
    """A running gunicorn: the process id of its master, and its port."""

    pid: int
    port: int


@contextmanager
def gunicorn(
    app: str, *options: str, folder: Path = ROOT, **environment: str
) -> Iterator[Server]:
    """Serve the app from its folder with two workers until the block is left."""
    # SIGTERM raises SystemExit here, so that the finally block stops the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = CACHE / f"{folder.resolve().name}-{app.partition(':')[0]}.log"
    command = [sys.executable, "-m", "gunicorn", "--workers", "2", *options]
    command += ["--bind", f"127.0.0.1:{port}", app]
    environment = os.environ | environment
    environment.pop("GUNICORN_CMD_ARGS", None)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        wait_for_response(process, port, log)
        yield Server(process.pid, port)
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_response(process: subprocess.Popen, port: int, log: Path) -> None:
    """Wait for the first response of the server; raise SystemExit if none comes."""
    for _ in range(2000):
        if process.poll() is not None:
            break
        try:
            request(port, "/")
        except OSError:
            time.sleep(0.01)
        else:
            return
    raise SystemExit(f"gunicorn did not start:\n{log.read_text().strip()}")


def request(
    port: int, path: str, method: str = "GET", **headers: str
) -> tuple[HTTPResponse, bytes]:
    """Send one request on a new connection; return the response and its body."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers={"Connection": "close"} | headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def worker_memory(server: Server) -> dict[int, float]:
    """Return the proportional set size of each worker in MB, by its process id."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    return {pid: process_memory(pid) for pid in map(int, children.split())}


def process_memory(pid: int) -> float:
    """Return the proportional set size of a process in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    line = next(line for line in lines if line.startswith("Pss:"))
    return int(line.split()[1]) / 1024
