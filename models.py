"""The tables, the access rule, and the statements that requests run."""

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from sqlalchemy.orm import Mapped, mapped_column

from database import db

# The contexts that open the API: of a token as Lightning keeps it, and of a digest.
PLAIN, DIGEST = "api", "api:sha256"

# Text of 36 characters in Python, as answers have it, and in SQLite too, where Uuid
# would keep the 32 digits alone and put the hyphens back into every value it reads.
Id = db.Uuid(as_uuid=False).with_variant(db.String(36), "sqlite")

Text255 = db.String(255)


def new_id() -> str:
    """A random UUID in the form that answers and files have."""
    return str(uuid4())


def utc_now() -> datetime:
    """The time as the tables keep it: UTC, without a time zone."""
    return datetime.now(UTC).replace(tzinfo=None)


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
    allow_support_access: Mapped[bool | None] = mapped_column(default=False, index=True)


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
    __table_args__ = (db.Index("jobs_workflow_id", "workflow_id", "inserted_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str | None] = mapped_column(Text255)
    adaptor: Mapped[str | None] = mapped_column(
        Text255, default="@openfn/language-common@latest"
    )
    workflow_id: Mapped[str] = belongs_to(Workflow)
    inserted_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    body: Mapped[str | None] = mapped_column(db.Text)


# The access rule: a member's projects, and a support user's where the project allows
# it, none of them scheduled for deletion. A member's are looked up one by one: in a
# join PostgreSQL reads all projects, and among 5,000 a list takes 3 ms in place of 1.
user_id, project_id = db.bindparam("user_id"), db.bindparam("project_id")
its_deletion = db.select(Project.scheduled_deletion).where(
    Project.id == ProjectUser.project_id
)
is_support_user = db.select(User.id).where(User.id == user_id, User.support_user)
accessible_projects = db.union_all(
    db.select(ProjectUser.project_id.label("id")).where(
        ProjectUser.user_id == user_id, its_deletion.scalar_subquery().is_(None)
    ),
    db.select(Project.id).where(
        is_support_user.exists(),
        Project.allow_support_access,
        Project.scheduled_deletion.is_(None),
    ),
).subquery()

is_accessible = (
    db.exists().where(accessible_projects.c.id == Project.id).label("is_accessible")
)

find_caller = (
    db.select(UserToken.user_id, UserToken.inserted_at)
    .join(User)
    .where(
        db.or_(
            (UserToken.context == PLAIN) & (UserToken.token == db.bindparam("token")),
            (UserToken.context == DIGEST) & (UserToken.token == db.bindparam("digest")),
        ),
        User.disabled.is_not(True),
    )
)

find_project = db.select(is_accessible).where(Project.id == project_id)

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
        is_accessible,
    )
    .select_from(Job)
    .join(Workflow)
    .join(Project)
    .where(Job.id == db.bindparam("job_id"), Workflow.deleted_at.is_(None))
)

can_read = db.select(Job.id).limit(1)


def listing(in_projects: db.ColumnElement[bool]) -> db.Select:
    """The statement of a list: its total, and a page of its jobs beside it.

    A page without a job is one row, which has the total and no job.
    """
    # All of the list is sorted, so it is kept narrow.
    listed = (
        db.select(Job.id, Job.inserted_at)
        .join(Workflow)
        .where(Workflow.deleted_at.is_(None), in_projects)
        .cte()
    )
    total = db.select(db.func.count().label("total")).select_from(listed).subquery()
    ids = (
        db.select(listed.c.id)
        .order_by(listed.c.inserted_at, listed.c.id)
        .limit(db.bindparam("limit"))
        .offset(db.bindparam("offset", type_=db.BigInteger))
    )
    jobs = db.select(*listed_columns).select_from(Job).join(Workflow)
    page = jobs.where(Job.id.in_(ids)).subquery()
    return (
        db.select(total, page)
        .select_from(total.outerjoin(page, db.true()))
        .order_by(page.c.inserted_at, page.c.id)
    )


all_jobs = listing(Workflow.project_id.in_(db.select(accessible_projects.c.id)))
project_jobs = listing(Workflow.project_id == project_id).add_columns(
    find_project.scalar_subquery().label("is_accessible")
)


def paginate(
    connection: db.Connection, page: int, page_size: int, **ids: str | None
) -> tuple[list[db.RowMapping], int, bool | None]:
    """A page of jobs, the total of its list, and whether the project is accessible.

    The list is that of ``user_id`` or, if there is one, of ``project_id``; it begins
    with the oldest job. Past its last page there are none.
    """
    statement = all_jobs if ids["project_id"] is None else project_jobs
    limits = {"limit": page_size, "offset": (page - 1) * page_size}
    rows = connection.execute(statement, ids | limits).mappings().all()
    found = [row for row in rows if row["id"] is not None]
    return found, rows[0]["total"], rows[0].get("is_accessible")
