"""The report: what is in a run, as one HTML page."""
