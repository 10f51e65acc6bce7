"""What docs/deployment.md says of nginx, systemd, containers, upgrades and errors."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
from contextlib import closing, contextmanager
from http.client import HTTPSConnection

import pytest
from conftest import (
    ROOT,
    RUN_ID,
    TIMEOUT,
    Server,
    files_in_image,
    free_port,
    postgresql_only,
    run_command,
    sqlite_only,
    wait_until,
    with_shared_server,
)
from sqlalchemy import make_url
from test_headers import FORWARDED
from test_readme import block, find_program
from test_server import Load

from app import create_app
from database import db

DEPLOYMENT = (ROOT / "docs/deployment.md").read_text()
NGINX = (ROOT / "examples/nginx.conf").read_text()
UNIT = (ROOT / "examples/jobs.service").read_text()

HOST = "jobs.example.org"
# Tests ask 127.0.0.1 whether a server is up.
BEHIND = {"TRUSTED_PROXIES": "1", "TRUSTED_HOSTS": f"{HOST},127.0.0.1"}


class Nginx:
    """An nginx process with the configuration of examples/nginx.conf."""

    def __init__(self, folder, blocks):
        self.port = free_port()
        self.context = ssl.create_default_context()
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE
        certificate = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256"
        certificate += " -nodes -subj / -keyout jobs.key -out jobs.pem"
        command = [find_program("openssl"), *certificate.split()]
        subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)
        blocks = blocks.replace("listen 443", f"listen 127.0.0.1:{self.port}")
        blocks = blocks.replace("/etc/ssl/", f"{folder}/")
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        folders = "".join(f"{kind}_temp_path {kind};" for kind in kinds)
        (folder / "nginx.conf").write_text(
            "daemon off; master_process off; pid pid; error_log stderr;"
            f"events {{}} http {{ access_log off; {folders}\n{blocks} }}"
        )
        command = [find_program("nginx"), "-e", "stderr", "-p", folder]
        command += ["-c", "nginx.conf"]
        self.process = subprocess.Popen(command, env={"JOBS_TEST_RUN": RUN_ID})

    def get(self, path, headers=None):
        """Return the response over TLS, with its ``body`` read."""
        connection = HTTPSConnection(
            "127.0.0.1", self.port, timeout=30, context=self.context
        )
        with closing(connection):
            connection.request("GET", path, headers={"Host": HOST} | (headers or {}))
            response = connection.getresponse()
            response.body = response.read()
            return response


def nginx_for(*servers):
    """Return the configuration with these servers in the place of the example's."""
    lines = [f"server 127.0.0.1:{server.port};" for server in servers]
    assert NGINX.count("server 127.0.0.1:8000;") == 1
    return NGINX.replace("server 127.0.0.1:8000;", "\n".join(lines))


@pytest.fixture
def start_nginx(tmp_path):
    """A function that starts an nginx with blocks of configuration."""
    started = []

    def start(blocks):
        started.append(Nginx(tmp_path, blocks))
        wait_until(lambda: started[-1].get("/").status)
        return started[-1]

    yield start
    for nginx in started:
        nginx.process.terminate()
        nginx.process.wait(30)


@with_shared_server(**BEHIND)
def test_links_behind_nginx_have_the_address_of_the_request(server, start_nginx, seed):
    """Forwarded headers of a client change nothing."""
    nginx = start_nginx(nginx_for(server))
    for host in (HOST, f"{HOST}:8443"):
        for forwarded in ({}, FORWARDED):
            headers = seed.auth_header | {"Host": host} | forwarded
            document = json.loads(nginx.get("/api/jobs", headers).body)
            assert document["links"]["self"] == f"https://{host}/api/jobs"
    assert nginx.get("/api/jobs", {"Host": "evil.example"}).status == 400


