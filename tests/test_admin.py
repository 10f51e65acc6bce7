"""What commands change in the database, and what they leave as it is."""

import json
import sqlite3
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event

from database import db

PROJECT, WORKFLOW, JOB, OTHER = (
    f"00000000-0000-4000-8000-00000000000{n}" for n in "1234"
)


@pytest.fixture
def state():
    """A small state file as Python values; tests change it."""
    job = {"id": JOB, "name": "Job", "body": "fn();"}
    workflow = {"id": WORKFLOW, "name": "Workflow", "jobs": [job]}
    return {"id": PROJECT, "name": "Project", "workflows": [workflow]}


@pytest.fixture
def job(state):
    """The job in the state."""
    return state["workflows"][0]["jobs"][0]


def parse_time(value):
    """Return a time of a row, which SQLite stores as text."""
    return datetime.fromisoformat(value) if isinstance(value, str) else value


def test_first_import_creates(import_state, state, dump):
    now = datetime.now(UTC).replace(tzinfo=None)
    line = import_state(state, "You@Example.org:owner", "two@example.org")
    assert line == (
        f"Imported project {PROJECT}: 1 job created, 2 members created, "
        "1 project created, 1 workflow created.\n"
    )
    rows = dump()
    row = {key: str(value) for key, value in rows["jobs"][JOB].items()}
    assert row["inserted_at"] == row["updated_at"]
    assert row["adaptor"] == "@openfn/language-common@latest"
    assert row["workflow_id"] == WORKFLOW and row["body"] == "fn();"
    created = parse_time(rows["jobs"][JOB]["inserted_at"])
    assert now <= created <= now + timedelta(minutes=1)
    emails = {user_id: user["email"] for user_id, user in rows["users"].items()}
    members = rows["project_users"].values()
    roles = {emails[str(row["user_id"])]: row["role"] for row in members}
    assert roles == {"you@example.org": "owner", "two@example.org": "viewer"}


def test_unchanged_file_changes_nothing(import_state, new_state, dump):
    state = new_state(jobs=5)
    import_state(state, "you@example.org:admin")
    before = dump()
    line = import_state(state, "you@example.org", "YOU@example.org:admin")
    assert dump() == before
    assert line == (
        f"Imported project {state['id']}: 5 jobs unchanged, 2 members unchanged, "
        "1 project unchanged, 3 workflows unchanged.\n"
    )


def test_change_sets_the_time_unless_the_file_has_one(import_state, state, job, dump):
    import_state(state)
    before = dump()["jobs"][JOB]
    job["body"] = "changed"
    assert "1 job updated, 1 project unchanged" in import_state(state)
    after = dump()["jobs"][JOB]
    assert after["body"] == "changed"
    assert after["inserted_at"] == before["inserted_at"]
    assert after["updated_at"] > before["updated_at"]
    job |= {
        "inserted_at": "2024-01-01T00:00:00Z",
        "updated_at": "2024-01-02T01:00+01:00",
    }
    import_state(state)
    after = dump()["jobs"][JOB]
    assert parse_time(after["inserted_at"]) == datetime(2024, 1, 1)
    assert parse_time(after["updated_at"]) == datetime(2024, 1, 2)


def test_what_the_file_no_longer_has_is_deleted(import_state, new_state, dump):
    """Other projects stay; a job moves from a workflow that is deleted."""
    other, state = new_state(jobs=2), new_state(jobs=6)
    import_state(other, "you@example.org")
    import_state(state, "you@example.org")
    first, second, third = state["workflows"]
    moved, _ = second["jobs"]
    first["jobs"].append(moved)
    state["workflows"] = [first, third | {"jobs": third["jobs"][:1]}]
    assert import_state(state).endswith(
        ": 2 jobs deleted, 3 jobs unchanged, 1 job updated, 1 project unchanged, "
        "1 workflow deleted, 2 workflows unchanged.\n"
    )
    rows = dump()
    kept = [*first["jobs"], third["jobs"][0], *other["workflows"][0]["jobs"]]
    assert rows["jobs"].keys() == {job["id"] for job in kept}
    assert str(rows["jobs"][moved["id"]]["workflow_id"]) == first["id"]
    assert len(rows["workflows"]) == 3 and len(rows["project_users"]) == 2


def test_new_jobs_keep_the_order_of_the_file(
    import_state, new_state, auth_header, client
):
    import_state(new_state(jobs=9), "you@example.org")
    listed = client.get("/api/jobs", headers=auth_header("you@example.org")).json
    names = [job["attributes"]["name"] for job in listed["data"]]
    assert names == [f"Job {n}" for n in range(9)]


