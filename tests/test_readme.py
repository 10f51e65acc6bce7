"""The README's examples are what the service does."""

import json
import os
import re
import sqlite3
import subprocess
from shutil import which

import pytest
from conftest import ROOT, free_port, sqlite_only
from test_lightning import GRANTS

from config import Settings
from database import db

README = (ROOT / "README.md").read_text()


@sqlite_only
def test_first_example_prints_what_it_says(empty_app):
    demo = empty_app.test_cli_runner().invoke(args=["demo"]).stdout
    token = demo.split()[1]
    assert re.sub(r"[\w-]{43}", "TOKEN", demo) in re.sub(r"[\w-]{43}", "TOKEN", README)
    response = empty_app.test_client().get(
        "/api/jobs?page_size=1",
        headers={"Authorization": f"Bearer {token}"},
        base_url="http://127.0.0.1:8000",
    )
    assert response.text in README


@sqlite_only
def test_example_of_an_error_is_true(client, seed):
    response = client.get("/api/jobs?page_size=0", headers=seed.bearer)
    assert response.text in README


def block(language, word):
    """The one block of code in a language that has a word in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    [found] = [block for block in blocks if word in block]
    return found


@pytest.fixture
def read_pages(tmp_path, seed):
    """A function that starts the script that reads all pages, with a job a page."""
    if not (which("curl") and which("jq")):
        assert not os.environ.get("CI"), "CI must have curl and jq"
        pytest.skip("needs curl and jq")
    script = block("sh", "curl")
    started = []

    def start(port, **options):
        _, _, token = seed.bearer["Authorization"].partition(" ")
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


@sqlite_only
def test_script_reads_all_pages(start_server, read_pages, seed):
    process = read_pages(start_server().port, stdout=subprocess.PIPE)
    names = [job["name"] for flow in seed.state["workflows"] for job in flow["jobs"]]
    assert process.communicate(timeout=30)[0].split("\n") == [*names, ""]
    assert process.returncode == 0


@sqlite_only
def test_script_fails_where_nobody_listens(read_pages):
    process = read_pages(free_port(), stderr=subprocess.PIPE)
    assert "curl: (7)" in process.communicate(timeout=10)[1]
    assert process.returncode == 7


@sqlite_only
def test_script_fails_where_the_database_goes_away(
    start_server, read_pages, seed, import_state, new_state, tmp_path
):
    """Though it has printed what it got until then."""
    import_state(new_state(jobs=1000), "you@example.org")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = read_pages(start_server().port, **pipes)
    assert process.stdout.readline() == "Job 0\n"
    with sqlite3.connect(tmp_path / "jobs.db") as connection:
        connection.execute("ALTER TABLE jobs RENAME TO gone")
    connection.close()
    assert "503" in process.communicate(timeout=30)[1]
    assert process.returncode == 22


@sqlite_only
def test_example_of_an_integration_test_passes(
    tmp_path, new_state, monkeypatch, database_url
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(new_state(jobs=3)))
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(f"from app import create_app\n{example}", names := {"tmp_path": tmp_path})
    with names["app"].app_context():
        db.engine.dispose()


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
