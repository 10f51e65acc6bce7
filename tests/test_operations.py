"""Test what an operator does: start, stop and reload gunicorn, and read its log."""

import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from shutil import copy2
from urllib.request import urlopen

import pytest
from conftest import (
    ROOT,
    RUN_ID,
    TIMEOUT,
    free_port,
    run_command,
    sqlite_only,
    wait_until,
    with_shared_server,
)
from test_server import Load

from app import create_app
from database import db

LINE = r"\[[-\d]+ [:\d]+ [+-]\d{4}\] \[\d+\] \[[A-Z]+\] .+"


@pytest.fixture
def checkout(checkout):
    """A checkout that ``make serve`` can use, with the libraries of the tests."""
    copy2(ROOT / "Makefile", checkout)
    (checkout / ".venv").symlink_to(sys.prefix)
    return checkout


@contextmanager
def making(target, folder, **variables):
    """Run make, with its output in the files ``out`` and ``err`` of the folder."""
    environment = {"JOBS_TEST_RUN": RUN_ID, "PATH": os.environ["PATH"]} | variables
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(
            ["make", target], cwd=folder, env=environment, stdout=out, stderr=err
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(TIMEOUT)


# os.write() writes the line at once, so that other processes cannot split it.
SLOW_RESPONSE = r"""
import os, time
from flask import request
@app.before_request
def wait():
    if request.path == "/api/jobs":
        os.write(2, b"has begun\n")
        time.sleep(1)
"""


@sqlite_only
@pytest.mark.parametrize(
    "signal_number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
)
def test_responses_that_have_begun_are_finished(
    start_server, seed, checkout, signal_number
):
    """A stop, Ctrl-C and a reload interrupt no response and log no error."""
    with (checkout / "wsgi.py").open("a") as file:
        file.write(SLOW_RESPONSE)
    server = start_server("--workers", "2", folder=checkout)
    before = server.workers()
    with ThreadPoolExecutor() as pool:
        responses = [
            pool.submit(server.get, "/api/jobs", seed.auth_header) for _ in range(4)
        ]
        wait_until(lambda: server.log().count("has begun") == len(responses))
        server.process.send_signal(signal_number)
        if signal_number == signal.SIGINT:
            # A terminal sends SIGINT to the master and to its workers.
            for pid in before:
                os.kill(pid, signal_number)
        for response in responses:
            assert json.loads(response.result().body)["data"]
    if signal_number == signal.SIGHUP:
        wait_until(lambda: not {*before} & {*server.workers()})
        server.get("/health_check")
        server.stop()
    assert server.process.wait(TIMEOUT) == 0
    assert "Traceback" not in server.log() and "SystemExit" not in server.log()


@sqlite_only
def test_reload_of_broken_code_finishes_responses_and_stops(
    start_server, seed, checkout
):
    """The master exits with an error, because a new worker cannot import the code."""
    with (checkout / "wsgi.py").open("a") as file:
        file.write(SLOW_RESPONSE)
    server = start_server(folder=checkout)
    with ThreadPoolExecutor() as pool:
        response = pool.submit(server.get, "/api/jobs", seed.auth_header)
        wait_until(lambda: "has begun" in server.log())
        with (checkout / "app.py").open("a") as file:
            file.write("broken\n")
        server.process.send_signal(signal.SIGHUP)
        assert json.loads(response.result().body)["data"]
    assert server.process.wait(TIMEOUT) == 3
    assert "NameError: name 'broken' is not defined" in server.log()


def test_make_serve_reports_a_taken_port_before_it_creates_anything(checkout):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        with making("serve", checkout, PORT=port) as process:
            assert process.wait(TIMEOUT) != 0
    line, *rest = (checkout / "err").read_text().splitlines()
    assert port in line and "PORT=" in line
    assert all(line.startswith("make: ") for line in rest)
    assert "Token" not in (checkout / "out").read_text()
    assert not (checkout / "instance/jobs.db").exists()


def test_curl_line_of_make_serve_works_before_and_after_usr2(checkout):
    """USR2 starts a new master, which goes on when the old one gets SIGTERM."""
    log, port = checkout / "err", free_port()

    def masters():
        return re.findall(r"Listening at: .* \((\d+)\)", log.read_text())

    with making("serve", checkout, PORT=str(port)) as process:
        wait_until(lambda: "Booting worker" in log.read_text())
        [line] = re.findall("^curl .*", (checkout / "out").read_text(), re.MULTILINE)
        curl = [*shlex.split(line), "--silent", "--fail", "--retry", "9"]
        curl += ["--retry-connrefused"]
        assert json.loads(subprocess.check_output(curl))["meta"]["total_entries"] == 3
        os.kill(int(masters()[0]), signal.SIGUSR2)
        wait_until(lambda: log.read_text().count("Booting worker") == 2)
        os.kill(int(masters()[0]), signal.SIGTERM)
        process.wait(TIMEOUT)
        assert json.loads(subprocess.check_output(curl))["meta"]["total_entries"] == 3
        os.kill(int(masters()[1]), signal.SIGTERM)
        wait_until(lambda: log.read_text().count("Shutting down: Master") == 2)


def test_make_serve_creates_no_demo_where_projects_exist(checkout, new_state):
    """It prints a line that says how to create a token."""
    (checkout / "instance").mkdir()
    url = f"sqlite:///{checkout}/instance/jobs.db"
    app = create_app({"DATABASE_URL": url})
    run_command(app, "init-db")
    run_command(app, "import-project", "-", input=json.dumps(new_state()))
    port = free_port()
    with making("serve", checkout, PORT=str(port)):
        wait_until(lambda: urlopen(f"http://127.0.0.1:{port}/health_check").status)
    [line] = (checkout / "out").read_text().splitlines()[-1:]
    assert "flask create-token" in line
    assert run_command(app, "list-tokens") == ""
    with app.app_context():
        db.engine.dispose()


REPORT_IMPORT = r"""
import os
os.write(2, f"{os.getpid()} runs {__name__}\n".encode())
"""


@sqlite_only
def test_reload_serves_the_new_code(start_server, seed, paths, checkout):
    """Each new worker imports every module again, and no request is lost."""
    server = start_server("--workers", "2", folder=checkout)
    before = {*server.workers()}
    modules = [path for path in checkout.glob("*.py") if path.stem.isidentifier()]
    for module in modules:
        with module.open("a") as file:
            file.write(REPORT_IMPORT)
    with Load(server, paths, seed.auth_header, pause=0.002) as load:
        load.wait_for(50)
        server.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: len(server.workers()) == 2 and not before & {*server.workers()}
        )
        load.wait_for(50)
    assert load.disconnected == []
    assert {response.status for response in load.responses} == {200}
    for worker in server.workers():
        wait_until(lambda worker=worker: f"{worker} runs wsgi" in server.log())
        names = {*re.findall(rf"^{worker} runs (\w+)$", server.log(), re.MULTILINE)}
        assert names == {module.stem for module in modules}


