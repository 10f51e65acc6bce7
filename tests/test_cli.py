"""The commands: what they print on which stream, and how they fail."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import datetime, timedelta

import pytest
from conftest import ROOT, new_database, sqlite_only
from sqlalchemy import text

from app import create_app
from database import db, write_transaction
from models import Project, User, UserToken, Workflow

UNKNOWN_ID = "00000000-0000-0000-0000-000000000000"
NOT_UTF_8 = (
    "'utf-8' codec can't encode character '\\udcff' in position 0: "
    "surrogates not allowed"
)
NO_USER = (
    "There is no user nobody@x. Add one with: flask set-member PROJECT_ID nobody@x"
)
UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@pytest.fixture
def user_email(import_state, new_state):
    """The email of a user, who is a member of the only project."""
    import_state(new_state(), "you@example.org")
    return "you@example.org"


def test_init_db_prints_the_tables_that_it_creates(app_without_tables):
    result = app_without_tables.test_cli_runner().invoke(args=["init-db"])
    assert result.exit_code == 0
    names = result.stdout.removeprefix("Created the tables ").removesuffix(".\n")
    assert {*names.split(", ")} == {*db.metadata.tables}


def test_init_db_is_safe_to_repeat(run_flask, client, seed):
    assert run_flask("init-db") == "No table was missing.\n"
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == 200


def test_init_db_names_each_missing_column(app, runner, run_statements):
    """init-db changes nothing then, not even by creating a table that is missing."""
    run_statements(
        "ALTER TABLE jobs DROP COLUMN body",
        "ALTER TABLE users DROP COLUMN disabled",
        "DROP TABLE project_users",
    )
    for _ in range(2):
        result = runner.invoke(args=["init-db"])
        assert (result.exit_code, result.stdout) == (1, "")
        [line] = result.stderr.splitlines()
        assert "users.disabled, jobs.body" in line and "CHANGELOG.md" in line


@pytest.fixture
def run_statements(app):
    """A function that changes the tables, as no command does."""

    def run(*statements):
        with app.app_context(), db.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("BEGIN READ WRITE"))
            for statement in statements:
                connection.execute(text(statement))
            connection.commit()

    return run


def test_sqlite_is_set_to_write_ahead_logging(tmp_path):
    path = tmp_path / "jobs.db"
    app = create_app({"DATABASE_URL": f"sqlite:///{path}"})
    app.test_cli_runner().invoke(args=["init-db"])
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_create_token_prints_the_token_alone(runner, client, user_email):
    result = runner.invoke(args=["create-token", user_email.upper()])
    assert result.exit_code == 0
    assert re.fullmatch(r"[\w-]{43}\n", result.stdout)
    assert re.fullmatch(f"Token id, for flask revoke-token: {UUID}\n", result.stderr)
    headers = {"Authorization": f"Bearer {result.stdout.strip()}"}
    assert client.get("/api/jobs", headers=headers).status_code == 200


@sqlite_only
@pytest.mark.parametrize(
    ("redirection", "error"),
    [
        (">/dev/full", "Cannot write to standard output: No space left on device."),
        (">&-", "Cannot write to standard output: it is closed."),
    ],
)
def test_token_that_cannot_be_shown_is_not_stored(
    shell, run_flask, user_email, redirection, error
):
    done = shell(f"create-token {user_email} {redirection}")
    assert (done.returncode, done.stderr.splitlines()[1:]) == (1, [f"Error: {error}"])
    assert run_flask("list-tokens") == ""


@sqlite_only
def test_token_that_is_not_stored_is_not_shown(shell, run_flask, user_email):
    """The token is printed last, so that a full stderr shows no token."""
    done = shell(f"create-token {user_email} 2>/dev/full")
    assert done.returncode != 0 and done.stdout == ""
    assert run_flask("list-tokens") == ""


@sqlite_only
def test_text_that_the_database_cannot_encode_is_a_one_line_error(
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


@pytest.fixture
def new_token_id(runner):
    """A function that creates a token of a user, and returns its id."""
    return lambda email: runner.invoke(args=["create-token", email]).stderr.split()[-1]


def test_list_tokens_prints_one_line_per_token(
    run_flask, set_columns, import_state, new_state, user_email, new_token_id
):
    """list-tokens prints API tokens only, and never the token column."""
    import_state(new_state(), "they@example.org")
    ids = [new_token_id(user_email) for _ in range(3)]
    other_id = new_token_id("they@example.org")
    for number, (token_id, context) in enumerate(
        zip([*ids, other_id], ["api:sha256", "api", "session", "api"], strict=True)
    ):
        set_columns(
            UserToken,
            token_id,
            context=context,
            token=b"s3cret %d" % number,
            inserted_at=datetime(2024, 1, 1, 0, 0, number, 5),
        )
    lines = [
        f"{ids[0]}  {user_email}  api:sha256  2024-01-01T00:00:00Z",
        f"{ids[1]}  {user_email}  api  2024-01-01T00:00:01Z",
        f"{other_id}  they@example.org  api  2024-01-01T00:00:03Z",
    ]
    assert run_flask("list-tokens").splitlines() == lines
    assert run_flask("list-tokens", "You@example.org").splitlines() == lines[:2]


def test_revoked_token_is_no_longer_listed(run_flask, user_email, new_token_id):
    token_id = new_token_id(user_email)
    line = f"Revoked a token of {user_email}.\n"
    assert run_flask("revoke-token", token_id.upper()) == line
    assert run_flask("list-tokens") == ""


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["create-token", "nobody@x"], NO_USER),
        (["list-tokens", "nobody@x"], NO_USER),
        (["delete-user", "nobody@x"], NO_USER),
        (["create-token", "\udcff@x"], NOT_UTF_8),
        (["revoke-token", "x"], "There is no token x. See: flask list-tokens"),
        (
            ["revoke-token", "\udcff"],
            "There is no token \\udcff. See: flask list-tokens",
        ),
        (
            ["revoke-token", UNKNOWN_ID],
            f"There is no token {UNKNOWN_ID}. See: flask list-tokens",
        ),
        (
            ["list-members", UNKNOWN_ID],
            f"There is no project {UNKNOWN_ID}. See: flask list-projects",
        ),
        (
            ["set-member", "x", "you@example.org"],
            "There is no project x. See: flask list-projects",
        ),
    ],
)
def test_unknown_name_is_an_error_with_a_remedy(runner, args, line):
    result = runner.invoke(args=args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {line}\n"


@pytest.mark.parametrize(
    "args",
    [
        ["create-token", "you@example.org"],
        ["list-tokens"],
        ["list-projects"],
        ["set-member", UNKNOWN_ID, "you@example.org"],
        ["revoke-token", UNKNOWN_ID],
    ],
)
def test_command_without_tables_prints_what_to_do(app_without_tables, args):
    result = app_without_tables.test_cli_runner().invoke(args=args)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert "run `flask init-db`" in line


def test_database_that_cannot_be_reached_is_a_one_line_error(make_app, tmp_path):
    for url in (
        f"sqlite:///{tmp_path}/no/folder/jobs.db",
        "postgresql://127.0.0.1:1/x",
    ):
        runner = make_app(DATABASE_URL=url).test_cli_runner()
        for args in (["init-db"], ["demo"], ["list-tokens"]):
            result = runner.invoke(args=args)
            assert result.exit_code == 1
            assert len(result.stderr.splitlines()) == 1


def test_demo_prints_a_token_a_request_and_a_page(app_without_tables, set_tokens_back):
    """The demo creates missing tables and deletes only its tokens older than a day."""
    runner, client = (
        app_without_tables.test_cli_runner(),
        app_without_tables.test_client(),
    )
    tokens = []
    for hours in (20, 10, 0):
        first, second, third = runner.invoke(args=["demo"]).stdout.splitlines()
        tokens.append(first.removeprefix("Token: "))
        assert second == (
            f"curl -H 'Authorization: Bearer {tokens[-1]}' "
            "'http://127.0.0.1:8000/api/jobs?page_size=1'"
        )
        assert third == "Docs: http://127.0.0.1:8000/api/docs"
        set_tokens_back(hours)
    for token, status in zip(tokens, (401, 200, 200), strict=True):
        headers = {"Authorization": f"Bearer {token}"}
        assert client.get("/api/jobs", headers=headers).status_code == status
    assert client.get("/api/jobs", headers=headers).json["meta"]["total_entries"] == 3


@pytest.fixture
def set_tokens_back(app_without_tables):
    """A function that makes all tokens older by a number of hours."""

    def run(hours):
        with app_without_tables.app_context(), write_transaction():
            for token in db.session.scalars(db.select(UserToken)):
                token.inserted_at -= timedelta(hours=hours)

    return run


def test_demo_changes_no_database_with_other_projects(
    runner, run_flask, user_email, dump
):
    before = dump()
    assert run_flask("demo").splitlines() == [
        "The database has other projects, so nothing was changed.",
        "Create a token with: flask create-token EMAIL",
    ]
    assert dump() == before


@pytest.mark.parametrize(
    "args",
    [
        ["init-db"],
        ["demo"],
        ["create-token", "you@example.org"],
        ["revoke-token", UNKNOWN_ID],
        ["set-member", UNKNOWN_ID, "you@example.org"],
        ["delete-project", UNKNOWN_ID],
        ["delete-user", "you@example.org"],
    ],
)
def test_writing_commands_reject_a_lightning_database(
    runner, args, user_email, dump, run_statements
):
    run_statements("CREATE TABLE schema_migrations (version bigint)")
    [project_id] = dump()["Project"]
    result = runner.invoke(args=args)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert "belongs to Lightning" in line and "schema_migrations" in line
    for reading in ["list-tokens"], ["list-projects"], ["list-members", project_id]:
        assert runner.invoke(args=reading).exit_code == 0


@sqlite_only
def test_every_command_has_a_help_text(app, runner):
    for name, command in app.cli.commands.items():
        help_text = runner.invoke(args=[name, "--help"]).stdout
        assert command.help.split("\n")[0] in " ".join(help_text.split())


def test_project_is_deleted_with_its_contents(
    run_flask, import_state, new_state, auth_header, client, dump
):
    """Deleting a project changes no user, no token and no other project."""
    import_state(new_state(), "you@example.org")
    headers, before = auth_header("you@example.org"), dump()
    deleted = new_state(jobs=3)
    import_state(deleted, "you@example.org", "they@example.org")
    users = dump()["User"]
    assert run_flask("delete-project", deleted["id"].upper()) == (
        f"Deleted project {deleted['id']}: "
        "3 jobs deleted, 2 members deleted, 2 workflows deleted.\n"
    )
    assert dump() == before | {"User": users}
    assert client.get("/api/jobs", headers=headers).json["meta"]["total_entries"] == 3
    path = f"/api/projects/{deleted['id']}/jobs"
    assert client.get(path, headers=headers).status_code == 404


@sqlite_only
@pytest.mark.parametrize("project_id", ["x", "", "\udcff", UNKNOWN_ID])
def test_unknown_project_cannot_be_deleted(runner, user_email, dump, project_id):
    before = dump()
    result = runner.invoke(args=["delete-project", project_id])
    assert (result.exit_code, result.stdout) == (1, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: There is no project ")
    assert dump() == before


@sqlite_only
def test_disabled_user_gets_no_token(
    app, runner, run_flask, user_email, set_columns, dump
):
    [user_id] = dump()["User"]
    set_columns(User, user_id, disabled=True)
    result = runner.invoke(args=["create-token", user_email])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: The user {user_email} is disabled.\n"
    assert run_flask("list-tokens") == ""


@sqlite_only
def test_expired_tokens_are_marked(
    make_app, app, run_flask, user_email, set_columns, new_token_id
):
    old, new = (new_token_id(user_email) for _ in range(2))
    set_columns(UserToken, old, inserted_at=datetime(2024, 1, 1))
    lines = (
        make_app(TOKEN_MAX_AGE_DAYS=7).test_cli_runner().invoke(args=["list-tokens"])
    )
    first, second = lines.stdout.splitlines()
    assert first == f"{old}  {user_email}  api:sha256  2024-01-01T00:00:00Z  expired"
    assert second.startswith(new) and "expired" not in second
    assert "expired" not in run_flask("list-tokens")


@pytest.fixture
def shell(database_url):
    """A function that runs a ``flask`` command in a shell, with redirections."""

    def run(command):
        return subprocess.run(
            ["sh", "-c", f"{sys.executable} -m flask {command}"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "DATABASE_URL": database_url},
            capture_output=True,
            text=True,
        )

    return run


@sqlite_only
@pytest.mark.parametrize("stdout", ["/dev/full", "&-"])
def test_summary_is_printed_on_stderr_if_stdout_fails(
    shell, user_email, dump, tmp_path, stdout
):
    """The exit code is 0, because the change is committed before the summary."""
    [project_id] = dump()["Project"]
    done = shell(f"delete-project {project_id} >{stdout}")
    assert done.returncode == 0
    assert done.stderr.startswith(f"Deleted project {project_id}: 3 jobs deleted")
    assert dump()["Project"] == {}


@sqlite_only
def test_demo_whose_token_cannot_be_shown_stores_no_token(shell, run_flask, dump):
    run_flask("demo")
    before = dump()
    done = shell("demo >/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: Cannot write to standard output: No space left on device."
    )
    assert dump() == before


@sqlite_only
def test_import_without_standard_input_is_a_one_line_error(shell, app):
    done = shell("import-project - <&-")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: There is no standard input to read.\n"


def test_projects_and_members_are_listed(
    run_flask, import_state, new_state, set_columns
):
    """The number of jobs leaves out deleted workflows, as the lists of the API do."""
    first, second = new_state(jobs=3, name="A\nB"), new_state(jobs=0, name="C")
    import_state(first, "you@example.org:owner", "they@example.org")
    import_state(second)
    set_columns(Workflow, first["workflows"][0]["id"], deleted_at=datetime(2024, 1, 1))
    set_columns(Project, second["id"], scheduled_deletion=datetime(2030, 1, 1))
    assert run_flask("list-projects").splitlines() == [
        f'{first["id"]}  "A\\nB"  1 jobs',
        f'{second["id"]}  "C"  0 jobs  scheduled for deletion',
    ]
    assert run_flask("list-members", first["id"].upper()).splitlines() == [
        "they@example.org  viewer",
        "you@example.org  owner",
    ]
    assert run_flask("list-members", second["id"]) == ""


def test_member_is_set_without_a_file(
    run_flask, import_state, new_state, auth_header, client, dump
):
    """set-member creates the user, changes the role and removes the membership."""
    state = new_state()
    import_state(state)
    jobs = dump()["Job"]
    for member, change, listed in (
        ("New@example.org", "created", "new@example.org  viewer\n"),
        ("new@example.org", "unchanged", "new@example.org  viewer\n"),
        ("new@example.org:owner", "updated", "new@example.org  owner\n"),
        ("new@example.org:none", "removed", ""),
    ):
        line = run_flask("set-member", state["id"], member)
        assert line == f"Project {state['id']}: member new@example.org {change}.\n"
        assert run_flask("list-members", state["id"]) == listed
    assert dump()["Job"] == jobs
    run_flask("set-member", state["id"], "new@example.org")
    page = client.get("/api/jobs", headers=auth_header("new@example.org")).json
    assert page["meta"]["total_entries"] == 3


@sqlite_only
def test_member_that_is_malformed_is_rejected(runner, user_email, dump):
    before = dump()
    [project_id] = before["Project"]
    for member in ("you", "you@example.org:boss", ""):
        result = runner.invoke(args=["set-member", project_id, member])
        assert (result.exit_code, result.stdout) == (1, "")
        assert "owner, admin, editor, viewer" in result.stderr
    assert dump() == before


def test_user_is_deleted_with_tokens_and_memberships(
    run_flask, import_state, new_state, auth_header, client, dump
):
    """Projects, jobs and other users stay, and the user's tokens give no access."""
    states = new_state(), new_state()
    for state in states:
        import_state(state, "they@example.org")
    other, before = auth_header("they@example.org"), dump()
    for state in states:
        import_state(state, "you@example.org")
    headers = auth_header("you@example.org")
    assert run_flask("delete-user", "You@example.org") == (
        "Deleted user you@example.org: 2 members deleted, 1 token deleted.\n"
    )
    assert dump() == before
    assert client.get("/api/jobs", headers=headers).status_code == 401
    assert client.get("/api/jobs", headers=other).status_code == 200
