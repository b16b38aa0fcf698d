"""Signals that ask a training run to end: after its step, saving, or at once."""

import os
import signal
import socket
import threading
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """While entered, SIGTERM, SIGINT and SIGUSR1 ask the run to end after its step: `signal` is then the name.

    Before there is something to save, which `running` says, the request ends the process at once with status 0.
    Launchers pass a signal on that the process has got already, so what comes within a second of the first is the same
    request; a later one ends the process at once, with status 128 + its number.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.running = False

    def __enter__(self) -> "StopRequest":
        # Python runs handlers between its own instructions only, and a process may hang within one: a thread reads the
        # signals as well.
        self.inbox, self.outbox = socket.socketpair()
        self.outbox.setblocking(False)
        self.fd_before = signal.set_wakeup_fd(self.outbox.fileno(), warn_on_full_buffer=False)
        self.handlers_before = {number: signal.signal(number, self._mark) for number in STOP_SIGNALS}
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.fd_before)
        self.outbox.close()  # Ends the thread.
        self.watcher.join()
        self.inbox.close()

    def _mark(self, number: int, _) -> None:
        self.signal = self.signal or signal.Signals(number).name

    def _watch(self) -> None:
        first = None
        while received := self.inbox.recv(1):
            number = received[0]
            if number not in STOP_SIGNALS:
                continue
            name = signal.Signals(number).name
            if first is not None and time.monotonic() - first > 1:
                os._exit(128 + number)
            elif first is None and not self.running:
                os.write(2, f"\nstopped by {name} before the first step; the same command starts again\n".encode())
                os._exit(0)
            elif first is None:
                first = time.monotonic()
                os.write(2, f"\n{name}: stopping after this step; once more to stop at once\n".encode())
