"""The examples in the README and the pytest fixture for other projects."""

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from shutil import which
from textwrap import dedent

import pytest
from conftest import (
    ROOT,
    RUN_ID,
    free_port,
    sqlite_only,
    wait_until,
    with_shared_server,
)
from sqlalchemy import make_url

from config import load_config

README = (ROOT / "README.md").read_text()


def block(text, language, word):
    """Return the only block of code in a language that contains a word."""
    form = rf"^ *```{language}\n(.*?)^ *```"
    blocks = re.findall(form, text, re.DOTALL | re.MULTILINE)
    [found] = [block for block in blocks if word in block]
    return dedent(found)


def find_program(name):
    """Return the path of a program, or skip the test on a machine that lacks it."""
    found = which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if not found:
        assert not os.environ.get("CI"), f"CI must have {name}"
        pytest.skip(f"needs {name}")
    return found


@sqlite_only
def test_quick_start_prints_what_the_readme_shows(app_without_tables):
    demo = app_without_tables.test_cli_runner().invoke(args=["demo"]).stdout
    token = demo.split()[1]
    shown = block(README, "text", "Token:")
    assert re.sub(r"[\w-]{43}", "TOKEN", demo) == re.sub(r"[\w-]{43}", "TOKEN", shown)
    response = app_without_tables.test_client().get(
        "/api/jobs?page_size=1",
        headers={"Authorization": f"Bearer {token}"},
        base_url="http://127.0.0.1:8000",
    )
    command = [find_program("jq"), "."]
    output = subprocess.check_output(command, input=response.text, text=True)
    shown = block(README, "json", '"data"')
    for part in re.split("^ *…\n", shown, flags=re.MULTILINE):
        assert part in output
        output = output[output.index(part) + len(part) :]


@sqlite_only
def test_example_of_an_error_is_true(client, seed):
    response = client.get("/api/jobs?page_size=0", headers=seed.auth_header)
    assert f"```json\n{response.text}\n```" in README


@pytest.fixture
def checkout(checkout):
    """A checkout in which ``make install`` finds everything installed."""
    shutil.copy2(ROOT / "Makefile", checkout)
    (checkout / ".venv").symlink_to(sys.prefix)
    return checkout


def test_own_jobs_are_imported_as_the_readme_shows(checkout):
    """The project file is what ``openfn project pull`` would have written."""
    commands, server = block(README, "sh", "flask init-db").split("gunicorn")
    assert server == " wsgi:app\n"
    pull, *commands = commands.splitlines()
    assert pull.startswith("openfn project pull")
    project_id = pull.split()[-1]
    [path] = re.findall(r"import-project (\S+)", "\n".join(commands))
    project = {
        "id": "clinic",
        "name": "clinic",
        "schema_version": "4.0",
        "openfn": {"uuid": project_id},
        "workflows": [
            {
                "id": "visits",
                "name": "Visits",
                "openfn": {"uuid": "7b1d2e90-4c3a-4f58-8e61-0a9c5d7f3b24"},
                "steps": [
                    {
                        "id": f"step-{n}",
                        "name": f"Step {n}",
                        "expression": "fn();",
                        "openfn": {"uuid": f"c2a4e6f8-1b3d-4579-a8c0-e2f4a6b8c0d{n}"},
                    }
                    for n in range(3)
                ],
            }
        ],
    }
    (checkout / path).parent.mkdir()

    def run(*lines):
        (checkout / path).write_text(json.dumps(project))
        return subprocess.run(
            ["bash", "-ec", "\n".join(lines)],
            cwd=checkout,
            env={"PATH": os.environ["PATH"], "JOBS_TEST_RUN": RUN_ID},
            capture_output=True,
            text=True,
        )

    done = run(*commands)
    assert done.returncode == 0, done.stderr
    success, *error = block(README, "text", "Imported project").splitlines()
    assert success in done.stdout.splitlines()
    assert re.fullmatch(r"[\w-]{43}", done.stdout.splitlines()[-1])
    project["workflows"][0]["steps"][2]["openfn"]["uuid"] = "2"
    activate, import_project = commands[1], commands[3]
    done = run(activate, import_project)
    assert done.returncode == 1
    assert done.stderr.splitlines() == error


@pytest.fixture
def read_pages(tmp_path, seed):
    """A function that starts the script that reads all pages, with one job a page."""
    for name in ("curl", "jq"):
        find_program(name)
    script = block(README, "sh", "curl")
    started = []

    def start(port, **options):
        _, _, token = seed.auth_header["Authorization"].partition(" ")
        text = re.sub(r"TOKEN=\S+", f"TOKEN={token}", script, count=1)
        text = text.replace(":8000/", f":{port}/")
        text = text.replace("page_size=100", "page_size=1")
        command = ["sh", "-c", text]
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
def test_script_fails_if_no_server_listens(read_pages):
    process = read_pages(free_port(), stderr=subprocess.PIPE)
    assert "curl: (7)" in process.communicate(timeout=10)[1]
    assert process.returncode == 7


