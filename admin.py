"""What commands change: the write transaction, imports, members, users and tokens."""

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

from sqlalchemy import ColumnElement, exists, func, inspect, select

import models
from database import db
from models import Job, Project, ProjectUser, User, UserToken, Workflow, utc_now
from schemas import is_id

# The write lock comes before the first read, so that imports run one after the other.
BEGIN_WRITE_SQL = {
    "sqlite": [
        "PRAGMA busy_timeout = 60000",
        "PRAGMA journal_mode = WAL",
        "PRAGMA foreign_keys = ON",
        "BEGIN IMMEDIATE",
    ],
    "postgresql": [
        "SET statement_timeout = 0",
        "BEGIN READ WRITE",
        # The key, "jobs" in ASCII, only has to differ from those of other programs.
        "SELECT pg_advisory_xact_lock(1785684595)",
    ],
}

ROLES = ("owner", "admin", "editor", "viewer", "none")
LIST_MEMBERS = "See: flask list-members PROJECT_ID"

Columns = dict[str, Any]
Rows = list[Columns]
Counts = Counter[tuple[str, str]]  # {("job", "created"): 3} is an example.


class AdminError(Exception):
    """A change that is rejected; the message says why, and what to do next."""


@contextmanager
def write_transaction() -> Iterator[None]:
    """Run a transaction of ``db.session`` with the write lock, and commit it."""
    connection = db.session.connection()
    # Requests must not get a connection with the settings for writing from the pool.
    connection.detach()
    # Connections are in autocommit mode, so BEGIN is sent here, and
    # ``db.session.commit()`` below ends it.
    for statement in BEGIN_WRITE_SQL[connection.dialect.name]:
        connection.exec_driver_sql(statement)
    # Ecto, Lightning's database library, creates this table.
    if inspect(connection).has_table("schema_migrations"):
        raise AdminError(
            "The database belongs to Lightning (it has the table schema_migrations), "
            "and this service only reads it. Make the change in Lightning."
        )
    yield
    db.session.commit()


def create_tables() -> list[str]:
    """Create the tables that are missing, and return their names."""
    connection = db.session.connection()
    existing = inspect(connection).get_table_names()
    db.metadata.create_all(connection)
    return [name for name in db.metadata.tables if name not in existing]


def import_project(project: Columns, workflows: Rows, jobs: Rows) -> Counts:
    """Make the database agree with a file, and count the rows by what was done."""
    counts, in_project = Counts(), Workflow.project_id == project["id"]
    in_workflows = Job.workflow_id.in_(select(Workflow.id).where(in_project))
    merge_rows(Project, Project.id == project["id"], [project], counts)
    old_workflows = merge_rows(Workflow, in_project, workflows, counts)
    old_jobs = merge_rows(Job, in_workflows, jobs, counts)
    # A workflow takes its jobs with it, so jobs are deleted, and counted, first.
    for kind, rows in ("job", old_jobs), ("workflow", old_workflows):
        for row in rows:
            db.session.delete(row)
            counts[kind, "deleted"] += 1
        db.session.flush()
    return counts


def merge_rows(
    model: Any, in_scope: ColumnElement[bool], entries: Rows, counts: Counts
) -> Iterable[Any]:
    """Insert or update a row for each entry, and return the rows without an entry."""
    kind, now = model.__name__.lower(), utc_now()
    rows = {row.id: row for row in db.session.scalars(select(model).where(in_scope))}
    # Databases limit the parameters of a statement, so this reads all ids instead of
    # asking for those of the file: 0.3 s among 100,000 jobs.
    taken_ids = set(db.session.scalars(select(model.id))) - rows.keys()
    for number, columns in enumerate(entries):
        if columns["id"] in taken_ids:
            raise AdminError(
                f"The {kind} {columns['name']!r} cannot be imported, because its id "
                f"{columns['id']} appears twice or belongs to another project."
            )
        taken_ids.add(columns["id"])
        row = rows.pop(columns["id"], None) or model()
        # Lists are sorted by time, so later jobs of the file get later times.
        change = set_columns(row, columns, now + timedelta(microseconds=number))
        counts[kind, change] += 1
        db.session.add(row)
    db.session.flush()
    return rows.values()


def set_columns(row: Any, columns: Columns, time: datetime) -> str:
    """Set the columns of a row, and the times of a job; return what was done."""
    if all(getattr(row, name) == value for name, value in columns.items()):
        return "unchanged"
    change = "updated" if row.id else "created"
    for name, value in columns.items():
        setattr(row, name, value)
    if isinstance(row, Job):
        row.inserted_at = row.inserted_at or time
        row.updated_at = columns.get("updated_at", time)
    return change


def access_hint(project_id: str) -> str | None:
    """Return why no user can read a project, or None."""
    if db.session.get_one(Project, project_id).scheduled_deletion:
        return "No user can read the project, because it is scheduled for deletion."
    if db.session.scalar(select(exists().where(ProjectUser.project_id == project_id))):
        return None
    remedy = f"Add one with: flask set-member {project_id} EMAIL"
    return f"No user can read the project, because it has no members. {remedy}"


def set_member(project_id: str, member: str) -> str:
    """Add, change or remove the member EMAIL or EMAIL:ROLE; return what was done."""
    email, _, role = member.lower().partition(":")
    if "@" not in email or role not in ("", *ROLES):
        roles = ", ".join(ROLES)
        raise AdminError(
            f"{member} is neither EMAIL nor EMAIL:ROLE. ROLE is one of {roles}."
        )
    query = select(ProjectUser).join(User).where(func.lower(User.email) == email)
    row = db.session.scalar(query.where(ProjectUser.project_id == project_id))
    if role == "none":
        if row is None:
            return "absent"
        db.session.delete(row)
        return "removed"
    if row is None:
        user = find_user(email) or User(email=email)
        db.session.add(user)
        db.session.flush()
        row = ProjectUser(project_id=project_id, user_id=user.id, role=role or "viewer")
        db.session.add(row)
        return "created"
    if role in ("", row.role):
        return "unchanged"
    row.role = role
    return "updated"


def create_token(email: str) -> tuple[str, str]:
    """Store the digest of a new token of a user; return the token and its id."""
    user = require_user(email, f"Add one with: flask set-member PROJECT_ID {email}")
    token, context = secrets.token_urlsafe(32), models.HASHED_API_TOKEN
    digest = sha256(token.encode()).digest()
    row = UserToken(user_id=user.id, context=context, token=digest)
    db.session.add(row)
    db.session.flush()
    return token, row.id


def find_user(email: str) -> User | None:
    """Return the user with an email, in any case."""
    query = select(User).where(func.lower(User.email) == email.lower())
    return db.session.scalar(query)


def require_user(email: str, remedy: str = LIST_MEMBERS) -> User:
    """Return the user with an email, or raise AdminError with a remedy."""
    user = find_user(email)
    if user is None:
        raise AdminError(f"There is no user {email}. {remedy}")
    return user


def require_row(model: Any, row_id: str, kind: str) -> Any:
    """Return the row with an id, or raise AdminError."""
    row = db.session.get(model, row_id.lower()) if is_id(row_id) else None
    if row is None:
        raise AdminError(f"There is no {kind} {row_id}. See: flask list-{kind}s")
    return row
