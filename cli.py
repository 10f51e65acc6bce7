"""The ``flask`` commands."""

import json
import sys
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from flask import Blueprint, current_app
from sqlalchemy import delete, func, select
from sqlalchemy.exc import SQLAlchemyError

import models
import project_import
from auth import create_token, is_expired
from database import create_tables, db, describe_error, write_transaction
from models import Job, Project, ProjectUser, User, UserToken, Workflow, utc_now
from project_files import load_project_file
from project_import import Member, parse_member, require_row, require_user


class Command(click.Command):
    """A command that reports database and system errors without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn errors into messages that click prints."""
        try:
            return super().invoke(ctx)
        except SQLAlchemyError as error:
            raise click.ClickException(describe_error(error)) from error
        except (OSError, UnicodeEncodeError) as error:
            raise click.ClickException(str(error)) from error


commands = Blueprint("commands", __name__, cli_group=None)
commands.cli.command_class = Command


def print_lines(*lines: str) -> None:
    """Print lines on stdout. Raises ClickException if stdout cannot be written."""
    reason = None if sys.stdout else "it is closed"
    try:
        click.echo("\n".join(lines))
    except OSError as error:
        reason = error.strerror
        # Python would fail again when it flushes stdout at exit.
        with suppress(OSError):
            sys.stdout.close()
    if reason:
        raise click.ClickException(f"Cannot write to standard output: {reason}.")


def print_done(line: str) -> None:
    """Print what a command has committed, on stderr if stdout cannot be written."""
    try:
        print_lines(line)
    except click.ClickException:
        with suppress(OSError):
            click.echo(line, err=True)


def print_counts(subject: str, counts: Counter[str]) -> None:
    """Print how many rows a command changed, such as ``2 jobs created``."""
    changes = [
        f"{count} {what if count > 1 else what.replace('s ', ' ', 1)}"
        for what, count in sorted(counts.items())
        if count
    ]
    print_done(f"{subject}: {', '.join(changes)}." if changes else f"{subject}.")


def print_token(row: UserToken, *lines: str) -> None:
    """Print the lines with a token, or delete the token if they cannot be written."""
    try:
        click.echo(f"Token id, for flask revoke-token: {row.id}", err=True)
        print_lines(*lines)
    except (OSError, click.ClickException):
        with write_transaction():
            db.session.delete(row)
        raise


@commands.cli.command("init-db")
def init_db() -> None:
    """Create the tables that are missing."""
    with write_transaction():
        names = ", ".join(create_tables())
    print_done(f"Created the tables {names}." if names else "No table was missing.")


@commands.cli.command("import-project")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--member",
    "members",
    multiple=True,
    type=parse_member,
    metavar="EMAIL[:ROLE]",
    help=f"Make a user a member: {', '.join(project_import.ROLES)}, or none to remove. "
    "Without a role, a user who is not a member yet becomes a viewer. Repeatable.",
)
def import_project(file: str, members: tuple[Member, ...]) -> None:
    """Make the database agree with an OpenFn project FILE (- is stdin).

    FILE is a project file, which `openfn project pull` writes, or a state file of the
    older CLI. Jobs that FILE no longer has are deleted.
    """
    if file == "-" and sys.stdin is None:
        raise click.ClickException("There is no standard input to read.")
    with click.open_file(file, "rb") as stream:
        project_file = load_project_file(stream.read())
    project_id = project_file.project["id"]
    with write_transaction():
        counts = project_import.import_project(project_file, members)
        hint = project_import.access_hint(project_id)
    print_counts(f"Imported project {project_id}", counts)
    if hint:
        with suppress(OSError):
            click.echo(hint, err=True)


@commands.cli.command("delete-project")
@click.argument("project_id")
def delete_project(project_id: str) -> None:
    """Delete a project with its workflows, jobs and memberships; users stay."""
    with write_transaction():
        project = require_row(Project, project_id, "project")
        counts = project_import.delete_project(project)
    print_counts(f"Deleted project {project.id}", counts)


