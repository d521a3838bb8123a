"""The roof: the command line and what people see (run folders, tracking, results, figures)."""
