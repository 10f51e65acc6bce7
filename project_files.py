"""The files that OpenFn writes of a project: their two forms, and every fault."""

import re
from collections.abc import Iterator
from datetime import UTC
from typing import Any, NamedTuple

from marshmallow import EXCLUDE, Schema, ValidationError, fields, post_load, validate

from documents import InvalidFile, parse, told
from schemas import Id, Time, is_id

MISSING = "Missing data for required field."
NOT_DEPLOYED = f"{MISSING} Deploy the project, or pull it once."

# How many faults are told.
MOST_FAULTS = 200

# What a project file has elsewhere than a state file, and than our tables.
PROJECT_FILE_KEYS = {
    "id": "openfn.uuid",
    "scheduled_deletion": "options.scheduled_deletion",
    "allow_support_access": "options.allow_support_access",
    "deleted_at": "openfn.deleted_at",
    "jobs": "steps",
    "body": "expression",
    "inserted_at": "openfn.inserted_at",
    "updated_at": "openfn.updated_at",
}

# The keys and the numbers that lead from the top of a file to a place in it.
Place = tuple[str | int, ...]


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
    """What all objects of a file have."""

    error_messages = {"type": "Must be an object."}

    id = Id(required=True)
    name = fields.String(required=True, validate=[validate.Length(max=255), storable])


class ProjectSchema(EntrySchema):
    """A project; its workflows are read one by one."""

    workflows = fields.Raw(required=True)
    scheduled_deletion = Time(timezone=UTC, allow_none=True)
    allow_support_access = fields.Raw(allow_none=True, validate=boolean)


class WorkflowSchema(EntrySchema):
    """A workflow; its jobs are read one by one."""

    jobs = fields.Raw(required=True)
    deleted_at = Time(timezone=UTC, allow_none=True)


class JobSchema(EntrySchema):
    """A job."""

    body = fields.String(required=True, validate=storable)
    adaptor = fields.String(validate=[validate.Length(max=255), storable])
    inserted_at = Time(timezone=UTC, allow_none=True)
    updated_at = Time(timezone=UTC, allow_none=True)

    @post_load
    def without_nulls(self, values: dict[str, Any], **_: Any) -> dict[str, Any]:
        """A time that is null is one that the file lacks."""
        return {name: value for name, value in values.items() if value is not None}


class Entry(NamedTuple):
    """An object of a file: where it stands, and what it says of its columns."""

    path: Place
    values: dict[str, Any]


class State(NamedTuple):
    """A project, its workflows and its jobs, in the order of the file."""

    project: Entry
    workflows: list[Entry]
    jobs: list[Entry]
    reader: "Reader"


def read_state(content: bytes) -> State:
    """The project in a state file or a project file, checked.

    Raises InvalidFile, which names every place at fault.
    """
    document = parse(content)
    path: Place = ()
    if isinstance(document, dict) and "data" in document and "id" not in document:
        document, path = document["data"], ("data",)
    reader = Reader(PROJECT_FILE_KEYS if is_project_file(document) else {})
    project = reader.read_object(ProjectSchema(), document, path)
    workflows = reader.read_children(
        WorkflowSchema(), "workflows", [project], "project_id"
    )
    jobs = reader.read_children(JobSchema(), "jobs", workflows, "workflow_id")
    reader.refuse_faults()
    return State(project, workflows, jobs, reader)


def is_project_file(document: Any) -> bool:
    """Whether it is one; InvalidFile where it is of a version that is not known.

    A state file's ``id`` is a UUID; older project files have ``cli`` or ``version``
    in place of ``schema_version``.
    """
    marks = {"schema_version", "openfn", "cli", "version"}
    if not isinstance(document, dict) or not marks & document.keys():
        return False
    if is_id(document.get("id")):
        return False
    version = document.get("schema_version", "missing")
    # Not of an array, which aliases may have made a long one.
    text = told(str(version)) if isinstance(version, str | float) else "of another type"
    if text != "4.0":
        raise InvalidFile(f"schema_version: Must be 4.0, not {text}.")
    return True


