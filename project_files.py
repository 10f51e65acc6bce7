"""Read OpenFn's state files and project files into the columns of rows."""

from collections.abc import Iterator
from datetime import UTC
from typing import Any

import yaml_rs
from marshmallow import EXCLUDE, Schema, ValidationError, fields, post_load
from marshmallow.validate import Length

from schemas import Id, is_id

Columns = dict[str, Any]
Rows = list[Columns]

FETCH = "openfn project fetch UUID -o project.json"


class Name(fields.String):
    """A name in a project file, which the YAML parser may have read as a number."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if type(value) in (int, float):
            remedy = f"Fetch the project as JSON: {FETCH}"
            raise ValidationError(f"It was read as the number {value}. {remedy}")
        return super()._deserialize(value, *args, **kwargs)


class Entries(fields.Nested):
    """The objects in an array or an object, each loaded by the nested schema."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, list | dict):
            raise ValidationError("Must be an array or an object.")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        entries = {key: entry for key, entry in items if not self.is_dropped(entry)}
        try:
            return self.schema.load([*entries.values()], many=True)
        except ValidationError as error:
            # marshmallow has numbered only the entries that it was given.
            keys: Any = [*entries]
            errors = {keys[n]: found for n, found in error.messages_dict.items()}
            raise ValidationError(errors) from None

    def is_dropped(self, entry: Any) -> bool:
        """Return whether an entry is marked for deletion, or a trigger among steps."""
        match entry:
            case {"delete": True}:
                return True
            case {"type": str()}:
                return self.data_key == "steps"
        return False


class FileSchema(Schema):
    """The base of all schemas of files, which ignores other keys."""

    class Meta:
        unknown = EXCLUDE

    @post_load
    def flatten(self, columns: Columns, **_: Any) -> Columns:
        """Move the columns that are in ``openfn`` and ``options`` to the others."""
        for key in ("openfn", "options"):
            columns |= columns.pop(key, {})
        return columns


class StateJobSchema(FileSchema):
    """A job in a state file."""

    id = Id(required=True)
    name = fields.String(required=True, validate=Length(max=255))
    body = fields.String(required=True)
    adaptor = fields.String(validate=Length(max=255))
    inserted_at = fields.NaiveDateTime(timezone=UTC, allow_none=True)
    updated_at = fields.NaiveDateTime(timezone=UTC, allow_none=True)


class StateWorkflowSchema(FileSchema):
    """A workflow in a state file."""

    id = Id(required=True)
    name = fields.String(required=True, validate=Length(max=255))
    deleted_at = fields.NaiveDateTime(timezone=UTC, allow_none=True)
    jobs = Entries(StateJobSchema, required=True)


class StateSchema(FileSchema):
    """A state file. What an optional key does not say stays as it is."""

    id = Id(required=True)
    name = fields.String(required=True, validate=Length(max=255))
    scheduled_deletion = fields.NaiveDateTime(timezone=UTC, allow_none=True)
    allow_support_access = fields.Boolean(truthy={True}, falsy={False}, allow_none=True)
    workflows = Entries(StateWorkflowSchema, required=True)


class OpenFnSchema(FileSchema):
    """The ``openfn`` object, in which OpenFn leaves out keys that are null."""

    id = Id(required=True, data_key="uuid")
    deleted_at = fields.NaiveDateTime(timezone=UTC, load_default=None)
    inserted_at = fields.NaiveDateTime(timezone=UTC, allow_none=True)
    updated_at = fields.NaiveDateTime(timezone=UTC, allow_none=True)


class OptionsSchema(FileSchema):
    """The ``options`` of a project, in which OpenFn leaves out keys that are null."""

    scheduled_deletion = fields.NaiveDateTime(timezone=UTC, load_default=None)
    allow_support_access = fields.Boolean(
        truthy={True}, falsy={False}, load_default=None
    )


class StepSchema(FileSchema):
    """A job in a project file."""

    name = Name(required=True, validate=Length(max=255))
    body = fields.String(required=True, data_key="expression")
    adaptor = fields.String(validate=Length(max=255))
    openfn = fields.Nested(OpenFnSchema(exclude=["deleted_at"]), required=True)


class WorkflowSchema(FileSchema):
    """A workflow in a project file."""

    name = Name(required=True, validate=Length(max=255))
    openfn = fields.Nested(OpenFnSchema(only=["id", "deleted_at"]), required=True)
    jobs = Entries(StepSchema, required=True, data_key="steps")


class ProjectSchema(FileSchema):
    """A project file."""

    name = Name(required=True, validate=Length(max=255))
    openfn = fields.Nested(OpenFnSchema(only=["id"]), required=True)
    options = fields.Nested(OptionsSchema, load_default=OptionsSchema().load({}))
    workflows = Entries(WorkflowSchema, required=True)


def load_project_file(content: bytes) -> tuple[Columns, Rows, Rows]:
    """Return the columns of a project, of its workflows and of its jobs, in order.

    Raises ValidationError with one sentence, or with each error at its location.
    """
    try:
        text = content.decode("utf-8-sig")
        document = yaml_rs.loads(text, parse_datetime=False)  # JSON is YAML, too.
    except (ValueError, TypeError) as error:  # TypeError: an object is used as a key.
        # The parser quotes the file between the first and the last line of a message.
        lines = str(error).splitlines()
        problem = lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}"
        message = f"The file is neither JSON nor YAML in UTF-8: {problem}."
        raise ValidationError(message) from error
    project = load_document(document)
    # Such a file can be valid YAML, and the import would delete the jobs that it lacks.
    if "\0" in text or not (text.startswith("{") or text.endswith("\n")):
        raise ValidationError(
            "The file ends within a line or has a NUL character, so it may be damaged. "
            "If it is complete, end it with a line break."
        )
    workflows, jobs = project.pop("workflows"), []
    for workflow in workflows:
        workflow["project_id"] = project["id"]
        for job in workflow.pop("jobs"):
            # A null time is no time: the database keeps the one that it has.
            columns = {key: job[key] for key in job if job[key] is not None}
            jobs.append(columns | {"workflow_id": workflow["id"]})
    return project, workflows, jobs


def load_document(document: Any) -> Any:
    """Return the columns of a project, which contain those of its workflows."""
    match document:
        case {"schema_version": "4.0" | 4.0}:
            return ProjectSchema().load(document)
        case {"id": project_id} if is_id(project_id):
            return StateSchema().load(document)
        case {"data": {"id": _} as state}:  # Lightning's API sends this form.
            return StateSchema().load(state)
        case None:
            problem = "is empty"
        case {"schema_version": version}:
            problem = f"cannot be read: its schema_version is {version!r}, not '4.0'"
        case {"workflows": _} if "id" not in document:
            problem = "cannot be read: it is a spec, whose workflows have no ids"
        case _:
            problem = "is neither a project file nor a state file, whose id is a UUID"
    raise ValidationError(f"The file {problem}. Fetch the project with: {FETCH}")


def format_errors(errors: Any, location: str = "") -> Iterator[str]:
    """Yield a line for each error that marshmallow found, with its location."""
    if isinstance(errors, list):
        yield from (f"{location}: {message}".lstrip(": ") for message in errors)
        return
    for key, found in errors.items():
        # The key of errors of the object itself is "_schema".
        step = f"[{key}]" if isinstance(key, int) else f".{key}"
        step = step.replace("._schema", "")
        yield from format_errors(found, f"{location}{step}".lstrip("."))
