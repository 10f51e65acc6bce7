"""Links, promises and limits in the documents, and the API's page in a browser."""

import json
import re

import pytest
from documents import DATABASES
from gunicorn.config import Config
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import element_to_be_clickable
from selenium.webdriver.support.wait import WebDriverWait
from servers import ROOT, find_program

from database import READ_TIMEOUT_SECONDS, db

DOCUMENTS = [path for path in ROOT.glob("*.md")] + [*ROOT.glob("[a-z]*/*.md")]


def without_code(text):
    """Return a document without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_and_anchors_exist(path):
    text = re.sub(r"`[^`\n]*`", "", without_code(path.read_text()))
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists() and linked.is_relative_to(ROOT), target
        if anchor:
            headings = re.findall("^#+ (.*)", without_code(linked.read_text()), re.M)
            # GitHub makes anchors of headings in this way.
            words = [re.sub(r"[^\w\- ]", "", heading).lower() for heading in headings]
            assert anchor in [word.replace(" ", "-") for word in words], target


def test_every_promise_has_tests_that_exist():
    text = (ROOT / "docs/reliability.md").read_text()
    numbers = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    named = dict(re.findall(r"^(\d+)\. (.*)$", text.split("## Tests")[1], re.MULTILINE))
    assert [*named] == numbers
    for number, tests in named.items():
        found = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert found, number
        for file, name in found:
            source = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), name


def limits():
    """Return the table of limits: the value of each, and what changes it."""
    table = DATABASES.split("## Limits and timeouts")[1]
    cells = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| .* \|$", table, re.MULTILINE)
    return {what: (value, setting.strip("`")) for what, value, setting in cells}


def number(value):
    """Return the number that a cell of the table begins with."""
    return float(re.match(r"[\d.]+", value)[0])


def test_limits_of_gunicorn_are_those_of_the_table():
    defaults = {name: setting.get() for name, setting in Config().settings.items()}
    text = (ROOT / "gunicorn.conf.py").read_text()
    config = defaults | dict(re.findall(r"^(\w+) = (\d+)$", text, re.MULTILINE))
    rows = [row for row in limits().values() if row[1].startswith("--")]
    assert len(rows) == 8
    for value, option in rows:
        name = option[2:].replace("keep-alive", "keepalive").replace("-", "_")
        assert number(value) == float(config[name]), option


def test_limits_of_databases_are_those_of_the_table(make_app, app, database_url):
    """A limit that the URL can change has its default there."""
    kind = "SQLite" if database_url.startswith("sqlite") else "PostgreSQL"
    rows = [row for what, row in limits().items() if what.startswith(kind)]
    with app.app_context(), db.engine.connect() as connection:
        for value, setting in rows:
            if match := re.match(r"\?(\w+)=$|\?(timeout)=", setting):
                assert number(value) == float(db.engine.url.query[match[1] or match[2]])
        if kind == "PostgreSQL":
            statements = re.findall(r"SET (\w+) = '?(\w+)'?;", DATABASES)
            assert len(statements) == 2
            for name, value in statements:
                assert connection.exec_driver_sql(f"SHOW {name}").scalar() == value
            for what, value in (
                ("time to read the database, per request", READ_TIMEOUT_SECONDS),
                ("connections per worker", db.engine.pool.size()),
                ("wait for a free connection", db.engine.pool.timeout()),
            ):
                assert number(limits()[f"PostgreSQL: {what}"][0]) == value


@pytest.fixture
def browser():
    """Chromium, with a log of its requests and of its console."""
    options = ChromeOptions()
    options.binary_location = find_program("chromium")
    # Chromium's sandbox does not start as root, which runs the tests in containers.
    for argument in ("headless", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1200,1600")
    logs = {"browser": "ALL", "performance": "ALL"}
    options.set_capability("goog:loggingPrefs", logs)
    with Chrome(options, ChromeService(find_program("chromedriver"))) as browser:
        yield browser


def test_page_of_the_api_sends_requests(server, seeded, browser):
    """It loads nothing from other hosts, shows no raw Markdown, and logs no error."""
    root = f"http://127.0.0.1:{server.port}"

    def element(selector):
        clickable = element_to_be_clickable((By.CSS_SELECTOR, selector))
        return WebDriverWait(browser, 30).until(clickable)

    browser.get(f"{root}/api/docs")
    element(".btn.authorize").click()
    element(".auth-container input").send_keys(seeded.token)
    element(".auth-container .btn.authorize").click()
    element(".auth-container .btn-done").click()
    element("#operations-jobs-list_jobs .opblock-summary-control").click()
    element("#operations-jobs-list_jobs .try-out__btn").click()
    element("#operations-jobs-list_jobs .execute").click()
    response = element(".live-responses-table .response-col_description code").text
    names = [job["attributes"]["name"] for job in json.loads(response)["data"]]
    assert names == ["Job 0", "Job 1", "Job 2"]
    text = browser.find_element(By.TAG_NAME, "body").text
    # Swagger UI itself writes these backticks.
    assert "`" not in re.sub(r"Operation `\w+`", "", text)
    messages = [
        json.loads(e["message"])["message"] for e in browser.get_log("performance")
    ]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = {params["request"]["url"] for params in sent}
    assert f"{root}/api/jobs?page=1&page_size=10" in urls
    assert [url for url in urls if not url.startswith((root, "data:"))] == []
    assert browser.get_log("browser") == []
