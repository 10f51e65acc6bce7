"""Compare the OpenAPI document with what the service does."""

import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import jsonschema_rs
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from werkzeug.serving import make_server

from schemas import QueryParamsSchema

pytestmark = pytest.mark.sqlite

# These ids are fixed, so that each run sends the same requests except for the token.
UNKNOWN_ID, FOREIGN_PROJECT_ID, FOREIGN_JOB_ID = [str(UUID(int=n)) for n in range(3)]


def objects_with(key, node):
    """Yield each object in a part of the document that has a key."""
    if isinstance(node, dict):
        if key in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from objects_with(key, child)


@pytest.fixture
def document(client):
    """The document as the service returns it."""
    return client.get("/api/openapi.json").json


@pytest.fixture
def closed_document(document):
    """The document, by which a response with an undocumented field is wrong."""
    for schema in objects_with("properties", document):
        schema["additionalProperties"] = False
    return document


@pytest.fixture
def demo(run_flask):
    """The request headers of the demo user, whose project is in the database."""
    return {"Authorization": f"Bearer {run_flask('demo').split()[1]}"}


@pytest.fixture
def url(app, caplog):
    """The URL of the service, which listens while the test runs."""
    caplog.set_level("ERROR", "werkzeug")
    server = make_server("127.0.0.1", 0, app)
    with server, ThreadPoolExecutor() as pool:
        pool.submit(server.serve_forever, poll_interval=0.01)
        yield f"http://127.0.0.1:{server.port}"
        server.shutdown()


def explore(document, **config):
    """Return the statuses that each operation returns, if all checks pass.

    The requests go over HTTP, because schemathesis 4.32 raises a TypeError when it
    checks for ignored tokens in process.
    """
    # If schemathesis loaded the document by its URL, it would not test that route.
    config = SchemathesisConfig.from_dict(config)
    schema = schemathesis.openapi.from_dict(document, config=config)
    statuses, failures = defaultdict(set), []
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            failures.append(event)
        if isinstance(event, events.ScenarioFinished):
            for case_id, sent in event.recorder.interactions.items():
                operation = event.recorder.cases[case_id].value.operation.definition.raw
                if sent.request.method == "GET":
                    statuses[operation["operationId"]].add(sent.response.status_code)
            for check in sum(event.recorder.checks.values(), []):
                if found := check.failure_info:
                    failures.append(f"{found.failure}\n{found.code_sample}")
    assert not failures, "\n\n".join(map(str, failures))
    return statuses


def test_every_status_is_as_documented(
    closed_document, url, demo, new_state, import_state
):
    """Except 500, 503 and the 400 of open routes, which need a failure."""
    foreign = new_state(1, id=FOREIGN_PROJECT_ID)
    foreign["workflows"][0]["jobs"][0]["id"] = FOREIGN_JOB_ID
    import_state(foreign, "they@example.org")
    parameters = closed_document["components"]["parameters"]
    project_id, job_id = [parameters[n]["example"] for n in ("project_id", "job_id")]
    values = {
        "project_id": [project_id.upper(), FOREIGN_PROJECT_ID, UNKNOWN_ID],
        "job_id": [job_id, FOREIGN_JOB_ID, UNKNOWN_ID],
        "If-None-Match": ["*"],
        "page": [2],
        "page_size": [1],
    }
    statuses = explore(
        closed_document,
        **{"base-url": url, "headers": demo},
        generation={"max-examples": 5, "deterministic": True, "database": "none"},
        dictionaries={name: {"values": values[name]} for name in values},
        parameters={n: {"dictionary": n, "probability": 0.7} for n in values},
    )
    gets = [item["get"] for item in closed_document["paths"].values()]
    found = {get["operationId"]: {*map(int, get["responses"])} for get in gets}
    expected = {name: documented - {500, 503} for name, documented in found.items()}
    assert statuses == expected | {"health_check": {200}, "show_openapi": {200}}


