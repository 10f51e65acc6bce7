"""Making the database agree with a project's file; members; deleting a project."""

import re
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from sqlalchemy import BindParameter, Select, bindparam, delete, func, select

from database import Refused, db
from models import Job, Project, ProjectUser, User, Workflow, new_id, utc_now
from project_files import Entry, State

ROLES = ("owner", "admin", "editor", "viewer")

# An email, and a role for its user; "none" to remove, None to be a member at all.
Member = tuple[str, str | None]


def parse_member(text: str) -> Member:
    """The wish in EMAIL or EMAIL:ROLE; Refused where it is none."""
    part, roles = r"[^@:\s\0\ud800-\udfff]+", (*ROLES, "none")
    match = re.fullmatch(f"({part}@{part})(?::({'|'.join(roles)}))?", text)
    if match is None or len(match[1].lower()) > 255:
        raise Refused(
            f"--member {ascii(text)}: Must be an email address, or one with a colon "
            f"and a role: {', '.join(roles)}."
        )
    return match[1].lower(), match[2]


def import_state(state: State, members: Iterable[Member] = ()) -> Counter[str]:
    """Make the database agree with a state, and count what that took.

    Raises InvalidFile where an id belongs to another project.
    """
    project_id = state.project.values["id"]
    in_project = Workflow.project_id == project_id
    workflows = rows_by_id(select(Workflow).where(in_project))
    jobs = rows_by_id(select(Job).join(Workflow).where(in_project))
    check_id_ownership(state, workflows, jobs)
    db.session.merge(Project(**state.project.values))
    db.session.flush()
    counts = upsert(Workflow, state.workflows, workflows)
    counts += upsert(Job, state.jobs, jobs)
    # The rows that are left have no entry; jobs first, or they go with their workflow.
    for kind, rows in (("jobs", jobs), ("workflows", workflows)):
        for row in rows.values():
            db.session.delete(row)
            counts[f"{kind} deleted"] += 1
        db.session.flush()
    counts.update(f"members {set_member(project_id, *member)}" for member in members)
    return counts


def rows_by_id(query: Select[Any]) -> dict[str, Any]:
    """The rows of a query by their ids."""
    return {row.id: row for row in db.session.scalars(query)}


def check_id_ownership(
    state: State, workflows: dict[str, Workflow], jobs: dict[str, Job]
) -> None:
    """Raise InvalidFile where a row of another project has an id of the file."""
    for model, entries, ours in (
        (Workflow, state.workflows, workflows),
        (Job, state.jobs, jobs),
    ):
        paths = {entry.values["id"]: entry.path for entry in entries}
        new = [row_id for row_id in paths if row_id not in ours]
        # Within the statement, which takes no more than some thousands of parameters.
        ids: BindParameter[Any] = bindparam(
            "ids", new, expanding=True, literal_execute=True
        )
        foreign = set(db.session.scalars(select(model.id).where(model.id.in_(ids))))
        for row_id, path in paths.items():
            if row_id in foreign:
                state.reader.add_fault((*path, "id"), "Belongs to another project.")
    state.reader.refuse_faults()


def upsert(
    model: type[Workflow | Job], entries: list[Entry], rows: dict[str, Any]
) -> Counter[str]:
    """Add or change a row for each entry, taken out of ``rows``, and count that."""
    counts: Counter[str] = Counter()
    kind, now = model.__tablename__, utc_now()
    for number, (_, values) in enumerate(entries):
        row = rows.pop(values["id"], None) or model()
        if all(getattr(row, name) == values[name] for name in values):
            counts[f"{kind} unchanged"] += 1
            continue
        counts[f"{kind} {'updated' if row.id else 'created'}"] += 1
        for name, value in values.items():
            setattr(row, name, value)
        if isinstance(row, Job):
            # Later jobs of the file come later in lists.
            time = now + timedelta(microseconds=number)
            row.inserted_at = row.inserted_at or time
            row.updated_at = values.get("updated_at", time)
        db.session.add(row)
    db.session.flush()
    return counts


def delete_project(project: Project) -> Counter[str]:
    """Delete a project with all that is in it, and count that."""
    workflows = select(Workflow.id).filter_by(project_id=project.id)
    counts: Counter[str] = Counter()
    for kind, statement in (
        ("jobs", delete(Job).where(Job.workflow_id.in_(workflows))),
        ("workflows", delete(Workflow).filter_by(project_id=project.id)),
        ("members", delete(ProjectUser).filter_by(project_id=project.id)),
    ):
        done = db.session.connection().execute(statement)
        counts[f"{kind} deleted"] = done.rowcount
    db.session.delete(project)
    return counts


def set_member(project_id: str, email: str, role: str | None) -> str:
    """Give a user the role, or take it; says what was done."""
    user = find_user(email)
    if user is None and role != "none":
        user = User(id=new_id(), email=email)
        db.session.add(user)
    # A user who is not there has no id, and None is no member's.
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
    """The user with the email, in any case."""
    same = func.lower(User.email) == email.lower()
    return db.session.scalar(select(User).where(same))
