"""Pictures of attention: what is drawn where, files that other programs read, and text that stays text."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lm import pictures
from lm.pictures.labels import JOIN, PART, labels
from lm.tokenizer import train_bpe, train_characters, train_words
from lm.trace import Maps

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'{{data}}{{title}}"


def alignment() -> Maps:
    """Three source tokens, two written: the first came from the third, the second from the first."""
    weights = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])
    return Maps(
        cross={0: weights},
        energies={0: torch.tensor([[[-1.0, 0.0, 9.0], [9.0, 0.0, -1.0]]])},
        source=["drei", "eins", "zwei"],
        inputs=["<s>", "two"],
        outputs=["two", "three"],
    )


def heads(layers: int = 6, count: int = 8, q: int = 5, k: int = 5) -> Maps:
    generator = torch.Generator().manual_seed(0)
    maps = {layer: torch.randn(count, q, k, generator=generator).softmax(-1) for layer in range(layers)}
    return Maps(encoder=maps, source=[f"w{i}" for i in range(q)])


def test_an_alignment_is_white_and_black_in_the_papers_orientation() -> None:
    """Source across the top, output down; white is 1 and black 0."""
    figure = pictures.matrix(alignment(), "cross", 0, 0)
    canvas = figure.canvas
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    (axes,) = figure.axes
    for i in range(2):
        for j in range(3):
            x, y = axes.transData.transform((j, i))
            shade = pixels[pixels.shape[0] - 1 - int(y), int(x), :3].tolist()
            assert shade == ([255] * 3 if (i, j) in ((0, 2), (1, 0)) else [0] * 3), (i, j)
    (left, top), (right, bottom) = axes.transData.transform([(0, 0), (2, 1)])
    assert left < right
    assert top > bottom  # in pixels from below: row 0 is above row 1
    assert [label.get_text() for label in axes.get_xticklabels()] == ["drei", "eins", "zwei"]
    assert axes.xaxis.get_ticks_position() == "top"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["two", "three"]


def test_a_written_png_holds_the_matrix(tmp_path: Path) -> None:
    pictures.save(pictures.matrix(alignment(), "cross", 0, 0), tmp_path / "a.png")
    image = (255 * imread(tmp_path / "a.png")[:, :, :3]).round().astype(int)
    black = image.sum(axis=2) == 0  # the squares; labels are black too, but thin
    rows, columns = (np.flatnonzero(black.mean(axis=axis) > 0.2) for axis in (1, 0))
    inner = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, 0]
    height, width = inner.shape
    shades = [[inner[int((i + 0.5) * height / 2), int((j + 0.5) * width / 3)] for j in range(3)] for i in range(2)]
    assert shades == [[0, 0, 255], [255, 0, 0]]


def test_energies_run_from_black_to_white(tmp_path: Path) -> None:
    figure = pictures.matrix(alignment(), "cross", 0, 0, energies=True)
    (image,) = figure.axes[0].images
    assert image.get_clim() == (-1.0, 9.0)


def test_equal_pictures_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "a.svg", "b.svg"):
        pictures.save(pictures.lines(heads(), "encoder", 4, [1, 2]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_picture_is_a_file_that_can_be_read(suffix: str, tmp_path: Path) -> None:
    maps = heads()
    figures = [
        pictures.matrix(maps, "encoder", 5, 7),
        pictures.grid(maps, "encoder"),
        pictures.grid(maps, "encoder", [2], [0, 3]),
        pictures.lines(maps, "encoder", 4),
        pictures.lines(maps, "encoder", 4, [5], word=2),
        pictures.matrix(heads(1, 1, 1, 1), "encoder", 0, 0),
        pictures.lines(heads(1, 1, 1, 1), "encoder", 0),
    ]
    for number, figure in enumerate(figures):
        file = tmp_path / f"{number}.{suffix}"
        pictures.save(figure, file)
        if suffix == "svg":
            assert ElementTree.parse(file).getroot().tag.endswith("svg")
        else:
            assert imread(file).shape[2] == 4


def test_the_grid_has_every_layer_and_head() -> None:
    figure = pictures.grid(heads(6, 8), "encoder")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(i) for i in range(6)]
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(i) for i in range(8)]
    (image,) = axes.images
    tiles = np.ma.filled(image.get_array().astype(float), np.nan)
    first = heads(6, 8).encoder[0][0]
    assert np.allclose(tiles[:5, :5], first / first.max())


def test_one_word_s_lines_are_its_row() -> None:
    weights = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.25, 0.75], [0.0, 0.0, 1.0]]])
    maps = Maps(encoder={0: weights}, source=["a", "b", "c"])
    figure = pictures.lines(maps, "encoder", 0, word=1)
    (collection,) = figure.axes[0].collections
    assert sorted(collection.get_colors()[:, 3].tolist()) == [0.25, 0.75]
    starts = {tuple(segment[0]) for segment in collection.get_segments()}
    assert len(starts) == 1
    everything = pictures.lines(maps, "encoder", 0).axes[0].collections[0]
    assert len(everything.get_segments()) == 4


def test_long_sentences_stay_within_a_page() -> None:
    maps = heads(1, 2, 300, 300)
    for figure in (
        pictures.matrix(maps, "encoder", 0, 0),
        pictures.grid(maps, "encoder"),
        pictures.lines(maps, "encoder", 0, word=7),
    ):
        assert max(figure.get_size_inches()) <= 26
    assert len(pictures.matrix(maps, "encoder", 0, 0).axes[0].get_xticklabels()) <= 300


def test_no_label_is_read_as_mathematics_or_markup(tmp_path: Path) -> None:
    tokens = ["$x^2$", "$\\frac{1$", "<b>&amp;", "漢字", "🙂"]
    maps = Maps(encoder={0: torch.eye(5).unsqueeze(0)}, source=tokens)
    for figure in (pictures.matrix(maps, "encoder", 0, 0), pictures.lines(maps, "encoder", 0)):
        pictures.save(figure, tmp_path / "a.png")
        pictures.save(figure, tmp_path / "a.svg")
        texts = [element.text for element in ElementTree.parse(tmp_path / "a.svg").iter() if element.text]
        assert {token for token in tokens if not any(token in text for text in texts)} == set()


# ---------------------------------------------------------------- the page


class Document(html.parser.HTMLParser):
    """The elements of a page, their attributes and the text inside each script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.title = self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside == "title":
            self.title += data


