"""What docs/deployment.md says, done on this machine: nginx, systemd, upgrades."""

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
from shutil import copy2, copytree

import pytest
from documents import DEPLOYMENT, block
from load import Load
from servers import ROOT, files_in_image, find_program, free_port, wait_until

from app import create_app
from database import db

NGINX = (ROOT / "examples/nginx.conf").read_text()
HOST = "jobs.example.org"
# Tests ask 127.0.0.1 whether a server is up.
BEHIND_NGINX = {"TRUSTED_PROXIES": "1", "TRUSTED_HOSTS": f"{HOST},127.0.0.1"}


class Nginx:
    """An nginx process with blocks of configuration, and a certificate."""

    def __init__(self, folder, blocks):
        self.port = free_port()
        self.context = ssl._create_unverified_context()
        command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        command += " -subj / -keyout jobs.key -out jobs.pem"
        command = [find_program("openssl"), *command.split()]
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
        self.process = subprocess.Popen([*command, "-c", "nginx.conf"])
        wait_until(lambda: self.get("/").status)

    def get(self, path, headers=None):
        """Return the response over TLS, with its ``body`` read."""
        options = {"timeout": 30, "context": self.context}
        with closing(HTTPSConnection("127.0.0.1", self.port, **options)) as connection:
            connection.request("GET", path, headers={"Host": HOST} | (headers or {}))
            response = connection.getresponse()
            response.body = response.read()
            return response


@pytest.fixture
def start_nginx(tmp_path):
    """A function that starts nginx as the example says, in front of servers."""
    started = []

    def start(*servers, old="", new=""):
        folder = tmp_path / f"nginx-{len(started)}"
        folder.mkdir()
        lines = "\n".join(f"server 127.0.0.1:{server.port};" for server in servers)
        assert NGINX.count("server 127.0.0.1:8000;") == 1
        blocks = NGINX.replace("server 127.0.0.1:8000;", lines)
        started.append(Nginx(folder, blocks.replace(old, new) if old else blocks))
        return started[-1]

    yield start
    for nginx in started:
        nginx.process.terminate()
        nginx.process.wait(30)


def test_two_services_behind_nginx_lose_no_request(
    start_server, start_nginx, seeded_url, seeded
):
    """One is reloaded, the other is stopped. Links have the address of the request."""
    services = [start_server(seeded_url, **BEHIND_NGINX) for _ in range(2)]
    lines = re.findall(r"^ +server [\d.]+:8000;$", DEPLOYMENT, re.MULTILINE)
    assert len(lines) == len(services)
    nginx = start_nginx(*services)
    forwarded = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "http"}
    for headers in ({"Host": f"{HOST}:8443"}, {"Host": f"{HOST}:8443"} | forwarded):
        document = nginx.get("/api/jobs", seeded.auth_header | headers).body
        assert json.loads(document)["links"]["self"] == f"https://{HOST}:8443/api/jobs"
    assert nginx.get("/api/jobs", {"Host": "evil.example"}).status == 400
    zipped = nginx.get("/api/openapi.json", {"Accept-Encoding": "gzip"})
    assert zipped.headers["Content-Encoding"] == "gzip"
    with Load(nginx, seeded.paths, seeded.auth_header) as load:
        load.wait_for(20)
        reloaded, stopped = services
        before = reloaded.workers()
        reloaded.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: len(reloaded.workers()) == 1 and reloaded.workers() != before
        )
        load.wait_for(20)
        stopped.stop()
        load.wait_for(20)
    assert load.statuses() == {200} and load.disconnected == []


