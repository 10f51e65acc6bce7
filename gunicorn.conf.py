"""Configure gunicorn, where the service needs more than gunicorn's defaults."""

import logging
import os
import resource
import socket
import sys
from importlib import import_module
from typing import Any

import gevent
from gevent import monkey

# Other libraries must find the patched functions when they are imported.
monkey.patch_all()

# The master imports the libraries, so that workers share them and start in 0.1 s, not
# in 0.7 s. Each worker imports the service itself, so that HUP serves new code.
for library in ("flask_sqlalchemy", "marshmallow", "orjson", "psycopg", "yaml_rs"):
    import_module(library)

# gunicorn itself would listen on all addresses. The master cannot import config.py,
# because workers would inherit its old code at a reload.
port = os.environ.get("PORT") or "8000"
if port not in map(str, range(1, 65_536)):
    sys.exit("PORT must be a whole number between 1 and 65535.")
bind = f"127.0.0.1:{port}"

# Each connection has a greenlet of its own, so that slow clients block no others.
worker_class = "gevent"

# Each connection is an open file, and the worker itself needs up to 100 files.
worker_connections = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)

# A client has 5 seconds to send the headers of its next request.
keepalive = 5

# A client that accepts no data for 30 seconds is disconnected.
SEND_TIMEOUT_MS = 30_000

# A worker that stops has 10 seconds to finish the responses that have begun.
graceful_timeout = 10

# gunicorn trusts forwarded headers from this machine, but TRUSTED_PROXIES must decide.
secure_scheme_headers: dict[str, str] = {}
forwarder_headers = ""

# The control socket would be a second way to give commands to the running service.
control_socket_disable = True

# The query string, the user and the headers are left out, since they may hold a token.
# %a escapes control characters, so that a path cannot start a new line.
access_log_format = '%(h)s - - %(t)s "%(m)s %(U)a %(H)s" %(s)s %(b)s'

# Lines with these prefixes quote a malformed request, which may hold a token, or are
# the traceback of a client that was disconnected.
UNLOGGED_PREFIXES = "Invalid request", "Ignored premature", "Socket error"


def post_fork(server: Any, worker: Any) -> None:
    """Set up the worker's log, its time limit for sending, and its stop by Ctrl-C."""
    log = worker.log.error_log
    log.addFilter(lambda record: not str(record.msg).startswith(UNLOGGED_PREFIXES))
    # The application's lines get gunicorn's format and destination.
    logging.getLogger().handlers = log.handlers
    for listener in worker.sockets:
        # Connections inherit the option. Only Linux has it, and only for TCP.
        if listener.sock.family != socket.AF_UNIX and sys.platform == "linux":
            option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
            listener.sock.setsockopt(*option, SEND_TIMEOUT_MS)
    # Ctrl-C makes the master send SIGQUIT, which would abort responses.
    worker.handle_quit = worker.handle_exit


def post_request(worker: Any, request: Any, environ: Any, response: Any) -> None:
    """Serve other clients before the next request of the same connection.

    Without this, the slowest of 32 clients with keep-alive waits 1.9 s, not 0.5 s.
    ``sleep(0)`` would return before other sockets are polled; a timer does not.
    """
    if response and not response.should_close():
        gevent.sleep(1e-6)
