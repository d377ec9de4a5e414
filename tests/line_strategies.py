"""What lines of an import Hypothesis may think of: right ones, nearly right ones, and what they are made of."""

from hypothesis import strategies as st

from plain_python import FIELD_NAMES, MAX_NESTING

FULL_LINE = (
    b'{"stream":"order-4711","type":"order_placed","data":{"total":12},"version":3,"id":"018f3b1e-0000-7000-8000-'
    b'0000000000aa","time":"2024-01-01T12:34:56.789012+02:00","correlation_id":"00000000-0000-4000-8000-0000000000bb",'
    b'"metadata":{"who":"\xc5\xbdofie"}}'
)


def nested(depth, inner=b"1"):
    return b'{"a":' + b"[" * (depth - 1) + inner + b"]" * (depth - 1) + b"}"


# What a scanner could take for the end of a string, an object or a line.
texts = st.text(st.sampled_from('"\\/{}[],: \t\na\u00e4\u20ac\U0001f40d'), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
blanks = st.text(st.sampled_from(" \t\r\n"), max_size=2)

ODD_VALUES = [
    *(b"null", b"true", b"0", b"-0", b"1", b"-1", b"1.0", b"1e2", b"2147483647", b"2147483648", b"1" + b"0" * 400),
    *(b"{}", b"[]", b"[{}]", b'{"a":1}', b'{"a":1e999}', b'{"a":NaN}', b'{"a":"\\ud800"}', b'{"a":"\\ud83d\\ude00"}'),
    *(
        b'""',
        b'"x"',
        b'" "',
        b'"\\u0000"',
        b'"\\ud800"',
        b'"\\udc00"',
        b'"\xc3\xa4"',
        b'"\t"',
        b'"' + b"x" * 1001 + b'"',
    ),
    *(b'"018f3b1e-0000-7000-8000-0000000000aa"', b'"018F3B1E0000700080000000000000AA"'),
    *(b'"{018f3b1e-0000-7000-8000-0000000000aa}"', b'"018f3b1e-00007000-8000-0000000000aa"'),
    *(b'"2024-02-29T23:59:59Z"', b'"2023-02-29T00:00:00Z"', b'"2016-12-31T23:59:60Z"', b'"2024-01-01T24:00:00Z"'),
    *(b'"0000-01-01T00:00:00Z"', b'"0001-01-01T00:00:00+14:00"', b'"9999-12-31T23:59:59-23:59"'),
    *(b'"2024-01-01T00:00:00.9999995Z"', b'"2024-01-01T00:00:00.12345649Z"', b'"9999-12-31T23:59:59.9999999Z"'),
    *(b'"2024-01-01 00:00:00.5-0930"', b'"2024-01-01t00:00:00z"', b'"2024-01-01T00:00:00"', b'"2024-01-01"'),
    *(nested(MAX_NESTING), nested(MAX_NESTING + 1)),
]


@st.composite
def nearly_lines(draw):
    """Lines that are right but for a value, a field too many or too few, or a few bytes."""
    members = {"stream": b'"s"', "type": b'"t"', "data": b"{}"}
    for name in draw(st.lists(st.sampled_from(FIELD_NAMES), max_size=3)):
        members[name] = draw(st.sampled_from(ODD_VALUES))
    pairs = [b'"%s":%s' % (name.encode(), value) for name, value in members.items()]
    change = draw(st.sampled_from(["none", "none", "twice", "missing", "unknown"]))
    if change == "twice":
        pairs.append(draw(st.sampled_from(pairs)))
    elif change == "missing":
        pairs.remove(draw(st.sampled_from(pairs)))
    elif change == "unknown":
        pairs.append(b'"extra":1')
    line = b"{" + b",".join(draw(st.permutations(pairs))) + b"}"
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(line)))
        line = (
            line[:at] + draw(st.sampled_from([*b'"\\{}[],: 0aZ-.'])).to_bytes() + line[at + draw(st.integers(0, 1)) :]
        )
    return line
