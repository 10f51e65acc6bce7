"""Which tokens are accepted, and which users can access a project."""

from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest

TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln"
DIGEST = sha256(TOKEN.encode()).digest()
NO_TOKEN = 'Bearer realm="jobs"'
INVALID_TOKEN = 'Bearer realm="jobs", error="invalid_token"'


@pytest.mark.sqlite
def test_every_route_except_the_open_ones_requires_a_token(app, client):
    """The token is checked before ids and query parameters, which are wrong here."""
    open_routes = ("/health_check", "/api/openapi.json", "/api/docs/")
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<", "").replace(">", "")
        is_rejected = client.get(f"{path}?unknown=1").status_code == 401
        assert is_rejected != rule.rule.startswith(open_routes), path


@pytest.mark.parametrize(
    ("challenge", "values"),
    [
        (NO_TOKEN, [
            "", "Bearer", "Bearer ", "Bearer\tx", "Bearerx y", "a=b", "Basic eW91OnB3",
            "Basic pässword",
        ]),
        (INVALID_TOKEN, [
            "Bearer x", "Bearer a=b", "Bearer a=b,c", "Bearer a b", 'Bearer "',
            "Bearer \x00", "Bearer tökén", "Bearer " + "x" * 100_000,
        ]),
    ],
)  # fmt: skip
def test_request_without_a_valid_token_is_a_401(client, challenge, values):
    error = {"status": "401", "title": "Unauthorized"}
    error["detail"] = "A valid bearer token is required."
    for value in values:
        response = client.get("/api/jobs", headers={"Authorization": value})
        assert response.status_code == 401, value
        assert response.headers["WWW-Authenticate"] == challenge, value
        assert response.json == {"error": "Unauthorized", "errors": [error]}


@pytest.mark.sqlite
@pytest.mark.parametrize("form", ["bearer {}", "BEARER {}", "Bearer  {} "])
def test_scheme_is_accepted_in_any_case(client, seed, form):
    headers = {"Authorization": form.format(seed.token)}
    assert client.get("/api/jobs", headers=headers).status_code == 200


def test_context_decides_what_is_compared_with_the_stored_bytes(client, seed, execute):
    """A token is compared with "api" rows only, its digest with "api:sha256" rows."""
    token = TOKEN.encode()
    for context, stored, presented, status in (
        ("api", token, TOKEN, 200),
        ("api", b"t\xe9\xff", "té\xff", 200),
        ("api", DIGEST, TOKEN, 401),
        ("api:sha256", DIGEST, TOKEN, 200),
        ("api:sha256", token, TOKEN, 401),
        ("session", DIGEST, TOKEN, 401),
        ("session", token, TOKEN, 401),
        ("reset_password", DIGEST, TOKEN, 401),
        ("API", token, TOKEN, 401),
    ):
        sql = "UPDATE user_tokens SET context = :context, token = :token"
        execute(sql, context=context, token=stored)
        headers = {"Authorization": f"Bearer {presented}"}
        response = client.get("/api/jobs", headers=headers)
        assert response.status_code == status, (context, stored)


def test_database_has_only_the_digest_of_a_token(seed, dump):
    [row] = dump()["user_tokens"].values()
    assert row["context"] == "api:sha256"
    assert row["token"] == sha256(seed.token.encode()).digest()


@pytest.mark.parametrize(
    ("hours", "max_age", "status"),
    [(23, 1, 200), (24, 1, 401), (-48, 1, 200), (9999, None, 200), (9999, 10**30, 200)],
)
def test_token_is_valid_until_its_maximum_age(
    make_app, seed, execute, hours, max_age, status
):
    created = datetime.now(UTC).replace(tzinfo=None) - timedelta(hours=hours)
    execute("UPDATE user_tokens SET inserted_at = :time", time=f"{created:%F %T.%f}")
    client = make_app(TOKEN_MAX_AGE_DAYS=max_age).test_client()
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == status


@pytest.mark.parametrize(
    ("disabled", "status"), [("true", 401), ("false", 200), ("NULL", 200)]
)
def test_disabled_user_is_rejected(client, seed, execute, disabled, status):
    execute(f"UPDATE users SET disabled = {disabled}")
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == status


def test_revoked_token_is_rejected(client, run_flask, seed, dump):
    run_flask("revoke-token", *dump()["user_tokens"])
    assert client.get("/api/jobs", headers=seed.auth_header).status_code == 401


ROLES = "owner", "admin", "editor", "viewer"
USUAL, SUPPORTED = {}, {"allow_support_access": True}
SCHEDULED = {"scheduled_deletion": "2999-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("role", "supporter", "project", "allowed"),
    [
        *[(role, False, USUAL, True) for role in ROLES],
        ("viewer", True, SUPPORTED, True),
        ("owner", False, SCHEDULED, False),
        ("owner", True, SUPPORTED | SCHEDULED, False),
        ("none", False, USUAL, False),
        ("none", False, SUPPORTED, False),
        ("none", None, SUPPORTED, False),
        ("none", True, USUAL, False),
        ("none", True, SUPPORTED, True),
        ("none", True, SUPPORTED | SCHEDULED, False),
    ],
)
def test_access_rule_is_the_same_on_all_routes(
    client, seed, new_state, import_state, execute, role, supporter, project, allowed
):
    """The other user, who is a supporter and a member, has no influence."""
    state = new_state(jobs=1, **project)
    import_state(state, f"you@example.org:{role}", "they@example.org")
    execute("UPDATE users SET support_user = true")
    sql = "UPDATE users SET support_user = :value WHERE email = 'you@example.org'"
    execute(sql, value=supporter)
    project_id, job_id = state["id"], state["workflows"][0]["jobs"][0]["id"]
    page = client.get("/api/jobs", headers=seed.auth_header).json
    listed = seed.job_ids + [job_id] * allowed
    assert [job["id"] for job in page["data"]] == listed
    assert page["meta"]["total_entries"] == len(listed)
    for path in (
        f"jobs?project_id={project_id}",
        f"projects/{project_id}/jobs",
        f"jobs/{job_id}",
        f"projects/{project_id}/jobs/{job_id}",
    ):
        response = client.get(f"/api/{path}", headers=seed.auth_header)
        assert response.status_code == (200 if allowed else 403), path
