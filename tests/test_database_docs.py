"""The statements, commands and figures in docs/databases.md."""

import re
import string
import subprocess
import sys
from contextlib import contextmanager
from uuid import uuid4

import pytest
from conftest import ROOT, RUN_ID, SERVER, postgresql_only, run_command, sqlite_only
from sqlalchemy import make_url
from test_lightning import GRANTS
from test_readme import block

from app import create_app
from database import READ_TIMEOUT_SECONDS, db

DATABASES = (ROOT / "docs/databases.md").read_text()


def test_grants_are_those_that_are_tested():
    """The name of the role and line breaks are ignored."""
    sql = block(DATABASES, "sql", "GRANT")
    granted = GRANTS.format(role="jobs_api").split()
    assert sql.split("'…';")[1].split() == granted


@contextmanager
def new_role(server):
    """Run the statements for a new database, with another name and password."""
    name, password = f"{RUN_ID}_{uuid4().hex[:8]}", string.punctuation
    statements = block(DATABASES, "sql", "CREATE DATABASE")
    statements = statements.replace("jobs", name)
    quoted = password.replace("'", "''")
    statements = statements.replace("'password'", f"'{quoted}'")
    try:
        for statement in statements.splitlines():
            server.execute(statement)
        yield name, password
    finally:
        server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        server.execute(f"DROP ROLE IF EXISTS {name}")


def test_new_role_can_create_the_tables(postgresql_server):
    """Its password has every character that must be encoded."""
    command = block(DATABASES, "sh", "quote").replace("python3", sys.executable)
    with new_role(postgresql_server) as (name, password):
        encoded = subprocess.check_output(
            ["bash", "-c", command], input=f"{password}\n", text=True
        ).strip()
        host = make_url(SERVER).host
        port = make_url(SERVER).port or 5432
        url = f"postgresql://{name}:{encoded}@{host}:{port}/{name}"
        app = create_app({"DATABASE_URL": url})
        assert app.config["DATABASE_URL"].password == password
        run_command(app, "init-db")
        assert app.test_client().get("/health_check").status_code == 200
        with app.app_context():
            db.engine.dispose()


def test_characters_to_encode_are_named():
    """Those are the ones that end a password in a URL, or begin an escape."""
    [named] = re.findall(r"password, the characters `(.*)` and spaces", DATABASES)
    for character in string.punctuation:
        is_safe = False
        try:
            url = make_url(f"postgresql://jobs:a{character}41b@host/jobs")
            is_safe = (url.password, url.host) == (f"a{character}41b", "host")
        except ValueError:
            pass
        assert is_safe or character in named.split()


@postgresql_only
def test_role_of_pgbouncer_has_the_settings_of_a_session(app, execute, database_url):
    """The statements set for a role what the service sets for its connections."""
    statements = block(DATABASES, "sql", "ALTER ROLE")
    settings = re.findall(r"SET (\w+) = '?(\w+)'?;", statements)
    assert len(settings) == len(statements.splitlines())
    with app.app_context(), db.engine.connect() as connection:
        for name, value in settings:
            assert connection.exec_driver_sql(f"SHOW {name}").scalar() == value


def rows():
    """Return what the table of limits has: the value of each limit, and its setting."""
    table = DATABASES.split("## Limits and timeouts")[1]
    cells = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| .* \|$", table, re.MULTILINE)
    return [(what, value, setting) for what, value, setting in cells if what != "what"]


def number(value):
    """Return the number that a cell of the table begins with."""
    return float(re.match(r"[\d.]+", value)[0])


def test_limits_of_gunicorn_are_those_of_the_table():
    output = subprocess.check_output(
        [sys.executable, "-m", "gunicorn", "--print-config", "wsgi:app"],
        cwd=ROOT,
        env={},
        text=True,
    )
    config = dict(re.findall(r"^(\w+) += (.*)$", output, re.MULTILINE))
    options = {
        "--backlog": "backlog",
        "--graceful-timeout": "graceful_timeout",
        "--keep-alive": "keepalive",
        "--limit-request-field_size": "limit_request_field_size",
        "--limit-request-fields": "limit_request_fields",
        "--limit-request-line": "limit_request_line",
        "--timeout": "timeout",
    }
    found = {
        setting.strip("`"): number(value)
        for _, value, setting in rows()
        if setting.startswith("`--")
    }
    assert found == {option: float(config[options[option]]) for option in options}


@pytest.mark.parametrize(
    ("database_url", "names"),
    [
        ("sqlite", {"timeout"}),
        ("postgresql", {"connect_timeout", "keepalives_idle", "tcp_user_timeout"}),
    ],
    indirect=["database_url"],
)
def test_defaults_of_the_url_are_those_of_the_table(app, names):
    found = {
        match[1]: number(value)
        for _, value, setting in rows()
        if (match := re.fullmatch(r"`\?(\w+)=`", setting)) and match[1] in names
    }
    with app.app_context():
        query = db.engine.url.query
    assert found == {name: float(query[name]) for name in names}


@postgresql_only
def test_other_limits_are_those_of_the_table(app, client):
    values = {what: value for what, value, _ in rows()}
    with app.app_context():
        pool = db.engine.pool
    assert number(values["PostgreSQL: connections per worker"]) == pool.size()
    wait = values["PostgreSQL: wait for a free connection"]
    assert number(wait) == pool.timeout()
    read = values["time to read the database, per request"]
    assert number(read) == READ_TIMEOUT_SECONDS
    assert number(values["jobs per page"]) == app.config["MAX_PAGE_SIZE"]


@postgresql_only
def test_statement_timeout_can_be_changed_as_the_table_says(make_app, database_url):
    [(value, setting)] = [
        (value, setting)
        for what, value, setting in rows()
        if "statement_timeout" in setting
    ]
    for url, expected in (
        (database_url, value.replace(" ", "")),
        (database_url + setting.strip("`"), "8s"),
    ):
        app = make_app(DATABASE_URL=url)
        with app.app_context(), db.engine.connect() as connection:
            shown = connection.exec_driver_sql("SHOW statement_timeout").scalar()
        assert shown == expected


@sqlite_only
def test_retry_after_is_that_of_the_table(app_without_tables):
    response = app_without_tables.test_client().get("/health_check")
    assert f"`Retry-After: {response.headers['Retry-After']}`" in DATABASES
