"""When Flower's SuperNode gives up its process ends, so that the site starts it again; test_faults has a real one."""

import subprocess
import sys

import pytest

from fedfuse_client.supernode import BEAT

PROGRAM = """
import sys, threading
from flwr.supernode.cli import flower_supernode as cli

def gives_up():
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection
    print("beats", heartbeat.HEARTBEAT_DEFAULT_INTERVAL, fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL)
    threading.Thread(target=threading.Event().wait).start()  # as its Runtime API does, which keeps serving
    {end}

sys.modules["flwr.supernode.cli.flower_supernode"].flower_supernode = gives_up
from fedfuse_client.supernode import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("raise OSError('EOF occurred in violation of protocol')", 1, "EOF occurred"),
        ("raise SystemExit(0)", 0, ""),
        ("return", 1, ""),
        # Flower's thread that sends heartbeats ends at the first answer it did not expect.
        (
            "threading.Thread(target=int, args=['no heartbeat']).start(); threading.Event().wait()",
            1,
            "no heartbeat",
        ),
    ],
)
def test_its_process_ends_whatever_still_runs_in_it(end, code, said):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert f"beats {BEAT} {BEAT}" in done.stdout
