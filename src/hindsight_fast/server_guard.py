"""The guard: a process of its own that starts a private server, and stops it when we end, however we end.

It takes its orders from a pipe that only we hold open. With us the pipe ends, ``kill -9`` included: the guard then
stops the server and removes what was temporary. Were the guard itself killed, the kernel would tell PostgreSQL to stop.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from .accounts import Account, environment
from .errors import EmbeddedServerError


def _guard_program() -> None:
    """The guard's whole program. It runs in an interpreter of its own, from this text alone.

    It answers orders, one JSON line each way, until the pipe ends. Everything is imported at once: the virtual
    environment may be deleted while it runs.
    """
    import contextlib
    import ctypes
    import json
    import os
    import shutil
    import signal
    import subprocess
    import sys

    # Handlers, not SIG_IGN: ignored signals would be inherited by PostgreSQL.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    libc = ctypes.CDLL(None)
    be_subreaper, signal_on_parents_death, remove_segment = 36, 1, 0  # linux/prctl.h, sys/ipc.h
    # What a killed postmaster leaves behind becomes our child, so that we can end it and know when it has ended.
    libc.prctl(be_subreaper, 1, 0, 0, 0)

    temporary_root, account = json.loads(sys.argv[1])
    folder = os.path.join(temporary_root, "hindsight-" + os.urandom(6).hex())
    server: Any = None

    def make_folder() -> str:
        os.mkdir(folder, 0o700)
        if account:
            os.chown(folder, account["user"], account["group"])
        return folder

    def run(command: list[str]) -> tuple[int, str]:
        out = subprocess.PIPE
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, **account)
        return ended.returncode, ended.stdout.decode(errors="replace")

    def start_server(command: list[str], log_path: str) -> int:
        nonlocal server
        # O_NOFOLLOW: we may be root, and the folder is not ours.
        log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if account:
                os.fchown(log, account["user"], account["group"])
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(signal_on_parents_death, signal.SIGINT, 0, 0, 0),
                **account,
            )
        finally:
            os.close(log)
        return int(server.pid)

    def server_status() -> int | None:
        return server.poll()  # type: ignore[no-any-return]

    def end_server(first_signal: int, patience_s: float) -> None:
        """Return when no process of the server is left."""
        for number in (first_signal, signal.SIGQUIT, signal.SIGKILL) if server else ():
            server.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(patience_s)
                break
        with contextlib.suppress(ChildProcessError):  # No child is left.
            while True:
                with open(f"/proc/self/task/{os.getpid()}/children") as children:
                    for pid in children.read().split():
                        os.kill(int(pid), signal.SIGKILL)
                os.waitpid(-1, 0)

    orders: Any = {order.__name__: order for order in (make_folder, run, start_server, server_status, end_server)}
    try:
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            try:
                answer = [orders[name](*arguments), None]
            except (OSError, subprocess.SubprocessError) as error:
                answer = [None, str(error)]
            print(json.dumps(answer), flush=True)  # noqa: T201 - the answer's way
    finally:
        end_server(signal.SIGINT, 5.0)
        # A server that was killed and not started again leaves a segment of shared memory behind, named here.
        with contextlib.suppress(OSError, IndexError, ValueError):
            with open(os.path.join(folder, "data", "postmaster.pid")) as pid_file:
                segment = int(pid_file.read().splitlines()[6].split()[1])
            libc.shmctl(segment, remove_segment, None)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)  # Not through the interpreter's end, which would complain about a pipe without a reader.


class Guard:
    """Our end of a guard process, which has made a temporary ``folder`` in *temporary_root*, owned by *account*."""

    def __init__(self, account: Account, temporary_root: Path) -> None:
        self.made_in = os.getpid()
        program = f"from __future__ import annotations\n{inspect.getsource(_guard_program)}\n_guard_program()"
        # -I -S: whatever the environment or site-packages would run at start is none of its business.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program, json.dumps([str(temporary_root), account.popen_arguments])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env=environment(),
            start_new_session=True,
        )
        _guards.add(self)
        self.pid = self._process.pid
        try:
            self.folder = Path(self.ask("make_folder"))
        except BaseException:
            self.end()
            raise

    def ask(self, order: str, *arguments: object) -> Any:
        """Give an order (a function within the program above) and return its answer.

        Raises EmbeddedServerError if it failed, or if the guard is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([order, *arguments]).encode() + b"\n")
            answer, problem = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:  # The pipe is closed, or its other end; a half answer is no JSON.
            raise EmbeddedServerError(
                f"The embedded server's guard process {self.pid} has ended, so the server ends too. Call stop(), then "
                "start() again."
                if os.getpid() == self.made_in
                else f"The embedded server belongs to process {self.made_in}: a forked child cannot steer it."
            ) from error
        if problem is not None:
            raise EmbeddedServerError(f"The embedded server's guard process {self.pid} could not do it: {problem}")
        return answer

    def end(self) -> None:
        """Let go of the guard and wait until it has stopped the server and removed its folder."""
        self._close()
        self._process.wait()

    def forget_in_child(self) -> None:
        # A forked child that kept the pipe open would keep the server alive after its owner's death.
        self._close()
        self._process.returncode = 0  # Not our child: nothing to wait for, nothing to warn about.

    def _close(self) -> None:
        for end in (self._process.stdin, self._process.stdout):
            if end is not None:
                end.close()


_guards: weakref.WeakSet[Guard] = weakref.WeakSet()


def _forget_guards_in_child() -> None:
    for guard in list(_guards):
        guard.forget_in_child()


os.register_at_fork(after_in_child=_forget_guards_in_child)
