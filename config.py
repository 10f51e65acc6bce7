"""The settings, which are read and validated at the start."""

import os
import sys
from collections.abc import Mapping
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields
from marshmallow.validate import Range
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError


class DatabaseURL(fields.Field[URL]):
    """A URL of SQLite or PostgreSQL, loaded with the driver that the service uses."""

    default_error_messages = {
        "invalid": "Must be a URL such as sqlite:////var/lib/jobs/jobs.db or "
        "postgresql://user:password@host/database. In the user and the password, "
        "write @ as %40, / as %2F, : as %3A and % as %25."
    }

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> URL:
        try:
            url = make_url(value)
        except (ArgumentError, ValueError):
            raise self.make_error("invalid") from None
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        # An unescaped @ would put the end of the password into the host or after it.
        is_escaped = str(value).count("@") <= 1
        if url.drivername not in ("sqlite", "postgresql+psycopg") or not is_escaped:
            raise self.make_error("invalid")
        return url


class HostNames(fields.Field[list[str]]):
    """Host names separated by commas."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> list[str]:
        return [name.strip().lower() for name in value.split(",")]


class SettingsSchema(Schema):
    """Every setting, with its default and its limits."""

    DATABASE_URL = DatabaseURL(load_default=make_url("sqlite:///jobs.db"))
    # Flask would check its own TRUSTED_HOSTS on every path, the health check included.
    KNOWN_HOSTS = HostNames(data_key="TRUSTED_HOSTS", load_default=None)
    MAX_PAGE_SIZE = fields.Integer(load_default=100, validate=Range(1, 10_000))
    PORT = fields.Integer(load_default=8000, validate=Range(1, 65_535))
    SCRIPT_NAME = fields.String(load_default="")
    TOKEN_MAX_AGE_DAYS = fields.Integer(load_default=None, validate=Range(1))
    TRUSTED_PROXIES = fields.Integer(load_default=0, validate=Range(0))


def load_config(config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings with defaults, from the mapping or else the environment."""
    source = os.environ if config is None else config
    # Shells and unit files leave a variable empty to unset it.
    given = {name: value for name, value in source.items() if value not in (None, "")}
    try:
        # Other programs have variables, too.
        settings: dict[str, Any] = SettingsSchema().load(given, unknown=EXCLUDE)
    except ValidationError as error:
        # The value may contain a password, so print only the name.
        name, [message] = error.messages_dict.popitem()
        print(f"{name}: {message}", file=sys.stderr)
        # gunicorn stops if a worker exits with WORKER_BOOT_ERROR (3). With another code
        # it would start workers again and again.
        sys.exit(3)
    settings["DEFAULT_PAGE_SIZE"] = min(10, settings["MAX_PAGE_SIZE"])
    return settings
