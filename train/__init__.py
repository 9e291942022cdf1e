"""Training: from text to a model folder, with Accelerate. `python -m train CONFIG [key=value ...]`."""
