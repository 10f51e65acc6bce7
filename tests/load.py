"""Clients that send requests while a test does something else."""

import threading
import time
from http.client import HTTPException
from typing import NamedTuple

from servers import wait_until


class TimedResponse(NamedTuple):
    """A response, the time of its request, and how many seconds it took."""

    status: int
    body: bytes
    began: float
    seconds: float


class Load:
    """Clients that send requests until the block ends, and the responses they got.

    Each client pauses for some seconds between two requests. The shorter the pause, the
    more requests are served at any moment, and the slower everything else becomes.
    """

    def __init__(self, server, paths, headers, clients=4, pause=0.05):
        self.server, self.paths, self.headers = server, paths, headers
        self.pause = pause
        self.responses, self.disconnected = [], []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.run) for _ in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def run(self):
        while not self.stopped.is_set():
            for path in self.paths:
                began = time.monotonic()
                try:
                    got = self.server.get(path, self.headers)
                except (OSError, HTTPException) as error:
                    self.disconnected.append(error)
                else:
                    seconds = time.monotonic() - began
                    response = TimedResponse(got.status, got.body, began, seconds)
                    self.responses.append(response)
                self.stopped.wait(self.pause)

    def wait_for(self, count):
        """Return as soon as that many more responses have arrived."""
        count += len(self.responses)
        wait_until(lambda: len(self.responses) >= count)

    def statuses(self):
        """Return the different statuses of the responses."""
        return {response.status for response in self.responses}
