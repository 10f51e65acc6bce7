"""SQLite and PostgreSQL: connecting, reading, writing, and what their errors mean."""

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from gevent import Timeout
from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn
from sqlalchemy import URL, Connection, Engine, ExceptionContext, event, exc, inspect
from sqlalchemy.pool import ConnectionPoolEntry

# How to wait for the write lock, and to take it: before the first read of a writer.
BEGIN_WRITE_SQL = {
    "sqlite": [
        "PRAGMA busy_timeout = 60000",
        "PRAGMA journal_mode = WAL",
        "PRAGMA foreign_keys = ON",
        "BEGIN IMMEDIATE",
    ],
    "postgresql": [
        "SET statement_timeout = 0",
        # Whatever the role's default, or the second of two would not see the first.
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",
        # Any number will do that no other program takes: "jobs" in ASCII.
        "SELECT pg_advisory_xact_lock(1785684595)",
    ],
}

# Of a request, for all that it asks of the database: its answer comes within 10.
READ_TIMEOUT_SECONDS = 9

db = SQLAlchemy(
    engine_options={
        # A list is one statement: no BEGIN and COMMIT around it.
        "isolation_level": "AUTOCOMMIT",
        # In errors, which get into the log.
        "hide_parameters": True,
        "pool_size": 8,
        "max_overflow": 0,
        "pool_timeout": 5,
        "pool_use_lifo": True,
    }
)


class Refused(Exception):
    """Says why a command does nothing."""


def init_database(app: Flask) -> None:
    """Make the engine for DATABASE_URL, or SystemExit; it connects when needed."""
    url = app.config["DATABASE_URL"]
    try:
        if url.get_backend_name() == "postgresql":
            url, options = postgresql_options(url)
        else:
            # Waiting for a lock holds a whole worker, request after request.
            url = url.set(query={"timeout": "0.02"} | dict(url.query))
            options = {"pool_events": [(find_replaced, "checkout")]}
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        db.init_app(app)
    except OSError:
        raise SystemExit("DATABASE_URL must be set: instance/ is missing.") from None
    except (exc.SQLAlchemyError, psycopg.Error, TypeError, ValueError):
        raise SystemExit("DATABASE_URL must have arguments of its driver.") from None


def postgresql_options(url: URL) -> tuple[URL, dict[str, Any]]:
    """The URL and the options that keep a slow server from holding a request for long.

    What the URL says itself goes before. Raises ValueError for what libpq takes for no
    value before it connects, and would say at each request.
    """
    ours = {"client_encoding": "utf8", "connect_timeout": "3", "keepalives_idle": "30"}
    url = url.set(query={**ours, "tcp_user_timeout": "5000", **url.query})
    _, arguments = url.get_dialect()().create_connect_args(url)
    int(arguments["connect_timeout"])
    # It looks at the others when it begins to connect: here, to sockets nowhere.
    nowhere = re.sub("[^,]+", "/nowhere", str(arguments.get("host", "none")))
    conninfo = make_conninfo(**{**arguments, "host": nowhere, "hostaddr": None})
    attempt = PGconn.connect_start(conninfo.encode())
    if re.search(b"^invalid ", attempt.error_message, re.MULTILINE):
        raise ValueError
    settings = "-c statement_timeout=5s -c default_transaction_read_only=on"
    return url, {
        "pool_events": [(discard_if_closed, "checkout")],
        "connect_args": {
            "options": " ".join([settings, *url.normalized_query.get("options", ())]),
            "prepare_threshold": 0,  # at first use: to plan costs more than to run
        },
    }


def discard_if_closed(connection: psycopg.Connection, *_: Any) -> None:
    """Have the pool replace a connection that the server closed while it was idle.

    Reads what has come, without a round trip: ``pool_pre_ping`` costs a list a tenth.
    """
    try:
        # Twice: the end of a connection may come after a last message.
        connection.pgconn.consume_input()
        connection.pgconn.consume_input()
    except psycopg.OperationalError as error:
        raise exc.DisconnectionError from error


def find_replaced(
    connection: sqlite3.Connection, entry: ConnectionPoolEntry, _: Any
) -> None:
    """Have the pool open the file anew where another took its place, as a backup does.

    To open it for each request instead makes a list take 1.6 times as long.
    """
    _, _, path = connection.execute("PRAGMA database_list").fetchone()
    try:
        file = os.stat(path)
    except OSError as error:
        raise exc.DisconnectionError from error
    if not os.path.samestat(entry.info.setdefault("file", file), file):
        raise exc.DisconnectionError


