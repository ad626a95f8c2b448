"""A model as headers and layers."""
