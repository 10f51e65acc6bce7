"""What the README says of running the service: behind nginx, as a unit, in an image."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import closing
from fnmatch import fnmatch
from http.client import HTTPSConnection

import pytest
from conftest import ROOT, RUN, free_port, postgresql_only, sqlite_only, wait_until
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
        certificate = "req -x509 -newkey rsa:2048 -nodes -subj / "
        certificate += "-keyout jobs.key -out jobs.pem"
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
        self.process = subprocess.Popen(command, env={"JOBS_TEST_RUN": RUN})

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


@sqlite_only
def test_links_behind_nginx_have_the_address_that_was_asked(
    start_server, start_nginx, seed
):
    """Whatever a caller forwards of its own."""
    server = start_server(**BEHIND)
    nginx = start_nginx(block("nginx", "server_name").replace("8000", str(server.port)))
    for host in (HOST, f"{HOST}:8443"):
        for forwarded in ({}, FORWARDED):
            headers = seed.bearer | {"Host": host} | forwarded
            answer = json.loads(nginx.get("/api/jobs", headers).body)
            assert answer["links"]["self"] == f"https://{host}/api/jobs"
    assert nginx.get("/api/jobs", {"Host": "evil.example"}).status == 400


@sqlite_only
def test_services_behind_nginx_go_one_after_the_other(
    start_server, start_nginx, seed, paths
):
    """Reloaded or stopped, and no request is lost."""
    services = [start_server("--workers", "2", **BEHIND) for _ in range(2)]
    upstream = block("nginx", "upstream")
    for n, service in enumerate(services, start=1):
        upstream = upstream.replace(f"10.0.0.{n}:8000", f"127.0.0.1:{service.port}")
    server = block("nginx", "server_name").replace("127.0.0.1:8000", "jobs")
    nginx = start_nginx(upstream + server)
    with Load(nginx, paths, seed.bearer) as load:
        for service in services:
            load.wait_for(50)
            before = {*service.workers()}
            service.process.send_signal(signal.SIGHUP)
            wait_until(
                lambda service=service, before=before: (
                    len(service.workers()) == 2 and not before & {*service.workers()}
                )
            )
        load.wait_for(50)
        services[0].stop()
        load.wait_for(50)
    assert {answer.status for answer in load.answers} == {200}
    assert load.cut == []


[STRIPPED] = re.findall(r"proxy_pass (http://127.0.0.1:8000/\w+/);", README)


@sqlite_only
@pytest.mark.parametrize(
    ("location", "target", "path"),
    [
        ("/openfn/", "http://127.0.0.1:8000", "/openfn/api/jobs"),
        ("/", STRIPPED, "/api/jobs"),
    ],
    ids=["whole", "stripped"],
)
def test_links_below_a_prefix_have_it(
    start_server, start_nginx, seed, location, target, path
):
    server = start_server(SCRIPT_NAME="/openfn", **BEHIND)
    blocks = block("nginx", "server_name").replace("location /", f"location {location}")
    blocks = blocks.replace("http://127.0.0.1:8000", target)
    nginx = start_nginx(blocks.replace("8000", str(server.port)))
    answer = nginx.get(f"{path}?page_size=2", seed.bearer)
    links = json.loads(answer.body)["links"]
    root = f"https://{HOST}/openfn/api/jobs"
    assert links["self"] == f"{root}?page_size=2"
    assert links["next"] == f"{root}?page=2&page_size=2"


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


def files_in_image():
    """What the Dockerfile copies, where the last rule that fits a name decides."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = re.findall(
        r"^COPY (.*) \./$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    for name in os.listdir(ROOT):
        rules = [rule for rule in ignored if fnmatch(name, rule.removeprefix("!"))]
        is_let_in = not rules or rules[-1].startswith("!")
        if is_let_in and any(fnmatch(name, form) for form in " ".join(copied).split()):
            yield name


@pytest.fixture
def checkout(tmp_path):
    """A folder with nothing but what the image has, too."""
    (tmp_path / "checkout").mkdir()
    for file in files_in_image():
        shutil.copy(ROOT / file, tmp_path / "checkout")
    return tmp_path / "checkout"


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


