"""What a few minutes on a GPU are spent on, in order of value; what is measured is kept after every section."""
