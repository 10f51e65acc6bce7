"""Project files: read like the state file of the same project, or rejected whole."""

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
NOT_DEPLOYED = (
    "Missing, because the project was never deployed. "
    "Deploy it, then run: openfn project pull"
)
ERRORS = "Error: Nothing was imported, because the file has errors:\n"
UNKNOWN_FORM = (
    "Error: The file is neither a project file of OpenFn (only schema_version 4.0 is "
    "supported) nor a state file (whose id is a UUID). "
    "Write a project file with: openfn project pull\n"
)
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
    """A function that imports the content of a file and returns the result."""

    def run(content):
        if isinstance(content, dict):
            content = json.dumps(content)
        return runner.invoke(args=["import-project", "-"], input=content)

    return run


def yaml_of(name="Name", expression="fn();"):
    """Return a project file in YAML whose job has this name and body."""
    text = f"""
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
    return text if text.endswith("\n") else f"{text}\n"


def content_of(name):
    """Return the content of a file, with quotes around two names that need them.

    OpenFn's reader takes them for text where they are plain; the YAML parser does not.
    """
    content = (FILES / name).read_text()
    for number in ("1_000", "0b1"):
        content = content.replace(f" name: {number}\n", f" name: '{number}'\n")
    return content


@pytest.mark.parametrize("name", ["plain", "odd", "lossy"])
def test_project_file_says_what_the_state_file_says(run_flask, dump, name):
    """OpenFn's own library wrote all three files of a project."""
    state, in_yaml, in_json = (
        content_of(f"{name}{ending}")
        for ending in ("-state.json", ".yaml", "-project.json")
    )
    command = ["import-project", "-", "--member", "you@example.org"]
    run_flask(*command, input=state)
    before = dump()
    for content in (in_yaml, in_json, state, in_json, in_yaml):
        line = run_flask(*command, input=content)
        assert "unchanged" in line
        assert not any(word in line for word in ("created", "updated", "deleted"))
        assert dump() == before


@sqlite_only
def test_plain_name_that_looks_like_a_number_is_rejected(runner, dump):
    result = runner.invoke(args=["import-project", str(FILES / "odd.yaml")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == ERRORS + (
        "workflows[0].steps[16].name: Not a valid string.\n"
        "workflows[0].steps[22].name: Not a valid string.\n"
    )
    assert dump()["Project"] == {}


@sqlite_only
@pytest.mark.parametrize("ending", [".yaml", "-project.json"])
def test_new_jobs_are_in_the_order_of_the_file(run_flask, client, auth_header, ending):
    """Jobs whose times are in the file are sorted by these instead."""
    command = ["import-project", "-", "--member", "you@example.org"]
    run_flask(*command, input=content_of(f"odd{ending}"))
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
        "no", "on", "Yes", "y", "OFF", "12:30", "2024-01-01", "0o8", "=", "<<",
        "2024-01-01T00:00:00Z", "+", ".", "0x", "nUll", "tRUE", "1e", "é 🙂",
    ],
)  # fmt: skip
def test_name_without_quotes_is_text(import_file, dump, name):
    """Names are read by YAML 1.2's core schema, where no, 12:30 and dates are text."""
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
                "1_000",
                "0b1",
            )
        ],
        ("[a]", "Not a valid string."),
        ('"a\\0b"', "Must not contain NUL."),
    ],
)
def test_name_that_is_no_text_is_rejected(import_file, dump, name, message):
    result = import_file(yaml_of(name))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"{ERRORS}workflows[0].steps[0].name: {message}\n"
    assert dump()["Project"] == {}


ODD = "a\u2028b\u2029c\x85d\ufeffe\x7f\x1b\uffff🙂"


@sqlite_only
@pytest.mark.parametrize(
    ("expression", "body"),
    [
        ("|\n          a\n\n            b\n", "a\n\n  b\n"),
        ("|-\n          a\n", "a"),
        ("|+\n          a\n\n\n", "a\n\n\n"),
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
    ids=range(14),
)  # fmt: skip
def test_body_is_read_as_openfn_reads_it(import_file, dump, expression, body):
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
    assert "1 job deleted" in import_file(project).stdout
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
        (["workflows", 0, "steps", 1, "name"], "x" * 256,
         f"{STEP}.name: Longer than maximum length 255."),
        (["workflows", 0, "steps", 1, "adaptor"], None,
         f"{STEP}.adaptor: Field may not be null."),
    ],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_error_has_its_location_in_the_file(
    import_file, project, dump, path, value, line
):
    """The database stays as it was."""
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
    assert result.stderr == f"{ERRORS}{line}\n"
    assert dump() == before


