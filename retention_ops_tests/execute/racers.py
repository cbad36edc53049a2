"""Sixteen processes that answer one date at the same moment: `python -m retention_ops_tests.execute.racers HOME URL DAY NOW`.

With `quiet` for the DAY and a number after NOW, so many say what there is to say on a quiet morning.

Everything is imported once and forked sixteen times: on two cores, sixteen imports would take half a minute.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from datetime import date, datetime
from pathlib import Path

from retention_ops.execute import quiet
from retention_ops_tests.execute.stage import FakeClock, Stage


def answer(home: str, url: str, day: str, now: str, number: int) -> None:
    stage = Stage(Path(home), FakeClock(datetime.fromisoformat(now)), {"ops_database_url": url, "health_channel": "C0HEALTH1"})
    # the clock stands still: a lease that no other process may lose by an impatient one
    responder = stage.responder(run_id=f"racer-{number}", sleep=lambda seconds: None, patience=0.0)
    if day == "quiet":
        quiet.tell(responder)
    else:
        row = responder.answer(date.fromisoformat(day))
        print(f"{number} {row['status']} {row['error_message']}")
    stage.close()


def main(home: str, url: str, day: str, now: str, racers: str = "16") -> None:
    with suppress(ImportError):
        import psycopg  # noqa: F401  loaded before the fork
    waiting, go = os.pipe()
    children = []
    for number in range(int(racers)):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(waiting, 1)
            try:
                answer(home, url, day, now, number)
            except BaseException as error:
                print(f"{number} {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    os.close(go)  # all start now
    sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main(*sys.argv[1:])
