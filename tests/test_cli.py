"""The commands: what they print on which stream, and how they fail."""

import re

import pytest

UNKNOWN_ID = "00000000-0000-0000-0000-000000000000"
UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
SEE_MEMBERS = "See: flask list-members PROJECT_ID"
SEE_PROJECTS = "See: flask list-projects"
SEE_TOKENS = "See: flask list-tokens"

# Every command that writes, except import-project.
WRITING = [
    ["init-db"],
    ["demo"],
    ["create-token", "you@example.org"],
    ["revoke-token", UNKNOWN_ID],
    ["set-member", UNKNOWN_ID, "you@example.org"],
    ["delete-project", UNKNOWN_ID],
    ["delete-user", "you@example.org"],
]


def test_init_db_prints_the_tables_that_it_creates(run_flask, execute):
    execute("DROP TABLE project_users")
    assert run_flask("init-db") == "Created the tables project_users.\n"
    assert run_flask("init-db") == "No table was missing.\n"


@pytest.mark.sqlite
def test_create_token_prints_only_the_token_on_stdout(app, client, seed):
    result = app.test_cli_runner().invoke(args=["create-token", "You@Example.org"])
    assert result.exit_code == 0
    assert re.fullmatch(r"[\w-]{43}\n", result.stdout)
    assert re.fullmatch(f"Token id, for flask revoke-token: {UUID}\n", result.stderr)
    headers = {"Authorization": f"Bearer {result.stdout.strip()}"}
    assert client.get(seed.paths[-1], headers=headers).status_code == 200


def test_list_tokens_prints_one_line_per_api_token(
    make_app, seed, run_flask, auth_header, execute
):
    """The oldest comes first, and tokens with other contexts are left out."""
    execute("UPDATE user_tokens SET context = 'api'")
    auth_header("they@example.org")
    sql = "UPDATE user_tokens SET inserted_at = '2024-01-01 00:00:00.500000'"
    execute(f"{sql} WHERE context = 'api:sha256'")
    old, new = run_flask("list-tokens").splitlines()
    line = f"{UUID}  they@example.org  api:sha256  2024-01-01T00:00:00Z"
    assert re.fullmatch(line, old)
    assert re.fullmatch(f"{UUID}  you@example.org  api  20[0-9T:-]{{17}}Z", new)
    assert run_flask("list-tokens", "You@example.org") == f"{new}\n"
    runner = make_app(TOKEN_MAX_AGE_DAYS=7).test_cli_runner()
    assert runner.invoke(args=["list-tokens"]).stdout == f"{old}  expired\n{new}\n"
    execute("UPDATE user_tokens SET context = 'session' WHERE context = 'api'")
    assert run_flask("list-tokens") == f"{old}\n"


def test_projects_and_members_are_listed(run_flask, import_state, new_state):
    """The number of jobs is that of the lists of the API."""
    closed = new_state(jobs=1, name="A", scheduled_deletion="2030-01-02T00:00:00Z")
    usual = new_state(jobs=3, name="B")
    usual["workflows"][0]["deleted_at"] = "2024-01-01T00:00:00Z"
    import_state(usual, "you@example.org:owner", "they@example.org")
    import_state(closed)
    assert run_flask("list-projects").splitlines() == [
        f"{closed['id']}  A  readable jobs: 0  scheduled for deletion on 2030-01-02",
        f"{usual['id']}  B  readable jobs: 1",
    ]
    members = "they@example.org  viewer\nyou@example.org  owner\n"
    assert run_flask("list-members", usual["id"].upper()) == members
    assert run_flask("list-members", closed["id"]) == ""


@pytest.mark.sqlite
def test_set_member_prints_what_it_changed(run_flask, fail_flask, seed):
    for member, change, listed in (
        ("New@example.org", "created", "new@example.org  viewer\n"),
        ("new@example.org", "unchanged", "new@example.org  viewer\n"),
        ("new@example.org:owner", "updated", "new@example.org  owner\n"),
        ("new@example.org:none", "removed", ""),
    ):
        line = f"Project {seed.project_id}: member {member} {change}.\n"
        assert run_flask("set-member", seed.project_id, member) == line
        members = run_flask("list-members", seed.project_id)
        assert members == f"{listed}you@example.org  viewer\n"
    hint = f"See: flask list-members {seed.project_id}"
    for email in ("new@example.org", "they@example.org", "nobody@x"):
        error = fail_flask("set-member", seed.project_id, f"{email}:none")
        assert error == [f"{email} is no member. {hint}"]


