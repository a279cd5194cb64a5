"""Benchmarks of the operators over `cnnkern.testing.CASES`, of whole models and of a call's overhead.

`python -m benchmarks` runs them all and writes a table, CSV, JSON and a chart; `pytest benchmarks` runs the same
measurements as plain pytest-benchmark tests.
"""
