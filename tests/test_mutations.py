"""Damaged files: each is imported, or rejected whole without a traceback."""

import copy
import json
import os

import pytest
from conftest import ROOT, sqlite_only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# A hundred of each file by default; MUTATIONS=10000 for a long run.
EXAMPLES = int(os.environ.get("MUTATIONS", "100"))

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(
        ["\0", "\ud800", "x" * 256, "2024-01-01T00:00:00Z", "0001-01-01+23:00"]
    )
    | st.uuids().map(str),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text() | st.sampled_from(["id", "delete", "data", "jobs"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=5,
)


def containers(value):
    """Yield all objects and arrays in a value that are not empty."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


@st.composite
def mutations(draw, state):
    """Return a file with up to three changed values, and sometimes changed bytes."""
    state = copy.deepcopy(state)
    for _ in range(draw(st.integers(1, 3))):
        places = list(containers(state))
        if not places:
            break
        place = draw(st.sampled_from(places))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if draw(st.booleans()):
            place[key] = draw(values)
        else:
            del place[key]
    content = json.dumps(state).encode()
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(content)))
        content = content[:cut] + draw(st.binary(max_size=3)) + content[cut + 1 :]
    return content


@pytest.fixture(params=["state file", "project file in JSON", "project file in YAML"])
def file(request, new_state):
    """A file as Python values, and the beginning of its text."""
    if request.param == "state file":
        options = {"allow_support_access": False, "scheduled_deletion": None}
        return new_state(jobs=3, **options), b""
    project = ROOT / "tests/project_files/plain-project.json"
    # JSON is YAML, and is read as such behind a comment.
    start = b"# YAML\n" if request.param.endswith("YAML") else b""
    return json.loads(project.read_text()), start


@sqlite_only
def test_mutated_file_is_imported_or_rejected_whole(runner, dump, file):
    project, start = file
    command = ["import-project", "-", "--member", "you@example.org"]
    assert runner.invoke(args=command, input=json.dumps(project)).exit_code == 0
    before = dump()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(project))
    def check(content):
        nonlocal before
        result = runner.invoke(args=command, input=start + content)
        after = dump()
        if result.exit_code == 0:
            assert result.stdout.startswith("Imported project ")
            hint = "No user can read the project, because it is scheduled for deletion."
            assert result.stderr == "" or result.stderr.startswith(hint)
        else:
            assert (result.exit_code, result.stdout) == (1, "")
            assert isinstance(result.exception, SystemExit)
            first, *lines = result.stderr.splitlines()
            assert first.startswith("Error: ")
            assert all(": " in line for line in lines)
            assert after == before
        before = after

    check()
