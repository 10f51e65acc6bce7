"""The tables, the access rule, and every statement that a request runs."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from select import POLLIN, poll
from typing import Any, NamedTuple
from uuid import uuid4

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.sql.functions import FunctionElement

# The contexts that open the API: of a token as Lightning keeps it, and of a digest.
PLAIN, DIGEST = "api", "api:sha256"

# How many jobs at an end of the table are looked through before a whole list is sorted.
WINDOW = 2000

# Pages that begin before this job are read together with their total, unless the ids
# of the projects are longer than some hundred are: then the total is large.
EARLY = 200
MANY_IDS = 3600

DEFAULT_ADAPTOR = "@openfn/language-common@latest"


def utc_now() -> datetime:
    """The time as the tables keep it: UTC, without a time zone."""
    return datetime.now(UTC).replace(tzinfo=None)


def prepare_connection(connection: Any, _: Any) -> None:
    """Set up a new connection of the driver's."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA temp_store = MEMORY")
    else:
        connection.read_only = True
        # Ids are text in Python: as UUID objects they would cost twice.
        adapters = connection.adapters
        text = adapters.get_loader(adapters.types["text"].oid, 0)
        adapters.register_loader("uuid", text)


def begin_snapshot(connection: Any, *_: Any) -> None:
    """Make everything that is read on this connection one state of the database."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("BEGIN")
        return
    # psycopg sends its own BEGIN. A server that closed the connection has made the
    # socket readable, which costs no round trip to see; one that is about to, within
    # the millisecond, is a 503.
    poller = poll()
    poller.register(connection.fileno(), POLLIN)
    if poller.poll(0):
        raise DisconnectionError


db = SQLAlchemy(
    engine_options={
        "hide_parameters": True,
        "pool_events": [
            (prepare_connection, "connect"),
            (begin_snapshot, "checkout"),
        ],
    }
)


# Text of 36 characters in Python, as answers have it, and in SQLite too, where Uuid
# would keep the 32 digits alone and put the hyphens back into every value it reads.
Id = db.Uuid(as_uuid=False).with_variant(db.String(36), "sqlite")


def new_id() -> str:
    """A random UUID in the form that answers and files have."""
    return str(uuid4())


Text255 = db.String(255)


def belongs_to(model: type[db.Model], **options: Any) -> Mapped[str]:
    """A column with the id of a row, which takes this one along when it goes."""
    return mapped_column(db.ForeignKey(model.id, ondelete="CASCADE"), **options)


class User(db.Model):
    """Somebody who may hold tokens and be a member of projects."""

    __tablename__ = "users"

    id: Mapped[str] = mapped_column(Id, primary_key=True, default=new_id)
    email: Mapped[str] = mapped_column(Text255, unique=True)
    disabled: Mapped[bool | None] = mapped_column(default=False)
    support_user: Mapped[bool | None] = mapped_column(default=False)


class UserToken(db.Model):
    """A token or its digest; only the contexts PLAIN and DIGEST open the API."""

    __tablename__ = "user_tokens"
    __table_args__ = (db.UniqueConstraint("context", "token"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True, default=new_id)
    user_id: Mapped[str] = belongs_to(User, index=True)
    token: Mapped[bytes] = mapped_column(db.LargeBinary)
    context: Mapped[str] = mapped_column(Text255)
    inserted_at: Mapped[datetime] = mapped_column(default=utc_now)


class Project(db.Model):
    """What members share; its workflows hold the jobs."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str | None] = mapped_column(Text255)
    scheduled_deletion: Mapped[datetime | None]
    allow_support_access: Mapped[bool | None] = mapped_column(default=False)