@commands.cli.command("list-projects")
def list_projects() -> None:
    """Print id, name, number of jobs and any scheduled deletion of each project."""
    jobs = select(func.count(Job.id)).join(Workflow)
    jobs = jobs.where(Workflow.project_id == Project.id, Workflow.deleted_at.is_(None))
    query = select(Project, jobs.scalar_subquery()).order_by(Project.name, Project.id)
    for project, count in db.session.execute(query):
        # JSON escapes line breaks, which a name may have.
        name = json.dumps(project.name, ensure_ascii=False)
        mark = "  scheduled for deletion" if project.scheduled_deletion else ""
        print_lines(f"{project.id}  {name}  {count} jobs{mark}")


@commands.cli.command("list-members")
@click.argument("project_id")
def list_members(project_id: str) -> None:
    """Print the email and role of each member of a project."""
    project = require_row(Project, project_id, "project")
    query = select(User.email, ProjectUser.role).join(ProjectUser)
    query = query.where(ProjectUser.project_id == project.id).order_by(User.email)
    for email, role in db.session.execute(query):
        print_lines(f"{email}  {role}")


@commands.cli.command("set-member")
@click.argument("project_id")
@click.argument("member", type=parse_member, metavar="EMAIL[:ROLE]")
def set_member(project_id: str, member: Member) -> None:
    """Add or change a member of a project, or remove one with EMAIL:none."""
    email, role = member
    with write_transaction():
        project = require_row(Project, project_id, "project")
        change = project_import.set_member(project.id, email, role)
    print_done(f"Project {project.id}: member {email} {change}.")


@commands.cli.command("delete-user")
@click.argument("email")
def delete_user(email: str) -> None:
    """Delete a user with all tokens and memberships."""
    with write_transaction():
        counts = project_import.delete_user(require_user(email))
    print_counts(f"Deleted user {email.lower()}", counts)


@commands.cli.command("create-token")
@click.argument("email")
def create_token_command(email: str) -> None:
    """Print a new token of a user; it is shown only once, and its id on stderr."""
    with write_transaction():
        token, row = create_token(require_user(email))
    print_token(row, token)


@commands.cli.command("list-tokens")
@click.argument("email", required=False)
def list_tokens(email: str | None) -> None:
    """Print id, email, context and time of each token, and whether it is expired."""
    query = select(UserToken, User.email).join(User)
    contexts = models.API_TOKEN, models.HASHED_API_TOKEN
    query = query.where(UserToken.context.in_(contexts))
    if email is not None:
        query = query.where(User.id == require_user(email).id)
    query = query.order_by(UserToken.inserted_at, UserToken.id)
    for token, owner in db.session.execute(query):
        mark = "  expired" if is_expired(token.inserted_at) else ""
        time = f"{token.inserted_at:%Y-%m-%dT%H:%M:%SZ}"
        print_lines(f"{token.id}  {owner}  {token.context}  {time}{mark}")


@commands.cli.command("revoke-token")
@click.argument("token_id")
def revoke_token(token_id: str) -> None:
    """Delete the token with an id that list-tokens prints."""
    with write_transaction():
        token = require_row(UserToken, token_id, "token")
        email = db.session.get_one(User, token.user_id).email
        db.session.delete(token)
    print_done(f"Revoked a token of {email}.")


@commands.cli.command("demo")
def demo() -> None:
    """Import a sample project; print a token, a request and the address of the page.

    Safe to repeat: tokens of earlier runs stay valid for a day. Nothing is changed if
    the database has other projects.
    """
    file = load_project_file(Path(current_app.root_path, "demo.json").read_bytes())
    root = f"http://127.0.0.1:{current_app.config['PORT']}/api"
    with write_transaction():
        create_tables()
        others = select(Project.id).where(Project.id != file.project["id"])
        if db.session.scalar(others.limit(1)) is not None:
            print_lines("The database has other projects, so nothing was changed.")
            print_lines("Create a token with: flask create-token EMAIL")
            return
        project_import.import_project(file, [("demo@example.org", "owner")])
        user = require_user("demo@example.org")
        yesterday = utc_now() - timedelta(days=1)
        old = delete(UserToken).filter_by(user_id=user.id)
        db.session.execute(old.where(UserToken.inserted_at < yesterday))
        token, row = create_token(user)
    curl = f"curl -H 'Authorization: Bearer {token}' '{root}/jobs?page_size=1'"
    print_token(row, f"Token: {token}", curl, f"Docs: {root}/docs")