@sqlite_only
def test_no_request_is_lost_when_one_of_two_services_stops(
    start_server, start_nginx, seed, paths
):
    """The first is reloaded, the second is stopped."""
    services = [start_server(**BEHIND) for _ in range(2)]
    lines = re.findall(r"^ +server [\d.]+:8000;$", DEPLOYMENT, re.MULTILINE)
    assert len(lines) == len(services)
    nginx = start_nginx(nginx_for(*services))
    with Load(nginx, paths, seed.auth_header) as load:
        load.wait_for(50)
        reloaded, stopped = services
        before = reloaded.workers()
        reloaded.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: len(reloaded.workers()) == 1 and reloaded.workers() != before
        )
        load.wait_for(50)
        stopped.stop()
        load.wait_for(50)
    assert {response.status for response in load.responses} == {200}
    assert load.disconnected == []


[STRIPPED] = re.findall(r"proxy_pass (http://jobs/\w+/);", DEPLOYMENT)
[LOCATION] = re.findall(r"`(location /\w+/)`", DEPLOYMENT)

below_prefix = with_shared_server(SCRIPT_NAME="/openfn", **BEHIND)


@below_prefix
@pytest.mark.parametrize(
    ("location", "target", "path"),
    [
        (LOCATION, "http://jobs", "/openfn/api/jobs"),
        ("location /", STRIPPED, "/api/jobs"),
    ],
    ids=["whole", "stripped"],
)
def test_links_below_a_prefix_have_it(
    server, start_nginx, seed, location, target, path
):
    blocks = nginx_for(server).replace("location /", location)
    nginx = start_nginx(blocks.replace("http://jobs", target))
    response = nginx.get(f"{path}?page_size=2", seed.auth_header)
    links = json.loads(response.body)["links"]
    root = f"https://{HOST}/openfn/api/jobs"
    assert links["self"] == f"{root}?page_size=2"
    assert links["next"] == f"{root}?page=2&page_size=2"


@below_prefix
def test_page_works_below_a_prefix(server):
    response = server.get("/openfn/api/docs")
    page, policy = response.body.decode(), response.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in policy and "unsafe-eval" not in policy
    paths = re.findall(r'(?:src|href)="([^"]+)"|url: "([^"]+)"', page)
    for path in ("".join(pair) for pair in paths):
        assert path.startswith("/openfn/api/")
        assert server.get(path).status == 200
    document = json.loads(server.get("/openfn/api/openapi.json").body)
    assert document["servers"][0]["url"] == "/openfn"


@below_prefix
def test_path_without_the_prefix_is_a_500(server):
    assert server.get("/api/jobs").status == 500


