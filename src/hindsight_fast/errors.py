"""Every exception of the package.

    HindsightError
    ├── EventEncodeError         an event cannot be stored as it is
    ├── EventParseError          stored bytes cannot be read as the event they claim to be
    ├── SchemaError              the tables are missing, newer than this code, or in a state that forbids the call
    ├── ImportFailed             an import stopped; what precedes the reported line is stored, nothing after it
    ├── ServerNotFound           no PostgreSQL binaries for an embedded server
    └── StoreClosed              the store was used before open() or after close()

Wrong use (a negative version, a naive datetime) is a plain ``TypeError`` or ``ValueError``, raised before any I/O.
Errors carry facts as attributes and survive pickling.
"""

from __future__ import annotations
