"""Which tokens are accepted, and which users can access a project."""

from datetime import UTC, datetime, timedelta

import pytest
from conftest import sqlite_only

from database import db
from models import Project, User, UserToken


def rows(app, model):
    """Return all rows of a model."""
    with app.app_context():
        return db.session.scalars(db.select(model)).all()


@pytest.fixture
def token_id(app, seed):
    """The id of the token of ``seed.auth_header``."""
    return rows(app, UserToken)[0].id


@sqlite_only
def test_every_route_except_the_open_ones_requires_a_token(app, client):
    """The token is checked before ids and query parameters, which are wrong here."""
    open_routes = {"/health_check", "/api/openapi.json"}
    for rule in app.url_map.iter_rules():
        if rule.endpoint.startswith("swagger_ui."):
            continue
        path = rule.rule.replace("<", "").replace(">", "")
        response = client.get(f"{path}?unknown=1")
        assert (response.status_code == 401) == (rule.rule not in open_routes), path


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer unknown",
        "Bearer tökén",
        "Bearer " + "x" * 100_000,
        "Bearer a b",
        "Bearer a=b,c",
        "Bearer \x00",
        'Bearer "',
    ],
    ids=lambda value: value[:12],
)
def test_wrong_token_is_rejected_as_invalid(client, seed, authorization):
    response = client.get("/api/jobs", headers={"Authorization": authorization})
    assert response.status_code == 401
    challenge = response.headers["WWW-Authenticate"]
    assert challenge == 'Bearer realm="jobs", error="invalid_token"'


@sqlite_only
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic eW91OnB3"},
        {"Authorization": "Bearerx y"},
        {"X-Authorization": "Bearer x"},
    ],
    ids=str,
)
def test_request_without_a_token_is_a_401_with_a_challenge(client, seed, headers):
    response = client.get("/api/jobs", headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="jobs"'
    assert response.json == {
        "error": "Unauthorized",
        "errors": [
            {
                "status": "401",
                "title": "Unauthorized",
                "detail": "A valid bearer token is required.",
            }
        ],
    }


@sqlite_only
@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer ", "Bearer  "])
def test_scheme_is_case_insensitive(client, seed, scheme):
    token = seed.auth_header["Authorization"].removeprefix("Bearer ")
    response = client.get("/api/jobs", headers={"Authorization": f"{scheme} {token} "})
    assert response.status_code == 200


def test_revoked_token_is_rejected(client, run_flask, seed, token_id):
    run_flask("revoke-token", token_id)
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == 401


@pytest.mark.parametrize(
    ("disabled", "status"), [(True, 401), (False, 200), (None, 200)]
)
def test_disabled_user_is_rejected(app, client, seed, set_columns, disabled, status):
    user_id = rows(app, UserToken)[0].user_id
    set_columns(User, user_id, disabled=disabled)
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == status


@pytest.mark.parametrize(("hours", "status"), [(23, 200), (25, 401), (-48, 200)])
def test_token_older_than_the_maximum_is_rejected(
    make_app, app, seed, token_id, set_columns, hours, status
):
    created = datetime.now(UTC).replace(tzinfo=None) - timedelta(hours=hours)
    set_columns(UserToken, token_id, inserted_at=created)
    client = make_app(TOKEN_MAX_AGE_DAYS=1).test_client()
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == status


@sqlite_only
@pytest.mark.parametrize("days", ["1", "999999999999999999999"])
def test_token_is_valid_until_its_maximum_age(make_app, app, seed, days):
    client = make_app(TOKEN_MAX_AGE_DAYS=days).test_client()
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == 200


@pytest.mark.parametrize(
    ("context", "is_accepted"),
    [
        ("api", True),
        ("session", False),
        ("sudo_session", False),
        ("reset_password", False),
        ("api:sha256", False),
        ("API", False),
    ],
)
def test_stored_bytes_are_a_token_only_in_the_api_context(
    client, seed, token_id, set_columns, context, is_accepted
):
    """The bytes of a row with another context, such as a digest, are no valid token."""
    jwt = b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln"
    set_columns(UserToken, token_id, context=context, token=jwt)
    headers = {"Authorization": f"Bearer {jwt.decode()}"}
    assert client.get("/api/jobs", headers=headers).status_code == (
        200 if is_accepted else 401
    )


def test_token_that_is_not_ascii_is_compared_as_bytes(
    client, seed, token_id, set_columns
):
    set_columns(UserToken, token_id, context="api", token=b"t\xe9\xff")
    headers = {"Authorization": "Bearer té\xff"}
    assert client.get("/api/jobs", headers=headers).status_code == 200


def test_database_has_the_digest_of_a_token_only(app, seed):
    token = seed.auth_header["Authorization"].removeprefix("Bearer ").encode()
    stored = rows(app, UserToken)[0]
    assert (stored.context, len(stored.token)) == ("api:sha256", 32)
    assert token not in stored.token and token.decode() not in repr(stored)


ROLES = ("owner", "admin", "editor", "viewer")
USUAL, SUPPORTED, UNKNOWN = (
    {},
    {"allow_support_access": True},
    {"allow_support_access": None},
)
SCHEDULED = {"scheduled_deletion": datetime(2999, 1, 1)}


@pytest.mark.parametrize(
    ("role", "support", "project", "allowed"),
    [
        *[(role, False, USUAL, True) for role in ROLES],
        *[(role, True, SUPPORTED, True) for role in ROLES],
        *[(role, False, SCHEDULED, False) for role in ROLES],
        (None, False, USUAL, False),
        (None, False, SUPPORTED, False),
        (None, None, SUPPORTED, False),
        (None, True, USUAL, False),
        (None, True, UNKNOWN, False),
        (None, True, SUPPORTED, True),
        (None, True, SUPPORTED | SCHEDULED, False),
        ("viewer", None, UNKNOWN, True),
        ("viewer", True, SUPPORTED | SCHEDULED, False),
    ],
)
def test_access_rule_is_the_same_on_all_routes(
    app, client, seed, new_state, import_state, set_columns,
    role, support, project, allowed,
):  # fmt: skip
    """Lists and single jobs follow one rule of role, support access and deletion."""
    state = new_state(jobs=1)
    job_id = state["workflows"][0]["jobs"][0]["id"]
    import_state(state, f"you@example.org:{role or 'none'}")
    user_id = rows(app, UserToken)[0].user_id
    set_columns(User, user_id, support_user=support)
    set_columns(Project, state["id"], **project) if project else None
    all_jobs = client.get("/api/jobs", headers=seed.auth_header).json
    assert (job_id in [job["id"] for job in all_jobs["data"]]) == allowed
    assert all_jobs["meta"]["total_entries"] == len(seed.job_ids) + allowed
    for path in (
        f"/api/jobs?project_id={state['id']}",
        f"/api/projects/{state['id']}/jobs",
        f"/api/jobs/{job_id}",
        f"/api/projects/{state['id']}/jobs/{job_id}",
    ):
        assert client.get(path, headers=seed.auth_header).status_code == (
            200 if allowed else 403
        )