@sqlite_only
def test_health_check_accepts_any_host(make_app, seed):
    """Load balancers request it by address, and TRUSTED_HOSTS has only names."""
    client = make_app(TRUSTED_HOSTS="jobs.example.org").test_client()

    def status(path, host):
        headers = seed.auth_header | {"Host": host}
        return client.get(path, headers=headers).status_code

    for host in ("127.0.0.1", "10.0.0.7:8001", "[::1]:8000", "localhost"):
        assert status("/health_check", host) == 200
        assert status("/api/jobs", host) == 400
        assert status("/nothing", host) == 400
    assert status("/health_check", "a b") == 400


@sqlite_only
@pytest.mark.parametrize(
    "host", ["Jobs.Example.org", "jobs.example.org.", "JOBS.example.ORG.:8443"]
)
def test_trusted_host_matches_in_any_case_and_with_a_final_dot(make_app, seed, host):
    client = make_app(TRUSTED_HOSTS="jobs.example.org").test_client()
    response = client.get("/api/jobs", headers=seed.auth_header | {"Host": host})
    assert response.status_code == 200
    assert response.json["links"]["self"] == f"http://{host.lower()}/api/jobs"


@sqlite_only
def test_service_without_its_database_runs_and_is_not_healthy(start_server, tmp_path):
    """Every line of the log has gunicorn's form, and no path starts a line."""
    hosts = {"TRUSTED_HOSTS": "jobs.example.org,127.0.0.1"}
    server = start_server(DATABASE_URL=f"sqlite:///{tmp_path}/none.db", **hosts)
    assert server.get("/health_check", {"Host": "10.0.0.1"}).status == 503
    assert server.get("/api/openapi.json", {"Host": "jobs.example.org"}).status == 200
    headers = {"Authorization": "Bearer x"}
    assert server.get("/api/jobs/x%0aforged", headers).status == 503
    server.stop()
    lines = server.log().splitlines()
    assert any("run `flask init-db`" in line for line in lines)
    for line in lines:
        assert re.fullmatch(LINE, line), line


