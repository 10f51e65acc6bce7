"""The application: its factory, its routes, its errors."""

from collections.abc import Mapping
from typing import Any

import orjson
from flask import Blueprint, Flask, Response, abort, current_app, g, request, url_for
from flask_swagger_ui import get_swaggerui_blueprint
from marshmallow import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import BadRequest, HTTPException, NotFound, ServiceUnavailable
from werkzeug.middleware.proxy_fix import ProxyFix

import schemas
from auth import require_access, require_job, token_required
from cli import commands
from config import load_config
from database import init_database, is_unavailable, reading, reason
from models import can_read, paginate

jobs = Blueprint("jobs", __name__)

# Without a validator, since that of the default is elsewhere.
SWAGGER_UI = {
    "app_name": "Jobs API",
    "defaultModelsExpandDepth": 0,
    "layout": "BaseLayout",
    "validatorUrl": None,
}
docs = get_swaggerui_blueprint("/api/docs", "/api/openapi.json", SWAGGER_UI)


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """The service: configured by ``config`` in a test, else by the environment."""
    app = Flask(__name__, static_folder=None)
    app.config.update(load_config(config))
    init_database(app)
    count = app.config["TRUSTED_PROXIES"]
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=count, x_proto=count, x_host=count)
    # Both redirect before any error handler, unless off before the first rule.
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.register_blueprint(jobs)
    app.register_blueprint(docs)
    app.register_blueprint(commands)
    app.register_error_handler(HTTPException, as_json)
    app.register_error_handler(ValidationError, invalid_arguments)
    app.register_error_handler(SQLAlchemyError, database_error)
    return app


@jobs.before_app_request
def require_well_formed_address() -> None:
    """Refuse what links could not repeat: no host (400), no such scheme, ``//`` (404).

    Werkzeug gives an empty host for a malformed one, and overlooks slashes that are
    doubled at the start of a path.
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
    with reading() as connection:
        connection.execute(can_read).first()
    return {"status": "ok"}


@jobs.get("/api/openapi.json")
def show_openapi() -> Response:
    """The OpenAPI document, with the configured limits of a page."""
    with current_app.open_resource("openapi.json") as file:
        document = orjson.loads(file.read())
    schema = document["components"]["parameters"]["page_size"]["schema"]
    schema["maximum"] = current_app.config["MAX_PAGE_SIZE"]
    schema["default"] = min(schemas.DEFAULT_PAGE_SIZE, schema["maximum"])
    return json_response(document)


@jobs.get("/api/jobs")
@token_required
def list_jobs() -> Response:
    """One page of the jobs that the caller can access, or of one project's."""
    arguments = load_arguments("page", "page_size", "project_id")
    return page_of(jobs_url(), arguments, arguments.get("project_id"))


@jobs.get("/api/projects/<project_id>/jobs")
@token_required
def list_project_jobs(project_id: str) -> Response:
    """One page of a project's jobs."""
    project_id = parse_id(project_id)
    arguments = load_arguments("page", "page_size")
    url = url_for("jobs.list_project_jobs", project_id=project_id, _external=True)
    return page_of(url, arguments, project_id)


@jobs.get("/api/jobs/<job_id>")
@jobs.get("/api/projects/<project_id>/jobs/<job_id>", endpoint="show_project_job")
@token_required
def show_job(job_id: str, project_id: str | None = None) -> Response:
    """One job with its body, if it is in the project, where the path names one."""
    job_id, project_id = parse_id(job_id), parse_id(project_id)
    load_arguments()
    return cacheable(schemas.job_document(require_job(job_id, project_id), jobs_url()))


def parse_id(text: str | None) -> str | None:
    """An id from the path in lower case, None for none, or the answer 400."""
    try:
        return schemas.path_id.deserialize(text)
    except ValidationError:
        abort(400, f"{text} is not a UUID.")


def load_arguments(*names: str) -> dict[str, Any]:
    """The arguments of the request, with defaults; 400 for any that is not named."""
    schema = schemas.arguments_schema(current_app.config["MAX_PAGE_SIZE"], only=names)
    return schemas.check_arguments(schema, request.args)


def jobs_url() -> str:
    """The absolute URL of the list of all jobs, below which each job has its own."""
    return url_for("jobs.list_jobs", _external=True)


def page_of(url: str, arguments: dict[str, Any], project_id: str | None) -> Response:
    """The page of a list that the arguments ask for, with the links to the others."""
    number, size = arguments["page"], arguments["page_size"]
    ids = {"user_id": g.user_id, "project_id": project_id}
    found, total, is_accessible = paginate(g.connection, number, size, **ids)
    if project_id is not None:
        require_access(project_id, is_accessible)
    given = {name: arguments[name] for name in arguments if name in request.args}
    page = schemas.Page(url, given, number, size, total)
    document = schemas.list_document(found, jobs_url(), page)
    response = cacheable(document)
    response.headers["Link"] = schemas.link_header(document["links"])
    return response


def cacheable(document: dict[str, Any]) -> Response:
    """The document as JSON, or a 304 for ``If-None-Match`` (RFC 9110)."""
    response = json_response(document)
    response.headers["Cache-Control"] = "private, no-cache"
    response.headers["Vary"] = "Authorization"
    response.add_etag()
    if request.if_none_match.contains_weak(response.get_etag()[0]):
        response.status_code = 304
    return response


def json_response(document: dict[str, Any]) -> Response:
    """A 200 with the document."""
    return Response(orjson.dumps(document), mimetype="application/json")


def as_json(error: HTTPException) -> Response:
    """The error as JSON; its status and its headers stay its own."""
    detail = error.description
    # Our own 404s say what there is not; this one is the router's.
    if detail == NotFound.description:
        detail = "There is no such path: see /api/docs for those that there are."
    return error_response(error, [{"detail": detail}])


def invalid_arguments(error: ValidationError) -> Response:
    """A 400 with an error object for each argument at fault."""
    faults = [
        {"detail": f"{name} {message}", "source": {"parameter": name}}
        for name, [message] in error.messages_dict.items()
    ]
    return error_response(BadRequest(), faults)


def database_error(error: SQLAlchemyError) -> Response:
    """A 503 and a line in the log where asking again may help, else a fault of ours."""
    if not is_unavailable(error):
        raise error
    current_app.logger.error("The database cannot be read: %s", reason(error))
    unavailable = "The database cannot be read now."
    return as_json(ServiceUnavailable(unavailable, retry_after=5))


def error_response(error: HTTPException, faults: list[dict[str, Any]]) -> Response:
    """JSON:API's error objects, and the reason phrase where the original has it."""
    common = {"status": str(error.code), "title": error.name}
    document = {"error": error.name, "errors": [common | fault for fault in faults]}
    response = error.get_response()
    response.content_type = "application/json"
    response.set_data(orjson.dumps(document))
    return response
