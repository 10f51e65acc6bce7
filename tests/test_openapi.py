"""The OpenAPI document, held against the service."""

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

pytestmark = sqlite_only

OPEN_ROUTES = ("health_check", "show_openapi")

# Fixed, as the demo's ids are: each run sends the same requests, but for the token.
UNKNOWN_ID, FOREIGN_PROJECT_ID, FOREIGN_JOB_ID = [str(UUID(int=n)) for n in range(3)]


@pytest.fixture
def document(app_without_tables):
    """The document as the service gives it."""
    return app_without_tables.test_client().get("/api/openapi.json").json


@pytest.fixture
def demo(run_flask):
    """The credentials of the demo's user, with the demo's data in the database."""
    token = re.match("Token: (.+)", run_flask("demo"))[1]
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def url(app, caplog):
    """Where the service listens while a test runs."""
    caplog.set_level("ERROR", "werkzeug")
    server = make_server("127.0.0.1", 0, app)
    with server, ThreadPoolExecutor() as pool:
        pool.submit(server.serve_forever, poll_interval=0.01)
        yield f"http://127.0.0.1:{server.port}"
        server.shutdown()


@pytest.fixture
def explore(document, url, demo, new_state, import_state):
    """A function that gives the statuses by operation that schemathesis reaches.

    All its checks are on, and what fails one fails the test. Over HTTP, since in
    process its check of ignored tokens raises a TypeError (4.32).
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
    """The statuses of each operation in the document, but those of failures."""
    operations = [item["get"] for item in document["paths"].values()]
    return {
        get["operationId"]: {*map(int, get["responses"])} - {500, 503}
        for get in operations
    }


def test_members_get_every_answer_that_is_documented(document, explore, demo):
    """But failures, and what a malformed host gets."""
    expected = documented(document) | dict.fromkeys(OPEN_ROUTES, {200})
    assert explore(demo, examples=20, scenarios=10) == expected


def test_strangers_get_the_open_routes_alone(document, explore):
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
        # The one that is off takes every 503 for a fault.
        case.validate_response(response, excluded_checks=[not_a_server_error])
        reached.add(response.status_code)
    assert reached == statuses


def test_faults_of_the_service_are_as_documented(make_app, document):
    app = make_app()
    app.before_request(lambda: 1 / 0)
    schema = schemathesis.openapi.from_dict(document)
    ids = dict.fromkeys(("project_id", "job_id"), UNKNOWN_ID)
    for path in schema:
        case = schema[path]["GET"].Case(path_parameters=ids)
        # Not by case.call(), which raises what the service catches.
        response = app.test_client().get(case.formatted_path)
        case.validate_response(response, excluded_checks=[not_a_server_error])
        assert response.status_code == 500


def test_document_is_valid(document):
    schemathesis.openapi.from_dict(document).validate()


def test_document_has_the_routes_of_the_application(app, document):
    """But the page for people, which is no operation."""
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


def test_examples_are_what_the_service_answers(document, client, demo):
    responses = document["components"]["responses"]
    contents = [responses[name]["content"] for name in ("JobList", "Job")]
    documents = [content["application/json"]["example"] for content in contents]
    answers = [client.get(d["links"]["self"], headers=demo) for d in documents]
    assert [answer.json for answer in answers] == documents
    link = document["components"]["headers"]["Link"]["example"]
    assert answers[0].headers["Link"] == link


def at(document, reference):
    """What a JSON pointer behind a # names in the document."""
    for key in reference.partition("#/")[2].split("/"):
        document = document[int(key) if isinstance(document, list) else key]
    return document


def test_examples_and_defaults_of_parameters_show_the_demo(document, client, demo):
    """So a page for people that fills them in has answers to show."""
    answers = {}
    for path, item in document["paths"].items():
        given = {"path": {}, "query": {}, "header": {}}
        for parameter in item["get"].get("parameters", ()):
            if "$ref" in parameter:
                parameter = at(document, parameter["$ref"])
            value = parameter.get("example", parameter["schema"].get("default"))
            if value is not None:
                given[parameter["in"]][parameter["name"]] = value
        answers[path] = client.get(
            path.format(**given["path"]),
            query_string=given["query"],
            headers=demo | given["header"],
        )
    assert {path: answer.status_code for path, answer in answers.items()} == (
        dict.fromkeys(document["paths"], 200)
    )
    assert len(answers["/api/jobs"].json["data"]) == 3


def test_links_lead_to_answers(document, client, seed):
    paths = {item["get"]["operationId"]: p for p, item in document["paths"].items()}
    responses = document["components"]["responses"]
    for name, path in ("JobList", "/api/jobs"), ("Job", f"/api/jobs/{seed.job_ids[0]}"):
        answer = client.get(path, headers=seed.auth_header).json
        for link in responses[name]["links"].values():
            ids = {n: at(answer, value) for n, value in link["parameters"].items()}
            linked = paths[link["operationId"]].format(**ids)
            assert client.get(linked, headers=seed.auth_header).status_code == 200
