"""The commands: what they print, where, and how they fail."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import datetime

import pytest
from conftest import ROOT, new_database, sqlite_only
from sqlalchemy import text

from app import create_app
from database import db
from models import UserToken

UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@pytest.fixture
def you(import_state, new_state):
    """The email of a user."""
    import_state(new_state(), "you@example.org")
    return "you@example.org"


def test_init_db_is_safe_to_repeat(flask, client, seed):
    assert flask("init-db") == ""
    assert client.get("/api/jobs", headers=seed.bearer).status_code == 200


def test_sqlite_is_set_to_write_ahead_logging(tmp_path):
    path = tmp_path / "jobs.db"
    app = create_app({"DATABASE_URL": f"sqlite:///{path}"})
    app.test_cli_runner().invoke(args=["init-db"])
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_create_token_prints_the_token_alone(runner, client, you):
    result = runner.invoke(args=["create-token", you.upper()])
    assert result.exit_code == 0
    assert re.fullmatch(r"[\w-]{43}\n", result.stdout)
    assert re.fullmatch(f"{UUID}\n", result.stderr)
    headers = {"Authorization": f"Bearer {result.stdout.strip()}"}
    assert client.get("/api/jobs", headers=headers).status_code == 200


@sqlite_only
@pytest.mark.parametrize(
    ("stdout", "line"),
    [
        ("/dev/full", "[Errno 28] No space left on device\n"),
        ("&-", "There is no standard output to print the token on.\n"),
    ],
)
def test_token_that_cannot_be_shown_is_not_kept(flask, you, database_url, stdout, line):
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m flask create-token {you} >{stdout}"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "DATABASE_URL": database_url},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, line)
    assert flask("list-tokens") == ""


@sqlite_only
def test_text_that_the_database_cannot_hold_is_one_line(
    postgresql_server, make_app, new_state
):
    latin = "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    with new_database(postgresql_server, latin) as url:
        runner = make_app(DATABASE_URL=url).test_cli_runner()
        assert runner.invoke(args=["init-db"]).exit_code == 0
        state = json.dumps(new_state(name="→"))
        result = runner.invoke(args=["import-project", "-"], input=state)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert "LATIN1" in line


def test_list_tokens_has_a_line_a_token(
    runner, flask, set_columns, import_state, new_state, you
):
    """Of API tokens alone, and never the token column."""
    import_state(new_state(), "they@example.org")
    ids = [runner.invoke(args=["create-token", you]).stderr.strip() for _ in range(3)]
    theirs = runner.invoke(args=["create-token", "they@example.org"]).stderr.strip()
    for number, (token_id, context) in enumerate(
        zip([*ids, theirs], ["api:sha256", "api", "session", "api"], strict=True)
    ):
        set_columns(
            UserToken,
            token_id,
            context=context,
            token=b"s3cret %d" % number,
            inserted_at=datetime(2024, 1, 1, 0, 0, number, 5),
        )
    lines = [
        f"{ids[0]}  {you}  api:sha256  2024-01-01T00:00:00Z",
        f"{ids[1]}  {you}  api  2024-01-01T00:00:01Z",
        f"{theirs}  they@example.org  api  2024-01-01T00:00:03Z",
    ]
    assert flask("list-tokens").splitlines() == lines
    assert flask("list-tokens", "You@example.org").splitlines() == lines[:2]


def test_revoked_token_is_gone(runner, flask, you):
    token_id = runner.invoke(args=["create-token", you]).stderr.strip()
    assert flask("revoke-token", token_id.upper()) == ""
    assert flask("list-tokens") == ""


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["create-token", "nobody@x"], "There is no user nobody@x."),
        (["list-tokens", "nobody@x"], "There is no user nobody@x."),
        (["list-tokens", ""], "There is no user ."),
        (["create-token", "\udcff@x"], "An argument is not text in UTF-8."),
        (["revoke-token", "x"], "There is no token x."),
        (["revoke-token", "\udcff"], "There is no token \\udcff."),
        (
            ["revoke-token", "00000000-0000-0000-0000-000000000000"],
            "There is no token 00000000-0000-0000-0000-000000000000.",
        ),
    ],
)
def test_unknown_name_is_an_error(runner, args, line):
    result = runner.invoke(args=args)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"{line}\n")


@pytest.mark.parametrize(
    "args",
    [
        ["create-token", "you@example.org"],
        ["list-tokens"],
        ["revoke-token", "00000000-0000-0000-0000-000000000000"],
    ],
)
def test_command_without_tables_says_what_to_do(empty_app, args):
    result = empty_app.test_cli_runner().invoke(args=args)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert "run `flask init-db`" in line


def test_database_that_cannot_be_reached_is_one_line(make_app, tmp_path):
    for url in (
        f"sqlite:///{tmp_path}/no/folder/jobs.db",
        "postgresql://127.0.0.1:1/x",
    ):
        runner = make_app(DATABASE_URL=url).test_cli_runner()
        for args in (["init-db"], ["demo"], ["list-tokens"]):
            result = runner.invoke(args=args)
            assert result.exit_code == 1
            assert len(result.stderr.splitlines()) == 1


def test_demo_prints_a_token_a_request_and_a_page(empty_app):
    """It needs no tables, and revokes the tokens of earlier runs."""
    runner, client = empty_app.test_cli_runner(), empty_app.test_client()
    tokens = []
    for _ in range(2):
        first, second, third = runner.invoke(args=["demo"]).stdout.splitlines()
        tokens.append(first.removeprefix("Token: "))
        assert second == (
            f"curl -H 'Authorization: Bearer {tokens[-1]}' "
            "'http://127.0.0.1:8000/api/jobs?page_size=1'"
        )
        assert third == "Docs: http://127.0.0.1:8000/api/docs"
    for token, status in zip(tokens, (401, 200), strict=True):
        headers = {"Authorization": f"Bearer {token}"}
        assert client.get("/api/jobs", headers=headers).status_code == status
    assert client.get("/api/jobs", headers=headers).json["meta"]["total_entries"] == 3


@pytest.mark.parametrize(
    "args",
    [
        ["init-db"],
        ["demo"],
        ["create-token", "you@example.org"],
        ["revoke-token", "00000000-0000-0000-0000-000000000000"],
    ],
)
def test_writing_commands_leave_lightning_alone(app, runner, args, you):
    with app.app_context(), db.engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("BEGIN READ WRITE"))
        connection.execute(text("CREATE TABLE schema_migrations (version bigint)"))
        connection.commit()
    result = runner.invoke(args=args)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert "belongs to Lightning" in line and "schema_migrations" in line
    assert runner.invoke(args=["list-tokens"]).exit_code == 0


@sqlite_only
def test_every_command_has_a_help_text(app, runner):
    for name, command in app.cli.commands.items():
        help_text = runner.invoke(args=[name, "--help"]).stdout
        assert command.help.split("\n")[0] in " ".join(help_text.split())
