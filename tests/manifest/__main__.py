"""Compares the outputs of this code with the manifest, or records them."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path

from tests.manifest.cases import cases
from tests.manifest.runner import Entries, Runner, differences, read_manifest, write_manifest


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.manifest")
    parser.add_argument("--only", metavar="PATTERN", default="", help="cases whose names match *PATTERN*")
    parser.add_argument("--write", action="store_true", help="record the outputs of this code")
    parser.add_argument("--check", action="store_true", help="compare (what it does by default)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--times", action="store_true", help="print the slowest cases")
    given = parser.parse_args()
    every = cases()
    chosen = [case for case in every if fnmatch(case.name, f"*{given.only}*")]
    if given.list:
        print(*(case.name for case in chosen), sep="\n")
        return 0
    manifest = read_manifest()
    written: dict[str, Entries] = {}
    seconds: dict[str, float] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        runner = Runner(Path(work))
        for case in chosen:
            started = time.monotonic()
            try:
                found = runner.run(case)
            except RuntimeError as error:
                failed += 1
                print(f"{case.name}: {error}", flush=True)
                continue
            seconds[case.name] = time.monotonic() - started
            if given.write:
                written[case.name] = found
            elif lines := differences(manifest.get(case.name, {}), found):
                failed += 1
                print(f"{case.name}:", *lines, sep="\n  ", flush=True)
    if given.write:
        known = {case.name for case in every}
        merged = read_manifest() | written
        write_manifest({name: entries for name, entries in merged.items() if name in known})
    if given.times:
        for name in sorted(seconds, key=lambda name: -seconds[name])[:40]:
            print(f"{seconds[name]:6.2f} s  {name}")
    print(f"{len(chosen)} cases in {sum(seconds.values()):.0f} s, {failed} of them differ or failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
