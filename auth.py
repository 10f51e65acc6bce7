"""Bearer tokens, and the access that they give."""

import secrets
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from hashlib import sha256
from typing import Any

import click
from flask import abort, current_app, g, request
from sqlalchemy import Connection, RowMapping
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Unauthorized

import models
from database import db, read_connection


def create_token(user: models.User) -> tuple[str, models.UserToken]:
    """Store the digest of a new token of the user; return the token and its row."""
    if user.disabled:
        raise click.ClickException(f"The user {user.email} is disabled.")
    token = secrets.token_urlsafe(32)
    digest = sha256(token.encode()).digest()
    context = models.HASHED_API_TOKEN
    row = models.UserToken(user_id=user.id, context=context, token=digest)
    db.session.add(row)
    db.session.flush()
    return token, row


def token_required(view: Callable[..., Any]) -> Callable[..., Any]:
    """Raise a 401 unless the request has a valid bearer token.

    The view finds the token's user in ``g.user_id`` and a database connection in
    ``g.connection``.
    """

    @wraps(view)
    def wrapped_view(**path_params: str) -> Any:
        """Find the user of the token, then call the view."""
        token = bearer_token()
        if token is None:
            raise unauthorized()
        values = {"token": token, "digest": sha256(token).digest()}
        with read_connection() as g.connection:
            caller = g.connection.execute(models.caller_query, values).first()
            if caller is None or is_expired(caller.inserted_at):
                raise unauthorized("invalid_token")
            g.user_id = caller.user_id
            return view(**path_params)

    return wrapped_view


def bearer_token() -> bytes | None:
    """Return the raw bearer token, or None if the request has none (RFC 6750)."""
    header = request.authorization
    if header is None or header.type != "bearer" or header.token == "":
        return None
    # Werkzeug reads "a=b" as parameters of the scheme. No token has this form.
    token = header.token or ""
    # WSGI decodes headers as Latin-1. Other characters come from test clients only.
    return token.encode("latin-1", "backslashreplace")


def unauthorized(error: str | None = None) -> Unauthorized:
    """Return a 401 whose challenge may have an error code (RFC 6750)."""
    error_param = f', error="{error}"' if error else ""
    # Werkzeug would not quote the values of parameters, so pass them as a token.
    challenge = WWWAuthenticate("bearer", token=f'realm="jobs"{error_param}')
    return Unauthorized("A valid bearer token is required.", None, challenge)


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
    ids = {"user_id": g.user_id, "job_id": job_id, "project_id": project_id}
    if project_id is not None:
        require_access(project_id, connection.scalar(models.project_access_query, ids))
    job = connection.execute(models.job_query, ids).mappings().first()
    if job is None:
        abort(404, f"There is no job {job_id}.")
    if project_id not in (None, job["project_id"]):
        abort(404, f"There is no job {job_id} in project {project_id}.")
    if not job["is_accessible"]:
        abort(403, f"You do not have access to job {job_id}.")
    return job
