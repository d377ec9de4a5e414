"""Event types: names, versions and upcasts. Stored events never change; the code that reads them does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, is_typeddict
from uuid import UUID

import msgspec

from .errors import EventDefinitionError, EventEncodeError, EventParseError
from .payloads import MAX_NESTING, Lossy, PayloadCodec, Unsupported, is_too_deep, reason_and_path

if TYPE_CHECKING:
    from ._core import RecordedEvent

T = TypeVar("T")

_Step = tuple[str, Callable[[Any], Any]]  # where a function stands in its EventType, and the function

MAX_VERSION: Final = 2**31 - 1
MAX_NAME_BYTES: Final = 1_000
"""What the core's encoder takes, where the reason stands."""

_plain: Final = PayloadCodec(dict)


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to append: its *payload* a dict, or JSON as bytes, which is stored byte for byte.

    *version* is that of the payload's layout. *event_id* is drawn when the event is appended, unless given;
    *created_at* (aware) is the server's time, unless given; *metadata* is a dict or None. ``data`` and
    ``metadata_json`` are what is stored of payload and metadata. *event_type* is the type that made it, so that
    ``dataclasses.replace`` encodes by it again; a pickled event leaves it behind. Raises TypeError or ValueError for
    what no event can have, EventEncodeError for a payload or metadata that would not come back as they are.
    """

    name: str
    payload: Any
    version: int = 0
    event_id: UUID | None = None
    metadata: Mapping[str, Any] | None = None
    created_at: datetime | None = None
    event_type: EventType[Any] | None = field(default=None, repr=False, compare=False, kw_only=True)
    data: bytes = field(init=False, repr=False)
    metadata_json: bytes | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_version(self.version)
        if self.event_type is not None:
            if (self.name, self.version) != (self.event_type.name, self.event_type.latest_version):
                raise ValueError(f"{self.event_type!r} makes no event {self.name!r} of version {self.version}")
            self._set("data", self.event_type.encode(self.payload))
        elif isinstance(self.payload, bytes):
            self._set("data", _checked_json(self.payload, self.name, self.version))
        elif isinstance(self.payload, dict):
            self._set("data", _encoded(_plain, self.payload, self.name, self.version))
        else:
            raise TypeError(
                f"the payload of a NewEvent is a dict or JSON as bytes, not {type(self.payload).__name__}; objects of"
                " a class are appended through their EventType"
            )
        self._finish()

    def _finish(self) -> None:
        if self.event_id is not None and not isinstance(self.event_id, UUID):
            raise TypeError(f"event_id must be a UUID or None, not {type(self.event_id).__name__}")
        if self.created_at is not None:
            if not isinstance(self.created_at, datetime):
                raise TypeError(f"created_at must be a datetime or None, not {type(self.created_at).__name__}")
            if self.created_at.utcoffset() is None:
                raise ValueError("created_at must carry a time zone")
        if self.metadata is None:
            self._set("metadata_json", None)
            return
        if not isinstance(self.metadata, Mapping):
            raise TypeError(f"metadata must be a dict or None, not {type(self.metadata).__name__}")
        try:
            self._set("metadata_json", _plain.encode(dict(self.metadata)))
        except Lossy as lossy:
            path = "metadata" + lossy.path[1:]
            raise EventEncodeError(lossy.reason, name=self.name, version=self.version, path=path) from lossy.__cause__

    def with_id(self, event_id: UUID) -> NewEvent:
        """Return the same event under this id."""
        made = object.__new__(NewEvent)
        for each in fields(self):
            made._set(each.name, getattr(self, each.name))
        made._set("event_id", event_id)
        return made

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Callable[..., NewEvent], tuple[Any, ...]]:
        # Without its EventType: functions, which upcasts are, do not travel.
        return _restored, tuple(getattr(self, name) for name in _TRAVELLING)

    @classmethod
    def _of_type(
        cls, event_type: EventType[Any], payload: Any, data: bytes, event_id: UUID | None, metadata: Any
    ) -> NewEvent:
        """Make one of what an EventType has checked and encoded."""
        made = object.__new__(cls)
        keep = object.__setattr__  # each by itself: a loop over pairs took half of the time that encoding takes
        keep(made, "event_type", event_type)
        keep(made, "name", event_type.name)
        keep(made, "payload", payload)
        keep(made, "version", event_type.latest_version)
        keep(made, "event_id", event_id)
        keep(made, "metadata", metadata)
        keep(made, "created_at", None)
        keep(made, "data", data)
        made._finish()
        return made


_TRAVELLING: Final = tuple(each.name for each in fields(NewEvent) if each.name != "event_type")


def _restored(*values: Any) -> NewEvent:
    made = object.__new__(NewEvent)
    for name, value in zip(("event_type", *_TRAVELLING), (None, *values), strict=True):
        object.__setattr__(made, name, value)
    return made


class EventType(Generic[T]):
    """An event's name, and the payload classes of all versions that were ever stored under it.

    *versions* are the classes of version 0, 1, …; the last one is what code sees. ``upcasts[i]`` makes an object of
    version i + 1 of one of version i; they are composed when the type is made. *migrations* jump from a version to the
    last one directly, also where the chain comes by that version: what version i means is said in one place, and
    ``upcasts[i]`` may then be None. Raises EventDefinitionError, which names the hole, for an upcast too few or too
    many, a class listed twice (but ``dict``), a class that JSON cannot hold: never when an event is read.
    """

    __slots__ = ("_codecs", "_decoders", "latest_version", "name", "payload_type", "versions")

    name: str
    latest_version: int
    payload_type: type[T]
    versions: tuple[type[Any], ...]

    def __init__(
        self,
        name: str,
        versions: tuple[*tuple[type[Any], ...], type[T]],
        upcasts: Sequence[Callable[[Any], Any] | None] = (),
        migrations: Mapping[int, Callable[[Any], T]] | None = None,
    ) -> None:
        try:
            check_name(name)
        except (TypeError, ValueError) as error:
            raise EventDefinitionError(str(error), name=str(name)) from None
        self.name = name
        if isinstance(versions, (str, bytes)) or not isinstance(versions, Sequence):
            raise EventDefinitionError("versions is a tuple of payload classes, the oldest first", name=name)
        if isinstance(upcasts, (str, bytes)) or not isinstance(upcasts, Sequence):
            raise EventDefinitionError("upcasts is a list of functions, that from version 0 first", name=name)
        if migrations is not None and not isinstance(migrations, Mapping):
            raise EventDefinitionError("migrations is a dict of functions by the version they begin with", name=name)
        self.versions = tuple(versions)
        if not self.versions:
            raise EventDefinitionError("it has no version: give at least one payload class", name=name)
        self.latest_version = len(self.versions) - 1
        self.payload_type = self.versions[-1]
        self._codecs = tuple(self._codec(version) for version in range(len(self.versions)))
        paths = self._paths(list(upcasts), dict(migrations or {}))
        self._decoders: tuple[Callable[[bytes], T], ...] = tuple(
            self._decoder(codec.decode, path) for codec, path in zip(self._codecs, paths, strict=True)
        )

    @property
    def payload_type_is_its_own(self) -> bool:
        """Whether an object tells by its class which event it is; a dict, or a TypedDict's, does not."""
        return _class_of_objects(self.payload_type) is not dict

    def __repr__(self) -> str:
        return f"<EventType {self.name!r}, version {self.latest_version}: {self.payload_type.__name__}>"

    def __call__(
        self, payload: T, *, event_id: UUID | None = None, metadata: Mapping[str, Any] | None = None
    ) -> NewEvent:
        """Return the event that carries *payload*, encoded.

        Raises TypeError for another class than the latest version's, EventEncodeError for a value that would not come
        back as it is.
        """
        return NewEvent._of_type(self, payload, self.encode(payload), event_id, metadata)

    def encode(self, payload: T) -> bytes:
        """Return *payload* as it is stored. Raises as calling the type does."""
        codec = self._codecs[-1]
        if not isinstance(payload, _class_of_objects(codec.payload_class)):
            raise TypeError(f"{self.name!r} takes {codec.payload_class.__name__}, not {type(payload).__name__}")
        return _encoded(codec, payload, self.name, self.latest_version)

    def decode(self, version: int, data: bytes) -> T:
        """Return the payload that *data*, stored under *version*, means today: an object of the latest class.

        Raises EventParseError for bytes that are no such payload, an upcast that fails, and a version that this type
        does not know.
        """
        if not 0 <= version <= self.latest_version:
            raise EventParseError(self._unknown_version(), name=self.name, version=version)
        try:
            return self._decoders[version](data)
        except Undecodable as error:
            raise EventParseError(error.reason, path=error.path, name=self.name, version=version) from error.__cause__

    def decode_event(self, event: RecordedEvent) -> T:
        """Return the payload of a stored event of this name. Raises EventParseError, which carries its attributes."""
        version = event.version
        if not 0 <= version <= self.latest_version:
            raise EventParseError.of(event, self._unknown_version())
        try:
            return self._decoders[version](event.data)
        except Undecodable as error:
            raise EventParseError.of(event, error.reason, error.path) from error.__cause__

    def _unknown_version(self) -> str:
        return f"this program knows versions up to {self.latest_version} only: a newer one has written it"

    def _codec(self, version: int) -> PayloadCodec:
        payload_class = self.versions[version]
        if payload_class is not dict and payload_class in self.versions[:version]:
            first = self.versions.index(payload_class)
            raise EventDefinitionError(
                f"{payload_class.__name__} stands for version {first} and for version {version}: each version has a"
                " class of its own",
                name=self.name,
            )
        try:
            return PayloadCodec(payload_class)
        except Unsupported as error:
            raise EventDefinitionError(f"version {version}: {error}", name=self.name) from error

    def _paths(
        self, upcasts: list[Callable[[Any], Any] | None], migrations: dict[int, Callable[[Any], Any]]
    ) -> list[tuple[_Step, ...]]:
        """What to call, one after the other, to bring each version to the latest."""
        latest = self.latest_version
        if len(upcasts) > latest:
            surplus = f"{len(upcasts)} upcasts for {latest + 1} versions: upcasts[{latest}] would lead beyond the last"
            raise EventDefinitionError(surplus, name=self.name)
        for version, migrate in migrations.items():
            if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version < latest:
                raise EventDefinitionError(f"migrations[{version!r}] is for no version before the last", name=self.name)
            if not callable(migrate):
                raise EventDefinitionError(f"migrations[{version}] cannot be called", name=self.name)
        paths: list[tuple[_Step, ...]] = [()]
        for version in reversed(range(latest)):
            upcast = upcasts[version] if version < len(upcasts) else None
            if upcast is not None and not callable(upcast):
                raise EventDefinitionError(f"upcasts[{version}] cannot be called", name=self.name)
            if version in migrations:
                paths.insert(0, ((f"migrations[{version}]", migrations[version]),))
            elif upcast is not None:
                paths.insert(0, ((f"upcasts[{version}]", upcast), *paths[0]))
            else:
                raise EventDefinitionError(
                    f"upcasts[{version}] is missing: nothing leads from version {version} to {version + 1}",
                    name=self.name,
                )
        return paths

    def _decoder(self, decode: Callable[[bytes], Any], path: tuple[_Step, ...]) -> Callable[[bytes], T]:
        """Compose decoding and upcasting, once for all events."""
        latest = _class_of_objects(self.payload_type)

        def decode_only(data: bytes) -> T:
            try:
                return decode(data)  # type: ignore[no-any-return]
            except Exception as error:
                raise Undecodable(*reason_and_path(error, data)) from error

        def decode_and_upcast(data: bytes) -> T:
            try:
                payload = decode(data)
            except Exception as error:
                raise Undecodable(*reason_and_path(error, data)) from error
            try:
                for place, upcast in path:  # noqa: B007 - read where one raises
                    payload = upcast(payload)
            except Exception as error:
                raise Undecodable(f"{place} raised {type(error).__name__}", None) from error
            if not isinstance(payload, latest):
                raise Undecodable(
                    f"the upcasts end with {type(payload).__name__}, not {self.payload_type.__name__}", None
                )
            return payload  # type: ignore[no-any-return]

        return decode_and_upcast if path else decode_only


