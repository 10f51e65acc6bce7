"""Configure gunicorn, where the service needs more than gunicorn's defaults."""

import logging
import os
from importlib import import_module
from typing import Any

import gevent
from gevent import monkey

# Other libraries must find the patched functions when they are imported.
monkey.patch_all()

# The master imports the libraries, so that a worker needs 35 MB of its own, not 57 MB.
# Each worker imports the service itself, so that HUP serves new code.
for library in ("flask_sqlalchemy", "marshmallow", "orjson", "psycopg", "yaml_rs"):
    import_module(library)

# gunicorn would listen on all addresses if PORT is set.
bind = f"127.0.0.1:{os.environ.get('PORT') or 8000}"

# Each connection has a greenlet of its own, so that slow clients block no others.
worker_class = "gevent"

# A client has 5 seconds to send the headers of its next request.
keepalive = 5

# gunicorn trusts forwarded headers from this machine, but TRUSTED_PROXIES must decide.
secure_scheme_headers: dict[str, str] = {}
forwarder_headers = ""

# The control socket would be a second way to give commands to the running service.
control_socket_disable = True

# The query string, the user and the headers are left out, since they may hold a token.
# %a escapes control characters, so that a path cannot start a new line.
access_log_format = '%(h)s - - %(t)s "%(m)s %(U)a %(H)s" %(s)s %(b)s'


def post_fork(server: Any, worker: Any) -> None:
    """Give the application gunicorn's log, and the worker a quiet stop by Ctrl-C."""
    logging.getLogger().handlers = worker.log.error_log.handlers
    # Ctrl-C makes the master send SIGQUIT, which would abort responses.
    worker.handle_quit = worker.handle_exit


def post_request(worker: Any, request: Any, environ: Any, response: Any) -> None:
    """Serve other clients before the next request of the same connection.

    Without this, the slowest of 32 clients with keep-alive waits 1.9 s, not 0.5 s.
    ``sleep(0)`` would return before other sockets are polled; a timer does not.
    """
    if response and not response.should_close():
        gevent.sleep(1e-6)
