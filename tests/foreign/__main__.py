"""python -m tests.foreign [suite...]

Foreign suites, whole, each on a fresh local mount that fsck then reads: about half an hour in
all. Prints their figures and what is not as it should be; exit code 1 then.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.foreign.suites import DEVIATIONS, SUITES, judge
from tests.foreign.test_foreign import check
from tests.fuse.mounting import local_mount, scratch

IMAGE_BYTES = 8 << 30


def whole(suite: str) -> list[str]:
    """Run one suite; what is wrong."""
    begin = time.monotonic()
    with scratch() as directory:
        with local_mount(directory, image_bytes=IMAGE_BYTES) as mount:
            place = mount.path / "place"
            place.mkdir()
            result = SUITES[suite](place, True)
        check(directory / "image")
    wrong = judge(suite, result)
    print(f"{suite}: {time.monotonic() - begin:.0f} s, {len(wrong)} wrong", flush=True)
    print(*result.figures, *wrong, sep="\n", flush=True)
    for (of, name), reason in DEVIATIONS.items():
        if of == suite:
            print(f"expected of {name}: {reason}", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.foreign")
    parser.add_argument("suite", nargs="*", help=", ".join(SUITES))
    suites = parser.parse_args().suite or list(SUITES)
    unknown = sorted(set(suites) - set(SUITES))
    if unknown:
        parser.error(f"no such suite: {', '.join(unknown)}; there are {', '.join(SUITES)}")
    return 1 if sum(len(whole(suite)) for suite in suites) else 0


if __name__ == "__main__":
    sys.exit(main())
