"""What gunicorn and ``flask`` find: the service, configured by the environment."""

from app import create_app

app = create_app()
