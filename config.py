"""The settings: read from the environment or a mapping, and checked at the start."""

import os
import re
from collections.abc import Mapping
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from schemas import StrictInteger


class DatabaseUrl(fields.Field[URL]):
    """A URL of SQLite or PostgreSQL, loaded with the driver that the service uses."""

    default_error_messages = {
        "invalid": "must be a URL such as sqlite:////var/lib/jobs/jobs.db, "
        "postgresql://user:password@host/database or, with more than one host, "
        "postgresql://user:password@/database?host=one:5432&host=two:5432.",
        "driver": "must name SQLite or PostgreSQL (with psycopg).",
        # Each connection would have a database of its own.
        "memory": "must name a file when it names SQLite.",
    }

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> URL:
        try:
            str(value).encode()  # bytes of the environment that are no text
            url = make_url(value)
        except (ArgumentError, ValueError):
            raise self.make_error("invalid") from None
        if url.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
            return url.set(drivername="postgresql+psycopg")
        if url.drivername not in ("sqlite", "sqlite+pysqlite"):
            raise self.make_error("driver")
        is_memory = url.query.get("mode") == "memory"
        if "\0" in str(url.database):
            raise self.make_error("invalid")
        if not url.database or ":memory:" in url.database or is_memory:
            raise self.make_error("memory")
        return url


class HostNames(fields.Field[list[str]]):
    """Names of hosts, as a list or separated by commas; loaded in lower case."""

    default_error_messages = {
        "invalid": "must be host names or IPv4 addresses, separated by commas, "
        "without ports; a leading dot stands for all subdomains."
    }

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> list[str]:
        hosts = value if isinstance(value, list) else str(value).split(",")
        hosts = [str(host).strip().lower() for host in hosts]
        form = r"\.?[a-z0-9-]+(\.[a-z0-9-]+)*"
        if not hosts or not all(re.fullmatch(form, host) for host in hosts):
            raise self.make_error("invalid")
        return hosts


class Settings(Schema):
    """Every setting, with its default and its limits."""

    DATABASE_URL = DatabaseUrl(load_default=make_url("sqlite:///jobs.db"))
    MAX_PAGE_SIZE = StrictInteger(1, 10_000, load_default=100)
    PORT = StrictInteger(1, 65_535, load_default=8000)
    TOKEN_MAX_AGE_DAYS = StrictInteger(1, load_default=None)
    TRUSTED_HOSTS = HostNames(load_default=None)
    TRUSTED_PROXIES = StrictInteger(0, load_default=0)


def load_config(config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of the mapping alone, or of the environment alone, with defaults.

    Raises SystemExit with a line that names the first variable at fault, never its
    value, since that may hold a password.
    """
    source = os.environ if config is None else config
    # An empty variable is how a shell or a unit file leaves one unset.
    given = {name: value for name, value in source.items() if value not in (None, "")}
    try:
        # Both hold other names too: the shell's, or Flask's.
        settings: dict[str, Any] = Settings().load(given, unknown=EXCLUDE)
    except ValidationError as error:
        name, messages = next(iter(error.messages_dict.items()))
        raise SystemExit(f"{name} {messages[0]}") from None
    return {**(config or {}), **settings}
