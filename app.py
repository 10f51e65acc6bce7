"""The application: its factory, its routes, its errors."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from flask import Blueprint, Flask, Response, abort, current_app, g, request, url_for
from marshmallow import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import BadRequest, HTTPException, NotFound, ServiceUnavailable
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.sansio.utils import host_is_trusted

import schemas
from auth import require_access, require_job, token_required
from cli import commands
from config import load_config
from database import describe_error, init_database, is_unavailable, read_connection
from models import check_queries, paginate
from swagger_ui import swagger_ui

jobs = Blueprint("jobs", __name__)


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """The service: configured by ``config`` in a test, else by the environment."""
    app = Flask(__name__, static_folder=None)
    app.config.update(load_config(config))
    # Flask checks TRUSTED_HOSTS on every path; ours spares the health check.
    app.config["KNOWN_HOSTS"] = app.config["TRUSTED_HOSTS"]
    app.config["TRUSTED_HOSTS"] = None
    app.logger.addFilter(escape_control_characters)
    init_database(app)
    apply_proxy_fix(app)
    # Both answer with redirects, unless they are off before the first rule.
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.register_blueprint(jobs)
    app.register_blueprint(swagger_ui)
    app.register_blueprint(commands)
    app.register_error_handler(HTTPException, handle_http_exception)
    app.register_error_handler(ValidationError, handle_validation_error)
    app.register_error_handler(SQLAlchemyError, handle_database_error)
    return app


def escape_control_characters(record: logging.LogRecord) -> bool:
    """Keep a path from looking like a line of the log: Flask logs it decoded."""
    record.msg = record.msg.encode("unicode_escape").decode()
    return True


def apply_proxy_fix(app: Flask) -> None:
    """Take what TRUSTED_PROXIES proxies forward for the caller's address and ours."""
    if count := app.config["TRUSTED_PROXIES"]:
        proxy_fix = ProxyFix(app.wsgi_app, x_for=count, x_proto=count, x_host=count)
        app.wsgi_app = proxy_fix  # type: ignore[method-assign]  # as Flask has it


@jobs.before_app_request
def check_host() -> None:
    """Refuse what links could not repeat: no host (400), no such scheme, ``//`` (404).

    Werkzeug gives an empty host for a malformed one, and overlooks slashes that are
    doubled at the start of a path. The health check repeats no host.
    """
    if request.environ["PATH_INFO"].startswith("//"):
        abort(404)
    if not request.host or request.scheme not in ("http", "https"):
        abort(400, "The Host header, or what the proxy forwards for it, is malformed.")
    known = current_app.config["KNOWN_HOSTS"]
    if known and request.endpoint != "jobs.health_check":
        # Names of hosts have no case, and may end in a dot (RFC 3986, 3.2.2).
        name = request.host.lower().replace(".:", ":").removesuffix(".")
        if not host_is_trusted(name, known):
            abort(400, "The Host header, or what the proxy forwards, is refused.")


@jobs.after_app_request
def add_headers(response: Response) -> Response:
    """Forbid sniffing, and keeping whatever does not say how long it is good for."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


@jobs.get("/health_check")
def health_check() -> dict[str, str]:
    """Whether a table can be read: 200, or 503."""
    with read_connection() as connection:
        check_queries(connection)
    return {"status": "ok"}


@jobs.get("/api/openapi.json")
def show_openapi() -> Response:
    """The OpenAPI document, with the configured limits and the prefix of its paths."""
    text = Path(current_app.root_path, "openapi.json").read_bytes()
    document = orjson.loads(text)
    document["servers"][0]["url"] = request.root_path or "/"
    schema = document["components"]["parameters"]["page_size"]["schema"]
    schema["maximum"] = current_app.config["MAX_PAGE_SIZE"]
    schema["default"] = min(schemas.DEFAULT_PAGE_SIZE, schema["maximum"])
    return json_response(document)


@jobs.get("/api/jobs")
@token_required
def list_jobs() -> Response:
    """One page of the jobs that the caller can access, or of one project's."""
    arguments = load_query_params("page", "page_size", "project_id")
    return list_response(arguments, arguments.get("project_id"))


