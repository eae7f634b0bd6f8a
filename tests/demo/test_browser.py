"""The page in a browser."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")

from tests.demo.shared import PROMPT, last
from tests.support.paths import ROOT
from vlm_fix.demo import compare, examples
from vlm_fix.demo.choices import START
from vlm_fix.eval import picto

WAIT = 120_000  # milliseconds: a busy machine


FRESH = "#pane3 .card.done .state >> text=tokens/s"  # an answer made now, not one prepared


def answered(page):
    page.click("#go")
    page.wait_for_selector(FRESH, timeout=WAIT)


@pytest.mark.slow
def test_comparing_in_a_browser_shows_the_panes_and_copies_them(page, artifacts, loaded, scene):
    assert page.locator(".card.done").count() == 4 and page.locator(".card mark.hallucinated").count() >= 1
    assert page.locator("#pane0 .said").bounding_box()["y"] < 844 - 60  # an answer within a phone's screen
    answered(page)
    panes = last(compare.compare(loaded, scene, PROMPT, START))
    for i, pane in enumerate(panes):
        assert page.inner_text(f"#pane{i} .said") == pane.text.strip()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=artifacts / "compare-phone.png", full_page=True)

    page.get_by_text("vcd: settings").click()
    number = page.get_by_label("number input for alpha").first
    number.fill("2")
    number.press("Tab")
    page.wait_for_selector("#pane1 .card.idle", timeout=WAIT)  # that answer was to another setting
    assert page.locator(".card.done").count() == 3
    page.locator("#examples button.thumbnail-item").nth(1).click()
    page.wait_for_selector("#pane0 >> text=made earlier", timeout=WAIT)
    answered(page)
    assert page.inner_text("#pane1 h3") == "vcd:alpha=2.0"
    page.get_by_text("Copy what was run").click()
    page.wait_for_selector("#python >> text=vcd:alpha=2.0", timeout=WAIT)
    assert 'find("scene:1")' in page.inner_text("#python")
    assert "--method vcd:alpha=2.0,vhr,hiprune" in page.inner_text("#command")
    page.locator("#m1 input").fill("icd")
    page.locator("#m1 input").press("Enter")
    page.wait_for_selector("#pane1 .card.failed >> text=vcd and icd both contrast", timeout=WAIT)


# all that the button says, however briefly
WATCH = """() => {
  window.said = "";
  const look = () => { window.said += document.querySelector("#go").innerText + "|"; };
  new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


@pytest.mark.slow
def test_questions_are_graded_and_a_word_clicked_early_opens_later(page):
    page.locator("#asks button").nth(1).click()
    page.wait_for_selector("#pane0 .card.idle", timeout=WAIT)
    assert page.locator(".card.done").count() == 0  # answers to another prompt are gone
    answered(page)
    assert page.locator(".rate b >> text=/^(right|wrong)$/").count() == 4
    page.locator("#asks button").nth(0).click()
    page.wait_for_selector("#pane0 >> text=made earlier", timeout=WAIT)
    page.locator("#m2 input").fill("opera")  # beside vhr it takes seconds
    page.locator("#m2 input").press("Enter")
    page.wait_for_selector("#pane2 .card.idle", timeout=WAIT)
    page.evaluate(WATCH)
    page.click("#go")
    page.wait_for_selector("#pane0 .card.done:not(:has-text('made earlier'))", timeout=WAIT)  # the others are written
    page.locator("#pane0 [data-word]").nth(2).focus()
    page.keyboard.press(
        "Enter"
    )  # the keyboard reaches the words of a pane, too; a slow browser may come when all is written
    page.wait_for_selector("#answer .word[data-word='2'][aria-pressed=true]", timeout=WAIT)
    tab(page, "Compare")
    page.wait_for_function("document.querySelector('#go').innerText.trim() == 'Compare'", timeout=WAIT)
    assert not page.locator("#stop").is_visible()
    assert "Comparing" in page.evaluate("window.said")


@pytest.mark.slow
def test_two_sessions_in_a_browser(browser, site, loaded, tmp_path):
    pages = [browser.new_context().new_page() for _ in range(2)]
    for i, page in enumerate(pages):
        page.goto(site)
        page.wait_for_selector("#pane3", timeout=WAIT)
        page.locator("#examples button.thumbnail-item").nth(i + 1).click()
        page.wait_for_selector(f"#credit >> text=scene {i + 1}", timeout=WAIT)
    for page in pages:
        page.click("#go")
    for i, page in enumerate(pages):
        page.wait_for_selector(FRESH, timeout=WAIT)
        examples.scenes()[i + 1].image.save(tmp_path / "scene.png")
        panes = last(compare.compare(loaded, tmp_path / "scene.png", PROMPT, START))
        assert [page.inner_text(f"#pane{n} .said") for n in range(4)] == [pane.text.strip() for pane in panes]
        page.context.close()


@pytest.mark.slow
def test_pictures_of_the_tabs(browser, site, artifacts):
    """As on a desk, light and dark; `docs/images` has some of them."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(site)
    page.wait_for_selector("#pane3 .card.done", timeout=WAIT)
    tops = [page.locator(f"#pane{i}").bounding_box()["y"] for i in range(4)]
    assert max(tops) - min(tops) < 5, "four panes stand beside each other"
    red = page.locator(".card mark.hallucinated").first.bounding_box()
    assert red["y"] + red["height"] < 900, "a red word is on the first screen"
    take(page, artifacts / "demo.png")
    page.locator("#pane3 mark.hallucinated").first.click()
    page.wait_for_selector("#maps >> text=patches reach the last layer", timeout=WAIT)
    assert page.locator("#maps figure").count() == 4 and page.locator("#maps .scale").count() == 2
    take(page, artifacts / "demo-inside.png")
    page.get_by_label("baseline", exact=True).click()
    page.wait_for_selector("#maps >> text=Choose a method", timeout=WAIT)
    page.get_by_label("What each layer would say").click()
    page.wait_for_selector("#maps .inspect td.own", timeout=WAIT)
    take(page, artifacts / "demo-layers.png")
    tab(page, "Benchmark")
    page.get_by_text("Open earlier results").click()
    page.fill(
        "#folder textarea, #folder input", "results/picto-smol-shift"
    )  # the picture names no folder of this machine
    page.press("#folder textarea, #folder input", "Enter")
    page.wait_for_selector("#board table", timeout=WAIT)
    assert page.evaluate("document.querySelector('#board').scrollWidth <= document.querySelector('#board').clientWidth")
    take(page, artifacts / "demo-benchmark.png")
    page.close()


@pytest.mark.slow
def test_pictures_of_what_runs_with_a_stop(browser, site, artifacts):
    """Point, and Recommend at the end of a search among few."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(site)
    page.wait_for_selector("#pane3 .card.done", timeout=WAIT)
    tab(page, "Point")
    page.wait_for_selector("#point", timeout=WAIT)
    assert not page.locator("#point-stop").is_visible()
    page.click("#point")
    page.wait_for_selector("#pointed1 .card.done", timeout=WAIT)
    page.wait_for_selector("#point-stop", state="hidden", timeout=WAIT)
    take(page, artifacts / "demo-point.png")
    tab(page, "Recommend")
    page.wait_for_selector("#search", timeout=WAIT)
    page.locator("#only input").fill("vhr")
    page.locator("#only input").press("Enter")
    page.get_by_label("number input for Number of scenes").last.fill("20")
    page.get_by_label("number input for Number of scenes").last.press("Tab")
    page.get_by_label("1 minute: a look").check()
    page.click("#search")
    page.wait_for_selector("#search-verdict .verdict", timeout=2 * WAIT)
    page.wait_for_selector("#search-stop", state="hidden", timeout=WAIT)
    take(page, artifacts / "demo-recommend.png")
    page.close()


def tab(page, name):
    """Open a tab; on a phone the last ones are behind a menu."""
    shown = page.get_by_role("tab", name=name)
    if not shown.count() or not shown.first.is_visible():
        page.locator(".overflow-menu > button").first.click()
        shown = page.locator(".overflow-dropdown button", has_text=name)
    shown.first.click()


def take(page, file):
    """Two pictures of a page; dark must not show light cards, nor light dark ones."""
    shades = []
    for mode in ("dark", "light"):
        page.evaluate(f"document.body.classList.toggle('dark', {str(mode == 'dark').lower()})")
        page.wait_for_timeout(400)
        path = file if mode == "light" else file.with_stem(f"{file.stem}-dark")
        page.screenshot(path=path, full_page=True)
        shades.append(np.asarray(Image.open(path).convert("L")))
    assert np.median(shades[0]) < 80 and np.median(shades[1]) > 200


@pytest.mark.slow
def test_looking_inside_in_a_browser(page, artifacts):
    page.locator("#pane0 mark.hallucinated").first.click()
    page.wait_for_selector("#maps figure img", timeout=WAIT)
    assert (
        page.inner_text("#answer .word[aria-pressed=true]") == page.inner_text("#answer .word.hallucinated") == "ball"
    )
    assert page.locator("#maps figure").count() == 2 and not page.locator("#look-notice .notice").count()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    before = page.get_attribute("#maps figure:nth-child(2) img", "src")
    page.locator("#answer .word").nth(4).focus()  # the keyboard reaches every word
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer .word[data-word='4'][aria-pressed=true]")
    assert page.get_attribute("#maps figure:nth-child(2) img", "src") != before
    page.get_by_label("vhr", exact=True).click()
    page.wait_for_selector("#maps >> text=vhr minus baseline", timeout=WAIT)
    page.locator("#heads .thumbs button").nth(2).click()
    page.wait_for_selector("#maps >> text=/layer \\d, head \\d/")
    tops = [page.locator("#maps figure").nth(i).bounding_box()["y"] for i in range(2)]
    assert tops[0] == tops[1], "the image and where the model looked stand beside each other on a phone, too"
    page.screenshot(path=artifacts / "inside-phone.png", full_page=True)


@pytest.mark.slow
def test_a_benchmark_in_a_browser(page, artifacts, tmp_path):
    tab(page, "Benchmark")
    page.get_by_label("number input for Number of scenes").fill("200")
    page.get_by_label("number input for Number of scenes").press("Tab")
    assert page.locator("#board .steps b").count() == 4
    assert not page.locator("#halt").is_visible()
    page.click("#run")
    page.wait_for_selector("#bar >> text=/baseline: [1-9]/", timeout=WAIT)
    page.click("#halt")
    page.wait_for_selector("#bar >> text=/stopped after [1-9]/", timeout=WAIT)
    page.get_by_label("number input for Number of scenes").fill("5")
    page.get_by_label("number input for Number of scenes").press("Tab")
    page.click("#run")
    page.wait_for_selector("#bar >> text=/answers in/", timeout=WAIT)
    page.wait_for_selector("#halt", state="hidden", timeout=WAIT)
    page.locator("#figure").scroll_into_view_if_needed()  # it is loaded when it is reached
    page.wait_for_selector("#figure img", timeout=WAIT)
    assert page.locator("#board tr").count() == 5 and page.locator("#bench-verdict .verdict p").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    with page.expect_download() as download:
        page.click("#save")
    shutil.unpack_archive(download.value.path(), tmp_path / "out", "zip")
    assert (tmp_path / "out/samples.jsonl").exists()
    page.get_by_text("Open earlier results").click()
    page.locator("#upload ~ input[type=file], #open input[type=file]").first.set_input_files(
        {"name": "results.json", "mimeType": "application/json", "buffer": b"{}"}
    )
    page.wait_for_selector("#bench-notice .notice >> text=This is no results.json")
    page.fill("#folder textarea, #folder input", str(ROOT / "results/picto-smol-shift"))
    page.press("#folder textarea, #folder input", "Enter")
    page.wait_for_selector("#bench-verdict >> text=100 scenes", timeout=WAIT)
    page.screenshot(path=artifacts / "benchmark-phone.png", full_page=True)


@pytest.mark.slow
def test_models_in_a_browser(page):
    box = page.locator("#model input")
    box.fill("/nowhere/${1+1}{{name}}<b>")
    box.press("Enter")
    page.wait_for_selector("#model-notice .notice >> text=could not be loaded")
    assert "/nowhere/${1+1}{{name}}<b>" in page.inner_text("#model-notice")
    page.click("#go")
    page.wait_for_selector("#notice .notice >> text=could not be loaded")
    box.fill(str(picto.model_path("picto-llava")))
    box.press("Enter")
    page.wait_for_selector("#about >> text=7 million parameters")
    answered(page)
    assert page.locator("#notice .notice").count() == 0


@pytest.mark.slow
def test_a_bad_upload_in_a_browser(page):
    page.locator("#image button[aria-label*='Clear'], #image button[aria-label*='Remove']").first.click()
    upload = page.locator("#image input[type=file]").first
    upload.set_input_files({"name": "bad.png", "mimeType": "image/png", "buffer": b"not an image"})
    page.wait_for_selector("#notice .notice")
    assert page.inner_text("#notice") == "This file is not a readable image: give a PNG, JPEG, WEBP, BMP, GIF file."
    good = io.BytesIO()
    Image.new("RGB", (50, 40), "blue").save(good, "PNG")
    page.locator("#image button[aria-label*='Clear'], #image button[aria-label*='Remove']").first.click()
    page.locator("#image input[type=file]").first.set_input_files(
        {"name": "good.png", "mimeType": "image/png", "buffer": good.getvalue()}
    )
    page.wait_for_selector("#notice .notice", state="detached")
    answered(page)
    assert page.locator("mark.grounded").count() == 1  # the legend's alone: no truth is known
