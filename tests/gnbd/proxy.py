"""A TCP relay that can be stalled and cut: one network of a test."""

from __future__ import annotations

import socket
import threading
import time


class Relay:
    """Listens on (address, port; 0: any), forwards to `target`."""

    def __init__(self, address: str, port: int, target: tuple[str, int]) -> None:
        self.address, self.port, self.target = address, port, target
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._flow = threading.Event()
        self._flow.set()
        self._listener: socket.socket | None = None
        self.delay_s = 0.0
        """What a client sends is passed on so much later."""
        self.spoils = b""
        """The next time these bytes pass, in either direction, one bit of them is changed."""
        self.pumps = 0
        """How many directions of connections are alive."""
        self.heal()

    def heal(self) -> None:
        """Take connections (again)."""
        self._flow.set()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.address, self.port))
        self.port = listener.getsockname()[1]
        listener.listen(16)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def stall(self) -> None:
        """Keep what clients send until `release`."""
        self._flow.clear()

    def release(self) -> None:
        self._flow.set()

    def close_listener(self) -> None:
        """No new connections; those there are stay."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def cut(self) -> None:
        """Break everything."""
        self.close_listener()
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(self.target)
            except OSError:
                return
            with self._lock:
                self._sockets += [client, server]
                self.pumps += 2
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, stallable: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if stallable:
                    self._flow.wait()
                    time.sleep(self.delay_s)
                if self.spoils and (at := data.find(self.spoils)) >= 0:
                    self.spoils = b""
                    data = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for sock in (source, sink):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        finally:
            with self._lock:
                self.pumps -= 1