def test_failures_are_as_documented(make_app, closed_document, execute):
    """Except for the health check, an untrusted host is a 400; a bug is a 500."""
    schema = schemathesis.openapi.from_dict(closed_document)
    ids = dict.fromkeys(("project_id", "job_id"), UNKNOWN_ID)

    def reached(app, headers):
        for path in schema:
            case = schema[path]["GET"].Case(path_parameters=ids)
            response = app.test_client().get(case.formatted_path, headers=headers)
            # This check is off because it rejects every 5xx, which is expected here.
            case.validate_response(response, excluded_checks=[not_a_server_error])
            yield response.status_code

    execute("DROP TABLE users")
    app, app_with_bug = make_app(TRUSTED_HOSTS="jobs.example"), make_app()
    app_with_bug.before_request(lambda: 1 / 0)
    assert {*reached(app, {})} == {400, 503}
    headers = {"Host": "jobs.example", "Authorization": "Bearer x"}
    assert {*reached(app, headers)} == {200, 503}
    assert {*reached(app_with_bug, {})} == {500}


def test_document_is_valid_and_fit_for_generators_of_clients(document):
    """They leave out arrays without items; clients must not reject more fields."""
    schemathesis.openapi.from_dict(document).validate()
    typed = objects_with("type", document)
    arrays = [schema for schema in typed if schema["type"] == "array"]
    assert len(arrays) > 3 and all("items" in schema for schema in arrays)
    assert [*objects_with("additionalProperties", document)] == []


def test_document_has_the_routes_of_the_application(app, document):
    """Except those of the Swagger UI page, which are not part of the API."""
    assert {
        (re.sub("{(.+?)}", r"<\1>", path), method, operation["operationId"])
        for path, item in document["paths"].items()
        for method, operation in item.items()
    } == {
        (rule.rule, method.lower(), rule.endpoint.removeprefix("jobs."))
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if not rule.endpoint.startswith("swagger_ui.")
    }


@pytest.mark.parametrize(("maximum", "default"), [(2, 2), (1000, 10)])
def test_document_has_the_prefix_and_the_limits(make_app, seed, maximum, default):
    client = make_app(MAX_PAGE_SIZE=maximum).test_client()
    document = client.get("/api/openapi.json", "http://localhost/p").json
    assert document["servers"][0]["url"] == "/p"
    limits = document["components"]["parameters"]["page_size"]["schema"]
    assert (limits["maximum"], limits["default"]) == (maximum, default)
    page = client.get("/api/jobs", headers=seed.auth_header).json
    assert page["meta"]["page_size"] == default
    for size, status in (maximum, 200), (maximum + 1, 400):
        url = f"/api/jobs?page_size={size}"
        assert client.get(url, headers=seed.auth_header).status_code == status


def test_examples_match_their_schemas(closed_document):
    components = {"components": closed_document["components"]}
    for described in objects_with("example", closed_document):
        schema = components | described["schema"]
        jsonschema_rs.validate(schema, described["example"], validate_formats=True)


def test_parameters_are_those_of_the_routes(document, client, demo):
    """Their examples and defaults show the demo, for the page with Swagger UI."""
    shared = document["components"]["parameters"]
    for path, operation in document["paths"].items():
        given = {"path": {}, "query": {}, "header": {}}
        for item in operation["get"].get("parameters", ()):
            item = shared.get(item.get("$ref", "").rpartition("/")[2], item)
            default = item["schema"].get("default")
            given[item["in"]][item["name"]] = item.get("example", default)
        url = path.format(**given["path"])
        query = {name: value for name, value in given["query"].items() if value}
        assert client.get(url, query_string=query, headers=demo).status_code == 200
        if "parameters" in operation["get"]:
            for name in {*given["query"], *QueryParamsSchema().fields}:
                text = client.get(url, query_string={name: "x"}, headers=demo).text
                assert ("not a query parameter" in text) == (name not in given["query"])
