"""The ``flask`` commands."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

import click
from flask import Blueprint, current_app
from sqlalchemy import delete, select
from sqlalchemy.exc import SQLAlchemyError

import project_state
from auth import create_token
from database import ReadOnlyDatabase, db, reason, writing
from models import DIGEST, PLAIN, User, UserToken
from project_state import InvalidState
from schemas import Id

DEMO_EMAIL = "demo@example.org"

commands = Blueprint("commands", __name__, cli_group=None)


@contextmanager
def faults_reported() -> Iterator[None]:
    """End a command that fails with a line a fault on stderr and exit code 1."""
    try:
        yield
        return  # without a fault
    except (InvalidState, ReadOnlyDatabase) as error:
        lines = error.args
    except SQLAlchemyError as error:
        lines = [f"The database refused: {reason(error)}"]
    except UnicodeEncodeError:
        lines = ["An argument is not text in UTF-8."]
    except OSError as error:
        lines = [str(error)]
        # What stdout could not take must not fail again when Python ends.
        with suppress(OSError):
            sys.stdout.close()
    for line in lines:
        click.echo(line.encode(errors="backslashreplace"), err=True)
    sys.exit(1)


def require_user(email: str) -> User:
    """The user with the email; InvalidState where there is none."""
    user = project_state.find_user(email)
    if user is None:
        raise InvalidState(f"There is no user {email}.")
    return user


@commands.cli.command("init-db")
@faults_reported()
def init_db() -> None:
    """Create the tables that are missing."""
    with writing():
        db.metadata.create_all(db.session.connection())


@commands.cli.command("import-project")
@click.argument("file", type=click.File("rb"))
@click.option(
    "--member",
    "members",
    multiple=True,
    metavar="EMAIL[:ROLE]",
    help=f"Make a user a member: {', '.join(project_state.ROLES)}, or none to remove. "
    "Without a role, one who is no member yet becomes a viewer. Repeatable.",
)
@faults_reported()
def import_project(file: BinaryIO, members: tuple[str, ...]) -> None:
    """Make the database agree with an OpenFn project state FILE (- is stdin).

    What the file no longer has is deleted from the project.
    """
    wishes = [project_state.read_member(text) for text in members]
    state = project_state.read_state(file.read())
    with writing():
        counts = project_state.import_state(state, wishes)
    done = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    click.echo(f"Project {state.project.values['id']}: {done or 'empty'}.")


@commands.cli.command("create-token")
@click.argument("email")
@faults_reported()
def create_token_command(email: str) -> None:
    """Print a new token of the user with EMAIL; its id goes to stderr.

    The token is shown this once: the database keeps only a digest.
    """
    if sys.stdout is None:
        raise InvalidState("There is no standard output to print the token on.")
    with writing():
        token, row = create_token(require_user(email))
        # Before the commit: a token that could not be shown is not kept.
        click.echo(token)
        click.echo(row.id, err=True)


@commands.cli.command("list-tokens")
@click.argument("email", required=False)
@faults_reported()
def list_tokens(email: str | None) -> None:
    """Print id, email, context and time of each API token, oldest first."""
    query = (
        select(UserToken.id, User.email, UserToken.context, UserToken.inserted_at)
        .join(User)
        .where(UserToken.context.in_((PLAIN, DIGEST)))
        .order_by(UserToken.inserted_at, UserToken.id)
    )
    if email is not None:
        query = query.where(User.id == require_user(email).id)
    for token_id, owner, context, time in db.session.execute(query):
        click.echo(f"{token_id}  {owner}  {context}  {time:%Y-%m-%dT%H:%M:%SZ}")


@commands.cli.command("revoke-token")
@click.argument("token_id", metavar="ID")
@faults_reported()
def revoke_token(token_id: str) -> None:
    """Delete the token with ID, as list-tokens prints it."""
    is_id = Id.form.fullmatch(token_id)
    with writing():
        row = db.session.get(UserToken, token_id.lower()) if is_id else None
        if row is None:
            raise InvalidState(f"There is no token {token_id}.")
        db.session.delete(row)


@commands.cli.command("demo")
@faults_reported()
def demo() -> None:
    """Fill the database with a small project; print a token, a request and a page.

    Safe to repeat: the tokens of earlier runs are revoked.
    """
    with current_app.open_resource("demo.json") as file:
        state = project_state.read_state(file.read())
    with writing():
        db.metadata.create_all(db.session.connection())
        project_state.import_state(state, [(DEMO_EMAIL, "owner")])
        user = require_user(DEMO_EMAIL)
        db.session.execute(delete(UserToken).where(UserToken.user_id == user.id))
        token, _ = create_token(user)
    root = f"http://127.0.0.1:{current_app.config['PORT']}/api"
    click.echo(f"Token: {token}")
    click.echo(f"curl -H 'Authorization: Bearer {token}' '{root}/jobs?page_size=1'")
    click.echo(f"Docs: {root}/docs")
