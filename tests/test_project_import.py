"""Importing state files: what they change, and what is rejected whole."""

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import sqlite_only
from sqlalchemy import event

from database import db

REAL_FILE = Path(__file__).parent.parent.parent / "shared/data/t3-demo-state.json"

PROJECT = "e09231d6-869f-4ecf-b163-e42a07849f0b"
WORKFLOW = "1a1175db-1962-47de-a7a9-52a36b2a4c85"
JOB = "13bae4ca-cabc-4a1f-8603-3dbdba8835e6"
OTHER = "9c3bfbc0-71e7-49da-bca1-9c307ffc3c7b"

ERRORS = "Error: Nothing was imported, because the file has errors:\n"


@pytest.fixture
def state():
    """A small state file as Python values; tests change it."""
    job = {"id": JOB, "name": "Job", "body": "fn();"}
    workflow = {"id": WORKFLOW, "name": "Workflow", "jobs": {"job": job}}
    return {"id": PROJECT, "name": "Project", "workflows": {"flow": workflow}}


@pytest.fixture
def job(state):
    """The job in the state."""
    return state["workflows"]["flow"]["jobs"]["job"]


def test_first_import_creates(import_state, state, job, dump):
    job["adaptor"] = "@openfn/language-http@6.5.4"
    state |= {"scheduled_deletion": "2030-01-01T00:00:00", "allow_support_access": True}
    before = datetime.now(UTC).replace(tzinfo=None)
    line = import_state(state, "You@Example.org:owner", "two@example.org")
    assert line == (
        f"Imported project {PROJECT}: 1 job created, 2 members created, "
        "1 project created, 1 workflow created.\n"
    )
    rows = dump()
    assert rows["Project"][PROJECT] == {
        "id": PROJECT,
        "name": "Project",
        "scheduled_deletion": datetime(2030, 1, 1),
        "allow_support_access": True,
    }
    created = rows["Job"][JOB]
    assert before <= created["inserted_at"] <= before + timedelta(minutes=1)
    assert created["inserted_at"] == created["updated_at"]
    assert created["adaptor"] == "@openfn/language-http@6.5.4"
    emails = {user["id"]: user["email"] for user in rows["User"].values()}
    members = {
        emails[row["user_id"]]: row["role"] for row in rows["ProjectUser"].values()
    }
    assert members == {"you@example.org": "owner", "two@example.org": "viewer"}


def test_unchanged_file_changes_nothing(import_state, new_state, dump):
    state = new_state(jobs=5)
    import_state(state, "you@example.org:admin")
    before = dump()
    line = import_state({"data": state}, "you@example.org", "YOU@example.org:admin")
    assert dump() == before
    assert line == (
        f"Imported project {state['id']}: 5 jobs unchanged, 2 members unchanged, "
        "1 project unchanged, 3 workflows unchanged.\n"
    )


def test_change_sets_the_time_of_the_change(import_state, state, job, dump):
    import_state(state)
    before = dump()["Job"][JOB]
    job["body"] = "changed"
    assert "1 job updated, 1 project unchanged" in import_state(state)
    after = dump()["Job"][JOB]
    assert after["inserted_at"] == before["inserted_at"]
    assert after["updated_at"] > before["updated_at"]
    assert after["body"] == "changed"


def test_time_in_the_file_wins(import_state, state, job, dump):
    job |= {
        "inserted_at": "2024-01-01T00:00:00Z",
        "updated_at": "2024-02-01T01:00:00+01:00",
    }
    import_state(state)
    job["body"] = "changed"
    import_state(state)
    row = dump()["Job"][JOB]
    assert row["inserted_at"] == datetime(2024, 1, 1)
    assert row["updated_at"] == datetime(2024, 2, 1)


