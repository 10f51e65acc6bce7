"""The ``flask`` commands."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import click
from flask import Blueprint, current_app
from sqlalchemy import delete, select
from sqlalchemy.exc import SQLAlchemyError

import project_import
from auth import create_token, is_expired
from database import Refused, db, describe_error, write_transaction
from models import API_TOKEN, HASHED_API_TOKEN, Base, Project, User, UserToken, utc_now
from project_files import load_project_file
from schemas import is_id

DEMO_EMAIL = "demo@example.org"

Row = TypeVar("Row", Project, UserToken)

commands = Blueprint("commands", __name__, cli_group=None)


@contextmanager
def report_errors() -> Iterator[None]:
    """End a command that fails with a line a fault on stderr and exit code 1."""
    try:
        yield
    except Refused as error:
        fail(*error.args)
    except SQLAlchemyError as error:
        fail(f"The database refused: {describe_error(error)}")
    except UnicodeEncodeError:
        fail("An argument is not text in UTF-8.")
    except OSError as error:
        fail(str(error))


def fail(*lines: str) -> NoReturn:
    """End the command with these lines on stderr."""
    for line in lines:
        click.echo(line.encode(errors="backslashreplace"), err=True)
    sys.exit(1)


def show(*lines: str) -> None:
    """Print lines on stdout; OSError where nobody can see them."""
    if sys.stdout is None:
        raise OSError("There is no standard output to print the token on.")
    try:
        click.echo("\n".join(lines))
    except OSError:
        # What stdout could not take must not fail again when Python ends.
        with suppress(OSError):
            sys.stdout.close()
        raise


def print_summary(subject: str, counts: Counter[str]) -> None:
    """Print what was done to rows; if stdout fails, print it on stderr."""
    done = [
        f"{count} {what if count > 1 else what.replace('s ', ' ', 1)}"
        for what, count in sorted(counts.items())
        if count
    ]
    line = f"{subject}: {', '.join(done)}." if done else f"{subject}."
    try:
        show(line)
    except OSError:
        with suppress(OSError):
            click.echo(line, err=True)


def require_user(email: str) -> User:
    """The user with the email; Refused where there is none."""
    user = project_import.find_user(email)
    if user is None:
        raise Refused(f"There is no user {email}.")
    return user


def require_row(model: type[Row], row_id: str, what: str) -> Row:
    """The row with an id; Refused where there is none."""
    row = db.session.get(model, row_id.lower()) if is_id(row_id) else None
    if row is None:
        raise Refused(f"There is no {what} {row_id}.")
    return row


@commands.cli.command("init-db")
@report_errors()
def init_db() -> None:
    """Create the tables that are missing."""
    with write_transaction():
        Base.metadata.create_all(db.session.connection())


@commands.cli.command("import-project")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--member",
    "members",
    multiple=True,
    metavar="EMAIL[:ROLE]",
    help=f"Make a user a member: {', '.join(project_import.ROLES)}, or none to remove. "
    "Without a role, one who is no member yet becomes a viewer. Repeatable.",
)
@report_errors()
def import_project(file: str, members: tuple[str, ...]) -> None:
    """Make the database agree with an OpenFn project FILE (- is stdin).

    It is one that `openfn project pull` writes, or a state file of the older CLI. What
    it no longer has is deleted from the project.
    """
    parsed_members = [project_import.parse_member(text) for text in members]
    if file == "-" and sys.stdin is None:
        raise click.ClickException("There is no standard input to read.")
    with click.open_file(file, "rb") as stream:
        project_file = load_project_file(stream.read())
    project_id = project_file.project["id"]
    with write_transaction():
        counts = project_import.import_project(project_file, parsed_members)
        hint = project_import.access_hint(project_id)
    print_summary(f"Imported project {project_id}", counts)
    if hint:
        click.echo(hint, err=True)


@commands.cli.command("delete-project")
@click.argument("project_id", metavar="ID")
@report_errors()
def delete_project(project_id: str) -> None:
    """Delete the project with ID, its workflows, its jobs and its memberships.

    Users and their tokens stay.
    """
    with write_transaction():
        project = require_row(Project, project_id, "project")
        counts = project_import.delete_project(project)
    print_summary(f"Deleted project {project.id}", counts)


@commands.cli.command("create-token")
@click.argument("email")
@report_errors()
def create_token_command(email: str) -> None:
    """Print a new token of the user with EMAIL; its id goes to stderr.

    The token is shown this once: the database keeps only a digest.
    """
    with write_transaction():
        token, row = create_token(require_user(email))
        # Before the commit: a token that could not be shown is not kept.
        show(token)
        click.echo(row.id, err=True)


@commands.cli.command("list-tokens")
@click.argument("email", required=False)
@report_errors()
def list_tokens(email: str | None) -> None:
    """Print id, email, context and time of each API token, oldest first.

    One that is too old to open anything is marked as expired.
    """
    query = (
        select(UserToken.id, User.email, UserToken.context, UserToken.inserted_at)
        .join(User)
        .where(UserToken.context.in_((API_TOKEN, HASHED_API_TOKEN)))
        .order_by(UserToken.inserted_at, UserToken.id)
    )
    if email is not None:
        query = query.where(User.id == require_user(email).id)
    for token_id, owner, context, time in db.session.execute(query):
        mark = "  expired" if is_expired(time) else ""
        show(f"{token_id}  {owner}  {context}  {time:%Y-%m-%dT%H:%M:%SZ}{mark}")


@commands.cli.command("revoke-token")
@click.argument("token_id", metavar="ID")
@report_errors()
def revoke_token(token_id: str) -> None:
    """Delete the token with ID, as list-tokens prints it."""
    with write_transaction():
        db.session.delete(require_row(UserToken, token_id, "token"))


@commands.cli.command("demo")
@report_errors()
def demo() -> None:
    """Fill an empty database with a small project; print a token, a request, a page.

    Safe to repeat: tokens of earlier runs are good for a day. Where there are other
    projects, nothing is made.
    """
    project_file = load_project_file(
        Path(current_app.root_path, "demo.json").read_bytes()
    )
    root = f"http://127.0.0.1:{current_app.config['PORT']}/api"
    with write_transaction():
        Base.metadata.create_all(db.session.connection())
        others = select(Project.id).where(Project.id != project_file.project["id"])
        if db.session.scalar(others.limit(1)) is not None:
            show(
                "No demo among other projects: `flask create-token EMAIL` makes tokens."
            )
            return
        project_import.import_project(project_file, [(DEMO_EMAIL, "owner")])
        user = require_user(DEMO_EMAIL)
        yesterday = utc_now() - timedelta(days=1)
        old = delete(UserToken).filter_by(user_id=user.id)
        db.session.execute(old.where(UserToken.inserted_at < yesterday))
        token, _ = create_token(user)
        # Before the commit: a token that could not be shown is not kept.
        show(
            f"Token: {token}",
            f"curl -H 'Authorization: Bearer {token}' '{root}/jobs?page_size=1'",
            f"Docs: {root}/docs",
        )
