"""The commands and tables of README.md, and the files in examples/."""

import json
import os
import re
import subprocess
import sys
from shutil import copy2

import pytest
from documents import README, block
from servers import ROOT, find_program, free_port, wait_until

from config import SettingsSchema


@pytest.mark.sqlite
def test_quick_start_prints_what_the_readme_shows(run_flask, client):
    demo = run_flask("demo")
    shown = block(README, "text", "Token:")
    assert re.sub(r"[\w-]{43}", "TOKEN", demo) == re.sub(r"[\w-]{43}", "TOKEN", shown)
    response = client.get(
        "/api/jobs?page_size=1",
        headers={"Authorization": f"Bearer {demo.split()[1]}"},
        base_url="http://127.0.0.1:8000",
    ).json
    shown = block(README, "json", '"data"')
    assert shown.count("{…}") == 1
    assert json.loads(shown.replace("{…}", json.dumps(response["links"]))) == response


@pytest.mark.sqlite
def test_example_of_an_error_is_true(client, seed):
    response = client.get("/api/jobs?page_size=0", headers=seed.auth_header)
    assert f"```json\n{response.text}\n```" in README


@pytest.mark.sqlite
def test_own_project_is_imported_as_the_readme_shows(
    checkout, new_state, tmp_path, fail_flask
):
    """In place of OpenFn, a stub of curl prints the project."""
    commands, server = block(README, "sh", "flask init-db").split("gunicorn")
    assert server == " wsgi:app\n"
    [project_id] = re.findall(r"openfn.org/api/provision/(\S+)", commands)
    state = new_state(id=project_id)
    state["workflows"] = [
        state["workflows"][0]
        | {"jobs": [j for w in state["workflows"] for j in w["jobs"]]}
    ]
    copy2(ROOT / "Makefile", checkout)
    (checkout / ".venv").symlink_to(sys.prefix)
    curl = tmp_path / "curl"
    curl.write_text(f"#!/bin/sh\ncat {tmp_path}/project.json\n")
    curl.chmod(0o755)

    (tmp_path / "project.json").write_text(json.dumps({"data": state}))
    output = subprocess.check_output(
        ["bash", "-ec", commands],
        cwd=checkout,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        text=True,
    ).splitlines()
    success, error = block(README, "text", "Imported project").splitlines()
    assert success in output and re.fullmatch(r"[\w-]{43}", output[-1])
    state["workflows"][0]["jobs"][2]["id"] = "2"
    errors = fail_flask("import-project", "-", input=json.dumps(state))
    assert [f"Error: {line}" for line in errors] == [error]


def run_script(*command, token, **options):
    """Start a shell script that reads the API with curl and jq."""
    find_program("curl"), find_program("jq")
    variables = {"PATH": os.environ["PATH"], "TOKEN": token}
    return subprocess.Popen(command, env=variables, text=True, **options)


def test_loop_reads_all_pages(server, seeded, tmp_path):
    script = block(README, "sh", "while").replace(":8000/", f":{server.port}/")
    for text, printed in (
        (script.replace("page_size=100", "page_size=1"), "Job 0\nJob 1\nJob 2\n"),
        (script.replace(f":{server.port}", f":{free_port()}"), ""),
    ):
        command = ["sh", "-c", text]
        options = {"cwd": tmp_path, "stdout": subprocess.PIPE}
        process = run_script(*command, token=seeded.token, **options)
        assert process.communicate(timeout=30)[0] == printed


@pytest.mark.sqlite
def test_script_starts_again_if_a_job_that_it_has_read_is_deleted(
    start_server, database_url, import_state, new_state, auth_header
):
    state = new_state(jobs=20)
    import_state(state, "you@example.org")
    token = auth_header("you@example.org")["Authorization"].split()[1]
    server = start_server(database_url, "--access-logfile", "-")
    url = f"http://127.0.0.1:{server.port}/api/jobs?page_size=2"
    script = ROOT / "examples/read-all-jobs.sh"
    process = run_script(script, url, token=token, stdout=subprocess.PIPE)
    wait_until(lambda: server.log().count("GET '/api/jobs'") > 3)
    del state["workflows"][0]["jobs"][0]
    import_state(state)
    output, _ = process.communicate(timeout=90)
    assert output.splitlines() == [f"Job {n}" for n in range(1, 20)]
    assert process.returncode == 0
    server.stop()
    process = run_script(script, url, token=token, stderr=subprocess.PIPE)
    assert "curl: (7)" in process.communicate(timeout=30)[1]
    assert process.returncode == 7


TEST_ELSEWHERE = """
import json
from urllib.request import Request, urlopen

import app
import config

def test_jobs(jobs_api):
    url, token = jobs_api
    request = Request(f"{url}/api/jobs", headers={"Authorization": f"Bearer {token}"})
    with urlopen(request) as response:
        assert json.load(response)["meta"]["total_entries"] == 3

def test_that_fails(jobs_api):
    assert not config.IS_WRONG
"""


def test_fixture_serves_the_tests_of_another_project(tmp_path, new_state):
    """That project may have modules of the same names; a failing test shows the log."""
    fixture = (ROOT / "examples/conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(fixture.replace("/srv/jobs", str(ROOT)))
    (tmp_path / "app.py").touch()
    (tmp_path / "config.py").write_text("IS_WRONG = True")
    (tmp_path / "project.json").write_text(json.dumps(new_state(jobs=3)))
    (tmp_path / "test_elsewhere.py").write_text(TEST_ELSEWHERE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-W", "error"],
        cwd=tmp_path,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        text=True,
        stdout=subprocess.PIPE,
    )
    assert "= 1 failed, 1 passed in" in done.stdout, done.stdout
    assert "- assert not True" in done.stdout and "Booting worker" in done.stdout


@pytest.mark.sqlite
def test_every_setting_command_and_path_is_in_a_table(app):
    """Each setting has its default there."""
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", README, re.MULTILINE))
    schema = SettingsSchema()
    defaults = schema.load({})
    for name, field in schema.fields.items():
        default = (
            defaults[name] if defaults[name] not in (None, "") else {"none", "any"}
        )
        words = default if isinstance(default, set) else {str(default)}
        assert rows.pop(field.data_key or name).strip("`") in words
    assert rows == {}
    names = re.findall(r"^\| `flask ([a-z-]+)", README, re.MULTILINE)
    assert sorted(names) == sorted(app.cli.commands)
    rules = {re.sub("<.*?>", "UUID", rule.rule) for rule in app.url_map.iter_rules()}
    # The page at /api/docs loads its files from below it.
    rules -= {"/api/docs/", "/api/docs/UUID"}
    assert {*re.findall(r"`GET (/[\w/.]+)", README)} == rules | {"/api/docs"}
