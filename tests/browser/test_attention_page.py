"""The attention page in a real browser: what a person clicks, points at and types shows what the record holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lm import pictures
from lm.trace import Maps
from tests.browser.conftest import Browser

TAB, LEFT, UP, RIGHT, DOWN, ESCAPE = "\ue004", "\ue012", "\ue013", "\ue014", "\ue015", "\ue00c"
HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


def transformer() -> Maps:
    """Two layers of three heads, each of another shape: head h attends h places to the right."""
    generator = torch.Generator().manual_seed(0)

    def shifted(q: int, k: int) -> torch.Tensor:
        maps = 0.1 * torch.rand(3, q, k, generator=generator)
        for head in range(3):
            for i in range(q):
                maps[head, i, min(i + head, k - 1)] += 3
        return maps / maps.sum(-1, keepdim=True)

    return Maps(
        encoder={layer: shifted(4, 4) for layer in range(2)},
        cross={layer: shifted(3, 4) for layer in range(2)},
        source=["der", "Hund", HOSTILE, "</s>"],
        inputs=["<s>", "the", "dog"],
        outputs=["the", "dog", "</s>"],
    )


def aligned() -> Maps:
    energies = torch.tensor([[[5.1, 0.0, 0.2], [0.0, 4.08, 1.02]]])  # multiples of a byte's step
    return Maps(cross={0: energies.softmax(-1)}, energies={0: energies}, source=["a", "b", "c"], outputs=["x", "y"])


@pytest.fixture
def show(browser: Browser, tmp_path: Path):
    """show(maps, hash) opens the page; afterwards the console must be empty."""

    def open(maps: Maps, anchor: str = "", **options: object) -> None:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.html"
        file.write_text(pictures.page(maps, **options), encoding="utf-8")
        browser.open(f"{file.as_uri()}#{anchor}")

    yield open
    assert browser.log() == []


def test_it_opens_with_what_the_record_ends_with_and_asks_for_nothing(browser: Browser, show) -> None:
    show(transformer(), title=HOSTILE, source=HOSTILE, target="the dog")
    assert browser.run("return document.title") == HOSTILE == browser.text("h1")
    assert browser.run("return window.broken") is None
    assert (
        browser.run("return performance.getEntriesByType('resource').filter(e => !/^data:/.test(e.name)).length") == 0
    )
    assert browser.text("[role=tab][aria-selected=true]") == "Cross-attention"
    assert browser.count("#grid button") == 6
    assert browser.count("#drawing .word") == 3


def test_a_head_is_chosen_by_pointer_and_by_keys(browser: Browser, show) -> None:
    show(transformer(), "kind=encoder")
    browser.click('#grid button[aria-label="layer 1, head 2"]')
    assert browser.text("#caption") == "Encoder self-attention, layer 1, head 2"
    browser.press(UP, LEFT)
    assert browser.text("#caption") == "Encoder self-attention, layer 0, head 1"
    assert browser.run("return document.activeElement.getAttribute('aria-label')") == "layer 0, head 1"
    assert browser.run("return document.querySelectorAll('#grid button[tabindex=\"0\"]').length") == 1
    browser.run("document.querySelector('[role=tab][aria-selected=true]').focus()")
    browser.press(RIGHT)
    assert browser.text("#caption") == "Cross-attention, layer 0, head 1"
    assert "kind=cross" in browser.run("return location.hash")


def test_pointing_at_a_word_shows_its_row_alone(browser: Browser, show) -> None:
    show(transformer(), "kind=encoder&layer=0&head=1&view=lines")
    everything = browser.count("#drawing line")
    browser.point("#drawing .word:nth-child(2)")
    assert browser.count("#drawing line") <= 4 < everything
    assert browser.text("#readout").startswith(f"Hund attends to {HOSTILE}")
    browser.point("h1")
    assert browser.count("#drawing line") == everything


def test_words_are_reached_with_the_keyboard(browser: Browser, show) -> None:
    show(transformer(), "kind=encoder&layer=0&head=0")
    browser.run("document.querySelector('#drawing .word').focus()")
    browser.press(DOWN)
    assert browser.text("#drawing .word[aria-selected=true]") == "der"
    browser.press(DOWN)
    assert browser.text("#drawing .word[aria-selected=true]") == "Hund"
    assert browser.text("#readout").startswith("Hund attends to Hund")
    assert "word=1" in browser.run("return location.hash")
    browser.press(ESCAPE)
    assert browser.count("#drawing .word[aria-selected=true]") == 0


def test_a_cell_says_its_weight(browser: Browser, show) -> None:
    maps = aligned()
    show(maps)
    browser.point("#drawing image")  # its middle is b, between x and y
    assert browser.text("#readout") in {
        f"{word} attends to b: {maps.cross[0][0, i, 1]:.2f}" for i, word in enumerate("xy")
    }
    assert browser.run("return document.querySelector('.cross').getAttribute('visibility')") == "visible"


def test_energies_are_a_switch_where_there_are_any(browser: Browser, show) -> None:
    show(aligned(), "word=1")
    assert browser.text("#readout").startswith("y attends to b 0.")
    browser.click("input[value=energies]")
    assert browser.text("#readout") == "y has the highest energies with b 4.08, c 1.02, a 0.00"
    assert browser.text("#legend") == "Energies before the softmax: black 0.00, white 5.10."
    assert browser.run("return document.getElementById('overview').hidden") is True
    show(transformer())
    assert browser.run("return document.getElementById('values').hidden") is True


def test_several_heads_are_drawn_each_in_its_colour(browser: Browser, show) -> None:
    show(transformer(), "kind=cross&layer=1&view=lines&head=0")
    browser.click("#heads button:nth-of-type(4)")
    assert browser.text("#caption") == "Cross-attention, layer 1, heads 0, 2"
    colours = "return new Set([...document.querySelectorAll('#drawing line')].map(l => l.getAttribute('stroke'))).size"
    assert browser.run(colours) == 2
    browser.click("input[value=matrix]")
    assert browser.text("#caption") == "Cross-attention, layer 1, head 0"


def test_the_matrix_is_black_and_white_in_its_place(browser: Browser, show) -> None:
    """The pixels of the drawn image are the record's bytes."""
    show(aligned())
    pixels = browser.run("""
        const image = new Image();
        image.src = document.querySelector('#drawing image').getAttribute('href');
        const canvas = document.createElement('canvas');
        return image.decode().then(() => {
          [canvas.width, canvas.height] = [image.width, image.height];
          const context = canvas.getContext('2d');
          context.drawImage(image, 0, 0);
          return [image.width, image.height, [...context.getImageData(0, 0, image.width, image.height).data]];
        });""")
    width, height, data = pixels
    assert (width, height) == (3, 2)
    wanted = (255 * aligned().cross[0][0]).round().to(torch.int64).flatten().tolist()
    assert data[::4] == wanted
