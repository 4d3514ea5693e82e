"""The page in a real browser: it works, it says what it shows, and it reaches for nothing."""

import json
from pathlib import Path

import pytest
from conftest import EVIL_TEXTS
from opened_pages import SIZES, Opened


def until(page, what):
    """Wait for something to be true; Playwright's own way needs what the policy forbids."""
    for _ in range(60):
        if page.evaluate(what):
            return
        page.wait_for_timeout(50)
    raise AssertionError(what)


def data_of(page):
    return json.loads(page.locator("#report-data").text_content())


def spot(page, at):
    """Where a point is drawn."""
    page.locator("#map-box").scroll_into_view_if_needed()
    box = page.locator("#map-canvas").bounding_box()
    points = data_of(page)["points"]
    x = box["x"] + box["width"] * (0.5 + (points["x"][at] / 10_000 - 0.5) * 0.94)
    y = box["y"] + box["height"] * (0.5 + (points["y"][at] / 10_000 - 0.5) * 0.94)
    return x, y


def lonely_point(page):
    """A point far from the others and from the buttons, so that it can be hit."""
    points = data_of(page)["points"]
    places = list(zip(points["x"], points["y"], strict=True))

    def room(at):
        x, y = places[at]
        gaps = (abs(x - a) + abs(y - b) for k, (a, b) in enumerate(places) if k != at)
        return min(gaps) if y > 2500 else -1

    return max(range(len(places)), key=room)


NAMES = """() => {
  const named = e => (e.getAttribute('aria-label') || e.textContent || '').trim() ||
    (e.labels && e.labels.length && e.labels[0].textContent.trim());
  const problems = [];
  const all = (what) => [...document.querySelectorAll(what)];
  for (const e of all('button, select, input, a, summary, [tabindex="0"], [role=application]'))
    if (!named(e)) problems.push('no name: ' + e.outerHTML.slice(0, 200));
  for (const e of all('img')) if (!e.alt) problems.push('no alt: ' + e.outerHTML.slice(0, 80));
  for (const e of all('[role=img]')) if (!e.getAttribute('aria-label')) problems.push('no label');
  for (const e of all('[aria-labelledby], [aria-describedby]'))
    for (const id of [e.getAttribute('aria-labelledby'), e.getAttribute('aria-describedby')])
      if (id && !document.getElementById(id)) problems.push('points nowhere: ' + id);
  for (const e of all('a[href^="#"]'))
    if (!document.querySelector(e.getAttribute('href'))) problems.push('leads nowhere: ' + e.href);
  for (const t of all('table'))
    if (!t.caption || !t.querySelector('th[scope=col]')) problems.push('table without heads');
  const levels = all('h1, h2, h3, h4').map(e => Number(e.tagName[1]));
  levels.forEach((n, at) => { if (at && n > levels[at - 1] + 1) problems.push('level skipped'); });
  for (const what of ['h1', 'main', 'header', 'footer', 'title'])
    if (all(what).length !== 1) problems.push(all(what).length + ' of ' + what);
  if (!document.documentElement.lang) problems.push('no language');
  return problems;
}"""

CONTRAST = """() => {
  const light = (c) => { const [r, g, b] = c.map(v => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const parse = (t) => t.match(/[\\d.]+/g).map(Number);
  const ground = (e) => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  const low = [];
  for (const e of document.querySelectorAll('main *, header *, footer *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    if (e.closest('svg, option, noscript, .hidden') || !e.getClientRects().length) continue;
    const a = light(parse(getComputedStyle(e).color).slice(0, 3)), b = light(ground(e).slice(0, 3));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(ratio.toFixed(2) + ' ' + e.outerHTML.slice(0, 90));
  }
  return low;
}"""


INKED = """() => { const c = document.getElementById('map-canvas');
  const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }"""

WIDE = """() => [...document.querySelectorAll('main *, header *, footer *')]
  .filter(e => !e.closest('.scroll, .hidden, details:not([open]), select'))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"""


@pytest.mark.parametrize(("size", "scheme"), [("phone", "light"), ("desk", "dark")])
@pytest.mark.parametrize("kind", ["text_report", "image_report", "pair_report", "evil_report"])
def test_opens_at_any_size_and_in_any_light(browser, request, kind, size, scheme):
    """Nothing is wider than the screen, everything has a name, and text can be read."""
    with Opened(browser, request.getfixturevalue(kind), size, scheme) as page:
        assert "points shown" in page.locator("#map-count").text_content()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, ground[4:-1].split(","))) < 90) == (scheme == "dark")
        assert page.evaluate(INKED) > 300
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate(WIDE) == []
        page.locator("#map-box").focus()
        page.keyboard.press("Home")
        assert page.evaluate(NAMES) == []
        assert page.evaluate(CONTRAST) == []


