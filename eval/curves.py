"""Run `report/curves.py` as `python -m vlm_fix.eval.curves`."""

from .report.curves import main

if __name__ == "__main__":
    main()
