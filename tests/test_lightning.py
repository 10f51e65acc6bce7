"""Lightning's database, read by a role that can only read the mapped columns."""

import os
import re
from uuid import uuid4

import psycopg
import pytest
from documents import DATABASES, block
from sqlalchemy import make_url
from sqlalchemy.exc import InternalError

from app import create_app
from database import db

# These are all columns that Lightning has in the tables that the service reads. The
# defaults of those that the service does not read are for these tests only.
SCHEMA = """
CREATE EXTENSION IF NOT EXISTS citext;
CREATE TABLE schema_migrations (version bigint PRIMARY KEY, inserted_at timestamp(0));
CREATE TABLE users (
    id uuid PRIMARY KEY, email citext NOT NULL UNIQUE, first_name varchar(255),
    last_name varchar(255), hashed_password varchar(255) NOT NULL DEFAULT 'x',
    role varchar(255) NOT NULL DEFAULT 'user', confirmed_at timestamp(0),
    disabled boolean DEFAULT false, support_user boolean DEFAULT false,
    mfa_enabled boolean DEFAULT false, scheduled_deletion timestamp(0),
    inserted_at timestamp(0) DEFAULT now(), updated_at timestamp(0) DEFAULT now()
);
CREATE TABLE user_tokens (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), token bytea NOT NULL,
    user_id uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    context varchar(255) NOT NULL, sent_to varchar(255), last_used_at timestamp,
    inserted_at timestamp(0) NOT NULL DEFAULT now(), UNIQUE (context, token)
);
CREATE TABLE projects (
    id uuid PRIMARY KEY, name varchar(255), description text,
    scheduled_deletion timestamp(0), requires_mfa boolean DEFAULT false,
    retention_policy varchar(255), allow_support_access boolean DEFAULT false,
    parent_id uuid, env varchar(255), color varchar(255),
    inserted_at timestamp(0) DEFAULT now(), updated_at timestamp(0) DEFAULT now()
);
CREATE TABLE project_users (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), user_id uuid REFERENCES users,
    project_id uuid REFERENCES projects, role varchar(255) NOT NULL DEFAULT 'editor',
    failure_alert boolean DEFAULT true, digest varchar(255),
    inserted_at timestamp(0) DEFAULT now(), updated_at timestamp(0) DEFAULT now(),
    UNIQUE (project_id, user_id)
);
CREATE TABLE workflows (
    id uuid PRIMARY KEY, name varchar(255), deleted_at timestamp(0),
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    concurrency integer, enable_job_logs boolean, positions jsonb,
    version_history varchar[] NOT NULL DEFAULT '{}', lock_version integer DEFAULT 0,
    inserted_at timestamp(0) DEFAULT now(), updated_at timestamp(0) DEFAULT now(),
    UNIQUE (name, project_id)
);
CREATE TABLE jobs (
    id uuid PRIMARY KEY, name varchar(255), body text, adaptor varchar(255),
    workflow_id uuid NOT NULL REFERENCES workflows ON DELETE CASCADE,
    project_credential_id uuid, keychain_credential_id uuid,
    inserted_at timestamp NOT NULL DEFAULT now(), updated_at timestamp DEFAULT now()
);
"""

