"""The ``flask`` commands."""

from pathlib import Path
from typing import Any, BinaryIO

import click
from flask import Blueprint, current_app
from marshmallow import ValidationError
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

import admin
import models
from admin import AdminError, require_row, require_user, write_transaction
from auth import is_expired
from database import db, describe_error
from models import Job, Project, ProjectUser, User, UserToken, Workflow
from project_files import format_errors, load_project_file


class Command(click.Command):
    """A command whose errors are lines on stderr, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn errors into messages that click prints."""
        try:
            return super().invoke(ctx)
        except ValidationError as error:
            message = "\n".join(format_errors(error.messages))
        except AdminError as error:
            message = str(error)
        except SQLAlchemyError as error:
            message = describe_error(error)
        raise click.ClickException(message)


commands = Blueprint("commands", __name__, cli_group=None)
commands.cli.command_class = Command


@commands.cli.command("init-db")
def init_db() -> None:
    """Create the tables that are missing."""
    with write_transaction():
        names = ", ".join(admin.create_tables())
    click.echo(f"Created the tables {names}." if names else "No table was missing.")


@commands.cli.command("import-project")
@click.argument("file", type=click.File("rb"))
@click.option(
    "--member",
    "members",
    multiple=True,
    metavar="EMAIL[:ROLE]",
    help=f"Add a member with a role: {', '.join(admin.ROLES)} (to remove). Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Print the counts, but change nothing.")
def import_project(file: BinaryIO, members: tuple[str, ...], dry_run: bool) -> None:
    """Make the database agree with an OpenFn project FILE (- is stdin).

    FILE is a project file or a state file. Jobs that it no longer has are deleted.
    """
    project, *rows = load_project_file(file.read())
    project_id = project["id"]
    with write_transaction():
        counts = admin.import_project(project, *rows)
        for member in members:
            counts["member", admin.set_member(project_id, member)] += 1
        hint = admin.access_hint(project_id)
        if dry_run:
            db.session.rollback()
    changes = ", ".join(
        f"{number} {kind}{'s' if number > 1 else ''} {change}"
        for (kind, change), number in sorted(counts.items())
    )
    done = "Would import" if dry_run else "Imported"
    click.echo(f"{done} project {project_id}: {changes}.")
    if hint:
        click.echo(hint, err=True)


@commands.cli.command("delete-project")
@click.argument("project_id")
def delete_project(project_id: str) -> None:
    """Delete a project with its workflows, jobs and memberships; users stay."""
    with write_transaction():
        project = require_row(Project, project_id, "project")
        db.session.delete(project)
    click.echo(f"Deleted project {project_id}.")


@commands.cli.command("list-projects")
def list_projects() -> None:
    """Print id, name, number of readable jobs and any deletion date of each project."""
    jobs = select(func.count(Job.id)).join(Workflow)
    jobs = jobs.where(Workflow.project_id == Project.id, Workflow.deleted_at.is_(None))
    jobs = jobs.where(Project.scheduled_deletion.is_(None))
    query = select(Project, jobs.scalar_subquery()).order_by(Project.name, Project.id)
    for project, number in db.session.execute(query):
        line = f"{project.id}  {project.name}  readable jobs: {number}"
        if date := project.scheduled_deletion:
            line += f"  scheduled for deletion on {date:%Y-%m-%d}"
        click.echo(line)


@commands.cli.command("list-members")
@click.argument("project_id")
def list_members(project_id: str) -> None:
    """Print the email and role of each member of a project."""
    project = require_row(Project, project_id, "project")
    query = select(User.email, ProjectUser.role).join(ProjectUser)
    query = query.where(ProjectUser.project_id == project.id).order_by(User.email)
    for email, role in db.session.execute(query):
        click.echo(f"{email}  {role}")


@commands.cli.command("set-member")
@click.argument("project_id")
@click.argument("member", metavar="EMAIL[:ROLE]")
def set_member(project_id: str, member: str) -> None:
    """Add or change a member of a project, or remove one with EMAIL:none."""
    with write_transaction():
        project = require_row(Project, project_id, "project")
        change = admin.set_member(project.id, member)
    if change == "absent":
        email = member.removesuffix(":none")
        raise AdminError(f"{email} is no member. See: flask list-members {project_id}")
    click.echo(f"Project {project_id}: member {member} {change}.")


@commands.cli.command("delete-user")
@click.argument("email")
def delete_user(email: str) -> None:
    """Delete a user with all tokens and memberships."""
    with write_transaction():
        db.session.delete(require_user(email))
    click.echo(f"Deleted user {email}.")


@commands.cli.command("create-token")
@click.argument("email")
def create_token(email: str) -> None:
    """Print a new token of a user; it is shown only once, and its id on stderr."""
    with write_transaction():
        token, token_id = admin.create_token(email)
    click.echo(f"Token id, for flask revoke-token: {token_id}", err=True)
    click.echo(token)


@commands.cli.command("list-tokens")
@click.argument("email", required=False)
def list_tokens(email: str | None) -> None:
    """Print id, email, context and time of each token, and whether it is expired."""
    query = select(UserToken, User.email).join(User)
    query = query.where(UserToken.context.in_(models.API_CONTEXTS))
    if email is not None:
        query = query.where(User.id == require_user(email).id)
    query = query.order_by(UserToken.inserted_at, UserToken.id)
    for token, owner in db.session.execute(query):
        mark = "  expired" if is_expired(token.inserted_at) else ""
        time = f"{token.inserted_at:%Y-%m-%dT%H:%M:%SZ}"
        click.echo(f"{token.id}  {owner}  {token.context}  {time}{mark}")


@commands.cli.command("revoke-token")
@click.argument("token_id")
def revoke_token(token_id: str) -> None:
    """Delete the token with an id that list-tokens prints."""
    with write_transaction():
        db.session.delete(require_row(UserToken, token_id, "token"))
    click.echo(f"Revoked token {token_id}.")


@commands.cli.command("demo")
def demo() -> None:
    """Import a sample project, unless there are others; print a token and a request."""
    url = f"http://127.0.0.1:{current_app.config['PORT']}/api"
    file = Path(current_app.root_path, "demo.json")
    project, *rows = load_project_file(file.read_bytes())
    others = select(Project.id).where(Project.id != project["id"])
    with write_transaction():
        admin.create_tables()
        if db.session.scalar(others.limit(1)):
            click.echo("No sample was imported, because there are other projects.")
            click.echo("Create a token with: flask create-token EMAIL")
            return
        admin.import_project(project, *rows)
        admin.set_member(project["id"], "demo@example.org:owner")
        token, _ = admin.create_token("demo@example.org")
    click.echo(f"Token: {token}")
    click.echo(f"curl -sS -H 'Authorization: Bearer {token}' '{url}/jobs?page_size=1'")
    click.echo(f"Docs: {url}/docs")
