"""What the README says of running the service: behind nginx, as a unit, in an image."""

import json
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import closing
from http.client import HTTPSConnection

import pytest
from conftest import (
    ROOT,
    RUN_ID,
    files_in_image,
    free_port,
    postgresql_only,
    sqlite_only,
    wait_until,
    with_shared_server,
)
from sqlalchemy import make_url
from test_headers import FORWARDED
from test_readme import README, block, find_program
from test_server import Load

HOST = "jobs.example.org"
# Of 127.0.0.1 a test asks whether a server is up.
BEHIND = {"TRUSTED_PROXIES": "1", "TRUSTED_HOSTS": f"{HOST},127.0.0.1"}


class Nginx:
    """An nginx of its own with the README's blocks, run as the tests are."""

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
            f"events {{}} http {{ access_log off; {folders} {blocks} }}"
        )
        command = [find_program("nginx"), "-e", "stderr", "-p", folder]
        command += ["-c", "nginx.conf"]
        self.process = subprocess.Popen(command, env={"JOBS_TEST_RUN": RUN_ID})

    def get(self, path, headers=None):
        """The answer over TLS, with its ``body`` read."""
        connection = HTTPSConnection(
            "127.0.0.1", self.port, timeout=30, context=self.context
        )
        with closing(connection):
            connection.request("GET", path, headers={"Host": HOST} | (headers or {}))
            response = connection.getresponse()
            response.body = response.read()
            return response


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
def test_links_behind_nginx_have_the_address_that_was_asked(server, start_nginx, seed):
    """Whatever a caller forwards of its own."""
    nginx = start_nginx(block("nginx", "server_name").replace("8000", str(server.port)))
    for host in (HOST, f"{HOST}:8443"):
        for forwarded in ({}, FORWARDED):
            headers = seed.auth_header | {"Host": host} | forwarded
            answer = json.loads(nginx.get("/api/jobs", headers).body)
            assert answer["links"]["self"] == f"https://{host}/api/jobs"
    assert nginx.get("/api/jobs", {"Host": "evil.example"}).status == 400


@sqlite_only
def test_services_behind_nginx_go_one_after_the_other(
    start_server, start_nginx, seed, paths
):
    """Reloaded or stopped, and no request is lost."""
    services = [start_server(**BEHIND) for _ in range(2)]
    upstream = block("nginx", "upstream")
    for n, service in enumerate(services, start=1):
        upstream = upstream.replace(f"10.0.0.{n}:8000", f"127.0.0.1:{service.port}")
    server = block("nginx", "server_name").replace("127.0.0.1:8000", "jobs")
    nginx = start_nginx(upstream + server)
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


[STRIPPED] = re.findall(r"proxy_pass (http://127.0.0.1:8000/\w+/);", README)

below_prefix = with_shared_server(SCRIPT_NAME="/openfn", **BEHIND)


@below_prefix
@pytest.mark.parametrize(
    ("location", "target", "path"),
    [
        ("/openfn/", "http://127.0.0.1:8000", "/openfn/api/jobs"),
        ("/", STRIPPED, "/api/jobs"),
    ],
    ids=["whole", "stripped"],
)
def test_links_below_a_prefix_have_it(
    server, start_nginx, seed, location, target, path
):
    blocks = block("nginx", "server_name").replace("location /", f"location {location}")
    blocks = blocks.replace("http://127.0.0.1:8000", target)
    nginx = start_nginx(blocks.replace("8000", str(server.port)))
    answer = nginx.get(f"{path}?page_size=2", seed.auth_header)
    links = json.loads(answer.body)["links"]
    root = f"https://{HOST}/openfn/api/jobs"
    assert links["self"] == f"{root}?page_size=2"
    assert links["next"] == f"{root}?page=2&page_size=2"


@below_prefix
def test_page_works_below_a_prefix(server):
    answer = server.get("/openfn/api/docs")
    page, policy = answer.body.decode(), answer.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in policy and "unsafe-eval" not in policy
    paths = re.findall(r'(?:src|href)="([^"]+)"|url: "([^"]+)"', page)
    for path in ("".join(pair) for pair in paths):
        assert path.startswith("/openfn/api/")
        assert server.get(path).status == 200
    document = json.loads(server.get("/openfn/api/openapi.json").body)
    assert document["servers"][0]["url"] == "/openfn"