@event.listens_for(Engine, "handle_error")
def discard_stale_statements(context: ExceptionContext) -> None:
    """Have the pool replace connections whose statements PostgreSQL no longer runs.

    It refuses those that were prepared before a column changed its type, again and
    again.
    """
    if isinstance(context.original_exception, psycopg.errors.FeatureNotSupported):
        context.is_disconnect = True


@contextmanager
def read_connection() -> Iterator[Connection]:
    """A connection in autocommit; TimeoutError where the database takes too long.

    The server's own limits are none where the server stands still. It is gevent that
    counts the seconds: commands, which run without it, wait on.
    """
    late = exc.TimeoutError(f"No answer within {READ_TIMEOUT_SECONDS} seconds.")
    with Timeout(READ_TIMEOUT_SECONDS, late), db.engine.connect() as connection:
        try:
            yield connection
        except exc.TimeoutError:
            # The answer may still come, and would be taken for that of the next.
            connection.invalidate()
            raise


@contextmanager
def write_transaction() -> Iterator[None]:
    """A transaction of ``db.session`` with the write lock, committed at the end."""
    connection = db.session.connection()
    # What is set for writing must not come back to the pool.
    connection.detach()
    wait, *begin = BEGIN_WRITE_SQL[connection.dialect.name]
    connection.exec_driver_sql(wait)
    require_writable_database(connection)
    # In autocommit the drivers begin nothing by themselves; their commit() ends this.
    for statement in begin:
        connection.exec_driver_sql(statement)
    yield
    db.session.commit()
    if db.engine.dialect.name == "sqlite":
        # Or what is beside the file would be taken for that of a file in its place.
        with db.engine.connect() as other:
            other.detach()
            other.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


def require_writable_database(connection: Connection) -> None:
    """Refused for Lightning's, which has Ecto's table of migrations, or a standby."""
    if inspect(connection).has_table("schema_migrations"):
        raise Refused(
            "The database belongs to Lightning (it has the table schema_migrations), "
            "and this service only reads it: make the change in Lightning."
        )
    if connection.dialect.name != "postgresql":
        return
    if connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar():
        raise Refused(
            "The database is a standby, which cannot be written to: let DATABASE_URL "
            "name the primary, or give it the argument target_session_attrs=primary."
        )


def lacks_table(error: exc.SQLAlchemyError) -> bool:
    """Whether the database misses a table of ours."""
    cause = getattr(error, "orig", None)
    code = getattr(cause, "sqlstate", None)
    return code == "42P01" or str(cause).startswith("no such table")


def is_unavailable(error: exc.SQLAlchemyError) -> bool:
    """Whether asking again may help; else the fault is ours."""
    # No connection was free in time, or there was no answer in time.
    if isinstance(error, exc.TimeoutError):
        return True
    # The pool found a connection closed, and the one that it made in its place.
    if not isinstance(error, exc.DBAPIError):
        return str(error).startswith("This connection is closed")
    # It broke, or was outdated; or there is no table yet.
    if error.connection_invalidated or lacks_table(error):
        return True
    # Away, locked, full …, where SQLite counts wrong statements too; or no database.
    name = getattr(error.orig, "sqlite_errorname", None)
    is_away = isinstance(error, exc.OperationalError) and name != "SQLITE_ERROR"
    return is_away or name in ("SQLITE_CORRUPT", "SQLITE_NOTADB")


def describe_error(error: exc.SQLAlchemyError) -> str:
    """Which database complains of what, and what to do, in a line and no password."""
    url = db.engine.url
    line = str(getattr(error, "orig", error)).strip().partition("\n")[0]
    if lacks_table(error):
        line += " (run `flask init-db` to create the tables)"
    if url.get_backend_name() == "sqlite":
        file = str(url.database).removeprefix("file:").partition("?")[0]
        return f"{file}: {line}{missing_right(file)}"
    host = f"{url.host or 'localhost'}:{url.port or 5432}"
    hosts = ", ".join(url.normalized_query.get("host", [host]))
    return f"{hosts}, {url.database or 'the default database'}: {line}"


def missing_right(file: str) -> str:
    """In brackets, what this process may not do to a SQLite file that it must do."""
    folder = os.path.dirname(file)
    if not os.path.isdir(folder):
        return f" (this user sees no folder {folder})"
    # A database in WAL mode is read with the files beside it, which a reader writes.
    for path in (folder, file, f"{file}-wal", f"{file}-shm"):
        if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
            return f" ({path} must be readable and writable for this user)"
    return ""
