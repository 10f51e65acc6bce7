"""Lists of jobs and single jobs, as a client receives them."""

from datetime import datetime

import pytest
from conftest import sqlite_only

from models import Job, Workflow

JOB_1 = "13bae4ca-cabc-4a1f-8603-3dbdba8835e6"
JOB_2 = "23bae4ca-cabc-4a1f-8603-3dbdba8835e6"
WORKFLOW = "1a1175db-1962-47de-a7a9-52a36b2a4c85"
PROJECT = "e09231d6-869f-4ecf-b163-e42a07849f0b"

STATE = {
    "id": PROJECT,
    "name": "Clinic",
    "workflows": {
        "w": {
            "id": WORKFLOW,
            "name": "Visits",
            "jobs": {
                "two": {
                    "id": JOB_2,
                    "name": "Später",
                    "body": "fn(s => s);\n",
                    "adaptor": "@openfn/language-http@6.5.4",
                    "inserted_at": "2024-03-29T08:37:53.5Z",
                    "updated_at": "2024-03-29T10:59:51+02:00",
                },
                "one": {
                    "id": JOB_1.upper(),
                    "name": "Check age",
                    "body": "",
                    "inserted_at": "2024-03-29T08:37:53",
                    "updated_at": "2024-03-29T08:37:53",
                },
            },
        }
    },
}

RELATIONSHIPS = {
    "workflow": {"data": {"type": "workflows", "id": WORKFLOW}},
    "project": {"data": {"type": "projects", "id": PROJECT}},
}

RESOURCE_1 = {
    "type": "jobs",
    "id": JOB_1,
    "attributes": {
        "name": "Check age",
        "adaptor": "@openfn/language-common@latest",
        "inserted_at": "2024-03-29T08:37:53.000000Z",
        "updated_at": "2024-03-29T08:37:53.000000Z",
    },
    "relationships": RELATIONSHIPS,
    "links": {"self": f"http://localhost/api/jobs/{JOB_1}"},
}

RESOURCE_2 = {
    "type": "jobs",
    "id": JOB_2,
    "attributes": {
        "name": "Später",
        "adaptor": "@openfn/language-http@6.5.4",
        "inserted_at": "2024-03-29T08:37:53.500000Z",
        "updated_at": "2024-03-29T08:59:51.000000Z",
    },
    "relationships": RELATIONSHIPS,
    "links": {"self": f"http://localhost/api/jobs/{JOB_2}"},
}


@pytest.fixture
def clinic(import_state, auth_header):
    """The header with the token of a member of the project with the two jobs above."""
    import_state(STATE, "you@example.org")
    return auth_header("you@example.org")


@pytest.mark.parametrize(
    ("path", "args"),
    [
        ("/api/jobs", ""),
        ("/api/jobs", f"project_id={PROJECT}"),
        (f"/api/projects/{PROJECT}/jobs", ""),
    ],
)
def test_list_has_all_jobs_in_order(client, clinic, path, args):
    url, query = f"http://localhost{path}", f"&{args}" if args else ""
    response = client.get(f"{path}?{args}", headers=clinic)
    assert response.status_code == 200
    assert response.json == {
        "data": [RESOURCE_1, RESOURCE_2],
        "included": [],
        "links": {
            "self": f"{url}?{args}" if args else url,
            "first": f"{url}?page=1{query}",
            "last": f"{url}?page=1{query}",
            "next": None,
            "prev": None,
        },
        "meta": {
            "page_number": 1,
            "page_size": 10,
            "total_entries": 2,
            "total_pages": 1,
        },
    }


@pytest.mark.parametrize(
    "path", [f"/api/jobs/{JOB_2}", f"/api/projects/{PROJECT}/jobs/{JOB_2}"]
)
def test_job_has_its_body_its_workflow_and_its_project(client, clinic, path):
    body = {"body": "fn(s => s);\n"}
    assert client.get(path, headers=clinic).json == {
        "data": RESOURCE_2 | {"attributes": RESOURCE_2["attributes"] | body},
        "included": [
            {
                "type": "workflows",
                "id": WORKFLOW,
                "attributes": {"name": "Visits"},
                "relationships": {"project": RELATIONSHIPS["project"]},
            },
            {"type": "projects", "id": PROJECT, "attributes": {"name": "Clinic"}},
        ],
        "links": RESOURCE_2["links"],
    }


