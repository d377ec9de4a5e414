"""A position in the log: the compiled Cursor against its plain twin."""

import copy
import json
import pickle
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hindsight_fast._core import Cursor
from plain_python import PlainCursor

transaction_nos = st.integers(0, 2**63 - 1) | st.integers(0, 3)
sequence_nos = st.integers(0, 2**31 - 1) | st.integers(0, 3)
places = st.tuples(transaction_nos, sequence_nos)
LAST_PLACE = (2**63 - 1, 2**31 - 1)


def outcome(make, argument):
    """What *make* returns as text, or the kind of error it raises."""
    try:
        return str(make(argument))
    except (ValueError, TypeError) as error:
        return type(error)


@given(places, places)
@example((1, 0), (0, 2**31 - 1))
@example((2**63 - 1, 0), (2**31, 0))
@example((2**32, 5), (0, 5))
def test_order_and_equality_are_the_twins(left, right):
    a, b = Cursor(*left), Cursor(*right)
    plain_a, plain_b = PlainCursor(*left), PlainCursor(*right)
    assert (a < b, a <= b, a == b, a != b, a >= b, a > b) == (
        plain_a < plain_b,
        plain_a <= plain_b,
        plain_a == plain_b,
        plain_a != plain_b,
        plain_a >= plain_b,
        plain_a > plain_b,
    )


@given(places)
@example((0, 0))
@example(LAST_PLACE)
def test_hash_is_the_twins_number(place):
    assert hash(Cursor(*place)) == hash(PlainCursor(*place))


def test_a_hash_of_minus_one_is_never_returned():
    # C reserves -1 for errors. The two steps are undone to find the cursor whose mixed number is 2**64 - 1.
    mask = 2**64 - 1
    mixed = mask
    for shift in (31, 62):
        mixed ^= mask >> shift
    mixed = (mixed * pow(0xBF58476D1CE4E5B9, -1, 2**64)) & mask
    mixed = mixed ^ (mixed >> 30) ^ (mixed >> 60)
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    sequence_no = next(n for n in range(1000) if ((mixed - n) * inverse) & mask < 2**63)
    transaction_no = ((mixed - sequence_no) * inverse) & mask
    assert hash(PlainCursor(transaction_no, sequence_no)) == -2
    assert hash(Cursor(transaction_no, sequence_no)) == -2


@given(places)
def test_equal_cursors_have_equal_hashes_and_share_one_dictionary_key(place):
    assert hash(Cursor(*place)) == hash(Cursor(*place))
    assert {Cursor(*place): "found"}[Cursor(*place)] == "found"


def test_neighbours_do_not_share_buckets():
    buckets = {hash(Cursor(7, n)) & 0xFFFF for n in range(1000)}
    assert len(buckets) > 950


@given(st.lists(places))
def test_sorting_is_the_twins(many):
    in_order = [(cursor.transaction_no, cursor.sequence_no) for cursor in sorted(Cursor(*place) for place in many)]
    assert in_order == sorted(many)


@given(places)
@example((0, 0))
@example(LAST_PLACE)
def test_text_dictionary_pickle_and_copies_give_the_cursor_back(place):
    cursor, plain = Cursor(*place), PlainCursor(*place)
    assert (cursor.transaction_no, cursor.sequence_no) == place
    assert str(cursor) == str(plain)
    assert cursor.to_dict() == plain.to_dict()
    assert repr(cursor) == f"Cursor({place[0]}, {place[1]})"
    assert eval(repr(cursor), {"Cursor": Cursor}) == cursor  # noqa: S307 (its own repr)
    assert Cursor.parse(str(cursor)) == cursor
    assert Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))) == cursor
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(cursor, protocol)) == cursor
    assert copy.copy(cursor) == cursor
    assert copy.deepcopy([cursor, cursor]) == [cursor, cursor]


@given(
    st.from_regex(r"[0-9 _+\-\n٣²]{0,12}:?[0-9 _+\-\n٣²]{0,12}:?", fullmatch=True)
    | st.text(max_size=20)
    | st.builds(lambda a, b: f"{a}:{b}", st.integers(-1, 2**64), st.integers(-1, 2**32))
)
@example("812:3")
@example("0:0")
@example("")
@example(":")
@example("1:")
@example(":1")
@example("01:1")
@example("1:00")
@example("1:2:3")
@example("1:2\n")
@example("1:2\0")
@example(" 1:2")
@example("1_0:2")
@example("+1:2")
@example("-0:2")
@example("٣:2")
@example("²:2")
@example("\ud800:2")
@example(f"{2**63 - 1}:{2**31 - 1}")
@example(f"{2**63}:0")
@example(f"0:{2**31}")
@example(f"{2**64}:0")
@example("9" * 5000 + ":1")
def test_parse_reads_only_what_str_writes(text):
    assert outcome(Cursor.parse, text) == outcome(PlainCursor.parse, text)


