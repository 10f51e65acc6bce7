"""SQLite and PostgreSQL: connections, the read timeout, and what errors say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from gevent import Timeout
from sqlalchemy import Connection, exc

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
    """Create the engine for DATABASE_URL, whose parameters override the defaults."""
    url = app.config["DATABASE_URL"]
    query, options = dict(url.query), dict[str, Any]()
    if url.get_backend_name() == "sqlite":
        # SQLite blocks the whole worker while it waits for a lock.
        query = {"timeout": "0.02"} | query
    else:
        # Where the database's encoding is SQL_ASCII, psycopg would return bytes.
        query = {"client_encoding": "utf8"} | query
        query = {"connect_timeout": "3", "keepalives_idle": "30"} | query
        settings = "-c statement_timeout=5s -c default_transaction_read_only=on"
        query["options"] = f"{settings} {query.get('options', '')}"
        # Planning a list takes longer than running it, so prepare it at its first use.
        options["connect_args"] = {"prepare_threshold": 0}
        options["pool_events"] = [(discard_if_closed, "checkout")]
    app.config["SQLALCHEMY_DATABASE_URI"] = url.set(query=query)
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options
    db.init_app(app)


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


@contextmanager
def read_connection() -> Iterator[Connection]:
    """Yield a connection; raise TimeoutError after READ_TIMEOUT_SECONDS.

    A server that hangs does not keep its own timeouts. This limit needs gevent's
    patches, which gunicorn.conf.py applies.
    """
    try:
        with Timeout(READ_TIMEOUT_SECONDS), db.engine.connect() as connection:
            yield connection
    except Timeout as timeout:
        message = f"No response within {READ_TIMEOUT_SECONDS} seconds."
        # SQLAlchemy has closed the connection, on which the late result may arrive.
        raise exc.TimeoutError(message) from timeout


def describe_error(error: exc.SQLAlchemyError) -> str:
    """Return the database, the error and a remedy in one line without a password."""
    url = db.engine.url.set(query={}).render_as_string(hide_password=True)
    cause = getattr(error, "orig", None) or error
    line = str(cause).strip().partition("\n")[0]
    is_table_missing = isinstance(cause, psycopg.errors.UndefinedTable)
    if is_table_missing or line.startswith("no such table"):
        line += " (run `flask init-db` to create the tables)"
    return f"{url}: {line}"
