import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import jsonschema_rs
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from werkzeug.serving import make_server

OPEN_ROUTES = ("health_check", "show_openapi")


@pytest.fixture
def document(empty_app):
    """The document as the service gives it."""
    return empty_app.test_client().get("/api/openapi.json").json


@pytest.fixture
def url(app, caplog):
    """Where the service listens while a test runs."""
    caplog.set_level("ERROR", "werkzeug")
    server = make_server("127.0.0.1", 0, app, threaded=True)
    with server, ThreadPoolExecutor() as pool:
        pool.submit(server.serve_forever)
        yield f"http://127.0.0.1:{server.port}"
        server.shutdown()


@pytest.fixture
def explore(document, url, seed):
    """A function that gives the statuses by operation that schemathesis reaches.

    All its checks are on, in all its phases, and what fails one fails the test. Over
    HTTP, since in process its check of ignored tokens raises a TypeError (4.32).
    """
    values = {
        "project_id": [seed.project_id.upper(), seed.foreign_project_id],
        "job_id": [*seed.job_ids, seed.foreign_job_id],
        "If-None-Match": ["*"],
        "page": [2],
        "page_size": [1],
    }
    settings = {
        "base-url": url,
        "generation": {"max-examples": 50, "deterministic": True, "database": "none"},
        "dictionaries": {name: {"values": values[name]} for name in values},
        "parameters": {n: {"dictionary": n, "probability": 0.6} for n in values},
    }

    def run(headers):
        config = SchemathesisConfig.from_dict(settings | {"headers": headers})
        # Not loaded from its URL, or schemathesis would pass over that route.
        schema = schemathesis.openapi.from_dict(document, config=config)
        statuses, faults = defaultdict(set), []
        for event in from_schema(schema).execute():
            if isinstance(event, events.NonFatalError | events.FatalError):
                faults.append(event)
            if not isinstance(event, events.ScenarioFinished):
                continue
            for case_id, sent in event.recorder.interactions.items():
                operation = event.recorder.cases[case_id].value.operation.definition.raw
                if sent.request.method == "GET":
                    statuses[operation["operationId"]].add(sent.response.status_code)
            for check in sum(event.recorder.checks.values(), []):
                if found := check.failure_info:
                    faults.append(f"{found.failure}\n{found.code_sample}")
        assert not faults, "\n\n".join(map(str, faults))
        return statuses

    return run


def documented(document):
    """The statuses of each operation in the document."""
    operations = [item["get"] for item in document["paths"].values()]
    return {get["operationId"]: {*map(int, get["responses"])} for get in operations}


def test_members_get_every_answer_that_is_documented(document, explore, seed):
    """But those that the test of failures provokes."""
    expected = {name: codes - {503} for name, codes in documented(document).items()}
    assert explore(seed.bearer) == expected | dict.fromkeys(OPEN_ROUTES, {200})


def test_strangers_get_the_open_routes_alone(document, explore):
    expected = dict.fromkeys(documented(document), {401})
    assert explore({}) == expected | dict.fromkeys(OPEN_ROUTES, {200})


@pytest.mark.parametrize(
    ("headers", "statuses"),
    [({"Host": "a/b"}, {400}), ({"Authorization": "Bearer x"}, {200, 503})],
    ids=["malformed host", "no tables"],
)
def test_failures_are_as_documented(empty_app, headers, statuses):
    schema = schemathesis.openapi.from_wsgi("/api/openapi.json", empty_app)
    ids = dict.fromkeys(("project_id", "job_id"), str(uuid4()))
    reached = set()
    for path in schema:
        case = schema[path]["GET"].Case(path_parameters=ids)
        response = case.call(headers=headers)
        # The one that is off takes every 503 for a fault.
        case.validate_response(response, excluded_checks=[not_a_server_error])
        reached.add(response.status_code)
    assert reached == statuses


def test_document_is_valid(document):
    schemathesis.openapi.from_dict(document).validate()


def test_document_has_the_routes_of_the_application(app, document):
    described = {
        (path, method.upper(), operation["operationId"])
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    assert described == {
        (re.sub("<(.+?)>", r"{\1}", rule.rule), method, rule.endpoint.split(".")[-1])
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }


@pytest.mark.parametrize(("maximum", "default"), [(5, 5), (100, 10), (1000, 10)])
def test_document_has_the_configured_page_size(make_app, maximum, default):
    client = make_app(MAX_PAGE_SIZE=maximum).test_client()
    document = client.get("/api/openapi.json").json
    schema = document["components"]["parameters"]["page_size"]["schema"]
    assert (schema["maximum"], schema["default"]) == (maximum, default)


def examples(node):
    """The schema and the example of whatever in the node has both."""
    if isinstance(node, dict):
        if "schema" in node and "example" in node:
            yield node["schema"], node["example"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from examples(child)


def test_examples_are_of_their_schema(document):
    components = {"components": document["components"]}
    for schema, example in examples(document):
        jsonschema_rs.validate(components | schema, example, validate_formats=True)


def test_examples_are_what_the_service_answers(document, client, import_state, bearer):
    responses = document["components"]["responses"]
    contents = [responses[name]["content"] for name in ("JobList", "Job")]
    page, one = [content["application/json"]["example"] for content in contents]
    resources = [one["data"], *one["included"]]
    job, workflow, project = [{"id": r["id"]} | r["attributes"] for r in resources]
    before, after = [{"id": str(uuid4()), "name": n, "body": ""} for n in ("A", "B")]
    workflow["jobs"] = [before | {"inserted_at": "2023-01-01T00:00:00Z"}, job, after]
    import_state(project | {"workflows": [workflow]}, "you@example.org")
    headers = bearer("you@example.org")
    urls = [example["links"]["self"] for example in (page, one)]
    assert [client.get(url, headers=headers).json for url in urls] == [page, one]
