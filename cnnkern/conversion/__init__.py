"""Conversion of models that someone else wrote: `convert`, `revert`, `conversion_report`, `fold`."""
