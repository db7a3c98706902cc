"""Pages to share: those of the default experiment in outputs/gallery/, or of any executed notebooks, with an index.

A page of the gallery says by a digest what it was made of, so that a test can tell that one is stale: its notebook, the
notebook's configuration, and the modules that draw. What only trains or answers does not count, for results are the
run's; neither does what is for knobs alone.
"""

import re
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from pathlib import Path

from mmrev_kit.config.project import ASSETS, project_root, resolve
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.files import write_text
from mmrev_kit.notebook.parameters import written_parameters
from mmrev_kit.notebook.render import DEFAULT, execute, page_folder, render, to_page

NAMES = ("data", "train", "evaluate", "history", "memory", "helpers")
GALLERY = "outputs/gallery"
LIMIT = 2 * 2**20  # bytes of a page
DRAWS = (
    "plots",
    "curves",
    "tables",
    "gallery",
    "budget",
)  # modules whose content a page shows, where its notebook imports them
ALWAYS = ("drawing", "render")
STAMP = '<meta content="{}" name="mmrev-made-of"/>'  # as nbconvert writes that of the template


def source_digest(notebook: Path) -> str:
    """Hexadecimal digest of what a page of a notebook in notebooks/ is made of, beside the results of its run."""
    import nbformat

    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells]
    package, names = Path(__file__).parent, set(re.findall(r"\w+", "\n".join(cells))) & set(DRAWS)
    files = [package / f"{name}.py" for name in sorted(names | set(ALWAYS))]
    files += [package.parent / "evaluation" / "tables.py"] if "mmrev_kit.evaluation" in "".join(cells) else []
    files += [*sorted((ASSETS / "page").iterdir()), resolve(written_parameters(notebook).get("config") or DEFAULT)]
    digest = sha256("\n".join(cells).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def stamp(page: str, source: str) -> str:
    """The page with the digest of its sources and of itself."""
    blank = re.sub(re.escape(STAMP).replace(r"\{\}", "[0-9a-f]*"), STAMP.format(""), page, count=1)
    return blank.replace(STAMP.format(""), STAMP.format(sha256(f"{source}{blank}".encode()).hexdigest()), 1)


def stale(folder: Path) -> list[str]:
    """Names of the pages in a gallery that show other than their notebooks, configurations and drawing modules would,
    or were changed by hand."""
    found = []
    for page in sorted(folder.glob("*.html")):
        notebook = project_root() / "notebooks" / f"{page.stem}.ipynb"
        text = page.read_text(encoding="utf-8")
        if page.stem != "index" and (not notebook.is_file() or stamp(text, source_digest(notebook)) != text):
            found.append(page.stem)
    return found


def share(notebooks: Iterable[str] = (), folder: str | None = None) -> int:
    """Write pages and an index of them; returns an exit status.

    Args:
        notebooks: executed ones; none: those of the default experiment, executed first (what is finished is only read).
        folder: where to; None: outputs/gallery for the default experiment, outputs/shared for others.

    Raises:
        ConfigError: there is no such notebook.
    """
    given = [resolve(path) for path in notebooks]
    if missing := [str(path) for path in given if not path.is_file()]:
        raise ConfigError(f"{', '.join(missing)}: there is no such notebook. Execute it first.")
    target, pages = resolve(folder or ("outputs/shared" if given else GALLERY)), {}
    for path in given:
        pages[path.stem if path.stem not in pages else f"{path.parent.name}_{path.stem}"] = path
    for name in () if given else NAMES:
        source = project_root() / "notebooks" / f"{name}.ipynb"
        folder = page_folder(written_parameters(source))
        of_run = [("histories", str(folder.relative_to(project_root())))]
        if status := execute(name, of_run if name == "history" else []):
            return status
        pages[name] = folder / f"{name}.ipynb"
    for name, path in pages.items():
        page = render(path, target / f"{name}.html", pages)
        if not given:
            source = source_digest(project_root() / "notebooks" / f"{name}.ipynb")
            write_text(page, stamp(page.read_text(encoding="utf-8"), source))
        if (size := page.stat().st_size) > LIMIT:
            print(f"{page}: {size / 2**20:.1f} MiB, more than {LIMIT / 2**20:g}")
    write_index(target, pages)
    print(f"Open {target / 'index.html'}")
    return 0


def write_index(folder: Path, notebooks: dict[str, Path]) -> None:
    """index.html: each page with its title and the question that it answers."""
    import nbformat

    lines = []
    for name, path in notebooks.items():
        title, *rest = nbformat.read(path, as_version=4).cells[0].source.splitlines()
        question = next((line.strip("*") for line in rest if line.strip()), "")
        lines.append(f"- [{escape(title.lstrip('# '))}]({name}.ipynb): {question.removeprefix('Question: ')}")
    text = "# Pages\n\nRendered notebooks; each page stands alone.\n\n" + "\n".join(lines)
    cell = nbformat.v4.new_markdown_cell(text, id="pages")
    write_text(folder / "index.html", to_page(nbformat.v4.new_notebook(cells=[cell]), "Pages", notebooks))
