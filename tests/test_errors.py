"""Which requests are rejected, with which message and which headers."""

from contextlib import ExitStack
from time import monotonic
from urllib.parse import unquote

import pytest
from flask import abort
from werkzeug.exceptions import default_exceptions
from werkzeug.http import HTTP_STATUS_CODES

from database import db


def error_document(status, detail):
    """Return the document of an error without a query parameter."""
    title = HTTP_STATUS_CODES[status]
    error = {"status": str(status), "title": title, "detail": detail}
    return {"error": title, "errors": [error]}


def details(response):
    """Return the detail of each error of a 400, by the name of the query parameter."""
    assert (response.status_code, response.json["error"]) == (400, "Bad Request")
    errors = response.json["errors"]
    return {e.get("source", {}).get("parameter"): e["detail"] for e in errors}


@pytest.mark.sqlite
@pytest.mark.parametrize("status", default_exceptions)
def test_every_error_is_json(app, client, status):
    app.add_url_rule("/error", view_func=lambda: abort(status))
    response = client.get("/error")
    detail = default_exceptions[status].description
    assert (response.status_code, response.mimetype) == (status, "application/json")
    assert response.json == error_document(status, detail)


@pytest.mark.sqlite
def test_only_methods_that_read_are_allowed(client):
    for path in ("/api/jobs", "/api/jobs/x", "/health_check"):
        for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE", "PURGE", "OPTIONS"):
            response = client.open(path, method=method)
            assert response.status_code == (200 if method == "OPTIONS" else 405)
            assert {*response.allow} == {"GET", "HEAD", "OPTIONS"}
            assert bool(response.data) == (response.status_code == 405)


@pytest.mark.sqlite
def test_other_paths_are_not_found_and_never_redirected(client):
    slashes = ("//api/jobs", "/api//jobs", "/api/jobs//", "/health_check//")
    others = ("/api/", "/API/jobs", "/api/projects/x", "/api/jobs/x/y", "/%00", "/%ff")
    for path in ("/", *slashes, *others, "/static/x"):
        response = client.get(f"http://localhost{path}")
        expected = error_document(404, default_exceptions[404].description)
        assert (response.status_code, response.json) == (404, expected), path


@pytest.mark.sqlite
@pytest.mark.parametrize("name", ["page", "page_size"])
def test_number_is_whole_and_within_its_limits(client, seed, name):
    wrong = ["", "abc", "1.5", "1e1", "1%00", "%ff", "0", "-1", "2147483648"]
    for value in (*wrong, "9" * 30, "9" * 5000):
        response = client.get(f"/api/jobs?{name}={value}", headers=seed.auth_header)
        assert [*details(response)] == [name], value


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "form",
    ["x", "{}6", "{{{}}}", "urn:uuid:{}", "%20{}", "{}%0A", "{:.35}", "{:.35}g",
     "{:.35}%D9%A1", "{:.8}_cabc-4a1f-8603-3dbdba8835e6", "{:.8}" + "c" * 24],
)  # fmt: skip
def test_id_has_one_form(client, seed, form):
    bad_id = form.format(seed.project_id)
    response = client.get(f"/api/jobs?project_id={bad_id}", headers=seed.auth_header)
    assert details(response) == {"project_id": "project_id must be one UUID."}
    for path in (
        f"/api/jobs/{bad_id}",
        f"/api/projects/{bad_id}/jobs",
        f"/api/projects/{bad_id}/jobs/{seed.job_ids[0]}",
        f"/api/projects/{seed.project_id}/jobs/{bad_id}",
    ):
        response = client.get(path, headers=seed.auth_header)
        assert details(response) == {None: f"{unquote(bad_id)} is not a UUID."}


@pytest.mark.sqlite
def test_every_wrong_query_parameter_is_named(client, seed):
    query = "page=0&page_size=1&page_size=1&projectid=x&project_id=&%C3%A9=1"
    response = client.get(f"/api/jobs?{query}", headers=seed.auth_header)
    assert details(response) == {
        "page": "page must be between 1 and 2147483647.",
        "page_size": "page_size must be one whole number.",
        "projectid": "projectid is not a query parameter of this request.",
        "project_id": "project_id must be one UUID.",
        "é": "é is not a query parameter of this request.",
    }


@pytest.mark.sqlite
def test_ids_and_query_parameters_are_checked_before_access(client, seed):
    """Each route accepts only the query parameters that it has."""
    project_id, job_id = seed.foreign_project_id, seed.foreign_job_id
    for path, name in (
        (f"/api/jobs?project_id={project_id}&page=0", "page"),
        (f"/api/projects/{project_id}/jobs?project_id={project_id}", "project_id"),
        (f"/api/projects/{project_id}/jobs/x", None),
        (f"/api/projects/{project_id}/jobs/{job_id}?page_size=1", "page_size"),
        (f"/api/jobs/{job_id}?page=1", "page"),
    ):
        response = client.get(path, headers=seed.auth_header)
        assert [*details(response)] == [name]


@pytest.mark.parametrize(
    ("sql", "cause"),
    [
        ("DROP TABLE user_tokens", "run `flask init-db` to create the tables"),
        ("ALTER TABLE jobs RENAME adaptor TO language", "adaptor"),
    ],
)
def test_error_of_the_database_is_a_503_with_its_cause_in_the_log(
    client, seed, execute, caplog, database_url, sql, cause
):
    """It is one line without the token, and a traceback if it may be a bug."""
    execute(sql)
    response = client.get("/api/jobs", headers=seed.auth_header)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    assert response.json == error_document(503, "The database cannot be read now.")
    [record] = caplog.records
    assert record.levelname == "ERROR" and cause in record.message
    # psycopg shows the first bytes of a parameter.
    assert "\n" not in record.message and seed.token[:9] not in caplog.text
    # In SQLite, the error is an OperationalError, in PostgreSQL a ProgrammingError.
    assert bool(record.exc_info) == database_url.startswith("postgresql")


def test_missing_column_makes_the_health_check_fail(client, execute):
    """A load balancer stops sending requests, whichever query needs the column."""
    columns = ("users", "disabled"), ("jobs", "adaptor"), ("jobs", "body")
    for table, column in (*columns, ("projects", "name"), ("project_users", "user_id")):
        execute(f"ALTER TABLE {table} RENAME {column} TO renamed")
        assert client.get("/health_check").status_code == 503
        execute(f"ALTER TABLE {table} RENAME renamed TO {column}")
        response = client.get("/health_check")
        assert (response.status_code, response.json) == (200, {"status": "ok"})


@pytest.mark.sqlite
def test_log_names_the_database_that_cannot_be_reached(make_app, caplog):
    """It shows no password, and a request without a token needs no database."""
    url = "postgresql://u:s3cret@127.0.0.1:1/x?password=s3cret"
    client = make_app(DATABASE_URL=url).test_client()
    assert client.get("/api/jobs").status_code == 401
    headers = {"Authorization": "Bearer x"}
    assert client.get("/api/jobs", headers=headers).status_code == 503
    [record] = caplog.records
    assert "://u:***@127.0.0.1:1/x: " in record.message and record.exc_info is None
    assert "\n" not in record.message and "s3cret" not in record.message


@pytest.mark.sqlite
def test_request_waits_less_than_10_seconds_for_a_free_connection(app, client, caplog):
    with app.app_context(), ExitStack() as stack:
        for _ in range(db.engine.pool.size()):
            stack.enter_context(db.engine.connect())
        began = monotonic()
        assert client.get("/health_check").status_code == 503
        assert monotonic() - began < 10
    assert caplog.records[0].exc_info is None
    assert client.get("/health_check").status_code == 200
