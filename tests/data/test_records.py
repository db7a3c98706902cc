"""Lists are read as they are written, or their lines are refused; no record is cut, guessed at or lost."""

import pytest

from mmrev_kit.data.faults import DataError
from mmrev_kit.data.records import read_info, read_json, read_jsonl, read_list

BOTH = {"image": "1.png", "description": "the keeper, of Rome"}


def read(folder, name: str, content: str | bytes):
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    records, faults = read_list(folder / name)
    short = [(where.removeprefix(f"{folder}/"), record) for where, record in records]
    return short, [str(fault).removeprefix(f"{folder}/") for fault in faults]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", 'image,description\n1.png,"the keeper, of Rome"\n'),
        ("p.csv", '\ufeffImage , DESCRIPTION\r\n1.png, "the keeper, of Rome"\r\n'),
        ("p.csv", "image;description;\n1.png;the keeper, of Rome;\n;;\n\n"),  # as spreadsheets save it elsewhere
        ("p.TSV", "image\tdescription\n1.png\tthe keeper, of Rome\n"),
        ("p.txt", "image|description\n1.png|the keeper, of Rome\n"),
        ("p.jsonl", '{"image": "1.png", "description": "the keeper, of Rome"}\n\n'),
        ("p.json", '{"image": "1.png",\n "Description": "the keeper, of Rome"}'),
        ("p.json", '[{"image": "1.png", "description": "the keeper, of Rome"}]'),
    ],
)
def test_the_same_list_in_the_ways_that_people_write_it(tmp_path, name, content):
    records, faults = read(tmp_path, name, content)
    assert [record for _, record in records] == [BOTH] and faults == []


@pytest.mark.parametrize(
    ("content", "kept", "told"),
    [
        ("1.png,the keeper of Hall 0, in Rome\n2.png,b\n", [3], ["p.csv:2: the line has 3 cells, the header 2"]),
        ("1.png\n2.png,b\n", [3], ["p.csv:2: the line has 1 cells"]),
        ('1.png,"the keeper\n2.png,the cook\n', [], ["p.csv:2: not CSV (unexpected end of data)"]),
        ('1.png,"the keeper\n2.png,the cook"\n3.png,c\n', [4], ["p.csv:2: a cell runs over several lines"]),
        ('1.png,"the "old" keeper"\n2.png,b\n', [3], ["p.csv:2: not CSV"]),
        (b"1.png,the caf\xe9\n2.png,b\n", [3], ["p.csv:2: a byte is not UTF-8"]),
        ('\n1.png,"the keeper"\n,,,\n2.png,b,,\n', [3, 5], []),
    ],
)
def test_every_line_of_a_table_is_a_record_or_a_fault(tmp_path, content, kept, told):
    content = content if isinstance(content, bytes) else content.encode()
    records, faults = read(tmp_path, "p.csv", b"image,description\n" + content)
    assert [where for where, _ in records] == [f"p.csv:{line}" for line in kept]
    assert len(faults) == len(told) and all(map(str.startswith, faults, told))


def test_a_column_named_twice_and_columns_without_a_name(tmp_path):
    assert read(tmp_path, "p.csv", "image,description,Description\n1.png,a,b\n") == (
        [], ["p.csv:1: the column description is named twice. Rename or remove one."]
    )  # fmt: skip
    records, faults = read(tmp_path, "p.csv", ",image,description,\n0,1.png,a,\n")  # with the index of a data frame
    assert records == [("p.csv:2", {"column 1": "0", "image": "1.png", "description": "a"})] and not faults


BROKEN = {
    '{"a": "\\ud800"}': "a \\u escape is half of a pair",
    "[" * 100_000: "its brackets are nested too deeply",
    '{"a": ' + "9" * 5000 + "}": "a number of 5000 digits",
    '{"a": 1, "a": 2}': "the key 'a' is given twice",
    '{"a": NaN}': "NaN is no number of JSON; write null",
    '{"a": 1': "Expecting ',' delimiter",
}


def test_every_broken_line_of_jsonl_is_told_with_its_number(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes("\n".join(['{"a": 1}', *BROKEN, '{"a": "\\ud83d\\ude00"}']).encode() + b'\n{"a": "\xff"}\n')
    rows, faults = read_jsonl(path)
    assert rows == [(1, {"a": 1}), (8, {"a": "\U0001f600"})]  # a whole pair is a character
    told = [*(f"{path}:{n}: not JSON ({reason})." for n, reason in enumerate(BROKEN.values(), start=2))]
    told.append(f"{path}:9: not JSON (a byte is not UTF-8).")
    assert [str(fault).removesuffix(" Correct the line or remove it.") for fault in faults] == told
    assert all(fault.of_row for fault in faults)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'[{"a": 1},\n{"a" 2}]', "p.json:2: not JSON (Expecting ':' delimiter)."),
        (b'[{"a": 1},\n{"a": "\xff"}]', "p.json:2: not JSON (a byte is not UTF-8)."),
        (b'[{"a": 1, "a": 2}]', "p.json: not JSON (the key 'a' is given twice)."),
        (b'[{"a": 1}, [2]]', "p.json: entry 2: a list, not an object."),
        (b'[{"Group": "main", "group": "control"}]', "p.json: entry 1: a field is given twice"),
        (b"[]", "p.json: the file names nobody."),
    ],
)
def test_broken_json_lists(tmp_path, content, told):
    assert read(tmp_path, "p.json", content)[1][0].startswith(told)


def test_a_list_that_is_no_text_is_refused_with_the_way_out(tmp_path):
    assert "a list in a .xlsx file is not read. Save the list as CSV" in read(tmp_path, "p.xlsx", b"PK")[1][0]


def test_a_note_is_the_kits_own_or_none(tmp_path):
    assert read_info(tmp_path) == {}
    (tmp_path / "pool_info.json").write_text('{"made_by": "another", "counts": 3}')
    assert read_info(tmp_path) == {}
    (tmp_path / "pool_info.json").write_text('{"made_by": "mmrev_kit", "seed": 3}')
    assert read_info(tmp_path)["seed"] == 3
    (tmp_path / "pool_info.json").write_text('{"made_by": \n')
    with pytest.raises(DataError, match=r"pool_info.json:2: not JSON"):
        read_info(tmp_path)
    with pytest.raises(DataError, match=r"none.json: there is no such file"):
        read_json(tmp_path / "none.json")
