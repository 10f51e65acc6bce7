"""Bearer tokens, and what they give access to."""

import secrets
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from hashlib import sha256
from typing import Any

from flask import abort, current_app, g, request
from sqlalchemy import Connection, Row, RowMapping
from sqlalchemy.orm import Session
from werkzeug.exceptions import Unauthorized

import models


def create_token(session: Session, user: models.User) -> tuple[str, models.UserToken]:
    """A new token of the user's and its row, which keeps the digest alone."""
    token = secrets.token_urlsafe(32)
    row = models.UserToken(
        user_id=user.id, context=models.DIGEST, token=sha256(token.encode()).digest()
    )
    session.add(row)
    session.flush()
    return token, row


def token_required(view: Callable[..., Any]) -> Callable[..., Any]:
    """Answer 401 unless the request bears a valid token.

    For the view, ``g.connection`` reads the snapshot in which the token was found and
    ``g.project_ids`` is a text with the id of each project that its user can access.
    """

    @wraps(view)
    def with_token(**path: str) -> Any:
        """What the view answers, while the snapshot is open."""
        # Ends with a commit: at a rollback psycopg drops its prepared statements.
        with models.db.engine.begin() as connection:
            g.connection = connection
            g.project_ids = find_caller_of(connection, bearer_token()).project_ids
            return view(**path)

    return with_token


def bearer_token() -> bytes:
    """The token in the Authorization header as it was sent, or nothing (RFC 6750)."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    # WSGI hands over the bytes of a header as Latin-1; only a test client sends more.
    token = token.strip(" ").encode("latin-1", "backslashreplace")
    return token if scheme.lower() == "bearer" else b""


def find_caller_of(connection: Connection, token: bytes) -> Row:
    """What a known token opens; 401 for others, old ones and disabled users."""
    values = {"token": token, "digest": sha256(token).digest()}
    caller = connection.execute(models.find_caller, values).first() if token else None
    if caller is None or is_too_old(caller.inserted_at):
        # Text, since Werkzeug's WWWAuthenticate leaves off the quotes of the realm.
        challenge = 'Bearer realm="jobs"' + (', error="invalid_token"' if token else "")
        raise Unauthorized("A valid bearer token is required.", None, [challenge])
    return caller


def is_too_old(inserted_at: datetime) -> bool:
    """Whether a token has reached TOKEN_MAX_AGE_DAYS."""
    max_age = current_app.config["TOKEN_MAX_AGE_DAYS"]
    return max_age is not None and (models.utc_now() - inserted_at).days >= max_age


def require_project(project_id: str) -> None:
    """Answer 404 for a project that does not exist, 403 for one without access."""
    if project_id in g.project_ids:
        return
    values = {"project_id": project_id}
    if g.connection.execute(models.find_project, values).first() is None:
        abort(404, f"There is no project {project_id}.")
    abort(403, f"You do not have access to project {project_id}.")


def require_job(job_id: str, project_id: str | None = None) -> RowMapping:
    """The job with its body, or the answer 404 or 403, the project's first."""
    if project_id is not None:
        require_project(project_id)
    values = {"job_id": job_id}
    job = g.connection.execute(models.find_job, values).mappings().first()
    if job is None:
        abort(404, f"There is no job {job_id}.")
    if project_id not in (None, job["project_id"]):
        abort(404, f"There is no job {job_id} in project {project_id}.")
    if job["project_id"] not in g.project_ids:
        abort(403, f"You do not have access to job {job_id}.")
    return job
