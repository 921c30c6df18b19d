"""Evaluation: accuracy, fidelity, cost and speed of wrapped models."""
