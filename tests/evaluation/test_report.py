"""The HTML report: everything inside, nothing that tells who items are of, and it works."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from evaluation_fakes import data_file, exported
from PIL import Image
from rich.console import Console

import domainssl
from domainssl.cli.run.evaluating import _data_name
from domainssl.evaluation.comparison import Row
from domainssl.evaluation.gallery import principal
from domainssl.evaluation.html import spectrum
from domainssl.evaluation.tables import HEADLINES, left_off, overviews, pair_tables

BROWSER, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FEW = {"protocols": ("knn", "linear", "retrieval", "cross_modal", "dense"), "resamples": 20}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with its configuration, export and a panel."""
    folder = tmp_path_factory.mktemp("report") / "run"
    exported(folder / "backbone")
    text = data_file(folder).read_text()
    (folder / "config.yaml").write_text("name: '<i>pairs</i> & more'\n" + text)
    (folder / "panels").mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "panels" / "step_0000010_s2.png")
    Image.new("RGB", (60, 40), "blue").save(folder / "panels" / "step_0000020_s2.png")
    return folder


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    found = domainssl.evaluate(run, output=run.parent / "out", **FEW)
    assert [path.name for path in found.files] == [
        "evaluation.csv", "evaluation.json", "report.html",
    ]  # fmt: skip
    return found.files[-1]


def content(report: Path) -> dict:
    text = report.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found)


