"""Compare the OpenAPI document with what the service does."""

import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import jsonschema_rs
import pytest
import schemathesis
from conftest import sqlite_only
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from werkzeug.serving import make_server

from schemas import query_params_schema

pytestmark = sqlite_only

OPEN_ROUTES = ("health_check", "show_openapi")

# These ids are fixed, so that each run sends the same requests except for the token.
UNKNOWN_ID, FOREIGN_PROJECT_ID, FOREIGN_JOB_ID = [str(UUID(int=n)) for n in range(3)]


@pytest.fixture
def document(app_without_tables):
    """The document as the service returns it."""
    return app_without_tables.test_client().get("/api/openapi.json").json


@pytest.fixture
def demo(run_flask):
    """The request headers of the demo user, whose project is in the database."""
    token = re.match("Token: (.+)", run_flask("demo"))[1]
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def url(app, caplog):
    """The URL of the service, which listens while the test runs."""
    caplog.set_level("ERROR", "werkzeug")
    server = make_server("127.0.0.1", 0, app)
    with server, ThreadPoolExecutor() as pool:
        pool.submit(server.serve_forever, poll_interval=0.01)
        yield f"http://127.0.0.1:{server.port}"
        server.shutdown()


@pytest.fixture
def explore(document, url, demo, new_state, import_state):
    """A function that returns the statuses that schemathesis gets from each operation.

    All checks of schemathesis are on, and the test fails if one of them does. The
    requests go over HTTP, because schemathesis 4.32 raises a TypeError when it checks
    for ignored tokens in process.
    """
    foreign = new_state(1, id=FOREIGN_PROJECT_ID)
    foreign["workflows"][0]["jobs"][0]["id"] = FOREIGN_JOB_ID
    import_state(foreign, "they@example.org")
    parameters = document["components"]["parameters"]
    project_id, job_id = [parameters[n]["example"] for n in ("project_id", "job_id")]
    values = {
        "project_id": [project_id.upper(), FOREIGN_PROJECT_ID, UNKNOWN_ID],
        "job_id": [job_id, FOREIGN_JOB_ID, UNKNOWN_ID],
        "If-None-Match": ["*"],
        "page": [2],
        "page_size": [1],
    }

    def run(headers, examples, scenarios):
        config = SchemathesisConfig.from_dict(
            {
                "base-url": url,
                "headers": headers,
                "generation": {
                    "max-examples": examples,
                    "deterministic": True,
                    "database": "none",
                },
                "phases": {"stateful": {"generation": {"max-examples": scenarios}}},
                "dictionaries": {name: {"values": values[name]} for name in values},
                "parameters": {
                    n: {"dictionary": n, "probability": 0.7} for n in values
                },
            }
        )
        # If schemathesis loaded the document by its URL, it would not test that route.
        schema = schemathesis.openapi.from_dict(document, config=config)
        statuses, failures = defaultdict(set), []
        for event in from_schema(schema).execute():
            if isinstance(event, events.NonFatalError | events.FatalError):
                failures.append(event)
            if not isinstance(event, events.ScenarioFinished):
                continue
            for case_id, sent in event.recorder.interactions.items():
                operation = event.recorder.cases[case_id].value.operation.definition.raw
                if sent.request.method == "GET":
                    statuses[operation["operationId"]].add(sent.response.status_code)
            for check in sum(event.recorder.checks.values(), []):
                if found := check.failure_info:
                    failures.append(f"{found.failure}\n{found.code_sample}")
        assert not failures, "\n\n".join(map(str, failures))
        return statuses

    return run


def documented(document):
    """Return the statuses of each operation in the document, except 500 and 503."""
    operations = [item["get"] for item in document["paths"].values()]
    return {
        get["operationId"]: {*map(int, get["responses"])} - {500, 503}
        for get in operations
    }


def test_members_get_every_documented_status(document, explore, demo):
    """Except 500 and 503, and the 400 of the open routes for a malformed host."""
    expected = documented(document) | dict.fromkeys(OPEN_ROUTES, {200})
    assert explore(demo, examples=20, scenarios=10) == expected


def test_requests_without_a_token_reach_only_the_open_routes(document, explore):
    expected = dict.fromkeys(documented(document), {401})
    expected |= dict.fromkeys(OPEN_ROUTES, {200})
    assert explore({}, examples=5, scenarios=1) == expected


@pytest.mark.parametrize(
    ("headers", "statuses"),
    [({"Host": "a/b"}, {400}), ({"Authorization": "Bearer x"}, {200, 503})],
    ids=["malformed host", "no tables"],
)
def test_failures_are_as_documented(app_without_tables, headers, statuses):
    schema = schemathesis.openapi.from_wsgi("/api/openapi.json", app_without_tables)
    ids = dict.fromkeys(("project_id", "job_id"), UNKNOWN_ID)
    reached = set()
    for path in schema:
        case = schema[path]["GET"].Case(path_parameters=ids)
        response = case.call(headers=headers)
        # This check is off because it rejects every 5xx, and the 503 is expected.
        case.validate_response(response, excluded_checks=[not_a_server_error])
        reached.add(response.status_code)
    assert reached == statuses