def test_pointing_and_clicking_show_a_row(browser, text_report):
    with Opened(browser, text_report) as page:
        at = lonely_point(page)
        page.mouse.move(*spot(page, at))
        panel = page.locator("#point")
        panel.get_by_text(f"Question number {at}: why?").wait_for(timeout=3000)
        points = data_of(page)["points"]
        said = panel.inner_text()
        assert ("kept" if points["kept"][at] else "left out") in said
        assert f"{points['bin'][at]} of 0 to 3" in said
        n_rows, n_kept = data_of(page)["groups"][points["group"][at]]
        assert f"number {points['place'][at]} of {n_rows} rows; the first {n_kept} are" in said
        assert f"Question number {points['near'][at]}: why?" in said
        other = page.locator("#map-canvas").bounding_box()
        page.mouse.click(*spot(page, at))
        page.mouse.move(other["x"] + 5, other["y"] + other["height"] - 5)
        assert f"Row {at}" in panel.inner_text()
        assert f"Row {at}," in page.locator("#map-live").text_content()


@pytest.mark.parametrize("size", SIZES)
def test_picture_and_words_are_shown_together(browser, pair_report, size):
    with Opened(browser, pair_report, size) as page:
        panel, table = page.locator("#point"), page.locator("#points")
        at = lonely_point(page)
        page.mouse.click(*spot(page, at))
        until(page, "document.querySelector('#point h3') !== null")
        near = data_of(page)["points"]["near"][at]
        for number, row in enumerate((at, near)):
            shown, of_point = panel.locator(".shown").nth(number), row % 12
            assert shown.locator("img").count() == (of_point not in (4, 6))
            wanted = "(no text)" if of_point == 7 else f"square {row % 3} of picture {row // 3}?"
            assert wanted in shown.inner_text()
        page.get_by_label("Search").fill("of picture 1?")
        assert page.locator("#map-count").text_content() == "3 of 96 points shown"
        lines = table.locator("tbody tr")
        assert lines.locator("img").count() == 2  # row 4 has none
        assert lines.locator("mark").all_inner_texts() == ["of picture 1?"] * 3
        assert "no picture" in lines.nth(1).inner_text()
        assert "1 of 3 pictures" in lines.nth(2).inner_text()
        lines.nth(2).get_by_role("button").click()
        image = panel.locator("img").first
        assert image.evaluate("i => i.complete && i.naturalWidth") == 32
        assert "1 of 3 pictures" in page.locator("#map-live").text_content()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#duplicates details").last.locator(".card img").count()


def test_a_finger_shows_a_row(browser, text_report):
    with Opened(browser, text_report, "phone", has_touch=True, is_mobile=True) as page:
        at = lonely_point(page)
        page.touchscreen.tap(*spot(page, at))
        page.locator("#point").get_by_text(f"Row {at},").wait_for(timeout=3000)


def test_the_map_works_by_keys(browser, text_report):
    with Opened(browser, text_report) as page:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "map-box":
                break
        assert page.evaluate("document.activeElement.id") == "map-box"
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"
        live, heard = page.locator("#map-live"), set()
        for key in ("Home", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "End", "Enter"):
            page.keyboard.press(key)
            heard.add(live.text_content())
            assert live.text_content().startswith("Row ")
        assert len(heard) >= 5
        page.keyboard.press("Home")
        assert live.text_content().startswith("Row 0, ")
        assert "Question number 0: why?" in live.text_content()
        for key in ("+", "+", "ArrowRight", "-", "0"):
            page.keyboard.press(key)


