"""Create the application for gunicorn and for the ``flask`` commands."""

from app import create_app

app = create_app()
