"""What events Hypothesis may think of."""

from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

from hypothesis import strategies as st

from plain_python import PlainEvent, PlainNewEvent

FIRST_MOMENT = datetime.min.replace(tzinfo=UTC)
LAST_MOMENT = datetime.max.replace(tzinfo=UTC)

offsets = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
# UTC by name: the core has a way of its own for it.
# An offset can carry the first and last hours out of the years that a datetime in UTC can name.
moments = st.datetimes(timezones=st.just(UTC) | offsets).filter(lambda moment: FIRST_MOMENT <= moment <= LAST_MOMENT)
names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
few_ids = st.integers(0, 4).map(lambda n: UUID(int=n << 120 | n))

new_events = st.builds(
    PlainNewEvent,
    event_id=st.uuids(),
    stream_id=few_ids | st.uuids(),
    event_name=names,
    event_version=st.integers(0, 2**31 - 1) | st.integers(0, 3),
    payload=st.binary(max_size=300),
    created_at=st.none() | moments,
    correlation_id=st.none() | st.uuids(),
    metadata=st.none() | st.binary(max_size=100),
)

events = st.builds(
    PlainEvent,
    transaction_no=st.integers(0, 2**63 - 1),
    sequence_no=st.integers(0, 2**31 - 1),
    event_id=st.uuids(),
    stream_id=st.uuids(),
    stream_version=st.integers(0, 2**63 - 1),
    created_at=moments,
    event_version=st.integers(0, 2**31 - 1),
    correlation_id=st.none() | st.uuids(),
    event_name=names,
    payload=st.binary(max_size=200),
    metadata=st.none() | st.binary(max_size=60),
)