def saved(page):
    """Row numbers that the export holds."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save these row numbers").click()
    assert download.value.suggested_filename == "rows.csv"
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0] == "row,kept,bin"
    return [int(line.split(",")[0]) for line in lines[1:]]


def test_filters_and_search_choose_what_is_shown_and_saved(browser, text_report):
    with Opened(browser, text_report) as page:
        points = data_of(page)["points"]
        of_bin = {row for row in range(240) if points["bin"][row] == 2}
        kept = {row for row in range(240) if points["kept"][row]}
        count, show = page.locator("#map-count"), page.locator("#filter-kept")
        show.select_option("kept")
        assert count.text_content() == "60 of 240 points shown"
        assert saved(page) == sorted(kept)
        page.locator("#filter-bin").select_option("bin 2")
        assert saved(page) == sorted(kept & of_bin)
        show.select_option("left out")
        assert saved(page) == sorted(of_bin - kept)
        show.select_option("kept and left out")
        page.locator("#filter-label").select_option("odd")
        odd = sorted(row for row in of_bin if row % 2)
        assert saved(page) == odd
        listed = page.locator("#points th[scope=row]").all_inner_texts()
        assert list(map(int, listed)) == odd[:10]
        page.get_by_role("button", name="Show all").click()
        assert count.text_content() == "240 of 240 points shown"
        page.get_by_role("button", name="Next rows").click()
        assert page.get_by_text("page 2 of 24").count() == 1
        search = page.get_by_label("Search")
        search.fill("Number 23")
        assert saved(page) == [23, *range(230, 240)]
        page.get_by_role("button", name="Show row 235 on the map").click()
        assert page.locator("#point h3").text_content().startswith("Row 235,")
        assert page.locator("#point mark").first.text_content() == "number 23"
        search.fill("<nothing>")
        assert count.text_content() == "0 of 240 points shown"
        assert page.get_by_role("button", name="Save these row numbers").is_disabled()


def test_points_are_coloured_by_what_one_asks(browser, text_report):
    with Opened(browser, text_report) as page:
        points = data_of(page)["points"]
        lengths = sorted(points["length"])
        lengths = [f"{lengths[at]:,} characters" for at in (0, 120, 239)]
        seen = set()
        for by, entries in (
            ("bin", ["bin 0", "bin 1", "bin 2", "bin 3"]),
            ("label", ["even", "odd"]),
            ("kept or left out", []),
            ("length (characters)", lengths),
        ):
            page.get_by_label("Colour by").select_option(by)
            page.wait_for_timeout(100)
            legend = page.locator("#legend li").all_inner_texts()
            assert legend == ["kept", "left out", *entries]
            seen.add(page.locator("#map-canvas").screenshot())
        assert len(seen) == 4


def test_gallery_and_groups_open(browser, text_report, image_report):
    with Opened(browser, text_report) as page:
        assert page.locator("#gallery details").count() == 4
        assert page.locator("#gallery details[open]").count() == 1
        page.locator("#gallery summary").nth(2).click()
        opened = page.locator("#gallery details").nth(2)
        assert opened.get_by_text("Question number").first.is_visible()
        assert opened.locator(".is-kept").count() == opened.locator(".is-out").count() == 6
        assert page.locator("#duplicates details").first.get_by_text("kept").first.is_visible()
    with Opened(browser, image_report) as page:
        page.locator("#gallery summary").nth(1).click()
        image = page.locator("#gallery details").nth(1).locator("img").first
        assert image.evaluate("i => i.complete && i.naturalWidth") > 0


def test_print_opens_everything_and_shuts_it_again(browser, text_report):
    with Opened(browser, text_report, scheme="dark") as page:
        before = page.locator("details[open]").count()
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        until(page, "!document.querySelector('details:not([open])')")
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 33, 41)"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
        assert not page.locator("nav").is_visible()
        assert not page.get_by_label("Search").is_visible()
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        until(page, f"document.querySelectorAll('details[open]').length === {before}")
        assert len(page.pdf()) > 10_000


def test_pointing_works_after_a_held_point_was_filtered_away(browser, text_report):
    with Opened(browser, text_report) as page:
        points = data_of(page)["points"]
        at = lonely_point(page)
        page.mouse.click(*spot(page, at))
        page.get_by_text(f"Question number {at}: why?").first.wait_for(timeout=3000)
        others = [b for b in sorted(set(points["bin"])) if b != points["bin"][at]]
        page.locator("#filter-bin").select_option(f"bin {others[0]}")
        assert "Point at a row" in page.locator("#point").inner_text()
        page.mouse.move(*spot(page, points["bin"].index(others[0])))
        until(page, "document.querySelector('#point h3') !== null")


def test_hostile_rows_are_text_and_nothing_else(browser, evil_report):
    with Opened(browser, evil_report) as page:
        for details in page.locator("summary").all():
            if not details.evaluate("s => s.parentElement.open"):
                details.click()
        page.locator("#map-box").focus()
        page.keyboard.press("Home")
        rows = data_of(page)["points"]["row"]
        assert 7 not in rows
        for row in range(len(EVIL_TEXTS)):
            if row in rows:
                at = rows.index(row)
                page.mouse.click(*spot(page, at))
        panel = page.locator("#point")
        page.locator("#map-box").focus()
        page.keyboard.press("Home")
        assert EVIL_TEXTS[0] in panel.inner_text()
        while page.get_by_role("button", name="Next rows").is_enabled():
            page.get_by_role("button", name="Next rows").click()
        page.get_by_label("Search").fill("<script>")
        assert page.locator("#points mark").first.text_content() == "<script>"
        for option in page.locator("#colour option").all_inner_texts():
            page.get_by_label("Colour by").select_option(option)
        assert page.evaluate("window.pwned") is None
        assert page.locator("script").count() == 2
        assert page.locator("main img, main iframe, main b, main form, main link").count() == 0
        assert page.evaluate(
            """() => [...document.querySelectorAll('*')].every(
            e => [...e.attributes].every(a => !a.name.startsWith('on')))"""
        )
        assert "<script>" in page.locator("#gallery").inner_text()
        isolated = page.evaluate(
            """() => [...document.querySelectorAll('.text')].every(
            e => getComputedStyle(e).unicodeBidi.startsWith('isolate') && e.dir === 'auto')"""
        )
        assert isolated


def test_without_scripts_the_rest_is_there(browser, text_report):
    with Opened(browser, text_report, java_script_enabled=False) as page:
        assert page.locator("noscript p").is_visible()
        assert page.get_by_text("60 of 240 rows").first.is_visible()
        assert page.get_by_text("Question number").first.is_visible()
        assert not page.get_by_label("Search").is_visible()


def test_a_full_map_is_ready_within_a_second(browser, large_report):
    with Opened(browser, large_report) as page:
        took = page.evaluate(
            "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
        )
        assert page.locator("#map-count").text_content() == "4,000 of 4,000 points shown"
        assert took < 3000  # far below a second where nothing else runs
