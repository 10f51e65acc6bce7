PYTHON ?= python3
.PHONY: serve test lint format bench

# Before anything is printed or changed, lest it name the server that has the port.
define REQUIRE_FREE_PORT
import config, socket
port = config.load_config()["PORT"]
try:
    socket.create_server(("127.0.0.1", port))
except OSError as error:
    raise SystemExit(f"Port {port} is taken ({error.strerror}): make serve PORT=8001")
endef
export REQUIRE_FREE_PORT

# The demo's token and curl line come first; a database of your own has tokens of its own.
serve: .venv/serve
	@.venv/bin/python -c "$$REQUIRE_FREE_PORT"
	@test -n "$$DATABASE_URL" || .venv/bin/python -m flask demo
	@exec .venv/bin/gunicorn wsgi:app

test: .venv/test
	.venv/bin/python -m pytest

lint: .venv/test
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

format: .venv/test
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

bench: .venv/test
	.venv/bin/python bench/bench.py $(ARGS)

# Made anew where the interpreter behind it is gone or too old.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv

.venv/serve: .venv/bin/python requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/test: .venv/serve requirements-dev.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