class Reader:
    """Reads the objects of a file, and gathers what is wrong with them."""

    def __init__(self, keys: dict[str, str]) -> None:
        """``keys`` are the file's own, by those of a state file."""
        self.keys = keys
        self.faults: list[str] = []
        self.untold = 0
        # Where each id and each array was read first.
        self.paths: dict[Any, Place] = {}

    def add_fault(self, path: Place, message: str) -> None:
        """Add the line of a fault, or count it behind hundreds."""
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(f"{self.place(path) or 'The file'}: {message}")
        else:
            self.untold += 1

    def refuse_faults(self) -> None:
        """Raise InvalidFile with a line a fault, if there are any."""
        if self.untold:
            self.faults.append(f"And {self.untold} faults more.")
        if self.faults:
            raise InvalidFile(*self.faults)

    def place(self, path: Place) -> str:
        """A path as text: ``[2]`` in an array, ``.name`` in an object."""
        text = ""
        for key in path:
            if isinstance(key, int):
                text += f"[{key}]"
            else:
                text += f".{self.keys.get(key) or told(key)}"
        return text.removeprefix(".")

    def refuse_again(self, what: Any, path: Place, *key: str) -> bool:
        """Add a fault, and say so, where the same was read at an earlier place."""
        first = self.paths.setdefault(what, path)
        if first != path:
            self.add_fault((*path, *key), f"Stands at {self.place(first)} too.")
        return first != path

    def read_object(self, schema: Schema, value: Any, path: Place) -> Entry:
        """The object at a place, as far as it has no faults."""
        if self.keys and isinstance(value, dict):
            value = self.renamed(schema, value, path)
        try:
            values = schema.load(value, unknown=EXCLUDE)
        except ValidationError as error:
            values = error.valid_data
            for name, messages in error.messages_dict.items():
                at = path if name == "_schema" else (*path, name)
                for message in messages:
                    is_new = self.keys and (name, message) == ("id", MISSING)
                    self.add_fault(at, NOT_DEPLOYED if is_new else message)
        return Entry(path, values)

    def renamed(self, schema: Schema, value: dict[str, Any], path: Place) -> Any:
        """What a project file's object has for the fields, by their names."""
        holders = {"": value}
        for outer in ("openfn", "options"):
            holders[outer] = value.get(outer) or {}
            if not isinstance(holders[outer], dict):
                self.add_fault((*path, outer), "Must be an object.")
                holders[outer] = {}
        renamed = {}
        for name in schema.fields:
            outer, _, key = self.keys.get(name, name).rpartition(".")
            if key in holders[outer]:
                renamed[name] = holders[outer][key]
        return renamed

    def read_children(
        self, schema: Schema, name: str, parents: list[Entry], parent_column: str
    ) -> list[Entry]:
        """The objects that the parents have under a name, with the parents' ids."""
        entries = []
        for parent in parents:
            for path, value in self.children(name, parent):
                entry = self.read_object(schema, value, path)
                if "id" in entry.values:
                    self.refuse_again((name, entry.values["id"]), path, "id")
                entry.values[parent_column] = parent.values.get("id")
                entries.append(entry)
        return entries

    def children(self, name: str, parent: Entry) -> Iterator[tuple[Place, Any]]:
        """What is in an array or an object, but for what is to go unread."""
        # What is missing or null is among the faults already.
        value, path = parent.values.pop(name, []), (*parent.path, name)
        if not isinstance(value, dict | list):
            self.add_fault(path, "Must be an object or an array.")
        # A thousand aliases of an array of thousands would make a small file large.
        elif not (value and self.refuse_again(id(value), path)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, child in items:
                if not (isinstance(child, dict) and self.is_left_out(name, child)):
                    yield (*path, key), child

    def is_left_out(self, name: str, value: dict[str, Any]) -> bool:
        """Whether it is marked for deletion or, in a project file, a trigger."""
        if self.keys:
            return name == "jobs" and value.get("type") is not None
        return value.get("delete") is True
