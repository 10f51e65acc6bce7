"""A wrong setting stops the start, with one line that names it, not its value."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TIMEOUT
from flask import Flask

from app import create_app
from config import SettingsSchema

DEFAULTS = SettingsSchema().load({})

WRONG = [
    ("MAX_PAGE_SIZE", "0"),
    ("MAX_PAGE_SIZE", "10001"),
    ("MAX_PAGE_SIZE", "ten"),
    ("MAX_PAGE_SIZE", "+5"),
    ("MAX_PAGE_SIZE", "١"),
    ("MAX_PAGE_SIZE", "5\n"),
    ("MAX_PAGE_SIZE", "9" * 5000),
    ("TOKEN_MAX_AGE_DAYS", "0"),
    ("TOKEN_MAX_AGE_DAYS", "never"),
    ("TRUSTED_PROXIES", "-1"),
    ("TRUSTED_PROXIES", "true"),
    ("PORT", "0"),
    ("PORT", "65536"),
    ("TRUSTED_HOSTS", ","),
    ("TRUSTED_HOSTS", "a b"),
    ("TRUSTED_HOSTS", "https://jobs.example"),
    ("TRUSTED_HOSTS", "jobs.example:8000"),
    ("TRUSTED_HOSTS", "*"),
    ("DATABASE_URL", "jobs.db"),
    ("DATABASE_URL", "mysql://u:s3cret@h/d"),
    ("DATABASE_URL", "postgresql+psycopg2://u:s3cret@h/d"),
    ("DATABASE_URL", "postgresql://u:s3cret@h:port/d"),
    ("DATABASE_URL", "postgresql://u:s3cret@a:5432,b:5432/d"),
    ("DATABASE_URL", "sqlite://"),
    ("DATABASE_URL", "sqlite:///:memory:"),
    ("DATABASE_URL", "sqlite:///file::memory:?uri=true"),
    ("DATABASE_URL", "sqlite:///file:x?mode=memory&uri=true"),
    ("DATABASE_URL", "sqlite:////tmp/x.db?timeout=never"),
    ("DATABASE_URL", "postgresql://h/d?plugin=never"),
    ("DATABASE_URL", "postgresql://h/d?never=1"),
    ("DATABASE_URL", "postgresql://h/d?connect_timeout=never"),
    ("DATABASE_URL", "sqlite:///a\0b"),
    ("DATABASE_URL", "postgresql://h/a%00b"),
    ("DATABASE_URL", "postgresql://h/d?host=a%00b"),
    ("DATABASE_URL", "postgresql://user:s3cret@t/Pass@host/d"),
    ("DATABASE_URL", "postgresql://user:Pass@s3cret@host/d"),
    ("DATABASE_URL", "postgresql://user:Pass@?s3cret@host/d"),
    ("DATABASE_URL", "postgresql://us/er:s3cret@host/d"),
    ("DATABASE_URL", "postgresql://us/er:Pass?s3cret@host/d?x=1"),
    ("DATABASE_URL", "sqlite://host/x.db"),
    ("DATABASE_URL", "sqlite:////tmp/x.db?timeout=1&timeout=2"),
    ("DATABASE_URL", "sqlite:////tmp/x.db?timout=5"),
    ("SCRIPT_NAME", "openfn"),
    ("SCRIPT_NAME", "/open fn"),
    ("SCRIPT_NAME", "/openfn/"),
    ("SCRIPT_NAME", "/"),
    ("DATABASE_URL", "postgresql://\udcff@h/d"),
    ("DATABASE_URL", "sqlite+aiosqlite:///jobs.db"),
]


def environment(**variables):
    """Return this process's environment without the service's settings."""
    settings = {*SettingsSchema().fields, "GUNICORN_CMD_ARGS", "WEB_CONCURRENCY"}
    return {k: v for k, v in os.environ.items() if k not in settings} | variables


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """An environment in which no setting has a value."""
    for name in SettingsSchema().fields:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_value_stops_the_start(name, value):
    with pytest.raises(SystemExit, match=f"^{name} must [^\n]*$") as error:
        create_app({name: value})
    assert not re.search("s3cret|9999|=never|true|evil", str(error.value))


def test_parameter_that_the_driver_rejects_is_named():
    """The message names the parameters but not their values, which may be secrets."""
    for url, name in (
        ("sqlite:////tmp/x.db?timeout=s3cret", "timeout"),
        ("postgresql://h/d?passwd=s3cret", "passwd"),
    ):
        with pytest.raises(SystemExit, match=f"Check the names .*: {name}.$"):
            create_app({"DATABASE_URL": url})


def test_unescaped_password_is_reported_with_the_characters_to_escape():
    with pytest.raises(SystemExit, match="write each @ as %40"):
        create_app({"DATABASE_URL": "postgresql://user:S3cr@t/Pass@host/d"})


def test_password_may_have_any_escaped_character():
    url = "postgresql://us%40er:S3cr%40t%2FPass%25@host/d"
    url = create_app({"DATABASE_URL": url}).config["DATABASE_URL"]
    assert (url.username, url.password) == ("us@er", "S3cr@t/Pass%")


def test_number_without_a_maximum_is_reported_with_its_minimum():
    with pytest.raises(SystemExit, match="^TRUSTED_PROXIES must be .* 0 or more.$"):
        create_app({"TRUSTED_PROXIES": "-1"})


def test_rejected_list_of_hosts_is_reported_with_the_form_that_works():
    with pytest.raises(SystemExit, match="host=one:5432&host=two:5432"):
        create_app({"DATABASE_URL": "postgresql://u@a:5432,b:5432/d"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_PAGE_SIZE", True),
        ("MAX_PAGE_SIZE", 1.5),
        ("MAX_PAGE_SIZE", [5]),
        ("TRUSTED_HOSTS", []),
        ("TRUSTED_HOSTS", [""]),
        ("TRUSTED_HOSTS", b"x"),
        ("DATABASE_URL", 5),
    ],
)
def test_wrong_type_in_a_mapping_stops_the_start(name, value):
    with pytest.raises(SystemExit, match=f"^{name} must [^\n]*$"):
        create_app({name: value})


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        ("flask init-db", "MAX_PAGE_SIZE", "77777"),
        ("gunicorn wsgi:app", "DATABASE_URL", "mysql://u:s3cret@h/d"),
        ("gunicorn wsgi:app", "PORT", "77777"),
        ("gunicorn --check-config wsgi:app", "MAX_PAGE_SIZE", "77777"),
    ],
)
def test_wrong_value_stops_flask_and_gunicorn(command, name, value):
    """Each prints one line and exits with an error, and no worker is started again."""
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        env=environment(**{name: value}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode != 0
    # gunicorn's own lines begin with a time in brackets.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and lines[0].startswith(f"{name} must "), done.stderr
    assert value not in done.stderr
    assert done.stderr.count("Booting worker") <= 1


def test_environment_and_mapping_do_not_mix(monkeypatch):
    monkeypatch.setenv("MAX_PAGE_SIZE", "7")
    assert create_app({}).config["MAX_PAGE_SIZE"] == 100
    assert create_app().config["MAX_PAGE_SIZE"] == 7


def test_empty_variable_counts_as_unset(monkeypatch):
    for name in ("MAX_PAGE_SIZE", "TOKEN_MAX_AGE_DAYS", "TRUSTED_HOSTS"):
        monkeypatch.setenv(name, "")
    config = create_app().config
    assert (config["MAX_PAGE_SIZE"], config["TOKEN_MAX_AGE_DAYS"]) == (100, None)
    assert config["TRUSTED_HOSTS"] is None


@pytest.mark.parametrize("value", [None, ""])
def test_unset_value_in_a_mapping_is_the_default(value):
    app = create_app(dict.fromkeys(DEFAULTS, value))
    assert {name: app.config[name] for name in DEFAULTS} == DEFAULTS


def test_folder_that_cannot_be_created_stops_the_start(monkeypatch, tmp_path):
    (tmp_path / "instance").touch()
    monkeypatch.setattr(
        Flask, "auto_find_instance_path", lambda app: f"{tmp_path}/instance"
    )
    with pytest.raises(SystemExit, match="^DATABASE_URL must be set"):
        create_app({})


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgresql_urls_use_psycopg(scheme):
    app = create_app(
        {"DATABASE_URL": f"{scheme}://u:p@127.0.0.1/d?options=-csearch_path%3Dx"}
    )
    assert app.config["SQLALCHEMY_DATABASE_URI"].drivername == "postgresql+psycopg"
    options = app.config["SQLALCHEMY_ENGINE_OPTIONS"]["connect_args"]["options"]
    assert options.endswith("-csearch_path=x")


def test_default_database_is_a_file_in_the_instance_folder():
    url = create_app({}).config["DATABASE_URL"]
    assert str(url) == "sqlite:///jobs.db"
