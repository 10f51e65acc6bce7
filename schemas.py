"""Marshmallow: what a request may ask, and how answers look (JSON:API in shape)."""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from flask import current_app
from marshmallow import Schema, ValidationError, fields
from werkzeug.datastructures import MultiDict

MAX_PAGE = 2**31 - 1


class Id(fields.Field[str]):
    """A UUID in its 36-character form, either case; lower case once it is loaded."""

    default_error_messages = {"invalid": "Not a valid UUID."}
    form = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.I)

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if not isinstance(value, str) or not self.form.fullmatch(value):
            raise self.make_error("invalid")
        return value.lower()


class PageNumber(fields.Field[int]):
    """A count from 1 to a maximum, in ASCII digits and nothing else."""

    def maximum(self) -> int:
        """The largest number that is allowed."""
        return MAX_PAGE

    def _deserialize(self, value: str, *args: Any, **kwargs: Any) -> int:
        if not re.fullmatch("[0-9]+", value):
            raise ValidationError(
                f"must be a whole number between 1 and {self.maximum()}."
            )
        # int() refuses thousands of digits, and ten are enough for every maximum.
        digits = value.lstrip("0")
        number = int(digits or 0) if len(digits) <= 10 else 0
        if not 1 <= number <= self.maximum():
            raise ValidationError(f"must be between 1 and {self.maximum()}.")
        return number


class PageSize(PageNumber):
    """A page number that MAX_PAGE_SIZE limits."""

    def maximum(self) -> int:
        """The configured maximum."""
        return current_app.config["MAX_PAGE_SIZE"]


class ListArguments(Schema):
    """The arguments of a list; those that the request lacks are not loaded."""

    error_messages = {"unknown": "is not an argument of this request."}

    page = PageNumber()
    page_size = PageSize()
    project_id = Id(error_messages={"invalid": "must be a UUID."})


list_arguments = ListArguments()
project_list_arguments = ListArguments(exclude=["project_id"])
no_arguments = ListArguments(only=[])
path_id = Id()


def load_arguments(schema: Schema, arguments: MultiDict) -> dict[str, Any]:
    """The arguments of a request; ValidationError names each one that is at fault."""
    if not arguments:
        return {}
    faults = {
        name: ["must be given once."]
        for name, values in arguments.lists()
        if len(values) > 1
    }
    try:
        loaded = schema.load(arguments.to_dict())
    except ValidationError as error:
        raise ValidationError(error.normalized_messages() | faults) from None
    if faults:
        raise ValidationError(faults)
    return loaded


def attributes(job: Mapping[str, Any]) -> dict[str, str | None]:
    """What a list tells of a job."""
    return {
        "name": job["name"],
        "adaptor": job["adaptor"],
        "inserted_at": as_time(job["inserted_at"]),
        "updated_at": as_time(job["updated_at"]),
    }


def as_time(time: datetime) -> str:
    """A naive UTC time as RFC 3339 text with six digits and ``Z``."""
    return time.isoformat("T", "microseconds") + "Z"


def relationships(job: Mapping[str, Any]) -> dict[str, Any]:
    """The workflow and the project of a job."""
    return {
        "workflow": to_one("workflows", job["workflow_id"]),
        "project": to_one("projects", job["project_id"]),
    }


def to_one(resource_type: str, resource_id: str) -> dict[str, Any]:
    """A relationship to one resource."""
    return {"data": {"type": resource_type, "id": resource_id}}


class JobSchema(Schema):
    """A job's row as a resource object."""

    type = fields.Constant("jobs")
    id = fields.Function(lambda job: job["id"])
    attributes = fields.Function(attributes)
    relationships = fields.Function(relationships)


job_schema = JobSchema()


def job_document(job: Mapping[str, Any], jobs_url: str) -> dict[str, Any]:
    """The answer with one job, its workflow and its project."""
    resource = job_schema.dump(job)
    resource["attributes"]["body"] = job["body"]
    links = {"self": f"{jobs_url}/{job['id']}"}
    workflow = {
        "type": "workflows",
        "id": job["workflow_id"],
        "attributes": {"name": job["workflow_name"]},
        "relationships": {"project": to_one("projects", job["project_id"])},
    }
    project = {
        "type": "projects",
        "id": job["project_id"],
        "attributes": {"name": job["project_name"]},
    }
    return {
        "data": resource | {"links": links},
        "included": [workflow, project],
        "links": links,
    }


def list_document(
    jobs: Iterable[Mapping[str, Any]],
    jobs_url: str,
    links: Mapping[str, str | None],
    meta: Mapping[str, int],
) -> dict[str, Any]:
    """The answer with one page of jobs."""
    data = job_schema.dump(jobs, many=True)
    for resource in data:
        resource["links"] = {"self": f"{jobs_url}/{resource['id']}"}
    return {"data": data, "included": [], "links": links, "meta": meta}


def page_links(
    url: str, arguments: Mapping[str, Any], page: int, total_pages: int
) -> dict[str, str | None]:
    """The links of a page: the URL and the arguments of its request, page by page."""

    def link(**page_argument: int) -> str:
        """The URL of the request, or that of another page of it."""
        query = "&".join(
            f"{name}={value}"
            for name, value in (page_argument | arguments | page_argument).items()
        )
        return f"{url}?{query}" if query else url

    return {
        "self": link(),
        "first": link(page=1),
        "last": link(page=total_pages),
        "next": link(page=page + 1) if page < total_pages else None,
        "prev": link(page=min(page - 1, total_pages)) if page > 1 else None,
    }
