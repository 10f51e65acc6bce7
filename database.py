"""SQLite and PostgreSQL: connections, transactions, and what their errors mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from warnings import catch_warnings

import click
import psycopg
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from gevent import Timeout
from psycopg.conninfo import make_conninfo, timeout_from_conninfo
from sqlalchemy import URL, Connection, Engine, ExceptionContext, event, exc, inspect

# The write lock comes before the first read, so that imports run one after the other.
BEGIN_WRITE_SQL = {
    "sqlite": [
        "PRAGMA busy_timeout = 60000",
        "PRAGMA journal_mode = WAL",
        "PRAGMA foreign_keys = ON",
        "BEGIN IMMEDIATE",
    ],
    "postgresql": [
        "SET statement_timeout = 0",
        # With another isolation level, an import would not see the changes of the
        # import that it waited for.
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",
        # The key, "jobs" in ASCII, only has to differ from those of other programs.
        "SELECT pg_advisory_xact_lock(1785684595)",
    ],
}

# A request has this long for all of its queries, so that it ends within 10 seconds.
READ_TIMEOUT_SECONDS = 9

db = SQLAlchemy(
    engine_options={
        # A list is one statement, so it needs no BEGIN and COMMIT around it.
        "isolation_level": "AUTOCOMMIT",
        # Keep parameter values out of error messages, because those are logged.
        "hide_parameters": True,
        "pool_size": 8,
        "max_overflow": 0,
        "pool_timeout": 5,
        "pool_use_lifo": True,
    }
)


def init_database(app: Flask) -> None:
    """Create the engine for DATABASE_URL, or exit if the driver rejects the URL."""
    url = app.config["DATABASE_URL"]
    options: dict[str, Any] = {}
    try:
        if url.get_backend_name() == "postgresql":
            url, options = postgresql_options(url)
        else:
            # SQLite blocks the whole worker while it waits for a lock.
            url = url.set(query={"timeout": "0.02"} | dict(url.query))
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        # SQLAlchemy only warns of a parameter that SQLite does not have.
        with catch_warnings(action="error", category=exc.SAWarning):
            db.init_app(app)
    except OSError as error:
        message = f"DATABASE_URL must be set, because instance/ cannot be used: {error}"
        raise SystemExit(message) from None
    except (exc.SQLAlchemyError, exc.SAWarning, psycopg.Error, TypeError, ValueError):
        names = ", ".join(app.config["DATABASE_URL"].query)
        raise SystemExit(
            "DATABASE_URL must have only parameters that the driver accepts. "
            f"Check the names and values of: {names}."
        ) from None


def postgresql_options(url: URL) -> tuple[URL, dict[str, Any]]:
    """Return the URL and engine options with time limits, which the URL can override.

    Raises an error for parameters that the driver would reject at each connection.
    """
    defaults = {"client_encoding": "utf8", "connect_timeout": "3"}
    defaults |= {"keepalives_idle": "30", "tcp_user_timeout": "5000"}
    url = url.set(query=defaults | dict(url.query))
    _, parameters = url.get_dialect()().create_connect_args(url)
    make_conninfo(**parameters)
    timeout_from_conninfo(dict(parameters))
    settings = "-c statement_timeout=5s -c default_transaction_read_only=on"
    connect_args = {
        "options": " ".join([settings, *url.normalized_query.get("options", ())]),
        # Planning a list takes longer than running it, so prepare it at its first use.
        "prepare_threshold": 0,
    }
    events = [(discard_if_closed, "checkout")]
    return url, {"pool_events": events, "connect_args": connect_args}


def discard_if_closed(connection: psycopg.Connection, *_: Any) -> None:
    """Have the pool replace a connection that the server closed while it was idle.

    This reads what has arrived. ``pool_pre_ping`` would send a query, with which the
    requests of 32 clients become 7 to 15 % slower.
    """
    try:
        # The first call may only read a last message before the end of the connection.
        connection.pgconn.consume_input()
        connection.pgconn.consume_input()
    except psycopg.OperationalError as error:
        raise exc.DisconnectionError from error


@event.listens_for(Engine, "handle_error")
def discard_stale_statements(context: ExceptionContext) -> None:
    """Discard a connection with outdated prepared statements.

    PostgreSQL rejects them for good after a column has changed its type.
    """
    if isinstance(context.original_exception, psycopg.errors.FeatureNotSupported):
        context.is_disconnect = True


@contextmanager
def read_connection() -> Iterator[Connection]:
    """Yield a connection; raise TimeoutError after READ_TIMEOUT_SECONDS.

    A server that hangs does not keep its own timeouts. This limit needs gevent's
    patches, which gunicorn.conf.py applies.
    """
    error = exc.TimeoutError(f"No response within {READ_TIMEOUT_SECONDS} seconds.")
    with Timeout(READ_TIMEOUT_SECONDS, error), db.engine.connect() as connection:
        try:
            yield connection
        except exc.TimeoutError:
            # The next request on this connection would read the late result.
            connection.invalidate()
            raise


@contextmanager
def write_transaction() -> Iterator[None]:
    """Run a transaction of ``db.session`` with the write lock, and commit it.

    Raises ClickException if the database belongs to Lightning.
    """
    connection = db.session.connection()
    # In autocommit mode the drivers send no BEGIN; their commit() ends this one.
    for statement in BEGIN_WRITE_SQL[connection.dialect.name]:
        connection.exec_driver_sql(statement)
    # Requests must not get a connection with the settings for writing from the pool.
    connection.detach()
    # Ecto, Lightning's database library, creates this table.
    if inspect(connection).has_table("schema_migrations"):
        raise click.ClickException(
            "The database belongs to Lightning (it has the table schema_migrations), "
            "and this service only reads it. Make the change in Lightning."
        )
    yield
    db.session.commit()


def create_tables() -> list[str]:
    """Create the tables that are missing, and return their names."""
    connection = db.session.connection()
    existing = {
        table: {column["name"] for column in columns}
        for (_, table), columns in inspect(connection).get_multi_columns().items()
    }
    tables = db.metadata.sorted_tables
    missing = [
        str(column)
        for table in tables
        for column in table.columns
        if column.name not in existing.get(table.name, {column.name})
    ]
    if missing:
        raise click.ClickException(
            f"The database lacks these columns: {', '.join(missing)}. "
            "CHANGELOG.md has the statement that adds them."
        )
    db.metadata.create_all(connection)
    return [table.name for table in tables if table.name not in existing]


def lacks_table(error: exc.SQLAlchemyError) -> bool:
    """Return whether the error is that the database lacks a table."""
    cause = getattr(error, "orig", None)
    code = getattr(cause, "sqlstate", None)
    return code == "42P01" or str(cause).startswith("no such table")


def is_unavailable(error: exc.SQLAlchemyError) -> bool:
    """Return whether the same request may succeed later; otherwise it is a bug."""
    # No connection was free in time, or there was no response in time.
    if isinstance(error, exc.TimeoutError):
        return True
    # The pool gives up when the connection that replaces a closed one is closed, too.
    if not isinstance(error, exc.DBAPIError):
        return str(error).startswith("This connection is closed")
    if error.connection_invalidated or lacks_table(error):
        return True
    # SQLite raises OperationalError for a wrong statement, too, and DatabaseError for
    # a file that is no database.
    if getattr(error.orig, "sqlite_errorname", None) == "SQLITE_ERROR":
        return False
    return type(error) in (exc.OperationalError, exc.DatabaseError)


def describe_error(error: exc.SQLAlchemyError) -> str:
    """Return the database, the error and a remedy in one line without a password."""
    url = db.engine.url
    line = str(getattr(error, "orig", error)).strip().partition("\n")[0]
    if lacks_table(error):
        line += " (run `flask init-db` to create the tables)"
    if url.get_backend_name() == "sqlite":
        return f"{url.database}: {line}"
    host = f"{url.host or 'localhost'}:{url.port or 5432}"
    hosts = ", ".join(url.normalized_query.get("host", [host]))
    return f"{hosts}, {url.database or 'the default database'}: {line}"
