"""Evaluation: metrics by population, reports."""
