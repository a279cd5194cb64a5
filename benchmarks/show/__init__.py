"""What shows rows: on a terminal, as a page, in documents, and beside those of another run."""
