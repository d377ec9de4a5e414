"""A proxy before PostgreSQL's Unix socket that cuts connections at a chosen moment."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

APPEND = b"hindsight_fast "
"""How the name of each prepared call begins; no other statement of the store's has a name."""


class CuttingProxy:
    """Hands on bytes both ways, until it is told to cut.

    ``cut_next("answer")``: the next append is handed on and carried out, but its answer goes nowhere: the client's
    connection is closed instead. ``cut_next("request")``: the client's connection is closed as soon as the next append
    has been handed on, while the server goes on with it and learns nothing. If *held*, the client's connection is not
    closed before ``let_go()``. ``cut`` is set once the append has been carried out, or handed on.
    """

    def __init__(self, conninfo: str, folder: Path) -> None:
        given = conninfo_to_dict(conninfo)
        self._server_address = f"{given['host']}/.s.PGSQL.{given['port']}"
        self.conninfo = make_conninfo(conninfo, host=str(folder))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / f".s.PGSQL.{given['port']}"))
        self._listener.listen(50)
        self._cut_next: Literal["answer", "request"] | None = None
        self.cut = threading.Event()
        self._may_close = threading.Event()
        self._kept: list[socket.socket] = []
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(20)
        for each in (*self._kept, self._listener):
            each.close()

    def cut_next(self, what: Literal["answer", "request"], *, held: bool = False) -> None:
        self.cut.clear()
        if held:
            self._may_close.clear()
        else:
            self._may_close.set()
        self._cut_next = what

    def let_go(self) -> None:
        self._may_close.set()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        self._listener.settimeout(0.05)
        while not self._stopped.is_set():
            with suppress(TimeoutError):
                client, _ = self._listener.accept()
                self._start(self._hand_on, client)

    def _hand_on(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(self._server_address)
        except OSError:  # it is down: the client sees that its connection ends
            client.close()
            server.close()
            return
        swallow_answer = False
        with selectors.DefaultSelector() as ready, client:
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while not self._stopped.is_set():
                for key, _ in ready.select(0.05):
                    source, target = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    try:
                        data = source.recv(1 << 16)
                    except ConnectionError:
                        data = b""
                    if source is server and swallow_answer:
                        self.cut.set()
                        server.close()
                        self._may_close.wait(20)
                        return
                    if not data:
                        server.close()
                        return
                    with suppress(ConnectionError):
                        target.sendall(data)
                    # Bind, the message that carries an append's parameters; its Sync comes with the same bytes.
                    if source is client and self._cut_next and data.startswith(b"B") and APPEND in data[:60]:
                        what, self._cut_next = self._cut_next, None
                        if what == "request":
                            self._kept.append(server)  # open: the server does not notice
                            self.cut.set()
                            self._may_close.wait(20)
                            return
                        swallow_answer = True
        server.close()
