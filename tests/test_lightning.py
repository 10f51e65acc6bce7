"""A Lightning database, read by a role that can only SELECT the mapped columns."""

import pytest
from conftest import ROOT
from sqlalchemy import make_url

from database import db

# These are all columns that Lightning has in the tables that the service reads.
SCHEMA = """
CREATE EXTENSION IF NOT EXISTS citext;
CREATE TABLE schema_migrations (
    version bigint PRIMARY KEY, inserted_at timestamp(0)
);
CREATE TABLE users (
    id uuid PRIMARY KEY, email citext NOT NULL UNIQUE,
    first_name varchar(255), last_name varchar(255),
    hashed_password varchar(255) NOT NULL, role varchar(255) NOT NULL,
    confirmed_at timestamp(0), disabled boolean DEFAULT false,
    support_user boolean DEFAULT false, mfa_enabled boolean DEFAULT false,
    scheduled_deletion timestamp(0),
    inserted_at timestamp(0) NOT NULL, updated_at timestamp(0) NOT NULL
);
CREATE TABLE user_tokens (
    id uuid PRIMARY KEY, user_id uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    token bytea NOT NULL, context varchar(255) NOT NULL, sent_to varchar(255),
    last_used_at timestamp, inserted_at timestamp(0) NOT NULL
);
CREATE UNIQUE INDEX ON user_tokens (context, token);
CREATE INDEX ON user_tokens (user_id);
CREATE TABLE projects (
    id uuid PRIMARY KEY, name varchar(255), description text,
    scheduled_deletion timestamp(0), requires_mfa boolean DEFAULT false,
    retention_policy varchar(255), allow_support_access boolean DEFAULT false,
    parent_id uuid, env varchar(255), color varchar(255),
    inserted_at timestamp(0) NOT NULL, updated_at timestamp(0) NOT NULL
);
CREATE TABLE project_users (
    id uuid PRIMARY KEY, user_id uuid REFERENCES users,
    project_id uuid REFERENCES projects,
    role varchar(255) NOT NULL DEFAULT 'editor', failure_alert boolean DEFAULT true,
    digest varchar(255),
    inserted_at timestamp(0) NOT NULL, updated_at timestamp(0) NOT NULL
);
CREATE UNIQUE INDEX ON project_users (project_id, user_id);
CREATE INDEX ON project_users (user_id);
CREATE INDEX ON project_users (project_id);
CREATE TABLE workflows (
    id uuid PRIMARY KEY, name varchar(255),
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    deleted_at timestamp(0), concurrency integer, enable_job_logs boolean,
    positions jsonb, version_history varchar[] NOT NULL DEFAULT '{}',
    lock_version integer DEFAULT 0,
    inserted_at timestamp(0) NOT NULL, updated_at timestamp(0) NOT NULL
);
CREATE UNIQUE INDEX ON workflows (name, project_id);
CREATE TABLE jobs (
    id uuid PRIMARY KEY, name varchar(255), body text, adaptor varchar(255),
    workflow_id uuid NOT NULL REFERENCES workflows ON DELETE CASCADE,
    project_credential_id uuid, keychain_credential_id uuid,
    inserted_at timestamp NOT NULL, updated_at timestamp NOT NULL
);
CREATE INDEX ON jobs (workflow_id);
CREATE UNIQUE INDEX ON jobs (lower(replace(name, '-', ' ')), workflow_id);
"""

# An operator grants these permissions, as the documentation says.
GRANTS = """
GRANT USAGE ON SCHEMA public TO {role};
GRANT SELECT (id, email, disabled, support_user) ON users TO {role};
GRANT SELECT (id, user_id, token, context, inserted_at) ON user_tokens TO {role};
GRANT SELECT (id, name, scheduled_deletion, allow_support_access)
    ON projects TO {role};
GRANT SELECT (id, user_id, project_id, role) ON project_users TO {role};
GRANT SELECT (id, name, project_id, deleted_at) ON workflows TO {role};
GRANT SELECT (id, name, body, adaptor, workflow_id, inserted_at, updated_at)
    ON jobs TO {role};
"""

