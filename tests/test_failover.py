"""Two hosts in one URL: a primary and its standby, either of which can stop."""

import json
import os
import subprocess
import time
from glob import glob
from pathlib import Path
from shutil import chown, rmtree, which
from tempfile import mkdtemp

import pytest
from conftest import RUN_ID, free_port, sqlite_only, wait_until
from test_server import Load

# The fixtures require a kind of database, although these tests start two servers.
pytestmark = sqlite_only


class PostgreSQL:
    """A PostgreSQL server with its data in a folder, run by a user other than root."""

    def __init__(self, folder):
        self.folder, self.port = Path(folder), free_port()

    def run(self, command, *arguments):
        """Run one of PostgreSQL's programs."""
        user = "postgres" if os.getuid() == 0 else None
        subprocess.run(
            [program(command), *arguments],
            cwd=self.folder.parent,
            user=user,
            env={"JOBS_TEST_RUN": RUN_ID, "LC_ALL": "C", "PATH": os.environ["PATH"]},
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

    def is_running(self):
        """Return whether the server was started and not stopped."""
        return Path(self.folder, "postmaster.pid").exists()


def program(name):
    """Return the path of one of PostgreSQL's programs, not of Debian's wrapper."""
    folders = glob("/usr/lib/postgresql/*/bin")
    return which(name, path=os.pathsep.join([*folders, os.environ["PATH"]]))


@pytest.fixture(scope="module")
def servers():
    """A primary and its standby, which every test leaves running and unchanged."""
    if not all(map(program, ("initdb", "pg_basebackup", "pg_ctl"))):
        assert not os.environ.get("CI"), "CI must have PostgreSQL's programs"
        pytest.skip("needs initdb, pg_basebackup and pg_ctl")
    folder = mkdtemp(prefix=RUN_ID)
    if os.getuid() == 0:
        chown(folder, "postgres")
    primary, standby = servers = [
        PostgreSQL(f"{folder}/{name}") for name in ("primary", "standby")
    ]
    try:
        primary.run("initdb", "-D", primary.folder, "-U", "jobs", "-A", "trust")
        primary.start()
        source = f"host=127.0.0.1 port={primary.port} user=jobs"
        standby.run("pg_basebackup", "-R", "-D", standby.folder, "-d", source)
        standby.start()
        yield servers
    finally:
        for server in servers:
            if server.is_running():
                server.stop()
        rmtree(folder)


def url_of(*servers, parameters=""):
    """Return one URL with the hosts of all servers, and with more query parameters."""
    hosts = "&".join(f"host=127.0.0.1:{server.port}" for server in servers)
    return f"postgresql://jobs@/postgres?{hosts}{parameters}"


@pytest.fixture
def auth_header(servers, make_app):
    """The header with the demo's token, which the standby has received too."""
    primary, standby = (make_app(DATABASE_URL=url_of(server)) for server in servers)
    token = primary.test_cli_runner().invoke(args=["demo"]).stdout.split()[1]
    auth_header = {"Authorization": f"Bearer {token}"}
    client = standby.test_client()
    wait_until(lambda: client.get("/api/jobs", headers=auth_header).status_code == 200)
    return auth_header


def test_either_host_can_stop(servers, auth_header, start_server):
    """Two seconds after a host stops under load, all responses are correct again."""
    server = start_server(DATABASE_URL=url_of(*servers))
    expected = server.get("/api/jobs", auth_header).body
    assert json.loads(expected)["meta"]["total_entries"] == 3
    later = []
    with Load(server, ["/api/jobs"], auth_header, clients=2) as load:
        for stopped_server in servers:
            load.wait_for(50)
            stopped_server.stop()
            try:
                recovered = time.monotonic() + 2
                wait_until(lambda t=recovered: load.responses[-1].began > t)
                load.wait_for(50)
                later += [r for r in load.responses if r.began > recovered]
            finally:
                stopped_server.start()
    assert load.disconnected == []
    assert {response.status for response in load.responses} <= {200, 503}
    assert {response.status for response in later} == {200}
    bodies = {response.body for response in load.responses if response.status == 200}
    assert bodies == {expected}
    assert max(response.seconds for response in load.responses) < 5


def test_command_on_a_standby_is_a_one_line_error(servers, make_app):
    """The error names both hosts, and a URL that asks for the primary avoids it."""
    primary, standby = servers
    runner = make_app(DATABASE_URL=url_of(standby, primary)).test_cli_runner()
    for command in ("init-db", "demo"):
        result = runner.invoke(args=[command])
        assert (result.exit_code, result.stdout) == (1, "")
        [line] = result.stderr.splitlines()
        assert f"127.0.0.1:{standby.port}, " in line and "during recovery" in line
    url = url_of(standby, primary, parameters="&target_session_attrs=primary")
    runner = make_app(DATABASE_URL=url).test_cli_runner()
    assert runner.invoke(args=["demo"]).exit_code == 0


def test_server_without_tls_is_unavailable_if_tls_is_required(
    servers, make_app, caplog
):
    """One line in the log reports that the server does not support TLS."""
    for mode in ("require", "verify-full&sslrootcert=/no/such/ca.pem"):
        caplog.clear()
        url = url_of(servers[0], parameters=f"&sslmode={mode}")
        client = make_app(DATABASE_URL=url).test_client()
        assert client.get("/health_check").status_code == 503
        [record] = caplog.records
        assert "server does not support SSL" in record.message
        assert "\n" not in record.message