@pytest.mark.sqlite
def test_malformed_member_is_an_error_with_the_form(fail_flask, seed):
    roles = "owner, admin, editor, viewer, none"
    for member in ("you", "", ":owner", "you@example.org:boss"):
        error = f"{member} is neither EMAIL nor EMAIL:ROLE. ROLE is one of {roles}."
        assert fail_flask("set-member", seed.project_id, member) == [error]


def test_what_has_been_deleted_is_unknown(run_flask, fail_flask, seed, dump):
    [token_id] = dump()["user_tokens"]
    for command, name, kind, remedy in (
        ("revoke-token", token_id.upper(), "token", SEE_TOKENS),
        ("delete-user", "You@example.org", "user", SEE_MEMBERS),
        ("delete-project", seed.project_id.upper(), "project", SEE_PROJECTS),
    ):
        verb = "Revoked" if kind == "token" else "Deleted"
        assert run_flask(command, name) == f"{verb} {kind} {name}.\n"
        assert fail_flask(command, name) == [f"There is no {kind} {name}. {remedy}"]


@pytest.mark.sqlite
def test_unknown_name_is_an_error_with_a_remedy(fail_flask):
    add_user = "Add one with: flask set-member PROJECT_ID n@x"
    for command, error in (
        ("create-token n@x", f"user n@x. {add_user}"),
        ("list-tokens n@x", f"user n@x. {SEE_MEMBERS}"),
        ("revoke-token x", f"token x. {SEE_TOKENS}"),
        (f"list-members {UNKNOWN_ID}", f"project {UNKNOWN_ID}. {SEE_PROJECTS}"),
        ("set-member x you@example.org", f"project x. {SEE_PROJECTS}"),
    ):
        assert fail_flask(*command.split()) == [f"There is no {error}"]


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("sqlite:///{}/new.db", "(run `flask init-db` to create the tables)"),
        ("sqlite:///{}/no/jobs.db", "/no/jobs.db: unable to open database file"),
        ("postgresql://u:s3cret@127.0.0.1:1/x", "u:***@127.0.0.1:1/x: connection fail"),
    ],
)
def test_error_of_the_database_is_one_line(make_app, tmp_path, url, error):
    runner = make_app(DATABASE_URL=url.format(tmp_path)).test_cli_runner()
    for args in (*WRITING[2:], ["list-tokens"], ["list-projects"]):
        result = runner.invoke(args=args)
        assert (result.exit_code, result.stdout) == (1, "")
        [line] = result.stderr.splitlines()
        assert line.startswith("Error: ") and error in line


@pytest.mark.sqlite
def test_writing_commands_reject_a_lightning_database(
    run_flask, fail_flask, seed, execute, dump
):
    execute("CREATE TABLE schema_migrations (version bigint)")
    before = dump()
    for args in WRITING:
        [line] = fail_flask(*args)
        assert "belongs to Lightning" in line and "schema_migrations" in line
    assert dump() == before
    assert run_flask("list-members", seed.project_id) == "you@example.org  viewer\n"


@pytest.mark.sqlite
def test_demo_prints_a_token_a_request_and_a_page(make_app, tmp_path):
    """It creates the tables that are missing, and prints another token each time."""
    app = make_app(DATABASE_URL=f"sqlite:///{tmp_path}/new.db", PORT=8123)
    url = "http://127.0.0.1:8123/api"
    for _ in range(2):
        first, *others = app.test_cli_runner().invoke(args=["demo"]).stdout.splitlines()
        value = first.replace("Token:", "Bearer")
        request = f"curl -sS -H 'Authorization: {value}' '{url}/jobs?page_size=1'"
        assert others == [request, f"Docs: {url}/docs"]
        headers = {"Authorization": value}
        page = app.test_client().get("/api/jobs", headers=headers).json
        assert page["meta"]["total_entries"] == 3


@pytest.mark.sqlite
def test_demo_changes_nothing_beside_other_projects(run_flask, seed, dump):
    before = dump()
    assert run_flask("demo").splitlines() == [
        "No sample was imported, because there are other projects.",
        "Create a token with: flask create-token EMAIL",
    ]
    assert dump() == before
