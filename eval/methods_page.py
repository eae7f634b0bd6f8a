"""Run `report/methods_page.py` as `python -m vlm_fix.eval.methods_page`."""

from .report.methods_page import main

if __name__ == "__main__":
    main()