def test_service_below_a_prefix(start_server, start_nginx, seeded_url, seeded):
    """Its access log and StatsD report requests as "Monitoring" says."""
    [options] = re.findall(r"^gunicorn (.*) wsgi:app$", DEPLOYMENT, re.MULTILINE)
    [statsd_host] = re.findall(r"`(--statsd-host \S+:)8125`", DEPLOYMENT)
    [location] = re.findall(r"`(location /\w+/)`", DEPLOYMENT)
    [proxy_pass] = re.findall(r"`(proxy_pass http://jobs/\w+/);`", DEPLOYMENT)
    [probe] = re.findall(r"a probe requests `(\S+)`", DEPLOYMENT)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(30)
        options += f" {statsd_host}{statsd.getsockname()[1]}"
        variables = BEHIND_NGINX | {"SCRIPT_NAME": "/openfn"}
        server = start_server(seeded_url, *shlex.split(options), **variables)
        received = b""
        while b"gunicorn.request.duration" not in received:
            received += statsd.recv(65536)
    assert server.get(probe).status == 200
    assert server.get("/api/jobs").status == 500
    page = server.get("/openfn/api/docs").body.decode()
    for path in re.findall(r'(?:src|href)="([^"]+)"|"url": "([^"]+)"', page):
        assert server.get("".join(path)).status == 200
    document = json.loads(server.get("/openfn/api/openapi.json").body)
    assert document["servers"][0]["url"] == "/openfn"
    whole = start_nginx(server, old="location /", new=location)
    stripped = start_nginx(server, old="proxy_pass http://jobs", new=proxy_pass)
    for nginx, path in (whole, "/openfn/api/jobs"), (stripped, "/api/jobs"):
        response = nginx.get(f"{path}?page_size=2", seeded.auth_header)
        links = json.loads(response.body)["links"]
        root = f"https://{HOST}/openfn/api/jobs"
        assert links["self"] == f"{root}?page_size=2"
        assert links["next"] == f"{root}?page=2&page_size=2"
    forwarded = {"X-Forwarded-For": "198.51.100.9, 203.0.113.7"}
    assert server.get("/openfn/api/jobs?page=1", forwarded).status == 401
    line = r"^203\.0\.113\.7 GET '/api/jobs' 401 \d+ \d+ms$"
    wait_until(lambda: re.search(line, server.log(), re.MULTILINE))


def test_unit_is_valid_and_confined(tmp_path):
    """Its exposure is at most 3 of 10, as systemd rates it."""
    unit, text = tmp_path / "jobs.service", ROOT / "examples/jobs.service"
    unit.write_text(text.read_text().replace("/srv/jobs", str(ROOT)))
    command = [find_program("systemd-analyze"), "--no-pager"]
    options = {"stderr": subprocess.STDOUT, "stdout": subprocess.PIPE, "text": True}
    verified = subprocess.run([*command, "verify", unit], **options)
    assert "jobs.service" not in verified.stdout
    security = ["security", "--offline=true", "--threshold=30", unit]
    assert subprocess.run([*command, *security], **options).returncode == 0


def test_image_has_what_runs_and_nothing_else():
    """The documentation names the volume, the port and the user of the image."""
    modules = {path.name for path in ROOT.glob("*.py")}
    assert {*files_in_image()} == modules | {
        "demo.json", "openapi.json", "requirements.txt"
    }  # fmt: skip
    dockerfile = (ROOT / "Dockerfile").read_text()
    values = dict(re.findall(r"^(CMD|VOLUME|EXPOSE|USER) (.*)", dockerfile, re.M))
    assert json.loads(values["CMD"])[-1] == "wsgi:app"
    run = block(DEPLOYMENT, "sh", "docker build")
    assert f":{values['EXPOSE']} -v jobs:{values['VOLUME']} " in run
    assert f"runs as user {values['USER']} " in DEPLOYMENT


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
    """A folder used as the root of a machine, and a repository to clone from."""

    def __init__(self, folder, origin):
        self.folder, self.origin = folder, origin
        etc, var = "etc/systemd/system", "var/lib/jobs"
        for name in (etc, var, "root", "stubs", "usr/local/bin"):
            (folder / name).mkdir(parents=True)
        for name in ("Makefile", ".gitignore"):
            copy2(ROOT / name, origin)
        copytree(ROOT / "examples", origin / "examples")
        self.commit("First version")
        for name, script in STUBS.items():
            (folder / "stubs" / name).write_text(f"#!/bin/sh\n{script}")
            (folder / "stubs" / name).chmod(0o755)

    def commit(self, subject):
        """Commit everything in the repository."""
        who = "-c user.name=Test -c user.email=test@example.org"
        command = f"git init -q; git add .; git {who} commit -qm '{subject}'"
        subprocess.run(["sh", "-ec", command], cwd=self.origin, check=True)

    def translate(self, text):
        """Return the text with the paths of this machine."""
        text = text.replace("-o jobs -g jobs ", "").replace(
            "REPOSITORY", f"{self.origin}"
        )
        roots = r"(?<![\w.])/(srv|etc|root|usr/local|var)/"
        return re.sub(roots, rf"{self.folder}/\1/", text)

    def run(self, script):
        """Paste a block into a shell, and return what it prints."""
        path = f"{self.folder}/stubs:{self.folder}/usr/local/bin:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail"],
            input=self.translate(script),
            cwd=self.folder / "root",
            env={"PATH": path, "HOME": str(self.folder)},
            check=True,
            text=True,
            stdout=subprocess.PIPE,
        ).stdout


