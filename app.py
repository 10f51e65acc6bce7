"""The application: its factory, its routes, its errors."""

from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import orjson
from flask import Blueprint, Flask, Response, abort, current_app, g, request, url_for
from marshmallow import ValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import BadRequest, HTTPException, ServiceUnavailable
from werkzeug.middleware.proxy_fix import ProxyFix

import models
import schemas
from auth import require_job, require_project, token_required
from cli import commands
from config import load_config

DEFAULT_PAGE_SIZE = 10
RETRY_AFTER = 5

jobs = Blueprint("jobs", __name__)


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """The service: configured by ``config`` in a test, else by the environment.

    Raises SystemExit with one line for a value that is wrong.
    """
    app = Flask(__name__, static_folder=None)
    load_config(app, config)
    models.db.init_app(app)
    trusted = app.config["TRUSTED_PROXIES"]
    app.wsgi_app = ProxyFix(
        app.wsgi_app, x_for=trusted, x_proto=trusted, x_host=trusted
    )
    # Both redirect before any error handler, unless off before the first rule.
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.register_blueprint(jobs)
    app.register_error_handler(HTTPException, as_json)
    app.register_error_handler(ValidationError, invalid_arguments)
    app.register_error_handler(DBAPIError, database_unavailable)
    app.register_error_handler(PoolTimeout, database_unavailable)
    for command in commands:
        app.cli.add_command(command)
    return app


@jobs.before_app_request
def require_well_formed_address() -> None:
    """Answer 400 where links would echo a host or a scheme that is none.

    Werkzeug gives an empty host for a malformed one, leaves the scheme that a proxy
    passed on as it is, and overlooks slashes that are doubled at the start: a 404 here.
    """
    if request.environ["PATH_INFO"].startswith("//"):
        abort(404)
    if not request.host or request.scheme not in ("http", "https"):
        abort(400, "The Host header, or what the proxy forwards for it, is malformed.")


@jobs.after_app_request
def add_headers(response: Response) -> Response:
    """Forbid sniffing, and keeping whatever does not say how long it is good for."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


@jobs.get("/health_check")
def health_check() -> dict[str, str]:
    """Whether a table can be read: 200, or 503."""
    with models.db.engine.begin() as connection:
        connection.execute(models.can_read).first()
    return {"status": "ok"}


@jobs.get("/api/openapi.json")
def show_openapi() -> Response:
    """The OpenAPI document, with the configured limits of a page."""
    path = Path(current_app.root_path, "openapi.json")
    document = orjson.loads(path.read_bytes())
    schema = document["components"]["parameters"]["page_size"]["schema"]
    schema["maximum"] = current_app.config["MAX_PAGE_SIZE"]
    schema["default"] = default_page_size()
    return Response(orjson.dumps(document), mimetype="application/json")


@jobs.get("/api/jobs")
@token_required
def list_jobs() -> Response:
    """One page of the jobs that the caller can access, or of one project's."""
    arguments = schemas.load_arguments(schemas.list_arguments, request.args)
    if "project_id" in arguments:
        return project_page(arguments["project_id"], arguments)
    return page_of(models.all_jobs, arguments, project_ids=g.project_ids)


@jobs.get("/api/projects/<project_id>/jobs")
@token_required
def list_project_jobs(project_id: str) -> Response:
    """One page of a project's jobs."""
    project_id = parse_id(project_id)
    arguments = schemas.load_arguments(schemas.project_list_arguments, request.args)
    return project_page(project_id, arguments)


@jobs.get("/api/jobs/<job_id>")
@token_required
def show_job(job_id: str) -> Response:
    """One job with its body."""
    job_id = parse_id(job_id)
    schemas.load_arguments(schemas.no_arguments, request.args)
    return cacheable(schemas.job_document(require_job(job_id), jobs_url()))


