"""The event types that a store was opened with: by name for reading, by class for appending."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import EventDefinitionError, EventParseError
from .events import EventType, NewEvent, check_name
from .payloads import reason_and_path

if TYPE_CHECKING:
    from ._core import RecordedEvent

_decode_plain = msgspec.json.Decoder().decode


class EventRegistry:
    """Raises EventDefinitionError for two types with one name, or with one latest class.

    ``dict`` and TypedDicts may be the class of many: their objects are appended as ``event_type(payload)``.
    """

    def __init__(self, event_types: Iterable[EventType[Any]]) -> None:
        self._by_name: dict[str, EventType[Any]] = {}
        self._by_class: dict[type[Any], EventType[Any]] = {}
        if isinstance(event_types, EventType):
            raise TypeError(f"event_types is a list: [{event_types!r}], not {event_types!r}")
        for event_type in event_types:
            if not isinstance(event_type, EventType):
                raise TypeError(f"event_types holds EventTypes, not {type(event_type).__name__}")
            name, payload_type = event_type.name, event_type.payload_type
            if name in self._by_name:
                raise EventDefinitionError("it is listed twice", name=name)
            if payload_type in self._by_class:
                rival = self._by_class[payload_type].name
                raise EventDefinitionError(
                    f"its latest class {payload_type.__name__} is also that of {rival!r}: which of the two would an"
                    " object of it be?",
                    name=name,
                )
            self._by_name[name] = event_type
            if event_type.payload_type_is_its_own:
                self._by_class[payload_type] = event_type

    @property
    def known_names(self) -> frozenset[str]:
        """The names of all types."""
        return frozenset(self._by_name)

    @property
    def decode_payload(self) -> Callable[[RecordedEvent], Any] | None:
        """What an event's payload is decoded by; None where all are plain JSON."""
        return self._decode if self._by_name else None

    def new_event(self, given: Any) -> NewEvent:
        """Return what *given* is to be appended as: a NewEvent itself, or an object of a registered type.

        Raises TypeError for anything else, EventEncodeError for an object that would not come back as it is.
        """
        if isinstance(given, NewEvent):
            return given
        event_type = self._by_class.get(type(given))
        if event_type is None:
            raise TypeError(self._unknown(given))
        return event_type(given)

    def names(self, event_types: Iterable[EventType[Any] | str] | None) -> list[str] | None:
        """Return the names to filter by: of types, registered or not, and names as they are. Raises TypeError."""
        if event_types is None:
            return None
        if isinstance(event_types, (str, EventType)):
            raise TypeError(f"event_types is a list: [{event_types!r}], not {event_types!r}")
        names = []
        for each in event_types:
            if not isinstance(each, (EventType, str)):
                raise TypeError(f"event_types holds EventTypes and names, not {type(each).__name__}")
            names.append(each.name if isinstance(each, EventType) else check_name(each))
        return names

    def _decode(self, event: RecordedEvent) -> Any:
        event_type = self._by_name.get(event.name)
        if event_type is not None:
            return event_type.decode_event(event)
        try:
            return _decode_plain(event.data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise EventParseError.of(event, *reason_and_path(error, event.data)) from error

    def _unknown(self, given: Any) -> str:
        kind = type(given).__name__
        if isinstance(given, dict):
            return "a dict is appended through its EventType, event_type(payload), or as NewEvent(name, payload)"
        older = next((t for t in self._by_name.values() if type(given) in t.versions), None)
        if older is not None:
            latest = older.payload_type.__name__
            return f"{kind} is an older version of {older.name!r}: append its latest, {latest}"
        return f"{kind} is the class of no event type that this store was opened with (event_types=[...])"
