"""What an operator does with a checkout: start, stop, and reload the service."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from shutil import copy2

import pytest
from load import Load
from servers import ROOT, TIMEOUT, free_port, wait_until

# os.write() writes the line at once, so that other processes cannot split it.
REPORT_IMPORT = """
import os
os.write(2, f"{os.getpid()} runs {__name__}\\n".encode())
"""
SLOW_RESPONSE = """
import os, time
from flask import request
@app.before_request
def wait():
    if request.headers.get("X-Slow"):
        os.write(2, b"has begun\\n")
        time.sleep(1)
"""


@contextmanager
def responses_that_have_begun(server, headers):
    """Send four slow requests, and check at the end that each has its response."""
    before = server.log().count("has begun")
    with ThreadPoolExecutor() as pool:
        slow = headers | {"X-Slow": "1"}
        futures = [pool.submit(server.get, "/api/jobs", slow) for _ in range(4)]
        wait_until(lambda: server.log().count("has begun") == before + len(futures))
        yield
        for future in futures:
            assert json.loads(future.result().body)["data"]


def append(path, text):
    """Add code to a module."""
    with path.open("a") as file:
        file.write(text)


def test_reload_serves_the_new_code_and_loses_no_request(
    start_server, seeded_url, seeded, checkout
):
    """Each new worker imports every module again. Ctrl-C completes responses, too."""
    append(checkout / "wsgi.py", SLOW_RESPONSE)
    server = start_server(seeded_url, "--workers", "2", folder=checkout)
    before = {*server.workers()}
    modules = [path for path in checkout.glob("*.py") if path.stem.isidentifier()]
    for module in modules:
        append(module, REPORT_IMPORT)
    with Load(server, seeded.paths, seeded.auth_header, pause=0.002) as load:
        load.wait_for(50)
        with responses_that_have_begun(server, seeded.auth_header):
            server.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: len(server.workers()) == 2 and not before & {*server.workers()}
        )
        load.wait_for(50)
    assert load.statuses() == {200} and load.disconnected == []
    for worker in server.workers():
        wait_until(lambda worker=worker: f"{worker} runs wsgi" in server.log())
        names = {*re.findall(rf"^{worker} runs (\w+)$", server.log(), re.MULTILINE)}
        assert names == {module.stem for module in modules}
    with responses_that_have_begun(server, seeded.auth_header):
        # A terminal sends SIGINT to the master and to its workers.
        for pid in (server.process.pid, *server.workers()):
            os.kill(pid, signal.SIGINT)
    assert server.process.wait(TIMEOUT) == 0
    assert "Traceback" not in server.log() and "SystemExit" not in server.log()


def test_reload_of_code_that_cannot_be_loaded_stops_the_service(
    start_server, seeded_url, seeded, checkout
):
    """The check, which the unit runs before a reload, exits with an error."""
    append(checkout / "wsgi.py", SLOW_RESPONSE)
    server = start_server(seeded_url, folder=checkout)
    unit = (ROOT / "examples/jobs.service").read_text()
    check, reload = re.findall("^ExecReload=(.*)", unit, re.MULTILINE)
    assert reload == "/bin/kill -HUP $MAINPID"
    command = shlex.split(check.removeprefix("/srv/jobs/.venv/bin/"))
    options = {"cwd": checkout, "env": {}, "stderr": subprocess.DEVNULL}
    append(checkout / "app.py", "broken\n")
    assert subprocess.run([sys.executable, "-m", *command], **options).returncode != 0
    with responses_that_have_begun(server, seeded.auth_header):
        server.process.send_signal(signal.SIGHUP)
    assert server.process.wait(TIMEOUT) == 3
    assert "NameError: name 'broken' is not defined" in server.log()


@contextmanager
def make_serve(folder, port):
    """Run ``make serve``, with its output in the files ``out`` and ``err``."""
    variables = {"PATH": os.environ["PATH"], "PORT": str(port)}
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(
            ["make", "serve"], cwd=folder, env=variables, stdout=out, stderr=err
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(TIMEOUT)


@pytest.fixture
def installed_checkout(checkout):
    """A checkout with a Makefile, in which everything is installed."""
    copy2(ROOT / "Makefile", checkout)
    (checkout / ".venv").symlink_to(sys.prefix)
    return checkout


def test_make_serve_reports_a_taken_port_before_it_creates_anything(installed_checkout):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with make_serve(installed_checkout, port) as process:
            assert process.wait(TIMEOUT) != 0
    line, *rest = (installed_checkout / "err").read_text().splitlines()
    assert str(port) in line and "make serve PORT=" in line
    assert all(line.startswith("make: ") for line in rest)
    assert not (installed_checkout / "instance/jobs.db").exists()


def test_curl_line_of_make_serve_works(installed_checkout):
    with make_serve(installed_checkout, free_port()):
        log = installed_checkout / "err"
        wait_until(lambda: "Booting worker" in log.read_text())
        out = (installed_checkout / "out").read_text()
        [line] = re.findall("^curl .*", out, re.MULTILINE)
        curl = [*shlex.split(line), "--fail", "--retry", "9"]
        output = subprocess.check_output([*curl, "--retry-connrefused"])
    assert json.loads(output)["meta"]["total_entries"] == 3