def test_unit_is_sound_and_confined(tmp_path):
    """Of systemd's ten points of exposure it has no more than three."""
    unit = tmp_path / "jobs.service"
    unit.write_text(block("ini", "[Service]").replace("/srv/jobs", str(ROOT)))
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
    """The exit code of a Python program in a folder, without an environment."""
    process = subprocess.run([sys.executable, "-m", *command], cwd=folder, env={})
    return process.returncode


def test_image_has_what_runs_and_nothing_else(checkout):
    modules = {path.name for path in ROOT.glob("*.py")}
    others = {"demo.json", "docs.html", "openapi.json", "requirements.txt"}
    assert {*files_in_image()} == modules | others
    [command] = re.findall("^CMD (.*)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert run_in(checkout, *json.loads(command), "--check-config") == 0
    assert run_in(checkout, "flask", "demo") == 0


def test_unit_does_not_reload_what_cannot_be_loaded(checkout):
    """With systemd, the first of its two commands must succeed."""
    check, _ = re.findall("^ExecReload=(.*)", block("ini", "[Service]"), re.MULTILINE)
    command = shlex.split(check.removeprefix("/srv/jobs/.venv/bin/"))
    assert run_in(checkout, *command) == 0
    for broken in ("gunicorn.conf.py", "app.py"):
        text = (checkout / broken).read_text()
        (checkout / broken).write_text(f"{text}import nothing")
        assert run_in(checkout, *command) != 0
        (checkout / broken).write_text(text)


@sqlite_only
def test_access_log_and_statsd_tell_of_requests(start_server):
    """The caller's address behind a proxy that is trusted, and the time."""
    [options] = re.findall(r"^gunicorn (.*) wsgi:app$", README, re.MULTILINE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(30)
        options += f" --statsd-host 127.0.0.1:{statsd.getsockname()[1]}"
        server = start_server(*shlex.split(options), TRUSTED_PROXIES="1")
        headers = {"X-Forwarded-For": "198.51.100.9, 203.0.113.7"}
        assert server.get("/api/jobs?page=1", headers).status == 401
        line = r'^203\.0\.113\.7 "GET /api/jobs\?page=1 HTTP/1\.1" 401 \d+ \d+ms$'
        wait_until(lambda: re.search(line, server.log(), re.MULTILINE))
        heard = b""
        for name in (b"requests", b"request.status.401", b"request.duration"):
            while b"gunicorn." + name not in heard:
                heard += statsd.recv(65536)


@sqlite_only
def test_copy_of_sqlite_can_be_put_back(
    start_server, make_app, seed, tmp_path, import_state
):
    """Though it was made while the service ran, which then ended in a power cut."""
    commands = re.findall(r"^# (sqlite3|rm|install) (.*)", README, re.MULTILINE)

    def run(name):
        [line] = [rest for command, rest in commands if command == name]
        line = line.replace("/var/lib/jobs", str(tmp_path))
        line = line.replace("/root", f"{tmp_path}/copies").replace(
            "-o jobs -g jobs", ""
        )
        subprocess.run([find_program(name), *shlex.split(line)], check=True)

    (tmp_path / "copies").mkdir()
    server = start_server()
    headers = seed.auth_header | {"Host": HOST}
    before = server.get("/api/jobs", headers).body
    assert json.loads(before)["meta"]["total_entries"] == 3
    run("sqlite3")
    import_state(seed.state | {"workflows": []})
    assert json.loads(server.get("/api/jobs", headers).body)["data"] == []
    for pid in (server.process.pid, *server.workers()):
        os.kill(pid, signal.SIGKILL)
    run("rm")
    run("install")
    assert make_app().test_client().get("/api/jobs", headers=headers).data == before


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
        # Those that were refused count until they are gone.
        wait_until(
            lambda most=limit: execute(CONNECTIONS, [role]).fetchone()[0] <= most
        )
