"""Driftbook: what parameter-efficient fine-tuning does to a model's safety and fairness, measured."""