# Project 1 is the member's, 2 is open to support users, 3 is scheduled for deletion,
# and the workflow 4 of project 1 is deleted. Each workflow has a job of its number.
DATA = """
INSERT INTO users (id, email, disabled, support_user) VALUES
    ({}1, 'Member@example.org', NULL, NULL), ({}2, 'Support@example.org', false, true),
    ({}3, 'Disabled@example.org', true, true);
INSERT INTO projects (id, name, scheduled_deletion, allow_support_access) VALUES
    ({}1, NULL, NULL, NULL), ({}2, 'Open', NULL, true), ({}3, 'x', '2999-01-01', true);
INSERT INTO project_users (user_id, project_id) VALUES ({}1, {}1), ({}1, {}3);
INSERT INTO workflows (id, project_id, deleted_at) VALUES
    ({}1, {}1, NULL), ({}2, {}2, NULL), ({}3, {}3, NULL), ({}4, {}1, now());
INSERT INTO jobs (id, workflow_id) SELECT id, id FROM workflows;
INSERT INTO user_tokens (user_id, context, token)
SELECT id, context, convert_to(lower(split_part(email, '@', 1)) || context, 'UTF8')
FROM users, unnest(ARRAY['api', 'session', 'auth', 'api:sha256']) AS context;
"""
ID = "00000000-0000-0000-0000-00000000000"
TABLES = ["users", "user_tokens", "projects", "project_users", "workflows", "jobs"]


@pytest.fixture(scope="module")
def lightning(postgresql_server):
    """A connection to Lightning's database as the owner of its tables, and its URL."""
    name = f"jobs_test_{uuid4().hex[:12]}"
    url = make_url(os.environ["TEST_DATABASE_URL"]).set(database=name)
    owner_url = url.render_as_string(hide_password=False)
    postgresql_server.execute(f"CREATE DATABASE {name}")
    with psycopg.connect(owner_url, autocommit=True) as owner:
        owner.execute(SCHEMA)
        owner.execute(re.sub(r"{}(\d)", rf"'{ID}\1'", DATA))
        yield owner, owner_url
    postgresql_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def reader_url(lightning):
    """The database's URL for the role that docs/databases.md describes."""
    owner, owner_url = lightning
    role = make_url(owner_url).database.replace("jobs_test", "reader")
    statements = block(DATABASES, "sql", "GRANT").replace("jobs_api", role)
    owner.execute(statements.replace("'…'", "'reader'"))
    url = make_url(owner_url).set(username=role, password="reader")
    yield url.render_as_string(hide_password=False)
    owner.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.fixture
def reader(reader_url):
    """The service, connected as the role that can only read."""
    app = create_app({"DATABASE_URL": reader_url})
    yield app
    with app.app_context():
        db.engine.dispose()


@pytest.fixture
def get(reader):
    """A function that sends a request with a token that Lightning created."""
    client = reader.test_client()
    return lambda path, token: client.get(
        path, headers={"Authorization": f"Bearer {token}"}
    )


@pytest.mark.parametrize(
    ("user", "statuses"),
    [
        ("member", [200, 403, 403, 404]),
        ("support", [403, 200, 403, 404]),
        ("disabled", [401, 401, 401, 401]),
    ],
)
def test_access_follows_the_rules_of_lightning(get, user, statuses):
    job_ids = [f"{ID}{number}" for number in range(1, 5)]
    for job_id, status in zip(job_ids, statuses, strict=True):
        assert get(f"/api/jobs/{job_id}", f"{user}api").status_code == status
    listed = get("/api/jobs", f"{user}api").json.get("data", [])
    allowed = [job_ids[n] for n, status in enumerate(statuses) if status == 200]
    assert [job["id"] for job in listed] == allowed
    for context in ("session", "auth", "api:sha256"):
        assert get("/api/jobs", f"{user}{context}").status_code == 401


def test_nothing_is_written(lightning, get):
    """Requests change no row, not even ``last_used_at``, and sessions cannot write."""
    owner, owner_url = lightning

    def contents():
        return [owner.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES]

    before = contents()
    app = create_app({"DATABASE_URL": owner_url})
    for path in ("/api/jobs", f"/api/jobs/{ID}1", "/health_check"):
        headers = {"Authorization": "Bearer memberapi"}
        assert app.test_client().get(path, headers=headers).status_code == 200
    assert contents() == before
    with app.app_context(), db.engine.connect() as connection:
        with pytest.raises(InternalError, match="read-only transaction"):
            connection.exec_driver_sql("DELETE FROM jobs")
        connection.close()
        db.engine.dispose()