@jobs.get("/api/projects/<project_id>/jobs/<job_id>")
@token_required
def show_project_job(project_id: str, job_id: str) -> Response:
    """One job with its body, if it is in the project."""
    project_id, job_id = parse_id(project_id), parse_id(job_id)
    schemas.load_arguments(schemas.no_arguments, request.args)
    return cacheable(schemas.job_document(require_job(job_id, project_id), jobs_url()))


def parse_id(text: str) -> str:
    """An id from the path in lower case, or the answer 400."""
    try:
        return schemas.path_id.deserialize(text)
    except ValidationError:
        abort(400, f"{text} is not a UUID.")


def jobs_url() -> str:
    """The absolute URL of the list of all jobs, below which each job has its own."""
    return url_for("jobs.list_jobs", _external=True)


def default_page_size() -> int:
    """The size of a page where the request names none."""
    return min(DEFAULT_PAGE_SIZE, current_app.config["MAX_PAGE_SIZE"])


def project_page(project_id: str, arguments: dict[str, Any]) -> Response:
    """The page of a project's jobs that the arguments ask for."""
    require_project(project_id)
    return page_of(models.project_jobs, arguments, project_id=project_id)


def page_of(
    listing: models.Listing, arguments: dict[str, Any], **values: str
) -> Response:
    """The page of a list that the arguments ask for, with the links to the others."""
    page = arguments.get("page", 1)
    page_size = arguments.get("page_size", default_page_size())
    rows, total = models.paginate(g.connection, listing, page, page_size, **values)
    total_pages = max(1, -(-total // page_size))
    path = {name: value.lower() for name, value in request.view_args.items()}
    url = url_for(request.endpoint, _external=True, **path)
    links = schemas.page_links(url, arguments, page, total_pages)
    meta = {
        "page_number": page,
        "page_size": page_size,
        "total_entries": total,
        "total_pages": total_pages,
    }
    response = cacheable(schemas.list_document(rows, jobs_url(), links, meta))
    response.headers["Link"] = ", ".join(
        f'<{links[rel]}>; rel="{rel}"'
        for rel in ("first", "prev", "next", "last")
        if links[rel]
    )
    return response


def cacheable(document: dict[str, Any]) -> Response:
    """The document as JSON, or a 304 to a client that has it already (RFC 9110)."""
    response = Response(orjson.dumps(document), mimetype="application/json")
    response.headers["Cache-Control"] = "private, no-cache"
    response.headers["Vary"] = "Authorization"
    response.add_etag()
    if request.if_none_match.contains_weak(response.get_etag()[0]):
        response.status_code = HTTPStatus.NOT_MODIFIED
        response.set_data(b"")
    return response


def as_json(error: HTTPException) -> Response:
    """The error as JSON; its status and its headers stay its own."""
    return error_response(error, [{"detail": error.description}])


def invalid_arguments(error: ValidationError) -> Response:
    """A 400 with an error object for each argument at fault."""
    faults = [
        {"detail": f"{name} {message}", "source": {"parameter": name}}
        for name, messages in error.messages_dict.items()
        for message in messages
    ]
    return error_response(BadRequest(), faults)


def database_unavailable(error: DBAPIError | PoolTimeout) -> Response:
    """A 503 for a database that does not answer, and one line in the log."""
    why = (
        models.reason(error) if isinstance(error, DBAPIError) else "no free connection"
    )
    current_app.logger.error("The database cannot be read: %s", why)
    return as_json(
        ServiceUnavailable("The database cannot be read now.", retry_after=RETRY_AFTER)
    )


def error_response(error: HTTPException, faults: list[dict[str, Any]]) -> Response:
    """JSON:API's error objects, and the reason phrase where the original has it."""
    common = {"status": str(error.code), "title": error.name}
    document = {"error": error.name, "errors": [common | fault for fault in faults]}
    response = error.get_response()
    response.content_type = "application/json"
    response.set_data(orjson.dumps(document))
    return response
