"""Read OpenFn's project files and state files, and report each error in them."""

import json
from datetime import UTC
from typing import Any, NamedTuple, NoReturn

import yaml_rs
from click import ClickException
from marshmallow import EXCLUDE, Schema, ValidationError, fields, pre_load, validate

from schemas import Id, UTCDateTime, is_id

MAX_REPORTED_ERRORS, MAX_QUOTED_LENGTH = 200, 150
JOB_TIMES = {"inserted_at", "updated_at"}
# Without this limit, a file of 0.4 MB with 20,000 aliases takes 3.8 GB in memory.
ALIAS_LIMITS = yaml_rs.AliasLimits(max_alias_expansions_per_anchor=100)

NOT_DEPLOYED = {
    "required": "Missing, because the project was never deployed. "
    "Deploy it, then run: openfn project pull"
}

# The key in a project file for each field that is named as in state files and tables.
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

# An entry is the location of an object in the file, and the columns of its row.
Columns = dict[str, Any]
Entry = tuple[str, Columns]


class ProjectFile(NamedTuple):
    """A project, and its workflows and jobs in the order of the file."""

    project: Columns
    workflows: list[Entry]
    jobs: list[Entry]


# PostgreSQL cannot store NUL.
validate_storable = validate.Regexp(r"[^\0]*\Z", error="Must not contain NUL.")
validate_short_text = validate.And(validate.Length(max=255), validate_storable)


def validate_boolean(value: Any) -> None:
    """Reject everything but true and false, so that "yes" grants no access."""
    if not isinstance(value, bool):
        raise ValidationError("Not a valid boolean.")


class Children(fields.Field[list[Entry]]):
    """The objects in an array or an object, each loaded by a schema."""

    schema: "EntrySchema"

    def __init__(self, schema_class: type["EntrySchema"]) -> None:
        super().__init__(required=True)
        self.schema_class = schema_class

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if not isinstance(value, dict | list):
            raise ValidationError("Must be an object or an array.")
        entries, errors = list[Entry](), dict[Any, Any]()
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            if not isinstance(child, dict):
                errors[key] = ["Must be an object."]
            elif not self.is_skipped(child):
                try:
                    entries.append((join(attr, key), self.schema.load(child)))
                except ValidationError as error:
                    errors[key] = error.messages
        if errors:
            raise ValidationError(errors)
        return entries

    def is_skipped(self, child: Columns) -> bool:
        """Return whether a child is a trigger among steps, or marked for deletion."""
        if self.schema.is_project_file:
            return self.data_key == "steps" and child.get("type") is not None
        return child.get("delete") is True


class EntrySchema(Schema):
    """The fields that every object of a file has."""

    id = Id(required=True)
    name = fields.String(required=True, validate=validate_short_text)

    def __init__(self, is_project_file: bool) -> None:
        self.is_project_file = is_project_file
        super().__init__(unknown=EXCLUDE)

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        """Adapt a field to project files, which lack each key whose value is null."""
        if isinstance(field_obj, Children):
            field_obj.schema = field_obj.schema_class(self.is_project_file)
        if self.is_project_file:
            field_obj.data_key = PROJECT_FILE_KEYS.get(field_name)
            if field_obj.allow_none:
                field_obj.load_default = None
            if field_name == "id":
                # Do not change the dictionary itself, because fields share it.
                field_obj.error_messages = field_obj.error_messages | NOT_DEPLOYED

    @pre_load
    def flatten(self, values: Columns, **_: Any) -> Columns:
        """Add what is in ``openfn`` and ``options`` under keys like ``openfn.uuid``."""
        for outer in ("openfn", "options") if self.is_project_file else ():
            inner = {} if values.get(outer) is None else values[outer]
            if not isinstance(inner, dict):
                raise ValidationError("Must be an object.", outer)
            values = values | {f"{outer}.{key}": inner[key] for key in inner}
        return values


class JobSchema(EntrySchema):
    """A job."""

    body = fields.String(required=True, validate=validate_storable)
    adaptor = fields.String(validate=validate_short_text)
    inserted_at = UTCDateTime(timezone=UTC, allow_none=True)
    updated_at = UTCDateTime(timezone=UTC, allow_none=True)


class WorkflowSchema(EntrySchema):
    """A workflow with its jobs."""

    jobs = Children(JobSchema)
    deleted_at = UTCDateTime(timezone=UTC, allow_none=True)


class ProjectSchema(EntrySchema):
    """A project with its workflows."""

    workflows = Children(WorkflowSchema)
    scheduled_deletion = UTCDateTime(timezone=UTC, allow_none=True)
    allow_support_access = fields.Raw(allow_none=True, validate=validate_boolean)


