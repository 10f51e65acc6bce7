"""Marshmallow schemas: query parameters in, JSON:API documents out."""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from typing import Any, TypeGuard
from urllib.parse import urlencode

from marshmallow import Schema, ValidationError, fields, validate
from werkzeug.datastructures import MultiDict

MAX_PAGE = 2**31 - 1
DEFAULT_PAGE_SIZE = 10
UUID_PATTERN = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.I)

# A row of a query by column names. SQLAlchemy types the keys of a RowMapping as Any.
Row = Mapping[Any, Any]


def is_id(value: Any) -> TypeGuard[str]:
    """Return whether a value is a UUID in its 36-character form, in either case."""
    return isinstance(value, str) and UUID_PATTERN.fullmatch(value) is not None


class Id(fields.Field[str]):
    """A UUID in its 36-character form, loaded in lower case."""

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
        limits = f"between {minimum} and {maximum}" if maximum else f"{minimum} or more"
        super().__init__(
            validate=validate.Range(minimum, maximum, error=f"must be {limits}."),
            error_messages={
                "invalid": f"must be a whole number {'' if maximum else 'of '}{limits}."
            },
            **options,
        )

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> int:
        # int() also accepts signs, spaces, underscores and digits of other scripts, and
        # raises ValueError for thousands of digits.
        match = re.fullmatch("0*([0-9]{1,99})", str(value))
        if match is None:
            raise self.make_error("invalid")
        return int(match[1])


class UTCDateTime(fields.NaiveDateTime):
    """A naive UTC time, dumped in ISO 8601 with six digits and ``Z``."""

    def _serialize(self, value: datetime | None, *args: Any, **kwargs: Any) -> Any:
        return value and value.isoformat("T", "microseconds") + "Z"

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> datetime:
        try:
            return super()._deserialize(value, *args, **kwargs)
        except OverflowError:
            raise ValidationError("Out of range.") from None


@cache
def query_params_schema(max_page_size: int, only: tuple[str, ...]) -> Schema:
    """Return the schema of the query parameters that a route accepts."""
    default = min(DEFAULT_PAGE_SIZE, max_page_size)

    class QueryParamsSchema(Schema):
        error_messages = {"unknown": "is not a query parameter of this request."}
        page = StrictInteger(1, MAX_PAGE, load_default=1)
        page_size = StrictInteger(1, max_page_size, load_default=default)
        project_id = Id(error_messages={"invalid": "must be a UUID."})

    return QueryParamsSchema(only=only)


class JobAttributesSchema(Schema):
    """The attributes of a job; lists leave out the body."""

    name = fields.String()
    adaptor = fields.String()
    inserted_at = UTCDateTime()
    updated_at = UTCDateTime()
    body = fields.String()


job_attributes = JobAttributesSchema()
list_attributes = JobAttributesSchema(exclude=["body"])


def validate_query_params(
    schema: Schema, params: MultiDict[str, str]
) -> dict[str, Any]:
    """Return the parameters with defaults, or raise a message for each wrong one."""
    loaded, errors = {}, {}
    try:
        loaded = schema.load(params.to_dict())
    except ValidationError as error:
        errors = error.messages_dict
    for name, values in params.lists():
        if len(values) > 1:
            errors[name] = ["must be given only once."]
    if errors:
        raise ValidationError(errors)
    return loaded


def list_meta(page: int, page_size: int, total: int) -> dict[str, int]:
    """Return the numbers of a page and of its list, which has at least one page."""
    return {
        "page_number": page,
        "page_size": page_size,
        "total_entries": total,
        "total_pages": max(1, -(-total // page_size)),
    }


def list_links(
    url: str, params: Mapping[str, Any], page: int, last: int
) -> dict[str, str | None]:
    """Return the URLs of a page and of other pages, with the request's parameters."""
    return {
        "self": build_url(url, params),
        "first": build_url(url, params, page=1),
        "last": build_url(url, params, page=last),
        "next": build_url(url, params, page=page + 1) if page < last else None,
        "prev": build_url(url, params, page=min(page - 1, last)) if page > 1 else None,
    }


def build_url(url: str, params: Mapping[str, Any], **overrides: int) -> str:
    """Return the URL with the query parameters, some of them overridden."""
    query = urlencode(sorted({**params, **overrides}.items()))
    return f"{url}?{query}" if query else url


def link_header(links: Mapping[str, str | None]) -> str:
    """Return the links to other pages as the value of ``Link`` (RFC 8288)."""
    relations = [name for name in ("first", "prev", "next", "last") if links[name]]
    return ", ".join(f'<{links[name]}>; rel="{name}"' for name in relations)


def list_document(
    jobs: Iterable[Row],
    jobs_url: str,
    links: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the document with one page of jobs."""
    pairs = zip(jobs, list_attributes.dump(jobs, many=True), strict=True)
    data = [job_resource(job, attributes, jobs_url) for job, attributes in pairs]
    return {"data": data, "included": [], "links": links, "meta": meta}


def job_document(job: Row, jobs_url: str) -> dict[str, Any]:
    """Return the document with one job, its workflow and its project."""
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
    """Return a job with its attributes as a resource object."""
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
    """Return a relationship to one resource."""
    return {"data": {"type": resource_type, "id": resource_id}}