def test_optional_keys_that_are_gone_leave_what_is_there(
    import_state, state, job, dump
):
    workflow = state["workflows"]["flow"]
    state |= {"allow_support_access": True, "scheduled_deletion": "2030-01-01"}
    workflow["deleted_at"] = "2024-01-01T00:00:00.5"
    job |= {"adaptor": "x", "inserted_at": "2024-01-01", "updated_at": "2024-01-01"}
    import_state(state)
    before = dump()
    for entry, keys in (
        (state, ("allow_support_access", "scheduled_deletion")),
        (workflow, ("deleted_at",)),
        (job, ("adaptor", "inserted_at", "updated_at")),
    ):
        for key in keys:
            del entry[key]
    job["inserted_at"] = None
    import_state(state)
    assert dump() == before
    workflow["deleted_at"] = state["scheduled_deletion"] = None
    import_state(state)
    assert dump()["Workflow"][WORKFLOW]["deleted_at"] is None
    assert dump()["Project"][PROJECT]["scheduled_deletion"] is None


def test_what_the_file_no_longer_has_is_deleted(import_state, new_state, dump):
    """Other projects stay, and entries marked for deletion are dropped unread."""
    other, state = new_state(jobs=2), new_state(jobs=4)
    import_state(other, "you@example.org")
    import_state(state, "you@example.org")
    kept, gone = state["workflows"]
    kept["jobs"][0] = {"delete": True}
    state["workflows"][1] = {"id": "nonsense", "delete": True, "jobs": 5}
    assert "3 jobs deleted" in import_state(state)
    rows = dump()
    ids = {kept["jobs"][1]["id"]} | {job["id"] for job in other["workflows"][0]["jobs"]}
    assert rows["Job"].keys() == ids
    assert rows["Workflow"].keys() == {kept["id"], other["workflows"][0]["id"]}
    assert len(rows["ProjectUser"]) == 2


def test_job_moves_from_a_workflow_that_is_deleted(import_state, new_state, dump):
    state = new_state(jobs=4)
    import_state(state)
    first, second = state["workflows"]
    first["jobs"] += second["jobs"]
    state["workflows"] = [first]
    import_state(state)
    rows = dump()
    assert len(rows["Job"]) == 4
    assert {job["workflow_id"] for job in rows["Job"].values()} == {first["id"]}


def test_new_jobs_keep_the_order_of_the_file(
    import_state, new_state, client, auth_header
):
    state = new_state(jobs=9)
    import_state(state, "you@example.org")
    listed = client.get("/api/jobs", headers=auth_header("you@example.org")).json[
        "data"
    ]
    assert [job["attributes"]["name"] for job in listed] == [
        f"Job {n}" for n in range(9)
    ]


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
    assert [row["role"] for row in dump()["ProjectUser"].values()] == [role] * bool(
        role
    )
    assert [row["email"] for row in dump()["User"].values()] == (
        [] if not before and not role else ["you@example.org"]
    )


@sqlite_only
def test_array_and_object_are_the_same(import_state, state, dump, job):
    import_state(state)
    before = dump()
    workflow = state["workflows"]["flow"]
    state["workflows"] = [workflow | {"jobs": [job]}]
    import_state(state)
    assert dump() == before


@sqlite_only
def test_byte_order_mark_and_unknown_keys_are_accepted(run_flask, state, job, dump):
    job["edges"] = {"x": [1.5, 10**400, None]}
    content = b"\xef\xbb\xbf" + json.dumps(state).encode()
    run_flask("import-project", "-", input=content)
    assert JOB in dump()["Job"]


@sqlite_only
def test_file_is_read_by_its_name(run_flask, state, dump, tmp_path, runner):
    path = tmp_path / "state.json"
    path.write_text(json.dumps(state))
    run_flask("import-project", str(path))
    assert JOB in dump()["Job"]
    for missing in (str(tmp_path / "none.json"), str(tmp_path)):
        result = runner.invoke(args=["import-project", missing])
        assert result.exit_code == 2 and missing in result.stderr


