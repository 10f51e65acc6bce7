PYTHON ?= python3
PORT ?= 8000
export PORT
.PHONY: install serve test lint format bench

# Install what the service needs, into .venv/.
install: .venv/installed

# The check comes first, or the demo's curl line would reach the server that has the port. The demo is only for the
# default database.
serve: install
	@.venv/bin/python -c 'import socket; socket.create_server(("127.0.0.1", $(PORT)))' 2> /dev/null \
	|| { echo "Port $(PORT) cannot be used. Type, for example: make serve PORT=8001" >&2; exit 1; }
	@test -n "$$DATABASE_URL" || .venv/bin/python -m flask demo
	@exec .venv/bin/gunicorn wsgi:app

test: .venv/installed-dev
	.venv/bin/python -m pytest

lint: .venv/installed-dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

format: .venv/installed-dev
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

bench: .venv/installed-dev
	.venv/bin/python bench/bench.py $(ARGS)

# make runs this also where the interpreter behind .venv was removed; --clear replaces what is left.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv

# Each of these files is as new as the last installation, so that a repeated call installs nothing.
.venv/installed: .venv/bin/python requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
