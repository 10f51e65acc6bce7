"""Headers of responses, and of requests that are forwarded by proxies."""

import pytest
from conftest import sqlite_only


def test_job_routes_return_304_if_the_etag_matches(client, seed, paths):
    for path in paths:
        full = client.get(path, headers=seed.auth_header)
        etag = full.headers["ETag"]
        assert etag.startswith('"') and full.headers["Vary"] == "Authorization"
        assert full.headers["Cache-Control"] == "private, no-cache"
        for match in (etag, f'W/{etag}, "x"', "*"):
            headers = seed.auth_header | {"If-None-Match": match}
            response = client.get(path, headers=headers)
            assert (response.status_code, response.data) == (304, b"")
            for name in ("ETag", "Vary", "Cache-Control", "Link"):
                assert response.headers.get(name) == full.headers.get(name)
        headers = seed.auth_header | {"If-None-Match": '"x"', "If-Match": '"x"'}
        assert client.get(path, headers=headers).data == full.data


def test_if_none_match_is_checked_after_access(client, seed):
    for path, status in (
        (f"/api/jobs/{seed.foreign_job_id}", 403),
        ("/api/jobs?page=0", 400),
    ):
        headers = seed.auth_header | {"If-None-Match": "*"}
        assert client.get(path, headers=headers).status_code == status
    assert client.get("/api/jobs", headers={"If-None-Match": "*"}).status_code == 401


def test_etag_changes_with_the_response(client, seed, run_flask, import_state):
    path = f"/api/jobs/{seed.job_ids[0]}"
    before = client.get(path, headers=seed.auth_header).headers["ETag"]
    assert client.get(path, headers=seed.auth_header).headers["ETag"] == before
    seed.state["workflows"][0]["jobs"][0]["body"] = "changed"
    import_state(seed.state)
    assert client.get(path, headers=seed.auth_header).headers["ETag"] != before


@sqlite_only
def test_link_header_has_the_links_of_the_list(client, seed):
    url = "/api/jobs?page=2&page_size=1"
    response = client.get(url, headers=seed.auth_header)
    links = response.json["links"]
    assert response.headers["Link"] == ", ".join(
        f'<{links[rel]}>; rel="{rel}"' for rel in ("first", "prev", "next", "last")
    )
    only_page = client.get("/api/jobs", headers=seed.auth_header).headers["Link"]
    assert "prev" not in only_page and "next" not in only_page


@sqlite_only
def test_no_response_is_sniffed_and_no_error_is_cached(client, seed):
    for path, headers, cache_control in (
        ("/api/jobs", seed.auth_header, "private, no-cache"),
        ("/api/jobs", {}, "no-store"),
        ("/nothing", {}, "no-store"),
        ("/health_check", {}, "no-store"),
    ):
        response = client.get(path, headers=headers)
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cache-Control"] == cache_control


FORWARDED = {
    "X-Forwarded-For": "10.0.0.1",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "jobs.example",
    "X-Forwarded-Port": "1",
    "X-Forwarded-Prefix": "/evil",
    "Forwarded": "host=evil.example;proto=ftp",
}


@sqlite_only
@pytest.mark.parametrize(
    ("proxies", "root"), [(0, "http://localhost"), (1, "https://jobs.example")]
)
def test_only_trusted_proxies_can_set_the_address(make_app, seed, proxies, root):
    client = make_app(TRUSTED_PROXIES=proxies).test_client()
    response = client.get("/api/jobs", headers=seed.auth_header | FORWARDED)
    assert response.json["links"]["self"] == f"{root}/api/jobs"


@sqlite_only
def test_number_of_trusted_proxies_is_a_limit(make_app, seed):
    client = make_app(TRUSTED_PROXIES=1).test_client()
    headers = {"X-Forwarded-Host": "evil.example, jobs.example"}
    response = client.get("/api/jobs", headers=seed.auth_header | headers)
    assert response.json["links"]["self"] == "http://jobs.example/api/jobs"


@sqlite_only
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "a b<>"},
        {"Host": "evil.com/x"},
        {"Host": ""},
        {"Host": "a:b"},
        {"Host": "a:99999"},
        {"Host": "[::1"},
        {"Host": "a\x00"},
        {"Host": "é"},
        {"Host": "a@b"},
        {"X-Forwarded-Host": "evil.com/x"},
        {"X-Forwarded-Proto": "javascript"},
        {"X-Forwarded-Proto": "https://evil.com/?"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/api/jobs", "/health_check", "/nothing"])
def test_malformed_address_is_rejected(make_app, seed, headers, path):
    client = make_app(TRUSTED_PROXIES=1).test_client()
    response = client.get(path, headers=seed.auth_header | headers)
    assert (response.status_code, response.mimetype) == (400, "application/json")


@sqlite_only
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("jobs.example", 200),
        ("jobs.example:8443", 200),
        ("a.internal", 200),
        ("internal", 200),
        ("127.0.0.1:8000", 200),
        ("evil.example", 400),
        ("jobs.example.evil.example", 400),
        ("notinternal", 400),
    ],
)
@pytest.mark.parametrize(
    "trusted",
    ["Jobs.example, .internal,127.0.0.1", ["jobs.example", ".internal", "127.0.0.1"]],
)
def test_only_trusted_hosts_are_served(make_app, seed, host, status, trusted):
    client = make_app(TRUSTED_HOSTS=trusted, TRUSTED_PROXIES=1).test_client()
    for headers in ({"Host": host}, {"Host": "internal", "X-Forwarded-Host": host}):
        for path, expected in (
            ("/api/jobs", status),
            ("/health_check", 200),
            ("/nothing", 404 if status == 200 else status),
        ):
            response = client.get(path, headers=seed.auth_header | headers)
            assert response.status_code == expected


@sqlite_only
def test_host_that_is_not_trusted_is_logged(make_app, seed, caplog):
    """The operator of a wrong setup is often the client too, and finds the cause."""
    client = make_app(TRUSTED_HOSTS="jobs.example").test_client()
    response = client.get("/api/jobs", headers={"Host": "other.example"})
    detail = "The host other.example is not in TRUSTED_HOSTS."
    assert response.json["errors"][0]["detail"] == detail
    [record] = caplog.records
    assert record.message == "Host other.example is not in TRUSTED_HOSTS."