@pytest.mark.parametrize("broken", ["app.py", "models.py", "gunicorn.conf.py"])
def test_unit_does_not_reload_what_cannot_be_loaded(checkout, broken):
    """With systemd, the first of its two commands must succeed."""
    check, _ = re.findall("^ExecReload=(.*)", block("ini", "[Service]"), re.MULTILINE)
    command = shlex.split(check.removeprefix("/srv/jobs/.venv/bin/"))
    assert run_in(checkout, *command) == 0
    with (checkout / broken).open("a") as file:
        file.write("import nothing")
    assert run_in(checkout, *command) != 0


# In one piece, though others write too.
TELL_TALE = r"""
import os
os.write(2, f"{os.getpid()} runs {__name__}\n".encode())
"""


@sqlite_only
def test_reload_loads_every_module_anew(start_server, checkout):
    """So that what was pulled is what runs."""
    server = start_server(folder=checkout)
    before = server.workers()
    modules = [path for path in checkout.glob("*.py") if path.stem.isidentifier()]
    for module in modules:
        with module.open("a") as file:
            file.write(TELL_TALE)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(server.workers()) == 1 and server.workers() != before)
    [worker] = server.workers()
    wait_until(lambda: f"{worker} runs wsgi" in server.log())
    names = {*re.findall(rf"^{worker} runs (\w+)$", server.log(), re.MULTILINE)}
    assert names == {module.stem for module in modules}


@sqlite_only
def test_access_log_tells_the_caller_s_address_and_the_time(start_server):
    """Behind a proxy that is trusted."""
    [options] = re.findall(r"^gunicorn (.*) wsgi:app$", README, re.MULTILINE)
    server = start_server(*shlex.split(options), TRUSTED_PROXIES="1")
    headers = {"X-Forwarded-For": "198.51.100.9, 203.0.113.7"}
    assert server.get("/api/jobs?page=1", headers).status == 401
    line = r'^203\.0\.113\.7 "GET /api/jobs\?page=1 HTTP/1\.1" 401 \d+ \d+ms$'
    wait_until(lambda: re.search(line, server.log(), re.MULTILINE))


@sqlite_only
def test_probes_tell_a_service_from_its_database(start_server):
    """The one for readiness under any host, as load balancers ask by address."""
    url = f"postgresql://jobs@127.0.0.1:{free_port()}/jobs"
    server = start_server(DATABASE_URL=url, **BEHIND)
    assert server.get("/health_check", {"Host": "10.0.0.1"}).status == 503
    assert server.get("/api/openapi.json", {"Host": HOST}).status == 200


@sqlite_only
def test_statsd_hears_of_requests(start_server):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(30)
        start_server("--statsd-host", f"127.0.0.1:{statsd.getsockname()[1]}")
        heard = b""
        for name in (b"requests", b"request.status.200", b"request.duration"):
            while b"gunicorn." + name not in heard:
                heard += statsd.recv(65536)


@sqlite_only
def test_copy_of_sqlite_can_be_put_back(
    start_server, seed, tmp_path, flask, import_state
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
    headers = seed.bearer | {"Host": HOST}
    before = server.get("/api/jobs", headers).body
    assert json.loads(before)["meta"]["total_entries"] == 3
    run("sqlite3")
    import_state(seed.state | {"workflows": []})
    assert json.loads(server.get("/api/jobs", headers).body)["data"] == []
    for pid in (server.process.pid, *server.workers()):
        os.kill(pid, signal.SIGKILL)
    run("rm")
    run("install")
    assert start_server().get("/api/jobs", headers).body == before


@pytest.fixture
def limited_url(execute, database_url):
    """A function that gives the URL of a new role that may connect so many times."""
    made = []

    def make(limit):
        made.append(f"limited_{limit}_{RUN}")
        execute(
            f"CREATE ROLE {made[-1]} LOGIN PASSWORD 'secret' CONNECTION LIMIT {limit};"
            f"GRANT USAGE ON SCHEMA public TO {made[-1]};"
            f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {made[-1]}"
        )
        url = make_url(database_url).set(username=made[-1], password="secret")
        return url.render_as_string(hide_password=False)

    yield make
    for role in made:
        execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@postgresql_only
@pytest.mark.parametrize(("limit", "statuses"), [(16, {200}), (1, {200, 503})])
def test_role_needs_eight_connections_a_worker(
    app, seed, limited_url, start_server, limit, statuses
):
    server = start_server("--workers", "2", DATABASE_URL=limited_url(limit))
    with Load(server, ["/api/jobs"], seed.bearer, clients=32) as load:
        load.wait_for(300)
    assert {answer.status for answer in load.answers} == statuses
    assert load.cut == []