@pytest.fixture
def machine(tmp_path, checkout):
    """A machine without the service."""
    return Machine(tmp_path / "machine", checkout)


def test_blocks_set_up_upgrade_and_restore_a_service(machine, new_state):
    """The copy brings back a project that was deleted after the upgrade."""
    setup = block(DEPLOYMENT, "sh", "useradd")
    clone = setup.splitlines()[0]
    machine.run(clone)
    (machine.folder / "srv/jobs/.venv").symlink_to(sys.prefix)
    # As old as what is installed, so that make installs nothing.
    os.utime(machine.folder / "srv/jobs/requirements.txt", (0, 0))
    flask = machine.folder / "srv/jobs/examples/jobs-flask"
    flask.write_text(machine.translate(flask.read_text()))
    machine.run(setup.replace(clone, ""))
    assert (machine.folder / "etc/jobs.env").stat().st_mode & 0o777 == 0o600
    (machine.folder / "root/project.json").write_text(json.dumps(new_state()))
    token = machine.run(block(DEPLOYMENT, "sh", "jobs-flask import-project")).split()[
        -1
    ]

    def list_jobs():
        url = f"sqlite:///{machine.folder}/var/lib/jobs/jobs.db"
        app = create_app({"DATABASE_URL": url})
        headers = {"Authorization": f"Bearer {token}"}
        response = app.test_client().get("/api/jobs", headers=headers)
        with app.app_context():
            db.engine.dispose()
        return response.json

    before = list_jobs()
    assert before["meta"]["total_entries"] == 3
    machine.run(block(DEPLOYMENT, "sh", ".backup"))
    (machine.origin / "new.py").write_text('"""A new module."""\n')
    machine.commit("Second version")
    machine.run(block(DEPLOYMENT, "sh", "git -C /srv/jobs pull"))
    assert (machine.folder / "srv/jobs/new.py").exists()
    project = before["data"][0]["relationships"]["project"]["data"]["id"]
    machine.run(f"jobs-flask delete-project {project}")
    assert list_jobs()["data"] == []
    machine.run(block(DEPLOYMENT, "sh", "-wal"))
    assert list_jobs() == before
    machine.run(block(DEPLOYMENT, "sh", "reset --keep"))
    assert not (machine.folder / "srv/jobs/new.py").exists()


@pytest.mark.postgresql
def test_postgresql_can_be_restored(machine, client, seed, run_flask, database_url):
    before = client.get("/api/jobs", headers=seed.auth_header).data
    address = "postgresql://jobs:password@db.example.org/jobs"
    copy, restore = (
        block(DEPLOYMENT, "sh", word).replace(address, database_url)
        for word in ("pg_dump", "pg_restore")
    )
    assert database_url in copy and database_url in restore
    machine.run(f"git clone -q REPOSITORY /srv/jobs\n{copy}")
    run_flask("delete-project", seed.project_id)
    machine.run(restore)
    assert client.get("/api/jobs", headers=seed.auth_header).data == before
