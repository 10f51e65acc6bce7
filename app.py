"""The application factory, the routes, and the error handlers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from flask import Blueprint, Flask, Response, abort, current_app, g, request, url_for
from flask_swagger_ui import get_swaggerui_blueprint  # type: ignore[import-untyped]
from marshmallow import ValidationError
from sqlalchemy import exc
from werkzeug.exceptions import BadRequest, HTTPException, ServiceUnavailable
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.sansio.utils import host_is_trusted

import schemas
from auth import require_access, require_job, token_required
from cli import commands
from config import load_config
from database import describe_error, init_database, read_connection
from models import check_queries, paginate

jobs = Blueprint("jobs", __name__)


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Create the application, configured by ``config`` or else by the environment."""
    app = Flask(__name__, static_folder=None)
    app.config.update(load_config(config))
    init_database(app)
    proxies = app.config["TRUSTED_PROXIES"]
    app.wsgi_app = ProxyFix(  # type: ignore[method-assign]  # as Flask documents it
        app.wsgi_app, x_for=proxies, x_proto=proxies, x_host=proxies
    )
    # Werkzeug would redirect paths with other slashes. Only rules that are added later
    # follow these settings.
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.register_blueprint(jobs)
    register_swagger_ui(app)
    app.register_blueprint(commands)
    app.register_error_handler(HTTPException, handle_http_exception)
    app.register_error_handler(ValidationError, handle_validation_error)
    app.register_error_handler(exc.SQLAlchemyError, handle_database_error)
    return app


def register_swagger_ui(app: Flask) -> None:
    """Serve the OpenAPI document as a page for people at /api/docs."""
    url = app.config["SCRIPT_NAME"] + "/api"
    # The default validator is a service on another host.
    options = {"app_name": "Jobs API", "layout": "BaseLayout", "validatorUrl": None}
    page = get_swaggerui_blueprint(f"{url}/docs", f"{url}/openapi.json", options)
    app.register_blueprint(page, url_prefix="/api/docs")


@jobs.before_app_request
def check_host() -> None:
    """Abort if the host is malformed or untrusted, because links repeat it."""
    known_hosts = current_app.config["KNOWN_HOSTS"]
    # Load balancers request the health check by address, and it has no links.
    if request.endpoint == "jobs.health_check":
        known_hosts = None
    if not host_is_trusted(request.host.lower(), known_hosts):
        abort(400, f"The host {request.host} is malformed or not in TRUSTED_HOSTS.")


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
    page_size = document["components"]["parameters"]["page_size"]["schema"]
    page_size["maximum"] = current_app.config["MAX_PAGE_SIZE"]
    page_size["default"] = current_app.config["DEFAULT_PAGE_SIZE"]
    return Response(orjson.dumps(document), mimetype="application/json")


@jobs.get("/api/jobs")
@token_required
def list_jobs() -> Response:
    """Return a page of the jobs that the caller can access, or of one project's."""
    params = schemas.list_params.load(request.args)
    url = url_for("jobs.list_jobs", _external=True)
    return list_response(url, params, params.get("project_id"))


@jobs.get("/api/projects/<project_id>/jobs")
@token_required
def list_project_jobs(project_id: str) -> Response:
    """Return a page of a project's jobs."""
    project_id = parse_id(project_id)
    params = schemas.project_list_params.load(request.args)
    url = url_for("jobs.list_project_jobs", project_id=project_id, _external=True)
    return list_response(url, params, project_id)


@jobs.get("/api/jobs/<job_id>")
@jobs.get("/api/projects/<project_id>/jobs/<job_id>", endpoint="show_project_job")
@token_required
def show_job(job_id: str, project_id: str | None = None) -> Response:
    """Return a job with its body; if the path names a project, the job is in it."""
    job_id, project_id = parse_id(job_id), project_id and parse_id(project_id)
    schemas.no_params.load(request.args)
    job = require_job(job_id, project_id)
    return conditional_response(schemas.job_document(job))


def parse_id(text: str) -> str:
    """Return an id from the path in lower case, or abort with 400."""
    if not schemas.is_id(text):
        abort(400, f"{text} is not a UUID.")
    return text.lower()


def list_response(url: str, params: dict[str, Any], project_id: str | None) -> Response:
    """Return a page of the list at ``url``, with links to other pages."""
    page = params.get("page", 1)
    size = params.get("page_size", current_app.config["DEFAULT_PAGE_SIZE"])
    jobs, total, access = paginate(g.connection, g.user_id, project_id, page, size)
    require_access(project_id, access)
    document = schemas.list_document(jobs, total, page, size, url, params)
    response = conditional_response(document)
    links = document["links"].items()
    others = [f'<{link}>; rel="{rel}"' for rel, link in links if link and rel != "self"]
    response.headers["Link"] = ", ".join(others)
    return response


def conditional_response(document: dict[str, Any]) -> Response:
    """Return the document as JSON, or 304 if ``If-None-Match`` has its ETag."""
    response = Response(orjson.dumps(document), mimetype="application/json")
    response.headers["Cache-Control"] = "private, no-cache"
    response.headers["Vary"] = "Authorization"
    response.add_etag()
    etag, _ = response.get_etag()
    # Werkzeug's make_conditional would also look at other headers, such as If-Match.
    if etag and request.if_none_match.contains_weak(etag):
        response.status_code = 304
    return response


def handle_http_exception(
    error: HTTPException, details: list[dict[str, Any]] | None = None
) -> Response:
    """Return the error as JSON:API error objects, with its own status and headers."""
    details = details or [{"detail": error.description}]
    common = {"status": str(error.code), "title": error.name}
    errors = [common | item for item in details]
    body = orjson.dumps({"error": error.name, "errors": errors})
    return Response(body, error.code, error.get_headers(), "application/json")


def handle_validation_error(error: ValidationError) -> Response:
    """Return a 400 with an error object for each query parameter that is wrong."""
    details = [
        {"detail": f"{name} {message}", "source": {"parameter": name}}
        for name, [message] in sorted(error.messages_dict.items())
    ]
    return handle_http_exception(BadRequest(), details)


def handle_database_error(error: exc.SQLAlchemyError) -> Response:
    """Return a 503, and log one line, with the traceback if it may be a bug."""
    is_bug = not isinstance(error, exc.OperationalError | exc.TimeoutError)
    message = f"The database cannot be read: {describe_error(error)}"
    current_app.logger.error(message, exc_info=error if is_bug else None)
    detail = "The database cannot be read now."
    return handle_http_exception(ServiceUnavailable(detail, retry_after=5))
