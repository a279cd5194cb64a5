"""Programs of their own, each an answer to one question: `python -m benchmarks.studies.NAME --help`."""
