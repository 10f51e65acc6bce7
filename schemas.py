"""Marshmallow: what a request may ask, and how answers look (JSON:API in shape)."""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from typing import Any, TypeGuard

from marshmallow import Schema, ValidationError, fields, validate
from werkzeug.datastructures import MultiDict

MAX_PAGE = 2**31 - 1
DEFAULT_PAGE_SIZE = 10
UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.I)

# By the names of columns, as SQLAlchemy's RowMapping has it.
Row = Mapping[Any, Any]


def is_id(value: Any) -> TypeGuard[str]:
    """Whether a value is a UUID in its 36-character form, in either case."""
    return isinstance(value, str) and UUID.fullmatch(value) is not None


class Id(fields.Field[str]):
    """A UUID in its 36-character form, either case; lower case once it is loaded."""

    default_error_messages = {"invalid": "Not a valid UUID."}

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if not is_id(value):
            raise self.make_error("invalid")
        return value.lower()


class StrictInteger(fields.Field[int]):
    """A number within limits, in ASCII digits and nothing else."""

    def __init__(
        self, minimum: int, maximum: int | None = None, **options: Any
    ) -> None:
        limits = (
            f"between {minimum} and {maximum}" if maximum else f"above {minimum - 1}"
        )
        super().__init__(
            validate=validate.Range(minimum, maximum, error=f"must be {limits}."),
            error_messages={"invalid": f"must be a whole number {limits}."},
            **options,
        )

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> int:
        if not re.fullmatch("[0-9]+", str(value)):
            raise self.make_error("invalid")
        # int() refuses thousands of digits; 18 that matter are beyond every maximum.
        return int(str(value).lstrip("0")[:18] or 0)


class UTCDateTime(fields.NaiveDateTime):
    """A naive UTC time; as text in ISO 8601, with six digits and ``Z`` when dumped."""

    def _serialize(self, value: datetime | None, *args: Any, **kwargs: Any) -> Any:
        return value and value.isoformat("T", "microseconds") + "Z"

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> datetime:
        try:
            return super()._deserialize(value, *args, **kwargs)
        except OverflowError:
            raise ValidationError("Out of range.") from None


@cache
def query_params_schema(max_page_size: int, only: tuple[str, ...]) -> Schema:
    """The schema of some arguments of a list, up to the configured limit of a page."""
    default = min(DEFAULT_PAGE_SIZE, max_page_size)

    class Arguments(Schema):
        error_messages = {"unknown": "is not an argument of this request."}
        page = StrictInteger(1, MAX_PAGE, load_default=1)
        page_size = StrictInteger(1, max_page_size, load_default=default)
        project_id = Id(error_messages={"invalid": "must be a UUID."})

    return Arguments(only=only)


class JobAttributes(Schema):
    """What is told of a job; lists leave out the body."""

    name = fields.String()
    adaptor = fields.String()
    inserted_at = UTCDateTime()
    updated_at = UTCDateTime()
    body = fields.String()


job_attributes, list_attributes = JobAttributes(), JobAttributes(exclude=["body"])


def validate_query_params(
    schema: Schema, arguments: MultiDict[str, str]
) -> dict[str, Any]:
    """The arguments of a request; ValidationError names each one that is at fault."""
    loaded, faults = {}, {}
    try:
        loaded = schema.load(arguments.to_dict())
    except ValidationError as error:
        faults = error.messages_dict
    for name, values in arguments.lists():
        if len(values) > 1:
            faults[name] = ["must be given once."]
    if faults:
        raise ValidationError(faults)
    return loaded


def list_meta(page: int, page_size: int, total: int) -> dict[str, int]:
    """The numbers of a page and of its list, which has one page at least."""
    return {
        "page_number": page,
        "page_size": page_size,
        "total_entries": total,
        "total_pages": max(1, -(-total // page_size)),
    }


def list_links(
    url: str, arguments: Mapping[str, Any], page: int, last: int
) -> dict[str, str | None]:
    """The URLs of a page and of the others, with the request's own arguments."""
    return {
        "self": build_url(url, arguments),
        "first": build_url(url, arguments, page=1),
        "last": build_url(url, arguments, page=last),
        "next": build_url(url, arguments, page=page + 1) if page < last else None,
        "prev": (
            build_url(url, arguments, page=min(page - 1, last)) if page > 1 else None
        ),
    }


def build_url(url: str, arguments: Mapping[str, Any], **others: int) -> str:
    """The URL with the arguments, of which others may take the place."""
    # Numbers and ids, which need no quotes.
    pairs = sorted({**arguments, **others}.items())
    query = "&".join(f"{name}={value}" for name, value in pairs)
    return f"{url}?{query}" if query else url


def link_header(links: Mapping[str, str | None]) -> str:
    """The links to other pages as the header ``Link`` (RFC 8288)."""
    relations = [name for name in ("first", "prev", "next", "last") if links[name]]
    return ", ".join(f'<{links[name]}>; rel="{name}"' for name in relations)


def list_document(
    jobs: Iterable[Row],
    jobs_url: str,
    links: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """The answer with one page of jobs."""
    attributes = list_attributes.dump(jobs, many=True)
    data = [
        job_resource(job, attributes, jobs_url)
        for job, attributes in zip(jobs, attributes, strict=True)
    ]
    return {"data": data, "included": [], "links": links, "meta": meta}


def job_document(job: Row, jobs_url: str) -> dict[str, Any]:
    """The answer with one job, its workflow and its project."""
    resource = job_resource(job, job_attributes.dump(job), jobs_url)
    workflow = {
        "type": "workflows",
        "id": job["workflow_id"],
        "attributes": {"name": job["workflow_name"]},
        "relationships": {"project": relationship("projects", job["project_id"])},
    }
    project = {
        "type": "projects",
        "id": job["project_id"],
        "attributes": {"name": job["project_name"]},
    }
    included = [workflow, project]
    return {"data": resource, "included": included, "links": resource["links"]}


def job_resource(job: Row, attributes: Any, jobs_url: str) -> dict[str, Any]:
    """A job with its attributes as a resource object."""
    return {
        "type": "jobs",
        "id": job["id"],
        "attributes": attributes,
        "relationships": {
            "workflow": relationship("workflows", job["workflow_id"]),
            "project": relationship("projects", job["project_id"]),
        },
        "links": {"self": f"{jobs_url}/{job['id']}"},
    }


def relationship(resource_type: str, resource_id: str) -> dict[str, Any]:
    """A relationship to one resource."""
    return {"data": {"type": resource_type, "id": resource_id}}
