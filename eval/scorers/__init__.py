"""The benchmarks: how each reads its files, judges answers and computes its numbers.

A benchmark is one module or folder that exports `BENCHMARK`; `registry.py` lists them. None of these modules imports
torch, NumPy or NLTK before it is asked to score something.
"""