@sqlite_only
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "The file is neither YAML nor JSON in UTF-8: "),
        ("{} {}", "The file is neither YAML nor JSON in UTF-8: "),
        (b'{"\xff": 1}', "The file is neither YAML nor JSON in UTF-8: 'utf-8' codec"),
        (
            "{}".encode("utf-16"),
            "The file is neither YAML nor JSON in UTF-8: 'utf-8' codec",
        ),
        ("[]", "The file is neither a project file of OpenFn "),
        ("5", "The file is neither a project file of OpenFn "),
        ("null", "The file is neither a project file of OpenFn "),
        ('{"data": []}', "The file is neither a project file of OpenFn "),
        (
            '{"x": {"a": 1, "b": [{"a": 1, "a": 2}]}}',
            "The file is neither YAML nor JSON in UTF-8: duplicate mapping key: 'a'.",
        ),
        (
            '{"id": "\\ud800"}',
            "The file is neither YAML nor JSON in UTF-8: YAML parse error at line 1, ",
        ),
    ],
    ids=range(10),
)
def test_what_is_no_state_file_is_rejected(runner, dump, content, line):
    result = runner.invoke(args=["import-project", "-"], input=content)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {line}")
    assert result.stderr.count("\n") == 1


@sqlite_only
@pytest.mark.parametrize("depth", [500, 990, 1500, 5000, 100_000])
def test_file_that_is_nested_too_deep_is_rejected(runner, depth):
    content = f'{{"z": {"[" * depth}{"]" * depth}}}'
    result = runner.invoke(args=["import-project", "-"], input=content)
    assert result.exit_code == 1 and "recursion limit exceeded" in result.stderr


REMOVE = object()
FLOW, PLACE = "workflows.flow", "workflows.flow.jobs.job"
MISSING = "Missing data for required field."
NULL = "Field may not be null."
TEXT = "Not a valid string."
NO_ID = "Not a valid UUID."
NUL = "Must not contain NUL."
NO_TIME = "Not a valid datetime."