@pytest.mark.parametrize(
    "path",
    [
        "/api/jobs",
        f"/api/jobs?project_id={PROJECT}",
        f"/api/projects/{PROJECT}/jobs?page_size=1",
        f"/api/jobs/{JOB_1}",
        f"/api/projects/{PROJECT}/jobs/{JOB_1}",
    ],
)
def test_case_of_ids_and_a_trailing_slash_change_nothing(client, clinic, path):
    """HEAD returns the same headers as GET, without the body."""
    response = client.get(path, headers=clinic)
    route, mark, query = path.partition("?")
    for target in (
        f"{route}/{mark}{query}",
        path.replace(PROJECT, PROJECT.upper()).replace(JOB_1, JOB_1.upper()),
    ):
        assert client.get(target, headers=clinic).data == response.data
    head_response = client.head(path, headers=clinic)
    assert (head_response.status_code, head_response.data) == (200, b"")
    assert dict(head_response.headers) == dict(response.headers)


@pytest.mark.parametrize(
    ("query", "numbers", "prev", "next_"),
    [
        ("page_size=2", [0, 1], None, 2),
        ("page_size=2&page=2", [2, 3], 1, 3),
        ("page=3&page_size=2", [4], 2, None),
        ("page=4&page_size=2", [], 3, None),
        ("page=2147483647&page_size=2", [], 3, None),
        ("page_size=4&page=2", [4], 1, None),
        ("page_size=5", [0, 1, 2, 3, 4], None, None),
        ("page_size=100", [0, 1, 2, 3, 4], None, None),
        ("page=0002&page_size=001", [1], 1, 3),
        ("page=" + "0" * 4400 + "2&page_size=2", [2, 3], 1, 3),
    ],
)
def test_page_has_its_jobs_and_links_to_its_neighbours(
    client, new_state, import_state, auth_header, query, numbers, prev, next_
):
    import_state(new_state(jobs=5), "you@example.org")
    response = client.get(f"/api/jobs?{query}", headers=auth_header("you@example.org"))
    names = [job["attributes"]["name"] for job in response.json["data"]]
    assert names == [f"Job {n}" for n in numbers]
    links = response.json["links"]
    for name, page in (("prev", prev), ("next", next_)):
        assert page is None or f"page={page}" in links[name].split("?")[1].split("&")
        assert (page is None) == (links[name] is None)
    assert response.json["meta"]["total_entries"] == 5


def test_pages_in_turn_are_the_whole_list(client, new_state, import_state, auth_header):
    """Each job is on one page even if jobs have equal times; then the id decides."""
    state = new_state(jobs=23)
    for workflow in state["workflows"]:
        for job in workflow["jobs"]:
            job["inserted_at"] = f"2024-01-01T00:00:0{ord(job['id'][0]) % 3}"
    import_state(state, "you@example.org")
    headers = auth_header("you@example.org")
    whole = client.get("/api/jobs?page_size=100", headers=headers).json["data"]
    pages, url = [], "/api/jobs?page_size=4"
    while url:
        page = client.get(url, headers=headers).json
        pages += page["data"]
        url = page["links"]["next"]
    assert pages == whole
    assert whole == sorted(
        whole, key=lambda job: (job["attributes"]["inserted_at"], job["id"])
    )


def test_list_is_in_order_among_the_jobs_of_other_projects(
    client, new_state, import_state, auth_header
):
    """Jobs of other projects can be older, newer or of the same time."""
    import_state(new_state(jobs=20), "you@example.org")
    headers = auth_header("you@example.org")
    for inserted_at in ("2001-01-01", "2999-01-01", None):
        other_project = new_state(jobs=20)
        for workflow in other_project["workflows"]:
            for job in workflow["jobs"]:
                job["inserted_at"] = inserted_at
        import_state(other_project)
        for page, numbers in ((1, [0, 1, 2]), (4, [9, 10, 11]), (7, [18, 19]), (8, [])):
            path = f"/api/jobs?page_size=3&page={page}"
            listed = client.get(path, headers=headers).json["data"]
            names = [job["attributes"]["name"] for job in listed]
            assert names == [f"Job {number}" for number in numbers]


def test_empty_list_has_one_page(client, new_state, import_state, auth_header):
    import_state(new_state(jobs=0), "you@example.org")
    page = client.get("/api/jobs?page=2", headers=auth_header("you@example.org")).json
    assert page["data"] == []
    assert page["meta"]["total_pages"] == 1
    assert page["links"]["last"] == "http://localhost/api/jobs?page=1"
    assert page["links"]["prev"] == "http://localhost/api/jobs?page=1"


