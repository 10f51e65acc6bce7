"""What an operator does to a real gunicorn: start, stop, reload, read its log."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from contextlib import ExitStack, contextmanager
from urllib.request import urlopen

import pytest
from conftest import PATIENCE, ROOT, RUN, Server, free_port, sqlite_only, wait_until
from test_deployment import files_in_image
from test_server import Load

from database import db

LINE = r"\[[-\d]+ [:\d]+ [+-]\d{4}\] \[\d+\] \[[A-Z]+\] .+"


@pytest.fixture
def checkout(tmp_path):
    """A copy of what runs, which tests may change, with the tests' own libraries."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in (*files_in_image(), "Makefile"):
        shutil.copy2(ROOT / name, folder)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@contextmanager
def making(target, folder, **variables):
    """A make that runs, with what it prints in ``out`` and ``err`` of the folder."""
    environment = {"JOBS_TEST_RUN": RUN, "PATH": os.environ["PATH"]} | variables
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(
            ["make", target], cwd=folder, env=environment, stdout=out, stderr=err
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)


@sqlite_only
def test_ctrl_c_finishes_what_has_begun_and_is_quiet(start_server, seed, paths):
    """It reaches the master and its workers at once."""
    server = start_server("--workers", "2")
    with Load(server, paths, seed.bearer) as load:
        load.wait_for(50)
        for pid in (server.process.pid, *server.workers()):
            os.kill(pid, signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0
    assert {answer.status for answer in load.answers} == {200}
    for answer in load.answers:
        assert json.loads(answer.body)["data"]
    assert "Traceback" not in server.log() and "SystemExit" not in server.log()


# The first that a worker does of ours.
SLOW_TO_START = """
import time
start = post_fork
def post_fork(server, worker):
    time.sleep(2)
    start(server, worker)
"""


@sqlite_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_server_that_has_just_started_ends_at_once(
    database_url, checkout, tmp_path, number
):
    """Even if its worker has not come to anything yet."""
    with (checkout / "gunicorn.conf.py").open("a") as file:
        file.write(SLOW_TO_START)
    server = Server(database_url, tmp_path / "log", folder=checkout)
    wait_until(lambda: "Booting worker" in server.log())
    began = time.monotonic()
    server.process.send_signal(number)
    assert server.process.wait(PATIENCE) == 0
    # gunicorn kills those that do not end after 30.
    assert time.monotonic() - began < 25
    assert "Traceback" not in server.log()


def test_port_that_is_taken_is_told_before_anything_is_done(checkout):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        with making("serve", checkout, PORT=port) as process:
            assert process.wait(PATIENCE) != 0
    line, *rest = (checkout / "err").read_text().splitlines()
    assert port in line and "PORT=" in line
    assert all(line.startswith("make: ") for line in rest)
    assert "Token" not in (checkout / "out").read_text()
    assert not (checkout / "instance/jobs.db").exists()


def test_restart_leaves_the_demo_s_token_good(checkout):
    """It can be pasted again after a second ``make serve``."""
    port, tokens = free_port(), []
    for _ in range(2):
        with making("serve", checkout, PORT=str(port)):
            wait_until(lambda: "Booting worker" in (checkout / "err").read_text())
            tokens += re.findall("Token: (.+)", (checkout / "out").read_text())
            for token in tokens:
                curl = ["curl", "--silent", "--fail", "--retry", "9"]
                curl += ["--retry-connrefused", "-H", f"Authorization: Bearer {token}"]
                curl.append(f"http://127.0.0.1:{port}/api/jobs")
                assert json.loads(subprocess.check_output(curl))["meta"]
    assert len({*tokens}) == 2


def test_no_demo_among_projects_of_one_s_own(checkout, new_state):
    """But a line that says how to make a token."""
    flask = [sys.executable, "-m", "flask"]
    options = {"cwd": checkout, "env": {"PATH": os.environ["PATH"]}, "text": True}
    subprocess.check_call([*flask, "init-db"], **options)
    command = [*flask, "import-project", "-", "--member", "you@example.org"]
    subprocess.run(command, input=json.dumps(new_state()), check=True, **options)
    with making("serve", checkout, PORT=str(free_port())):
        wait_until(lambda: "Booting worker" in (checkout / "err").read_text())
    [line] = (checkout / "out").read_text().splitlines()[-1:]
    assert "flask create-token" in line
    assert subprocess.check_output([*flask, "list-tokens"], **options) == ""


@sqlite_only
def test_reload_serves_the_new_code(start_server, seed, paths, checkout):
    """Of whichever module, and loses no request."""
    server = start_server("--workers", "2", folder=checkout)
    for module, old, new in (
        ("app.py", '{"status": "ok"}', '{"status": "new"}'),
        ("schemas.py", '"total_entries"', '"total"'),
        ("config.py", "between", "from"),
    ):
        path = checkout / module
        path.write_text(path.read_text().replace(old, new))
    with Load(server, paths, seed.bearer) as load:
        load.wait_for(50)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: b"new" in server.get("/health_check").body)
        wait_until(lambda: len(server.workers()) == 2)
        load.wait_for(50)
    assert load.cut == []
    assert {answer.status for answer in load.answers} == {200}
    meta = json.loads(server.get("/api/jobs", seed.bearer).body)["meta"]
    assert "total" in meta and "total_entries" not in meta


