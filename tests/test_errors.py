"""Which requests are rejected, with which message and which headers."""

import logging
from contextlib import ExitStack

import pytest
from conftest import sqlite_only
from flask import abort
from werkzeug.exceptions import default_exceptions
from werkzeug.http import HTTP_STATUS_CODES

from database import db


@pytest.fixture
def rename_column(app):
    """A function that renames a column of a table, which no command does."""

    def rename(table, old, new):
        with app.app_context(), db.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET default_transaction_read_only = off")
            connection.exec_driver_sql(f"ALTER TABLE {table} RENAME {old} TO {new}")
            connection.invalidate()

    return rename


def details(response):
    return {
        error.get("source", {}).get("parameter"): error["detail"]
        for error in response.json["errors"]
    }


@sqlite_only
@pytest.mark.parametrize("status", default_exceptions)
def test_every_error_is_json(app_without_tables, status):
    app_without_tables.add_url_rule("/boom", view_func=lambda: abort(status))
    response = app_without_tables.test_client().get("/boom")
    assert (response.status_code, response.mimetype) == (status, "application/json")
    assert response.json["error"] == HTTP_STATUS_CODES[status]
    assert response.json["errors"][0]["status"] == str(status)


@sqlite_only
def test_bug_is_reported_in_the_log_only(app_without_tables, caplog):
    app_without_tables.add_url_rule("/boom", view_func=lambda: 1 / 0)
    response = app_without_tables.test_client().get("/boom")
    assert (response.status_code, response.mimetype) == (500, "application/json")
    assert "ZeroDivision" not in response.text
    [record] = caplog.records
    assert record.exc_info[0] is ZeroDivisionError


@sqlite_only
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "PURGE"])
@pytest.mark.parametrize("path", ["/api/jobs", "/api/jobs/x", "/health_check"])
def test_other_methods_are_rejected_with_the_allowed_ones(client, method, path):
    response = client.open(path, method=method)
    assert (response.status_code, response.mimetype) == (405, "application/json")
    assert set(response.allow) == {"GET", "HEAD", "OPTIONS"}


@sqlite_only
def test_options_returns_the_allowed_methods(client):
    response = client.options("/api/jobs")
    assert (response.status_code, response.data) == (200, b"")
    assert set(response.allow) == {"GET", "HEAD", "OPTIONS"}


@sqlite_only
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api",
        "/api/",
        "/API/jobs",
        "//api/jobs",
        "/api//jobs",
        "/api/jobs//",
        "/api/docs//",
        "//health_check",
        "/health_check//",
        "/api/projects/x",
        "/api/jobs/x/y",
        "/static/x",
        "/%00",
        "/%ff",
    ],
)
def test_other_paths_are_not_found(client, path):
    response = client.get(f"http://localhost{path}")
    assert (response.status_code, response.mimetype) == (404, "application/json")
    assert "Location" not in response.headers


NUMBER = "{} must be a whole number between 1 and {}."
RANGE = "{} must be between 1 and {}."


@sqlite_only
@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ("", NUMBER),
        ("abc", NUMBER),
        ("1.5", NUMBER),
        ("-1", NUMBER),
        ("%2B1", NUMBER),
        ("+1", NUMBER),
        ("1_0", NUMBER),
        ("1e1", NUMBER),
        ("0x1", NUMBER),
        ("%D9%A1", NUMBER),
        ("%EF%BC%91", NUMBER),
        ("1%0A", NUMBER),
        ("1%00", NUMBER),
        ("%ff", NUMBER),
        ("0", RANGE),
        ("2147483648", RANGE),
        ("9" * 30, RANGE),
        ("9" * 5000, NUMBER),
    ],
)
@pytest.mark.parametrize(
    ("name", "maximum"), [("page", 2147483647), ("page_size", 100)]
)
def test_numbers_are_ascii_digits_within_limits(
    client, seed, value, detail, name, maximum
):
    response = client.get(f"/api/jobs?{name}={value}", headers=seed.auth_header)
    assert response.status_code == 400
    assert details(response) == {name: detail.format(name, maximum)}


BAD_IDS = [
    "x",
    "13bae4ca-cabc-4a1f-8603-3dbdba8835e",
    "13bae4ca-cabc-4a1f-8603-3dbdba8835e66",
    "13bae4cacabc4a1f86033dbdba8835e6",
    "{13bae4ca-cabc-4a1f-8603-3dbdba8835e6}",
    "urn:uuid:13bae4ca-cabc-4a1f-8603-3dbdba8835e6",
    "13bae4ca-cabc-4a1f-8603-3dbdba8835eg",
    "13bae4ca_cabc_4a1f_8603_3dbdba8835e6",
    "13bae4ca-cabc-4a1f-8603-3dbdba8835e%D9%A1",
    "13bae4ca-cabc-4a1f-8603-3dbdba8835e6%0A",
    "%2013bae4ca-cabc-4a1f-8603-3dbdba8835e6",
]


