"""Project files: read like the state file of the same project, or refused whole."""

import copy
import json
import tracemalloc
from pathlib import Path

import pytest
from conftest import sqlite_only
from sqlalchemy import event

from database import db

FILES = Path(__file__).parent / "project_files"
MISSING = "Missing data for required field."
NOT_DEPLOYED = f"{MISSING} Deploy the project, or pull it once."
PROJECT, WORKFLOW, JOB, OTHER = (
    f"00000000-0000-4000-8000-00000000000{n}" for n in "1234"
)


@pytest.fixture
def project():
    """A small project file as Python values; tests change it."""
    trigger = {"id": "webhook", "type": "webhook", "openfn": {"uuid": "x"}}
    job = {"id": "job", "name": "Job", "expression": "fn();", "openfn": {"uuid": JOB}}
    return {
        "id": "project",
        "name": "Project",
        "schema_version": "4.0",
        "openfn": {"uuid": PROJECT},
        "workflows": [
            {
                "id": "workflow",
                "name": "Workflow",
                "openfn": {"uuid": WORKFLOW},
                "steps": [trigger, job],
            }
        ],
    }


@pytest.fixture
def job(project):
    """The job in the project."""
    return project["workflows"][0]["steps"][1]


@pytest.fixture
def import_file(runner):
    """A function that imports a file's content, and gives what came of it."""

    def run(content):
        if isinstance(content, dict):
            content = json.dumps(content)
        return runner.invoke(args=["import-project", "-"], input=content)

    return run


def yaml_of(name="Name", expression="fn();"):
    """A project file in YAML, whose job has these for its name and body."""
    return f"""
id: project
name: Project
schema_version: '4.0'
openfn:
  uuid: {PROJECT}
workflows:
  - id: workflow
    name: Workflow
    openfn:
      uuid: {WORKFLOW}
    steps:
      - id: job
        name: {name}
        openfn:
          uuid: {JOB}
        expression: {expression}"""


@pytest.mark.parametrize("name", ["plain", "odd", "lossy"])
def test_project_file_says_what_the_state_file_says(run_flask, dump, name):
    """Those that OpenFn's own library wrote of one project, in every order."""
    state, in_yaml, in_json = (
        str(FILES / f"{name}{ending}")
        for ending in ("-state.json", ".yaml", "-project.json")
    )
    run_flask("import-project", state, "--member", "you@example.org")
    before = dump()
    for path in (in_yaml, in_json, state, in_json, in_yaml):
        line = run_flask("import-project", path)
        assert "unchanged" in line
        assert not any(word in line for word in ("created", "updated", "deleted"))
        assert dump() == before


@sqlite_only
@pytest.mark.parametrize("ending", [".yaml", "-project.json"])
def test_new_jobs_are_in_the_order_of_the_file(run_flask, client, auth_header, ending):
    """But for those whose times the file has."""
    run_flask(
        "import-project", str(FILES / f"odd{ending}"), "--member", "you@example.org"
    )
    project = json.loads((FILES / "odd-project.json").read_text())
    steps = [step for flow in project["workflows"] for step in flow["steps"]]
    jobs = [
        step["openfn"]["uuid"]
        for step in steps
        if "type" not in step and "inserted_at" not in step["openfn"]
    ]
    url, headers = "/api/jobs?page_size=100", auth_header("you@example.org")
    listed = []
    while url:
        page = client.get(url, headers=headers).json
        listed += [job["id"] for job in page["data"] if job["id"] in jobs]
        url = page["links"]["next"]
    assert listed == jobs


@sqlite_only
@pytest.mark.parametrize(
    "name",
    [
        "no", "on", "Yes", "y", "OFF", "12:30", "2024-01-01", "1_000", "0o8", "=", "<<",
        "2024-01-01T00:00:00Z", "0b1", "+", ".", "0x", "nUll", "tRUE", "1e", "é 🙂",
    ],
)  # fmt: skip
def test_name_without_quotes_is_text(import_file, dump, name):
    """As YAML 1.2's core schema has it, not as 1.1 does."""
    assert import_file(yaml_of(name)).exit_code == 0
    assert dump()["Job"][JOB]["name"] == name


