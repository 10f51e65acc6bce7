"""How gunicorn serves the application, where that differs from gunicorn's defaults."""

import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from selectors import EVENT_READ
from typing import NoReturn

from gunicorn.http import get_parser
from gunicorn.http.errors import LimitRequestHeaders
from gunicorn.http.message import Request
from gunicorn.workers.gthread import TConn, ThreadWorker

# How many seconds a client may take to send the head of a request, to make room for
# more of the answer, and to hang up after it.
PATIENCE = 5

# How many bytes of a head are waited for; a longer one is a 431.
LARGEST_HEAD = 65536


class PatientWorker(ThreadWorker):
    """Threads that no client can hold up: it is the poller that waits for them.

    gunicorn's own gives a thread to whoever sends one byte, until the rest has come,
    and stands still, two seconds each, for all who do not hang up after their answer.
    """

    def enqueue_req(self, conn: TConn) -> None:
        """Give the next request of a connection to a thread, once its head has come."""
        if self.cfg.is_ssl or self.cfg.protocol != "http":
            super().enqueue_req(conn)
            return
        if conn.parser is None:
            conn.parser = get_parser(self.cfg, conn.sock, conn.client)
            limit = struct.pack("@ll", PATIENCE, 0)
            conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        if has_head(conn):
            conn.data_ready = True
            super().enqueue_req(conn)
        else:
            self.wait(conn, self.go_on_reading)

    def wait(self, conn: TConn, then: Callable[[TConn, socket.socket], None]) -> None:
        """Call the method whenever more has come, until PATIENCE is at its end."""
        conn.timeout = time.monotonic() + PATIENCE
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, EVENT_READ, partial(then, conn))

    def go_on_reading(self, conn: TConn, sock: socket.socket) -> None:
        """Stop waiting for a head that has come."""
        if has_head(conn):
            self.on_pending_socket_readable(conn, sock)

    def finish_request(self, conn: TConn, future: Future) -> None:
        """Hang up after the last answer, and wait until the client does so too.

        Closed at once, the connection would be reset by what the client still sends,
        and the answer might be lost with it (RFC 9112, section 9.6).
        """
        with suppress(OSError):
            if not (future.exception() or future.result()):
                conn.sock.shutdown(socket.SHUT_WR)
                self.wait(conn, self.discard)
                return
        super().finish_request(conn, future)

    def discard(self, conn: TConn, sock: socket.socket) -> None:
        """Drop what the client still sends; close when it has hung up."""
        if receive(conn) == b"":
            self.poller.unregister(sock)
            self.pending_conns.remove(conn)
            self.nr_conns -= 1
            conn.close()


def has_head(conn: TConn) -> bool:
    """Whether a thread can read the next head without waiting for the client."""
    unreader = conn.parser.unreader
    head = unreader.take_buffered()
    received = None if b"\r\n\r\n" in head else receive(conn)
    head += received or b""
    unreader.unread(head)
    if b"\r\n\r\n" in head or received == b"":
        return True
    if len(head) > LARGEST_HEAD:
        unreader.chunk = refuse_more
        return True
    return False


def refuse_more(size_hint: int | None = None) -> NoReturn:
    """Let the parser find a head too long where it asks for more of it."""
    raise LimitRequestHeaders(f"more than {LARGEST_HEAD} bytes")


def receive(conn: TConn) -> bytes | None:
    """What the client has sent: None if nothing has come, no bytes if nothing will."""
    try:
        return conn.sock.recv(8192, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def pre_request(worker: ThreadWorker, request: Request) -> None:
    """Let no thread wait for the end of a body, which the service would not read."""
    if {"CONTENT-LENGTH", "TRANSFER-ENCODING"} & {name for name, _ in request.headers}:
        request.force_close()


# A wrong configuration ends the start once, instead of one worker after the other.
# Nothing connects to the database until a worker, forked by then, is asked.
preload_app = True

# All threads of a worker take turns at one interpreter lock, so more cost rate.
worker_class = PatientWorker
threads = 8

# Below the usual limit of 1024 open files: gunicorn ends a worker that reaches it.
worker_connections = 900

# A worker touches its heartbeat, a file, before each request: no disk shall delay that.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None

# Whoever sits on the machine may send any header: TRUSTED_PROXIES alone decides.
secure_scheme_headers = {}
forwarder_headers = ""

# No second way into the process.
control_socket_disable = True