@sqlite_only
@pytest.mark.parametrize("bad_id", BAD_IDS)
def test_id_has_one_form(client, seed, bad_id):
    response = client.get(f"/api/jobs?project_id={bad_id}", headers=seed.auth_header)
    assert details(response) == {"project_id": "project_id must be a UUID."}
    for path in (
        f"/api/jobs/{bad_id}",
        f"/api/projects/{bad_id}/jobs",
        f"/api/projects/{bad_id}/jobs/{seed.job_ids[0]}",
        f"/api/projects/{seed.project_id}/jobs/{bad_id}",
    ):
        response = client.get(path, headers=seed.auth_header)
        assert response.status_code == 400, path
        [detail] = details(response).items()
        assert detail[0] is None and detail[1].endswith(" is not a UUID.")


@sqlite_only
def test_every_wrong_query_parameter_is_named(client, seed):
    query = "page=0&page_size=1&page_size=2&projectid=x&project_id=&%C3%A9=1"
    response = client.get(f"/api/jobs?{query}", headers=seed.auth_header)
    assert response.json["error"] == "Bad Request"
    assert details(response) == {
        "page": "page must be between 1 and 2147483647.",
        "page_size": "page_size must be given only once.",
        "projectid": "projectid is not a query parameter of this request.",
        "project_id": "project_id must be a UUID.",
        "é": "é is not a query parameter of this request.",
    }


@sqlite_only
@pytest.mark.parametrize("query", ["page=1&page=1", "page=1&page_size=2&page=2"])
def test_query_parameter_is_accepted_only_once(client, seed, query):
    """A query parameter that is given twice is a 400, even with equal values."""
    response = client.get(f"/api/jobs?{query}", headers=seed.auth_header)
    assert response.status_code == 400
    assert details(response) == {"page": "page must be given only once."}


@sqlite_only
def test_routes_accept_only_their_query_parameters(client, seed):
    project, job = seed.project_id, seed.job_ids[0]
    for path, name in (
        (f"/api/projects/{project}/jobs?project_id={project}", "project_id"),
        (f"/api/jobs/{job}?page=1", "page"),
        (f"/api/projects/{project}/jobs/{job}?page_size=1", "page_size"),
    ):
        response = client.get(path, headers=seed.auth_header)
        assert response.status_code == 400
        assert details(response) == {
            name: f"{name} is not a query parameter of this request."
        }


def test_query_parameters_are_checked_before_the_project(client, seed):
    foreign = seed.foreign_project_id
    for path in (
        f"/api/jobs?project_id={foreign}&page=0",
        f"/api/projects/{foreign}/jobs?page=0",
        f"/api/projects/{foreign}/jobs/x",
        f"/api/projects/{foreign}/jobs/{seed.foreign_job_id}?page=1",
    ):
        assert client.get(path, headers=seed.auth_header).status_code == 400


def test_database_without_tables_is_unavailable(app_without_tables, caplog):
    """One line in the log names the command to run, and does not repeat the token."""
    headers = {"Authorization": "Bearer secret"}
    for path in ("/health_check", "/api/jobs"):
        caplog.clear()
        response = app_without_tables.test_client().get(path, headers=headers)
        assert (response.status_code, response.mimetype) == (503, "application/json")
        assert response.headers["Retry-After"] == "5"
        [record] = caplog.records
        assert record.levelno == logging.ERROR and record.exc_info is None
        assert "run `flask init-db`" in record.message
        assert "secret" not in record.message and "\n" not in record.message


def test_missing_column_is_a_500(client, seed, rename_column, caplog):
    """A request for a missing column is a 500, and the log has the traceback."""
    rename_column("jobs", "adaptor", "language")
    response = client.get("/api/jobs", headers=seed.auth_header)
    assert (response.status_code, response.mimetype) == (500, "application/json")
    assert "adaptor" not in response.text
    [record] = caplog.records
    assert "adaptor" in str(record.exc_info[1])
    assert seed.auth_header["Authorization"][7:] not in caplog.text
    rename_column("jobs", "language", "adaptor")
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == 200


def test_missing_column_makes_the_health_check_fail(client, seed, rename_column):
    """A load balancer takes the instance out, whichever query needs the column."""
    columns = ("jobs", "body"), ("projects", "name"), ("users", "disabled")
    for table, column in columns:
        rename_column(table, column, "renamed")
        assert client.get("/health_check").status_code == 503
        rename_column(table, "renamed", column)
        assert client.get("/health_check").status_code == 200


def test_request_without_a_token_never_queries_the_database(make_app, tmp_path):
    for url in (f"sqlite:///{tmp_path}/no/jobs.db", "postgresql://127.0.0.1:1/x"):
        client = make_app(DATABASE_URL=url).test_client()
        assert client.get("/api/jobs").status_code == 401
        headers = {"Authorization": "Bearer x"}
        assert client.get("/api/jobs", headers=headers).status_code == 503


@sqlite_only
def test_pool_without_a_free_connection_is_unavailable(app, client):
    with app.app_context(), ExitStack() as stack:
        for _ in range(db.engine.pool.size()):
            stack.enter_context(db.engine.connect())
        assert client.get("/health_check").status_code == 503
    assert client.get("/health_check").status_code == 200


@sqlite_only
def test_health_check_is_never_cached(client):
    response = client.get("/health_check")
    assert (response.status_code, response.json) == (200, {"status": "ok"})
    assert response.headers["Cache-Control"] == "no-store"
