"""The command line: words and tables."""
