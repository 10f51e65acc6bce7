"""Marshmallow schemas: query parameters in, JSON:API documents out."""

import re
from datetime import datetime
from typing import Any, TypeGuard
from urllib.parse import urlencode

from flask import current_app, url_for
from marshmallow import Schema, fields, pre_load
from marshmallow.validate import Range
from sqlalchemy import RowMapping
from werkzeug.datastructures import MultiDict

OUT_OF_RANGE = "must be between {min} and {max}."
PAGE_RANGE = Range(1, 2**31 - 1, error=OUT_OF_RANGE)
Params = dict[str, Any]  # The values that QueryParamsSchema has loaded, by name.
NO_NUMBER: dict[str, Any] = {"invalid": "must be one whole number."}
UUID_PATTERN = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.I)


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


def validate_page_size(page_size: int) -> None:
    """Reject a page size that is out of range."""
    Range(1, current_app.config["MAX_PAGE_SIZE"], error=OUT_OF_RANGE)(page_size)


class QueryParamsSchema(Schema):
    """The query parameters of a list. Messages continue the name of a parameter."""

    error_messages = {"unknown": "is not a query parameter of this request."}

    page = fields.Integer(validate=PAGE_RANGE, error_messages=NO_NUMBER)
    page_size = fields.Integer(validate=validate_page_size, error_messages=NO_NUMBER)
    project_id = Id(error_messages={"invalid": "must be one UUID."})

    @pre_load
    def unwrap(self, params: MultiDict[str, str], **_: Any) -> dict[str, Any]:
        """Return the value of each parameter, or a list, which no field accepts."""
        lists = params.lists()
        return {key: values[0] if len(values) == 1 else values for key, values in lists}


list_params = QueryParamsSchema()
project_list_params = QueryParamsSchema(exclude=["project_id"])
no_params = QueryParamsSchema(only=[])


class UTCDateTime(fields.Field[datetime]):
    """A UTC time in ISO 8601 with six digits; strftime makes a list 4 % slower."""

    def _serialize(self, value: datetime | None, *args: Any, **kwargs: Any) -> Any:
        return value and value.isoformat(timespec="microseconds") + "Z"


class JobAttributesSchema(Schema):
    """The attributes of a job; lists leave out the body."""

    name = fields.String()
    adaptor = fields.String()
    inserted_at = UTCDateTime()
    updated_at = UTCDateTime()
    body = fields.String()


job_attributes = JobAttributesSchema()
list_attributes = JobAttributesSchema(exclude=["body"])


def list_document(
    jobs: list[RowMapping], total: int, page: int, size: int, url: str, params: Params
) -> dict[str, Any]:
    """Return one page of the list at ``url``, whose links keep the query parameters."""
    jobs_url = url_for("jobs.list_jobs", _external=True)
    last = max(1, -(-total // size))
    prev = min(page - 1, last)
    return {
        "data": [job_resource(job, list_attributes, jobs_url) for job in jobs],
        "included": [],
        "links": {
            "self": build_url(url, params),
            "first": build_url(url, params, page=1),
            "prev": build_url(url, params, page=prev) if prev else None,
            "next": build_url(url, params, page=page + 1) if page < last else None,
            "last": build_url(url, params, page=last),
        },
        "meta": {
            "page_number": page,
            "page_size": size,
            "total_entries": total,
            "total_pages": last,
        },
    }


def build_url(url: str, params: Params, **overrides: int) -> str:
    """Return the URL with the query parameters, some of them overridden."""
    query = urlencode(sorted((params | overrides).items()))
    return f"{url}?{query}" if query else url


def job_document(job: RowMapping) -> dict[str, Any]:
    """Return the document with one job, its workflow and its project."""
    jobs_url = url_for("jobs.list_jobs", _external=True)
    resource = job_resource(job, job_attributes, jobs_url)
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


def job_resource(job: RowMapping, attributes: Schema, jobs_url: str) -> dict[str, Any]:
    """Return a job as a resource object with the attributes that the schema has."""
    return {
        "type": "jobs",
        "id": job["id"],
        "attributes": attributes.dump(job),
        "relationships": {
            "workflow": relationship("workflows", job["workflow_id"]),
            "project": relationship("projects", job["project_id"]),
        },
        "links": {"self": f"{jobs_url}/{job['id']}"},
    }


def relationship(resource_type: str, resource_id: str) -> dict[str, Any]:
    """Return a relationship to one resource."""
    return {"data": {"type": resource_type, "id": resource_id}}
