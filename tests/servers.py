"""Start gunicorn, send requests to it, and wait for what it does."""

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import randrange
from shutil import which

import pytest

ROOT = Path(__file__).parent.parent

# Tests wait at most this number of seconds for what an idle machine does at once.
TIMEOUT = 90


def wait_until(condition, seconds=TIMEOUT):
    """Wait until a condition is true; an error of a connection counts as false."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError, HTTPException):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError(f"not in {seconds} seconds")


def free_port():
    """Return a port without a listener, outside of the range that clients use."""
    while True:
        with suppress(OSError):
            port = randrange(20_000, 32_000)
            with socket.create_server(("127.0.0.1", port)):
                return port


def find_program(name):
    """Return the path of a program, or skip the test on a machine that lacks it."""
    found = which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if not found:
        assert not os.environ.get("CI"), f"CI must have {name}"
        pytest.skip(f"needs {name}")
    return found


def files_in_image():
    """Yield the names of the files that .dockerignore does not ignore."""
    first, *rules = (ROOT / ".dockerignore").read_text().split()
    assert first == "*" and all(rule.startswith("!") for rule in rules)
    for rule in rules:
        yield from (path.name for path in ROOT.glob(rule[1:]))


class Server:
    """A gunicorn on a free port of 127.0.0.1, with the project's configuration."""

    def __init__(self, url, log_path, *options, folder=ROOT, **variables):
        self.log_path = log_path
        self.prefix = variables.get("SCRIPT_NAME", "")
        # The server must not inherit settings from the environment of the tests.
        variables = {"DATABASE_URL": url, "PATH": os.environ["PATH"]} | variables
        command = ["gunicorn", "--bind", "127.0.0.1:0", *options, "wsgi:app"]
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=folder,
                env=variables,
                stderr=log,
                stdout=log,
            )

    def wait_until_it_responds(self):
        """Read the port from the log, and wait for a first response."""

        def is_listening():
            assert self.process.poll() is None, self.log()
            return re.search(r"Listening at: http://127.0.0.1:(\d+)[ ,]", self.log())

        wait_until(is_listening)
        self.port = int(is_listening()[1])
        wait_until(lambda: self.get(f"{self.prefix}/api/openapi.json").status)

    def get(self, path, headers=None, method="GET"):
        """Send a request on a new connection; return the response with its ``body``."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        with closing(connection):
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            response.body = response.read()
            return response

    def connect(self):
        """Return a new connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)

    def send(self, request):
        """Send raw bytes, and return what the server sends until it disconnects."""
        with self.connect() as connection:
            connection.sendall(request)
            # The server may have closed the connection already.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def workers(self):
        """Return the ids of the worker processes."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in children.split()]

    def log(self):
        """Return the log since the start of the server."""
        return self.log_path.read_text()

    def stop(self):
        """Stop the server as an operator does; it must exit within 30 seconds."""
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@contextmanager
def running_server(url, log_path, *options, **variables):
    """Start a server, yield it when it responds, and stop it at the end."""
    server = Server(url, log_path, *options, **variables)
    try:
        server.wait_until_it_responds()
        yield server
    finally:
        server.stop()
