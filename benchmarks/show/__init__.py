"""Output of results: on a terminal, as a page, in documents, and compared with another run."""
