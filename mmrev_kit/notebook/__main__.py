"""`python -m mmrev_kit.notebook`."""

from __future__ import annotations

import argparse
import sys

from mmrev_kit.notebook.render import execute


def main() -> None:
    """`python -m mmrev_kit.notebook train -p task reverse`: papermill, then HTML, both into the run folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", help="a notebook in notebooks/, without .ipynb")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters")
    given = parser.parse_args()
    sys.exit(execute(given.name, [tuple(pair) for pair in given.parameters]))


if __name__ == "__main__":
    main()
