"""The report, published tables and figures, exports and licences."""
