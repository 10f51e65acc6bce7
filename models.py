"""The tables, the access rule, and the statements that requests run."""

from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from database import db

# The contexts that open the API: of a token as Lightning keeps it, and of a digest.
API_TOKEN, HASHED_API_TOKEN = "api", "api:sha256"

# Text of 36 characters in Python, as in answers, and in SQLite too, where Uuid would
# keep the 32 digits alone and put the hyphens back into every value that it reads.
Id = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")


def new_id() -> str:
    """A random UUID in the form that answers and files have."""
    return str(uuid4())


def utc_now() -> datetime:
    """The time as the tables keep it: UTC, without a time zone."""
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    """What the tables have in common: their metadata, and the length of text."""

    metadata = db.metadata
    type_annotation_map = {str: sa.String(255)}


def belongs_to(parent: type[Base], **options: Any) -> Mapped[str]:
    """A column with the id of a row, which takes this one along when it goes."""
    key = sa.ForeignKey(f"{parent.__tablename__}.id", ondelete="CASCADE")
    return mapped_column(key, **options)


class User(Base):
    """Somebody who may hold tokens and be a member of projects."""

    __tablename__ = "users"

    id: Mapped[str] = mapped_column(Id, primary_key=True, default=new_id)
    email: Mapped[str] = mapped_column(unique=True)
    disabled: Mapped[bool | None] = mapped_column(default=False)
    support_user: Mapped[bool | None] = mapped_column(default=False)


