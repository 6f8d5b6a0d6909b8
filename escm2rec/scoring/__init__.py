"""Scoring: candidate logs in, predictions out."""
