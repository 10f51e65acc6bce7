"""Lists of jobs and single jobs, as a client receives them."""

import pytest

UNKNOWN_ID = "00000000-0000-0000-0000-000000000000"


def test_responses_are_the_examples_of_the_openapi_document(client, run_flask):
    headers = {"Authorization": f"Bearer {run_flask('demo').split()[1]}"}
    responses = client.get("/api/openapi.json").json["components"]["responses"]
    for name in ("JobList", "Job"):
        example = responses[name]["content"]["application/json"]["example"]
        response = client.get(example["links"]["self"], headers=headers)
        assert (response.status_code, response.json) == (200, example)


def test_every_list_of_a_project_has_the_same_jobs(client, seed):
    all_jobs, project_jobs, *_ = seed.paths
    meta = {"page_number": 1, "page_size": 10, "total_entries": 3, "total_pages": 1}
    for path in (all_jobs, project_jobs, f"{all_jobs}?project_id={seed.project_id}"):
        response = client.get(path, headers=seed.auth_header)
        assert (response.status_code, response.mimetype) == (200, "application/json")
        assert [job["id"] for job in response.json["data"]] == seed.job_ids
        assert response.json["meta"] == meta


@pytest.mark.sqlite
def test_case_of_ids_and_a_trailing_slash_change_nothing(client, seed):
    """HEAD returns the headers of GET. Both paths of a job return the same document."""
    for path in (*seed.paths, f"/api/jobs?page=1&project_id={seed.project_id}"):
        response = client.get(path, headers=seed.auth_header)
        assert response.status_code == 200
        route, mark, query = path.partition("?")
        upper = path
        for an_id in (seed.project_id, seed.job_ids[0]):
            upper = upper.replace(an_id, an_id.upper())
        for same in (f"{route}/{mark}{query}", upper):
            assert client.get(same, headers=seed.auth_header).data == response.data
        head_response = client.head(path, headers=seed.auth_header)
        assert (head_response.status_code, head_response.data) == (200, b"")
        assert dict(head_response.headers) == dict(response.headers)
    _, _, *both = (client.get(path, headers=seed.auth_header) for path in seed.paths)
    assert both[0].data == both[1].data


def test_page_has_its_jobs_and_links_to_its_neighbours(client, seed):
    for query, numbers, prev, next_, last in (
        ("page_size=1", [0], None, 2, 3),
        ("page=2&page_size=1", [1], 1, 3, 3),
        ("page_size=1&page=3", [2], 2, None, 3),
        ("page=4&page_size=1", [], 3, None, 3),
        ("page=2147483647&page_size=100", [], 1, None, 1),
        ("page=2&page_size=2", [2], 1, None, 2),
        ("page_size=3", [0, 1, 2], None, None, 1),
        ("page_size=100", [0, 1, 2], None, None, 1),
    ):
        page = client.get(f"/api/jobs?{query}", headers=seed.auth_header).json
        assert [job["id"] for job in page["data"]] == [seed.job_ids[n] for n in numbers]
        size = page["meta"]["page_size"]
        url = f"http://localhost/api/jobs?page={{}}&page_size={size}"
        pages = {"first": 1, "prev": prev, "next": next_, "last": last}
        links = {name: number and url.format(number) for name, number in pages.items()}
        assert page["links"] == links | {"self": page["links"]["self"]}, query
        assert (page["meta"]["total_entries"], page["meta"]["total_pages"]) == (3, last)


@pytest.mark.parametrize("path", ["/api/jobs", "/api/projects/{}/jobs"])
def test_pages_in_turn_are_the_whole_list_in_order(
    client, new_state, import_state, auth_header, path
):
    """Jobs with equal times are in the order of their ids, among any other jobs."""
    own, older, newer = new_state(jobs=23), new_state(jobs=20), new_state(jobs=20)
    expected = []
    for state, day in (own, 2), (older, 1), (newer, 3), (new_state(jobs=20), 2):
        for job in (job for workflow in state["workflows"] for job in workflow["jobs"]):
            job["inserted_at"] = f"2024-01-0{day}T00:00:0{ord(job['id'][0]) % 3}"
            if state is own:
                expected.append((job["inserted_at"], job["id"]))
        import_state(state, f"{'you' if state is own else 'they'}@example.org")
    headers, ids = auth_header("you@example.org"), []
    url = path.format(own["id"]) + "?page_size=4"
    while url:
        page = client.get(url, headers=headers).json
        ids += [job["id"] for job in page["data"]]
        url = page["links"]["next"]
    assert ids == [job_id for _, job_id in sorted(expected)]