# The last digit of an id is its table: 1 users, 2 projects, 3 workflows, 4 jobs.
DATA = """
INSERT INTO users (id, email, hashed_password, role, disabled, support_user,
                   inserted_at, updated_at)
SELECT id::uuid, name || '@example.org', 'x', 'user', disabled, support, now(), now()
FROM (VALUES
    ('00000000-0000-0000-0000-000000000001', 'Member', NULL, NULL),
    ('00000000-0000-0000-0000-000000000101', 'Support', false, true),
    ('00000000-0000-0000-0000-000000000201', 'Disabled', true, true)
) AS u (id, name, disabled, support);
INSERT INTO projects (id, name, scheduled_deletion, allow_support_access,
                      inserted_at, updated_at)
SELECT id::uuid, name, deletion::timestamp, support, now(), now()
FROM (VALUES
    ('00000000-0000-0000-0000-000000000002', NULL, NULL, NULL),
    ('00000000-0000-0000-0000-000000000102', 'Open', NULL, true),
    ('00000000-0000-0000-0000-000000000202', 'Going', '2999-01-01', true)
) AS p (id, name, deletion, support);
INSERT INTO project_users (id, user_id, project_id, role, inserted_at, updated_at)
SELECT gen_random_uuid(), users.id, projects.id, 'viewer', now(), now()
FROM users, projects
WHERE users.email = 'member@EXAMPLE.org' AND projects.name IS DISTINCT FROM 'Open';
INSERT INTO workflows (id, name, project_id, deleted_at, inserted_at, updated_at)
SELECT (left(id::text, 33) || substr(id::text, 34, 2) || '3')::uuid, NULL, id, NULL,
       now(), now() FROM projects;
INSERT INTO workflows (id, project_id, deleted_at, inserted_at, updated_at)
VALUES ('00000000-0000-0000-0000-000000000903',
        '00000000-0000-0000-0000-000000000002', now(), now(), now());
INSERT INTO jobs (id, name, body, adaptor, workflow_id, inserted_at, updated_at)
SELECT (left(id::text, 35) || '4')::uuid, NULL, NULL, NULL, id,
       '2024-03-29 08:37:53.123456', '2024-03-29 08:37:53.1' FROM workflows;
"""

JOB, OPEN_JOB, GOING_JOB, DELETED_JOB = (
    f"00000000-0000-0000-0000-000000000{n}04" for n in (0, 1, 2, 9)
)


@pytest.fixture
def admin(execute, empty_schema):
    """A function that runs statements as the owner of Lightning's tables."""
    execute(SCHEMA)
    execute(DATA)
    for email in ("member", "support", "disabled"):
        for context in ("api", "session", "auth", "api:sha256"):
            execute(
                "INSERT INTO user_tokens (id, user_id, token, context, inserted_at)"
                " SELECT gen_random_uuid(), id, %s, %s, now()"
                " FROM users WHERE email = %s",
                (f"{email}.{context}".encode(), context, f"{email}@example.org"),
            )
    return execute