@sqlite_only
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("null", "Field may not be null."),
        ("~", "Field may not be null."),
        ("", "Field may not be null."),
        *[
            (name, "Not a valid string.")
            for name in (
                "true",
                "False",
                "1",
                "-1.5",
                "1e3",
                ".5",
                "0x1F",
                "0o17",
                ".inf",
            )
        ],
        ("[a]", "Not a valid string."),
        ('"a\\0b"', "Must not contain NUL."),
        ("a\0b", "Must not contain NUL."),
    ],
)
def test_name_that_is_no_text_is_refused(import_file, dump, name, message):
    result = import_file(yaml_of(name))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"workflows[0].steps[0].name: {message}\n"
    assert dump()["Project"] == {}


ODD = "a\u2028b\u2029c\x85d\ufeffe\x7f\x1b\uffff🙂"


@sqlite_only
@pytest.mark.parametrize(
    ("expression", "body"),
    [
        ("|\n          a\n\n            b\n", "a\n\n  b\n"),
        ("|-\n          a\n", "a"),
        ("|+\n          a\n\n\n", "a\n\n\n"),
        ("|\n          a", "a\n"),
        (">\n          a\n          b\n\n          c\n", "a b\nc\n"),
        ("|\n          \ta\n          \t\tb\n", "\ta\n\t\tb\n"),
        (">\n          \ta\n          b\n", "\ta\nb\n"),
        ("|2\n            a\n", "  a\n"),
        (f"|\n          {ODD}\n", f"{ODD}\n"),
        ('"a\\r\\n\\u2028\\/"', "a\r\n\u2028/"),
        ("'it''s'", "it's"),
        ("|  # a comment\n          \ta\n", "\ta\n"),
        ("|\n          x: |\n            \ty\n", "x: |\n  \ty\n"),
        (">\n          x: >\n          \ty\n", "x: >\n\ty\n"),
        ('"x: |\\n  \\ty"', "x: |\n  \ty"),
    ],
    ids=range(15),
)  # fmt: skip
def test_body_comes_as_openfn_reads_it(import_file, dump, expression, body):
    result = import_file(yaml_of(expression=expression))
    assert result.exit_code == 0, result.stderr
    assert dump()["Job"][JOB]["body"] == body


@sqlite_only
def test_optional_keys_are_read(import_file, project, job, dump):
    project["options"] = {
        "allow_support_access": True,
        "scheduled_deletion": "2030-01-01T00:00:00Z",
    }
    project["workflows"][0]["openfn"]["deleted_at"] = "2024-01-01T00:00:00Z"
    times = {
        "inserted_at": "2024-01-02T00:00:00Z",
        "updated_at": "2024-01-03T00:00:00Z",
    }
    job["openfn"] |= times
    job["adaptor"] = "@openfn/language-http@7.2.3"
    assert import_file(project).exit_code == 0
    rows = dump()
    assert rows["Project"][PROJECT]["allow_support_access"] is True
    assert f"{rows['Project'][PROJECT]['scheduled_deletion']:%F}" == "2030-01-01"
    assert f"{rows['Workflow'][WORKFLOW]['deleted_at']:%F}" == "2024-01-01"
    assert f"{rows['Job'][JOB]['inserted_at']:%F}" == "2024-01-02"
    assert f"{rows['Job'][JOB]['updated_at']:%F}" == "2024-01-03"
    assert rows["Job"][JOB]["adaptor"] == "@openfn/language-http@7.2.3"


@sqlite_only
def test_what_the_project_file_no_longer_has_is_deleted(import_file, project, dump):
    import_file(project)
    project["workflows"][0]["steps"].pop()
    assert "1 jobs deleted" in import_file(project).stdout
    assert dump()["Job"] == {}


REMOVE = ...
STEP = "workflows[0].steps[1]"


