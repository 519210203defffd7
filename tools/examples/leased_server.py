"""An inference server that knows nothing of mpmm, on a lease: it gets a share of memory that mpmm keeps free for it.

    mpmm run --mb 6000 --namespace inference -- python tools/examples/leased_server.py 8000
    curl 'localhost:8000/?text=to+be+or+not+to+be'

mpmm waits until that much memory is free, and evicts idle models for it. The environment tells the server the amount.
`mpmm run` passes signals on to the server, and frees the memory for others however the server ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Reverser:
    """Stands for a model, and for the cache that an engine makes as large as its share allows."""

    def __init__(self, mb: float) -> None:
        self.mb = mb

    def predict(self, text: str) -> str:
        """Return the text backwards."""
        return text[::-1]


class Handler(BaseHTTPRequestHandler):
    """Answers requests."""

    model: Reverser

    def do_GET(self) -> None:
        """Answer with the prediction."""
        answer = {"answer": self.model.predict(parse_qs(urlsplit(self.path).query)["text"][0]), "mb": self.model.mb}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({**answer, "server": os.getpid()}).encode())


def main(port: int) -> None:
    """Load the model, and serve until a signal ends this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # For engines that want a fraction of the device: MPMM_MEMORY_FRACTION; MPMM_DEVICES names the devices.
    Handler.model = Reverser(float(os.environ["MPMM_LEASE_MB"]))
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"serving on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
