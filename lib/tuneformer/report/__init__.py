"""What is said: run records, tables, figures and the page."""
