"""Pages to share: those of outputs/gallery/ (default experiment, shipped sweeps), or of any executed notebooks.

A page of the gallery says by a digest what it was made of, so that a test can tell that one is stale: its notebook, the
notebook's configuration, and the modules that draw. What only trains or answers does not count, for results are the
run's; neither does what is for knobs alone.
"""

import re
from hashlib import sha256
from html import escape
from pathlib import Path

from mmrev_kit.config.project import ASSETS, project_root, resolve
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.files import write_text
from mmrev_kit.notebook.parameters import written_parameters
from mmrev_kit.notebook.render import DEFAULT, execute, page_folder, render, to_page
from mmrev_kit.notebook.sweeps import read_sweep

SWEEPS = {name: f"configs/sweeps/{name}.yaml" for name in ("reproduce", "taught", "shared_people", "format_bridge")}
NAMES = ("data", "train", "evaluate", "history", "memory", "helpers", *SWEEPS)
GALLERY = "outputs/gallery"
LIMIT = 2 * 2**20  # bytes of a page
# Modules whose content a page shows, where its notebook imports them.
DRAWS = ("plots", "curves", "tables", "gallery", "budget", "sweep_results")
ALWAYS = ("drawing", "render")
STAMP = '<meta content="{}" name="mmrev-made-of"/>'  # as nbconvert writes that of the template


def source_of(name: str) -> Path:
    """The notebook of a page: of its own name, or the one for sweeps."""
    own = project_root() / "notebooks" / f"{name}.ipynb"
    return own.with_name("sweep.ipynb") if name in SWEEPS and not own.is_file() else own


def source_digest(notebook: Path, sweep: str | None = None) -> str:
    """Hexadecimal digest of what a page of a notebook in notebooks/ is made of, beside the results of its run.

    Args:
        sweep: the file of the sweep that the page shows.
    """
    import nbformat

    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells]
    package, names = Path(__file__).parent, set(re.findall(r"\w+", "\n".join(cells))) & set(DRAWS)
    files = [package / f"{name}.py" for name in sorted(names | set(ALWAYS))]
    files += [package.parent / "evaluation" / "tables.py"] if "mmrev_kit.evaluation" in "".join(cells) else []
    files += [*sorted((ASSETS / "page").iterdir()), resolve(written_parameters(notebook).get("config") or DEFAULT)]
    files += [resolve(sweep)] if sweep else []
    digest = sha256("\n".join(cells).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def stamp(page: str, source: str) -> str:
    """The page with the digest of its sources and of itself."""
    blank = re.sub(re.escape(STAMP).replace(r"\{\}", "[0-9a-f]*"), STAMP.format(""), page, count=1)
    return blank.replace(STAMP.format(""), STAMP.format(sha256(f"{source}{blank}".encode()).hexdigest()), 1)


def opening(name: str) -> str | None:
    """The first cell of the page of a sweep that has no notebook of its own: what it asks."""
    if name not in SWEEPS or source_of(name).stem == name:
        return None
    lines = [f"# {name.replace('_', ' ').capitalize()}", f"**Question: {read_sweep(SWEEPS[name]).file.question}**"]
    return "\n\n".join([*lines, f'[sweep.ipynb](sweep.ipynb) with `sweep = "{SWEEPS[name]}"`.'])


def stale(folder: Path) -> list[str]:
    """Names of the pages in a gallery that show other than their notebooks, configurations and drawing modules would,
    or were changed by hand."""
    found = []
    for page in sorted(folder.glob("*.html")):
        name, text = page.stem, page.read_text(encoding="utf-8")
        known = name in NAMES and source_of(name).is_file()
        if name != "index" and not (known and stamp(text, source_digest(source_of(name), SWEEPS.get(name))) == text):
            found.append(name)
    return found


def executed(name: str) -> Path:
    """A page's notebook, executed; of runs that are finished it only reads.

    Raises:
        SystemExit: with papermill's status, where the notebook was interrupted or failed.
    """
    source, given = source_of(name), {}
    written = written_parameters(source)
    if name in SWEEPS:
        given = {"sweep": SWEEPS[name]}
    folder = page_folder(written | given)
    if name == "history":
        given = {"histories": str(folder.relative_to(project_root()))}
    if status := execute(source.stem, list(given.items())):
        raise SystemExit(status)
    return folder / source.name


def share(given: list[str], folder: str | None) -> int:
    """Write pages and an index of them; returns an exit status.

    Args:
        given: executed notebooks, or names of the gallery's pages, whose notebooks are executed first; none: the pages
            of the default experiment. Those of sweeps are made by name only, since their runs take hours.
        folder: where to; None: outputs/gallery for its own pages, outputs/shared for others.

    Raises:
        ConfigError: there is no such notebook, or a page would take the place of another.
        SystemExit: see `executed`.
    """
    given = given or [name for name in NAMES if name not in SWEEPS]
    own = [name for name in NAMES if name in given]
    paths = dict.fromkeys(resolve(path) for path in given if path not in NAMES)
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ConfigError(f"{', '.join(missing)}: there is no such notebook. Execute it first.")
    target, pages = resolve(folder or ("outputs/shared" if paths else GALLERY)), {}
    for path in paths:
        names = path.stem, f"{path.parent.name}_{path.stem}"
        name = next((name for name in names if name not in (*pages, *own)), None)
        if name is None:
            raise ConfigError(f"{path}: its page would take the place of another. Share it into a folder of its own.")
        pages[name] = path
    pages |= {name: executed(name) for name in own}
    links = pages if paths else pages | {name: source_of(name) for name in NAMES if (target / f"{name}.html").is_file()}
    for name, path in pages.items():
        page = render(path, target / f"{name}.html", links, opening(name) if name in own else None)
        if name in own:
            digest = source_digest(source_of(name), SWEEPS.get(name))
            write_text(page, stamp(page.read_text(encoding="utf-8"), digest))
        if (size := page.stat().st_size) > LIMIT:
            print(f"{page}: {size / 2**20:.1f} MiB, more than {LIMIT / 2**20:g}")
    write_index(target, {name: links[name] for name in (*NAMES, *pages) if name in links})
    print(f"Open {target / 'index.html'}")
    return 0


def write_index(folder: Path, notebooks: dict[str, Path]) -> None:
    """index.html: each page with its title and the question that it answers."""
    import nbformat

    lines = []
    for name, path in notebooks.items():
        title, *rest = (opening(name) or nbformat.read(path, as_version=4).cells[0].source).splitlines()
        question = next((line.strip("*") for line in rest if line.strip()), "")
        lines.append(f"- [{escape(title.lstrip('# '))}]({name}.ipynb): {question.removeprefix('Question: ')}")
    text = "# Pages\n\nRendered notebooks; each page stands alone.\n\n" + "\n".join(lines)
    cell = nbformat.v4.new_markdown_cell(text, id="pages")
    write_text(folder / "index.html", to_page(nbformat.v4.new_notebook(cells=[cell]), "Pages", notebooks))