def test_report_is_one_small_file_without_addresses(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    own = re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", text)
    links = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\w", own))
    assert links == {"http://www.w3.org"}  # the name of SVG, which nothing fetches
    assert not re.search(r"<(?:link|img|script)[^>]+(?:href|src)=\"(?!data:)", text)


def test_title_and_captions_say_what_is_shown(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "<h1>Evaluation on pairs</h1>" in text  # the format of the data, no class of ours
    assert content(report)["facts"]["data"]["kind"] == "LabelledPairs"
    assert "Short grey ticks are chance: what features without information reach." in text
    assert "for accuracy the share of the largest class" in text
    assert "numbers count items, colours are shares of the row" in text
    assert "Share found per class" not in text


def row(features: str, protocol: str, metric: str, chance: float, backbone: str = "a") -> Row:
    return Row(
        backbone=backbone, features=features, protocol=protocol, metric=metric, value=0.5, low=0.4,
        high=0.6, seeds=1, seed_std=0.0, chance=chance, train_items=9, test_items=9,
    )  # fmt: skip


def test_the_table_on_screen_has_a_row_of_chances() -> None:
    rows = [
        row("s1", "kNN", "accuracy", 0.25),
        row("s2", "kNN", "accuracy", 0.5),
        row("s1", "retrieval", "mAP", 0.125),
        row("s1", "kNN", "balanced accuracy", 0.9),
    ]
    [table] = overviews(rows, "t", 80)
    assert [list(column.cells)[-1] for column in table.columns] == [
        "chance", "", "25.0 to 50.0", "12.5",
    ]  # fmt: skip
    assert "chance: what features without information reach" in str(table.caption)


def test_tables_on_screen_are_no_wider_than_it_and_lose_no_value() -> None:
    subsets = ["a", "b", "c", "d", "a+b", "a+b+c", "a+b+c+d"]
    names = ["omnisat", "untrained (a long label)"]
    rows = [
        row(features, protocol, metric, 0.25, name)
        for features in subsets
        for name in names
        for protocol, metric in HEADLINES.items()
    ]
    pairs = [(a, b) for a in "abcd" for b in "abcd" if a != b]
    for how in ("aligned", "direct"):
        rows += [
            row(f"{a} to {b}", f"cross-modal ({how})", "R@1", 0.1, name)
            for a, b in pairs
            for name in [*names, "raw"]
        ]
    tables = overviews(rows, "t", 80)
    console = Console(width=80, file=io.StringIO())
    for table in tables:
        console.print(table)
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert text.count("50.0 ±10") == 2 * 5 * len(HEADLINES)  # backbones, features on screen
    assert "│ untrained (a long label) │ a+b+c+d" in text and "a+b+c " not in text
    [matrix] = pair_tables(rows)  # of pairs, two ways and three backbones were 72 rows
    assert matrix.row_count == 3 * 4
    cells = [list(column.cells) for column in matrix.columns]
    assert cells[1][:4] == ["a", "b", "c", "d"] and cells[2][:4] == ["", *["50.0 ±10"] * 3]
    assert "chance 10.0" in str(matrix.caption)
    console.print(matrix)
    assert max(map(len, console.file.getvalue().splitlines())) <= 80
    assert left_off(rows) == (
        "not shown here: 2 subsets of modalities and direct retrieval, R@5, R@10 and mAP between "
        "modalities; see the files"
    )
    two = [r for r in rows if r.features in ("a to b", "b to a")]
    assert [table.row_count for table in pair_tables(two)] == [2 * 2 * 3]
    assert left_off([row("a", "kNN", "accuracy", 0.5)]) == ""


def test_a_sample_is_called_one() -> None:
    class Data:
        root = "sample:petct"

        def identity(self) -> dict[str, str]:
            return {"format": "volumes"}

    assert _data_name(Data()) == "volumes (embedded sample)"
    assert _data_name(object()) == "object"


def test_names_of_users_are_text_and_never_markup(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "<i>pairs" not in text and "<b>river" not in text
    assert "&lt;i&gt;pairs&lt;/i&gt; &amp; more" in text
    found = content(report)
    assert found["classes"][0] == "<b>river</b>"
    assert found["facts"]["backbones"][0]["label"] == "<i>pairs</i> & more"


def test_report_holds_what_it_shows(report: Path) -> None:
    found = content(report)
    label = "<i>pairs</i> & more"
    assert set(found["embeddings"]) == {label, "untrained", "raw"}
    own = found["embeddings"][label]["s1+s2"]
    assert len(own["xy"]) == len(own["items"]) == 24 and own["spectrum"][0] == 1
    assert sorted(found["items"]["places"]) == list(range(24))
    assert found["items"]["names"][0] == "val0"
    assert [set(e["pictures"]) for e in found["examples"]] == [{"s1", "s2"}] * 4
    assert set(found["examples"][0]["maps"]) == {label}
    (panel,) = found["panels"]  # the last step
    assert panel["title"] == f"{label}: s2" and panel["picture"].startswith("data:image/webp")


def test_protected_items_have_no_picture_and_no_name(run: Path, tmp_path: Path) -> None:
    found = domainssl.evaluate(run, output=tmp_path / "out", data={"private": True}, **FEW)
    assert any("--thumbnails" in note for note in found.notes)
    page = content(found.files[-1])
    assert page["sheet"]["uri"] == "" and page["examples"] == page["panels"] == []
    assert all(re.fullmatch(r"[0-9a-f]{10}", name) for name in page["items"]["names"])
    for path in found.files:
        assert "val0" not in path.read_text() and "Miller" not in path.read_text(), path
    shown = domainssl.evaluate(
        run, output=tmp_path / "out", data={"private": True}, thumbnails=True, **FEW
    )
    page = content(shown.files[-1])
    assert page["sheet"]["uri"] and len(page["examples"]) == 4
    assert "val0" not in shown.files[-1].read_text()


def test_spectrum_and_components_are_those_of_the_features() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) * [8, 4, 2, 1, 0.5, 0] + 3
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    assert spectrum(x) == pytest.approx((values / values[0]).tolist(), abs=1e-6)
    plane = principal(x, 2)
    assert plane.std(0) * np.sqrt(50) == pytest.approx(values[:2])
    assert principal(x[:, :1], 3)[:, 1:].tolist() == [[0.0, 0.0]] * 50


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    """A headless browser; where none is installed, tests are skipped, or fail under CI."""
    lacking = [str(path) for path in (BROWSER, DRIVER) if not path.is_file()]
    if lacking:
        text = f"no browser here: {', '.join(lacking)} (Debian: chromium, chromium-driver)"
        pytest.fail(text) if os.environ.get("CI") == "true" else pytest.skip(text)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(service=Service(str(DRIVER)), options=options)
    yield driver
    driver.quit()


def opened(driver, report: Path, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get(report.as_uri())


def press(driver, key: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(key).perform()


def script(driver, text: str):
    return driver.execute_script(text)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_report_fits_the_window_without_errors(chromium, report, width, scheme) -> None:
    opened(chromium, report, width, scheme)
    assert chromium.get_log("browser") == []
    assert script(chromium, "return innerWidth") == width
    assert script(chromium, "return document.documentElement.scrollWidth") <= width
    shown = script(
        chromium,
        "return [...document.querySelectorAll('section')].filter(s => s.offsetHeight)"
        ".map(s => s.id)",
    )
    assert shown == [
        "overview", "bars", "confusion", "plane", "ranks", "maps", "panels", "table",
    ]  # fmt: skip
    texts = script(  # marks and letters stay inside their charts
        chromium,
        "return [...document.querySelectorAll('svg text')].filter(t => {"
        " const a = t.getBoundingClientRect(), b = t.closest('section').getBoundingClientRect();"
        " return a.left < b.left || a.right > b.right; }).map(t => t.textContent)",
    )
    assert texts == []
    assert script(chromium, "return document.querySelectorAll('i, b').length") == 0
    ground = script(chromium, "return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(13, 17, 23)")


def test_choices_change_the_charts(chromium, report) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    opened(chromium, report, 1280)
    hint = "return document.querySelector('#confusion .hint').textContent"
    assert "linear, features s1+s2" in script(chromium, hint)
    Select(chromium.find_element(By.ID, "features")).select_by_value("s1")
    Select(chromium.find_element(By.ID, "protocol")).select_by_value("kNN")
    Select(chromium.find_element(By.ID, "backbone")).select_by_value("raw")
    assert "raw, kNN, features s1" in script(chromium, hint)
    cells = script(
        chromium,
        "return [...document.querySelectorAll('#confusion svg text[pointer-events]')]"
        ".map(t => Number(t.textContent))",
    )
    (row,) = [
        r for r in content(report)["rows"]
        if (r["backbone"], r["features"], r["protocol"], r["metric"])
        == ("raw", "s1", "kNN", "accuracy")
    ]  # fmt: skip
    assert cells == [n for line in row["confusion"] for n in line]


def test_pointer_and_keys_show_items(chromium, report) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(chromium, report, 1280)
    tip = chromium.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    mark = chromium.find_elements(By.CSS_SELECTOR, "#plane .mark")[-1]
    script(chromium, "document.getElementById('plane').scrollIntoView()")
    ActionChains(chromium).pause(0.2).move_to_element(mark).perform()
    assert tip.is_displayed() and re.search(r"val\d+\n", tip.text)
    assert tip.find_elements(By.TAG_NAME, "i")  # its picture
    script(chromium, "document.querySelector('#bars .chart svg').focus({preventScroll: true})")
    press(chromium, Keys.ARROW_RIGHT)
    assert tip.text.startswith("<i>pairs</i> & more\n<b>river</b>: ") and "of 8 items" in tip.text
    press(chromium, Keys.ARROW_RIGHT)
    assert tip.text.startswith("untrained\n<b>river</b>: ")
    press(chromium, Keys.ESCAPE)
    assert not tip.is_displayed()
    assert chromium.get_log("browser") == []
