"""Headers of responses, and of requests that are forwarded by proxies."""

import pytest

pytestmark = pytest.mark.sqlite


def test_job_routes_return_304_if_the_etag_matches(client, seed):
    for path in seed.paths:
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


def test_etag_is_compared_after_access(client, seed):
    path, any_etag = f"/api/jobs/{seed.foreign_job_id}", {"If-None-Match": "*"}
    for headers, status in ({}, 401), (seed.auth_header, 403):
        assert client.get(path, headers=headers | any_etag).status_code == status


def test_etag_changes_with_the_response(client, seed, execute):
    *_, path, _ = seed.paths
    before = client.get(path, headers=seed.auth_header).headers["ETag"]
    assert client.get(path, headers=seed.auth_header).headers["ETag"] == before
    execute("UPDATE jobs SET body = 'changed'")
    assert client.get(path, headers=seed.auth_header).headers["ETag"] != before


def test_link_header_has_the_links_that_are_not_null(client, seed):
    for query, names in (
        ("page=2&page_size=1", ("first", "prev", "next", "last")),
        ("page=1&page_size=1", ("first", "next", "last")),
        ("page=9", ("first", "prev", "last")),
    ):
        response = client.get(f"/api/jobs?{query}", headers=seed.auth_header)
        links = [f'<{response.json["links"][name]}>; rel="{name}"' for name in names]
        assert response.headers["Link"] == ", ".join(links)


def test_no_response_is_sniffed_and_no_error_is_cached(client, seed):
    for path, headers, cache_control in (
        ("/api/jobs", seed.auth_header, "private, no-cache"),
        ("/api/jobs", {}, "no-store"),
        ("/nothing", {}, "no-store"),
        ("/health_check", {}, "no-store"),
        ("/api/openapi.json", {}, "no-store"),
    ):
        response = client.get(path, headers=headers)
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cache-Control"] == cache_control


@pytest.mark.parametrize(
    ("proxies", "root"),
    [(0, "http://localhost"), (1, "https://b.example"), (2, "http://a.example")],
)
def test_only_trusted_proxies_can_set_the_address(make_app, seed, proxies, root):
    """The last values are those of the nearest proxy."""
    forwarded = {
        "X-Forwarded-Proto": "http, https",
        "X-Forwarded-Host": "a.example, b.example",
        "X-Forwarded-Port": "1",
        "X-Forwarded-Prefix": "/other",
        "Forwarded": "host=other.example;proto=ftp",
    }
    client = make_app(TRUSTED_PROXIES=proxies).test_client()
    response = client.get("/api/jobs", headers=seed.auth_header | forwarded)
    assert response.json["links"]["self"] == f"{root}/api/jobs"


@pytest.mark.parametrize("header", ["Host", "X-Forwarded-Host"])
def test_malformed_host_is_rejected_on_every_path(make_app, seed, header):
    client = make_app(TRUSTED_PROXIES=1).test_client()
    for host in "a b<>", "a.example/x", "a:b", "a:99999", "[::1", "a\x00", "é", "a@b":
        for path in ("/api/jobs", "/health_check", "/nothing"):
            response = client.get(path, headers=seed.auth_header | {header: host})
            assert (response.status_code, response.json["error"]) == (
                400,
                "Bad Request",
            )


@pytest.mark.parametrize(
    ("status", "hosts"),
    [
        (200, "jobs.example JOBS.example:8443 a.internal internal 127.0.0.1:8000"),
        (400, "other.example jobs.example.other.example notinternal internal.a"),
    ],
)
def test_only_trusted_hosts_are_served(make_app, seed, status, hosts):
    """The health check is served on any well-formed host."""
    trusted = "Jobs.example, .internal,127.0.0.1"
    client = make_app(TRUSTED_HOSTS=trusted, TRUSTED_PROXIES=1).test_client()
    for host in hosts.split():
        for headers in ({"Host": host}, {"Host": "internal", "X-Forwarded-Host": host}):
            for path, expected in (
                ("/api/jobs", status),
                ("/nothing", 404 if status == 200 else 400),
                ("/health_check", 200),
            ):
                response = client.get(path, headers=seed.auth_header | headers)
                assert response.status_code == expected, host