@sqlite_only
def test_key_that_a_project_file_lacks_is_cleared(import_file, project, job, dump):
    """OpenFn writes no key whose value is null; adaptors and times are not cleared."""
    import_file(project)
    before = dump()
    project["options"] = {
        "allow_support_access": True,
        "scheduled_deletion": "2030-01-01T00:00:00Z",
    }
    flow = project["workflows"][0]["openfn"]
    flow["deleted_at"] = "2024-01-01T00:00:00Z"
    assert "1 project updated, 1 workflow updated" in import_file(project).stdout
    del project["options"], flow["deleted_at"]
    assert "1 project updated, 1 workflow updated" in import_file(project).stdout
    assert dump() == before
    job["openfn"]["updated_at"] = job["openfn"]["inserted_at"] = "2024-01-01T00:00:00Z"
    job["adaptor"] = "@openfn/language-http@7.2.3"
    assert "1 job updated" in import_file(project).stdout
    before = dump()
    job["openfn"]["updated_at"] = None
    del job["openfn"]["inserted_at"], job["adaptor"]
    assert "1 job unchanged" in import_file(project).stdout
    assert dump() == before


@sqlite_only
@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": "5.0"},
        {"schema_version": None},
        {"schema_version": None, "cli": {"version": 2}},
        {"schema_version": None, "version": 2},
    ],
)
def test_other_version_of_a_project_file_is_rejected(import_file, project, change):
    result = import_file(project | change)
    assert (result.exit_code, result.stderr) == (1, UNKNOWN_FORM)


def test_id_of_another_project_is_rejected(import_file, project, dump):
    import_file(project)
    before = dump()
    project["openfn"]["uuid"] = OTHER
    result = import_file(project)
    assert (result.exit_code, result.stderr) == (
        1,
        f"{ERRORS}workflows[0].openfn.uuid: Belongs to another project.\n"
        f"{STEP}.openfn.uuid: Belongs to another project.\n",
    )
    assert dump() == before


@sqlite_only
def test_step_that_appears_twice_is_rejected(import_file, project, job):
    project["workflows"][0]["steps"].append(copy.deepcopy(job))
    result = import_file(project)
    assert result.stderr == (
        f"{ERRORS}workflows[0].steps[2].openfn.uuid: Duplicate of {STEP}.openfn.uuid.\n"
    )


@sqlite_only
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a: b: c", "line 1, column 5: mapping values are not allowed in this context"),
        ("a: 1\nb: 'c", "line 2, column 4: unclosed quote"),
        ("a: 1\nb: 2\na: 3", "duplicate mapping key: 'a'"),
        ("x:\n  - {a: 1, 'a': 3}", "duplicate mapping key: 'a'"),
        ("a: *b", "line 1, column 4: while parsing node, found unknown anchor"),
        ("{{a: [b]}: c}", "unhashable type: 'list'"),
        ("a: !!python/object:os.system x", "Invalid tag: '!!python/object:os.system'"),
        ('{"a": "\\ud800"}', "found high surrogate without following low surrogate"),
        ("x: " + "[" * 100_000, "recursion limit exceeded"),
        ("x: " + "[" * 900 + "]" * 900, "recursion limit exceeded"),
        ("{'" + "k" * 1_000_000 + "': 1}", "did not find expected ',' or '}'"),
        ("!!int " + "k" * 1_000_000, "kkk…"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_is_no_yaml_is_rejected_in_one_line(import_file, content, problem):
    result = import_file(content)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(
        "Error: The file is neither YAML nor JSON in UTF-8: "
    )
    assert problem in result.stderr and result.stderr.count("\n") == 1
    assert len(result.stderr) < 250


@sqlite_only
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("- " * 100_000, "The file is nested too deep: 5,000 times '- '."),
        (
            b"a: \xff",
            "The file is neither YAML nor JSON in UTF-8: "
            "'utf-8' codec can't decode byte 0xff in position 3: invalid start byte.",
        ),
        (yaml_of() + "\0\n" + yaml_of(), "The file has a NUL character in line 18."),
    ],
    ids=range(3),
)
def test_file_that_the_parser_would_mangle_is_rejected(
    import_file, dump, content, line
):
    """The parser ignores what follows a NUL, and exits where it is nested too deep."""
    result = import_file(content)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {line}\n"
    assert dump()["Project"] == {}


