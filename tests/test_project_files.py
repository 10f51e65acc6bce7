"""Project files and state files: read as OpenFn reads them, or rejected whole."""

import json
import re

import pytest
import yaml_rs
from servers import ROOT

# A file is read in the same way whatever the database is.
pytestmark = pytest.mark.sqlite

FILES = ROOT / "tests/project_files"
PROJECT, WORKFLOW, JOB = (f"00000000-0000-4000-8000-00000000000{n}" for n in "123")
FETCH = "openfn project fetch UUID -o project.json"
MISSING = "Missing data for required field."
NO_JSON = "The file is neither JSON nor YAML in UTF-8: "
DAMAGED = "The file ends within a line or has a NUL character, so it may be damaged. "
DAMAGED += "If it is complete, end it with a line break."
OPTIONS = {"scheduled_deletion": "2024-01-01", "allow_support_access": True}
TIMES = dict.fromkeys(["inserted_at", "updated_at"], "2024-01-01T01:00:00+01:00")
DELETED = {"deleted_at": "2024-01-01T00:00:00Z"}


def state_file(has_options=False):
    """Return a small state file as Python values, also with all optional keys."""
    job = {"id": JOB, "name": "Job", "body": "fn();"}
    workflow = {"id": WORKFLOW, "name": "Workflow", "jobs": {"job": job}}
    project = {"id": PROJECT, "name": "Project", "workflows": {"flow": workflow}}
    if has_options:
        job |= TIMES | {"adaptor": "x"}
        workflow |= DELETED
    return project | (OPTIONS if has_options else {})


def project_file(has_options=False):
    """Return a project file of the same project as Python values."""
    trigger = {"id": "webhook", "type": "webhook", "openfn": {"uuid": "x"}}
    job = {"name": "Job", "expression": "fn();", "openfn": {"uuid": JOB}}
    workflow = {"name": "Workflow", "steps": [trigger, job]}
    workflow["openfn"] = {"uuid": WORKFLOW}
    project = {"name": "Project", "schema_version": "4.0", "workflows": [workflow]}
    if has_options:
        job["openfn"] |= TIMES
        job["adaptor"] = "x"
        workflow["openfn"] |= DELETED
        project["options"] = OPTIONS
    return project | {"openfn": {"uuid": PROJECT}}


def yaml_file(name="Job"):
    """Return the project file in YAML, with a name of its job without quotes."""
    text = yaml_rs.dumps(project_file()).replace("name: Job", f"name: {name}")
    return text.removeprefix("---\n") + "\n"


@pytest.fixture
def import_file(run_flask, dump):
    """A function that imports the content of a file, and returns all rows."""

    def run(content):
        content = json.dumps(content) if isinstance(content, dict) else content
        run_flask("import-project", "-", input=content)
        return dump()

    return run


@pytest.fixture
def reject_file(fail_flask, dump):
    """A function that imports a file that must be rejected, and returns the errors."""

    def run(content):
        before = dump()
        content = json.dumps(content) if isinstance(content, dict) else content
        errors = fail_flask("import-project", "-", input=content)
        assert dump() == before
        return errors

    return run


@pytest.mark.postgresql
@pytest.mark.parametrize("name", ["plain", "odd", "lossy"])
def test_all_forms_of_a_project_are_read_as_openfn_reads_them(import_file, name):
    """OpenFn's own library wrote the other two files of each state file."""
    in_yaml = (FILES / f"{name}.yaml").read_text()
    for number in ("1_000", "0b1"):  # The parser would read these as numbers.
        in_yaml = in_yaml.replace(f" name: {number}\n", f" name: '{number}'\n")
    in_json = (FILES / f"{name}-project.json").read_text()
    in_state = (FILES / f"{name}-state.json").read_text()
    before = import_file(in_state)
    for content in (in_yaml, in_json, in_state):
        assert import_file(content) == before
    workflows = json.loads(in_state)["workflows"].values()
    jobs = [job for workflow in workflows for job in workflow["jobs"].values()]
    texts = {job["id"]: (job["name"], job["body"]) for job in jobs}
    rows = before["jobs"].items()
    assert {job_id: (row["name"], row["body"]) for job_id, row in rows} == texts


@pytest.mark.parametrize(
    ("name", "number"),
    [("1", 1), ("2026_01", 202601), ("0b1", 1), ("0x1F", 31), ("1.50", 1.5)],
)
def test_name_that_is_read_as_a_number_is_rejected(reject_file, name, number):
    error = f"It was read as the number {number}. Fetch the project as JSON: {FETCH}"
    for kind, location in (
        ("Project", "name"),
        ("Workflow", "workflows[0].name"),
        ("Job", "workflows[0].steps[1].name"),
    ):
        content = yaml_file().replace(f"name: {kind}", f"name: {name}")
        assert reject_file(content) == [f"{location}: {error}"]