def test_unit_is_valid_and_confined(tmp_path):
    """Its exposure is at most 3 of 10, as systemd rates it."""
    unit = tmp_path / "jobs.service"
    unit.write_text(UNIT.replace("/srv/jobs", str(ROOT)))
    command = [find_program("systemd-analyze"), "--no-pager"]
    verified = subprocess.run(
        [*command, "verify", unit],
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "jobs.service" not in verified.stdout
    security = ["security", "--offline=true", "--threshold=30", unit]
    assert subprocess.run([*command, *security]).returncode == 0


def run_in(folder, *command):
    """Return the exit code of a Python program in a folder, without an environment."""
    process = subprocess.run([sys.executable, "-m", *command], cwd=folder, env={})
    return process.returncode


def test_image_has_what_runs_and_nothing_else(checkout):
    modules = {path.name for path in ROOT.glob("*.py")}
    others = {"demo.json", "docs.html", "openapi.json", "requirements.txt"}
    assert {*files_in_image()} == modules | others
    [command] = re.findall("^CMD (.*)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert run_in(checkout, *json.loads(command), "--check-config") == 0
    assert run_in(checkout, "flask", "demo") == 0


def test_container_block_fits_the_dockerfile():
    """The documentation names the volume, the port and the user of the image."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    commands = block(DEPLOYMENT, "sh", "docker build")
    [volume] = re.findall("^VOLUME (.*)", dockerfile, re.MULTILINE)
    [port] = re.findall("^EXPOSE (.*)", dockerfile, re.MULTILINE)
    [user] = re.findall("^USER (.*)", dockerfile, re.MULTILINE)
    assert f"-v jobs:{volume} " in commands
    assert f":{port} " in commands
    assert f"runs as user {user} " in DEPLOYMENT


def test_unit_does_not_reload_what_cannot_be_loaded(checkout):
    """The second command of the unit runs only if the first succeeds."""
    check, _ = re.findall("^ExecReload=(.*)", UNIT, re.MULTILINE)
    command = shlex.split(check.removeprefix("/srv/jobs/.venv/bin/"))
    assert run_in(checkout, *command) == 0
    for broken in ("gunicorn.conf.py", "app.py"):
        text = (checkout / broken).read_text()
        (checkout / broken).write_text(f"{text}import nothing")
        assert run_in(checkout, *command) != 0
        (checkout / broken).write_text(text)


@sqlite_only
def test_access_log_and_statsd_report_requests(start_server):
    """The log has the client's address behind a trusted proxy, and the time."""
    [options] = re.findall(r"^gunicorn (.*) wsgi:app$", DEPLOYMENT, re.MULTILINE)
    [statsd_host] = re.findall(r"`(--statsd-host \S+:)8125`", DEPLOYMENT)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(30)
        options += f" {statsd_host}{statsd.getsockname()[1]}"
        server = start_server(*shlex.split(options), TRUSTED_PROXIES="1")
        headers = {"X-Forwarded-For": "198.51.100.9, 203.0.113.7"}
        assert server.get("/api/jobs?page=1", headers).status == 401
        line = r"^203\.0\.113\.7 GET '/api/jobs' 401 \d+ \d+ms$"
        wait_until(lambda: re.search(line, server.log(), re.MULTILINE))
        received = b""
        for name in (b"requests", b"request.status.401", b"request.duration"):
            while b"gunicorn." + name not in received:
                received += statsd.recv(65536)


# What the blocks call, on a machine without systemd and without the rights of root.
STUBS = {
    "useradd": "",
    "systemctl": "",
    "systemd-run": """
while true; do
  case $1 in
    --working-directory=*) cd "${1#*=}" ;;
    --property=EnvironmentFile=*) set -a; . "${1#*EnvironmentFile=}"; set +a ;;
    --*) ;;
    *) exec "$@" ;;
  esac
  shift
done
""",
}


class Machine:
    """A folder used as the root of a machine that has a checkout in /srv/jobs."""

    def __init__(self, folder, checkout):
        self.folder = folder
        for name in ("etc/systemd/system", "root", "srv", "stubs", "usr/local/bin"):
            (folder / name).mkdir(parents=True)
        (folder / "var/lib/jobs").mkdir(parents=True)
        for name in ("Makefile", ".gitignore"):
            shutil.copy2(ROOT / name, checkout)
        shutil.copytree(ROOT / "examples", checkout / "examples")
        self.origin, self.checkout = checkout, folder / "srv/jobs"
        self.git("init", "--quiet")
        self.commit("First version")
        self.git("clone", "--quiet", ".", self.checkout)
        # As old as the files that were copied, so that make installs nothing.
        for name in ("requirements.txt", "requirements-dev.txt"):
            if (self.checkout / name).exists():
                os.utime(self.checkout / name, (0, 0))
        (self.checkout / ".venv").symlink_to(sys.prefix)
        for name, script in STUBS.items():
            (folder / "stubs" / name).write_text(f"#!/bin/sh\n{script}")
            (folder / "stubs" / name).chmod(0o755)

    def git(self, *args):
        """Run a git command in the repository that the checkout is cloned from."""
        who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        command = [find_program("git"), *who, *args]
        subprocess.run(command, cwd=self.origin, check=True)

    def commit(self, subject):
        """Commit everything there."""
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", subject)

    def translate(self, text):
        """Return the text with the paths of this machine."""
        text = text.replace("-o jobs -g jobs ", "")
        return re.sub(
            r"(?<![\w.])/(srv|etc|root|usr/local|var)/",
            lambda match: f"{self.folder}/{match[1]}/",
            text,
        )

    def run(self, script):
        """Paste a block into a shell, and return what it prints."""
        path = f"{self.folder}/stubs:{self.folder}/usr/local/bin:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail"],
            input=self.translate(script),
            cwd=self.folder / "root",
            env={"PATH": path, "JOBS_TEST_RUN": RUN_ID, "HOME": str(self.folder)},
            check=True,
            text=True,
            stdout=subprocess.PIPE,
        ).stdout


