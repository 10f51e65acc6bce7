"""Bearer tokens, and the access that they give."""

from collections.abc import Callable
from datetime import datetime
from functools import wraps
from hashlib import sha256
from typing import Any

from flask import abort, current_app, g, request
from sqlalchemy import Connection, RowMapping
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Unauthorized

import models
from database import read_connection


def token_required(view: Callable[..., Any]) -> Callable[..., Any]:
    """Raise a 401 unless the request has a valid bearer token.

    The view finds the token's user in ``g.user_id`` and a database connection in
    ``g.connection``.
    """

    @wraps(view)
    def wrapped_view(**path_params: str) -> Any:
        # Werkzeug's own parser raises an error for some malformed headers.
        scheme, _, text = request.headers.get("Authorization", "").partition(" ")
        token = text.strip().encode("latin-1")  # WSGI has decoded it as Latin-1.
        if scheme.lower() != "bearer" or not token:
            raise unauthorized('realm="jobs"')
        values = {"token": token, "digest": sha256(token).digest()}
        with read_connection() as g.connection:
            caller = g.connection.execute(models.caller_query, values).first()
            if caller is None or is_expired(caller.inserted_at):
                raise unauthorized('realm="jobs", error="invalid_token"')
            g.user_id = caller.user_id
            return view(**path_params)

    return wrapped_view


def unauthorized(challenge: str) -> Unauthorized:
    """Return a 401 with the parameters of a bearer challenge (RFC 6750)."""
    # Werkzeug would not quote the values of parameters, so pass them as a token.
    header = WWWAuthenticate("bearer", token=challenge)
    return Unauthorized("A valid bearer token is required.", None, header)


def is_expired(inserted_at: datetime) -> bool:
    """Return whether a token has reached TOKEN_MAX_AGE_DAYS."""
    max_age = current_app.config["TOKEN_MAX_AGE_DAYS"]
    return max_age is not None and (models.utc_now() - inserted_at).days >= max_age


def require_access(project_id: str | None, is_accessible: bool | None) -> None:
    """Abort with 404 if the project is unknown (None), with 403 if it is forbidden."""
    if is_accessible is None:
        abort(404, f"There is no project {project_id}.")
    if not is_accessible:
        abort(403, f"You do not have access to project {project_id}.")


def require_job(job_id: str, project_id: str | None) -> RowMapping:
    """Return the job with its body, or abort; the path's project is checked first."""
    connection: Connection = g.connection
    values = {"user_id": g.user_id, "job_id": job_id, "project_id": project_id}
    if project_id is not None:
        is_accessible = connection.scalar(models.project_access_query, values)
        require_access(project_id, is_accessible)
    job = connection.execute(models.job_query, values).mappings().first()
    if job is None:
        abort(404, f"There is no job {job_id}.")
    if project_id not in (None, job["project_id"]):
        abort(404, f"There is no job {job_id} in project {project_id}.")
    if not job["is_accessible"]:
        abort(403, f"You do not have access to job {job_id}.")
    return job