@pytest.fixture
def read_many_pages(server, read_pages, seed, import_state, new_state, tmp_path):
    """A function that starts the script on a project with many jobs.

    It returns when the script has read some of them.
    """

    def start(state):
        import_state(state, "you@example.org")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = read_pages(server.port, **pipes)
        wait_until(lambda: (tmp_path / "jobs.jsonl").read_text().count("\n") > 5)
        return process

    return start


@with_shared_server()
def test_script_starts_again_if_a_job_that_it_has_read_is_deleted(
    read_many_pages, seed, new_state, import_state, run_flask
):
    run_flask("delete-project", seed.project_id)
    state = new_state(jobs=40)
    process = read_many_pages(state)
    del state["workflows"][0]["jobs"][0]
    import_state(state)
    output, _ = process.communicate(timeout=90)
    assert output.splitlines() == [f"Job {n}" for n in range(1, 40)]
    assert process.returncode == 0


@with_shared_server()
def test_script_fails_if_the_database_becomes_unavailable(
    server, read_many_pages, new_state
):
    process = read_many_pages(new_state(jobs=1000))
    path = make_url(server.database_url).database
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        connection.execute("ALTER TABLE user_tokens RENAME TO away")
        try:
            output, errors = process.communicate(timeout=30)
        finally:
            connection.execute("ALTER TABLE away RENAME TO user_tokens")
    assert output == ""
    assert "503" in errors
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
    print(f"sent to {url}.")

def test_that_fails(jobs_api):
    print(f"sent to {jobs_api[0]}.")
    assert not config.IS_WRONG
"""

FIXTURE = (ROOT / "examples/conftest.py").read_text()
SCOPE = '(scope="session")'


@pytest.fixture
def run_elsewhere(tmp_path, new_state):
    """A function that tests another project with a fixture from examples/."""
    (tmp_path / "app.py").touch()
    (tmp_path / "config.py").write_text("IS_WRONG = True")
    (tmp_path / "projectState.json").write_text(json.dumps(new_state(jobs=3)))
    (tmp_path / "test_elsewhere.py").write_text(ELSEWHERE)

    def run(fixture):
        text = fixture.replace("/srv/jobs", str(ROOT))
        (tmp_path / "conftest.py").write_text(text)
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-rA", "-W", "error"],
            cwd=tmp_path,
            env={"JOBS_TEST_RUN": RUN_ID, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            text=True,
            stdout=subprocess.PIPE,
        )

    return run


@pytest.mark.parametrize(
    ("fixture", "count"),
    [(FIXTURE, 1), (FIXTURE.replace(SCOPE, ""), 2)],
    ids=["session", "test"],
)
def test_fixture_serves_the_tests_of_another_project(run_elsewhere, fixture, count):
    """The service stops after them, and a test that fails shows what it has logged."""
    assert SCOPE in FIXTURE
    done = run_elsewhere(fixture)
    assert done.returncode == 1 and "Booting worker" in done.stdout, done.stdout
    # No error is reported except the one of the test.
    assert "- assert not True" in done.stdout
    assert "= 1 failed, 1 passed in" in done.stdout
    ports = re.findall(r"^sent to http://127.0.0.1:(\d+)\.", done.stdout, re.MULTILINE)
    assert len(set(ports)) == count and len(ports) == 2
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)))


def test_fixture_shows_why_a_service_did_not_start(run_elsewhere):
    done = run_elsewhere(FIXTURE.replace("wsgi:app", "wsgi:nothing"))
    assert done.returncode == 1, done.stdout
    assert "Failed to find attribute 'nothing' in 'wsgi'" in done.stdout


def test_every_setting_is_in_the_table_with_its_default():
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", README, re.MULTILINE))
    defaults = load_config({})
    assert rows.keys() == defaults.keys()
    for name, default in defaults.items():
        words = {None: {"none", "any"}}.get(default, {str(default)})
        assert rows[name].strip("`") in words


@sqlite_only
def test_every_command_is_in_the_table(app):
    names = re.findall(r"^\| `flask ([a-z-]+)", README, re.MULTILINE)
    assert sorted(names) == sorted(app.cli.commands)


@sqlite_only
def test_every_path_is_in_the_table(app):
    paths = set(re.findall(r"`GET (/[\w/.]+)", README))
    rules = {re.sub("<.*?>", "UUID", rule.rule) for rule in app.url_map.iter_rules()}
    # The page at /api/docs loads its files from below it.
    assert paths == rules - {"/api/docs/UUID"}