@pytest.mark.parametrize("not_text", [None, 812, b"812:3", ("812", "3"), Cursor(1, 2)])
def test_parse_takes_only_str(not_text):
    with pytest.raises(TypeError, match="parsed from str"):
        Cursor.parse(not_text)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"transaction_no": 1},
        {"sequence_no": 1},
        {"transaction_no": 1, "sequence_no": 2, "more": 3},
        {"transaction_no": 1, 2: 3},
        {1: 2, "a": 3, None: 4},
    ],
)
def test_from_dict_wants_exactly_its_two_keys(keys):
    with pytest.raises(ValueError, match="keys"):
        Cursor.from_dict(keys)


@pytest.mark.parametrize("no_mapping", [None, 5])
def test_from_dict_wants_a_mapping(no_mapping):
    with pytest.raises(TypeError):
        Cursor.from_dict(no_mapping)


@pytest.mark.parametrize("value", [True, False, 1.0, 1.5, float("nan"), "1", b"1", None, Decimal(1), Fraction(1), [1]])
def test_the_parts_are_ints_and_nothing_like_them(value):
    with pytest.raises(TypeError, match="transaction_no must be an int"):
        Cursor(value, 0)
    with pytest.raises(TypeError, match="sequence_no must be an int"):
        Cursor(0, value)
    with pytest.raises(TypeError, match="must be an int"):
        Cursor.from_dict({"transaction_no": 0, "sequence_no": value})


@pytest.mark.parametrize(
    ("transaction_no", "sequence_no"),
    [(-1, 0), (0, -1), (2**63, 0), (0, 2**31), (2**64, 0), (0, 2**32), (-(2**63), 0), (10**400, 0), (0, 10**400)],
)
def test_parts_out_of_range_are_refused_and_never_wrap(transaction_no, sequence_no):
    with pytest.raises(ValueError, match="must lie between 0 and"):
        Cursor(transaction_no, sequence_no)
    with pytest.raises(ValueError, match="out of range"):
        PlainCursor(transaction_no, sequence_no)


def test_the_arguments_are_two_and_have_names():
    assert Cursor(sequence_no=3, transaction_no=812) == Cursor(812, 3)
    for arguments in ((), (1,), (1, 2, 3)):
        with pytest.raises(TypeError):
            Cursor(*arguments)


@pytest.mark.parametrize("other", [(1, 2), "1:2", 1, None, PlainCursor(1, 2), object()])
def test_other_types_are_not_equal_and_have_no_order(other):
    cursor = Cursor(1, 2)
    assert cursor != other
    assert not cursor == other  # noqa: SIM201 (the other operator)
    for compare in (
        lambda: cursor < other,
        lambda: cursor <= other,
        lambda: cursor > other,
        lambda: cursor >= other,
        lambda: other < cursor,
    ):
        with pytest.raises(TypeError, match="not supported"):
            compare()


def test_a_foreign_type_may_bring_its_own_comparison():
    class Always:
        def __eq__(self, other):
            return True

        def __gt__(self, other):
            return True

    assert Cursor(1, 2) == Always()
    assert Cursor(1, 2) < Always()


def test_a_cursor_cannot_be_changed():
    cursor = Cursor(1, 2)
    for name in ("transaction_no", "sequence_no", "made", "anything"):
        with pytest.raises(AttributeError):
            setattr(cursor, name, 5)
    with pytest.raises(AttributeError):
        del cursor.transaction_no
    with pytest.raises(TypeError, match="immutable"):
        cursor.__init__(3, 4)
    with pytest.raises(TypeError):
        Cursor.BEGINNING = cursor
    with pytest.raises(TypeError):
        type("Sub", (Cursor,), {})
    assert cursor == Cursor(1, 2)


def test_the_beginning_stands_before_every_event():
    assert Cursor(0, 0) == Cursor.BEGINNING
    assert Cursor(0, 1) > Cursor.BEGINNING
    assert Cursor(1, 0) > Cursor.BEGINNING


def test_a_cursor_can_be_matched():
    match Cursor(812, 3):
        case Cursor(812, sequence_no):
            assert sequence_no == 3
        case _:
            pytest.fail("did not match by position")
    match Cursor(812, 3):
        case Cursor(sequence_no=4):
            pytest.fail("matched another number")
        case Cursor(transaction_no=transaction_no, sequence_no=3):
            assert transaction_no == 812


def test_recycled_memory_holds_no_old_cursor():
    # More than the freelist keeps, so that both recycled and fresh memory is seen.
    for round_no in range(3):
        cursors = [Cursor(round_no * 10_000 + n, n) for n in range(3000)]
        assert all(c.transaction_no == round_no * 10_000 + n and c.sequence_no == n for n, c in enumerate(cursors))
        del cursors
