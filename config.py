"""The settings, which are read and validated at the start."""

import os
import re
from collections.abc import Mapping
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from schemas import StrictInteger


class DatabaseURL(fields.Field[URL]):
    """A URL of SQLite or PostgreSQL, loaded with the driver that the service uses."""

    default_error_messages = {
        "invalid": "must be a URL such as sqlite:////var/lib/jobs/jobs.db, "
        "postgresql://user:password@host/database or, with more than one host, "
        "postgresql://user:password@/database?host=one:5432&host=two:5432.",
        "driver": "must name SQLite or PostgreSQL (with psycopg).",
        # In memory, each connection would have another database.
        "memory": "must name a file if it names SQLite.",
        "unescaped": "must name a host. In user names and passwords, write each @ as "
        "%40, / as %2F, : as %3A and % as %25.",
    }

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> URL:
        try:
            str(value).encode()  # Bytes of the environment that are not UTF-8 fail.
            url = make_url(value)
        except (ArgumentError, ValueError):
            raise self.make_error("invalid") from None
        # The drivers would only read the text before a NUL.
        if "\0" in str(value) or "%00" in str(value):
            raise self.make_error("invalid")
        if url.drivername in ("sqlite", "sqlite+pysqlite"):
            is_memory = url.query.get("mode") == "memory"
            if not url.database or url.host or ":memory:" in url.database or is_memory:
                raise self.make_error("memory")
            return url
        if url.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
            raise self.make_error("driver")
        # The host would contain the end of a password such as S3cr@t, and be logged.
        has_host = url.host or "host" in url.query or not url.password
        if not has_host or "@" in f"{url.host}{url.database}{''.join(url.query)}":
            raise self.make_error("unescaped")
        return url.set(drivername="postgresql+psycopg")


class HostNames(fields.Field[list[str]]):
    """Host names, as a list or separated by commas; loaded in lower case."""

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


# gunicorn reads SCRIPT_NAME itself. With a wrong value, every request would be a 500.
PATH_PREFIX = validate.Regexp(
    r"(/[\w.~-]+)+\Z", re.ASCII, error="must be a path prefix such as /openfn."
)


class SettingsSchema(Schema):
    """Every setting, with its default and its limits."""

    DATABASE_URL = DatabaseURL(load_default=make_url("sqlite:///jobs.db"))
    MAX_PAGE_SIZE = StrictInteger(1, 10_000, load_default=100)
    PORT = StrictInteger(1, 65_535, load_default=8000)
    SCRIPT_NAME = fields.String(validate=PATH_PREFIX, load_default=None)
    TOKEN_MAX_AGE_DAYS = StrictInteger(1, load_default=None)
    TRUSTED_HOSTS = HostNames(load_default=None)
    TRUSTED_PROXIES = StrictInteger(0, load_default=0)


def load_config(config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings with defaults, from the mapping or else the environment.

    Raises SystemExit with the name of a wrong variable, but without its value, because
    the value may contain a password.
    """
    source = os.environ if config is None else config
    # Shells and unit files leave a variable empty to unset it.
    given = {name: value for name, value in source.items() if value not in (None, "")}
    try:
        # Ignore other names, because other programs have variables, too.
        settings: dict[str, Any] = SettingsSchema().load(given, unknown=EXCLUDE)
    except ValidationError as error:
        name, messages = next(iter(error.messages_dict.items()))
        raise SystemExit(f"{name} {messages[0]}") from None
    return {**(config or {}), **settings}
