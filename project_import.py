"""Import projects from files, change members, and delete projects and users."""

import re
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, TypeVar

from click import ClickException
from sqlalchemy import Delete, Select, delete, exists, func, select

from database import db
from models import Job, Project, ProjectUser, User, UserToken, Workflow, new_id, utc_now
from project_files import Columns, ProjectFile, raise_errors
from schemas import is_id

ROLES = ("owner", "admin", "editor", "viewer")

Row = TypeVar("Row", Project, UserToken)

# An email and a role. "none" removes the member; None leaves the role of a member.
Member = tuple[str, str | None]


def parse_member(text: str) -> Member:
    """Return the member in EMAIL or EMAIL:ROLE."""
    # PostgreSQL cannot store surrogates, and terminals would obey control characters.
    part, roles = r"[^@:\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+", (*ROLES, "none")
    match = re.fullmatch(f"({part}@{part})(?::({'|'.join(roles)}))?", text)
    if match is None or len(match[1].lower()) > 255:
        raise ClickException(
            f"{ascii(text)} is neither EMAIL nor EMAIL:ROLE. "
            f"ROLE is one of {', '.join(roles)}."
        )
    return match[1].lower(), match[2]


def import_project(file: ProjectFile, members: Iterable[Member] = ()) -> Counter[str]:
    """Make the database agree with a file, and count the rows by what was done."""
    project_id = file.project["id"]
    in_project = Workflow.project_id == project_id
    old_project = rows_by_id(select(Project).filter_by(id=project_id))
    old_workflows = rows_by_id(select(Workflow).where(in_project))
    old_jobs = rows_by_id(select(Job).join(Workflow).where(in_project))
    check_id_ownership(file)
    counts = upsert(Project, [file.project], old_project)
    workflows = [columns for _, columns in file.workflows]
    counts += upsert(Workflow, workflows, old_workflows)
    counts += upsert(Job, [columns for _, columns in file.jobs], old_jobs)
    # The rows that are left are not in the file. A deleted workflow would delete its
    # jobs, so these are deleted, and counted, first.
    for kind, rows in (("jobs", old_jobs), ("workflows", old_workflows)):
        for row in rows.values():
            db.session.delete(row)
            counts[f"{kind} deleted"] += 1
        db.session.flush()
    counts.update(f"members {set_member(project_id, *member)}" for member in members)
    return counts


def rows_by_id(query: Select[Any]) -> dict[str, Any]:
    """Return the rows of a query by their ids."""
    return {row.id: row for row in db.session.scalars(query)}


def check_id_ownership(file: ProjectFile) -> None:
    """Reject a file with ids that workflows or jobs of another project have."""
    # Databases limit the parameters of a statement, so this reads the ids of all other
    # projects instead of asking for those of the file: 0.3 s among 100,000 jobs.
    is_other = Workflow.project_id != file.project["id"]
    workflow_ids = select(Workflow.id).where(is_other)
    job_ids = select(Job.id).join(Workflow).where(is_other)
    errors: list[str] = []
    for entries, query in (file.workflows, workflow_ids), (file.jobs, job_ids):
        other_ids = set(db.session.scalars(query))
        errors += [
            f"{location}: Belongs to another project."
            for location, columns in entries
            if columns["id"] in other_ids
        ]
    if errors:
        raise_errors(errors)


def upsert(
    model: type[Project | Workflow | Job], entries: list[Columns], old: dict[str, Any]
) -> Counter[str]:
    """Insert or update a row for each entry, take it out of ``old``, and count it."""
    counts: Counter[str] = Counter()
    kind, now = model.__tablename__, utc_now()
    for number, columns in enumerate(entries):
        row = old.pop(columns["id"], None) or model()
        if all(getattr(row, name) == columns[name] for name in columns):
            counts[f"{kind} unchanged"] += 1
            continue
        counts[f"{kind} {'updated' if row.id else 'created'}"] += 1
        for name, value in columns.items():
            setattr(row, name, value)
        if isinstance(row, Job):
            # Lists are sorted by time, so later jobs of the file get later times.
            time = now + timedelta(microseconds=number)
            row.inserted_at = row.inserted_at or time
            row.updated_at = columns.get("updated_at", time)
        db.session.add(row)
    db.session.flush()
    return counts


def access_hint(project_id: str) -> str | None:
    """Return why no user can read a project, and the remedy, or None."""
    members = select(exists().where(ProjectUser.project_id == project_id))
    if db.session.get_one(Project, project_id).scheduled_deletion:
        cause = "is scheduled for deletion"
        remedy = "Cancel the deletion in OpenFn, then import the project again."
    elif not db.session.scalar(members):
        cause = "has no members"
        remedy = f"Add a member with: flask set-member {project_id} EMAIL"
    else:
        return None
    return f"No user can read the project, because it {cause}. {remedy}"


def delete_project(project: Project) -> Counter[str]:
    """Delete a project with its jobs, workflows and memberships, and count those."""
    workflows = select(Workflow.id).filter_by(project_id=project.id)
    counts = delete_rows(
        jobs=delete(Job).where(Job.workflow_id.in_(workflows)),
        workflows=delete(Workflow).filter_by(project_id=project.id),
        members=delete(ProjectUser).filter_by(project_id=project.id),
    )
    db.session.delete(project)
    return counts


def delete_user(user: User) -> Counter[str]:
    """Delete a user with its tokens and memberships, and count those."""
    counts = delete_rows(
        tokens=delete(UserToken).filter_by(user_id=user.id),
        members=delete(ProjectUser).filter_by(user_id=user.id),
    )
    db.session.delete(user)
    return counts


def delete_rows(**statements: Delete) -> Counter[str]:
    """Execute the statements, and count the rows that they delete by their kind."""
    connection = db.session.connection()
    return Counter(
        {
            f"{kind} deleted": connection.execute(statement).rowcount
            for kind, statement in statements.items()
        }
    )


def set_member(project_id: str, email: str, role: str | None) -> str:
    """Give a user a role or remove the member, and return what was done."""
    user = find_user(email)
    if user is None and role != "none":
        user = User(id=new_id(), email=email)
        db.session.add(user)
    # For a user that does not exist, the query looks for NULL, which no member has.
    key = {"project_id": project_id, "user_id": user and user.id}
    member = db.session.scalar(select(ProjectUser).filter_by(**key))
    if member is None and role != "none":
        db.session.add(ProjectUser(**key, role=role or "viewer"))
        return "created"
    if member is None or role in (None, member.role):
        return "unchanged"
    if role == "none":
        db.session.delete(member)
        return "removed"
    member.role = role
    return "updated"


def find_user(email: str) -> User | None:
    """Return the user with an email, in any case."""
    query = select(User).where(func.lower(User.email) == email.lower())
    return db.session.scalar(query)


def require_user(email: str) -> User:
    """Return the user with an email. Raises ClickException if there is none."""
    user = find_user(email)
    if user is None:
        remedy = f"Add one with: flask set-member PROJECT_ID {email}"
        raise ClickException(f"There is no user {email}. {remedy}")
    return user


def require_row(model: type[Row], row_id: str, kind: str) -> Row:
    """Return the row with an id. Raises ClickException if there is none."""
    row = db.session.get(model, row_id.lower()) if is_id(row_id) else None
    if row is None:
        raise ClickException(f"There is no {kind} {row_id}. See: flask list-{kind}s")
    return row
