"""Weights and data of the embedded reference task."""
