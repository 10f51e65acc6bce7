"""Two hosts in one URL: a primary and its standby, either of which can stop."""

import json
import os
import subprocess
import time
from glob import glob
from pathlib import Path
from shutil import chown, rmtree
from tempfile import mkdtemp

import pytest
from load import Load
from servers import find_program, free_port, wait_until

from app import create_app
from database import db


class PostgreSQL:
    """A PostgreSQL server with its data in a folder, run by a user other than root."""

    def __init__(self, folder):
        self.folder, self.port = Path(folder), free_port()

    def run(self, command, *arguments):
        """Run one of PostgreSQL's programs, not Debian's wrapper of it."""
        found = glob(f"/usr/lib/postgresql/*/bin/{command}")
        subprocess.run(
            [found[0] if found else find_program(command), *arguments],
            cwd=self.folder.parent,
            user="postgres" if os.getuid() == 0 else None,
            env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def start(self):
        """Start the server and wait until it accepts connections."""
        options = f"-h 127.0.0.1 -p {self.port} -k '' -c fsync=off"
        log = f"{self.folder}.log"
        self.run("pg_ctl", "start", "-w", "-D", self.folder, "-o", options, "-l", log)

    def stop(self):
        """Stop the server as a power failure would."""
        self.run("pg_ctl", "stop", "-m", "immediate", "-D", self.folder)


@pytest.fixture
def hosts():
    """A primary and its standby, with the sample project, and a header for it."""
    folder = mkdtemp(prefix="jobs_test_")
    if os.getuid() == 0:
        chown(folder, "postgres")
    primary, standby = (PostgreSQL(f"{folder}/{name}") for name in ("one", "two"))
    try:
        primary.run("initdb", "-N", "-D", primary.folder, "-U", "jobs", "-A", "trust")
        primary.start()
        source = f"host=127.0.0.1 port={primary.port} user=jobs"
        standby.run("pg_basebackup", "-R", "-D", standby.folder, "-d", source)
        standby.start()
        yield primary, standby
    finally:
        for host in (primary, standby):
            if Path(host.folder, "postmaster.pid").exists():
                host.stop()
        rmtree(folder)


def url_of(*hosts, parameters=""):
    """Return one URL with all hosts, and with more query parameters."""
    names = "&".join(f"host=127.0.0.1:{host.port}" for host in hosts)
    return f"postgresql://jobs@/postgres?{names}{parameters}"


def run_demo(url):
    """Run ``flask demo`` and return its result."""
    app = create_app({"DATABASE_URL": url})
    result = app.test_cli_runner().invoke(args=["demo"])
    with app.app_context():
        db.engine.dispose()
    return result


def test_either_host_can_stop(hosts, start_server):
    """Two seconds after a host stops under load, all responses are correct again.

    Commands that write need the parameter for the primary.
    """
    primary, standby = hosts
    parameters = "&target_session_attrs=primary"
    token = run_demo(url_of(standby, primary, parameters=parameters)).stdout.split()[1]
    headers = {"Authorization": f"Bearer {token}"}
    server = start_server(url_of(standby, primary))
    # The standby needs a moment to receive the sample.
    wait_until(lambda: server.get("/api/jobs", headers).status == 200)
    [line] = run_demo(url_of(standby, primary)).stderr.splitlines()
    assert "during recovery" in line
    expected = server.get("/api/jobs", headers).body
    assert json.loads(expected)["meta"]["total_entries"] == 3
    later = []
    with Load(server, ["/api/jobs"], headers, clients=2) as load:
        for stopped in (standby, primary):
            load.wait_for(20)
            stopped.stop()
            recovered = time.monotonic() + 2
            wait_until(lambda t=recovered: load.responses[-1].began > t)
            load.wait_for(20)
            later += [r for r in load.responses if r.began > recovered]
            stopped.start()
    assert load.disconnected == [] and load.statuses() <= {200, 503}
    assert {response.status for response in later} == {200}
