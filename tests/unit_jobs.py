"""Jobs for tests of worker processes, which import this file."""

import os
import pathlib
import signal
import time

from flip_jax.runtime import UserError
from flip_jax.tools import units
from flip_jax.tools.source_units import Place

RECORDS = 10


class Numbers(units.Job):
    """Sums the numbers of the records of each unit, and dies where it is told to."""

    def __init__(self, folder, at_record=(), at_unit=(), once=(), slow=(), error=None, unborn=False, seconds=0):
        """`at_record` and `slow` are (unit, number); at a unit in `once` only the first worker dies."""
        self.folder, self.at_record, self.at_unit, self.once = pathlib.Path(folder), at_record, at_unit, once
        self.slow, self.error, self.unborn, self.seconds = slow, error, unborn, seconds

    def open(self):
        if self.unborn:
            os._exit(7)

    def payload(self, unit):
        return f"payload of {unit}"

    def do(self, unit, payload, watch):
        assert payload == f"payload of {unit}"
        time.sleep(self.seconds)
        if unit in self.at_unit:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.error and unit == 2:
            raise {"user": UserError("refused"), "full": OSError(28, "No space left", "x"), "bug": TypeError("a bug")}[
                self.error
            ]
        records = (Place({"key": str(i)}, unit, i) for i in range(RECORDS))
        total, bad = 0, []
        for number, place, result in watch(lambda record: self.number(unit, record), records):
            assert int(place.record["key"]) == number
            total += result.result()
            if "bad" in place.record:
                bad.append([place.record["key"], place.record["bad"]])
        return {"read": RECORDS, "total": total, "bad": bad, "process": os.getpid()}

    def number(self, unit, record):
        number = int(record["key"])
        if "bad" in record:
            return 0
        if (unit, number) in self.at_record:
            os.kill(os.getpid(), signal.SIGKILL)
        if (unit, number) in self.slow:
            signal.setitimer(signal.ITIMER_PROF, 0.05)  # what is left of the time for a record
            while True:
                pass
        flag = self.folder / f"died-{unit}"
        if unit in self.once and number == 5 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number


class Sleeper(units.Job):
    """Writes its process number to a file and sleeps."""

    def __init__(self, folder):
        self.folder = folder

    def do(self, unit, payload, watch):
        (pathlib.Path(self.folder) / str(os.getpid())).touch()
        time.sleep(1000)
        return {}
