"""Pictures of a plan and of what was measured, for the report page and for model cards."""
