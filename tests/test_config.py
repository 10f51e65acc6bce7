"""A wrong setting stops the start, with one line that names it, not its value."""

import subprocess
import sys

import pytest
from servers import ROOT, TIMEOUT

from app import create_app
from config import load_config
from database import db

ONE_SECOND = "options=-cstatement_timeout%3D1s"

WRONG = [
    ("MAX_PAGE_SIZE", "-77"),
    ("MAX_PAGE_SIZE", "10001"),
    ("MAX_PAGE_SIZE", "ten"),
    ("TOKEN_MAX_AGE_DAYS", "0"),
    ("TOKEN_MAX_AGE_DAYS", "never"),
    ("TRUSTED_PROXIES", "-1"),
    ("PORT", "65536"),
    ("DATABASE_URL", "orders.db"),
    ("DATABASE_URL", "sqlite+aiosqlite:///orders.db"),
    ("DATABASE_URL", "mysql://u:s3cret@h/d"),
    ("DATABASE_URL", "postgresql+psycopg2://u:s3cret@h/d"),
    ("DATABASE_URL", "postgresql://u:s3cret@h:port/d"),
    ("DATABASE_URL", "postgresql://u:s3cret@a:5432,b:5432/d"),
    ("DATABASE_URL", "postgresql://u:Pass@s3cret@h/d"),
    ("DATABASE_URL", "postgresql://u:s3cret@t/Pass@h/d"),
    ("DATABASE_URL", "postgresql://u:Pass@?s3cret@h/d"),
    ("DATABASE_URL", "postgresql://u:Pass@/s3cret?x=1@h/d"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_value_stops_the_start(capsys, name, value):
    with pytest.raises(SystemExit) as error:
        create_app({name: value})
    # gunicorn starts a worker that exits with another code again and again.
    assert error.value.code == 3
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith(f"{name}: ") and line.endswith(".")
    assert value not in line and "s3cret" not in line and printed.out == ""


@pytest.mark.parametrize("command", ["flask init-db", "gunicorn wsgi:app"])
def test_wrong_value_stops_flask_and_gunicorn(command):
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        env={"MAX_PAGE_SIZE": "77777"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (done.returncode, done.stdout) == (3, "")
    # gunicorn's lines begin with a time in brackets.
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert line.startswith("MAX_PAGE_SIZE: ") and "77777" not in done.stderr
    assert done.stderr.count("Booting worker") == (command != "flask init-db")


def test_environment_and_mapping_do_not_mix(monkeypatch):
    monkeypatch.setenv("MAX_PAGE_SIZE", "7")
    assert create_app({}).config["MAX_PAGE_SIZE"] == 100
    assert create_app().config["MAX_PAGE_SIZE"] == 7


def test_empty_value_counts_as_unset(monkeypatch):
    defaults = load_config({})
    for name in ("DATABASE_URL", "TRUSTED_HOSTS", *defaults):
        monkeypatch.setenv(name, "")
    assert load_config() == load_config(dict.fromkeys(defaults)) == defaults


def test_default_database_is_a_file_in_the_instance_folder():
    with create_app({}).app_context():
        assert db.engine.url.database == str(ROOT / "instance/jobs.db")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgresql_url_may_have_a_password_with_escaped_characters(scheme):
    url = f"{scheme}://us%40er:S3cr%40t%2FPa%3A%25@host/d"
    url = load_config({"DATABASE_URL": url})["DATABASE_URL"]
    assert (url.username, url.password) == ("us@er", "S3cr@t/Pa:%")
    assert (url.drivername, url.host) == ("postgresql+psycopg", "host")


def test_parameters_of_the_url_override_the_defaults(make_app, database_url):
    sql, default, param, value = {
        "sqlite": ("PRAGMA busy_timeout", 20, "timeout=1", 1000),
        "postgresql": ("SHOW statement_timeout", "5s", ONE_SECOND, "1s"),
    }[database_url.partition(":")[0]]
    for url, expected in (database_url, default), (f"{database_url}?{param}", value):
        app = make_app(DATABASE_URL=url)
        with app.app_context(), db.engine.connect() as connection:
            assert connection.exec_driver_sql(sql).scalar() == expected
