"""Lines of an import: what the core checks of them, and LineReader, against their plain twins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import plain_python
from hindsight_fast._core import EventRows, check_fields
from hindsight_fast.import_lines import BadLine, LineReader
from hindsight_fast.streams import stream_bytes
from line_strategies import FULL_LINE, blanks, nearly_lines, nested, texts, values
from locked_page import BytesBeforeLockedPage
from plain_python import FIELD_NAMES, MAX_NESTING, PlainLine

NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)


class Lifted(msgspec.Struct):
    """The two values as LineReader lifts them out: views into the line. (A union with None would decode a null.)"""

    data: msgspec.Raw = msgspec.Raw(b"{}")
    metadata: msgspec.Raw = msgspec.Raw(b"null")


lift = msgspec.json.Decoder(Lifted).decode


def outcome(check, *arguments):
    try:
        return check(*arguments)
    except ValueError:
        return ValueError


# --- check_fields ---------------------------------------------------------------------------------------------------


@st.composite
def keys(draw):
    """A field's name or another text, in JSON, each character perhaps escaped."""
    name = draw(st.sampled_from(FIELD_NAMES) | texts)
    escaped = "".join(f"\\u{ord(c):04x}" if c.isascii() and draw(st.integers(0, 9)) == 0 else c for c in name)
    return (
        f'"{escaped}"' if escaped.replace("\\u", "").isalnum() else json.dumps(name, ensure_ascii=draw(st.booleans()))
    )


@st.composite
def objects(draw):
    """Bytes of a JSON object, fields in any order, some of them twice."""
    text = draw(blanks) + "{" + draw(blanks)
    for n in range(draw(st.integers(0, 6))):
        value = json.dumps(draw(values), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
        text += "," + draw(blanks) if n else ""
        text += draw(keys()) + draw(blanks) + ":" + draw(blanks) + value + draw(blanks)
    return (text + "}" + draw(blanks)).encode()


@given(objects())
@example(FULL_LINE)
@example(b'{"stream":1,"\\u0073tream":2}')
@example(b'{"data":{"data":{"data":1}},"metadata":{"data":"\\"data\\":"}}')
@example(b'{"data":{"x":"\\\\"},"type":"\\\\\\"","type":1}')
@example(b'{"data":{},"data":{}}')
@example(b'{"metadata":{"a":[1]},"stream":"}","metadata":null,"data":{}}')
def test_repeated_fields_are_found_as_the_twin_finds_them(line):
    lifted = lift(line)
    copies = bytes(lifted.data), bytes(lifted.metadata)
    expected = outcome(plain_python.check_fields, line, *copies)
    assert outcome(check_fields, line, lifted.data, lifted.metadata) == expected
    # Without views into the line every byte of it is scanned, to the same end.
    assert outcome(check_fields, line, *copies) == expected


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_each_field_may_stand_once(name):
    once = b'{"%s": {"%s": 1}, "other": 1, "other": 2}' % (name.encode(), name.encode())
    check_fields(once, b"{}")
    again = b'{"%s": 1, "x": [{"a": "}"}, 2], "\\u%04x%s": 2}' % (name.encode(), ord(name[0]), name[1:].encode())
    with pytest.raises(ValueError, match=f"the field {name} stands twice"):
        check_fields(again, b"{}")


@pytest.mark.parametrize("which", ["data", "metadata"])
@pytest.mark.parametrize("inner", [b"1", b'"]]]]}}}}"', b'"[\\"[{"', b"[],[],{}"])
def test_nesting_has_a_bound_of_its_own(which, inner):
    deep = 1 if inner.startswith(b"[]") else 0
    good, bad = nested(MAX_NESTING - deep, inner), nested(MAX_NESTING - deep + 1, inner)
    for value in (good, good + b" ", b" " * 2000 + good, bad):
        assert plain_python.nesting(value) == MAX_NESTING + (value is bad)
    line = b'{"x": 1}'
    arguments = {"data": b"{}", "metadata": b"{}"}
    assert check_fields(line, **{**arguments, which: good})
    with pytest.raises(ValueError, match=f"{which} is nested more than 500 deep"):
        check_fields(line, **{**arguments, which: bad})


def test_many_brackets_side_by_side_are_not_deep():
    assert not check_fields(b"{}", b'{"a":[' + b"[],{}," * 10_000 + b'"' + b"[{" * 10_000 + b'"]}')


def test_data_is_an_object_and_metadata_an_object_or_null():
    for value in (b"", b"1", b'"{"', b"[{}]", b"null", b"true"):
        with pytest.raises(ValueError, match="data must be a JSON object"):
            check_fields(b"{}", value)
        if value != b"null":
            with pytest.raises(ValueError, match="metadata must be a JSON object or null"):
                check_fields(b"{}", b"{}", value)
    assert [check_fields(b"{}", b"{}", value) for value in (b"{}", b"null", None)] == [True, False, False]


noises = st.binary(max_size=60) | st.text(st.sampled_from('{}[]",:\\ adt'), max_size=30).map(str.encode)


@given(noises, st.integers(0, 60), st.integers(0, 60))
@example(b'{"', 0, 2)
@example(b'{"\\', 0, 3)
@example(b'{"stream":"', 0, 0)
@example(b'{"stream":', 10, 10)
@example(b'{"stream":1', 10, 10)
@example(b'{"stream":1,', 10, 11)
@example(b'{"\\ud800":1}', 0, 0)
@example(b'{"\\x":1}', 0, 0)
def test_what_is_no_object_comes_to_an_end(noise, data_at, metadata_at):
    data, metadata = memoryview(noise)[data_at:], memoryview(noise)[metadata_at:]  # views of whatever stands there
    for arguments in ((b"{}",), (data,), (data, metadata), (b"{}", metadata)):
        outcome(check_fields, noise, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (None, b"{}"),
        ("{}", b"{}"),
        (bytearray(b"{}"), b"{}"),
        (b"{}", None),
        (b"{}", "{}"),
        (b"{}", b"{}", "{}"),
        (b"{}", memoryview(b"{ } ")[::2]),
        (b"{}", b"{}", memoryview(b"{ } ")[::2]),
    ],
)
def test_wrong_arguments_of_check_fields_are_errors(arguments):
    with pytest.raises((TypeError, BufferError)):
        check_fields(*arguments)