@jobs.get("/api/projects/<project_id>/jobs")
@token_required
def list_project_jobs(project_id: str) -> Response:
    """One page of a project's jobs."""
    project_id = parse_id(project_id)
    url = url_for("jobs.list_project_jobs", project_id=project_id, _external=True)
    return list_response(load_query_params("page", "page_size"), project_id, url)


@jobs.get("/api/jobs/<job_id>")
@jobs.get("/api/projects/<project_id>/jobs/<job_id>", endpoint="show_project_job")
@token_required
def show_job(job_id: str, project_id: str | None = None) -> Response:
    """One job with its body, if it is in the project, where the path names one."""
    job_id, project_id = parse_id(job_id), project_id and parse_id(project_id)
    load_query_params()
    return conditional_response(
        schemas.job_document(require_job(job_id, project_id), jobs_url())
    )


def parse_id(text: str) -> str:
    """An id from the path in lower case, or the answer 400."""
    if not schemas.is_id(text):
        abort(400, f"{text} is not a UUID.")
    return text.lower()


def load_query_params(*names: str) -> dict[str, Any]:
    """The arguments of the request, with defaults; 400 for any that is not named."""
    schema = schemas.query_params_schema(
        current_app.config["MAX_PAGE_SIZE"], only=names
    )
    return schemas.validate_query_params(schema, request.args)


def jobs_url() -> str:
    """The absolute URL of the list of all jobs, below which each job has its own."""
    return url_for("jobs.list_jobs", _external=True)


def list_response(
    arguments: dict[str, Any], project_id: str | None, url: str | None = None
) -> Response:
    """The page of a list that the arguments ask for, with the links to the others.

    The list is at ``url``, or at that of all jobs.
    """
    number, size, root = arguments["page"], arguments["page_size"], jobs_url()
    rows, total, access = paginate(g.connection, g.user_id, project_id, number, size)
    require_access(project_id, access)
    meta = schemas.list_meta(number, size, total)
    given = {name: arguments[name] for name in arguments if name in request.args}
    links = schemas.list_links(url or root, given, number, meta["total_pages"])
    response = conditional_response(schemas.list_document(rows, root, links, meta))
    response.headers["Link"] = schemas.link_header(links)
    return response


def conditional_response(document: dict[str, Any]) -> Response:
    """The document as JSON, or a 304 for ``If-None-Match`` (RFC 9110)."""
    response = json_response(document)
    response.headers["Cache-Control"] = "private, no-cache"
    response.headers["Vary"] = "Authorization"
    response.add_etag()
    etag, _ = response.get_etag()
    if etag and request.if_none_match.contains_weak(etag):
        response.status_code = 304
    return response


def json_response(document: dict[str, Any]) -> Response:
    """A 200 with the document."""
    return Response(orjson.dumps(document), mimetype="application/json")


def handle_http_exception(error: HTTPException) -> Response:
    """The error as JSON; its status and its headers stay its own."""
    detail = error.description
    # Our own 404s say what there is not; this one is the router's.
    if detail == NotFound.description:
        detail = "There is no such path: see /api/docs for those that there are."
    return error_response(error, [{"detail": detail}])


def handle_validation_error(error: ValidationError) -> Response:
    """A 400 with an error object for each argument at fault."""
    faults = [
        {"detail": f"{name} {message}", "source": {"parameter": name}}
        for name, [message] in sorted(error.messages_dict.items())
    ]
    return error_response(BadRequest(), faults)


def handle_database_error(error: SQLAlchemyError) -> Response:
    """A 503 and a line in the log where asking again may help, else a fault of ours."""
    if not is_unavailable(error) and request.endpoint != "jobs.health_check":
        raise error
    current_app.logger.error("The database cannot be read: %s", describe_error(error))
    unavailable = "The database cannot be read now."
    return handle_http_exception(ServiceUnavailable(unavailable, retry_after=5))


def error_response(error: HTTPException, faults: list[dict[str, Any]]) -> Response:
    """JSON:API's error objects, and the reason phrase where the original has it."""
    common = {"status": str(error.code), "title": error.name}
    document = {"error": error.name, "errors": [common | fault for fault in faults]}
    headers = error.get_headers()
    return Response(orjson.dumps(document), error.code, headers, "application/json")