@sqlite_only
def test_path_cannot_forge_a_line_of_the_log(app, seed, set_columns, caplog):
    """A request that ends in a bug is logged with its path escaped."""
    with app.app_context(), db.engine.connect() as connection:
        connection.exec_driver_sql("ALTER TABLE user_tokens RENAME context TO x")
    path = "/api/jobs/x%0a%5B2026-01-01%5D%1b forged"
    assert app.test_client().get(path, headers=seed.auth_header).status_code == 500
    [record] = caplog.records
    assert r"x\n[2026-01-01]\x1b forged" in record.message
    assert "\n" not in record.message


@sqlite_only
@pytest.mark.parametrize("level", ["info", "debug"])
def test_no_token_is_in_the_log(start_server, seed, tmp_path, level):
    """Requests that hold a token in a wrong place are not logged, or without it."""
    token = seed.auth_header["Authorization"].removeprefix("Bearer ")
    basic = b64encode(f"{token}:".encode()).decode()
    targets = [
        f"/api/jobs?token={token}",
        f"/api/jobs?access_token={token}",
        f"/api/jobs?%61ccess_token={token}",
        f"http://u:{token}@h/api/jobs",
    ]
    headers = [
        f"Referer: http://h/?token={token}",
        f"User-Agent: {token}",
        f"Authorization: Basic {basic}",
        f"Authorization Bearer {token}",
        f"Authorization; Bearer {token}",
        f"Authorization : Bearer {token}",
        f"Authorization: Bearer\x00{token}",
        f"Bearer {token}: x",
        f" Authorization: Bearer {token}",
    ]
    requests = [f"GET {target} HTTP/1.1\r\nHost: h" for target in targets]
    requests += [f"GET /api/jobs HTTP/1.1\r\nHost: h\r\n{line}" for line in headers]
    requests += [f"GET /api/jobs?token={token}"]
    path = str(tmp_path / "socket")
    options = ["--access-logfile", "-", "--log-level", level, "--bind", f"unix:{path}"]
    server = start_server(*options)
    for request in requests:
        for end in ("\r\n\r\n", "\r\n", ""):
            server.send(f"{request}{end}".encode())
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(f"{request}{end}".encode())
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
    server.stop()
    assert token not in server.log() and basic not in server.log()
    # Seven requests are well-formed, and each is sent to both sockets.
    assert server.log().count("\"GET '/api/jobs' HTTP/1.1\" 401") == 14
    assert "Traceback" not in server.log()


PIPELINED_REQUESTS = (
    b"GET /api/docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: h\r\n\r\n" * 6
)


@with_shared_server()
def test_clients_that_read_nothing_are_disconnected(server):
    """A thousand of them occupy a file each for 30 seconds, and block no others."""
    [worker] = server.workers()
    with ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(1100)]
        for client in clients:
            client.sendall(PIPELINED_REQUESTS)
        assert server.get("/health_check").status == 200
        files = os.listdir(f"/proc/{worker}/fd")
        assert len(files) < len(clients) + 100
        wait_until(lambda: len(os.listdir(f"/proc/{worker}/fd")) < 100)
    assert "Traceback" not in server.log() and "ERROR" not in server.log()


@sqlite_only
def test_worker_accepts_no_more_connections_than_it_has_files(app, start_server):
    """Others wait until a connection is closed, so that no client gets a 500."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        server = start_server()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with ExitStack() as stack:
        for _ in range(500):
            # A client that sends nothing is disconnected after 5 seconds.
            stack.enter_context(server.connect())
        assert server.get("/health_check").status == 200
        assert server.get("/api/docs").status == 200
    assert "Traceback" not in server.log() and "Too many open files" not in server.log()
