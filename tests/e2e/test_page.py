"""The page at ``/`` in a real browser, with a real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from cpucache.server.settings import ServerSettings
from tests.support.browser import CONTRASTS, Browser, browser
from tests.support.serving import Served, serving

TABS = ("playground", "schemas", "store", "requests")
NOTES = "The library opens at nine and closes at seven. Books are lent for four weeks, and films for one. " * 4
SCHEMA = (
    "<schema name='town'><system>You answer visitors of a town.<module name='pool'>The pool is open from six to "
    "ten, and <parameter name='warm' length='8'/> warm.</module><union><module name='summer'>In summer there is a "
    "market each day.</module><module name='winter'>In winter the market is closed.</module></union></system></schema>"
)


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(smollm2, tmp_path_factory.mktemp("served"), kv_type="f16") as running:
        yield running


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(window: Browser, served: Served) -> Iterator[Browser]:
    """The page as it is when it has been loaded. Its console has nothing to complain of, whatever a test does."""
    window.shape(1280)
    window.driver.get("about:blank")
    window.driver.get(f"{served.url}/")
    yield window
    assert window.complaints() == []


def ask(page: Browser, *, tokens: int = 12) -> None:
    """Ask what stands in the playground, and wait for what comes of it."""
    page.fill("[name=tokens]", str(tokens))
    page.click("#ask [type=submit]")
    finished(page)


def finished(page: Browser) -> None:
    page.until(lambda: page.one("#ask [type=submit]").is_enabled(), "both answers")


def counts(page: Browser, column: str) -> dict[str, int]:
    """Token counts of an answer by relation, as its column shows them."""
    told = (each.text.split() for each in page.all(f"#{column} .kinds li"))
    return {kind: int(count.replace(",", "")) for count, kind in told}


# ---- the playground --------------------------------------------------------------------------------------------------
def test_both_answers_stream_one_after_the_other(page: Browser, served: Served) -> None:
    assert "smollm2" in page.text("#model")
    page.fill("#system", NOTES)
    page.fill("#user", "When does it open?")
    ask(page)
    whole = counts(page, "uncached")["evaluated"]
    assert whole > 80
    assert counts(page, "uncached").keys() == {"evaluated"}
    page.fill("#user", "For how long can I keep a film?")
    page.fill("[name=tokens]", "40")
    page.click("#ask [type=submit]")
    seen: list[tuple[int, int]] = []
    while not page.one("#ask [type=submit]").is_enabled():
        script = "return ['cached', 'uncached'].map((id) => document.querySelector(`#${id} .text`).textContent.length)"
        seen.append(tuple(page.run(script)))
    lengths = [[each[column] for each in seen] for column in (0, 1)]
    # Each grows piece by piece, and the second begins when the first has ended.
    assert all(len(set(each)) > 4 for each in lengths)
    assert all(first == lengths[0][-1] for first, second in seen if second)
    cached, uncached = counts(page, "cached"), counts(page, "uncached")
    assert sum(cached.values()) == sum(uncached.values()) == uncached["evaluated"]
    assert cached["exact"] > 80 and cached["evaluated"] < uncached["evaluated"] / 2
    for column in ("cached", "uncached"):
        assert page.text(f"#{column} .ttft").endswith(("ms", "s"))
        assert "40 tokens" in page.text(f"#{column} article, #{column} .note")
    assert "The answers" in page.text("#verdict")
    told = served.http.get("/v1/cache").json()
    assert told["hits"] > 0 and told["ram_bytes"] > 0


def test_an_answer_is_stopped(page: Browser, served: Served) -> None:
    page.fill("[name=tokens]", "1500")
    page.one("#user").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.all("#cached .text")[0].text, "the first words")
    page.click("#stop")
    finished(page)
    assert page.text("#cached .note") == "stopped"
    assert page.text("#uncached .ttft") == "–"
    page.until(served.idle, "an idle server")


def test_what_a_request_brings_is_text_and_never_markup(page: Browser) -> None:
    page.click("[value=pml]")
    hostile = "<prompt schema='x'><img src='x' onerror='document.title=1'/></prompt>"
    page.fill("#pml", hostile)
    ask(page)
    assert "x" in page.text("#cached .text.error")
    assert page.all("main img, main script") == []
    # It could not be, were it tried: the browser refuses.
    script = "try { document.body.innerHTML = '<img>'; } catch (error) { return error.name; } return 'done'"
    assert page.run(script) == "TypeError"
    assert any("TrustedHTML" in each for each in page.complaints())
    assert not page.driver.title.startswith("1")


# ---- schemas, the store, requests ------------------------------------------------------------------------------------
def test_a_schema_is_uploaded_encoded_and_asked(page: Browser, tmp_path: Path) -> None:
    file = tmp_path / "town.xml"
    file.write_text(SCHEMA)
    page.click("#tab-schemas")
    page.fill("#schema-text", "<schema name='broken'><module>")
    page.click("#upload [type=submit]")
    assert "line 1" in page.text("#failure")
    assert all("400" in each for each in page.complaints())
    page.one("#schema-file").send_keys(str(file))
    page.until(lambda: page.one("#schema-text").get_property("value") == SCHEMA, "the file's text")
    page.click("#upload [type=submit]")
    page.until(lambda: page.text("#schema-name") == "town", "the schema")
    assert not page.all("#failure")[0].text
    rows = [each.text.split("\n")[0] for each in page.all("#tree .node")]
    assert rows == ["town", "pool", "{warm}", "one of 2", "summer", "winter"]
    # A union's members stand one level below it, to those who hear the page, too.
    assert [each.text.split("\n")[0] for each in page.all("#tree > li > ul > li > ul > li > .node")] == [
        "{warm}",
        "summer",
        "winter",
    ]
    page.click("#encode")
    page.until(lambda: len(page.all("#tree .whole")) == 4, "all modules encoded")
    assert page.one("#encoding").get_property("value") == page.one("#encoding").get_property("max")
    assert "town: encoded" in str(page.all("#said")[0].get_property("textContent"))
    page.click("#use")
    prompt = page.until(lambda: page.one("#pml").get_property("value"), "a prompt")
    assert "<pool warm=" in prompt and "<summer/>" in prompt and "winter" not in prompt
    page.fill("#user", "Is there a market?")
    ask(page)
    cached = counts(page, "cached")
    assert cached["evaluated"] < sum(cached.values()) / 2
    page.click("#tab-schemas")
    page.click("#delete")
    page.until(lambda: "None yet" in page.text("#schema-list"), "an empty list")


def test_the_store_is_shown(page: Browser, served: Served) -> None:
    ask(page)
    page.click("#tab-store")
    told = served.http.get("/v1/cache").json()
    assert told["slices"] > 0
    page.until(lambda: page.text("#asked dd") == f"{told['hits']:,}", "the hits")
    memory, disk = (each.text for each in page.all("#tiers > div"))
    assert f"{told['ram_slices']} slices" in memory
    assert f"{told['slices']} slices" in disk and " GB" in disk
    assert "evaluated" in page.text("#tokens")


def test_a_miss_is_explained(page: Browser, served: Served) -> None:
    for clock in ("It is nine o'clock.", "It is noon already."):
        page.fill("#system", f"{clock} {NOTES}")
        ask(page)
    page.click("#cached a")
    page.until(lambda: page.all("#request-list details[open] mark"), "both texts")
    # The one that was asked for is open and has the focus.
    newest, opened = served.http.get("/v1/requests").json()["data"][:2]
    assert page.text("#request-list details[open] code") == opened["id"]
    assert page.run("return document.activeElement.tagName") == "SUMMARY"
    why = served.http.get(f"/v1/requests/{opened['id']}").json()["why"]
    told = page.text("#request-list details[open] .why")
    assert all(text in told for text in (why["says"], why["advice"], why["cause"], f"{why['evaluated']:,} tokens"))
    known, sent = (each.text for each in page.all("#request-list details[open] pre"))
    assert "nine" in known and "noon" in sent
    # Asked without the cache, it says so; what fails, too, and the list goes on by itself.
    page.click("#request-list li:first-child summary")
    page.until(lambda: "cause: cache-off" in page.text("#request-list li:first-child .why"), newest["id"])
    served.http.post("/v1/chat/completions", json={"messages": []})
    page.until(lambda: "failed (400)" in page.text("#request-list li:first-child summary"), "the request that failed")
    assert len(page.all("#request-list details[open]")) == 2


# ---- for everybody ---------------------------------------------------------------------------------------------------
def test_tabs_by_keyboard(page: Browser) -> None:
    focused = "return document.activeElement.id"
    page.one("#tab-playground").send_keys(Keys.ARROW_LEFT)
    assert page.run(focused) == "tab-requests"
    for key, name in ((Keys.HOME, "playground"), (Keys.ARROW_RIGHT, "schemas"), (Keys.END, "requests")):
        page.driver.switch_to.active_element.send_keys(key)
        assert page.run(focused) == f"tab-{name}"
        page.until(page.all(f"#{name}")[0].is_displayed, name)
        assert [each.get_attribute("id") for each in page.all("[role=tab][aria-selected=true]")] == [f"tab-{name}"]
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    # One tab is in the way of the tabulator, and every field has a name.
    assert len(page.all("[role=tab][tabindex='0']")) == 1
    fields = "[...document.querySelectorAll('input, select, textarea')]"
    assert page.run(f"return {fields}.every((each) => each.labels.length || each.ariaLabel)")
    page.driver.back()
    page.until(page.all("#schemas")[0].is_displayed, "the tab before")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_every_view_is_readable(width: int, dark: bool, page: Browser, served: Served) -> None:
    served.http.post("/v1/schemas", json={"text": SCHEMA})
    page.shape(width, dark=dark)
    ask(page)
    for name in TABS:
        page.click(f"#tab-{name}")
        page.until(page.all(f"#{name}")[0].is_displayed, name)
        if name == "schemas":
            page.one("#tree .node")
        elif name == "store":
            page.one("#load dd")
        assert page.run("return document.documentElement.scrollWidth") <= width, name
        assert page.run(CONTRASTS) == [], name
    assert page.run("return matchMedia('(prefers-color-scheme: dark)').matches") == dark
    served.http.delete("/v1/schemas/town")


# ---- with keys -------------------------------------------------------------------------------------------------------
def test_a_key_is_asked_for_once(window: Browser, smollm2: Path, tmp_path: Path) -> None:
    settings = ServerSettings(api_keys=("first-key", "schlüssel"))
    with serving(smollm2, tmp_path, settings=settings, kv_type="f16") as served:
        window.shape(1280)
        window.driver.get(f"{served.url}/")
        window.fill("#key-text", "wrong")
        window.click("#key-form [type=submit]")
        window.until(lambda: "does not have this key" in window.all("#key-wrong")[0].text, "a refusal")
        window.fill("#key-text", "schlüssel")
        window.click("#key-form [type=submit]")
        window.until(lambda: window.all("#model")[0].text, "the model")
        assert window.run("return [localStorage.length, document.cookie]") == [0, ""]
        # Nothing but the server's refusals of what was asked without a key.
        assert all("401" in each for each in window.complaints())
        window.driver.refresh()
        window.until(lambda: window.all("#model")[0].text, "the model")
        ask(window)
        assert sum(counts(window, "cached").values()) > 20
        assert window.complaints() == []
        window.click("#forget")
        assert window.one("#key-text").get_property("value") == ""
        window.click("#key-cancel")
        assert "needs a key" in window.text("#failure")
        window.complaints()