def test_new_master_takes_over_from_what_make_serve_started(checkout):
    """After USR2 to the old one, and TERM."""
    log = checkout / "err"

    def masters():
        return re.findall(r"Listening at: .* \((\d+)\)", log.read_text())

    port = free_port()
    with making("serve", checkout, PORT=str(port)) as process:
        wait_until(lambda: "Booting worker" in log.read_text())
        os.kill(int(masters()[0]), signal.SIGUSR2)
        wait_until(lambda: log.read_text().count("Booting worker") == 2)
        os.kill(int(masters()[0]), signal.SIGTERM)
        process.wait(PATIENCE)
        with urlopen(f"http://127.0.0.1:{port}/health_check") as answer:
            assert answer.status == 200
        os.kill(int(masters()[1]), signal.SIGTERM)
        wait_until(lambda: log.read_text().count("Shutting down: Master") == 2)


@sqlite_only
def test_health_is_told_by_address_too(start_server, seed):
    """Load balancers ask so, whatever the names of the service are."""
    server = start_server(TRUSTED_HOSTS="jobs.example.org")
    for host in ("127.0.0.1", f"10.0.0.7:{server.port}", "[::1]:8000", "localhost"):
        assert server.get("/health_check", {"Host": host}).status == 200
        assert server.get("/api/jobs", seed.bearer | {"Host": host}).status == 400
        assert server.get("/nothing", {"Host": host}).status == 400
    assert server.get("/health_check", {"Host": "a b"}).status == 400


@sqlite_only
@pytest.mark.parametrize(
    "host", ["Jobs.Example.org", "jobs.example.org.", "JOBS.example.ORG.:8443"]
)
def test_names_of_hosts_have_no_case_and_may_end_in_a_dot(make_app, seed, host):
    client = make_app(TRUSTED_HOSTS="jobs.example.org").test_client()
    response = client.get("/api/jobs", headers=seed.bearer | {"Host": host})
    assert response.status_code == 200
    assert response.json["links"]["self"] == f"http://{host.lower()}/api/jobs"


@sqlite_only
def test_log_has_one_form(start_server, tmp_path):
    """gunicorn's, for what Flask and the service say too; a path makes no line."""
    url = f"sqlite:///{tmp_path}/none.db"
    server = start_server(DATABASE_URL=url)
    assert server.get("/health_check").status == 503
    headers = {"Authorization": "Bearer x"}
    assert server.get("/api/jobs/x%0aforged", headers).status == 503
    server.stop()
    lines = server.log().splitlines()
    assert any("run `flask init-db`" in line for line in lines)
    for line in lines:
        assert re.fullmatch(LINE, line), line