def test_no_byte_behind_a_value_is_read():
    # In a process of its own, which a byte too many would kill.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], timeout=60, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def read_values_before_a_locked_page():
    before = BytesBeforeLockedPage()
    # More openings than may be nested, in a string, so that each byte is looked at.
    payload = b'{"a":"' + b"[" * 2000 + b'\\\\"}'
    for size in range(len(payload)):
        view = before.view(payload[:size])
        outcome(check_fields, b"{}", view)
        outcome(check_fields, b"{}", b"{}", view)
        view.release()
    assert not check_fields(b"{}", before.view(payload))


# --- LineReader -----------------------------------------------------------------------------------------------------


def read(line, line_no=1):
    """What LineReader makes of *line*, as the twin's dataclass; BadLine if it refuses it, with the rows untouched."""
    reader, rows = LineReader("import"), EventRows()
    rows.add(b"e" * 16, b"s" * 16, "before", 1, b"{}")
    before = rows.row(0), rows.stream_arrays(), rows.byte_count
    try:
        assert reader.add(line, line_no, [rows]) == 0
    except BadLine as error:
        assert (rows.row(0), rows.stream_arrays(), rows.byte_count, len(rows)) == (*before, 1)
        return BadLine if is_fit_to_print(str(error)) else "a reason to mend"
    heads = plain_python.encode_bigint_array([1] if rows.stream_count == 1 else [0, 0])
    rows.place(1, heads, NOW)
    stored = plain_python.decode_row(rows.row(1))
    return stored, rows.is_dated(1), reader.derived_id(line_no)


def is_fit_to_print(reason):
    return reason.isprintable() and 0 < len(reason) < 900


def expected_of(line, line_no=1):
    try:
        said = plain_python.read_line(line)
    except ValueError:
        return BadLine
    return said, LineReader("import").derived_id(line_no)


def assert_same(line):
    found, expected = read(line), expected_of(line)
    if BadLine in (found, expected):
        assert found == expected
        return
    (stored, is_dated, derived_id), (said, expected_derived_id) = found, expected
    stream = said.stream
    if plain_python.is_uuid_text(stream):
        assert str(stored.stream_id) == stream.lower()
    else:
        assert stored.stream_id.bytes == stream_bytes(stream)
    assert derived_id == expected_derived_id
    assert stored.event_id.bytes == (derived_id if said.event_id is None else said.event_id.bytes)
    assert is_dated == (said.time is not None)
    assert (
        PlainLine(
            stream,
            stored.event_name,
            stored.payload,
            stored.event_version,
            said.event_id,
            stored.created_at if is_dated else None,
            stored.correlation_id,
            stored.metadata,
        )
        == said
    )


@given(nearly_lines())
@example(FULL_LINE)
@example(b'{"\\u0073tream":"s","type":"t","data":{}}')
@example(b'{"stream":"s","type":"t","data":{},"version":true}')
def test_a_line_says_what_its_twin_says_or_is_refused(line):
    assert_same(line)


def test_every_prefix_of_a_line_is_refused():
    for size in range(len(FULL_LINE)):
        assert read(FULL_LINE[:size]) is BadLine
    assert read(FULL_LINE) is not BadLine


def test_every_byte_in_place_of_another_is_refused_or_says_what_the_twin_says():
    for at in range(len(FULL_LINE)):
        for byte in b'\0\n "\\{}[],:0a\x7f':
            line = FULL_LINE[:at] + bytes([byte]) + FULL_LINE[at + 1 :]
            if byte < 0x80 and is_utf8(line):
                assert_same(line)


def is_utf8(text):
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


@given(st.binary(max_size=120))
def test_noise_is_refused(noise):
    assert read(noise) is BadLine


def test_a_line_goes_to_one_shard_and_always_the_same():
    reader = LineReader("import")
    shards = [EventRows() for _ in range(3)]
    first = reader.add(FULL_LINE, 1, shards)
    assert reader.add(FULL_LINE, 2, shards) == first
    assert [len(rows) for rows in shards] == [2 if n == first else 0 for n in range(3)]


def test_long_stream_names_are_not_remembered():
    # 65,536 names of a megabyte each would be 64 GiB.
    reader, rows = LineReader("import"), EventRows()
    for n in range(100):
        reader.add(b'{"stream":"%s%d","type":"t","data":{}}' % (b"x" * 300, n), 1, [rows])
        reader.add(b'{"stream":"%d","type":"t","data":{}}' % n, 1, [rows])
    assert rows.stream_count == 200
    assert len(reader._streams) == 100


if __name__ == "__main__":
    read_values_before_a_locked_page()
