"""What knows no model: errors, units, files, messages."""
