"""Lists of records (CSV, JSON, JSONL), read strictly: every line becomes a record or a fault, none is guessed at."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from mmrev_kit.data.faults import DataError, Fault

SEPARATORS = ",;\t|"
JSON_ENDINGS, TABLE_ENDINGS = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv", ".tab", ".txt")
INFO_FILES = ("experiment_info.json", "pool_info.json")
Records = list[tuple[str, dict]]  # (where, record); where is file:line or the entry of a JSON list


def read_text(path: Path) -> str:
    """A file's text; a byte that is not UTF-8 becomes a surrogate (U+DC80 to U+DCFF), which `is_text` finds.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError([Fault(str(path), "there is no such file.", "Correct its name, or make the data again.")])
    return path.read_bytes().decode("utf-8-sig", errors="surrogateescape")


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return dict(pairs)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON; write null")


def _whole(digits: str) -> int:
    if len(digits) > 1000:  # Python's own limit speaks of a setting of the interpreter
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def parse_json(text: str) -> Any:
    """The value of a JSON text by RFC 8259; other than `json.loads` it lets no key come twice, and no NaN.

    Raises:
        ValueError: with the reason; a `json.JSONDecodeError`, which knows the line, where the grammar is broken.
    """
    if not is_text(text):
        raise ValueError("a byte is not UTF-8")
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_int=_whole, parse_constant=_no_number)
        whole = "\\u" not in text or is_text(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not whole:
        raise ValueError("a \\u escape is half of a pair")
    return value


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        DataError: there is no such file, or it is not JSON (see `parse_json`).
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError([_not_json(path, error, text)]) from None


def _not_json(path: Path, error: ValueError, text: str) -> Fault:
    where, reason = str(path), str(error)
    if isinstance(error, json.JSONDecodeError):
        where, reason = f"{path}:{error.lineno}", error.msg
    elif not is_text(text):
        where = f"{path}:{1 + next(n for n, line in enumerate(text.split(chr(10))) if not is_text(line))}"
    return Fault(where, f"not JSON ({reason}).", "Correct it.")


def read_info(folder: Path) -> dict:
    """What the kit noted about an experiment or a pool that it made; empty for a folder of another maker.

    Raises:
        DataError: the note is not JSON.
    """
    notes = [read_json(folder / name) for name in INFO_FILES if (folder / name).is_file()]
    return next((note for note in notes if isinstance(note, dict) and note.get("made_by") == "mmrev_kit"), {})


def read_jsonl(path: Path) -> tuple[list[tuple[int, dict]], list[Fault]]:
    """(line number, object) pairs of a JSONL file, and the faults of the lines that are none.

    Blank lines, a byte-order mark and Windows line ends are accepted. Lines end at a line feed only: U+2028 and its
    like may stand inside strings.
    """
    try:
        text = read_text(path)
    except DataError as error:
        return [], error.faults
    rows, faults = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip(" \t\r"):
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            reason, advice = f"not JSON ({getattr(error, 'msg', error)}).", "Correct the line or remove it."
            faults.append(Fault(f"{path}:{number}", reason, advice, of_row=True))
            continue
        if isinstance(value, dict):
            rows.append((number, value))
        else:
            reason = f"a {type(value).__name__}, not an object with fields."
            faults.append(Fault(f"{path}:{number}", reason, "Write one JSON object a line.", of_row=True))
    if not rows and not faults:
        faults.append(Fault(str(path), "the file has no rows.", "Make the data again."))
    return rows, faults


def read_list(path: Path) -> tuple[Records, list[Fault]]:
    """The records of a list of the user's, by lower-case column names, and the faults of what is none.

    A table (CSV) has a header line; its cells are separated by comma, semicolon, tab or bar, whichever the header has
    most of, and a cell that holds the separator is quoted. A JSON file holds a list of objects, or an object a line.
    Lines whose cells are all empty are no records.
    """
    ending = path.suffix.lower()
    if ending not in JSON_ENDINGS + TABLE_ENDINGS:
        advice = "Save the list as CSV, TSV, JSON or JSONL, under a name that ends so."
        return [], [Fault(str(path), f"a list in a {ending or 'nameless'} file is not read.", advice)]
    try:
        text = read_text(path)
        records, faults = (_read_objects if ending in JSON_ENDINGS else _read_table)(path, text)
    except DataError as error:
        return [], error.faults
    if not records and not faults:
        faults.append(Fault(str(path), "the file names nobody.", "Write one line a person."))
    return records, faults


def _read_objects(path: Path, text: str) -> tuple[Records, list[Fault]]:
    try:
        value = parse_json(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            return [], [_not_json(path, error, text)]
        lines, faults = read_jsonl(path)
        found = [(f"{path}:{number}", record) for number, record in lines]
    else:
        faults = []
        entries = value if isinstance(value, list) else [value]
        found = [(f"{path}: entry {number}", record) for number, record in enumerate(entries, start=1)]
    records = []
    for where, record in found:
        names = [name.strip().casefold() for name in record] if isinstance(record, dict) else []
        if not isinstance(record, dict):
            faults.append(Fault(where, f"a {type(record).__name__}, not an object.", "Write one object a person."))
        elif len(set(names)) < len(names):
            faults.append(Fault(where, f"a field is given twice: {', '.join(record)}.", "Keep one."))
        else:
            records.append((where, dict(zip(names, record.values(), strict=True))))
    return records, faults


def _read_table(path: Path, text: str) -> tuple[Records, list[Fault]]:
    head = text.lstrip().partition("\n")[0]
    separator = max(SEPARATORS, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    names, records, faults, cells = [], [], [], []
    while cells is not None:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason, advice = f"not CSV ({error}).", "Double each quotation mark within a quoted cell, and close it."
            faults.append(Fault(where, reason, advice))
            continue
        cells = cells and [cell.strip() for cell in cells]
        if not cells or not any(cells):
            continue
        reason = _wrong_cells(names, cells)
        if reason:
            faults.append(Fault(where, *reason))
            if not names:
                break
        elif names:
            pairs = enumerate(zip(names, cells, strict=False), start=1)
            record = {name or f"column {number}": cell for number, (name, cell) in pairs if name or cell}
            records.append((where, record))
        else:
            names = [cell.casefold() for cell in cells]
    return records, faults


def _wrong_cells(names: list[str], cells: list[str]) -> tuple[str, str] | None:
    """What is wrong with a line of a table, and what to do; the first line has no `names` yet."""
    if not all(map(is_text, cells)):
        return "a byte is not UTF-8.", "Save the file as UTF-8."
    if any("\n" in cell or "\r" in cell for cell in cells):
        return "a cell runs over several lines.", "Add the quotation mark that is missing, or write it on one line."
    if not names:
        told = [cell.casefold() for cell in cells if cell]
        twice = sorted({name for name in told if told.count(name) > 1})
        return (f"the column {', '.join(twice)} is named twice.", "Rename or remove one.") if twice else None
    if len(cells) < len(names) or any(cells[len(names) :]):
        return f"the line has {len(cells)} cells, the header {len(names)}.", "Quote a cell that holds the separator."
    return None