class Undecodable(Exception):
    """Bytes that are no payload of their version: why, and where in the JSON."""

    def __init__(self, reason: str, path: str | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path


def check_name(name: str) -> str:
    """Return an event's *name*. Raises TypeError or ValueError for what cannot be stored as one."""
    if not isinstance(name, str):
        raise TypeError(f"an event's name must be a str, not {type(name).__name__}")
    if not name or "\0" in name:
        raise ValueError("an event's name must have at least one character, none of them NUL")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"the event name {name[:80]!r} holds half of a surrogate pair") from None
    if size > MAX_NAME_BYTES:
        raise ValueError(f"an event's name takes {MAX_NAME_BYTES:,} bytes at most, not {size:,}: {name[:80]!r}…")
    return name


def check_version(version: int) -> int:
    """Return a payload's *version*. Raises TypeError or ValueError."""
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"version must be an int, not {type(version).__name__}")
    if not 0 <= version <= MAX_VERSION:
        raise ValueError(f"version must be between 0 and {MAX_VERSION}, not {version}")
    return version


def _class_of_objects(payload_class: type[Any]) -> type[Any]:
    return dict if is_typeddict(payload_class) else payload_class  # whose objects are plain dicts


def _encoded(codec: PayloadCodec, payload: Any, name: str, version: int) -> bytes:
    try:
        return codec.encode(payload)
    except Lossy as lossy:
        raise EventEncodeError(lossy.reason, name=name, version=version, path=lossy.path) from lossy.__cause__


def _checked_json(data: bytes, name: str, version: int) -> bytes:
    try:
        _plain.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason, path = reason_and_path(error, data)
        message = f"is not the JSON of an object: {reason}"
        raise EventEncodeError(message, name=name, version=version, path=path or "$") from error
    if is_too_deep(data):
        raise EventEncodeError(f"is nested more than {MAX_NESTING} deep", name=name, version=version, path="$")
    return data
