"""OpenFn project state files: their form, and making the database agree with one."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from models import Job, Project, ProjectUser, User, Workflow, utc_now
from schemas import Id

ROLES = ("owner", "admin", "editor", "viewer")


class InvalidState(Exception):
    """Says what is wrong with a state file or with what it asks for, a line a fault."""

    def __init__(self, *faults: str) -> None:
        super().__init__(*faults)
        self.faults = faults


def storable(text: str) -> None:
    """Refuse text that no database column can hold."""
    if "\0" in text:
        raise ValidationError("Must not contain NUL.")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValidationError("Must not contain lone surrogates.")


class Time(fields.NaiveDateTime):
    """An ISO 8601 time, UTC unless it says otherwise, as the tables keep it."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> datetime:
        try:
            return super()._deserialize(value, *args, **kwargs)
        except OverflowError:
            raise ValidationError("Out of range.") from None


class Entries(fields.Field[list[dict[str, Any]]]):
    """The entries of an object or an array, each with the ``place`` that it stands at.

    Those marked for deletion are dropped unread.
    """

    def __init__(self, schema: type[Schema]) -> None:
        super().__init__(required=True)
        self.schema = schema()

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> list[dict]:
        if not isinstance(value, dict | list):
            raise ValidationError("Must be an object or an array.")
        entries, faults = [], {}
        for key, entry in (
            value.items() if isinstance(value, dict) else enumerate(value)
        ):
            if isinstance(entry, dict) and entry.get("delete") is True:
                continue
            try:
                entries.append(self.schema.load(entry) | {"place": step(key)})
            except ValidationError as error:
                faults[key] = error.messages
        if faults:
            raise ValidationError(faults)
        return entries


class StateSchema(Schema):
    """What all objects of a state file have."""

    class Meta:
        """Keys that the service has no use for may stand anywhere."""

        unknown = EXCLUDE

    error_messages = {"type": "Must be an object."}

    id = Id(required=True)
    name = fields.String(required=True, validate=[validate.Length(max=255), storable])


class JobSchema(StateSchema):
    """A job as a state file has it."""

    body = fields.String(required=True, validate=storable)
    adaptor = fields.String(validate=[validate.Length(max=255), storable])
    inserted_at = Time(timezone=UTC, allow_none=True)
    updated_at = Time(timezone=UTC, allow_none=True)


class WorkflowSchema(StateSchema):
    """A workflow as a state file has it."""

    jobs = Entries(JobSchema)
    deleted_at = Time(timezone=UTC, allow_none=True)


class ProjectSchema(StateSchema):
    """A project as a state file has it."""

    workflows = Entries(WorkflowSchema)
    scheduled_deletion = Time(timezone=UTC, allow_none=True)
    allow_support_access = fields.Boolean(truthy={True}, falsy={False}, allow_none=True)


