"""Pages to share: they need nothing but themselves, say what their figures show, and show what the code would."""

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import nbformat
import pytest

from mmrev_kit.config.sections import ConfigError
from mmrev_kit.notebook import share
from mmrev_kit.notebook.drawing import subplots
from mmrev_kit.notebook.render import clean, relink, render

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "outputs" / "gallery"
PAGES = sorted(GALLERY.glob("*.html"))
WIDGET = "application/vnd.jupyter.widget-view+json"
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_of_the_gallery_stands_alone(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) <= 2 * 2**20
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?!data:)', text)
    assert not re.findall(r"@import|url\((?!data:)", text)
    pictures = re.findall(r"<img [^>]*>", text)
    alts = [re.search(r' alt="([^"]+)"', picture) for picture in pictures]
    assert all(alts) and not [alt[1] for alt in alts if alt[1].startswith(("&lt;", "<"))]
    for link in re.findall(r'<a href="([^"#]*\.html)"', text):
        assert (GALLERY / link).is_file(), link
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert page.stem == "index" or text.count('<li class="level2">') >= 4
    assert not re.findall(r"/(?:tmp|root|home)/|Traceback|FutureWarning", text[text.index("</head>") :])


def test_the_gallery_is_whole_and_small_enough_to_keep():
    assert {page.stem for page in PAGES} == {"index", *share.NAMES}
    assert sum(path.stat().st_size for path in GALLERY.iterdir()) <= 6 * 2**20


def test_the_gallery_shows_what_its_notebooks_and_code_would():
    """After a change of a notebook, of tiny_cpu.yaml or of a module that draws: make share ARGS="<the pages>"."""
    assert share.stale(GALLERY) == []


def test_a_page_that_was_changed_or_whose_notebook_was_is_found(tmp_path, monkeypatch):
    page = GALLERY / "history.html"
    shutil.copy(page, tmp_path)
    assert share.stale(tmp_path) == []
    text = page.read_text(encoding="utf-8")
    (tmp_path / "history.html").write_text(text.replace("History", "history", 1), encoding="utf-8")
    assert share.stale(tmp_path) == ["history"]

    notebook = nbformat.read(ROOT / "notebooks" / "history.ipynb", as_version=4)
    before = share.source_digest(ROOT / "notebooks" / "history.ipynb")
    notebook.metadata["signature"] = "of another editor"
    nbformat.write(notebook, tmp_path / "history.ipynb")
    assert share.source_digest(tmp_path / "history.ipynb") == before
    notebook.cells[-1].source += "\nMore."
    nbformat.write(notebook, tmp_path / "history.ipynb")
    assert share.source_digest(tmp_path / "history.ipynb") != before
    sweeps = [share.source_digest(share.source_of(name), file) for name, file in share.SWEEPS.items()]
    assert len({*sweeps, share.source_digest(share.source_of("taught"))}) == len(sweeps) + 1  # each is of its own file


def widgets(state: dict | None, **beside) -> nbformat.NotebookNode:
    """As JupyterLab saves a panel of knobs with a picture: with or without the widgets' state."""
    data = {WIDGET: {"model_id": "a"}, "text/plain": "HBox(children=())", **beside}
    outputs = [nbformat.v4.new_output("display_data", data=data)]
    outputs += [nbformat.v4.new_output("stream", text=text) for text in ("10%\r50%\r", "100%\nke", "pt\n")]
    cells = [nbformat.v4.new_code_cell("x", outputs=outputs, id="x")]
    saved = {"application/vnd.jupyter.widget-state+json": {"state": state, "version_major": 2, "version_minor": 0}}
    return nbformat.v4.new_notebook(cells=cells, metadata={"widgets": saved} if state else {})


STATE = {
    "a": {"model_name": "HBoxModel", "state": {"children": ["IPY_MODEL_b", "IPY_MODEL_c"]}},
    "b": {"model_name": "IntSliderModel", "state": {"_model_name": "IntSliderModel", "value": 3}},
    "c": {"model_name": "HTMLModel", "state": {"_model_name": "HTMLModel", "value": "<b>a figure</b>"}},
}
SHOWN = {"output_type": "display_data", "data": {"image/png": DOT, "text/plain": "dots"}, "metadata": {}}
OUTPUT = {"a": {"model_name": "OutputModel", "state": {"outputs": [SHOWN]}}}


@pytest.mark.parametrize(
    ("notebook", "left"),
    [
        (widgets(STATE), "<b>a figure</b>"),
        (widgets(OUTPUT), f"data:image/png;base64,{DOT}"),
        (widgets(None, **{"text/html": "<b>beside</b>"}), "<b>beside</b>"),
    ],
)
def test_a_widget_leaves_its_picture(notebook, left, tmp_path):
    path = tmp_path / "w.ipynb"
    nbformat.write(notebook, path)
    page = render(path).read_text(encoding="utf-8")
    body = page[page.index("<body") :]
    assert left in body and "HBox(" not in body and WIDGET not in body
    assert re.search(r"100%\s*kept", body) and "50%" not in body