@sqlite_only
@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (["openfn"], REMOVE, f"openfn.uuid: {NOT_DEPLOYED}"),
        (["openfn", "uuid"], REMOVE, f"openfn.uuid: {NOT_DEPLOYED}"),
        (["openfn", "uuid"], "x", "openfn.uuid: Not a valid UUID."),
        (["openfn", "uuid"], None, "openfn.uuid: Field may not be null."),
        (["name"], REMOVE, f"name: {MISSING}"),
        (["workflows"], REMOVE, f"workflows: {MISSING}"),
        (["workflows"], 5, "workflows: Must be an object or an array."),
        (["workflows", 0], 5, "workflows[0]: Must be an object."),
        (["options"], {"allow_support_access": 1},
         "options.allow_support_access: Not a valid boolean."),
        (["options"], {"scheduled_deletion": "x"},
         "options.scheduled_deletion: Not a valid datetime."),
        (["options"], [1], "options: Must be an object."),
        (["workflows", 0, "steps"], REMOVE, f"workflows[0].steps: {MISSING}"),
        (["workflows", 0, "openfn", "deleted_at"], "x",
         "workflows[0].openfn.deleted_at: Not a valid datetime."),
        (["workflows", 0, "openfn"], REMOVE,
         f"workflows[0].openfn.uuid: {NOT_DEPLOYED}"),
        (["workflows", 0, "steps", 1, "openfn", "uuid"], "x",
         f"{STEP}.openfn.uuid: Not a valid UUID."),
        (["workflows", 0, "steps", 1, "openfn", "inserted_at"], "x",
         f"{STEP}.openfn.inserted_at: Not a valid datetime."),
        (["workflows", 0, "steps", 1, "expression"], REMOVE,
         f"{STEP}.expression: {MISSING}"),
        (["workflows", 0, "steps", 1, "expression"], "\ud800",
         f"{STEP}.expression: Must not contain lone surrogates."),
        (["workflows", 0, "steps", 1, "name"], "x" * 256,
         f"{STEP}.name: Longer than maximum length 255."),
        (["workflows", 0, "steps", 1, "adaptor"], None,
         f"{STEP}.adaptor: Field may not be null."),
        (["schema_version"], "5.0", "schema_version: Must be 4.0, not 5.0."),
        (["schema_version"], REMOVE, "schema_version: Must be 4.0, not missing."),
    ],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_fault_is_named_with_the_file_s_own_place(
    import_file, project, dump, path, value, line
):
    """And the database stays as it was."""
    import_file(project)
    before = dump()
    *way, key = path
    entry = project
    for step in way:
        entry = entry[step]
    entry[key] = value
    if value is REMOVE:
        del entry[key]
    result = import_file(project)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"{line}\n"
    assert dump() == before


@sqlite_only
@pytest.mark.parametrize("mark", [{"cli": {"version": 2}}, {"version": 2}])
def test_older_project_file_is_told_which_are_known(import_file, project, mark):
    del project["schema_version"]
    result = import_file(project | mark)
    assert (result.exit_code, result.stderr) == (
        1,
        "schema_version: Must be 4.0, not missing.\n",
    )


def test_id_of_another_project_is_refused(import_file, project, dump):
    import_file(project)
    before = dump()
    project["openfn"]["uuid"] = OTHER
    result = import_file(project)
    assert (result.exit_code, result.stderr) == (
        1,
        "workflows[0].openfn.uuid: Belongs to another project.\n"
        f"{STEP}.openfn.uuid: Belongs to another project.\n",
    )
    assert dump() == before


@sqlite_only
def test_step_that_stands_twice_is_refused(import_file, project, job):
    project["workflows"][0]["steps"].append(copy.deepcopy(job))
    result = import_file(project)
    assert result.stderr == (
        f"workflows[0].steps[2].openfn.uuid: Stands at {STEP} too.\n"
    )


NO_TEXT = "expected a scalar node, but found sequence"


@sqlite_only
@pytest.mark.parametrize(
    ("content", "problem", "line", "column"),
    [
        ("a: b: c", "mapping values are not allowed in this context", 1, 5),
        ("a: 'b", "found unexpected end of stream", 2, 1),
        ("a: 1\nb: 2\na: 3", 'found "a" twice in one object', 3, 1),
        ("x:\n  - {a: 1, 'a': 3}", 'found "a" twice in one object', 2, 12),
        ("a: 1\n---\nb: 2", "but found another document", 2, 1),
        ("a: !!python/object:os.system x", "found a tag", 1, 4),
        ("a: !!str x", "found a tag", 1, 4),
        ("!x {a: b}", "found a tag", 1, 1),
        ("? [a]\n: b", NO_TEXT, 1, 3),
        ("a: *b", "found undefined alias", 1, 4),
        ("a: &b [*b]", "found unconstructable recursive node", 1, 4),
        ('a: "\\ud800"', "found invalid Unicode character escape code", 1, 7),
        (
            "a: |\n  \tx\nb: |\n  \tx\nc: d: e",
            "mapping values are not allowed in this context",
            5,
            5,
        ),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_place(
    import_file, content, problem, line, column
):
    result = import_file(content)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"The file is neither JSON nor plain YAML: {problem} "
        f"at line {line}, column {column}.\n"
    )


@sqlite_only
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "The file: Must be an object."),
        ("# nothing", "The file: Must be an object."),
        ("- " * 100_000, "The file is nested too deep."),
        ("x: " + "[" * 100_000, "The file is nested too deep."),
        ("x: " + "[" * 900 + "]" * 900, "The file is nested too deep."),
        (b"a: \xff", "The file is not UTF-8 at byte 3."),
    ],
    ids=range(6),
)
def test_what_is_no_project_file_is_refused_in_one_line(
    import_file, dump, content, line
):
    result = import_file(content)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"{line}\n"
    assert dump()["Project"] == {}