@sqlite_only
@pytest.mark.parametrize(
    ("place", "key", "value", "line"),
    [
        *[
            (place, key, value, f"{place}.{key}".lstrip(".") + f": {message}")
            for place, keys in (
                ("", ("name",)),
                (FLOW, ("id", "name")),
                (PLACE, ("id", "name", "body")),
            )
            for key in keys
            for value, message in (
                (REMOVE, MISSING),
                (None, NULL),
                (5, NO_ID if key == "id" else TEXT),
                ({}, NO_ID if key == "id" else TEXT),
                (True, NO_ID if key == "id" else TEXT),
            )
        ],
        *[
            (place, key, value, f"{place}.{key}".lstrip(".") + f": {message}")
            for place, key in (("", "workflows"), (FLOW, "jobs"))
            for value, message in (
                (REMOVE, MISSING),
                (None, NULL),
                ("x", "Must be an object or an array."),
                (5, "Must be an object or an array."),
            )
        ],
        *[
            (place, "id", value, f"{place}.id".lstrip(".") + f": {NO_ID}")
            for place in (FLOW, PLACE)
            for value in (
                "",
                "x",
                f"{{{JOB}}}",
                f"urn:uuid:{JOB}",
                JOB.replace("-", ""),
                f"{JOB}\n",
            )
        ],
        ("", "workflows", [5], "workflows[0]: Must be an object."),
        (FLOW, "jobs", {"job": []}, f"{PLACE}: Must be an object."),
        (FLOW, "jobs", {"a\nb": []}, f'{FLOW}.jobs."a\\nb": Must be an object.'),
        (
            "",
            "workflows",
            {"_schema": {"id": WORKFLOW, "name": "x"}},
            f"workflows._schema.jobs: {MISSING}",
        ),
        ("", "name", "x" * 256, "name: Longer than maximum length 255."),
        (FLOW, "name", "é" * 256, f"{FLOW}.name: Longer than maximum length 255."),
        (PLACE, "name", "x" * 256, f"{PLACE}.name: Longer than maximum length 255."),
        (
            PLACE,
            "adaptor",
            "x" * 256,
            f"{PLACE}.adaptor: Longer than maximum length 255.",
        ),
        (PLACE, "adaptor", 5, f"{PLACE}.adaptor: {TEXT}"),
        (PLACE, "adaptor", None, f"{PLACE}.adaptor: {NULL}"),
        ("", "name", "a\0b", f"name: {NUL}"),
        (FLOW, "name", "\0", f"{FLOW}.name: {NUL}"),
        (PLACE, "body", "\0", f"{PLACE}.body: {NUL}"),
        (PLACE, "adaptor", "\0", f"{PLACE}.adaptor: {NUL}"),
        (PLACE, "inserted_at", "yesterday", f"{PLACE}.inserted_at: {NO_TIME}"),
        (PLACE, "inserted_at", "", f"{PLACE}.inserted_at: {NO_TIME}"),
        (PLACE, "updated_at", 5, f"{PLACE}.updated_at: {NO_TIME}"),
        (PLACE, "updated_at", "2024-02-30T00:00:00", f"{PLACE}.updated_at: {NO_TIME}"),
        (PLACE, "updated_at", "10000-01-01T00:00:00", f"{PLACE}.updated_at: {NO_TIME}"),
        (
            PLACE,
            "updated_at",
            "0001-01-01T00:00:00+23:00",
            f"{PLACE}.updated_at: Out of range.",
        ),
        (FLOW, "deleted_at", "x", f"{FLOW}.deleted_at: {NO_TIME}"),
        (FLOW, "deleted_at", False, f"{FLOW}.deleted_at: {NO_TIME}"),
        ("", "scheduled_deletion", [], f"scheduled_deletion: {NO_TIME}"),
        (
            "",
            "allow_support_access",
            "yes",
            "allow_support_access: Not a valid boolean.",
        ),
        ("", "allow_support_access", {}, "allow_support_access: Not a valid boolean."),
        ("", "allow_support_access", 1, "allow_support_access: Not a valid boolean."),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_error_has_its_location(
    runner, import_state, state, dump, place, key, value, line
):
    """The database stays as it was."""
    import_state(state, "you@example.org")
    before = dump()
    entry = state
    for name in place.split(".") if place else []:
        entry = entry[name]
    entry[key] = value
    if value is REMOVE:
        del entry[key]
    result = runner.invoke(args=["import-project", "-"], input=json.dumps(state))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"{ERRORS}{line}\n"
    assert dump() == before


@sqlite_only
@pytest.mark.parametrize("value", ["", "x", 5, None, f"{{{PROJECT}}}", f"{PROJECT}\n"])
def test_state_file_whose_id_is_no_uuid_is_rejected(runner, state, value):
    content = json.dumps(state | {"id": value})
    result = runner.invoke(args=["import-project", "-"], input=content)
    assert result.exit_code == 1
    assert "nor a state file (whose id is a UUID)" in result.stderr


@sqlite_only
def test_all_errors_are_reported_at_once(runner, state, job):
    job |= {"id": "x", "name": None}
    state["workflows"]["flow"]["id"] = 5
    state["workflows"]["other"] = {"id": OTHER, "name": "Other", "jobs": [{}, job]}
    result = runner.invoke(args=["import-project", "-"], input=json.dumps(state))
    assert result.stderr.startswith(ERRORS)
    assert set(result.stderr.removeprefix(ERRORS).splitlines()) == {
        f"{FLOW}.id: {NO_ID}",
        f"{PLACE}.id: {NO_ID}",
        f"{PLACE}.name: {NULL}",
        f"workflows.other.jobs[0].id: {MISSING}",
        f"workflows.other.jobs[0].name: {MISSING}",
        f"workflows.other.jobs[0].body: {MISSING}",
        f"workflows.other.jobs[1].id: {NO_ID}",
        f"workflows.other.jobs[1].name: {NULL}",
    }


@sqlite_only
def test_id_that_appears_twice_is_rejected(runner, state, job, dump):
    state["workflows"]["two"] = {
        "id": OTHER,
        "name": "Two",
        "jobs": [job | {"id": JOB.upper()}, job | {"id": OTHER}],
    }
    result = runner.invoke(args=["import-project", "-"], input=json.dumps(state))
    assert result.stderr == (
        f"{ERRORS}workflows.two.jobs[0].id: Duplicate of {PLACE}.id.\n"
    )
    state["workflows"]["two"] = {"id": WORKFLOW.upper(), "name": "Two", "jobs": []}
    result = runner.invoke(
        args=["import-project", "-"], input=json.dumps({"data": state})
    )
    assert result.stderr == (
        f"{ERRORS}data.workflows.two.id: Duplicate of data.{FLOW}.id.\n"
    )
    assert dump()["Project"] == {}


def test_id_of_another_project_is_rejected(runner, import_state, state, dump):
    import_state(state)
    before = dump()
    thief = state | {"id": OTHER}
    result = runner.invoke(args=["import-project", "-"], input=json.dumps(thief))
    assert (result.exit_code, result.stderr) == (
        1,
        f"{ERRORS}{FLOW}.id: Belongs to another project.\n"
        f"{PLACE}.id: Belongs to another project.\n",
    )
    assert dump() == before


@sqlite_only
@pytest.mark.parametrize(
    "member",
    [
        "",
        "you",
        "you@",
        "@x",
        "a b@x",
        "you@example.org:",
        "you@example.org:boss",
        "you@example.org:Owner",
        "a@b@c",
        "x\n@y",
        "x" * 256 + "@y",
        "İ" * 250 + "@y",
        "\udcff@y",
    ],
)
def test_member_that_is_none_is_rejected(runner, state, dump, member):
    args = ["import-project", "-", "--member", member]
    result = runner.invoke(args=args, input=json.dumps(state))
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {ascii(member)} is neither EMAIL nor EMAIL:ROLE. "
        "ROLE is one of owner, admin, editor, viewer, none.\n"
    )
    assert dump()["Project"] == {}


@sqlite_only
def test_file_may_have_more_jobs_than_a_statement_has_parameters(
    app, import_state, new_state
):
    with app.app_context():
        event.listen(
            db.engine,
            "connect",
            lambda connection, _: connection.setlimit(
                sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 200
            ),
        )
    state = new_state(jobs=300)
    assert "300 jobs created" in import_state(state)
    assert "300 jobs unchanged" in import_state(state)


@sqlite_only
def test_project_that_no_user_can_read_has_a_hint(runner, state, dump):
    def hint_of(*options):
        args = ["import-project", "-", *options]
        result = runner.invoke(args=args, input=json.dumps(state))
        assert result.exit_code == 0
        return result.stderr

    no_member = (
        "No user can read the project, because it has no members. "
        f"Add a member with: flask set-member {PROJECT} EMAIL\n"
    )
    assert hint_of() == hint_of() == no_member
    assert hint_of("--member", "you@example.org") == hint_of() == ""
    assert hint_of("--member", "you@example.org:none") == no_member
    state["scheduled_deletion"] = "2030-01-01T00:00:00Z"
    scheduled = (
        "No user can read the project, because it is scheduled for deletion. "
        "Cancel the deletion in OpenFn, then import the project again.\n"
    )
    assert hint_of() == hint_of("--member", "you@example.org") == scheduled
    state["scheduled_deletion"] = None
    assert hint_of() == ""


def test_change_of_the_project_is_counted(import_state, state):
    import_state(state)
    state["name"] = "Another name"
    line = import_state(state)
    assert "1 job unchanged, 1 project updated, 1 workflow unchanged." in line


def test_real_file_is_walked_from_import_to_curl(run_flask, client, auth_header, dump):
    if not REAL_FILE.exists():
        pytest.skip(f"needs {REAL_FILE.name}")
    for _ in range(2):
        run_flask("import-project", str(REAL_FILE), "--member", "you@example.org:owner")
    headers = auth_header("you@example.org")
    project = json.loads(REAL_FILE.read_text())
    jobs = [job for w in project["workflows"].values() for job in w["jobs"].values()]
    listed = client.get("/api/jobs", headers=headers).json["data"]
    assert [job["id"] for job in listed] == [job["id"] for job in jobs]
    for resource, job in zip(listed, jobs, strict=True):
        shown = client.get(resource["links"]["self"], headers=headers).json["data"]
        assert shown["attributes"]["body"] == job["body"]
        assert shown["attributes"]["adaptor"] == job["adaptor"]