def test_a_panel_of_the_kits_leaves_its_picture_with_plain_nbconvert(tmp_path):
    path = tmp_path / "w.ipynb"
    nbformat.write(widgets(None, **{"text/html": "<b>beside</b>"}), path)
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--output", str(tmp_path / "plain.html"), str(path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    text = (tmp_path / "plain.html").read_text(encoding="utf-8")
    body = text[text.index("<body") :]
    assert "<b>beside</b>" in body and "HBox(" not in body and WIDGET not in body


def test_what_was_printed_in_pieces_is_one_text():
    notebook = widgets(None)
    clean(notebook)
    (output,) = notebook.cells[0].outputs
    assert output.text == "100%\nkept\n"


def test_a_figure_arrives_in_the_page_with_its_text(tmp_path):
    figure, (axis,) = subplots(1, 1.0)
    axis.plot([1, 2])
    figure.alt = 'loss "a" < 2'
    data, facts = figure._repr_mimebundle_()
    data = {"image/png": DOT, "text/plain": data["text/plain"]}
    output = nbformat.v4.new_output("display_data", data=data, metadata=json.loads(json.dumps(facts)))
    cell = nbformat.v4.new_code_cell("figure", outputs=[output], id="f")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "f.ipynb")
    (alt,) = re.findall(r"<img (.*?)src=", render(tmp_path / "f.ipynb").read_text(encoding="utf-8"))
    assert unescape(alt).strip() in ("""alt='loss "a" < 2'""", 'alt="loss "a" < 2"')


def test_notebooks_of_ones_own_are_shared_with_an_index(tmp_path, capsys):
    title = nbformat.v4.new_markdown_cell("# Mine\n\n**Question: what is it?**\n\nSee [it](mine.ipynb).", id="t")
    nbformat.write(nbformat.v4.new_notebook(cells=[title]), tmp_path / "mine.ipynb")
    assert share.share([str(tmp_path / "mine.ipynb")], str(tmp_path / "pages")) == 0
    assert "index.html" in capsys.readouterr().out
    assert '<a href="mine.html">it</a>' in (tmp_path / "pages" / "mine.html").read_text()
    assert '<a href="mine.html">Mine</a>: what is it?' in (tmp_path / "pages" / "index.html").read_text()
    with pytest.raises(ConfigError, match=r"none\.ipynb: there is no such notebook"):
        share.share(["none.ipynb"], str(tmp_path))


def test_no_page_takes_the_place_of_another(tmp_path, monkeypatch):
    texts = {"a/train": "first", "b/train": "second", "c/b/train": "third"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True)
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), tmp_path / f"{name}.ipynb"
        )
    first, second, third = (str(tmp_path / f"{name}.ipynb") for name in texts)
    monkeypatch.setattr(share, "executed", lambda name: tmp_path / "a" / "train.ipynb")
    assert share.share([second, "train", second], str(tmp_path / "pages")) == 0
    assert "second" in (tmp_path / "pages" / "b_train.html").read_text()
    assert "first" in (tmp_path / "pages" / "train.html").read_text()
    with pytest.raises(ConfigError, match=r"c/b/train\.ipynb: its page would take the place of another"):
        share.share([first, second, third], str(tmp_path / "pages"))


def test_links_of_an_executed_notebook_lead_where_they_led(tmp_path):
    text = "# A\n\n## B\n\n[it](it.ipynb), [there](../configs/a.md#x), [out](https://a.b/c.ipynb), [here](#B)"
    copy = tmp_path / "outputs" / "run" / "mine.ipynb"
    copy.parent.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="t")]), copy)
    relink(copy, tmp_path / "notebooks")
    links = re.findall(r"\]\((.*?)\)", nbformat.read(copy, as_version=4).cells[0].source)
    assert links == ["../../notebooks/it.ipynb", "../../notebooks/../configs/a.md#x", "https://a.b/c.ipynb", "#B"]
    page = render(copy, tmp_path / "mine.html", ["it"]).read_text(encoding="utf-8")
    assert '<a href="it.html">it</a>' in page and '<a href="index.html">All pages</a>' in page


def test_a_sweeps_page_says_what_the_sweep_asks():
    assert share.opening("reproduce") is None and share.opening("train") is None  # have notebooks of their own
    told = share.opening("shared_people")
    assert told.startswith("# Shared people\n\n**Question: Does it carry over") and "shared_people.yaml" in told
