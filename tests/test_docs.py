"""Open the Swagger UI page in a real browser."""

import json
import os
from shutil import which

import pytest
from conftest import sqlite_only, with_shared_server
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import element_to_be_clickable
from selenium.webdriver.support.wait import WebDriverWait


@pytest.fixture
def browser(tmp_path):
    """Chromium, with a log of its requests and of its console."""
    chromium, driver = which("chromium"), which("chromedriver")
    if not (chromium and driver):
        assert not os.environ.get("CI"), "CI must have Chromium and its driver"
        pytest.skip("needs chromium and chromedriver in PATH")
    options = ChromeOptions()
    options.binary_location = chromium
    # Chromium's sandbox does not start as root, which runs the tests in containers.
    for argument in ("headless", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1200,1600")
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    with Chrome(options, ChromeService(driver)) as browser:
        yield browser


def requested_urls(browser):
    """Yield all URLs that the page has requested."""
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]


@with_shared_server()
def test_page_shows_the_demo_s_jobs(server, run_flask, browser):
    """The page loads nothing from other hosts, and the console has no error."""
    token = run_flask("demo").split()[1]
    root = f"http://127.0.0.1:{server.port}"

    def element(selector):
        clickable = element_to_be_clickable((By.CSS_SELECTOR, selector))
        return WebDriverWait(browser, 30).until(clickable)

    browser.get(f"{root}/api/docs")
    element(".btn.authorize").click()
    element(".auth-container input").send_keys(token)
    element(".auth-container .btn.authorize").click()
    element(".auth-container .btn-done").click()
    element("#operations-jobs-list_jobs .opblock-summary-control").click()
    element("#operations-jobs-list_jobs .try-out__btn").click()
    element("#operations-jobs-list_jobs .execute").click()
    response = element(".live-responses-table .response-col_description code").text
    names = [job["attributes"]["name"] for job in json.loads(response)["data"]]
    assert names == ["Read visits", "Keep new patients", "Register"]
    urls = set(requested_urls(browser))
    assert f"{root}/api/jobs?page=1&page_size=10" in urls
    assert [url for url in urls if not url.startswith((root, "data:"))] == []
    assert browser.get_log("browser") == []


@sqlite_only
def test_page_is_served_with_and_without_a_trailing_slash(client):
    for path in ("/api/docs", "/api/docs/"):
        response = client.get(path)
        assert (response.status_code, response.mimetype) == (200, "text/html")
        assert response.headers["X-Content-Type-Options"] == "nosniff"


@sqlite_only
def test_404_of_an_unknown_path_names_the_page(client):
    for path in ("/", "/api", "/nothing", "/api/docs/nothing.js"):
        [error] = client.get(path).json["errors"]
        assert "/api/docs" in error["detail"]
