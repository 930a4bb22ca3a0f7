"""What is wrong with an adapter, with training data, with a finished study."""
