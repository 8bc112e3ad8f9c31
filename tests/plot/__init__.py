"""Figures say what was given to them."""
