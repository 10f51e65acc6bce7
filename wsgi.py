"""Create the application for gunicorn and for the ``flask`` commands."""

import sys
from contextlib import suppress

from app import create_app

try:
    app = create_app()
except SystemExit as error:
    # A full disk must not prevent the exit.
    with suppress(OSError):
        print(error, file=sys.stderr, flush=True)
    # gunicorn stops if a worker exits with WORKER_BOOT_ERROR (3). With another code it
    # would start workers again and again.
    sys.exit(3)
