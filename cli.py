"""The ``flask`` commands."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import click
from flask import current_app
from flask.cli import with_appcontext
from sqlalchemy import delete, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import project_state
from auth import create_token
from models import (
    DIGEST,
    PLAIN,
    LightningDatabase,
    User,
    UserToken,
    db,
    reason,
    writing,
)
from schemas import Id

DEMO_EMAIL = "demo@example.org"


@contextmanager
def faults_reported() -> Iterator[None]:
    """End a command that fails with a line a fault on stderr and exit code 1."""
    try:
        yield
    except project_state.InvalidState as error:
        lines = error.faults
    except LightningDatabase:
        lines = [
            "The database belongs to Lightning (it has the table schema_migrations), "
            "and this service only reads it: make the change in Lightning."
        ]
    except DBAPIError as error:
        lines = [f"The database refused: {reason(error)}"]
    except UnicodeEncodeError:
        lines = ["An argument is not text in UTF-8."]
    except OSError as error:
        lines = [str(error)]
        if error.filename is None:
            # What stdout could not take must not fail again when Python ends.
            with suppress(OSError):
                sys.stdout.close()
    else:
        return
    for line in lines:
        click.echo(line.encode(errors="backslashreplace"), err=True)
    sys.exit(1)


def require_user(session: Session, email: str) -> User:
    """The user with the email; InvalidState where there is none."""
    user = project_state.find_user(session, email)
    if user is None:
        raise project_state.InvalidState(f"There is no user {email}.")
    return user


@click.command("init-db")
@with_appcontext
@faults_reported()
def init_db() -> None:
    """Create the tables that are missing."""
    with writing() as session:
        db.metadata.create_all(session.connection())


@click.command("import-project")
@click.argument("file", type=click.File("rb"))
@click.option(
    "--member",
    "members",
    multiple=True,
    metavar="EMAIL[:ROLE]",
    help="Make a user a member: owner, admin, editor or viewer, or none to remove. "
    "Without a role, one who is no member yet becomes a viewer. Repeatable.",
)
@with_appcontext
@faults_reported()
def import_project_command(file: BinaryIO, members: tuple[str, ...]) -> None:
    """Make the database agree with an OpenFn project state FILE (- is stdin).

    What the file no longer has is deleted from the project.
    """
    wishes = [project_state.read_member(text) for text in members]
    project = project_state.read_state(file.read())
    with writing() as session:
        counts = project_state.import_project(session, project, wishes)
        done = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        click.echo(f"Project {project['id']}: {done or 'empty'}.")


@click.command("create-token")
@click.argument("email")
@with_appcontext
@faults_reported()
def create_token_command(email: str) -> None:
    """Print a new token of the user with EMAIL; its id goes to stderr.

    The token is shown this once: the database keeps only a digest.
    """
    with writing() as session:
        token, row = create_token(session, require_user(session, email))
        # Before the commit: a token that could not be shown is not kept.
        click.echo(token)
        click.echo(row.id, err=True)


@click.command("list-tokens")
@click.argument("email", required=False)
@with_appcontext
@faults_reported()
def list_tokens(email: str | None) -> None:
    """Print id, email, context and time of each API token, oldest first."""
    query = (
        select(UserToken.id, User.email, UserToken.context, UserToken.inserted_at)
        .join(User, User.id == UserToken.user_id)
        .where(UserToken.context.in_((PLAIN, DIGEST)))
        .order_by(UserToken.inserted_at, UserToken.id)
    )
    with db.engine.connect() as connection, Session(connection) as session:
        if email is not None:
            query = query.where(User.id == require_user(session, email).id)
        for token_id, owner, context, inserted_at in session.execute(query):
            time = inserted_at.isoformat(timespec="seconds") + "Z"
            click.echo(f"{token_id}  {owner}  {context}  {time}")


@click.command("revoke-token")
@click.argument("token_id", metavar="ID")
@with_appcontext
@faults_reported()
def revoke_token(token_id: str) -> None:
    """Delete the token with ID, as list-tokens prints it."""
    with writing() as session:
        row = Id.form.fullmatch(token_id) and session.get(UserToken, token_id.lower())
        if not row:
            raise project_state.InvalidState(f"There is no token {token_id}.")
        session.delete(row)


@click.command("demo")
@with_appcontext
@faults_reported()
def demo() -> None:
    """Fill the database with a small project, and print a token and a request.

    Safe to repeat: the tokens of earlier runs are revoked.
    """
    content = Path(current_app.root_path, "demo.json").read_bytes()
    project = project_state.read_state(content)
    with writing() as session:
        db.metadata.create_all(session.connection())
        project_state.import_project(
            session, project, [project_state.Member(DEMO_EMAIL, "owner")]
        )
        user = require_user(session, DEMO_EMAIL)
        session.execute(delete(UserToken).where(UserToken.user_id == user.id))
        token, _ = create_token(session, user)
        url = f"http://127.0.0.1:{current_app.config['PORT']}/api/jobs?page_size=1"
        click.echo(f"Token: {token}")
        click.echo(f"curl -H 'Authorization: Bearer {token}' '{url}'")


commands = (
    init_db,
    import_project_command,
    create_token_command,
    list_tokens,
    revoke_token,
    demo,
)