def test_the_page_holds_all_it_needs() -> None:
    text = pictures.page(heads(), title="Attention", source="w0 w1", target="")
    assert not re.search(r"(?:https?:)?//[a-z]|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket", text)
    document = Document(text)
    assert [tag for tag, attributes in document.tags if {"src", "href", "action"} & attributes.keys()] == []
    (policy,) = [a["content"] for t, a in document.tags if t == "meta" and a.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy


def test_the_page_s_data_is_the_record() -> None:
    maps = heads(2, 3, 4, 4)
    maps.cross, maps.energies = {0: alignment().cross[0]}, {0: alignment().energies[0]}
    maps.outputs, maps.source = ["two", "three"], ["a", "b", "c", "d"]
    data = json.loads(Document(pictures.page(maps)).scripts[0])
    encoder, cross = data["kinds"]
    assert (encoder["kind"], encoder["layers"], encoder["heads"]) == ("encoder", [0, 1], [0, 1, 2])
    weights = np.frombuffer(base64.b64decode(encoder["weights"]), dtype=np.uint8).reshape(2, 3, 4, 4)
    assert np.abs(weights / 255 - torch.stack([maps.encoder[0], maps.encoder[1]]).numpy()).max() <= 1 / 510 + 1e-6
    energies = np.frombuffer(base64.b64decode(cross["energies"]["values"]), dtype=np.uint8).reshape(2, 3)
    assert (cross["energies"]["low"], cross["energies"]["high"]) == (-1, 9)
    assert energies.tolist() == [[0, 26, 255], [255, 26, 0]]
    assert cross["queries"] == ["two", "three"]


def test_no_text_leaves_its_place() -> None:
    """Whatever the sentence, the title and the tokens hold, the page has the same elements and says them back."""
    maps = alignment()
    harmless = Document(pictures.page(maps))
    maps.source = [HOSTILE, "\u2028", "\\"]
    hostile = Document(pictures.page(maps, title=HOSTILE, source=HOSTILE, target=HOSTILE))
    assert hostile.tags == harmless.tags
    assert hostile.scripts[1] == harmless.scripts[1]
    data = json.loads(hostile.scripts[0])
    assert (data["title"], data["source"], data["target"], hostile.title) == (HOSTILE,) * 4
    assert data["kinds"][0]["keys"] == maps.source


# ---------------------------------------------------------------- labels


def test_labels_are_what_a_reader_reads() -> None:
    tokenizer = train_bpe(["the dog runs over the grass"] * 3, 290)
    ids = tokenizer.encode("the dogs\n🙂")
    shown = labels(tokenizer, [*ids, tokenizer.eos_id])
    assert shown == ["the", "dog", f"{JOIN}s", "\u21b5", PART, PART, PART, "🙂", "<|endoftext|>"]
    assert labels(tokenizer, tokenizer.encode("the  the")) == ["the", "\u2423", "the"]


def test_labels_of_words_and_characters() -> None:
    words = train_words(["ein Hund rennt"])
    assert labels(words, [words.bos_id, *words.encode("ein Hund")]) == ["<s>", "ein", "Hund"]
    characters = train_characters(["a b\x07"])
    assert labels(characters, characters.encode("a b\x07")) == ["a", "\u2423", "b", "\\x07"]
