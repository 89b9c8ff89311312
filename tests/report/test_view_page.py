"""The page, in headless Chromium: what it shows, that filters work, that data cannot act."""

from __future__ import annotations

import io
import json
import re
import time
from html import unescape

import pytest
from rich.console import Console
from view_rig import Browser, chat, needs_chromium, shown_cards, text_of, view_config

from burnish.report.view import View, ViewedExample
from burnish.report.view_html import page
from burnish.view import view

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def browser(tmp_path):
    return Browser(tmp_path)


@pytest.fixture
def html(tmp_path):
    """Two sources; a warning, a bad row, weights, an emoji of several tokens, and hostile text."""
    first = [chat("Hi", "Hello 🙂 there"), chat("Half", "Paris", weight=0.5), '{"messages": 3}']
    second = [chat(f"See {EVIL}", f"{{{{ 7*7 }}}} {EVIL}"), chat("A <|im_end|> typed", "Paris.")]
    config = view_config(tmp_path, {"first": first, EVIL.replace("/", "_")[:30]: second})
    path = tmp_path / "pages" / "view.html"
    view(config, Console(file=io.StringIO()), html=path)
    return path


def test_the_page_is_self_contained(html):
    text = html.read_text("utf-8")
    assert "default-src 'none'; script-src 'sha256-" in unescape(text)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)", text)
    assert "@import" not in text
    assert text.count("<script") == 2, "the data and the page's own script, nothing of the data's"


@needs_chromium
def test_it_shows_trained_and_control_tokens_and_split_characters(html, browser):
    first = shown_cards(browser.dom(html))[0]
    trained = re.findall(r'<span class="t">([^<]*)</span>', first)
    assert "".join(trained) == "Hello 🙂 there"
    assert re.search(r'<span class="t p">·</span>', first), "the later bytes of the emoji"
    controls = re.findall(r'<span class="c">([^<]*)</span>', first)
    assert [unescape(name) for name in controls] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert re.findall(r'<span class="t c">([^<]*)</span>', first) == ["&lt;|im_end|&gt;"]
    assert "--w: 0.5" in shown_cards(browser.dom(html))[1]


@needs_chromium
def test_data_cannot_act(html, browser):
    dom = browser.dom(html)
    assert "<title>What the model sees</title>" in dom
    assert "<img" not in dom
    shown = "".join(text_of(card) for card in shown_cards(dom))
    assert EVIL in shown
    assert "{{ 7*7 }}" in shown


@needs_chromium
def test_the_policy_stops_scripts_that_are_not_the_page_s_own(html, browser):
    """Were escaping to fail, the policy would still hold."""
    text = html.read_text("utf-8").replace("</body>", "<script>document.title = 'owned'</script></body>")
    hostile = html.with_name("hostile.html")
    hostile.write_text(text, "utf-8")
    assert "<title>What the model sees</title>" in browser.dom(hostile)


@needs_chromium
@pytest.mark.parametrize(
    ("fragment", "num_shown"),
    [("", 4), ("source=first", 2), ("warned=1", 1), ("text=half", 1), ("text=xyz", 0)],
)
def test_filters_from_the_address(html, browser, fragment, num_shown):
    dom = browser.dom(html, fragment)
    assert len(shown_cards(dom)) == num_shown
    assert f"{num_shown} of 4 examples" in dom
    assert ('class="none">' in dom) == (num_shown == 0)


@needs_chromium
def test_filters_by_hand(html, browser):
    act = """
      const box = document.getElementById("warned");
      box.click();
      document.body.dataset.hash = location.hash;
    """
    dom = browser.dom(html, after=act)
    [card] = shown_cards(dom)
    assert "typed" in text_of(card)
    assert 'data-hash="#warned=1"' in dom


@needs_chromium
def test_micro_batches_show_the_borders_of_documents(html, browser):
    dom = browser.dom(html, "order=batches")
    assert "Micro-batch 1 of 1" in dom
    borders = re.findall(r'<p class="border">([^<]*)</p>', dom.split("<template")[0])
    assert len(borders) == 3
    assert all("positions start again at 0" in border for border in borders)


@needs_chromium
def test_bad_rows_stand_on_the_page(html, browser):
    dom = browser.dom(html)
    lost = re.search(r'<article class="card lost"[^>]*>.*?</article>', dom, re.DOTALL)
    assert lost is not None
    assert "messages_not_a_list" in text_of(lost[0])
    assert "first.jsonl:3" in text_of(lost[0])


@needs_chromium
def test_the_keyboard_goes_to_a_token_and_its_id(html, browser):
    act = """
      const press = (key) => {
        const event = new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true});
        document.activeElement.dispatchEvent(event);
      };
      for (const key of ["j", "Enter", "ArrowRight", "ArrowRight"]) press(key);
      document.body.dataset.tip = document.getElementById("tip").textContent;
    """
    dom = browser.dom(html, after=act)
    tip = re.search(r'data-tip="([^"]*)"', dom)
    assert tip is not None
    data = re.search(r'id="data">(.*?)</script>', html.read_text("utf-8"), re.DOTALL)
    assert data is not None
    ids = json.loads(data[1])["examples"][0]["ids"]
    assert tip[1].startswith(f"id {ids[1]} ")
    assert "read only" in tip[1]


@needs_chromium
def test_pointing_at_a_token_shows_its_id(html, browser):
    act = """
      const token = document.querySelector("#example-1 .t");
      token.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
      document.body.dataset.tip = document.getElementById("tip").textContent;
    """
    assert "trained on, weight 0.5" in browser.dom(html, after=act)


def long_view(num_examples, num_tokens):
    weights = tuple(float(i % 40 > 10) for i in range(num_tokens))
    ids = tuple(i % 5_000 for i in range(num_tokens))
    texts = tuple(f" w{i}" for i in ids)
    examples = [ViewedExample("long", f"l:{n}", ids, texts, weights) for n in range(num_examples)]
    batches = [[n] for n in range(num_examples)]
    return View({"model": "m"}, None, frozenset(), examples, [], batches, True)


@needs_chromium
def test_many_long_examples_are_drawn_only_near_the_screen(tmp_path, browser):
    path = tmp_path / "long.html"
    path.write_text(page(long_view(200, 4_096)), "utf-8")
    act = "document.body.dataset.spans = document.querySelectorAll('.tokens > span').length"
    start = time.monotonic()
    dom = browser.dom(path, after=act)
    assert time.monotonic() - start < 60
    spans = re.search(r'data-spans="(\d+)"', dom)
    assert spans is not None
    assert 4_096 <= int(spans[1]) <= 12 * 4_096
    assert "200 of 200 examples" in dom
