"""Figures, in one palette and one style."""