class ProjectUser(db.Model):
    """A user's membership of a project; any role gives access."""

    __tablename__ = "project_users"
    __table_args__ = (
        db.UniqueConstraint("project_id", "user_id"),
        db.Index("project_users_user_id_project_id", "user_id", "project_id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True, default=new_id)
    user_id: Mapped[str] = belongs_to(User)
    project_id: Mapped[str] = belongs_to(Project)
    role: Mapped[str] = mapped_column(Text255)


class Workflow(db.Model):
    """Jobs of a project; one with ``deleted_at`` is in no answer, nor are its jobs."""

    __tablename__ = "workflows"
    __table_args__ = (
        # Everything that a list asks of a workflow, so that it need not read the row.
        db.Index("workflows_project_id", "project_id", "deleted_at", "id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str | None] = mapped_column(Text255)
    project_id: Mapped[str] = belongs_to(Project)
    deleted_at: Mapped[datetime | None]


class Job(db.Model):
    """A JavaScript step. The body stands last, so that lists need not read past it."""

    __tablename__ = "jobs"
    __table_args__ = (
        db.Index("jobs_workflow_id", "workflow_id", "inserted_at", "id"),
        db.Index("jobs_inserted_at", "inserted_at", "id", "workflow_id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str | None] = mapped_column(Text255)
    adaptor: Mapped[str | None] = mapped_column(Text255, default=DEFAULT_ADAPTOR)
    workflow_id: Mapped[str] = belongs_to(Workflow)
    inserted_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    body: Mapped[str | None] = mapped_column(db.Text)


class ids_in(FunctionElement[str]):
    """The ids that a query gives, as one text: each with its hyphens, lower case."""

    type = db.String()
    inherit_cache = True


@compiles(ids_in)
def compile_ids_in(element: ids_in, compiler: Any, **kwargs: Any) -> str:
    """A JSON array on SQLite, an array's text on PostgreSQL."""
    query = compiler.process(element.clauses, **kwargs)
    if compiler.dialect.name == "sqlite":
        return f"(SELECT json_group_array(id) FROM {query})"
    return f"CAST(ARRAY{query} AS TEXT)"


class is_among(FunctionElement[bool]):
    """Whether an id is one of those that ``ids_in`` gathered.

    Of no type, since a Boolean would be compared with 1 on SQLite, past its indexes.
    """

    inherit_cache = True


@compiles(is_among)
def compile_is_among(element: is_among, compiler: Any, **kwargs: Any) -> str:
    """A look-up among the elements of the array."""
    column, ids = (compiler.process(clause, **kwargs) for clause in element.clauses)
    if compiler.dialect.name == "sqlite":
        return f"({column} IN (SELECT value FROM json_each({ids})))"
    return f"({column} IN (SELECT unnest(CAST({ids} AS UUID[]))))"


# The access rule: a member's projects, and a support user's where the project allows
# it, none of them scheduled for deletion. Read once a request, with the token: the
# statements after it need no join for it, and PostgreSQL need not plan them anew.
accessible_projects = db.union_all(
    db.select(ProjectUser.project_id.label("id"))
    .where(
        ProjectUser.user_id == User.id,
        # A look-up a membership: joined, PostgreSQL would read all projects for them.
        db.select(Project.scheduled_deletion)
        .where(Project.id == ProjectUser.project_id)
        .scalar_subquery()
        .is_(None),
    )
    .correlate(User),
    db.select(Project.id)
    .where(
        User.support_user,
        Project.allow_support_access,
        Project.scheduled_deletion.is_(None),
    )
    .correlate(User),
).scalar_subquery()

find_caller = (
    db.select(UserToken.inserted_at, ids_in(accessible_projects).label("project_ids"))
    .join(User, User.id == UserToken.user_id)
    .where(
        db.or_(
            (UserToken.context == PLAIN) & (UserToken.token == db.bindparam("token")),
            (UserToken.context == DIGEST) & (UserToken.token == db.bindparam("digest")),
        ),
        User.disabled.is_not(True),
    )
)

find_project = db.select(Project.id).where(Project.id == db.bindparam("project_id"))

listed_columns = (
    Job.id,
    Job.name,
    Job.adaptor,
    Job.inserted_at,
    Job.updated_at,
    Job.workflow_id,
    Workflow.project_id,
)

find_job = (
    db.select(
        *listed_columns,
        Job.body,
        Workflow.name.label("workflow_name"),
        Project.name.label("project_name"),
    )
    .join(Workflow, Workflow.id == Job.workflow_id)
    .join(Project, Project.id == Workflow.project_id)
    .where(Job.id == db.bindparam("job_id"), Workflow.deleted_at.is_(None))
)

can_read = db.select(Job.id).limit(1)


class Listing(NamedTuple):
    """The statements of a list: built once, since building costs more than running."""

    page_with_total: db.Select
    count: db.Select
    pages: dict[tuple[bool, bool], db.Select]


def in_order(jobs: Any, backwards: bool) -> list[db.ColumnElement]:
    """The order of lists, oldest first or, backwards, newest first."""
    keys = [jobs.inserted_at, jobs.id]
    return [key.desc() for key in keys] if backwards else keys


def listing(condition: db.ColumnElement[bool]) -> Listing:
    """The list of the jobs that meet the condition, but for deleted workflows.

    A page is read from the first job or from the last, and from all jobs or from the
    WINDOW jobs at that end of the table.
    """
    conditions = Workflow.deleted_at.is_(None), condition
    workflows = db.select(Workflow.id).where(*conditions)
    count = db.select(db.func.count(Job.id)).where(Job.workflow_id.in_(workflows))
    jobs = db.select(*listed_columns).join(Workflow)
    limit, offset = db.bindparam("limit"), db.bindparam("offset")
    pages = {}
    for backwards in (False, True):
        order = in_order(Job, backwards)
        page = jobs.where(*conditions).order_by(*order)
        pages[backwards, False] = page.limit(limit).offset(offset)
        keys = db.select(Job.id, Job.inserted_at, Job.workflow_id)
        window = keys.order_by(*order).limit(WINDOW).subquery().c
        ids = (
            db.select(window.id)
            .where(workflows.where(Workflow.id == window.workflow_id).exists())
            .order_by(*in_order(window, backwards))
        )
        near = jobs.where(Job.id.in_(ids.limit(limit).offset(offset)))
        pages[backwards, True] = near.order_by(*order)
    # Cheaper than the other count for few projects, and dearer for many.
    flat = db.select(db.func.count(Job.id)).join(Workflow).where(*conditions)
    total = flat.correlate(None).scalar_subquery().label("total")
    return Listing(pages[False, False].add_columns(total), count, pages)


all_jobs = listing(
    is_among(Workflow.project_id, db.bindparam("project_ids", type_=db.String))
)
project_jobs = listing(Workflow.project_id == db.bindparam("project_id"))


class Page(NamedTuple):
    """The jobs of one page, and how many there are on all pages."""

    jobs: list[db.RowMapping]
    total: int


def paginate(
    connection: db.Connection, jobs: Listing, page: int, page_size: int, **values: Any
) -> Page:
    """One page of a list, oldest jobs first; no jobs past the last page."""
    offset = (page - 1) * page_size
    if offset < EARLY and len(values.get("project_ids", "")) < MANY_IDS:
        limits = {"limit": page_size, "offset": offset}
        rows = connection.execute(jobs.page_with_total, values | limits)
        if rows := rows.mappings().all():
            return Page(rows, rows[0]["total"])
    total = connection.scalar(jobs.count, values) or 0
    size = max(0, min(page_size, total - offset))
    # From the nearer end: sorting gets dearer with every row that is passed over.
    backwards = total - offset - size < offset
    values |= {"limit": size, "offset": total - offset - size if backwards else offset}
    rows = []
    # Who sees many jobs most likely finds a page near an end of the table, unsorted.
    for near in (True, False) if total > WINDOW else (False,):
        if len(rows) < size:
            statement = jobs.pages[backwards, near]
            rows = connection.execute(statement, values).mappings().all()
    return Page(rows[::-1] if backwards else rows, total)


BEGIN_WRITING = {
    "sqlite": [
        "ROLLBACK",
        "PRAGMA busy_timeout = 60000",
        "PRAGMA journal_mode = WAL",
        "BEGIN IMMEDIATE",
    ],
    "postgresql": [
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE",
        "SET LOCAL statement_timeout = 0",
        # Any number will do that no other program takes: "jobs" in ASCII.
        "SELECT pg_advisory_xact_lock(1785684595)",
    ],
}


class LightningDatabase(Exception):
    """Refuses to write to the database of a Lightning instance."""


@contextmanager
def writing() -> Iterator[db.Session]:
    """A session that holds the write lock from its start and commits at its end.

    Raises LightningDatabase where Ecto's table of migrations stands: that database is
    Lightning's to change.
    """
    with db.engine.connect() as connection:
        # What is set for writing must not come back to the pool.
        connection.detach()
        for statement in BEGIN_WRITING[connection.dialect.name]:
            connection.exec_driver_sql(statement)
        if db.inspect(connection).has_table("schema_migrations"):
            raise LightningDatabase
        with db.Session(connection) as session:
            yield session
            session.commit()
        connection.commit()


def reason(error: DBAPIError) -> str:
    """The database's complaint in one line, with a hint where tables are missing."""
    line = str(error.orig).strip().partition("\n")[0]
    missing = getattr(error.orig, "sqlstate", None) == "42P01"
    if missing or line.startswith("no such table"):
        return f"{line} (run `flask init-db` to create the tables)"
    return line
