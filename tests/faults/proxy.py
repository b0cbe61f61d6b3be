"""A TCP proxy on loopback that a test can tell to cut, hold back or slow what passes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

Judge = Callable[[bytes], bool]
CHUNKS_ON_THE_WAY = 256
"""Of 64 KiB at most, each way: a delayed connection is slow to answer, not narrow."""


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
        cutting = asyncio.Event()
        pumps = [
            asyncio.create_task(self._pump(reader, out, cutting, from_client=True)),
            asyncio.create_task(self._pump(there, writer, cutting, from_client=False)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for task in pumps:
            task.cancel()
        for end in (writer, out):
            self._writers.discard(end)
            end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cutting: asyncio.Event, from_client: bool) -> None:
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
