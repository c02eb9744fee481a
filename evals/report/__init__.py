"""What a run found: tables, plots, a page, and the comparison of two runs."""