@sqlite_only
def test_path_cannot_forge_a_line_of_the_log(app, seed, set_columns, caplog):
    """Where its request ends in a fault of ours."""
    with app.app_context(), db.engine.connect() as connection:
        connection.exec_driver_sql("ALTER TABLE user_tokens RENAME context TO x")
    path = "/api/jobs/x%0a%5B2026-01-01%5D%1b forged"
    assert app.test_client().get(path, headers=seed.bearer).status_code == 500
    [record] = caplog.records
    assert r"x\n[2026-01-01]\x1b forged" in record.message
    assert "\n" not in record.message


@sqlite_only
def test_no_token_is_in_the_log(start_server, seed):
    """Not of a head that is malformed, nor of an argument that RFC 6750 warns of."""
    server = start_server("--access-logfile", "-")
    token = seed.bearer["Authorization"].removeprefix("Bearer ")
    for head in (
        f"Authorization Bearer {token}",
        f"Authorization; Bearer {token}",
        f"Authorization : Bearer {token}",
        f"Authorization: Bearer\x00{token}",
        f"Bearer {token}: x",
        f" Authorization: Bearer {token}",
    ):
        request = f"GET /api/jobs?access_token={token} HTTP/1.1\r\nHost: h\r\n{head}"
        server.send(f"{request}\r\n\r\n".encode())
    assert server.get(f"/api/jobs?access_token={token}&page=1").status == 401
    path = f"/api/jobs?page=1&access_token={token}"
    assert server.get(path, seed.bearer).status == 400
    basic = b64encode(f"{token}:".encode()).decode()
    assert server.get("/api/jobs", {"Authorization": f"Basic {basic}"}).status == 401
    assert server.get(f"/api/jobs?access%5Ftoken={token}").status == 401
    server.stop()
    assert token not in server.log()
    assert "GET /api/jobs?page=1&access_token=… HTTP/1.1" in server.log()
    assert "Invalid request from ip=127.0.0.1" in server.log()


ASK = b"GET /api/docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: h\r\n\r\n" * 6


@sqlite_only
def test_clients_who_ask_and_do_not_read_are_cut_off(app, start_server):
    """However many, with an open file for each, and the others are served."""
    server = start_server()
    [worker] = server.workers()
    with ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(1100)]
        for client in clients:
            client.sendall(ASK)
        assert server.get("/health_check").status == 200
        files = os.listdir(f"/proc/{worker}/fd")
        assert len(files) < len(clients) + 100
        wait_until(lambda: len(os.listdir(f"/proc/{worker}/fd")) < 100)
    assert "Traceback" not in server.log() and "ERROR" not in server.log()


@sqlite_only
def test_worker_takes_as_many_as_it_may_have_files(app, start_server):
    """So that none of those who are connected gets a 500."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        server = start_server()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(server.connect()).sendall(ASK)
        assert server.get("/health_check").status == 200
        assert server.get("/api/docs").status == 200
    assert "Traceback" not in server.log() and "Too many open files" not in server.log()


@sqlite_only
def test_page_and_links_work_below_a_prefix(start_server, seed):
    server = start_server(SCRIPT_NAME="/openfn")
    page = server.get("/openfn/api/docs").body.decode()
    policy = server.get("/openfn/api/docs").headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in policy and "unsafe-eval" not in policy
    paths = re.findall(r'(?:src|href)="([^"]+)"|url: "([^"]+)"', page)
    for path in ("".join(pair) for pair in paths):
        assert path.startswith("/openfn/api/")
        assert server.get(path).status == 200
    document = json.loads(server.get("/openfn/api/openapi.json").body)
    assert document["servers"][0]["url"] == "/openfn"
    links = json.loads(server.get("/openfn/api/jobs", seed.bearer).body)["links"]
    assert links["self"] == f"http://127.0.0.1:{server.port}/openfn/api/jobs"
