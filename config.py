"""The configuration: read from the environment or a mapping, checked at the start."""

import os
import re
from collections.abc import Mapping
from typing import Any

from flask import Flask
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

DEFAULTS = {
    "DATABASE_URL": "sqlite:///jobs.db",
    "MAX_PAGE_SIZE": 100,
    "PORT": 8000,
    "TOKEN_MAX_AGE_DAYS": None,
    "TRUSTED_HOSTS": None,
    "TRUSTED_PROXIES": 0,
}

# More threads than this may wait for a connection; each worker has its own pool.
POOL = {"pool_size": 8, "max_overflow": 0, "pool_timeout": 5, "pool_use_lifo": True}


def load_config(app: Flask, config: Mapping[str, Any] | None) -> None:
    """Configure the app from the mapping alone, or from the environment alone.

    Raises SystemExit with a line that names the variable at fault, never its value,
    since that may hold a password.
    """
    source = os.environ if config is None else config
    app.config.update(config or {})
    for name, default in DEFAULTS.items():
        # An empty variable is how a shell or a unit file leaves one unset.
        unset = source.get(name) in (None, "")
        app.config[name] = default if unset else source[name]
    check_number(app, "MAX_PAGE_SIZE", 1, 10_000)
    check_number(app, "PORT", 1, 65_535)
    check_number(app, "TOKEN_MAX_AGE_DAYS", 1)
    check_number(app, "TRUSTED_PROXIES", 0)
    check_hosts(app)
    url = database_url(app.config["DATABASE_URL"])
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options = POOL | engine_options(url)
    try:
        create_engine(url, **options)
    except (SQLAlchemyError, TypeError, ValueError):
        raise SystemExit("DATABASE_URL must have arguments of its driver.") from None
    if url.drivername.startswith("sqlite") and not os.path.isabs(url.database):
        make_instance_folder(app)


def make_instance_folder(app: Flask) -> None:
    """Make the folder in which a relative path of SQLite's is."""
    try:
        os.makedirs(app.instance_path, exist_ok=True)
    except OSError:
        raise SystemExit(
            "DATABASE_URL must be set: instance/ cannot be made."
        ) from None


def check_number(
    app: Flask, name: str, minimum: int, maximum: int | None = None
) -> None:
    """Make the variable an int, where it is set at all."""
    value = app.config[name]
    if value is None:
        return
    limits = f"from {minimum} to {maximum}" if maximum else f"of {minimum} or more"
    # str() of a bool or a float has no place here, and 4300 digits is where int() ends.
    if not re.fullmatch("[0-9]{1,4300}", str(value)):
        raise SystemExit(f"{name} must be a whole number {limits}.")
    app.config[name] = int(value)
    if app.config[name] < minimum or (maximum and app.config[name] > maximum):
        raise SystemExit(f"{name} must be a whole number {limits}.")


def check_hosts(app: Flask) -> None:
    """Make TRUSTED_HOSTS a list of names in lower case, where it is set at all."""
    hosts = app.config["TRUSTED_HOSTS"]
    if hosts is None:
        return
    hosts = hosts if isinstance(hosts, list) else str(hosts).split(",")
    name = r"\.?[a-z0-9-]+(\.[a-z0-9-]+)*"
    hosts = [str(host).strip().lower() for host in hosts]
    if not hosts or not all(re.fullmatch(name, host) for host in hosts):
        raise SystemExit(
            "TRUSTED_HOSTS must be host names or IPv4 addresses, separated by commas, "
            "without ports; a leading dot stands for all subdomains."
        )
    app.config["TRUSTED_HOSTS"] = hosts


def database_url(text: str) -> URL:
    """The URL with the driver that the service uses: SQLite's own, or psycopg 3."""
    try:
        str(text).encode()  # bytes of the environment that are no text
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise SystemExit(
            "DATABASE_URL must be a URL such as sqlite:////var/lib/jobs/jobs.db "
            "or postgresql://user:password@host/database."
        ) from None
    if url.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise SystemExit("DATABASE_URL must name SQLite or PostgreSQL (with psycopg).")
    is_memory = url.query.get("mode") == "memory"
    if not url.database or ":memory:" in url.database or is_memory:
        # Each connection would have a database of its own.
        raise SystemExit("DATABASE_URL must name a file when it names SQLite.")
    return url


def engine_options(url: URL) -> dict[str, Any]:
    """What keeps a database that is slow or gone from holding a worker for long."""
    if url.drivername.startswith("sqlite"):
        # Without an isolation level the driver leaves every BEGIN to us.
        return {"connect_args": {"timeout": 5, "isolation_level": None}}
    own = url.normalized_query.get("options", ())
    # Prepared at first use and planned once: planning costs more than running.
    settings = "-c statement_timeout=5s -c plan_cache_mode=force_generic_plan"
    options = " ".join((settings, *own))
    return {
        "isolation_level": "REPEATABLE READ",
        "connect_args": {
            "client_encoding": "utf8",
            "connect_timeout": 3,
            "keepalives_idle": 30,
            "options": options,
            "prepare_threshold": 0,
            "tcp_user_timeout": 5000,
        },
    }
