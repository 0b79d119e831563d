"""The page in a browser: every chart draws, what is hovered is what the records say, and nothing leaves the file."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium")
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from cifarlab.recipe import flatten
from cifarlab.report import page
from cifarlab.report.data import read_report
from cifarlab.rundir import RunFolder
from made_up_runs import HOSTILE, a_thousand, make_run, make_study

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not DRIVER or not BROWSER, reason="needs chromium and chromedriver")
NOW = datetime(2026, 11, 28, 15)


class Browser:
    """Opens pages, and sees what they ask of the network and complain of."""

    def __init__(self, profile: Path) -> None:
        options = ChromeOptions()
        options.binary_location = str(BROWSER)
        arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        arguments.append(f"--user-data-dir={profile}")
        if os.name == "posix" and os.getuid() == 0:
            arguments.append("--no-sandbox")
        for argument in arguments:
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options=options, service=Service(DRIVER))
        self.size(1400)

    def size(self, width: int, scheme: str = "light") -> None:
        command = self.driver.execute_cdp_cmd
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        command("Emulation.setDeviceMetricsOverride", metrics)
        command("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def open(self, path: Path) -> None:
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        self.driver.get(path.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map((n) => n.textContent)", selector
        )
        return found

    def hover(self, element: WebElement, x: float = 0, y: float = 0) -> str:
        """The tip, with the pointer so far from the middle of an element."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver, duration=0).move_to_element_with_offset(element, int(x), int(y)).perform()
        return self.tip()

    def tip(self) -> str:
        found: str = self.run("const tip = document.getElementById('tip'); return tip.hidden ? '' : tip.textContent")
        return found

    def press(self, *keys: str) -> None:
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def settle(self) -> None:
        """Wait until what has changed its size is drawn again."""
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
        )

    def complaints(self) -> list[str]:
        """What the console says, and what is asked for that is not the page itself."""
        said = [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]
        for entry in self.driver.get_log("performance"):  # type: ignore[no-untyped-call]
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if not url.startswith("data:") and not url.startswith(self.driver.current_url.partition("#")[0]):
                    said.append(f"asked for {url}")
        return said


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.driver.quit()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs on two datasets, a study and a search, and a page about them."""
    place = tmp_path_factory.mktemp("runs")
    for number, seconds in enumerate((120.0, 130.0, 1100.0)):
        rate = f"optimizer.lr={1e-3 * (number + 1)}"
        make_run(place / str(number), rate, accuracy=0.6 + number / 10, seconds=seconds, count=400, epochs=30)
    make_run(place / "3", dataset="cifar100", classes=40, count=400, accuracy=0.3, epochs=3)
    make_run(place / "4", dataset="cifar100", pictures=False, status="failed", epochs=1, count=50)
    make_study(place / "study", arms=6)
    make_study(place / "the-search", arms=60, design="search", changes={"name": "a search"})
    write(place, place / "page.html")
    return place


def write(place: Path, out: Path) -> None:
    out.write_text(page.page(read_report([place]), out.parent, NOW))


@pytest.fixture
def opened(browser: Browser, place: Path) -> Iterator[Browser]:
    """The page, opened anew; afterwards nothing has been complained of, and nothing asked for."""
    browser.size(1400)
    browser.open(place / "page.html")
    yield browser
    assert browser.complaints() == []


def records(place: Path, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    run = RunFolder(place / str(number))
    return run.train_log(), run.test_log() or {}


def test_every_chart_draws_at_any_width_and_in_the_dark(opened: Browser) -> None:
    fronts, study, search, panels = ("#fronts", "#study-0", "#study-1", "#panels")
    light = opened.run("return getComputedStyle(document.body).backgroundColor")
    for width, scheme in ((1400, "light"), (390, "dark")):
        opened.size(width, scheme)
        opened.settle()
        for selector, charts in ((fronts, 2), (study, 1), (search, 4), (panels, 4)):
            assert len(opened.all(f"{selector} svg.chart")) == charts, (selector, width)
        assert opened.run("return document.documentElement.scrollWidth") == width
        charts_of = "return [...document.querySelectorAll('svg.chart')]"
        assert set(opened.run(f"{charts_of}.map((s) => s.viewBox.baseVal.width - s.parentNode.clientWidth)")) == {0}
        assert opened.run(f"{charts_of}.filter((s) => /NaN|undefined|Infinity/.test(s.innerHTML)).length") == 0
    assert opened.run("return getComputedStyle(document.body).backgroundColor") != light


def test_tables_sort_by_any_column_and_what_is_unknown_stays_below(opened: Browser, place: Path) -> None:
    accuracies = [records(place, number)[1]["accuracy"] for number in range(5)]
    heading = next(button for button in opened.all("#run-table th button") if button.text.startswith("test"))
    for order, down in (("descending", True), ("ascending", False)):
        heading.click()
        cells = opened.texts("#run-table tbody td:nth-child(5)")
        assert cells == [f"{100 * value:.2f}" for value in sorted(accuracies, reverse=down)]
        assert heading.find_element(By.XPATH, "..").get_attribute("aria-sort") == order
    assert len(opened.all("#run-table th[aria-sort]")) == 1
    heading = opened.all("#study-table-0 th button")[4]
    for _ in range(2):
        heading.click()
        assert opened.texts("#study-table-0 tbody td:first-child")[-1] == "baseline"  # has no difference


def test_rows_are_filtered_by_words(opened: Browser) -> None:
    field = opened.one("#filter")
    for words, rows in (("cifar100", 2), ("CIFAR100 failed", 1), ("nothing", 0), ("", 5)):
        field.clear()
        field.send_keys(words or " ")
        assert len([row for row in opened.all("#run-table tbody tr") if row.is_displayed()]) == rows
        assert opened.one("#filtered").text == f"{rows} of 5 runs"


def test_points_are_read_by_pointer_and_by_keys_and_lead_to_their_runs(opened: Browser, place: Path) -> None:
    points = opened.all("#fronts .front:first-child .point")
    assert len(points) == 3
    tips = [opened.hover(point) for point in points]
    for number, tip in enumerate(tips):  # in the order of their times
        _, test = records(place, number)
        assert f"{test['accuracy']:.2%} in " in tip and f"optimizer.lr={0.001 * (number + 1):g}" in tip
    assert [point.get_attribute("tabindex") for point in points] == ["0", "-1", "-1"]
    opened.run("arguments[0].focus()", points[0])
    opened.press(Keys.ARROW_RIGHT)
    assert opened.tip() == tips[1]
    opened.press(Keys.ENTER)
    assert opened.one("#run-1").get_attribute("open") is not None
    assert opened.all("#run-1 svg.chart") and not opened.all("#run-0 svg.chart")  # drawn when it is opened


def test_the_front_is_drawn_through_its_runs(opened: Browser) -> None:
    path = opened.one("#fronts .front:first-child .pareto").get_attribute("d") or ""
    assert path.count("V") == 2 and path.startswith("M")


def test_accuracies_that_most_runs_have_are_shown_first(browser: Browser, place: Path, tmp_path: Path) -> None:
    def shown() -> list[str | None]:
        return [chart.get_attribute("aria-label") for chart in browser.all("#fronts svg.chart")]

    browser.size(1400)
    browser.open(place / "page.html")
    assert shown() == ["test accuracy on cifar10 by training time", "test accuracy on cifar100 by training time"]
    for number in range(3):
        make_run(tmp_path / str(number), count=10, pictures=False, epochs=2)
        if number:  # as in a study, where the test set is scored for few runs
            (tmp_path / str(number) / "test.json").unlink()
    write(tmp_path, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert shown() == ["validation accuracy on cifar10 by training time"]
    assert browser.complaints() == []


def test_reference_experiments_are_switched_on(opened: Browser) -> None:
    box = opened.one("#fronts .front:first-child input[type=checkbox]")
    box.click()
    labels = [point.get_attribute("aria-label") or "" for point in opened.all("#fronts .front:first-child .point")]
    assert len(labels) == 10
    assert "EX-4, reference\n96.24% in 48 min 26 s" in labels
    assert "EX-5" in opened.texts("#fronts .front:first-child text")
    box.click()
    assert len(opened.all("#fronts .front:first-child .point")) == 3


def test_curves_are_read_by_pointer_and_zoomed(opened: Browser, place: Path) -> None:
    loss = opened.all("#panels svg.chart")[0]
    log, _ = records(place, 2)
    opened.run("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", loss)
    opened.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    lines = opened.tip().split("\n")
    entry = log["epochs"][1]
    assert lines[0] == "epoch 2"
    (own,) = [line for line in lines if "optimizer.lr=0.003" in line]
    numbers = {name: float(text) for name, text in re.findall(r"(training|validation) ([\d.]+)", own)}
    assert numbers == pytest.approx({"training": entry["train_loss"], "validation": entry["val_loss"]}, rel=1e-3)
    width = loss.rect["width"]
    assert opened.hover(loss, x=width / 2 - 16).startswith("epoch 30")

    ticks = "return [...arguments[0].querySelectorAll('text')].map((n) => n.textContent)"
    before = opened.run(ticks, loss)
    chain = ActionChains(opened.driver, duration=0).move_to_element_with_offset(loss, 0, 0).click_and_hold()
    chain.move_by_offset(int(width / 4), 0).release().perform()
    panels = opened.all("#panels svg.chart")
    for panel in panels:  # all of them
        epochs = [int(text) for text in opened.run(ticks, panel) if text.isdigit() and int(text) > 9]
        assert epochs and min(epochs) >= 15 and max(epochs) <= 25
    opened.run("arguments[0].focus()", panels[0])
    opened.press(Keys.ESCAPE)
    assert opened.run(ticks, opened.all("#panels svg.chart")[0]) == before


def test_runs_are_chosen_for_the_curves(opened: Browser) -> None:
    def curves() -> int:
        return len(opened.all("#panels > :nth-child(4) .curve"))  # learning rate: one a run

    assert curves() == 5 == len(opened.all("#legend li"))
    opened.all("#run-table input")[0].click()
    assert curves() == 4 == len(opened.all("#legend li"))


def test_two_recipes_differ_by_their_fields(opened: Browser, place: Path) -> None:
    opened.run("const s = document.getElementById('other'); s.value = '3'; s.dispatchEvent(new Event('change'))")
    one, other = (flatten(RunFolder(place / str(number)).recipe_values()) for number in (0, 3))
    expected = {name for name in one | other if one.get(name) != other.get(name)}
    shown = {name for name in opened.texts(".differences td:first-child") if name not in ("content", "machine")}
    assert shown == expected >= {"datasets"}


def test_confusions_are_read_and_put_in_order(opened: Browser, place: Path) -> None:
    opened.run("document.getElementById('run-0').open = true")
    opened.settle()
    matrix = records(place, 0)[1]["confusion_matrix"]
    svg = opened.one("#run-0 svg.matrix")
    assert len(opened.all("#run-0 svg.matrix .cell")) == sum(bool(cell) for row in matrix for cell in row)
    opened.run("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", svg)
    opened.press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    share = matrix[2][1] / sum(matrix[2])
    assert opened.tip() == f"true: class 2\npredicted: class 1\n{matrix[2][1]} of {sum(matrix[2])} ({share:.1%})"
    for button in opened.all("#run-0 .group button"):
        button.click()
        names = opened.texts("#run-0 svg.matrix text[text-anchor=end]")
        assert sorted(names) == sorted(f"class {number}" for number in range(10))
        assert (
            len([one for one in opened.all("#run-0 .group button") if one.get_attribute("aria-pressed") == "true"]) == 1
        )
    recalls = [row[number] / sum(row) for number, row in enumerate(matrix)]
    assert [recalls[int(name.split()[1])] for name in names] == sorted(recalls)
    assert opened.hover(opened.one("#run-0 svg.matrix .cell")).startswith("true: ")


def test_many_classes_confused_together_stand_together(opened: Browser, place: Path) -> None:
    opened.run("document.getElementById('run-3').open = true")
    matrix = records(place, 3)[1]["confusion_matrix"]
    order = [int(name.split()[1]) for name in opened.texts("#run-3 svg.matrix text[text-anchor=end]")]
    assert sorted(order) == list(range(40))

    def beside(order: list[int]) -> int:
        return sum(matrix[a][b] + matrix[b][a] for a, b in itertools.pairwise(order))

    assert beside(order) > beside(sorted(order))


def test_classes_reliability_and_pictures(opened: Browser, place: Path) -> None:
    opened.run("document.getElementById('run-0').open = true")
    opened.settle()
    _, test = records(place, 0)
    assert f"Reliability: ECE {test['ece']:.2%}" in opened.texts("#run-0 h3")
    table = opened.texts("#run-0 [aria-label^='Precision'] tbody tr:nth-child(4) td")
    own = test["per_class"][3]
    assert table[:5] == ["class 3", str(own["support"]), *(f"{own[key]:.1%}" for key in ("precision", "recall", "f1"))]
    bins = opened.all("#run-0 svg.chart:not(.matrix) .point")
    assert "confidence " in opened.hover(bins[-1]) and len(bins) > 3

    arrays = RunFolder(place / "0").read_arrays("examples.npz")
    labels = [one.get_attribute("aria-label") or "" for one in opened.all("#run-0 .picture")]
    assert len(labels) == 3 * 24
    index, label = arrays["most_wrong_index"][0], arrays["most_wrong_labels"][0]
    assert labels[0].startswith(f"image {index}, class class {label}, ")
    assert labels[48] == f"image {arrays['augmented_index'][0]}, class class {arrays['augmented_labels'][0]}"
    loaded = """const [list, done] = arguments, picture = new Image();
        picture.onload = picture.onerror = () => done([picture.naturalWidth, picture.naturalHeight]);
        picture.src = getComputedStyle(list).getPropertyValue('--sheet').slice(5, -2);"""
    size = opened.driver.execute_async_script(loaded, opened.one("#run-0 .pictures"))
    assert size == [8 * 32, 3 * 32]
    boxes = [picture.rect for picture in opened.all("#run-0 .picture")[:24]]
    assert all(box["width"] == pytest.approx(box["height"], abs=1) and box["width"] > 40 for box in boxes)
    first = opened.run("return getComputedStyle(arguments[0]).backgroundPosition", opened.all("#run-0 .picture")[9])
    assert first == f"{100 / 7:.4f}% 50%"  # the second of the second row


def test_a_forest_says_what_is_within_noise(opened: Browser, place: Path) -> None:
    results = json.loads((place / "study" / "study.json").read_text())["results"][1:]
    points = opened.all("#study-0 .point")
    assert len(points) == len(results) == 5
    by_difference = sorted(results, key=lambda one: one["difference"])
    for point, result in zip(points, by_difference, strict=True):
        noise = result["verdict"] == "within noise"
        assert (point.get_attribute("fill") == "var(--paper)") == noise  # hollow
        text = point.get_attribute("aria-label") or ""
        low, high = (f"{100 * result[end]:+.2f}".replace("-", "−") for end in ("low", "high"))
        assert f"[{low}, {high}]" in text and text.endswith(result["verdict"])
    assert len({one["verdict"] for one in results}) > 1


def test_a_search_shows_each_field(opened: Browser) -> None:
    assert opened.texts("#study-1 .title") == ["trial", "optimizer.lr", "optimizer.name", "augment.crop_padding"]
    assert [len(svg.find_elements(By.CSS_SELECTOR, ".point")) for svg in opened.all("#study-1 svg.chart")] == [
        60,
        59,
        59,
        59,
    ]


def test_hostile_names_do_nothing(browser: Browser, tmp_path: Path) -> None:
    evil = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
    run = make_run(tmp_path / "<svg onload=alert(1)>", classes=[evil, HOSTILE, "<b>c"], count=60, epochs=2)
    (run.path / "recipe.yaml").write_text(f"name: {json.dumps(evil)}\nseed: 0")
    make_study(
        tmp_path / "study",
        changes={"name": evil, "design": "search", "arms": [{"id": "a", "name": evil, "changes": {evil: evil}}]},
    )
    write(tmp_path, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    browser.settle()
    browser.hover(browser.one("svg.matrix .cell"))
    assert browser.all("svg.matrix") and browser.driver.title != "hacked"
    assert not browser.all("main img, main b, main script")
    assert browser.complaints() == []


def test_a_runs_own_page_is_open_and_a_thousand_runs_are_readable(
    browser: Browser, place: Path, tmp_path: Path
) -> None:
    write(place / "0", tmp_path / "one.html")
    browser.open(tmp_path / "one.html")
    assert browser.all("#run-0[open] svg.matrix") and len(browser.all("#panels svg.chart")) == 4
    assert browser.complaints() == []
    (tmp_path / "many.html").write_text(page.page(a_thousand(tmp_path / "runs"), tmp_path, NOW))
    browser.open(tmp_path / "many.html")
    assert len(browser.all("#fronts .point")) == 1000 and len(browser.all("#run-table tbody tr")) == 1000
    browser.all("#run-table th button")[3].click()
    cells = [float(text) for text in browser.texts("#run-table tbody td:nth-child(5)")]
    assert cells == sorted(cells, reverse=True)
    assert browser.complaints() == []
