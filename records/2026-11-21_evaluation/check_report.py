"""Open a report.html in a real headless browser and use it: check_report.py REPORT.html OUT.png

Needs selenium, chromium with its driver on the PATH, and a report with two models or more and a judge that scores.
Expected rows are counted here, from the page's own data.
Writes OUT.png (the whole page) and OUT_sorted.png (sorted and filtered).
"""

import json
import re
import shutil
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

PER_PAGE = 25


def open_browser(dark=False):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1000",
                 *(["--force-dark-mode"] if dark else [])):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def main(report, out):
    text = report.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    browser = open_browser()

    def element(name):
        return browser.find_element(By.ID, name)

    def choose(name, label):
        started = time.time()
        Select(element(name)).select_by_visible_text(label)
        return time.time() - started

    def counts():  # (rows found, rows of all, page, pages)
        found = re.fullmatch(r"(\d+) of (\d+) prompts, page (\d+) of (\d+)", element("count").text)
        return tuple(map(int, found.groups()))

    def cells(model):  # the texts of one model's column on this page
        column = 1 + len(data["groups"]) + data["models"].index(model)
        return browser.execute_script(
            "return [...document.querySelectorAll('#body tr')].map(row => row.cells[arguments[0]].innerText"
            ".toWellFormed())", column)

    def shoot(name):
        width, height = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        browser.set_window_size(max(1500, width), min(height + 150, 9000))
        browser.save_screenshot(str(name))
        browser.set_window_size(1500, 1000)

    started = time.time()
    browser.get(report.resolve().as_uri())
    print(f"opened in {time.time() - started:.2f} s")
    total = len(data["rows"])
    assert counts()[:3] == (total, total, 1), counts()
    images = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert images and all(images), images
    first = [row["cells"][0]["text"] for row in data["rows"][:PER_PAGE]]
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#body tr')].map(row => row.cells[arguments[0]].firstChild.textContent"
        ".toWellFormed())", 1 + len(data["groups"]))
    assert [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in first] == shown  # the driver refuses lone surrogates
    styles = browser.execute_script("return getComputedStyle(document.querySelector('#body .text')).whiteSpace")
    assert styles == "pre-wrap", styles
    shoot(out)

    # next and previous, by mouse and by keyboard
    element("next").click()
    assert counts()[2] == 2
    element("previous").send_keys(Keys.ENTER)
    assert counts()[2] == 1

    # sort by a score, descending: the numbers that are shown fall, over all pages
    judge, model = data["quantities"][2], data["models"][1]
    browser.execute_script("""window.spent = 0; document.getElementById("quantity").addEventListener("change",
        () => { const started = performance.now(); update(); window.spent = performance.now() - started; });""")
    choose("quantity", judge), choose("of", model)
    seconds = choose("direction", "descending")
    numbers = []
    for page in range(3):
        numbers += [float(re.search(re.escape(judge) + r" (-?[\d.]+)", cell)[1]) for cell in cells(model)]
        if page < 2:
            element("next").click()
    expected = sorted((row["cells"][1]["numbers"][2] for row in data["rows"]), reverse=True)[: len(numbers)]
    assert all(abs(a - b) < 6e-4 for a, b in zip(numbers, expected)) and len(numbers) == min(total, 3 * PER_PAGE)
    print(f"sorted by {judge} of {model} in {seconds:.2f} s with the driver; "
          f"{browser.execute_script('return window.spent'):.0f} ms in the page")

    # a head sorts, and turns on a second click
    heads = browser.find_elements(By.CSS_SELECTOR, "#head button")
    heads[1].click()
    assert heads[1].find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    heads[1].send_keys(Keys.ENTER)
    assert heads[1].find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    assert browser.switch_to.active_element == heads[1]  # the keyboard stays where it was

    # rows without a number come last
    missing = [(q, m) for q in range(2, len(data["quantities"])) for m in range(len(data["models"]))
               if any(row["cells"][m]["numbers"][q] is None for row in data["rows"])]
    if missing:
        quantity, column = missing[0]
        choose("quantity", data["quantities"][quantity]), choose("of", data["models"][column])
        for direction in ("ascending", "descending"):
            choose("direction", direction)
            assert all(f"{data['quantities'][quantity]} " in cell for cell in cells(data["models"][column]))

    # the difference of two models
    for name, label in (("quantity", judge), ("of", model), ("minus", data["models"][0]), ("direction", "descending")):
        choose(name, label)
    prompts = browser.execute_script("return [...document.querySelectorAll('#body tr')].map(r => r.cells[0].innerText)")
    numbers = [float(re.search(r"difference (-?[\d.]+)", prompt)[1]) for prompt in prompts]
    expected = sorted((row["cells"][1]["numbers"][2] - row["cells"][0]["numbers"][2] for row in data["rows"]),
                      reverse=True)
    assert all(abs(a - b) < 6e-4 for a, b in zip(numbers, expected)) and len(numbers) == min(total, PER_PAGE)
    choose("minus", "nothing"), choose("quantity", "prompt order"), choose("direction", "ascending")

    # comparisons: as many rows as verdicts
    for number, verdict in list(enumerate(data["verdicts"], 1))[:4]:
        Select(element("comparison")).select_by_index(number)
        wins = [verdict["a_wins"][row["index"]] for row in data["rows"]]
        for label, value in ((verdict["a"] + " wins", 1), ("tie", 0.5), (verdict["b"] + " wins", 0), ("dropped", None)):
            choose("outcome", label)
            assert counts()[0] == wins.count(value), (verdict["judge"], label, counts(), wins.count(value))
        choose("outcome", verdict["a"] + " wins")
        assert all("wins" in cell for cell in cells(verdict["a"])) and all("loses" in c for c in cells(verdict["b"]))
    same = [v["a_wins"] for v in data["verdicts"] if (v["a"], v["b"]) == (verdict["a"], verdict["b"])]
    choose("outcome", "judges disagree")
    assert counts()[0] == sum({0, 1} <= {wins[row["index"]] for wins in same} for row in data["rows"])

    # sorted and filtered, for the eye
    Select(element("comparison")).select_by_index(1)
    choose("outcome", data["verdicts"][0]["a"] + " wins"), choose("quantity", judge), choose("direction", "descending")
    browser.execute_script("document.querySelector('h2:last-of-type').scrollIntoView()")
    browser.save_screenshot(str(out.with_stem(out.stem + "_sorted")))
    choose("outcome", "all")
    Select(element("comparison")).select_by_index(0)

    # groups
    if data["groups"]:
        value = data["rows"][0]["groups"][0]
        choose("group0", value)
        assert counts()[0] == sum(row["groups"][0] == value for row in data["rows"])
        choose("group0", "all")

    # search: in prompts and responses, whatever the case
    for word in (data["rows"][0]["prompt"].split()[0], max(data["rows"][-1]["cells"][-1]["text"].split(), key=len)):
        for typed in (word.upper(), word.lower()):
            element("search").send_keys(typed)
            assert counts()[0] == sum(any(word.lower() in text.lower() for text in (
                row["prompt"], *(cell["text"] for cell in row["cells"] if cell))) for row in data["rows"])
            for _ in word:
                element("search").send_keys(Keys.BACKSPACE)
            assert counts()[0] == total

    # hide a model: its column goes, and the other cells stay under their heads
    visible = "return [...document.querySelectorAll('#head th')].filter(h => !h.hidden).map(h => h.innerText)"
    before = browser.execute_script(visible)
    browser.find_elements(By.CSS_SELECTOR, "#models input")[0].click()
    after = browser.execute_script(visible)
    assert len(after) == len(before) - 1 and not any(head.strip() == data["models"][0] for head in after)
    widths = browser.execute_script("return [...document.querySelectorAll('#body tr')].map(r => r.cells.length)")
    assert set(widths) == {len(after)}

    # nothing of the data ran, nothing was fetched, nothing complained
    assert browser.execute_script("return window.hurt === undefined")
    fetched = [message["params"]["request"]["url"] for message in (
        json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
        if message["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:")) for url in fetched), fetched
    log = browser.get_log("browser")
    assert not log, log
    browser.quit()

    browser = open_browser(dark=True)
    browser.get(report.resolve().as_uri())
    browser.execute_script("document.querySelector('h2:last-of-type').scrollIntoView()")
    browser.save_screenshot(str(out.with_stem(out.stem + "_dark")))
    browser.quit()
    print("all checks passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