@pytest.fixture
def reader_url(admin, postgresql_url):
    """The database's URL for a role that can only read the mapped columns."""
    role = f"reader_{make_url(postgresql_url).database}"
    admin(f"CREATE ROLE {role} LOGIN PASSWORD 'reader'")
    try:
        admin(GRANTS.format(role=role))
        url = make_url(postgresql_url).set(username=role, password="reader")
        yield url.render_as_string(hide_password=False)
    finally:
        admin(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.fixture
def database_url(admin, postgresql_url):
    """The database's URL for the role that owns the tables."""
    return postgresql_url


@pytest.fixture
def app(reader_url, make_app):
    """The service, connected as the role that can only read."""
    return make_app(DATABASE_URL=reader_url)


@pytest.fixture
def get(app):
    """A function that sends a request with a token that Lightning created."""
    client = app.test_client()
    return lambda path, token: client.get(
        path, headers={"Authorization": f"Bearer {token}"}
    )


@pytest.mark.parametrize(
    ("user", "statuses"),
    [
        ("member", {JOB: 200, OPEN_JOB: 403, GOING_JOB: 403, DELETED_JOB: 404}),
        ("support", {JOB: 403, OPEN_JOB: 200, GOING_JOB: 403, DELETED_JOB: 404}),
        ("disabled", {JOB: 401, OPEN_JOB: 401, GOING_JOB: 401, DELETED_JOB: 401}),
    ],
)
def test_access_follows_the_rules_of_lightning(get, user, statuses):
    for job_id, status in statuses.items():
        assert get(f"/api/jobs/{job_id}", f"{user}.api").status_code == status
    listed = get("/api/jobs", f"{user}.api")
    allowed = [job_id for job_id, status in statuses.items() if status == 200]
    assert [job["id"] for job in listed.json.get("data", [])] == allowed


def test_nulls_and_microseconds_are_returned_unchanged(get):
    document = get(f"/api/jobs/{JOB}", "member.api").json
    assert document["data"]["attributes"] == {
        "name": None,
        "adaptor": None,
        "body": None,
        "inserted_at": "2024-03-29T08:37:53.123456Z",
        "updated_at": "2024-03-29T08:37:53.100000Z",
    }
    names = [resource["attributes"] for resource in document["included"]]
    assert names == [{"name": None}] * 2


@pytest.mark.parametrize("context", ["session", "auth", "api:sha256"])
def test_token_of_another_context_is_rejected(get, context):
    assert get("/api/jobs", f"member.{context}").status_code == 401


def test_nothing_is_written(admin, make_app):
    """Requests change no row, not even ``last_used_at``, as the owner of the tables."""
    tables = ["users", "user_tokens", "projects", "project_users", "workflows", "jobs"]

    def contents():
        return [admin(f"SELECT * FROM {table}").fetchall() for table in tables]

    before = contents()
    client = make_app().test_client()
    for path in ("/api/jobs", f"/api/jobs/{JOB}", "/health_check"):
        headers = {"Authorization": "Bearer member.api"}
        assert client.get(path, headers=headers).status_code == 200
    assert contents() == before


def test_connection_of_the_service_cannot_write(app):
    with app.app_context(), db.engine.connect() as connection:
        values = [
            connection.exec_driver_sql(f"SHOW {name}").scalar()
            for name in ("transaction_read_only", "statement_timeout")
        ]
    assert values == ["on", "5s"]


def test_statements_stay_prepared(get, app):
    """Requests share one prepared statement; planning takes longer than running it."""
    for _ in range(2):
        assert get("/api/jobs", "member.api").status_code == 200
    with app.app_context(), db.engine.connect() as connection:
        prepared = connection.exec_driver_sql(
            "SELECT statement FROM pg_prepared_statements"
        ).scalars()
        assert sum("FROM user_tokens" in statement for statement in prepared) == 1


def test_changed_type_of_a_column_fails_one_request(get, admin):
    """Only the first request of a connection fails, on its old prepared statement."""
    assert get("/api/jobs", "member.api").status_code == 200
    admin("ALTER TABLE jobs ALTER COLUMN name TYPE text")
    statuses = [get("/api/jobs", "member.api").status_code for _ in range(3)]
    assert statuses == [503, 200, 200]


@pytest.mark.parametrize(
    "args",
    [
        ["init-db"],
        ["demo"],
        ["create-token", "member@example.org"],
        ["import-project", str(ROOT / "demo.json")],
    ],
)
def test_write_commands_reject_the_database(make_app, args):
    """A command that writes is an error, even as the owner of the tables."""
    result = make_app().test_cli_runner().invoke(args=args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "belongs to Lightning" in result.stderr


def test_list_tokens_prints_no_sessions(app):
    result = app.test_cli_runner().invoke(args=["list-tokens", "MEMBER@example.org"])
    lines = [line.split("  ") for line in result.stdout.splitlines()]
    assert {(line[1], line[2]) for line in lines} == {
        ("Member@example.org", "api"),
        ("Member@example.org", "api:sha256"),
    }
