"""Trained models measured on tasks by EleutherAI's lm-evaluation-harness."""