@sqlite_only
def test_byte_order_mark_and_comments_are_accepted(import_file, dump):
    content = b"\xef\xbb\xbf# pulled\n---\n" + yaml_of("&name Job # no").encode()
    assert import_file(content).exit_code == 0
    assert dump()["Job"][JOB]["name"] == "Job"


@sqlite_only
def test_alias_stands_for_what_it_names(import_file, dump):
    content = yaml_of("&name Job").replace("name: Workflow", "name: *flow", 1)
    content = f"x: &flow Flow\n{content}"
    assert import_file(content).exit_code == 0
    assert dump()["Workflow"][WORKFLOW]["name"] == "Flow"


def peak_of(call):
    """The most bytes that Python's objects took during a call, and its result."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def laughs(item, depth):
    """Lists of ten aliases each, over one another."""
    lines = [f"a0: &a0 {item}"]
    lines += [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)
    ]
    return "\n".join(lines)


# A thousand workflows, each of which has the same thousand jobs.
SAME_JOBS = (
    "schema_version: '4.0'\njobs: &jobs\n"
    + "- {}\n" * 1000
    + "workflows:\n"
    + "- {steps: *jobs}\n" * 1000
)


@sqlite_only
@pytest.mark.parametrize(
    "content",
    [
        laughs("ha", 50) + yaml_of(),
        laughs("{steps: [x]}", 9)
        + yaml_of().replace("workflows:", "workflows: *a8\nx:"),
        laughs("ha", 50) + yaml_of().replace("'4.0'", "*a49"),
        SAME_JOBS,
        f"x: &x {'é' * 200_000}\nys:\n" + "- *x\n" * 20_000,
    ],
    ids=["unread", "workflows", "version", "jobs", "text"],
)
def test_billion_laughs_cost_little(import_file, content):
    result, peak = peak_of(lambda: import_file(content))
    assert isinstance(result.exception, SystemExit | None)
    assert peak < 100_000_000


@sqlite_only
def test_hundreds_of_faults_are_told_and_the_rest_is_counted(import_file, new_state):
    """Each with a place of a few words, whatever the file has for keys."""
    long = "k" * 1_000_000
    state = new_state(jobs=0)
    flow = {"id": WORKFLOW, "name": "x", "jobs": [{} for _ in range(2000)]}
    state["workflows"] = {long: flow}
    result, peak = peak_of(lambda: import_file(state))
    *lines, last = result.stderr.splitlines()
    assert len(lines) == 200 and last == "And 5800 faults more."
    assert lines[0] == f"workflows.{'k' * 80}….jobs[0].id: {MISSING}"
    assert peak < 50_000_000


@pytest.fixture
def statements(app):
    """Those that are sent to the database, one for many rows."""
    sent = []
    with app.app_context():
        event.listen(
            db.engine, "before_cursor_execute", lambda *event: sent.append(event[2])
        )
    return sent


def test_number_of_statements_does_not_grow_with_the_jobs(
    import_state, new_state, statements
):
    """Whether the jobs are new, the same, changed or gone."""
    counts = []
    for jobs in (30, 300):
        state = new_state(jobs=jobs)
        for change in ("", "", "changed"):
            for workflow in state["workflows"]:
                for job in workflow["jobs"]:
                    job["body"] += change
            statements.clear()
            import_state(state)
            counts.append(len(statements))
        state["workflows"] = []
        statements.clear()
        import_state(state)
        counts.append(len(statements))
    assert counts[:4] == counts[4:]