def test_internal_server_errors_are_as_documented(make_app, document):
    app = make_app()
    app.before_request(lambda: 1 / 0)
    schema = schemathesis.openapi.from_dict(document)
    ids = dict.fromkeys(("project_id", "job_id"), UNKNOWN_ID)
    for path in schema:
        case = schema[path]["GET"].Case(path_parameters=ids)
        # case.call() would raise the exception that the service turns into a 500.
        response = app.test_client().get(case.formatted_path)
        case.validate_response(response, excluded_checks=[not_a_server_error])
        assert response.status_code == 500


def test_document_is_valid(document):
    schemathesis.openapi.from_dict(document).validate()


def array_schemas(node):
    """Yield each schema in the node that is one of an array."""
    if isinstance(node, dict):
        if node.get("type") == "array":
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from array_schemas(child)


def test_every_array_has_items(document):
    """Generators of Python clients leave out a schema with an array without items."""
    arrays = list(array_schemas(document))
    assert arrays
    assert [schema for schema in arrays if "items" not in schema] == []


def test_document_has_the_routes_of_the_application(app, document):
    """Except those of the Swagger UI page, which are not part of the API."""
    described = {
        (path, method.upper(), operation["operationId"])
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    assert described == {
        (re.sub("<(.+?)>", r"{\1}", rule.rule), method, rule.endpoint.split(".")[-1])
        for rule in app.url_map.iter_rules()
        if not rule.endpoint.startswith("swagger_ui.")
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }


@pytest.mark.parametrize(("maximum", "default"), [(5, 5), (100, 10), (1000, 10)])
def test_document_has_the_configured_page_size(make_app, maximum, default):
    client = make_app(MAX_PAGE_SIZE=maximum).test_client()
    document = client.get("/api/openapi.json").json
    schema = document["components"]["parameters"]["page_size"]["schema"]
    assert (schema["maximum"], schema["default"]) == (maximum, default)


def examples(node):
    """Yield the schema and the example of each object in the node that has both."""
    if isinstance(node, dict):
        if "schema" in node and "example" in node:
            yield node["schema"], node["example"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from examples(child)


def test_examples_match_their_schemas(document):
    components = {"components": document["components"]}
    for schema, example in examples(document):
        jsonschema_rs.validate(components | schema, example, validate_formats=True)


def test_examples_are_real_responses(document, client, demo):
    described = document["components"]["responses"]
    contents = [described[name]["content"] for name in ("JobList", "Job")]
    documents = [content["application/json"]["example"] for content in contents]
    responses = [client.get(d["links"]["self"], headers=demo) for d in documents]
    assert [response.json for response in responses] == documents
    link = document["components"]["headers"]["Link"]["example"]
    assert responses[0].headers["Link"] == link


def at(document, reference):
    """Return what the JSON pointer after the # refers to in the document."""
    for key in reference.partition("#/")[2].split("/"):
        document = document[int(key) if isinstance(document, list) else key]
    return document


def parameters(document, path):
    """Return the parameters of the operation at the path, by location and name."""
    found = {"path": {}, "query": {}, "header": {}}
    for parameter in document["paths"][path]["get"].get("parameters", ()):
        if "$ref" in parameter:
            parameter = at(document, parameter["$ref"])
        found[parameter["in"]][parameter["name"]] = parameter
    return found


def example_values(parameters):
    """Return the example or else the default of each parameter that has one."""
    values = {
        name: parameter.get("example", parameter["schema"].get("default"))
        for name, parameter in parameters.items()
    }
    return {name: value for name, value in values.items() if value is not None}


def test_examples_and_defaults_of_parameters_show_the_demo(document, client, demo):
    """So the Swagger UI page, which fills them in, has responses to show."""
    responses = {}
    for path in document["paths"]:
        given = {k: example_values(v) for k, v in parameters(document, path).items()}
        responses[path] = client.get(
            path.format(**given["path"]),
            query_string=given["query"],
            headers=demo | given["header"],
        )
    assert {path: response.status_code for path, response in responses.items()} == (
        dict.fromkeys(document["paths"], 200)
    )
    assert len(responses["/api/jobs"].json["data"]) == 3


def test_views_accept_exactly_the_query_parameters_that_are_described(
    document, client, demo
):
    """A view rejects what it does not accept as it rejects an unknown name."""
    every_name = {*query_params_schema(100, only=None).fields}
    for path in document["paths"]:
        described = parameters(document, path)
        url = path.format(**example_values(described["path"]))

        def text(name, url=url):
            return client.get(url, query_string={name: ""}, headers=demo).text

        rejection = text("no-such-name")
        accepted = {
            name
            for name in every_name | {*described["query"]}
            if text(name) != rejection.replace("no-such-name", name)
        }
        assert (path, accepted) == (path, {*described["query"]})


def test_links_lead_to_responses(document, client, seed):
    paths = {item["get"]["operationId"]: p for p, item in document["paths"].items()}
    responses = document["components"]["responses"]
    for name, path in ("JobList", "/api/jobs"), ("Job", f"/api/jobs/{seed.job_ids[0]}"):
        response = client.get(path, headers=seed.auth_header).json
        for link in responses[name]["links"].values():
            ids = {n: at(response, value) for n, value in link["parameters"].items()}
            linked = paths[link["operationId"]].format(**ids)
            assert client.get(linked, headers=seed.auth_header).status_code == 200