class UserToken(Base):
    """An API token or its SHA-256 digest, depending on the context."""

    __tablename__ = "user_tokens"
    __table_args__ = (sa.UniqueConstraint("context", "token"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True, default=new_id)
    user_id: Mapped[str] = belongs_to(User, index=True)
    token: Mapped[bytes]
    context: Mapped[str]
    inserted_at: Mapped[datetime] = mapped_column(default=utc_now)


class Project(Base):
    """What members share; its workflows hold the jobs."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str | None]
    scheduled_deletion: Mapped[datetime | None]
    allow_support_access: Mapped[bool | None] = mapped_column(index=True)


class ProjectUser(Base):
    """A user's membership of a project; any role gives access."""

    __tablename__ = "project_users"
    __table_args__ = (
        sa.UniqueConstraint("project_id", "user_id"),
        sa.Index("project_users_user_id_project_id", "user_id", "project_id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True, default=new_id)
    user_id: Mapped[str] = belongs_to(User)
    project_id: Mapped[str] = belongs_to(Project)
    role: Mapped[str]


class Workflow(Base):
    """Jobs of a project; one with ``deleted_at`` is in no answer, nor are its jobs."""

    __tablename__ = "workflows"
    # Everything that a list asks of a workflow, so that it need not read the row.
    __table_args__ = (
        sa.Index("workflows_project_id", "project_id", "deleted_at", "id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str | None]
    project_id: Mapped[str] = belongs_to(Project)
    deleted_at: Mapped[datetime | None]


class Job(Base):
    """A JavaScript step. The body stands last, so that lists need not read past it."""

    __tablename__ = "jobs"
    __table_args__ = (sa.Index("jobs_workflow_id", "workflow_id", "inserted_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str | None]
    adaptor: Mapped[str | None] = mapped_column(
        default="@openfn/language-common@latest"
    )
    workflow_id: Mapped[str] = belongs_to(Workflow)
    inserted_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    body: Mapped[str | None] = mapped_column(sa.Text)


# The access rule: a member's projects, and a support user's where the project allows
# it, none of them scheduled for deletion. A member's are looked up one by one: in a
# join PostgreSQL reads all projects, and among 5,000 a list takes 3 ms in place of 1.
user_id = sa.bindparam("user_id", type_=Id)
project_id = sa.bindparam("project_id", type_=Id)
deletion = sa.select(Project.scheduled_deletion).filter_by(id=ProjectUser.project_id)
accessible_projects = sa.union_all(
    sa.select(ProjectUser.project_id.label("id")).where(
        ProjectUser.user_id == user_id, deletion.scalar_subquery().is_(None)
    ),
    sa.select(Project.id).where(
        # First, or SQLite looks at each project: 1.16 times a small user's list. Of one
        # column, since Lightning may grant no more: without it would be SELECT *.
        sa.exists(User.id).where(User.id == user_id, User.support_user.is_(True)),
        Project.allow_support_access.is_(True),
        Project.scheduled_deletion.is_(None),
    ),
).subquery()

is_accessible = (
    sa.exists().where(accessible_projects.c.id == Project.id).label("is_accessible")
)

caller_query = (
    sa.select(UserToken.user_id, UserToken.inserted_at)
    .join(User)
    .where(
        sa.or_(
            (UserToken.context == API_TOKEN)
            & (UserToken.token == sa.bindparam("token")),
            (UserToken.context == HASHED_API_TOKEN)
            & (UserToken.token == sa.bindparam("digest")),
        ),
        User.disabled.is_not(True),
    )
)

project_access_query = sa.select(is_accessible).where(Project.id == project_id)

listed_columns = (
    Job.id,
    Job.name,
    Job.adaptor,
    Job.inserted_at,
    Job.updated_at,
    Job.workflow_id,
    Workflow.project_id,
)

job_query = (
    sa.select(
        *listed_columns,
        Job.body,
        Workflow.name.label("workflow_name"),
        Project.name.label("project_name"),
        is_accessible,
    )
    .select_from(Job)
    .join(Workflow)
    .join(Project)
    .where(Job.id == sa.bindparam("job_id"), Workflow.deleted_at.is_(None))
)

health_query = sa.select(Job.id).limit(1)


def list_query(in_projects: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """The statement of a list: its total, and a page of its jobs beside it.

    A page without a job is one row, which has the total and no job.
    """
    # All of the list is sorted, so it is kept narrow.
    listed = (
        sa.select(Job.id, Job.inserted_at)
        .join(Workflow)
        .where(Workflow.deleted_at.is_(None), in_projects)
        .cte()
    )
    total = sa.select(sa.func.count().label("total")).select_from(listed).subquery()
    ids = (
        sa.select(listed.c.id)
        .order_by(listed.c.inserted_at, listed.c.id)
        .limit(sa.bindparam("limit"))
        .offset(sa.bindparam("offset", type_=sa.BigInteger))
    )
    jobs = sa.select(*listed_columns).select_from(Job).join(Workflow)
    page = jobs.where(Job.id.in_(ids)).subquery()
    return (
        sa.select(total, page)
        .select_from(total.outerjoin(page, sa.true()))
        .order_by(page.c.inserted_at, page.c.id)
    )


all_jobs_query = list_query(
    Workflow.project_id.in_(sa.select(accessible_projects.c.id))
)
project_jobs_query = list_query(Workflow.project_id == project_id).add_columns(
    project_access_query.scalar_subquery().label("is_accessible")
)


class Page(NamedTuple):
    """A page of jobs, the total of its list, and whether its project is accessible."""

    jobs: list[sa.RowMapping]
    total: int
    is_accessible: bool | None


def paginate(
    connection: sa.Connection,
    user_id: str,
    project_id: str | None,
    page: int,
    size: int,
) -> Page:
    """A page of the project's jobs or, for None, of all that the user can access.

    The oldest come first. For an unknown project ``is_accessible`` is None.
    """
    statement = all_jobs_query if project_id is None else project_jobs_query
    values = {"user_id": user_id, "project_id": project_id}
    limits = {"limit": size, "offset": (page - 1) * size}
    rows = connection.execute(statement, values | limits).mappings().all()
    jobs = [row for row in rows if row["id"] is not None]
    return Page(jobs, rows[0]["total"], rows[0].get("is_accessible", True))