@pytest.mark.parametrize(
    "content",
    [
        project_file(),
        {"data": state_file()},
        state_file() | {"created_by": {"x": [1.5, 10**400, None]}},
        state_file() | {"id": PROJECT.upper()},
        yaml_file().replace("'4.0'", "4.0"),
        b"\xef\xbb\xbf# fetched\n---\n" + yaml_file("&name Job # no").encode(),
        f"x: &flow Workflow\n{yaml_file()}".replace("name: Workflow", "name: *flow"),
    ],
    ids=["json", "api", "keys", "upper", "version", "mark", "alias"],
)
def test_other_forms_of_the_file_say_the_same(import_file, content):
    assert import_file(state_file()) == import_file(content)


def test_triggers_and_deleted_entries_are_dropped_unread(import_file, reject_file):
    """Errors have their location among all entries. A job's ``type`` may be null."""
    project, state = project_file(), state_file()
    steps = project["workflows"][0]["steps"]
    steps[:0] = [{"type": "cron", "name": 5}, {"delete": True, "name": 5}]
    steps[3]["type"] = None
    project["workflows"].insert(0, {"delete": True, "steps": 5})
    state["workflows"]["gone"] = {"delete": True, "id": "x"}
    jobs = state["workflows"]["flow"]["jobs"]
    jobs["gone"] = {"delete": True, "id": "x"}
    jobs["job"] |= {"delete": False, "type": "job"}
    assert import_file(project)["jobs"].keys() == {JOB}
    assert import_file(state)["jobs"].keys() == {JOB}
    steps[3]["name"] = None
    error = "workflows[1].steps[3].name: Field may not be null."
    assert reject_file(project) == [error]


@pytest.mark.parametrize(
    ("make_file", "is_cleared"),
    [(state_file, False), (project_file, True)],
    ids=["state file", "project file"],
)
def test_optional_keys_that_are_absent(import_file, make_file, is_cleared):
    """They are null in a project file, and leave what is there in a state file.

    Jobs are never cleared.
    """
    options = [*import_file(make_file(has_options=True))["jobs"][JOB].values()][2:6]
    time = "2024-01-01 00:00:00.000000"  # as SQLite has it
    assert options == ["x", WORKFLOW, time, time]
    before = import_file(make_file(has_options=True))
    after = import_file(make_file())
    assert after["jobs"] == before["jobs"]
    for rows, values in (
        (after, [None] * 3) if is_cleared else (after, [time, 1, time]),
    ):
        project = rows["projects"][PROJECT]
        found = [project[key] for key in OPTIONS]
        assert [*found, rows["workflows"][WORKFLOW]["deleted_at"]] == values


def test_null_clears_a_key_of_a_state_file_except_the_times_of_a_job(import_file):
    before = import_file(state_file(has_options=True))
    state = state_file() | dict.fromkeys(OPTIONS)
    workflow = state["workflows"]["flow"]
    workflow["deleted_at"] = None
    workflow["jobs"]["job"] |= dict.fromkeys(TIMES)
    after = import_file(state)
    assert [after["projects"][PROJECT][key] for key in OPTIONS] == [None, None]
    assert after["workflows"][WORKFLOW]["deleted_at"] is None
    assert after["jobs"] == before["jobs"]


UUID, TIME = "Not a valid UUID.", "Not a valid datetime."
JOB_KEYS = ("id", "name", "body")
STEP, FLOW_JOB = "workflows[0].steps[1]", "workflows.flow.jobs.job"