class Object(dict[str, Any]):
    """A JSON object that remembers the keys it had twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [
            key for key, n in Counter(k for k, _ in pairs).items() if n > 1
        ]


def read_state(content: bytes) -> dict[str, Any]:
    """The project in a state file, checked; each of its entries has its ``place``.

    Raises InvalidState, which names every place at fault.
    """
    try:
        document = parse_json(content)
        faults = list(repeated_keys(document))
    except RecursionError:
        raise InvalidState("The file is nested too deep.") from None
    if faults:
        raise InvalidState(*faults)
    place, project = "", document
    if isinstance(document, dict) and "data" in document and "id" not in document:
        place, project = ".data", document["data"]
    try:
        project = ProjectSchema().load(project)
    except ValidationError as error:
        raise InvalidState(*lines(error.normalized_messages(), place)) from None
    tie_entries(project, place)
    refuse_repeated_ids(project["workflows"])
    refuse_repeated_ids(jobs_of(project))
    return project


def tie_entries(project: dict[str, Any], place: str) -> None:
    """Give each workflow and job its whole place and the id of what it belongs to."""
    for workflow in project["workflows"]:
        workflow["project_id"] = project["id"]
        workflow["place"] = f"{place}.workflows{workflow['place']}".lstrip(".")
        for job in workflow["jobs"]:
            job["workflow_id"] = workflow["id"]
            job["place"] = f"{workflow['place']}.jobs{job['place']}"


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark."""
    try:
        return json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=Object,
            # No number is kept, and int() refuses the longest.
            parse_int=float,
            parse_constant=not_json,
        )
    except UnicodeDecodeError as error:
        raise InvalidState(f"The file is not UTF-8 at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise InvalidState(f"The file is not JSON: {error}.") from None


def not_json(constant: str) -> None:
    """Refuse what Python's parser takes and RFC 8259 does not."""
    raise InvalidState(f"The file is not JSON: {constant} is no number.")


def repeated_keys(value: Any, place: str = "") -> Iterator[str]:
    """A line for each key that stands twice in one object."""
    if isinstance(value, Object):
        for key in value.repeated:
            yield f"{place}{step(key)}".lstrip(".") + ": Stands twice in one object."
        items = value.items()
    else:
        items = enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from repeated_keys(inner, place + step(key))


def step(key: str | int) -> str:
    """One step of a place in a file: ``[2]`` in an array, ``.name`` in an object."""
    if isinstance(key, int):
        return f"[{key}]"
    return f".{key}" if key.isprintable() else f".{json.dumps(key)}"


def lines(messages: dict | list, place: str) -> Iterator[str]:
    """Marshmallow's messages as lines that each begin with a place."""
    if isinstance(messages, list):
        yield from (f"{place.lstrip('.') or 'The file'}: {text}" for text in messages)
        return
    for key, inner in messages.items():
        # Marshmallow's own key, unless it is the name of a workflow or a job.
        own = key == "_schema" and isinstance(inner, list)
        yield from lines(inner, place if own else place + step(key))


def jobs_of(project: dict[str, Any]) -> list[dict[str, Any]]:
    """All jobs of a project that was read, in the order of the file."""
    return [job for workflow in project["workflows"] for job in workflow["jobs"]]


def refuse_repeated_ids(entries: Iterable[dict[str, Any]]) -> None:
    """Raise InvalidState where two of the entries have one id."""
    places, faults = {}, []
    for entry in entries:
        first = places.setdefault(entry["id"], entry["place"])
        if first != entry["place"]:
            faults.append(f"{entry['place']}.id: Stands at {first} too.")
    if faults:
        raise InvalidState(*faults)


class Member(NamedTuple):
    """A wish about one member: a role, "none", or just to be one."""

    email: str
    role: str | None


def read_member(text: str) -> Member:
    """The member that EMAIL or EMAIL:ROLE names; InvalidState where it names none."""
    email, colon, role = text.partition(":")
    email = email.lower()
    part = r"[^@\s\0\ud800-\udfff]+"
    if len(email) > 255 or not re.fullmatch(f"{part}@{part}", email):
        raise InvalidState(f"--member {ascii(text)}: Not a valid email address.")
    if colon and role not in (*ROLES, "none"):
        raise InvalidState(
            f"--member {ascii(text)}: The role is none of {', '.join(ROLES)}, none."
        )
    return Member(email, role or None)


def import_project(
    session: Session, project: dict[str, Any], members: Iterable[Member] = ()
) -> Counter[str]:
    """Make the database agree with a project that was read, and count what that took.

    Raises InvalidState where an id belongs to another project.
    """
    refuse_ids_of_others(session, project)
    row = session.get(Project, project["id"])
    put(session, Project, row, pick(project, Project))
    session.flush()
    in_project = Workflow.project_id == project["id"]
    workflows = rows_by_id(session, select(Workflow).where(in_project))
    jobs = rows_by_id(session, select(Job).join(Workflow).where(in_project))
    counts = Counter()
    counts.update(import_workflows(session, project, workflows))
    counts.update(import_jobs(session, project, jobs))
    # What is left of the rows has no entry in the file any more.
    counts.update(delete_rows(session, "jobs", jobs))
    counts.update(delete_rows(session, "workflows", workflows))
    counts.update(
        f"members {set_member(session, project['id'], member)}" for member in members
    )
    return counts


def import_workflows(
    session: Session, project: dict[str, Any], rows: dict[str, Workflow]
) -> Iterator[str]:
    """What was done with each workflow of the file, whose row leaves ``rows``."""
    for workflow in project["workflows"]:
        row = rows.pop(workflow["id"], None)
        yield f"workflows {put(session, Workflow, row, pick(workflow, Workflow))}"
    session.flush()


def import_jobs(
    session: Session, project: dict[str, Any], rows: dict[str, Job]
) -> Iterator[str]:
    """What was done with each job of the file, whose row leaves ``rows``."""
    now = utc_now()
    for place, job in enumerate(jobs_of(project)):
        values = {
            name: value for name, value in pick(job, Job).items() if value is not None
        }
        row = rows.pop(job["id"], None)
        if row is None:
            # Later jobs of the file come later in lists.
            time = now + timedelta(microseconds=place)
            values = {"inserted_at": time, "updated_at": time} | values
        done = put(session, Job, row, values)
        if done == "updated" and "updated_at" not in values:
            row.updated_at = now
        yield f"jobs {done}"
    session.flush()


def delete_rows(session: Session, kind: str, rows: dict[str, Any]) -> Iterator[str]:
    """What was done with each of the rows: it was deleted."""
    for row in rows.values():
        session.delete(row)
        yield f"{kind} deleted"
    session.flush()


def refuse_ids_of_others(session: Session, project: dict[str, Any]) -> None:
    """Raise InvalidState for workflows and jobs that another project has already."""
    others = Workflow.project_id != project["id"]
    faults = []
    for query, entries in (
        (select(Workflow.id).where(others), project["workflows"]),
        (select(Job.id).join(Workflow).where(others), jobs_of(project)),
    ):
        column = query.selected_columns[0]
        places = {entry["id"]: entry["place"] for entry in entries}
        ids = list(places)
        # A statement takes no more than some ten thousand parameters.
        for start in range(0, len(ids), 1000):
            taken = session.scalars(query.where(column.in_(ids[start : start + 1000])))
            faults += [
                f"{places[id_]}.id: Belongs to another project." for id_ in taken
            ]
    if faults:
        raise InvalidState(*faults)


def rows_by_id(session: Session, query: Select) -> dict[str, Any]:
    """The rows of a query by their ids."""
    return {row.id: row for row in session.scalars(query)}


def pick(entry: dict[str, Any], model: type) -> dict[str, Any]:
    """What an entry says of the columns of its table."""
    return {
        name: entry[name] for name in model.__table__.columns.keys() if name in entry
    }


def put(session: Session, model: type, row: Any, values: dict[str, Any]) -> str:
    """Add a row where there is none, else change it; says which, or "unchanged"."""
    if row is None:
        session.add(model(**values))
        return "created"
    for name, value in values.items():
        setattr(row, name, value)
    return "updated" if session.is_modified(row) else "unchanged"


def set_member(session: Session, project_id: str, member: Member) -> str:
    """Give a user the role, or take it; says what was done."""
    user = find_user(session, member.email)
    if user is None and member.role != "none":
        user = User(email=member.email)
        session.add(user)
        session.flush()
    membership = user and session.scalar(
        select(ProjectUser).filter_by(project_id=project_id, user_id=user.id)
    )
    if member.role == "none":
        if membership is None:
            return "unchanged"
        session.delete(membership)
        return "removed"
    values = {"project_id": project_id, "user_id": user.id}
    if member.role or not membership:
        values["role"] = member.role or "viewer"
    return put(session, ProjectUser, membership, values)


def find_user(session: Session, email: str) -> User | None:
    """The user with the email, in any case."""
    return session.scalar(select(User).where(func.lower(User.email) == email.lower()))
