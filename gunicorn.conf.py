"""How gunicorn serves the application, where that differs from gunicorn's defaults."""

from gevent import monkey

# Before the modules below keep a socket, a lock or a way to wait that blocks.
monkey.patch_all()

import gevent  # noqa: E402

from config import load_config  # noqa: E402

bind = f"127.0.0.1:{load_config()['PORT']}"

# A greenlet a connection: who is slow to send, to read or to hang up holds nobody up.
worker_class = "gevent"

# How many seconds a client may take to send the head of a request.
keepalive = 5

# A wrong configuration ends the start once, instead of one worker after the other.
preload_app = True

# Whoever sits on the machine may send any header: TRUSTED_PROXIES alone decides.
secure_scheme_headers = {}
forwarder_headers = ""

# No second way into the process.
control_socket_disable = True


def post_request(worker, request, environ, response):
    """After an answer to a client with keep-alive, give way to the others.

    Otherwise one whose next request has come is served again first, and of 32 such
    clients some waited for more than 2 seconds. ``sleep(0)`` would come back before
    requests that are still to be read; a timer comes after them.
    """
    if response and not response.should_close():
        gevent.sleep(1e-6)