@sqlite_only
def test_links_keep_the_query_parameters_of_the_request(client, clinic):
    query = f"?project_id={PROJECT.upper()}&page_size=1"
    links = client.get(f"/api/jobs{query}", headers=clinic).json["links"]
    parameters = f"page_size=1&project_id={PROJECT}"
    assert links["self"] == f"http://localhost/api/jobs?{parameters}"
    assert links["next"] == f"http://localhost/api/jobs?page=2&{parameters}"


@sqlite_only
def test_links_have_the_prefix_where_the_service_is_mounted(client, clinic):
    response = client.get("/api/jobs", headers=clinic, base_url="https://h.example:8/p")
    root = "https://h.example:8/p/api/jobs"
    assert response.json["links"]["self"] == root
    assert response.json["data"][0]["links"]["self"] == f"{root}/{JOB_1}"


@sqlite_only
def test_maximum_below_the_default_page_size_is_the_default(make_app, app, seed):
    client = make_app(MAX_PAGE_SIZE=2).test_client()
    page = client.get("/api/jobs", headers=seed.auth_header).json
    assert page["meta"]["page_size"] == 2
    assert len(page["data"]) == 2


def test_jobs_of_a_deleted_workflow_are_in_no_response(client, seed, set_columns):
    set_columns(Workflow, seed.workflow_id, deleted_at=datetime(2024, 1, 1))
    page = client.get("/api/jobs", headers=seed.auth_header).json
    assert [job["id"] for job in page["data"]] == seed.job_ids[2:]
    assert page["meta"]["total_entries"] == 1
    response = client.get(f"/api/jobs/{seed.job_ids[0]}", headers=seed.auth_header)
    assert response.status_code == 404


def test_nulls_are_returned_as_null(client, seed, set_columns):
    job_id = seed.job_ids[0]
    set_columns(Job, job_id, name=None, body=None, adaptor=None)
    set_columns(Workflow, seed.workflow_id, name=None)
    document = client.get(f"/api/jobs/{job_id}", headers=seed.auth_header).json
    attributes = document["data"]["attributes"]
    assert [attributes[name] for name in ("name", "body", "adaptor")] == [None] * 3
    assert document["included"][0]["attributes"] == {"name": None}


def test_large_body_is_returned_whole(client, import_state, new_state, auth_header):
    state = new_state(jobs=1)
    state["workflows"][0]["jobs"][0]["body"] = body = "fn('\u2028é😀');\n" * 100_000
    import_state(state, "you@example.org")
    job_id = state["workflows"][0]["jobs"][0]["id"]
    response = client.get(f"/api/jobs/{job_id}", headers=auth_header("you@example.org"))
    assert response.json["data"]["attributes"]["body"] == body


@pytest.mark.parametrize(
    ("path", "status", "detail"),
    [
        ("/api/jobs/{unknown}", 404, "There is no job {unknown}."),
        ("/api/jobs/{foreign}", 403, "You do not have access to job {foreign}."),
        ("/api/jobs?project_id={unknown}", 404, "There is no project {unknown}."),
        ("/api/projects/{unknown}/jobs", 404, "There is no project {unknown}."),
        ("/api/projects/{unknown}/jobs/{own}", 404, "There is no project {unknown}."),
        (
            "/api/projects/{foreign_project}/jobs",
            403,
            "You do not have access to project {foreign_project}.",
        ),
        (
            "/api/projects/{foreign_project}/jobs/{own}",
            403,
            "You do not have access to project {foreign_project}.",
        ),
        (
            "/api/projects/{own_project}/jobs/{foreign}",
            404,
            "There is no job {foreign} in project {own_project}.",
        ),
        (
            "/api/projects/{own_project}/jobs/{unknown}",
            404,
            "There is no job {unknown}.",
        ),
    ],
)
def test_project_is_checked_before_the_job(client, seed, path, status, detail):
    ids = {
        "unknown": "00000000-0000-0000-0000-000000000000",
        "own": seed.job_ids[0],
        "foreign": seed.foreign_job_id,
        "own_project": seed.project_id,
        "foreign_project": seed.foreign_project_id,
    }
    response = client.get(path.format(**ids), headers=seed.auth_header)
    assert response.status_code == status
    assert response.json["errors"][0]["detail"] == detail.format(**ids)
