"""Evaluate with Lightning: `python eval.py`, or `python eval.py --config configs/eval/...yaml`."""

import sys

from vistoken.cli.eval import main

if __name__ == "__main__":
    sys.exit(main())
