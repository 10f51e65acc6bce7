"""SQLite and PostgreSQL: connecting, reading, writing, and what their errors mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL, Connection, exc, inspect, text

# The write lock comes before the first read, so that writers follow each other.
START_WRITING = {
    "sqlite": [
        "PRAGMA busy_timeout = 60000",
        "PRAGMA journal_mode = WAL",
        "PRAGMA foreign_keys = ON",
        "BEGIN IMMEDIATE",
    ],
    "postgresql": [
        "BEGIN READ WRITE",
        "SET LOCAL statement_timeout = 0",
        # Any number will do that no other program takes: "jobs" in ASCII.
        "SELECT pg_advisory_xact_lock(1785684595)",
    ],
}

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


class ReadOnlyDatabase(Exception):
    """Says why commands do not write to a database."""


def init_database(app: Flask) -> None:
    """Make the engine for DATABASE_URL, or SystemExit; it connects when needed."""
    url = app.config["DATABASE_URL"]
    try:
        if url.get_backend_name() == "postgresql":
            # Else libpq would refuse an unknown argument at each request.
            make_conninfo(**dict.fromkeys(url.query, ""))
            app.config["SQLALCHEMY_ENGINE_OPTIONS"] = postgresql_options(url)
        else:
            # Waiting for a lock holds a whole worker, request after request.
            url = url.set(query={"timeout": "1"} | dict(url.query))
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        db.init_app(app)
    except OSError:
        raise SystemExit("DATABASE_URL must be set: instance/ is missing.") from None
    except (exc.SQLAlchemyError, psycopg.Error, TypeError, ValueError):
        raise SystemExit("DATABASE_URL must have arguments of its driver.") from None


def postgresql_options(url: URL) -> dict[str, Any]:
    """What keeps a server that is slow or gone from holding a request for long."""
    settings = "-c statement_timeout=5s -c default_transaction_read_only=on"
    return {
        "pool_events": [(find_closed, "checkout")],
        "connect_args": {
            "client_encoding": "utf8",
            "connect_timeout": 3,
            "keepalives_idle": 30,
            "options": " ".join([settings, *url.normalized_query.get("options", ())]),
            "prepare_threshold": 0,  # at first use: to plan costs more than to run
            "tcp_user_timeout": 5000,
        },
    }


def find_closed(connection: psycopg.Connection, *_: Any) -> None:
    """Have the pool replace a connection that the server closed while it was idle.

    Reads what has come, without a round trip: ``pool_pre_ping`` costs a list a tenth.
    """
    try:
        # Twice: the end of a connection may come after a last message.
        connection.pgconn.consume_input()
        connection.pgconn.consume_input()
    except psycopg.OperationalError as error:
        raise exc.DisconnectionError from error


@contextmanager
def reading() -> Iterator[Connection]:
    """A connection in autocommit, which is not used again after an error.

    PostgreSQL refuses a statement that it prepared before a column changed its type,
    and would go on doing so on that connection.
    """
    with db.engine.connect() as connection:
        try:
            yield connection
        except exc.DBAPIError:
            connection.invalidate()
            raise


@contextmanager
def writing() -> Iterator[None]:
    """A transaction of ``db.session`` with the write lock, committed at the end.

    Raises ReadOnlyDatabase for Lightning's, which has Ecto's table of migrations, and
    for a standby of PostgreSQL's.
    """
    connection = db.session.connection()
    # What is set for writing must not come back to the pool.
    connection.detach()
    if inspect(connection).has_table("schema_migrations"):
        raise ReadOnlyDatabase(
            "The database belongs to Lightning (it has the table schema_migrations), "
            "and this service only reads it: make the change in Lightning."
        )
    is_postgresql = connection.dialect.name == "postgresql"
    if is_postgresql and connection.scalar(text("SELECT pg_is_in_recovery()")):
        raise ReadOnlyDatabase(
            "The database is a standby, which cannot be written to: let DATABASE_URL "
            "name the primary, or give it the argument target_session_attrs=primary."
        )
    # In autocommit the drivers begin nothing by themselves; their commit() ends this.
    for statement in START_WRITING[connection.dialect.name]:
        connection.exec_driver_sql(statement)
    yield
    db.session.commit()


def lacks_table(error: exc.SQLAlchemyError) -> bool:
    """Whether the database misses a table of ours."""
    cause = getattr(error, "orig", None)
    code = getattr(cause, "sqlstate", None)
    return code == "42P01" or str(cause).startswith("no such table")


def is_unavailable(error: exc.SQLAlchemyError) -> bool:
    """Whether asking again may help; else the fault is ours."""
    if isinstance(error, exc.OperationalError) and not lacks_table(error):
        # SQLite counts wrong statements among these.
        return getattr(error.orig, "sqlite_errorname", None) != "SQLITE_ERROR"
    if isinstance(error, exc.DBAPIError):
        # 0A000: a column has changed its type, see reading().
        is_outdated = getattr(error.orig, "sqlstate", None) == "0A000"
        return is_outdated or error.connection_invalidated or lacks_table(error)
    # SQLAlchemy's pool says so when a connection broke and the next one too.
    closed = str(error).startswith("This connection is closed")
    return isinstance(error, exc.TimeoutError) or closed


def reason(error: exc.SQLAlchemyError) -> str:
    """The database's complaint in one line, with a hint where a table is missing."""
    line = str(getattr(error, "orig", error)).strip().partition("\n")[0]
    hint = " (run `flask init-db` to create the tables)"
    return line + hint if lacks_table(error) else line
