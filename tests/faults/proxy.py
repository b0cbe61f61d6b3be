"""A TCP proxy on loopback that a test can tell to cut, hold back or slow what passes; it remembers what was inserted through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

Judge = Callable[[bytes], bool]
CHUNKS_ON_THE_WAY = 256
"""Of 64 KiB at most, each way: a delayed connection is slow to answer, not narrow."""
INSERT = b"INSERT INTO"


@dataclass
class Conversation:
    """What a client of ClickHouse's native protocol said on one connection; a message ends where the server answers."""

    said: list[bytearray] = field(default_factory=list)
    answered: bool = True

    def hear(self, data: bytes) -> None:
        if self.answered:
            self.said.append(bytearray())
            self.answered = False
        self.said[-1] += data

    @property
    def inserts(self) -> list[tuple[bytes, bytes]]:
        """(statement, rows) of each insert that was sent as a whole."""
        return [(bytes(a), bytes(b)) for a, b in zip(self.said, self.said[1:], strict=False) if INSERT in a]

    def insert_again(self, port: int) -> int:
        """All its inserts once more, as a network delivers them that has held them back; how many."""
        with socket.create_connection(("127.0.0.1", port), timeout=30) as late:
            for message in (bytes(self.said[0]), *(part for insert in self.inserts for part in insert)):
                late.sendall(message)
                assert late.recv(1 << 20), "the server hung up"
        return len(self.inserts)


class Proxy:
    """Forwards connections to `target`.

    `refuse` turns new connections away, `delay_seconds` is what everything takes each way, `cut_reply_after` drops the answer to what was forwarded.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.refuse = False
        self.delay_seconds = 0.0
        self.cut_reply_after: Judge | None = None  # asked of what the client sends; True: forward it, then cut before any reply
        self.cuts = 0
        self.conversations: list[Conversation] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut_all(self) -> None:
        """Abort every open connection."""
        self._loop.call_soon_threadsafe(self._abort)

    def hold(self) -> None:
        """The network is gone: connections stay open, nothing arrives, nobody is told. What was sent is on the way still, as with TCP's own retries."""
        self._loop.call_soon_threadsafe(self._passing.clear)

    def release(self) -> None:
        """The network is back: all that was held arrives."""
        self._loop.call_soon_threadsafe(self._passing.set)

    def forget(self) -> None:
        """A router has lost its table: nothing passes any more on the connections that are open, and nobody is told. New ones pass."""
        self._loop.call_soon_threadsafe(self._forget)

    def _forget(self) -> None:
        self._passing.clear()
        self._passing = asyncio.Event()
        self._passing.set()

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.transport.abort()
            return
        try:
            there, out = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, out}
        self.conversations.append(conversation := Conversation())
        cutting = asyncio.Event()
        pumps = [
            asyncio.create_task(self._pump(reader, out, cutting, conversation, from_client=True)),
            asyncio.create_task(self._pump(there, writer, cutting, conversation, from_client=False)),
        ]
        with contextlib.suppress(asyncio.CancelledError):  # the proxy ends
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for task in pumps:
            task.cancel()
        for end in (writer, out):
            self._writers.discard(end)
            end.close()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        cutting: asyncio.Event,
        conversation: Conversation,
        from_client: bool,
    ) -> None:
        passing = self._passing
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_ON_THE_WAY)
        reading = asyncio.create_task(self._read(reader, on_the_way))
        try:
            while True:
                due, data = await on_the_way.get()
                await asyncio.sleep(due - self._loop.time())
                await passing.wait()
                if not data:
                    return
                if from_client:
                    conversation.hear(data)
                else:
                    conversation.answered = True
                if from_client and self.cut_reply_after is not None and self.cut_reply_after(data):
                    cutting.set()
                if not from_client and cutting.is_set():
                    self.cuts += 1
                    self.cut_reply_after = None
                    return  # the server has answered; the client never hears it
                with contextlib.suppress(OSError):
                    writer.write(data)
                    await writer.drain()
        finally:
            reading.cancel()

    async def _read(self, reader: asyncio.StreamReader, on_the_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        """Ends with an empty chunk, at the end or a reset."""
        data = b"begin"
        while data:
            data = b""
            with contextlib.suppress(OSError):
                data = await reader.read(1 << 16)
            await on_the_way.put((self._loop.time() + self.delay_seconds, data))
