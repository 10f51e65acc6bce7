"""Start a Jobs API for the tests of another project: copy this file there.

It needs pytest, and a checkout of the Jobs API in which ``make install`` has run.
"""

import socket
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest

CHECKOUT = Path("/srv/jobs")
PROJECT = Path(__file__).with_name("project.json")


# The API is read-only, so one service is enough for all tests. For one service per
# test, remove the scope.
@pytest.fixture(scope="session")
def jobs_api(tmp_path_factory):
    """Return the URL of a Jobs API that serves PROJECT, and the token of a member."""
    database = tmp_path_factory.mktemp("jobs_api") / "jobs.db"
    options = {"cwd": CHECKOUT, "env": {"DATABASE_URL": f"sqlite:///{database}"}}

    def run_flask(*args):
        command = [CHECKOUT / ".venv/bin/flask", *args]
        return subprocess.check_output(command, text=True, **options).strip()

    run_flask("init-db")
    run_flask("import-project", PROJECT, "--member", "you@example.org")
    token = run_flask("create-token", "you@example.org")
    command = [CHECKOUT / ".venv/bin/gunicorn", "wsgi:app", "--bind"]
    # The service inherits an open socket, so no other program can take its port.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        fd = listener.fileno()
        service = subprocess.Popen([*command, f"fd://{fd}"], pass_fds=[fd], **options)
    with service:
        try:
            urlopen(f"{url}/health_check", timeout=30).close()
            yield url, token
        finally:
            service.terminate()