@pytest.fixture
def machine(tmp_path, checkout):
    """A machine with a checkout."""
    return Machine(tmp_path / "machine", checkout)


SETUP = block(DEPLOYMENT, "sh", "useradd")
TO_IMPORT = block(DEPLOYMENT, "sh", "jobs-flask import-project")
UPGRADE = block(DEPLOYMENT, "sh", "git -C /srv/jobs pull")
COPY_SQLITE, RESTORE_SQLITE = (
    block(DEPLOYMENT, "sh", word) for word in (".backup", "-wal")
)
BACK = block(DEPLOYMENT, "sh", "reset --keep")


@pytest.fixture
def installed(machine, new_state):
    """A machine after the blocks of "systemd", and the token that they print."""
    # The settings file is read by a shell here, which needs the translated path.
    machine.run(SETUP.replace("jobs-flask init-db\n", ""))
    env = machine.folder / "etc/jobs.env"
    env.write_text(machine.translate(env.read_text()))
    flask = machine.folder / "usr/local/bin/jobs-flask"
    flask.write_text(machine.translate(flask.read_text()))
    machine.run("jobs-flask init-db")
    state = new_state()
    (machine.folder / "root/projectState.json").write_text(json.dumps(state))
    machine.project_id = state["id"]
    machine.token = machine.run(TO_IMPORT).splitlines()[-1]
    return machine


@pytest.fixture
def get(installed):
    """A function that sends a request to the app of the machine's database."""
    url = f"sqlite:///{installed.folder}/var/lib/jobs/jobs.db"

    def run():
        app = create_app({"DATABASE_URL": url})
        headers = {"Authorization": f"Bearer {installed.token}"}
        response = app.test_client().get("/api/jobs", headers=headers)
        with app.app_context():
            db.engine.dispose()
        return response

    run.url = url
    return run


def test_setup_block_makes_a_service_that_responds(installed, get):
    """Its settings can be read by root only, and its unit is the example."""
    assert get().json["meta"]["total_entries"] == 3
    etc = installed.folder / "etc"
    assert (etc / "jobs.env").stat().st_mode & 0o777 == 0o600
    assert (etc / "systemd/system/jobs.service").read_text() == UNIT


@sqlite_only
def test_upgrade_can_be_undone_with_its_data(installed, get, start_server):
    """The copy is made while the service runs, which a power cut then stops."""
    before = get().data
    server = start_server(DATABASE_URL=get.url)
    installed.run(COPY_SQLITE)
    (installed.origin / "new.py").write_text('"""A new module."""\n')
    installed.commit("Second version")
    installed.run(UPGRADE)
    assert (installed.checkout / "new.py").exists()
    installed.run(f"jobs-flask delete-project {installed.project_id}")
    assert get().json["data"] == []
    for pid in (server.process.pid, *server.workers()):
        os.kill(pid, signal.SIGKILL)
    installed.run(RESTORE_SQLITE)
    assert get().data == before
    installed.run(BACK)
    assert not (installed.checkout / "new.py").exists()