@sqlite_only
@pytest.mark.parametrize(
    "content",
    [
        "",
        "# nothing",
        "<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>",
        "project:\n  uuid: x\nworkspace:\n  formats: {}",
        "name: a project\nworkflows:\n  flow:\n    name: Flow\n    jobs: {}",
        "id: flow\nname: Flow\nsteps: []",
        yaml_of() + "\n---\n" + yaml_of(),
    ],
    ids=["nothing", "comment", "page", "openfn.yaml", "spec", "workflow", "two"],
)
def test_file_of_another_form_is_rejected(import_file, dump, content):
    result = import_file(content)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", UNKNOWN_FORM)
    assert dump()["Project"] == {}


@sqlite_only
def test_tag_of_a_text_runs_nothing(import_file, dump, tmp_path):
    made = tmp_path / "made"
    content = yaml_of(name=f"!!python/object/apply:os.mkdir ['{made}']")
    assert import_file(content).exit_code == 1 and not made.exists()
    assert import_file(yaml_of(name="!!str 12")).exit_code == 0
    assert dump()["Job"][JOB]["name"] == "12"


@sqlite_only
def test_file_that_was_cut_within_a_line_is_rejected(import_file, dump):
    """YAML has no end mark, so that the rest would be imported as the whole project."""
    whole = (FILES / "plain.yaml").read_bytes()
    assert import_file(whole).exit_code == 0
    before = dump()
    for end in range(len(whole) - 1, len(whole) // 2, -97):
        if whole[:end].endswith((b"\n", b"}")):
            continue
        result = import_file(whole[:end])
        assert (result.exit_code, result.stdout) == (1, "")
    assert dump() == before


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
    """Return a call's result, and the peak of the bytes that Python allocated."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def laughs(item, depth):
    """Return nested lists, each of which has ten aliases of the one before."""
    lines = [f"a0: &a0 {item}"]
    lines += [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)
    ]
    return "\n".join(lines)


# Fifty workflows, each of which has the same thousand jobs.
SAME_JOBS = (
    "schema_version: '4.0'\njobs: &jobs\n"
    + "- {}\n" * 1000
    + "workflows:\n"
    + "- {steps: *jobs}\n" * 50
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
        SAME_JOBS + "- {steps: *jobs}\n" * 950,
        f"x: &x {'é' * 200_000}\nys:\n" + "- *x\n" * 20_000,
        f"x: &x {'é' * 200_000}\nys:\n" + "- *x\n" * 100,
    ],
    ids=["unread", "workflows", "version", "jobs", "more", "text", "less text"],
)
def test_billion_laughs_cost_little(import_file, content):
    result, peak = peak_of(lambda: import_file(content))
    assert isinstance(result.exception, SystemExit | None)
    assert peak < 100_000_000


@sqlite_only
def test_hundreds_of_errors_are_reported_and_the_rest_is_counted(
    import_file, new_state
):
    """A location is short, however long a key of the file is."""
    long = "k" * 1000
    state = new_state(jobs=0)
    flow = {"id": WORKFLOW, "name": "x", "jobs": [{} for _ in range(2000)]}
    state["workflows"] = {long: flow}
    result, peak = peak_of(lambda: import_file(state))
    title, *lines, last = result.stderr.splitlines(keepends=True)
    assert title == ERRORS
    assert len(lines) == 200 and last == "5800 more errors.\n"
    assert lines[0] == f"workflows.{'k' * 150}….jobs[0].id: {MISSING}\n"
    assert peak < 50_000_000
    flow["jobs"] = [{}] * 67
    assert import_file(state).stderr.endswith("\n1 more error.\n")


@pytest.fixture
def statements(app):
    """The statements that are sent to the database; one may insert many rows."""
    sent = []
    with app.app_context():
        event.listen(
            db.engine, "before_cursor_execute", lambda *event: sent.append(event[2])
        )
    return sent


def test_number_of_statements_does_not_grow_with_the_jobs(
    import_state, new_state, statements
):
    """The jobs are new, unchanged, changed, and at last deleted."""
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
