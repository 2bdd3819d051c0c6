"""`python -m tests.golden --write [ID…]`: keep the traces of these ids, or of all that have none yet."""

from __future__ import annotations

import argparse

from stem_gym.envs.registration import variant_files
from tests.golden import golden_file, write


def main() -> None:
    """Write what is asked; without --write, say what there is."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID")
    parser.add_argument("--write", action="store_true", help="write the traces")
    given = parser.parse_args()
    for id in given.ids or [id for id in variant_files() if not (given.write and golden_file(id).exists())]:
        if given.write:
            print(f"{write(id)} written")
        else:
            print(f"{id}: {'kept' if golden_file(id).exists() else 'no trace'}")


if __name__ == "__main__":
    main()
