"""Benchmarks of the operators over `cnnkern.testing.CASES`, of whole models and of a call's overhead.

Three rooms: `suite` runs, `show` shows what ran, `studies` are programs of their own. `python -m benchmarks` runs the
suite and shows it; `pytest benchmarks` runs the same measurements as plain pytest-benchmark tests.
"""
