"""Load a base model, attach adapters, score and generate."""
