"""Running the service until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import signal
from socket import socket

import uvicorn

from crosslayer.server.app import Service

# After the answers were ended: for their last bytes to go out, and for uploads that never end to be cut.
_LAST_SECONDS = 3


def run(service: Service, listener: socket, drain: int, greeting: str) -> None:
    """Serve on `listener` until SIGTERM, which lets nobody new in. Answers then have `drain` seconds to end, and what
    is left ends with an error. SIGINT does the same, a second one at once, and raises KeyboardInterrupt.

    `greeting` is printed when requests are taken.
    """
    settings = uvicorn.Config(
        service.app, log_level="warning", access_log=False, timeout_graceful_shutdown=drain + _LAST_SECONDS
    )
    server = _Server(settings, service, drain, greeting)
    # Also what uvicorn puts back at its end, to raise the signal once more for it: so the process ends with status 0.
    signal.signal(signal.SIGTERM, server.handle_exit)
    # A script's background jobs start with SIGINT ignored; uvicorn heeds it all the same, but the status would be 0.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Or every now and then Python would look through all of it for garbage, which takes a tenth of a second.
    gc.collect()
    gc.freeze()
    server.run([listener])


class _Server(uvicorn.Server):
    def __init__(self, settings: uvicorn.Config, service: Service, drain: int, greeting: str) -> None:
        super().__init__(settings)
        self._service, self._drain, self._greeting = service, drain, greeting

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._drain, self._service.worker.drop_all)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves this out, but Python must not end while the engine's thread computes
            await self.lifespan.shutdown()
