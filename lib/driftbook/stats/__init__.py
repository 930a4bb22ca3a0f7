"""Scores with their influence, intervals, comparisons and mixed models."""