@pytest.mark.parametrize(
    ("make_file", "location", "value", "error"),
    [
        (state_file, "name", ..., MISSING),
        (state_file, "workflows", None, "Field may not be null."),
        (state_file, "workflows", 5, "Must be an array or an object."),
        (state_file, "workflows.flow", 5, "Invalid input type."),
        (state_file, "allow_support_access", "yes", "Not a valid boolean."),
        (state_file, "workflows.flow.id", JOB.replace("-", ""), UUID),
        (state_file, "workflows.flow.deleted_at", False, TIME),
        (state_file, f"{FLOW_JOB}.body", 5, "Not a valid string."),
        (state_file, f"{FLOW_JOB}.inserted_at", "2024-02-30", TIME),
        (
            state_file,
            f"{FLOW_JOB}.adaptor",
            "é" * 256,
            "Longer than maximum length 255.",
        ),
        (project_file, "openfn", ..., MISSING),
        (project_file, "options", [1], "Invalid input type."),
        (project_file, "workflows[0].openfn.deleted_at", "x", TIME),
        (project_file, "workflows[0].name", True, "Not a valid string."),
        (project_file, "workflows[0].steps", ..., MISSING),
        (project_file, f"{STEP}.openfn.uuid", "x", UUID),
        (project_file, f"{STEP}.openfn.updated_at", 5, TIME),
        (project_file, f"{STEP}.expression", ..., MISSING),
        (project_file, f"{STEP}.name", "x" * 256, "Longer than maximum length 255."),
    ],
    ids=range(19),
)
def test_error_has_its_location(reject_file, make_file, location, value, error):
    """The value ``...`` removes a key."""
    document = entry = make_file()
    *steps, key = re.findall(r"\w+", location)
    for step in steps:
        entry = entry[int(step) if step.isdigit() else step]
    entry[key] = value
    if value is ...:
        del entry[key]
    assert reject_file(document) == [f"{location}: {error}"]


def test_all_errors_are_reported_at_once(reject_file):
    state = state_file() | {"name": None}
    state["workflows"]["flow"]["id"] = 5
    state["workflows"]["other"] = {"id": PROJECT, "name": "Other", "jobs": [{}]}
    missing = [f"workflows.other.jobs[0].{key}: {MISSING}" for key in JOB_KEYS]
    others = ["name: Field may not be null.", f"workflows.flow.id: {UUID}"]
    assert sorted(reject_file(state)) == sorted(missing + others)


OTHER_FORM = "is neither a project file nor a state file, whose id is a UUID"
OTHER_VERSION = "cannot be read: its schema_version is '3.0', not '4.0'"
SPEC = "cannot be read: it is a spec, whose workflows have no ids"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        (project_file() | {"schema_version": "3.0"}, OTHER_VERSION),
        ({"name": "x", "workflows": {"x": {"name": "X"}}}, SPEC),
        ("<!DOCTYPE html>\n<html><title>Log in</title></html>\n", OTHER_FORM),
        ("project:\n  uuid: x\n", OTHER_FORM),
        ('{"error": "Unauthorized"}', OTHER_FORM),
        ('{"data": []}', OTHER_FORM),
        ("[]", OTHER_FORM),
        (state_file() | {"id": f"{PROJECT}\n"}, OTHER_FORM),
        (yaml_file() + "---\n" + yaml_file(), OTHER_FORM),
    ],
    ids=range(11),
)
def test_file_of_another_form_is_rejected_in_one_sentence(
    reject_file, content, problem
):
    error = f"The file {problem}. Fetch the project with: {FETCH}"
    assert reject_file(content) == [error]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a: b: c\n", "YAML parse error at line 1, column 5: mapping values are"),
        ("a: 1\nb: 2\na: 3\n", "duplicate mapping key: 'a'."),
        ('{"x": [{"a": 1, "a": 2}]}', "duplicate mapping key: 'a'."),
        ("a: *b\n", "YAML parse error at line 1, column 4: while parsing node, found"),
        ("{{a: [b]}: c}", "unhashable type: 'list'."),
        ("a: !!python/object:os.system x\n", "Invalid tag: '!!python/object:os.sys"),
        (b"a: \xff", "'utf-8' codec can't decode byte 0xff in position 3"),
        ('{"a": "\\ud800"}', "YAML parse error at line 1, column 7: while parsing"),
    ],
    ids=range(8),
)
def test_what_is_no_yaml_is_rejected_in_one_line(reject_file, content, problem):
    [error] = reject_file(content)
    assert error.startswith(f"{NO_JSON}{problem}")


def test_file_that_a_crash_has_damaged_is_rejected(import_file, reject_file):
    """What is left can be valid, and the jobs that it lacks would be deleted."""
    import_file((FILES / "plain.yaml").read_text())
    for name in ("plain.yaml", "plain-project.json"):
        whole = (FILES / name).read_bytes().strip()
        for end in range(len(whole) - 1, 0, -197):
            if not whole[:end].endswith(b"\n") or name.endswith("json"):
                reject_file(whole[:end])
    reject_file("\0" + yaml_file())
    assert reject_file(yaml_file() + "\0\n" + yaml_file()) == [DAMAGED]
    assert reject_file(yaml_file().strip()) == [DAMAGED]
