"""`python -m tests.soak`: 2,000 calls of random methods in one process; `python -m tests.soak --serve`: clients of a server."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--checked", type=int, default=200, metavar="N", help="answers held against a fresh process")
    parser.add_argument("--serve", action="store_true", help="vlm-fix serve instead, in an environment with vLLM")
    parser.add_argument("--minutes", type=float, default=10, help="of --serve")
    parser.add_argument("--clients", type=int, default=16, help="of --serve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        from . import serve

        return int(not serve.soak(args.minutes, args.clients, args.seed))
    from . import calls

    if args.again:
        print(calls.again(sys.stdin.read()))
        return 0
    return int(not calls.soak(args.calls, args.checked, args.seed))


if __name__ == "__main__":
    raise SystemExit(main())
