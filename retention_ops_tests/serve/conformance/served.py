"""Our server with the suite's fixtures on a port: `python -m retention_ops_tests.serve.conformance.served HOME PORT`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from retention_ops.serve.http import serve
from retention_ops.serve.server import build_server, open_desk
from retention_ops.settings import Settings
from retention_ops_tests.serve.conformance import fixtures

if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    home, port = Path(sys.argv[1]), int(sys.argv[2])
    with open_desk(lambda: Settings(_env_file=None, home=home)) as desk:
        serve(build_server(desk, more=fixtures.add), "127.0.0.1", port)
