"""The tables, the access rule, and the queries that requests run."""

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from database import db

# The contexts that give access: a token as Lightning stores it, and a SHA-256 digest.
API_CONTEXTS = API_TOKEN, HASHED_API_TOKEN = "api", "api:sha256"

# In SQLite, Uuid would store ids without the hyphens that responses need.
UUIDText = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")


def utc_now() -> datetime:
    """Return the current time as the tables store it: UTC, without a time zone."""
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    """The base class of the tables."""

    metadata = db.metadata
    type_annotation_map = {str: sa.String(255)}

    id: Mapped[str] = mapped_column(
        UUIDText, primary_key=True, default=lambda: str(uuid4()), sort_order=-1
    )


def belongs_to(parent: type[Base], **options: Any) -> Mapped[str]:
    """Return a foreign key column; deleting the parent row deletes the child row."""
    key = sa.ForeignKey(f"{parent.__tablename__}.id", ondelete="CASCADE")
    return mapped_column(key, **options)


class User(Base):
    """A user, who can have tokens and be a member of projects."""

    __tablename__ = "users"

    email: Mapped[str] = mapped_column(unique=True)
    disabled: Mapped[bool | None] = mapped_column(default=False)
    support_user: Mapped[bool | None] = mapped_column(default=False)


class UserToken(Base):
    """An API token or its SHA-256 digest, depending on the context."""

    __tablename__ = "user_tokens"
    __table_args__ = (sa.UniqueConstraint("context", "token"),)

    user_id: Mapped[str] = belongs_to(User, index=True)
    token: Mapped[bytes]
    context: Mapped[str]
    inserted_at: Mapped[datetime] = mapped_column(default=utc_now)


class Project(Base):
    """A project; it contains workflows, and these contain the jobs."""

    __tablename__ = "projects"

    name: Mapped[str | None]
    scheduled_deletion: Mapped[datetime | None]
    allow_support_access: Mapped[bool | None] = mapped_column(index=True)


class ProjectUser(Base):
    """A user's membership of a project. Every role gives access."""

    __tablename__ = "project_users"
    __table_args__ = (
        sa.UniqueConstraint("project_id", "user_id"),
        sa.Index("project_users_user_id_project_id", "user_id", "project_id"),
    )

    user_id: Mapped[str] = belongs_to(User)
    project_id: Mapped[str] = belongs_to(Project)
    role: Mapped[str]


class Workflow(Base):
    """A workflow of a project. If it has ``deleted_at``, no response has its jobs."""

    __tablename__ = "workflows"
    # The index has every column that a list needs, so that no row has to be read.
    __table_args__ = (
        sa.Index("workflows_project_id", "project_id", "deleted_at", "id"),
    )

    name: Mapped[str | None]
    project_id: Mapped[str] = belongs_to(Project)
    deleted_at: Mapped[datetime | None]


class Job(Base):
    """A JavaScript step."""

    __tablename__ = "jobs"
    __table_args__ = (sa.Index("jobs_workflow_id", "workflow_id", "inserted_at", "id"),)

    name: Mapped[str | None]
    adaptor: Mapped[str | None] = mapped_column(
        default="@openfn/language-common@latest"
    )
    workflow_id: Mapped[str] = belongs_to(Workflow)
    inserted_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    # The last column: SQLite reads a row from its start, so lists skip large bodies.
    body: Mapped[str | None] = mapped_column(sa.Text)


user_id_param = sa.bindparam("user_id", type_=UUIDText)
project_id_param = sa.bindparam("project_id", type_=UUIDText)

# The access rule: members can access their projects, and support users the projects
# that allow support access. A project that is scheduled for deletion is closed to all.
# With a join in place of the subquery, PostgreSQL reads all projects: among 5,000
# projects, a list takes 3 ms instead of 1 ms.
scheduled = sa.select(Project.scheduled_deletion).filter_by(id=ProjectUser.project_id)
accessible_projects = sa.union_all(
    sa.select(ProjectUser.project_id.label("id")).where(
        ProjectUser.user_id == user_id_param, scheduled.scalar_subquery().is_(None)
    ),
    sa.select(Project.id).where(
        # SQLite evaluates this condition first. As the last one it would make the list
        # of a user in 10 projects 16 % slower. Without User.id, EXISTS would select all
        # columns, which the grants on Lightning's database do not cover.
        sa.exists(User.id).where(User.id == user_id_param, User.support_user.is_(True)),
        Project.allow_support_access.is_(True),
        Project.scheduled_deletion.is_(None),
    ),
).subquery()

is_accessible = sa.exists().where(accessible_projects.c.id == Project.id)
project_access_query = sa.select(is_accessible).where(Project.id == project_id_param)

# A stored digest is no token: what is presented is compared as it is with "api" only.
is_plain = sa.and_(
    UserToken.context == API_TOKEN, UserToken.token == sa.bindparam("token")
)
is_hashed = sa.and_(
    UserToken.context == HASHED_API_TOKEN, UserToken.token == sa.bindparam("digest")
)
caller_query = (
    sa.select(UserToken.user_id, UserToken.inserted_at)
    .join(User)
    .where(is_plain | is_hashed, User.disabled.is_not(True))
)

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
        is_accessible.label("is_accessible"),
    )
    .select_from(Job)
    .join(Workflow)
    .join(Project)
    .where(Job.id == sa.bindparam("job_id"), Workflow.deleted_at.is_(None))
)


def list_query(in_projects: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Return the query for one page of a list's jobs, each beside the list's total."""
    # The database sorts the whole list, so it reads only these two columns of it.
    listed_jobs = sa.select(Job.id, Job.inserted_at).join(Workflow)
    listed = listed_jobs.where(Workflow.deleted_at.is_(None), in_projects).cte()
    total = sa.select(sa.func.count().label("total")).select_from(listed).subquery()
    page_ids = sa.select(listed.c.id).order_by(listed.c.inserted_at, listed.c.id)
    page_ids = page_ids.limit(sa.bindparam("limit"))
    page_ids = page_ids.offset(sa.bindparam("offset", type_=sa.BigInteger))
    jobs = sa.select(*listed_columns).select_from(Job).join(Workflow)
    page = jobs.where(Job.id.in_(page_ids)).subquery()
    rows = sa.select(total, page).select_from(total.outerjoin(page, sa.true()))
    return rows.order_by(page.c.inserted_at, page.c.id)


all_jobs_query = list_query(Workflow.project_id.in_(sa.select(accessible_projects)))
project_jobs_query = list_query(Workflow.project_id == project_id_param).add_columns(
    project_access_query.scalar_subquery().label("is_accessible")
)


def paginate(
    connection: sa.Connection,
    user_id: str,
    project_id: str | None,
    page: int,
    size: int,
) -> tuple[list[sa.RowMapping], int, bool | None]:
    """Return a page of jobs, their total, and the access (None: unknown project)."""
    query = all_jobs_query if project_id is None else project_jobs_query
    values = {"user_id": user_id, "project_id": project_id}
    limits = {"limit": size, "offset": (page - 1) * size}
    rows = connection.execute(query, values | limits).mappings().all()
    # An empty page is one row, which has the total and no job.
    jobs = [row for row in rows if row["id"] is not None]
    return jobs, rows[0]["total"], rows[0].get("is_accessible", True)


def check_queries(connection: sa.Connection) -> None:
    """Run each query that requests run, so that a missing column raises an error."""
    unknown = dict.fromkeys(["user_id", "project_id", "job_id", "token", "digest"])
    for query in (caller_query, all_jobs_query, project_jobs_query, job_query):
        connection.execute(query, {**unknown, "limit": 1, "offset": 0})
