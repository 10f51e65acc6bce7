"""Create the application for gunicorn and for the ``flask`` commands."""

import sys

from app import create_app

try:
    app = create_app()
except SystemExit as error:
    print(error, file=sys.stderr)
    # A worker that exits with gunicorn's WORKER_BOOT_ERROR stops the master; with
    # another code gunicorn would start workers again and again.
    sys.exit(3)
