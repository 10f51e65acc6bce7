"""The README's examples are what the service does."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
from conftest import ROOT, RUN_ID, free_port, sqlite_only, with_shared_server
from sqlalchemy import make_url
from test_lightning import GRANTS

from config import Settings

README = (ROOT / "README.md").read_text()


@sqlite_only
def test_first_example_prints_what_it_says(app_without_tables):
    demo = app_without_tables.test_cli_runner().invoke(args=["demo"]).stdout
    token = demo.split()[1]
    assert re.sub(r"[\w-]{43}", "TOKEN", demo) in re.sub(r"[\w-]{43}", "TOKEN", README)
    response = app_without_tables.test_client().get(
        "/api/jobs?page_size=1",
        headers={"Authorization": f"Bearer {token}"},
        base_url="http://127.0.0.1:8000",
    )
    assert response.text in README


@sqlite_only
def test_example_of_an_error_is_true(client, seed):
    response = client.get("/api/jobs?page_size=0", headers=seed.auth_header)
    assert response.text in README


def block(language, word):
    """The one block of code in a language that has a word in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    [found] = [block for block in blocks if word in block]
    return found


def find_program(name):
    """Where a program is that a machine may lack; the test is skipped there."""
    found = which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if not found:
        assert not os.environ.get("CI"), f"CI must have {name}"
        pytest.skip(f"needs {name}")
    return found


@pytest.fixture
def read_pages(tmp_path, seed):
    """A function that starts the script that reads all pages, with a job a page."""
    for name in ("curl", "jq"):
        find_program(name)
    script = block("sh", "curl")
    started = []

    def start(port, **options):
        _, _, token = seed.auth_header["Authorization"].partition(" ")
        text = re.sub(r"TOKEN=\S+", f"TOKEN={token}", script, count=1)
        text = text.replace(":8000/", f":{port}/")
        text = text.replace("page_size=100", "page_size=1")
        command = ["bash", "-c", text]
        started.append(subprocess.Popen(command, cwd=tmp_path, text=True, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@with_shared_server()
def test_script_reads_all_pages(server, read_pages, seed):
    process = read_pages(server.port, stdout=subprocess.PIPE)
    names = [job["name"] for flow in seed.state["workflows"] for job in flow["jobs"]]
    assert process.communicate(timeout=30)[0].split("\n") == [*names, ""]
    assert process.returncode == 0


@sqlite_only
def test_script_fails_where_nobody_listens(read_pages):
    process = read_pages(free_port(), stderr=subprocess.PIPE)
    assert "curl: (7)" in process.communicate(timeout=10)[1]
    assert process.returncode == 7


@with_shared_server()
def test_script_fails_where_the_database_goes_away(
    server, read_pages, seed, import_state, new_state
):
    """Though it has printed what it got until then."""
    import_state(new_state(jobs=1000), "you@example.org")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = read_pages(server.port, **pipes)
    assert process.stdout.readline() == "Job 0\n"
    path = Path(make_url(server.database_url).database)
    path.rename(f"{path}.away")
    try:
        said = process.communicate(timeout=30)[1]
    finally:
        Path(f"{path}.away").rename(path)
    assert "503" in said
    assert process.returncode == 22


ELSEWHERE = """
import json
from urllib.request import Request, urlopen

import app
import config

def test_jobs(jobs_api):
    url, token = jobs_api
    request = Request(f"{url}/api/jobs", headers={"Authorization": f"Bearer {token}"})
    with urlopen(request) as response:
        assert json.load(response)["meta"]["total_entries"] == 3
    print(f"asked {url}.")
    assert not config.IS_WRONG
"""


@pytest.fixture
def run_elsewhere(tmp_path, new_state):
    """A function that tests another project with the README's fixture."""
    (tmp_path / "app.py").touch()
    (tmp_path / "config.py").write_text("IS_WRONG = True")
    (tmp_path / "projectState.json").write_text(json.dumps(new_state(jobs=3)))
    (tmp_path / "test_elsewhere.py").write_text(ELSEWHERE)
    example = block("python", "jobs_api").replace("/srv/jobs", str(ROOT))

    def run(served="wsgi:app"):
        (tmp_path / "conftest.py").write_text(example.replace("wsgi:app", served))
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-W", "error"],
            cwd=tmp_path,
            env={"JOBS_TEST_RUN": RUN_ID, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            text=True,
            stdout=subprocess.PIPE,
        )

    return run


def test_fixture_serves_other_projects_and_ends_with_a_test_that_fails(run_elsewhere):
    """At its last line, and shows what the service has logged."""
    done = run_elsewhere()
    assert done.returncode == 1 and "Booting worker" in done.stdout, done.stdout
    assert "- assert not True" in done.stdout
    [port] = re.findall(r"^asked http://127.0.0.1:(\d+)", done.stdout, re.MULTILINE)
    # And no error beside it.
    assert "= 1 failed in" in done.stdout
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)))


def test_fixture_shows_why_a_service_did_not_start(run_elsewhere):
    done = run_elsewhere(served="wsgi:nothing")
    assert done.returncode == 1, done.stdout
    assert "Failed to find attribute 'nothing' in 'wsgi'" in done.stdout


def test_grants_are_those_that_are_tested():
    """Up to the name of the role and the folding of lines."""
    [sql] = re.findall(r"```sql\n(.*?)```", README, re.DOTALL)
    granted = GRANTS.format(role="jobs_api").split()
    assert sql.split("'…';")[1].split() == granted


@sqlite_only
def test_every_variable_and_command_is_told(app):
    for name in Settings().fields:
        assert f"| `{name}` |" in README
    for command in app.cli.commands:
        assert f"| `flask {command}" in README
