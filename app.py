"""The application factory, the routes, and the error handlers."""

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
    """Create the application, configured by ``config`` or else by the environment."""
    app = Flask(__name__, static_folder=None)
    app.config.update(load_config(config))
    # Flask would check TRUSTED_HOSTS on every path, also on that of the health check.
    app.config.update(KNOWN_HOSTS=app.config["TRUSTED_HOSTS"], TRUSTED_HOSTS=None)
    app.logger.addFilter(escape_control_characters)
    init_database(app)
    apply_proxy_fix(app)
    # Werkzeug would redirect paths with other slashes. Only rules that are added later
    # follow these settings.
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
    """Escape control characters: Flask logs decoded paths, which could forge lines."""
    record.msg = record.msg.encode("unicode_escape").decode()
    return True


def apply_proxy_fix(app: Flask) -> None:
    """Trust the X-Forwarded headers of as many proxies as TRUSTED_PROXIES says."""
    if count := app.config["TRUSTED_PROXIES"]:
        proxy_fix = ProxyFix(app.wsgi_app, x_for=count, x_proto=count, x_host=count)
        app.wsgi_app = proxy_fix  # type: ignore[method-assign]  # as Flask documents it


@jobs.before_app_request
def check_host() -> None:
    """Abort if the host is malformed or untrusted, because links repeat it."""
    # Werkzeug would route //api/jobs like /api/jobs.
    if request.environ["PATH_INFO"].startswith("//"):
        abort(404)
    # Werkzeug returns an empty host if the header is malformed.
    if not request.host or request.scheme not in ("http", "https"):
        abort(400, "The Host header, or what a proxy forwards for it, is malformed.")
    known_hosts = current_app.config["KNOWN_HOSTS"]
    # Load balancers request the health check by address, and it has no links.
    if known_hosts and request.endpoint != "jobs.health_check":
        # Host names are case-insensitive and may end in a dot (RFC 3986, 3.2.2).
        name = request.host.lower().replace(".:", ":").removesuffix(".")
        if not host_is_trusted(name, known_hosts):
            current_app.logger.warning("Host %s is not in TRUSTED_HOSTS.", request.host)
            abort(400, f"The host {request.host} is not in TRUSTED_HOSTS.")


@jobs.after_app_request
def add_headers(response: Response) -> Response:
    """Forbid content sniffing, and caching unless the response says otherwise."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


@jobs.get("/health_check")
def health_check() -> dict[str, str]:
    """Return 200 if the queries of the other routes can be run, otherwise 503."""
    with read_connection() as connection:
        check_queries(connection)
    return {"status": "ok"}


@jobs.get("/api/openapi.json")
def show_openapi() -> Response:
    """Return the OpenAPI document with the configured limits and path prefix."""
    document = orjson.loads(Path(current_app.root_path, "openapi.json").read_bytes())
    document["servers"][0]["url"] = request.root_path or "/"
    schema = document["components"]["parameters"]["page_size"]["schema"]
    schema["maximum"] = current_app.config["MAX_PAGE_SIZE"]
    schema["default"] = min(schemas.DEFAULT_PAGE_SIZE, schema["maximum"])
    return json_response(document)


@jobs.get("/api/jobs")
@token_required
def list_jobs() -> Response:
    """Return a page of the jobs that the caller can access, or of one project's."""
    params = load_query_params("page", "page_size", "project_id")
    return list_response(params, params.get("project_id"))


@jobs.get("/api/projects/<project_id>/jobs")
@token_required
def list_project_jobs(project_id: str) -> Response:
    """Return a page of a project's jobs."""
    project_id = parse_id(project_id)
    url = url_for("jobs.list_project_jobs", project_id=project_id, _external=True)
    return list_response(load_query_params("page", "page_size"), project_id, url)


@jobs.get("/api/jobs/<job_id>")
@jobs.get("/api/projects/<project_id>/jobs/<job_id>", endpoint="show_project_job")
@token_required
def show_job(job_id: str, project_id: str | None = None) -> Response:
    """Return a job with its body; if the path names a project, the job is in it."""
    job_id, project_id = parse_id(job_id), project_id and parse_id(project_id)
    load_query_params()
    document = schemas.job_document(require_job(job_id, project_id), jobs_url())
    return conditional_response(document)


def parse_id(text: str) -> str:
    """Return an id from the path in lower case, or abort with 400."""
    if not schemas.is_id(text):
        abort(400, f"{text} is not a UUID.")
    return text.lower()


def load_query_params(*names: str) -> dict[str, Any]:
    """Return the named query parameters with defaults; any other one is a 400."""
    schema = schemas.query_params_schema(current_app.config["MAX_PAGE_SIZE"], names)
    return schemas.validate_query_params(schema, request.args)


def jobs_url() -> str:
    """Return the absolute URL of the list of all jobs."""
    return url_for("jobs.list_jobs", _external=True)


def list_response(
    params: dict[str, Any], project_id: str | None, url: str | None = None
) -> Response:
    """Return a page of the list at ``url``, or of all jobs, with links to others."""
    number, size, root = params["page"], params["page_size"], jobs_url()
    rows, total, access = paginate(g.connection, g.user_id, project_id, number, size)
    require_access(project_id, access)
    meta = schemas.list_meta(number, size, total)
    given = {name: value for name, value in params.items() if name in request.args}
    links = schemas.list_links(url or root, given, number, meta["total_pages"])
    response = conditional_response(schemas.list_document(rows, root, links, meta))
    response.headers["Link"] = schemas.link_header(links)
    return response


def conditional_response(document: dict[str, Any]) -> Response:
    """Return the document as JSON, or 304 if ``If-None-Match`` has its ETag."""
    response = json_response(document)
    response.headers["Cache-Control"] = "private, no-cache"
    response.headers["Vary"] = "Authorization"
    response.add_etag()
    etag, _ = response.get_etag()
    if etag and request.if_none_match.contains_weak(etag):
        response.status_code = 304
    return response


def json_response(document: dict[str, Any]) -> Response:
    """Return a 200 with the document as JSON."""
    return Response(orjson.dumps(document), mimetype="application/json")


def handle_http_exception(error: HTTPException) -> Response:
    """Return the error as JSON, with its own status and headers."""
    detail = error.description
    # NotFound has this text if no route or file has the path.
    if detail == NotFound.description:
        detail = f"There is no such path. See {url_for('swagger_ui.show_page')}."
    return error_response(error, [{"detail": detail}])


def handle_validation_error(error: ValidationError) -> Response:
    """Return a 400 with an error object for each query parameter that is wrong."""
    errors = [
        {"detail": f"{name} {message}", "source": {"parameter": name}}
        for name, [message] in sorted(error.messages_dict.items())
    ]
    return error_response(BadRequest(), errors)


def handle_database_error(error: SQLAlchemyError) -> Response:
    """Return a 503 and log one line if the database is unavailable."""
    # Other errors are bugs, which Flask logs with a traceback and returns as a 500. The
    # health check is a 503 for each error, so that it shows a missing column, too.
    if not is_unavailable(error) and request.endpoint != "jobs.health_check":
        raise error
    current_app.logger.error("The database cannot be read: %s", describe_error(error))
    return handle_http_exception(
        ServiceUnavailable("The database cannot be read now.", retry_after=5)
    )


def error_response(error: HTTPException, errors: list[dict[str, Any]]) -> Response:
    """Return JSON:API error objects, with the reason phrase as ``error``."""
    common = {"status": str(error.code), "title": error.name}
    document = {"error": error.name, "errors": [common | item for item in errors]}
    headers = error.get_headers()
    return Response(orjson.dumps(document), error.code, headers, "application/json")
