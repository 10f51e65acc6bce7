"""Bearer tokens, and what they give access to."""

import secrets
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
from database import Refused, db, read_connection


def create_token(user: models.User) -> tuple[str, models.UserToken]:
    """A new token of the user's and its row, which keeps the digest alone.

    Raises Refused for a disabled user, whose tokens open nothing.
    """
    if user.disabled:
        raise Refused(f"The user {user.email} is disabled.")
    token = secrets.token_urlsafe(32)
    digest = sha256(token.encode()).digest()
    row = models.UserToken(
        user_id=user.id, context=models.HASHED_API_TOKEN, token=digest
    )
    db.session.add(row)
    db.session.flush()
    return token, row


def token_required(view: Callable[..., Any]) -> Callable[..., Any]:
    """Answer 401 unless the request bears a valid token.

    For the view, ``g.connection`` is one to read with, and ``g.user_id`` the caller's.
    """

    @wraps(view)
    def wrapped_view(**path: str) -> Any:
        """The view's answer to a caller who is known."""
        token = bearer_token()
        if not token:
            raise unauthorized()
        values = {"token": token, "digest": sha256(token).digest()}
        with read_connection() as g.connection:
            caller = g.connection.execute(models.caller_query, values).first()
            if caller is None or is_expired(caller.inserted_at):
                raise unauthorized("invalid_token")
            g.user_id = caller.user_id
            return view(**path)

    return wrapped_view


def bearer_token() -> bytes:
    """The token in the Authorization header as it was sent, or nothing (RFC 6750)."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return b""
    # WSGI hands over the bytes of a header as Latin-1; only a test client sends more.
    return token.strip(" ").encode("latin-1", "backslashreplace")


def unauthorized(error: str | None = None) -> Unauthorized:
    """The 401, with a challenge that may tell an error (RFC 6750)."""
    # As a token, since WWWAuthenticate leaves off the quotes of a parameter's value.
    told = f', error="{error}"' if error else ""
    challenge = WWWAuthenticate("bearer", token=f'realm="jobs"{told}')
    return Unauthorized("A valid bearer token is required.", None, challenge)


def is_expired(inserted_at: datetime) -> bool:
    """Whether a token has reached TOKEN_MAX_AGE_DAYS."""
    max_age = current_app.config["TOKEN_MAX_AGE_DAYS"]
    return max_age is not None and (models.utc_now() - inserted_at).days >= max_age


def require_access(project_id: str | None, is_accessible: bool | None) -> None:
    """Answer 404 where the project does not exist (None), 403 where it is closed."""
    if is_accessible is None:
        abort(404, f"There is no project {project_id}.")
    if not is_accessible:
        abort(403, f"You do not have access to project {project_id}.")


def require_job(job_id: str, project_id: str | None) -> RowMapping:
    """The job with its body, or the answer 404 or 403, the project's first."""
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