@postgresql_only
def test_postgresql_can_be_restored(machine, client, seed, run_flask, database_url):
    before = client.get("/api/jobs", headers=seed.auth_header).data
    address = "postgresql://jobs:password@db.example.org/jobs"
    copy, restore = (
        block(DEPLOYMENT, "sh", word).replace(address, database_url)
        for word in ("pg_dump", "pg_restore")
    )
    assert database_url in copy and database_url in restore
    machine.run(copy)
    run_flask("delete-project", seed.project_id)
    machine.run(restore)
    assert client.get("/api/jobs", headers=seed.auth_header).data == before


@contextmanager
def exclusive_lock(path):
    """Lock a SQLite file as a program does that does not know WAL mode."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def assert_unavailable(app, caplog, text):
    """A request is a 503, and the log has a text that the table explains."""
    assert app.test_client().get("/health_check").status_code == 503
    assert text in caplog.text
    assert f"| 503, *{text}*" in DEPLOYMENT


@sqlite_only
def test_causes_of_a_503_are_in_the_table(
    app_without_tables, make_app, tmp_path, caplog
):
    assert_unavailable(app_without_tables, caplog, "no such table")
    nowhere = make_app(DATABASE_URL=f"sqlite:///{tmp_path}/no/jobs.db")
    assert_unavailable(nowhere, caplog, "unable to open database file")
    run_command(app_without_tables, "init-db")
    with app_without_tables.app_context():
        db.engine.dispose()
    with exclusive_lock(tmp_path / "jobs.db"):
        assert_unavailable(app_without_tables, caplog, "database is locked")


@postgresql_only
def test_value_that_libpq_rejects_is_in_the_table(make_app, database_url, caplog):
    app = make_app(DATABASE_URL=f"{database_url}?sslmode=maybe")
    assert_unavailable(app, caplog, "invalid sslmode value")


@sqlite_only
def test_hup_with_code_that_cannot_be_loaded_stops_the_service(start_server, checkout):
    server = start_server(folder=checkout)
    with (checkout / "app.py").open("a") as file:
        file.write("import nothing\n")
    server.process.send_signal(signal.SIGHUP)
    assert server.process.wait(TIMEOUT) != 0


@sqlite_only
def test_requests_hang_without_a_worker(database_url, tmp_path):
    server = Server(database_url, tmp_path / "log", WEB_CONCURRENCY="0")
    try:
        wait_until(lambda: "Listening at" in server.log())
        [port] = re.findall(r"Listening at: http://127.0.0.1:(\d+)", server.log())
        with socket.create_connection(("127.0.0.1", int(port)), timeout=1) as client:
            client.sendall(b"GET /health_check HTTP/1.0\r\n\r\n")
            with pytest.raises(TimeoutError):
                client.recv(1)
    finally:
        server.stop()


CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"


@pytest.fixture
def limited_role(execute, database_url):
    """A role that may connect once, and its URL."""
    role = f"limited_{RUN_ID}"
    execute(
        f"CREATE ROLE {role} LOGIN PASSWORD 'secret' CONNECTION LIMIT 1;"
        f"GRANT USAGE ON SCHEMA public TO {role};"
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"
    )
    url = make_url(database_url).set(username=role, password="secret")
    yield role, url.render_as_string(hide_password=False)
    execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@postgresql_only
def test_role_needs_eight_connections_a_worker(
    app, seed, execute, limited_role, start_server
):
    role, url = limited_role
    server = start_server(DATABASE_URL=url)
    for limit, statuses in (1, {200, 503}), (8, {200}):
        execute(f"ALTER ROLE {role} CONNECTION LIMIT {limit}")
        with Load(server, ["/api/jobs"], seed.auth_header, clients=32) as load:
            load.wait_for(100)
        assert {response.status for response in load.responses} == statuses
        assert load.disconnected == []
        # Connections that were rejected count until they are closed.
        wait_until(
            lambda most=limit: execute(CONNECTIONS, [role]).fetchone()[0] <= most
        )
