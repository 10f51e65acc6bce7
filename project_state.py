"""OpenFn project state files: their form, and making the database agree with one."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate
from sqlalchemy import Select, func, select

from database import db
from models import Job, Project, ProjectUser, User, Workflow, new_id, utc_now
from schemas import Id, Time

ROLES = ("owner", "admin", "editor", "viewer")

# An email, and a role for its user; "none" to remove, None to be a member at all.
Member = tuple[str, str | None]


class InvalidState(Exception):
    """Says what is wrong with a state file or a wish: an argument, a line, a fault."""


def storable(text: str) -> None:
    """Refuse text that no database column can hold."""
    if "\0" in text:
        raise ValidationError("Must not contain NUL.")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValidationError("Must not contain lone surrogates.")


def boolean(value: Any) -> None:
    """Refuse numbers too, some of which Python takes for booleans."""
    if not isinstance(value, bool):
        raise ValidationError("Not a valid boolean.")


class EntrySchema(Schema):
    """What all objects of a state file have."""

    error_messages = {"type": "Must be an object."}

    id = Id(required=True)
    name = fields.String(required=True, validate=[validate.Length(max=255), storable])


class JobSchema(EntrySchema):
    """A job as a state file has it."""

    parent_column = "workflow_id"
    body = fields.String(required=True, validate=storable)
    adaptor = fields.String(validate=[validate.Length(max=255), storable])
    inserted_at = Time(timezone=UTC, allow_none=True)
    updated_at = Time(timezone=UTC, allow_none=True)


class WorkflowSchema(EntrySchema):
    """A workflow as a state file has it; its jobs are read one by one."""

    parent_column = "project_id"
    jobs = fields.Raw(required=True)
    deleted_at = Time(timezone=UTC, allow_none=True)


class ProjectSchema(EntrySchema):
    """A project as a state file has it; its workflows are read one by one."""

    workflows = fields.Raw(required=True)
    scheduled_deletion = Time(timezone=UTC, allow_none=True)
    allow_support_access = fields.Raw(allow_none=True, validate=boolean)


class Entry(NamedTuple):
    """An object of a state file: where it stands, and what it says of its columns."""

    place: str
    values: dict[str, Any]


class State(NamedTuple):
    """A project, and its workflows and jobs in the order of the file."""

    project: Entry
    workflows: list[Entry]
    jobs: list[Entry]


def read_state(content: bytes) -> State:
    """The project in a state file, checked.

    Raises InvalidState, which names every place at fault.
    """
    document, place = parse_json(content), ""
    if isinstance(document, dict) and "data" in document and "id" not in document:
        document, place = document["data"], "data"
    faults = []
    project = read_entry(ProjectSchema(), document, place, faults)
    workflows = read_entries(WorkflowSchema(), project, "workflows", faults)
    jobs = []
    for workflow in workflows:
        jobs += read_entries(JobSchema(), workflow, "jobs", faults)
    for entries in (workflows, jobs):
        faults += repeated_ids(entries)
    if faults:
        raise InvalidState(*faults)
    return State(project, workflows, jobs)


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark."""
    try:
        return json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=without_repeated_keys,
            # No number is kept, and int() refuses the longest.
            parse_int=float,
            parse_constant=not_json,
        )
    except UnicodeDecodeError as error:
        raise InvalidState(f"The file is not UTF-8 at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise InvalidState(f"The file is not JSON: {error}.") from None
    except RecursionError:
        raise InvalidState("The file is nested too deep.") from None


def not_json(constant: str) -> None:
    """Refuse what Python's parser takes and RFC 8259 does not."""
    raise InvalidState(f"The file is not JSON: {constant} is no number.")


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; InvalidState where a key stands twice in it."""
    keys = Counter(key for key, _ in pairs)
    if len(keys) < len(pairs):
        [(key, _)] = keys.most_common(1)
        raise InvalidState(f"The file has {json.dumps(key)} twice in one object.")
    return dict(pairs)


def read_entry(schema: Schema, value: Any, place: str, faults: list[str]) -> Entry:
    """The object at a place, as far as it has no faults, of which each adds a line."""
    try:
        values = schema.load(value, unknown=EXCLUDE)
    except ValidationError as error:
        values = error.valid_data
        for key, messages in error.normalized_messages().items():
            at = place or "The file" if key == "_schema" else join(place, key)
            faults += [f"{at}: {message}" for message in messages]
    return Entry(place, values)


def read_entries(
    schema: Schema, parent: Entry, name: str, faults: list[str]
) -> list[Entry]:
    """The entries of an object or an array; those marked for deletion go unread."""
    # What is missing or null is among the faults already.
    value, place = parent.values.pop(name, []), join(parent.place, name)
    if not isinstance(value, dict | list):
        faults.append(f"{place}: Must be an object or an array.")
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    entries = [
        read_entry(schema, entry, join(place, key), faults)
        for key, entry in items
        if not (isinstance(entry, dict) and entry.get("delete") is True)
    ]
    for entry in entries:
        entry.values[schema.parent_column] = parent.values.get("id")
    return entries


def join(place: str, key: str | int) -> str:
    """A place and a step from it: ``[2]`` in an array, ``.name`` in an object."""
    if isinstance(key, int):
        return f"{place}[{key}]"
    return f"{place}.{key if key.isprintable() else json.dumps(key)}".lstrip(".")


def repeated_ids(entries: Iterable[Entry]) -> Iterator[str]:
    """A line for each entry whose id stands at an earlier place too."""
    places = {}
    for place, values in entries:
        first = places.setdefault(values.get("id", place), place)
        if first != place:
            yield f"{place}.id: Stands at {first} too."


def read_member(text: str) -> Member:
    """The wish in EMAIL or EMAIL:ROLE; InvalidState where it is none."""
    part, roles = r"[^@:\s\0\ud800-\udfff]+", (*ROLES, "none")
    match = re.fullmatch(f"({part}@{part})(?::({'|'.join(roles)}))?", text)
    if match is None or len(match[1].lower()) > 255:
        raise InvalidState(
            f"--member {ascii(text)}: Must be an email address, or one with a colon "
            f"and a role: {', '.join(roles)}."
        )
    return match[1].lower(), match[2]


def import_state(state: State, members: Iterable[Member] = ()) -> Counter[str]:
    """Make the database agree with a state, and count what that took.

    Raises InvalidState where an id belongs to another project.
    """
    project_id, now = state.project.values["id"], utc_now()
    in_project = Workflow.project_id == project_id
    workflows = rows_by_id(select(Workflow).where(in_project))
    jobs = rows_by_id(select(Job).join(Workflow).where(in_project))
    counts, faults = Counter(), []
    db.session.merge(Project(**state.project.values))
    db.session.flush()
    for entry in state.workflows:
        counts[f"workflows {put(Workflow, entry, workflows, faults)}"] += 1
    db.session.flush()
    for number, entry in enumerate(state.jobs):
        # Later jobs of the file come later in lists.
        time = now + timedelta(microseconds=number)
        counts[f"jobs {put_job(entry, jobs, faults, time)}"] += 1
    if faults:
        raise InvalidState(*faults)
    # The rows that are left have no entry; jobs first, or they go with their workflow.
    for kind, rows in (("jobs", jobs), ("workflows", workflows)):
        for row in rows.values():
            db.session.delete(row)
            counts[f"{kind} deleted"] += 1
        db.session.flush()
    counts.update(f"members {set_member(project_id, *member)}" for member in members)
    return counts


def rows_by_id(query: Select) -> dict[str, Any]:
    """The rows of a query by their ids."""
    return {row.id: row for row in db.session.scalars(query)}


def put(model: type, entry: Entry, rows: dict[str, Any], faults: list[str]) -> str:
    """Add or change the row of an entry, which leaves ``rows``; says what was done."""
    is_ours = rows.pop(entry.values["id"], None) is not None
    # Else a new row's look-up would send those before it one by one.
    with db.session.no_autoflush:
        row = db.session.merge(model(**entry.values))
    if row in db.session.new:
        return "created"
    if not is_ours:
        faults.append(f"{entry.place}.id: Belongs to another project.")
    return "updated" if db.session.is_modified(row) else "unchanged"


def put_job(entry: Entry, rows: dict, faults: list[str], time: datetime) -> str:
    """The same for a job; the time is for those of its times that the entry lacks."""
    values = {name: v for name, v in entry.values.items() if v is not None}
    row = rows.get(values["id"])
    if row is None:
        values = {"inserted_at": time, "updated_at": time} | values
    done = put(Job, Entry(entry.place, values), rows, faults)
    if row and done == "updated" and "updated_at" not in values:
        row.updated_at = time
    return done


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