def test_empty_list_has_one_page(client, seed, execute):
    execute("DELETE FROM jobs")
    page = client.get("/api/jobs?page=2", headers=seed.auth_header).json
    first, second = (f"http://localhost/api/jobs?page={n}" for n in (1, 2))
    links = {"self": second, "first": first, "prev": first, "next": None, "last": first}
    assert (page["data"], page["links"]) == ([], links)
    assert (page["meta"]["total_entries"], page["meta"]["total_pages"]) == (0, 1)


@pytest.mark.sqlite
def test_links_keep_the_path_the_query_parameters_and_the_address(client, seed):
    """The address has the scheme, the host, the port and the prefix."""
    root, project_id = "https://h.example:8/p", seed.project_id
    for path, query in (
        ("/api/jobs", ""),
        ("/api/jobs", f"&project_id={project_id}"),
        (f"/api/projects/{project_id}/jobs", ""),
    ):
        target = f"{path}/?page_size=1{query.replace(project_id, project_id.upper())}"
        page = client.get(target, root, headers=seed.auth_header).json
        assert page["links"]["self"] == f"{root}{path}?page_size=1{query}"
        assert page["links"]["next"] == f"{root}{path}?page=2&page_size=1{query}"
        job_url = f"{root}/api/jobs/{seed.job_ids[0]}"
        assert page["data"][0]["links"] == {"self": job_url}


def test_jobs_of_a_deleted_workflow_are_in_no_response(client, seed, execute):
    sql = "UPDATE workflows SET deleted_at = '2024-01-01 00:00:00' WHERE id = :id"
    execute(sql, id=seed.workflow_id)
    all_jobs, project_jobs, job, project_job = seed.paths
    for path in (all_jobs, project_jobs):
        page = client.get(path, headers=seed.auth_header).json
        assert [job["id"] for job in page["data"]] == seed.job_ids[2:]
        assert page["meta"]["total_entries"] == 1
    for path in (job, project_job):
        assert client.get(path, headers=seed.auth_header).status_code == 404


def test_nulls_are_null_and_times_are_utc_with_microseconds(client, seed, execute):
    execute("UPDATE jobs SET name = NULL, body = NULL, adaptor = NULL")
    execute("UPDATE jobs SET inserted_at = '2024-03-29 08:37:53.500000'")
    execute("UPDATE jobs SET updated_at = '2024-03-29 08:59:51.000000'")
    execute("UPDATE workflows SET name = NULL")
    execute("UPDATE projects SET name = NULL")
    document = client.get(seed.paths[2], headers=seed.auth_header).json
    assert document["data"]["attributes"] == {
        "name": None,
        "adaptor": None,
        "body": None,
        "inserted_at": "2024-03-29T08:37:53.500000Z",
        "updated_at": "2024-03-29T08:59:51.000000Z",
    }
    assert [one["attributes"] for one in document["included"]] == [{"name": None}] * 2


def test_large_body_is_returned_whole(client, import_state, new_state, auth_header):
    state = new_state(jobs=1)
    [job] = state["workflows"][0]["jobs"]
    job["body"] = "fn('\u2028é😀');\n" * 100_000
    import_state(state, "you@example.org")
    headers = auth_header("you@example.org")
    document = client.get(f"/api/jobs/{job['id']}", headers=headers).json
    assert document["data"]["attributes"]["body"] == job["body"]


NO_PROJECT = (404, "There is no project {unknown}.")
CLOSED_PROJECT = (403, "You do not have access to project {closed}.")
ELSEWHERE = (404, "There is no job {foreign} in project {open}.")


def test_project_is_checked_before_the_job(client, seed):
    ids = {
        "unknown": UNKNOWN_ID,
        "own": seed.job_ids[0],
        "foreign": seed.foreign_job_id,
        "open": seed.project_id,
        "closed": seed.foreign_project_id,
    }
    for path, status, detail in (
        ("jobs/{unknown}", 404, "There is no job {unknown}."),
        ("jobs/{foreign}", 403, "You do not have access to job {foreign}."),
        ("jobs?project_id={unknown}", *NO_PROJECT),
        ("jobs?project_id={closed}", *CLOSED_PROJECT),
        ("projects/{unknown}/jobs", *NO_PROJECT),
        ("projects/{unknown}/jobs/{own}", *NO_PROJECT),
        ("projects/{closed}/jobs", *CLOSED_PROJECT),
        ("projects/{closed}/jobs/{own}", *CLOSED_PROJECT),
        ("projects/{closed}/jobs/{foreign}", *CLOSED_PROJECT),
        ("projects/{open}/jobs/{unknown}", 404, "There is no job {unknown}."),
        ("projects/{open}/jobs/{foreign}", *ELSEWHERE),
    ):
        url = f"/api/{path.format(**ids)}"
        response = client.get(url, headers=seed.auth_header)
        assert response.status_code == status, path
        assert response.json["errors"][0]["detail"] == detail.format(**ids)
