"""The README's examples are what the service does."""

import json
import re

from conftest import ROOT, sqlite_only
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