def load_project_file(content: bytes) -> ProjectFile:
    """Return the project in a file. Raises ClickException with a line per error."""
    document, prefix = parse(content), ""
    if isinstance(document, dict) and "data" in document and "id" not in document:
        document, prefix = document["data"], "data."
    schema = ProjectSchema(is_project_file(document))
    # YAML has no end mark, and a truncated file would delete the jobs that it lacks.
    if not content.endswith((b"\n", b"}")):
        raise ClickException("The file ends within a line: it may be truncated.")
    try:
        project = schema.load(document)
    except ValidationError as error:
        raise_errors([prefix + line for line in format_errors(error.messages_dict)])
    id_key = schema.fields["id"].data_key or "id"
    workflows, jobs = [], []
    for location, workflow in project.pop("workflows"):
        for job_location, job in workflow.pop("jobs"):
            # A null is the same as no time: the database keeps the time that it has.
            job = {key: job[key] for key in job if job[key] or key not in JOB_TIMES}
            job["workflow_id"] = workflow["id"]
            jobs.append((f"{prefix}{location}.{job_location}.{id_key}", job))
        workflow["project_id"] = project["id"]
        workflows.append((f"{prefix}{location}.{id_key}", workflow))
    if duplicates := find_duplicates(workflows) + find_duplicates(jobs):
        raise_errors(duplicates)
    return ProjectFile(project, workflows, jobs)


def parse(content: bytes) -> Any:
    """Return the value of a YAML text in UTF-8; JSON is YAML, too."""
    try:
        text = content.decode("utf-8-sig")
        # The parser ignores what follows a NUL, so the import would delete those jobs.
        if "\0" in text:
            line = text[: text.index("\0")].count("\n") + 1
            raise ClickException(f"The file has a NUL character in line {line}.")
        # Some 40,000 arrays that begin on one line would overflow the parser's stack.
        if "- " * 5000 in text:
            raise ClickException("The file is nested too deep: 5,000 times '- '.")
        return yaml_rs.loads(text, parse_datetime=False, alias_limits=ALIAS_LIMITS)
    except (ValueError, TypeError) as error:  # TypeError: an object is used as a key.
        # The parser quotes the file between the first and the last line of a message.
        first, *others = str(error).splitlines()
        problem = shorten(": ".join([first, *others[-1:]]))
    raise ClickException(f"The file is neither YAML nor JSON in UTF-8: {problem}.")


def is_project_file(document: Any) -> bool:
    """Return whether a document is a project file (True) or a state file (False)."""
    if isinstance(document, dict) and is_id(document.get("id")):
        return False
    if isinstance(document, dict) and document.get("schema_version") in ("4.0", 4.0):
        return True
    raise ClickException(
        "The file is neither a project file of OpenFn (only schema_version 4.0 is "
        "supported) nor a state file (whose id is a UUID). "
        "Write a project file with: openfn project pull"
    )


def find_duplicates(entries: list[Entry]) -> list[str]:
    """Return an error for each id that an earlier entry has."""
    locations: dict[str, str] = {}
    return [
        f"{location}: Duplicate of {first}."
        for location, columns in entries
        if (first := locations.setdefault(columns["id"], location)) != location
    ]


def format_errors(errors: dict[Any, Any], parent: str = "") -> list[str]:
    """Return a line for each error that marshmallow found, with its location."""
    lines = []
    for key, value in errors.items():
        location = join(parent, key)
        if isinstance(value, dict):
            lines += format_errors(value, location)
        else:
            lines += [f"{location}: {message}" for message in value]
    return lines


def join(location: str, key: Any) -> str:
    """Return the location of an index (``[2]``) or a key (``.name``) at another one."""
    if isinstance(key, int):
        return f"{location}[{key}]"
    return f"{location}.{shorten(str(key))}".removeprefix(".")


def shorten(text: str) -> str:
    """Return a text on one line and, if it is long, only its beginning."""
    text = text if len(text) <= MAX_QUOTED_LENGTH else text[:MAX_QUOTED_LENGTH] + "…"
    return text if text.isprintable() else json.dumps(text)


def raise_errors(errors: list[str]) -> NoReturn:
    """Reject a file: report its first errors, and count the others."""
    lines = ["Nothing was imported, because the file has errors:"]
    lines += errors[:MAX_REPORTED_ERRORS]
    if others := len(errors[MAX_REPORTED_ERRORS:]):
        lines.append(f"{others} more error{'s' if others > 1 else ''}.")
    raise ClickException("\n".join(lines))
