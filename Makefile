PYTHON ?= python3
.PHONY: serve test lint format bench

# The demo's token and curl line come first; a database of your own has tokens of its own.
serve: .venv/serve
	@test -n "$$DATABASE_URL" || .venv/bin/python -m flask demo
	@exec .venv/bin/python -m gunicorn wsgi:app

test: .venv/test
	.venv/bin/python -m pytest

lint: .venv/test
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

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
