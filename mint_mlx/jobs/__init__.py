"""One function for each thing that a user asks for."""
