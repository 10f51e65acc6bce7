"""List a user's jobs, as a programmer would write it first with the same libraries."""

import os
from typing import Any

from flask import Flask
from marshmallow import Schema, fields
from sqlalchemy import DateTime, create_engine, text

JOIN = """
    FROM jobs
    JOIN workflows ON workflows.id = workflow_id
    JOIN project_users USING (project_id)
    JOIN projects ON projects.id = project_id
    JOIN users ON users.id = user_id
    WHERE email = 'small@example.org'
    AND scheduled_deletion IS NULL AND deleted_at IS NULL
"""
COUNT = text(f"SELECT count(*) {JOIN}")
FIRST_PAGE = text(f"""
    SELECT jobs.id, jobs.name, adaptor, inserted_at, updated_at, workflow_id, project_id
    {JOIN} ORDER BY inserted_at, jobs.id LIMIT 10
""").columns(inserted_at=DateTime, updated_at=DateTime)


class JobSchema(Schema):
    """A job without its body."""

    id = fields.String()
    name = fields.String()
    adaptor = fields.String()
    inserted_at = fields.DateTime()
    updated_at = fields.DateTime()
    workflow_id = fields.String()
    project_id = fields.String()


def create_app() -> Flask:
    """Create the app, which reads the database that DATABASE_URL names."""
    app, schema = Flask(__name__), JobSchema(many=True)
    # These are the service's pool settings. With SQLAlchemy's defaults, 32 clients
    # would open and close overflow connections all the time.
    pool = {"isolation_level": "AUTOCOMMIT", "pool_size": 8, "max_overflow": 0}
    engine = create_engine(os.environ["DATABASE_URL"], **pool)

    @app.get("/api/jobs")
    def list_jobs() -> dict[str, Any]:
        """Return the first page and the total, which Flask encodes as JSON."""
        with engine.connect() as connection:
            total = connection.scalar(COUNT)
            jobs = connection.execute(FIRST_PAGE).mappings().all()
        return {"data": schema.dump(jobs), "total": total}

    return app
