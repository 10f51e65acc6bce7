"""How gunicorn serves the application, where that differs from gunicorn's defaults."""

import logging
import os
import resource
import socket
import sys
from importlib import import_module
from typing import Any

import gevent
from gevent import monkey

# Before the libraries keep a lock, or a way to wait, that blocks.
monkey.patch_all()

# Workers have the libraries from here: each starts in 0.1 s in place of 0.7, and four
# take 117 MB with the master in place of 215. Our own modules each imports anew, since
# after HUP they would otherwise have the old ones.
for library in ("flask_sqlalchemy", "marshmallow", "orjson", "psycopg"):
    import_module(library)

# gunicorn's own default would be all addresses of the machine where PORT is set.
port = os.environ.get("PORT") or "8000"
if port not in map(str, range(1, 65_536)):
    sys.exit("PORT must be a whole number between 1 and 65535.")
bind = f"127.0.0.1:{port}"

# A greenlet a connection: who is slow to send, to read or to hang up holds nobody up.
worker_class = "gevent"

# As many as may be open at once, but for the files of the worker itself.
worker_connections = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)

# How many seconds a client may take to send the head of a request.
keepalive = 5

# A client that accepts no data for 30 seconds is disconnected.
SEND_TIMEOUT_MS = 30_000

# A worker that stops has 10 seconds to finish the responses that have begun.
graceful_timeout = 10

# Whoever sits on the machine may send any header: TRUSTED_PROXIES alone decides.
secure_scheme_headers: dict[str, str] = {}
forwarder_headers = ""

# No second way into the process.
control_socket_disable = True

# The query string, the user and the headers are left out, since they may hold a token.
# %a escapes control characters, so that a path cannot start a new line.
access_log_format = '%(h)s - - %(t)s "%(m)s %(U)a %(H)s" %(s)s %(b)s'

# These lines quote malformed requests, which may hold a token, or are tracebacks of
# disconnected clients.
UNLOGGED = (
    "Invalid request",
    "Ignored premature client disconnection",
    "Socket error processing request",
)


def post_fork(server: Any, worker: Any) -> None:
    """Set up the worker's log, its time limit for sending, and its stop by Ctrl-C."""
    log = worker.log.error_log
    log.addFilter(lambda record: not str(record.msg).startswith(UNLOGGED))
    # The application's lines get gunicorn's form and file.
    logging.getLogger().handlers = log.handlers
    for listener in worker.sockets:
        # Connections inherit the option. Linux alone has it, and only for TCP.
        if listener.sock.family != socket.AF_UNIX and sys.platform == "linux":
            option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
            listener.sock.setsockopt(*option, SEND_TIMEOUT_MS)
    # Ctrl-C makes the master send SIGQUIT, which would abort responses.
    worker.handle_quit = worker.handle_exit


def post_request(worker: Any, request: Any, environ: Any, response: Any) -> None:
    """After an answer to a client with keep-alive, give way to the others.

    Otherwise one whose next request has come is served again first, and of 32 such
    clients some waited for more than 2 seconds. ``sleep(0)`` would come back before
    requests that are still to be read; a timer comes after them.
    """
    if response and not response.should_close():
        gevent.sleep(1e-6)
