"""Benchmarks of the operators over `cnnkern.testing.CASES`, of whole models and of a call's overhead.

`suite` times, `show` prints and publishes, `studies` are separate programs. `python -m benchmarks` runs the
suite and shows it; `pytest benchmarks` runs the same measurements as plain pytest-benchmark tests.
"""