def test_id_that_is_taken_is_rejected(import_state, fail_flask, state, job, dump):
    """The error names the kind, the name and the id, and nothing is changed."""
    import_state(state)
    before = dump()

    def error_of(changed):
        [line] = fail_flask("import-project", "-", input=json.dumps(changed))
        assert dump() == before
        return line.replace(" appears twice or belongs to another project.", "")

    taken = "cannot be imported, because its id"
    assert (
        error_of(state | {"id": OTHER}) == f"The workflow 'Workflow' {taken} {WORKFLOW}"
    )
    thief = {"id": OTHER, "name": "Thief", "jobs": [job]}
    stolen = {"id": OTHER, "name": "Other", "workflows": [thief]}
    assert error_of(stolen) == f"The job 'Job' {taken} {JOB}"
    twice = state | {"workflows": [*state["workflows"], thief | {"jobs": []}]}
    twice["workflows"][1]["jobs"] = [job | {"id": JOB.upper(), "name": "Two"}]
    assert error_of(twice) == f"The job 'Two' {taken} {JOB}"


def test_dry_run_prints_the_counts_and_changes_nothing(
    run_flask, import_state, new_state, dump
):
    state = new_state()
    import_state(state, "you@example.org")
    state["workflows"].pop()
    state["workflows"] += new_state()["workflows"]
    before = dump()
    command = ["import-project", "-", "--member", "new@example.org:owner"]
    content = json.dumps(state)
    line = run_flask(*command, "--dry-run", input=content)
    assert dump() == before
    assert line.startswith(f"Would import project {state['id']}: ")
    done = run_flask(*command, input=content)
    assert done == line.replace("Would import", "Imported") and dump() != before


@pytest.mark.sqlite
def test_file_may_have_more_jobs_than_a_statement_has_parameters(
    app, import_state, new_state
):
    """The number of statements does not grow with the number of jobs."""
    sent, counts = [], []
    with app.app_context():

        @event.listens_for(db.engine, "connect")
        def limit_parameters(connection, _):
            connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 200)

        @event.listens_for(db.engine, "before_cursor_execute")
        def note_statement(_, cursor, statement, *args):
            sent.append(statement)

    for jobs in (30, 300):
        state = new_state(jobs=jobs)
        for workflows in (state["workflows"], state["workflows"], []):
            sent.clear()
            import_state(state | {"workflows": workflows})
            counts.append(len(sent))
    assert counts[:3] == counts[3:]


@pytest.mark.parametrize(
    ("before", "member", "role"),
    [
        (None, "YOU@example.org", "viewer"),
        (None, "you@example.org:editor", "editor"),
        (None, "you@example.org:none", None),
        ("admin", "you@example.org", "admin"),
        ("admin", "you@Example.org:viewer", "viewer"),
        ("admin", "you@example.org:none", None),
        ("admin", "they@example.org:none", "admin"),
    ],
)
def test_member_gets_the_role(import_state, state, dump, before, member, role):
    import_state(state, *([f"you@example.org:{before}"] if before else []))
    import_state(state, member)
    rows = dump()
    assert [row["role"] for row in rows["project_users"].values()] == [role] * bool(
        role
    )
    emails = [row["email"] for row in rows["users"].values()]
    assert emails == (["you@example.org"] if before or role else [])


@pytest.mark.sqlite
def test_project_that_no_user_can_read_has_a_hint(app, state):
    def hint_of(*options):
        args, content = ["import-project", "-", *options], json.dumps(state)
        result = app.test_cli_runner().invoke(args=args, input=content)
        assert result.exit_code == 0
        return result.stderr.removeprefix("No user can read the project, because it ")

    no_member = f"has no members. Add one with: flask set-member {PROJECT} EMAIL\n"
    assert hint_of() == hint_of() == no_member
    assert hint_of("--member", "you@example.org") == hint_of() == ""
    assert hint_of("--member", "you@example.org:none") == no_member
    state["scheduled_deletion"] = "2030-01-01T00:00:00Z"
    assert hint_of("--member", "you@example.org") == "is scheduled for deletion.\n"


def test_deletions_take_what_belongs_to_a_row_and_nothing_else(
    run_flask, import_state, new_state, auth_header, client, dump
):
    kept, deleted = new_state(), new_state()
    import_state(kept, "they@example.org")
    other, before = auth_header("they@example.org"), dump()
    for state in (kept, deleted):
        import_state(state, "you@example.org")
    headers = auth_header("you@example.org")
    run_flask("delete-project", deleted["id"].upper())
    assert client.get("/api/jobs", headers=headers).json["meta"]["total_entries"] == 3
    run_flask("delete-user", "You@example.org")
    assert dump() == before
    assert client.get("/api/jobs", headers=headers).status_code == 401
    assert client.get("/api/jobs", headers=other).status_code == 200
